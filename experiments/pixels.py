"""What a pixel is: a likelihood, and where a decoder's output starts so that it knows each pixel's own law."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

import vdiff as vd
from vdiff import likelihoods


def _bernoulli(images: np.ndarray, levels: int) -> tuple[vd.Likelihood, np.ndarray]:
    mean = np.clip(images.mean(0) / (levels - 1), 0.01, 0.99)
    return likelihoods.bernoulli(), np.log(mean) - np.log1p(-mean)


def _categorical(images: np.ndarray, levels: int) -> tuple[vd.Likelihood, np.ndarray]:
    frequency = np.stack([(images == level).mean(0) for level in range(levels)], axis=-1)
    return likelihoods.categorical(levels), np.log(frequency + 0.1 / levels)


def _logistic(images: np.ndarray, levels: int) -> tuple[vd.Likelihood, np.ndarray]:
    embedded = 2.0 * images / (levels - 1) - 1.0
    out_bias = np.stack([embedded.mean(0), np.log(embedded.std(0) + 1.0 / levels)], axis=-1)
    return likelihoods.discretized_logistic(levels), out_bias


def _gaussian(images: np.ndarray, levels: int) -> tuple[vd.Likelihood, np.ndarray]:
    unit = (images + 0.5) / levels
    out_bias = np.stack([unit.mean(0), np.log(unit.std(0) + 0.3 / levels)], axis=-1)
    return likelihoods.gaussian(), out_bias


class Pixels(NamedTuple):
    """Hold images, and what a pixel of them is to a model.

    Attributes:
        dataset: the images, as integer levels.
        shape: of an image.
        likelihood: of a pixel.
        out_bias: where a decoder's output starts, of `likelihood.out_shape(shape)`: the pixels' own laws.
        transform: `(key, levels) -> x`, what a model sees: the binarisation, or nothing.
        levels: how many values a pixel of x has.
    """

    dataset: vd.data.Dataset
    shape: tuple[int, ...]
    likelihood: vd.Likelihood
    out_bias: np.ndarray
    transform: Callable[[jax.Array, jax.Array], jax.Array]
    levels: int


def load(name: str, likelihood: str) -> Pixels:
    """Load a data set, to be modelled under one of `LIKELIHOODS`.

    Raises:
        ValueError: if the data set is unknown or does not fit.
    """
    dataset = vd.data.load(name)
    of, out_bias = LIKELIHOODS[likelihood](looked_at(dataset.train), dataset.levels)
    transform, levels = (lambda key, x: x), dataset.levels
    if likelihood == "bernoulli":
        transform, levels = vd.transforms.binarize(dataset.levels), 2
    return Pixels(dataset, dataset.train.shape[1:], of, out_bias, transform, levels)


def check_drawn_once(name: str, dataset: vd.data.Dataset) -> None:
    """Refuse to draw binary pixels once of images that stay on disk."""
    if not isinstance(dataset.train, np.ndarray):
        raise ValueError(
            f"binarization: got fixed for {name}, which stays on disk, expected data in memory; use dynamic"
        )


def looked_at(images: np.ndarray | vd.data.Rows, *, at_most: int = 10_000) -> np.ndarray:
    """Read the images that a model's start is taken from: all in memory; on disk some, evenly spread."""
    if isinstance(images, np.ndarray):
        return images
    return images[np.linspace(0, len(images) - 1, min(len(images), at_most)).astype(np.int64)]


def predicted(
    vae: vd.VAE, key: jax.Array, params: vd.Params, images: np.ndarray, *, num_draws: int = 30
) -> tuple[np.ndarray, np.ndarray]:
    """Draw what a VAE predicts of images that it has seen: x_rep ~ p(x_rep | z) and E[x_rep | z], z ~ q(z | x).

    Returns:
        Both [N, num_draws, ...], in the units of x.
    """

    def one(key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        loc, scale = vae.encode(params, x)

        def once(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            key_z, key_x = jax.random.split(key)
            z = loc + scale * jax.random.normal(key_z, loc.shape)
            return vae.sample_x(key_x, params, z), vae.decode(params, z)

        return jax.vmap(once)(jax.random.split(key, num_draws))

    draws, means = jax.jit(jax.vmap(one))(jax.random.split(key, len(images)), images)
    return np.asarray(draws), np.asarray(means)


LIKELIHOODS = {
    "bernoulli": _bernoulli,
    "categorical": _categorical,
    "logistic": _logistic,
    "gaussian": _gaussian,
}
"""Each: (training images, levels) -> the likelihood, and the decoder's first output: that of the pixels alone."""
