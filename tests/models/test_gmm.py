"""The mixture against scipy, against enumeration and against a second log p(x) in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import vdiff as vd
from vdiff.models.covariance import diagonal_covariance, full_covariance, shared_covariance
from vdiff.models.gmm import GMM, gmm
from vdiff.models.mixture import collapsed

KINDS = {"full": full_covariance, "shared": shared_covariance, "diagonal": diagonal_covariance}
every_kind = pytest.mark.parametrize("kind", KINDS)


def random_params(seed, model):
    """Parameters far from the start: unequal weights, and covariances with correlations."""
    rng = np.random.default_rng(seed)

    def draw(scale, part):
        return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), part)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    theta = draw(0.4, shapes.theta) | {"loc": draw(1.1, shapes.theta["loc"])}
    return vd.Params(theta, draw(0.4, shapes.phi), draw(0.8, shapes.lam))


def sigmas(theta):
    """The covariances [C, dim, dim], in float64 numpy."""
    theta = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), theta)
    num_components, dim = theta["loc"].shape
    if "log_scale" in theta:
        return np.stack([np.diag(np.exp(2 * row)) for row in theta["log_scale"]])
    log_diag = np.broadcast_to(theta["log_diag"], (num_components, dim))
    lower = np.broadcast_to(theta["lower"], (num_components, dim, dim))
    whitening = [np.tril(b, -1) + np.diag(np.exp(a)) for a, b in zip(log_diag, lower, strict=True)]
    return np.stack([np.linalg.inv(w.T @ w) for w in whitening])


def exact_log_joints(params, x):
    """Log p(x_n, z) [N, C] by scipy."""
    log_prior = scipy.special.log_softmax(np.asarray(params.phi["logits"], np.float64))
    loc = np.asarray(params.theta["loc"], np.float64)
    columns = [
        scipy.stats.multivariate_normal(m, s, allow_singular=False).logpdf(np.asarray(x, np.float64))
        for m, s in zip(loc, sigmas(params.theta), strict=True)
    ]
    return log_prior + np.stack([np.reshape(c, (len(x),)) for c in columns], axis=1)


def exact_log_prob(params, x):
    return scipy.special.logsumexp(exact_log_joints(params, x), axis=1)


def reference_log_prob(theta, phi, x):
    """A log p(x) written apart, by precision matrices and determinants, for `jax.grad` in float64."""
    num_components, dim = theta["loc"].shape
    terms = []
    for k in range(num_components):
        if "log_scale" in theta:
            precision = jnp.diag(jnp.exp(-2 * theta["log_scale"][k]))
        else:
            a = theta["log_diag"] if theta["log_diag"].ndim == 1 else theta["log_diag"][k]
            b = theta["lower"] if theta["lower"].ndim == 2 else theta["lower"][k]
            w = jnp.where(jnp.tri(dim, k=-1) > 0, b, 0.0) + jnp.diag(jnp.exp(a))
            precision = w.T @ w
        r = x - theta["loc"][k]
        log_det = jnp.linalg.slogdet(precision)[1]
        terms.append(phi["logits"][k] + 0.5 * (log_det - r @ precision @ r - dim * np.log(2 * np.pi)))
    return jnp.log(sum(jnp.exp(t) for t in terms) / jnp.sum(jnp.exp(phi["logits"])))


def reference_gradient(params, x):
    """The mean of reference_log_prob over x and its gradients by theta and phi, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (params.theta, params.phi)
        )
        x = jnp.asarray(np.asarray(x), jnp.float64)

        def mean(parts):
            return jnp.mean(jax.vmap(lambda row: reference_log_prob(*parts, row))(x))

        value, grads = jax.jit(jax.value_and_grad(mean))(wide)
        return jax.tree.map(np.asarray, (value, grads))


def relative(got, expected):
    """The largest error of a leaf over the largest entry of its reference."""
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    errors = [np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b)) for a, b in leaves]
    return max(errors)


def z_scores(draws, expected, floor):
    draws, expected = np.asarray(draws, np.float64), np.asarray(expected, np.float64)
    std_error = np.maximum(np.std(draws, axis=0) / np.sqrt(len(draws)), floor)
    return np.max(np.abs(np.mean(draws, axis=0) - expected) / std_error)


def two_clusters(num_data=200):
    """The lecture's picture: two Gaussian clouds in the plane."""
    rng = np.random.default_rng(0)
    left = rng.normal(size=(num_data // 2, 2)) @ np.array([[1.0, 0.4], [0.0, 0.5]]) + [-1.5, 0.5]
    right = rng.normal(size=(num_data - num_data // 2, 2)) * [0.6, 1.1] + [1.5, -0.5]
    return jnp.asarray(np.concatenate([left, right]), jnp.float32)


def linear_encoder(num_components, dim):
    return vd.Network(
        init=lambda key: {"w": jnp.zeros((num_components, dim)), "b": jnp.zeros((num_components,))},
        apply=lambda lam, x: lam["w"] @ x + lam["b"],
    )


def averaged(fn):
    """The mean of fn(params, x_n) over the data, and each value beside it."""

    def mean(params, x):
        each = jax.vmap(fn, in_axes=(None, 0))(params, x)
        return jnp.mean(each), each

    return mean


def mean_over(objective, x):
    """The scalar function of params: the objective's total, averaged over x."""
    total = vd.total(objective)
    return lambda params: jnp.mean(jax.vmap(total, in_axes=(None, None, 0))(jax.random.key(0), params, x))


@pytest.mark.parametrize(("num_components", "dim"), [(3, 2), (1, 1), (4, 5)])
@every_kind
def test_log_prob_log_joint_and_posterior_are_scipys(kind, num_components, dim):
    model = gmm(num_components, dim, covariance=KINDS[kind])
    params = random_params(1, model)
    x = 2.0 * jax.random.normal(jax.random.key(2), (20, dim))
    log_joints = exact_log_joints(params, x)
    log_prob = scipy.special.logsumexp(log_joints, axis=1)
    support = jnp.arange(num_components)

    @jax.jit
    @jax.vmap
    def everything(x):
        joint, q = (jax.vmap(lambda z, f=f: f(params, x, z))(support) for f in (model.log_joint, model.log_q))
        return model.log_prob(params, x), model.log_posterior(params, x), joint, q

    got = everything(x)
    log_posterior = log_joints - log_prob[:, None]
    np.testing.assert_allclose(got[0], log_prob, rtol=1e-5, atol=1e-6)
    for a, b in zip(got[1:], (log_posterior, log_joints, log_posterior), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@every_kind
def test_elbo_is_tight_at_the_posterior_in_value_and_gradient(kind):
    x = two_clusters()
    model = gmm(2, 2, covariance=KINDS[kind])
    params = random_params(3, model)
    expected, (grad_theta, grad_phi) = reference_gradient(params, x)
    one_by_one = exact_log_prob(params, x)
    np.testing.assert_allclose(np.mean(one_by_one), expected, rtol=1e-9)  # the references agree

    def elbo(params, x):
        return model.elbo_estimate(jax.random.key(0), params, x)

    for fn in (elbo, model.log_prob):
        (_, each), grads = jax.jit(jax.value_and_grad(averaged(fn), has_aux=True))(params, x)
        np.testing.assert_allclose(each, one_by_one, rtol=1e-5)
        assert relative(grads.theta, grad_theta) < 1e-5
        assert relative(grads.phi, grad_phi) < 1e-5
        assert grads.lam == ()


@pytest.mark.parametrize("has_encoder", [False, True])
def test_terms_are_what_their_names_say(has_encoder):
    encoder = linear_encoder(3, 2) if has_encoder else None
    model = gmm(3, 2, encoder=encoder)
    params = random_params(5, model)
    x = jnp.array([0.7, -1.2])
    log_prior = scipy.special.log_softmax(np.asarray(params.phi["logits"], np.float64))
    log_joints = exact_log_joints(params, x[None])[0]
    logits = log_joints
    if has_encoder:
        lam = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params.lam)
        logits = lam["w"] @ np.asarray(x, np.float64) + lam["b"]
    log_q = scipy.special.log_softmax(logits)
    terms = jax.jit(model.elbo_terms)(jax.random.key(0), params, x)
    assert set(terms) == {"reconstruction", "kl"}
    np.testing.assert_allclose(terms["reconstruction"], np.exp(log_q) @ (log_joints - log_prior), rtol=1e-5)
    np.testing.assert_allclose(terms["kl"], -np.exp(log_q) @ (log_q - log_prior), rtol=1e-5)
    got = jax.jit(jax.vmap(lambda z: model.log_q(params, x, z)))(jnp.arange(3))
    np.testing.assert_allclose(got, log_q, rtol=1e-5)


def test_with_an_encoder_the_gap_is_the_divergence_to_the_posterior():
    x = two_clusters(40)
    model = gmm(3, 2, encoder=linear_encoder(3, 2))
    params = random_params(6, model)
    bound = jax.jit(jax.vmap(model.elbo_estimate, in_axes=(None, None, 0)))(jax.random.key(0), params, x)
    log_joints = exact_log_joints(params, x)
    log_prob = scipy.special.logsumexp(log_joints, axis=1)
    logits = np.asarray(x, np.float64) @ np.asarray(params.lam["w"]).T + np.asarray(params.lam["b"])
    log_q = scipy.special.log_softmax(logits, axis=1)
    divergence = np.sum(np.exp(log_q) * (log_q - log_joints + log_prob[:, None]), axis=1)
    assert np.all(divergence > 1e-4)
    assert np.all(bound < log_prob)
    np.testing.assert_allclose(bound, log_prob - divergence, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "has_encoder"), [("full", True), ("shared", True), ("diagonal", True), ("full", False)]
)
def test_terms_equal_the_enumerated_elbo_in_value_and_gradient(kind, has_encoder):
    x = two_clusters(30)
    encoder = linear_encoder(4, 2) if has_encoder else None
    model = gmm(4, 2, covariance=KINDS[kind], encoder=encoder)
    params = random_params(7, model)
    value, grads = jax.jit(jax.value_and_grad(mean_over(model.elbo_terms, x)))(params)
    other = vd.enumerated(model, jnp.arange(4))
    expected, expected_grads = jax.jit(jax.value_and_grad(mean_over(other, x)))(params)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert relative(grads.theta, expected_grads.theta) < 1e-5
    assert relative(grads.phi, expected_grads.phi) < 1e-5
    if has_encoder:
        assert np.max(np.abs(expected_grads.lam["w"])) > 0.01
        assert relative(grads.lam, expected_grads.lam) < 1e-5


@pytest.mark.parametrize("objective_of", ["score_function", "one_sample"])
def test_sampled_estimators_agree_in_value_and_gradient(objective_of):
    # 40,000 draws: a standard error near 1 % of each gradient, so a bias of 5 % of the largest entries shows.
    model = gmm(3, 2, encoder=linear_encoder(3, 2))
    params = random_params(8, model)
    x = jnp.array([0.4, 0.9])
    exact, exact_grads = jax.value_and_grad(model.elbo_estimate, argnums=1)(jax.random.key(0), params, x)
    if objective_of == "score_function":
        sampled = vd.total(vd.score_function(model, num_samples=3))
    else:
        sampled = model._replace(elbo_terms=None).elbo_estimate
    keys = jax.random.split(jax.random.key(9), 40_000)
    draw = jax.jit(jax.vmap(jax.value_and_grad(sampled, argnums=1), in_axes=(0, None, None)))
    values, grads = draw(keys, params, x)
    assert z_scores(values, exact, 1e-6) < 5
    for part in ("theta", "phi", "lam"):
        got, expected = getattr(grads, part), getattr(exact_grads, part)
        scores = jax.tree.map(lambda a, b: z_scores(a, b, 1e-6), got, expected)
        assert max(jax.tree.leaves(scores)) < 5, (part, scores)
        assert max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected)) > 0.05


@every_kind
def test_sample_has_the_models_moments(kind):
    # 100,000 draws: a bias of 2 % of a standard deviation is 6 standard errors within one component.
    num_components, dim = 3, 2
    model = gmm(num_components, dim, covariance=KINDS[kind])
    params = random_params(10, model)
    keys = jax.random.split(jax.random.key(11), 100_000)
    x, z = jax.jit(jax.vmap(model.sample, in_axes=(0, None)))(keys, params)
    assert x.shape == (100_000, dim)
    assert z.shape == (100_000,)
    assert z.dtype == jnp.int32
    weights = scipy.special.softmax(np.asarray(params.phi["logits"], np.float64))
    assert z_scores(np.eye(num_components)[np.asarray(z)], weights, 1e-6) < 5
    x = np.asarray(x, np.float64)
    loc, sigma = np.asarray(params.theta["loc"], np.float64), sigmas(params.theta)
    for k in range(num_components):
        residual = x[np.asarray(z) == k] - loc[k]
        assert z_scores(residual, np.zeros(dim), 1e-6) < 5
        assert z_scores(residual[:, :, None] * residual[:, None, :], sigma[k], 1e-6) < 5


@pytest.mark.parametrize("has_encoder", [False, True])
def test_sample_q_has_the_frequencies_of_log_q(has_encoder):
    model = gmm(4, 2, encoder=linear_encoder(4, 2) if has_encoder else None)
    params = random_params(21, model)
    x = jnp.array([0.3, -0.4])
    keys = jax.random.split(jax.random.key(13), 50_000)
    z = jax.jit(jax.vmap(model.sample_q, in_axes=(0, None, None)))(keys, params, x)
    assert z.dtype == jnp.int32
    q = jnp.exp(jax.jit(jax.vmap(lambda z: model.log_q(params, x, z)))(jnp.arange(4)))
    np.testing.assert_allclose(jnp.sum(q), 1.0, rtol=1e-6)
    assert jnp.min(q) > 0.001
    assert z_scores(np.eye(4)[np.asarray(z)], q, 1e-6) < 5


def test_init_draws_standard_normal_locations_and_unit_everything_else():
    for covariance in KINDS.values():
        model = gmm(3, 2, covariance=covariance)
        params = jax.jit(model.init)(jax.random.key(0))
        np.testing.assert_allclose(sigmas(params.theta), np.broadcast_to(np.eye(2), (3, 2, 2)), atol=1e-7)
        np.testing.assert_allclose(jax.nn.softmax(params.phi["logits"]), np.full(3, 1 / 3), rtol=1e-6)
        assert params.lam == params.cv == ()
    loc = (
        jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(1), 20_000)).theta["loc"].reshape(-1, 6)
    )
    assert z_scores(loc, np.zeros(6), 1e-6) < 5
    assert z_scores(np.asarray(loc)[:, :, None] * np.asarray(loc)[:, None, :], np.eye(6), 1e-6) < 5


@functools.cache
def extreme_model(has_encoder):
    """A model whose encoder ignores x, and its compiled functions, for all the extremes."""
    encoder = vd.Network(init=lambda key: jnp.zeros(3), apply=lambda lam, x: lam)
    model = gmm(3, 2, encoder=encoder if has_encoder else None)
    return model, jax.jit(jax.value_and_grad(model.elbo_estimate, argnums=1)), jax.jit(model.log_prob)


@pytest.mark.parametrize("has_encoder", [False, True])
@pytest.mark.parametrize("logits", [(80.0, -80.0, 0.0), (-80.0, 80.0, 80.0), (0.0, -np.inf, 1.0)])
@pytest.mark.parametrize("x", [(0.5, 0.2), (3e4, -2e4)])
def test_extremes_keep_value_and_gradient(has_encoder, logits, x):
    model, value_and_grad, log_prob = extreme_model(has_encoder)
    params = random_params(14, model)._replace(phi={"logits": jnp.array(logits)})
    if has_encoder:
        params = params._replace(lam=jnp.array([90.0, -90.0, 0.0]))
    x = jnp.array(x)
    expected = exact_log_prob(params, x[None])[0]
    np.testing.assert_allclose(log_prob(params, x), expected, rtol=1e-5)
    if has_encoder:
        expected = exact_log_joints(params, x[None])[0, 0]  # q takes component 0 alone
    value, grads = value_and_grad(jax.random.key(0), params, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    if not has_encoder:
        # The exact gradient by the weights: posterior less prior.
        posterior = scipy.special.softmax(exact_log_joints(params, x[None])[0])
        prior = scipy.special.softmax(np.asarray(logits))
        np.testing.assert_allclose(grads.phi["logits"], posterior - prior, atol=1e-4)


def test_an_encoder_that_excludes_a_component_excludes_it():
    model, value_and_grad, _ = extreme_model(True)
    logits = jnp.array([0.0, -jnp.inf, 1.0])
    params = random_params(15, model)._replace(phi={"logits": logits}, lam=logits)
    x = jnp.array([0.1, 0.2])
    value, grads = value_and_grad(jax.random.key(0), params, x)
    keep = np.array([0, 2])
    log_q = scipy.special.log_softmax(np.array([0.0, 1.0]))
    expected = np.exp(log_q) @ (exact_log_joints(params, x[None])[0, keep] - log_q)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.all(np.isfinite(grads.phi["logits"]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((grads.theta, grads.lam)))
    np.testing.assert_array_equal(grads.theta["loc"][1], np.zeros(2))


def test_a_component_that_does_not_exist_has_no_probability():
    model = gmm(3, 2)
    params = random_params(16, model)
    assert np.isnan(model.log_joint(params, jnp.zeros(2), jnp.int32(3)))


def test_collapsed_is_the_same_density_without_a_latent():
    model = gmm(3, 2, encoder=linear_encoder(3, 2))
    density = collapsed(model)
    params = density.init(jax.random.key(0))
    assert params.lam == ()
    params = params._replace(**{part: getattr(random_params(17, model), part) for part in ("theta", "phi")})
    x = two_clusters(20)
    expected = exact_log_prob(params, x)
    log_joint = jax.jit(jax.vmap(lambda x: density.log_joint(params, x, ())))
    np.testing.assert_allclose(log_joint(x), expected, rtol=1e-5)
    terms = jax.jit(jax.vmap(density.elbo_terms, in_axes=(None, None, 0)))(jax.random.key(0), params, x)
    assert set(terms) == {"log_prob"}
    np.testing.assert_allclose(terms["log_prob"], expected, rtol=1e-5)
    bare = density._replace(elbo_terms=None)
    np.testing.assert_allclose(bare.elbo_estimate(jax.random.key(0), params, x[0]), expected[0], rtol=1e-5)
    assert density.log_q(params, x[0], ()) == 0.0
    assert density.sample_q(jax.random.key(0), params, x[0]) == ()
    key = jax.random.key(18)
    drawn, z = density.sample(key, params)
    assert z == ()
    np.testing.assert_array_equal(drawn, model.sample(key, params)[0])


def test_the_record_begins_as_a_model():
    assert GMM._fields[: len(vd.Model._fields)] == vd.Model._fields
    assert GMM.elbo_estimate is vd.Model.elbo_estimate


def test_every_function_traces_once_under_jit_and_vmap():
    traces = []

    def whiten(theta, z, residual):
        traces.append(residual.shape)
        return full_covariance.whiten(theta, z, residual)

    model = gmm(3, 2, covariance=full_covariance._replace(whiten=whiten))
    params = random_params(19, model)
    x = two_clusters(8)
    keys = jax.random.split(jax.random.key(0), 8)
    log_prob = jax.jit(jax.vmap(model.log_prob, in_axes=(None, 0)))
    step = jax.jit(jax.grad(lambda p, k, x: jnp.mean(jax.vmap(model.elbo_estimate, (0, None, 0))(k, p, x))))
    log_prob(params, x), step(params, keys, x)
    count = len(traces)
    assert count >= 2
    params = random_params(20, model)
    np.testing.assert_allclose(log_prob(params, x + 1.0), exact_log_prob(params, x + 1.0), rtol=1e-5)
    step(params, keys, x + 1.0)
    assert len(traces) == count


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0), (-1, 2)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match=r"(num_components|dim): got (0|-1), expected at least 1"):
        gmm(*sizes)


def test_a_wrong_datum_is_refused_while_tracing():
    model = gmm(3, 2)
    params = model.init(jax.random.key(0))
    calls = {
        "log_prob": lambda x: model.log_prob(params, x),
        "log_posterior": lambda x: model.log_posterior(params, x),
        "log_joint": lambda x: model.log_joint(params, x, jnp.int32(0)),
        "log_q": lambda x: model.log_q(params, x, jnp.int32(0)),
        "sample_q": lambda x: model.sample_q(jax.random.key(0), params, x),
        "elbo_terms": lambda x: model.elbo_terms(jax.random.key(0), params, x),
    }
    for call in calls.values():
        for shape in ((3,), (5, 2), ()):
            with pytest.raises(ValueError, match=r"x: got shape \[.*\], expected \[2\]; .*vmap"):
                jax.eval_shape(call, jax.ShapeDtypeStruct(shape, jnp.float32))
        with pytest.raises(ValueError, match=r"x: got dtype int32, expected floating point"):
            jax.eval_shape(call, jax.ShapeDtypeStruct((2,), jnp.int32))


def test_a_wrong_encoder_is_refused_while_tracing():
    encoder = vd.Network(init=lambda key: (), apply=lambda lam, x: jnp.zeros(5))
    model = gmm(3, 2, encoder=encoder)
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"encoder: got an output of shape \[5\], expected \[3\]; "):
        jax.eval_shape(model.elbo_terms, jax.random.key(0), params, jnp.zeros(2))


def test_raw_keys_are_refused():
    model = gmm(3, 2)
    params = model.init(jax.random.key(0))
    raw = jax.random.PRNGKey(0)
    for call in (
        lambda: model.init(raw),
        lambda: model.sample(raw, params),
        lambda: model.sample_q(raw, params, jnp.zeros(2)),
        lambda: model.elbo_estimate(raw, params, jnp.zeros(2)),
    ):
        with pytest.raises(TypeError, match=r"expected a typed key"):
            call()
