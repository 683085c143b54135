r"""A density of continuous data as a model of integers: dequantisation is one more latent.

    k in {0..levels-1}^d,   y = (k + u) / levels,   u ~ q(u | k) = U[0, 1)^d
    P(k) = int p(y(u)) levels^-d du        so  log p(y) - d log levels  is a log-joint of (k, u)

The ELBO of the pair (u, z) is the usual bound by uniform dequantisation; `importance_log_prob` tightens it.
Mass that the density puts outside [0, 1)^d counts for no integer: the bound stays a bound.

Source: Theis, van den Oord and Bethge, A Note on the Evaluation of Generative Models, 2016, 3.1; Ho et al.,
Flow++, 2019, 3.1.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vdiff.types import Distribution, Key, Model, ModelLike, Params, PyTree, Terms, check_key, fused, q_at


def dequantized(model: ModelLike, levels: int) -> Model:
    """Turn a model of y in [0, 1)^d into a model of integer levels.

    Args:
        model: a `Model` whose datum is a float array.
        levels: how many values an integer can take, e.g. 17 or 256.

    Returns:
        A `Model` of x, an integer array of the same shape, with the latent (u, z); its terms are the model's
        and "dequantization", -d log(levels). Everything in nats per datum, as a mass, not a density. What it
        samples is clipped to 0..levels-1.

    Raises:
        ValueError: if there are fewer than two levels.
    """
    if levels < 2:
        raise ValueError(f"levels: got {levels}, expected at least 2; count the values a pixel can take")

    def to_unit(x: Array, u: Array) -> Array:
        k = x.astype(jnp.float32)
        # A sum that float32 rounds up to the next level is taken back into its bin.
        return jnp.minimum(k + u, jnp.nextafter(k + 1.0, 0.0)) / levels

    def log_joint(params: Params, x: Array, z: tuple[Array, PyTree]) -> Array:
        u, z = z
        return model.log_joint(params, to_unit(x, u), z) - x.size * math.log(levels)

    def q(params: Params, x: Array) -> Distribution:
        def log_prob(z: tuple[Array, PyTree]) -> Array:
            u, z = z
            return model.log_q(params, to_unit(x, u), z)

        def sample_and_log_prob(key: Key) -> tuple[tuple[Array, PyTree], Array]:
            key_u, key_z = jax.random.split(key)
            u = jax.random.uniform(key_u, x.shape)
            z, log_q = q_at(model, params, to_unit(x, u)).sample_and_log_prob(key_z)
            return (u, z), log_q

        return Distribution(lambda key: sample_and_log_prob(key)[0], log_prob, sample_and_log_prob)

    def sample(key: Key, params: Params) -> tuple[Array, tuple[Array, PyTree]]:
        y, z = model.sample(key, params)
        x = jnp.clip(jnp.floor(y * levels), 0, levels - 1)
        return x.astype(jnp.int32), (y * levels - x, z)

    def elbo_terms(key: Key, params: Params, x: Array) -> Terms:
        key_u, key_z = jax.random.split(check_key(key))
        y = to_unit(x, jax.random.uniform(key_u, x.shape))
        if model.elbo_terms is None:
            terms = {"elbo": model.elbo_estimate(key_z, params, y)}
        else:
            terms = model.elbo_terms(key_z, params, y)
        return {**terms, "dequantization": jnp.asarray(-x.size * math.log(levels), y.dtype)}

    sample_q, log_q = fused(q)
    return Model(model.init, log_joint, log_q, sample_q, sample, elbo_terms)
