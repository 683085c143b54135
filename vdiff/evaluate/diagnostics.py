"""What a latent space is used for."""

from typing import NamedTuple

import numpy as np


class Units(NamedTuple):
    """Hold which latent units carry information.

    Attributes:
        variance: [D], the variance over the data of each unit's posterior mean.
        is_active: [D], whether it exceeds the threshold.
    """

    variance: np.ndarray
    is_active: np.ndarray


def active_units(posterior_means: np.ndarray, threshold: float = 0.01) -> Units:
    """Find the latent units whose posterior mean varies with the datum.

        A_d = Var_x( E_q[z_d | x] ) > threshold

    Args:
        posterior_means: [N, D], e.g. `jax.vmap(lambda x: model.encode(params, x)[0])(data)`.
        threshold: the least variance of an active unit.

    Returns:
        The `Units`.

    Raises:
        ValueError: if `posterior_means` is not [N, D] with at least two data.

    Source: Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, section 5.
    """
    if np.ndim(posterior_means) != 2 or len(posterior_means) < 2:
        raise ValueError(
            f"posterior_means: got shape {np.shape(posterior_means)}, expected [N, D] with N at least 2"
        )
    variance = np.var(np.asarray(posterior_means, np.float64), axis=0)
    return Units(variance, variance > threshold)
