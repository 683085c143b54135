r"""PixelCNN: the chain rule over the pixels of an image, row by row, each law from one causal network.

    log p(x) = sum_{i, j} log p(x_ij | rows above i, row i left of j)                 one pass of the network

There is no latent: z = (), and log p(x, z) is log p(x) itself. Channels of one pixel are independent given the pixels
before it. To draw, what a row is told of the rows above is computed once a row, and the row alone is gone through pixel
by pixel: H passes of one stack and H W of a row of the other, in place of H W passes of both.

Source: van den Oord, Kalchbrenner and Kavukcuoglu, Pixel Recurrent Neural Networks, 2016; van den Oord et al.,
Conditional Image Generation with PixelCNN Decoders, 2016.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.nets.gated_pixelcnn import RowCausal
from vdiff.types import Key, Likelihood, Model, Objective, Params, PyTree, check_key


class PixelCNN(NamedTuple):
    """Hold a density of images: the fields of `Model`, and what is known without a latent.

    Attributes:
        init, log_joint, log_q, sample_q, sample, elbo_terms: as in `vdiff.types.Model`; z is ().
        log_prob: `(params, x) -> []`, log p(x), exact, nats.
        out: `(params, x) -> [*likelihood.out_shape(shape)]`, the law of each pixel given those before it.
    """

    init: Callable[[Key], Params]
    log_joint: Callable[[Params, PyTree, PyTree], Array]
    log_q: Callable[[Params, PyTree, PyTree], Array]
    sample_q: Callable[[Key, Params, PyTree], PyTree]
    sample: Callable[[Key, Params], tuple[PyTree, PyTree]]
    elbo_terms: Objective
    log_prob: Callable[[Params, Array], Array]
    out: Callable[[Params, Array], Array]

    elbo_estimate = Model.elbo_estimate


def pixelcnn(network: RowCausal, shape: Sequence[int], *, likelihood: Likelihood) -> PixelCNN:
    """Build an autoregressive model of images.

    `elbo_terms` is {"log_prob": log p(x)}, exact in value and gradient.

    Args:
        network: of likelihood.embed(x), with output [*likelihood.out_shape(shape)], such as `nets.gated_pixelcnn`.
        shape: (H, W, C) of an image.
        likelihood: what the output says of a pixel, e.g. `likelihoods.bernoulli()` or `.categorical(levels)`.

    Returns:
        A `PixelCNN`; theta is the network's, phi and lam are (). Everything in nats per datum.

    Raises:
        ValueError: at trace time, if the network's output does not fit.
    """
    height, width, channels = shape = tuple(shape)

    def out(params: Params, x: Array) -> Array:
        found = network.apply(params.theta, likelihood.embed(x))
        if found.shape != likelihood.out_shape(shape):
            raise ValueError(
                f"network: got output of shape {found.shape}, expected {likelihood.out_shape(shape)} for x of shape "
                f"{shape}; build it with out_shape=likelihood.out_shape(shape)"
            )
        return found

    def log_prob(params: Params, x: Array) -> Float[Array, ""]:
        return likelihood.log_prob(out(params, x), x)

    def sample(key: Key, params: Params) -> tuple[Array, tuple[()]]:
        def draw_row(x: Array, step: tuple[Array, Key]) -> tuple[Array, None]:
            i, keys = step
            told = jax.tree.map(lambda leaf: leaf[i], network.above(params.theta, likelihood.embed(x)))

            def draw_pixel(row: Array, step: tuple[Array, Key]) -> tuple[Array, None]:
                j, key = step
                law = network.along(params.theta, told, likelihood.embed(row))[j]
                return row.at[j].set(likelihood.sample(key, law)), None

            row, _ = jax.lax.scan(draw_pixel, x[i], (jnp.arange(width), keys))
            return x.at[i].set(row), None

        of_pixel = jnp.zeros(likelihood.out_shape((channels,)))
        dtype = jax.eval_shape(likelihood.sample, key, of_pixel).dtype
        keys = jax.random.split(check_key(key), (height, width))
        x, _ = jax.lax.scan(draw_row, jnp.zeros(shape, dtype), (jnp.arange(height), keys))
        return x, ()

    return PixelCNN(
        init=lambda key: Params(theta=network.init(check_key(key))),
        log_joint=lambda params, x, z: log_prob(params, x),
        log_q=lambda params, x, z: jnp.zeros(()),
        sample_q=lambda key, params, x: (),
        sample=sample,
        elbo_terms=lambda key, params, x: {"log_prob": log_prob(params, x)},
        log_prob=log_prob,
        out=out,
    )
