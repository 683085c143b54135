r"""Classifier-free guidance: samples that look more like their condition than the data do.

    x_hat = x_hat(z | y) + w ( x_hat(z | y) - x_hat(z) )

In terms of scores this is the score of p(z | y) (p(z | y) / p(z))^w at every noise level. No joint density has these
guesses for its own: the result samples, and has no ELBO.

Source: Ho and Salimans, Classifier-Free Diffusion Guidance, 2022, eq. 6.
"""

from jaxtyping import Array

from vdiff.diffusion.denoised import with_denoise
from vdiff.diffusion.model import Diffusion
from vdiff.types import Params


def guided(conditional: Diffusion, unconditional: Diffusion, weight: float | Array) -> Diffusion:
    """Move every guess of the data away from what it would be without the condition.

        of = lambda y: ddpm(given(network, y), betas, shape=shape)
        guided(of(y), of(null), 1.0)

    Args:
        conditional: the model given y.
        unconditional: the model given none; it shares the parameters.
        weight: w, zero for the conditional model itself; may be traced.

    Returns:
        A `Diffusion` whose `sample` is rebuilt, see `with_denoise`; its ELBO is refused. Two calls of the network a
        step.

    Raises:
        ValueError: if the two models differ in shape.
    """
    if conditional.shape != unconditional.shape:
        raise ValueError(
            f"unconditional: got shape {unconditional.shape}, expected {conditional.shape}, that of conditional; "
            "build both by one function of y"
        )

    def denoise(params: Params, z: Array, log_snr: Array) -> Array:
        x_hat = conditional.denoise(params, z, log_snr)
        return x_hat + weight * (x_hat - unconditional.denoise(params, z, log_snr))

    return with_denoise(conditional, denoise)
