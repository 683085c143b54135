"""Small convolutional encoder and decoder for images [H, W, C], one datum at a time."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from vdiff.nets.adapters import from_linen
from vdiff.types import Network


class _ConvEncoder(nn.Module):
    out_dim: int
    features: tuple[int, ...]
    hidden: int
    activation: Callable[[Array], Array]
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x
        for width in self.features:
            h = self.activation(nn.Conv(width, (3, 3), strides=(2, 2), dtype=self.dtype)(h))
        h = self.activation(nn.Dense(self.hidden, dtype=self.dtype)(h.ravel()))
        out = nn.Dense(self.out_dim, dtype=self.dtype)(h)
        return out if self.dtype is None else out.astype(jnp.float32)


class _ConvDecoder(nn.Module):
    out_shape: tuple[int, ...]
    features: tuple[int, ...]
    hidden: int
    activation: Callable[[Array], Array]
    out_bias: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, z: Array) -> Array:
        height, width, *outs = self.out_shape
        scale = 2 ** len(self.features)
        low_height, low_width = -(-height // scale), -(-width // scale)
        h = self.activation(nn.Dense(self.hidden, dtype=self.dtype)(z))
        size = low_height * low_width * self.features[0]
        h = self.activation(nn.Dense(size, dtype=self.dtype)(h))
        h = h.reshape(low_height, low_width, self.features[0])
        for features in self.features:
            h = self.activation(nn.ConvTranspose(features, (3, 3), strides=(2, 2), dtype=self.dtype)(h))
        bias_init = nn.initializers.constant(self.out_bias)
        out = nn.Conv(math.prod(outs), (3, 3), bias_init=bias_init, dtype=self.dtype)(h)
        out = out[:height, :width].reshape(self.out_shape)
        return out if self.dtype is None else out.astype(jnp.float32)


def conv_encoder(
    in_shape: Sequence[int],
    out_dim: int,
    *,
    features: Sequence[int] = (32, 64),
    hidden: int = 256,
    activation: Callable[[Array], Array] = jax.nn.gelu,
    dtype: DTypeLike | None = None,
) -> Network:
    """Build strided 3x3 convolutions and one hidden layer, from an image to a vector.

    Args:
        in_shape: (H, W, C).
        out_dim: length of the output, e.g. `2 * latent_dim`.
        features: channels after each halving of height and width.
        hidden: width of the dense layer.
        activation: elementwise nonlinearity.
        dtype: of the computation inside, e.g. bfloat16; parameters and output are float32 all the same. None for
            that of the input and the parameters.

    Returns:
        A `Network` with `apply(params, x [H, W, C]) -> [out_dim]`.

    Raises:
        ValueError: if `in_shape` is not (H, W, C).
    """
    if len(in_shape) != 3:
        raise ValueError(f"in_shape: got {tuple(in_shape)}, expected (H, W, C); add a channel axis")
    module = _ConvEncoder(out_dim, tuple(features), hidden, activation, dtype)
    return from_linen(module, jnp.zeros(tuple(in_shape)))


def conv_decoder(
    latent_dim: int,
    out_shape: Sequence[int],
    *,
    features: Sequence[int] = (64, 32),
    hidden: int = 256,
    activation: Callable[[Array], Array] = jax.nn.gelu,
    out_bias: float = 0.0,
    dtype: DTypeLike | None = None,
) -> Network:
    """Build one hidden layer and transposed 3x3 convolutions, from a vector to an image.

    Args:
        latent_dim: length of z.
        out_shape: (H, W, ...) of the output, e.g. `likelihood.out_shape((28, 28, 1))`; trailing axes are
            channels. Any height and width: the last doubling is cropped.
        features: channels at each doubling of height and width.
        hidden: width of the dense layer.
        activation: elementwise nonlinearity.
        out_bias: where the output starts, e.g. the logit of the mean pixel.
        dtype: of the computation inside, e.g. bfloat16; parameters and output are float32 all the same. None for
            that of the input and the parameters.

    Returns:
        A `Network` with `apply(params, z [latent_dim]) -> [*out_shape]`.

    Raises:
        ValueError: if `out_shape` has fewer than three axes, or `features` is empty.
    """
    if len(out_shape) < 3:
        raise ValueError(f"out_shape: got {tuple(out_shape)}, expected (H, W, C) or more; add a channel axis")
    if not features:
        raise ValueError(
            "features: got none, expected the channels of at least one doubling; use mlp without"
        )
    module = _ConvDecoder(tuple(out_shape), tuple(features), hidden, activation, out_bias, dtype)
    return from_linen(module, jnp.zeros((latent_dim,)))
