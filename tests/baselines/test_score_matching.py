"""Score matching against closed forms: Gaussians, whose loss is a polynomial in every moment, and all signs in turn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.toys import quick_jit
from vdiff import nets
from vdiff.baselines.score_matching import (
    curvature_gap,
    denoising_score_matching,
    explicit_score_matching,
    sliced_score_matching,
    sliced_score_matching_vr,
)

KEY = jax.random.key(0)
DATA = np.random.default_rng(0).normal(size=(7, 2)) @ np.array([[1.1, 0.4], [0.0, 0.6]]) + [0.5, -0.3]
MEAN, COVARIANCE = DATA.mean(0), np.cov(DATA.T, bias=True)
SIGNS = np.array(list(itertools.product([-1.0, 1.0], repeat=2)), np.float32)
SIGMA = 0.6
FORMS = {
    "explicit": explicit_score_matching,
    "sliced": lambda f: sliced_score_matching(f, 4, draw=all_signs),
    "sliced_vr": lambda f: sliced_score_matching_vr(f, 4, draw=all_signs),
}


def all_signs(key, shape, dtype):
    """Every vector of signs once: the mean over them is the expectation."""
    assert shape == SIGNS.shape
    return jnp.asarray(SIGNS, dtype)


def gaussian(params, x):
    residual = x - params["loc"]
    precision = 0.5 * (params["precision"] + params["precision"].T)
    return -0.5 * residual @ precision @ residual + 11.0


def parameters(loc, precision):
    return {"loc": jnp.asarray(loc, jnp.float32), "precision": jnp.asarray(precision, jnp.float32)}


def over_data(objective):
    """Value and gradient of an objective's mean over the data."""

    def mean(params):
        terms = jax.vmap(objective, in_axes=(None, None, 0))(KEY, params, jnp.asarray(DATA, jnp.float32))
        return jnp.mean(sum(terms.values()))

    return quick_jit(jax.value_and_grad(mean))


def over_noise(sigma):
    """As `over_data`, with the expectation over the noise too: three nodes an axis, exact up to degree five."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    weights = weights / weights.sum()
    eps = jnp.asarray(list(itertools.product(nodes, repeat=2)), jnp.float32)
    masses = jnp.asarray([a * b for a, b in itertools.product(weights, repeat=2)], jnp.float32)

    def mean(params):
        def at(eps):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax.random, "normal", lambda key, shape, dtype: eps)
                objective = denoising_score_matching(gaussian, sigma)
                data = jnp.asarray(DATA, jnp.float32)
                return jnp.mean(jax.vmap(objective, (None, None, 0))(KEY, params, data)["denoising"])

        return masses @ jax.vmap(at)(eps)

    return quick_jit(jax.value_and_grad(mean))


def moments(loc):
    """E (x - loc)(x - loc)^T over the data."""
    return COVARIANCE + np.outer(MEAN - loc, MEAN - loc)


LOC, PRECISION = np.array([0.2, 0.4]), np.array([[1.3, -0.4], [-0.4, 0.9]])


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    return over_data(FORMS[request.param](gaussian))


def test_value_on_a_gaussian(form):
    """J = tr(P M P) / 2 - tr P, and the value is -J."""
    value = form(parameters(LOC, PRECISION))[0]
    loss = 0.5 * np.trace(PRECISION @ moments(LOC) @ PRECISION) - np.trace(PRECISION)
    assert float(value) == pytest.approx(-loss, rel=2e-6)


def test_gradient_on_a_gaussian(form):
    """dJ/dP = (M P + P M) / 2 - I, dJ/dloc = -P^2 (mean - loc)."""
    gradient = form(parameters(LOC, PRECISION))[1]
    symmetric = 0.5 * (moments(LOC) @ PRECISION + PRECISION @ moments(LOC))
    np.testing.assert_allclose(gradient["precision"], np.eye(2) - symmetric, atol=2e-6)
    np.testing.assert_allclose(gradient["loc"], PRECISION @ PRECISION @ (MEAN - LOC), atol=2e-6)


def test_the_gradient_is_zero_at_the_maximum_likelihood(form):
    """At the data's own mean and precision, and at no other: there the value is tr(P) / 2."""
    precision = np.linalg.inv(COVARIANCE)
    value, gradient = form(parameters(MEAN, precision))
    np.testing.assert_allclose(gradient["loc"], 0, atol=5e-6 * np.abs(precision).max() ** 2)
    np.testing.assert_allclose(gradient["precision"], 0, atol=5e-6)
    assert float(value) == pytest.approx(0.5 * np.trace(precision), rel=2e-6)
    elsewhere = form(parameters(MEAN, 1.1 * precision))[1]
    assert np.abs(elsewhere["precision"]).max() > 0.05


def test_denoising_on_a_gaussian():
    """Value and gradient off the optimum; the gradient zero at the blurred density, covariance + sigma^2 I."""
    form = over_noise(SIGMA)
    value, gradient = form(parameters(LOC, PRECISION))
    shrunk = np.eye(2) - SIGMA**2 * PRECISION
    loss = 0.5 * np.trace(shrunk @ shrunk) + 0.5 * SIGMA**2 * np.trace(PRECISION @ moments(LOC) @ PRECISION)
    assert float(value) == pytest.approx(-loss, rel=2e-6)
    symmetric = 0.5 * (moments(LOC) @ PRECISION + PRECISION @ moments(LOC))
    np.testing.assert_allclose(gradient["precision"], SIGMA**2 * (shrunk - symmetric), atol=2e-6)
    expected = SIGMA**2 * PRECISION @ PRECISION @ (MEAN - LOC)
    np.testing.assert_allclose(gradient["loc"], expected, atol=2e-6)

    blurred = np.linalg.inv(COVARIANCE + SIGMA**2 * np.eye(2))
    value, gradient = form(parameters(MEAN, blurred))
    np.testing.assert_allclose(gradient["loc"], 0, atol=2e-6)
    np.testing.assert_allclose(gradient["precision"], 0, atol=2e-6)
    # The floor: half the variance of eps given the noisy x.
    floor = 0.5 * np.trace(np.eye(2) - SIGMA**2 * blurred)
    assert float(value) == pytest.approx(-floor, rel=2e-6)
    gradient = form(parameters(MEAN, np.linalg.inv(COVARIANCE)))[1]
    assert np.abs(gradient["precision"]).max() > 0.05


def two_layers(params, x):
    """A small network of swish units."""
    return params["out"] @ jax.nn.swish(params["mid"] @ jax.nn.swish(params["in"] @ x + params["bias"]))


def weights():
    rng = np.random.default_rng(3)
    shapes = {"in": (6, 2), "bias": (6,), "mid": (5, 6), "out": (5,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def bent():
    """A network, so that no loss is a polynomial: value and gradient by form, of one datum, over many keys."""
    params, x = weights(), jnp.array([0.4, -0.7])
    forms = {name: build(two_layers) for name, build in FORMS.items()}
    forms["sliced, drawn"] = sliced_score_matching(two_layers, 3, draw=jax.random.normal)
    forms["sliced_vr, drawn"] = sliced_score_matching_vr(two_layers, 3)
    keys = jax.random.split(jax.random.key(5), 4000)

    def each(objective):
        def both(key):
            value, gradient = jax.value_and_grad(lambda p: sum(objective(key, p, x).values()))(params)
            return jnp.concatenate([value[None], *(leaf.ravel() for leaf in jax.tree.leaves(gradient))])

        return both

    run = quick_jit(lambda keys: {name: jax.vmap(each(form))(keys) for name, form in forms.items()})
    return {name: np.asarray(out, np.float64) for name, out in run(keys).items()}


@pytest.mark.parametrize("name", ["sliced", "sliced_vr"])
def test_the_mean_over_all_signs_is_the_explicit_form(bent, name):
    np.testing.assert_allclose(bent[name][0], bent["explicit"][0], atol=5e-6)


@pytest.mark.parametrize("name", ["sliced, drawn", "sliced_vr, drawn"])
def test_the_mean_over_draws_is_the_explicit_form(bent, name):
    """Value and every entry of the gradient, apart."""
    exact, drawn = bent["explicit"][0], bent[name]
    std_error = drawn.std(0, ddof=1) / np.sqrt(len(drawn)) + 1e-6
    z = (drawn.mean(0) - exact) / std_error
    assert np.all(np.abs(z) < 5) and np.sum(std_error > 1e-5) > 20


def test_the_closed_form_norm_lowers_the_variance(bent):
    """On one datum with three directions: to less than half, in value and gradient."""
    plain, reduced = bent["sliced, drawn"].var(0), bent["sliced_vr, drawn"].var(0)
    assert reduced[0] < 0.5 * plain[0] and reduced[1:].sum() < 0.5 * plain[1:].sum()


def test_explicit_uses_no_noise(bent):
    assert np.all(bent["explicit"].std(0) < 1e-6)


# What the explicit form cannot learn from.


def confined(network):
    return lambda params, x: -network.apply(params, x) - jnp.sum(x**2)


@pytest.mark.parametrize("build", FORMS.values(), ids=FORMS)
def test_a_relu_energy_is_refused(build):
    """While tracing, under jit, vmap and grad alike, with the way out."""
    network = nets.mlp((2,), (), hidden=(6, 5), activation=jax.nn.relu)
    params, data = jax.eval_shape(network.init, KEY), jnp.asarray(DATA, jnp.float32)
    for log_density in (network.apply, confined(network)):
        objective = build(log_density)

        def loss(params, objective=objective):
            return jnp.mean(jax.vmap(objective, (None, None, 0))(KEY, params, data)["trace"])

        with pytest.raises(ValueError, match=r"ReLU.*jax\.nn\.swish, or denoising_score_matching"):
            jax.eval_shape(jax.jit(jax.grad(loss)), params)


@pytest.mark.parametrize(
    "activation", [jnp.abs, jax.nn.leaky_relu, lambda h: jnp.max(h.reshape(3, 2), axis=1), jax.nn.hard_tanh]
)
def test_other_pieces_are_refused_too(activation):
    def log_density(params, x):
        return params["out"] @ activation(params["in"] @ x) - 0.5 * jnp.sum(x**2)

    num_units = activation(jnp.zeros(6)).size
    params = {"in": jnp.ones((6, 2)), "out": jnp.ones(num_units)}
    with pytest.raises(ValueError, match="piece by piece"):
        jax.eval_shape(explicit_score_matching(log_density), KEY, params, jnp.ones(2))


SMOOTH = {
    "a learned mean alone": (lambda p, x: -0.5 * jnp.sum((x - p) ** 2), jnp.ones(2)),
    "the same, compiled": (jax.jit(lambda p, x: -0.5 * jnp.sum((x - p) ** 2)), jnp.ones(2)),
    "nothing learned": (lambda p, x: -0.5 * jnp.sum(x**2), ()),
    "a mixture": (lambda p, x: jax.nn.logsumexp(-jnp.sum((x[None] - p) ** 2, 1)), jnp.ones((3, 2))),
    "softplus": (lambda p, x: -jax.nn.softplus(p @ x), jnp.ones(2)),
    "elu": (lambda p, x: -jax.nn.elu(p @ x), jnp.ones(2)),
    "gelu": (lambda p, x: -jax.nn.gelu(p @ x), jnp.ones(2)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_what_bends_is_taken(name):
    log_density, params = SMOOTH[name]
    terms = jax.eval_shape(explicit_score_matching(log_density), KEY, params, jnp.ones(2))
    assert set(terms) == {"norm", "trace"}


def test_denoising_takes_a_relu_energy():
    objective = denoising_score_matching(lambda p, x: jnp.sum(jax.nn.relu(p @ x)), 0.5)
    gradient = quick_jit(jax.grad(lambda p: objective(KEY, p, jnp.ones(2))["denoising"]))(jnp.ones((3, 2)))
    assert np.all(np.any(gradient != 0, axis=1))


def test_the_gap_is_the_jump_of_the_score():
    """A ReLU under a smooth last layer, which nothing refuses: its kink is measured; a swish has none."""
    x, y = jnp.array([-0.7, 0.3]), jnp.array([0.9, 0.5])
    for activation, jump in ((jax.nn.relu, 1.0), (jax.nn.swish, 0.0)):

        def log_density(params, x, activation=activation):
            return jnp.exp(activation(params @ x)) - jnp.sum(x**2)

        params = jnp.array([1.2, 0.4])
        gap = quick_jit(curvature_gap(log_density, 400))(params, x, y)
        # exp(relu(u)) has the slope exp(0) right of its kink and none left of it, along the step.
        assert float(gap) == pytest.approx(jump * float(params @ (y - x)), abs=2e-3)


def test_what_is_refused(unchecked):
    for build in (sliced_score_matching, sliced_score_matching_vr):
        with pytest.raises(ValueError, match="num_projections: got 0"):
            build(gaussian, 0)
    with pytest.raises(ValueError, match="num_points: got 0"):
        curvature_gap(gaussian, 0)
    with pytest.raises(ValueError, match=r"sigma: got 0\.0"):
        denoising_score_matching(gaussian, 0.0)
    params = parameters(LOC, PRECISION)
    forms = [*(build(gaussian) for build in FORMS.values()), denoising_score_matching(gaussian, 0.5)]
    for objective in forms:
        with pytest.raises(TypeError, match="x: got dtype int32"):
            objective(KEY, params, jnp.ones(2, jnp.int32))
        with pytest.raises(TypeError, match="typed key"):
            objective(jax.random.PRNGKey(0), params, jnp.ones(2))
    with pytest.raises(ValueError, match="log_density: got an output of shape"):
        explicit_score_matching(lambda params, x: -(x**2))(KEY, (), jnp.ones(2))
