"""Wake-sleep against exact answers: theta against grad IWAE_K, each phase of lambda against its own sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys


def half_and_half(*arguments):
    return 0.5 * vd.wake_phase(*arguments) + 0.5 * vd.sleep_phase(*arguments)


PHASES = {"wake": vd.wake_phase, "sleep": vd.sleep_phase, "both": half_and_half}


@functools.cache
def exact_wake(name, num_samples):
    """E sum_k w_k d log q(z_k | x) over K draws, by enumeration or quadrature in float64."""
    toy = toys.toy(name)
    log_q = jax.vmap(jax.vmap(toy.model.log_q, in_axes=(None, None, 0)), in_axes=(None, None, 0))

    def raised(params, x, z, log_weights):
        return jnp.sum(jax.nn.softmax(log_weights) * log_q(params, x, z), axis=-1)

    return toys.flat_single(toys.exact_expectations(toy, num_samples, of=raised)[None][1].lam)


@functools.cache
def exact_sleep():
    """sum_z p(z) int p(x | z) d log q(z | x) dx of the Bernoulli toy, Gauss-Hermite in x's two dimensions."""
    toy = toys.toy("bernoulli")
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    noise = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    mass = np.outer(weights, weights).ravel() / weights.sum() ** 2

    def expectation(lam, params):
        prior = jax.nn.sigmoid(params.phi["logits"])
        total = 0.0
        for bits in toys.BITS:
            p = jnp.prod(jnp.where(bits == 1, prior, 1 - prior))
            x = (params.theta["weight"] @ bits.astype(float))[None] + jnp.asarray(noise)
            log_q = jax.vmap(toy.model.log_q, in_axes=(None, 0, None))(
                params._replace(lam=lam), x, jnp.asarray(bits)
            )
            total = total + p * jnp.sum(jnp.asarray(mass) * log_q)
        return total

    return toys.flat_single(toys.in_float64(jax.grad(expectation), toy.params.lam, toy.params))


def exact_posterior_gradient():
    """E_{p(z | x)} d log q(z | x): what the wake phase tends to, mean over the Bernoulli toy's data."""
    toy = toys.toy("bernoulli")

    def expectation(lam, params, data):
        def one(x):
            log_joint = jax.vmap(toy.model.log_joint, in_axes=(None, None, 0))(
                params, x, jnp.asarray(toys.BITS)
            )
            log_q = jax.vmap(toy.model.log_q, in_axes=(None, None, 0))
            return jnp.sum(
                jax.nn.softmax(log_joint) * log_q(params._replace(lam=lam), x, jnp.asarray(toys.BITS))
            )

        return jnp.mean(jax.vmap(one)(data))

    return toys.flat_single(toys.in_float64(jax.grad(expectation), toy.params.lam, toy.params, toy.data))


@functools.cache
def runs(num_samples):
    toy = toys.toy("bernoulli")
    objectives = {name: vd.wake_sleep(toy.model, num_samples, phase=phase) for name, phase in PHASES.items()}
    return toys.gradient_draws(objectives, toy.params, toy.data, 260_000, seed=num_samples)


@pytest.mark.parametrize("num_samples", [2, 5, 8])
@pytest.mark.parametrize("phase", PHASES)
def test_theta_has_the_gradient_of_iwae(num_samples, phase):
    values, draws = runs(num_samples)[phase]
    value, gradient = toys.exact("bernoulli", num_samples)[0.0]
    assert toys.z_scores(values[:, None], value) < 5.0
    toys.check_unbiased(draws, gradient, ("theta", "phi"))


@pytest.mark.parametrize("name", ["bernoulli", "linear2", "shared"])
def test_the_value_is_iwae_of_the_draws(name):
    """To 1e-6 of the log-weights of the same draws; of both phases, and of likelihood_gradient."""
    toy, num_samples = toys.toy(name), 5
    objectives = {phase: vd.wake_sleep(toy.model, num_samples, phase=PHASES[phase]) for phase in PHASES}
    objectives["ratio"] = vd.likelihood_gradient(toy.model, num_samples)
    keys = jax.random.split(jax.random.key(0), len(toy.data))
    runs = toys.single_draws(objectives, keys, toy.params, toy.data)
    for i, key in enumerate(keys):
        for name, (terms, _) in runs.items():
            of_z = key if name == "ratio" else jax.random.split(key)[0]
            log_weights = toys.log_weights(toy.model, of_z, toy.params, jnp.asarray(toy.data[i]), num_samples)
            assert float(terms["iwae"][i]) == pytest.approx(toys.numpy_bound(0.0, log_weights), rel=1e-6)


def check_lam(draws, exact):
    draws = draws._replace(theta=(), phi=())
    toys.check_unbiased(draws, vd.Params(lam=exact), ("lam",))


@pytest.mark.parametrize("num_samples", [2, 5, 8])
def test_lambda_has_the_gradient_of_its_phase(num_samples):
    wake, sleep = exact_wake("bernoulli", num_samples), exact_sleep()
    check_lam(runs(num_samples)["wake"][1], wake)
    check_lam(runs(num_samples)["sleep"][1], sleep)
    check_lam(runs(num_samples)["both"][1], 0.5 * wake + 0.5 * sleep)


def test_the_wake_phase_is_biased_as_stated():
    """For the gradient of -KL(p(z | x) || q): by 69 % of its norm at K = 2, 36 % at 5, 24 % at 8."""
    limit = exact_posterior_gradient()
    bias = {k: np.linalg.norm(exact_wake("bernoulli", k) - limit) / np.linalg.norm(limit) for k in (2, 5, 8)}
    for k, stated in {2: 0.69, 5: 0.36, 8: 0.24}.items():
        assert bias[k] == pytest.approx(stated, abs=0.005)
    assert bias[8] * 8 == pytest.approx(bias[5] * 5, rel=0.2)


def test_a_continuous_latent():
    """Lambda by quadrature, theta by that of IWAE_5."""
    toy = toys.toy("linear")
    objective = vd.wake_sleep(toy.model, 5)
    _, draws = toys.gradient_draws({"it": objective}, toy.params, toy.data, 60_000)["it"]
    toys.check_unbiased(draws, toys.exact("linear", 5)[0.0][1], ("theta", "phi"))
    check_lam(draws, exact_wake("linear", 5))


def test_shared_weights_move_lambda_alone_in_the_phase():
    """The phase's surrogate is differentiated for lam only: theta is what likelihood_gradient gives."""
    toy = toys.toy("shared")
    key, x = jax.random.key(3), jnp.asarray(toy.data[0])

    def gradient(phase):
        objective = vd.wake_sleep(toy.model, 4, phase=phase)
        return jax.grad(vd.total(objective), argnums=(1, 2))(key, toy.params, x)

    none, of_x = gradient(lambda *arguments: jnp.zeros(()))
    for phase in (vd.wake_phase, vd.sleep_phase):
        params, other_x = gradient(phase)
        np.testing.assert_array_equal(params.theta["w"], none.theta["w"])
        np.testing.assert_array_equal(other_x, of_x)
        assert np.any(toys.flat_single(params.lam)) and not np.any(toys.flat_single(none.lam))


def test_one_draw_teaches_the_wake_phase_nothing():
    toy = toys.toy("bernoulli")
    with pytest.raises(
        ValueError, match="num_samples: got 1, expected at least 2 for wake_phase.*sleep_phase"
    ):
        vd.wake_sleep(toy.model, 1)
    vd.wake_sleep(toy.model, 1, phase=vd.sleep_phase)
    with pytest.raises(ValueError, match="num_samples: got 0"):
        vd.wake_sleep(toy.model, 0, phase=vd.sleep_phase)
