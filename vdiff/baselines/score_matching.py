r"""Score matching: an unnormalised density fitted without its normaliser.

With s(x) = grad_x log_density(x), in which the normaliser has no part, and H(x) its Jacobian,

    explicit:     J(x) = |s(x)|^2 / 2 + tr H(x)
    sliced:       J(x) = E_v[ (v . s(x))^2 / 2 + v . H(x) v ],        E v v^T = I
                  or, with the first term in closed form,   |s(x)|^2 / 2 + E_v[ v . H(x) v ]
    denoising:    J(x) = E_eps[ |sigma s(x + sigma eps) + eps|^2 ] / 2,   eps ~ N(0, I)

Averaged over data, the first two are half the Fisher divergence E |s - grad log p_data|^2 plus what no parameter moves;
that takes an integration by parts, and so a continuous s. The third is sigma^2 times the same against the data blurred
by N(0, sigma^2 I), and asks nothing of s.

The objectives here are -J, larger is better. THEY ARE NO LOG-PROBABILITIES AND NO BOUNDS: explicit and sliced are in
units of x to the power -2, denoising has none. They compare models of the same data under the same loss, nothing else.

Source: Hyvarinen, Estimation of Non-Normalized Statistical Models by Score Matching, 2005; Vincent, A Connection
Between Score Matching and Denoising Autoencoders, 2011; Song et al., Sliced Score Matching, 2019.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.types import Key, Objective, PyTree, Terms, check_key

LogDensity = Callable[[PyTree, Array], Array]
"""A function `(params, x) -> []`, nats, normalised or not."""

Draw = Callable[..., Array]
"""A function `(key, shape, dtype) -> array` of independent entries with mean zero and variance one."""


def explicit_score_matching(log_density: LogDensity) -> Objective:
    """Match scores with the exact trace of the Hessian.

        value = -|s(x)|^2 / 2 - tr H(x)

    Value and gradient have no noise: the key is not used. As many Hessian products as x has entries, so for few.

    Args:
        log_density: `(params, x) -> []`, with a gradient by x that is continuous.

    Returns:
        An objective with the terms "norm" and "trace", in units of x to the power -2: no nats, and no bound.

    Raises:
        ValueError: at trace time, if `log_density` is piecewise linear in x, or what is learned of it is, as with ReLU
            units: the trace then has no say in the gradient, which only shrinks the score. Not seen are kinks beside
            what bends, such as ReLU units under a smooth last layer; `curvature_gap` measures them.
        TypeError: at trace time, if x is not a floating-point array.
    """

    def objective(key: Key, params: PyTree, x: Array) -> Terms:
        check_key(key)
        score, product = _linearized_score(log_density, params, x)
        basis = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
        trace = jnp.sum(jax.vmap(lambda v: jnp.vdot(v, product(v)))(basis))
        return {"norm": -0.5 * jnp.sum(jnp.square(score)), "trace": -trace}

    return objective


def sliced_score_matching(
    log_density: LogDensity, num_projections: int = 1, *, draw: Draw = jax.random.rademacher
) -> Objective:
    """Match scores along random directions, v_1..v_K.

        value = -1/K sum_k [ (v_k . s(x))^2 / 2 + v_k . H(x) v_k ]

    Its mean over v is that of `explicit_score_matching`, value and gradient; `sliced_score_matching_vr` varies less.

    Args:
        log_density: `(params, x) -> []`, with a gradient by x that is continuous.
        num_projections: K; each is one Hessian product.
        draw: `(key, shape, dtype) -> v`, e.g. `jax.random.rademacher` or `jax.random.normal`.

    Returns:
        An objective with the terms "norm" and "trace", in units of x to the power -2: no nats, and no bound.

    Raises:
        ValueError: if `num_projections` is less than one; at trace time, as `explicit_score_matching` does.
        TypeError: at trace time, if x is not a floating-point array.
    """
    _check_num_projections(num_projections)

    def objective(key: Key, params: PyTree, x: Array) -> Terms:
        score, product = _linearized_score(log_density, params, x)
        directions = draw(check_key(key), (num_projections, *x.shape), x.dtype)
        slopes = jax.vmap(lambda v: jnp.vdot(v, score))(directions)
        return {"norm": -0.5 * jnp.mean(jnp.square(slopes)), "trace": -_mean_curvature(product, directions)}

    return objective


def sliced_score_matching_vr(
    log_density: LogDensity, num_projections: int = 1, *, draw: Draw = jax.random.rademacher
) -> Objective:
    """Match scores with the trace estimated along random directions, v_1..v_K, and the norm exact.

        value = -|s(x)|^2 / 2 - 1/K sum_k v_k . H(x) v_k

    Its mean over v is that of `explicit_score_matching`, value and gradient.

    Args:
        log_density: `(params, x) -> []`, with a gradient by x that is continuous.
        num_projections: K; each is one Hessian product.
        draw: `(key, shape, dtype) -> v`, e.g. `jax.random.rademacher` or `jax.random.normal`.

    Returns:
        An objective with the terms "norm" and "trace", in units of x to the power -2: no nats, and no bound.

    Raises:
        ValueError: if `num_projections` is less than one; at trace time, as `explicit_score_matching` does.
        TypeError: at trace time, if x is not a floating-point array.
    """
    _check_num_projections(num_projections)

    def objective(key: Key, params: PyTree, x: Array) -> Terms:
        score, product = _linearized_score(log_density, params, x)
        directions = draw(check_key(key), (num_projections, *x.shape), x.dtype)
        return {
            "norm": -0.5 * jnp.sum(jnp.square(score)),
            "trace": -_mean_curvature(product, directions),
        }

    return objective


def denoising_score_matching(log_density: LogDensity, sigma: float | Array) -> Objective:
    """Match the score of the data blurred by N(0, sigma^2 I): it must point back from the noisy x to the clean one.

        value = -|sigma s(x + sigma eps) + eps|^2 / 2,   eps ~ N(0, I)

    What is learned is the blurred density, wider than the data's: a Gaussian's covariance grows by sigma^2 I. Then
    E[x | x + sigma eps = y] = y + sigma^2 s(y). The loss is Vincent's times sigma^2, and has a floor that no model
    passes. Any energy does, one of ReLU units too.

    Args:
        log_density: `(params, x) -> []`.
        sigma: standard deviation of the noise, positive, in units of x; a number or a traced scalar.

    Returns:
        An objective with the one term "denoising", without unit: no nats, and no bound.

    Raises:
        ValueError: if `sigma` is not positive.
        TypeError: at trace time, if x is not a floating-point array.
    """
    if not isinstance(sigma, jax.core.Tracer) and not sigma > 0:
        raise ValueError(f"sigma: got {sigma}, expected a positive number, in units of x")

    def objective(key: Key, params: PyTree, x: Array) -> Terms:
        _check_datum(x)
        eps = jax.random.normal(check_key(key), x.shape, x.dtype)
        score = jax.grad(_scalar(log_density), argnums=1)(params, x + sigma * eps)
        return {"denoising": -0.5 * jnp.sum(jnp.square(sigma * score + eps))}

    return objective


def curvature_gap(
    log_density: LogDensity, num_points: int = 100
) -> Callable[[PyTree, Array, Array], Float[Array, ""]]:
    """Measure by how much the score jumps between two points without its derivative telling.

        gap = (y - x) . (s(y) - s(x)) - int_0^1 (y - x) . H(x + t (y - x)) (y - x) dt

    Zero, but for the error of the midpoint rule, where s is continuous, as explicit and sliced score matching need.
    Where units have kinks it is the sum of the jumps of s that the segment crosses. Compare it with the first term.

    Args:
        log_density: `(params, x) -> []`.
        num_points: of the midpoint rule, at least 1.

    Returns:
        `(params, x, y) -> []`, nats.

    Raises:
        ValueError: if `num_points` is less than one.
    """
    if num_points < 1:
        raise ValueError(f"num_points: got {num_points}, expected at least 1")

    def gap(params: PyTree, x: Array, y: Array) -> Float[Array, ""]:
        score = jax.grad(lambda x: _scalar(log_density)(params, x))
        step = y - x

        def curvature(t: Array) -> Array:
            return jnp.vdot(step, jax.jvp(score, (x + t * step,), (step,))[1])

        times = (jnp.arange(num_points, dtype=x.dtype) + 0.5) / num_points
        return jnp.vdot(step, score(y) - score(x)) - jnp.mean(jax.lax.map(curvature, times))

    return gap


def _linearized_score(
    log_density: LogDensity, params: PyTree, x: Array
) -> tuple[Array, Callable[[Array], Array]]:
    """Give s(x) and the Hessian product v -> H(x) v, having refused what has no useful Hessian."""
    _check_datum(x)
    _check_bends(log_density, params, x)
    return jax.linearize(lambda x: jax.grad(_scalar(log_density), argnums=1)(params, x), x)


def _mean_curvature(product: Callable[[Array], Array], directions: Array) -> Array:
    return jnp.mean(jax.vmap(lambda v: jnp.vdot(v, product(v)))(directions))


def _scalar(log_density: LogDensity) -> LogDensity:
    def checked(params: PyTree, x: Array) -> Array:
        value = log_density(params, x)
        if jnp.shape(value) != ():
            raise ValueError(
                f"log_density: got an output of shape {jnp.shape(value)}, expected a scalar; sum over the entries of x"
            )
        return value

    return checked


def _check_bends(log_density: LogDensity, params: PyTree, x: Array) -> None:
    """Refuse a density whose Hessian is zero, or holds nothing that is learned though the score's slope jumps with x.

    JAX's derivative of what is linear piece by piece is zero in the program itself, not only in its numbers: no
    operation leads from the direction to the result. So this needs no values and is done once, while tracing.
    """
    score = jax.grad(_scalar(log_density), argnums=1)

    def product(params: PyTree, x: Array, v: Array) -> Array:
        return jax.jvp(lambda x: score(params, x), (x,), (v,))[1]

    def learned(function: Callable) -> Callable:
        return lambda params, x, v, change: jax.jvp(lambda p: function(p, x, v), (params,), (change,))[1]

    is_flat = not _depends(product, 2, params, x, x)
    floats = all(jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in jax.tree.leaves(params))
    if not is_flat and floats and jax.tree.leaves(params):
        given = (params, x, x, params)
        slope = learned(lambda params, x, v: score(params, x))
        # A Gaussian of fixed precision learns nothing of H either; but how its mean moves the score is one for all x.
        is_flat = not _depends(learned(product), 3, *given) and _depends(slope, 1, *given)
    if is_flat:
        raise ValueError(
            "log_density: got one that is linear in x piece by piece, as far as it is learned, as with ReLU units, "
            "expected one that bends: its Hessian trace is zero but for the kinks, where it is infinite; use a smooth "
            "activation, e.g. jax.nn.swish, or denoising_score_matching"
        )


def _depends(function: Callable, argument: int, *args: PyTree) -> bool:
    """Tell whether any operation leads from an argument of a function to its result."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), args)
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    marks = [jax.tree.map(lambda leaf, i=i: i == argument, arg) for i, arg in enumerate(shapes)]
    return any(_reached(jaxpr, jax.tree.leaves(marks)))


def _reached(jaxpr: PyTree, marks: list[bool]) -> list[bool]:
    """Tell which results of a program follow from marked inputs; loops and branches count as one operation."""
    marked = {var for var, mark in zip(jaxpr.invars, marks, strict=True) if mark}

    def is_marked(var: PyTree) -> bool:
        return not hasattr(var, "val") and var in marked

    for eqn in jaxpr.eqns:
        inputs = [is_marked(var) for var in eqn.invars]
        if not any(inputs):
            continue
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        inner = getattr(inner, "jaxpr", inner)
        outputs = [True] * len(eqn.outvars)
        if eqn.primitive.name != "scan" and inner is not None and len(inner.invars) == len(inputs):
            outputs = _reached(inner, inputs)
        marked |= {var for var, mark in zip(eqn.outvars, outputs, strict=True) if mark}
    return [is_marked(var) for var in jaxpr.outvars]


def _check_datum(x: Array) -> None:
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(
            f"x: got dtype {jnp.result_type(x)}, expected floating point, as scores are gradients by x; dequantise "
            "levels first, by transforms.dequantize"
        )


def _check_num_projections(num_projections: int) -> None:
    if num_projections < 1:
        raise ValueError(f"num_projections: got {num_projections}, expected at least 1")
