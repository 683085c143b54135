"""What estimates of log p(x) are worth, on a linear VAE whose log p(x) is known: the tables of docs/evaluation.md.

python -m experiments.evaluation
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import vdiff as vd
from vdiff import evaluate

LATENT_DIM, DIM, SCALE = 10, 30, 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare estimates of log p(x) with the truth, on simulated data of a linear VAE."""

    num_data: int = 100
    """Simulated data."""
    num_steps: tuple[int, ...] = (10, 100, 1000)
    """Steps of annealing."""
    num_samples: tuple[int, ...] = (100, 10_000)
    """Draws of importance sampling."""
    seed: int = 0
    """Seed of the model, the data and the estimates."""


def linear_vae(seed: int) -> tuple[vd.VAE, vd.Params, Callable[[np.ndarray], np.ndarray]]:
    """Build x = W z + s eps, its q a mean-field one with scales that are half too wide, and its exact log p(x)."""
    weight = np.random.default_rng(seed).normal(size=(DIM, LATENT_DIM)) / np.sqrt(LATENT_DIM)
    precision = np.eye(LATENT_DIM) + weight.T @ weight / SCALE**2
    encode = jnp.asarray(np.linalg.solve(precision, weight.T) / SCALE**2, jnp.float32)
    log_scale = jnp.asarray(np.log(1.5) - 0.5 * np.log(np.diag(precision)), jnp.float32)
    model = vd.vae(
        vd.Network(lambda key: (), lambda lam, x: jnp.concatenate([encode @ x, log_scale])),
        vd.Network(lambda key: jnp.asarray(weight, jnp.float32), lambda theta, z: theta @ z),
        latent_dim=LATENT_DIM,
        likelihood=vd.likelihoods.gaussian(SCALE),
    )
    covariance = weight @ weight.T + SCALE**2 * np.eye(DIM)

    def log_prob(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float64)
        return (
            -0.5 * np.sum(x * np.linalg.solve(covariance, x.T).T, -1)
            - 0.5 * (np.linalg.slogdet(2 * np.pi * covariance)[1])
        )

    return model, model.init(jax.random.key(seed)), log_prob


def started_from_prior(model: vd.VAE) -> vd.VAE:
    """Exchange q for N(0, I)."""
    return model._replace(
        sample_q=lambda key, params, x: jax.random.normal(key, (LATENT_DIM,)),
        log_q=lambda params, x, z: jnp.sum(vd.densities.standard_normal_log_prob(z)),
    )


def run(config: Config) -> None:
    """Print the tables."""
    console = Console(width=120)
    model, params, exact = linear_vae(config.seed)
    key_data, key_judge, key_bdmc = jax.random.split(jax.random.key(config.seed), 3)
    x, _ = jax.jit(jax.vmap(model.sample, in_axes=(0, None)))(
        jax.random.split(key_data, config.num_data), params
    )
    x, moves = np.asarray(x), evaluate.hmc(0.1, 5)
    truth = exact(x)

    table = Table("estimate", "error, mean", "error, spread", "std_error", "ess", "k-hat > 0.7")
    starts = {"q": model, "the prior": started_from_prior(model)}
    estimates = {
        f"importance from {start}, {k:,} draws": evaluate.importance_log_prob(of, k, 100)
        for start, of in starts.items()
        for k in config.num_samples
    } | {
        f"annealed from {start}, {t:,} steps": evaluate.annealed_log_prob(of, moves, t)
        for start, of in starts.items()
        for t in config.num_steps
    }
    for name, estimate in estimates.items():
        judged = evaluate.evaluate(estimate, key_judge, params, x, batch_size=config.num_data)
        error = evaluate.summarize(judged.value - truth)
        share = evaluate.untrusted_share(judged.k_hat)
        table.add_row(
            name,
            f"{error.mean:+.3f} ± {error.std_error:.3f}",
            f"{np.std(judged.value - truth):.3f}",
            f"{np.median(judged.std_error):.3f}",
            f"{np.median(judged.ess):.1f}",
            "-" if np.isnan(share) else f"{share:.0%}",
        )
    console.print(table)

    table = Table("bidirectional, from q", "lower - truth", "upper - truth", "gap")
    for t in config.num_steps:
        keys = jax.random.split(key_bdmc, config.num_data)
        brackets = jax.jit(jax.vmap(evaluate.bdmc(model, moves, t), in_axes=(0, None)))(keys, params)
        simulated = jax.vmap(lambda key: model.sample(jax.random.split(key, 3)[0], params)[0])(keys)
        found = evaluate.sandwich(brackets)
        sides = (evaluate.summarize(np.asarray(bound.value) - exact(simulated)) for bound in brackets)
        table.add_row(
            f"T = {t:,}", *(f"{side.mean:+.4f} ± {side.std_error:.4f}" for side in (*sides, found.gap))
        )
    console.print(table)


if __name__ == "__main__":
    run(tyro.cli(Config))
