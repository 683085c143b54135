r"""Log-densities and closed-form divergences, elementwise unless said, in nats.

    log N(x; loc, scale^2) = -1/2 ((x - loc) / scale)^2 - log scale - 1/2 log 2 pi
    KL( N(m, s^2) || N(0, 1) ) = 1/2 (m^2 + s^2 - 1) - log s

A scale is passed as its logarithm where a network produces it: nothing then over- or underflows
before it must.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jax.scipy.stats import norm
from jaxtyping import Array, Float

LOG_2_PI = 1.8378770664093453


def normal_log_prob(
    x: Float[Array, "*n"], loc: Float[Array, "*n"], log_scale: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """Evaluate log N(x; loc, exp(log_scale)^2), elementwise, nats."""
    return -0.5 * (jnp.square((x - loc) * jnp.exp(-log_scale)) + LOG_2_PI) - log_scale


def standard_normal_log_prob(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Evaluate log N(x; 0, 1), elementwise, nats."""
    return norm.logpdf(x)


def normal_log_cdf(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Evaluate log P(N(0, 1) <= x), elementwise, nats; value and slope right in either tail."""
    return _log_mills(x) - 0.5 * jnp.square(x)


def normal_interval_log_prob(
    centre: Float[Array, "*n"], half_width: Float[Array, "*#n"]
) -> Float[Array, "*n"]:
    """Evaluate the mass of N(0, 1) on an interval, elementwise, nats.

        log( Phi(c + h) - Phi(c - h) )

    with slopes that are right in either tail and for a narrow interval, where that is a difference of like numbers.

    Args:
        centre: c.
        half_width: h, positive; broadcast against c.
    """
    # A narrow one has the density at its centre times its width, and a correction.
    is_narrow = half_width * (1.0 + jnp.abs(centre)) < 0.2
    c, h = jnp.where(is_narrow, centre, 0.0), jnp.where(is_narrow, half_width, 0.1)
    curvature = jnp.square(h) * (jnp.square(c) - 1.0) / 6.0
    curvature += h**4 * (c**4 - 6.0 * jnp.square(c) + 3.0) / 120.0
    narrow = jnp.log(2.0 * h) - 0.5 * (jnp.square(c) + LOG_2_PI) + jnp.log1p(curvature)
    # Else Phi(b) (1 - Phi(a) / Phi(b)), on the side where the two differ most in their logarithms.
    b, a = half_width - jnp.abs(centre), -half_width - jnp.abs(centre)
    log_ratio = _log_mills(a) - _log_mills(b) - 2.0 * half_width * jnp.abs(centre)
    wide = normal_log_cdf(b) + jnp.log(-jnp.expm1(jnp.minimum(log_ratio, -0.1)))
    return jnp.where(is_narrow, narrow, wide)


def _log_mills(x: Array) -> Array:
    """Return log Phi(x) + x^2 / 2, which varies slowly on the left, where jax's own log_ndtr has lost its slope."""
    left = jnp.minimum(x, -8.0)
    inverse = 1.0 / jnp.square(left)
    series = inverse * (-1.0 + inverse * (3.0 + inverse * (-15.0 + 105.0 * inverse)))
    tail = jnp.log1p(series) - jnp.log(-left) - 0.5 * LOG_2_PI
    right = jnp.maximum(x, -8.0)
    return jnp.where(x < -8.0, tail, log_ndtr(right) + 0.5 * jnp.square(right))


def normal_entropy(log_scale: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Evaluate the entropy of N(., exp(log_scale)^2), elementwise, nats."""
    return log_scale + 0.5 * (1.0 + LOG_2_PI)


def normal_kl(loc: Float[Array, "*n"], log_scale: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Evaluate KL( N(loc, exp(log_scale)^2) || N(0, 1) ), elementwise, nats.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, 2014, appendix B.
    """
    return 0.5 * (jnp.square(loc) + jnp.expm1(2.0 * log_scale)) - log_scale


def bernoulli_log_prob(x: Array, logits: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Evaluate log Bernoulli(x; sigmoid(logits)), elementwise, nats; x in {0, 1} of any dtype."""
    return x.astype(logits.dtype) * logits - jax.nn.softplus(logits)


def categorical_log_prob(k: Array, logits: Float[Array, "*n levels"]) -> Float[Array, "*n"]:
    """Evaluate log Categorical(k; softmax(logits)), elementwise over the leading axes, nats.

    A level outside 0..levels-1 gives NaN.
    """
    k = k.astype(jnp.int32)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), k[..., None], axis=-1)[..., 0]
    return jnp.where((k >= 0) & (k < logits.shape[-1]), log_p, jnp.nan)


def discretized_logistic_log_prob(
    k: Array, loc: Float[Array, "*n"], log_scale: Float[Array, "*n"], levels: int
) -> Float[Array, "*n"]:
    """Evaluate the mass that a logistic puts on the bin of level k, elementwise, nats.

    Levels 0..levels-1 lie at 2 k / (levels - 1) - 1 in [-1, 1]; the outermost bins reach to infinity, so
    the masses sum to one. With a and b the bin's upper and lower edge in units of the scale,

        sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)),

    whose logarithm is finite in both tails.

    Source: Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow, 2016, A.1;
    Salimans et al., PixelCNN++, 2017, eq. 2.
    """
    half = 1.0 / (levels - 1)
    centred = (2.0 * half) * k.astype(loc.dtype) - 1.0 - loc
    inv_scale = jnp.exp(-log_scale)
    upper = jax.nn.log_sigmoid((centred + half) * inv_scale)
    lower = jax.nn.log_sigmoid((half - centred) * inv_scale)
    inside = jnp.log(-jnp.expm1(-2.0 * half * inv_scale))
    middle = upper + lower + inside
    return jnp.where(k == 0, upper, jnp.where(k == levels - 1, lower, middle))
