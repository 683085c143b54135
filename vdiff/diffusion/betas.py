r"""The noise of a chain: beta_1..beta_m, the variance that each step adds, and the log-SNRs that follow.

    alpha_i^2 = prod_{j <= i} (1 - beta_j)                                                                   (12.2.6)

Source: Ho, Jain and Abbeel, 2020; Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def linear_betas(num_steps: int, first: float = 1e-4, last: float = 0.02) -> Float[Array, " m"]:
    """Space betas evenly, for any number of steps as noisy at the end as 1,000 steps of the given ones.

        beta_i = (1000 / m) (first + (last - first) (i - 1) / (m - 1)),   at most 0.999

    Args:
        num_steps: m.
        first: beta_1 when m is 1,000.
        last: beta_m when m is 1,000.

    Returns:
        [m].

    Raises:
        ValueError: if `num_steps` is less than one, or a beta is not in (0, 1).

    Source: Ho, Jain and Abbeel, 2020; the factor from Nichol and Dhariwal, 2021.
    """
    _check_num_steps(num_steps)
    for name, beta in (("first", first), ("last", last)):
        _check_beta(name, beta)
    return jnp.minimum(jnp.linspace(first, last, num_steps) * (1000.0 / num_steps), 0.999)


def cosine_betas(num_steps: int, offset: float = 0.008) -> Float[Array, " m"]:
    """Let alpha^2 fall as a squared cosine.

        alpha_i^2 = f(i / m) / f(0),   f(t) = cos^2( (t + offset) / (1 + offset) pi / 2 ),   beta_i at most 0.999

    Args:
        num_steps: m.
        offset: keeps the first betas from vanishing; positive.

    Returns:
        [m].

    Raises:
        ValueError: if `num_steps` is less than one or `offset` is not positive.

    Source: Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021, eq. 17.
    """
    _check_num_steps(num_steps)
    if not offset > 0:
        raise ValueError(f"offset: got {offset}, expected a positive number, e.g. 0.008")
    angle = (jnp.linspace(0.0, 1.0, num_steps + 1) + offset) / (1.0 + offset) * (jnp.pi / 2)
    # 1 - cos^2(b) / cos^2(a) as sin(b - a) sin(b + a) / cos^2(a): small betas keep their digits.
    before, after = angle[:-1], angle[1:]
    betas = jnp.sin(after - before) * jnp.sin(after + before) / jnp.square(jnp.cos(before))
    return jnp.minimum(betas, 0.999)


def constant_betas(num_steps: int, beta: float) -> Float[Array, " m"]:
    """Repeat one beta.

    Args:
        num_steps: m.
        beta: in (0, 1).

    Returns:
        [m].

    Raises:
        ValueError: if `num_steps` is less than one, or beta is not in (0, 1).

    Source: lecture 12.2.6.
    """
    _check_num_steps(num_steps)
    return jnp.full((num_steps,), _check_beta("beta", beta))


def log_snrs_of(betas: ArrayLike | Sequence[float]) -> Float[Array, " m"]:
    """Return the log-SNRs of z_1..z_m, given the variance that each step adds.

        alpha_i^2 = prod_{j <= i} (1 - beta_j),   log_snr_i = log alpha_i^2 - log(1 - alpha_i^2)

    In float64 on the host, so that a thousand summed logarithms keep their digits; `forward.betas_of` is the way back.

    Args:
        betas: [m] numbers in (0, 1).

    Returns:
        [m], falling, float32.

    Raises:
        ValueError: if betas are not [m] numbers in (0, 1).
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or len(betas) == 0 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError(
            f"betas: got {betas}, expected [m] variances in (0, 1); make them with linear_betas(m)"
        )
    log_alpha_squared = np.cumsum(np.log1p(-betas))
    return jnp.asarray(log_alpha_squared - np.log(-np.expm1(log_alpha_squared)), jnp.float32)


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")


def _check_beta(name: str, beta: float) -> float:
    if not 0.0 < beta < 1.0:
        raise ValueError(f"{name}: got {beta}, expected a variance in (0, 1)")
    return beta
