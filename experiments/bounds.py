"""What experiments on latent-variable models of images share: the bound that is raised, and how a model is judged."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd
from experiments import runs, training
from vdiff import evaluate


class BoundConfig(Protocol):
    """Describe the settings that say what is raised."""

    bound: str
    num_samples: int
    warmup_steps: int


def objective_of(
    config: BoundConfig,
    model: vd.ModelLike,
    transform: Callable[[jax.Array, jax.Array], jax.Array],
    kl_terms: Sequence[str],
) -> vd.Scheduled:
    """Choose what is raised, of one stored image, at a step.

    Args:
        config: the settings.
        model: with `elbo_terms`.
        transform: `(key, stored image) -> the model's datum`.
        kl_terms: the terms whose weight rises to one over the warm-up.

    Returns:
        The ELBO with its closed forms, a mean over draws, or the importance-weighted bound with the DReG gradient.
    """
    bound = vd.repeat(model.elbo_terms, config.num_samples)
    if config.bound == "iwae":
        bound = vd.doubly_reparameterized(model, vd.iwae, config.num_samples)

    def at(step: jax.Array) -> vd.Objective:
        if not config.warmup_steps:
            return vd.preprocessed(bound, transform)
        beta = jnp.minimum(1.0, (step + 1) / config.warmup_steps)
        return vd.preprocessed(vd.weighted(bound, dict.fromkeys(kl_terms, beta)), transform)

    return vd.scheduled(at)


class Judged(NamedTuple):
    """Hold what judging a trained model gives.

    Attributes:
        metrics: `log_prob`, `elbo`, `bits_per_dim`, and how far weights are to be trusted, as `result.json` has them.
        terms: the ELBO's terms of every test image, each [N], nats.
        seconds: of training and of evaluation.
    """

    metrics: dict[str, Any]
    terms: dict[str, np.ndarray]
    seconds: dict[str, float]


def judge(
    model: vd.ModelLike,
    num_samples: int,
    key: jax.Array,
    params: vd.Params,
    test: np.ndarray,
    directory: Path,
) -> Judged:
    """Judge a model on test images by importance sampling, and by its ELBO, term by term."""
    began = time.perf_counter()
    judged = training.judge(model, num_samples, key, params, test)
    terms = evaluate.evaluate(model.elbo_terms, key, params, test)
    seconds = {"training": training.training_seconds(directory), "evaluation": time.perf_counter() - began}
    nats = evaluate.summarize(judged.value)
    metrics = {
        "log_prob": runs.metric(nats, f"importance, K = {num_samples:,}"),
        "elbo": runs.metric(evaluate.summarize(sum(terms.values())), "ELBO, one draw"),
        "bits_per_dim": {"value": vd.bits_per_dim(nats.mean, test[0].size), "unit": "bits/dim"},
        **training.trust(judged, num_samples),
    }
    return Judged(metrics, terms, seconds)
