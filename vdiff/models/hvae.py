r"""The hierarchical variational autoencoder: layers of Gaussians, inferred from the data upwards.

    p(x, z_1..z_L) = p_theta(x | z_1) prod_l p_phi(z_l | z_{l+1}) p(z_L),      p(z_L) = N(0, I)
    q(z_1..z_L | x) = q_lambda(z_1 | x) prod_l q_lambda(z_{l+1} | z_l)

each a Gaussian with independent units, its loc and log scale from a network of the layer that it is given. With
H the entropy, and all expectations over q,

    ELBO(x) = E[log p(x | z_1)] + sum_{l<L} E[ H(q(z_l | z_{l-1})) + log p(z_l | z_{l+1}) ]
              - E[KL( q(z_L | z_{L-1}) || p(z_L) )],              z_0 = x

Entropies and the KL divergence at the top are closed forms. Below the top there is no divergence: z_{l+1}, which
p(z_l | .) is given, is drawn after z_l. Inference in the other direction has them all: `ladder`.

Source: Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016 (two layers); Rezende, Mohamed and
Wierstra, Stochastic Backpropagation and Approximate Inference in Deep Generative Models, 2014.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.models.gaussian_layer import Gaussian, drawn, entropy, halved, kl, log_prob
from vdiff.types import (
    Distribution,
    Key,
    Likelihood,
    Model,
    Network,
    Objective,
    Params,
    PyTree,
    Terms,
    check_key,
    fused,
)

Layers = tuple[Array, ...]
"""z_1..z_L, from the data upwards."""


class HVAE(NamedTuple):
    """Hold a `Model` whose latent is z = (z_1..z_L), and three functions more.

    Attributes:
        init: see `Model`.
        log_joint: see `Model`.
        log_q: see `Model`.
        sample_q: see `Model`.
        sample: see `Model`.
        elbo_terms: see `Model`; "reconstruction" and "kl_1".."kl_L", each with its sign already in.
        encode: `(params, x) -> z`, each layer the mean of q given those before it.
        decode: `(params, z) -> E[x | z]`, in the units of x.
        complete: `(key, params, upper) -> z`, the layers below `upper` = (z_j..z_L) drawn from the prior given them;
            `()` for all of them.
    """

    init: Callable[[Key], Params]
    log_joint: Callable[[Params, PyTree, PyTree], Array]
    log_q: Callable[[Params, PyTree, PyTree], Array]
    sample_q: Callable[[Key, Params, PyTree], PyTree]
    sample: Callable[[Key, Params], tuple[PyTree, PyTree]]
    elbo_terms: Objective
    encode: Callable[[Params, PyTree], Layers]
    decode: Callable[[Params, Layers], Array]
    complete: Callable[[Key, Params, Layers], Layers]

    elbo_estimate = Model.elbo_estimate


def hvae(
    encoders: Sequence[Network],
    decoders: Sequence[Network],
    *,
    latent_dims: Sequence[int],
    likelihood: Likelihood,
) -> HVAE:
    """Build a hierarchical variational autoencoder with bottom-up inference.

    `params.theta` are those of the first decoder, p(x | z_1); `params.phi`, a tuple, those of the others, which are the
    prior; `params.lam`, a tuple, the encoders'. With one layer it is `vae`. K draws take one pass through the first
    encoder, the costly one, and K through the others.

    Args:
        encoders: loc beside log scale of z_1 given likelihood.embed(x), then of z_{l+1} given z_l.
        decoders: the likelihood's `out` given z_1, then loc beside log scale of z_l given z_{l+1}.
        latent_dims: lengths of z_1..z_L.
        likelihood: what decoders[0]'s output means, e.g. `likelihoods.bernoulli()`.

    Returns:
        An `HVAE`; everything in nats per datum. Its terms are "reconstruction" at one draw and "kl_l", l = 1..L:
        below the top  H(q(z_l | z_{l-1})) + log p(z_l | z_{l+1}),  at the top  -KL(q(z_L | z_{L-1}) || N(0, I)).

    Raises:
        ValueError: if there is not one encoder, decoder and positive length a layer, and at least one; at trace time,
            if a network's output does not fit.
    """
    num_layers = len(latent_dims)
    if num_layers < 1 or len(encoders) != num_layers or len(decoders) != num_layers:
        raise ValueError(
            f"latent_dims: got {num_layers} for {len(encoders)} encoders and {len(decoders)} decoders, expected one of "
            "each a layer, at least one"
        )
    if min(latent_dims) < 1:
        raise ValueError(f"latent_dims: got {tuple(latent_dims)}, expected each at least 1")

    def of_layer(name: str, layer: int, out: Array) -> Gaussian:
        if out.shape != (2 * latent_dims[layer],):
            raise ValueError(
                f"{name}: got output of shape {out.shape}, expected ({2 * latent_dims[layer]},), loc beside log scale "
                f"for latent_dims[{layer}] = {latent_dims[layer]}"
            )
        return halved(name, out)

    def q_layer(params: Params, below: Array, layer: int) -> Gaussian:
        return of_layer(f"encoders[{layer}]", layer, encoders[layer].apply(params.lam[layer], below))

    def p_layer(params: Params, above: Layers, layer: int) -> Gaussian:
        if layer == num_layers - 1:
            zeros = jnp.zeros(latent_dims[layer])
            return Gaussian(zeros, zeros)
        name = f"decoders[{layer + 1}]"
        return of_layer(name, layer, decoders[layer + 1].apply(params.phi[layer], above[0]))

    def log_likelihood(params: Params, x: PyTree, z: Layers) -> Array:
        out = decoders[0].apply(params.theta, z[0])
        if out.shape != likelihood.out_shape(x.shape):
            raise ValueError(
                f"decoders[0]: got output of shape {out.shape}, expected {likelihood.out_shape(x.shape)} for x "
                f"of shape {x.shape}; build it with out_shape=likelihood.out_shape(x.shape)"
            )
        return likelihood.log_prob(out, x)

    def init(key: Key) -> Params:
        keys = jax.random.split(check_key(key), 2 * num_layers)
        down = [net.init(k) for net, k in zip(decoders, keys[:num_layers], strict=True)]
        up = [net.init(k) for net, k in zip(encoders, keys[num_layers:], strict=True)]
        return Params(theta=down[0], phi=tuple(down[1:]), lam=tuple(up))

    def log_joint(params: Params, x: PyTree, z: Layers) -> Array:
        layers = (log_prob(z[i], p_layer(params, z[i + 1 :], i)) for i in range(num_layers))
        return log_likelihood(params, x, z) + sum(layers)

    def ascend(params: Params, first: Gaussian, choose: Callable[[int, Gaussian], Array]) -> tuple:
        """Go up from q(z_1 | x), choosing each z_l of its density; returns z and the densities."""
        z, qs = (choose(0, first),), (first,)
        for layer in range(1, num_layers):
            qs = (*qs, q_layer(params, z[-1], layer))
            z = (*z, choose(layer, qs[-1]))
        return z, qs

    def first_of(params: Params, x: PyTree) -> Gaussian:
        return q_layer(params, likelihood.embed(x), 0)

    def sampled(key: Key, params: Params, first: Gaussian) -> tuple[Layers, tuple[Gaussian, ...]]:
        keys = jax.random.split(check_key(key), num_layers)
        return ascend(params, first, lambda layer, q: drawn(keys[layer], q))

    def q(params: Params, x: PyTree) -> Distribution:
        first = first_of(params, x)

        def sample_and_log_prob(key: Key) -> tuple[Layers, Array]:
            z, qs = sampled(key, params, first)
            return z, sum(map(log_prob, z, qs))

        def log_prob_of(z: Layers) -> Array:
            return sum(map(log_prob, *ascend(params, first, lambda layer, q: z[layer])))

        return Distribution(lambda key: sampled(key, params, first)[0], log_prob_of, sample_and_log_prob)

    def complete(key: Key, params: Params, upper: Layers) -> Layers:
        keys = jax.random.split(check_key(key), num_layers)
        z = tuple(upper)
        for layer in reversed(range(num_layers - len(z))):
            z = (drawn(keys[layer], p_layer(params, z, layer)), *z)
        return z

    def sample(key: Key, params: Params) -> tuple[PyTree, Layers]:
        key_z, key_x = jax.random.split(check_key(key))
        z = complete(key_z, params, ())
        return likelihood.sample(key_x, decoders[0].apply(params.theta, z[0])), z

    def elbo_terms(key: Key, params: Params, x: PyTree) -> Terms:
        z, qs = sampled(key, params, first_of(params, x))
        terms = {"reconstruction": log_likelihood(params, x, z)}
        for i, q in enumerate(qs):
            p = p_layer(params, z[i + 1 :], i)
            terms[f"kl_{i + 1}"] = -kl(q, p) if i == num_layers - 1 else entropy(q) + log_prob(z[i], p)
        return terms

    def encode(params: Params, x: PyTree) -> Layers:
        return ascend(params, first_of(params, x), lambda layer, q: q.loc)[0]

    def decode(params: Params, z: Layers) -> Array:
        return likelihood.mean(decoders[0].apply(params.theta, z[0]))

    sample_q, log_q = fused(q)
    return HVAE(init, log_joint, log_q, sample_q, sample, elbo_terms, encode, decode, complete)
