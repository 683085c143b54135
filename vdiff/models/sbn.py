r"""The sigmoid belief network: layers of bits, each given the one above.

    p(x, z_1..z_L) = p_theta(x | z_1) prod_l p_theta(z_l | z_{l+1}) p_phi(z_L)         bits independent given parents
    q(z_1..z_L | x) = q_lambda(z_1 | x) prod_l q_lambda(z_{l+1} | z_l)

No derivative passes through a bit: train it by `score_function`, `wake_sleep`, `rebar` (one layer) or the like.

Source: Neal, Connectionist Learning of Belief Networks, 1992; Mnih and Gregor, Neural Variational Inference and
Learning in Belief Networks, 2014.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.densities import bernoulli_log_prob
from vdiff.types import (
    Distribution,
    Key,
    Likelihood,
    Model,
    Network,
    Objective,
    Params,
    PyTree,
    check_key,
    fused,
)

Bits = tuple[Array, ...]
"""z_1..z_L, each bool [size]; floats between zero and one are accepted where a density is evaluated."""


class SBN(NamedTuple):
    """Hold a `Model` and what relaxations of it need.

    Attributes:
        init: see `Model`.
        log_joint: see `Model`.
        log_q: see `Model`.
        sample_q: see `Model`.
        sample: see `Model`.
        elbo_terms: None; the terms are an estimator's.
        logits: `(params, x) -> (l_1,)`, those of q(z | x) where there is one layer.
        prior_logits: `(params) -> (l_1,)`, those of p(z) where there is one layer.
        sample_x: `(key, params, z) -> x`, drawn from p(x | z).
        decode: `(params, z) -> E[x | z]`.
    """

    init: Callable[[Key], Params]
    log_joint: Callable[[Params, PyTree, PyTree], Array]
    log_q: Callable[[Params, PyTree, PyTree], Array]
    sample_q: Callable[[Key, Params, PyTree], PyTree]
    sample: Callable[[Key, Params], tuple[PyTree, PyTree]]
    elbo_terms: Objective | None
    logits: Callable[[Params, PyTree], tuple[Array]]
    prior_logits: Callable[[Params], tuple[Array]]
    sample_x: Callable[[Key, Params, Bits], PyTree]
    decode: Callable[[Params, Bits], Array]

    elbo_estimate = Model.elbo_estimate


def sbn(
    encoders: Sequence[Network], decoders: Sequence[Network], *, num_units: int, likelihood: Likelihood
) -> SBN:
    """Build a sigmoid belief network with as many layers as there are encoders.

    `params.theta` and `params.lam` are tuples, one entry a layer from the data upwards; `params.phi` are the logits of
    the top layer's bits, [num_units], which start at zero.

    Args:
        encoders: logits of z_1 given likelihood.embed(x), then of z_{l+1} given 2 z_l - 1.
        decoders: the likelihood's `out` given 2 z_1 - 1, then the logits of z_l given 2 z_{l+1} - 1.
        num_units: bits in the top layer.
        likelihood: what decoders[0]'s output means, e.g. `likelihoods.bernoulli()`.

    Returns:
        An `SBN`; everything in nats per datum.

    Raises:
        ValueError: if the numbers of encoders and decoders are not the same and positive, or `num_units` is less than
            one; in `logits` and `prior_logits`, if there is more than one layer.
    """
    num_layers = len(encoders)
    if num_layers < 1 or len(decoders) != num_layers:
        raise ValueError(
            f"decoders: got {len(decoders)} for {num_layers} encoders, expected one of each a layer, at least one"
        )
    if num_units < 1:
        raise ValueError(f"num_units: got {num_units}, expected at least 1")

    def q_logits(params: Params, below: Array, layer: int) -> Array:
        return encoders[layer].apply(params.lam[layer], below)

    def p_logits(params: Params, above: Bits, layer: int) -> Float[Array, " bits"]:
        if layer == num_layers - 1:
            return params.phi
        return decoders[layer + 1].apply(params.theta[layer + 1], _shown(above[0]))

    def out(params: Params, z: Bits) -> Array:
        return decoders[0].apply(params.theta[0], _shown(z[0]))

    def init(key: Key) -> Params:
        keys = jax.random.split(check_key(key), 2 * num_layers)
        return Params(
            theta=tuple(net.init(k) for net, k in zip(decoders, keys[:num_layers], strict=True)),
            phi=jnp.zeros(num_units),
            lam=tuple(net.init(k) for net, k in zip(encoders, keys[num_layers:], strict=True)),
        )

    def log_joint(params: Params, x: PyTree, z: Bits) -> Array:
        layers = (
            jnp.sum(bernoulli_log_prob(z[i], p_logits(params, z[i + 1 :], i))) for i in range(num_layers)
        )
        return likelihood.log_prob(out(params, z), x) + sum(layers)

    def q(params: Params, x: PyTree) -> Distribution:
        first = q_logits(params, likelihood.embed(x), 0)

        def sample_and_log_prob(key: Key) -> tuple[Bits, Array]:
            z, log_prob, eta = (), 0.0, first
            for layer, key_layer in enumerate(jax.random.split(key, num_layers)):
                if layer > 0:
                    eta = q_logits(params, _shown(z[-1]), layer)
                z = (*z, _draw(key_layer, eta))
                log_prob += jnp.sum(bernoulli_log_prob(z[-1], eta))
            return z, log_prob

        def log_prob(z: Bits) -> Array:
            etas = (first, *(q_logits(params, _shown(z[i]), i + 1) for i in range(num_layers - 1)))
            return sum(jnp.sum(bernoulli_log_prob(*pair)) for pair in zip(z, etas, strict=True))

        return Distribution(lambda key: sample_and_log_prob(key)[0], log_prob, sample_and_log_prob)

    def sample_x(key: Key, params: Params, z: Bits) -> PyTree:
        return likelihood.sample(check_key(key), out(params, z))

    def sample(key: Key, params: Params) -> tuple[PyTree, Bits]:
        keys = jax.random.split(check_key(key), num_layers + 1)
        z = ()
        for layer in reversed(range(num_layers)):
            z = (_draw(keys[layer], p_logits(params, z, layer)), *z)
        return sample_x(keys[-1], params, z), z

    def logits(params: Params, x: PyTree) -> tuple[Array]:
        _check_one_layer("logits", num_layers)
        return (q_logits(params, likelihood.embed(x), 0),)

    def prior_logits(params: Params) -> tuple[Array]:
        _check_one_layer("prior_logits", num_layers)
        return (params.phi,)

    def decode(params: Params, z: Bits) -> Array:
        return likelihood.mean(out(params, z))

    sample_q, log_q = fused(q)
    return SBN(init, log_joint, log_q, sample_q, sample, None, logits, prior_logits, sample_x, decode)


def _shown(z: Array) -> Array:
    """Show bits to a network as -1 and 1, centred like `embed`'s pixels: it learns several times faster."""
    return 2.0 * z.astype(jnp.float32) - 1.0


def _draw(key: Key, logits: Array) -> Array:
    return jax.random.bernoulli(key, jax.nn.sigmoid(logits))


def _check_one_layer(name: str, num_layers: int) -> None:
    if num_layers > 1:
        raise ValueError(
            f"{name}: got a network of {num_layers} layers, expected one, since deeper bits are not independent given "
            "x; use score_function(model, bound, num_samples) or wake_sleep(model, num_samples)"
        )
