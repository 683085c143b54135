"""Restoring: every bit comes back, a resumed run is the run, damage is passed over and what is foreign refused."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import vdiff as vd
from tests import processes
from tests.train import tiny
from tests.train.on_devices import state as many
from tests.train.tiny import at, batches, build, equal, start
from vdiff.train import checksums


@pytest.fixture(scope="module")
def steps():
    made = {
        name: vd.make_train_step(tiny.MODEL.elbo_terms, tiny.OPTIMIZER, axis_name=name)
        for name in (None, "data")
    }
    return {"jit": vd.jit_step(made[None]), "pmap": vd.pmap_step(made["data"])}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, steps):
    """A directory with the checkpoints of steps 5 and 10, and the states there."""
    directory, states = tmp_path_factory.mktemp("run") / "checkpoints", {}
    with vd.checkpoint_every(5, directory, best="objective") as saving:
        copy = vd.Hook(5, lambda step, state, metrics: states.update({step: jax.tree.map(jnp.copy, state)}))
        vd.fit(start(), steps["jit"], batches, 10, hooks=[copy, saving])
    return directory, states


@pytest.fixture
def copied(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved[0], directory)
    return directory


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="checkpoint ")
        yield


def test_every_bit_comes_back(saved, steps):
    directory, states = saved
    like = start(seed=99)
    before = jax.tree.map(jnp.copy, like)
    restored = vd.restore(directory, like)
    equal(restored, states[10])
    equal(vd.restore(directory, like, step=5), states[5])
    equal(like, before)
    # From shapes alone, where a step says that they lie.
    shapes, at = jax.eval_shape(start), steps["jit"].shardings
    equal(vd.restore(directory, shapes, shardings=at), states[10])
    assert type(restored) is vd.TrainState and type(restored.params) is vd.Params
    assert jnp.issubdtype(restored.key.dtype, jax.dtypes.prng_key)
    assert int(restored.step) == 10 == vd.latest_step(directory)
    # What the bits are tested on is not trivial: trained parameters, away from their average.
    kernels = [
        np.asarray(p.theta["Dense_0"]["kernel"]) for p in (restored.params, restored.ema, before.params)
    ]
    assert np.all(kernels[0] != kernels[1]) and np.all(kernels[0] != kernels[2])


@pytest.mark.parametrize(("before", "after"), [("jit", "jit"), ("jit", "pmap"), ("pmap", "jit")])
def test_a_resumed_run_is_the_run(tmp_path, steps, before, after):
    """20 steps straight are 10, a restart and 10 more; on one device pmap computes the same bits too."""
    straight = vd.fit(start(), steps[before], batches, 20)
    vd.save(tmp_path, vd.fit(start(), steps[before], batches, 10))
    resumed = vd.restore(tmp_path, start(seed=99))
    equal(vd.fit(resumed, steps[after], batches, 20), straight)


def test_aux_comes_back(tmp_path):
    state = start()._replace(aux={"chains": jnp.arange(12).reshape(4, 3), "seen": jnp.array([True, False])})
    vd.save(tmp_path, state)
    like = start(seed=99)._replace(aux=jax.tree.map(jnp.zeros_like, state.aux))
    equal(vd.restore(tmp_path, like), state)


@pytest.mark.parametrize("kind", ["nnx", "equinox"])
def test_networks_of_other_libraries_are_saved(tmp_path, kind):
    """Lists of layers and modules as nodes: paths that are no plain dictionary of strings."""

    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 6, rngs=rngs)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    network = {
        "nnx": lambda: vd.nets.from_nnx(Stack),
        "equinox": lambda: vd.nets.from_equinox(lambda key: eqx.nn.MLP(6, 6, 5, 2, key=key)),
    }[kind]()
    model = vd.Model(lambda key: vd.Params(theta=network.init(key)), *[None] * 4)
    state = start(model)
    vd.save(tmp_path, state)
    restored = vd.restore(tmp_path, start(model, seed=99))
    equal(restored, state)
    x = jnp.arange(6.0)
    np.testing.assert_array_equal(
        network.apply(restored.params.theta, x), network.apply(state.params.theta, x)
    )


def test_no_checkpoint(tmp_path, saved):
    absent = tmp_path / "absent"
    assert vd.latest_step(absent) is None and vd.saved_steps(absent) == [] and not absent.exists()
    assert vd.best_step(absent, "score") is vd.best_step(tmp_path, "score") is None
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    assert vd.latest_step(tmp_path) is None
    for directory in (absent, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"directory: got {directory}, expected a folder with"):
            vd.restore(directory, start())
    with pytest.raises(FileNotFoundError, match=r"step: got 7, expected one that .* holds: \[5, 10\]"):
        vd.restore(saved[0], start(), step=7)


def test_another_model_or_optimizer_is_refused_by_name(saved):
    """The line names the first leaf that differs, what was saved and what was expected; an older one is not tried."""
    directory, _ = saved
    half = start()
    half = half._replace(ema=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), half.ema))
    others = {
        r"ema\.lam\.Dense_0\.bias is float32\[5\]\), expected float32\[7\]": start(build(hidden=(7,))),
        r"ema\.lam\.Dense_0\.bias is float32\[5\]\), expected bfloat16\[5\]": half,
        r"opt_state\..*count is int32\[\]\), expected nothing": start(optimizer=optax.sgd(1e-2)),
        r"aux is nothing\), expected float32\[4\]": start()._replace(aux=jnp.zeros(4)),
    }
    for pattern, like in others.items():
        with pytest.raises(ValueError, match=pattern) as error:
            vd.restore(directory, like)
        assert str(directory / "10") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [tiny.truncate, tiny.flip, tiny.empty, tiny.delete])
def test_whichever_file_is_damaged_the_checkpoint_before_is_taken(saved, copied, damage):
    """Every file of the newest in turn; one line says which checkpoint was skipped, and for which file."""
    folder, whole = copied / "10", saved[0] / "10"
    names = tiny.files_of(whole)
    assert "manifest.json" in names and "_CHECKPOINT_METADATA" in names and len(names) > 7
    for name in names:
        if (whole / name).stat().st_size == 0:
            continue
        damage(folder / name)
        lines = []
        equal(vd.restore(copied, start(), on_skip=lines.append), saved[1][5])
        how = "missing" if damage is tiny.delete else "not as it was saved"
        assert lines == [f"checkpoint {folder} is damaged and was skipped: {name} is {how}"]
        with pytest.raises(ValueError, match=f"no checkpoint is whole .10: {name} is {how}.*leave step out"):
            vd.restore(copied, start(), step=10)
        shutil.copy(whole / name, folder / name)
    equal(vd.restore(copied, start()), saved[1][10])


def test_a_skip_is_a_warning_unless_told_otherwise(saved, copied):
    shutil.rmtree(copied / "10")
    (copied / "10").mkdir()
    with pytest.warns(
        UserWarning, match="checkpoint .*/10 is damaged and was skipped: manifest.json is miss"
    ):
        equal(vd.restore(copied, start()), saved[1][5])


def test_when_none_is_whole_each_is_named(copied):
    tiny.delete(copied / "10/manifest.json")
    tiny.flip(copied / "5/default/_METADATA")
    lines = []
    with pytest.raises(ValueError, match="no checkpoint is whole") as error:
        vd.restore(copied, start(), on_skip=lines.append)
    assert "(10: manifest.json is missing; 5: default/_METADATA is not as it was saved)" in str(error.value)
    assert "\n" not in str(error.value) and len(lines) == 2
    assert tiny.names_in(copied) == {"5", "10"}


def test_a_resume_from_the_one_before_ends_at_the_same_bits(saved, copied, steps):
    tiny.flip(copied / "10/manifest.json")
    state = vd.restore(copied, start(), on_skip=lambda line: None)
    with vd.checkpoint_every(5, copied) as saving:
        vd.fit(state, steps["jit"], batches, 10, hooks=[saving])
    equal(vd.restore(copied, start()), saved[1][10])


def test_a_folder_left_by_a_killed_save_is_ignored(saved, copied):
    """Orbax renames a checkpoint when it is whole; one under its temporary name is no checkpoint."""
    shutil.copytree(copied / "10", copied / "15.orbax-checkpoint-tmp")
    assert vd.latest_step(copied) == 10
    equal(vd.restore(copied, start()), saved[1][10])


def test_killed_right_after_the_commit(saved, copied):
    """The manifest does not list Orbax's two last notes yet: whole, whatever they are."""
    path = copied / "10/manifest.json"
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        assert name in json.loads(path.read_text())["files"]
        (copied / "10" / name).rename(copied / name)
    checksums.write_manifest(copied / "10", 2)
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        shutil.move(copied / name, copied / "10" / name)
        equal(vd.restore(copied, start()), saved[1][10])
        tiny.empty(copied / "10" / name)
        equal(vd.restore(copied, start()), saved[1][10])


def test_a_newer_format_is_refused_and_no_older_checkpoint_taken(copied):
    checksums.write_manifest(copied / "10", 99)
    with pytest.raises(
        ValueError, match=r"/10: got format 99, expected at most 2; .* upgrade vdiff$"
    ) as error:
        vd.restore(copied, start())
    assert "\n" not in str(error.value)


class FirstState(NamedTuple):
    """The state before there was a guard."""

    step: Any
    params: Any
    ema: Any
    opt_state: Any
    key: Any
    aux: Any = ()


@pytest.mark.parametrize("has_guard", [False, True])
def test_the_first_format_is_read(tmp_path, has_guard):
    """Checksums in a file of their own, no manifest, and no guard until its last days."""
    skipped = jax.tree.map(lambda leaf: jnp.asarray(leaf) + 3, start().guard)
    for step in (5, 10):
        folder, state = tmp_path / str(step), at(step)._replace(guard=skipped)
        with ocp.StandardCheckpointer() as writer:
            writer.save(folder / "default", state if has_guard else FirstState(*state[:6]))
        checksums.write_manifest(folder, 1)
        sums = json.loads((folder / "manifest.json").read_text())["files"]
        (folder / "manifest.json").unlink()
        (folder / "sha256.json").write_text(json.dumps(sums))
    expected = skipped if has_guard else start().guard
    equal(vd.restore(tmp_path, start(seed=2)), at(10)._replace(guard=expected))
    shardings = vd.jit_step(vd.make_train_step(tiny.MODEL.elbo_terms, tiny.OPTIMIZER)).shardings
    equal(vd.restore(tmp_path, jax.eval_shape(start), shardings=shardings), at(10)._replace(guard=expected))
    tiny.flip(tmp_path / "10/default/_METADATA")
    lines = []
    equal(vd.restore(tmp_path, start(), on_skip=lines.append), at(5)._replace(guard=expected))
    assert "default/_METADATA is not as it was saved" in lines[0]


def test_best_step_passes_over_what_is_damaged(tmp_path):
    with vd.checkpoint_every(1, tmp_path, best="score") as saving:
        for i, score in ((1, -2.0), (2, -1.0), (3, -3.0)):
            saving.call(i, at(i), {"score": score})
    assert vd.best_step(tmp_path, "score") == 2 and vd.best_step(tmp_path, "other") is None
    tiny.truncate(tmp_path / "2/default/_METADATA")
    assert vd.best_step(tmp_path, "score") == 1


def on_devices(num_devices, action, *directories):
    command = [sys.executable, "-m", "tests.train.on_devices", action, *map(str, directories)]
    root, environment = Path(__file__).parents[2], processes.with_devices(num_devices)
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_saved_on_some_devices_restored_on_others_in_any_placement(tmp_path):
    """On one device, whole on each or split over them: eight to one and two, one to two, two to eight."""
    on_devices(8, "save", tmp_path / "8")
    on_devices(2, "save", tmp_path / "2")
    vd.save(tmp_path / "1/one", many())
    for saved in ("2/whole", "2/split", "8/whole", "8/split"):
        equal(vd.restore(tmp_path / saved, many(seed=2)), many())
    assert on_devices(2, "restore", tmp_path / "1", tmp_path / "8") == [
        f"2 devices restored {n}" for n in (1, 2)
    ]
    assert on_devices(8, "restore", tmp_path / "2") == ["8 devices restored 2"]
