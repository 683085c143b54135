"""The arguments of a loaded function: checked against those it was exported with, and laid out in rows of data."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.exported.containers import plain
from vdiff.types import PyTree


class Spec(NamedTuple):
    """Hold what is expected of one array.

    Attributes:
        name: of the argument and where in it the array lies.
        shape: of one datum's.
        dtype: of the array.
        has_rows: whether each datum has its own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    has_rows: bool


def leaves_of(args: Sequence[PyTree], in_tree: Any, names: Sequence[str]) -> list[Array]:
    """Take arguments apart.

    Args:
        args: the arguments.
        in_tree: the structure of the exported ones.
        names: theirs.

    Returns:
        The arrays in them.

    Raises:
        TypeError: if they are not built as the exported ones were.
    """
    if len(args) != len(names):
        raise TypeError(f"arguments: got {len(args)}, expected {len(names)} ({', '.join(names)})")
    plains = [plain(arg, name) for arg, name in zip(args, names, strict=True)]
    for name, arg, expected in zip(names, plains, in_tree.children(), strict=True):
        got = jax.tree.structure(arg)
        if got != expected:
            raise TypeError(
                f"{name}: got a tree {_short(got)}, expected {_short(expected)}, as it was exported"
            )
    return [jnp.asarray(leaf) for leaf in jax.tree.leaves(plains)]


def lay_out(leaves: Sequence[Array], specs: Sequence[Spec]) -> tuple[tuple[int, ...], list[Array]]:
    """Lay arrays with any leading axes out in rows.

    What has no leading axes is the same in all rows; but a typed key is folded with each row's position.

    Args:
        leaves: the arrays.
        specs: what is expected of each.

    Returns:
        The batch's shape, and the arrays: those that data have their own of have one axis for them all.

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or leading axes differ.
    """
    leads = [_lead(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)]
    batch = max(leads, key=len)
    for lead, spec in zip(leads, specs, strict=True):
        if lead not in ((), batch) or 0 in batch:
            raise ValueError(
                f"{spec.name}: got leading axes {list(lead)} beside {list(batch)}, expected none, or the same for all "
                "and at least one datum"
            )
    size = math.prod(batch)

    def in_rows(leaf: Array, lead: tuple[int, ...], spec: Spec) -> Array:
        if not spec.has_rows:
            return leaf
        if lead == batch:
            return leaf.reshape(size, *spec.shape)
        if _is_key(spec):
            positions = jnp.arange(size).reshape(size, *(1,) * leaf.ndim)
            return jnp.vectorize(jax.random.fold_in)(leaf[None], positions)
        return jnp.broadcast_to(leaf[None], (size, *spec.shape))

    return batch, [in_rows(*each) for each in zip(leaves, leads, specs, strict=True)]


def _lead(leaf: Array, spec: Spec) -> tuple[int, ...]:
    """Return the leading axes of an array beyond one datum's."""
    if leaf.dtype != spec.dtype:
        fix = "make it with jax.random.key(seed)" if _is_key(spec) else "convert it by astype"
        raise TypeError(f"{spec.name}: got dtype {leaf.dtype}, expected {spec.dtype}; {fix}")
    lead = leaf.shape[: max(leaf.ndim - len(spec.shape), 0)]
    if leaf.shape != (*lead, *spec.shape) or (lead and not spec.has_rows):
        expected = ", ".join(map(str, (*("...",)[: spec.has_rows], *spec.shape)))
        raise ValueError(f"{spec.name}: got shape {list(leaf.shape)}, expected [{expected}]")
    return lead


def _is_key(spec: Spec) -> bool:
    return jnp.issubdtype(spec.dtype, jax.dtypes.prng_key)


def _short(tree: Any) -> str:
    text = str(tree).removeprefix("PyTreeDef(").removesuffix(")")
    return text if len(text) < 200 else text[:200] + "..."
