r"""How good a gradient estimator is: its mean, its variance, its signal-to-noise ratio, its cost.

    snr = |E g| / sqrt(sum_i Var g_i)           of one draw, over the elements of a leaf or of a part

An unbiased estimator of n draws has n^(1/2) of the ratio, so that 1 / snr^2 draws are needed to see the gradient at
all; multiplied by the cost per draw, that is what compares estimators.

Source: Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.
"""

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdiff.objectives import total
from vdiff.types import Key, Objective, Params, PyTree, check_key

CHUNK_ELEMENTS = 2**24
"""How many numbers the gradients of one chunk of draws may hold."""


class Row(NamedTuple):
    """Hold the statistics of one leaf, or of all leaves of one part.

    Attributes:
        mean_norm: |E g|, estimated.
        std: square root of the summed variance of one draw.
        snr: their ratio; `mean_norm` is itself uncertain by std / sqrt(num_draws).
        z_score: the largest |mean - exact| / standard error over the elements; NaN where no exact gradient was given.
    """

    mean_norm: float
    std: float
    snr: float
    z_score: float


class GradientReport(NamedTuple):
    """Hold what was measured of an objective's gradient; print it to see the table.

    Attributes:
        value: mean of the estimate, in the objective's unit (nats).
        value_std: standard deviation of one draw of it.
        mean: E g, a `Params` of NumPy arrays.
        variance: of one draw of g, elementwise, a `Params`.
        parts: statistics by part: theta, phi, lam, cv, where the part has parameters.
        leaves: statistics by leaf, under its path.
        num_draws: N.
        seconds_per_draw: measured on this machine, compilation left out.
        flops_per_draw: floating-point operations that the compiler counts; NaN where it does not tell.
    """

    value: float
    value_std: float
    mean: Params
    variance: Params
    parts: dict[str, Row]
    leaves: dict[str, Row]
    num_draws: int
    seconds_per_draw: float
    flops_per_draw: float

    def __str__(self) -> str:
        """Write the report as a table."""
        rows = {**{part.upper(): row for part, row in self.parts.items()}, **self.leaves}
        width = max(len(name) for name in rows)
        error = self.value_std / math.sqrt(self.num_draws)
        lines = [
            f"value {self.value:.4f} +- {error:.4f} nats, {self.num_draws} draws, "
            f"{1e6 * self.seconds_per_draw:.3g} us and {self.flops_per_draw:.3g} FLOP per draw",
            f"{'':{width}}  {'|mean|':>10}  {'std':>10}  {'snr':>10}  {'max |z|':>8}",
        ]
        for name, row in rows.items():
            z = "-" if math.isnan(row.z_score) else f"{row.z_score:.2f}"
            lines.append(f"{name:{width}}  {row.mean_norm:10.4g}  {row.std:10.4g}  {row.snr:10.4g}  {z:>8}")
        return "\n".join(lines)


class _Moments(NamedTuple):
    count: jax.Array
    mean: PyTree
    squares: PyTree


def gradient_report(
    objective: Objective,
    params: Params,
    x: PyTree,
    key: Key,
    num_draws: int = 1000,
    *,
    exact: Params | None = None,
) -> GradientReport:
    """Measure an objective's gradient at one datum: mean, variance, signal-to-noise ratio and cost.

    Everything runs in one compiled loop over chunks of draws.

    Args:
        objective: `(key, params, x) -> Terms`.
        params: where.
        x: one datum.
        key: a typed key.
        num_draws: N, at least 2; rounded up to whole chunks.
        exact: the exact gradient, for z-scores; or None.

    Returns:
        A `GradientReport`.

    Raises:
        ValueError: if `num_draws` is less than 2, or `exact` has another structure than params.
        TypeError: if `key` is not a typed key.
    """
    if num_draws < 2:
        raise ValueError(f"num_draws: got {num_draws}, expected at least 2, to know a variance")
    if exact is not None and jax.tree.structure(exact) != jax.tree.structure(params):
        raise ValueError(
            f"exact: got {jax.tree.structure(exact)}, expected the structure of params, "
            f"{jax.tree.structure(params)}; pass what jax.grad gives by params"
        )
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    chunk = max(1, min(num_draws, 256, CHUNK_ELEMENTS // max(size, 1)))
    num_chunks = -(-num_draws // chunk)
    keys = jax.random.split(check_key(key), (num_chunks, chunk))

    def moments(keys: Key, params: Params, x: PyTree) -> _Moments:
        draws = jax.vmap(jax.value_and_grad(total(objective), argnums=1), in_axes=(0, None, None))

        def add(sums: _Moments, keys: Key) -> tuple[_Moments, None]:
            return _merge(sums, _moments_of(draws(keys, params, x))), None

        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        return jax.lax.scan(add, _Moments(jnp.zeros(()), zeros, zeros), keys)[0]

    compiled = jax.jit(moments).lower(keys, params, x).compile()
    began = time.perf_counter()
    found = jax.device_get(jax.block_until_ready(compiled(keys, params, x)))
    seconds = time.perf_counter() - began
    count = num_chunks * chunk
    value, mean = found.mean
    value_variance, variance = jax.tree.map(lambda leaf: leaf / (count - 1), found.squares)
    table = _elements(mean, variance, exact, count)
    parts = {part: [e for name, e in table.items() if name.startswith(f".{part}")] for part in Params._fields}
    return GradientReport(
        value=float(value),
        value_std=math.sqrt(value_variance),
        mean=mean,
        variance=variance,
        parts={part: _row(elements) for part, elements in parts.items() if elements},
        leaves={name.removeprefix("."): _row([elements]) for name, elements in table.items()},
        num_draws=count,
        seconds_per_draw=seconds / count,
        flops_per_draw=_flops(compiled) / chunk,
    )


def _moments_of(draws: PyTree) -> _Moments:
    """Return the count, means and summed squares about the means of draws on a leading axis."""
    count = jnp.float32(jax.tree.leaves(draws)[0].shape[0])
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), draws)
    squares = jax.tree.map(lambda leaf, m: jnp.sum(jnp.square(leaf - m[None]), axis=0), draws, mean)
    return _Moments(count, mean, squares)


def _merge(one: _Moments, other: _Moments) -> _Moments:
    """Join the moments of two sets of draws without the cancellation of a sum of squares (Chan et al., 1979)."""
    count = one.count + other.count
    share = other.count / count
    gaps = jax.tree.map(jnp.subtract, other.mean, one.mean)
    mean = jax.tree.map(lambda m, gap: m + share * gap, one.mean, gaps)
    squares = jax.tree.map(
        lambda s, t, gap: s + t + one.count * share * jnp.square(gap), one.squares, other.squares, gaps
    )
    return _Moments(count, mean, squares)


def _elements(
    mean: Params, variance: Params, exact: Params | None, count: int
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """List, by the path of a leaf, its elements' means, variances and z-scores, float64."""
    exact = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan), mean) if exact is None else exact
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(mean)[0]]
    flat = (
        [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(t)]
        for t in (mean, variance, exact)
    )
    table = {}
    for path, m, v, e in zip(paths, *flat, strict=True):
        # What does not vary is known to float32's rounding.
        error = np.maximum(np.sqrt(v / count), 1e-6 * np.linalg.norm(e) + 1e-12)
        table[path] = (m, v, np.abs(m - e) / error)
    return table


def _row(elements: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Row:
    mean, variance, z_scores = (np.concatenate(arrays) for arrays in zip(*elements, strict=True))
    norm, std = float(np.linalg.norm(mean)), math.sqrt(np.sum(variance))
    snr = norm / std if std > 0 else (math.inf if norm > 0 else 0.0)
    return Row(norm, std, snr, float(np.max(z_scores, initial=0.0)))


def _flops(compiled: jax.stages.Compiled) -> float:
    """Ask the compiler; XLA counts the body of a loop once."""
    analysis = compiled.cost_analysis() or {}
    return float(analysis.get("flops", math.nan))
