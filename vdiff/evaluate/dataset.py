r"""A whole data set judged: the mean over its data, with a standard error.

    mean = 1/N sum_n v_n,   std_error = sqrt( sum_n (v_n - mean)^2 / (N (N - 1)) )

The standard error is that of the mean over data; what single values lack in precision shows in their spread.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdiff.data.rows import Rows
from vdiff.types import Key, Params, PyTree, check_key


class Summary(NamedTuple):
    """Hold the mean of an evaluation over a data set.

    Attributes:
        mean: mean over the data, in the evaluator's unit (nats).
        std_error: its standard error over the data.
        num_data: N.
    """

    mean: float
    std_error: float
    num_data: int


def evaluate(
    evaluator: Callable[[Key, Params, PyTree], PyTree],
    key: Key,
    params: Params,
    data: np.ndarray | jax.Array | Rows,
    *,
    batch_size: int = 100,
    on_progress: Callable[[int], None] = lambda done: None,
) -> PyTree:
    """Apply a function of one datum to every datum of a set.

    Datum n gets the key fold_in(key, n), so that the result does not depend on `batch_size`. Compiled once
    per evaluator and shape.

    Args:
        evaluator: `(key, params, x) -> PyTree`, e.g. `importance_log_prob(model, 5000)` or `total(o)`.
        key: a typed key.
        params: the model's parameters.
        data: [N, ...], an array, or `Rows` that are read batch by batch.
        batch_size: how many data are evaluated at once.
        on_progress: called with the number of data done.

    Returns:
        What the evaluator returns, each leaf a NumPy array with a leading axis N.

    Raises:
        ValueError: if the set is empty, or `batch_size` is less than one.
    """
    num_data = len(data)
    if num_data == 0 or batch_size < 1:
        raise ValueError(
            f"data: got {num_data} data and batch_size {batch_size}, expected at least 1 of each"
        )
    compiled, key = _batched(evaluator), check_key(key)
    batch_size = min(batch_size, num_data)
    results = []
    for start in range(0, num_data, batch_size):
        # The last batch is filled up by data seen before, so that one shape is compiled.
        index = np.minimum(np.arange(start, start + batch_size), num_data - 1)
        results.append(jax.device_get(compiled(key, params, jnp.asarray(index), data[index])))
        on_progress(min(start + batch_size, num_data))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_data], *results)


def summarize(values: np.ndarray | jax.Array) -> Summary:
    """Average values over a data set.

    Args:
        values: [N].

    Returns:
        A `Summary`; its std_error is infinite when N is 1.
    """
    values = np.asarray(values, np.float64)
    spread = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Summary(float(values.mean()), float(spread), len(values))


def untrusted_share(k_hat: np.ndarray | jax.Array, limit: float = 0.7) -> float:
    """Compute the share of the data whose importance weights have too long a tail to be trusted.

    Args:
        k_hat: [N], of a `LogProb`.
        limit: the largest k-hat of weights that are trusted; 0.7 is that of Vehtari et al., 2024.

    Returns:
        A share in [0, 1]; NaN where all k-hats are, since there were too few draws to tell.
    """
    k_hat = np.asarray(k_hat)
    return math.nan if np.all(np.isnan(k_hat)) else float(np.mean(k_hat[~np.isnan(k_hat)] > limit))


@cache
def _batched(evaluator: Callable) -> Callable:
    @jax.jit
    def batched(key: Key, params: Params, index: jax.Array, batch: PyTree) -> PyTree:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
        return jax.vmap(evaluator, in_axes=(0, None, 0))(keys, params, batch)

    return batched
