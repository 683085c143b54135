"""EM against its own theory, against NumPy in float64, against scikit-learn and against gradient ascent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from sklearn.mixture import GaussianMixture

from vdiff import Network, Params
from vdiff.models.covariance import diagonal_covariance, full_covariance, shared_covariance
from vdiff.models.em import em_step, fit_em
from vdiff.models.gmm import gmm

KINDS = {"full": full_covariance, "shared": shared_covariance, "diagonal": diagonal_covariance}
SKLEARN = {"full": "full", "shared": "tied", "diagonal": "diag"}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_prior = pytest.mark.parametrize(("nu", "scale"), [(0.0, 1.0), (7.0, 0.6)])


def two_clusters(seed=0, num_data=400):
    """The lecture's picture: two Gaussian clouds in the plane."""
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(num_data // 2, 2)) @ np.array([[1.0, 0.4], [0.0, 0.5]]) + [-1.5, 0.5]
    right = rng.normal(size=(num_data - num_data // 2, 2)) * [0.6, 1.1] + [1.5, -0.5]
    return jnp.asarray(np.concatenate([left, right]), jnp.float32)


@functools.cache
def mixture(kind, num_components, dim):
    """One model per kind and size, so that its compiled steps are shared by the tests."""
    return gmm(num_components, dim, covariance=KINDS[kind])


def start(kind, num_components, dim, seed=0):
    """A model and parameters away from any optimum: unequal weights, correlated covariances."""
    rng = np.random.default_rng(seed)
    model = mixture(kind, num_components, dim)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    draw = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)
    loc = jnp.asarray(rng.normal(size=(num_components, dim)), jnp.float32)
    return model, draw._replace(theta=draw.theta | {"loc": loc})


def moments(params):
    """Weights, locations and covariances [C, dim, dim], in float64 numpy."""
    theta = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params.theta)
    num_components, dim = theta["loc"].shape
    weights = scipy.special.softmax(np.asarray(params.phi["logits"], np.float64))
    if "log_scale" in theta:
        return weights, theta["loc"], np.stack([np.diag(np.exp(2 * row)) for row in theta["log_scale"]])
    log_diag = np.broadcast_to(theta["log_diag"], (num_components, dim))
    lower = np.broadcast_to(theta["lower"], (num_components, dim, dim))
    whitening = [np.tril(b, -1) + np.diag(np.exp(a)) for a, b in zip(log_diag, lower, strict=True)]
    return weights, theta["loc"], np.stack([np.linalg.inv(w.T @ w) for w in whitening])


def exact_log_joints(params, data):
    """Log p(x_n, z) [N, C] by scipy."""
    parts = zip(*moments(params), strict=True)
    data = np.asarray(data, np.float64)
    return np.stack(
        [np.log(w) + scipy.stats.multivariate_normal(m, s).logpdf(data) for w, m, s in parts], axis=1
    )


def exact_objective(kind, params, data, nu, scale):
    """The penalised log-likelihood in nats per datum: one penalty per distinct matrix."""
    distinct = moments(params)[2][: 1 if kind == "shared" else None]
    penalty = sum(np.linalg.slogdet(s)[1] + scale**2 * np.trace(np.linalg.inv(s)) for s in distinct)
    log_prob = scipy.special.logsumexp(exact_log_joints(params, data), axis=1)
    return (np.sum(log_prob) - nu / 2 * penalty) / len(data)


def exact_step(kind, params, data, nu, scale):
    """One E and M step as the books write it, in float64: weights, locations, covariances."""
    x = np.asarray(data, np.float64)
    responsibility = scipy.special.softmax(exact_log_joints(params, data), axis=1)
    counts = responsibility.sum(axis=0)
    loc = responsibility.T @ x / counts[:, None]
    residual = x[:, None, :] - loc
    scatter = np.einsum("nk,nki,nkj->kij", responsibility, residual, residual)
    prior = nu * scale**2 * np.eye(x.shape[1])
    if kind == "shared":
        sigma = np.broadcast_to((scatter.sum(axis=0) + prior) / (len(x) + nu), scatter.shape)
    else:
        sigma = (scatter + prior) / (counts + nu)[:, None, None]
    if kind == "diagonal":
        sigma = sigma * np.eye(x.shape[1])
    return counts / len(x), loc, sigma


def penalised(model, params, data, nu, scale):
    """The same objective through the library, for gradients."""
    log_prob = jax.vmap(model.log_prob, in_axes=(None, 0))(params, data)
    return jnp.mean(log_prob) + nu / len(data) * model.covariance.log_prior(params.theta, scale)


gradient = jax.jit(jax.grad(penalised, argnums=1), static_argnums=0)


@every_kind
@every_prior
def test_a_step_is_the_textbooks(kind, nu, scale):
    data = two_clusters()
    model, params = start(kind, 3, 2)
    expected = exact_step(kind, params, data, nu, scale)
    got = moments(em_step(model, params, data, prior_strength=nu, prior_scale=scale))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@every_kind
@every_prior
def test_no_step_lowers_the_penalised_likelihood(kind, nu, scale):
    data = two_clusters()
    model, params = start(kind, 3, 2, seed=1)

    def step(p):
        return em_step(model, p, data, prior_strength=nu, prior_scale=scale)

    values = []
    for _ in range(40):
        values.append(exact_objective(kind, params, data, nu, scale))
        params = step(params)
    gains = np.diff(values)
    assert np.min(gains) > -1e-6
    assert values[-1] - values[0] > 0.1


@every_kind
def test_the_penalty_is_what_the_docstring_says(kind):
    model, params = start(kind, 3, 2, seed=2)
    distinct = moments(params)[2][: 1 if kind == "shared" else None]
    expected = -0.5 * sum(np.linalg.slogdet(s)[1] + 0.49 * np.trace(np.linalg.inv(s)) for s in distinct)
    np.testing.assert_allclose(model.covariance.log_prior(params.theta, 0.7), expected, rtol=1e-5)


@every_kind
@every_prior
def test_a_fixed_point_has_no_gradient(kind, nu, scale):
    data = two_clusters()
    model, params = start(kind, 2, 2, seed=3)

    def size(params):
        return max(jnp.max(jnp.abs(g)) for g in jax.tree.leaves(gradient(model, params, data, nu, scale)))

    before = size(params)
    for _ in range(500):
        params = em_step(model, params, data, prior_strength=nu, prior_scale=scale)
    assert before > 0.05
    assert size(params) < 2e-5


@every_kind
def test_steps_are_scikit_learns(kind):
    data = two_clusters(seed=4)
    model, params = start(kind, 3, 2, seed=4)
    weights, loc, sigma = moments(params)
    precisions = {
        "full": np.linalg.inv(sigma),
        "shared": np.linalg.inv(sigma[0]),
        "diagonal": 1 / np.diagonal(sigma, axis1=1, axis2=2),
    }[kind]
    other = GaussianMixture(
        3,
        covariance_type=SKLEARN[kind],
        weights_init=weights,
        means_init=loc,
        precisions_init=precisions,
        reg_covar=0.0,
        max_iter=12,
        tol=0.0,
    )
    with pytest.warns(match="did not converge"):
        other.fit(np.asarray(data, np.float64))
    for _ in range(12):
        params = em_step(model, params, data)
    log_prob = jax.vmap(model.log_prob, in_axes=(None, 0))(params, data)
    np.testing.assert_allclose(jnp.mean(log_prob), other.score(np.asarray(data, np.float64)), rtol=2e-6)
    np.testing.assert_allclose(params.theta["loc"], other.means_, atol=1e-3)


def test_em_and_gradient_ascent_reach_the_same_likelihood():
    data = two_clusters()
    model, params = start("full", 2, 2, seed=5)
    fitted, _ = fit_em(jax.random.key(0), model, data, tolerance=0.0)

    def objective(params):
        return penalised(model, params, data, 0.0, 1.0)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 600))

    def update(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(lambda p: -objective(p))(params), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(update, (p, optimizer.init(p)), length=600)[0][0])
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count
        climbed = run(params)
    assert objective(fitted) - objective(params) > 0.1
    assert abs(float(objective(fitted) - objective(climbed))) < 1e-3


@every_kind
@every_prior
def test_history_is_the_objective_and_never_falls(kind, nu, scale):
    data = two_clusters(seed=6)
    model = mixture(kind, 3, 2)
    params, history = fit_em(
        jax.random.key(0), model, data, tolerance=0.0, prior_strength=nu, prior_scale=scale
    )
    assert isinstance(history, np.ndarray)
    assert 3 <= len(history) <= 101
    assert np.all(np.diff(history) >= 0)
    np.testing.assert_allclose(history[-1], exact_objective(kind, params, data, nu, scale), rtol=2e-6)


def test_history_begins_before_the_first_step_and_ends_after_the_last():
    data = two_clusters(seed=6)
    model = mixture("diagonal", 3, 2)
    _, history = fit_em(jax.random.key(0), model, data, tolerance=0.0)
    params, short = fit_em(jax.random.key(0), model, data, num_steps=3, tolerance=0.0)
    assert len(short) == 4
    np.testing.assert_allclose(short, history[:4], rtol=1e-6)
    np.testing.assert_allclose(short[-1], exact_objective("diagonal", params, data, 0.0, 1.0), rtol=2e-6)
    np.testing.assert_allclose(
        history[4], exact_objective("diagonal", em_step(model, params, data), data, 0.0, 1.0), rtol=2e-6
    )


def test_the_run_stops_when_a_step_gains_less_than_the_tolerance():
    data = two_clusters()
    model = mixture("full", 3, 2)
    _, history = fit_em(jax.random.key(0), model, data, tolerance=1e-4)
    gains = np.diff(history)
    assert 2 < len(gains) < 100
    assert np.all(gains[:-1] >= 1e-4)
    assert gains[-1] < 1e-4
    _, history = fit_em(jax.random.key(0), model, data, tolerance=1e3)
    assert len(history) == 2


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_it_finds_the_clusters_that_made_the_data(kind):
    # 3 clusters 6 standard deviations apart: the locations are averages of known data, so z-scores.
    rng = np.random.default_rng(7)
    centres = np.array([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    labels = rng.choice(3, size=400, p=[0.5, 0.3, 0.2])
    data = jnp.asarray(centres[labels] + rng.normal(size=(400, 2)), jnp.float32)
    model = mixture(kind, 3, 2)
    params, _ = fit_em(jax.random.key(0), model, data)
    weights, loc, sigma = moments(params)
    order = np.argmin(np.sum((centres[:, None] - loc) ** 2, axis=2), axis=1)
    counts = np.bincount(labels)
    assert sorted(order) == [0, 1, 2]
    assert np.max(np.abs(weights[order] - [0.5, 0.3, 0.2]) / np.sqrt(0.25 / 400)) < 5
    assert np.max(np.abs(loc[order] - centres) * np.sqrt(counts)[:, None]) < 5
    assert np.max(np.abs(sigma[order] - np.eye(2)) * np.sqrt(counts / 2)[:, None, None]) < 5


def test_restarts_return_the_best_run():
    # 9 tight clusters. A run that splits one and joins two others ends half a nat below the likelihood of
    # the truth, and some of these 16 do; the best run ends above it.
    rng = np.random.default_rng(8)
    centres = np.stack(np.meshgrid([0.0, 4.0, 8.0], [0.0, 4.0, 8.0]), axis=-1).reshape(9, 2)
    data = jnp.asarray(np.repeat(centres, 30, axis=0) + 0.5 * rng.normal(size=(270, 2)), jnp.float32)
    model = mixture("shared", 9, 2)
    params, history = fit_em(jax.random.key(1), model, data, num_restarts=16)
    log_scale = np.full((2,), np.log(0.5), np.float32)
    theta = {"loc": centres, "log_diag": -log_scale, "lower": np.zeros((2, 2))}
    truth = exact_objective("shared", Params(theta, {"logits": np.zeros(9)}), data, 0.0, 1.0)
    assert truth < history[-1] < truth + 0.2
    np.testing.assert_allclose(history[-1], exact_objective("shared", params, data, 0.0, 1.0), rtol=1e-5)
    assert np.all(np.diff(history) >= 0)


@every_kind
@every_prior
def test_an_empty_component_stays_and_does_no_harm(kind, nu, scale):
    data = two_clusters()
    model, params = start(kind, 3, 2, seed=9)
    away = params.theta["loc"].at[2].set(1e4)
    params = params._replace(theta=params.theta | {"loc": away})
    new = em_step(model, params, data, prior_strength=nu, prior_scale=scale)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new))
    weights, loc, sigma = moments(new)
    np.testing.assert_array_equal(loc[2], [1e4, 1e4])
    assert weights[2] < 1e-30
    if kind != "shared" and nu == 0:
        np.testing.assert_allclose(sigma[2], moments(params)[2][2], rtol=1e-6)
    if kind != "shared" and nu > 0:
        np.testing.assert_allclose(sigma[2], scale**2 * np.eye(2), rtol=1e-5, atol=1e-7)
    # The other two take the step that they would take alone.
    alone = mixture(kind, 2, 2)
    own = {
        name: leaf if kind == "shared" else leaf[:2] for name, leaf in params.theta.items() if name != "loc"
    }
    two = Params({"loc": params.theta["loc"][:2], **own}, {"logits": params.phi["logits"][:2]})
    expected = moments(em_step(alone, two, data, prior_strength=nu, prior_scale=scale))
    for a, b in zip((weights, loc, sigma), expected, strict=True):
        np.testing.assert_allclose(a[:2], b, rtol=1e-5, atol=1e-6)
    grads = gradient(model, new, data, nu, scale)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


@every_kind
def test_a_constant_dimension_keeps_its_variance_without_a_prior_and_shrinks_with_one(kind):
    data = two_clusters().at[:, 1].set(0.3)
    model, params = start(kind, 3, 2, seed=10)
    new = em_step(model, params, data)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new))
    if kind == "diagonal":
        np.testing.assert_array_equal(new.theta["log_scale"][:, 1], params.theta["log_scale"][:, 1])
        assert np.all(new.theta["log_scale"][:, 0] != params.theta["log_scale"][:, 0])
    else:
        np.testing.assert_array_equal(new.theta["log_diag"], params.theta["log_diag"])
        np.testing.assert_array_equal(new.theta["lower"], params.theta["lower"])
    before, after = (exact_objective(kind, p, data, 0.0, 1.0) for p in (params, new))
    assert after > before
    fitted, history = fit_em(jax.random.key(0), model, data)
    assert np.all(np.diff(history) >= 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fitted))
    weights, _, sigma = moments(em_step(model, params, data, prior_strength=4.0, prior_scale=0.5))
    counts = np.full(3, len(data)) if kind == "shared" else weights * len(data)
    np.testing.assert_allclose(sigma[:, 1, 1], 4.0 * 0.25 / (counts + 4.0), rtol=1e-3)


def test_identical_data_and_as_many_components_as_data_are_survived():
    model = mixture("full", 3, 2)
    for data in (jnp.ones((3, 2)), jnp.zeros((3, 2)), two_clusters()[:3]):
        params, history = fit_em(jax.random.key(0), model, data)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
        assert len(history) > 0
        np.testing.assert_allclose(history[-1], exact_objective("full", params, data, 0.0, 1.0), rtol=1e-5)


def test_it_compiles_once_per_model_and_shape():
    traces = []

    def whiten(theta, z, residual):
        traces.append(residual.shape)
        return full_covariance.whiten(theta, z, residual)

    model = gmm(2, 2, covariance=full_covariance._replace(whiten=whiten))
    first, _ = fit_em(jax.random.key(0), model, two_clusters(seed=11))
    count = len(traces)
    assert count > 0
    data = two_clusters(seed=12) + 100.0
    second, _ = fit_em(jax.random.key(1), model, data, tolerance=1e-4, prior_strength=1.0, prior_scale=2.0)
    assert len(traces) == count
    # The data are an argument and not a constant: the second fit is of the second data.
    assert np.min(second.theta["loc"]) > 90 > np.max(first.theta["loc"])


def test_a_step_under_jit_and_vmap_is_the_step():
    model, params = start("full", 2, 2)
    batches = jnp.stack([two_clusters(seed=13), two_clusters(seed=14)])

    def step(data, nu):
        return em_step(model, params, data, prior_strength=nu)

    together = jax.jit(jax.vmap(step))(batches, jnp.array([0.0, 3.0]))
    for i, nu in enumerate((0.0, 3.0)):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(step(batches[i], nu)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


@every_kind
def test_mnists_size_fits_in_memory(kind):
    # 60,000 x 784 data and 100 components: compiled, not run. One [N, C, dim] array alone would be 17 GiB.
    model = gmm(100, 784, covariance=KINDS[kind])
    params = jax.eval_shape(model.init, jax.random.key(0))
    step = jax.jit(lambda params, data: em_step(model, params, data))
    compiled = step.lower(params, jax.ShapeDtypeStruct((60_000, 784), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30


def test_a_step_leaves_an_encoder_alone():
    encoder = Network(init=lambda key: jax.random.normal(key, (2,)), apply=lambda lam, x: lam)
    model = gmm(2, 2, encoder=encoder)
    params = model.init(jax.random.key(0))
    new = em_step(model, params, two_clusters())
    np.testing.assert_array_equal(new.lam, params.lam)
    with pytest.raises(ValueError, match=r"model: got a mixture with an encoder, .* elbo_terms"):
        fit_em(jax.random.key(0), model, two_clusters())


def test_numpy_data_will_do():
    model = mixture("full", 2, 2)
    _, expected = fit_em(jax.random.key(0), model, two_clusters())
    _, history = fit_em(jax.random.key(0), model, np.asarray(two_clusters(), np.float64))
    np.testing.assert_array_equal(history, expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (jnp.zeros((10, 3)), r"data: got shape \[10, 3\], expected \[N, 2\]; .*reshape"),
        (jnp.zeros((10,)), r"data: got shape \[10\], expected \[N, 2\]; .*reshape"),
        (jnp.zeros((10, 2, 1)), r"data: got shape \[10, 2, 1\], expected \[N, 2\]; .*reshape"),
        (jnp.zeros((10, 2), jnp.int32), r"data: got dtype int32, expected floating point; .*astype"),
        (np.zeros((10, 2), np.uint8), r"data: got dtype uint8, expected floating point; .*astype"),
        (jnp.zeros((2, 2)), r"data: got 2 rows, expected at least num_components = 3"),
        (jnp.zeros((10, 2)).at[3, 1].set(jnp.nan), r"data: got 1 entries NaN or infinite, expected none"),
        (jnp.zeros((10, 2)).at[0].set(jnp.inf), r"data: got 2 entries NaN or infinite, expected none"),
        (1e30 * jnp.ones((400, 2)).at[0].set(-1.0), r"data: got values whose squares overflow"),
    ],
)
def test_bad_data_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        fit_em(jax.random.key(0), mixture("full", 3, 2), data)


def test_a_step_refuses_the_wrong_shape():
    model, params = start("full", 3, 2)
    with pytest.raises(ValueError, match=r"data: got shape \[2\], expected \[N, 2\]"):
        em_step(model, params, jnp.zeros(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, r"num_steps: got 0, expected at least 1"),
        ({"num_restarts": 0}, r"num_restarts: got 0, expected at least 1"),
        ({"tolerance": -1.0}, r"tolerance: got -1.0, expected nats per datum"),
        ({"tolerance": float("nan")}, r"tolerance: got nan"),
        ({"prior_strength": -1.0}, r"prior_strength: got -1.0"),
        ({"prior_strength": float("inf")}, r"prior_strength: got inf"),
        ({"prior_scale": 0.0}, r"prior_scale: got 0.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fit_em(jax.random.key(0), mixture("full", 3, 2), two_clusters(), **settings)


def test_raw_keys_are_refused():
    with pytest.raises(TypeError, match=r"expected a typed key"):
        fit_em(jax.random.PRNGKey(0), mixture("full", 3, 2), two_clusters())
