"""Annealed importance sampling, both ways, on a linear VAE whose log p(x) is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from tests.evaluate import linear_vae

MODEL = linear_vae.build()
PARAMS = MODEL.init(jax.random.key(0))._replace(lam=linear_vae.lam((1.0, -0.5), (0.3, 0.2)))
MOVES = linear_vae.autoregressive(0.4)
NUM_DATA = 4000
evaluate = vd.evaluate


@pytest.fixture(scope="module")
def bounds():
    """Single chains, both ways and from the prior, on simulated data: brackets, log-weights less log p(x), log p(x)."""
    both = evaluate.bdmc(MODEL, MOVES, 8)
    from_prior = evaluate.annealed_log_prob(linear_vae.started_from_prior(MODEL), MOVES, 8)

    def one(key):
        key_bracket, key_prior = jax.random.split(key)
        x, _ = MODEL.sample(jax.random.split(key_bracket, 3)[0], PARAMS)  # the datum that bdmc makes
        return x, both(key_bracket, PARAMS), from_prior(key_prior, PARAMS, x).value

    keys = jax.random.split(jax.random.key(1), NUM_DATA)
    x, brackets, prior = toys.quick_jit(jax.vmap(one))(keys)
    exact = linear_vae.log_prob(x)
    values = {"forward": brackets.lower.value, "reverse": brackets.upper.value, "prior": prior}
    return brackets, {name: np.asarray(value, np.float64) - exact for name, value in values.items()}, exact


def z_score(values):
    return values.mean() / (values.std(ddof=1) / np.sqrt(len(values)))


@pytest.mark.parametrize(("way", "sign"), [("forward", 1), ("prior", 1), ("reverse", -1)])
def test_a_weight_is_unbiased(bounds, way, sign):
    """E exp(w - log p(x)) = 1 forward, E exp(log p(x) - w) = 1 in reverse, within 4 standard errors."""
    ratio = np.exp(sign * bounds[1][way])
    limit = 0.02 if way != "prior" else 0.1
    assert ratio.std() / np.sqrt(NUM_DATA) < limit
    assert abs(z_score(ratio - 1)) < 4


def test_both_bounds_are_on_their_side(bounds):
    """Not only within their errors, but beyond them: the gap is real at eight steps."""
    errors = bounds[1]
    assert z_score(errors["forward"]) < -5 and z_score(errors["reverse"]) > 5
    assert z_score(errors["prior"]) < -5


def test_a_start_from_q_is_tighter_than_one_from_the_prior(bounds):
    errors = bounds[1]
    assert errors["prior"].std() > 3 * errors["forward"].std()
    assert errors["forward"].mean() > errors["prior"].mean() + 1


def test_three_steps_from_the_prior_are_five_nats_lower_and_wider():
    """Than as many from q, on the same simulated data."""
    estimates = [
        evaluate.annealed_log_prob(of, MOVES, 3) for of in (MODEL, linear_vae.started_from_prior(MODEL))
    ]

    def one(key):
        key_data, *keys = jax.random.split(key, 3)
        x, _ = MODEL.sample(key_data, PARAMS)
        return x, [estimate(k, PARAMS, x).value for estimate, k in zip(estimates, keys, strict=True)]

    x, values = toys.quick_jit(jax.vmap(one))(jax.random.split(jax.random.key(5), NUM_DATA))
    exact = linear_vae.log_prob(x)
    from_q, from_prior = (np.asarray(value, np.float64) - exact for value in values)
    assert from_prior.mean() < from_q.mean() - 5 and from_prior.std() > from_q.std() + 5


def test_many_chains_are_exact_within_their_standard_error():
    """On 40 data, of q's making and not: no value is off by five standard errors, and together they are calibrated."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 5)), jnp.float32)
    estimate = evaluate.annealed_log_prob(
        MODEL, MOVES, 10, num_chains=200, temperatures=evaluate.linear_temperatures
    )
    keys = jax.random.split(jax.random.key(2), 40)
    got = toys.quick_jit(jax.vmap(estimate, in_axes=(0, None, 0)))(keys, PARAMS, x)
    scores = (np.asarray(got.value, np.float64) - linear_vae.log_prob(x)) / got.std_error
    assert np.max(np.abs(scores)) < 5 and abs(np.sum(scores)) / np.sqrt(40) < 5
    assert 0.6 < scores.std() < 1.5
    assert np.all((got.ess > 20) & (got.ess < 200) & (got.k_hat < 0.7)) and np.all(got.std_error < 0.2)


def test_the_sandwich_holds_in_the_mean(bounds):
    """It encloses the mean of log p(x) over the data, and E log p(x), which is minus the entropy of a Gaussian."""
    brackets, errors, exact = bounds
    found = evaluate.sandwich(brackets)
    assert found.lower.mean < exact.mean() < found.upper.mean
    covariance = linear_vae.WEIGHT @ linear_vae.WEIGHT.T + linear_vae.SCALE**2 * np.eye(5)
    truth = -0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    assert found.lower.mean - 5 * found.lower.std_error < truth < found.upper.mean + 5 * found.upper.std_error
    gap = errors["reverse"] - errors["forward"]
    np.testing.assert_allclose(found.gap.mean, gap.mean(), rtol=1e-4)
    np.testing.assert_allclose(found.gap.std_error, gap.std(ddof=1) / np.sqrt(NUM_DATA), rtol=1e-4)


def discrete():
    """A model with two kinds of latents in a dictionary, one of them an integer."""
    logits = jnp.array([0.3, -0.5, 0.1])

    def log_joint(params, x, z):
        loc = z["class"].astype(jnp.float32)
        return (
            jax.nn.log_softmax(logits)[z["class"]]
            + toys.log_normal(z["u"], loc, jnp.zeros(2))
            + toys.log_normal(x, z["u"], jnp.zeros(2))
        )

    def sample_q(key, params, x):
        key_class, key_u = jax.random.split(key)
        return {"class": jax.random.randint(key_class, (), 0, 3), "u": x + jax.random.normal(key_u, (2,))}

    def log_q(params, x, z):
        return -jnp.log(3.0) + toys.log_normal(z["u"], x, jnp.zeros(2))

    return vd.Model(lambda key: vd.Params(), log_joint, log_q, sample_q, lambda key, params: None)


def test_where_nothing_moves_it_is_importance_sampling():
    """The increments of the temperature add up to one, at one step and at six; z is any pytree."""
    model, params, x = discrete(), vd.Params(), jnp.array([0.4, 1.1])
    estimates = [
        evaluate.annealed_log_prob(model, lambda key, log_density, z: z, num_steps, num_chains=30)
        for num_steps in (1, 6)
    ]

    def both(key):
        starts = jax.vmap(lambda key: jax.random.split(key)[0])(jax.random.split(key, 30))
        z = jax.vmap(model.sample_q, in_axes=(0, None, None))(starts, params, x)
        over = jax.vmap(lambda z: model.log_joint(params, x, z) - model.log_q(params, x, z))
        return [estimate(key, params, x) for estimate in estimates], over(z)

    found, log_w = toys.quick_jit(both)(jax.random.key(4))
    w = np.exp(np.asarray(log_w, np.float64))
    for got in found:
        np.testing.assert_allclose(np.exp(got.value), w.mean(), rtol=1e-5)
        np.testing.assert_allclose(got.ess, w.sum() ** 2 / np.sum(w**2), rtol=1e-4)


def test_the_transition_is_asked_for_the_densities_of_the_path():
    """At each b it is given (1 - b) log q + b log p(x, z)."""
    seen, x = [], jnp.array([0.1, 0.2, 0.3, 0.4, 0.5])

    def recording(key, log_density, z):
        ends = MODEL.log_q(PARAMS, x, z), MODEL.log_joint(PARAMS, x, z)
        jax.debug.callback(
            lambda *values: seen.append([float(v) for v in values]), z[0], log_density(z), *ends
        )
        return z + 1.0

    toys.quick_jit(evaluate.annealed_log_prob(MODEL, recording, 4))(jax.random.key(5), PARAMS, x)
    jax.effects_barrier()
    _, given, log_q, log_joint = np.array(sorted(seen)).T
    b = evaluate.sigmoidal_temperatures(4)[1:-1]
    np.testing.assert_allclose(given, (1 - b) * log_q + b * log_joint, rtol=1e-5)


@pytest.mark.parametrize("of", [evaluate.linear_temperatures, evaluate.sigmoidal_temperatures])
@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_temperatures_rise_from_zero_to_one(of, num_steps):
    b = of(num_steps)
    assert b.shape == (num_steps + 1,) and b[0] == 0 and b[-1] == 1 and np.all(np.diff(b) > 0)
    np.testing.assert_allclose(b, 1 - b[::-1], atol=1e-12)


def test_sigmoidal_temperatures_are_close_at_both_ends():
    rise = np.diff(evaluate.sigmoidal_temperatures(100))
    assert rise[0] < 0.1 * rise[50] and rise[-1] < 0.1 * rise[50]
    steeper = np.diff(evaluate.sigmoidal_temperatures(100, steepness=8.0))
    assert steeper[0] < rise[0] and steeper[50] > rise[50]


@pytest.mark.parametrize(
    "build", [evaluate.annealed_log_prob, evaluate.reverse_annealed_log_prob, evaluate.bdmc]
)
def test_what_cannot_be_is_refused(build):
    with pytest.raises(ValueError, match="num_steps: got 0, expected at least 1"):
        build(MODEL, MOVES, 0)
    with pytest.raises(ValueError, match="num_chains: got 0, expected at least 1"):
        build(MODEL, MOVES, 3, num_chains=0)
    for wrong in (np.linspace(0, 1, 3), np.linspace(1, 0, 4), np.linspace(0, 0.9, 4), np.linspace(0.1, 1, 4)):
        with pytest.raises(
            ValueError, match="temperatures: got .*, expected 4 numbers that rise from 0 to 1"
        ):
            build(MODEL, MOVES, 3, temperatures=lambda n, wrong=wrong: wrong)


def test_a_raw_key_is_refused():
    with pytest.raises(TypeError, match="expected a typed key"):
        evaluate.annealed_log_prob(MODEL, MOVES, 3)(jax.random.PRNGKey(0), PARAMS, jnp.zeros(5))
