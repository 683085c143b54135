"""What is counted in a step, against what is known of it."""

import jax
import numpy as np
import pytest

import vdiff as vd
from experiments import scaling


@pytest.fixture(scope="module")
def small():
    model, objective = scaling.parts((8, 8, 1), width=16, depth=1, heads=2)
    return scaling.abstract(model), vd.make_train_step(objective, scaling.OPTIMIZER)


def test_a_step_reduces_each_parameter_once(small):
    """Four bytes each, and four of the one term."""
    state, step = small
    batch = jax.ShapeDtypeStruct((1, jax.device_count(), 8, 8, 1), np.float32)
    num = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert scaling.reduced_bytes(vd.jit_step(step, vd.data_mesh()), state, batch) == 4 * num + 4


def test_a_device_holds_its_slice(small):
    """Of leaves with 1,024 numbers; the width, 16, has no part in 3."""
    state, _ = small
    leaves = jax.tree.leaves(state)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    large = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.size >= 1024)
    assert scaling.held_bytes(state, 1, 1) == whole
    assert scaling.held_bytes(state, 2, 1) == whole - large / 2
    assert scaling.held_bytes(state, 5, 1) == whole


def test_the_batch_that_hides_the_all_reduce():
    """2 x 7/8 x 100 bytes at 10 bytes/s are 17.5 s; a datum's way back, 2/3 x 30 FLOP at half of 10 FLOP/s, 4 s."""
    config = scaling.Config(peak=10.0, bandwidth=10.0, utilization=0.5)
    row = scaling.scale(config, {"bytes reduced": 100, "FLOPs of a datum": 30}, vd.TrainState(*[()] * 5))[0]
    assert row[:4] == ["8", "17500.0", "5", "40"]
