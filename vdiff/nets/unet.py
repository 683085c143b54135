"""A time-conditioned U-Net for images [H, W, C] of any size, one datum at a time."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from vdiff.nets.adapters import from_linen
from vdiff.nets.attention import self_attention
from vdiff.nets.norm import film, group_norm
from vdiff.nets.patches import check_patch, patchify, unpatchify
from vdiff.nets.rematerialized import Around, called, unchanged
from vdiff.nets.time import TimeEmbedding, time_examples
from vdiff.types import Network

MOST_GROUPS = 8
ZERO = nn.initializers.zeros


def _norm(h: Array) -> Array:
    return group_norm(h, math.gcd(h.shape[-1], MOST_GROUPS))


class _FilmNorm(nn.Module):
    """silu(film(norm(h), W e)): scale and shift of each channel, both from the time."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, h: Array, e: Array) -> Array:
        scale, shift = jnp.split(nn.Dense(2 * h.shape[-1], dtype=self.dtype)(e), 2)
        return jax.nn.silu(film(_norm(h), scale, shift))


class _Block(nn.Module):
    """h + two convolutions of it; the second starts at zero."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, h: Array, e: Array) -> Array:
        r = nn.Conv(self.width, (3, 3), dtype=self.dtype)(_FilmNorm(self.dtype)(h, e))
        r = nn.Conv(self.width, (3, 3), dtype=self.dtype, kernel_init=ZERO)(_FilmNorm(self.dtype)(r, e))
        return r + (h if h.shape[-1] == self.width else nn.Dense(self.width, dtype=self.dtype)(h))


class _Attention(nn.Module):
    """h + attention among its positions, one head; the last product starts at zero."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, h: Array) -> Array:
        height, width, channels = h.shape
        qkv = nn.Dense(3 * channels, dtype=self.dtype)(_norm(h))
        mixed = self_attention(qkv.reshape(height * width, 3 * channels), 1).reshape(h.shape)
        return h + nn.Dense(channels, dtype=self.dtype, kernel_init=ZERO)(mixed)


class _UNet(nn.Module):
    out_channels: int
    features: tuple[int, ...]
    num_blocks: int
    attention: tuple[int, ...]
    patch: int
    num_labels: int
    dtype: DTypeLike
    around: Around

    def _stage(self, h: Array, e: Array, level: int) -> Array:
        h = self.around(called)(_Block(self.features[level], self.dtype), h, e)
        return self.around(called)(_Attention(self.dtype), h) if level in self.attention else h

    @nn.compact
    def __call__(self, z: Array, log_snr: Array, *label: Array) -> Array:
        e = TimeEmbedding(4 * self.features[0], self.num_labels)(log_snr, *label).astype(self.dtype)
        h = nn.Conv(self.features[0], (3, 3), dtype=self.dtype)(patchify(z, self.patch))
        levels, skips = range(len(self.features)), []
        for level in levels:
            if level:
                odd = tuple((0, n % 2) for n in h.shape[:2])
                h = patchify(jnp.pad(h, (*odd, (0, 0)), mode="edge"), 2)
                h = nn.Dense(self.features[level], dtype=self.dtype)(h)
            for _ in range(self.num_blocks):
                h = self._stage(h, e, level)
                skips.append(h)
        h = self._stage(h, e, levels[-1])
        for level in reversed(levels):
            for _ in range(self.num_blocks):
                h = self._stage(jnp.concatenate([h, skips.pop()], axis=-1), e, level)
            if level:
                h = unpatchify(nn.Dense(4 * self.features[level - 1], dtype=self.dtype)(h), 2)
                height, width, _ = skips[-1].shape
                h = h[:height, :width]
        h = _FilmNorm(self.dtype)(h, e)
        size = self.patch**2 * self.out_channels
        out = nn.Conv(size, (3, 3), dtype=self.dtype, kernel_init=ZERO)(h)
        return unpatchify(out, self.patch).astype(jnp.float32)


def unet(
    shape: Sequence[int],
    *,
    out_channels: int | None = None,
    features: Sequence[int] = (16, 32, 64),
    num_blocks: int = 1,
    attention: Sequence[int] = (-1,),
    patch: int = 1,
    num_labels: int = 0,
    dtype: DTypeLike = jnp.float32,
    around: Around = unchanged,
) -> Network:
    """Build residual convolutions on ever coarser grids and back, joined by skip connections.

    Level 0 has the image's own size, or one position for each patch, and each level half of the one before, odd
    sizes rounded up (28, 14, 7, 4). Each block is  h + conv(silu(film(norm(conv(silu(film(norm(h))))))),  with scale
    and shift of both norms from the log-SNR and the label. Between levels four pixels become one and one becomes
    four, each by a matrix product. The last layer starts at zero, and so does the output.

    Args:
        shape: (H, W, C) of z, any H and W.
        out_channels: channels of the output; those of z when left out.
        features: channels of each level, finest first.
        num_blocks: blocks at each level, on the way down and again on the way up.
        attention: levels whose blocks are each followed by self-attention, e.g. `(1, 2)`, or counted from
            the coarsest, `(-1,)`; `()` for none. Its time grows with the square of the positions: on a CPU
            it is nothing at 7 x 7 and a third of the network's at 14 x 14.
        patch: side of the squares of pixels that level 0 takes for one position, a divisor of H and W. With 2 the
            costliest level is gone, and each of the others may be wider for the same time.
        num_labels: number of classes; with 0 the network takes no label.
        dtype: of the computation inside; parameters, input and output are float32 all the same.
        around: put around each block, `(function) -> function` of the block and its inputs; `rematerialized_block`
            computes a block again for the gradient, so that the inner activations of one are held at a time.

    Returns:
        A `Network` with `apply(params, z [H, W, C], log_snr []) -> [H, W, out_channels]`; with labels
        `apply(params, z, log_snr, label)`, an int32 scalar of which `num_labels` means "no label".

    Raises:
        ValueError: if `shape` is not (H, W, C), `features` is empty, `num_blocks` below 1, `attention` names a
            level that is not there, or `patch` does not divide H and W.

    Source:
        Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, 2020, appendix B; Dhariwal and
        Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, for scale and shift from the time.
    """
    if len(shape) != 3:
        raise ValueError(f"shape: got {tuple(shape)}, expected (H, W, C); add a channel axis")
    if not features:
        raise ValueError("features: got none, expected the channels of at least one level; use (16, 32)")
    if num_blocks < 1:
        raise ValueError(f"num_blocks: got {num_blocks}, expected at least 1 at each level; use 1")
    levels = range(len(features))
    if any(not -len(levels) <= level < len(levels) for level in attention):
        raise ValueError(
            f"attention: got levels {tuple(attention)}, expected some of 0 to {levels[-1]}, one for each of "
            f"features, or -1 to {-len(levels)} from the coarsest; leave the others out"
        )
    check_patch(patch, shape)
    channels = shape[-1] if out_channels is None else out_channels
    attended = tuple(levels[level] for level in attention)
    module = _UNet(channels, tuple(features), num_blocks, attended, patch, num_labels, dtype, around)
    return from_linen(module, jnp.zeros(tuple(shape)), *time_examples(num_labels))
