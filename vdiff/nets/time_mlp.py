"""A time-conditioned perceptron, for vectors and tiny images: latents of a VAE, points of the plane."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from vdiff.nets.adapters import from_linen
from vdiff.nets.norm import film
from vdiff.nets.time import TimeEmbedding, time_examples
from vdiff.types import Network


class _TimeMLP(nn.Module):
    hidden: tuple[int, ...]
    num_labels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, z: Array, log_snr: Array, *label: Array) -> Array:
        e = TimeEmbedding(max(self.hidden), self.num_labels)(log_snr, *label).astype(self.dtype)
        h = z.ravel()
        for width in self.hidden:
            scale, shift = jnp.split(nn.Dense(2 * width, dtype=self.dtype)(e), 2)
            h = jax.nn.silu(film(nn.Dense(width, dtype=self.dtype)(h), scale, shift))
        out = nn.Dense(math.prod(z.shape), dtype=self.dtype, kernel_init=nn.initializers.zeros)(h)
        return out.reshape(z.shape).astype(jnp.float32)


def time_mlp(
    shape: Sequence[int],
    *,
    hidden: Sequence[int] = (128, 128, 128),
    num_labels: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> Network:
    """Build a perceptron whose layers are scaled and shifted by the time.

        h <- silu((1 + scale(e)) (W h + b) + shift(e))            e = e(log_snr, label)

    The last layer starts at zero, and so does the output.

    Args:
        shape: of z, any rank, flattened row by row.
        hidden: widths of the hidden layers, at least one.
        num_labels: number of classes; with 0 the network takes no label.
        dtype: of the computation inside; parameters, input and output are float32 all the same.

    Returns:
        A `Network` with `apply(params, z [*shape], log_snr []) -> [*shape]`; with labels
        `apply(params, z, log_snr, label)`, an int32 scalar of which `num_labels` means "no label".

    Raises:
        ValueError: if `hidden` is empty.
    """
    if not hidden:
        raise ValueError("hidden: got none, expected at least one width, where the time comes in; use (128,)")
    module = _TimeMLP(tuple(hidden), num_labels, dtype)
    return from_linen(module, jnp.zeros(tuple(shape)), *time_examples(num_labels))
