"""The law of objectives, for every pair of a model and an objective that is legal for it, and for the baselines' own.

Terms are named scalars, the names are the same on every call, their sum is the total; under jit and vmap they
are what they are in a Python loop; the gradient is a finite tree like params. What the numbers ARE is tested
beside each estimator and each model; here, that any model goes with any estimator.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from tests import toys
from tests.zoo import CONTINUOUS, CONTROL, DISCRETE, LIKELIHOODS, MIXED, baselines_own, built, mixture
from vdiff.train.step import per_example

BOUNDS = {
    "elbo": vd.elbo,
    "iwae": vd.iwae,
    "renyi(0.5)": vd.renyi(0.5),
    "renyi(2)": vd.renyi(2.0),
    "tvo": vd.tvo((0.0, 0.3, 1.0)),
}
NUM_SAMPLES = 2  # and 3 data: K != M

ESTIMATORS = {
    "pathwise": vd.pathwise,
    "doubly_reparameterized": vd.doubly_reparameterized,
    "score_function": vd.score_function,
}
FOR_ANY = [
    *("terms", "likelihood_gradient", "wake_sleep", "sleep phase"),
    *(f"score_function, {bound}" for bound in BOUNDS),
]
FOR_BITS = ["relaxed", "straight_through", "rebar", "relax"]
COMBINED = ["weighted", "repeat", "preprocessed"]
FOR_CONTINUOUS = [f"{e}, {b}" for e in ("pathwise", "doubly_reparameterized") for b in BOUNDS]
CASES = [
    *((model, objective) for model in CONTINUOUS for objective in FOR_ANY + FOR_CONTINUOUS),
    *((model, objective) for model in DISCRETE for objective in [*FOR_ANY, "enumerated"]),
    *(("Bernoulli latent", objective) for objective in FOR_BITS),
    *((model, f"mixed, {bound}") for model in MIXED for bound in BOUNDS),
    *((model, objective) for model in MIXED for objective in FOR_ANY),
    *((model, objective) for model in ("linear-Gaussian", "gmm, encoder") for objective in COMBINED),
]


@functools.cache
def objectives(name):
    """Every objective that is legal for a model."""
    model = built(name)[0]
    terms = model.elbo_terms or (lambda key, params, x: {"elbo": model.elbo_estimate(key, params, x)})
    names = [n for n in FOR_ANY if ", " in n] + (FOR_CONTINUOUS if name in CONTINUOUS else [])
    made = {n: ESTIMATORS[n.split(", ")[0]](model, BOUNDS[n.split(", ")[1]], NUM_SAMPLES) for n in names}
    made["terms"] = terms
    made["likelihood_gradient"] = vd.likelihood_gradient(model, NUM_SAMPLES)
    made["wake_sleep"] = vd.wake_sleep(model, NUM_SAMPLES)
    made["sleep phase"] = vd.wake_sleep(model, NUM_SAMPLES, phase=vd.sleep_phase)
    if name in MIXED:
        log_q_discrete = toys.toy(
            "mixed c, u" if name == "a category, then a number" else "mixed u, c"
        ).logits
        for bound, function in BOUNDS.items():
            made[f"mixed, {bound}"] = vd.mixed(model, log_q_discrete, function, NUM_SAMPLES)
    if name == "Bernoulli latent":
        logits = toys.toy("bernoulli").logits
        made["relaxed"] = vd.relaxed(model, logits, 0.5, vd.iwae, NUM_SAMPLES)
        made["straight_through"] = vd.straight_through(model, logits, 0.5, vd.iwae, NUM_SAMPLES)
        made["rebar"] = vd.rebar(model, logits, vd.iwae, NUM_SAMPLES)
        made["relax"] = vd.relax(model, logits, CONTROL, vd.iwae, NUM_SAMPLES)
    if (name, "repeat") in CASES:
        made["weighted"] = vd.weighted(terms, {})
        made["repeat"] = vd.repeat(made["score_function, iwae"], 2)
        made["preprocessed"] = vd.preprocessed(
            terms, lambda key, x: x + 0.1 * jax.random.normal(key, x.shape)
        )
    if name in DISCRETE:
        made["enumerated"] = vd.enumerated(model, DISCRETE[name]()[2])
    return made


def keys():
    return jax.random.split(jax.random.key(5), 3)


@functools.cache
def compiled_results(name):
    """{objective: (terms [3], gradients [3, ...])} of a model's objectives, under jit and vmap."""
    _, params, data = built(name)
    return toys.single_draws(objectives(name), keys(), params, data)


def check_law(function, params, data, terms, gradient, drawn_keys):
    """Named scalars with the same names on each call; what jit and vmap gave, `terms`; finite gradients like params."""
    assert isinstance(terms, dict) and terms
    for i, key in enumerate(drawn_keys):
        eager = function(key, params, jnp.asarray(data[i]))
        assert set(eager) == set(terms)
        scale = max(1.0, *(abs(float(term)) for term in eager.values()))
        for term_name, term in eager.items():
            assert isinstance(term_name, str) and term.shape == () and term.dtype == jnp.float32
            assert abs(float(term) - float(terms[term_name][i])) < 1e-5 * scale, term_name
            assert np.isfinite(term)
        if len(drawn_keys) > 1:
            total = vd.total(function)(key, params, jnp.asarray(data[i]))
            assert float(total) == pytest.approx(sum(float(t) for t in eager.values()), abs=1e-5 * scale)
    for term in terms.values():
        assert term.shape == (3,) and term.dtype == np.float32 and np.all(np.isfinite(term))
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    for leaf, of in zip(jax.tree.leaves(gradient), jax.tree.leaves(params), strict=True):
        assert leaf.shape == (3, *of.shape) and leaf.dtype == of.dtype and np.all(np.isfinite(leaf))
    assert np.any(toys.flat(gradient.theta))


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_law(name, objective):
    """And the gradient moves whatever q or p learns, and cv where the estimator learns."""
    _, params, data = built(name)
    terms, gradient = compiled_results(name)[objective]
    drawn = keys()[: 3 if objective == "terms" else 1]
    check_law(objectives(name)[objective], params, data, terms, gradient, drawn)
    if jax.tree.leaves(params.lam):
        assert np.any(toys.flat(gradient.lam)) == (objective != "likelihood_gradient")
    if jax.tree.leaves(params.cv):
        assert np.any(toys.flat(gradient.cv)) == (objective in ("rebar", "relax"))


@pytest.mark.parametrize(
    "name", ["contrastive divergence", "explicit", "sliced", "sliced, variance reduced", "denoising"]
)
def test_law_of_the_baselines_own_objectives(name):
    objective, params, data = baselines_own()[name]
    terms, gradient = toys.single_draws({name: objective}, keys(), params, data)[name]
    check_law(objective, params, data, terms, gradient, keys())


@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE, *MIXED])
def test_data_differ(name):
    """Each datum of the batch has an estimate of its own."""
    for objective, (terms, _) in compiled_results(name).items():
        assert len(set(np.asarray(sum(terms.values())).tolist())) == 3, objective


@pytest.mark.parametrize("name", CONTINUOUS)
def test_values_agree_between_estimators(name):
    """On one key pathwise, doubly reparametrized and score function have drawn the same z: the same value."""
    results = compiled_results(name)
    for bound, function in BOUNDS.items():
        values = [results[f"{e}, {bound}"][0][function.__name__] for e in ESTIMATORS]
        np.testing.assert_allclose(values[1], values[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(values[2], values[0], rtol=1e-5, atol=1e-5)


def test_bounds_have_one_order_on_any_model():
    """The same draws: renyi(2) <= elbo <= renyi(0.5) <= iwae."""
    for name in [*CONTINUOUS, *DISCRETE, *MIXED]:
        results = compiled_results(name)
        upwards = ("renyi(2)", "elbo", "renyi(0.5)", "iwae")
        values = [results[f"score_function, {b}"][0][BOUNDS[b].__name__] for b in upwards]
        for low, high in zip(values, values[1:], strict=False):
            assert np.all(low <= high + 1e-5 * np.abs(high)), name


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_latents_are_told_where_to_go(name):
    model, params, data = built(name)
    for estimator in (vd.pathwise, vd.doubly_reparameterized):
        with pytest.raises(TypeError, match="score_function.*enumerated"):
            jax.eval_shape(estimator(model), jax.random.key(0), params, jnp.asarray(data[0]))


def test_a_mixture_is_exact_under_each_of_its_objectives():
    """With q the posterior every log-weight is log p(x): each bound is it, at any K."""
    for name in ("gmm", "collapsed(gmm)"):
        model, params, data = built(name)
        mixed = (mixture() if name == "collapsed(gmm)" else model).log_prob
        exact = jax.vmap(mixed, in_axes=(None, 0))(params, jnp.asarray(data))
        for objective, (terms, _) in compiled_results(name).items():
            np.testing.assert_allclose(sum(terms.values()), exact, rtol=1e-5, err_msg=f"{name} {objective}")


# A user's model, all the way.


def test_a_users_model_trains():
    """Five plain functions with numpyro inside: 60 steps of `fit` raise log p(x) by many standard errors."""
    model = toys.toy("numpyro").model
    truth = model.init(jax.random.key(11))._replace(phi={"loc": jnp.array([1.5, -1.0])})
    sample = toys.quick_jit(jax.vmap(model.sample, in_axes=(0, None)))
    data = np.asarray(sample(jax.random.split(jax.random.key(1), 64), truth)[0])
    log_prob = toys.quick_jit(jax.vmap(vd.importance_log_prob(model, 500), in_axes=(0, None, 0)))
    keys = jax.random.split(jax.random.key(3), len(data))
    optimizer = optax.adam(3e-2)
    before = log_prob(keys, vd.init_state(jax.random.key(2), model, optimizer).params, jnp.asarray(data))
    step = vd.jit_step(vd.make_train_step(vd.doubly_reparameterized(model, vd.iwae, 4), optimizer))
    state = vd.fit(vd.init_state(jax.random.key(2), model, optimizer), step, lambda i: data, 60)
    after = log_prob(keys, state.params, jnp.asarray(data))
    gain = np.asarray(after.value - before.value, float)
    std_error = np.sqrt(np.sum(np.square(before.std_error) + np.square(after.std_error))) / len(data)
    assert int(state.step) == 60 and std_error < 0.05
    assert np.mean(gain) > max(0.1, 5 * std_error), (np.mean(gain), std_error)


def test_a_users_model_is_evaluated():
    """log p(x) by importance sampling against one by numpyro's own prior draws, within their errors."""
    toy = toys.toy("numpyro")
    x = jnp.asarray(toy.data[0])
    ours = toys.quick_jit(vd.importance_log_prob(toy.model, 4_000))(jax.random.key(0), toy.params, x)

    def weight(key):
        z = toy.params.phi["loc"] + jax.random.normal(key, (2,))
        return toy.model.log_joint(toy.params, x, z) - toys.log_normal(z, toy.params.phi["loc"], jnp.zeros(2))

    log_likelihood = np.asarray(
        toys.quick_jit(jax.vmap(weight))(jax.random.split(jax.random.key(1), 40_000)), float
    )
    likelihood = np.exp(log_likelihood)
    std_error = np.hypot(
        likelihood.std() / likelihood.mean() / np.sqrt(len(likelihood)), float(ours.std_error)
    )
    assert std_error < 0.05 and abs(float(ours.value) - np.log(likelihood.mean())) < 5 * std_error


# The contract, by inspection.

SIGNATURES = {
    "init": ["key"],
    "log_joint": ["params", "x", "z"],
    "log_q": ["params", "x", "z"],
    "sample_q": ["key", "params", "x"],
    "sample": ["key", "params"],
    "elbo_terms": ["key", "params", "x"],
}
FAMILY = {
    "encode": ["params", "x"],
    "decode": ["params", "z"],
    "log_prob": ["params", "x"],
    "log_posterior": ["params", "x"],
}


def names(function):
    """Names of a function's parameters, but for what it only passes on."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]


@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE, *MIXED])
def test_signatures_of_models(name):
    model = built(name)[0]
    assert model._fields[:6] == vd.Model._fields and isinstance(model, vd.ModelLike)
    for field, expected in (SIGNATURES | FAMILY).items():
        function = getattr(model, field, None)
        if function is not None:
            assert names(function) == expected, field
    assert names(model.elbo_estimate) == ["key", "params", "x"]


@pytest.mark.parametrize(
    ("name", "objective"), [c for c in CASES if c[0] in ("linear-Gaussian", "gmm, encoder")]
)
def test_signatures_of_objectives(name, objective):
    function = objectives(name)[objective]
    assert names(function) == ["key", "params", "x"]


def test_signatures_of_the_rest():
    objective = objectives("gmm")["terms"]
    for function in (
        vd.total(objective),
        vd.preprocessed(objective, lambda key, x: x),
        vd.importance_log_prob(built("gmm")[0], 2),
    ):
        assert names(function) == ["key", "params", "x"]
    assert names(per_example(objective)) == ["key", "params", "batch", "positions", "aux"]
    for likelihood, _ in LIKELIHOODS.values():
        assert names(likelihood.log_prob) == ["out", "x"]
        assert names(likelihood.sample) == ["key", "out"]
        assert names(likelihood.embed) == ["x"] and names(likelihood.out_shape) == ["shape"]


@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE, *MIXED])
def test_what_a_model_samples_it_can_judge(name):
    """`sample` returns (x, z) that log_joint and log_q accept, with q's own structure of z."""
    model, params, data = built(name)
    x, z = model.sample(jax.random.key(0), params)
    assert jnp.shape(x) == data[0].shape and jnp.result_type(x) == data.dtype
    drawn = model.sample_q(jax.random.key(1), params, x)
    assert jax.tree.structure(z) == jax.tree.structure(drawn)
    for one, other in zip(jax.tree.leaves(z), jax.tree.leaves(drawn), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
    for latent in (z, drawn):
        for function in (model.log_joint, model.log_q):
            value = function(params, x, latent)
            assert value.shape == () and np.isfinite(value)
