"""The VAE against the pathwise estimator, against closed forms and against objectives written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.distributions.kl import kl_divergence

import vdiff as vd

LATENT_DIM, DIM, LEVELS = 2, 3, 5
NUM_DRAWS = 40_000

LIKELIHOODS = {
    "bernoulli": (vd.likelihoods.bernoulli(), jnp.array([1, 0, 1])),
    "categorical": (vd.likelihoods.categorical(LEVELS), jnp.array([4, 0, 2])),
    "discretized_logistic": (vd.likelihoods.discretized_logistic(LEVELS), jnp.array([4, 0, 2])),
    "gaussian": (vd.likelihoods.gaussian(0.5), jnp.array([1.0, -0.5, 2.0])),
    "gaussian with learned scale": (vd.likelihoods.gaussian(), jnp.array([1.0, -0.5, 2.0])),
}
every_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)


def build(likelihood, prior=None):
    return vd.vae(
        vd.nets.mlp((DIM,), (2 * LATENT_DIM,), hidden=(4,), activation=jnp.tanh),
        vd.nets.mlp((LATENT_DIM,), likelihood.out_shape((DIM,)), hidden=(4,), activation=jnp.tanh),
        latent_dim=LATENT_DIM,
        likelihood=likelihood,
        prior=prior,
    )


def draw_params(model, seed, scale=0.5):
    """Parameters of the model's shapes, away from the start, where biases and logits are zero."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), shapes)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def moments(scalar, params, num_draws=NUM_DRAWS, seed=0):
    """Mean and variance of the mean, over draws, of a `(key, params) -> []` and of its gradient by part."""

    def one(key):
        value, grads = jax.value_and_grad(scalar, argnums=1)(key, params)
        return {"value": value, "theta": grads.theta, "phi": grads.phi, "lam": grads.lam}

    out = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), num_draws))
    mean = {
        part: jax.tree.map(lambda leaf: np.mean(np.asarray(leaf, np.float64), axis=0), out[part])
        for part in out
    }
    var = {
        part: jax.tree.map(lambda leaf: np.var(np.asarray(leaf, np.float64), axis=0) / num_draws, out[part])
        for part in out
    }
    return {part: (flat(mean[part]), flat(var[part])) for part in out if jax.tree.leaves(out[part])}


def agree(one, other, parts):
    """|z| < 5 for every number of every part; and each part's error is under 2 % of it, so a bias would show."""
    assert set(one) == set(other) == set(parts)
    for part in parts:
        (a, a_var), (b, b_var) = one[part], other[part]
        assert a.shape == b.shape
        scale = np.abs(b).max()
        error = np.sqrt(a_var + b_var + (1e-6 * scale) ** 2)
        assert np.max(np.abs(a - b) / error) < 5, part
        assert np.sqrt(np.sum(a_var + b_var) / np.sum(b**2)) < 0.02 * np.sqrt(a.size), part
        # The whole part at once, along its own direction: a common factor of 2 % would be seen.
        along = np.sum((a - b) * b) / np.sqrt(np.sum((a_var + b_var) * b**2) + 1e-12 * np.sum(b**2) ** 2)
        assert abs(along) < 5, part


@every_likelihood
def test_closed_form_kl_agrees_with_pathwise(name):
    """Value and gradient, for theta and for lam."""
    likelihood, x = LIKELIHOODS[name]
    model = build(likelihood)
    params = draw_params(model, 1)
    exact = moments(lambda key, params: model.elbo_estimate(key, params, x), params)
    objective = vd.total(vd.pathwise(model, vd.elbo, 2))
    sampled = moments(lambda key, params: objective(key, params, x), params, seed=1)
    agree(exact, sampled, ["value", "theta", "lam"])


@pytest.mark.parametrize("name", ["bernoulli", "gaussian with learned scale"])
def test_terms_are_reconstruction_at_one_draw_and_the_closed_form_kl(name):
    likelihood, x = LIKELIHOODS[name]
    model = build(likelihood)
    params = draw_params(model, 2)
    loc, scale = model.encode(params, x)
    assert loc.shape == scale.shape == (LATENT_DIM,) and np.all(np.asarray(scale) > 0)
    terms = model.elbo_terms(jax.random.key(3), params, x)
    assert set(terms) == {"reconstruction", "kl"}
    kl = np.sum(kl_divergence(dist.Normal(loc, scale), dist.Normal(jnp.zeros(2), jnp.ones(2))))
    np.testing.assert_allclose(float(terms["kl"]), -kl, rtol=1e-5)
    # log p(x, z) - log p(z) is log p(x | z); its mean over q is the mean of the term.
    keys = jax.random.split(jax.random.key(4), NUM_DRAWS)
    z = np.asarray(loc) + np.asarray(scale) * np.random.default_rng(0).normal(size=(NUM_DRAWS, LATENT_DIM))
    z = jnp.asarray(z, jnp.float32)
    log_joint = np.asarray(jax.jit(jax.vmap(lambda z: model.log_joint(params, x, z)))(z), np.float64)
    by_hand = log_joint - scipy.stats.norm.logpdf(np.asarray(z, np.float64)).sum(axis=1)
    term = np.asarray(
        jax.jit(jax.vmap(lambda k: model.elbo_terms(k, params, x)["reconstruction"]))(keys), np.float64
    )
    assert abs(term.mean() - by_hand.mean()) < 5 * np.sqrt((term.var() + by_hand.var()) / NUM_DRAWS)
    out = jax.jit(jax.vmap(lambda z: likelihood.log_prob(build_out(model, params, z), x)))(z[:50])
    np.testing.assert_allclose(out, by_hand[:50], rtol=1e-4, atol=1e-4)


def build_out(model, params, z):
    """The decoder's output, by the layers themselves."""
    layers = params.theta
    h = jnp.tanh(z @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"])
    out = h @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]
    return out.reshape(OUT_SHAPES[out.size])


OUT_SHAPES = {DIM: (DIM,), DIM * 2: (DIM, 2), DIM * LEVELS: (DIM, LEVELS)}


@every_likelihood
def test_what_is_shown_and_decoded(name):
    """The encoder sees embed(x); decode is the likelihood's mean; draws have the datum's shape and dtype."""
    likelihood, x = LIKELIHOODS[name]
    model = build(likelihood)
    params = draw_params(model, 5)
    layers = params.lam
    h = jnp.tanh(likelihood.embed(x) @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"])
    out = h @ layers["Dense_1"]["kernel"] + layers["Dense_1"]["bias"]
    loc, scale = model.encode(params, x)
    np.testing.assert_allclose(loc, out[:LATENT_DIM], rtol=1e-5)
    np.testing.assert_allclose(scale, np.exp(out[LATENT_DIM:]), rtol=1e-5)

    z = jnp.array([0.3, -1.2])
    expected = likelihood.mean(build_out(model, params, z))
    assert model.decode(params, z).shape == (DIM,)
    np.testing.assert_allclose(model.decode(params, z), expected, rtol=1e-5, atol=1e-6)

    drawn, latent = model.sample(jax.random.key(6), params)
    assert drawn.shape == x.shape and drawn.dtype == x.dtype and latent.shape == (LATENT_DIM,)
    many, latents = jax.jit(jax.vmap(model.sample, in_axes=(0, None)))(
        jax.random.split(jax.random.key(7), NUM_DRAWS), params
    )
    # E x = E decode(z), each datum with its own z, so that the two differ by the likelihood's noise alone.
    differences = np.asarray(many, np.float64) - np.asarray(
        jax.jit(jax.vmap(lambda z: model.decode(params, z)))(latents)
    )
    z_scores = differences.mean(axis=0) / (differences.std(axis=0) / np.sqrt(NUM_DRAWS))
    assert np.max(np.abs(z_scores)) < 5
    latents = np.asarray(latents, np.float64)
    assert np.max(np.abs(latents.mean(axis=0))) * np.sqrt(NUM_DRAWS) < 5
    assert np.max(np.abs(np.cov(latents.T) - np.eye(2))) * np.sqrt(NUM_DRAWS / 2) < 5


def test_log_q_is_the_density_of_sample_q():
    """E_q[r / q] = 1 for a density r narrower than q, and the draws have q's mean and covariance."""
    likelihood, x = LIKELIHOODS["gaussian"]
    model = build(likelihood)
    params = draw_params(model, 8, scale=0.6)
    loc, scale = (np.asarray(a, np.float64) for a in model.encode(params, x))
    assert np.abs(np.log(scale)).max() > 0.1  # not a standard normal by chance
    keys = jax.random.split(jax.random.key(9), NUM_DRAWS)
    z = jax.jit(jax.vmap(model.sample_q, in_axes=(0, None, None)))(keys, params, x)
    log_q = np.asarray(jax.jit(jax.vmap(model.log_q, in_axes=(None, None, 0)))(params, x, z), np.float64)
    z = np.asarray(z, np.float64)
    ratio = np.exp(scipy.stats.norm.logpdf(z, loc, 0.7 * scale).sum(axis=1) - log_q)
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / np.sqrt(NUM_DRAWS)
    assert ratio.std() / np.sqrt(NUM_DRAWS) < 0.01
    white = (z - loc) / scale
    assert np.max(np.abs(white.mean(axis=0))) * np.sqrt(NUM_DRAWS) < 5
    assert np.max(np.abs(np.cov(white.T) - np.eye(2))) * np.sqrt(NUM_DRAWS / 2) < 5


# The linear VAE: W has orthogonal columns, so that its posterior is a diagonal Gaussian.
W = np.array([[0.8, 0.3], [-0.4, 0.9], [0.6, 0.2]])
W[:, 1] -= W[:, 0] * (W[:, 0] @ W[:, 1]) / (W[:, 0] @ W[:, 0])
OFFSET, SCALE = np.array([0.1, -0.2, 0.3]), 0.6
LINEAR_X = np.array([0.7, -1.1, 0.4])


def linear_vae():
    """p(x) = N(offset, W W^T + scale^2 I), with the encoder that gives the exact posterior."""
    gain = 1 + np.diag(W.T @ W) / SCALE**2
    to_loc = (W.T / SCALE**2) / gain[:, None]
    theta = {"w": jnp.asarray(W, jnp.float32), "b": jnp.asarray(OFFSET, jnp.float32)}
    lam = {
        "w": jnp.asarray(to_loc, jnp.float32),
        "b": jnp.asarray(-to_loc @ OFFSET, jnp.float32),
        "log_scale": jnp.asarray(-0.5 * np.log(gain), jnp.float32),
    }
    encoder = vd.Network(lambda key: lam, lambda p, x: jnp.concatenate([p["w"] @ x + p["b"], p["log_scale"]]))
    decoder = vd.Network(lambda key: theta, lambda p, z: p["w"] @ z + p["b"])
    model = vd.vae(encoder, decoder, latent_dim=2, likelihood=vd.likelihoods.gaussian(SCALE))
    return model, vd.Params(theta=theta, lam=lam)


def linear_log_prob(x):
    return scipy.stats.multivariate_normal(OFFSET, W @ W.T + SCALE**2 * np.eye(DIM)).logpdf(x)


def test_a_linear_vae_is_exact_at_the_posterior(key):
    """There log p(x, z) - log q(z | x) is log p(x) at any z, and the ELBO is the log-likelihood."""
    model, params = linear_vae()
    assert jax.tree.structure(model.init(key)) == jax.tree.structure(params)
    x, expected = jnp.asarray(LINEAR_X, jnp.float32), linear_log_prob(LINEAR_X)
    for z in 2.0 * jax.random.normal(key, (5, 2)):
        log_joint, log_q = model.log_joint(params, x, z), model.log_q(params, x, z)
        size = abs(float(log_joint)) + abs(float(log_q))
        np.testing.assert_allclose(float(log_joint - log_q), expected, atol=2e-6 * size)
    out = vd.importance_log_prob(model, 20, 6)(key, params, x)
    np.testing.assert_allclose(float(out.value), expected, rtol=2e-6)
    np.testing.assert_allclose(float(out.ess), 20, rtol=1e-4)
    values = jax.jit(jax.vmap(lambda k: model.elbo_estimate(k, params, x)))(jax.random.split(key, NUM_DRAWS))
    values = np.asarray(values, np.float64)
    assert abs(values.mean() - expected) < 5 * values.std() / np.sqrt(NUM_DRAWS)


def test_a_linear_vae_samples_its_marginal(key):
    model, params = linear_vae()
    x, z = jax.jit(jax.vmap(model.sample, in_axes=(0, None)))(jax.random.split(key, NUM_DRAWS), params)
    both = np.concatenate([np.asarray(x, np.float64), np.asarray(z, np.float64)], axis=1)
    top = np.concatenate([W @ W.T + SCALE**2 * np.eye(DIM), W], axis=1)
    covariance = np.concatenate([top, np.concatenate([W.T, np.eye(2)], axis=1)])
    mean = np.concatenate([OFFSET, np.zeros(2)])
    variance = np.diag(covariance)
    assert np.max(np.abs(both.mean(axis=0) - mean) / np.sqrt(variance / NUM_DRAWS)) < 5
    error = np.sqrt((covariance**2 + np.outer(variance, variance)) / NUM_DRAWS)
    assert np.max(np.abs(np.cov(both.T) - covariance) / error) < 5


def test_a_worse_encoder_gives_a_bound(key):
    """Off the posterior, ELBO = log p(x) - KL(q || posterior), the divergence in closed form."""
    model, params = linear_vae()
    params = params._replace(
        lam={**params.lam, "b": params.lam["b"] + 0.5, "log_scale": params.lam["log_scale"] - 0.4}
    )
    good = linear_vae()[1]
    x = jnp.asarray(LINEAR_X, jnp.float32)
    q, posterior = model.encode(params, x), model.encode(good, x)
    kl = float(jnp.sum(kl_divergence(dist.Normal(*q), dist.Normal(*posterior))))
    assert kl > 0.3
    values = jax.jit(jax.vmap(lambda k: model.elbo_estimate(k, params, x)))(jax.random.split(key, NUM_DRAWS))
    values = np.asarray(values, np.float64)
    assert abs(values.mean() - (linear_log_prob(LINEAR_X) - kl)) < 5 * values.std() / np.sqrt(NUM_DRAWS)


MIXTURE = vd.gmm(3, LATENT_DIM, covariance=vd.diagonal_covariance)


def by_hand(likelihood, log_prior):
    """A VAE's objective with a prior's log-density, log q subtracted at the draw, from jax.numpy alone."""

    def objective(key, params, x):
        lam, theta = params.lam["encoder"], params.theta
        h = jnp.tanh(likelihood.embed(x) @ lam["Dense_0"]["kernel"] + lam["Dense_0"]["bias"])
        out = h @ lam["Dense_1"]["kernel"] + lam["Dense_1"]["bias"]
        loc, log_scale = out[:LATENT_DIM], out[LATENT_DIM:]
        z = loc + jnp.exp(log_scale) * jax.random.normal(key, (LATENT_DIM,))
        h = jnp.tanh(z @ theta["Dense_0"]["kernel"] + theta["Dense_0"]["bias"])
        logits = h @ theta["Dense_1"]["kernel"] + theta["Dense_1"]["bias"]
        log_likelihood = jnp.sum(jnp.where(x == 1, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)))
        log_q = jnp.sum(jax.scipy.stats.norm.logpdf(z, loc, jnp.exp(log_scale)))
        return log_likelihood + log_prior(params, z) - log_q

    return objective


def mixture_log_prob(params, z):
    theta, logits = params.phi["theta"], params.phi["phi"]["logits"]
    scale = jnp.exp(theta["log_scale"])
    each = jnp.sum(jax.scipy.stats.norm.logpdf(z[None], theta["loc"], scale), axis=1)
    return jax.scipy.special.logsumexp(jax.nn.log_softmax(logits) + each)


def without_terms(mixture):
    """The same mixture as a user would write it: five functions, u discrete, no terms of its own."""
    return vd.Model(mixture.init, mixture.log_joint, mixture.log_q, mixture.sample_q, mixture.sample)


@pytest.mark.parametrize("kind", ["collapsed", "gmm", "without terms"])
def test_a_mixture_prior_is_the_objective_by_hand(kind):
    """Value, and gradient for theta, phi and lam; with u summed out, kept, or kept and drawn."""
    prior, names = {
        "collapsed": (vd.collapsed(MIXTURE), ["prior_log_prob"]),
        "gmm": (MIXTURE, ["prior_reconstruction", "prior_kl"]),
        "without terms": (without_terms(MIXTURE), ["prior_elbo"]),
    }[kind]
    likelihood, x = LIKELIHOODS["bernoulli"]
    model = build(likelihood, prior)
    params = draw_params(model, 1, scale=0.3)
    terms = model.elbo_terms(jax.random.key(0), params, x)
    assert set(terms) == {"reconstruction", "entropy", *names}
    num_draws = NUM_DRAWS * (4 if kind == "without terms" else 1)  # a score needs more
    got = moments(lambda key, params: model.elbo_estimate(key, params, x), params, num_draws)
    objective = by_hand(likelihood, mixture_log_prob)
    expected = moments(lambda key, params: objective(key, params, x), params, seed=1)
    assert np.abs(expected["phi"][0]).max() > 0.05
    agree(got, expected, ["value", "theta", "phi", "lam"])


def test_a_priors_own_encoder_is_trained_in_lam():
    """A mixture with a q(u | z) of its own: its parameters are gathered in lam, and its gradient is right."""
    prior = vd.gmm(
        3,
        LATENT_DIM,
        covariance=vd.diagonal_covariance,
        encoder=vd.nets.mlp((LATENT_DIM,), (3,), hidden=(), out_bias=0.3),
    )
    likelihood, x = LIKELIHOODS["bernoulli"]
    model = build(likelihood, prior)
    params = draw_params(model, 1)
    assert set(params.lam) == {"encoder", "prior"} and set(params.phi) == {"theta", "phi"}

    def log_prior(params, z):
        q_net = params.lam["prior"]["Dense_0"]
        log_q = jax.nn.log_softmax(z @ q_net["kernel"] + q_net["bias"])
        theta = params.phi["theta"]
        each = jnp.sum(
            jax.scipy.stats.norm.logpdf(z[None], theta["loc"], jnp.exp(theta["log_scale"])), axis=1
        )
        return jnp.sum(jnp.exp(log_q) * (jax.nn.log_softmax(params.phi["phi"]["logits"]) + each - log_q))

    got = moments(lambda key, params: model.elbo_estimate(key, params, x), params)
    objective = by_hand(likelihood, log_prior)
    expected = moments(lambda key, params: objective(key, params, x), params, seed=1)
    agree(got, expected, ["value", "theta", "phi", "lam"])
    grads = jax.grad(lambda p: model.elbo_estimate(jax.random.key(0), p, x))(params)
    assert np.all(np.asarray(grads.lam["prior"]["Dense_0"]["bias"]) != 0)


def continuous_prior():
    """z = a u + s eps, u ~ N(0, 1), with q(u | z) off its posterior; no terms of its own."""
    a, s = np.array([0.9, -0.5]), 0.8

    def log_normal(x, loc, scale):
        return jnp.sum(jax.scipy.stats.norm.logpdf(x, loc, scale))

    def sample(key, params):
        key_u, key_z = jax.random.split(key)
        u = jax.random.normal(key_u)
        return params.theta * u + s * jax.random.normal(key_z, (2,)), u

    model = vd.Model(
        init=lambda key: vd.Params(theta=jnp.asarray(a, jnp.float32), lam=jnp.array([0.3, -0.2])),
        log_joint=lambda params, z, u: log_normal(u, 0.0, 1.0) + log_normal(z, params.theta * u, s),
        log_q=lambda params, z, u: log_normal(u, params.lam @ z, 0.9),
        sample_q=lambda key, params, z: params.lam @ z + 0.9 * jax.random.normal(key),
        sample=sample,
    )
    return model, lambda z: scipy.stats.multivariate_normal(
        np.zeros(2), np.outer(a, a) + s**2 * np.eye(2)
    ).logpdf(z)


@pytest.mark.parametrize("kind", ["gmm", "continuous"])
def test_the_pair_is_one_model(kind):
    """Log p(x, (z, u)) - log q((z, u) | x) has the ELBO for its mean and p(x) for the mean of its exponential."""
    prior = {"gmm": MIXTURE, "continuous": continuous_prior()[0]}[kind]
    likelihood, x = LIKELIHOODS["bernoulli"]
    model = build(likelihood, prior)
    params = draw_params(model, 1, scale=0.2)
    if kind == "continuous":
        params = params._replace(phi={**params.phi, "theta": prior.init(None).theta})
    wider = jnp.array([0.0, 0.0, 0.5, 0.5])  # weights without a tail: q as wide as what it stands for
    params.lam["encoder"]["Dense_1"]["bias"] += wider

    def one(key):
        z = model.sample_q(key, params, x)
        return model.log_joint(params, x, z) - model.log_q(params, x, z)

    log_w = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), NUM_DRAWS)), np.float64)
    keys = jax.random.split(jax.random.key(1), NUM_DRAWS)
    terms = jax.jit(jax.vmap(lambda k: model.elbo_estimate(k, params, x)))(keys)
    terms = np.asarray(terms, np.float64)
    assert abs(log_w.mean() - terms.mean()) < 5 * np.sqrt((log_w.var() + terms.var()) / NUM_DRAWS)

    # p(x) by simulation: z from the prior's closed form, p(x | z) by decode, which is P(x = 1 | z).
    draws = jax.jit(jax.vmap(model.sample, in_axes=(0, None)))(
        jax.random.split(jax.random.key(2), NUM_DRAWS), params
    )
    z = np.asarray(draws[1][0], np.float64)
    assert draws[0].shape == (NUM_DRAWS, DIM) and draws[0].dtype == jnp.int32
    p = np.asarray(
        jax.jit(jax.vmap(lambda z: model.decode(params, z)))(jnp.asarray(z, jnp.float32)), np.float64
    )
    p = np.prod(np.where(np.asarray(x) == 1, p, 1 - p), axis=1)
    w = np.exp(log_w)
    assert abs(w.mean() - p.mean()) < 5 * np.sqrt((w.var() + p.var()) / NUM_DRAWS)
    assert np.sqrt(w.var() / NUM_DRAWS) < 0.02 * w.mean()
    is_x = np.all(np.asarray(draws[0]) == np.asarray(x), axis=1)
    assert abs(is_x.mean() - p.mean()) < 5 * np.sqrt((is_x.var() + p.var()) / NUM_DRAWS)
    if kind == "continuous":  # the draws of z are the prior's: their covariance is a a^T + s^2 I
        a = np.asarray(params.phi["theta"], np.float64)
        covariance = np.outer(a, a) + 0.8**2 * np.eye(2)
        error = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / NUM_DRAWS)
        assert np.max(np.abs(np.cov(z.T) - covariance) / error) < 5


def test_a_prior_at_its_own_posterior_gives_its_log_density(key):
    """Without terms, at the exact q(u | z) the prior's one-sample ELBO is log p(z), whatever u was drawn."""
    prior, log_prob = continuous_prior()
    a, s = np.array([0.9, -0.5]), 0.8
    precision = 1 + a @ a / s**2
    lam = jnp.asarray(a / s**2 / precision, jnp.float32)
    scale = float(1 / np.sqrt(precision))
    prior = prior._replace(
        init=lambda key: vd.Params(theta=jnp.asarray(a, jnp.float32), lam=lam),
        log_q=lambda params, z, u: jax.scipy.stats.norm.logpdf(u, params.lam @ z, scale),
        sample_q=lambda key, params, z: params.lam @ z + scale * jax.random.normal(key),
    )
    likelihood, x = LIKELIHOODS["bernoulli"]
    model = build(likelihood, prior)
    params = draw_params(model, 3)
    fixed = prior.init(key)
    params = params._replace(phi={**params.phi, "theta": fixed.theta}, lam={**params.lam, "prior": fixed.lam})
    terms = model.elbo_terms(jax.random.key(1), params, x)
    assert set(terms) == {"reconstruction", "entropy", "prior_elbo"}
    loc, q_scale = (np.asarray(a, np.float64) for a in model.encode(params, x))
    np.testing.assert_allclose(
        float(terms["entropy"]), scipy.stats.norm(loc, q_scale).entropy().sum(), rtol=1e-5
    )
    keys = jax.random.split(jax.random.key(2), NUM_DRAWS)
    got = np.asarray(
        jax.jit(jax.vmap(lambda k: model.elbo_terms(k, params, x)["prior_elbo"]))(keys), np.float64
    )
    z = loc + q_scale * np.random.default_rng(0).normal(size=(NUM_DRAWS, 2))
    expected = log_prob(z)
    assert abs(got.mean() - expected.mean()) < 5 * np.sqrt((got.var() + expected.var()) / NUM_DRAWS)
    # Not only the mean: the two are one distribution.
    assert scipy.stats.ks_2samp(got, expected).pvalue > 1e-5


def test_outputs_that_do_not_fit_are_refused_at_trace_time(key):
    likelihood, x = LIKELIHOODS["categorical"]
    good = build(likelihood)
    narrow = vd.vae(
        vd.nets.mlp((DIM,), (LATENT_DIM,), hidden=()),
        vd.nets.mlp((LATENT_DIM,), (DIM, LEVELS), hidden=()),
        latent_dim=LATENT_DIM,
        likelihood=likelihood,
    )
    wrong = vd.vae(
        vd.nets.mlp((DIM,), (2 * LATENT_DIM,), hidden=()),
        vd.nets.mlp((LATENT_DIM,), (DIM,), hidden=()),
        latent_dim=LATENT_DIM,
        likelihood=likelihood,
    )

    def shape(function, model, *args):
        return jax.eval_shape(function, *args[:1], jax.eval_shape(model.init, key), *args[1:])

    assert shape(good.elbo_estimate, good, key, x).shape == ()
    pattern = r"encoder: got output of shape \(2,\), expected \(4,\), loc beside log scale for latent_dim = 2"
    for function in (narrow.elbo_estimate, narrow.sample_q):
        with pytest.raises(ValueError, match=pattern):
            shape(function, narrow, key, x)
    pattern = (
        r"decoder: got output of shape \(3,\), expected \(3, 5\) for x of shape \(3,\); build it with "
        r"out_shape=likelihood.out_shape\(x.shape\)"
    )
    with pytest.raises(ValueError, match=pattern):
        shape(wrong.elbo_estimate, wrong, key, x)
    with pytest.raises(ValueError, match=pattern):
        jax.eval_shape(wrong.log_joint, jax.eval_shape(wrong.init, key), x, jnp.zeros(LATENT_DIM))
    with pytest.raises(ValueError, match="latent_dim: got 0, expected at least 1"):
        vd.vae(vd.nets.mlp((DIM,), (2,)), vd.nets.mlp((1,), (DIM,)), latent_dim=0, likelihood=likelihood)


def test_raw_keys_are_refused():
    model = build(LIKELIHOODS["bernoulli"][0])
    raw, x = jax.random.PRNGKey(0), LIKELIHOODS["bernoulli"][1]
    params = draw_params(model, 0)
    calls = [
        lambda: model.init(raw),
        lambda: model.sample(raw, params),
        lambda: model.sample_q(raw, params, x),
        lambda: model.elbo_terms(raw, params, x),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="expected a typed key"):
            call()


@pytest.mark.parametrize("kind", ["none", "collapsed"])
def test_parts_of_the_parameters(key, kind):
    """A fixed prior has no phi; theta is the decoder's and lam the encoder's, drawn from different keys."""
    prior = {"none": None, "collapsed": vd.collapsed(MIXTURE)}[kind]
    model = build(LIKELIHOODS["bernoulli"][0], prior)
    params = jax.jit(model.init)(key)
    own = params.lam if prior is None else params.lam["encoder"]
    assert own["Dense_0"]["kernel"].shape == (DIM, 4) and params.theta["Dense_0"]["kernel"].shape == (2, 4)
    if prior is None:
        assert params.phi == ()
    else:
        assert params.lam["prior"] == () and set(params.phi["theta"]) == {"loc", "log_scale"}
    assert params.cv == ()
    # An array of latents, not a pair, without a prior's latent.
    z = model.sample_q(key, params, jnp.array([1, 0, 1]))
    assert (z.shape == (LATENT_DIM,)) if prior is None else (z[0].shape == (LATENT_DIM,) and z[1] == ())


@pytest.mark.parametrize("kind", ["none", "gmm"])
def test_parts_start_from_keys_of_their_own(key, kind):
    """Networks whose parameters are the key that they were given, and a prior of the same kind."""
    echo = vd.Network(jax.random.key_data, lambda params, x: x)
    prior = None if kind == "none" else MIXTURE._replace(init=lambda key: vd.Params(theta=echo.init(key)))
    model = vd.vae(echo, echo, latent_dim=2, likelihood=vd.likelihoods.gaussian(), prior=prior)
    params = model.init(key)
    parts = [params.theta, params.lam] if prior is None else [params.theta, *params.lam.values()]
    parts = [tuple(np.asarray(part)) for part in [*parts, params.phi and params.phi["theta"]] if len(part)]
    assert len(set(parts)) == len(parts) == (2 if prior is None else 3)
