"""Relaxed and straight-through gradients: the value exact, theta and phi unbiased, lambda's bias by quadrature."""

import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from tests import toys
from vdiff import Model, Params, relaxations
from vdiff.estimators.perturbed import perturb
from vdiff.types import gradient_only

RELAXATION = {"bernoulli": relaxations.bernoulli, "categorical": relaxations.one_hot}


def estimator(name, of, temperature, bound=vd.elbo, num_samples=1):
    toy = toys.toy(name)
    return of(toy.model, toy.logits, temperature, bound, num_samples, relaxation=RELAXATION[name])


@functools.partial(toys.quick_jit, static_argnums=(0, 4))
def log_weights(name, key, params, x, num_samples):
    """log p(x, z_k) - log q(z_k | x) at the hard draws that both estimators make with this key."""
    toy, of = toys.toy(name), RELAXATION[name]
    z = of.harden(perturb(of, key, toy.logits(params, x), num_samples))
    over = {"in_axes": (None, None, 0)}
    return jax.vmap(toy.model.log_joint, **over)(params, x, z) - jax.vmap(toy.model.log_q, **over)(
        params, x, z
    )


@pytest.mark.parametrize("name", RELAXATION)
@pytest.mark.parametrize("num_samples", [1, 4])
def test_the_value_is_the_bound_at_the_hard_draws(name, num_samples):
    toy = toys.toy(name)
    bounds = {1.0: vd.elbo, 0.0: vd.iwae}
    objectives = {
        (alpha, of): estimator(name, of, 0.5, bound, num_samples)
        for alpha, bound in bounds.items()
        for of in (vd.relaxed, vd.straight_through)
    }
    keys = jax.random.split(jax.random.key(0), len(toy.data))
    runs = toys.single_draws(objectives, keys, toy.params, toy.data)
    for i, key in enumerate(keys):
        weights = log_weights(name, key, toy.params, jnp.asarray(toy.data[i]), num_samples)
        for (alpha, _), (terms, _) in runs.items():
            assert list(terms) == [bounds[alpha].__name__]
            (value,) = terms.values()
            assert float(value[i]) == pytest.approx(toys.numpy_bound(alpha, weights), rel=1e-6)


@pytest.mark.parametrize(("name", "alpha", "num_samples"), [("bernoulli", 0.0, 5), ("categorical", 1.0, 2)])
def test_theta_and_phi_are_unbiased(name, alpha, num_samples):
    toy = toys.toy(name)
    objectives = {
        of: estimator(name, of, 0.5, toys.BOUNDS[alpha], num_samples)
        for of in (vd.relaxed, vd.straight_through)
    }
    value, gradient = toys.exact(name, num_samples)[alpha]
    for values, draws in toys.gradient_draws(objectives, toy.params, toy.data, 60_000, seed=1).values():
        assert toys.z_scores(values[:, None], value) < 5.0
        toys.check_unbiased(draws, gradient, parts=("theta", "phi"))


# The bias of lambda: the mean of either gradient is an integral over one uniform a bit, here by Gauss-Legendre in
# float64 on either side of y = 0, where z jumps.


def expected_gradient(toy, of, temperatures, num_nodes=80):
    """E of the gradient by lambda of the ELBO, K = 1, of a model of one or two bits, mean over toy.data, [t, P]."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    nodes, weights = (nodes[None] + 1) / 2, weights[None] / 2

    def one(params, x, temperature):
        def soft(y):
            return jax.nn.sigmoid(y / temperature)

        logits = toy.logits(params, x)
        split = jax.lax.stop_gradient(jax.nn.sigmoid(-logits))[:, None]
        u = jnp.concatenate([split * nodes, split + (1 - split) * nodes], axis=1)
        mass = jnp.concatenate([split * weights, (1 - split) * weights], axis=1)
        y = logits[:, None] + jnp.log(u) - jnp.log1p(-u)
        z = soft(y) if of is vd.relaxed else (u > split).astype(y.dtype) + gradient_only(soft(y))
        grid = jnp.stack(jnp.meshgrid(*z, indexing="ij"), axis=-1).reshape(-1, len(z))
        mass = functools.reduce(lambda a, b: (a[:, None] * b[None, :]).ravel(), mass)
        over = {"in_axes": (None, None, 0)}
        log_weights = jax.vmap(toy.model.log_joint, **over)(params, x, grid)
        return jnp.sum(mass * (log_weights - jax.vmap(toy.model.log_q, **over)(params, x, grid)))

    def mean(params, data, temperature):
        return jnp.mean(jax.vmap(one, in_axes=(None, 0, None))(params, data, temperature))

    gradients = jax.vmap(jax.grad(mean), in_axes=(None, None, 0))
    return toys.flat(toys.in_float64(gradients, toy.params, toy.data, np.array(temperatures)).lam)


TABLE = {
    (vd.relaxed, 0.1): 0.013,
    (vd.relaxed, 0.5): 0.118,
    (vd.relaxed, 1.0): 0.436,
    (vd.straight_through, 0.1): 0.027,
    (vd.straight_through, 0.5): 0.072,
    (vd.straight_through, 1.0): 0.118,
}
"""What the docstrings say, of the two-bit toy "bernoulli" at K = 1."""

OF_THE_GUIDE = TABLE | {(vd.relaxed, 2.0): 0.960, (vd.straight_through, 2.0): 0.349}
"""The guide, docs/estimators.md, goes on to temperature 2."""


def test_the_guide_s_table_of_biases():
    toy = toys.toy("bernoulli")
    exact = toys.flat_single(toys.exact("bernoulli", 1)[1.0][1].lam)
    rows = (Path(__file__).parents[2] / "docs/estimators.md").read_text().splitlines()
    temperatures = (0.1, 0.5, 1.0, 2.0)
    for of in (vd.relaxed, vd.straight_through):
        means = expected_gradient(toy, of, temperatures)
        bias = np.linalg.norm(means - exact, axis=1) / np.linalg.norm(exact)
        np.testing.assert_allclose(bias, [OF_THE_GUIDE[of, t] for t in temperatures], atol=6e-4)
        cells = " | ".join(f"{100 * OF_THE_GUIDE[of, t]:.1f} %" for t in temperatures)
        assert f"| `{of.__name__}`, lambda | {cells} |" in rows


def test_the_bias_of_lambda():
    """The docstrings' figures are the quadrature's; it falls with the temperature while the variance rises.

    And the estimators' mean gradients are the quadrature's: 60,000 draws tell a difference of 1 % of the norm.
    """
    toy = toys.toy("bernoulli")
    exact = toys.flat_single(toys.exact("bernoulli", 1)[1.0][1].lam)
    means = {}
    for of in (vd.relaxed, vd.straight_through):
        temperatures = [temperature for other, temperature in TABLE if other is of]
        for temperature, mean in zip(temperatures, expected_gradient(toy, of, temperatures), strict=True):
            means[of, temperature] = mean
            bias = np.linalg.norm(mean - exact) / np.linalg.norm(exact)
            assert bias == pytest.approx(TABLE[of, temperature], abs=6e-4), (of, temperature)
            assert f"{100 * TABLE[of, temperature]:.1f} %" in of.__doc__
    objectives = {row: estimator("bernoulli", *row) for row in TABLE}
    runs = toys.gradient_draws(objectives, toy.params, toy.data, 60_000)
    for row, (_, draws) in runs.items():
        scores = toys.z_scores(toys.flat(draws.lam), means[row])
        assert np.max(scores) < 5.0, (row, scores)
    for of in (vd.relaxed, vd.straight_through):
        variances = [toys.variance(runs[of, temperature][1], "lam") for temperature in (1.0, 0.5, 0.1)]
        assert variances == sorted(variances) and variances[-1] > 2 * variances[0], variances


def powers_of_a_bit():
    """One bit, log p(x, z) = 2 sum_n x_n z^n, n = 1, 2, 3, q's logit lam . x: the datum chooses the power.

    No density of x; what is asked for is the gradient by lam_n at 0, exactly 2 sigmoid'(0) / 3 in the mean over data.
    """

    def logits(params, x):
        return jnp.sum(params.lam * x, keepdims=True)

    def log_joint(params, x, z):
        z = z.astype(x.dtype)[0]
        return params.theta * jnp.sum(x * jnp.stack([z, z**2, z**3]))

    def log_q(params, x, z):
        return jnp.sum(z.astype(x.dtype) * logits(params, x) - jax.nn.softplus(logits(params, x)))

    def sample_q(key, params, x):
        return jax.random.bernoulli(key, jax.nn.sigmoid(logits(params, x)))

    params = Params(theta=jnp.float32(2.0), lam=jnp.zeros(3))
    model = Model(lambda key: params, log_joint, log_q, sample_q, lambda key, params: ((), ()))
    return toys.Toy(model, params, np.eye(3, dtype=np.float32), None, logits=logits)


def test_straight_through_tends_to_the_trapezoid_rule():
    """In place of f(1) - f(0): (f'(0) + f'(1)) / 2, the same for a linear f and a square, 1.5 times it for a cube.

    At temperature 1 a linear f gets 2/3: E s' is the integral of sigmoid'^2, 1/6, and sigmoid'(0) is 1/4.
    """
    toy, exact = powers_of_a_bit(), 2 / 4 / 3
    means = expected_gradient(toy, vd.straight_through, [1.0, 0.1, 0.01], 300)
    away = np.abs(means / exact - np.array([1.0, 1.0, 1.5]))
    assert means[0, 0] / exact == pytest.approx(2 / 3, rel=1e-6)
    assert np.all(away[0] > 3 * away[1]) and np.all(away[1] > 3 * away[2]) and np.max(away[2]) < 1e-2, away
    # The cube keeps its bias; relaxed loses it.
    relaxed = expected_gradient(toy, vd.relaxed, [0.01], 300)[0]
    np.testing.assert_allclose(relaxed / exact, 1.0, atol=1e-2)
    objective = vd.straight_through(toy.model, toy.logits, 1.0)
    _, draws = toys.gradient_draws({"elbo": objective}, toy.params, toy.data, 20_000)["elbo"]
    assert np.max(toys.z_scores(toys.flat(draws.lam), means[0])) < 5.0


def test_one_draw_of_the_gradient_is_the_formula():
    """By theta and phi d f at hard draws; by lambda relaxed: d f(soft), straight_through: df/dz ds + df."""
    toy, num_samples, temperature = toys.toy("categorical"), 3, 0.7
    of, x, key = relaxations.one_hot, jnp.asarray(toy.data[1]), jax.random.key(5)

    def f(params, z):
        over = {"in_axes": (None, None, 0)}
        return jax.vmap(toy.model.log_joint, **over)(params, x, z) - jax.vmap(toy.model.log_q, **over)(
            params, x, z
        )

    @toys.quick_jit
    def both(params):
        def y_of(lam):
            return perturb(of, key, toy.logits(params._replace(lam=lam), x), num_samples)

        z = of.harden(y_of(params.lam))
        at_hard = jax.grad(lambda params: vd.iwae(f(params, z)))(params)
        soft = jax.grad(lambda lam: vd.iwae(f(params._replace(lam=lam), of.soften(y_of(lam), temperature))))(
            params.lam
        )
        df_dz = jax.grad(lambda z: vd.iwae(f(params, z)))(z)
        _, pull = jax.vjp(lambda lam: of.soften(y_of(lam), temperature), params.lam)
        through = jax.tree.map(jnp.add, pull(df_dz)[0], at_hard.lam)
        return at_hard._replace(lam=soft), at_hard._replace(lam=through)

    expected = both(toy.params)
    for of_estimator, gradient in zip((vd.relaxed, vd.straight_through), expected, strict=True):
        objective = estimator("categorical", of_estimator, temperature, vd.iwae, num_samples)
        got = toys.quick_jit(jax.grad(vd.total(objective), argnums=1))(key, toy.params, x)
        for part in ("theta", "phi", "lam"):
            one, other = (toys.flat_single(getattr(g, part)) for g in (got, gradient))
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_scheduled_temperature_compiles_once():
    """And is the one at work: the third step is that of a fixed temperature of a quarter."""
    traces = []
    toy = toys.toy("bernoulli")
    data = jnp.asarray(toy.data)

    def log_joint(params, x, z):
        traces.append(z.shape)
        return toy.model.log_joint(params, x, z)

    for of in (vd.relaxed, vd.straight_through):
        traces.clear()

        def at(temperature, of=of):
            return of(toy.model._replace(log_joint=log_joint), toy.logits, temperature)

        scheduled = vd.scheduled(lambda step, at=at: at(0.5 ** step.astype(jnp.float32)))
        step = toys.quick_jit(vd.make_train_step(scheduled, optax.sgd(1.0)))
        state = vd.init_state(jax.random.key(0), toy.model, optax.sgd(1.0))
        for _ in range(3):
            before, (state, _) = state, step(state, data)
        assert len(traces) == (2 if of is vd.relaxed else 1) and step._cache_size() == 1
        expected, _ = toys.quick_jit(vd.make_train_step(at(0.25), optax.sgd(1.0)))(before, data)
        one, other = (toys.flat_single(tree.params) for tree in (state, expected))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RELAXATION)
def test_finite_in_the_far_tails(name):
    """Logits of q of +-20 and +-80, by a prior of the opposite ones; a temperature of .1."""
    toy = toys.toy(name)
    objectives = {
        (of, bound): estimator(name, of, 0.1, bound, 3)
        for of in (vd.relaxed, vd.straight_through)
        for bound in (vd.elbo, vd.iwae)
    }
    size = len(toy.params.lam["bias"])
    far = np.array(list(itertools.product([-80.0, -20.0, 20.0, 80.0], repeat=size)), np.float32)
    params = toy.params._replace(lam=toy.params.lam | {"weight": jnp.zeros((size, 2))})

    @toys.quick_jit
    @functools.partial(jax.vmap, in_axes=(0, 0))
    def run(key, bias):
        at = params._replace(phi={"logits": -bias}, lam=params.lam | {"bias": bias})
        x = jnp.asarray(toy.data[0])
        return [jax.value_and_grad(vd.total(o), argnums=(1, 2))(key, at, x) for o in objectives.values()]

    found = jax.device_get(run(jax.random.split(jax.random.key(0), len(far)), jnp.asarray(far)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.all(np.isfinite(leaf)), path
    # The value at the one draw that such logits leave: log p(x | z) - 80 or so a bit.
    value = found[0][0]
    assert np.all(value < 0) and np.min(value) < -80 * math.sqrt(size)


def test_refusals(key):
    toy, linear = toys.toy("bernoulli"), toys.toy("linear")
    x = jnp.asarray(toy.data[0])
    for of in (vd.relaxed, vd.straight_through):
        with pytest.raises(ValueError, match="num_samples: got 0, expected at least 1"):
            of(toy.model, toy.logits, 0.5, vd.elbo, 0)
        with pytest.raises(ValueError, match="temperature: got 0.0, expected a positive number"):
            of(toy.model, toy.logits, 0.0)
        with pytest.raises(TypeError, match=f"z: got a continuous leaf, .* for {of.__name__}; use pathwise"):
            of(linear.model, toy.logits, 0.5)(key, linear.params, jnp.asarray(linear.data[0]))
        with pytest.raises(TypeError, match=f"logits: .* for {of.__name__}; .* use score_function"):
            of(toy.model, lambda params, x: toy.logits(params, x)[:1], 0.5)(key, toy.params, x)
        with pytest.raises(TypeError, match="expected a typed key"):
            of(toy.model, toy.logits, 0.5)(jax.random.PRNGKey(0), toy.params, x)
