r"""What every diffusion model is made of, whatever its times: a denoiser, p(x | z_1), the ELBO's two ends."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from vdiff.densities import normal_kl
from vdiff.diffusion.data_likelihoods import DataLikelihood
from vdiff.diffusion.forward import alpha, forward_marginal
from vdiff.diffusion.predict import Prediction
from vdiff.types import Key, Network, Params, PyTree, Terms, check_key, gradient_only


class Parts(NamedTuple):
    """Hold functions of one datum that chains and continuous time share.

    Attributes:
        init: `(key) -> Params`.
        embed: `(x) -> y`, of the latents' shape.
        denoise: `(params, z, log_snr) -> x_hat`.
        squared_error: `(key, params, y, log_snr) -> []`, |eps_hat - eps|^2 at one draw of z.
        reverse_variance: `(params, log_snr_s, log_snr_t) -> []`.
        log_reconstruction: `(params, x, z, log_snr) -> []`, log p(x | z), nats.
        end_terms: `(key, params, x, first, last) -> {"prior", "reconstruction"}` for the log-SNRs of z_1 and z_m.
    """

    init: Callable[[Key], Params]
    embed: Callable[[PyTree], Array]
    denoise: Callable[[Params, Array, Array], Array]
    squared_error: Callable[[Key, Params, Array, Array], Array]
    reverse_variance: Callable[[Params, Array, Array], Array]
    log_reconstruction: Callable[[Params, PyTree, Array, Array], Array]
    end_terms: Callable[[Key, Params, PyTree, Array, Array], Terms]


def make_parts(
    denoiser: Network,
    *,
    init_lam: Callable[[Key], PyTree],
    shape: tuple[int, ...],
    predict: Prediction,
    reverse_variance: Network,
    likelihood: DataLikelihood,
) -> Parts:
    """Build the parts; see `ddpm` for the arguments, and init_lam: `(key) -> lam`."""

    def init(key: Key) -> Params:
        key_denoiser, key_likelihood, key_phi, key_lam = jax.random.split(check_key(key), 4)
        theta = {"denoiser": denoiser.init(key_denoiser), "likelihood": likelihood.init(key_likelihood)}
        return Params(theta=theta, phi=reverse_variance.init(key_phi), lam=init_lam(key_lam))

    def embed(x: PyTree) -> Array:
        y = likelihood.embed(x)
        if y.shape != shape:
            raise ValueError(
                f"x: got a datum of shape {y.shape}, expected {shape}; build the model with shape=x.shape"
            )
        return y

    def output(params: Params, z: Array, log_snr: Array) -> Array:
        out = denoiser.apply(params.theta["denoiser"], z, log_snr)
        if out.shape != shape:
            raise ValueError(
                f"denoiser: got output of shape {out.shape}, expected {shape}, that of z; build it for that shape"
            )
        return out

    def denoise(params: Params, z: Array, log_snr: Array) -> Array:
        return predict.data(z, log_snr, output(params, z, log_snr))

    def squared_error(key: Key, params: Params, y: Array, log_snr: Array) -> Array:
        z, eps = forward_marginal(key, y, log_snr)
        error = predict.gain(log_snr) * (output(params, z, log_snr) - predict.target(y, eps, log_snr))
        return jnp.sum(jnp.square(error))

    def log_reconstruction(params: Params, x: PyTree, z: Array, log_snr: Array) -> Array:
        x_hat = denoise(params, z, log_snr)
        return likelihood.log_prob(params.theta["likelihood"], x, x_hat, z, log_snr)

    def end_terms(key: Key, params: Params, x: PyTree, first: Array, last: Array) -> Terms:
        y = embed(x)
        z, _ = forward_marginal(key, y, first)
        kl = normal_kl(alpha(last) * y, jnp.broadcast_to(0.5 * log_sigmoid(-last), y.shape))
        return {"prior": -jnp.sum(kl), "reconstruction": log_reconstruction(params, x, z, first)}

    return Parts(
        init,
        embed,
        denoise,
        squared_error,
        lambda params, s, t: reverse_variance.apply(params.phi, s, t),
        log_reconstruction,
        end_terms,
    )


def towards_less_variance(
    value: Float[Array, ""], log_density: Float[Array, ""], num_dims: int
) -> Float[Array, ""]:
    """Return zero, with the gradient that lowers the variance of an importance-sampled estimate.

        d/d lam E_p[f^2],   f = g / p,   is  -E_p[ f^2 d log p / d lam ]          in units of one dimension

    Args:
        value: f, one draw of the estimate.
        log_density: log p of what was drawn, differentiable by lam and nothing else.
        num_dims: of the datum.

    Returns:
        Zero.

    Source: the score form of Kingma et al., Variational Diffusion Models, 2021, appendix I.
    """
    return gradient_only(stop_gradient(jnp.square(value / num_dims)) * log_density)
