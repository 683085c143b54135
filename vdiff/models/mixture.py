r"""A finite mixture: the latent-variable model whose every quantity is a sum over components, and so exact.

    p(z) = softmax(phi)_z,   z in {0..C-1}           p(x | z) = that of component z          (12.2.1)
    log p(x)   = log sum_z p(z) p(x | z)                            C terms: exact
    p(z | x)   = p(z) p(x | z) / p(x)                               exact, so a q for which
    ELBO(x)    = log p(x)                                           tight at the posterior (12.2.3)

What a component is, is a record of three functions: `gaussian_components` of vectors, `pixel_components` of images of
discrete pixels.

Source: lecture 12.2.1 and 12.2.3; Bishop, Pattern Recognition and Machine Learning, 2006, 9.2 and 9.3.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from vdiff.densities import categorical_log_prob
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
    in_turn,
)


class Components(NamedTuple):
    """Hold what the components of a mixture are.

    Attributes:
        init: `(key, num_components) -> theta`, the start.
        log_prob: `(theta, z, x) -> []`, log p(x | z), nats; raises ValueError where x is not such a datum.
        sample: `(key, theta, z) -> x`, a draw.
    """

    init: Callable[[Key, int], PyTree]
    log_prob: Callable[[PyTree, Array, PyTree], Array]
    sample: Callable[[Key, PyTree, Array], PyTree]


class Mixture(NamedTuple):
    """Hold a mixture: the fields of `Model`, and what only a mixture knows.

    Attributes:
        init, log_joint, log_q, sample_q, sample, elbo_terms: as in `vdiff.types.Model`; z is an int32 scalar.
        log_prob: `(params, x) -> []`, log p(x) by enumeration, nats.
        log_posterior: `(params, x) -> [num_components]`, log p(z | x), nats.
    """

    init: Callable[[Key], Params]
    log_joint: Callable[[Params, PyTree, PyTree], Array]
    log_q: Callable[[Params, PyTree, PyTree], Array]
    sample_q: Callable[[Key, Params, PyTree], PyTree]
    sample: Callable[[Key, Params], tuple[PyTree, PyTree]]
    elbo_terms: Objective
    log_prob: Callable[[Params, PyTree], Array]
    log_posterior: Callable[[Params, PyTree], Array]

    elbo_estimate = Model.elbo_estimate


def mixture(num_components: int, components: Components, *, encoder: Network | None = None) -> Mixture:
    """Build a mixture of such components.

        log p(x, z) = log softmax(phi)_z + log p(x | z)
        elbo_terms  = {"reconstruction": sum_z q(z|x) log p(x|z), "kl": -KL(q(z|x) || p(z))}

    Without an encoder q(z | x) is the exact posterior at theta and phi, lam is (), and the terms sum to
    log p(x), in value and gradient. With one, q = softmax(encoder(x)) and they sum to the exact ELBO. Either
    way the sum runs over all components, so no key is used; a component of probability zero adds nothing.

    Args:
        num_components: C, at least 1.
        components: what they are.
        encoder: a `Network` with apply(lam, x) -> logits [C]; None for the exact posterior.

    Returns:
        A `Mixture`, with params theta that of the components, phi = {"logits": [C]} and lam = encoder's. `init` gives
        all the same weight.

    Raises:
        ValueError: if C is less than one; at trace time, if x does not fit the components or the encoder's output is
            not [C].

    Source: lecture 12.2.1 and 12.2.3; Bishop, Pattern Recognition and Machine Learning, 2006, 9.2.
    """
    if num_components < 1:
        raise ValueError(f"num_components: got {num_components}, expected at least 1")

    def init(key: Key) -> Params:
        key_theta, key_lam = jax.random.split(check_key(key))
        return Params(
            theta=components.init(key_theta, num_components),
            phi={"logits": jnp.zeros((num_components,))},
            lam=() if encoder is None else encoder.init(key_lam),
        )

    def log_likelihoods(params: Params, x: PyTree) -> Float[Array, " C"]:
        of_all = jnp.arange(num_components, dtype=jnp.int32)
        return jax.vmap(lambda z: components.log_prob(params.theta, z, x))(of_all)

    def log_joints(params: Params, x: PyTree) -> Float[Array, " C"]:
        return jax.nn.log_softmax(params.phi["logits"]) + log_likelihoods(params, x)

    def log_prob(params: Params, x: PyTree) -> Float[Array, ""]:
        return logsumexp(log_joints(params, x))

    def log_posterior(params: Params, x: PyTree) -> Float[Array, " C"]:
        return jax.nn.log_softmax(log_joints(params, x))

    def log_qs(params: Params, x: PyTree) -> Float[Array, " C"]:
        if encoder is None:
            return log_posterior(params, x)
        return jax.nn.log_softmax(_check_logits(encoder.apply(params.lam, x), num_components))

    def log_joint(params: Params, x: PyTree, z: Int[Array, ""]) -> Float[Array, ""]:
        log_likelihood = components.log_prob(params.theta, z, x)
        return categorical_log_prob(z, params.phi["logits"]) + log_likelihood

    def q(params: Params, x: PyTree) -> Distribution:
        log_q = log_qs(params, x)
        return in_turn(
            lambda key: jax.random.categorical(key, log_q).astype(jnp.int32),
            lambda z: categorical_log_prob(z, log_q),
        )

    def sample(key: Key, params: Params) -> tuple[PyTree, Int[Array, ""]]:
        key_z, key_x = jax.random.split(check_key(key))
        z = jax.random.categorical(key_z, params.phi["logits"]).astype(jnp.int32)
        return components.sample(key_x, params.theta, z), z

    def elbo_terms(key: Key, params: Params, x: PyTree) -> Terms:
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
    return Mixture(init, log_joint, log_q, sample_q, sample, elbo_terms, log_prob, log_posterior)


def pixel_components(
    likelihood: Likelihood,
    levels: int,
    shape: tuple[int, ...],
    *,
    out_bias: np.ndarray | float = 0.0,
    init_scale: float = 0.3,
) -> Components:
    """Build components whose pixels are independent and discrete.

        log p(x | z) = sum_i T_z[i, x_i],   T_z[i, l] = log-mass that likelihood(out_zi) gives the level l

    A table of masses is the same for all data: over a batch the sum is one matrix product with the levels, one-hot.

    Args:
        likelihood: what a pixel is; under `likelihoods.bernoulli()` the mixture is one of Bernoullis (Bishop, 9.3.3).
        levels: how many values a pixel has, 2 for bits.
        shape: of x.
        out_bias: broadcast to `likelihood.out_shape(shape)`; the outputs' start, the same in all components.
        init_scale: standard deviation of the noise on that, which tells components apart.

    Returns:
        `Components`, theta = {"out": [C, *likelihood.out_shape(shape)]}. A level outside 0..levels-1 gives NaN.

    Raises:
        ValueError: if there are fewer than two levels; at trace time, if x has another shape.
    """
    if levels < 2:
        raise ValueError(f"levels: got {levels}, expected at least 2; count the values a pixel can take")
    out_shape = likelihood.out_shape(shape)
    num_pixels, of_pixel = math.prod(shape), out_shape[len(shape) :]

    def init(key: Key, num_components: int) -> PyTree:
        noise = jax.random.normal(check_key(key), (num_components, *out_shape))
        start = jnp.broadcast_to(jnp.asarray(out_bias, jnp.float32), noise.shape)
        return {"out": start + init_scale * noise}

    def log_prob(theta: PyTree, z: Int[Array, ""], x: PyTree) -> Float[Array, ""]:
        if jnp.shape(x) != tuple(shape):
            fix = "pass one datum, and map over a batch with jax.vmap"
            raise ValueError(f"x: got shape {list(jnp.shape(x))}, expected {list(shape)}; {fix}")
        x = jnp.asarray(x, jnp.int32).ravel()
        of_level = jax.vmap(likelihood.log_prob, in_axes=(None, 0))
        out = theta["out"][z].reshape(num_pixels, *of_pixel)
        table = jax.vmap(of_level, in_axes=(0, None))(out, jnp.arange(levels, dtype=jnp.int32))
        shown = jax.nn.one_hot(x, levels, dtype=table.dtype)
        value = jnp.dot(shown.ravel(), table.ravel(), precision=Precision.HIGHEST)
        return jnp.where(jnp.all((x >= 0) & (x < levels)), value, jnp.nan)

    return Components(
        init, log_prob, lambda key, theta, z: likelihood.sample(check_key(key), theta["out"][z])
    )


@runtime_checkable
class Summable(Protocol):
    """Describe what `collapsed` takes: a `Mixture`, a `GMM`, or whatever knows its log p(x)."""

    @property
    def init(self) -> Callable[[Key], Params]: ...  # noqa: D102

    @property
    def sample(self) -> Callable[[Key, Params], tuple[PyTree, PyTree]]: ...  # noqa: D102

    @property
    def log_prob(self) -> Callable[[Params, PyTree], Array]: ...  # noqa: D102


def collapsed(mixture: Summable) -> Model:
    """Sum the component out of a mixture: the same density of x, as a `Model` without a latent.

        z = (),   log p(x, z) = log p(x),   log q = 0

    A density in this form can be the prior of a VAE, with its latent for x. An encoder is left behind.

    Args:
        mixture: a `Mixture` or a `GMM`.

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


def _check_logits(logits: Array, num_components: int) -> Array:
    if jnp.shape(logits) != (num_components,):
        raise ValueError(
            f"encoder: got an output of shape {list(jnp.shape(logits))}, expected [{num_components}]; "
            "let its last layer return one logit per component"
        )
    return logits
