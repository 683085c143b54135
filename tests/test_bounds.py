"""The bounds against NumPy in float64, their limits, and the model whose log p(x) is known."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import vdiff as vd
from tests import toys

ALPHAS = (-3.0, -0.5, 0.0, 0.3, 0.5, 0.9, 0.999, 1.0, 1.001, 1.1, 2.0, 5.0)
PARTITIONS = {"tvo(0, 1)": (0.0, 1.0), "tvo of 4": toys.PARTITION}
RENYI = {"elbo": vd.elbo, "iwae": vd.iwae} | {f"renyi({a})": vd.renyi(a) for a in ALPHAS}
NAMED = RENYI | {name: vd.tvo(partition) for name, partition in PARTITIONS.items()}


def weights(seed, num_samples, spread, centre=-40.0):
    """Log-weights of a given standard deviation."""
    rng = np.random.default_rng(seed)
    return (centre + spread * rng.normal(size=num_samples)).astype(np.float32)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("num_samples", [1, 2, 7])
@pytest.mark.parametrize("constant", [-80.0, 0.0, 3.25, 1e4])
def test_equal_weights_give_that_weight(name, num_samples, constant):
    bound = NAMED[name](jnp.full(num_samples, constant))
    assert bound == pytest.approx(constant, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 300])
def test_limits(num_samples):
    log_weights = jnp.asarray(weights(0, num_samples, 3.0, centre=-4.0))
    assert vd.renyi(1.0)(log_weights) == vd.elbo(log_weights)
    np.testing.assert_allclose(vd.renyi(0.0)(log_weights), vd.iwae(log_weights), atol=1e-5)
    np.testing.assert_allclose(
        jax.grad(vd.renyi(0.0))(log_weights), jax.grad(vd.iwae)(log_weights), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("alpha", [1 - 1e-6, 1 + 1e-6])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_the_limit_at_one_is_approached_in_value_and_gradient(alpha, spread):
    log_weights = jnp.asarray(weights(1, 9, spread, centre=-4.0))
    assert abs(vd.renyi(alpha)(log_weights) - vd.elbo(log_weights)) < 1e-5
    difference = jax.grad(vd.renyi(alpha))(log_weights) - jax.grad(vd.elbo)(log_weights)
    assert np.max(np.abs(difference)) < 1e-5


@pytest.mark.parametrize("order", [1e-6, 1e-4, 1e-2, 0.1, 0.5, 0.9, 1.0, 3.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_renyi_is_the_formula(order, sign):
    """Value and gradient against float64, for spreads that take the near branch and that take the far one."""
    alpha = 1.0 - sign * order
    spreads = [s for s in (1e-4, 1e-2, 0.3, 1.0, 3.0, 30.0, 1e3) for _ in range(4)]
    rows = np.stack([weights(seed, 6, spread) for seed, spread in enumerate(spreads)])
    values, gradients = toys.quick_jit(jax.vmap(jax.value_and_grad(vd.renyi(alpha))))(rows)
    for row, value, gradient in zip(rows, values, gradients, strict=True):
        # In float64 the plain formula loses 1e-16 / order; about the mean it does not matter here.
        exponents = np.asarray(row, np.float64)
        centre = np.mean(exponents)
        exact = centre + toys.numpy_bound(alpha, exponents - centre)
        scale = np.max(np.abs(row)) + 1.0
        np.testing.assert_allclose(value, exact, atol=1e-6 * scale, rtol=0)
        tilted = scipy.special.softmax((1.0 - alpha) * exponents)
        # The exponents are rounded: their error is float32's, times the order, times their size.
        slack = 1e-6 + 1.5e-7 * order * scale
        np.testing.assert_allclose(gradient, tilted, atol=slack * np.max(tilted), rtol=0)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_near_and_far_branch_meet(alpha):
    """The branch changes where |1 - alpha| max |l - mean| passes 1."""
    for spread in (0.99, 0.999, 0.9999, 1.0001, 1.001, 1.01):
        log_weights = np.float32(spread / abs(1 - alpha)) * np.array([-1.0, 0.2, 0.8], np.float32)
        exact = toys.numpy_bound(alpha, log_weights)
        np.testing.assert_allclose(vd.renyi(alpha)(jnp.asarray(log_weights)), exact, rtol=1e-5, atol=1e-7)
        gradient = jax.grad(vd.renyi(alpha))(jnp.asarray(log_weights))
        exact = scipy.special.softmax((1 - alpha) * np.asarray(log_weights, np.float64))
        np.testing.assert_allclose(gradient, exact, rtol=2e-6)


@pytest.mark.parametrize("name", ["iwae", "renyi(0.5)", "renyi(0.0)", "renyi(-0.5)"])
def test_a_weight_of_zero_counts_as_zero(name):
    """Below alpha = 1 a draw of weight zero only lowers the mean of the powers."""
    alpha = {"iwae": 0.0, "renyi(0.5)": 0.5, "renyi(0.0)": 0.0, "renyi(-0.5)": -0.5}[name]
    log_weights = jnp.array([-1.0, -jnp.inf, -2.0])
    order = 1 - alpha
    exact = np.log(np.sum(np.exp(order * np.array([-1.0, -2.0]))) / 3) / order
    assert NAMED[name](log_weights) == pytest.approx(exact, rel=1e-6)
    gradient = np.append(scipy.special.softmax(order * np.array([-1.0, -2.0])), 0.0)[[0, 2, 1]]
    np.testing.assert_allclose(jax.grad(NAMED[name])(log_weights), gradient, rtol=1e-5)


@pytest.mark.parametrize("name", ["elbo", "renyi(1.1)", "renyi(2.0)"])
def test_a_weight_of_zero_is_fatal_from_alpha_one_up(name):
    assert NAMED[name](jnp.array([-1.0, -jnp.inf, -2.0])) == -jnp.inf


@pytest.mark.parametrize("name", RENYI)
def test_gradient_at_80_nats(name):
    """The gradient is softmax((1 - alpha) l), whose sum is one, at log-weights of +-80 as well."""
    alpha = {"elbo": 1.0, "iwae": 0.0}.get(name) if name in ("elbo", "iwae") else float(name[6:-1])
    for log_weights in ([80.0, -80.0], [80.0, 79.0, -80.0], [-80.0, -80.0, -80.0], [80.0, 80.0]):
        gradient = jax.grad(NAMED[name])(jnp.array(log_weights))
        exact = scipy.special.softmax((1 - alpha) * np.array(log_weights))
        np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.sum(gradient), 1.0, rtol=2e-6)


@pytest.mark.parametrize("spread", [0.1, 3.0, 100.0])
def test_bounds_fall_with_alpha(spread):
    for seed in range(5):
        log_weights = jnp.asarray(weights(seed, 5, spread))
        values = [float(vd.renyi(alpha)(log_weights)) for alpha in ALPHAS]
        slack = 1e-6 * float(jnp.max(jnp.abs(log_weights)))
        assert all(low <= high + slack for high, low in zip(values, values[1:], strict=False)), values
        assert values[0] > values[-1] + 1e-3 * spread
        assert values[0] <= np.max(log_weights) + slack and values[-1] >= np.min(log_weights) - slack


def test_bounds_do_not_depend_on_the_order_of_the_draws():
    log_weights = weights(3, 8, 2.0)
    for bound in NAMED.values():
        np.testing.assert_allclose(
            bound(jnp.asarray(log_weights)), bound(jnp.asarray(log_weights[::-1].copy())), rtol=1e-6
        )


def test_many_draws_reach_log_p():
    """Log-mean-weight of 200,000 draws against log N(x; W loc + b, W W^T + s^2 I), by the delta method."""
    toy = toys.toy("linear2")
    model, data = toy.model, toy.data
    # Wider than the posterior, so that the weights are bounded.
    params = toys.at_posterior(toy.params)
    params = params._replace(lam=params.lam | {"log_diag": params.lam["log_diag"] + 0.5})
    num_samples = 200_000

    for i, x in enumerate(jnp.asarray(data)):
        log_w = toys.log_weights(model, jax.random.key(i), params, x, num_samples)
        exact = toys.linear_gaussian_log_prob(params, x)
        ratio = np.exp(np.asarray(log_w, np.float64) - float(exact))
        std_error = np.std(ratio) / np.sqrt(num_samples)
        assert std_error < 0.01
        assert abs(float(vd.iwae(log_w)) - float(exact)) < 5 * max(std_error, 2e-6 * abs(float(exact)))
        # In expectation the order is elbo < renyi < iwae <= log p(x); here by a wide margin.
        assert vd.elbo(log_w) < vd.renyi(0.5)(log_w) - 0.02 < vd.iwae(log_w) - 0.04


def test_the_bounds_are_functions_with_names():
    assert [b.__name__ for b in (vd.elbo, vd.iwae, vd.renyi(0.5))] == ["elbo", "iwae", "renyi"]


def test_bounds_map_over_a_batch():
    log_weights = np.stack([weights(seed, 4, 2.0) for seed in range(3)])
    for bound in (vd.elbo, vd.iwae, vd.renyi(0.5)):
        one_by_one = [bound(jnp.asarray(row)) for row in log_weights]
        np.testing.assert_allclose(jax.jit(jax.vmap(bound))(log_weights), one_by_one, rtol=1e-6)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf")])
def test_renyi_refuses_an_infinite_order(alpha):
    with pytest.raises(ValueError, match="alpha: got .*, expected a finite number"):
        vd.renyi(alpha)


SHIFT = jax.jit(lambda log_weights, by: (vd.elbo(log_weights + by), vd.iwae(log_weights + by)))


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(
    log_weights=st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5),
    by=st.floats(-50, 50, width=32),
)
def test_bounds_are_ordered_move_with_a_constant_and_lie_between_the_extremes(log_weights, by):
    log_weights = np.array(log_weights, np.float32)
    elbo, iwae = (float(value) for value in SHIFT(log_weights, np.float32(0)))
    slack = 1e-5 * (1 + np.max(np.abs(log_weights)))
    assert log_weights.min() - slack <= elbo <= iwae + slack <= log_weights.max() + 2 * slack
    moved = np.array(SHIFT(log_weights, np.float32(by)), np.float64)
    np.testing.assert_allclose(moved, np.array([elbo, iwae]) + by, atol=3 * (slack + 1e-5 * abs(by)))


# The thermodynamic bound.


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_tvo_is_the_formula(spread):
    """Value against float64, gradient against its finite differences in float64."""
    for seed in range(4):
        log_weights = weights(seed, 6, spread)
        value, gradient = jax.value_and_grad(vd.tvo(toys.PARTITION))(jnp.asarray(log_weights))
        scale = float(np.max(np.abs(log_weights)))
        assert float(value) == pytest.approx(toys.numpy_bound("tvo", log_weights), abs=2e-6 * scale)
        step = 1e-5
        for k in range(6):
            ends = [np.float64(log_weights) + sign * step * np.eye(6)[k] for sign in (1, -1)]
            difference = (toys.numpy_bound("tvo", ends[0]) - toys.numpy_bound("tvo", ends[1])) / (2 * step)
            assert float(gradient[k]) == pytest.approx(difference, abs=1e-5 + 1e-6 * scale)


def test_tvo_of_two_points_is_the_elbo():
    log_weights = jnp.asarray(weights(0, 7, 3.0))
    assert vd.tvo((0.0, 1.0))(log_weights) == pytest.approx(float(vd.elbo(log_weights)), rel=1e-6)


@pytest.mark.parametrize("spread", [0.5, 5.0])
def test_tvo_rises_to_iwae_as_the_partition_is_refined(spread):
    """A left sum of a rising function: more points, a higher bound, and the integral is logmeanexp."""
    for seed in range(4):
        log_weights = jnp.asarray(weights(seed, 9, spread, centre=-4.0))
        values = [float(vd.tvo(np.linspace(0, 1, 2**j + 1))(log_weights)) for j in (0, 1, 2, 4, 7)]
        assert values == sorted(values) and values[-1] < float(vd.iwae(log_weights)) + 1e-5
        # The left sum's error is at most the step times the function's rise, max l - mean l.
        rise = float(jnp.max(log_weights) - jnp.mean(log_weights))
        assert float(vd.iwae(log_weights)) - values[-1] < rise / 128


@pytest.mark.parametrize(
    "partition",
    [
        (),
        (0.0,),
        (0.0, 0.5),
        (0.1, 1.0),
        (0.0, 0.5, 0.5, 1.0),
        (0.0, 0.8, 0.3, 1.0),
        (0.0, float("nan"), 1.0),
    ],
)
def test_tvo_refuses_what_is_no_partition(partition):
    with pytest.raises(ValueError, match="partition: got .* expected numbers rising from 0 to 1"):
        vd.tvo(partition)


def test_tvo_at_80_nats():
    for log_weights in ([80.0, -80.0], [80.0, 79.0, -80.0], [-80.0, -80.0, -80.0]):
        value, gradient = jax.value_and_grad(vd.tvo(toys.PARTITION))(jnp.array(log_weights))
        assert value == pytest.approx(toys.numpy_bound("tvo", log_weights), rel=1e-5)
        np.testing.assert_allclose(np.sum(gradient), 1.0, rtol=1e-5)


# Bounds of one's own: a line of arithmetic.


def test_ciwae_is_a_line():
    """Rainforth et al., 2018: beta ELBO + (1 - beta) IWAE, on the same draws."""

    def ciwae(log_weights):
        return 0.05 * vd.elbo(log_weights) + 0.95 * vd.iwae(log_weights)

    toy = toys.toy("linear")
    objective = vd.doubly_reparameterized(toy.model, ciwae, 5)
    values, draws = toys.gradient_draws({"it": objective}, toy.params, toy.data, 40_000)["it"]
    (elbo, of_elbo), (iwae, of_iwae) = (toys.exact("linear", 5)[alpha] for alpha in (1.0, 0.0))
    assert toys.z_scores(values[:, None], 0.05 * elbo + 0.95 * iwae) < 5.0
    toys.check_unbiased(draws, jax.tree.map(lambda a, b: 0.05 * a + 0.95 * b, of_elbo, of_iwae))
    terms = objective(jax.random.key(0), toy.params, jnp.asarray(toy.data[0]))
    assert list(terms) == ["ciwae"]
