r"""Discrete codes: an autoencoder whose latent is a set of entries of a learned codebook, with a bound in nats.

    z = (z_1..z_N), each one of K codes, one-hot              decoder sees e = z C, C the codebook [K, d]
    p_phi(z) any density of codes, e.g. MADE                  p_theta(x | z) = likelihood(decoder(e))
    q(z | x) = prod_n softmax_k( -|encoder_n(x) - C_k|^2 / temperature )

The nearest code is the likeliest. The first VQ-VAE always takes it, and leaves the prior to be learned afterwards;
there the ELBO is that of a q without entropy and a uniform prior. Here q is a distribution and the prior is part of the
model, so that the ELBO bounds log p(x), and importance sampling estimates it.

C is in theta, and q reads it too: an estimator that is biased for lambda is biased for C. Codes enter log p(x, z) by
z C and by the prior, so that soft copies of one-hot codes have a density too, as the estimators need that raise the
bound:

    vd.straight_through(model, model.logits, 1.0, relaxation=vd.relaxations.one_hot)

Source: van den Oord, Vinyals and Kavukcuoglu, Neural Discrete Representation Learning, 2017; q by distances: Sonderby,
Poole and Mnih, Continuous Relaxation Training of Discrete Latent Variable Image Models, 2017.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.relaxations import one_hot
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
    check_key,
    fused,
    in_turn,
)


class VQVAE(NamedTuple):
    """Hold a `Model` and what relaxations of it need.

    Attributes:
        init, log_joint, log_q, sample_q, sample, elbo_terms: as in `vdiff.types.Model`; z is int32 [N, K], one-hot, and
            floats are accepted where a density is evaluated; elbo_terms is None, since the terms are an estimator's.
        logits: `(params, x) -> [N, K]`, those of q(z | x).
        encode: `(params, x) -> int32 [N]`, the nearest codes.
        decode: `(params, z) -> E[x | z]`.
    """

    init: Callable[[Key], Params]
    log_joint: Callable[[Params, PyTree, PyTree], Array]
    log_q: Callable[[Params, PyTree, PyTree], Array]
    sample_q: Callable[[Key, Params, PyTree], PyTree]
    sample: Callable[[Key, Params], tuple[PyTree, PyTree]]
    elbo_terms: Objective | None
    logits: Callable[[Params, PyTree], Array]
    encode: Callable[[Params, PyTree], Array]
    decode: Callable[[Params, Array], Array]

    elbo_estimate = Model.elbo_estimate


def vqvae(
    encoder: Network,
    decoder: Network,
    *,
    num_latents: int,
    num_codes: int,
    code_dim: int,
    likelihood: Likelihood,
    prior: ModelLike,
    temperature: float = 1.0,
) -> VQVAE:
    """Build an autoencoder of discrete codes.

    `params.theta` is {"decoder", "codebook" [K, code_dim]}, `params.phi` holds the prior's theta and phi, `params.lam`
    is the encoder's.

    Args:
        encoder: `Network` with apply(lam, likelihood.embed(x)) -> [N * code_dim] numbers in any shape.
        decoder: `Network` with apply(theta, e [N, code_dim]) -> [*likelihood.out_shape(x.shape)].
        num_latents: N.
        num_codes: K.
        code_dim: length of a code's entry in the codebook.
        likelihood: what the decoder's output means, e.g. `likelihoods.bernoulli()`.
        prior: a density of z, a `Model` without a latent whose datum is one-hot [N, K], e.g.
            `baselines.made(net, (N, K), likelihood=likelihoods.one_hot(K), orders=shuffled_orders(N, 1))`.
        temperature: of q, in units of squared distance.

    Returns:
        A `VQVAE`; everything in nats per datum.

    Raises:
        ValueError: if a number is less than one or the temperature not positive; at init, if the prior has a latent or
            parameters in lam; at trace time, if a network's output does not fit.
    """
    for name, got in (("num_latents", num_latents), ("num_codes", num_codes), ("code_dim", code_dim)):
        if got < 1:
            raise ValueError(f"{name}: got {got}, expected at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a positive number, e.g. 1.0")
    shape = (num_latents, num_codes)

    def of_prior(params: Params) -> Params:
        return Params(params.phi["theta"], params.phi["phi"])

    def init(key: Key) -> Params:
        key_theta, key_codes, key_phi, key_lam = jax.random.split(check_key(key), 4)
        own = prior.init(key_phi)
        latent = jax.eval_shape(prior.sample_q, key, own, jnp.zeros(shape, jnp.int32))
        if jax.tree.leaves((own.lam, latent)):
            raise ValueError(
                "prior: got a model with a latent of its own, expected a density of z; use baselines.made, or "
                "collapsed(...)"
            )
        codebook = jax.random.normal(key_codes, (num_codes, code_dim))
        return Params(
            theta={"decoder": decoder.init(key_theta), "codebook": codebook},
            phi={"theta": own.theta, "phi": own.phi},
            lam=encoder.init(key_lam),
        )

    def logits(params: Params, x: PyTree) -> Float[Array, "N K"]:
        found = encoder.apply(params.lam, likelihood.embed(x))
        if found.size != num_latents * code_dim:
            raise ValueError(
                f"encoder: got output of shape {found.shape}, expected {num_latents * code_dim} numbers, {code_dim} "
                f"for each of {num_latents} codes"
            )
        points, codebook = found.reshape(num_latents, code_dim), params.theta["codebook"]
        # |p - c|^2 less |p|^2, which all codes share.
        distances = jnp.sum(jnp.square(codebook), axis=1)[None, :] - 2.0 * points @ codebook.T
        return -distances / temperature

    def out(params: Params, z: Array) -> Array:
        codebook = params.theta["codebook"]
        return decoder.apply(params.theta["decoder"], z.astype(codebook.dtype) @ codebook)

    def log_joint(params: Params, x: PyTree, z: Array) -> Array:
        found = out(params, z)
        if found.shape != likelihood.out_shape(x.shape):
            raise ValueError(
                f"decoder: got output of shape {found.shape}, expected {likelihood.out_shape(x.shape)} for x of shape "
                f"{x.shape}; build it with out_shape=likelihood.out_shape(x.shape)"
            )
        return prior.log_joint(of_prior(params), z, ()) + likelihood.log_prob(found, x)

    def q(params: Params, x: PyTree) -> Distribution:
        eta = logits(params, x)
        return in_turn(
            lambda key: one_hot.harden(one_hot.perturb(key, eta)).astype(jnp.int32),
            lambda z: one_hot.log_prob(eta, z),
        )

    def sample(key: Key, params: Params) -> tuple[PyTree, Array]:
        key_z, key_x = jax.random.split(check_key(key))
        z, _ = prior.sample(key_z, of_prior(params))
        return likelihood.sample(key_x, out(params, z)), z

    def encode(params: Params, x: PyTree) -> Array:
        return jnp.argmax(logits(params, x), axis=-1).astype(jnp.int32)

    def decode(params: Params, z: Array) -> Array:
        return likelihood.mean(out(params, z))

    sample_q, log_q = fused(q)
    return VQVAE(init, log_joint, log_q, sample_q, sample, None, logits, encode, decode)
