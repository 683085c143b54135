r"""The record of a diffusion model: a `Model` whose latent is a path z_1..z_m, and what samplers read of it.

    p(x, z_1..z_m) = p(x | z_1) prod_i p(z_i | z_{i+1}) p(z_m),    q(z_{i+1} | z_i) fixed noise       (12.2.6)

    ELBO = - KL(q(z_m | x), p(z_m)) + E log p(x | z_1) - sum_i E KL(q(z_i | z_{i+1}, x), p(z_i | z_{i+1}))
             "prior"                   "reconstruction"   "diffusion"

Section 12.2.6 of the lecture writes the reverse kernel with its arguments exchanged: it is p(z_i | z_{i+1}), and
z_0 = x is the data's end.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from vdiff.diffusion.data_likelihoods import DataLikelihood
from vdiff.types import Key, Model, Objective, Params, PyTree, Terms, check_key


class Rate(NamedTuple):
    """Hold one draw of the diffusion term, and where on the path it was drawn.

    Attributes:
        value: an estimate of the whole term, nats: minus the KL at one time, divided by that time's probability.
        log_snr: of the latent that was denoised.
        density: probability of drawing that time, per unit of log-SNR.
        squared_error: |eps_hat - eps|^2 there. value nears -1/2 squared_error / density as steps get small.
    """

    value: Float[Array, "..."]
    log_snr: Float[Array, "..."]
    density: Float[Array, "..."]
    squared_error: Float[Array, "..."]


class Diffusion(NamedTuple):
    """Hold a `Model` whose datum is x and whose latent is the path z [m, *shape], and the functions it is made of.

    Attributes:
        init: see `Model`; params are theta {"denoiser", "likelihood"}, phi the reverse variance's, lam the schedule's.
        log_joint: see `Model`.
        log_q: see `Model`.
        sample_q: see `Model`.
        sample: see `Model`.
        elbo_terms: see `Model`: "prior", "reconstruction" (one draw) and "diffusion" (one draw at one time).
        elbo_terms_at: `(key, params, x, u) -> Terms`, at the time that u in [0, 1) stands for.
        end_terms: `(key, params, x) -> {"prior", "reconstruction"}`, the terms that know no time.
        rate_at: `(key, params, x, u) -> Rate`, the diffusion term alone.
        denoise: `(params, z, log_snr) -> E[x | z]`, of shape `shape`.
        log_snr: `(params, t) -> []`, from t = 0 at z_1 to t = 1 at z_m.
        reverse_variance: `(params, log_snr_s, log_snr_t) -> []`, eta of one step from t to s.
        likelihood: p(x | z_1), and how x is embedded where the noise is added.
        shape: of a latent and of an embedded datum.
    """

    init: Callable[[Key], Params]
    log_joint: Callable[[Params, PyTree, PyTree], Array]
    log_q: Callable[[Params, PyTree, PyTree], Array]
    sample_q: Callable[[Key, Params, PyTree], PyTree]
    sample: Callable[[Key, Params], tuple[PyTree, PyTree]]
    elbo_terms: Objective
    elbo_terms_at: Callable[[Key, Params, PyTree, Array], Terms]
    end_terms: Objective
    rate_at: Callable[[Key, Params, PyTree, Array], Rate]
    denoise: Callable[[Params, Array, Array], Array]
    log_snr: Callable[[Params, Array], Array]
    reverse_variance: Callable[[Params, Array, Array], Array]
    likelihood: DataLikelihood
    shape: tuple[int, ...]

    elbo_estimate = Model.elbo_estimate


def terms_from(
    end_terms: Objective, rate_at: Callable[[Key, Params, PyTree, Array], Rate]
) -> Callable[[Key, Params, PyTree, Array], Terms]:
    """Make `elbo_terms_at` of its parts."""

    def elbo_terms_at(key: Key, params: Params, x: PyTree, u: Array) -> Terms:
        key_ends, key_rate = jax.random.split(check_key(key))
        return {**end_terms(key_ends, params, x), "diffusion": rate_at(key_rate, params, x, u).value}

    return elbo_terms_at


def at_random_time(terms_at: Callable[[Key, Params, PyTree, Array], Terms]) -> Objective:
    """Make an objective of one that is told its time: u is drawn uniformly, for each datum by itself."""

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        key_u, key_terms = jax.random.split(check_key(key))
        return terms_at(key_terms, params, x, jax.random.uniform(key_u))

    return objective
