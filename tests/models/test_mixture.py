"""A mixture of independent pixels against sums over all images and a second log p(x) in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

import vdiff as vd
from vdiff import likelihoods
from vdiff.models.mixture import Mixture, collapsed, mixture, pixel_components

SHAPE, COMPONENTS = (2, 2, 1), 3
IMAGES = np.array(list(itertools.product([0, 1], repeat=4)), np.int32).reshape(-1, *SHAPE)


def bernoullis(encoder=None, **options):
    components = pixel_components(likelihoods.bernoulli(), 2, SHAPE, init_scale=1.5, **options)
    return mixture(COMPONENTS, components, encoder=encoder)


def params_of(model, seed=0):
    params = model.init(jax.random.key(seed))
    return params._replace(phi={"logits": jnp.array([0.5, -1.0, 0.2])})


def log_joints(theta, phi, x):
    """Written apart: [N, C], for NumPy in float64 and for `jax.grad`."""
    p = 1 / (1 + jnp.exp(-theta["out"].reshape(COMPONENTS, -1)))
    weight = jnp.exp(phi["logits"]) / jnp.sum(jnp.exp(phi["logits"]))
    x = x.reshape(len(x), 1, -1)
    return jnp.log(weight)[None] + jnp.sum(jnp.log(jnp.where(x == 1, p, 1 - p)), -1)


def test_probabilities_are_bishops_and_sum_to_one():
    model = bernoullis()
    params = params_of(model)
    expected = np.asarray(log_joints(params.theta, params.phi, IMAGES), np.float64)
    log_prob = jax.jit(jax.vmap(model.log_prob, in_axes=(None, 0)))(params, IMAGES)
    np.testing.assert_allclose(log_prob, logsumexp(expected, 1), rtol=2e-6)
    np.testing.assert_allclose(np.exp(np.float64(log_prob)).sum(), 1.0, atol=2e-6)
    posterior = jax.vmap(model.log_posterior, in_axes=(None, 0))(params, IMAGES)
    np.testing.assert_allclose(posterior, expected - logsumexp(expected, 1)[:, None], atol=2e-5)
    for z in range(COMPONENTS):
        joint = jax.vmap(model.log_joint, in_axes=(None, 0, None))(params, IMAGES, jnp.int32(z))
        np.testing.assert_allclose(joint, expected[:, z], rtol=2e-6)


@pytest.mark.parametrize("has_encoder", [False, True])
def test_terms_are_the_enumerated_elbo_in_value_and_gradient(has_encoder):
    encoder = vd.nets.mlp(SHAPE, (COMPONENTS,), hidden=())
    encoder = vd.Network(encoder.init, lambda lam, x, of=encoder: of.apply(lam, x.astype(jnp.float32)))
    model = bernoullis(encoder if has_encoder else None)
    params = params_of(model, seed=1)

    def enumerated(params):
        joint = log_joints(params.theta, params.phi, IMAGES)
        if not has_encoder:
            return jnp.mean(jax.nn.logsumexp(joint, 1))
        log_q = jax.nn.log_softmax(jax.vmap(encoder.apply, in_axes=(None, 0))(params.lam, IMAGES))
        return jnp.mean(jnp.sum(jnp.exp(log_q) * (joint - log_q), 1))

    def estimated(params):
        keys = jax.random.split(jax.random.key(2), len(IMAGES))
        return jnp.mean(jax.vmap(model.elbo_estimate, in_axes=(0, None, 0))(keys, params, IMAGES))

    value, gradient = jax.value_and_grad(enumerated)(params)
    found, found_gradient = jax.value_and_grad(estimated)(params)
    np.testing.assert_allclose(found, value, rtol=2e-6)
    for part in ("theta", "phi", "lam"):
        one, other = (jax.tree.leaves(getattr(g, part)) for g in (found_gradient, gradient))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)


def test_draws_have_the_models_frequencies():
    model, num = bernoullis(), 40_000
    params = params_of(model)
    x, z = jax.jit(jax.vmap(model.sample, in_axes=(0, None)))(
        jax.random.split(jax.random.key(3), num), params
    )
    joint = np.exp(np.asarray(log_joints(params.theta, params.phi, IMAGES), np.float64))
    code = np.asarray(x).reshape(num, 4) @ (2 ** np.arange(3, -1, -1))
    counts = np.zeros(joint.shape)
    np.add.at(counts, (code, np.asarray(z)), 1)
    z_score = (counts - num * joint) / np.sqrt(num * joint * (1 - joint))
    assert np.max(np.abs(z_score)) < 4.5


@pytest.mark.slow
def test_the_linter_finds_nothing():
    model = bernoullis()
    found = vd.check_model(model, params_of(model), IMAGES[5], jax.random.key(4), 4000)
    assert found.ok, found


def test_components_are_told_apart_at_the_start_around_the_bias():
    bias = np.arange(4.0).reshape(SHAPE)
    out = pixel_components(likelihoods.bernoulli(), 2, SHAPE, out_bias=bias, init_scale=0.1).init(
        jax.random.key(5), 2000
    )["out"]
    np.testing.assert_allclose(out.mean(0), bias, atol=5 * 0.1 / np.sqrt(2000))
    np.testing.assert_allclose(out.std(0), 0.1, rtol=5 / np.sqrt(2 * 2000))
    levels = pixel_components(likelihoods.categorical(5), 5, SHAPE)
    assert levels.init(jax.random.key(5), 3)["out"].shape == (3, *SHAPE, 5)


@pytest.mark.parametrize(
    ("likelihood", "levels"),
    [
        (likelihoods.bernoulli(), 2),
        (likelihoods.categorical(5), 5),
        (likelihoods.discretized_logistic(7), 7),
    ],
)
def test_a_component_has_the_law_of_its_likelihood_in_value_and_gradient(likelihood, levels):
    components = pixel_components(likelihood, levels, SHAPE, init_scale=3.0)
    theta = components.init(jax.random.key(9), COMPONENTS)
    x = jax.random.randint(jax.random.key(10), SHAPE, 0, levels)
    for z in range(COMPONENTS):
        found = jax.value_and_grad(components.log_prob)(theta, jnp.int32(z), x)
        expected = jax.value_and_grad(lambda theta, z=z: likelihood.log_prob(theta["out"][z], x))(theta)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    for level in (-1, levels):
        assert np.isnan(components.log_prob(theta, jnp.int32(0), x.at[0, 0, 0].set(level)))


def test_a_batch_is_one_matrix_product():
    """No array as large as data x components x pixels: the sum over pixels is a product of matrices."""
    model = mixture(50, pixel_components(likelihoods.bernoulli(), 2, (8, 8, 1)))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((30, 8, 8, 1), jnp.int32)
    total = lambda params, x: jnp.sum(jax.vmap(model.log_prob, in_axes=(None, 0))(params, x))  # noqa: E731
    compiled = jax.jit(jax.grad(total)).lower(shapes, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 30 * 50 * 64


@pytest.mark.slow
def test_it_learns_the_law_that_made_its_data():
    """From a thousand draws: as good as the truth, on the truth's own law, to what a thousand draws can tell."""
    import optax

    model = bernoullis()
    truth = params_of(model, seed=6)
    keys = jax.random.split(jax.random.key(7), 20_000)
    x, _ = jax.vmap(model.sample, in_axes=(0, None))(keys, truth)
    optimizer = optax.adam(3e-2)
    step = vd.jit_step(vd.make_train_step(collapsed(model).elbo_terms, optimizer))
    state = vd.init_state(jax.random.key(8), model, optimizer)
    state = vd.fit(state, step, vd.data.batches(np.asarray(x), 200, 0), 500)
    p, learned = (
        jax.nn.softmax(jax.vmap(model.log_prob, in_axes=(None, 0))(params, IMAGES))
        for params in (truth, state.ema)
    )
    assert 0 <= float(jnp.sum(p * jnp.log(p / learned))) < 0.005


def test_the_record_begins_as_a_model():
    assert Mixture._fields[: len(vd.Model._fields)] == vd.Model._fields
    assert Mixture.elbo_estimate is vd.Model.elbo_estimate


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_components: got 0"):
        mixture(0, pixel_components(likelihoods.bernoulli(), 2, SHAPE))
    with pytest.raises(ValueError, match="levels: got 1, expected at least 2"):
        pixel_components(likelihoods.bernoulli(), 1, SHAPE)
    model = bernoullis()
    with pytest.raises(ValueError, match=r"x: got shape \[16, 2, 2, 1\], expected \[2, 2, 1\].*vmap"):
        model.log_prob(params_of(model), IMAGES)
    wide = bernoullis(vd.Network(lambda key: (), lambda lam, x: jnp.zeros(4)))
    with pytest.raises(ValueError, match=r"encoder: got an output of shape \[4\], expected \[3\]"):
        wide.log_q(params_of(wide), IMAGES[0], jnp.int32(0))
