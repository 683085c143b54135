r"""The hierarchical variational autoencoder inferred from the top down, along the path that generates.

A deterministic path h comes down through the layers and gathers what they say; another, e, goes up from the data:

    e_0 = embed(x),   e_l = encoder_l(e_{l-1})
    h_{L+1} = start,  h_l = decoder_l(h_{l+1}, z_l);      h_1 is the likelihood's `out`

    p(z_l | z_{l+1..L})    = N of prior_l(h_{l+1})                                     p(x | z) of h_1
    q(z_l | z_{l+1..L}, x) = N of combine( prior_l(h_{l+1}), posterior_l(h_{l+1}, e_l) )

p and q go through the same layers in the same order, so that each layer's KL divergence given those above is a closed
form, and h, the priors and what makes them are shared by p and q:

    ELBO(x) = E_q[log p(x | z)] - sum_l E_q[ KL( q(z_l | z_{l+1..L}, x) || p(z_l | z_{l+1..L}) ) ]

Source: Sonderby et al., Ladder Variational Autoencoders, 2016; Child, Very Deep VAEs Generalize Autoregressive Models,
2021; Vahdat and Kautz, NVAE, 2020 (the posterior relative to the prior).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.models.gaussian_layer import Gaussian, drawn, halved, kl, log_prob
from vdiff.models.hvae import HVAE, Layers
from vdiff.types import Distribution, Key, Likelihood, Network, Params, PyTree, Terms, check_key, fused

Combine = Callable[[Gaussian, Gaussian], Gaussian]
"""`(prior, seen) -> q`: a layer's q from its prior and from what the posterior's network sees in x."""


def relative_to_prior(prior: Gaussian, seen: Gaussian) -> Gaussian:
    """Move the prior: loc + scale * loc', log scale + log scale'. An output of zero is the prior, at no cost in KL.

    Source: Vahdat and Kautz, NVAE, 2020, 3.2.
    """
    return Gaussian(
        prior.loc + jnp.exp(prior.log_scale) * seen.loc,
        prior.log_scale + seen.log_scale,
    )


def precision_weighted(prior: Gaussian, seen: Gaussian) -> Gaussian:
    """Multiply the prior and what is seen: precisions add, means are weighted by them. Exact where both are Gaussian.

    Source: Sonderby et al., Ladder Variational Autoencoders, 2016, eqs. 17 and 18.
    """
    weight = jax.nn.sigmoid(2.0 * (seen.log_scale - prior.log_scale))
    loc = weight * prior.loc + (1.0 - weight) * seen.loc
    return Gaussian(loc, -0.5 * jnp.logaddexp(-2.0 * prior.log_scale, -2.0 * seen.log_scale))


def as_seen(prior: Gaussian, seen: Gaussian) -> Gaussian:
    """Take what is seen for q, and of the prior only what its network was shown.

    Source: Child, Very Deep VAEs, 2021.
    """
    return seen


def ladder(
    start: Network,
    encoders: Sequence[Network],
    priors: Sequence[Network],
    posteriors: Sequence[Network],
    decoders: Sequence[Network],
    *,
    likelihood: Likelihood,
    combine: Combine = relative_to_prior,
) -> HVAE:
    """Build a hierarchical variational autoencoder with top-down inference.

    `params.theta` are those of decoders[0]; `params.phi` is {"start", "priors", "decoders"}, which q goes through as
    well as p; `params.lam` is {"encoders", "posteriors"}. Sequences run from the data upwards, one entry a layer; z_l
    and h_l may have any shape, an image's too. K draws take one pass through the encoders, and K down.

    Args:
        start: `apply(params) -> h_{L+1}`, e.g. `nets.constant(shape)`.
        encoders: e_l given e_{l-1}, the first of them given likelihood.embed(x).
        priors: loc beside log scale of z_l along the last axis, given h_{l+1}.
        posteriors: the same shape, given (h_{l+1}, e_l).
        decoders: h_l given (h_{l+1}, z_l); that of the first is the likelihood's `out`.
        likelihood: what decoders[0]'s output means, e.g. `likelihoods.bernoulli()`.
        combine: how prior and posterior make q: `relative_to_prior`, `precision_weighted`, `as_seen`, or your own.

    Returns:
        An `HVAE`; everything in nats per datum. Its terms are "reconstruction" at one draw and "kl_l", l = 1..L,
        -KL(q(z_l | .) || p(z_l | .)) in closed form, given the draws above.

    Raises:
        ValueError: if there is not one encoder, prior, posterior and decoder a layer, and at least one; at trace time,
            if a network's output does not fit.
    """
    num_layers = len(encoders)
    counts = {"encoders": num_layers, "priors": len(priors), "posteriors": len(posteriors)}
    counts["decoders"] = len(decoders)
    if num_layers < 1 or set(counts.values()) != {num_layers}:
        raise ValueError(f"encoders: got {counts}, expected one of each a layer, at least one")

    def p_layer(params: Params, h: Array, layer: int) -> Gaussian:
        return halved(f"priors[{layer}]", priors[layer].apply(params.phi["priors"][layer], h))

    def pair(params: Params, h: Array, e: Array, layer: int) -> tuple[Gaussian, Gaussian]:
        """Compute p(z_l | z_{l+1..L}) and q(z_l | z_{l+1..L}, x)."""
        name, p = f"posteriors[{layer}]", p_layer(params, h, layer)
        seen = halved(name, posteriors[layer].apply(params.lam["posteriors"][layer], h, e))
        if seen.loc.shape != p.loc.shape:
            raise ValueError(
                f"{name}: got a latent of shape {seen.loc.shape}, expected {p.loc.shape}, that of priors[{layer}]"
            )
        return p, combine(p, seen)

    def ascend(params: Params, x: PyTree) -> Layers:
        """Compute e_1..e_L."""
        e = (likelihood.embed(x),)
        for net, of_net in zip(encoders, params.lam["encoders"], strict=True):
            e = (*e, net.apply(of_net, e[-1]))
        return e[1:]

    def descend(params: Params, step: Callable[[int, Array], tuple[Array, PyTree]]) -> tuple:
        """Come down with `step(layer, h_{l+1}) -> (z_l, anything)`; returns z, what steps gave besides, and h_1."""
        h, z, others = start.apply(params.phi["start"]), (), ()
        for layer in reversed(range(num_layers)):
            z_l, other = step(layer, h)
            z, others = (z_l, *z), (other, *others)
            of_net = params.phi["decoders"][layer - 1] if layer else params.theta
            h = decoders[layer].apply(of_net, h, z_l)
        return z, others, h

    def log_likelihood(out: Array, x: PyTree) -> Array:
        if out.shape != likelihood.out_shape(x.shape):
            raise ValueError(
                f"decoders[0]: got output of shape {out.shape}, expected {likelihood.out_shape(x.shape)} for x "
                f"of shape {x.shape}; build it with out_shape=likelihood.out_shape(x.shape)"
            )
        return likelihood.log_prob(out, x)

    def init(key: Key) -> Params:
        key_start, *keys = jax.random.split(check_key(key), 1 + 4 * num_layers)
        of_kind = [
            tuple(net.init(k) for net, k in zip(nets, keys[i::4], strict=True))
            for i, nets in enumerate((encoders, priors, posteriors, decoders))
        ]
        up, of_p, of_q, down = of_kind
        phi = {"start": start.init(key_start), "priors": of_p, "decoders": down[1:]}
        return Params(theta=down[0], phi=phi, lam={"encoders": up, "posteriors": of_q})

    def log_joint(params: Params, x: PyTree, z: Layers) -> Array:
        _, log_p, out = descend(
            params, lambda layer, h: (z[layer], log_prob(z[layer], p_layer(params, h, layer)))
        )
        return sum(log_p) + log_likelihood(out, x)

    def q(params: Params, x: PyTree) -> Distribution:
        e = ascend(params, x)

        def sample_and_log_prob(key: Key) -> tuple[Layers, Array]:
            keys = jax.random.split(check_key(key), num_layers)

            def step(layer: int, h: Array) -> tuple[Array, Array]:
                _, q_l = pair(params, h, e[layer], layer)
                z_l = drawn(keys[layer], q_l)
                return z_l, log_prob(z_l, q_l)

            z, log_q, _ = descend(params, step)
            return z, sum(log_q)

        def log_prob_of(z: Layers) -> Array:
            def step(layer: int, h: Array) -> tuple[Array, Array]:
                return z[layer], log_prob(z[layer], pair(params, h, e[layer], layer)[1])

            return sum(descend(params, step)[1])

        return Distribution(lambda key: sample_and_log_prob(key)[0], log_prob_of, sample_and_log_prob)

    def elbo_terms(key: Key, params: Params, x: PyTree) -> Terms:
        e, keys = ascend(params, x), jax.random.split(check_key(key), num_layers)

        def step(layer: int, h: Array) -> tuple[Array, Array]:
            p_l, q_l = pair(params, h, e[layer], layer)
            return drawn(keys[layer], q_l), -kl(q_l, p_l)

        _, kls, out = descend(params, step)
        names = (f"kl_{i + 1}" for i in range(num_layers))
        return {"reconstruction": log_likelihood(out, x), **dict(zip(names, kls, strict=True))}

    def completed(key: Key, params: Params, upper: Layers) -> tuple[Layers, Array]:
        keys, first = jax.random.split(check_key(key), num_layers), num_layers - len(upper)

        def step(layer: int, h: Array) -> tuple[Array, None]:
            if layer >= first:
                return upper[layer - first], None
            return drawn(keys[layer], p_layer(params, h, layer)), None

        z, _, out = descend(params, step)
        return z, out

    def sample(key: Key, params: Params) -> tuple[PyTree, Layers]:
        key_z, key_x = jax.random.split(check_key(key))
        z, out = completed(key_z, params, ())
        return likelihood.sample(key_x, out), z

    def complete(key: Key, params: Params, upper: Layers) -> Layers:
        return completed(key, params, upper)[0]

    def encode(params: Params, x: PyTree) -> Layers:
        e = ascend(params, x)
        return descend(params, lambda layer, h: (pair(params, h, e[layer], layer)[1].loc, None))[0]

    def decode(params: Params, z: Layers) -> Array:
        return likelihood.mean(descend(params, lambda layer, h: (z[layer], None))[2])

    sample_q, log_q = fused(q)
    return HVAE(init, log_joint, log_q, sample_q, sample, elbo_terms, encode, decode, complete)
