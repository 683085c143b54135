"""Trees made of dicts, lists and tuples alone: what a file can hold without the classes of whoever wrote it."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vdiff.types import PyTree


def plain(tree: PyTree, name: str) -> PyTree:
    """Turn the NamedTuples of a tree into dicts.

    Args:
        tree: arrays in dicts with string keys, lists, tuples and NamedTuples; None where there is nothing.
        name: of the tree, for errors.

    Returns:
        The same arrays, in dicts, lists and tuples.

    Raises:
        TypeError: if the tree holds anything else.
    """
    if hasattr(tree, "_fields"):
        return {field: plain(getattr(tree, field), f"{name}.{field}") for field in tree._fields}
    if type(tree) in (list, tuple):
        return type(tree)(plain(child, f"{name}[{i}]") for i, child in enumerate(tree))
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {key: plain(child, f"{name}[{key!r}]") for key, child in tree.items()}
    if tree is None or hasattr(tree, "dtype") or isinstance(tree, (bool, int, float, complex)):
        return tree
    raise TypeError(
        f"{name}: got {type(tree).__name__}, expected arrays in dicts with string keys, lists, tuples and NamedTuples"
    )


def like(example: PyTree, tree: PyTree) -> PyTree:
    """Undo `plain`: give a tree the NamedTuples of an example.

    Args:
        example: the tree that `plain` was given, or one of the same structure.
        tree: what it returned, or the same structure with other leaves.

    Returns:
        The leaves of `tree` in the containers of `example`.
    """
    if hasattr(example, "_fields"):
        return type(example)(*(like(getattr(example, field), tree[field]) for field in example._fields))
    if type(example) in (list, tuple):
        return type(example)(like(*pair) for pair in zip(example, tree, strict=True))
    if type(example) is dict:
        return {key: like(child, tree[key]) for key, child in example.items()}
    return tree


def write_tree(path: Path, tree: PyTree, name: str) -> None:
    """Write a tree to an .npz: its arrays, in jax's order, by names such as "theta/Dense_0/kernel", and its structure.

    Args:
        path: the .npz.
        tree: see `plain`.
        name: of the tree, for errors.

    Raises:
        TypeError: see `plain`.
        ValueError: if two arrays have one name, by a key with a slash in it.
    """
    arrays: dict[str, np.ndarray] = {}

    def describe(tree: PyTree, at: str) -> Any:
        if isinstance(tree, dict):
            return {"dict": {key: describe(tree[key], f"{at}/{key}") for key in sorted(tree)}}
        if isinstance(tree, (list, tuple)):
            kind = type(tree).__name__
            return {kind: [describe(child, f"{at}/{i}") for i, child in enumerate(tree)]}
        if tree is None:
            return None
        leaf, key = np.asarray(tree), at.removeprefix("/")
        if key in arrays or key == _STRUCTURE:
            raise ValueError(f"{name}: got two arrays called {key}, expected keys that tell them apart")
        arrays[key] = leaf
        return {"array": key, "dtype": str(leaf.dtype)}

    structure = json.dumps(describe(plain(tree, name), ""))
    with path.open("wb") as file:
        np.savez(file, **arrays, **{_STRUCTURE: np.asarray(structure)})


def read_tree(path: Path) -> PyTree:
    """Read what `write_tree` wrote: NumPy arrays in dicts, lists and tuples."""

    def build(described: Any) -> PyTree:
        match described:
            case {"dict": children}:
                return {key: build(child) for key, child in children.items()}
            case {"list": children}:
                return [build(child) for child in children]
            case {"tuple": children}:
                return tuple(build(child) for child in children)
            case {"array": key, "dtype": dtype}:
                # NumPy's own files do not know bfloat16 and its like: their bits are there, their name is not.
                return file[key].view(jnp.dtype(dtype))
        return None

    with np.load(path, allow_pickle=False) as file:
        return build(json.loads(str(file[_STRUCTURE])))


_STRUCTURE = "structure.json"
