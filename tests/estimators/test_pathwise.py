"""Pathwise and doubly reparametrized gradients against exact ones, by part of Params and by bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import vdiff as vd
from tests import toys

BOUNDS = toys.BOUNDS
ESTIMATORS = {"pathwise": vd.pathwise, "doubly_reparameterized": vd.doubly_reparameterized}
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())


def by_part(gradient):
    return {part: toys.flat_single(getattr(gradient, part)) for part in ("theta", "phi", "lam")}


# The reference itself: quadrature against the closed forms.


def test_the_reference_is_the_closed_form():
    """Quadrature gives the closed-form ELBO and its gradient, and reaches log p(x) where q is the posterior."""
    toy = toys.toy("linear2")
    value, gradient = toys.exact_expectations(toy, 1, (1.0,))[1.0]

    def mean_elbo(params, data):
        return jnp.mean(jax.vmap(toys.linear_gaussian_elbo, in_axes=(None, 0))(params, data))

    closed, closed_gradient = toys.in_float64(jax.value_and_grad(mean_elbo), toy.params, toy.data)
    assert value == pytest.approx(closed, rel=1e-9)
    for mine, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(closed_gradient), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-9)
    at_best = toy._replace(params=toys.at_posterior(toy.params))
    best = toys.exact_expectations(at_best, 1, (1.0,))[1.0][0]
    log_prob = jax.vmap(toys.linear_gaussian_log_prob, in_axes=(None, 0))(toy.params, jnp.asarray(toy.data))
    assert best == pytest.approx(float(jnp.mean(log_prob)), rel=1e-6)


@pytest.mark.parametrize(("name", "num_samples", "num_nodes"), [("linear", 8, 10), ("shared of 2", 3, 7)])
def test_the_reference_has_converged(name, num_samples, num_nodes):
    for alpha, (_, coarse) in toys.exact_expectations(
        toys.toy(name), num_samples, num_nodes=num_nodes
    ).items():
        for part in ("theta", "phi", "lam"):
            one = toys.flat_single(getattr(coarse, part))
            other = toys.flat_single(getattr(toys.exact(name, num_samples)[alpha][1], part))
            assert np.linalg.norm(one - other) < 1e-3 * np.linalg.norm(other), alpha


# Values.


@every_estimator
@pytest.mark.parametrize("num_samples", [1, 5])
def test_the_value_is_the_bound(estimator, num_samples):
    """Never a surrogate: to 1e-6 the bound of the log-weights of the same draws."""
    toy = toys.toy("linear2")
    objectives = {alpha: estimator(toy.model, bound, num_samples) for alpha, bound in BOUNDS.items()}
    keys = jax.random.split(jax.random.key(0), len(toy.data))
    runs = toys.single_draws(objectives, keys, toy.params, toy.data)
    for i, key in enumerate(keys):
        log_weights = toys.log_weights(toy.model, key, toy.params, jnp.asarray(toy.data[i]), num_samples)
        for alpha, (terms, _) in runs.items():
            assert list(terms) == [BOUNDS[alpha].__name__]
            (value,) = terms.values()
            assert float(value[i]) == pytest.approx(toys.numpy_bound(alpha, log_weights), rel=1e-6)


# Gradients.


@every_estimator
@pytest.mark.parametrize(
    ("num_samples", "alphas"), [(2, (1.0, 0.0, 0.5)), (5, tuple(BOUNDS)), (8, (0.0, 2.0))]
)
def test_gradients_are_unbiased(estimator, num_samples, alphas):
    """Linear-Gaussian, batch of 3: theta, phi and lambda against the exact gradient of each bound."""
    toy = toys.toy("linear")
    objectives = {alpha: estimator(toy.model, BOUNDS[alpha], num_samples) for alpha in alphas}
    runs = toys.gradient_draws(objectives, toy.params, toy.data, 40_000, seed=num_samples)
    for alpha, (values, draws) in runs.items():
        value, gradient = toys.exact("linear", num_samples)[alpha]
        assert toys.z_scores(values[:, None], value) < 5.0, alpha
        toys.check_unbiased(draws, gradient)


@every_estimator
def test_elbo_gradients_against_the_closed_form(estimator):
    """Two latent dimensions and a full covariance."""
    toy = toys.toy("linear2")

    def mean_elbo(params, data):
        return jnp.mean(jax.vmap(toys.linear_gaussian_elbo, in_axes=(None, 0))(params, data))

    value, gradient = toys.in_float64(jax.value_and_grad(mean_elbo), toy.params, toy.data)
    runs = toys.gradient_draws({"elbo": estimator(toy.model, vd.elbo, 2)}, toy.params, toy.data, 80_000)
    assert toys.z_scores(runs["elbo"][0][:, None], value) < 5.0
    toys.check_unbiased(runs["elbo"][1], gradient)


@every_estimator
def test_weights_shared_between_p_and_q(estimator):
    """Theta in p and in q, two layers of latents, batch of 2: stopping only lam would bias theta."""
    toy = toys.toy("shared of 2")
    objectives = {alpha: estimator(toy.model, bound, 3) for alpha, bound in BOUNDS.items()}
    runs = toys.gradient_draws(objectives, toy.params, toy.data, 60_000)
    for alpha, (values, draws) in runs.items():
        value, gradient = toys.exact("shared of 2", 3)[alpha]
        assert toys.z_scores(values[:, None], value) < 5.0, alpha
        toys.check_unbiased(draws, gradient)


@pytest.mark.parametrize("alpha", [alpha for alpha in BOUNDS if alpha != "tvo"])
def test_doubly_reparameterized_is_its_formula(alpha):
    """One draw of the gradient, rebuilt in float64: c_k = w_k - H_kk for lam, w_k for theta and phi.

    With w = softmax((1 - alpha) l), c = alpha w + (1 - alpha) w^2: 1/K for elbo, w^2 for iwae.
    """
    toy, num_samples, key = toys.toy("linear"), 5, jax.random.key(4)
    x = jnp.asarray(toy.data[0])
    eps = jax.vmap(lambda k: jax.random.normal(k, (1,)))(jax.random.split(key, num_samples))

    def rebuilt(params, x, eps):
        def log_weight(params_p, params_q, z):
            return toy.model.log_joint(params_p, x, z) - toy.model.log_q(params_q, x, z)

        z = jax.vmap(toy.transport, in_axes=(None, None, 0))(params, x, eps)
        w = jax.nn.softmax((1 - alpha) * jax.vmap(lambda z: log_weight(params, params, z))(z))
        c = alpha * w + (1 - alpha) * w**2
        of_p = jax.vmap(jax.grad(log_weight), in_axes=(None, None, 0))(params, params, z)
        of_z = jax.vmap(jax.grad(log_weight, argnums=2), in_axes=(None, None, 0))(params, params, z)

        def along_paths(params):
            return jnp.sum(
                c[:, None] * of_z * jax.vmap(toy.transport, in_axes=(None, None, 0))(params, x, eps)
            )

        direct = jax.tree.map(lambda leaf: jnp.tensordot(w, leaf, 1), of_p)
        return direct._replace(lam=jax.grad(along_paths)(params).lam)

    expected = toys.in_float64(rebuilt, toy.params, np.asarray(x), np.asarray(eps))
    objective = vd.doubly_reparameterized(toy.model, BOUNDS[alpha], num_samples)
    got = toys.single_draws({"it": objective}, key[None], toy.params, x[None])["it"][1]
    for part, value in by_part(got).items():
        np.testing.assert_allclose(value, toys.flat_single(getattr(expected, part)), rtol=1e-4, atol=1e-5)


def test_the_same_key_gives_pathwise_value_and_theta():
    """Theta and phi see the ordinary weights w_k; squared weights for theta are a known wrong gradient."""
    toy = toys.toy("linear2")
    objectives = {(name, a): e(toy.model, b, 5) for name, e in ESTIMATORS.items() for a, b in BOUNDS.items()}
    runs = toys.single_draws(objectives, jax.random.key(1)[None], toy.params, toy.data[2:])
    for alpha, bound in BOUNDS.items():
        (one_terms, one), (other_terms, other) = (runs[name, alpha] for name in ESTIMATORS)
        np.testing.assert_allclose(one_terms[bound.__name__], other_terms[bound.__name__], rtol=1e-6)
        one, other = by_part(one), by_part(other)
        for part in ("theta", "phi"):
            np.testing.assert_allclose(one[part], other[part], rtol=1e-4, atol=1e-5)
        assert np.max(np.abs(one["lam"] - other["lam"])) > 1e-2


# Variance.


def test_at_the_posterior_every_single_draw_is_zero():
    """Sticking the landing: log p(x, z) - log q(z | x) is flat in z, so nothing is left of lambda's gradient."""
    toy = toys.toy("linear2")
    params = toys.at_posterior(toy.params)
    objectives = {str(a): vd.doubly_reparameterized(toy.model, bound, 5) for a, bound in BOUNDS.items()}
    objectives["one draw"] = vd.doubly_reparameterized(toy.model, vd.elbo, 1)
    objectives["pathwise"] = vd.pathwise(toy.model, vd.elbo, 5)
    runs = toys.gradient_draws(objectives, params, toy.data[:1], 20)
    size = {name: np.abs(toys.flat(draws.lam)) for name, (_, draws) in runs.items()}
    pathwise = size.pop("pathwise")
    assert np.min(np.max(pathwise, axis=1)) > 0.1
    for name, ours in size.items():
        assert np.max(ours) < 1e-5 * np.max(pathwise), name


def test_near_the_posterior_the_variance_is_a_fraction_of_pathwise():
    """Lambda .05 from the posterior, K = 5: sticking the landing and DReG."""
    toy = toys.toy("linear2")
    best = toys.at_posterior(toy.params)
    params = best._replace(lam=jax.tree.map(lambda leaf: leaf + 0.05, best.lam))
    objectives = {(name, a): e(toy.model, BOUNDS[a], 5) for name, e in ESTIMATORS.items() for a in (1.0, 0.0)}
    runs = toys.gradient_draws(objectives, params, toy.data, 2_000)
    for alpha in (1.0, 0.0):
        ours, pathwise = (toys.variance(runs[name, alpha][1], "lam") for name in reversed(ESTIMATORS))
        assert pathwise > 1e-3 and ours < 0.1 * pathwise, (alpha, ours / pathwise)


def test_weights_that_underflow():
    """Log-weights hundreds of nats apart: one draw carries all, and the gradient is that draw's, not NaN."""
    toy, num_samples, key = toys.toy("linear2"), 4, jax.random.key(0)
    x = 200.0 * jnp.asarray(toy.data[0])
    log_weights = np.asarray(toys.log_weights(toy.model, key, toy.params, x, num_samples), float)
    keys = jax.random.split(key, num_samples)
    alphas = (0.0, 2.0)
    objectives = {
        (name, a): e(toy.model, BOUNDS[a], num_samples) for name, e in ESTIMATORS.items() for a in alphas
    }
    runs = toys.single_draws(objectives, key[None], toy.params, x[None])
    for (name, alpha), (_, gradient) in runs.items():
        weights = scipy.special.softmax((1 - alpha) * log_weights)
        assert np.max(weights) > 1 - 1e-7 and np.sum(np.float32(weights) == 0) >= 1
        k = int(np.argmax(weights))

        # The draw that carries all, by itself: c = w = 1 there, as with one sample.
        def alone(params, k=k, is_stopped=name == "doubly_reparameterized"):
            z = toy.model.sample_q(keys[k], params, x)
            fixed = jax.lax.stop_gradient(params) if is_stopped else params
            return toy.model.log_joint(params, x, z) - toy.model.log_q(fixed, x, z)

        for part, expected in by_part(jax.grad(alone)(toy.params)).items():
            scale = np.max(np.abs(expected))
            np.testing.assert_allclose(by_part(gradient)[part], expected, atol=1e-5 * scale)


# How it is computed.


@every_estimator
def test_traces_once(estimator):
    traces = []
    toy = toys.toy("linear2")

    def log_joint(params, x, z):
        traces.append(z.shape)
        return toy.model.log_joint(params, x, z)

    objective = estimator(toy.model._replace(log_joint=log_joint), vd.iwae, 8)
    step = jax.jit(jax.value_and_grad(vd.total(objective), argnums=1))
    step(jax.random.key(0), toy.params, jnp.asarray(toy.data[0]))
    first = len(traces)
    # Once forward; the doubly reparametrized one writes the same values twice, for the compiler to merge.
    assert first == (1 if estimator is vd.pathwise else 2)
    for seed in range(3):
        step(jax.random.key(seed), jax.tree.map(lambda leaf: leaf + 1, toy.params), jnp.asarray(toy.data[1]))
    assert len(traces) == first and step._cache_size() == 1


def test_doubly_reparameterized_keeps_one_forward_pass():
    """Its compiled gradient costs at most 1.1 of pathwise's arithmetic on an MLP VAE; two passes are 1.3."""
    likelihood = vd.likelihoods.bernoulli()
    model = vd.vae(
        vd.nets.mlp((16, 16), (8,), hidden=(64,)),
        vd.nets.mlp((4,), (16, 16), hidden=(64,)),
        latent_dim=4,
        likelihood=likelihood,
    )
    params, x = model.init(jax.random.key(0)), jnp.zeros((16, 16), jnp.int32)

    def flops(estimator, bound):
        gradient = jax.grad(vd.total(estimator(model, bound, 5)), argnums=1)
        return jax.jit(gradient).lower(jax.random.key(0), params, x).compile().cost_analysis()["flops"]

    cost = {name: flops(estimator, vd.iwae) for name, estimator in ESTIMATORS.items()}
    decoder = 5 * 2 * 3 * (64 * 4 + 64 * 256)
    assert cost["pathwise"] > 0.9 * decoder
    assert cost["doubly_reparameterized"] < 1.1 * cost["pathwise"], cost


# What it refuses.


@every_estimator
def test_discrete_latents_are_refused_at_trace_time(estimator):
    toy = toys.toy("bernoulli")
    objective = estimator(toy.model, vd.elbo, 2)
    with pytest.raises(
        TypeError, match=r"got leaves of dtype \['int32'\].*score_function.*enumerated"
    ) as error:
        jax.eval_shape(objective, jax.random.key(0), toy.params, jnp.asarray(toy.data[0]))
    assert estimator.__name__ in str(error.value)


@every_estimator
def test_one_discrete_leaf_is_enough(estimator):
    toy = toys.toy("shared")

    def sample_q(key, params, x):
        return toy.model.sample_q(key, params, x) | {"on": jax.random.bernoulli(key)}

    objective = estimator(toy.model._replace(sample_q=sample_q), vd.elbo, 2)
    with pytest.raises(TypeError, match="score_function"):
        jax.eval_shape(objective, jax.random.key(0), toy.params, jnp.asarray(toy.data[0]))


@every_estimator
def test_raw_keys_are_refused(estimator):
    toy = toys.toy("linear")
    with pytest.raises(TypeError, match="expected a typed key"):
        estimator(toy.model)(jax.random.PRNGKey(0), toy.params, jnp.asarray(toy.data[0]))
