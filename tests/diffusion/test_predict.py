"""What an output means: data, noise, target and gain against float64 formulas, at both ends of log-SNR too."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from tests.diffusion import cases
from vdiff.diffusion import predict

DATA_SCALE = 0.4
PREDICTIONS = {
    "noise": predict.noise,
    "data": predict.data,
    "velocity": predict.velocity,
    "preconditioned": predict.preconditioned(DATA_SCALE),
}
LOG_SNRS = [0.0, 5.0, -5.0, 13.3, 20.0, -20.0]


def target(name, x, eps, log_snr):
    """The output of a denoiser that knows, from the definitions, float64."""
    alpha, sigma = cases.scales(log_snr)
    z = alpha * x + sigma * eps
    variance = DATA_SCALE**2 * alpha**2 + sigma**2
    skip, spread = DATA_SCALE**2 * alpha / variance, DATA_SCALE * sigma / np.sqrt(variance)
    return {
        "noise": eps,
        "data": x,
        "velocity": alpha * eps - sigma * x,
        # x - skip z with z put in: in float64 too the difference would lose its digits at a high log-SNR.
        "preconditioned": (x * sigma**2 / variance - skip * sigma * eps) / spread,
    }[name], z


def read(name, z, log_snr, out):
    """What the output says of x and eps, from the definitions, float64."""
    alpha, sigma = cases.scales(log_snr)
    variance = DATA_SCALE**2 * alpha**2 + sigma**2
    if name == "noise":
        return (z - sigma * out) / alpha, out
    if name == "data":
        return out, (z - alpha * out) / sigma
    if name == "velocity":
        return alpha * z - sigma * out, sigma * z + alpha * out
    x = DATA_SCALE**2 * alpha / variance * z + DATA_SCALE * sigma / np.sqrt(variance) * out
    return x, z * sigma / variance - DATA_SCALE * alpha / np.sqrt(variance) * out


def is_well_conditioned(name, what, log_snr):
    """As the docstrings say: noise has no data where there is no signal, data no noise where there is none."""
    return not (name == "noise" and what == "data" and log_snr < -5) and not (
        name == "data" and what == "noise" and log_snr > 5
    )


def drawn(seed=0):
    x, eps, out = np.random.default_rng(seed).normal(size=(3, 5))
    return DATA_SCALE * x, eps, out


@pytest.mark.parametrize("log_snr", LOG_SNRS)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_denoiser_that_knows(name, log_snr):
    """data(target) = x and noise(target) = eps, in float32, wherever that is well-conditioned."""
    prediction, (x, eps, _) = PREDICTIONS[name], drawn()
    out, z = target(name, x, eps, log_snr)
    as_float32 = [jnp.asarray(v, jnp.float32) for v in (z, out, x, eps)]
    log_snr32 = jnp.float32(log_snr)
    found = prediction.target(*as_float32[2:], log_snr32)
    np.testing.assert_allclose(found, out, rtol=1e-5, atol=1e-6 * np.max(np.abs(out)))
    for what, expected in (("data", x), ("noise", eps)):
        found = getattr(prediction, what)(as_float32[0], log_snr32, as_float32[1])
        if is_well_conditioned(name, what, log_snr):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        # In float64 everywhere: so the formula is right, and only the conditioning of float32 at fault.
        exact = toys.in_float64(getattr(prediction, what), z, np.float64(log_snr), out)
        np.testing.assert_allclose(exact, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("log_snr", LOG_SNRS)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_any_output_and_its_slopes(name, log_snr):
    """An output that is wrong by much: value, and slopes by the output, z and log-SNR, within 1e-4."""
    prediction, (x, eps, out) = PREDICTIONS[name], drawn(1)
    _, z = target(name, x, eps, log_snr)
    z, out = np.float32(z), np.float32(out)
    for index, what in enumerate(("data", "noise")):
        function = getattr(prediction, what)
        exact = read(name, np.float64(z), log_snr, np.float64(out))[index]
        found = function(jnp.asarray(z), jnp.float32(log_snr), jnp.asarray(out))
        assert found.dtype == jnp.float32
        scale = np.max(np.abs(exact))
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6 * scale)
        slopes = jax.jacfwd(lambda *a, f=function: jnp.sum(f(*a)), (0, 1, 2))(
            jnp.asarray(z), jnp.float32(log_snr), jnp.asarray(out)
        )
        whole = lambda z, at, out, i=index: np.sum(read(name, z, at, out)[i] + 0 * z)  # noqa: E731
        zero = np.zeros(5)
        exact = (
            whole(np.ones(5), log_snr, zero) / 5 * np.ones(5),
            cases.slope(lambda at, w=whole: w(np.float64(z), at, np.float64(out)), log_snr, 1e-3),
            whole(zero, log_snr, np.ones(5)) / 5 * np.ones(5),
        )
        size = max(1e-30, abs(exact[1]), 1e-3 * scale)
        np.testing.assert_allclose(slopes[0], exact[0], rtol=1e-5)
        np.testing.assert_allclose(slopes[2], exact[2], rtol=1e-5)
        assert abs(float(slopes[1]) - exact[1]) < 1e-4 * size


@pytest.mark.parametrize("log_snr", [*LOG_SNRS, 30.0, -30.0])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_gain_turns_an_outputs_error_into_the_noises(name, log_snr):
    prediction, (x, eps, out) = PREDICTIONS[name], drawn(2)
    known, z = target(name, x, eps, log_snr)
    # Both outputs read at the same z: the error of the noise is linear in that of the output.
    expected = read(name, z, log_snr, out)[1] - read(name, z, log_snr, known)[1]
    found = prediction.gain(jnp.float32(log_snr))
    assert found.shape == () and found.dtype == jnp.float32
    np.testing.assert_allclose(
        float(found) * (out - known), expected, rtol=1e-5, atol=1e-9 * np.max(np.abs(expected))
    )
    slope = jax.grad(prediction.gain)(jnp.float32(log_snr))

    def gain(log_snr):
        one, none = (read(name, np.zeros(1), log_snr, np.full(1, v))[1][0] for v in (1.0, 0.0))
        return one - none

    exact = cases.slope(gain, log_snr, 1e-3)
    assert float(slope) == pytest.approx(exact, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("log_snr", [0.0, 5.0, -5.0, 10.0, -10.0])
@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(PREDICTIONS, 2)))
def test_any_prediction_gives_any_other(one, other, log_snr):
    """The x and eps that an output of one implies are a pair; the other's output for them implies them too."""
    one, other = PREDICTIONS[one], PREDICTIONS[other]
    x, eps, out = drawn(3)
    alpha, sigma = cases.scales(log_snr)

    def convert(z, log_snr, out):
        x_hat, eps_hat = one.data(z, log_snr, out), one.noise(z, log_snr, out)
        new = other.target(x_hat, eps_hat, log_snr)
        return x_hat, eps_hat, other.data(z, log_snr, new), other.noise(z, log_snr, new)

    z = alpha * x + sigma * eps
    x_hat, eps_hat, same_x, same_eps = toys.in_float64(convert, z, np.float64(log_snr), out)
    np.testing.assert_allclose(alpha * x_hat + sigma * eps_hat, z, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(same_x, x_hat, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(same_eps, eps_hat, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("log_snr", LOG_SNRS)
def test_preconditioned_by_one_is_minus_the_velocity(log_snr):
    unit, (x, eps, out) = predict.preconditioned(1.0), drawn(4)
    z, log_snr = jnp.asarray(eps, jnp.float32), jnp.float32(log_snr)
    x, out = jnp.asarray(x, jnp.float32), jnp.asarray(out, jnp.float32)
    for what in ("data", "noise"):
        np.testing.assert_allclose(
            getattr(unit, what)(z, log_snr, out), getattr(predict.velocity, what)(z, log_snr, -out), atol=2e-6
        )
    np.testing.assert_allclose(unit.target(x, z, log_snr), -predict.velocity.target(x, z, log_snr), atol=2e-6)
    np.testing.assert_allclose(unit.gain(log_snr), -predict.velocity.gain(log_snr), rtol=2e-6)


@pytest.mark.parametrize("log_snr", LOG_SNRS)
@pytest.mark.parametrize("data_scale", [0.05, 0.4, 1.0, 3.0])
def test_preconditioned_target_and_skip(data_scale, log_snr):
    """The target has variance one on white data, and an output of zero is the best linear guess, Cov / Var z."""
    prediction, at = predict.preconditioned(data_scale), jnp.float32(log_snr)
    of_x, of_eps = prediction.target(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), at)
    assert float((of_x * data_scale) ** 2 + of_eps**2) == pytest.approx(1.0, rel=1e-5)
    alpha, sigma = cases.scales(log_snr)
    best = data_scale**2 * alpha / (data_scale**2 * alpha**2 + sigma**2)
    assert float(prediction.data(jnp.float32(1.0), at, jnp.float32(0.0))) == pytest.approx(best, rel=1e-5)
    # And what it leaves is uncorrelated with z, in float64: Cov(target, z) = 0.
    of_x, of_eps = toys.in_float64(
        lambda at: prediction.target(
            jnp.asarray([1.0, 0.0], at.dtype), jnp.asarray([0.0, 1.0], at.dtype), at
        ),
        np.float64(log_snr),
    )
    assert abs(of_x * data_scale**2 * alpha + of_eps * sigma) < 1e-12


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="data_scale: got .*, expected a positive standard deviation"):
        predict.preconditioned(scale)
