r"""The variable in which a path is followed: even steps in u are short ones in log-SNR where the flow bends."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array


class Warp(NamedTuple):
    """Hold the variable u in which the flow is followed.

    Attributes:
        log_snr: `(u []) -> []`, increasing.
        inverse: `(log_snr []) -> u []`.
    """

    log_snr: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


def sinh_warp(centre: float = 1.5, width: float = 2.5) -> Warp:
    """Build log_snr = centre + width sinh(u): even steps in u crowd around the centre.

    Args:
        centre: where the flow bends most; for data of standard deviation s about -2 log s.
        width: of the crowded stretch, in log-SNR; positive.

    Returns:
        A `Warp`.

    Raises:
        ValueError: if `width` is not positive.
    """
    if not width > 0:
        raise ValueError(f"width: got {width}, expected a positive number of units of log-SNR")
    return Warp(
        lambda u: centre + width * jnp.sinh(u), lambda log_snr: jnp.arcsinh((log_snr - centre) / width)
    )
