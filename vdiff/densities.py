r"""Log-densities and closed-form divergences, elementwise unless said, in nats.

    log N(x; loc, scale^2) = -1/2 ((x - loc) / scale)^2 - log scale - 1/2 log 2 pi
    KL( N(m, s^2) || N(0, 1) ) = 1/2 (m^2 + s^2 - 1) - log s

A scale is passed as its logarithm where a network produces it: nothing then over- or underflows
before it must.
"""

import jax
import jax.numpy as jnp
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
