"""Posteriors as the q of a model: our estimators on them, the encoder called once, local fits, new starts."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from tests import toys
from vdiff import Model, Network, Params
from vdiff.models import families
from vdiff.models.posterior import Posterior, amortized, local, with_cv, with_q

D = 2
FAMILIES = {
    "mean_field": families.mean_field(D),
    "full_rank": families.full_rank(D),
    "low_rank": families.low_rank(D, 1),
    "mixture": families.mixture(D, 2),
}
every_family = pytest.mark.parametrize("name", FAMILIES)
TOY = toys.linear_gaussian(D)
# Off the posterior of the first datum, in every entry, so that no gradient is near zero.
OUTS = {
    "mean_field": [-0.9, 0.3, -0.6, -0.3],
    "full_rank": [-0.9, 0.3, -0.6, -0.3, 0.5],
    "low_rank": [-0.9, 0.3, -0.8, -0.5, 0.5, -0.4],
    "mixture": [0.4, -0.4, -1.2, 0.4, -0.2, 0.1, -0.7, -0.3, -0.5, -0.6],
}


def linear(size, dim=3):
    """An encoder whose output is W x + b."""
    return Network(
        init=lambda key: {"w": 0.1 * jax.random.normal(key, (size, dim)), "b": jnp.zeros(size)},
        apply=lambda lam, x: lam["w"] @ x + lam["b"],
    )


def with_family(name):
    model = with_q(TOY.model, local(FAMILIES[name]))
    return model, TOY.params._replace(lam=jnp.asarray(OUTS[name], jnp.float32))


def exact_elbo(name, params, x):
    """E_q[log p(x, z)] + H(q) of a Gaussian q, from its mean and covariance."""
    theta, out, eye = params.theta, params.lam, jnp.eye(D, dtype=params.lam.dtype)
    loc, scale, rest = out[:D], jnp.exp(out[D : 2 * D]), out[2 * D :]
    inner = {
        "mean_field": lambda: eye,
        "full_rank": lambda: jnp.stack(
            [eye[0] + rest[0] * eye[1], rest[0] * eye[0] + (1 + rest[0] ** 2) * eye[1]]
        ),
        "low_rank": lambda: eye + jnp.outer(rest, rest),
    }[name]()
    cov = scale[:, None] * inner * scale[None]
    residual = x - theta["weight"] @ loc - theta["bias"]
    spread = jnp.sum(residual**2) + jnp.trace(theta["weight"] @ cov @ theta["weight"].T)
    likelihood = -0.5 * spread / toys.SCALE**2 - 3 * math.log(toys.SCALE) - 1.5 * toys.LOG_2_PI
    prior = -0.5 * (jnp.sum((loc - params.phi["loc"]) ** 2) + jnp.trace(cov)) - D / 2 * toys.LOG_2_PI
    return likelihood + prior + 0.5 * jnp.linalg.slogdet(cov)[1] + D / 2 * (1 + toys.LOG_2_PI)


@pytest.mark.parametrize("name", ["mean_field", "full_rank", "low_rank"])
def test_elbo_gradients_are_the_exact_ones(name):
    model, params = with_family(name)
    objectives = {"pathwise": vd.pathwise(model), "doubly": vd.doubly_reparameterized(model)}
    value, gradient = toys.in_float64(
        jax.value_and_grad(lambda params, x: exact_elbo(name, params, x)), params, TOY.data[0]
    )
    for values, draws in toys.gradient_draws(objectives, params, TOY.data[:1], 60_000).values():
        assert np.max(toys.z_scores(np.asarray(values, np.float64)[:, None], np.array([value]))) < 5
        toys.check_unbiased(draws, gradient)


@every_family
def test_doubly_reparameterized_agrees_with_pathwise(name):
    """With iwae and K = 3 on the same keys: the mean difference is zero, and 2 % of the gradient would show."""
    model, params = with_family(name)
    objectives = {
        "pathwise": vd.pathwise(model, vd.iwae, 3),
        "doubly": vd.doubly_reparameterized(model, vd.iwae, 3),
    }
    runs = toys.gradient_draws(objectives, params, TOY.data[:1], 180_000 if name == "mixture" else 60_000)
    (values, one), (values2, other) = runs["pathwise"], runs["doubly"]
    np.testing.assert_allclose(values, values2, rtol=1e-5, atol=1e-5)
    one, other = (np.asarray(draws.lam, np.float64) for draws in (one, other))
    norm = np.linalg.norm(np.mean(other, axis=0))
    std_error = np.std(one - other, axis=0, ddof=1) / math.sqrt(len(one))
    assert np.max(std_error) < 0.004 * norm
    assert np.max(toys.z_scores(one - other, np.zeros(one.shape[1]))) < 5


def exact_posterior(params, x):
    """Mean and covariance of p(z | x), float64."""
    weight, bias, loc = (
        np.asarray(v, np.float64) for v in (params.theta["weight"], params.theta["bias"], params.phi["loc"])
    )
    cov = np.linalg.inv(np.eye(D) + weight.T @ weight / toys.SCALE**2)
    return cov @ (loc + weight.T @ (np.asarray(x, np.float64) - bias) / toys.SCALE**2), cov


def full_rank_out(loc, cov):
    factor = np.linalg.cholesky(cov)
    scale = np.diag(factor)
    lower = (factor / scale[:, None])[np.tril_indices(len(loc), -1)]
    return np.concatenate([loc, np.log(scale), lower])


def test_full_rank_holds_the_exact_posterior():
    """Every log-weight is then log p(x)."""
    model = with_q(TOY.model, local(FAMILIES["full_rank"]))
    for x in TOY.data:
        out = full_rank_out(*exact_posterior(TOY.params, x))
        params = TOY.params._replace(lam=jnp.asarray(out, jnp.float32))
        log_weights = toys.log_weights(model, jax.random.key(1), params, jnp.asarray(x), 64)
        exact = toys.in_float64(toys.linear_gaussian_log_prob, TOY.params, x)
        np.testing.assert_allclose(log_weights, exact, atol=1e-5)


def test_local_training_reaches_every_exact_posterior():
    """lam [N, size] by Adam, each datum its own; sticking the landing, whose noise vanishes at the optimum."""
    posterior = local(FAMILIES["full_rank"])
    model, num_data = with_q(TOY.model, posterior), 8
    data = jnp.asarray(np.random.default_rng(0).normal(size=(num_data, 3)), jnp.float32)
    objective = vd.doubly_reparameterized(model, vd.elbo, 2)
    in_axes = (0, Params(None, None, 0, None), 0)
    steps = 1200
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def loss(lam, keys):
        terms = jax.vmap(objective, in_axes=in_axes)(keys, TOY.params._replace(lam=lam), data)
        return -jnp.sum(terms["elbo"])

    def step(state, key):
        lam, opt_state = state
        grads = jax.grad(loss)(lam, jax.random.split(key, num_data))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count
            updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(lam, updates), opt_state), None

    @toys.quick_jit
    def train(key):
        lam = jax.vmap(posterior.init)(jax.random.split(key, num_data))
        return jax.lax.scan(step, (lam, optimizer.init(lam)), jax.random.split(key, steps))[0][0]

    lam = train(jax.random.key(0))
    assert lam.shape == (num_data, FAMILIES["full_rank"].size)
    expected = np.stack([full_rank_out(*exact_posterior(TOY.params, x)) for x in data])
    np.testing.assert_allclose(lam, expected, atol=2e-3)
    assert np.max(np.std(expected[:, :D], axis=0)) > 0.1


def wide_model(family, hidden=24, dim=5):
    """A model of x [5] with an encoder whose first weight [5, 24] no other product shares."""
    encoder = vd.nets.mlp((dim,), (family.size,), hidden=(hidden,))

    def log_joint(params, x, z):
        return toys.log_normal(z, jnp.zeros_like(z), jnp.zeros_like(z)) + toys.log_normal(
            x, jnp.full_like(x, jnp.sum(z)), jnp.zeros_like(x)
        )

    plain = Model(
        lambda key: Params(), log_joint, log_joint, lambda key, params, x: x, lambda key, params: (1, 1)
    )
    return encoder, with_q(plain, amortized(encoder, family))


@pytest.mark.parametrize("name", ["full_rank", "mixture"])
def test_the_compiled_estimator_calls_the_encoder_once(name):
    """For draw and density together, unbatched over the K draws; as it is written and as it is compiled."""
    _, model = wide_model(FAMILIES[name])
    params, x = toys.quick_jit(model.init)(jax.random.key(0)), jnp.arange(5.0)
    lowered = jax.jit(vd.pathwise(model, vd.iwae, 8)).lower(jax.random.key(0), params, x)
    assert len(re.findall(r"dot_general.*tensor<24xf32>\n", lowered.as_text())) == 1
    dots = [line for line in lowered.compile().as_text().splitlines() if " dot(" in line]
    first_layer = [line for line in dots if re.search(r"= f32\[(1,)?24\]", line)]
    assert len(first_layer) == 1, "\n".join(dots)


@every_family
def test_fused_sampling_calls_the_encoder_once(name):
    family = FAMILIES[name]
    encoder, _ = wide_model(family)
    calls = []

    def apply(lam, x):
        calls.append(x.shape)
        return encoder.apply(lam, x)

    posterior = amortized(Network(encoder.init, apply), family)
    args = jax.random.key(0), jax.eval_shape(encoder.init, jax.random.key(1)), jnp.arange(5.0)
    jaxpr = str(jax.make_jaxpr(lambda key, lam, x: posterior.at(lam, x).sample_and_log_prob(key))(*args))
    assert calls == [(5,)]
    assert len(re.findall(r"f32\[24\] = dot_general", jaxpr)) == 1


@every_family
def test_amortized_is_the_family_at_the_encoders_output(name):
    family = FAMILIES[name]
    encoder = linear(family.size)
    posterior = amortized(encoder, family, embed=lambda x: 2.0 * x)
    lam, x, key = posterior.init(jax.random.key(3)), jnp.asarray(TOY.data[0]), jax.random.key(4)
    out = lam["w"] @ (2.0 * x) + lam["b"]

    @toys.quick_jit
    def both(lam, out, z):
        return (
            (
                posterior.at(lam, x).sample(key),
                *posterior.at(lam, x).sample_and_log_prob(key),
                posterior.at(lam, x).log_prob(z),
            ),
            (family.sample(key, out), *family.sample_and_log_prob(key, out), family.log_prob(out, z)),
        )

    for got, expected in zip(*both(lam, out, jnp.array([0.3, -0.4])), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_an_encoder_that_does_not_fit_is_refused():
    posterior = amortized(linear(7), FAMILIES["full_rank"])
    lam, x, message = (
        posterior.init(jax.random.key(0)),
        jnp.zeros(3),
        r"encoder: got output of shape \(7,\), expected \(5,\)",
    )
    for call in (
        lambda: posterior.at(lam, x).log_prob(jnp.zeros(2)),
        lambda: posterior.at(lam, x).sample(jax.random.key(0)),
        lambda: posterior.at(lam, x).sample_and_log_prob(jax.random.key(0)),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call)


def test_local_ignores_x_and_starts_at_its_scale():
    family = families.mean_field(100)
    posterior = local(family, init_scale=0.5)
    lam = posterior.init(jax.random.key(0))
    assert lam.shape == (200,) and abs(np.std(lam) - 0.5) < 0.1
    z = posterior.at(lam, jnp.zeros(3)).sample(jax.random.key(1))
    np.testing.assert_array_equal(z, posterior.at(lam, "anything").sample(jax.random.key(1)))
    np.testing.assert_allclose(posterior.at(lam, None).log_prob(z), family.log_prob(lam, z))
    np.testing.assert_array_equal(local(family, init_scale=0.0).init(jax.random.key(0)), 0.0)


def small_vae(prior=None):
    return vd.vae(
        vd.nets.mlp((3,), (2 * D,), hidden=()),
        vd.nets.mlp((D,), (3,), hidden=()),
        latent_dim=D,
        likelihood=vd.likelihoods.gaussian(0.7),
        prior=prior,
    )


def assert_trees_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_with_q_of_a_vae_is_the_vae_when_q_is_its_own():
    vae = small_vae()
    encoder = vd.nets.mlp((3,), (2 * D,), hidden=())
    model = with_q(vae, amortized(encoder, FAMILIES["mean_field"], embed=lambda x: x))
    assert type(model) is Model and model.elbo_terms is None
    params, x, key = toys.quick_jit(vae.init)(jax.random.key(0)), jnp.asarray(TOY.data[0]), jax.random.key(1)

    @functools.partial(toys.quick_jit, static_argnums=0)
    def values(model, key, params):
        z = model.sample_q(key, params, x)
        return z, model.log_q(params, x, z), model.log_joint(params, x, z), model.sample(key, params)

    got, expected = values(model, key, params), values(vae, key, params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected)
    estimate = toys.quick_jit(model.elbo_estimate)(key, params, x)
    np.testing.assert_allclose(estimate, expected[2] - expected[1], rtol=1e-5)


def test_with_q_keeps_the_start_of_everything_but_lam():
    vae = with_cv(small_vae(), lambda key: jax.random.normal(key, (2,)))
    posterior = amortized(linear(5), FAMILIES["full_rank"])
    old, new = vae.init(jax.random.key(0)), with_q(vae, posterior).init(jax.random.key(0))
    assert_trees_equal(new._replace(lam=()), old._replace(lam=()))
    assert set(new.lam) == {"w", "b"} and np.any(new.lam["w"] != 0)


def test_with_q_on_a_learned_prior_draws_the_pair():
    """As the docstring says: z is the pair, lam keeps its two names; p does not change."""
    vae, q = small_vae(vd.collapsed(vd.gmm(2, D))), amortized(linear(5), FAMILIES["full_rank"])

    def of_pair(lam, x):
        of_z = q.at(lam["encoder"], x)
        return vd.in_turn(lambda key: (of_z.sample(key), ()), lambda z: of_z.log_prob(z[0]))

    pair = Posterior(init=lambda key: {"encoder": q.init(key), "prior": ()}, at=of_pair)
    model, x = with_q(vae, pair), jnp.asarray(TOY.data[0])

    @toys.quick_jit
    def values(key):
        old, params = vae.init(jax.random.key(0)), model.init(jax.random.key(0))
        z, u = model.sample_q(key, params, x)
        out = params.lam["encoder"]["w"] @ x + params.lam["encoder"]["b"]
        expected = vae.log_joint(old, x, (z, u)) - FAMILIES["full_rank"].log_prob(out, z)
        return model.elbo_estimate(key, params, x), expected

    np.testing.assert_allclose(*values(jax.random.key(1)), rtol=1e-6)


@pytest.mark.parametrize("build", [lambda: TOY.model, small_vae], ids=["Model", "VAE"])
def test_with_cv_changes_nothing_but_cv(build):
    model = build()
    new = with_cv(model, lambda key: {"baseline": jax.random.normal(key, (4,))})
    assert type(new) is type(model)
    assert new._replace(init=model.init) == model
    old_params, params = model.init(jax.random.key(7)), new.init(jax.random.key(7))
    assert_trees_equal(params._replace(cv=()), old_params)
    assert params.cv["baseline"].shape == (4,)
    assert np.all(params.cv["baseline"] != new.init(jax.random.key(8)).cv["baseline"])


def test_keys_of_q_and_cv_are_no_split_of_the_models_key():
    """`split` and `fold_in` share their numbers: a small constant would repeat a key of the model's own init."""
    seen = []
    base = with_cv(TOY.model, lambda key: seen.append(jax.random.key_data(key)) or ())
    posterior = local(FAMILIES["mean_field"])
    spy = posterior._replace(init=lambda key: seen.append(jax.random.key_data(key)) or posterior.init(key))
    with_q(base, spy).init(jax.random.key(0))
    splits = jax.random.key_data(jax.random.split(jax.random.key(0), 1000))
    q_key, cv_key = (np.asarray(data) for data in seen)
    assert np.any(q_key != cv_key)
    for data in (q_key, cv_key):
        assert not np.any(np.all(np.asarray(splits) == data[None], axis=1))
