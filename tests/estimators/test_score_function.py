"""Score-function gradients against exact ones, with discrete and continuous latents, and their baselines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from tests import toys

BOUNDS = toys.BOUNDS
every_bound = pytest.mark.parametrize("alpha", BOUNDS)


@pytest.mark.parametrize("name", ["bernoulli", "linear2"])
@pytest.mark.parametrize("num_samples", [2, 5])
def test_the_value_is_the_bound(name, num_samples):
    """Never a surrogate: to 1e-6 the bound of the log-weights of the same draws."""
    toy = toys.toy(name)
    objectives = {alpha: vd.score_function(toy.model, bound, num_samples) for alpha, bound in BOUNDS.items()}
    keys = jax.random.split(jax.random.key(0), len(toy.data))
    runs = toys.single_draws(objectives, keys, toy.params, toy.data)
    for i, key in enumerate(keys):
        log_weights = toys.log_weights(toy.model, key, toy.params, jnp.asarray(toy.data[i]), num_samples)
        for alpha, (terms, _) in runs.items():
            assert list(terms) == [BOUNDS[alpha].__name__]
            (value,) = terms.values()
            assert float(value[i]) == pytest.approx(toys.numpy_bound(alpha, log_weights), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "num_samples", "alphas"),
    [
        ("bernoulli", 2, (1.0, 0.0)),
        ("bernoulli", 5, tuple(BOUNDS)),
        ("bernoulli", 8, (0.0, 2.0)),
        ("linear", 2, (1.0, 0.5)),
        ("linear", 5, tuple(BOUNDS)),
    ],
)
def test_gradients_are_unbiased(name, num_samples, alphas):
    """Theta, phi and lambda, batch of 3, against enumeration or quadrature of each bound."""
    toy = toys.toy(name)
    objectives = {alpha: vd.score_function(toy.model, BOUNDS[alpha], num_samples) for alpha in alphas}
    num_draws = 140_000 if name == "linear" else 60_000
    runs = toys.gradient_draws(objectives, toy.params, toy.data, num_draws, seed=num_samples)
    for alpha, (values, draws) in runs.items():
        value, gradient = toys.exact(name, num_samples)[alpha]
        assert toys.z_scores(values[:, None], value) < 5.0, alpha
        toys.check_unbiased(draws, gradient)


def test_weights_shared_between_p_and_q():
    """Batch of 2, so that it is not K."""
    toy = toys.toy("shared of 2")
    objectives = {alpha: vd.score_function(toy.model, bound, 3) for alpha, bound in BOUNDS.items()}
    runs = toys.gradient_draws(objectives, toy.params, toy.data, 320_000)
    for alpha, (values, draws) in runs.items():
        value, gradient = toys.exact("shared of 2", 3)[alpha]
        assert toys.z_scores(values[:, None], value) < 5.0, alpha
        toys.check_unbiased(draws, gradient)


@pytest.mark.parametrize("num_samples", [1, 5])
def test_no_baseline_is_unbiased(num_samples):
    """Also with one draw, where leave-one-out has no other. Shifted so that the ELBO is zero."""
    toy = toys.toy("bernoulli")
    value, gradient = toys.exact("bernoulli", num_samples)[1.0]
    model = toy.model._replace(log_joint=lambda params, x, z: toy.model.log_joint(params, x, z) - value)
    objective = vd.score_function(model, vd.elbo, num_samples, baseline=vd.no_baseline)
    values, draws = toys.gradient_draws({"elbo": objective}, toy.params, toy.data, 280_000)["elbo"]
    assert toys.z_scores(values[:, None], 0.0) < 5.0
    toys.check_unbiased(draws, gradient)


def test_leave_one_out_lowers_the_variance():
    """To less than half of no_baseline's on this model, at K = 5, every bound."""
    toy = toys.toy("bernoulli")
    objectives = {
        (name, alpha): vd.score_function(toy.model, bound, 5, baseline=getattr(vd, name))
        for name in ("leave_one_out", "no_baseline")
        for alpha, bound in BOUNDS.items()
    }
    runs = toys.gradient_draws(objectives, toy.params, toy.data, 4_000)
    for alpha in BOUNDS:
        ours, plain = (
            toys.variance(runs[name, alpha][1], "lam") for name in ("leave_one_out", "no_baseline")
        )
        assert ours < 0.5 * plain, (alpha, ours / plain)


def test_a_baseline_of_ones_own():
    """Any b_k that ignores draw k is unbiased: here one that is .3 nats too high."""
    toy = toys.toy("bernoulli")

    def baseline(cv, x, bound, log_weights):
        return vd.leave_one_out(cv, x, bound, log_weights) + 0.3

    objective = vd.score_function(toy.model, vd.elbo, 5, baseline=baseline)
    _, draws = toys.gradient_draws({"elbo": objective}, toy.params, toy.data, 60_000)["elbo"]
    toys.check_unbiased(draws, toys.exact("bernoulli", 5)[1.0][1])


@every_bound
@pytest.mark.parametrize("num_samples", [2, 5])
def test_leave_one_out_is_its_formula(alpha, num_samples):
    """b_k = bound(.., mean of the others in place of l_k, ..), in a NumPy loop."""
    log_weights = np.random.default_rng(0).normal(-4, 3, size=num_samples).astype(np.float32)
    expected = []
    for k in range(num_samples):
        replaced = log_weights.astype(float)
        replaced[k] = np.mean(np.delete(replaced, k))
        expected.append(toys.numpy_bound(alpha, replaced))
    got = vd.leave_one_out((), (), BOUNDS[alpha], jnp.asarray(log_weights))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@every_bound
def test_a_baseline_does_not_see_its_own_draw(alpha):
    """The Jacobian of b_k by l_k is zero, by the others it is not."""
    log_weights = jnp.array([-1.0, -3.0, 0.5, -2.0])
    jacobian = np.asarray(jax.jacrev(functools.partial(vd.leave_one_out, (), (), BOUNDS[alpha]))(log_weights))
    assert np.max(np.abs(np.diag(jacobian))) < 1e-6
    np.testing.assert_allclose(jacobian.sum(axis=1), 1.0, rtol=1e-5)


def test_leave_one_out_for_elbo_is_rloo():
    """bound - b_k = (l_k - mean of the others) / K."""
    log_weights = jnp.array([-1.0, -3.0, 0.5, -2.0])
    advantage = vd.elbo(log_weights) - vd.leave_one_out((), (), vd.elbo, log_weights)
    others = [np.mean(np.delete(np.asarray(log_weights), k)) for k in range(4)]
    np.testing.assert_allclose(advantage, (np.asarray(log_weights) - others) / 4, rtol=1e-5)


def test_one_draw_of_the_gradient_is_the_formula():
    """sum_k w_k d l_k + sum_k (bound - b_k) d log q_k at fixed z, for iwae (VIMCO)."""
    toy, num_samples, key = toys.toy("bernoulli"), 3, jax.random.key(2)
    x = jnp.asarray(toy.data[0])
    objective = vd.score_function(toy.model, vd.iwae, num_samples)
    got = jax.grad(vd.total(objective), argnums=1)(key, toy.params, x)
    z = [toy.model.sample_q(k, toy.params, x) for k in jax.random.split(key, num_samples)]
    log_w = np.array(
        [toy.model.log_joint(toy.params, x, v) - toy.model.log_q(toy.params, x, v) for v in z], float
    )
    value = toys.numpy_bound(0.0, log_w)
    w = np.exp(log_w - value) / num_samples
    expected = 0.0
    for k, v in enumerate(z):
        replaced = log_w.copy()
        replaced[k] = np.mean(np.delete(log_w, k))
        advantage = value - toys.numpy_bound(0.0, replaced)
        of_p = toys.flat_single(jax.grad(toy.model.log_joint)(toy.params, x, v))
        of_q = toys.flat_single(jax.grad(toy.model.log_q)(toy.params, x, v))
        expected = expected + w[k] * (of_p - of_q) + advantage * of_q
    np.testing.assert_allclose(toys.flat_single(got), expected, rtol=1e-4, atol=1e-6)


def test_no_gradient_goes_through_the_draw(key):
    """On a model whose draw can be differentiated, the gradient is that of the score alone."""
    toy = toys.toy("linear2")
    x = jnp.asarray(toy.data[0])
    stopped = toy.model._replace(sample_q=lambda k, p, x: jax.lax.stop_gradient(toy.model.sample_q(k, p, x)))
    one, other = (
        jax.grad(vd.total(vd.score_function(model, vd.iwae, 3)), argnums=1)(key, toy.params, x)
        for model in (toy.model, stopped)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_traces_once():
    traces = []
    toy = toys.toy("bernoulli")

    def log_joint(params, x, z):
        traces.append(z.shape)
        return toy.model.log_joint(params, x, z)

    objective = vd.score_function(toy.model._replace(log_joint=log_joint), vd.iwae, 8)
    step = jax.jit(jax.value_and_grad(vd.total(objective), argnums=1))
    for seed in range(3):
        step(
            jax.random.key(seed),
            jax.tree.map(lambda leaf, seed=seed: leaf + seed, toy.params),
            jnp.asarray(toy.data[seed]),
        )
    assert len(traces) == 1 and step._cache_size() == 1


def test_leave_one_out_needs_two_draws():
    toy = toys.toy("bernoulli")
    with pytest.raises(
        ValueError, match="num_samples: got 1, expected at least 2 .* pass baseline=no_baseline"
    ):
        vd.score_function(toy.model, vd.elbo, 1)
    vd.score_function(toy.model, vd.elbo, 1, baseline=vd.no_baseline)


def test_raw_keys_are_refused():
    toy = toys.toy("bernoulli")
    with pytest.raises(TypeError, match="expected a typed key"):
        vd.score_function(toy.model)(jax.random.PRNGKey(0), toy.params, jnp.asarray(toy.data[0]))


# Baselines that learn.


def linear_baseline():
    """A `Network` (cv, x) -> w x + b."""
    return vd.Network(
        lambda key: {"w": jnp.zeros(2), "b": jnp.zeros(())}, lambda cv, x: cv["w"] @ x + cv["b"]
    )


LEARNED = {
    "running_mean": (vd.running_mean, jnp.float32(-4.25)),
    "learned": (
        vd.learned_baseline(linear_baseline()),
        {"w": jnp.array([-0.6, 0.9]), "b": jnp.float32(-3.3)},
    ),
}


@functools.cache
def exact_by_datum(num_samples, alpha):
    """E bound of each datum of the Bernoulli toy."""
    toy = toys.toy("bernoulli")
    data = [toy._replace(data=toy.data[i : i + 1]) for i in range(len(toy.data))]
    return np.array([toys.exact_expectations(one, num_samples, (alpha,))[alpha][0] for one in data])


@functools.cache
def learned_runs(name, num_samples):
    toy = toys.toy("bernoulli")
    baseline, cv = LEARNED[name]
    params = toy.params._replace(cv=cv)
    # One error for all K scores: with IWAE of many draws the noise would drown the gradient.
    objectives = {
        a: vd.score_function(toy.model, toys.BOUNDS[a], num_samples, baseline=baseline)
        for a in ((1.0, 0.0) if num_samples < 5 else (1.0,))
    }
    return params, toys.gradient_draws(objectives, params, toy.data, 400_000, seed=num_samples)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("num_samples", [1, 2, *(pytest.param(k, marks=pytest.mark.slow) for k in (5, 8))])
def test_learned_baselines_are_unbiased(name, num_samples):
    """Theta, phi and lambda against enumeration, cv against (E bound - b) db, which is linear in the bound."""
    params, runs = learned_runs(name, num_samples)
    toy = toys.toy("bernoulli")
    for alpha, (values, draws) in runs.items():
        value, gradient = toys.exact_expectations(toy, num_samples, (alpha,))[alpha]
        assert toys.z_scores(values[:, None], value) < 5.0
        means = exact_by_datum(num_samples, alpha)
        baseline = [LEARNED[name][0](params.cv, jnp.asarray(x), vd.elbo, jnp.zeros(1))[0] for x in toy.data]
        error = means - np.array(baseline, float)
        of_cv = np.mean(error)
        if name == "learned":
            of_cv = {"w": np.mean(error[:, None] * toy.data, axis=0), "b": np.mean(error)}
        toys.check_unbiased(draws, gradient._replace(cv=of_cv), ("theta", "phi", "lam", "cv"))


def test_the_fit_of_a_baseline_moves_nothing_else():
    """Neither q nor x, through which an encoder's gradient may come: exactly what a stopped cv gives."""
    toy = toys.toy("bernoulli")
    baseline, cv = LEARNED["learned"]
    params, x = toy.params._replace(cv=cv), jnp.asarray(toy.data[0])
    objective = vd.score_function(toy.model, vd.iwae, 3, baseline=baseline)
    (live, live_x), (stopped, stopped_x) = (
        jax.grad(vd.total(o), argnums=(1, 2))(jax.random.key(0), params, x)
        for o in (objective, vd.frozen(objective, "cv"))
    )
    np.testing.assert_array_equal(live_x, stopped_x)
    for one, other in zip(jax.tree.leaves(live[:3]), jax.tree.leaves(stopped[:3]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.any(toys.flat_single(live.cv)) and not np.any(toys.flat_single(stopped.cv))


def test_sgd_on_cv_is_the_running_mean():
    """cv <- d cv + (1 - d) bound, the bound averaged over the batch; theta, phi and lam stand still."""
    toy, decay = toys.toy("bernoulli"), 0.9
    model = toy.model._replace(init=lambda key: toy.params._replace(cv=jnp.zeros(())))
    optimizer = optax.partition(
        {"cv": optax.sgd(1 - decay), "rest": optax.set_to_zero()},
        vd.Params(theta="rest", phi="rest", lam="rest", cv="cv"),
    )
    objective = vd.score_function(model, vd.elbo, 2, baseline=vd.running_mean)
    step = jax.jit(vd.make_train_step(objective, optimizer))
    state, mean = vd.init_state(jax.random.key(0), model, optimizer), 0.0
    for _ in range(30):
        state, metrics = step(state, jnp.asarray(toy.data))
        mean = decay * mean + (1 - decay) * float(metrics["elbo"])
        assert float(state.params.cv) == pytest.approx(mean, rel=1e-5)


def test_a_trained_baseline_lowers_the_variance():
    """One draw, where leave-one-out cannot help: after 400 steps on cv alone, under a third of no_baseline's."""
    toy = toys.toy("bernoulli")
    baseline = vd.learned_baseline(linear_baseline())
    objective = vd.score_function(toy.model, vd.elbo, 1, baseline=baseline)
    model = vd.with_cv(toy.model, linear_baseline().init)
    optimizer = optax.partition(
        {"cv": optax.adam(3e-2), "rest": optax.set_to_zero()},
        vd.Params(theta="rest", phi="rest", lam="rest", cv="cv"),
    )
    step = vd.jit_step(vd.make_train_step(objective, optimizer))
    data = np.tile(toy.data, (10, 1))
    state = vd.fit(vd.init_state(jax.random.key(0), model, optimizer), step, lambda i: data, 400)
    objectives = {
        "learned": objective,
        "none": vd.score_function(toy.model, vd.elbo, 1, baseline=vd.no_baseline),
    }
    runs = toys.gradient_draws(objectives, state.params, toy.data, 4_000)
    learned, none = (toys.variance(draws, "lam") for _, draws in runs.values())
    assert learned < none / 3, learned / none


def test_a_baseline_must_be_a_number():
    toy = toys.toy("bernoulli")
    network = vd.Network(lambda key: (), lambda cv, x: x)
    objective = vd.score_function(toy.model, baseline=vd.learned_baseline(network))
    with pytest.raises(ValueError, match=r"network: got an output of shape \(2,\), expected \(\)"):
        jax.eval_shape(objective, jax.random.key(0), toy.params, jnp.asarray(toy.data[0]))


def test_a_baseline_that_was_not_started_is_told_how_to():
    toy = toys.toy("bernoulli")
    x, key = jnp.asarray(toy.data[0]), jax.random.key(0)

    def run(baseline, cv):
        objective = vd.score_function(toy.model, vd.elbo, 2, baseline=baseline)
        return jax.eval_shape(objective, key, toy.params._replace(cv=cv), x)

    for cv, got in (((), "nothing"), (jnp.zeros(2), r".*\(2,\)"), ({"b": jnp.zeros(())}, r".*{'b': \(\)}")):
        message = f"params.cv: got {got}, expected one number for running_mean; .*with_cv.*leave_one_out"
        with pytest.raises(TypeError, match=message):
            run(vd.running_mean, cv)
    message = r"params.cv: got \(\), .* for learned_baseline; .*with_cv\(model, network.init\).*leave_one_out"
    with pytest.raises(TypeError, match=message):
        run(vd.learned_baseline(linear_baseline()), ())
    run(vd.learned_baseline(vd.Network(lambda key: (), lambda cv, x: jnp.sum(x))), ())
