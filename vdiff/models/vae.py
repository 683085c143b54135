r"""The variational autoencoder: a deep latent Gaussian, its posterior amortised by a network.

    p_phi(z) = N(0, I), or any density;   p_theta(x | z) = likelihood(decoder(z))
    q_lambda(z | x) = N(loc, diag(scale^2)),   (loc, log scale) = encoder(embed(x))
    T(x, eps, lambda) = loc + scale * eps                                        (12.2.5)

    ELBO(x) = E_q[log p(x | z)] - KL(q(z | x) || p(z))

The KL divergence to N(0, I) is a closed form. With a prior that is itself a `Model` of z, with latents u of
its own, the whole is one model with the latent (z, u):

    ELBO(x) = E_q[log p(x | z)] + H(q(z | x)) + E_q[ELBO_prior(z)]

Source: Kingma and Welling, Auto-Encoding Variational Bayes, 2014; Rezende, Mohamed and Wierstra, Stochastic
Backpropagation and Approximate Inference in Deep Generative Models, 2014.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.densities import normal_entropy, normal_kl, normal_log_prob, standard_normal_log_prob
from vdiff.types import (
    Distribution,
    Key,
    Likelihood,
    Model,
    ModelLike,
    Network,
    Objective,
    Params,
    PyTree,
    Terms,
    check_key,
    fused,
    in_turn,
    q_at,
)


class VAE(NamedTuple):
    """Hold a `Model` and three functions more.

    Attributes:
        init: see `Model`.
        log_joint: see `Model`.
        log_q: see `Model`.
        sample_q: see `Model`.
        sample: see `Model`.
        elbo_terms: see `Model`.
        encode: `(params, x) -> (loc [latent_dim], scale [latent_dim])` of q(z | x).
        decode: `(params, z [latent_dim]) -> E[x | z]`, in the units of x.
        sample_x: `(key, params, z [latent_dim]) -> x`, drawn from p(x | z).
    """

    init: Callable[[Key], Params]
    log_joint: Callable[[Params, PyTree, PyTree], Array]
    log_q: Callable[[Params, PyTree, PyTree], Array]
    sample_q: Callable[[Key, Params, PyTree], PyTree]
    sample: Callable[[Key, Params], tuple[PyTree, PyTree]]
    elbo_terms: Objective
    encode: Callable[[Params, Array], tuple[Array, Array]]
    decode: Callable[[Params, Array], Array]
    sample_x: Callable[[Key, Params, Array], Array]

    elbo_estimate = Model.elbo_estimate


def vae(
    encoder: Network,
    decoder: Network,
    *,
    latent_dim: int,
    likelihood: Likelihood,
    prior: ModelLike | None = None,
) -> VAE:
    """Build a variational autoencoder.

    Without a prior, p(z) = N(0, I): z is an array, `params.phi` is `()`, `params.lam` the encoder's
    parameters, and the terms are "reconstruction" (one draw) and "kl" (closed form, its sign already in).

    With a prior, z is the pair (z, u) with u the prior's own latent, `params.phi` holds the prior's theta and
    phi, `params.lam` is {"encoder", "prior"}, and the terms are "reconstruction", "entropy" (closed form) and
    the prior's own, prefixed by "prior_". A mixture: `prior=collapsed(gmm(num_components, latent_dim))`.

    Args:
        encoder: `Network` with apply(lam, likelihood.embed(x)) -> [2 * latent_dim], loc beside log scale.
        decoder: `Network` with apply(theta, z [latent_dim]) -> [*likelihood.out_shape(x.shape)].
        latent_dim: length of z.
        likelihood: what the decoder's output means, e.g. `likelihoods.bernoulli()`.
        prior: a `Model` whose datum is z.

    Returns:
        A `VAE`; everything in nats per datum.

    Raises:
        ValueError: if `latent_dim` is less than one; at trace time, if the encoder's or decoder's output does
            not fit.
    """
    if latent_dim < 1:
        raise ValueError(f"latent_dim: got {latent_dim}, expected at least 1")

    def posterior(params: Params, x: Array) -> tuple[Array, Array]:
        out = encoder.apply(params.lam, likelihood.embed(x))
        if out.shape != (2 * latent_dim,):
            raise ValueError(
                f"encoder: got output of shape {out.shape}, expected ({2 * latent_dim},), loc beside log "
                f"scale for latent_dim = {latent_dim}; give the last layer 2 * latent_dim outputs"
            )
        return out[:latent_dim], out[latent_dim:]

    def log_likelihood(params: Params, x: Array, z: Array) -> Array:
        out = decoder.apply(params.theta, z)
        if out.shape != likelihood.out_shape(x.shape):
            raise ValueError(
                f"decoder: got output of shape {out.shape}, expected {likelihood.out_shape(x.shape)} for x "
                f"of shape {x.shape}; build it with out_shape=likelihood.out_shape(x.shape)"
            )
        return likelihood.log_prob(out, x)

    def sample_x(key: Key, params: Params, z: Array) -> Array:
        return likelihood.sample(check_key(key), decoder.apply(params.theta, z))

    def init(key: Key) -> Params:
        key_theta, key_lam = jax.random.split(check_key(key))
        return Params(theta=decoder.init(key_theta), lam=encoder.init(key_lam))

    def log_joint(params: Params, x: Array, z: Array) -> Array:
        return jnp.sum(standard_normal_log_prob(z)) + log_likelihood(params, x, z)

    def q(params: Params, x: Array) -> Distribution:
        loc, log_scale = posterior(params, x)
        return in_turn(
            lambda key: _transport(key, loc, log_scale),
            lambda z: jnp.sum(normal_log_prob(z, loc, log_scale)),
        )

    def sample(key: Key, params: Params) -> tuple[Array, Array]:
        key_z, key_x = jax.random.split(check_key(key))
        z = jax.random.normal(key_z, (latent_dim,))
        return sample_x(key_x, params, z), z

    def elbo_terms(key: Key, params: Params, x: Array) -> Terms:
        loc, log_scale = posterior(params, x)
        z = _transport(key, loc, log_scale)
        return {"reconstruction": log_likelihood(params, x, z), "kl": -jnp.sum(normal_kl(loc, log_scale))}

    def encode(params: Params, x: Array) -> tuple[Array, Array]:
        loc, log_scale = posterior(params, x)
        return loc, jnp.exp(log_scale)

    def decode(params: Params, z: Float[Array, " d"]) -> Array:
        return likelihood.mean(decoder.apply(params.theta, z))

    sample_q, log_q = fused(q)
    base = VAE(init, log_joint, log_q, sample_q, sample, elbo_terms, encode, decode, sample_x)
    return base if prior is None else _with_prior(base, prior, posterior, log_likelihood)


def _with_prior(base: VAE, prior: ModelLike, posterior: Callable, log_likelihood: Callable) -> VAE:
    """Replace N(0, I) by a `Model` of z; the latent becomes the pair (z, u)."""

    def split(params: Params) -> tuple[Params, Params]:
        own = params._replace(phi=(), lam=params.lam["encoder"])
        return own, Params(params.phi["theta"], params.phi["phi"], params.lam["prior"])

    def init(key: Key) -> Params:
        key_base, key_prior = jax.random.split(check_key(key))
        own, of_prior = base.init(key_base), prior.init(key_prior)
        phi = {"theta": of_prior.theta, "phi": of_prior.phi}
        return Params(theta=own.theta, phi=phi, lam={"encoder": own.lam, "prior": of_prior.lam})

    def log_joint(params: Params, x: Array, z: tuple[Array, PyTree]) -> Array:
        own, of_prior = split(params)
        z, u = z
        return prior.log_joint(of_prior, z, u) + log_likelihood(own, x, z)

    def q(params: Params, x: Array) -> Distribution:
        own, of_prior = split(params)
        first = q_at(base, own, x)

        def log_prob(z: tuple[Array, PyTree]) -> Array:
            z, u = z
            return first.log_prob(z) + prior.log_q(of_prior, z, u)

        def sample_and_log_prob(key: Key) -> tuple[tuple[Array, PyTree], Array]:
            key_z, key_u = jax.random.split(key)
            z, log_q = first.sample_and_log_prob(key_z)
            u, log_q_u = q_at(prior, of_prior, z).sample_and_log_prob(key_u)
            return (z, u), log_q + log_q_u

        return Distribution(lambda key: sample_and_log_prob(key)[0], log_prob, sample_and_log_prob)

    def sample(key: Key, params: Params) -> tuple[Array, tuple[Array, PyTree]]:
        own, of_prior = split(params)
        key_z, key_x = jax.random.split(check_key(key))
        z, u = prior.sample(key_z, of_prior)
        return base.sample_x(key_x, own, z), (z, u)

    def elbo_terms(key: Key, params: Params, x: Array) -> Terms:
        own, of_prior = split(params)
        key_z, key_u = jax.random.split(check_key(key))
        loc, log_scale = posterior(own, x)
        z = _transport(key_z, loc, log_scale)
        if prior.elbo_terms is None:
            terms = {"elbo": prior.elbo_estimate(key_u, of_prior, z)}
        else:
            terms = prior.elbo_terms(key_u, of_prior, z)
        return {
            "reconstruction": log_likelihood(own, x, z),
            "entropy": jnp.sum(normal_entropy(log_scale)),
            **{f"prior_{name}": term for name, term in terms.items()},
        }

    def encode(params: Params, x: Array) -> tuple[Array, Array]:
        return base.encode(split(params)[0], x)

    def decode(params: Params, z: Array) -> Array:
        return base.decode(split(params)[0], z)

    def sample_x(key: Key, params: Params, z: Array) -> Array:
        return base.sample_x(key, split(params)[0], z)

    sample_q, log_q = fused(q)
    return VAE(init, log_joint, log_q, sample_q, sample, elbo_terms, encode, decode, sample_x)


def _transport(key: Key, loc: Array, log_scale: Array) -> Array:
    """Map noise to a draw: T(x, eps, lambda) = loc + scale * eps (12.2.5)."""
    return loc + jnp.exp(log_scale) * jax.random.normal(check_key(key), loc.shape, loc.dtype)
