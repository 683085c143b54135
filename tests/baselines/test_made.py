"""MADE by enumeration: masses sum to one, the Jacobian is triangular, draws have their masses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import vdiff as vd
from tests import toys
from vdiff import likelihoods

BITS = np.array(list(itertools.product([0, 1], repeat=10)), np.int32)
# name -> (likelihood, shape of a datum, orders, every datum)
LEVELS = np.array(list(itertools.product(range(3), repeat=4)), np.int32)
CASES = {
    "bits": (
        likelihoods.bernoulli(),
        (5, 2, 1),
        vd.baselines.shuffled_orders(10, 3, seed=1),
        BITS.reshape(-1, 5, 2, 1),
    ),
    "levels": (likelihoods.categorical(3), (2, 2), np.array([[2, 0, 3, 1]]), LEVELS.reshape(-1, 2, 2)),
    "codes": (
        likelihoods.one_hot(3),
        (4, 3),
        np.array([[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 0, 1]]),
        np.eye(3, dtype=np.int32)[LEVELS],
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """A model, its parameters, every datum, and of each in float64 log p(x | order) [N, M] and log p(x) [N]."""
    likelihood, shape, orders, support = CASES[request.param]
    parts = {"num_variables": orders.shape[1], "hidden": (12, 7), "activation": jnp.tanh}
    net = vd.nets.masked_mlp(shape, likelihood.out_shape(shape), **parts)
    model = vd.baselines.made(net, shape, likelihood=likelihood, orders=orders)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda of: jnp.asarray(0.7 * rng.normal(size=of.shape), of.dtype), shapes)

    @toys.quick_jit
    @jax.vmap
    def every(x):
        under = jax.vmap(model.log_prob_under, in_axes=(None, None, 0))(params, x, jnp.arange(len(orders)))
        return under, model.log_prob(params, x)

    under, mixture = jax.device_get(every(jnp.asarray(support)))
    return model, params, support, under.astype(np.float64), mixture.astype(np.float64)


def test_masses_sum_to_one(case):
    """Under every order, and so of the mixture: 2^10 = 1,024 bits, 3^4 levels, 3^4 codes."""
    *_, under, mixture = case
    np.testing.assert_allclose(np.exp(under).sum(0), 1.0, atol=2e-6)
    assert np.exp(mixture).sum() == pytest.approx(1.0, abs=2e-6)
    # The orders are different laws, so that all of this is no accident of a product of independent variables.
    assert np.all(np.abs(under[:, :1] - under[:, 1:]).max(0) > 0.5)


def test_the_mixture_is_the_mean_over_orders(case):
    *_, under, mixture = case
    np.testing.assert_allclose(
        mixture, scipy.special.logsumexp(under, axis=1) - np.log(under.shape[1]), atol=1e-5
    )
    assert np.all(mixture >= under.mean(1) - 1e-5)


def test_the_jacobian_is_strictly_triangular_in_every_order(case):
    """By places: nothing on and above the diagonal, and no zero below, so that every earlier variable counts."""
    model, params, support, *_ = case
    num_variables = model.orders.shape[1]
    # `embed` is affine, so that a zero by x is a zero by what the network is shown.
    of_x = toys.quick_jit(jax.jacfwd(lambda x, m: model.out(params, x, m)))
    x = jnp.asarray(support[5], jnp.float32)
    for m, order in enumerate(model.orders):
        jacobian = np.asarray(of_x(x, m))
        jacobian = jacobian.reshape(num_variables, -1, num_variables, x.size // num_variables)
        between = np.abs(jacobian).max((1, 3))[np.ix_(order, order)]
        assert np.all(between[np.triu_indices(num_variables)] == 0.0)
        assert np.all(between[np.tril_indices(num_variables, -1)] > 1e-4)


def test_draws_have_their_masses(case):
    """60,000 draws of the mixture, chi-square over all data as a z-score."""
    model, params, support, _, mixture = case
    num_draws = 60_000
    draw = toys.quick_jit(jax.vmap(model.sample, in_axes=(0, None)))
    x, z = draw(jax.random.split(jax.random.key(3), num_draws), params)
    assert z == () and x.shape[1:] == support.shape[1:] and x.dtype == jnp.int32
    number = {datum.tobytes(): i for i, datum in enumerate(support)}
    counts = np.bincount([number[datum.tobytes()] for datum in np.asarray(x)], minlength=len(support))
    expected = num_draws * np.exp(mixture)
    # Of one multinomial count (c - e)^2 / e has mean 1 - p and variance about 2 + 1 / e.
    statistic = np.sum((counts - expected) ** 2 / expected)
    mean, variance = len(support) - 1, 2 * (len(support) - 1) + np.sum(1 / expected)
    assert abs(statistic - mean) / np.sqrt(variance) < 5


@pytest.mark.parametrize("case", ["codes"], indirect=True)
def test_is_a_density(case):
    """Its log-joint and its terms are log p(x), with the gradient of the mixture, and q is of nothing."""
    model, params, support, under, mixture = case
    x, key = jnp.asarray(support[7]), jax.random.key(0)
    assert model._fields[:6] == vd.Model._fields and isinstance(model, vd.ModelLike)
    assert params.phi == () and params.lam == () and model.sample_q(key, params, x) == ()
    assert float(model.log_q(params, x, ())) == 0.0

    @toys.quick_jit
    def gradients(params):
        def under_one(m):
            return jax.value_and_grad(vd.total(vd.baselines.under_order(model, m)), argnums=1)(key, params, x)

        whole = jax.value_and_grad(model.elbo_estimate, argnums=1)(key, params, x)
        return whole, jax.vmap(under_one)(jnp.arange(len(model.orders))), model.log_joint(params, x, ())

    (value, gradient), (values, slopes), log_joint = gradients(params)
    assert float(value) == pytest.approx(mixture[7], abs=1e-5) == pytest.approx(float(log_joint), abs=1e-5)
    np.testing.assert_allclose(values, under[7], atol=1e-5)
    expected = jax.tree.map(
        lambda leaf: jnp.tensordot(scipy.special.softmax(under[7]).astype(np.float32), leaf, 1), slopes
    )
    np.testing.assert_allclose(toys.flat_single(gradient), toys.flat_single(expected), rtol=1e-4, atol=1e-5)


def test_orders():
    orders = vd.baselines.shuffled_orders(6, 4, seed=3)
    assert orders.dtype == np.int32 and np.array_equal(orders[0], np.arange(6))
    assert np.array_equal(np.sort(orders), np.tile(np.arange(6), (4, 1)))
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(orders, vd.baselines.shuffled_orders(6, 4, seed=3))
    with pytest.raises(ValueError, match="num_orders: got 0 orders of 6 variables"):
        vd.baselines.shuffled_orders(6, 0)


def test_refusals():
    likelihood = likelihoods.bernoulli()
    net = vd.nets.masked_mlp((4,), (4,), hidden=())
    for orders in (np.arange(4), np.zeros((2, 4), int), np.zeros((0, 4), int), np.arange(1, 5)[None]):
        with pytest.raises(ValueError, match="expected .M, D., each row a permutation"):
            vd.baselines.made(net, (4,), likelihood=likelihood, orders=orders)
    with pytest.raises(ValueError, match="got 3 variables for a datum of 4 numbers"):
        vd.baselines.made(net, (4,), likelihood=likelihood, orders=np.arange(3)[None])
    model = vd.baselines.made(net, (4,), likelihood=likelihoods.categorical(3))
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"network: got output of shape \(4,\), expected \(4, 3\)"):
        jax.eval_shape(model.log_prob, params, jnp.zeros(4, jnp.int32))
    raw = jax.random.PRNGKey(0)
    for call in (lambda: model.init(raw), lambda: model.sample(raw, vd.Params())):
        with pytest.raises(TypeError, match="expected a typed key"):
            call()
