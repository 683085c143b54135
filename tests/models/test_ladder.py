"""Top-down inference: a linear chain against its marginal, two layers of networks against exact expectations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from tests.models import hierarchies as h
from vdiff import Network
from vdiff.models.gaussian_layer import Gaussian

NUM_DRAWS = 20_000
COMBINES = {
    "relative_to_prior": vd.relative_to_prior,
    "precision_weighted": vd.precision_weighted,
    "as_seen": vd.as_seen,
}


def constant(value):
    value = jnp.asarray(value, jnp.float32)
    return Network(lambda key: value, lambda params: params)


def without_parameters(function):
    return Network(lambda key: (), lambda params, *inputs: function(*inputs))


@functools.cache
def chain(name):
    """The linear chain, h the mean of the next layer; e_l and its precision are what x tells of z_l.

    p(x | z_l), as a function of z_l, is N(e_l; z_l, 1 / g_l): for z_1 from the columns of W, and then
    e_{l+1} = (e_l - b_l) / a_l,  g_{l+1} = a_l^2 / (s_l^2 + 1 / g_l).
    """
    gains, encoders, start = [None, h.GAIN], [], np.zeros(2)
    seen = h.W.T / (h.GAIN * h.S[0] ** 2)[:, None]
    encoders.append(h.affine(seen, -seen @ h.B[0]))
    for i in (1, 2):
        gains.append(h.A[i] ** 2 / (h.S[i] ** 2 + 1 / gains[i]))
        encoders.append(h.affine(np.diag(1 / h.A[i]), -h.B[i] / h.A[i]))
    scales = [None, h.S[1], h.S[2], np.ones(2)]
    priors = [h.affine(np.eye(2), np.zeros(2), np.log(scales[i])) for i in (1, 2, 3)]
    down = [h.affine(h.W, h.B[0]), *(h.affine(np.diag(h.A[i]), h.B[i]) for i in (1, 2))]
    decoders = [Network(net.init, lambda p, above, z, net=net: net.apply(p, z)) for net in down]

    def posterior(i):
        s, g = scales[i], gains[i]
        share, scale = g / (g + 1 / s**2), np.sqrt(1 / (g + 1 / s**2))
        share, ratio, log_s, log_g = (
            jnp.asarray(leaf, jnp.float32) for leaf in (share, np.log(scale / s), np.log(s), np.log(g))
        )
        of = {
            "relative_to_prior": lambda m, e: [share * (e - m) * jnp.exp(-log_s), ratio],
            "precision_weighted": lambda m, e: [e, -0.5 * log_g],
            "as_seen": lambda m, e: [m + share * (e - m), ratio + log_s],
        }[name]
        return lambda m, e: jnp.concatenate(of(m, e))

    posteriors = [without_parameters(posterior(i)) for i in (1, 2, 3)]
    model = vd.ladder(
        constant(start),
        encoders,
        priors,
        posteriors,
        decoders,
        likelihood=vd.likelihoods.gaussian(float(h.S[0])),
        combine=COMBINES[name],
    )
    return model, model.init(jax.random.key(0))


def test_at_the_posterior_every_weight_is_the_marginal(key):
    """log p(x, z) - log q(z | x) = log p(x) at any z; by importance sampling; and the terms have that mean."""
    x, expected = jnp.asarray(h.X, jnp.float32), h.log_prob(h.X)
    chains = {name: chain(name) for name in COMBINES}

    @toys.quick_jit
    def run(key):
        results = {}
        for name, (model, params) in chains.items():
            z = model.sample_q(key, params, x)
            wide = jax.tree.map(lambda leaf: 2.0 * leaf - 0.3, z)
            weights = [model.log_joint(params, x, v) - model.log_q(params, x, v) for v in (z, wide)]
            results[name] = jnp.stack(weights)
        model, params = chains["precision_weighted"]
        keys = jax.random.split(key, NUM_DRAWS)
        terms = jax.vmap(lambda k: model.elbo_terms(k, params, x))(keys)
        return results, vd.importance_log_prob(model, 20, 6)(key, params, x), terms

    weights, judged, terms = run(key)
    for name, values in weights.items():
        np.testing.assert_allclose(values, expected, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(float(judged.value), expected, atol=1e-4)
    np.testing.assert_allclose(float(judged.ess), 20, rtol=1e-4)
    assert set(terms) == {"reconstruction", "kl_1", "kl_2", "kl_3"}
    terms = {name: np.asarray(term, np.float64) for name, term in terms.items()}
    assert all(np.all(terms[f"kl_{i}"] <= 0) for i in (1, 2, 3))
    assert toys.z_scores(sum(terms.values())[:, None], expected) < 5.0
    # The top layer's is no estimate: the divergence of z_3 given x from N(0, I).
    np.testing.assert_allclose(terms["kl_3"], -top_divergence(), rtol=1e-5)


def test_importance_sampling_from_a_q_beside_the_posterior(key):
    model, params = chain("precision_weighted")
    first, *others = params.lam["encoders"]
    beside = params.lam | {"encoders": (first | {"b": first["b"] + 0.2}, *others)}
    h.check_importance_sampling(model, params._replace(lam=beside), key)


def top_divergence():
    """KL( p(z_3 | x) || N(0, I) ), from the joint Gaussian of x and z_3."""
    to_x = h.W @ np.diag(h.A[1] * h.A[2])
    covariance = h.W @ np.diag(h.VAR[1]) @ h.W.T + h.S[0] ** 2 * np.eye(3)
    gain = to_x.T @ np.linalg.inv(covariance)
    mean = gain @ (h.X - h.W @ h.MEAN[1] - h.B[0])
    var = np.diag(np.eye(2) - gain @ to_x)
    return 0.5 * np.sum(mean**2 + var - 1 - np.log(var))


@functools.cache
def two_layers():
    """z_2 [1], z_1 [1] and x [2] along a path h [2] of tanh networks; the posterior relative to the prior."""
    encoders = [h.random_dense(2, 2, 0), h.random_dense(2, 2, 1)]
    priors = [h.random_dense(2, 2, 2, (-1.0, -0.5)), h.random_dense(2, 2, 3, (1.0, 0.3))]
    posteriors = [h.random_dense(4, 2, 4, (1.0, -0.4)), h.random_dense(4, 2, 5, (-1.0, -0.5))]
    decoders = [h.random_dense(3, 2, 6), h.random_dense(3, 2, 7)]
    networks = constant([0.3, -0.8]), encoders, priors, posteriors, decoders
    model = vd.ladder(*networks, likelihood=vd.likelihoods.gaussian(0.7))

    def transport(params, x, eps):
        e_1 = encoders[0].apply(params.lam["encoders"][0], x)
        e_2 = encoders[1].apply(params.lam["encoders"][1], e_1)
        of_h, z = params.phi["start"], []
        for i, e in ((1, e_2), (0, e_1)):
            loc, log_scale = jnp.split(priors[i].apply(params.phi["priors"][i], of_h), 2)
            shift, log_ratio = jnp.split(posteriors[i].apply(params.lam["posteriors"][i], of_h, e), 2)
            scale = jnp.exp(log_scale)
            z.insert(0, loc + scale * shift + scale * jnp.exp(log_ratio) * eps[i : i + 1])
            if i:
                of_h = decoders[1].apply(params.phi["decoders"][0], of_h, z[0])
        return tuple(z)

    params = model.init(jax.random.key(0))
    return toys.Toy(model, params, np.array([[-2.0, 1.0]], np.float32), transport, 2)


@pytest.mark.slow
def test_terms_and_estimators_against_exact_expectations():
    """Two layers, K = 2, with phi in p and in q: values, and gradients by theta, phi and lam apart."""
    h.check_against_exact(two_layers(), num_draws=100_000)


def test_draws_and_densities_of_the_path(key):
    """x and z of the prior have their moments; E_q[p(z) / q(z)] = 1; `complete` keeps what it is given."""
    toy = two_layers()
    model, params, x = toy.model, toy.params, jnp.asarray(toy.data[0])
    upper = (jnp.array([0.9]),)

    @toys.quick_jit
    @jax.vmap
    def run(key):
        of_x, z = model.sample(key, params)
        of_q = model.sample_q(key, params, x)
        lower = model.complete(key, params, upper)
        # log p(z) is what the likelihood leaves of the joint.
        log_p = model.log_joint(params, x, of_q) - log_likelihood(x, of_q)
        return {
            "noise": of_x - model.decode(params, z),
            "ratio": jnp.exp(log_p - model.log_q(params, x, of_q)),
            "lower": lower[0],
            "upper": lower[1],
            "z_2": z[1],
        }

    def log_likelihood(x, z):
        return toys.log_normal(x, model.decode(params, z), jnp.full(2, jnp.log(0.7)))

    draws = {
        name: np.asarray(leaf, np.float64) for name, leaf in run(jax.random.split(key, NUM_DRAWS)).items()
    }
    assert np.max(toys.z_scores(draws["noise"], np.zeros(2))) < 5.0
    assert np.max(toys.z_scores(draws["noise"] ** 2, np.full(2, 0.49))) < 5.0
    np.testing.assert_array_equal(draws["upper"], np.float32(0.9))
    apply = toys.quick_jit(
        lambda: (
            h.random_dense(2, 2, 3).apply(params.phi["priors"][1], params.phi["start"]),
            h.random_dense(2, 2, 2).apply(
                params.phi["priors"][0],
                h.random_dense(3, 2, 7).apply(params.phi["decoders"][0], params.phi["start"], upper[0]),
            ),
        )
    )
    for name, (loc, log_scale) in zip(("z_2", "lower"), np.asarray(apply(), np.float64), strict=True):
        assert toys.z_scores(draws[name], loc) < 5.0, name
        assert toys.z_scores((draws[name] - loc) ** 2, np.exp(2 * log_scale)) < 5.0, name
    assert toys.z_scores(draws["ratio"][:, None], 1.0) < 5.0


def test_encode_is_the_path_without_noise(key):
    toy = two_layers()
    x = jnp.asarray(toy.data[0])
    one, other = toys.quick_jit(
        lambda: (toy.model.encode(toy.params, x), toy.transport(toy.params, x, jnp.zeros(2)))
    )()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)


def test_ways_to_combine():
    """Zero is the prior; precisions add up; at extremes of either scale the sharper one is left, with a slope."""
    prior, seen = Gaussian(jnp.array([1.0]), jnp.array([0.4])), Gaussian(jnp.array([-0.5]), jnp.array([-0.3]))
    zero = Gaussian(jnp.zeros(1), jnp.zeros(1))
    assert vd.relative_to_prior(prior, zero) == prior and vd.as_seen(prior, seen) == seen
    precisions = np.exp(-2 * np.array([0.4, -0.3]))
    q = vd.precision_weighted(prior, seen)
    np.testing.assert_allclose(q.log_scale, -0.5 * np.log(precisions.sum()), rtol=1e-6)
    np.testing.assert_allclose(q.loc, precisions @ [1.0, -0.5] / precisions.sum(), rtol=1e-6)
    for log_scale, expected in ((60.0, prior), (-60.0, None)):
        extreme = seen._replace(log_scale=jnp.array([log_scale]))
        q = vd.precision_weighted(prior, extreme)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), q, expected or extreme)
        slope = jax.grad(lambda e: jnp.sum(jnp.stack(vd.precision_weighted(prior, e))))(extreme)
        assert all(np.all(np.isfinite(leaf)) for leaf in slope)


def test_the_encoders_run_once():
    """K = 7 draws: what goes up from x is one pass, what comes down seven; an image's z."""
    up = [vd.nets.mlp((11,), (3,), hidden=(13,)), vd.nets.mlp((3,), (4,), hidden=(14,))]
    width = {"hidden": (17,)}
    flat = lambda net: Network(net.init, lambda p, *a: net.apply(p, jnp.concatenate([v.ravel() for v in a])))  # noqa: E731
    priors = [vd.nets.mlp((2,), (2, 2, 2), **width), vd.nets.mlp((2,), (6,), **width)]
    posteriors = [flat(vd.nets.mlp((5,), (2, 2, 2), **width)), flat(vd.nets.mlp((6,), (6,), **width))]
    decoders = [flat(vd.nets.mlp((6,), (11,), **width)), flat(vd.nets.mlp((5,), (2,), **width))]
    networks = constant([0.0, 0.0]), up, priors, posteriors, decoders
    model = vd.ladder(*networks, likelihood=vd.likelihoods.bernoulli())
    key = jax.random.key(0)
    params, x = jax.eval_shape(model.init, key), jnp.zeros(11, jnp.int32)
    z = jax.eval_shape(model.sample_q, key, params, x)
    assert [leaf.shape for leaf in z] == [(2, 2, 1), (3,)]
    shapes = h.products(vd.total(vd.pathwise(model, vd.iwae, 7)), key, params, x)
    assert shapes.count((13,)) == shapes.count((14,)) == 1
    assert (7, 13) not in shapes and (7, 14) not in shapes and (7, 17) in shapes


def test_refusals(key):
    net, likelihood = without_parameters(lambda *inputs: jnp.zeros(2)), vd.likelihoods.gaussian(1.0)
    for position in range(4):
        parts = [[net], [net], [net], [net]]
        parts[position] = [net, net]
        with pytest.raises(ValueError, match=r"encoders: got \{.*: 2.*\}, expected one of each a layer"):
            vd.ladder(constant(0.0), *parts, likelihood=likelihood)
    with pytest.raises(ValueError, match="expected one of each a layer, at least one"):
        vd.ladder(constant(0.0), [], [], [], [], likelihood=likelihood)

    wide, odd = (without_parameters(lambda *inputs, n=n: jnp.zeros(n)) for n in (4, 3))
    x = jnp.zeros(2)
    for parts, message in (
        ([net, odd, net, net], r"priors\[0\]: got output of shape \(3,\), expected an even last axis"),
        ([net, net, odd, net], r"posteriors\[0\]: got output of shape \(3,\), expected an even last axis"),
        (
            [net, net, wide, net],
            r"posteriors\[0\]: got a latent of shape \(2,\), expected \(1,\), that of prio",
        ),
        ([net, net, net, wide], r"decoders\[0\]: got output of shape \(4,\), expected \(2,\) for x of shape"),
    ):
        model = vd.ladder(constant(0.0), *([part] for part in parts), likelihood=likelihood)
        with pytest.raises(ValueError, match=message):
            model.elbo_terms(key, model.init(key), x)
    toy = two_layers()
    calls = itertools.product((toy.model.sample, toy.model.init), [jax.random.PRNGKey(0)])
    for call, raw in calls:
        with pytest.raises(TypeError, match="expected a typed key"):
            call(raw, *([] if call is toy.model.init else [toy.params]))
