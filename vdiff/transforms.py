r"""Random transforms `(key, x) -> x` of one datum, on the device: integer grey levels to what a model takes.

    binarize(levels)     x_i = 1 with probability k_i / (levels - 1)               "dynamic" binarisation
    dequantize(levels)   y_i = (k_i + u_i) / levels, u_i ~ U[0, 1)                 continuous data

Dequantisation bounds the mass of an integer image: log P(k) >= E_u log p(k + u), and with y in units of
the whole range the density of k + u is that of y less num_dims * log(levels): `dequantize_log_det`.

Source: Salakhutdinov and Murray, On the Quantitative Analysis of Deep Belief Networks, 2008 (binarisation
by grey level); Theis, van den Oord and Bethge, A Note on the Evaluation of Generative Models, 2016, 3.1.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdiff.types import Key, check_key

Transform = Callable[[Key, Array], Array]


def binarize(levels: int) -> Transform:
    """Build the draw of a binary image whose pixel is 1 with probability k / (levels - 1).

    Called anew at every step it is dynamic binarisation; called once with a key per image, fixed.

    Args:
        levels: how many grey levels the integer pixels have, e.g. 256.

    Returns:
        `(key, k) -> x` of the same shape, int32 in {0, 1}.
    """

    def transform(key: Key, k: Array) -> Int[Array, "..."]:
        probability = k.astype(jnp.float32) / (levels - 1)
        return jax.random.bernoulli(check_key(key), probability).astype(jnp.int32)

    return transform


def dequantize(levels: int) -> Transform:
    """Build the draw of a continuous image y = (k + u) / levels in [0, 1), u uniform in [0, 1).

    Args:
        levels: how many grey levels the integer pixels have.

    Returns:
        `(key, k) -> y` of the same shape, float32.
    """

    def transform(key: Key, k: Array) -> Float[Array, "..."]:
        k = k.astype(jnp.float32)
        y = k + jax.random.uniform(check_key(key), k.shape)
        # A sum that float32 rounds up to the next level is taken back into its bin.
        return jnp.minimum(y, jnp.nextafter(k + 1.0, 0.0)) / levels

    return transform


def dequantize_log_det(levels: int, num_dims: int) -> float:
    """Return what to add to log p(y) of `dequantize`d data to bound log P(k), nats: -num_dims log(levels)."""
    return -num_dims * math.log(levels)
