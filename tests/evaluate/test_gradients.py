"""The report of a gradient estimator, on a gradient whose moments are known and on the estimators themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys

MEAN = {"a": np.array([3.0, 0.0, -4.0]), "b": np.array(2.0)}
STD = {"a": np.array([1.0, 2.0, 0.0]), "b": np.array(0.5)}


def known(key, params, x):
    """A gradient of theta with means MEAN * x and standard deviations STD, and of lam exactly x."""
    keys = dict(zip(("a", "b"), jax.random.split(key), strict=True))
    total = params.lam * x
    for name, leaf in params.theta.items():
        g = MEAN[name] * x + STD[name] * jax.random.normal(keys[name], leaf.shape)
        total = total + jnp.sum(jax.lax.stop_gradient(g) * leaf)
    return {"known": total}


PARAMS = vd.Params(theta={"a": jnp.ones(3), "b": jnp.ones(())}, lam=jnp.ones(()))
X = jnp.array(2.0)


@pytest.fixture(scope="module")
def report():
    exact = vd.Params(theta={name: 2.0 * jnp.asarray(mean) for name, mean in MEAN.items()}, lam=X)
    with jax.numpy_dtype_promotion("standard"):
        return vd.gradient_report(known, PARAMS, X, jax.random.key(0), 40_000, exact=exact)


def test_moments(report):
    assert 40_000 <= report.num_draws < 40_000 + 256
    for name in ("a", "b"):
        error = STD[name] / np.sqrt(report.num_draws)
        assert np.all(np.abs(report.mean.theta[name] - 2 * MEAN[name]) <= 5 * error + 1e-5)
        # The standard deviation of a variance of normals is sqrt(2 / N) of it.
        assert np.all(np.abs(report.variance.theta[name] - STD[name] ** 2) <= 0.04 * STD[name] ** 2 + 1e-9)
    assert report.mean.lam == 2.0 and report.variance.lam == 0.0
    # The value: lam x + sum of the gradients at ones.
    assert report.value == pytest.approx(2.0 + 2.0 * (3.0 - 4.0 + 2.0), abs=5 * report.value_std / 200)
    assert report.value_std == pytest.approx(np.sqrt(1 + 4 + 0.25), rel=0.03)


def test_ratios(report):
    row = report.leaves["theta['a']"]
    assert row.mean_norm == pytest.approx(10.0, rel=0.01) and row.std == pytest.approx(np.sqrt(5), rel=0.03)
    assert row.snr == row.mean_norm / row.std
    part = report.parts["theta"]
    assert part.snr == pytest.approx(np.sqrt(100 + 16) / np.sqrt(5.25), rel=0.03)
    assert report.leaves["theta['b']"].snr == pytest.approx(4.0 / 0.5, rel=0.03)
    assert report.parts["lam"].snr == np.inf and set(report.parts) == {"theta", "lam"}


def test_z_scores(report):
    for row in (*report.parts.values(), *report.leaves.values()):
        assert 0.0 <= row.z_score < 5.0
    wrong = vd.Params(theta={"a": jnp.array([6.1, 0.0, -8.0]), "b": jnp.array(4.0)}, lam=jnp.array(2.001))
    with jax.numpy_dtype_promotion("standard"):
        found = vd.gradient_report(known, PARAMS, X, jax.random.key(0), 40_000, exact=wrong)
    assert found.leaves["theta['a']"].z_score > 15 and found.leaves["theta['b']"].z_score < 5
    assert found.parts["lam"].z_score > 100


def test_without_an_exact_gradient_there_is_no_z_score():
    toy = toys.toy("linear")
    found = vd.gradient_report(
        vd.pathwise(toy.model), toy.params, jnp.asarray(toy.data[0]), jax.random.key(0), 20
    )
    assert all(np.isnan(row.z_score) for row in found.parts.values())
    assert "-" in str(found).splitlines()[-1]


def test_an_estimator_against_its_exact_gradient():
    """One datum of the linear-Gaussian toy, IWAE_5, the same draws as by hand."""
    toy = toys.toy("linear")._replace(data=toys.toy("linear").data[:1])
    exact = toys.exact_expectations(toy, 5, (0.0,))[0.0][1]
    x, objective = jnp.asarray(toy.data[0]), vd.doubly_reparameterized(toy.model, vd.iwae, 5)
    found = vd.gradient_report(objective, toy.params, x, jax.random.key(1), 20_000, exact=exact)
    assert all(row.z_score < 5.0 for row in found.parts.values())
    assert set(found.parts) == {"theta", "phi", "lam"}
    keys = jax.random.split(jax.random.key(1), (79, 256)).ravel()
    gradient = toys.quick_jit(jax.vmap(jax.grad(vd.total(objective), 1), in_axes=(0, None, None)))
    draws = gradient(keys, toy.params, x)
    for mean, variance, draw in zip(*map(jax.tree.leaves, (found.mean, found.variance, draws)), strict=True):
        np.testing.assert_allclose(mean, np.mean(np.float64(draw), axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance, np.var(np.float64(draw), axis=0, ddof=1), rtol=1e-3, atol=1e-9)


def test_cost_is_that_of_one_draw():
    """Twice the draws of z cost about twice; and the number of draws does not matter."""
    model = vd.vae(
        vd.nets.mlp((8, 8), (8,), hidden=(32,)),
        vd.nets.mlp((4,), (8, 8), hidden=(32,)),
        latent_dim=4,
        likelihood=vd.likelihoods.bernoulli(),
    )
    params, x = model.init(jax.random.key(0)), jnp.zeros((8, 8), jnp.int32)

    def report(num_samples, num_draws):
        objective = vd.pathwise(model, vd.iwae, num_samples)
        return vd.gradient_report(objective, params, x, jax.random.key(0), num_draws)

    few, many, double = report(8, 64), report(8, 512), report(16, 64)
    decoder = 8 * 3 * 2 * (4 * 32 + 32 * 64)
    assert few.flops_per_draw == pytest.approx(many.flops_per_draw, rel=0.05)
    assert decoder < few.flops_per_draw < 3 * decoder
    assert 1.6 < double.flops_per_draw / few.flops_per_draw < 2.1
    assert few.seconds_per_draw > 0


def test_the_table_is_aligned(report):
    lines = str(report).splitlines()
    assert lines[0].startswith("value ") and "FLOP per draw" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["THETA", "LAM", "theta['a']", "theta['b']", "lam"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_what_it_refuses():
    toy, key = toys.toy("linear"), jax.random.key(0)
    objective, x = vd.pathwise(toy.model), jnp.asarray(toy.data[0])
    with pytest.raises(ValueError, match="num_draws: got 1, expected at least 2"):
        vd.gradient_report(objective, toy.params, x, key, 1)
    with pytest.raises(ValueError, match="exact: got .* expected the structure of params"):
        vd.gradient_report(objective, toy.params, x, key, exact=vd.Params())
    with pytest.raises(TypeError, match="typed key"):
        vd.gradient_report(objective, toy.params, x, jax.random.PRNGKey(0))
