"""Draws of q and their log-weights: what every estimator starts from."""

import jax
from jaxtyping import Array, Float

from vdiff.types import Distribution, Key, ModelLike, Params, PyTree, check_key


def draw(q: Distribution, key: Key, num_samples: int) -> PyTree:
    """Draw z_1..z_K of q(z | x).

    Returns:
        z with a leading axis K = num_samples on every leaf.
    """
    return jax.vmap(q.sample)(jax.random.split(check_key(key), num_samples))


def draw_with_log_q(q: Distribution, key: Key, num_samples: int) -> tuple[PyTree, Float[Array, " K"]]:
    """Draw z_1..z_K as `draw` does, together with log q(z_k | x), nats."""
    z, values = jax.vmap(q.sample_and_log_prob)(jax.random.split(check_key(key), num_samples))
    return z, check_scalars("log_q", values, num_samples)


def log_joints(
    model: ModelLike, params: Params, x: PyTree, z: PyTree, num_samples: int
) -> Float[Array, " K"]:
    """Evaluate log p(x, z_k) at K draws, nats; K is told, since a model without a latent has z = ()."""
    values = jax.vmap(model.log_joint, in_axes=(None, None, 0), axis_size=num_samples)(params, x, z)
    return check_scalars("log_joint", values, num_samples)


def log_qs(q: Distribution, z: PyTree, num_samples: int) -> Float[Array, " K"]:
    """Evaluate log q(z_k | x) at K draws, nats."""
    values = jax.vmap(q.log_prob, axis_size=num_samples)(z)
    return check_scalars("log_q", values, num_samples)


def check_num_samples(num_samples: int) -> None:
    """Refuse fewer than one draw.

    Raises:
        ValueError: if `num_samples` is less than one.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: got {num_samples}, expected at least 1")


def check_scalars(name: str, values: Array, num_samples: int) -> Array:
    """Refuse a log-density that was not summed: it would broadcast, and be wrong in silence.

    Raises:
        ValueError: if a value is not a scalar.
    """
    if values.shape != (num_samples,):
        raise ValueError(
            f"{name}: got an output of shape {values.shape[1:]}, expected a scalar; "
            "sum the log-probabilities over the dimensions of x and z"
        )
    return values
