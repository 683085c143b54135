"""Bottom-up inference: a linear chain against its marginal, two layers of networks against exact expectations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from tests.models import hierarchies as h

NUM_DRAWS = 40_000


@functools.cache
def chain():
    """The linear chain with its exact posterior: q(z_l | z_{l-1}) by Bayes' rule from the marginal of z_l."""
    encoders = []
    for layer in (1, 2, 3):
        a, b, s = (h.A[layer - 1], h.B[layer - 1], h.S[layer - 1])
        seen = np.diag(a / s**2) if layer > 1 else h.W.T / s**2
        precision = 1 / h.VAR[layer] + (a**2 / s**2 if layer > 1 else h.GAIN)
        weight = seen / precision[:, None]
        bias = h.MEAN[layer] / h.VAR[layer] / precision - weight @ b
        encoders.append(h.affine(weight, bias, -0.5 * np.log(precision)))
    decoders = [
        h.affine(h.W, h.B[0]),
        *(h.affine(np.diag(h.A[layer]), h.B[layer], np.log(h.S[layer])) for layer in (1, 2)),
    ]
    model = vd.hvae(
        encoders, decoders, latent_dims=(2, 2, 2), likelihood=vd.likelihoods.gaussian(float(h.S[0]))
    )
    return model, model.init(jax.random.key(0))


def test_at_the_posterior_every_weight_is_the_marginal(key):
    """log p(x, z) - log q(z | x) = log p(x) at any z, and by importance sampling; theta, phi, lam in their places."""
    model, params = chain()
    assert len(params.phi) == 2 and len(params.lam) == 3 and params.theta["w"].shape == (3, 2)
    x, expected = jnp.asarray(h.X, jnp.float32), h.log_prob(h.X)

    @toys.quick_jit
    def run(key):
        z = jax.vmap(lambda k: jax.tree.map(lambda leaf: 2.0 * leaf, model.sample_q(k, params, x)))(
            jax.random.split(key, 5)
        )
        weights = jax.vmap(lambda z: model.log_joint(params, x, z) - model.log_q(params, x, z))(z)
        return weights, vd.importance_log_prob(model, 20, 6)(key, params, x)

    weights, judged = run(key)
    np.testing.assert_allclose(weights, expected, atol=1e-4)
    np.testing.assert_allclose(float(judged.value), expected, atol=1e-5)
    np.testing.assert_allclose(float(judged.ess), 20, rtol=1e-4)


def test_importance_sampling_from_a_q_beside_the_posterior(key):
    model, params = chain()
    beside = tuple(layer | {"b": layer["b"] + 0.2, "c": layer["c"] + 0.1} for layer in params.lam)
    h.check_importance_sampling(model, params._replace(lam=beside), key)


def test_annealing_by_hamiltonian_moves_is_unbiased(key):
    """From a q whose layers sit beside the posterior's: E w = p(x) within 4 errors, and tighter than without a move."""
    pytest.importorskip("blackjax")
    model, params = chain()
    beside = params._replace(lam=tuple(layer | {"b": layer["b"] + 0.5} for layer in params.lam))
    x = jnp.asarray(h.X, jnp.float32)
    errors = {}
    for num_steps in (1, 8):
        estimate = vd.evaluate.annealed_log_prob(model, vd.evaluate.hmc(0.25, 4), num_steps)
        run = toys.quick_jit(jax.vmap(estimate, in_axes=(0, None, None)))
        judged = run(jax.random.split(key, NUM_DRAWS // 10), beside, x)
        errors[num_steps] = np.asarray(judged.value, np.float64) - h.log_prob(h.X)
    ratio = np.exp(errors[8])
    std_error = ratio.std() / np.sqrt(len(ratio))
    assert std_error < 0.05 and abs(ratio.mean() - 1.0) < 4 * std_error
    assert errors[8].std() < 0.7 * errors[1].std() and errors[1].mean() < errors[8].mean() - 0.1


def test_terms_and_draws_of_the_chain(key):
    """The terms' mean is log p(x), each KL that of its layer; draws of p and of q have closed-form moments."""
    model, params = chain()
    x = jnp.asarray(h.X, jnp.float32)

    @toys.quick_jit
    @jax.vmap
    def run(key):
        return model.elbo_terms(key, params, x), model.sample(key, params), model.sample_q(key, params, x)

    terms, (xs, z), of_q = jax.device_get(run(jax.random.split(key, NUM_DRAWS)))
    assert set(terms) == {"reconstruction", "kl_1", "kl_2", "kl_3"}
    total = sum(term.astype(np.float64) for term in terms.values())
    assert toys.z_scores(total[:, None], h.log_prob(h.X)) < 5.0

    # E_q log q(z_l | z_{l-1}) - log p(z_l | z_{l+1}), from the moments of q: each z_l is Gaussian given x.
    mean, var, cross = posterior()
    for i in (1, 2, 3):
        prior_mean, prior_var = (h.A[i] * mean[i + 1] + h.B[i], h.S[i] ** 2) if i < 3 else (0.0, 1.0)
        # Var(z_l - a z_{l+1}) = Var z_l + a^2 Var z_{l+1} - 2 a Cov
        spread = var[i] + (h.A[i] ** 2 * var[i + 1] - 2 * h.A[i] * cross[i] if i < 3 else 0.0)
        log_p = -0.5 * ((mean[i] - prior_mean) ** 2 + spread) / prior_var - 0.5 * np.log(
            2 * np.pi * prior_var
        )
        log_scale = np.asarray(params.lam[i - 1]["c"], np.float64)
        exact = np.sum(log_scale + 0.5 * np.log(2 * np.pi * np.e) + log_p)
        assert toys.z_scores(terms[f"kl_{i}"].astype(np.float64)[:, None], exact) < 5.0, i

    for leaf, m, v in ((z[i], h.MEAN[i + 1], h.VAR[i + 1]) for i in range(3)):
        assert np.max(toys.z_scores(leaf.astype(np.float64), m)) < 5.0
        assert np.max(toys.z_scores((leaf - m).astype(np.float64) ** 2, v)) < 5.0
    # Neighbours depend on each other as they should, and so does x on z_1.
    pairs = [(z[i] - h.MEAN[i + 1]) * (z[i + 1] - h.MEAN[i + 2]) for i in range(2)]
    for i, pair in enumerate(pairs):
        assert np.max(toys.z_scores(pair.astype(np.float64), h.A[i + 1] * h.VAR[i + 2])) < 5.0
    noise = xs - z[0] @ h.W.T - h.B[0]
    assert np.max(toys.z_scores(noise**2, np.full(3, h.S[0] ** 2))) < 5.0
    for i in range(3):
        assert np.max(toys.z_scores(of_q[i].astype(np.float64), mean[i + 1])) < 5.0
        assert np.max(toys.z_scores((of_q[i] - mean[i + 1]).astype(np.float64) ** 2, var[i + 1])) < 5.0


def posterior():
    """Means, variances and covariances of neighbours of z_1..z_3 given x, by one Gaussian of six dimensions."""
    joint = np.zeros((6, 6))  # the precision of z = (z_1, z_2, z_3), unit by unit
    shift = np.zeros(6)
    for unit in range(2):
        at = [unit, 2 + unit, 4 + unit]
        joint[at[0], at[0]] += h.GAIN[unit]
        shift[at[0]] += (h.W.T @ (h.X - h.B[0]))[unit] / h.S[0] ** 2
        joint[at[2], at[2]] += 1.0
        for layer in (1, 2):
            a, b, s = h.A[layer][unit], h.B[layer][unit], h.S[layer][unit]
            row = np.zeros(6)
            row[at[layer - 1]], row[at[layer]] = 1.0, -a
            joint += np.outer(row, row) / s**2
            shift += row * b / s**2
    covariance = np.linalg.inv(joint)
    mean = covariance @ shift
    of = lambda v: [None, *v.reshape(3, 2)]  # noqa: E731
    cross = [None, np.diag(covariance[:2, 2:4]), np.diag(covariance[2:4, 4:])]
    return of(mean), of(np.diag(covariance)), cross


@functools.cache
def two_layers():
    """z_2 [1] and z_1 [1] of tanh networks, x [2] of Gaussians."""
    encoders = [h.random_dense(2, 2, 0, (1.0, -0.7)), h.random_dense(1, 2, 1, (-1.0, -0.7))]
    decoders = [h.random_dense(1, 2, 2), h.random_dense(1, 2, 3, (-1.5, -0.5))]
    model = vd.hvae(encoders, decoders, latent_dims=(1, 1), likelihood=vd.likelihoods.gaussian(0.7))

    def transport(params, x, eps):
        z_1 = h.transport(encoders[0].apply(params.lam[0], x), eps[:1])
        return z_1, h.transport(encoders[1].apply(params.lam[1], z_1), eps[1:])

    data = np.array([[-2.0, 1.0]], np.float32)
    return toys.Toy(model, model.init(jax.random.key(0)), data, transport, 2)


@pytest.mark.slow
def test_terms_and_estimators_against_exact_expectations():
    """Two layers, K = 2: values, and gradients by theta, phi and lam apart."""
    h.check_against_exact(two_layers())


def test_one_layer_is_a_vae(key):
    encoder, decoder = h.random_dense(2, 4, 0), h.random_dense(2, 2, 1)
    likelihood = vd.likelihoods.gaussian(0.7)
    model = vd.hvae([encoder], [decoder], latent_dims=(2,), likelihood=likelihood)
    plain = vd.vae(encoder, decoder, latent_dim=2, likelihood=likelihood)
    params = model.init(key)
    assert params.phi == ()
    of_plain = vd.Params(theta=params.theta, lam=params.lam[0])
    x, z = jnp.array([0.3, -1.0]), jnp.array([0.5, 2.0])

    @toys.quick_jit
    def numbers():
        of_one = model.log_joint(params, x, (z,)), model.log_q(params, x, (z,))
        of_other = plain.log_joint(of_plain, x, z), plain.log_q(of_plain, x, z)
        kls = model.elbo_terms(key, params, x)["kl_1"], plain.elbo_terms(key, of_plain, x)["kl"]
        return jnp.stack([*of_one, kls[0]]), jnp.stack([*of_other, kls[1]])

    np.testing.assert_allclose(*numbers(), rtol=1e-6)


def test_encode_decode_complete(key):
    """Means passed upwards; the likelihood's mean; given layers stay, others are drawn from the prior."""
    toy = two_layers()
    model, params, x = toy.model, toy.params, jnp.asarray(toy.data[0])

    @toys.quick_jit
    def coded():
        z = model.encode(params, x)
        mean = h.random_dense(1, 2, 2).apply(params.theta, z[0])
        return (z, model.decode(params, z)), (toy.transport(params, x, jnp.zeros(2)), mean)

    one, other = coded()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)

    upper = (jnp.array([0.9]),)
    complete = toys.quick_jit(jax.vmap(lambda k: model.complete(k, params, upper)))
    z_1, z_2 = complete(jax.random.split(key, 20_000))
    np.testing.assert_array_equal(z_2, np.full((20_000, 1), upper[0][0]))
    loc, log_scale = np.asarray(h.random_dense(1, 2, 3, -9.0).apply(params.phi[0], upper[0]), np.float64)
    z_1 = np.asarray(z_1, np.float64)
    assert toys.z_scores(z_1, loc) < 5.0 and toys.z_scores((z_1 - loc) ** 2, np.exp(2 * log_scale)) < 5.0
    assert model.complete(key, params, one[0]) == one[0]


def test_the_first_encoder_runs_once():
    """K = 7 draws: the network that sees x is one product, those above it seven."""
    encoders = [vd.nets.mlp((11,), (10,), hidden=(13,)), vd.nets.mlp((5,), (4,), hidden=(17,))]
    decoders = [vd.nets.mlp((5,), (11,), hidden=()), vd.nets.mlp((2,), (10,), hidden=())]
    model = vd.hvae(encoders, decoders, latent_dims=(5, 2), likelihood=vd.likelihoods.bernoulli())
    params = jax.eval_shape(model.init, jax.random.key(0))
    objective = vd.total(vd.pathwise(model, vd.iwae, 7))
    shapes = h.products(objective, jax.random.key(0), params, jnp.zeros(11, jnp.int32))
    assert shapes.count((13,)) == 1 and (7, 13) not in shapes and (7, 17) in shapes


def test_refusals(key):
    net, likelihood = h.random_dense(2, 2, 0), vd.likelihoods.gaussian(1.0)
    for encoders, decoders, dims in (([net], [net, net], (1, 1)), ([net], [net], (1, 1)), ([], [], ())):
        with pytest.raises(ValueError, match=f"latent_dims: got {len(dims)} for {len(encoders)} encoders"):
            vd.hvae(encoders, decoders, latent_dims=dims, likelihood=likelihood)
    with pytest.raises(ValueError, match=r"latent_dims: got \(0,\), expected each at least 1"):
        vd.hvae([net], [net], latent_dims=(0,), likelihood=likelihood)
    x = jnp.zeros(2)
    of_three = vd.hvae([net], [net], latent_dims=(3,), likelihood=likelihood)
    with pytest.raises(ValueError, match=r"encoders\[0\]: got output of shape \(2,\), expected \(6,\)"):
        of_three.encode(of_three.init(key), x)
    nets = (
        [h.random_dense(2, 4, 0), h.random_dense(2, 4, 0)],
        [h.random_dense(2, 3, 0), h.random_dense(2, 2, 0)],
    )
    wrong = vd.hvae(*nets, latent_dims=(2, 2), likelihood=likelihood)
    params, z = wrong.init(key), (jnp.zeros(2), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"decoders\[0\]: got output of shape \(3,\), expected \(2,\) for x"):
        wrong.log_joint(params, x, z)
    with pytest.raises(ValueError, match=r"decoders\[1\]: got output of shape \(2,\), expected \(4,\)"):
        wrong.sample(key, params)
    model, params = chain()
    for call in (model.init, lambda k: model.sample(k, params), lambda k: model.complete(k, params, ())):
        with pytest.raises(TypeError, match="expected a typed key"):
            call(jax.random.PRNGKey(0))
    with pytest.raises(TypeError, match="expected a typed key"):
        model.elbo_terms(jax.random.PRNGKey(0), params, jnp.zeros(3))
