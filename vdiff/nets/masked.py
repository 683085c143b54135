r"""A perceptron whose d-th output sees only what comes before variable d, for any order of the variables.

A variable has a place in the order, 0..D-1; a hidden unit has a degree m, 0..D-2, and sees places up to m:

    input -> hidden      place_in <= m              hidden -> hidden     m_in <= m_out
    hidden -> output     m < place_out              input -> output      place_in < place_out

Weights are multiplied by what of this holds, so that the Jacobian of outputs by inputs, in the order, is strictly lower
triangular. Degrees are spread evenly over the units of a layer. The weights from input to output let each variable be
seen by all later ones, however narrow the layers are; they start at zero.

Source: Germain, Gregor, Murray and Larochelle, MADE: Masked Autoencoder for Distribution Estimation, 2015, 3 and 4.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from vdiff.types import Key, Network, PyTree, check_key


def masked_mlp(
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    *,
    num_variables: int | None = None,
    hidden: Sequence[int] = (512, 512),
    activation: Callable[[Array], Array] = jax.nn.relu,
    out_bias: ArrayLike = 0.0,
) -> Network:
    """Build a masked perceptron; the order of the variables is an argument of its `apply`.

    The variables lie on the leading axes of input and output; what is left of them belongs to one variable: the numbers
    that show it, and the outputs that tell its law.

    Args:
        in_shape: shape of the input, e.g. (28, 28, 1), or (D, K) for D one-hot codes.
        out_shape: shape of the output, e.g. `likelihood.out_shape(in_shape)`.
        num_variables: D; prod(in_shape), a number each, when left out.
        hidden: widths of the hidden layers; with none, each variable's output is linear in those before.
        activation: elementwise nonlinearity.
        out_bias: where the output starts for each variable, a number or an array of `out_shape`.

    Returns:
        A `Network` with `apply(params, x [*in_shape], place [D]) -> [*out_shape]`, place[d] that of variable d.

    Raises:
        ValueError: if the shapes do not divide among the variables, or `out_bias` is an array of another shape; at
            trace time, if the input or the places have another shape.

    Source: Germain et al., MADE, 2015; weights from input to output: its equation 13.
    """
    in_shape, out_shape = tuple(in_shape), tuple(out_shape)
    size_in, size_out = math.prod(in_shape), math.prod(out_shape)
    num_variables = size_in if num_variables is None else num_variables
    if num_variables < 1 or size_in % num_variables or size_out % num_variables:
        raise ValueError(
            f"num_variables: got {num_variables} for an input of {size_in} numbers and {size_out} outputs, expected a "
            "divisor of both; each variable has as many numbers as any other"
        )
    if jnp.ndim(out_bias) and jnp.shape(out_bias) != out_shape:
        raise ValueError(
            f"out_bias: got shape {jnp.shape(out_bias)}, expected {out_shape}, that of the output, or a number"
        )
    widths = (size_in, *hidden, size_out)
    glorot = jax.nn.initializers.glorot_uniform()
    bias = np.broadcast_to(np.asarray(out_bias, np.float32), out_shape).ravel()

    def init(key: Key) -> PyTree:
        keys = jax.random.split(check_key(key), len(widths) - 1)
        layers = [
            {"kernel": glorot(k, pair), "bias": jnp.zeros(pair[1])}
            for k, pair in zip(keys, itertools.pairwise(widths), strict=True)
        ]
        layers[-1]["bias"] = jnp.asarray(bias)
        return {"layers": layers, "direct": jnp.zeros((size_in, size_out))}

    def apply(params: PyTree, x: Array, place: Int[Array, " D"]) -> Array:
        if x.shape != in_shape or place.shape != (num_variables,):
            raise ValueError(
                f"x: got shape {x.shape} with places of shape {place.shape}, expected {in_shape} and "
                f"({num_variables},); a network takes one datum, so vmap over a batch"
            )
        place_in, place_out = (jnp.repeat(place, size // num_variables) for size in (size_in, size_out))
        x = h = x.ravel()
        sees_up_to = place_in
        for layer, width in zip(params["layers"][:-1], hidden, strict=True):
            degree = jnp.arange(width) * (num_variables - 1) // width
            kernel = jnp.where(sees_up_to[:, None] <= degree[None, :], layer["kernel"], 0.0)
            h, sees_up_to = activation(h @ kernel + layer["bias"]), degree
        last = params["layers"][-1]
        kernel = jnp.where(sees_up_to[:, None] < place_out[None, :], last["kernel"], 0.0)
        direct = jnp.where(place_in[:, None] < place_out[None, :], params["direct"], 0.0)
        out = h @ kernel + x @ direct + last["bias"]
        return out.reshape(out_shape)

    return Network(init, apply)
