r"""Noise schedules in continuous time: log_snr = apply(lam, t), falling from t = 0, the data, to t = 1, the noise.

With both ends fixed the ELBO in continuous time does not depend on what lies between: a
schedule then only decides where the estimate spends its draws.

Any Gaussian process a(t) x + s(t) eps of the literature is a variance-preserving one in other units,

    a x + s eps = scale * z,   log_snr = 2 log(a / s),   scale = sqrt(a^2 + s^2)

    variance preserving    scale = 1
    variance exploding     x + s eps              scale = 1 / alpha
    rectified flow         (1 - t) x + t eps      scale = 1 / (alpha + sigma)

and a `Schedule` carries its scale as a function of log-SNR.

Source: Kingma et al., Variational Diffusion Models, 2021; Song et al., Score-Based Generative Modeling through
Stochastic Differential Equations, 2021; Karras et al., 2022; Liu, Gong and Liu, Flow Straight and Fast, 2023.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from vdiff.diffusion.forward import alpha, sigma
from vdiff.types import Key, PyTree

# The part of time that is shared evenly by a learned schedule's stretches, whatever it learns.
_EVEN = 1e-3


class Schedule(NamedTuple):
    """Hold log-SNR as a function of time, in the form of a `Network`, and the units that its process is written in.

    Attributes:
        init: `(key) -> lam`; `()` when fixed.
        apply: `(lam, t []) -> log_snr []`, falling in t from 0 to 1.
        scale: `(log_snr) -> []`, the factor from z to the process of the literature.
    """

    init: Callable[[Key], PyTree]
    apply: Callable[[PyTree, Array], Array]
    scale: Callable[[Array], Array] = jnp.ones_like


def linear_log_snr(log_snr_max: float = 13.3, log_snr_min: float = -5.0) -> Schedule:
    """Let log-SNR fall linearly in time."""
    _check_ends(log_snr_max, log_snr_min)
    return _fixed(lambda t: log_snr_max + (log_snr_min - log_snr_max) * t)


def cosine_log_snr(log_snr_max: float = 13.3, log_snr_min: float = -5.0) -> Schedule:
    """Let alpha fall as a cosine: log_snr = -2 log tan(angle), the angle linear in time.

    Source: Nichol and Dhariwal, 2021; in log-SNR by Hoogeboom et al., Simple Diffusion, 2023.
    """
    _check_ends(log_snr_max, log_snr_min)
    # The angle from either end: near a right angle a cosine has lost its digits, the sine of what is left has not.
    first, last = math.atan(math.exp(-0.5 * log_snr_max)), math.atan(math.exp(0.5 * log_snr_min))
    whole = 0.5 * math.pi - first - last

    def apply(t: Array) -> Array:
        angle, left = first + whole * t, last + whole * (1.0 - t)
        return 2.0 * (jnp.log(jnp.sin(left)) - jnp.log(jnp.sin(angle)))

    return _fixed(apply)


def variance_preserving(rate_first: float = 0.1, rate_last: float = 20.0, time_min: float = 1e-3) -> Schedule:
    """Take the limit of `linear_betas`: alpha^2 = exp(-int rate), the rate linear in time.

    Args:
        rate_first: rate at time 0.
        rate_last: rate at time 1.
        time_min: where t = 0 lies; log-SNR is infinite at time 0.

    Source: Song et al., 2021, appendix C.
    """
    if not (0 < rate_first and 0 < rate_last and 0 < time_min < 1):
        raise ValueError(
            f"rates and time_min: got {rate_first}, {rate_last}, {time_min}, expected positive rates "
            "and a time in (0, 1)"
        )

    def apply(t: Array) -> Array:
        time = time_min + (1.0 - time_min) * t
        return -jnp.log(jnp.expm1(time * rate_first + 0.5 * jnp.square(time) * (rate_last - rate_first)))

    return _fixed(apply)


def variance_exploding(noise_min: float = 0.01, noise_max: float = 50.0) -> Schedule:
    """Write x + s eps with s rising geometrically: log_snr = -2 log s, linear in time.

    Source: Song et al., 2021, appendix C.
    """
    _check_noise(noise_min, noise_max)
    schedule = linear_log_snr(-2.0 * math.log(noise_min), -2.0 * math.log(noise_max))
    return schedule._replace(scale=lambda log_snr: 1.0 / alpha(log_snr))


def edm(noise_min: float = 0.002, noise_max: float = 80.0, rho: float = 7.0) -> Schedule:
    """Write x + s eps with s^(1/rho) linear in time.

    Args:
        noise_min: s at t = 0, in units of x.
        noise_max: s at t = 1.
        rho: how much of the time small noise gets.

    Source: Karras et al., 2022, eq. 5.
    """
    _check_noise(noise_min, noise_max)
    if not rho > 0:
        raise ValueError(f"rho: got {rho}, expected a positive number, e.g. 7")
    first, last = noise_min ** (1.0 / rho), noise_max ** (1.0 / rho)
    return Schedule(
        lambda key: (),
        lambda lam, t: -2.0 * rho * jnp.log(first + (last - first) * t),
        lambda log_snr: 1.0 / alpha(log_snr),
    )


def rectified_flow(time_min: float = 1e-3, time_max: float = 0.999) -> Schedule:
    """Write (1 - s) x + s eps, s linear in time: log_snr = 2 log((1 - s) / s).

    Args:
        time_min: s at t = 0; log-SNR is infinite at s = 0.
        time_max: s at t = 1; log-SNR is minus infinite at s = 1.

    Source: Liu, Gong and Liu, 2023; Lipman et al., Flow Matching for Generative Modeling, 2023.
    """
    if not 0 < time_min < time_max < 1:
        raise ValueError(
            f"time_min, time_max: got {time_min}, {time_max}, expected 0 < time_min < time_max < 1"
        )

    whole = time_max - time_min

    def apply(lam: PyTree, t: Array) -> Array:
        # 1 - s from its own end, where s itself has no digits left for it.
        return 2.0 * (jnp.log((1.0 - time_max) + whole * (1.0 - t)) - jnp.log(time_min + whole * t))

    return Schedule(lambda key: (), apply, lambda log_snr: 1.0 / (alpha(log_snr) + sigma(log_snr)))


def learned_log_snr(log_snr_max: float = 13.3, log_snr_min: float = -5.0, num_bins: int = 32) -> Schedule:
    """Learn how much of the time each stretch of log-SNR gets; both ends are pinned.

    log-SNR is piecewise linear in time, each of `num_bins` equal stretches taking a share of it,

        share_i = (1 - 1/1000) softmax(lam)_i + 1/1000 / num_bins

    which never vanishes: each log-SNR is visited whatever lam, and the estimate stays unbiased. So the density of times
    over log-SNR is a histogram, and where it settles is proportional to the root of the squared loss there.

    Args:
        log_snr_max: at t = 0.
        log_snr_min: at t = 1.
        num_bins: stretches.

    Returns:
        A `Schedule` whose lam is [num_bins], zeros at the start: linear.

    Raises:
        ValueError: if the ends do not fall, or `num_bins` is less than one.
    """
    _check_ends(log_snr_max, log_snr_min)
    if num_bins < 1:
        raise ValueError(f"num_bins: got {num_bins}, expected at least 1")
    width = (log_snr_min - log_snr_max) / num_bins

    def apply(lam: Float[Array, " num_bins"], t: Array) -> Array:
        share = (1.0 - _EVEN) * jax.nn.softmax(lam) + _EVEN / num_bins
        ends = jnp.cumsum(share)
        i = jnp.minimum(jnp.searchsorted(stop_gradient(ends), t, side="right"), num_bins - 1)
        start = jnp.where(i == 0, 0.0, ends[i - 1])
        # The last stretch ends at one, whatever rounding made of the sum.
        stop = jnp.where(i == num_bins - 1, 1.0, ends[i])
        return log_snr_max + width * (i.astype(share.dtype) + (t - start) / (stop - start))

    return Schedule(lambda key: jnp.zeros(num_bins), apply)


def monotone_log_snr(log_snr_max: float = 13.3, log_snr_min: float = -5.0, num_units: int = 32) -> Schedule:
    """Learn a smooth monotone function of time, its two ends pinned by normalising.

        raw(t) = e^l t + 1/n sum_i e^{w_i} sigmoid(4 e^{a_i} (t - c_i))
        log_snr = log_snr_max + (log_snr_min - log_snr_max) (raw(t) - raw(0)) / (raw(1) - raw(0))

    Args:
        log_snr_max: at t = 0.
        log_snr_min: at t = 1.
        num_units: n.

    Returns:
        A `Schedule` with lam {"slope": l, "height": w, "steepness": a, "centre": c}.

    Raises:
        ValueError: if the ends do not fall, or `num_units` is less than one.

    Source: after Kingma et al., Variational Diffusion Models, 2021, appendix H.
    """
    _check_ends(log_snr_max, log_snr_min)
    if num_units < 1:
        raise ValueError(f"num_units: got {num_units}, expected at least 1")

    def init(key: Key) -> PyTree:
        return {
            "slope": jnp.zeros(()),
            "height": jnp.zeros(num_units),
            "steepness": jnp.log1p(5.0 * jax.random.uniform(key, (num_units,))),
            "centre": jnp.linspace(0.0, 1.0, num_units),
        }

    def raw(lam: PyTree, t: Array) -> Array:
        bumps = jax.nn.sigmoid(4.0 * jnp.exp(lam["steepness"]) * (t - lam["centre"]))
        return jnp.exp(lam["slope"]) * t + jnp.mean(jnp.exp(lam["height"]) * bumps)

    def apply(lam: PyTree, t: Array) -> Array:
        first, last = raw(lam, jnp.zeros_like(t)), raw(lam, jnp.ones_like(t))
        return log_snr_max + (log_snr_min - log_snr_max) * (raw(lam, t) - first) / (last - first)

    return Schedule(init, apply)


def _fixed(log_snr: Callable[[Array], Array]) -> Schedule:
    return Schedule(lambda key: (), lambda lam, t: log_snr(t))


def _check_ends(log_snr_max: float, log_snr_min: float) -> None:
    if not log_snr_min < log_snr_max:
        raise ValueError(
            f"log_snr_max, log_snr_min: got {log_snr_max}, {log_snr_min}, expected a fall; exchange them"
        )


def _check_noise(noise_min: float, noise_max: float) -> None:
    if not 0 < noise_min < noise_max:
        raise ValueError(f"noise_min, noise_max: got {noise_min}, {noise_max}, expected 0 < min < max")
