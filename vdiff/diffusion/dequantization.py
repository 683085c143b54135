r"""From a density of embedded data to the mass of integer levels: noise that stays within a level's bin.

    level k of n lies at y_k = (2 k + 1) / n - 1, its bin is y_k + [-1/n, 1/n), and

    P(k) = int_bin p(y) dy = E_{q(u)} [ p(y_k + u) / q(u) ],     log P(k) >= E_q [ log p(y_k + u) - log q(u) ]

    uniform             q = n / 2 in every dimension, so  -log q = d log(2 / n):  the scaling's log-Jacobian
    truncated normal    q = N(0, scale^2) within the bin, renormalised

The bins of all levels fill [-1, 1); mass that the density puts outside counts for no level: the bound stays a bound.
The noise to take is the one that the model was trained on. A diffusion that saw the bare y_k has a density of narrow
peaks, as wide as the noise of t = 0, scale = exp(-log_snr(0) / 2): a truncated normal of that scale fits them and
starts the path where the denoiser was trained. One that saw y_k + u with uniform u has a density to be averaged over
the bin.

Source: Theis, van den Oord and Bethge, A Note on the Evaluation of Generative Models, 2016, 3.1 (uniform); Zheng et
al., Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs, 2023, 3.2 (truncated normal).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import erf, logsumexp
from jaxtyping import Array, Float

from vdiff.densities import standard_normal_log_prob
from vdiff.diffusion.data_likelihoods import levels
from vdiff.diffusion.model import Diffusion
from vdiff.types import Key, LogProb, Params, check_key

BinNoise = Callable[[Key, Params, tuple[int, ...], float], tuple[Array, Array]]
"""`(key, params, shape, half) -> (u [*shape] in [-half, half], log q(u) [])`, nats."""


def uniform_noise() -> BinNoise:
    """Build noise that fills the bin evenly: log q = -d log(2 half).

    Returns:
        A `BinNoise`.

    Source: Theis, van den Oord and Bethge, 2016, 3.1.
    """

    def draw(key: Key, params: Params, shape: tuple[int, ...], half: float) -> tuple[Array, Array]:
        u = half * jax.random.uniform(check_key(key), shape, minval=-1.0)
        return u, jnp.asarray(-u.size * math.log(2.0 * half), u.dtype)

    return draw


def truncated_normal_noise(scale: float | Callable[[Params], Array]) -> BinNoise:
    """Build normal noise that is kept within the bin.

        q(u) = N(u; 0, scale^2) / erf(half / (sqrt(2) scale))   on [-half, half]

    Args:
        scale: a standard deviation in embedded units, or `(params) -> []`, e.g. `start_scale(diffusion)`.

    Returns:
        A `BinNoise`.

    Raises:
        ValueError: if a scale that is a number is not positive.

    Source: Zheng et al., 2023, 3.2.
    """
    if not callable(scale) and not scale > 0:
        raise ValueError(
            f"scale: got {scale}, expected a positive standard deviation, or start_scale(diffusion)"
        )

    def draw(key: Key, params: Params, shape: tuple[int, ...], half: float) -> tuple[Array, Array]:
        spread = jnp.asarray(scale(params) if callable(scale) else scale, jnp.float32)
        bound = half / spread
        eps = jax.random.truncated_normal(check_key(key), -bound, bound, shape)
        log_kept = jnp.log(erf(bound / math.sqrt(2.0)))
        log_q = jnp.sum(standard_normal_log_prob(eps)) - eps.size * (jnp.log(spread) + log_kept)
        return spread * eps, log_q

    return draw


def start_scale(diffusion: Diffusion) -> Callable[[Params], Float[Array, ""]]:
    """Read off the noise of z_0 in embedded units, sigma_0 / alpha_0 = exp(-log_snr(0) / 2).

    Args:
        diffusion: whose log-SNR at t = 0 is read.

    Returns:
        `(params) -> []`, for `truncated_normal_noise`.
    """
    return lambda params: jnp.exp(-0.5 * diffusion.log_snr(params, jnp.zeros(())))


def dequantized_log_prob(
    log_prob: Callable[[Key, Params, Array], Array],
    num_levels: int,
    noise: BinNoise | None = None,
    *,
    num_samples: int = 1,
    chunk_size: int = 1,
) -> Callable[[Key, Params, Array], LogProb]:
    """Turn the log-density of embedded data into a bound on the log-mass of integer levels.

        log P(k) >= log 1/K sum_j p(y_k + u_j) / q(u_j)   in expectation, tight as K grows

    Args:
        log_prob: `(key, params, y) -> []`, nats per unit of y, e.g. `ode_log_prob(diffusion)`. With K = 1 it may be an
            unbiased estimate, as by `hutchinson`. With more it must be exact: noise in a logarithm raises the mean of
            the exponentials, and the value would bound nothing.
        num_levels: n, how many values an integer can take, as in `levels(n)`.
        noise: `uniform_noise()` when left out, or `truncated_normal_noise(start_scale(diffusion))`.
        num_samples: K, draws of the noise; one is the plain bound.
        chunk_size: how many of them are held in memory at once.

    Returns:
        `(key, params, k) -> LogProb(value, std_error, ess, k_hat)` of one datum, nats, a mass: with K = 1 the value's
        mean is the bound, std_error is infinite. k_hat is NaN: a handful of draws has no tail to judge. k is an integer
        array; a level outside 0..n-1 gives NaN.

    Raises:
        TypeError: at trace time, if k holds no integers.
        ValueError: if there are fewer than two levels, or `num_samples` or `chunk_size` is less than one.

    Source: Ho et al., Flow++, 2019, 3.1; Burda, Grosse and Salakhutdinov, 2016 (several draws).
    """
    if num_levels < 2:
        raise ValueError(
            f"num_levels: got {num_levels}, expected at least 2; count the values a pixel can take"
        )
    if num_samples < 1 or chunk_size < 1:
        raise ValueError(
            f"num_samples, chunk_size: got {num_samples}, {chunk_size}, expected at least 1 of each"
        )
    noise = noise or uniform_noise()
    half = 1.0 / num_levels
    embed = levels(num_levels).embed

    def estimate(key: Key, params: Params, k: Array) -> LogProb:
        if not jnp.issubdtype(k.dtype, jnp.integer):
            raise TypeError(
                f"k: got {k.dtype}, expected an integer array of levels 0..{num_levels - 1}; give real data to the "
                "log-density itself"
            )
        y = embed(k)

        def log_weight(key: Key) -> Array:
            key_noise, key_density = jax.random.split(key)
            u, log_q = noise(key_noise, params, y.shape, half)
            return log_prob(key_density, params, y + u) - log_q

        keys = jax.random.split(check_key(key), num_samples)
        log_w = jax.lax.map(log_weight, keys, batch_size=min(chunk_size, num_samples))
        is_level = (k >= 0) & (k <= num_levels - 1)
        log_w = jnp.where(jnp.all(is_level), log_w, jnp.nan)
        log_sum = logsumexp(log_w)
        inverse_ess = jnp.exp(logsumexp(2.0 * log_w) - 2.0 * log_sum)
        if num_samples == 1:
            std_error = jnp.full_like(log_sum, jnp.inf)
        else:
            spread = jnp.maximum(inverse_ess - 1.0 / num_samples, 0.0)
            std_error = jnp.sqrt(spread * (num_samples / (num_samples - 1)))
        unknown = jnp.full_like(log_sum, jnp.nan)
        return LogProb(log_sum - math.log(num_samples), std_error, 1.0 / inverse_ess, unknown)

    return estimate
