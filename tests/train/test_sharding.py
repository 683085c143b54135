"""Where the leaves of a state lie, on the devices that this process has; test_modes.py has eight."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

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


def test_aux_is_split_as_the_batch():
    zero = jnp.zeros(())
    state = vd.TrainState(zero, {"w": zero}, {"w": zero}, (), zero, aux={"chains": jnp.zeros((8, 3))})
    specs = sharding.state_specs(state, lambda path, shape: PartitionSpec("model" if "w" in path else None))
    assert specs.params == specs.ema == {"w": PartitionSpec("model")}
    assert specs.aux == {"chains": PartitionSpec("data")} and specs.opt_state == ()
