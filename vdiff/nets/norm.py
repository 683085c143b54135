r"""Normalisation of one datum without parameters of its own: scale and shift come from the time embedding.

    norm(h) = (h - mean h) / sqrt(var h + 1e-6)        film(h, scale, shift) = (1 + scale) h + shift

Mean and variance are taken in float32 whatever h is, and the result has the dtype of h.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

EPSILON = 1e-6


def _standardize(h: Array, axes: tuple[int, ...]) -> Array:
    wide = h.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axes, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axes, keepdims=True)
    return (centred * lax.rsqrt(variance + EPSILON)).astype(h.dtype)


def layer_norm(h: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Standardize each vector of the last axis.

    Args:
        h: [..., C].

    Returns:
        [..., C], of mean 0 and variance 1 along the last axis.
    """
    return _standardize(h, (-1,))


def group_norm(h: Float[Array, "H W C"], groups: int) -> Float[Array, "H W C"]:
    """Standardize each group of neighbouring channels, over all positions.

    Args:
        h: [H, W, C].
        groups: number of groups, a divisor of C.

    Returns:
        [H, W, C], of mean 0 and variance 1 within each group of one datum.
    """
    height, width, channels = h.shape
    grouped = h.reshape(height * width, groups, channels // groups)
    return _standardize(grouped, (0, 2)).reshape(h.shape)


def film(
    h: Float[Array, "... C"], scale: Float[Array, " C"], shift: Float[Array, " C"]
) -> Float[Array, "... C"]:
    """Scale and shift each channel: (1 + scale) h + shift.

    Args:
        h: [..., C].
        scale: [C], zero for no change.
        shift: [C].

    Returns:
        [..., C].

    Source:
        Perez et al., FiLM: Visual Reasoning with a General Conditioning Layer, 2018.
    """
    ones = (1,) * (h.ndim - 1)
    return h * (1 + scale).reshape(*ones, -1) + shift.reshape(*ones, -1)
