"""Where the leaves of a state lie, on the devices that this process has; test_modes.py has eight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import vdiff as vd
from vdiff.train import sharding


def test_a_leaf_is_put_where_it_belongs_once():
    mesh = vd.data_mesh()
    there = NamedSharding(mesh, PartitionSpec())
    host = np.arange(4, dtype=np.float32)
    leaf = sharding.placed(host, there)
    assert leaf.sharding == there and sharding.placed(leaf, there) is leaf
    np.testing.assert_array_equal(leaf, host)
    key = jax.random.key(3)
    moved = sharding.placed(key, there)
    assert moved.dtype == key.dtype and moved.sharding.is_equivalent_to(there, 0)
    np.testing.assert_array_equal(jax.random.key_data(moved), jax.random.key_data(key))


def test_specs_say_which_axis_is_split():
    assert sharding.split_axis(PartitionSpec()) == -1
    assert sharding.split_axis(PartitionSpec("model")) == -1
    assert sharding.split_axis(PartitionSpec("data")) == 0
    assert sharding.split_axis(PartitionSpec(None, "model", "data")) == 2
    assert sharding.whole(".params", (8, 8)) == PartitionSpec()


def test_each_rule_finds_the_two_layers_of_a_block():
    """By the names that Flax gives them: the first layer is split by its outputs, the second by as many inputs."""
    networks = (
        vd.nets.dit((8, 8, 1), width=32, depth=2, heads=2),
        vd.nets.unet((8, 8, 1), features=(24, 48)),
    )
    shapes = {}
    for network in networks:
        tree = vd.Params(theta=jax.eval_shape(network.init, jax.random.key(0)))
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        shapes |= {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
    found = [
        [shape[axis] for path, shape in shapes.items() if re.search(name, path)]
        for pattern, axis in sharding.RULES
        for name in pattern.split("|")
    ]
    # A transformer's blocks; then those of the U-Net, down and up.
    assert found == [[128, 128], [24, 48, 48, 48, 24]] * 2
    by_rules = sharding.by_rules(AbstractMesh((1, 2), ("data", "model")))
    assert sum("model" in by_rules(path, shape) for path, shape in shapes.items()) == 14


def test_aux_is_split_as_the_batch():
    zero = jnp.zeros(())
    state = vd.TrainState(zero, {"w": zero}, {"w": zero}, (), zero, aux={"chains": jnp.zeros((8, 3))})
    specs = sharding.state_specs(state, lambda path, shape: PartitionSpec("model" if "w" in path else None))
    assert specs.params == specs.ema == {"w": PartitionSpec("model")}
    assert specs.aux == {"chains": PartitionSpec("data")} and specs.opt_state == ()
