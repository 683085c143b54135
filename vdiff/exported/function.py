r"""A function in a file: exported once, called by any JAX program.

    file = StableHLO of  vmap(f)  for every number of data, for cpu, cuda and tpu, with its derivatives

`jax.export` writes and reads the file; a process that has jax and nothing else runs it by
`jax.export.deserialize(bytes).call(...)`, on a batch. `load_function` adds what that lacks: one datum or any leading
axes, and `vmap` and `grad` of the caller's own code.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vdiff.exported.arguments import Spec, lay_out, leaves_of
from vdiff.exported.containers import like, plain
from vdiff.exported.flattened import Rows, apply_rows
from vdiff.types import PyTree

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    path: str | Path,
    fn: Callable[..., PyTree],
    *example_args: PyTree,
    in_axes: Sequence[int | None] | None = None,
    platforms: Sequence[str] = PLATFORMS,
    vjp_order: int = 1,
) -> None:
    """Write a function of one datum to a file that runs without its code, for every number of data.

        vd.export("score.jaxexport", score, key, params, x, in_axes=(0, None, 0))
        score = vd.load_function("score.jaxexport")                  # or, with jax alone:
        jax.export.deserialize(content).call(keys [b], params, x [b, ...])

    Args:
        path: the file; written whole or not at all.
        fn: a pure function of one datum.
        example_args: its arguments, arrays or `jax.ShapeDtypeStruct` in dicts, lists, tuples and NamedTuples; only
            shapes and dtypes are used. A NamedTuple is a dict in the file, so that its class is not needed there.
        in_axes: by argument, 0 for what each datum has its own of, None for what all share, as in `jax.vmap`. When
            not given, each datum has its own of all.
        platforms: where the file is to run; it need not be made there.
        vjp_order: how many times the function can be differentiated, in reverse mode.

    Raises:
        TypeError: if an argument or the result is not made of arrays and those containers.
        ValueError: if `in_axes` does not fit the arguments; also whatever `fn` raises when it is traced.
        OSError: if the disk does not take it.
    """
    content = to_bytes(fn, *example_args, in_axes=in_axes, platforms=platforms, vjp_order=vjp_order)
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def to_bytes(
    fn: Callable[..., PyTree],
    *example_args: PyTree,
    in_axes: Sequence[int | None] | None = None,
    platforms: Sequence[str] = PLATFORMS,
    vjp_order: int = 1,
) -> bytes:
    """Export a function as `export` does, and return what its file holds."""
    axes = (0,) * len(example_args) if in_axes is None else tuple(in_axes)
    if len(axes) != len(example_args) or not set(axes) <= {0, None} or 0 not in axes:
        raise ValueError(
            f"in_axes: got {in_axes} for {len(example_args)} arguments, expected 0 or None for each, at least one 0"
        )
    (num_rows,) = jax.export.symbolic_shape("b")

    def struct(leaf: Any, axis: int | None) -> jax.ShapeDtypeStruct:
        leaf = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
        return jax.ShapeDtypeStruct(leaf.shape if axis is None else (num_rows, *leaf.shape), leaf.dtype)

    args = [plain(arg, f"argument {i}") for i, arg in enumerate(example_args)]
    structs = [
        jax.tree.map(lambda leaf, axis=axis: struct(leaf, axis), arg)
        for arg, axis in zip(args, axes, strict=True)
    ]

    def of_plain(*args: PyTree) -> PyTree:
        return plain(fn(*map(like, example_args, args)), "result")

    of_plain.__name__ = getattr(fn, "__name__", "function")
    exported = jax.export.export(jax.jit(jax.vmap(of_plain, in_axes=axes)), platforms=platforms)(*structs)
    return bytes(exported.serialize(vjp_order=vjp_order))


def load_function(path: str | Path) -> Callable[..., PyTree]:
    """Read a function from a file that `export` wrote, ready for the caller's own `jit`, `vmap` and `grad`.

    The leading axes of its arguments, beyond those of one datum, are the batch: none, one or several; what lacks them
    is the same for all data. A single typed key given with a batch is folded with each datum's position, so that data
    differ in their noise. It is jitted; reverse-mode derivatives go to the order that was exported. `jax.vmap` of it is
    one call with more data; a map over an argument that all data share, and gradients of it by datum, are one call
    after another.

    Args:
        path: the file.

    Returns:
        `(*args) -> result`; the result's NamedTuples are dicts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or from a jax too new or too old for this one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: got {path}, expected a file written by vdiff.export")
    return from_bytes(path.read_bytes(), str(path))


def from_bytes(
    content: bytes, source: str, names: Sequence[str] = (), about: str | None = None
) -> Callable[..., PyTree]:
    """Make the function that a file holds.

    Args:
        content: what `to_bytes` returned.
        source: named in errors.
        names: of the arguments, for errors; "argument 0" and so on when left out.
        about: its docstring.

    Returns:
        See `load_function`.

    Raises:
        ValueError: if the content cannot be read.
    """
    try:
        exported = jax.export.deserialize(bytearray(content))
        order = _order(exported)
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{source}: got a file that jax {jax.__version__} cannot read ({line}), expected one written by "
            "vdiff.export with a jax of the same half-year; export it anew"
        ) from error
    out_tree, (in_tree, _) = exported.out_tree, exported.in_tree.children()
    names = tuple(names) or tuple(f"argument {i}" for i in range(len(in_tree.children())))
    paths = jax.tree.leaves_with_path(jax.tree.unflatten(in_tree, range(in_tree.num_leaves)))
    specs = []
    for (path, _), aval in zip(paths, exported.in_avals, strict=True):
        has_rows = aval.ndim > 0 and not isinstance(aval.shape[0], int)
        name = names[path[0].idx] + jax.tree_util.keystr(path[1:])
        specs.append(Spec(name, aval.shape[has_rows:], aval.dtype, has_rows))

    def flat(*leaves: Array) -> list[Array]:
        return jax.tree.leaves(exported.call(*jax.tree.unflatten(in_tree, leaves)))

    rows = Rows(
        flat,
        in_rows=[spec.has_rows for spec in specs],
        out_rows=[True] * len(exported.out_avals),
        out_real=[jnp.issubdtype(aval.dtype, np.inexact) for aval in exported.out_avals],
        order=order,
    )

    @jax.jit
    def call(*args: PyTree) -> PyTree:
        batch, arrays = lay_out(leaves_of(args, in_tree, names), specs)
        outs = apply_rows(rows, *arrays)
        return jax.tree.unflatten(out_tree, [out.reshape(*batch, *out.shape[1:]) for out in outs])

    call.__name__ = call.__qualname__ = exported.fun_name
    call.__doc__ = about
    return call


def _order(exported: jax.export.Exported) -> int:
    """Count how many times an exported function can be differentiated."""
    return 1 + _order(exported.vjp()) if exported.has_vjp() else 0
