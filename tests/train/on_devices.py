"""Save and restore on several devices, in a process: `python -m tests.train.on_devices save|restore DIRECTORY...`."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import vdiff as vd
from tests import tiny_run
from tests.train import tiny

MODEL = tiny_run.build(8)
STATES = {seed: vd.init_state(jax.random.key(seed), MODEL, optax.adam(1e-2)) for seed in (1, 2)}


def state(seed=1):
    """A state at step 7 with leaves besides the parameters, one to be split and one that cannot be."""
    chains = jax.random.normal(jax.random.key(seed), (16, 3))
    aux = {"chains": chains, "few": jnp.arange(3.0) + seed}
    return STATES[seed]._replace(step=jnp.int32(7), aux=aux)


def whole(tree):
    return jax.device_put(tree, NamedSharding(vd.data_mesh(), PartitionSpec()))


def split(tree):
    """Split the first axis that the devices divide, of every leaf that has one."""
    mesh, n = vd.data_mesh(), jax.device_count()

    def place(leaf):
        axis = next((i for i, size in enumerate(leaf.shape) if size % n == 0), None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    placed = jax.tree.map(place, tree)
    assert sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed)) >= 7
    return placed


def save(directory):
    """Save the state whole on each device and split over them."""
    vd.save(directory / "whole", whole(state()))
    vd.save(directory / "split", split(state()))


def restore(directory):
    """Restore what is there on one device, whole on each and split; bits and places are those asked for."""
    for saved in sorted(directory.iterdir()):
        for like in (state(seed=2), whole(state(seed=2)), split(state(seed=2))):
            restored = vd.restore(saved, like)
            tiny.equal(restored, state())
            for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
                assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim), saved
    print(f"{jax.device_count()} devices restored {len(list(directory.iterdir()))}")


if __name__ == "__main__":
    action, *directories = sys.argv[1:]
    for directory in directories:
        {"save": save, "restore": restore}[action](Path(directory))
