r"""Residual convolutions up and down a ladder of grids, with a layer of latents at each, for `models.ladder`.

Level 0 has one position for each patch of the image, each level after it half of the one before, odd sizes rounded up
(28 pixels and patches of 2: 14, 7); above the last is a vector. A block is  h + W act(conv(act(h))),  with W zero at
the start.

    up       e: patches to channels, blocks; halved between levels; flattened to the vector
    down     h: the vector to a grid, h + W z, blocks; doubled between levels; at last patches to the image
    latents  of N(loc, scale^2) by  W act(conv(h)),  and the posterior's by  W act(conv([h, e])),  W starting at zero

Source: Child, Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images, 2021, whose blocks are
deeper and have no norm either; Maaloe et al., BIVA, 2019.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from vdiff.nets.adapters import from_linen
from vdiff.nets.constant import constant
from vdiff.nets.patches import patchify, unpatchify
from vdiff.types import Network

ZERO = nn.initializers.zeros
act = jax.nn.silu


class Ladder(NamedTuple):
    """Hold the networks of `vd.ladder`, in its order: `vd.ladder(*networks, likelihood=...)`.

    Attributes:
        start: the vector above the top layer, learned.
        encoders: e_l of e_{l-1}.
        priors: loc beside log scale of z_l, of h_{l+1}.
        posteriors: the same shape, of h_{l+1} and e_l.
        decoders: h_l of h_{l+1} and z_l.
    """

    start: Network
    encoders: tuple[Network, ...]
    priors: tuple[Network, ...]
    posteriors: tuple[Network, ...]
    decoders: tuple[Network, ...]


def conv_ladder(
    shape: Sequence[int],
    out_shape: Sequence[int],
    *,
    features: Sequence[int] = (16, 32),
    latents: Sequence[int] = (2, 4),
    layers_per_level: int = 1,
    num_blocks: int = 1,
    top: int = 16,
    hidden: int = 128,
    patch: int = 2,
    out_bias: ArrayLike = 0.0,
) -> Ladder:
    """Build the networks of a convolutional ladder.

    It has L = len(features) * layers_per_level + 1 layers of latents: on the grid of each level [h, w, latents], finest
    first, and a vector [top] above them.

    Args:
        shape: (H, W, C) of what the encoder is shown, any H and W.
        out_shape: (H, W, ...) of the output, e.g. `likelihood.out_shape(shape)`; trailing axes are channels.
        features: channels of each level, finest first.
        latents: channels of z at each level.
        layers_per_level: layers of latents at each level.
        num_blocks: residual blocks between two layers of latents, on the way up and on the way down.
        top: units of the top layer.
        hidden: width of the vectors above the grids.
        patch: side of the squares of pixels that level 0 takes for one position. Most of the time goes to level 0: with
            patches of 1 it is four times that of 2.
        out_bias: where the output starts, a number or an array of `out_shape`, e.g. the pixels' own logits.

    Returns:
        A `Ladder`. At the start every posterior is its prior, N(0, I), and the output is `out_bias` but for what the
        drawn z give.

    Raises:
        ValueError: if a shape is not (H, W, C), or heights and widths differ; if `features` is empty or not as long as
            `latents`; if a number is less than one; if `out_bias` is an array of another shape.
    """
    shape, out_shape = tuple(shape), tuple(out_shape)
    if len(shape) != 3 or len(out_shape) < 3 or out_shape[:2] != shape[:2]:
        raise ValueError(
            f"out_shape: got {out_shape} for shape {shape}, expected (H, W, ...) for (H, W, C), of one height and width"
        )
    if len(features) < 1 or len(features) != len(latents):
        raise ValueError(
            f"latents: got {len(latents)} levels for features of {len(features)}, expected one number a level"
        )
    counts = (*features, *latents, layers_per_level, num_blocks, top, hidden, patch)
    if min(counts) < 1:
        raise ValueError(
            f"features: got {tuple(features)} and other sizes {counts}, expected each at least 1"
        )
    if jnp.ndim(out_bias) and jnp.shape(out_bias) != out_shape:
        raise ValueError(
            f"out_bias: got shape {jnp.shape(out_bias)}, expected {out_shape}, that of the output, or a number"
        )
    grids = [tuple(-(-n // patch) for n in shape[:2])]
    while len(grids) < len(features):
        grids.append(tuple(-(-n // 2) for n in grids[-1]))
    of_level = [jnp.zeros((*grid, width)) for grid, width in zip(grids, features, strict=True)]
    vector, levels = jnp.zeros(hidden), range(len(features))

    encoders, priors, posteriors, decoders, below = [], [], [], [], jnp.zeros(shape)
    for level, i in itertools.product(levels, range(layers_per_level)):
        h, z = of_level[level], jnp.zeros((*grids[level], latents[level]))
        stride = (patch if level == 0 else 2) if i == 0 else 1
        encoders.append(from_linen(_Up(features[level], num_blocks, stride), below))
        below = h
        priors.append(from_linen(_Latent(features[level], latents[level]), h))
        posteriors.append(from_linen(_Latent(features[level], latents[level]), h, h))
        if i > 0:
            down = _Down(num_blocks, 1, h.shape)
        elif level > 0:
            down = _Down(num_blocks, 2, of_level[level - 1].shape)
        else:
            bias = np.broadcast_to(np.asarray(out_bias, np.float32), out_shape)
            down = _Down(num_blocks, patch, out_shape, bias)
        decoders.append(from_linen(down, h, z))
    encoders.append(from_linen(_ToVector(hidden), below))
    priors.append(from_linen(_LatentVector(hidden, top), vector))
    posteriors.append(from_linen(_LatentVector(hidden, top), vector, vector))
    decoders.append(from_linen(_FromVector(num_blocks, below.shape), vector, jnp.zeros(top)))
    return Ladder(constant((hidden,)), *map(tuple, (encoders, priors, posteriors, decoders)))


class _Block(nn.Module):
    """h + W act(conv(act(h))); W starts at zero."""

    @nn.compact
    def __call__(self, h: Array) -> Array:
        width = h.shape[-1]
        return h + nn.Dense(width, kernel_init=ZERO)(act(nn.Conv(width, (3, 3))(act(h))))


class _Up(nn.Module):
    """Squares of `stride` positions to one, where stride is more than one, and blocks."""

    width: int
    num_blocks: int
    stride: int

    @nn.compact
    def __call__(self, e: Array) -> Array:
        if self.stride > 1 or e.shape[-1] != self.width:
            rest = tuple((0, -n % self.stride) for n in e.shape[:2])
            e = nn.Dense(self.width)(patchify(jnp.pad(e, (*rest, (0, 0)), mode="edge"), self.stride))
        for _ in range(self.num_blocks):
            e = _Block()(e)
        return e


class _Latent(nn.Module):
    """Loc beside log scale at each position, of one array or of two side by side."""

    width: int
    channels: int

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        h = act(jnp.concatenate(inputs, axis=-1))
        return nn.Dense(2 * self.channels, kernel_init=ZERO)(act(nn.Conv(self.width, (3, 3))(h)))


class _Down(nn.Module):
    """Blocks on h + W z, then each position to a square of `stride`, cropped to `out_shape`."""

    num_blocks: int
    stride: int
    out_shape: tuple[int, ...]
    bias: np.ndarray | None = None

    @nn.compact
    def __call__(self, h: Array, z: Array) -> Array:
        h = h + nn.Dense(h.shape[-1])(z)
        for _ in range(self.num_blocks):
            h = _Block()(h)
        if self.stride == 1 and self.bias is None:
            return h
        height, width, *outs = self.out_shape
        size = self.stride**2 * math.prod(outs)
        last = nn.Dense(size) if self.bias is None else nn.Conv(size, (3, 3))
        out = unpatchify(last(h if self.bias is None else act(h)), self.stride)
        out = out[:height, :width].reshape(self.out_shape)
        if self.bias is None:
            return out
        return out + self.param("bias", lambda key: jnp.asarray(self.bias))


class _ToVector(nn.Module):
    """Positions flattened, and one hidden layer."""

    hidden: int

    @nn.compact
    def __call__(self, e: Array) -> Array:
        return nn.Dense(self.hidden)(act(nn.Dense(self.hidden)(act(e).ravel())))


class _LatentVector(nn.Module):
    """Loc beside log scale of a vector, of one vector or of two side by side."""

    hidden: int
    units: int

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        h = act(jnp.concatenate(inputs))
        return nn.Dense(2 * self.units, kernel_init=ZERO)(act(nn.Dense(self.hidden)(h)))


class _FromVector(nn.Module):
    """A vector and z to a grid, and blocks."""

    num_blocks: int
    out_shape: tuple[int, ...]

    @nn.compact
    def __call__(self, h: Array, z: Array) -> Array:
        h = h + nn.Dense(h.shape[-1])(z)
        h = nn.Dense(math.prod(self.out_shape))(act(h + nn.Dense(h.shape[-1])(act(h)))).reshape(
            self.out_shape
        )
        for _ in range(self.num_blocks):
            h = _Block()(h)
        return h
