"""The bound that experiments on latent-variable models of images raise."""

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

import vdiff as vd


class BoundConfig(Protocol):
    """Describe the settings that say what is raised."""

    bound: str
    num_samples: int
    warmup_steps: int


def bound_of(config: BoundConfig, model: vd.ModelLike) -> vd.Objective:
    """Choose the bound: the ELBO with its closed forms, a mean over draws, or the importance-weighted one (DReG)."""
    if config.bound == "iwae":
        return vd.doubly_reparameterized(model, vd.iwae, config.num_samples)
    return vd.repeat(model.elbo_terms, config.num_samples)


def objective_of(
    config: BoundConfig,
    model: vd.ModelLike,
    transform: Callable[[jax.Array, jax.Array], jax.Array],
    kl_terms: Sequence[str],
) -> vd.Scheduled:
    """Make what is raised of one stored image, at a step: the bound, its KL terms warmed up.

    Args:
        config: the settings.
        model: with `elbo_terms`.
        transform: `(key, stored image) -> the model's datum`.
        kl_terms: the terms whose weight rises to one over the warm-up.

    Returns:
        The scheduled objective.
    """
    bound = bound_of(config, model)

    def at(step: jax.Array) -> vd.Objective:
        if not config.warmup_steps:
            return vd.preprocessed(bound, transform)
        beta = jnp.minimum(1.0, (step + 1) / config.warmup_steps)
        return vd.preprocessed(vd.weighted(bound, dict.fromkeys(kl_terms, beta)), transform)

    return vd.scheduled(at)
