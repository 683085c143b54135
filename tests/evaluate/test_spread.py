"""How wide q is, and chains that take their steps in its units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from tests.evaluate import linear_vae

evaluate = vd.evaluate
KEY = jax.random.key(0)
NOISE = jnp.array([1.0, 0.01])
POSTERIOR_SCALE = NOISE / jnp.sqrt(1 + NOISE**2)


def narrow():
    """z ~ N(0, I), x = z + noise of scales 1 and .01; q misses each unit's posterior by as many of its deviations."""

    def log_joint(params, x, z):
        return toys.log_normal(z, 0.0, jnp.zeros(2)) + toys.log_normal(x, z, jnp.log(NOISE))

    def q(x):
        return x / (1 + NOISE**2) + 0.8 * POSTERIOR_SCALE, jnp.log(0.7 * POSTERIOR_SCALE)

    def sample_q(key, params, x):
        loc, log_scale = q(x)
        return loc + jnp.exp(log_scale) * jax.random.normal(key, (2,))

    return vd.Model(
        lambda key: vd.Params(),
        log_joint,
        lambda params, x, z: toys.log_normal(z, *q(x)),
        sample_q,
        lambda key, params: None,
    )


def narrow_log_prob(x):
    variance = 1 + np.asarray(NOISE, np.float64) ** 2
    return -0.5 * np.sum(np.square(x) / variance + np.log(2 * np.pi * variance), -1)


def test_the_spread_is_the_standard_deviation_of_q():
    """That of 20,000 draws is within five of its own errors, 1 / sqrt(2 K) of itself, and the same at each call."""
    model = linear_vae.build()
    params = model.init(KEY)._replace(lam=linear_vae.lam((1.0, -0.5), (0.3, 0.2)))
    spread = toys.quick_jit(evaluate.spread_of_q(model, KEY, 20_000))
    got = spread(params, jnp.ones(5))
    expected = linear_vae.POSTERIOR_SCALE * np.exp([0.3, 0.2])
    assert np.max(np.abs(got / expected - 1)) * np.sqrt(40_000) < 5
    np.testing.assert_array_equal(got, spread(params, jnp.ones(5)))


def test_a_layer_given_another_has_its_spread_over_both_and_a_point_has_one():
    def sample_q(key, params, x):
        eps = jax.random.normal(key, (2,))
        return {"above": eps[0], "below": 2 * eps[0] + 0.1 * eps[1], "points": jnp.array([x, 0.1, 7.7])}

    model = vd.Model(lambda key: vd.Params(), None, None, sample_q, None)
    got = toys.quick_jit(evaluate.spread_of_q(model, KEY, 20_000))(vd.Params(), 3.0)
    assert abs(got["above"] - 1) < 0.03 and abs(got["below"] / np.sqrt(4.01) - 1) < 0.03
    for num_samples in (64, 20_000):
        points = evaluate.spread_of_q(model, KEY, num_samples)(vd.Params(), 3.0)["points"]
        np.testing.assert_array_equal(points, np.ones(3))


@pytest.mark.parametrize("way", ["forward", "reverse"])
def test_a_move_that_knows_no_units_ends_where_it_did(way):
    """A Gaussian autoregression is the same in any units: so are the weights, to rounding, in units far from one."""
    model = linear_vae.build()
    params = model.init(KEY)._replace(lam=linear_vae.lam((1.0, -0.5), (0.3, 0.2)))
    moves = linear_vae.autoregressive(0.4)

    def value(key, **settings):
        x, z = model.sample(key, params)
        if way == "forward":
            return evaluate.annealed_log_prob(model, moves, 6, num_chains=3, **settings)(key, params, x)
        return evaluate.reverse_annealed_log_prob(model, moves, 6, num_chains=3, **settings)(
            key, params, x, z
        )

    keys = jax.random.split(KEY, 20)
    got, plain = toys.quick_jit(
        jax.vmap(lambda key: (value(key, units=lambda params, x: jnp.array([0.2, 5.0])), value(key)))
    )(keys)
    np.testing.assert_allclose(got.value, plain.value, atol=2e-3)
    assert np.std(plain.value) > 0.5


def test_in_units_of_q_one_step_size_serves_a_wide_and_a_narrow_latent():
    """Without, the narrow one does not move, and its error stays what importance sampling has."""
    pytest.importorskip("blackjax")
    model, moves = narrow(), evaluate.hmc(0.5, 5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(300, 2)), jnp.float32)
    settings = ({}, {"units": evaluate.spread_of_q(model, jax.random.key(2))})
    found = []
    for more in settings:
        estimate = evaluate.annealed_log_prob(model, moves, 100, **more)
        keys = jax.random.split(jax.random.key(1), len(x))
        value = toys.quick_jit(jax.vmap(estimate, in_axes=(0, None, 0)))(keys, vd.Params(), x).value
        found.append(np.asarray(value, np.float64) - narrow_log_prob(x))
    plain, in_units = found
    assert abs(np.mean(np.exp(in_units)) - 1) < 4 * np.std(np.exp(in_units)) / np.sqrt(len(x)) < 0.1
    assert np.std(in_units) < 0.25 * np.std(plain)
    assert -0.1 < np.mean(in_units) and np.mean(plain) < -0.4


def test_a_discrete_latent_and_one_draw_are_refused():
    model = vd.Model(lambda key: vd.Params(), None, None, lambda key, params, x: jnp.int32(1), None)
    with pytest.raises(TypeError, match="model: got a z with a leaf that is not floating point"):
        evaluate.spread_of_q(model, KEY)(vd.Params(), jnp.ones(2))
    with pytest.raises(ValueError, match="num_samples: got 1, expected at least 2"):
        evaluate.spread_of_q(model, KEY, 1)
    with pytest.raises(TypeError, match="key"):
        evaluate.spread_of_q(model, jax.random.PRNGKey(0))


def test_units_that_are_not_like_z_are_refused():
    estimate = evaluate.annealed_log_prob(
        narrow(), lambda key, log_density, z: z, 3, units=lambda params, x: jnp.ones(3)
    )
    with pytest.raises(ValueError, match=r"units: got shapes \(3,\), expected those of z, \(2,\)"):
        jax.eval_shape(estimate, KEY, vd.Params(), jnp.ones(2))
