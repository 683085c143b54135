"""A batch in parts is the batch: gradient, terms, keys, aux; under a nonlinear combination too."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd

SGD = optax.sgd(1.0)
DATA = np.random.default_rng(5).normal(size=(12, 3)).astype(np.float32)


def start(aux=()):
    model = vd.Model(lambda key: vd.Params(theta=jnp.array([0.3, -1.0, 2.0])), *[None] * 4)
    return vd.init_state(jax.random.key(4), model, SGD)._replace(aux=aux)


def noisy(key, params, x):
    noise = jax.random.normal(key, x.shape)
    return {"fit": -jnp.sum(jnp.square(x - params.theta + noise)), "kl": jnp.sum(x**2 * params.theta)}


def at_a_time(key, params, x, u):
    return {"fit": -jnp.sum(jnp.square(x - jnp.cos(7.0 * u) * params.theta))}


def free_bits(terms):
    """Nonlinear, with a slope that no part can know: the square of the mean over the batch."""
    return terms["fit"] - jnp.square(terms["kl"] - 1.0)


CASES = {
    "sum": (noisy, {}),
    "nonlinear": (noisy, {"combine": free_bits}),
    "stratified": (at_a_time, {"batching": vd.stratified}),
}


@pytest.mark.parametrize("num_accumulate", [2, 3, 12])
@pytest.mark.parametrize("case", CASES)
def test_parts_change_nothing_but_rounding(case, num_accumulate):
    objective, settings = CASES[case]
    plain, plain_metrics = vd.make_train_step(objective, SGD, **settings)(start(), DATA)
    step = vd.make_train_step(objective, SGD, num_accumulate=num_accumulate, **settings)
    state, metrics = jax.jit(step)(start(), DATA)
    gradient, expected = (s.params.theta - start().params.theta for s in (state, plain))
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-6)
    assert metrics.keys() == plain_metrics.keys()
    for name, value in plain_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-6, err_msg=name)


def test_a_nonlinear_combination_acts_on_the_mean_over_all_parts():
    """d/dm of -(m - 1)^2 at the batch's mean m, in NumPy; its mean over parts is another number."""
    objective = lambda key, params, x: {"fit": 0.0 * params.theta[0], "kl": x @ params.theta}  # noqa: E731
    step = vd.make_train_step(objective, SGD, combine=free_bits, num_accumulate=4)
    state, _ = step(start(), DATA)
    theta, x = np.array([0.3, -1.0, 2.0]), DATA.astype(np.float64)
    mean = np.mean(x @ theta)
    gradient = -2 * (mean - 1.0) * x.mean(axis=0)
    np.testing.assert_allclose(state.params.theta - start().params.theta, gradient, rtol=2e-5)
    parts = [-2 * (np.mean(p @ theta) - 1.0) * p.mean(axis=0) for p in np.split(x, 4)]
    assert np.linalg.norm(np.mean(parts, axis=0) - gradient) > 0.1 * np.linalg.norm(gradient)


def test_aux_goes_with_its_positions():
    """Each datum adds its own slot to what it has seen, and the slots come back in their order."""

    def batching(objective):
        def lifted(key, params, batch, positions, aux):
            terms, _ = vd.per_example(objective)(key, params, batch, positions, ())
            return terms, {"sum": aux["sum"] + batch, "at": positions}

        return lifted

    aux = {"sum": jnp.arange(36, dtype=jnp.float32).reshape(12, 3), "at": jnp.zeros(12, jnp.int32)}
    step = vd.make_train_step(noisy, SGD, batching=batching, num_accumulate=3)
    state, _ = jax.jit(step)(start(aux), DATA)
    np.testing.assert_array_equal(state.aux["sum"], np.arange(36, dtype=np.float32).reshape(12, 3) + DATA)
    np.testing.assert_array_equal(state.aux["at"], np.arange(12))


@pytest.mark.parametrize(("combine", "num_loops"), [(None, 1), (free_bits, 2)])
def test_data_are_gone_through_twice_only_under_a_nonlinear_combination(combine, num_loops):
    objective = lambda key, params, x: {"fit": x @ params.theta, "kl": jnp.sum(params.theta)}  # noqa: E731
    settings = {} if combine is None else {"combine": combine}
    step = vd.jit_step(vd.make_train_step(objective, SGD, num_accumulate=3, **settings))
    text = step.lower(start(), DATA[None]).compile().as_text()
    assert len(re.findall(r" while\(", text)) == num_loops


def test_a_part_holds_the_activations_of_a_part():
    """Of 64 data with 4,096 numbers each between two products, 8 parts hold an eighth."""
    up, down = jnp.ones((3, 4096)), jnp.ones((4096, 4))

    def objective(key, params, x):
        return {"fit": jnp.sum(jnp.tanh(jnp.tanh((x * params.theta) @ up) @ down))}

    data = np.ones((1, 64, 3), np.float32)

    def bytes_of(num_accumulate):
        step = vd.jit_step(vd.make_train_step(objective, SGD, num_accumulate=num_accumulate))
        return step.lower(start(), data).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(8) < 0.2 * bytes_of(1)


def test_parts_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"^num_accumulate: got 0, expected at least 1, the whole batch at once$"
    ):
        vd.make_train_step(noisy, SGD, num_accumulate=0)
    step = vd.make_train_step(noisy, SGD, num_accumulate=5)
    message = "batch: got 12 data for 5 parts, expected a multiple of 5; use a batch size of 5 or 10 or 15"
    for call in (step, vd.jit_step(step)):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call(start(), DATA)
