r"""Likelihoods p_theta(x | z) of one datum: what a decoder's output `out` means.

    bernoulli()                   x in {0, 1}           out = logits
    categorical(levels)           x in {0..levels-1}    out = logits, a trailing axis of `levels`
    one_hot(levels)               x one-hot             out = logits, of x's shape
    discretized_logistic(levels)  x in {0..levels-1}    out = (loc, log_scale), a trailing axis of 2
    gaussian(scale)               x real                out = loc; with scale=None (loc, log_scale)

Each sums over the dimensions of x: nats per datum. `embed` shows x to a network near [-1, 1].
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.densities import (
    bernoulli_log_prob,
    categorical_log_prob,
    discretized_logistic_log_prob,
    normal_log_prob,
)
from vdiff.types import Key, Likelihood, check_key


def _embed_levels(x: Array, levels: int) -> Array:
    return x.astype(jnp.float32) * (2.0 / (levels - 1)) - 1.0


def _check_levels(levels: int) -> int:
    if levels < 2:
        raise ValueError(f"levels: got {levels}, expected at least 2; count the values a pixel can take")
    return levels


def bernoulli() -> Likelihood:
    """Build p(x | out) = prod_i Bernoulli(x_i; sigmoid(out_i)), for x in {0, 1}.

    Returns:
        A `Likelihood`; out has the shape of x. Samples are int32.
    """
    return Likelihood(
        log_prob=lambda out, x: jnp.sum(bernoulli_log_prob(x, out)),
        sample=lambda key, out: jax.random.bernoulli(check_key(key), jax.nn.sigmoid(out)).astype(jnp.int32),
        mean=jax.nn.sigmoid,
        embed=lambda x: _embed_levels(x, 2),
        out_shape=lambda shape: shape,
    )


def categorical(levels: int) -> Likelihood:
    """Build p(x | out) = prod_i softmax(out_i)[x_i], for x in {0..levels-1}.

    Args:
        levels: how many values a pixel can take, e.g. 17 for the small digits, 256 for 8-bit images.

    Returns:
        A `Likelihood`; out has a trailing axis of `levels`. Samples are int32.

    Raises:
        ValueError: if there are fewer than two levels.
    """
    _check_levels(levels)
    return Likelihood(
        log_prob=lambda out, x: jnp.sum(categorical_log_prob(x, out)),
        sample=lambda key, out: jax.random.categorical(check_key(key), out).astype(jnp.int32),
        mean=lambda out: jax.nn.softmax(out) @ jnp.arange(levels, dtype=out.dtype),
        embed=lambda x: _embed_levels(x, levels),
        out_shape=lambda shape: (*shape, levels),
    )


def one_hot(levels: int) -> Likelihood:
    """Build p(x | out) = prod_i softmax(out_i) . x_i, for x one-hot on its last axis.

    log p(x | out) = sum_i x_i . log softmax(out_i) is linear in x, so that soft copies of x are accepted too, as
    relaxed estimators need of a prior of codes.

    Args:
        levels: length of the last axis, e.g. the size of a codebook.

    Returns:
        A `Likelihood`; out has the shape of x. Samples are int32; `embed` shows x as it is, in floats.

    Raises:
        ValueError: if there are fewer than two levels; at trace time, if the last axis has another length.
    """
    _check_levels(levels)

    def checked(out: Array) -> Array:
        if out.shape[-1:] != (levels,):
            raise ValueError(
                f"out: got shape {out.shape}, expected a last axis of {levels}, one logit a level"
            )
        return out

    return Likelihood(
        log_prob=lambda out, x: jnp.sum(x.astype(out.dtype) * jax.nn.log_softmax(checked(out))),
        sample=lambda key, out: jax.nn.one_hot(
            jax.random.categorical(check_key(key), checked(out)), levels, dtype=jnp.int32
        ),
        mean=lambda out: jax.nn.softmax(checked(out)),
        embed=lambda x: x.astype(jnp.float32),
        out_shape=lambda shape: shape,
    )


def discretized_logistic(levels: int) -> Likelihood:
    """Build p(x | out) = prod_i (mass of a logistic on the bin of x_i), for x in {0..levels-1}.

    Args:
        levels: how many values a pixel can take.

    Returns:
        A `Likelihood`; out has a trailing axis of 2, (loc, log_scale) in the units of `embed`. Samples are
        int32.

    Raises:
        ValueError: if there are fewer than two levels.

    Source: Salimans et al., PixelCNN++, 2017, with one component.
    """
    _check_levels(levels)

    def sample(key: Key, out: Array) -> Array:
        loc, log_scale = out[..., 0], out[..., 1]
        y = loc + jnp.exp(log_scale) * jax.random.logistic(check_key(key), loc.shape, loc.dtype)
        k = jnp.round((y + 1.0) * ((levels - 1) / 2.0))
        return jnp.clip(k, 0, levels - 1).astype(jnp.int32)

    def mean(out: Array) -> Array:
        # E[x] = sum over k >= 1 of P(x >= k), and x >= k above the lower edge of bin k.
        edges = (2.0 * jnp.arange(1, levels, dtype=out.dtype) - 1.0) / (levels - 1) - 1.0
        edges = edges.reshape((1,) * (out.ndim - 1) + edges.shape)
        return jnp.sum(jax.nn.sigmoid((out[..., :1] - edges) * jnp.exp(-out[..., 1:])), axis=-1)

    return Likelihood(
        log_prob=lambda out, x: jnp.sum(discretized_logistic_log_prob(x, out[..., 0], out[..., 1], levels)),
        sample=sample,
        mean=mean,
        embed=lambda x: _embed_levels(x, levels),
        out_shape=lambda shape: (*shape, 2),
    )


def gaussian(scale: float | None = None) -> Likelihood:
    """Build p(x | out) = prod_i N(x_i; loc_i, scale^2), for real x.

    Args:
        scale: a fixed standard deviation, then out = loc; or None, then out has a trailing axis of 2,
            (loc, log_scale), and the scale is learned.

    Returns:
        A `Likelihood`. Its log_prob is a density: on integer data, dequantise first.

    Raises:
        ValueError: if a fixed scale is not positive and finite.
    """
    if scale is None:
        return Likelihood(
            log_prob=lambda out, x: jnp.sum(normal_log_prob(x, out[..., 0], out[..., 1])),
            sample=lambda key, out: (
                out[..., 0]
                + jnp.exp(out[..., 1]) * jax.random.normal(check_key(key), out[..., 0].shape, out.dtype)
            ),
            mean=lambda out: out[..., 0],
            embed=lambda x: x,
            out_shape=lambda shape: (*shape, 2),
        )
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale: got {scale}, expected a positive number, or None to learn it")
    log_scale = math.log(scale)
    return Likelihood(
        log_prob=lambda out, x: jnp.sum(normal_log_prob(x, out, jnp.full_like(out, log_scale))),
        sample=lambda key, out: out + scale * jax.random.normal(check_key(key), out.shape, out.dtype),
        mean=lambda out: out,
        embed=lambda x: x,
        out_shape=lambda shape: shape,
    )
