r"""Give a function of a batch the batching rule that an exported program lacks.

    f: (shared, x [n, ...]) -> y [n, ...],   row by row, for every n

`jax.vmap` over x of such a function is one call of k n rows, and so is a map of maps. What belongs to all rows, the
parameters, has no axis to grow: a map over it, or gradients of it by row, are one call after another. Reverse-mode
derivatives are those of f itself, and are again of this kind, to the order that f has. A gradient of what rows share is
a sum over rows, so that `grad` of a mean of a `vmap` is one call.

A primitive says this once for every order of transformations; a `custom_vjp` under `vmap` would compute the parameters'
gradient row by row before it sums.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


class Rows:
    """Hold a function of flat arrays, and which of them have a row for each datum; compared by identity.

    Attributes:
        call: `(*arrays) -> list of arrays`, for any number of rows.
        in_rows: by argument, whether its leading axis counts rows.
        out_rows: by result, the same; what has none is a sum over rows.
        out_real: by result, whether it is floating-point and so has a derivative.
        order: how many times it can be differentiated.
        compiled: `call` under jit.
    """

    def __init__(
        self,
        call: Callable[..., Sequence[Array]],
        in_rows: Sequence[bool],
        out_rows: Sequence[bool],
        out_real: Sequence[bool],
        order: int,
    ) -> None:
        self.call, self.compiled, self.order = call, jax.jit(call), order
        self.in_rows, self.out_rows, self.out_real = tuple(in_rows), tuple(out_rows), tuple(out_real)


def apply_rows(rows: Rows, *args: Array) -> Sequence[Array]:
    """Call a function of rows, so that `jit`, `vmap` and `grad` around the call know what to do.

    Args:
        rows: the function.
        args: its arguments; those with rows have equally many.

    Returns:
        Its results.
    """
    return _call.bind(*args, rows=rows)


_call = Primitive("exported_rows")
_call.multiple_results = True
_tangent = Primitive("exported_rows_tangent")
_tangent.multiple_results = True


@_call.def_impl
def _run(*args: Array, rows: Rows) -> Sequence[Array]:
    return rows.compiled(*args)


@_call.def_abstract_eval
def _shapes(*avals: Any, rows: Rows) -> Sequence[Any]:
    return jax.make_jaxpr(rows.call)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals)).out_avals


mlir.register_lowering(_call, mlir.lower_fun(lambda *args, rows: rows.call(*args), multiple_results=True))


def _batch(
    args: Sequence[Array], axes: Sequence[int | None], *, rows: Rows
) -> tuple[Sequence[Array], Sequence[int]]:
    args = [arg if axis is None else jnp.moveaxis(arg, axis, 0) for arg, axis in zip(args, axes, strict=True)]
    is_batched = [axis is not None for axis in axes]
    if not all(rows.out_rows) or any(b and not r for b, r in zip(is_batched, rows.in_rows, strict=True)):
        outs = _one_by_one(args, is_batched, rows)
        return outs, [0] * len(outs)
    k = next(arg.shape[0] for arg, b in zip(args, is_batched, strict=True) if b)
    n = next(arg.shape[b] for arg, b, r in zip(args, is_batched, rows.in_rows, strict=True) if r)

    def merge(arg: Array, is_batched: bool) -> Array:  # noqa: FBT001
        whole = arg if is_batched else jnp.broadcast_to(arg[None], (k, *arg.shape))
        return whole.reshape(k * n, *whole.shape[2:])

    merged = [merge(*pair) if r else pair[0] for *pair, r in zip(args, is_batched, rows.in_rows, strict=True)]
    outs = [out.reshape(k, n, *out.shape[1:]) for out in _call.bind(*merged, rows=rows)]
    return outs, [0] * len(outs)


def _one_by_one(args: list[Array], is_batched: list[bool], rows: Rows) -> Sequence[Array]:
    def one(moving: list[Array]) -> Sequence[Array]:
        moving = iter(moving)
        return _call.bind(
            *(next(moving) if b else arg for arg, b in zip(args, is_batched, strict=True)), rows=rows
        )

    return jax.lax.map(one, [arg for arg, b in zip(args, is_batched, strict=True) if b])


batching.primitive_batchers[_call] = _batch


def _jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, rows: Rows
) -> tuple[Sequence[Array], Sequence[Any]]:
    outs = _call.bind(*primals, rows=rows)
    moves = tuple(not isinstance(t, ad.Zero) and t.dtype != jax.dtypes.float0 for t in tangents)
    live = iter(())
    if any(moves):
        linear = [t for t, m in zip(tangents, moves, strict=True) if m]
        live = iter(_tangent.bind(*primals, *linear, rows=rows, moves=moves))
    zeros = [ad.Zero(jax.typeof(out).to_tangent_aval()) for out in outs]
    return outs, [next(live, zero) if real else zero for real, zero in zip(rows.out_real, zeros, strict=True)]


ad.primitive_jvps[_call] = _jvp


@_tangent.def_abstract_eval
def _tangent_shapes(*avals: Any, rows: Rows, moves: tuple[bool, ...]) -> list[Any]:
    outs = _shapes(*avals[: len(moves)], rows=rows)
    return [aval for aval, real in zip(outs, rows.out_real, strict=True) if real]


def _no_tangent(*args: Array, rows: Rows, moves: tuple[bool, ...]) -> Sequence[Array]:
    raise NotImplementedError(
        "exported function: got a forward-mode derivative (jvp, jacfwd, linearize), expected a reverse-mode one; use "
        "jax.grad, jax.vjp or jax.jacrev"
    )


_tangent.def_impl(_no_tangent)
mlir.register_lowering(_tangent, mlir.lower_fun(_no_tangent, multiple_results=True))


def _transpose(
    cotangents: Sequence[Any], *args: Any, rows: Rows, moves: tuple[bool, ...]
) -> list[Array | None]:
    primals, linear = args[: len(moves)], args[len(moves) :]
    real = [ad.instantiate_zeros(c) for c in cotangents]
    gradients = _call.bind(*primals, *real, rows=pullback(rows, moves))
    wanted = [g if ad.is_undefined_primal(arg) else None for g, arg in zip(gradients, linear, strict=True)]
    return [None] * len(moves) + wanted


ad.primitive_transposes[_tangent] = _transpose


@functools.cache
def pullback(rows: Rows, moves: tuple[bool, ...]) -> Rows:
    """Make the function of rows that gives gradients.

    Args:
        rows: the function to be differentiated.
        moves: by argument, whether its gradient is wanted.

    Returns:
        `(*arguments, *cotangents of the floating-point results) -> gradients` of the arguments that move.

    Raises:
        ValueError: if the function has no further derivative.
    """
    if not rows.order:
        raise ValueError(
            "exported function: got a derivative of higher order than its file holds; export it with a larger vjp_order"
        )
    num_args = len(rows.in_rows)

    def call(*args: Array) -> Sequence[Array]:
        primals, cotangents = args[:num_args], args[num_args:]

        def of_moving(*moving: Array) -> tuple[Array, ...]:
            moving = iter(moving)
            outs = rows.call(*(next(moving) if m else p for p, m in zip(primals, moves, strict=True)))
            return tuple(out for out, real in zip(outs, rows.out_real, strict=True) if real)

        _, pull = jax.vjp(of_moving, *(p for p, m in zip(primals, moves, strict=True) if m))
        return pull(cotangents)

    of_cotangents = [r for r, real in zip(rows.out_rows, rows.out_real, strict=True) if real]
    of_gradients = [r for r, m in zip(rows.in_rows, moves, strict=True) if m]
    return Rows(
        call, (*rows.in_rows, *of_cotangents), of_gradients, [True] * len(of_gradients), rows.order - 1
    )
