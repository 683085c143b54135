r"""The Gaussian mixture: the latent-variable model whose every quantity is known exactly.

    p(z) = softmax(phi)_z,   z in {0..C-1}           p(x | z) = N(x; loc_z, Sigma_z)         (12.2.1)
    log p(x)   = log sum_z p(z) p(x | z)                            C terms: exact
    p(z | x)   = p(z) p(x | z) / p(x)                               exact, so a q for which
    ELBO(x)    = log p(x)                                           tight at the posterior (12.2.3)

Source: lecture 12.2.1 and 12.2.3; Bishop, Pattern Recognition and Machine Learning, 2006, 9.2 and 2.3.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from vdiff.densities import categorical_log_prob
from vdiff.models.covariance import Covariance, component_log_prob, full_covariance
from vdiff.types import (
    Distribution,
    Key,
    Model,
    Network,
    Objective,
    Params,
    PyTree,
    Terms,
    check_key,
    fused,
    in_turn,
)


class GMM(NamedTuple):
    """Hold a mixture: the fields of `Model`, and what only a mixture knows.

    Attributes:
        init, log_joint, log_q, sample_q, sample, elbo_terms: as in `vdiff.types.Model`; z is an int32 scalar.
        log_prob: `(params, x) -> []`, log p(x) by enumeration, nats.
        log_posterior: `(params, x) -> [num_components]`, log p(z | x), nats.
        covariance: the `Covariance` that it was built with.
        encoder: the `Network` of q, or None where q is the posterior.
    """

    init: Callable[[Key], Params]
    log_joint: Callable[[Params, PyTree, PyTree], Array]
    log_q: Callable[[Params, PyTree, PyTree], Array]
    sample_q: Callable[[Key, Params, PyTree], PyTree]
    sample: Callable[[Key, Params], tuple[PyTree, PyTree]]
    elbo_terms: Objective
    log_prob: Callable[[Params, PyTree], Array]
    log_posterior: Callable[[Params, PyTree], Array]
    covariance: Covariance
    encoder: Network | None

    elbo_estimate = Model.elbo_estimate


def gmm(
    num_components: int,
    dim: int,
    *,
    covariance: Covariance = full_covariance,
    encoder: Network | None = None,
) -> GMM:
    """Build a mixture of Gaussians; x is a float vector [dim], z the index of its component.

        log p(x, z) = log softmax(phi)_z + log N(x; loc_z, Sigma_z)
        elbo_terms  = {"reconstruction": sum_z q(z|x) log p(x|z), "kl": -KL(q(z|x) || p(z))}

    Without an encoder q(z | x) is the exact posterior at theta and phi, lam is (), and the terms sum to
    log p(x), in value and gradient. With one, q = softmax(encoder(x)) and they sum to the exact ELBO. Either
    way the sum runs over all components, so no key is used; a component of probability zero adds nothing.

    Args:
        num_components: C, at least 1.
        dim: dimension of x, at least 1.
        covariance: `full_covariance`, `diagonal_covariance` or `shared_covariance`, or your own record.
        encoder: a `Network` with apply(lam, x) -> logits [C]; None for the exact posterior.

    Returns:
        A `GMM`, with params theta = {"loc": [C, dim], ...the covariance's leaves}, phi = {"logits": [C]} and
        lam = encoder's. `init` draws locations from N(0, I), with unit covariances and equal weights.

    Raises:
        ValueError: if C or dim is less than one; at trace time, if x is not a float [dim] or the encoder's
            output not [C].

    Source: lecture 12.2.1 and 12.2.3; Bishop, Pattern Recognition and Machine Learning, 2006, 9.2.
    """
    for name, got in (("num_components", num_components), ("dim", dim)):
        if got < 1:
            raise ValueError(f"{name}: got {got}, expected at least 1")

    def init(key: Key) -> Params:
        key_loc, key_lam = jax.random.split(check_key(key))
        return Params(
            theta={"loc": jax.random.normal(key_loc, (num_components, dim))}
            | covariance.init(num_components, dim),
            phi={"logits": jnp.zeros((num_components,))},
            lam=() if encoder is None else encoder.init(key_lam),
        )

    def log_likelihoods(params: Params, x: Array) -> Float[Array, " C"]:
        _check_datum(x, dim)
        components = jnp.arange(num_components, dtype=jnp.int32)
        return jax.vmap(lambda z: component_log_prob(covariance, params.theta, z, x))(components)

    def log_joints(params: Params, x: Array) -> Float[Array, " C"]:
        return jax.nn.log_softmax(params.phi["logits"]) + log_likelihoods(params, x)

    def log_prob(params: Params, x: Array) -> Float[Array, ""]:
        return logsumexp(log_joints(params, x))

    def log_posterior(params: Params, x: Array) -> Float[Array, " C"]:
        return jax.nn.log_softmax(log_joints(params, x))

    def log_qs(params: Params, x: Array) -> Float[Array, " C"]:
        if encoder is None:
            return log_posterior(params, x)
        _check_datum(x, dim)
        return jax.nn.log_softmax(_check_logits(encoder.apply(params.lam, x), num_components))

    def log_joint(params: Params, x: Array, z: Int[Array, ""]) -> Float[Array, ""]:
        _check_datum(x, dim)
        log_prior = categorical_log_prob(z, params.phi["logits"])
        return log_prior + component_log_prob(covariance, params.theta, z, x)

    def q(params: Params, x: Array) -> Distribution:
        log_q = log_qs(params, x)
        return in_turn(
            lambda key: jax.random.categorical(key, log_q).astype(jnp.int32),
            lambda z: categorical_log_prob(z, log_q),
        )

    def sample(key: Key, params: Params) -> tuple[Float[Array, " dim"], Int[Array, ""]]:
        key_z, key_x = jax.random.split(check_key(key))
        loc = params.theta["loc"]
        z = jax.random.categorical(key_z, params.phi["logits"]).astype(jnp.int32)
        noise = jax.random.normal(key_x, (dim,), loc.dtype)
        return loc[z] + covariance.unwhiten(params.theta, z, noise), z

    def elbo_terms(key: Key, params: Params, x: Array) -> Terms:
        log_q = log_qs(params, x)
        log_prior = jax.nn.log_softmax(params.phi["logits"])
        # Where q is zero, or underflows to it, log_prior may be -inf: take it out before they meet.
        is_possible = log_q > jnp.log(jnp.finfo(log_q.dtype).tiny)
        q = jnp.where(is_possible, jnp.exp(log_q), 0.0)
        log_ratio = jnp.where(is_possible, log_prior, 0.0) - jnp.where(is_possible, log_q, 0.0)
        return {
            "reconstruction": jnp.sum(q * log_likelihoods(params, x)),
            "kl": jnp.sum(q * log_ratio),
        }

    sample_q, log_q = fused(q)
    return GMM(
        init, log_joint, log_q, sample_q, sample, elbo_terms, log_prob, log_posterior, covariance, encoder
    )


def collapsed(mixture: GMM) -> Model:
    """Sum the component out of a mixture: the same density of x, as a `Model` without a latent.

        z = (),   log p(x, z) = log p(x),   log q = 0

    A density in this form can be the prior of a VAE, with its latent for x. An encoder is left behind.

    Args:
        mixture: a `GMM`.

    Returns:
        A `Model` over the same theta and phi, lam = (), with the one term `log_prob`, exact, nats.
    """
    return Model(
        init=lambda key: mixture.init(key)._replace(lam=()),
        log_joint=lambda params, x, z: mixture.log_prob(params, x),
        log_q=lambda params, x, z: jnp.zeros(()),
        sample_q=lambda key, params, x: (),
        sample=lambda key, params: (mixture.sample(key, params)[0], ()),
        elbo_terms=lambda key, params, x: {"log_prob": mixture.log_prob(params, x)},
    )


def _check_datum(x: Array, dim: int) -> None:
    if jnp.shape(x) != (dim,):
        fix = "pass one datum as a vector, and map over a batch with jax.vmap"
        raise ValueError(f"x: got shape {list(jnp.shape(x))}, expected [{dim}]; {fix}")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(f"x: got dtype {jnp.result_type(x)}, expected floating point; convert it by astype")


def _check_logits(logits: Array, num_components: int) -> Array:
    if jnp.shape(logits) != (num_components,):
        raise ValueError(
            f"encoder: got an output of shape {list(jnp.shape(logits))}, expected [{num_components}]; "
            "let its last layer return one logit per component"
        )
    return logits
