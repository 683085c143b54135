"""Identities against exact expectations, and a z-score that heavy tails and rare events do not deceive."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toys import quick_jit
from vdiff.evaluate.checks.reference import Joint, fit_reference
from vdiff.evaluate.checks.statistics import (
    Moments,
    _largest_draw,
    identities,
    moments,
    pathwise_difference,
    worst,
)

LOC, SCALE, NUM_DRAWS = 0.4, 1.3, 20_000


def log_density(params, y):
    """z = (real, bit): bit ~ Bernoulli(sigmoid(logit)), real ~ N(loc + bit, scale^2)."""
    real, bit = y.z
    bit = bit.astype(jnp.float32)
    of_bit = bit * params["logit"] - jax.nn.softplus(params["logit"])
    return of_bit + jax.scipy.stats.norm.logpdf(real, params["loc"] + bit, params["scale"])


PARAMS = {"logit": jnp.array(0.7), "loc": jnp.array(LOC), "scale": jnp.array(SCALE)}


def draw(key):
    key_bit, key_real = jax.random.split(key)
    bit = jax.random.bernoulli(key_bit, jax.nn.sigmoid(PARAMS["logit"])).astype(jnp.int32)
    return Joint((), (LOC + bit.astype(jnp.float32) + SCALE * jax.random.normal(key_real), bit))


REFERENCE = fit_reference(jax.device_get(jax.vmap(draw)(jax.random.split(jax.random.key(9), 1_000))))


@pytest.fixture(scope="module")
def averaged():
    @quick_jit
    def run(params):
        def statistic(keys):
            keys_y, keys_rest = jax.vmap(jax.random.split, out_axes=1)(keys)
            return identities(keys_rest, log_density, params, params, jax.vmap(draw)(keys_y), REFERENCE)

        return moments(statistic, jax.random.key(0), NUM_DRAWS, 100)

    return lambda **changes: jax.device_get(run(PARAMS | {k: jnp.array(v) for k, v in changes.items()}))


def part(means, *names):
    for name in names:
        means = Moments(*(tree[name] for tree in means))
    return means


def z_of(means, *names):
    return worst(part(means, *names), NUM_DRAWS).z_score


NAMES = [("score",), ("Stein",), ("moves",), ("normalisation", "difference")]


@pytest.mark.parametrize("name", NAMES)
def test_all_hold_for_the_law_itself(averaged, name):
    assert z_of(averaged(), *name) < 4


def test_each_sees_its_error(averaged):
    shifted = averaged(loc=LOC + 0.1)
    assert z_of(shifted, "Stein") > 5 and z_of(shifted, "score") > 5
    # E[d log p/d loc] of a model off by delta is -delta / scale^2, exactly.
    mean, square = (part(shifted, "score")[i]["loc"] for i in (0, 1))
    assert abs(mean + 0.1 / SCALE**2) < 5 * math.sqrt(square / NUM_DRAWS)
    wider = averaged(scale=1.05 * SCALE)
    assert z_of(wider, "Stein") > 5
    biased = averaged(logit=1.0)
    # Barker's weight of a bit is P(other | rest): E = P(1) P'(0) - P(0) P'(1), times two for positions +-1.
    p, q = (1 / (1 + math.exp(-v)) for v in (0.7, 1.0))
    mean, square = (np.asarray(part(biased, "moves")[i])[0, 0] for i in (0, 1))
    assert z_of(biased, "moves") > 5 and abs(mean) < 2 * abs(p - q) + 5 * math.sqrt(square / NUM_DRAWS)
    assert np.sign(mean) == np.sign(p - q)


def test_noise_used_twice_is_seen_only_in_pairs():
    def run(keys):
        keys_y, keys_rest = jax.vmap(jax.random.split, out_axes=1)(keys)
        y = Joint((), jax.vmap(lambda key: jnp.full(2, jax.random.normal(key)))(keys_y))

        def log_p(params, y):
            return jnp.sum(jax.scipy.stats.norm.logpdf(y.z))

        return identities(keys_rest, log_p, (), (), y, reference)

    draws = np.random.default_rng(0).normal(size=(1_000, 2)).astype(np.float32)
    reference = fit_reference(Joint((), draws))
    means = jax.device_get(quick_jit(lambda key: moments(run, key, NUM_DRAWS, 100))(jax.random.key(0)))
    assert z_of(means, "Stein", "first") < 4 and z_of(means, "Stein", "second") < 4
    assert z_of(means, "Stein", "pairs") > 50


def gradients(stopped, block_size=1):
    """q = N(loc, scale^2)^2, by its draw with a gradient and without."""
    params = {"loc": jnp.array([0.3, -0.2]), "scale": jnp.array([0.5, 1.5])}

    def draw_z(key, params):
        return params["loc"] + stopped(params["scale"]) * jax.random.normal(key, (2,))

    def log_q(params, z):
        return jnp.sum(jax.scipy.stats.norm.logpdf(z, params["loc"], params["scale"]))

    def statistic(keys):
        return pathwise_difference(keys, draw_z, log_q, params, params, params["loc"], params["scale"])

    run = quick_jit(lambda key: moments(statistic, key, NUM_DRAWS, 100 // block_size, block_size))
    return jax.device_get(run(jax.random.key(0)))


@pytest.mark.parametrize("block_size", [1, 50])
def test_two_gradients_of_one_law_agree_unless_one_is_stopped(block_size):
    means = gradients(lambda scale: scale, block_size)
    assert z_of(means, "difference") < 4
    # E f' = -+ exp(-1/2) in units of the scale: E cos u = exp(-1/2), E sin u = 0.
    expected = math.exp(-0.5) / np.array([0.5, 1.5])
    np.testing.assert_allclose(np.abs(means.mean["gradient"]["loc"]), expected, rtol=0.05)
    stopped = gradients(jax.lax.stop_gradient, block_size)
    found = worst(part(stopped, "difference"), NUM_DRAWS)
    assert found.z_score > 15 and found.path[0].key == "scale"
    assert np.all(stopped.mean["gradient"]["scale"] == 0)


def test_moments_do_not_depend_on_the_chunk():
    def statistic(keys):
        return {"a": jax.random.normal(keys[0], (3,)), "b": jnp.ones(())}

    out = jax.device_get(moments(statistic, jax.random.key(0), 1_050, 100))
    keys = jnp.concatenate([jax.random.split(k, 100) for k in jax.random.split(jax.random.key(0), 11)])
    values = np.asarray(jax.vmap(statistic)(keys[:, None])["a"], np.float64)
    np.testing.assert_allclose(out.mean["a"], values.mean(0), atol=1e-5)
    np.testing.assert_allclose(out.mean_square["a"], (values**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(out.largest["a"], np.abs(values).max(0), rtol=1e-6)
    assert out.mean["b"] == pytest.approx(1.0)


def test_blocks_keep_the_scale_of_single_draws():
    """Gaussian noise, and a mean that no draw misses, whose |z| is at most the square root of 100 blocks."""

    def statistic(keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (200,)))(keys)
        return jnp.mean(jnp.concatenate([noise, 2.0 + 0.01 * noise], 1), axis=0)

    means = jax.device_get(moments(statistic, jax.random.key(0), 10_000, 5, 100))
    noise, shifted = (Moments(*(v[i : i + 200] for v in means)) for i in (0, 200))
    # A mean square over 100 blocks is off by 14 %, their largest magnitude near 2.6 standard deviations.
    assert abs(noise.mean_square.mean() - 1.0) < 0.05 and 2.0 < np.median(noise.largest) < 3.5
    assert worst(noise, 10_000).z_score < 2
    assert 8 < worst(shifted, 10_000).z_score < 10


def test_an_event_in_one_block_is_as_rare_as_that_of_one_draw():
    """Poisson counts in 10,000 draws, less their mean, seen in blocks of 100 and one by one."""
    rng = np.random.default_rng(0)
    for rate in (1e-4, 1e-3):
        draws = (rng.random((10_000, 1_000)) < rate) - rate * np.exp(0.1 * rng.normal(size=(10_000, 1_000)))
        assert worst(of_values(draws), 10_000).z_score < 3
        means = of_blocks(draws.reshape(100, 100, -1).mean(1), 100)
        assert worst(means, 10_000).z_score < 3
        once = (draws > 0.9).sum(0) == 1
        assert np.all(means.largest[once] > 0.85)


def of_blocks(blocks, block_size):
    """The moments of the rows, each the mean of a block."""
    square, largest = (blocks**2).mean(0), np.abs(blocks).max(0)
    draw = np.asarray(_largest_draw(block_size, jnp.asarray(square), jnp.asarray(largest)))
    return Moments(blocks.mean(0), block_size * square, draw)


def of_values(values):
    return Moments(values.mean(0), (values**2).mean(0), np.abs(values).max(0))


def test_the_worst_of_many_is_corrected_for_their_number():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2_000, 2_000))
    plain = np.abs(values.mean(0)).max() * math.sqrt(2_000)
    found = worst(of_values(values), 2_000)
    assert plain > 3 and found.z_score < 2 and found.num_tested == 2_000
    values[:, 7] += 0.3
    found = worst(of_values(values), 2_000)
    assert found.index == (7,) and 10 < found.z_score < 14
    assert found.mean == pytest.approx(values[:, 7].mean())


def test_what_is_not_finite_is_no_number():
    values = np.ones((10, 3))
    values[2, 1] = np.nan
    found = worst(of_values(values), 10)
    assert math.isnan(found.z_score) and found.index == (1,)


def test_nothing_to_test():
    assert worst(Moments({}, {}, {}), 10).num_tested == 0
    assert worst(of_values(np.zeros((10, 2))), 10) == worst(Moments({}, {}, {}), 10)


def test_rare_events_and_heavy_tails_raise_no_alarm():
    """Events of probability 1e-4 less their probability, which vary a little; log-normals less their mean."""
    rng = np.random.default_rng(0)
    rare = (rng.random((10_000, 500)) < 1e-4) - 1e-4 * np.exp(0.1 * rng.normal(size=(10_000, 500)))
    naive = np.abs(rare.mean(0)) / (rare.std(0) / 100)
    assert naive.max() > 50 and worst(of_values(rare), 10_000).z_score < 3
    heavy = np.exp(2.0 * rng.normal(size=(10_000, 200))) - math.exp(2.0)
    assert worst(of_values(heavy), 10_000).z_score < 4
