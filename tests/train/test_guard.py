"""A step from a number that is none is not made: the run is the one in which that step was left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from vdiff.train.guard import Guard, leaf_names, unguarded

OPTIMIZER = optax.adam(0.05)
POISONED = 3


def objective(key, params, x):
    """Two terms; the noise makes a wrong step number show."""
    noisy = x["y"] + 0.1 * jax.random.normal(key, (3,))
    fit = -jnp.sum(jnp.square(noisy - params.theta["loc"]))
    return {"fit": fit, "pull": jnp.sum(x["pull"] * jnp.sqrt(params.theta["scale"]))}


def start():
    theta = {"loc": jnp.zeros(3), "scale": jnp.ones(2)}
    return vd.init_state(
        jax.random.key(0), vd.Model(lambda key: vd.Params(theta=theta), *[None] * 4), OPTIMIZER
    )


def batches(step):
    rng = np.random.default_rng((7, step))
    return {"y": rng.normal(size=(4, 3)).astype(np.float32), "pull": np.ones(4, np.float32)}


def poisoned(step, *, name="y", value=np.nan, at=(POISONED,)):
    """One number of one datum is not finite at some steps."""
    batch = batches(step)
    if step in at:
        batch[name][(1,) * batch[name].ndim] = value
    return batch


def numbers(state):
    """All leaves but the guard's."""
    leaves = jax.tree.leaves(state._replace(guard=(), key=jax.random.key_data(state.key)))
    return [np.asarray(leaf) for leaf in leaves]


def equal(one, other):
    for a, b in zip(numbers(one), numbers(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@functools.cache
def compiled(mode="plain", **settings):
    axis_name = "data" if mode == "pmap" else None
    step = vd.make_train_step(objective, OPTIMIZER, axis_name=axis_name, **settings)
    if mode == "pmap":
        return vd.pmap_step(step)
    return vd.jit_step(step, vd.data_mesh() if mode == "mesh" else None)


def left_out(step, num_steps, at=(POISONED,)):
    """Train by hand, and where a batch is poisoned only count the step."""
    state = start()
    for i in range(num_steps):
        if i in at:
            state = state._replace(step=state.step + 1)
        else:
            state, _ = step(state, batches(i))
    return state


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.parametrize("mode", ["plain", "mesh", "pmap"])
def test_a_poisoned_batch_is_a_step_left_out(mode, steps_per_call, value):
    step = compiled(mode)
    state = vd.fit(start(), step, lambda i: poisoned(i, value=value), 9, steps_per_call=steps_per_call)
    if steps_per_call == 1:
        equal(state, left_out(step, 9))
    else:  # another program, a loop: but for its rounding
        for got, expected in zip(numbers(state), numbers(left_out(step, 9)), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    # Counted from 1, as a log does.
    assert [int(count) for count in state.guard[:3]] == [1, 0, POISONED + 1]
    assert all(np.all(np.isfinite(leaf)) for leaf in numbers(state) if leaf.dtype == np.float32)


def test_without_the_guard_the_same_batch_ends_the_run():
    state = vd.fit(start(), compiled(guard=unguarded), poisoned, 9)
    # Adam goes by coordinate, and only the poisoned one is lost.
    np.testing.assert_array_equal(np.isnan(state.params.theta["loc"]), [False, True, False])
    assert int(state.guard.num_skipped) == 0


def test_a_run_without_a_skip_is_the_unguarded_run():
    one, other = (
        vd.fit(start(), compiled(**settings), batches, 9) for settings in ({}, {"guard": unguarded})
    )
    for a, b in zip(numbers(one), numbers(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert [int(count) for count in one.guard] == [0] * 5


def test_skips_in_a_row_are_counted_and_an_update_ends_the_row():
    step, state, seen = compiled(), start(), []
    for i in range(9):
        state, metrics = step(state, poisoned(i, at=(1, 4, 5, 6)))
        seen.append((int(state.guard.num_skipped), int(state.guard.num_in_a_row), int(metrics["skipped"])))
    assert seen == [
        (0, 0, 0),
        (1, 1, 1),
        (1, 0, 0),
        (1, 0, 0),
        (2, 1, 1),
        (3, 2, 1),
        (4, 3, 1),
        (4, 0, 0),
        (4, 0, 0),
    ]
    assert int(state.guard.step) == 7 and int(state.step) == 9


def test_the_leaf_is_the_one_whose_gradient_is_not_finite():
    """The root of a scale of zero: its value is finite, its gradient infinite, and only there."""
    names = leaf_names(start().params)
    assert names == ["theta.loc", "theta.scale"]
    state = start()
    # The gradient of sqrt at 0 is infinite.
    state = state._replace(params=vd.Params(theta={"loc": jnp.zeros(3), "scale": jnp.array([1.0, 0.0])}))
    new, metrics = compiled()(jax.tree.map(jnp.copy, state), batches(0))
    assert np.isfinite(metrics["objective"]) and np.isinf(metrics["grad_norm"])
    assert names[int(new.guard.leaf)] == "theta.scale" and int(new.guard.num_leaves) == 1
    equal(new, state._replace(step=jnp.int32(1)))


def test_a_loss_that_is_not_finite_is_enough():
    """A term that no parameter reaches: every gradient is finite, and no leaf is accused."""
    step = vd.jit_step(
        vd.make_train_step(
            lambda key, params, x: {"fit": -jnp.sum(params.theta), "log": jnp.log(x)}, OPTIMIZER
        )
    )
    model = vd.Model(lambda key: vd.Params(theta=jnp.ones(2)), *[None] * 4)
    state = vd.init_state(jax.random.key(0), model, OPTIMIZER)
    new, metrics = step(state, np.array([1.0, 0.0], np.float32))
    assert float(metrics["log"]) == -np.inf and float(metrics["skipped"]) == 1
    np.testing.assert_array_equal(new.params.theta, [1.0, 1.0])
    assert int(new.guard.num_leaves) == 0 and int(new.guard.num_skipped) == 1


def test_a_gradient_whose_square_overflows_is_skipped():
    """1e20 is finite, its square is not: Adam's second moment would be infinite for ever."""
    step = vd.make_train_step(lambda key, params, x: {"fit": jnp.sum(params.theta * x)}, OPTIMIZER)
    model = vd.Model(lambda key: vd.Params(theta=jnp.zeros(1)), *[None] * 4)
    for size, is_skipped in ((1e18, False), (1e20, True)):
        state = vd.init_state(jax.random.key(0), model, OPTIMIZER)
        new, metrics = step(state, jnp.full((2, 1), size))
        assert bool(metrics["skipped"]) is is_skipped
        assert np.all(np.isfinite(new.opt_state[0].nu.theta))


def test_aux_keeps_its_value():
    """Chains moved by a step that is skipped stay where they were."""

    def batching(of):
        def lifted(key, params, batch, positions, aux):
            return vd.per_example(of)(key, params, batch, positions, ())[0], aux + 1

        return lifted

    step = compiled(batching=batching)
    state = start()._replace(aux=jnp.zeros(4))
    state = vd.fit(state, step, poisoned, 6)
    np.testing.assert_array_equal(state.aux, np.full(4, 5.0))


def test_means_leave_skipped_steps_out_and_tell_of_them_apart():
    rows, step = [], compiled()
    state = start()
    for i in range(8):
        state, row = step(state, poisoned(i))
        rows.append({name: float(value) for name, value in row.items()})
    for steps_per_call in (1, 4):
        seen = []
        hook = vd.Hook(4, lambda step, state, metrics: seen.append(metrics))  # noqa: B023
        vd.fit(start(), step, poisoned, 8, hooks=[hook], steps_per_call=steps_per_call)
        first, second = seen
        for name in ("fit", "pull", "objective", "grad_norm"):
            np.testing.assert_allclose(first[name], np.mean([row[name] for row in rows[:3]]), rtol=1e-6)
            np.testing.assert_allclose(second[name], np.mean([row[name] for row in rows[4:]]), rtol=1e-6)
        assert first["skipped"] == 0.25 and second["skipped"] == 0.0
        assert np.isnan(first["skipped/fit"]) and first["skipped/pull"] == pytest.approx(rows[3]["pull"])
        assert not any(name.startswith("skipped/") for name in second)


def test_means_over_skipped_steps_alone_are_no_numbers():
    seen = []
    hook = vd.Hook(2, lambda step, state, metrics: seen.append(metrics))
    vd.fit(start(), compiled(), lambda i: poisoned(i, at=(2, 3)), 4, hooks=[hook])
    assert seen[1]["skipped"] == 1.0 and np.isnan(seen[1]["fit"]) and np.isnan(seen[1]["pull"])
    assert np.isfinite(seen[1]["skipped/pull"])


def test_a_guard_starts_at_nothing():
    assert isinstance(start().guard, Guard)
    assert [(int(count), count.dtype) for count in start().guard] == [(0, jnp.int32)] * 5
