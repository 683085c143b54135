"""Objectives from objectives, on functions whose sums, means and variances are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from tests import toys
from vdiff.objectives import sum_terms


def noisy(key, params, x):
    """Two terms of mean theta x and -phi, the first with unit variance."""
    return {"fit": params.theta * x + jax.random.normal(key), "cost": -params.phi}


PARAMS = vd.Params(theta=jnp.array(2.0, jnp.float32), phi=jnp.array(0.25, jnp.float32))
X = jnp.array(3.0, jnp.float32)


def test_total_is_the_sum(key):
    terms = noisy(key, PARAMS, X)
    assert vd.total(noisy)(key, PARAMS, X) == terms["fit"] + terms["cost"] == sum_terms(terms)
    gradient = jax.grad(vd.total(noisy), argnums=1)(key, PARAMS, X)
    assert gradient == vd.Params(theta=3.0, phi=-1.0)


def test_weighted(key):
    terms = noisy(key, PARAMS, X)
    beta = vd.weighted(noisy, {"cost": 4.0})
    assert beta(key, PARAMS, X) == {"fit": terms["fit"], "cost": 4.0 * terms["cost"]}
    assert jax.grad(vd.total(beta), argnums=1)(key, PARAMS, X) == vd.Params(theta=3.0, phi=-4.0)
    assert vd.weighted(noisy, {})(key, PARAMS, X) == terms
    assert vd.weighted(noisy, {"fit": 0.0, "cost": 0.0})(key, PARAMS, X) == {"fit": 0.0, "cost": 0.0}


def test_weighted_takes_a_traced_weight(key):
    @jax.jit
    def gradient(weight):
        objective = vd.weighted(noisy, {"cost": weight})
        return jax.grad(vd.total(objective), argnums=1)(key, PARAMS, X)

    assert gradient(jnp.array(0.5)).phi == -0.5
    assert gradient(jnp.array(2.0)).phi == -2.0


def test_weighted_refuses_an_unknown_name(key):
    objective = vd.weighted(noisy, {"kl": 4.0, "cost": 1.0})
    with pytest.raises(ValueError, match=r"weights: got \['kl'\], expected names among \['cost', 'fit'\]"):
        jax.eval_shape(objective, key, PARAMS, X)


def kl_terms(theta):
    """Batch means: three KLs of 0.2, 2 and 0.5 nats, the last at its floor."""
    return {"fit": -3.0 * theta, "kl_1": -0.2 * theta, "kl_2": -2.0 * theta, "kl_3": -0.5 * theta}


FLOORS = {"kl_1": 0.5, "kl_2": 0.5, "kl_3": 0.5}


def test_free_bits_hold_a_layer_at_its_floor():
    """Below it, or at it, the value is the floor and the slope exactly zero; above it both are the term's own."""
    combine = vd.free_bits(FLOORS)
    value, slope = jax.value_and_grad(lambda theta: combine(kl_terms(theta)))(jnp.float32(1.0))
    assert float(value) == pytest.approx(-3.0 - 0.5 - 2.0 - 0.5) and float(slope) == -5.0
    assert float(vd.free_bits({})(kl_terms(jnp.float32(1.0)))) == pytest.approx(-5.7)
    assert float(vd.free_bits({"kl_1": 0.0})(kl_terms(jnp.float32(1.0)))) == pytest.approx(-5.7)


def test_free_bits_in_a_step():
    """The step's own gradient by a parameter that only a floored layer has is zero, though single data lie above it."""

    def objective(key, params, x):
        return {"fit": -params.theta * x, "kl_1": -jnp.exp(params.lam) * x}

    params = vd.Params(theta=jnp.float32(1.0), lam=jnp.float32(-1.0))
    model = vd.Model(lambda key: params, None, None, None, None)
    optimizer, batch = optax.sgd(0.1), jnp.array([0.1, 0.2, 3.0])
    state = vd.init_state(jax.random.key(0), model, optimizer)
    for floor, moves in ((0.5, False), (0.4, True)):  # the mean KL is e^-1 * 1.1 = .405
        step = vd.make_train_step(objective, optimizer, combine=vd.free_bits({"kl_1": floor}))
        after, metrics = jax.jit(step)(state, batch)
        assert (float(after.params.lam) != -1.0) == moves
        assert float(metrics["kl_1"]) == pytest.approx(-1.1 * math.exp(-1.0), rel=1e-6)
        assert float(metrics["objective"]) == pytest.approx(-1.1 - max(floor, 1.1 * math.exp(-1.0)), rel=1e-6)


def test_free_bits_refuse():
    with pytest.raises(ValueError, match="floors: got .*-0.1.*, expected nats of at least 0"):
        vd.free_bits({"kl_1": -0.1})
    with pytest.raises(ValueError, match=r"floors: got \['kl'\], expected names among \['fit', 'kl_1'"):
        vd.free_bits({"kl": 0.1})(kl_terms(jnp.float32(1.0)))


@pytest.mark.parametrize("num_repeats", [1, 4, 9])
def test_repeat_has_the_mean_and_a_share_of_the_variance(num_repeats):
    num_draws = 20_000
    repeated = vd.repeat(noisy, num_repeats)
    keys = jax.random.split(jax.random.key(1), num_draws)
    values = np.asarray(
        toys.quick_jit(jax.vmap(vd.total(repeated), in_axes=(0, None, None)))(keys, PARAMS, X), float
    )
    assert abs(values.mean() - 5.75) < 5 * values.std() / math.sqrt(num_draws)
    # The variance of a normal sample's variance is 2 / n; runs that shared a key would keep variance one.
    assert abs(values.var() * num_repeats - 1) < 5 * math.sqrt(2 / num_draws)
    assert jax.grad(vd.total(repeated), argnums=1)(keys[0], PARAMS, X) == vd.Params(theta=3.0, phi=-1.0)


def test_repeat_of_iwae_is_miwae():
    """M = 3 runs of K = 2: the expected value is that of IWAE with 2 draws, not with 6."""
    toy = toys.toy("bernoulli")
    objective = vd.repeat(vd.score_function(toy.model, vd.iwae, 2), 3)
    values, draws = toys.gradient_draws({"miwae": objective}, toy.params, toy.data, 30_000)["miwae"]
    two, six = (toys.exact("bernoulli", k)[0.0] for k in (2, 6))
    assert toys.z_scores(values[:, None], two[0]) < 5 < toys.z_scores(values[:, None], six[0])
    toys.check_unbiased(draws, two[1])


@pytest.mark.parametrize("num_repeats", [0, -1])
def test_repeat_refuses_no_runs(num_repeats):
    with pytest.raises(ValueError, match=f"num_repeats: got {num_repeats}, expected at least 1"):
        vd.repeat(noisy, num_repeats)


def test_preprocessed_transforms_with_a_key_of_its_own():
    """The transform's noise and the objective's are uncorrelated, and both depend on the key."""

    def judge(key, params, x):
        return {"of_data": x, "of_objective": jax.random.normal(key)}

    objective = vd.preprocessed(judge, lambda key, x: x + jax.random.normal(key))
    keys = jax.random.split(jax.random.key(0), 20_000)
    terms = jax.vmap(objective, in_axes=(0, None, None))(keys, PARAMS, X)
    data, noise = np.asarray(terms["of_data"], float) - 3.0, np.asarray(terms["of_objective"], float)
    for sample in (data, noise, data**2 - 1, noise**2 - 1, data * noise):
        assert abs(sample.mean()) < 5 * sample.std() / math.sqrt(len(sample))


def test_preprocessed_differentiates_through_the_datum_it_made(key):
    objective = vd.preprocessed(noisy, lambda key, x: 2.0 * x)
    assert jax.grad(vd.total(objective), argnums=1)(key, PARAMS, X) == vd.Params(theta=6.0, phi=-1.0)


def test_preprocessed_evaluators():
    """What it wraps may return anything, e.g. importance_log_prob's LogProb."""
    toy = toys.toy("linear2")
    evaluator = vd.importance_log_prob(toy.model, 2_000)
    plain = vd.preprocessed(evaluator, lambda key, x: x[::-1])
    x = jnp.asarray(toy.data[0])
    result = plain(jax.random.key(0), toy.params, x)
    exact = toys.linear_gaussian_log_prob(toy.params, x[::-1])
    assert isinstance(result, vd.LogProb) and abs(result.value - exact) < 5 * result.std_error


def test_scheduled_weight_follows_the_step_and_compiles_once():
    """With SGD of rate one the parameters move by the gradient: -cost's weight, 0, 1/4, 1/2, 3/4, 1, 1."""
    traces = []

    def at(step):
        traces.append(step)
        weight = jnp.minimum(1.0, step.astype(jnp.float32) / 4)
        return vd.weighted(noisy, {"cost": weight})

    def init(key):
        return PARAMS

    optimizer = optax.sgd(1.0)
    model = toys.toy("linear").model._replace(init=init)
    step = jax.jit(vd.make_train_step(vd.scheduled(at), optimizer))
    state = vd.init_state(jax.random.key(0), model, optimizer)
    phis = []
    for i in range(6):
        state, metrics = step(state, jnp.array([3.0, 3.0]))
        phis.append(float(state.params.phi))
        assert metrics["cost"] == pytest.approx(-min(1, i / 4) * (phis[-2] if i else 0.25), rel=1e-6)
    np.testing.assert_allclose(np.diff([0.25, *phis]), [0.0, -0.25, -0.5, -0.75, -1.0, -1.0], atol=1e-6)
    assert len(traces) == 1 and step._cache_size() == 1
    assert float(state.params.theta) == pytest.approx(2.0 + 6 * 3.0, rel=1e-6)


def test_scheduled_is_a_record():
    record = vd.scheduled(lambda step: noisy)
    assert isinstance(record, vd.Scheduled) and record.at(0) is noisy


def test_bits_per_dim():
    """A uniform mass over 256 levels is 8 bits a pixel; over 17 it is log2 17."""
    assert vd.bits_per_dim(-784 * math.log(256), 784) == pytest.approx(8.0, rel=1e-12)
    np.testing.assert_allclose(
        vd.bits_per_dim(-64 * jnp.log(jnp.array([2.0, 17.0])), 64), np.log2([2, 17]), rtol=1e-6
    )
    with pytest.raises(ValueError, match="num_dims: got 0, expected the number of dimensions"):
        vd.bits_per_dim(-1.0, 0)


@pytest.mark.parametrize(
    "function",
    [vd.total(noisy), vd.repeat(noisy, 2), vd.preprocessed(noisy, lambda key, x: x)],
    ids=["total", "repeat", "preprocessed"],
)
def test_a_raw_key_is_refused(function):
    with pytest.raises(TypeError, match=r"expected a typed key; make it with jax.random.key\(seed\)"):
        function(jax.random.PRNGKey(0), PARAMS, X)


# Gradients by part.


def test_frozen_stops_parts_and_nothing_else(key):
    assert vd.frozen(noisy, "phi")(key, PARAMS, X) == noisy(key, PARAMS, X)
    assert jax.grad(vd.total(vd.frozen(noisy, "phi")), 1)(key, PARAMS, X) == vd.Params(theta=3.0, phi=0.0)
    assert jax.grad(vd.total(vd.frozen(noisy, "phi", "theta")), 1)(key, PARAMS, X) == vd.Params(0.0, 0.0)
    assert jax.grad(vd.total(vd.frozen(noisy)), 1)(key, PARAMS, X) == vd.Params(theta=3.0, phi=-1.0)


def test_by_part_gives_each_part_its_gradient_and_keeps_the_value(key):
    def other(key, params, x):
        return {"cost": 7.0 * params.phi * params.theta * x, "more": params.phi**2}

    both = vd.by_part(noisy, phi=other)
    terms = both(key, PARAMS, X)
    assert terms == {**noisy(key, PARAMS, X), "more": 0.0}
    gradient = jax.grad(vd.total(both), argnums=1)(key, PARAMS, X)
    assert gradient == vd.Params(theta=3.0, phi=7.0 * 2.0 * 3.0 + 2 * 0.25)
    # By x it is the objective's own.
    assert jax.grad(vd.total(both), argnums=2)(key, PARAMS, X) == 2.0


def test_parts_that_do_not_exist_are_refused():
    with pytest.raises(
        ValueError, match=r"parts: got \['lambda'\], expected names among \['theta', 'phi', 'lam', 'cv'\]"
    ):
        vd.frozen(noisy, "lambda")
    with pytest.raises(ValueError, match=r"parts: got \['encoder'\]"):
        vd.by_part(noisy, encoder=noisy)


def test_miwae_and_piwae_are_a_line():
    """MIWAE(m, k): IWAE_k averaged over m runs. PIWAE(m, k): theta and phi from IWAE_mk, lambda from MIWAE(m, k)."""
    toy, m, k = toys.toy("linear"), 4, 2
    miwae = vd.repeat(vd.pathwise(toy.model, vd.iwae, k), m)
    piwae = vd.by_part(vd.pathwise(toy.model, vd.iwae, m * k), lam=miwae)
    runs = toys.gradient_draws({"miwae": miwae, "piwae": piwae}, toy.params, toy.data, 40_000)
    (small, of_small), (large, of_large) = (toys.exact("linear", n)[0.0] for n in (k, m * k))
    assert toys.z_scores(runs["miwae"][0][:, None], small) < 5.0
    toys.check_unbiased(runs["miwae"][1], of_small)
    assert toys.z_scores(runs["piwae"][0][:, None], large) < 5.0
    toys.check_unbiased(runs["piwae"][1], of_large._replace(lam=of_small.lam))
