"""Two and four processes with two devices each compute what one process with one device does."""

import functools
import json

import jax
import numpy as np
import pytest

import vdiff as vd
from tests.states import leaves_of, small_vae
from tests.train import hosts
from tests.train.host_program import CASES, OPTIMIZERS, trained
from vdiff.train.hosts import from_first, is_first, largest, on_one_device

pytestmark = pytest.mark.slow
# Each leaf's distance over its norm, after 20 steps.
LARGEST_DISTANCE = 2e-6


@functools.cache
def alone(optimizer):
    """What one process computes on one device."""
    model, images = small_vae()
    _, state, rows = trained(model, images, OPTIMIZERS[optimizer], vd.jit_step)
    return leaves_of(state), rows


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def together(request, tmp_path_factory):
    """What each of several processes found."""
    path = tmp_path_factory.mktemp("hosts") / "found"
    log = path.with_name("log")
    arguments = lambda port, i: ("-m", "tests.train.host_program", port, request.param, i, path)  # noqa: E731
    codes, printed = hosts.wait(hosts.start(request.param, arguments, log), log)
    assert codes == [0] * request.param, "\n".join(printed)
    arrays = [dict(np.load(f"{path}-{i}.npz")) for i in range(request.param)]
    with_facts = [json.loads(path.with_name(f"found-{i}.json").read_text()) for i in range(request.param)]
    return request.param, arrays, with_facts


def test_several_processes_compute_what_one_does(together):
    num, arrays, facts = together
    for mode, optimizer, parts in CASES[num]:
        case, (expected, rows) = f"{mode} {optimizer} {parts}", alone(optimizer)
        for found, fact in zip(arrays, facts, strict=True):
            for name, value in expected.items():
                other = found[f"{case} {name}"]
                gap = np.linalg.norm(np.float64(other) - np.float64(value))
                assert other.dtype == value.dtype
                assert gap <= LARGEST_DISTANCE * max(np.linalg.norm(np.float64(value)), 1e-30), (case, name)
            metrics = fact["metrics"][case]
            assert metrics.keys() == rows[-1].keys()
            for name, value in rows[-1].items():
                np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=case)


def test_all_processes_hold_the_same_bits(together):
    _, arrays, _ = together
    for other in arrays[1:]:
        for name, value in arrays[0].items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_processes_agree_and_one_is_first(together):
    num, _, facts = together
    for i, fact in enumerate(facts):
        assert fact["num_devices"] == [2 * num, 2]
        assert fact["largest"] == [10 * (num - 1), 0]
        assert fact["from first"] == 7
        assert fact["is_first"] == (i == 0)
        assert fact["alone"]


def test_what_is_split_is_gathered_by_one_program_a_shape(together):
    """Compiled at the first call: a few, as params, ema and Adam's moments have leaves of the same shapes."""
    _, _, facts = together
    for fact in facts:
        assert fact["split"] > 0 and 0 < fact["compiled for gathering"] < fact["split"]
        assert fact["compiled for gathering again"] == 0


def test_the_first_process_chooses_what_all_restore(together):
    """From shapes, into the split state; the others sum no files."""
    _, _, facts = together
    assert [fact["restored, sums"] for fact in facts] == [[True, i == 0] for i in range(len(facts))]
    for i, fact in enumerate(facts):
        assert "whose step 20 not every process sees; expected a disk" in fact["refused"]["elsewhere"]
        of_first = "expected a folder with a saved checkpoint; start the run anew"
        of_others = "of which the first process restores nothing, and says why"
        assert fact["refused"]["nowhere"].endswith(of_others if i else of_first)


def test_a_batch_that_does_not_divide_is_refused_in_numbers_of_the_whole(together):
    num, _, facts = together
    for fact in facts:
        line = fact["refused"]["batch"]
        assert f"got {3 * num} data for {2 * num} devices" in line
        assert f"use a batch size of {2 * num} or {4 * num}" in line


def test_devices_of_two_processes_do_not_share_features(together):
    """Each would give them its own rows of the batch, for the same data."""
    num, _, facts = together
    for fact in facts:
        assert fact["refused"]["model"].endswith(
            f"got {2 * num} for {2 * num} devices in {num} processes, expected a divisor of the devices of each; "
            "use one of 1, 2"
        )
        assert fact["refused"]["across"] is not None


def test_one_process_asks_nobody():
    assert is_first() and largest(-3) == from_first(-3) == -3
    tree = {"x": np.arange(3.0), "key": jax.random.key(1)}
    assert all(on_one_device(tree)[name] is tree[name] for name in tree)
