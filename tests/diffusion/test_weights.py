"""Weights against the losses of their papers, written out by hand and integrated in float64.

The denoiser here guesses x whatever z is, so that its error is known without a draw: e(log_snr)^2 = |D - x|^2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import vdiff as vd
from tests import toys
from tests.diffusion import cases
from vdiff import diffusion
from vdiff.diffusion import predict, weights

X = np.array([0.3, -0.2, 0.7], np.float32)
ENDS = (14.0, -14.0)
OF_ONE = np.array([0.5, -0.3, 0.2])


def error_of_x(log_snr):
    """|D - x|^2: some of x is missing, less where there is signal."""
    return np.sum((OF_ONE / (1.0 + np.exp(0.5 * log_snr))) ** 2)


def guess(theta, z, log_snr):
    return jnp.asarray(X, z.dtype) + theta * jnp.asarray(OF_ONE, z.dtype) * jax.nn.sigmoid(-0.5 * log_snr)


DENOISER = vd.Network(lambda key: jnp.ones(()), guess)


def built(schedule):
    return diffusion.vdm(DENOISER, schedule, shape=(3,), predict=predict.data)


def moved(schedule):
    """A learned schedule, and lam off its start."""
    lam = schedule.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.5 * rng.normal(size=leaf.shape).astype(np.float32), lam)


SCHEDULES = {
    "linear": diffusion.linear_log_snr(*ENDS),
    "cosine": diffusion.cosine_log_snr(*ENDS),
    "learned": diffusion.learned_log_snr(*ENDS, 8),
    "monotone": diffusion.monotone_log_snr(*ENDS, 8),
}


def mean_loss(weight, name, num_times=4096):
    """Minus the mean over a midpoint lattice of times, float64, of the weighted diffusion term."""
    model = built(SCHEDULES[name])
    params = model.init(jax.random.key(0))._replace(lam=moved(SCHEDULES[name]))
    terms_at = diffusion.weighted_terms(model, weight)
    u = (np.arange(num_times) + 0.5) / num_times

    def mean(params, u):
        losses = jax.vmap(
            lambda u: -terms_at(jax.random.key(0), params, jnp.asarray(X, u.dtype), u)["diffusion"]
        )
        return jnp.mean(losses(u))

    return float(toys.in_float64(mean, params, u))


def normal_density(x, mean, std):
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))


# Each paper's loss in its own terms, for a linear log-SNR where it depends on the schedule.


def simple():
    """Ho et al.: E_t |eps_hat - eps|^2, halved; the error of the noise is that of x by alpha / sigma."""

    def at(t):
        log_snr = ENDS[0] + (ENDS[1] - ENDS[0]) * t
        alpha, sigma = cases.scales(log_snr)
        return (alpha / sigma) ** 2 * error_of_x(log_snr)

    return 0.5 * quad(at, 0, 1, limit=400)[0]


def min_snr(gamma=5.0):
    """Hang et al., eq. for a prediction of x: E_t min(SNR, gamma) |x_hat - x|^2, halved."""

    def at(t):
        log_snr = ENDS[0] + (ENDS[1] - ENDS[0]) * t
        return min(np.exp(log_snr), gamma) * error_of_x(log_snr)

    kink = (np.log(gamma) - ENDS[0]) / (ENDS[1] - ENDS[0])
    return 0.5 * quad(at, 0, 1, limit=400, points=[kink])[0]


def edm(mean=-1.2, std=1.2, s=0.5):
    """Karras et al.: E over log n ~ N(-1.2, 1.2^2) of (n^2 + s^2) / (n s)^2 |D - x|^2, halved; D of x + n eps."""

    def at(log_n):
        n = np.exp(log_n)
        return normal_density(log_n, mean, std) * (n**2 + s**2) / (n * s) ** 2 * error_of_x(-2 * np.log(n))

    return 0.5 * quad(at, -0.5 * ENDS[0], -0.5 * ENDS[1], limit=400)[0]


def elbo():
    """Kingma et al.: 1/2 int SNR |x - x_hat|^2 dlog_snr."""
    return 0.5 * quad(lambda at: np.exp(at) * error_of_x(at), *ENDS[::-1], limit=400)[0]


def sigmoid(bias=2.0):
    return (
        0.5
        * quad(lambda at: np.exp(at) * error_of_x(at) / (1 + np.exp(at - bias)), *ENDS[::-1], limit=400)[0]
    )


LOSSES = {
    "elbo": (weights.elbo, elbo),
    "simple": (weights.simple, simple),
    "min_snr(5)": (weights.min_snr(), min_snr),
    "min_snr(1)": (weights.min_snr(1.0), lambda: min_snr(1.0)),
    "edm": (weights.edm(), edm),
    "edm, other": (weights.edm(-0.5, 1.0, 0.8), lambda: edm(-0.5, 1.0, 0.8)),
    "sigmoid": (weights.sigmoid(), sigmoid),
    "sigmoid(-1)": (weights.sigmoid(-1.0), lambda: sigmoid(-1.0)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_weight_is_its_papers_loss(name):
    weight, exact = LOSSES[name]
    assert mean_loss(weight, "linear", 16384) == pytest.approx(exact(), rel=1e-4)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "linear"])
@pytest.mark.parametrize("name", ["elbo", "edm", "sigmoid"])
def test_expectation_does_not_depend_on_the_schedule(name, schedule):
    """Where the weight does not name the density: only the ends matter."""
    weight, exact = LOSSES[name]
    # A cosine gives the ends little time: the lattice is coarse there.
    assert mean_loss(weight, schedule, 65536) == pytest.approx(exact(), rel=2e-3)


def test_simple_does_depend_on_it():
    assert abs(mean_loss(weights.simple, "learned") / simple() - 1) > 0.05


def test_weights_at_single_points():
    """By hand: value, and shape and dtype under strict promotion."""
    for at, density in ((-3.0, 0.2), (0.0, 0.05), (4.0, 1.7)):
        values = {
            weights.elbo: 1.0,
            weights.simple: density,
            weights.min_snr(2.0): density * min(1.0, 2.0 / np.exp(at)),
            weights.edm(-1.0, 0.7, 0.4): normal_density(at, 2.0, 1.4) * (1 + np.exp(-at) / 0.4**2),
            weights.sigmoid(1.0): 1 / (1 + np.exp(at - 1.0)),
        }
        for weight, expected in values.items():
            found = weight(jnp.float32(at), jnp.float32(density))
            assert found.shape == () and found.dtype == jnp.float32
            assert float(found) == pytest.approx(expected, rel=1e-5)


def test_edms_weight_is_finite_where_one_over_snr_is_not():
    for at in (-95.0, -40.0, 95.0):
        value, slope = jax.value_and_grad(weights.edm())(jnp.float32(at), jnp.float32(0.1))
        assert np.isfinite(value) and np.isfinite(slope)
    found = weights.edm(-20.0, 4.0)(jnp.float32(-95.0), jnp.float32(0.1))
    expected = normal_density(-95.0, 40.0, 8.0) + np.exp(95.0) * normal_density(-95.0, 40.0, 8.0) / 0.25
    assert float(found) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_elbos_weight_is_the_elbo_in_continuous_time(prediction, key):
    """Term by term, with the gradient by theta; lam gets none, though the model's own terms teach it."""
    model = diffusion.vdm(
        cases.tiny_denoiser(3), SCHEDULES["learned"], shape=(3,), predict=getattr(predict, prediction)
    )
    params = model.init(jax.random.key(1))._replace(lam=moved(SCHEDULES["learned"]))
    terms_at = diffusion.weighted_terms(model, weights.elbo)
    x, u = jnp.asarray(X), jnp.float32(0.37)
    found, expected = (jax.jit(f)(key, params, x, u) for f in (terms_at, model.elbo_terms_at))
    assert set(found) == set(expected) == {"prior", "reconstruction", "diffusion"}
    for name in expected:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5), name
    slopes, own = (
        jax.grad(lambda p, f=f: sum(f(key, p, x, u).values()))(params)
        for f in (terms_at, model.elbo_terms_at)
    )
    for one, other in zip(jax.tree.leaves(slopes.theta), jax.tree.leaves(own.theta), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.max(np.abs(other)))
    assert not np.any(slopes.lam) and np.any(own.lam)


def test_weights_of_a_chain(key):
    """A chain has a density too: the probability of a step, per unit of log-SNR that it crosses."""
    log_snrs = np.float64(diffusion.log_snrs_of(np.array([0.05, 0.2, 0.5, 0.6])))
    model = diffusion.ddpm(DENOISER, [0.05, 0.2, 0.5, 0.6], shape=(3,), predict=predict.data)
    params = model.init(key)
    terms_at = diffusion.weighted_terms(model, weights.elbo)
    for i in range(3):
        error = np.exp(log_snrs[i + 1]) * error_of_x(log_snrs[i + 1])
        expected = -0.5 * 3 * (log_snrs[i] - log_snrs[i + 1]) * error
        found = terms_at(key, params, jnp.asarray(X), jnp.float32((i + 0.5) / 3))["diffusion"]
        assert float(found) == pytest.approx(expected, rel=1e-4)
    assert float(
        diffusion.weighted_terms(model, weights.simple)(key, params, jnp.asarray(X), jnp.float32(0.0))[
            "diffusion"
        ]
    ) == pytest.approx(-0.5 * np.exp(log_snrs[1]) * error_of_x(log_snrs[1]), rel=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weights.min_snr(0.0), "gamma: got 0.0, expected a positive number"),
        (lambda: weights.min_snr(float("nan")), "gamma: got nan"),
        (lambda: weights.edm(std=0.0), "std, data_scale: got 0.0, 0.5"),
        (lambda: weights.edm(data_scale=-1.0), "std, data_scale: got 1.2, -1.0"),
    ],
)
def test_settings_that_make_no_weight_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_raw_keys_are_refused(key):
    model = built(SCHEDULES["linear"])
    with pytest.raises(TypeError, match="expected a typed key"):
        diffusion.weighted_terms(model, weights.elbo)(
            jax.random.PRNGKey(0), model.init(key), jnp.asarray(X), jnp.float32(0.5)
        )
