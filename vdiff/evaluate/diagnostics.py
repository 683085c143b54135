"""What a latent space is used for."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array


class Units(NamedTuple):
    """Hold which latent units carry information.

    Attributes:
        variance: [D], the variance over the data of each unit's posterior mean.
        is_active: [D], whether it exceeds the threshold.
    """

    variance: np.ndarray
    is_active: np.ndarray


def active_units(posterior_means: np.ndarray | Array, threshold: float = 0.01) -> Units:
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


def unit_kl(loc: np.ndarray | Array, scale: np.ndarray | Array) -> np.ndarray:
    """Average over the data what each unit of a factorised Gaussian posterior tells beyond a standard normal prior.

        KL_d = 1/N sum_n KL(N(loc_nd, scale_nd^2) || N(0, 1)),    KL = (loc^2 + scale^2 - 1) / 2 - log scale

    They sum to the KL term of the ELBO. A unit that is inactive by its mean has a KL near zero too.

    Args:
        loc: [N, D], e.g. of `jax.vmap(model.encode, in_axes=(None, 0))(params, data)`.
        scale: [N, D], positive.

    Returns:
        [D], nats per datum.

    Raises:
        ValueError: if the two are not [N, D] alike, or a scale is not positive.
    """
    loc, scale = np.asarray(loc, np.float64), np.asarray(scale, np.float64)
    if loc.ndim != 2 or loc.shape != scale.shape or not loc.size:
        raise ValueError(f"loc, scale: got shapes {loc.shape} and {scale.shape}, expected [N, D] for both")
    if not np.all(scale > 0):
        raise ValueError(f"scale: got {scale.min():.3g}, expected positive; pass exp of a log scale")
    return np.mean((loc**2 + scale**2 - 1.0) / 2.0 - np.log(scale), axis=0)
