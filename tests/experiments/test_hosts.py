"""An experiment in several processes: they stop together, end together, and go on in any number."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import vdiff as vd
from experiments import hosts as joining
from experiments import settings, training, vae
from tests.train import hosts

pytestmark = pytest.mark.slow
SETTINGS = "--num-steps 600 --log-every 25 --checkpoint-every 100 --eval-samples 10 --eval-images 50".split()


def arguments(directory, num_processes, *more):
    def of(port, i):
        several = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", num_processes, "--process-id", i]
        command = ["-m", "experiments.vae", "smoke", "--run-dir", directory, *SETTINGS, *more]
        return [*command, *several] if num_processes > 1 else command

    return of


def start(directory, num_processes, name, *more):
    log = directory.with_name(name)
    return hosts.start(num_processes, arguments(directory, num_processes, *more), log), log


def last_row(directory):
    """The step that was last told of."""
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def wait_for_a_step_after(directory, step, processes):
    """Wait until a later checkpoint is there, which is before the run ends."""
    deadline = time.monotonic() + 200
    while (vd.latest_step(directory / "checkpoints") or 0) <= step:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Two processes, of which one is told to stop; four, of which one is killed; one, to the end.

    The two split the state, the four have it whole, the last maps the step over its two devices: one run.
    """
    directory = tmp_path_factory.mktemp("several") / "run"
    processes, log = start(directory, 2, "two", "--parallel", "fsdp")
    wait_for_a_step_after(directory, 0, processes)
    processes[1].send_signal(signal.SIGTERM)
    told = hosts.wait(processes, log)
    stopped_at = vd.latest_step(directory / "checkpoints"), last_row(directory)

    processes, log = start(directory, 4, "four")
    wait_for_a_step_after(directory, stopped_at[0], processes)
    processes[2].kill()
    killed = hosts.wait(processes, log)
    killed_at = vd.latest_step(directory / "checkpoints"), last_row(directory)

    processes, log = start(directory, 1, "one", "--parallel", "pmap")
    return directory, told, stopped_at, killed, killed_at, hosts.wait(processes, log)


def test_all_stop_when_one_is_told_to(story):
    _, (codes, printed), stopped_at, *_ = story
    assert codes == [143, 143], printed
    assert 0 < stopped_at[0] == stopped_at[1] < 600  # nothing is lost
    assert all("stopped by signal 15; the same command goes on from here" in text for text in printed)
    assert "training" in printed[0] and "training" not in printed[1]  # one bar for all


def test_all_end_when_one_is_killed(story):
    _, _, stopped_at, (codes, printed), killed_at, _ = story
    assert f"resuming at step {stopped_at[0]} of 600" in printed[0]
    assert codes[2] == -signal.SIGKILL and all(code != 0 for code in codes), printed
    # In a collective they find the connection closed, or Gloo ends them; between two, JAX's own runtime does.
    said = ("another process of this run is gone", "another task died")
    assert any(line in text for i, text in enumerate(printed) if i != 2 for line in said), printed
    assert stopped_at[0] < killed_at[0] < 600 and killed_at[1] - killed_at[0] <= 100


def test_one_process_ends_what_two_and_four_began(story, tmp_path):
    directory, _, _, _, killed_at, (codes, printed) = story
    assert codes == [0], printed
    assert f"resuming at step {killed_at[0]} of 600" in printed[0]
    straight = subprocess.run(
        [sys.executable, *map(str, arguments(tmp_path / "run", 1)(0, 0))],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert straight.returncode == 0, straight.stderr
    ends = []
    for path in (directory, tmp_path / "run"):
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["step"] % 25 == 0] == list(range(25, 601, 25))
        ends.append(rows[-1])
    # Adam over 600 steps lets what rounding began grow a little.
    for name in ("objective", "reconstruction", "kl", "test_elbo"):
        np.testing.assert_allclose(ends[0][name], ends[1][name], rtol=1e-3)
    results = [json.loads((path / "result.json").read_text()) for path in (directory, tmp_path / "run")]
    values = [result["metrics"]["elbo"]["value"] for result in results]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-3)


def test_all_end_when_updates_are_skipped_and_keep_the_last_good_state(tmp_path):
    """The coordinator is found as Slurm's variables have it."""
    job = next(number for number in range(4096) if hosts.is_free(61440 + number))
    flags = ["--coordinator", "auto", "--learning-rate", "1e30", "--max-skips", 3]
    of_slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": 2}
    of_slurm |= {"SLURM_STEP_NUM_NODES": 1, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{61440 + job}"}

    def environment(i):
        variables = of_slurm | {"SLURM_PROCID": i, "SLURM_LOCALID": i}
        return {name: str(value) for name, value in variables.items()}

    command = [*arguments(tmp_path / "run", 1)(0, 0), *flags]
    processes = hosts.start(2, lambda port, i: command, tmp_path / "log", environment)
    codes, printed = hosts.wait(processes, tmp_path / "log")
    assert codes == [3, 3], printed
    assert "diverged" in printed[0] and "training" not in printed[1]
    config = dataclasses.replace(vae.PRESETS["smoke"][1], num_steps=600, learning_rate=1e30)
    like = vd.init_state(jax.random.key(0), vae.build(config).model, training.optimizer_of(config))
    state = vd.restore(tmp_path / "run/checkpoints", like)
    assert 0 < int(state.step) < 600 and all(
        np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params)
    )


def test_all_refuse_what_one_does(tmp_path):
    """The second process has no such file."""
    of = arguments(tmp_path / "run", 2)
    log = tmp_path / "log"
    more = lambda i: ["--data", tmp_path / "nothing.npz"] if i else []  # noqa: E731
    codes, printed = hosts.wait(hosts.start(2, lambda port, i: [*of(port, i), *more(i)], log), log)
    assert codes == [2, 2], printed
    assert "nothing.npz" in printed[1] and "another process of this run refused its input" in printed[0]


def test_none_waits_for_one_that_loses_its_data(tmp_path):
    """The second process's disk is gone in the middle of the run: it says so, and the first ends, too."""
    images = np.random.default_rng(0).integers(0, 256, (300, 4, 4), np.uint8)
    paths = [vd.data.write_shards(tmp_path / f"data-{i}", images, rows_per_shard=10) for i in (0, 1)]
    of = arguments(tmp_path / "run", 2, "--hidden", 8, "--likelihood", "logistic", "--batch-size", 32)
    log = tmp_path / "log"
    processes = hosts.start(2, lambda port, i: [*of(port, i), "--data", tmp_path / f"data-{i}"], log)
    wait_for_a_step_after(tmp_path / "run", 0, processes)
    began = time.monotonic()
    for path in paths[1]:
        path.unlink()
    codes, printed = hosts.wait(processes, log)
    assert codes[1] == 2 and "data-1" in printed[1] and codes[0] != 0, printed
    # Well before the five minutes for which JAX would let it wait.
    assert time.monotonic() - began < 120
    assert vd.latest_step(tmp_path / "run/checkpoints") >= 50


def test_a_run_directory_that_not_all_see_is_refused(tmp_path):
    """The second process has a disk of its own."""
    of = lambda port, i: arguments(tmp_path / f"disk-{i}/run", 2)(port, i)  # noqa: E731
    codes, printed = hosts.wait(hosts.start(2, of, tmp_path / "log"), tmp_path / "log")
    assert codes == [2, 2], printed
    line = "/run, which process 1 does not see, expected a disk that all share"
    assert all(line in text for text in printed), printed
    assert list((tmp_path / "disk-0/run").glob("*.tmp")) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((None, 2, None), "expected the three together"),
        (("auto", 2, 0), "expected the three together"),
        (("nowhere", 2, 0), "expected HOST:PORT of the first process, or auto"),
        (("127.0.0.1:1", 2, None), "this one's number from 0"),
        (("127.0.0.1:1", 2, 2), "this one's number from 0"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        joining.join(*flags)


def test_where_a_run_is_computed_is_not_what_it_is(tmp_path):
    """The flags of several processes are no settings of the run: another number of them goes on with it."""
    config = vae.PRESETS["smoke"][1]
    settings.record(config, tmp_path)
    several = dataclasses.replace(config, coordinator="127.0.0.1:1", num_processes=2, process_id=1)
    assert settings.differences(several, tmp_path) == {}
