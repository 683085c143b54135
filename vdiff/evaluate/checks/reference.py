r"""What a pilot sample tells of a random tree y: which leaves have atoms, their levels, where the mass lies.

y is handled as two vectors: c, all coordinates with a density, and d, for each discrete coordinate the index
of its level. The reference density over them, fitted to the pilot and easy to draw from, is

    h(c, d) = N(c; loc, S L L^T S) prod_k frequency_k(d_k),   S = diag(scale)

with L the Cholesky factor of the correlations, or the identity where there are many coordinates.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vdiff.densities import LOG_2_PI
from vdiff.evaluate.checks.structure import component_name
from vdiff.types import PyTree

MAX_PICKED = 64
MAX_LEVELS = 256
MAX_CORRELATED = 64


class Joint(NamedTuple):
    """Hold what is drawn: the pair (x, z), or z alone with x = ()."""

    x: PyTree
    z: PyTree


class Atoms(NamedTuple):
    """Hold the values of a discrete leaf of n coordinates.

    Attributes:
        levels: [L], in order.
        log_frequency: [n, L], how often a coordinate took a level, nats.
        row_total: [rows], the sum of level indices along the last axis where all draws agree on it, as
            one-hot vectors and permutations do; else NaN.
    """

    levels: np.ndarray | Array
    log_frequency: np.ndarray | Array
    row_total: np.ndarray | Array


class Reference(NamedTuple):
    """Hold the reference density, and which coordinates to look at.

    Attributes:
        atoms: for each leaf its `Atoms`, or None where it has a density.
        low: [C], the least value of each continuous coordinate.
        high: [C], the greatest.
        loc: [C], the mean.
        scale: [C], the standard deviation.
        factor: [C, C], Cholesky factor of the correlations; None where there are many.
        paired: continuous coordinates to be tested against others.
        moved: discrete coordinates to be moved.
        num_levels: [D], of each discrete coordinate.
        row_start: [D], where its row, along the last axis of its leaf, begins.
        row_width: [D], how long that row is.
        is_exchanged: [D], whether it may only change places with another of its row.
    """

    atoms: tuple[Atoms | None, ...]
    low: np.ndarray | Array
    high: np.ndarray | Array
    loc: np.ndarray | Array
    scale: np.ndarray | Array
    factor: np.ndarray | Array | None
    paired: np.ndarray | Array
    moved: np.ndarray | Array
    num_levels: np.ndarray | Array
    row_start: np.ndarray | Array
    row_width: np.ndarray | Array
    is_exchanged: np.ndarray | Array


class Names(NamedTuple):
    """Hold the names of coordinates: all continuous ones, those `paired`, and the discrete ones `moved`."""

    continuous: list[str]
    paired: list[str]
    moved: list[str]


def fit_reference(draws: PyTree, *others: PyTree) -> Reference:
    """Learn from a pilot sample.

    A leaf is discrete if its dtype is, or if its draws repeat. Of each leaf are chosen the first coordinates,
    where a key used twice gives the same noise, and those of the largest variance.

    Args:
        draws: a tree of [N, ...].
        others: more such trees, whose values count as levels too.

    Returns:
        A `Reference`.
    """
    trees = [[np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (draws, *others)]
    num_chosen = max(2, min(16, MAX_PICKED // max(len(trees[0]), 1)))
    atoms, ranges, chosen, rows = [], [np.zeros((4, 0))], ([], []), [np.zeros((4, 0), np.int32)]
    standard = []
    for leaf, *more in zip(*trees, strict=True):
        flat, kind = leaf.reshape(len(leaf), math.prod(leaf.shape[1:])), int(_has_atoms(leaf))
        done = sum(part.shape[1] for part in (rows if kind else ranges))
        chosen[kind].append(done + _choose(flat, num_chosen))
        if kind:
            atoms.append(_fit_atoms(leaf, more))
            rows.append(_rows(leaf.shape[1:], done, atoms[-1]))
        else:
            atoms.append(None)
            ranges.append(_range(leaf))
            standard.append((flat.astype(np.float64) - ranges[-1][2]) / ranges[-1][3])
    low, high, loc, scale = np.concatenate(ranges, axis=1).astype(np.float32)
    factor = None
    if 0 < len(loc) <= MAX_CORRELATED:
        standard = np.concatenate(standard, axis=1)
        # The jitter lets a degenerate sample, such as that of one key used twice, through.
        covariance = standard.T @ standard / len(standard) + 1e-6 * np.eye(len(loc))
        factor = np.linalg.cholesky(covariance).astype(np.float32)
    num_levels, row_start, row_width, is_exchanged = np.concatenate(rows, axis=1)
    none = [np.zeros(0, np.int32)]
    paired, moved = (np.concatenate(none + list(each)).astype(np.int32) for each in chosen)
    return Reference(
        tuple(atoms), low, high, loc, scale, factor, paired, moved,
        num_levels, row_start, row_width, is_exchanged.astype(bool),
    )  # fmt: skip


def split(reference: Reference, y: PyTree) -> tuple[Float[Array, " C"], Int[Array, " D"]]:
    """Return y's continuous coordinates, and the level indices of its discrete ones, -1 where unknown."""
    c, d = [jnp.zeros(0)], [jnp.zeros(0, jnp.int32)]
    for leaf, atoms in zip(jax.tree.leaves(y), reference.atoms, strict=True):
        if atoms is None:
            c.append(jnp.ravel(leaf).astype(jnp.float32))
        else:
            is_level = jnp.ravel(leaf)[:, None] == jnp.asarray(atoms.levels)[None, :]
            index = jnp.argmax(is_level, axis=1).astype(jnp.int32)
            d.append(jnp.where(jnp.any(is_level, axis=1), index, -1))
    return jnp.concatenate(c), jnp.concatenate(d)


def merge(reference: Reference, y: PyTree, c: Float[Array, " C"], d: Int[Array, " D"]) -> PyTree:
    """Return y with its coordinates replaced; one of an unknown level stays as it is."""
    leaves, tree = jax.tree.flatten(y)
    merged = []
    for leaf, atoms in zip(leaves, reference.atoms, strict=True):
        size = jnp.size(leaf)
        if atoms is None:
            flat, c = c[:size].astype(jnp.result_type(leaf)), c[size:]
        else:
            flat = jnp.where(d[:size] >= 0, jnp.asarray(atoms.levels)[d[:size]], jnp.ravel(leaf))
            d = d[size:]
        merged.append(jnp.reshape(flat, jnp.shape(leaf)))
    return jax.tree.unflatten(tree, merged)


def coordinate_names(reference: Reference, y: PyTree) -> Names:
    """Name the coordinates of y by their paths, such as "z['u'][0, 1]"."""
    names = ([], [])
    for (path, leaf), atoms in zip(jax.tree_util.tree_leaves_with_path(y), reference.atoms, strict=True):
        names[atoms is not None].extend(component_name(path, at) for at in np.ndindex(jnp.shape(leaf)))
    continuous, discrete = names
    return Names(
        continuous, [continuous[j] for j in reference.paired], [discrete[k] for k in reference.moved]
    )


def is_inside(reference: Reference, c: Float[Array, " C"], d: Int[Array, " D"]) -> Bool[Array, ""]:
    """Tell whether every coordinate is in the pilot's range, every level known, every fixed row sum kept."""
    inside = jnp.all((c >= reference.low) & (c <= reference.high)) & jnp.all(d >= 0)
    for atoms in reference.atoms:
        if atoms is not None:
            size, num_rows = atoms.log_frequency.shape[0], atoms.row_total.shape[0]
            total = jnp.sum(d[:size].reshape(num_rows, -1), axis=1).astype(jnp.float32)
            inside &= jnp.all((total == atoms.row_total) | jnp.isnan(atoms.row_total))
            d = d[size:]
    return inside


def features(reference: Reference, c: Float[Array, " C"], d: Int[Array, " D"]) -> Float[Array, " F"]:
    """Return the chosen coordinates, standardised and bounded: what an identity is weighted by."""
    u = jnp.clip((c - reference.loc) / reference.scale, -4.0, 4.0)[reference.paired]
    return jnp.concatenate([u, positions(reference, d)[reference.moved]])


def positions(reference: Reference, d: Int[Array, " D"]) -> Float[Array, " D"]:
    """Place each level index in [-1, 1]; an unknown level at 0."""
    last = jnp.maximum(jnp.asarray(reference.num_levels) - 1, 1).astype(jnp.float32)
    return jnp.where(d >= 0, 2.0 * d.astype(jnp.float32) / last - 1.0, 0.0)


def move(
    reference: Reference, d: Int[Array, " D"], k: Int[Array, ""], noise: Float[Array, " 2"]
) -> Int[Array, " D"]:
    """Move coordinate k by a symmetric kernel: to another level, or to another place in its row.

    Args:
        reference: knows its levels and its row.
        d: level indices.
        k: which to move.
        noise: uniform in [0, 1).

    Returns:
        The level indices; the same where one that is moved is unknown.
    """
    num_levels, start, width, is_exchanged = (
        jnp.asarray(each)[k]
        for each in (reference.num_levels, reference.row_start, reference.row_width, reference.is_exchanged)
    )
    step = 1 + jnp.floor(noise[0] * (num_levels - 1).astype(noise.dtype)).astype(jnp.int32)
    place = start + jnp.floor(noise[1] * width.astype(noise.dtype)).astype(jnp.int32)
    place = jnp.where(is_exchanged, place, k)
    other = jnp.where(is_exchanged, d[place], (d[k] + step) % num_levels)
    moved = d.at[place].set(jnp.where(is_exchanged, d[k], other)).at[k].set(other)
    return jnp.where((d[k] >= 0) & (d[place] >= 0), moved, d)


def transport(reference: Reference, noise: Float[Array, " N"]) -> tuple[Float[Array, " C"], Int[Array, " D"]]:
    """Map uniform noise, in (0, 1), to a draw (c, d) of the reference density."""
    num_continuous = reference.loc.shape[0]
    u, noise = jax.scipy.special.ndtri(noise[:num_continuous]), noise[num_continuous:]
    u = u if reference.factor is None else reference.factor @ u
    d = [jnp.zeros(0, jnp.int32)]
    for atoms in reference.atoms:
        if atoms is not None:
            num_discrete, num_levels = atoms.log_frequency.shape
            below = jnp.cumsum(jnp.exp(jnp.asarray(atoms.log_frequency)), axis=1) < noise[:num_discrete, None]
            index, noise = jnp.sum(below, axis=1), noise[num_discrete:]
            d.append(jnp.minimum(index, num_levels - 1).astype(jnp.int32))
    return reference.loc + reference.scale * u, jnp.concatenate(d)


def log_prob(reference: Reference, c: Float[Array, " C"], d: Int[Array, " D"]) -> Float[Array, ""]:
    """Evaluate log h(c, d), nats; an unknown level counts as the last one."""
    u = (c - reference.loc) / reference.scale
    total = -jnp.sum(jnp.log(reference.scale)) - 0.5 * c.size * LOG_2_PI
    if reference.factor is not None:
        u = jax.scipy.linalg.solve_triangular(jnp.asarray(reference.factor), u, lower=True)
        total -= jnp.sum(jnp.log(jnp.diag(reference.factor)))
    total -= 0.5 * jnp.sum(jnp.square(u))
    for atoms in reference.atoms:
        if atoms is not None:
            size = atoms.log_frequency.shape[0]
            total += jnp.sum(jnp.take_along_axis(jnp.asarray(atoms.log_frequency), d[:size, None], axis=1))
            d = d[size:]
    return total


def _has_atoms(leaf: np.ndarray) -> bool:
    return not jnp.issubdtype(leaf.dtype, jnp.inexact) or 0 < len(np.unique(leaf)) <= leaf.size / 2


def _choose(flat: np.ndarray, num_chosen: int) -> np.ndarray:
    first = np.arange(min(num_chosen // 2, flat.shape[1]))
    order = np.argsort(-flat.astype(np.float64).var(axis=0), kind="stable")
    return np.union1d(first, order[: num_chosen - len(first)])


def _range(leaf: np.ndarray) -> np.ndarray:
    """Return [4, n]: low, high, mean and standard deviation of each coordinate."""
    flat = leaf.reshape(len(leaf), math.prod(leaf.shape[1:])).astype(np.float64)
    low, high, loc, scale = flat.min(0), flat.max(0), flat.mean(0), flat.std(0)
    # A point on the simplex has no density in its coordinates: an empty range keeps it out of every test.
    if leaf.ndim > 1 and leaf.shape[-1] > 1 and np.all(np.abs(leaf.sum(axis=-1) - 1.0) < 1e-4):
        low, high = loc, loc
    return np.stack([low, high, loc, np.where(scale > 0, scale, 1.0)])


def _fit_atoms(leaf: np.ndarray, others: list[np.ndarray]) -> Atoms:
    levels, count = np.unique(np.concatenate([each.ravel() for each in (leaf, *others)]), return_counts=True)
    levels = np.sort(levels[np.argsort(-count, kind="stable")[:MAX_LEVELS]])
    flat = leaf.reshape(len(leaf), math.prod(leaf.shape[1:]))
    frequency = np.stack([np.sum(flat == level, axis=0) for level in levels], axis=1) + 0.5
    frequency = frequency / frequency.sum(axis=1, keepdims=True)
    width = leaf.shape[-1] if leaf.ndim > 1 else 1
    rows = np.searchsorted(levels, flat).reshape(len(leaf), -1, width).sum(axis=-1)
    is_fixed = width > 1 and np.all(rows == rows[:1]) and len(np.unique(flat)) > 1
    total = np.where(is_fixed, rows[0], np.nan).astype(np.float32)
    return Atoms(levels, np.log(frequency).astype(np.float32), total)


def _rows(shape: tuple[int, ...], done: int, atoms: Atoms) -> np.ndarray:
    """Return [4, n]: number of levels, row start, row width and whether a move must exchange."""
    size, width = math.prod(shape), shape[-1] if shape else 1
    start = done + np.arange(size) // max(width, 1) * width
    is_exchanged = np.repeat(np.isfinite(atoms.row_total), width)
    return np.stack([np.full(size, len(atoms.levels)), start, np.full(size, width), is_exchanged]).astype(
        np.int32
    )
