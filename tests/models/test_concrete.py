"""The relaxed model against quadrature over its noise, SciPy's densities, and the discrete model it tends to."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.scipy.special import log_ndtr

import vdiff as vd
from tests import toys
from vdiff import Model, Params, relaxations
from vdiff.models.concrete import concrete

TEMPERATURE = 0.5


def relaxed_toy(name, temperature=TEMPERATURE):
    """A toy of `toys` with its relaxation."""
    toy = toys.toy(name)

    def sample_x(key, params, z):
        loc = params.theta["weight"] @ z
        return (loc if name == "bernoulli" else jnp.tanh(loc)) + jax.random.normal(key, (2,))

    relaxation = relaxations.bernoulli if name == "bernoulli" else relaxations.one_hot
    model = concrete(
        toy.model,
        toy.logits,
        temperature,
        prior_logits=lambda params: params.phi["logits"],
        sample_x=sample_x,
        relaxation=relaxation,
    )
    return toy, model


@functools.cache
def small_sbn():
    """Two bits, three binary pixels, weights far from zero; z is a tuple of one leaf."""
    model = vd.sbn(
        [vd.nets.mlp((3,), (2,), hidden=())],
        [vd.nets.mlp((2,), (3,), hidden=())],
        num_units=2,
        likelihood=vd.likelihoods.bernoulli(),
    )
    params = jax.tree.map(lambda leaf: leaf + 0.5, model.init(jax.random.key(0)))
    params = params._replace(phi=jnp.array([-0.7, 1.1]))
    relaxed = concrete(
        model, model.logits, TEMPERATURE, prior_logits=model.prior_logits, sample_x=model.sample_x
    )
    return model, relaxed, params


def test_the_joint_sums_over_x_to_the_priors_density():
    model, relaxed, params = small_sbn()
    x = jnp.array(list(itertools.product([0, 1], repeat=3)), jnp.int32)
    y = (jnp.asarray(np.random.default_rng(0).normal(scale=3.0, size=(5, 2)), jnp.float32),)
    of = jax.vmap(jax.vmap(relaxed.log_joint, in_axes=(None, 0, None)), in_axes=(None, None, 0))
    got = scipy.special.logsumexp(np.asarray(toys.quick_jit(of)(params, x, y), np.float64), axis=1)
    expected = scipy.stats.logistic.logpdf(np.asarray(y[0], np.float64) - np.asarray(params.phi)).sum(axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    (logits,) = model.logits(params, x[3])
    got = jax.vmap(relaxed.log_q, in_axes=(None, None, 0))(params, x[3], y)
    expected = scipy.stats.logistic.logpdf(np.asarray(y[0], np.float64) - np.asarray(logits)).sum(axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_the_densities_are_scipys(name):
    """log p(y) + log p(x | soft y), and log q(y | x), written in SciPy."""
    toy, model = relaxed_toy(name)
    params, x = toy.params, jnp.asarray(toy.data[1])
    logits, prior = np.asarray(toy.logits(params, x)), np.asarray(params.phi["logits"])
    weight = np.asarray(params.theta["weight"])
    law = scipy.stats.logistic if name == "bernoulli" else scipy.stats.gumbel_r
    for y in np.random.default_rng(1).normal(scale=2.0, size=(4, len(prior))).astype(np.float32):
        if name == "bernoulli":
            loc = weight @ scipy.special.expit(y / TEMPERATURE)
        else:
            loc = np.tanh(weight @ scipy.special.softmax(y / TEMPERATURE))
        expected = law.logpdf(y - prior).sum() + scipy.stats.norm.logpdf(toy.data[1] - loc).sum()
        assert float(model.log_joint(params, x, jnp.asarray(y))) == pytest.approx(expected, rel=1e-5)
        got = float(model.log_q(params, x, jnp.asarray(y)))
        assert got == pytest.approx(law.logpdf(y - logits).sum(), rel=1e-5)


def quadrature_log_prob(temperatures, num_nodes=100):
    """log p(x) of the relaxed toy "bernoulli", [t, 3], and of the discrete one, [3]: its own log_joint, integrated.

    And the gradients by theta of their means over the data, [t, P] and [P].
    """
    toy = toys.toy("bernoulli")
    # The uniforms of two bits, finer where the prior's y is zero and a cold sigmoid steep.
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    grids = []
    for logit in np.asarray(toy.params.phi["logits"], np.float64):
        split = scipy.special.expit(-logit)
        u = np.concatenate([split * (nodes + 1) / 2, split + (1 - split) * (nodes + 1) / 2])
        mass = np.concatenate([split * weights / 2, (1 - split) * weights / 2])
        grids.append((logit + scipy.special.logit(u), np.log(mass)))
    y = np.array(list(itertools.product(grids[0][0], grids[1][0])))
    log_mass = np.add.outer(grids[0][1], grids[1][1]).ravel()

    def run(params, data, y, log_mass, temperatures):
        def log_prob(params, temperature, x):
            model = relaxed_toy("bernoulli", temperature)[1]
            prior = relaxations.bernoulli.log_density

            def integrand(y):
                return model.log_joint(params, x, y) - prior(params.phi["logits"], y)

            return jax.scipy.special.logsumexp(jax.vmap(integrand)(y) + log_mass)

        def discrete(params, x):
            z = jnp.asarray(toys.BITS)
            joint = jax.vmap(toy.model.log_joint, in_axes=(None, None, 0))(params, x, z)
            return jax.scipy.special.logsumexp(joint)

        def both(theta):
            at = params._replace(theta=theta)
            over = jax.vmap(jax.vmap(log_prob, in_axes=(None, None, 0)), in_axes=(None, 0, None))
            return over(at, temperatures, data), jax.vmap(discrete, in_axes=(None, 0))(at, data)

        means = jax.jacrev(lambda theta: [jnp.mean(v, axis=-1) for v in both(theta)])(params.theta)
        return *both(params.theta), *(leaf.reshape(*leaf.shape[:-2], -1) for leaf in jax.tree.leaves(means))

    return toys.in_float64(run, toy.params, toy.data, y, log_mass, np.array(temperatures))


def test_its_log_prob_is_reached_and_tends_to_the_discrete_one():
    """Importance sampling reaches the quadrature's value; that tends to the enumerated one as it gets cold.

    At a temperature of 1 the two models differ by more than .1 nats: a bound of one is not a bound of the other.
    """
    relaxed, discrete, of_relaxed, of_discrete = quadrature_log_prob([1.0, TEMPERATURE, 0.1, 0.02])
    away = np.max(np.abs(relaxed - discrete), axis=1)
    assert np.all(np.diff(away) < 0) and away[0] > 0.1 and away[-1] < 0.01, away
    bias = np.linalg.norm(of_relaxed - of_discrete, axis=1) / np.linalg.norm(of_discrete)
    # As the docstring says.
    np.testing.assert_allclose(away[:3], [0.161, 0.081, 0.033], atol=6e-4)
    np.testing.assert_allclose(bias[:3], [0.204, 0.153, 0.042], atol=6e-4)
    assert bias[3] < 0.01
    assert "0.161, 0.081 and 0.033 nats" in vd.concrete.__doc__
    assert "20.4, 15.3 and 4.2 %" in vd.concrete.__doc__
    toy, model = relaxed_toy("bernoulli")
    keys = jax.random.split(jax.random.key(0), len(toy.data))
    estimate = toys.quick_jit(jax.vmap(vd.importance_log_prob(model, 40_000, 4_000), in_axes=(0, None, 0)))(
        keys, toy.params, jnp.asarray(toy.data)
    )
    assert np.max(estimate.std_error) < 0.01
    assert np.max(np.abs(np.asarray(estimate.value) - relaxed[1]) / np.asarray(estimate.std_error)) < 5.0


def one_bit():
    """One bit, x ~ N(w z, 1); y's noise as a function of a normal, for Gauss-Hermite quadrature."""

    def logits(params, x):
        return params.lam["weight"] * x + params.lam["bias"]

    def log_bernoulli(z, logits):
        return jnp.sum(z.astype(logits.dtype) * logits - jax.nn.softplus(logits))

    def log_joint(params, x, z):
        loc = params.theta * z.astype(x.dtype)
        return log_bernoulli(z, params.phi) + toys.log_normal(x, loc, jnp.zeros_like(x))

    params = Params(
        theta=jnp.array([1.3]),
        phi=jnp.array([0.8]),
        lam={"weight": jnp.array([0.4]), "bias": jnp.array([-1.5])},
    )
    discrete = Model(lambda key: params, log_joint, lambda *_: None, lambda *_: None, lambda *_: None)
    model = concrete(
        discrete, logits, TEMPERATURE, prior_logits=lambda params: params.phi, sample_x=lambda *_: None
    )

    def transport(params, x, eps):
        return logits(params, x) + log_ndtr(eps) - log_ndtr(-eps)

    return toys.Toy(model, params, np.array([[1.6], [0.3], [2.4]], np.float32), transport, 1)


def test_the_pathwise_gradient_is_unbiased():
    """Elbo and iwae of two draws, against quadrature, which more nodes move by less than .1 %."""
    toy = one_bit()
    objectives = {alpha: vd.pathwise(toy.model, toys.BOUNDS[alpha], 2) for alpha in (1.0, 0.0)}
    exact, finer = (toys.exact_expectations(toy, 2, (1.0, 0.0), num_nodes=n) for n in (40, 80))
    runs = toys.gradient_draws(objectives, toy.params, toy.data, 60_000)
    for alpha, (values, draws) in runs.items():
        value, gradient = finer[alpha]
        one, other = (toys.flat_single(e[alpha][1]) for e in (exact, finer))
        assert np.linalg.norm(one - other) < 1e-3 * np.linalg.norm(other)
        assert toys.z_scores(values[:, None], value) < 5.0
        toys.check_unbiased(draws, gradient)


def test_draws_have_their_laws():
    """sample: y of the prior's, x's mean E p(x | soft y) by quadrature; sample_q: y of q's, per leaf of the tuple."""
    model, relaxed, params = small_sbn()
    x = jnp.array([1, 0, 1], jnp.int32)

    @toys.quick_jit
    @jax.vmap
    def run(key):
        (pixels, (y,)), (of_q,) = relaxed.sample(key, params), relaxed.sample_q(key, params, x)
        return pixels, y, of_q

    pixels, y, of_q = jax.device_get(run(jax.random.split(jax.random.key(0), 20_000)))
    (logits,) = model.logits(params, x)
    for draws, loc in ((y, params.phi), (of_q, logits)):
        for column, shift in zip(draws.T.astype(np.float64), np.asarray(loc), strict=True):
            assert scipy.stats.kstest(column - shift, scipy.stats.logistic.cdf).pvalue > 1e-6
    u = (np.arange(300) + 0.5) / 300
    soft = scipy.special.expit((np.asarray(params.phi) + scipy.special.logit(u)[:, None]) / TEMPERATURE)
    z = (jnp.asarray(np.array(list(itertools.product(*soft.T))), jnp.float32),)
    mean = np.mean(jax.vmap(model.decode, in_axes=(None, 0))(params, z), axis=0)
    assert set(np.unique(pixels)) == {0, 1}
    assert np.max(toys.z_scores(pixels.astype(np.float64), mean)) < 5.0


def test_finite_in_the_far_tails():
    """Logits of q of +-20 and +-80 and a prior of the opposite ones, at a temperature of .1; the elbo by hand."""
    toy, model = relaxed_toy("bernoulli", 0.1)
    far = np.array(list(itertools.product([-80.0, -20.0, 20.0, 80.0], repeat=2)), np.float32)
    objectives = [vd.pathwise(model, bound, 3) for bound in (vd.elbo, vd.iwae)]

    @toys.quick_jit
    @jax.vmap
    def run(key, bias):
        lam = {"weight": jnp.zeros((2, 2)), "bias": bias}
        at = toy.params._replace(phi={"logits": -bias}, lam=lam)
        x = jnp.asarray(toy.data[0])
        return [jax.value_and_grad(vd.total(o), argnums=(1, 2))(key, at, x) for o in objectives]

    found = jax.device_get(run(jax.random.split(jax.random.key(0), len(far)), jnp.asarray(far)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.all(np.isfinite(leaf)), path
    # Two logistics 2 |l| apart: log p(y) - log q(y) is near -2 |l| a bit, log p(x | z) some nats.
    assert np.max(np.abs(found[0][0] + 2 * np.abs(far).sum(axis=1))) < 20


def test_a_traced_temperature_and_the_discrete_models_params():
    """jit over the temperature gives what a number gives; init is the discrete model's."""
    toy = toys.toy("bernoulli")
    x, y = jnp.asarray(toy.data[0]), jnp.array([0.3, -1.2])

    @jax.jit
    def log_joint(temperature):
        return relaxed_toy("bernoulli", temperature)[1].log_joint(toy.params, x, y)

    for temperature in (0.2, 1.5):
        expected = relaxed_toy("bernoulli", temperature)[1].log_joint(toy.params, x, y)
        assert float(log_joint(jnp.float32(temperature))) == pytest.approx(float(expected), rel=1e-6)
    assert log_joint._cache_size() == 1
    assert relaxed_toy("bernoulli")[1].init is toy.model.init


def test_refusals(key):
    toy, model = relaxed_toy("bernoulli")
    x = jnp.asarray(toy.data[0])
    with pytest.raises(ValueError, match="temperature: got -1, expected a positive number"):
        relaxed_toy("bernoulli", -1)
    with pytest.raises(TypeError, match="expected a typed key"):
        model.sample_q(jax.random.PRNGKey(0), toy.params, x)
    with pytest.raises(TypeError, match="expected a typed key"):
        model.sample(jax.random.PRNGKey(0), toy.params)
    for prior in (jnp.zeros(1), (jnp.zeros(2),)):
        other = concrete(
            toy.model, toy.logits, 0.5, prior_logits=lambda params, p=prior: p, sample_x=lambda *_: None
        )
        with pytest.raises(TypeError, match=r"prior_logits: got leaves of shapes .*, expected \(2,\), those"):
            other.log_joint(toy.params, x, jnp.zeros(2))
