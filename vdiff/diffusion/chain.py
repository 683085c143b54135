r"""A diffusion model on a chain of m latents: what `ddpm` and `vdm` have in common.

    p(z_i | z_{i+1}) = N( E[z_i | z_{i+1}, x_hat], eta I ),   x_hat = denoise(z_{i+1})
    KL_i = dims/2 (v/eta - 1 - log(v/eta)) + |mean difference|^2 / (2 eta),   v the variance of q(z_i | z_{i+1}, x)

The difference of the means is alpha_s c (x - x_hat) with c = 1 - SNR_t / SNR_s, where x - x_hat is
sigma_t / alpha_t times eps_hat - eps, so that |mean difference|^2 = (alpha_s c sigma_t / alpha_t)^2 |eps_hat - eps|^2.

One step, drawn with probability p_i, stands for the sum: the diffusion term is -KL_i / p_i.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from vdiff.densities import normal_log_prob, standard_normal_log_prob
from vdiff.diffusion.ancestral import ancestral
from vdiff.diffusion.data_likelihoods import DataLikelihood
from vdiff.diffusion.forward import forward_noise, forward_posterior
from vdiff.diffusion.model import Diffusion, Rate, at_random_time, terms_from
from vdiff.diffusion.parts import Parts, towards_less_variance
from vdiff.types import Key, Params, PyTree, Terms


def chain(
    parts: Parts,
    *,
    num_latents: int,
    betas: Callable[[PyTree], Float[Array, " m"]],
    log_snrs: Callable[[PyTree], Float[Array, " m"]],
    log_snr: Callable[[PyTree, Array], Array],
    time_logits: Callable[[PyTree], Float[Array, " steps"]] | None,
    likelihood: DataLikelihood,
    shape: tuple[int, ...],
) -> Diffusion:
    """Build the `Diffusion` whose latents z_1..z_m have the log-SNRs `log_snrs(lam)`.

    Args:
        parts: from `make_parts`.
        num_latents: m.
        betas: `(lam) -> [m]`, the variance that each step of q adds.
        log_snrs: `(lam) -> [m]`, what follows from betas, falling; the ELBO is differentiated through it.
        log_snr: `(lam, t) -> []`, which passes through log_snrs at t = (i - 1) / (m - 1).
        time_logits: `(lam) -> [m - 1]`, how often each step is drawn, taught to make the estimate vary least; or None,
            evenly.
        likelihood: p(x | z_1).
        shape: of a latent.

    Returns:
        A `Diffusion`.
    """
    num_dims = math.prod(shape)

    def sample_q(key: Key, params: Params, x: PyTree) -> Array:
        return forward_noise(key, parts.embed(x), betas(params.lam))

    def log_q(params: Params, x: PyTree, z: Array) -> Array:
        before = jnp.concatenate([parts.embed(x)[None], z[:-1]])
        variances = betas(params.lam).reshape(-1, *(1,) * len(shape))
        log_scale = jnp.broadcast_to(0.5 * jnp.log(variances), z.shape)
        return jnp.sum(normal_log_prob(z, jnp.sqrt(1.0 - variances) * before, log_scale))

    def log_joint(params: Params, x: PyTree, z: Array) -> Array:
        times = log_snrs(params.lam)

        def log_step(z_s: Array, z_t: Array, log_snr_s: Array, log_snr_t: Array) -> Array:
            x_hat = parts.denoise(params, z_t, log_snr_t)
            mean, _ = forward_posterior(z_t, x_hat, log_snr_s, log_snr_t)
            log_scale = 0.5 * jnp.log(parts.reverse_variance(params, log_snr_s, log_snr_t))
            return jnp.sum(normal_log_prob(z_s, mean, jnp.broadcast_to(log_scale, shape)))

        log_prior = jnp.sum(standard_normal_log_prob(z[-1]))
        log_steps = jax.vmap(log_step)(z[:-1], z[1:], times[:-1], times[1:])
        return log_prior + jnp.sum(log_steps) + parts.log_reconstruction(params, x, z[0], times[0])

    def step_kl(params: Params, squared_error: Array, log_snr_s: Array, log_snr_t: Array) -> Array:
        log_kept = jnp.log(-jnp.expm1(log_snr_t - log_snr_s))
        log_eta = jnp.log(parts.reverse_variance(params, log_snr_s, log_snr_t))
        log_ratio = log_sigmoid(-log_snr_s) + log_kept - log_eta
        # v/eta - 1 - log(v/eta): a ratio near one would leave rounding alone, its logarithm leaves nothing.
        of_spreads = num_dims * (jnp.expm1(log_ratio) - log_ratio)
        alphas = log_sigmoid(log_snr_s) - log_sigmoid(log_snr_t)
        of_means = jnp.exp(alphas + log_sigmoid(-log_snr_t) + 2.0 * log_kept - log_eta)
        return 0.5 * (of_spreads + of_means * squared_error)

    def rate_at(key: Key, params: Params, x: PyTree, u: Array) -> Rate:
        times = log_snrs(params.lam)
        if num_latents == 1:
            return Rate(jnp.zeros(()), times[0], jnp.zeros(()), jnp.zeros(()))
        logits = None if time_logits is None else time_logits(params.lam)
        i, probability = _step_at(u, num_latents - 1, logits)
        log_snr_s, log_snr_t = times[i], times[i + 1]
        squared_error = parts.squared_error(key, params, parts.embed(x), log_snr_t)
        value = -step_kl(params, squared_error, log_snr_s, log_snr_t) / probability
        if logits is not None:
            value += towards_less_variance(value, jnp.log(_shares(logits))[i], num_dims)
        density = stop_gradient(probability / (log_snr_s - log_snr_t))
        return Rate(value, log_snr_t, density, squared_error)

    def end_terms(key: Key, params: Params, x: PyTree) -> Terms:
        times = log_snrs(params.lam)
        return parts.end_terms(key, params, x, times[0], times[-1])

    elbo_terms_at = terms_from(end_terms, rate_at)

    diffusion = Diffusion(
        init=parts.init,
        log_joint=log_joint,
        log_q=log_q,
        sample_q=sample_q,
        sample=None,  # it is made of the rest
        elbo_terms=at_random_time(elbo_terms_at),
        elbo_terms_at=elbo_terms_at,
        end_terms=end_terms,
        rate_at=rate_at,
        denoise=parts.denoise,
        log_snr=lambda params, t: log_snr(params.lam, t),
        reverse_variance=parts.reverse_variance,
        likelihood=likelihood,
        shape=shape,
    )
    own_grid = lambda _, params, num_steps: log_snrs(params.lam)  # noqa: E731
    return diffusion._replace(sample=ancestral(diffusion, num_latents, grid=own_grid))


def _shares(logits: Array) -> Array:
    """Return how often each step is drawn; each keeps a thousandth of an even share, or it might never be."""
    return 0.999 * jax.nn.softmax(logits) + 0.001 / logits.shape[0]


def _step_at(u: Array, num_steps: int, logits: Array | None) -> tuple[Array, Array]:
    """Turn u in [0, 1) into the step it stands for and that step's probability, both without a gradient."""
    if logits is None:
        i = jnp.minimum((u * num_steps).astype(jnp.int32), num_steps - 1)
        return i, jnp.asarray(1.0 / num_steps)
    ends = jnp.cumsum(stop_gradient(_shares(logits))).at[-1].set(1.0)
    i = jnp.minimum(jnp.searchsorted(ends, u, side="right"), num_steps - 1)
    # The share that u really has, roundings of the sum included: so the estimate stays unbiased.
    return i, ends[i] - jnp.where(i == 0, 0.0, ends[i - 1])
