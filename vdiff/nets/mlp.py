"""Multilayer perceptrons."""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from vdiff.nets.adapters import from_linen
from vdiff.types import Network


class _MLP(nn.Module):
    hidden: tuple[int, ...]
    out_shape: tuple[int, ...]
    activation: Callable[[Array], Array]
    bias_init: Callable[..., Array]
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=nn.initializers.glorot_uniform())
        h = x.ravel()
        for width in self.hidden:
            h = self.activation(dense(width)(h))
        out = dense(math.prod(self.out_shape), bias_init=self.bias_init)(h).reshape(self.out_shape)
        return out if self.dtype is None else out.astype(jnp.float32)


def mlp(
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    *,
    hidden: Sequence[int] = (512, 512),
    activation: Callable[[Array], Array] = jax.nn.gelu,
    out_bias: ArrayLike = 0.0,
    dtype: DTypeLike | None = None,
) -> Network:
    """Build a perceptron from an array of one shape to an array of another.

    Args:
        in_shape: shape of the input, e.g. (28, 28, 1); flattened.
        out_shape: shape of the output, e.g. `(2 * latent_dim,)` for an encoder, or
            `likelihood.out_shape(x_shape)` for a decoder.
        hidden: widths of the hidden layers.
        activation: elementwise nonlinearity.
        out_bias: where the output starts, a number or an array of `out_shape`, e.g. the logit of the mean
            image for a Bernoulli decoder.
        dtype: of the computation inside, e.g. bfloat16; parameters and output are float32 all the same. None for
            that of the input and the parameters.

    Returns:
        A `Network` with `apply(params, x [*in_shape]) -> [*out_shape]`.

    Raises:
        ValueError: if `out_bias` is an array of another shape; at trace time, if the input has another.
    """
    if jnp.ndim(out_bias) and jnp.shape(out_bias) != tuple(out_shape):
        raise ValueError(
            f"out_bias: got shape {jnp.shape(out_bias)}, expected {tuple(out_shape)}, that of the output, "
            "or a number"
        )
    bias = jnp.broadcast_to(jnp.asarray(out_bias, jnp.float32), tuple(out_shape)).ravel()
    start = lambda key, shape, dtype: bias.astype(dtype)  # noqa: E731
    module = _MLP(tuple(hidden), tuple(out_shape), activation, start, dtype)
    return from_linen(module, jnp.zeros(tuple(in_shape)))
