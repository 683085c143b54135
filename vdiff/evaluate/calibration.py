r"""Whether q(z | x) is the posterior, judged on simulated data: simulation-based calibration.

Where (x, z*) ~ p(x, z), z* is a draw of the posterior. So, for each unit of z, with z' ~ q(z | x),

    p = P(z' < z*)  is uniform on [0, 1] where q is the posterior                          (SBC: all of q)
    p and 1 - p  have one law where q is centred on it, though it be too narrow or wide    (VSBC: its location)

A narrow q has too many p near 0 and 1, and one that is shifted too many on one side. P is estimated by ranks among K
draws.

Source: Talts, Betancourt, Simpson, Vehtari and Gelman, Validating Bayesian Inference Algorithms with Simulation-Based
Calibration, 2018; Yao, Vehtari, Simpson and Gelman, Yes, but Did It Work? Evaluating Variational Inference, 2018;
Butler, A Test for Symmetry Using the Sample Distribution Function, 1969.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array

from vdiff.estimators.log_weights import check_num_samples, draw
from vdiff.types import Key, ModelLike, Params, PyTree, check_key, q_at


class Calibration(NamedTuple):
    """Hold the p-values of each unit of z: small where q is not the posterior.

    Attributes:
        uniformity: that the ranks are uniform, by the test of Kolmogorov and Smirnov.
        symmetry: that they are symmetric about 1/2, by the largest difference of the laws of p and 1 - p.
    """

    uniformity: np.ndarray
    symmetry: np.ndarray


def posterior_ranks(model: ModelLike, num_samples: int) -> Callable[[Key, Params], PyTree]:
    """Build the rank, in (0, 1), of the z that a simulated x was made of among draws of q(z | x).

        rank = (#{k: z_k < z*} + V (1 + #{k: z_k = z*})) / (K + 1),     V uniform on (0, 1)

    It is uniform exactly, at any K and for discrete z too, where q is the posterior.

    Args:
        model: any `Model` with `sample`.
        num_samples: K draws of q; a hundred resolve what a thousand data can tell.

    Returns:
        `(key, params) -> ranks`, of z's shapes, of one simulated datum.

    Raises:
        ValueError: if `num_samples` is less than one.
    """
    check_num_samples(num_samples)

    def ranks(key: Key, params: Params) -> PyTree:
        key_data, key_q, key_ties = jax.random.split(check_key(key), 3)
        x, truth = model.sample(key_data, params)
        draws = draw(q_at(model, params, x), key_q, num_samples)
        leaves, treedef = jax.tree.flatten(truth)
        keys = jax.tree.unflatten(treedef, list(jax.random.split(key_ties, len(leaves))))
        return jax.tree.map(lambda *leaf: _rank(*leaf, num_samples), keys, truth, draws)

    return ranks


def calibration(ranks: np.ndarray | Array) -> Calibration:
    """Test ranks for uniformity and for symmetry, unit by unit.

    The statistic of symmetry is sup_u |F(u) - G(u)|, F and G the sample's laws of p and of 1 - p. These are mirror
    images, not two samples: its law is that of the largest excursion of a random walk of N signs, here exact. (The
    two-sample test of Kolmogorov and Smirnov on the same numbers refuses a symmetric law about twice too often.)

    Args:
        ranks: [N, ...], a leaf of `posterior_ranks` over N simulated data.

    Returns:
        A `Calibration`, its p-values of shape [...]. Of D units, one is below 0.05 / D by chance in one case of 20.

    Raises:
        ValueError: if there are fewer than two data, or ranks outside [0, 1].
    """
    ranks = np.asarray(ranks, np.float64)
    if len(ranks) < 2 or not np.all((ranks >= 0) & (ranks <= 1)):
        raise ValueError(
            f"ranks: got shape {ranks.shape} from {ranks.min(initial=1):.3g} to {ranks.max(initial=0):.3g}, expected "
            "[N, ...] with N at least 2, in [0, 1]; map posterior_ranks over keys"
        )
    columns = ranks.reshape(len(ranks), -1).T
    uniformity = [scipy.stats.kstest(column, "uniform").pvalue for column in columns]
    symmetry = [symmetry_p_value(column) for column in columns]
    return Calibration(*(np.array(p).reshape(ranks.shape[1:]) for p in (uniformity, symmetry)))


def symmetry_p_value(p: np.ndarray) -> float:
    """Compute the exact p-value that numbers [N] are symmetric about 1/2, given that none is tied with another.

    In the order of |p - 1/2|, the farthest first, the signs of p - 1/2 are a fair random walk S_1..S_N, and
    N sup_u |F(u) - G(u)| = max_k |S_k|. That a walk of n steps stays below m is

        1/m sum_{j odd, j < 2 m} sin(pi j / 2) cot(pi j / (4 m)) cos(pi j / (2 m))^n

    Source: Butler, 1969 (the statistic); Feller, An Introduction to Probability Theory, 1968, XIV.5 (the walk).
    """
    away = p - 0.5
    signs = np.sign(away[np.argsort(-np.abs(away), kind="stable")])
    signs = signs[signs != 0]
    m = int(np.max(np.abs(np.cumsum(signs)), initial=0))
    if m == 0:
        return 1.0
    j = np.arange(1, 2 * m, 2)
    terms = np.sin(np.pi * j / 2) / np.tan(np.pi * j / (4 * m)) * np.cos(np.pi * j / (2 * m)) ** len(signs)
    return float(np.clip(1.0 - np.sum(terms) / m, 0.0, 1.0))


def _rank(key: Key, truth: Array, draws: Array, num_samples: int) -> Array:
    below = jnp.sum(draws < truth[None], axis=0, dtype=jnp.float32)
    equal = jnp.sum(draws == truth[None], axis=0, dtype=jnp.float32)
    position = below + jax.random.uniform(key, jnp.shape(truth)) * (1.0 + equal)
    return position / (num_samples + 1.0)
