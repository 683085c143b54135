"""A diffusion transformer: matrix products only, for images [H, W, C] cut into patches, one datum at a time."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from vdiff.nets.adapters import from_linen
from vdiff.nets.attention import self_attention
from vdiff.nets.norm import film, layer_norm
from vdiff.nets.patches import check_patch, patchify, unpatchify
from vdiff.nets.rematerialized import Around, called, unchanged
from vdiff.nets.time import TimeEmbedding, time_examples
from vdiff.types import Key, Network

ZERO = nn.initializers.zeros
EXPANSION = 4


def grid_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """Return sines and cosines of row and of column, [rows * columns, width], where each patch starts."""
    quarter = width // 4
    # Wavelengths from 6 to 600 patches: a grid has tens, where a sentence has thousands.
    frequencies = 100.0 ** (-np.arange(quarter) / max(quarter, 1))
    i, j = (index.reshape(-1, 1) * frequencies for index in np.indices((rows, columns)))
    table = np.concatenate([np.sin(i), np.cos(i), np.sin(j), np.cos(j)], axis=-1)
    return np.pad(table, ((0, 0), (0, width - 4 * quarter))).astype(np.float32)


class _Block(nn.Module):
    """Attention and a perceptron, each added through a gate that starts at zero (adaLN-zero)."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, h: Array, e: Array) -> Array:
        width = h.shape[-1]
        adaptive = nn.Dense(6 * width, dtype=self.dtype, kernel_init=ZERO, name="adaptive")(e)
        scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = jnp.split(adaptive, 6)
        qkv = nn.Dense(3 * width, dtype=self.dtype, name="qkv")(film(layer_norm(h), scale_a, shift_a))
        a = nn.Dense(width, dtype=self.dtype, name="mix")(self_attention(qkv, self.heads))
        h = h + gate_a.reshape(1, width) * a
        m = nn.Dense(EXPANSION * width, dtype=self.dtype, name="up")(film(layer_norm(h), scale_m, shift_m))
        m = nn.Dense(width, dtype=self.dtype, name="down")(jax.nn.gelu(m))
        return h + gate_m.reshape(1, width) * m


class _DiT(nn.Module):
    out_channels: int
    patch: int
    width: int
    depth: int
    heads: int
    num_labels: int
    dtype: DTypeLike
    around: Around

    @nn.compact
    def __call__(self, z: Array, log_snr: Array, *label: Array) -> Array:
        e = TimeEmbedding(self.width, self.num_labels)(log_snr, *label).astype(self.dtype)
        x = patchify(z, self.patch)
        rows, columns, _ = x.shape

        def start(key: Key) -> Array:
            return jnp.asarray(grid_positions(rows, columns, self.width))

        h = nn.Dense(self.width, dtype=self.dtype, name="embed")(x.reshape(rows * columns, -1))
        h = h + self.param("positions", start).astype(self.dtype)
        for i in range(self.depth):
            h = self.around(called)(_Block(self.heads, self.dtype, name=f"block_{i}"), h, e)
        adaptive = nn.Dense(2 * self.width, dtype=self.dtype, kernel_init=ZERO, name="adaptive")(e)
        scale, shift = jnp.split(adaptive, 2)
        size = self.patch**2 * self.out_channels
        out = nn.Dense(size, dtype=self.dtype, kernel_init=ZERO, name="out")(
            film(layer_norm(h), scale, shift)
        )
        return unpatchify(out.reshape(rows, columns, size), self.patch).astype(jnp.float32)


def dit(
    shape: Sequence[int],
    *,
    patch: int = 2,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    out_channels: int | None = None,
    num_labels: int = 0,
    dtype: DTypeLike = jnp.float32,
    around: Around = unchanged,
) -> Network:
    r"""Build a transformer over the patches of an image, with layer norms set by the time (adaLN-zero).

        h <- h + g_1 attention(film(norm(h), s_1, b_1))
        h <- h + g_2 perceptron(film(norm(h), s_2, b_2))          (s, b, g) = W silu(e(log_snr, label))

    W starts at zero, so each block starts as the identity; the last layer starts at zero, and so does the
    output. Positions are learned and start as sines and cosines of row and column. Without convolutions,
    nearly all of its time goes to large matrix products.

    Args:
        shape: (H, W, C) of z.
        patch: side of a patch, in pixels; divides H and W.
        width: length of a patch's vector.
        depth: number of blocks.
        heads: number of attention heads; divides `width`.
        out_channels: channels of the output; those of z when left out.
        num_labels: number of classes; with 0 the network takes no label.
        dtype: of the computation inside; parameters, input and output are float32 all the same.
        around: put around each block, `(function) -> function` of the block and its inputs; `rematerialized_block`
            computes a block again for the gradient, so that the inner activations of one are held at a time.

    Returns:
        A `Network` with `apply(params, z [H, W, C], log_snr []) -> [H, W, out_channels]`; with labels
        `apply(params, z, log_snr, label)`, an int32 scalar of which `num_labels` means "no label".

    Raises:
        ValueError: if `shape` is not (H, W, C), `patch` does not divide H and W, or `heads` not `width`.

    Source:
        Peebles and Xie, Scalable Diffusion Models with Transformers, 2023, section 3.2.
    """
    if len(shape) != 3:
        raise ValueError(f"shape: got {tuple(shape)}, expected (H, W, C); add a channel axis")
    check_patch(patch, shape)
    if heads < 1 or width % heads:
        raise ValueError(
            f"heads: got {heads} for width {width}, expected a divisor of the width; use {math.gcd(heads, width)}"
        )
    channels = shape[-1] if out_channels is None else out_channels
    module = _DiT(channels, patch, width, depth, heads, num_labels, dtype, around)
    return from_linen(module, jnp.zeros(tuple(shape)), *time_examples(num_labels))
