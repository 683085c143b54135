"""Both ends of time, with bf16 inside the network: the diffusion term within 1e-3 of float64, value and gradient.

The network's own rounding is not judged: what it returned, and how it takes a cotangent, is given to float64 formulas
of the term. Its "shift" is added in float32, so that its gradient is the term's slope by the output.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit

import vdiff as vd
from tests.diffusion import cases
from vdiff import diffusion
from vdiff.diffusion import predict, weights

DATA_SCALE, DIMS = 0.4, 3
X = np.array([0.3, -0.45, 0.1], np.float32)
LOG_SNRS = [30.0, 20.0, 13.3, -5.0, -20.0, -30.0]
PREDICTIONS = {
    "noise": predict.noise,
    "data": predict.data,
    "velocity": predict.velocity,
    "preconditioned": predict.preconditioned(DATA_SCALE),
}
TOLERANCE = 1e-3
SMALLEST = 1e-37  # below it float32 is not itself: EDM's weight at log-SNR -30


def apply(theta, z, log_snr):
    half = lambda v: v.astype(jnp.bfloat16)  # noqa: E731
    h = half(theta["weight"]) @ half(z) + half(theta["time"]) * half(0.1 * log_snr)
    return h.astype(jnp.float32) + theta["shift"]


def init(key):
    keys = jax.random.split(key, 3)
    return {
        "weight": 0.5 * jax.random.normal(keys[0], (DIMS, DIMS)),
        "time": 0.2 * jax.random.normal(keys[1], (DIMS,)),
        "shift": 0.3 * jax.random.normal(keys[2], (DIMS,)),
    }


NETWORK = vd.Network(init, apply)


def target_and_gain(name, eps, log_snr):
    """The target, its slope by x, and the gain, float64."""
    alpha, sigma = cases.scales(log_snr)
    root, x = np.sqrt((DATA_SCALE * alpha) ** 2 + sigma**2), X.astype(np.float64)
    return {
        "noise": (eps, 0.0, 1.0),
        "data": (x, 1.0, -alpha / sigma),
        "velocity": (alpha * eps - sigma * x, -sigma, alpha),
        "preconditioned": (
            (sigma / DATA_SCALE * x - DATA_SCALE * alpha * eps) / root,
            sigma / DATA_SCALE / root,
            -DATA_SCALE * alpha / root,
        ),
    }[name]


def expected(name, theta, key, log_snr, factor, constant=0.0):
    """constant + factor |eps_hat - eps|^2, its gradient by theta and by x; log_snr as float32 has it."""
    z, eps = diffusion.forward_marginal(key, jnp.asarray(X), jnp.float32(log_snr))
    out, pull_back = jax.vjp(lambda theta, z: apply(theta, z, jnp.float32(log_snr)), theta, z)
    eps, out = np.float64(eps), np.float64(out)
    alpha, sigma = cases.scales(np.float64(np.float32(log_snr)))
    np.testing.assert_allclose(z, alpha * X + sigma * eps, atol=1e-6)
    target, by_x, gain = target_and_gain(name, eps, np.float64(np.float32(log_snr)))
    error = out - target
    assert np.linalg.norm(error) > 0.05
    cotangent = 2.0 * factor * gain**2 * error
    by_theta, by_z = pull_back(jnp.asarray(cotangent, jnp.float32))
    by_x = alpha * np.float64(by_z) - by_x * cotangent
    return constant + factor * gain**2 * np.sum(error**2), (by_theta, by_x), cotangent


def check(found, exact):
    """Value relatively; each leaf of the gradient by its norm, "shift" by each element."""
    (value, (params, by_x)), (exact_value, (by_theta, exact_by_x), cotangent) = found, exact
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(exact_value, rel=TOLERANCE, abs=SMALLEST)
    np.testing.assert_allclose(params.theta["denoiser"]["shift"], cotangent, rtol=TOLERANCE, atol=SMALLEST)
    for name, leaf in {**by_theta, "x": exact_by_x}.items():
        own = by_x if name == "x" else params.theta["denoiser"][name]
        distance = np.linalg.norm(np.float64(own) - np.float64(leaf))
        assert distance <= TOLERANCE * np.linalg.norm(np.float64(leaf)) + SMALLEST, name


def evaluated(function, params):
    """Value and gradient by params and x of `(params, x) -> []`; not compiled, which would round bf16 elsewhere."""
    return jax.value_and_grad(function, argnums=(0, 1))(params, jnp.asarray(X))


def built(name, schedule, **settings):
    return diffusion.vdm(NETWORK, schedule, shape=(DIMS,), predict=PREDICTIONS[name], **settings)


@pytest.mark.parametrize("log_snr", LOG_SNRS)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_every_prediction(name, log_snr, key):
    """A linear schedule at the time of each log-SNR: 1/2 60 |eps_hat - eps|^2."""
    model = built(name, diffusion.linear_log_snr(30.0, -30.0))
    params, u = model.init(jax.random.key(1)), jnp.float32((30.0 - log_snr) / 60.0)
    rate = model.rate_at(key, params, jnp.asarray(X), u)
    assert float(rate.log_snr) == pytest.approx(log_snr, abs=1e-5)
    found = evaluated(lambda params, x: model.rate_at(key, params, x, u).value, params)
    check(found, expected(name, params.theta["denoiser"], key, rate.log_snr, -30.0))


# schedule, log_snr(t) in float64 as a function of the time from an end: (t from the left, 1 - t from the right)
def _angle(t, left):
    first = np.arctan(np.exp(-15.0))
    whole = np.pi / 2 - 2 * first
    return 2 * (np.log(np.sin(first + whole * left)) - np.log(np.sin(first + whole * t)))


def _straight(t, left, end=3e-7):
    return 2 * (np.log(end + (1 - 2 * end) * left) - np.log(end + (1 - 2 * end) * t))


def _preserving(t, left):
    time = 1e-12 + (1 - 1e-12) * t
    return -np.log(np.expm1(0.1 * time + 0.5 * time**2 * 59.9))


def _karras(t, left, low=3e-7 ** (1 / 7), high=3e6 ** (1 / 7)):
    return -14.0 * np.log(low + (high - low) * t)


SCHEDULES = {
    "linear": (diffusion.linear_log_snr(30.0, -30.0), lambda t, left: 30.0 - 60.0 * t),
    "cosine": (diffusion.cosine_log_snr(30.0, -30.0), _angle),
    "variance_preserving": (diffusion.variance_preserving(0.1, 60.0, 1e-12), _preserving),
    "variance_exploding": (
        diffusion.variance_exploding(3e-7, 3e6),
        lambda t, left: -2 * (np.log(3e-7) + t * np.log(1e13)),
    ),
    "edm": (diffusion.edm(3e-7, 3e6), _karras),
    "rectified_flow": (diffusion.rectified_flow(3e-7, 1 - 3e-7), _straight),
    "learned": (diffusion.learned_log_snr(30.0, -30.0, 8), None),
    "monotone": (diffusion.monotone_log_snr(30.0, -30.0, 8), None),
}


def exact_slope(name, lam, u):
    """d log_snr / du at u, float64; differences look inwards."""
    if name == "learned":
        share = np.exp(np.float64(lam)) / np.exp(np.float64(lam)).sum()
        share = 0.999 * share + 0.001 / 8
        return -60.0 / 8 / share[0 if u < 0.5 else -1]
    if name == "monotone":
        lam = {k: np.float64(v) for k, v in lam.items()}
        bump = lambda t: 1 / (1 + np.exp(-4 * np.exp(lam["steepness"]) * (t - lam["centre"])))  # noqa: E731
        height, slope = np.exp(lam["height"]), np.exp(lam["slope"])
        rise = slope + np.mean(height * (bump(1.0) - bump(0.0)))
        at = slope + np.mean(height * bump(u) * (1 - bump(u)) * 4 * np.exp(lam["steepness"]))
        return -60.0 * at / rise
    log_snr = SCHEDULES[name][1]
    width = {"variance_preserving": 1e-15 if u == 0 else 1e-4}.get(name, 1e-10)
    width *= 1.0 if u < 0.5 else -1.0
    h = np.arange(4) * width
    at = log_snr(u + h, (1.0 - u) - h)
    return np.dot([-11.0, 18.0, -9.0, 2.0], at) / (6.0 * width)


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-24])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedules_ends(schedule, u, key):
    """By the prediction that is well-conditioned at both: the slope of the schedule is what is at stake."""
    model = built("velocity", SCHEDULES[schedule][0])
    params = model.init(jax.random.key(1))
    if schedule in {"learned", "monotone"}:
        rng = np.random.default_rng(0)
        move = lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
        params = params._replace(lam=jax.tree.map(move, params.lam))
    rate = model.rate_at(key, params, jnp.asarray(X), jnp.float32(u))
    assert abs(float(rate.log_snr)) == pytest.approx(30.0, abs=1.0)
    slope = exact_slope(schedule, params.lam, u)
    assert float(rate.density) == pytest.approx(-1.0 / slope, rel=TOLERANCE)
    found = evaluated(lambda params, x: model.rate_at(key, params, x, jnp.float32(u)).value, params)
    check(found, expected("velocity", params.theta["denoiser"], key, rate.log_snr, 0.5 * slope))


def normal_density(x, mean, std):
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))


# weight, and the same in float64 of log_snr and density
WEIGHTS = {
    "elbo": (weights.elbo, lambda at, density: 1.0),
    "simple": (weights.simple, lambda at, density: density),
    "min_snr": (weights.min_snr(), lambda at, density: density * min(1.0, 5.0 * np.exp(-at))),
    "edm": (
        weights.edm(),
        lambda at, density: normal_density(at, 2.4, 2.4) * (1 + np.exp(-at) / 0.25),
    ),
    "sigmoid": (weights.sigmoid(), lambda at, density: 1 / (1 + np.exp(at - 2.0))),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_every_weighting(name, weight, key):
    model = built(name, diffusion.linear_log_snr(30.0, -30.0))
    params = model.init(jax.random.key(1))
    terms_at = diffusion.weighted_terms(model, WEIGHTS[weight][0])
    key_rate = jax.random.split(key)[1]
    for log_snr in LOG_SNRS:
        u = jnp.float32((30.0 - log_snr) / 60.0)
        at = np.float64(model.rate_at(key_rate, params, jnp.asarray(X), u).log_snr)
        factor = -30.0 * WEIGHTS[weight][1](at, 1 / 60)
        found = evaluated(lambda params, x, u=u: terms_at(key, params, x, u)["diffusion"], params)
        check(found, expected(name, params.theta["denoiser"], key_rate, at, factor))


VARIANCES = {
    "beta": diffusion.beta_variance,
    "posterior": diffusion.posterior_variance,
    "optimal": lambda: diffusion.optimal_variance(cases.gaussian_mse()),
    "learned": lambda: diffusion.learned_variance(30.0, -30.0, 4),
}


CHAINS = {
    "wide": LOG_SNRS,
    "narrow": [30.0, 29.9, 13.3, 13.28, -5.0, -5.02, -13.0, -13.02, -20.0, -20.1],
}


def steps(log_snrs):
    """A schedule whose latents have those log-SNRs."""
    times, log_snrs = jnp.linspace(0.0, 1.0, len(log_snrs)), jnp.asarray(log_snrs, jnp.float32)
    return diffusion.Schedule(lambda key: (), lambda lam, t: jnp.interp(t, times, log_snrs))


@pytest.mark.parametrize("chain", ["wide", pytest.param("narrow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_every_step_of_a_chain(name, variance, chain, key):
    """Minus the KL of each step, times the number of steps: wide ones, and ones where SNR hardly falls."""
    schedule, num_steps = steps(CHAINS[chain]), len(CHAINS[chain]) - 1
    model = built(name, schedule, num_steps=num_steps + 1, reverse_variance=VARIANCES[variance]())
    params = model.init(jax.random.key(1))
    times = jnp.linspace(0.0, 1.0, num_steps + 1)
    log_snrs = np.float64(jax.vmap(schedule.apply, in_axes=(None, 0))((), times))
    np.testing.assert_allclose(log_snrs, CHAINS[chain], rtol=1e-5)
    for i, (s, t) in enumerate(zip(log_snrs[:-1], log_snrs[1:], strict=True)):
        (alpha_s, _), (alpha_t, sigma_t), kept = cases.scales(s), cases.scales(t), -np.expm1(t - s)
        log_v, log_beta = log_expit(-s) + np.log(kept), log_expit(-t) + np.log(kept)
        mse = cases.SCALE**2 * sigma_t**2 / (cases.SCALE**2 * alpha_t**2 + sigma_t**2)
        more = np.log1p((alpha_s * kept) ** 2 * mse / np.exp(log_v))
        log_ratio = {
            "beta": log_v - log_beta,
            "posterior": 0.0,
            "optimal": -more,
            "learned": 0.5 * (log_v - log_beta),
        }
        log_ratio = log_ratio[variance]
        spreads = 0.5 * DIMS * (np.expm1(log_ratio) - log_ratio)
        of_means = 0.5 * (alpha_s * kept * sigma_t / alpha_t) ** 2 * np.exp(log_ratio - log_v)
        u = jnp.float32((i + 0.5) / num_steps)
        found = evaluated(lambda params, x, u=u: model.rate_at(key, params, x, u).value, params)
        own = params.theta["denoiser"]
        check(found, expected(name, own, key, t, -num_steps * of_means, -num_steps * spreads))
        if variance == "learned":
            # d KL / d log eta = d/2 (1 - v / eta) - |mean difference|^2 / (2 eta); v's logit has slope 1/4 at zero.
            value, _, _ = expected(name, own, key, t, of_means)
            by_log_eta = -0.5 * DIMS * np.expm1(log_ratio) - value
            by_logit = -num_steps * by_log_eta * 0.25 * (log_beta - log_v)
            # log(v / eta) is known to 1e-6, whatever its size.
            floor = 1e-6 * DIMS * num_steps * (log_beta - log_v)
            assert float(found[1][0].phi.sum()) == pytest.approx(by_logit, rel=TOLERANCE, abs=floor), i
