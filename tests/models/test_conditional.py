"""Conditional models are models of pairs: checked where p(x | y) is known, and on a diffusion model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import vdiff as vd
from tests import toys
from tests.diffusion.cases import tiny_denoiser
from vdiff import diffusion


def network():
    """A tiny denoiser that sees a label: shifted by a number of its own for each of three."""
    base = tiny_denoiser(2)

    def init(key):
        return {"base": base.init(key), "shift": jnp.array([[0.5, -0.2], [-0.4, 0.3], [0.0, 0.1]])}

    def apply(theta, z, log_snr, label):
        return base.apply(theta["base"], z, log_snr) + theta["shift"][label]

    return vd.Network(init, apply)


def of(label):
    return vd.ddpm(vd.given(network(), label), [0.3, 0.5], shape=(2,), likelihood=diffusion.gaussian(0.5))


LABELS = jnp.array([0, 1], jnp.int32)
DATA = jnp.array([[0.5, -1.0], [-0.3, 0.4]])


def linear(y):
    """z ~ N(y, 1), x | z ~ N(z, 1): p(x | y) = N(y, 2), with q the posterior."""
    return vd.Model(
        init=lambda key: vd.Params(),
        log_joint=lambda params, x, z: toys.log_normal(z, y, 0.0 * z) + toys.log_normal(x, z, 0.0 * z),
        log_q=lambda params, x, z: toys.log_normal(z, 0.5 * (x + y), 0.0 * z - 0.5 * math.log(2)),
        sample_q=lambda key, params, x: 0.5 * (x + y) + math.sqrt(0.5) * jax.random.normal(key, x.shape),
        sample=lambda key, params: (y + math.sqrt(2) * jax.random.normal(key, (1,)), y),
    )


def test_it_bounds_log_p_of_x_given_y():
    model = vd.conditional(linear, jnp.zeros(1))
    for x, y in ((0.3, -1.0), (2.0, 0.5)):
        pair = jnp.array([x]), jnp.array([y])
        exact = norm.logpdf(x, y, math.sqrt(2))
        for objective in (model.elbo_estimate, vd.total(vd.pathwise(model, vd.iwae, 3))):
            assert float(objective(jax.random.key(0), vd.Params(), pair)) == pytest.approx(exact, abs=1e-5)
        value = vd.importance_log_prob(model, 10)(jax.random.key(1), vd.Params(), pair).value
        assert float(value) == pytest.approx(exact, abs=1e-5)


def test_a_batch_of_pairs_is_each_model_by_itself():
    model = vd.conditional(of, jnp.int32(0))
    params = model.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 2)
    terms = jax.vmap(model.elbo_terms, in_axes=(0, None, 0))(keys, params, (DATA, LABELS))
    x, z = jax.vmap(model.sample, in_axes=(0, None, 0))(keys, params, LABELS)
    for i in range(2):
        alone = of(LABELS[i])
        for name, term in alone.elbo_terms(keys[i], params, DATA[i]).items():
            assert float(terms[name][i]) == pytest.approx(float(term), rel=1e-5)
        assert np.allclose(x[i], alone.sample(keys[i], params)[0], atol=1e-5)
        path = alone.sample_q(keys[i], params, DATA[i])
        pair = DATA[i], LABELS[i]
        assert np.allclose(model.sample_q(keys[i], params, pair), path)
        assert float(model.log_joint(params, pair, path)) == float(alone.log_joint(params, DATA[i], path))
        assert float(model.log_q(params, pair, path)) == float(alone.log_q(params, DATA[i], path))
    assert float(of(LABELS[0]).elbo_estimate(keys[0], params, DATA[0])) != float(
        of(LABELS[1]).elbo_estimate(keys[0], params, DATA[0])
    )


def test_terms_at_a_time_are_lifted_too():
    params = of(LABELS[0]).init(jax.random.key(0))
    lifted = vd.on_pairs(lambda y: of(y).elbo_terms_at)
    u, key = jnp.float32(0.2), jax.random.key(3)
    assert lifted(key, params, (DATA[0], LABELS[1]), u) == of(LABELS[1]).elbo_terms_at(
        key, params, DATA[0], u
    )


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_labels_are_dropped_as_often_as_said(probability):
    seen = vd.dropping(lambda key, params, xy: {"": xy[1].astype(jnp.float32)}, probability, jnp.int32(7))
    keys = jax.random.split(jax.random.key(0), 20_000)
    labels = jax.vmap(lambda key: seen(key, vd.Params(), (DATA[0], jnp.int32(1)))[""])(keys)
    share = np.mean(np.asarray(labels) == 7.0)
    assert set(np.unique(labels)) <= {1.0, 7.0}
    assert abs(share - probability) <= 5 * math.sqrt(probability * (1 - probability) / len(keys))


def test_a_wrong_probability_is_refused():
    with pytest.raises(ValueError, match="probability: got 1.5"):
        vd.dropping(lambda key, params, xy: {}, 1.5, 0)
