r"""The lecture's diffusion model: a chain of m latents under fixed betas (12.2.6).

    q(z_{i+1} | z_i) = N( sqrt(1 - beta_{i+1}) z_i, beta_{i+1} I ),   z_0 = x
    p(z_i | z_{i+1}) = N( E[z_i | z_{i+1}, x_hat], eta_i I ),   p(z_m) = N(0, I)

Source: Sohl-Dickstein et al., 2015; Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, 2020.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vdiff.diffusion.betas import log_snrs_of
from vdiff.diffusion.chain import chain
from vdiff.diffusion.data_likelihoods import DataLikelihood, gaussian
from vdiff.diffusion.model import Diffusion
from vdiff.diffusion.parts import make_parts
from vdiff.diffusion.predict import Prediction, noise
from vdiff.diffusion.variances import beta_variance
from vdiff.types import Network


def ddpm(
    denoiser: Network,
    betas: ArrayLike | Sequence[float],
    *,
    shape: Sequence[int],
    predict: Prediction = noise,
    reverse_variance: Network | None = None,
    likelihood: DataLikelihood | None = None,
    times: Network | None = None,
) -> Diffusion:
    """Build a diffusion model on a chain of m latents under fixed betas.

    Args:
        denoiser: `Network` with apply(theta, z [*shape], log_snr []) -> [*shape]: the same weights run under any
            schedule, number of steps and sampler.
        betas: [m], e.g. `linear_betas(1000)`.
        shape: of a datum.
        predict: what the denoiser's output means, e.g. `predict.velocity`.
        reverse_variance: eta, e.g. `posterior_variance()`; `beta_variance()` when left out.
        likelihood: p(x | z_1); a Gaussian around the denoiser's guess with a learned scale when left out.
        times: how often each step is drawn, apply(lam) -> logits [m - 1], e.g. `learned_times(m)`: `params.lam` is
            then what it learns, and its gradient lowers the variance of the estimate. Evenly when left out, and lam
            is `()`.

    Returns:
        A `Diffusion`; everything in nats per datum. `elbo_terms` draws z_1 once and one of the m - 1 steps.

    Raises:
        ValueError: if betas are not in (0, 1); at trace time, if the denoiser's output or a datum has another shape.

    Source: lecture 12.2.6.
    """
    betas = np.asarray(betas, np.float32)
    log_snrs = log_snrs_of(betas)
    likelihood = gaussian() if likelihood is None else likelihood
    parts = make_parts(
        denoiser,
        init_lam=(lambda key: ()) if times is None else times.init,
        shape=tuple(shape),
        predict=predict,
        reverse_variance=beta_variance() if reverse_variance is None else reverse_variance,
        likelihood=likelihood,
    )
    grid = jnp.linspace(0.0, 1.0, len(betas))
    return chain(
        parts,
        num_latents=len(betas),
        betas=lambda lam: jnp.asarray(betas),
        log_snrs=lambda lam: log_snrs,
        log_snr=lambda lam, t: jnp.interp(t, grid, log_snrs),
        time_logits=None if times is None else times.apply,
        likelihood=likelihood,
        shape=tuple(shape),
    )


def learned_times(num_latents: int) -> Network:
    """Build logits of how often each of the m - 1 steps is drawn, zeros at the start; apply(lam) -> [m - 1].

    Their softmax is mixed with a thousandth of even shares, so that no step is ever lost.

    Raises:
        ValueError: if there are fewer than two latents, and so no step.
    """
    if num_latents < 2:
        raise ValueError(f"num_latents: got {num_latents}, expected at least 2; one latent has no step")
    return Network(lambda key: jnp.zeros(num_latents - 1), lambda lam: lam)
