"""The flow against its dense Jacobian, against quadrature, and its draws against its density."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from vdiff import Network, Params
from vdiff.models import families
from vdiff.models.flow import conditioner, flow
from vdiff.models.posterior import amortized, local, with_q

NUM_LAYERS = 3
X = np.array([0.4, -0.7], np.float32)


def context(x):
    return x[:1]


@functools.cache
def bent(d):
    """A flow of z [d] over a mean field, with context, and parameters at which it is far from the identity."""
    base = local(families.mean_field(d))
    posterior = flow(base, [conditioner(d, context_dim=1, hidden=(8,))] * NUM_LAYERS, context)

    @toys.quick_jit
    def init(key):
        keys = iter(jax.random.split(key, 100))
        lam = posterior.init(jax.random.key(0))
        return jax.tree.map(lambda leaf: leaf + 0.5 * jax.random.normal(next(keys), leaf.shape), lam)

    return base, posterior, init(jax.random.key(1))


def test_log_det_is_that_of_the_dense_jacobian():
    """And the inverse inverts: log q of the draw is log q_0 of the base's own draw less slogdet."""
    d = 5
    base, posterior, lam = bent(d)

    def run(lam, x, eps):
        # A base that is a point: what `sample` does to z_0 is then the transport itself.
        def transport(z0):
            point = base._replace(at=lambda lam, x: vd.in_turn(lambda key: z0, lambda z: jnp.zeros(())))
            layers = [conditioner(d, context_dim=1, hidden=(8,))] * NUM_LAYERS
            return flow(point, layers, context).at(lam, x).sample(jax.random.key(0))

        log_det = jnp.linalg.slogdet(jax.jacfwd(transport)(eps))[1]
        return (
            posterior.at(lam, x).log_prob(transport(eps)),
            base.at(lam["base"], x).log_prob(eps) - log_det,
            log_det,
        )

    eps = np.random.default_rng(0).normal(size=(20, d)) * 1.5
    got, expected, log_det = toys.in_float64(jax.vmap(run, (None, None, 0)), lam, X, eps)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    assert np.mean(np.abs(log_det)) > 0.02


def test_begins_at_its_base():
    base = amortized(vd.nets.mlp((2,), (6,), hidden=()), families.mean_field(3))
    posterior = flow(base, [conditioner(3)] * 2)
    lam = toys.quick_jit(posterior.init)(jax.random.key(0))
    draw = toys.quick_jit(lambda key, lam: posterior.at(lam, jnp.asarray(X)).sample_and_log_prob(key))
    z, log_prob = draw(jax.random.key(1), lam)
    np.testing.assert_allclose(z, base.at(lam["base"], jnp.asarray(X)).sample(jax.random.key(1)), rtol=1e-6)
    np.testing.assert_allclose(log_prob, base.at(lam["base"], jnp.asarray(X)).log_prob(z), rtol=1e-5)
    one, two = (layer["net"]["Dense_0"]["kernel"] for layer in lam["layers"])
    assert np.all(one != two), "each layer has a key of its own"


def test_every_dimension_is_bent():
    _, posterior, lam = bent(5)
    still = lam | {"layers": jax.tree.map(jnp.zeros_like, lam["layers"])}
    sample = toys.quick_jit(lambda lam: posterior.at(lam, jnp.asarray(X)).sample(jax.random.key(0)))
    straight, moved = sample(still), sample(lam)
    assert np.all(np.abs(moved - straight) > 1e-2)


@functools.cache
def grid():
    axis = np.linspace(-30, 30, 500)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    return points, (axis[1] - axis[0]) ** 2


def nonlinear(z):
    return jnp.sin(0.8 * z[0] - 0.5 * z[1]) + jnp.square(0.4 * z[0] + 0.3 * z[1]) / (1 + 0.1 * jnp.sum(z**2))


def test_integrates_to_one_and_its_draws_follow_it():
    """The density by quadrature; d/d lam E[f(z)] by quadrature of f q, differentiated, against pathwise draws."""
    _, posterior, lam = bent(2)
    points, area = grid()

    def expectations(lam, z):
        density = area * jnp.exp(jax.vmap(posterior.at(lam, jnp.asarray(X, z.dtype)).log_prob)(z))
        return jnp.sum(density * jax.vmap(nonlinear)(z)), jnp.sum(density)

    (value, mass), gradient = toys.in_float64(jax.value_and_grad(expectations, has_aux=True), lam, points)
    np.testing.assert_allclose(mass, 1.0, rtol=1e-6)

    def objective(key, params, x):
        return {"f": nonlinear(posterior.at(params.lam, jnp.asarray(X)).sample(key))}

    values, draws = toys.gradient_draws({"f": objective}, Params(lam=lam), np.zeros(1), 100_000)["f"]
    assert np.max(toys.z_scores(np.asarray(values, np.float64)[:, None], np.array([value]))) < 5
    toys.check_unbiased(draws, Params(lam=gradient), ("lam",))


def test_score_has_mean_zero():
    _, posterior, lam = bent(2)

    @toys.quick_jit
    @jax.vmap
    def score(key):
        z = posterior.at(lam, jnp.asarray(X)).sample(key)
        return jax.grad(lambda lam: posterior.at(lam, jnp.asarray(X)).log_prob(z))(lam)

    draws = toys.flat(score(jax.random.split(jax.random.key(3), 50_000)))
    assert np.max(toys.z_scores(draws, np.zeros(draws.shape[1]))) < 5


@pytest.mark.parametrize("d", [1, 5])
def test_fused_is_the_two_apart(d):
    _, posterior, lam = bent(d)

    def fused(lam, key):
        return posterior.at(lam, jnp.asarray(X)).sample_and_log_prob(key)

    def apart(lam, key):
        z = posterior.at(lam, jnp.asarray(X)).sample(key)
        return z, posterior.at(lam, jnp.asarray(X)).log_prob(z)

    keys = jax.random.split(jax.random.key(5), 40)
    one, other = (toys.quick_jit(jax.vmap(f, (None, 0)))(lam, keys) for f in (fused, apart))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-6, atol=2e-5)


def test_doubly_reparameterized_agrees_with_pathwise():
    toy = toys.linear_gaussian(2)
    _, posterior, lam = bent(2)
    model, params = with_q(toy.model, posterior), toy.params._replace(lam=lam)
    objectives = {
        "pathwise": vd.pathwise(model, vd.iwae, 3),
        "doubly": vd.doubly_reparameterized(model, vd.iwae, 3),
    }
    runs = toys.gradient_draws(objectives, params, toy.data[:1], 40_000)
    (values, one), (values2, other) = runs["pathwise"], runs["doubly"]
    np.testing.assert_allclose(values, values2, rtol=1e-4, atol=1e-4)
    one, other = toys.flat(one.lam), toys.flat(other.lam)
    norm = np.linalg.norm(np.mean(other, axis=0))
    assert np.max(np.std(one - other, axis=0)) / np.sqrt(len(one)) < 0.004 * norm
    assert np.max(toys.z_scores(one - other, np.zeros(one.shape[1]))) < 5


def test_extreme_parameters_give_finite_values_and_gradients():
    """The base's parameters and the conditioners' outputs at +-20 and +-80, z far out."""
    d = 3
    constant = Network(init=lambda key: jnp.zeros(2 * d), apply=lambda out, inputs: out)
    posterior = flow(local(families.full_rank(d)), [constant] * NUM_LAYERS)
    rng = np.random.default_rng(0)
    lams = jax.vmap(posterior.init)(jax.random.split(jax.random.key(0), 16))
    scale = np.array([20.0, 80.0] * 8, np.float32)[:, None]
    lams = jax.tree.map(lambda leaf: jnp.asarray(scale * rng.choice([-1, 1], leaf.shape), jnp.float32), lams)
    far = jnp.array([[0.0, 0.0, 0.0], [1e3, -1e3, 10.0]])

    def at(lam, key):
        def log_prob_of(lam, z):
            return posterior.at(lam, None).log_prob(z)

        own = jax.jacrev(lambda lam: posterior.at(lam, None).sample_and_log_prob(key))(lam)
        z, log_prob = posterior.at(lam, None).sample_and_log_prob(key)
        spots = jnp.concatenate([z[None], far])
        return (
            own,
            z,
            log_prob,
            jax.vmap(jax.value_and_grad(log_prob_of, (0, 1)), (None, 0))(lam, spots),
        )

    keys = jax.random.split(jax.random.key(1), 16)
    for leaf in jax.tree.leaves(toys.quick_jit(jax.vmap(at))(lams, keys)):
        assert np.all(np.isfinite(leaf))


def test_refusals():
    base = local(families.mean_field(2))
    with pytest.raises(ValueError, match=r"conditioners: got none, expected at least 1; use \[conditioner"):
        flow(base, [])
    with pytest.raises(ValueError, match="latent_dim: got 0, expected at least 1"):
        conditioner(0)
    wrong = flow(base, [conditioner(2), Network(lambda key: (), lambda params, inputs: jnp.zeros(3))])
    with pytest.raises(ValueError, match=r"conditioners\[1\]: got output of shape \(3,\), expected \(4,\)"):
        wrong.at(wrong.init(jax.random.key(0)), None).sample(jax.random.key(0))
    matrix = base._replace(
        at=lambda lam, x: vd.in_turn(lambda key: jnp.zeros((2, 2)), lambda z: jnp.zeros(()))
    )
    with pytest.raises(ValueError, match=r"z: got shape \(2, 2\), expected \(latent_dim,\)"):
        posterior = flow(matrix, [conditioner(2)])
        posterior.at(posterior.init(jax.random.key(0)), None).sample(jax.random.key(0))
