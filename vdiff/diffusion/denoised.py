r"""Another guess of the data under the same noise: guidance, clipping, thresholding.

    x_hat' = f(x_hat, z, log_snr),    z_s ~ N( E[z_s | z_t, x_hat'], eta I )

What is sampled is then no longer the model that was trained: no joint density has these guesses for its own, and a
bound computed with them would be that of another model. So `sample` is rebuilt, and what speaks of the ELBO is refused.
The noising q is what it was.
"""

from collections.abc import Callable
from typing import NoReturn

import jax.numpy as jnp
from jaxtyping import Array

from vdiff.diffusion.ancestral import ancestral
from vdiff.diffusion.model import Diffusion
from vdiff.types import Params, PyTree


def with_denoise(diffusion: Diffusion, denoise: Callable[[Params, Array, Array], Array]) -> Diffusion:
    """Exchange the guess of the data, and sample by it.

    Args:
        diffusion: whose noise, reverse variance and p(x | z_1) are kept.
        denoise: `(params, z, log_snr) -> x_hat`, of shape `diffusion.shape`.

    Returns:
        A `Diffusion` whose `sample` is `ancestral` with 100 latents at even times; exchange it as ever,
        `guided._replace(sample=ddim(guided, 50))`. `log_joint`, `elbo_terms`, `elbo_terms_at`, `end_terms` and
        `rate_at` raise at trace time.
    """
    changed = diffusion._replace(
        denoise=denoise,
        log_joint=_refuse("log_joint"),
        elbo_terms=_refuse("elbo_terms"),
        elbo_terms_at=_refuse("elbo_terms_at"),
        end_terms=_refuse("end_terms"),
        rate_at=_refuse("rate_at"),
    )
    return changed._replace(sample=ancestral(changed, 100))


def clipped(diffusion: Diffusion, bound: Callable[[Array], Array]) -> Diffusion:
    """Apply a function to every guess of the data.

        x_hat' = bound(x_hat)

        clipped(diffusion, between(-1.0, 1.0))
        clipped(diffusion, dynamic_threshold(0.995))

    Args:
        diffusion: what to change.
        bound: `(x_hat) -> x_hat`, of the same shape.

    Returns:
        A `Diffusion` for sampling; see `with_denoise`.

    Raises:
        ValueError: at trace time, if `bound` changes the shape.
    """

    def denoise(params: Params, z: Array, log_snr: Array) -> Array:
        x_hat = bound(diffusion.denoise(params, z, log_snr))
        if x_hat.shape != diffusion.shape:
            raise ValueError(
                f"bound: got {x_hat.shape} from a guess of shape {diffusion.shape}, expected the same shape; "
                "return one number for each that is given"
            )
        return x_hat

    return with_denoise(diffusion, denoise)


def between(low: float, high: float) -> Callable[[Array], Array]:
    """Build a bound for `clipped`: into [low, high].

    Raises:
        ValueError: if the interval is empty.
    """
    if not low < high:
        raise ValueError(f"low, high: got {low}, {high}, expected low < high; exchange them")
    return lambda x_hat: jnp.clip(x_hat, low, high)


def dynamic_threshold(quantile: float, limit: float = 1.0) -> Callable[[Array], Array]:
    """Build a bound for `clipped`: scale down what sticks out, rather than cut it off.

        s = max(limit, quantile of |x_hat|),   x_hat' = limit / s clip(x_hat, -s, s)

    Args:
        quantile: in (0, 1], over the dimensions of one guess, e.g. 0.995.
        limit: the largest size of an embedded datum.

    Returns:
        `(x_hat) -> x_hat`.

    Raises:
        ValueError: if `quantile` is not in (0, 1] or `limit` is not positive.

    Source: Saharia et al., Photorealistic Text-to-Image Diffusion Models, 2022, 2.3.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile: got {quantile}, expected a number in (0, 1], e.g. 0.995")
    if not limit > 0:
        raise ValueError(f"limit: got {limit}, expected a positive size, e.g. 1.0")

    def bound(x_hat: Array) -> Array:
        size = jnp.maximum(jnp.quantile(jnp.abs(x_hat), quantile), limit)
        return limit / size * jnp.clip(x_hat, -size, size)

    return bound


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refused(*args: PyTree) -> NoReturn:
        raise ValueError(
            f"{name}: got a diffusion whose guesses were changed, expected the model as it was trained; "
            "take the ELBO of that one"
        )

    return refused
