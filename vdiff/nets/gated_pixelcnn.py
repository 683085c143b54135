r"""A convolutional network whose output at a pixel sees the pixels above it and to its left, all of them.

Two stacks of gated convolutions, so that no pixel is hidden behind a mask's corner:

    above:   a_1 = conv(rows i-k..i-1 of x),  a_l = conv(rows i-k+1..i of v_{l-1}),  v_l = gate(a_l)        of rows < i
    along:   b_1 = conv(columns j-k..j-1 of x) + a_1,   b_l = conv(columns j-k+1..j of h_{l-1}) + a_l
             h_l = h_{l-1} + W gate(b_l),         gate(a) = tanh(first half) sigmoid(second half)

with weights for each convolution and for each arrow from above to along. L layers look L (k - 1) + 1 rows up and
columns back, and L reach columns to either side of the rows above: every earlier pixel is seen where the first is at
least H - 1 and W - 1, and the second at least W - 1.

The stack along a row needs no other row of x. So it is a function of one row, and a row can be drawn pixel by pixel
while what is above stays as it is. A convolution is written as one product of shifted copies, the neighbours of a pixel
side by side: in a loop on a CPU a convolution is many times slower.

Source: van den Oord et al., Conditional Image Generation with PixelCNN Decoders, 2016, 2.1 and 2.2.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vdiff.types import Key, PyTree, check_key


class RowCausal(NamedTuple):
    """Hold a causal network of an image, a `Network` that can be asked row by row.

    Attributes:
        init: `(key) -> params`.
        apply: `(params, x [H, W, C]) -> [*out_shape]`; at a pixel it depends on those above, and left in the same row.
        above: `(params, x [H, W, C]) -> tree` with a leading axis H: what row i is told, of rows above it only.
        along: `(params, told, row [W, C]) -> [*out_shape[1:]]`, the output of a row that was told row i of `above`.
    """

    init: Callable[[Key], PyTree]
    apply: Callable[..., Array]
    above: Callable[[PyTree, Array], PyTree]
    along: Callable[[PyTree, PyTree, Array], Array]


def gated_pixelcnn(
    shape: Sequence[int],
    out_shape: Sequence[int],
    *,
    features: int = 32,
    layers: int = 6,
    kernel: int = 3,
    reach: int = 2,
    out_bias: ArrayLike = 0.0,
) -> RowCausal:
    """Build a gated PixelCNN; the channels of a pixel are shown together, and none is shown to the others.

    Args:
        shape: (H, W, C) of the input.
        out_shape: of the output, with (H, W) in front, e.g. `likelihood.out_shape(shape)`.
        features: channels inside.
        layers: gated layers in each stack.
        kernel: k, rows and columns that a layer looks back.
        reach: columns to either side that a layer looks at in the rows above.
        out_bias: where the output starts at each pixel, a number or an array of `out_shape`; learned per pixel.

    Returns:
        A `RowCausal` network.

    Raises:
        ValueError: if a number is less than one (`reach` less than zero), a shape is not (H, W, ..), or `out_bias` is
            an array of another shape; at trace time, if the input has another shape.

    Source: van den Oord et al., Conditional Image Generation with PixelCNN Decoders, 2016.
    """
    shape, out_shape = tuple(shape), tuple(out_shape)
    if len(shape) != 3 or out_shape[:2] != shape[:2]:
        raise ValueError(
            f"out_shape: got {out_shape} for an input of shape {shape}, expected (H, W, C) and (H, W, ..); add a "
            "channel axis"
        )
    for name, got, least in (
        ("features", features, 1),
        ("layers", layers, 1),
        ("kernel", kernel, 1),
        ("reach", reach, 0),
    ):
        if got < least:
            raise ValueError(f"{name}: got {got}, expected at least {least}")
    if jnp.ndim(out_bias) and jnp.shape(out_bias) != out_shape:
        raise ValueError(
            f"out_bias: got shape {jnp.shape(out_bias)}, expected {out_shape}, that of the output, or a number"
        )
    channels, out_size = shape[2], math.prod(out_shape[2:])
    start = np.broadcast_to(np.asarray(out_bias, np.float32), out_shape)
    columns = range(-reach, reach + 1)
    # The first layer does not look at its own row or column, later ones see what is already of those before.
    back = [range(-kernel, 0)] + [range(1 - kernel, 1)] * (layers - 1)
    inputs = [channels] + [features] * (layers - 1)

    def init(key: Key) -> PyTree:
        glorot = jax.nn.initializers.glorot_uniform()

        def layer(key: Key, size: int) -> PyTree:
            keys = jax.random.split(key, 4)
            return {
                "above": glorot(keys[0], (kernel * len(columns) * size, 2 * features)),
                "above_bias": jnp.zeros(2 * features),
                "along": glorot(keys[1], (kernel * size, 2 * features)),
                "told": glorot(keys[2], (2 * features, 2 * features)),
                "along_bias": jnp.zeros(2 * features),
                "mix": glorot(keys[3], (features, features)),
            }

        *keys, key_hidden, key_out = jax.random.split(check_key(key), layers + 2)
        return {
            "layers": [layer(k, size) for k, size in zip(keys, inputs, strict=True)],
            "hidden": glorot(key_hidden, (features, 2 * features)),
            "hidden_bias": jnp.zeros(2 * features),
            "out": 0.1 * glorot(key_out, (2 * features, out_size)),
            "start": jnp.asarray(start),
        }

    def above(params: PyTree, x: Float[Array, "H W C"]) -> PyTree:
        if x.shape != shape:
            raise ValueError(
                f"x: got shape {x.shape}, expected {shape}; a network takes one datum, so vmap over a batch"
            )
        told, v = [], x
        for layer, rows in zip(params["layers"], back, strict=True):
            a = _shifted(_shifted(v, rows, axis=0), columns, axis=1) @ layer["above"]
            a += layer["above_bias"][None, None, :]
            told.append(a @ layer["told"] + layer["along_bias"][None, None, :])
            v = _gate(a)
        return {"layers": tuple(told), "start": params["start"]}

    def along(params: PyTree, told: PyTree, row: Float[Array, "W C"]) -> Array:
        h, total = row, 0.0
        for layer, from_above, steps in zip(params["layers"], told["layers"], back, strict=True):
            h = _gate(_shifted(h, steps, axis=0) @ layer["along"] + from_above)
            h = total = total + h @ layer["mix"]
        hidden = jax.nn.gelu(jax.nn.gelu(total) @ params["hidden"] + params["hidden_bias"][None, :])
        return (hidden @ params["out"]).reshape(out_shape[1:]) + told["start"]

    def apply(params: PyTree, x: Float[Array, "H W C"]) -> Array:
        return jax.vmap(along, in_axes=(None, 0, 0))(params, above(params, x), x)

    return RowCausal(init, apply, above, along)


def _shifted(h: Array, offsets: Sequence[int], *, axis: int) -> Array:
    """Lay the neighbours at some offsets along an axis side by side in the channels, zero beyond the edge."""
    size = h.shape[axis]
    before, after = max(0, -offsets[0]), max(0, offsets[-1])
    padded = jnp.pad(h, [(before, after) if i == axis else (0, 0) for i in range(h.ndim)])
    at = [jax.lax.slice_in_dim(padded, before + o, before + o + size, axis=axis) for o in offsets]
    return jnp.concatenate(at, axis=-1)


def _gate(a: Array) -> Array:
    first, second = jnp.split(a, 2, axis=-1)
    return jnp.tanh(first) * jax.nn.sigmoid(second)
