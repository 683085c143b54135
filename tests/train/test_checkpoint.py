"""Checkpoints: every bit comes back, a resumed run is the run, and a damaged or foreign one is refused."""

import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import vdiff as vd

LATENT_DIM, SHAPE = 2, (3, 2)


def build(hidden=(5,), network=vd.nets.mlp):
    return vd.vae(
        network(SHAPE, (2 * LATENT_DIM,), hidden=hidden),
        network((LATENT_DIM,), SHAPE, hidden=hidden),
        latent_dim=LATENT_DIM,
        likelihood=vd.likelihoods.bernoulli(),
    )


MODEL, OPTIMIZER = build(), optax.adam(1e-2)


def start(model=MODEL, optimizer=OPTIMIZER, seed=1):
    return vd.init_state(jax.random.key(seed), model, optimizer)


def batches(step):
    return np.random.default_rng((5, step)).integers(0, 2, size=(4, *SHAPE)).astype(np.uint8)


def equal(one, other):
    """Same structure, same dtypes, same bits; keys by their data."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def steps():
    made = {name: vd.make_train_step(MODEL.elbo_terms, OPTIMIZER, axis_name=name) for name in (None, "data")}
    return {"jit": vd.jit_step(made[None]), "pmap": vd.pmap_step(made["data"])}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, steps):
    """A directory with the checkpoints of steps 5 and 10, and the state at 10."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    state = vd.fit(start(), steps["jit"], batches, 10, hooks=[vd.checkpoint_every(5, directory)])
    return directory, state


@pytest.fixture
def copied(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved[0], directory)
    return directory


def test_every_bit_comes_back(saved):
    directory, state = saved
    like = start(seed=99)
    before = jax.tree.map(jnp.copy, like)
    restored = vd.restore(directory, like)
    equal(restored, state)
    equal(like, before)
    assert type(restored) is vd.TrainState and type(restored.params) is vd.Params
    assert jnp.issubdtype(restored.key.dtype, jax.dtypes.prng_key)
    assert int(restored.step) == 10 == vd.latest_step(directory)
    # What the bits are tested on is not trivial: trained parameters, away from their average.
    kernels = [np.asarray(p.theta["Dense_0"]["kernel"]) for p in (state.params, state.ema, before.params)]
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


def test_no_checkpoint(tmp_path):
    absent = tmp_path / "absent"
    assert vd.latest_step(absent) is None and not absent.exists()
    assert vd.latest_step(tmp_path) is None
    for directory in (absent, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"directory: got {directory}, expected a folder with"):
            vd.restore(directory, start())


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        vd.save(tmp_path, start(seed=step)._replace(step=jnp.int32(step)), max_to_keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]
    assert vd.latest_step(tmp_path) == 5
    equal(vd.restore(tmp_path, start()), start(seed=5)._replace(step=jnp.int32(5)))


def test_a_saved_step_stays_as_it_is(tmp_path):
    first, second = (start(seed=seed)._replace(step=jnp.int32(3)) for seed in (1, 2))
    vd.save(tmp_path, first)
    vd.save(tmp_path, second)
    equal(vd.restore(tmp_path, second), first)


def test_a_step_before_the_newest_is_refused(tmp_path):
    """A new run in an old run's directory: a resume would go on from the old one, so say it at once."""
    late, early = (start(seed=step)._replace(step=jnp.int32(step)) for step in (10, 5))
    vd.save(tmp_path, late)
    with pytest.raises(ValueError, match=f"directory: got {tmp_path}.* step 10") as error:
        vd.save(tmp_path, early)
    assert "\n" not in str(error.value)
    equal(vd.restore(tmp_path, start()), late)


def test_checkpoint_every_saves_its_steps_and_the_last(tmp_path, steps):
    hook = vd.checkpoint_every(4, tmp_path, max_to_keep=10)
    state = vd.fit(start(), steps["jit"], batches, 10, hooks=[hook])
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 8, 10]
    equal(vd.restore(tmp_path, start()), state)


def test_another_model_or_optimizer_is_refused_by_name(saved):
    """The line names the first leaf that differs, what was saved and what was expected."""
    directory, _ = saved
    others = {
        r"ema\.lam\.Dense_0\.bias has shape \(5,\)\), expected \(7,\)": start(build(hidden=(7,))),
        r"opt_state\..*count has shape \(\)\), expected nothing": start(optimizer=optax.sgd(1e-2)),
        r"aux has shape nothing\), expected \(4,\)": start()._replace(aux=jnp.zeros(4)),
    }
    for pattern, like in others.items():
        with pytest.raises(ValueError, match=pattern) as error:
            vd.restore(directory, like)
        assert str(directory / "10") in str(error.value) and "\n" not in str(error.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, empty, delete])
def test_each_damaged_file_is_one_clear_error(saved, copied, damage):
    """Every file of the checkpoint in turn: one line, with the folder, the file and what to do."""
    folder, whole = copied / "10", saved[0] / "10"
    names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    assert "sha256.json" in names and len(names) > 5
    for name in names:
        if (whole / name).stat().st_size == 0:
            continue
        damage(folder / name)
        if damage is delete and name == "sha256.json":
            equal(vd.restore(copied, start()), saved[1])  # killed before it was written: still whole
        else:
            with pytest.raises(ValueError, match="got unreadable files") as error:
                vd.restore(copied, start())
            message = str(error.value)
            assert message.startswith(f"checkpoint {folder}: ")
            assert name in message or name == "sha256.json"  # a flipped digit there accuses the other file
            assert "move this folder away" in message and "\n" not in message and len(message) < 600
        shutil.copy(whole / name, folder / name)
    equal(vd.restore(copied, start()), saved[1])


def test_damage_without_checksums_is_refused_or_harmless(saved, copied):
    """Killed before the checksums were written: what Orbax cannot read is the same clear error."""
    folder, whole = copied / "10", saved[0] / "10"
    (folder / "sha256.json").unlink()
    num_refused = 0
    for path in sorted(p for p in whole.rglob("*") if p.is_file() and p.name != "sha256.json"):
        damaged = folder / path.relative_to(whole)
        truncate(damaged)
        try:
            equal(vd.restore(copied, start()), saved[1])
        except ValueError as error:
            num_refused += 1
            assert str(error).startswith(f"checkpoint {folder}: ") and "\n" not in str(error)
        shutil.copy(path, damaged)
    assert num_refused >= 3


def test_an_extra_file_is_refused_and_an_empty_folder_too(copied):
    (copied / "10" / "extra").write_text("")
    with pytest.raises(ValueError, match="extra is not as it was saved"):
        vd.restore(copied, start())
    shutil.rmtree(copied / "10")
    (copied / "10").mkdir()
    with pytest.raises(ValueError, match=f"checkpoint {copied / '10'}: got unreadable files"):
        vd.restore(copied, start())


def test_the_way_out_that_the_error_names_works(saved, copied, steps):
    """Move the damaged folder away, and the one before resumes, to the same end."""
    flip(copied / "10" / "sha256.json")
    with pytest.raises(ValueError, match="move this folder away to resume from the one before"):
        vd.restore(copied, start())
    shutil.move(copied / "10", copied.parent / "away")
    assert vd.latest_step(copied) == 5
    state = vd.fit(vd.restore(copied, start()), steps["jit"], batches, 10)
    equal(state, saved[1])
    vd.save(copied, state)
    equal(vd.restore(copied, start()), saved[1])


def test_a_folder_left_by_a_killed_save_is_ignored(saved, copied, steps):
    """Orbax renames a checkpoint when it is whole; half of one under its temporary name is no checkpoint."""
    temporary = copied / "15.orbax-checkpoint-tmp"
    shutil.copytree(copied / "10", temporary)
    (temporary / "_CHECKPOINT_METADATA").unlink()
    assert vd.latest_step(copied) == 10
    state = vd.restore(copied, start())
    equal(state, saved[1])
    state = vd.fit(state, steps["jit"], batches, 15)
    vd.save(copied, state)
    equal(vd.restore(copied, start()), state)
    assert json.loads((copied / "15" / "sha256.json").read_text())
