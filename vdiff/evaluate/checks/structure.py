"""What a model's functions are without any averaging: their shapes, what they read, and their tails.

A function reads a leaf of `params` if its output changes when that leaf is made NaN. Unlike a gradient this also
sees what goes through an integer, a comparison or a stopped gradient; unlike a jaxpr it sees through whatever
merely carries the whole of `params` along.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from vdiff.types import Key, ModelLike, Params, PyTree

NUM_KEYS = 16


def floats_of(tree: PyTree) -> PyTree:
    """Return the tree with None for each leaf that has no gradient."""
    return jax.tree.map(lambda v: v if jnp.issubdtype(jnp.result_type(v), jnp.floating) else None, tree)


def with_leaves(tree: PyTree, leaves: PyTree) -> PyTree:
    """Return the tree with those leaves exchanged that are not None in `leaves`."""
    return jax.tree.map(lambda new, v: v if new is None else new, leaves, tree, is_leaf=lambda v: v is None)


def component_name(path: tuple, index: tuple[int, ...] = ()) -> str:
    """Return the name of a leaf's component, its path and its index, such as "theta['w'][0, 1]"."""
    return jax.tree_util.keystr(path).lstrip(".") + (f"[{', '.join(map(str, index))}]" if index else "")


def describe(tree: PyTree) -> str:
    """Return the shapes and dtypes of a tree, such as "float32[3]"."""
    shapes = jax.tree.map(lambda v: f"{jnp.result_type(v)}{list(jnp.shape(v))}", tree)
    return str(shapes).replace("'", "")


def difference(got: PyTree, expected: PyTree) -> str:
    """Return how two trees differ in structure, shape or dtype; "" if they do not."""
    if jax.tree.structure(got) != jax.tree.structure(expected):
        return f"got {describe(got)}, expected {describe(expected)}"
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        if describe(one) != describe(other):
            at = f"{component_name(path)}: " if path else ""
            return f"{at}got {describe(one)}, expected {describe(other)}"
    return ""


def first_line(error: Exception) -> str:
    """Return an exception as one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def shape_faults(model: ModelLike, params: Params, x: PyTree) -> dict[str, str]:
    """Trace every function of a model on shapes alone.

    Args:
        model: any `Model`.
        params: its parameters.
        x: one datum.

    Returns:
        What is wrong, by the name of the function; a function without a fault is not in it.
    """
    key, faults = jax.random.key(0), {}

    def traced(name: str, *args: PyTree) -> PyTree:
        try:
            return jax.eval_shape(getattr(model, name), *args)
        except Exception as error:  # A user's function may raise anything.
            faults[name] = first_line(error)
            return None

    def expect(name: str, what: str, got: PyTree, expected: PyTree) -> None:
        if message := difference(got, expected):
            faults.setdefault(name, f"{what} {message}")

    z = traced("sample_q", key, params, x)
    drawn = traced("sample", key, params)
    if "sample" not in faults:
        if not isinstance(drawn, tuple) or len(drawn) != 2:
            faults["sample"] = f"got {describe(drawn)}, expected a pair (x, z)"
        else:
            expect("sample", "x:", drawn[0], x)
            if "sample_q" not in faults:
                expect("sample", "z, against that of sample_q:", drawn[1], z)
            else:
                z = drawn[1]
    for name in ("log_joint", "log_q"):
        value = traced(name, params, x, z)
        if name not in faults and not _is_scalar(value):
            faults[name] = f"got {describe(value)}, expected float32[]; sum over the dimensions of x and z"
    if model.elbo_terms is not None:
        terms = traced("elbo_terms", key, params, x)
        if "elbo_terms" not in faults and not (
            isinstance(terms, dict) and terms and all(_is_scalar(term) for term in terms.values())
        ):
            faults["elbo_terms"] = f"got {describe(terms)}, expected a dict of scalars, one for each term"
    if model.init is not None:
        made = traced("init", key)
        if "init" not in faults:
            # cv is an estimator's: what the model makes of it says nothing.
            made, given = (p._replace(cv=()) if isinstance(p, Params) else p for p in (made, params))
            expect("init", "params:", made, given)
    return faults


def _is_scalar(value: PyTree) -> bool:
    return hasattr(value, "dtype") and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def probe(
    model: ModelLike, names: frozenset[str], key: Key, params: Params, x: PyTree, z: PyTree, num_probes: int
) -> tuple[dict[str, PyTree], dict[str, Bool[Array, " T"]]]:
    """Evaluate the named functions: samplers at a few keys, densities at the z given.

    Args:
        model: any `Model`.
        names: of the functions to evaluate.
        key: a typed key.
        params: its parameters.
        x: one datum.
        z: a tree of [T, ...].
        num_probes: T.

    Returns:
        The outputs by name, with a leading axis; and for each density whether its gradient by params and z is
        finite, [T].
    """
    keys, outputs, is_finite = jax.random.split(key, NUM_KEYS), {}, {}
    if "sample_q" in names:
        outputs["sample_q"] = jax.vmap(model.sample_q, in_axes=(0, None, None))(keys, params, x)
    if "sample" in names:
        outputs["sample"] = jax.vmap(model.sample, in_axes=(0, None))(keys, params)
    if "elbo_terms" in names:
        outputs["elbo_terms"] = jax.vmap(model.elbo_terms, in_axes=(0, None, None))(keys, params, x)
    for name in sorted({"log_joint", "log_q"} & names):
        evaluate = functools.partial(_value_and_finite, getattr(model, name), params, x)
        # The axis is told, since a model without a latent has z = ().
        outputs[name], is_finite[name] = jax.vmap(evaluate, axis_size=num_probes)(z)
    return outputs, is_finite


def _value_and_finite(
    log_density: Callable[..., Array], params: Params, x: PyTree, z: PyTree
) -> tuple[Array, Bool[Array, ""]]:
    args = (params, z)

    def of(floats: PyTree) -> Array:
        params, z = with_leaves(args, floats)
        return log_density(params, x, z)

    value, gradient = jax.value_and_grad(of)(floats_of(args))
    finite = [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradient)]
    return value, functools.reduce(jnp.logical_and, finite, jnp.isfinite(value) | True)


def what_is_read(outputs: Callable[[Params], dict[str, PyTree]], params: Params) -> dict[str, frozenset[str]]:
    """Find which leaves of params each function reads.

    Args:
        outputs: `(params) -> {function name: its outputs}`.
        params: where.

    Returns:
        {function name: the names of leaves}.
    """
    leaves, tree = jax.tree.flatten(params)
    names = [component_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    base = jax.device_get(outputs(params))
    read = {name: set() for name in base}
    for i, leaf in enumerate(leaves):
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        spoilt = jnp.full_like(leaf, jnp.nan) if is_float else jnp.logical_not(leaf).astype(leaf.dtype)
        changed = jax.device_get(outputs(jax.tree.unflatten(tree, [*leaves[:i], spoilt, *leaves[i + 1 :]])))
        for name in base:
            pairs = zip(jax.tree.leaves(base[name]), jax.tree.leaves(changed[name]), strict=True)
            if not all(_same(one, other) for one, other in pairs):
                read[name].add(names[i])
    return {name: frozenset(each) for name, each in read.items()}


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    is_float = jnp.issubdtype(one.dtype, jnp.inexact)
    return (
        np.array_equal(one.astype(np.float64), other.astype(np.float64), equal_nan=True)
        if is_float
        else bool(np.array_equal(one, other))
    )
