r"""Identities that hold if a sampler draws from a log-density: each the mean of a statistic that must be zero.

With y ~ p_w in continuous coordinates c and discrete ones d (`reference`), and u = (c - loc) / scale,

    score            E[ d log p / d w ] = 0
    Stein            E[ f phi_j d_j log p + d_j(f phi_j) ] = 0,   f = 1 or u_i
    moves            E[ sigmoid(log p(y') - log p(y)) (F(y) - F(y')) ] = 0,   y -> y' symmetric, F = d_k or d_k u_i
    normalisation    E_p[ 1_B h / (h + p) ] = E_h[ 1_B p / (h + p) ]
    pathwise         E[ f'(c) dc/dw ] = E[ f d log p / d w ],   f = sum_j +-(sin u_j + cos u_j)

They are chosen to be sound for any density. phi_j is a trapezoid that vanishes outside a pilot sample's range,
so that no boundary term appears where a support ends (a uniform, an exponential, an angle). A move is weighted
by Barker's acceptance, bounded where p(y') / p(y) has heavy tails and zero where y' cannot be. h / (h + p), with
B the pilot's range, is bounded too, and silent where h and p do not overlap. Only Stein's second order (f = u_i)
and moves weighted by another coordinate see noise that was used twice.

A mean is judged by z = mean / sqrt(s^2 / N + (3 M / N)^2), s^2 the mean square and M the largest magnitude: three
more draws like the largest. With heavy tails, or events so rare that none was drawn, s alone is too small. The
largest |z| of m components counts as sqrt(z^2 - 2 log m), whose Gaussian tail exp(-z^2 / 2) is m times larger.
With many parameters a draw stands for the mean of a block of B, whose gradient costs as much as that of one. Few
blocks raise no more alarms: s^2, the mean not taken off, keeps |z| below their square root, and its tail Gaussian.

Source: Stein, A Bound for the Error in the Normal Approximation, 1972; Gorham and Mackey, Measuring Sample
Quality with Stein's Method, 2015; Grosse and Duvenaud, Testing MCMC Code, 2014; Barker, Monte Carlo Calculations
of the Radial Distribution Functions, 1965; Bennett, Efficient Estimation of Free Energy Differences, 1976.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vdiff.evaluate.checks.reference import (
    Reference,
    features,
    is_inside,
    log_prob,
    merge,
    move,
    positions,
    split,
    transport,
)
from vdiff.evaluate.checks.structure import with_leaves
from vdiff.types import Key, PyTree

UNSEEN_DRAWS = 3.0


class Moments(NamedTuple):
    """Hold means over draws, trees of one structure; `moments` tells how they follow from means over blocks.

    Attributes:
        mean: of each component.
        mean_square: of its square.
        largest: its greatest magnitude.
    """

    mean: PyTree
    mean_square: PyTree
    largest: PyTree


class Worst(NamedTuple):
    """Hold the component whose mean is farthest from zero.

    Attributes:
        z_score: its |z|, corrected for the number of components; NaN if a mean is not finite.
        path: of its leaf in the tree.
        index: its place in the leaf.
        mean: its mean.
        std_error: the standard error of that.
        num_tested: how many components were ever different from zero.
        largest: the greatest magnitude in any draw, over all components.
    """

    z_score: float
    path: tuple
    index: tuple[int, ...]
    mean: float
    std_error: float
    num_tested: int
    largest: float


def identities(
    keys: Key,
    log_density: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    learned: PyTree,
    y: PyTree,
    reference: Reference,
) -> dict[str, PyTree]:
    """Average over a block of draws y the statistics whose means are zero.

    Args:
        keys: typed keys [B], for the moves and the reference.
        log_density: `(params, y) -> []`, nats.
        params: its parameters.
        learned: the leaves of params to differentiate by, None in place of the others.
        y: draws, a tree of [B, ...].
        reference: fitted to other draws.

    Returns:
        {"score": tree like learned, "Stein": a dict of arrays, "moves": [K, 1 + F],
        "normalisation": {"difference": [], "overlap": [], whose mean is not zero}}.
    """
    num_draws, num_moved = keys.shape[0], reference.moved.shape[0]
    c, d = jax.vmap(functools.partial(split, reference), axis_size=num_draws)(y)

    def log_p(learned: PyTree, y: PyTree, c: Array, d: Array) -> Array:
        return log_density(with_leaves(params, learned), merge(reference, y, c, d))

    def total(learned: PyTree, c: Array) -> tuple[Array, Array]:
        values = jax.vmap(log_p, in_axes=(None, 0, 0, 0))(learned, y, c, d)
        return jnp.sum(values), values

    def at_one(key: Key, y: PyTree, c: Array, d: Array, value: Array, slope: Array) -> dict[str, PyTree]:
        # One draw of noise and one batch of densities for all: both are slow to compile.
        noise = jax.random.uniform(key, (2 * num_moved + c.size + d.size,), minval=1e-6)
        c_h, d_h = transport(reference, noise[2 * num_moved :])
        d_moved = jnp.zeros((0, d.size), jnp.int32)
        if num_moved:
            by_one = functools.partial(move, reference, d)
            d_moved = jax.vmap(by_one)(jnp.asarray(reference.moved), noise[: 2 * num_moved].reshape(-1, 2))
        other_c = jnp.concatenate([c_h[None], jnp.tile(c, (num_moved, 1))])
        other_d = jnp.concatenate([d_h[None], d_moved])
        others = jax.vmap(log_p, in_axes=(None, None, 0, 0))(learned, y, other_c, other_d)
        # Many densities answer NaN outside their support; at what was drawn it stays NaN, and fails.
        others = jnp.where(jnp.isnan(others), -jnp.inf, others)
        return {
            "Stein": _stein(reference, c, d, slope),
            "moves": _moves(reference, c, d, d_moved, others[1:] - value),
            "normalisation": _normalisation(reference, (c, d, value), (c_h, d_h, others[0])),
        }

    # The slopes of the sum are those of each draw; its score is one backward pass with products of matrices.
    (score, slopes), values = jax.grad(total, argnums=(0, 1), has_aux=True)(learned, c)
    score = jax.tree.map(lambda s: s / num_draws, score)
    return {"score": score} | _mean(jax.vmap(at_one)(keys, y, c, d, values, slopes))


def _mean(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda v: jnp.mean(v, axis=0), tree)


def _stein(reference: Reference, c: Array, d: Array, slope: Array) -> dict[str, Array]:
    u, ramp = (c - reference.loc) / reference.scale, 0.5 * reference.scale
    from_low, from_high = (c - reference.low) / ramp, (reference.high - c) / ramp
    phi = jnp.clip(jnp.minimum(from_low, from_high), 0.0, 1.0)
    rise = jnp.where(from_low < from_high, 1.0, -1.0) / ramp
    # Where phi is zero the slope may be infinite.
    term = jnp.where(phi > 0, slope, 0.0) * phi + jnp.where((phi > 0) & (phi < 1), rise, 0.0)
    first = reference.scale * term
    second = u * first + phi
    weights = features(reference, c, d)
    # A coordinate's own weight was differentiated in `second`.
    is_other = jnp.arange(weights.size)[None, :] != jnp.arange(reference.paired.size)[:, None]
    return {
        "first": first,
        "second": second,
        "pairs": jnp.where(is_other, first[reference.paired][:, None] * weights[None, :], 0.0),
        "trace": jnp.sum(second) / math.sqrt(max(c.size, 1)),
    }


def _moves(
    reference: Reference, c: Array, d: Array, d_moved: Array, log_ratio: Float[Array, " K"]
) -> Float[Array, "K F"]:
    def weighted(d: Array, k: Array) -> Array:
        return positions(reference, d)[k] * jnp.concatenate([jnp.ones(1), features(reference, c, d)])

    def one(d_moved: Array, k: Array, log_ratio: Array) -> Array:
        return jax.nn.sigmoid(log_ratio) * (weighted(d, k) - weighted(d_moved, k))

    if log_ratio.size == 0:
        return jnp.zeros((0, 1 + reference.paired.shape[0]))
    return jax.vmap(one)(d_moved, jnp.asarray(reference.moved), log_ratio)


def _normalisation(
    reference: Reference, of_p: tuple[Array, Array, Array], of_h: tuple[Array, Array, Array]
) -> dict[str, Array]:
    """Compare at a draw (c, d, log p) of p and one of h; a density over a single point has log p = 0."""
    (c, d, value), (c_h, d_h, value_h) = of_p, of_h
    if c.size + d.size == 0:
        return {"difference": jnp.expm1(value), "overlap": jnp.ones(())}
    at_p = jax.nn.sigmoid(log_prob(reference, c, d) - value)
    at_h = jax.nn.sigmoid(value_h - log_prob(reference, c_h, d_h))
    at_p = jnp.where(is_inside(reference, c, d), at_p, 0.0)
    at_h = jnp.where(is_inside(reference, c_h, d_h), at_h, 0.0)
    return {"difference": at_p - at_h, "overlap": at_p + at_h}


def pathwise_difference(
    keys: Key,
    draw_z: Callable[[Key, PyTree], PyTree],
    log_q: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    learned: PyTree,
    loc: PyTree,
    scale: PyTree,
) -> dict[str, PyTree]:
    """Average over a block of draws the pathwise gradient of E f(z) less its score-function gradient.

    Args:
        keys: typed keys [B].
        draw_z: `(key, params) -> z`, every leaf floating.
        log_q: `(params, z) -> []`, nats.
        params: their parameters.
        learned: the leaves of params to differentiate by, None in place of the others.
        loc: like z, about its mean.
        scale: like z, about its standard deviation.

    Returns:
        {"difference": of mean zero, "gradient": the pathwise one}, each like learned.
    """

    def f(z: PyTree) -> Array:
        value = jnp.zeros(())
        for i, leaf_at_by in enumerate(zip(*map(jax.tree.leaves, (z, loc, scale)), strict=True)):
            leaf, at, by = leaf_at_by
            sign = np.random.default_rng(i).choice([-1.0, 1.0], leaf.shape).astype(leaf.dtype)
            u = (leaf - at) / by
            # The mean of cos u is exp(-1/2) for a Gaussian; taking it off lowers the variance of f times the score.
            value += jnp.sum(sign * (jnp.sin(u) + jnp.cos(u) - math.exp(-0.5))).astype(jnp.float32)
        return value

    def of_draws(learned: PyTree) -> tuple[Array, tuple[PyTree, Array]]:
        z = jax.vmap(draw_z, in_axes=(0, None))(keys, with_leaves(params, learned))
        values = jax.vmap(f)(z)
        return jnp.mean(values), (z, values)

    def of_density(learned: PyTree) -> Array:
        return jnp.mean(values * jax.vmap(log_q, in_axes=(None, 0))(with_leaves(params, learned), z))

    pathwise, (z, values) = jax.grad(of_draws, has_aux=True)(learned)
    difference = jax.tree.map(jnp.subtract, pathwise, jax.grad(of_density)(learned))
    return {"difference": difference, "gradient": pathwise}


def moments(
    statistic: Callable[[Key], PyTree], key: Key, num_draws: int, chunk_size: int, block_size: int = 1
) -> Moments:
    """Average a statistic over draws, a chunk of blocks at a time.

    Args:
        statistic: `(keys [B]) -> tree of float arrays`, means over a block of B draws.
        key: a typed key.
        num_draws: N, rounded up to whole chunks.
        chunk_size: how many blocks are held at once.
        block_size: B.

    Returns:
        The `Moments` of single draws: B times the mean square of a block's mean, and the magnitude of a draw
        that would make one block's mean as large as the largest.
    """
    num_chunks = -(-num_draws // (chunk_size * block_size))

    def add(sums: Moments, key: Key) -> tuple[Moments, None]:
        values = jax.vmap(statistic)(jax.random.split(key, (chunk_size, block_size)))
        mean = jax.tree.map(lambda s, v: s + jnp.mean(v, axis=0) / num_chunks, sums.mean, values)
        square = jax.tree.map(
            lambda s, v: s + jnp.mean(jnp.square(v), axis=0) / num_chunks, sums.mean_square, values
        )
        largest = jax.tree.map(lambda s, v: jnp.maximum(s, jnp.max(jnp.abs(v), axis=0)), sums.largest, values)
        return Moments(mean, square, largest), None

    like = jax.eval_shape(statistic, jax.random.split(key, block_size))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
    sums = jax.lax.scan(add, Moments(zeros, zeros, zeros), jax.random.split(key, num_chunks))[0]
    if block_size == 1:
        return sums
    largest = jax.tree.map(functools.partial(_largest_draw, block_size), sums.mean_square, sums.largest)
    return Moments(sums.mean, jax.tree.map(lambda v: block_size * v, sums.mean_square), largest)


def _largest_draw(block_size: int, square: Array, largest: Array) -> Array:
    """Return how large a draw was that made its block's mean the largest.

    Either all draws of the block did, each sqrt(B) times as large, or one alone that exceeds the noise of the others.
    """
    noise = 9.0 * (1.0 - 1.0 / block_size) * square
    alone = block_size * jnp.sqrt(jnp.maximum(jnp.square(largest) - noise, 0.0))
    return jnp.maximum(alone, math.sqrt(block_size) * largest)


def worst(means: Moments, num_draws: int) -> Worst:
    """Find the component whose mean is farthest from zero, in standard errors.

    Args:
        means: of `num_draws` draws, NumPy or jax.
        num_draws: N.

    Returns:
        The `Worst`; of no component, all zero.
    """
    found = Worst(0.0, (), (), 0.0, 0.0, 0, 0.0)
    paths = jax.tree_util.tree_leaves_with_path(means.mean)
    rest = zip(jax.tree.leaves(means.mean_square), jax.tree.leaves(means.largest), strict=True)
    for (path, mean), (square, largest) in zip(paths, rest, strict=True):
        mean, square, largest = (np.asarray(v, np.float64) for v in (mean, square, largest))
        if mean.size == 0:
            continue
        # A rare event that was not drawn has the magnitude of its like, or of one nat per unit.
        typical = max(3.0 * math.sqrt(np.max(square, initial=0.0, where=np.isfinite(square))), 1.0)
        unseen = UNSEEN_DRAWS * np.maximum(largest, typical) / num_draws
        with np.errstate(invalid="ignore"):
            std_error = np.sqrt(square / num_draws + np.square(unseen))
            z = np.abs(mean) / std_error
        at = np.unravel_index(np.argmax(np.where(np.isnan(z), np.inf, z)), z.shape)
        if not z[at] <= found.z_score:
            index = tuple(int(i) for i in at)
            found = found._replace(
                z_score=float(z[at]),
                path=path,
                index=index,
                mean=float(mean[at]),
                std_error=float(std_error[at]),
            )
        num_tested = found.num_tested + int(np.sum(square > 0))
        found = found._replace(num_tested=num_tested, largest=max(found.largest, float(largest.max())))
        if math.isnan(found.z_score):
            return found
    log_m = math.log(max(found.num_tested, 1))
    return found._replace(z_score=math.sqrt(max(found.z_score**2 - 2.0 * log_m, 0.0)))
