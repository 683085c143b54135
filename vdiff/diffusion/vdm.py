r"""The variational diffusion model: log-SNR as a function of time, learned as lam; a chain, or its limit.

    log_snr = L(lam, t),  falling from t = 0 to t = 1

A chain of m latents has log-SNRs L(0), L(1/(m-1)), .. L(1) and is a `Model` like any other. As m grows the
diffusion term becomes

    -1/2 int SNR(t)'s decay |x - x_hat|^2 dt  =  -1/2 E_u[ -L'(u) |eps_hat - eps|^2 ],   u ~ U[0, 1)

which does not depend on L but through its two ends. So in continuous time lam is given another aim: the least variance
of that one-draw estimate, f, whose gradient is that of E[f^2] by lam at fixed log-SNR,

    d/d lam E[f^2] = -E[ f^2 d log p(log_snr) / d lam ],   p(log_snr) = 1 / |L'|

Source: Kingma et al., Variational Diffusion Models, 2021.
"""

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from vdiff.diffusion.chain import chain
from vdiff.diffusion.data_likelihoods import DataLikelihood, gaussian
from vdiff.diffusion.forward import betas_of
from vdiff.diffusion.model import Diffusion, Rate, at_random_time, terms_from
from vdiff.diffusion.parts import Parts, make_parts, towards_less_variance
from vdiff.diffusion.predict import Prediction, noise
from vdiff.diffusion.schedules import Schedule
from vdiff.diffusion.variances import posterior_variance
from vdiff.types import Key, Network, Params, PyTree, Terms


def vdm(
    denoiser: Network,
    log_snr: Schedule,
    *,
    shape: Sequence[int],
    num_steps: int | None = None,
    predict: Prediction = noise,
    reverse_variance: Network | None = None,
    likelihood: DataLikelihood | None = None,
) -> Diffusion:
    """Build a diffusion model whose schedule is a function of time.

    Args:
        denoiser: `Network` with apply(theta, z [*shape], log_snr []) -> [*shape].
        log_snr: the schedule, e.g. `learned_log_snr()`; what it learns is `params.lam`.
        shape: of a datum.
        num_steps: m, how many latents the chain has (m - 1 steps); None for continuous time.
        predict: what the denoiser's output means, e.g. `predict.velocity`.
        reverse_variance: eta, e.g. `beta_variance()`; `posterior_variance()` when left out. Samplers read it in
            continuous time too.
        likelihood: p(x | z_1); a Gaussian around the denoiser's guess with a learned scale when left out.

    Returns:
        A `Diffusion`; everything in nats per datum. With `num_steps` lam's gradient is the ELBO's. Without, lam's
        gradient lowers the variance of the estimate, and there is no path: `log_joint`, `log_q`, `sample_q` and
        `sample` raise at trace time; sample by `diffusion._replace(sample=ancestral(diffusion, 100))`.

    Raises:
        ValueError: if `num_steps` is less than one; at trace time, if the denoiser's output or a datum has another
            shape.
    """
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1, or None for continuous time")
    likelihood = gaussian() if likelihood is None else likelihood
    parts = make_parts(
        denoiser,
        init_lam=log_snr.init,
        shape=tuple(shape),
        predict=predict,
        reverse_variance=posterior_variance() if reverse_variance is None else reverse_variance,
        likelihood=likelihood,
    )
    if num_steps is None:
        return _continuous(parts, log_snr, likelihood, tuple(shape))
    times = jnp.linspace(0.0, 1.0, num_steps)

    def log_snrs(lam: PyTree) -> Float[Array, " m"]:
        return jax.vmap(log_snr.apply, in_axes=(None, 0))(lam, times)

    return chain(
        parts,
        num_latents=num_steps,
        betas=lambda lam: betas_of(log_snrs(lam)),
        log_snrs=log_snrs,
        log_snr=log_snr.apply,
        time_logits=None,
        likelihood=likelihood,
        shape=tuple(shape),
    )


def _continuous(
    parts: Parts, schedule: Schedule, likelihood: DataLikelihood, shape: tuple[int, ...]
) -> Diffusion:
    def decay(lam: PyTree, t: Array) -> Array:
        return -jax.grad(schedule.apply, argnums=1)(lam, t)

    def rate_at(key: Key, params: Params, x: PyTree, u: Array) -> Rate:
        lam = stop_gradient(params.lam)
        log_snr, slope = schedule.apply(lam, u), decay(lam, u)
        squared_error = parts.squared_error(key, params, parts.embed(x), log_snr)
        value = -0.5 * slope * squared_error
        if jax.tree.leaves(params.lam):
            # The time at which this log-SNR stays when lam moves: dt = (dL / d lam) / -L'.
            held = u + (schedule.apply(params.lam, u) - log_snr) / slope
            value += towards_less_variance(value, -jnp.log(decay(params.lam, held)), math.prod(shape))
        return Rate(value, log_snr, 1.0 / slope, squared_error)

    def end_terms(key: Key, params: Params, x: PyTree) -> Terms:
        lam = stop_gradient(params.lam)
        first, last = schedule.apply(lam, jnp.zeros(())), schedule.apply(lam, jnp.ones(()))
        return parts.end_terms(key, params, x, first, last)

    elbo_terms_at = terms_from(end_terms, rate_at)

    return Diffusion(
        init=parts.init,
        log_joint=_refuse("log_joint", "give vdm num_steps for a chain of latents"),
        log_q=_refuse("log_q", "give vdm num_steps for a chain of latents"),
        sample_q=_refuse("sample_q", "give vdm num_steps for a chain of latents"),
        sample=_refuse(
            "sample", "use diffusion._replace(sample=ancestral(diffusion, 100)), or give num_steps"
        ),
        elbo_terms=at_random_time(elbo_terms_at),
        elbo_terms_at=elbo_terms_at,
        end_terms=end_terms,
        rate_at=rate_at,
        denoise=parts.denoise,
        log_snr=lambda params, t: schedule.apply(params.lam, t),
        reverse_variance=parts.reverse_variance,
        likelihood=likelihood,
        shape=shape,
    )


def _refuse(name: str, fix: str) -> Callable[..., NoReturn]:
    def refused(*args: PyTree) -> NoReturn:
        raise ValueError(f"{name}: got a model in continuous time, expected a finite path z_1..z_m; {fix}")

    return refused
