"""Measure every sampler where the exact score is known: a Gaussian and a ring of eight modes.

python -m experiments.samplers
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

from experiments import runs
from vdiff import diffusion as df
from vdiff.types import Network, Params

ANGLES = np.arange(8) * math.pi / 4
MODES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
GAUSSIAN_ENDS, RING_ENDS = (9.0, -9.0), (10.0, -8.0)
KNOTS = np.linspace(-12.0, 12.0, 241, dtype=np.float32)

# By what they are called in the table: the sampler, and how many latents a number of calls pays for.
SAMPLERS: dict[str, tuple[Callable[..., df.Sampler], Callable[[int], int]]] = {
    "ancestral, posterior variance": (df.ancestral, lambda calls: calls),
    "ancestral, optimal variance": (df.ancestral, lambda calls: calls),
    "ddim": (df.ddim, lambda calls: calls),
    "dpm_solver order 2": (df.dpm_solver, lambda calls: calls),
    "dpm_solver order 3": (functools.partial(df.dpm_solver, order=3), lambda calls: calls),
    "dpm_solver_sde": (df.dpm_solver_sde, lambda calls: calls),
    "heun": (df.heun, lambda calls: (calls + 1) // 2),
    "heun in_sigma (EDM)": (functools.partial(df.heun, weight=df.in_sigma), lambda calls: (calls + 1) // 2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure every sampler where the exact score is known: a Gaussian and a ring of eight modes."""

    num_draws: int = 20_000
    """Points in the plane that each sampler draws."""
    gaussian_calls: tuple[int, ...] = (5, 10, 20, 50)
    """Calls of the denoiser on the Gaussian."""
    ring_calls: tuple[int, ...] = (5, 10, 20)
    """Calls of the denoiser on the ring."""
    seed: int = 0
    """Seed of all draws."""


def run(config: Config) -> dict[str, dict]:
    """Measure and print; returns the figures by table and row."""
    figures = {
        "gaussian": gaussian_table(config),
        "gaps": gap_table(config),
        "ring": ring_table(config),
    }
    return figures


def gaussian_table(config: Config) -> dict[str, list[float]]:
    """Print the standard deviation of N(0.3, 0.25^2) as drawn, by sampler and calls."""
    params = _params(np.full((8, 2), 0.3), 0.25)
    figures: dict[str, list[float]] = {}
    for name in SAMPLERS:
        figures[name] = []
        for calls in config.gaussian_calls:
            x, z = _draw(name, calls, df.uniform_log_snr, GAUSSIAN_ENDS, params, config)
            # A map that is affine in z_m is free of chance when it is put in units of z_m's own spread.
            chance = 1.0 if "ancestral" in name or "sde" in name else np.std(z[:, -1])
            figures[name].append(float(np.std(x) / chance))
    table = Table(
        "standard deviation, .2500 is right", *(f"{calls} calls" for calls in config.gaussian_calls)
    )
    for name, row in figures.items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    runs.console.print(table)
    return figures


def gap_table(config: Config) -> dict[str, list[float]]:
    """Print the bound gap of each grid on the ring, by reverse variance and steps."""
    mse, figures = _ring_error(config), {}
    for name, variance in _variances(mse).items():
        for grid, log_snrs in _grids(mse).items():
            figures[f"{grid}; {name}"] = [
                df.bound_gap(mse, variance, log_snrs(calls + 1)) for calls in config.ring_calls
            ]
    table = Table("bound gap on the ring, nats/dim", *(f"{calls} steps" for calls in config.ring_calls))
    for name, row in figures.items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    runs.console.print(table)
    return figures


def ring_table(config: Config) -> dict[str, list[float]]:
    """Print sliced W2 between draws and data, by grid, sampler and calls."""
    rng = np.random.default_rng(config.seed)
    mse, figures = _ring_error(config), {}
    params = _params(MODES, 0.1)._replace(phi=jnp.log(jax.vmap(mse)(jnp.asarray(KNOTS))))
    data = _ring_data(rng, config.num_draws)
    figures["other data"] = [_sliced_w2(_ring_data(rng, config.num_draws), data)] * len(config.ring_calls)
    for grid, log_snrs in _grids(mse).items():
        for name in SAMPLERS:
            figures[f"{grid}; {name}"] = [
                _sliced_w2(
                    _draw(
                        name, calls, df.fixed(log_snrs(SAMPLERS[name][1](calls))), RING_ENDS, params, config
                    )[0],
                    data,
                )
                for calls in config.ring_calls
            ]
    table = Table("sliced W2 on the ring", *(f"{calls} calls" for calls in config.ring_calls))
    for name, row in figures.items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    runs.console.print(table)
    return figures


def _guess(theta: dict, z: jax.Array, log_snr: jax.Array) -> jax.Array:
    """E[x | z] of a mixture of equal Gaussians."""
    a, b = df.alpha(log_snr), df.sigma(log_snr)
    variance = jnp.square(theta["std"] * a) + jnp.square(b)
    away = z[None] - a * theta["means"]
    weights = jax.nn.softmax(-0.5 * jnp.sum(jnp.square(away), axis=1) / variance)
    return weights @ (theta["means"] + jnp.square(theta["std"]) * a / variance * away)


def _params(means: np.ndarray, std: float) -> Params:
    """Put the toy into parameters, phi being the logarithm of the denoiser's error at KNOTS: one program for both."""
    theta = {"means": jnp.asarray(means, jnp.float32), "std": jnp.float32(std)}
    a2 = 1 / (1 + np.exp(-KNOTS))
    error = std**2 * (1 - a2) / (std**2 * a2 + 1 - a2)
    return Params(theta={"denoiser": theta, "likelihood": ()}, phi=jnp.log(jnp.asarray(error)))


def _diffusion(name: str, ends: tuple[float, float]) -> df.Diffusion:
    def of_table(phi: jax.Array, log_snr_s: jax.Array, log_snr_t: jax.Array) -> jax.Array:
        mse = lambda log_snr: jnp.exp(jnp.interp(log_snr, jnp.asarray(KNOTS), phi))  # noqa: E731
        return df.optimal_variance(mse).apply((), log_snr_s, log_snr_t)

    optimal = Network(lambda key: jnp.zeros(len(KNOTS)), of_table)
    return df.vdm(
        Network(lambda key: (), _guess),
        df.linear_log_snr(*ends),
        shape=(2,),
        predict=df.predict.data,
        reverse_variance=optimal if "optimal" in name else df.posterior_variance(),
        # x is the last guess: no noise is added that would hide an error.
        likelihood=df.gaussian(1e-6)._replace(sample=lambda key, params, x_hat, z, log_snr: x_hat),
    )


@functools.cache
def _program(name: str, num_steps: int, ends: tuple[float, float]) -> Callable:
    """Compile a sampler that takes its grid as an argument."""

    def draw(key: jax.Array, params: Params, log_snrs: jax.Array) -> tuple[jax.Array, jax.Array]:
        sample = SAMPLERS[name][0](_diffusion(name, ends), num_steps, grid=lambda *_: log_snrs)
        return sample(key, params)

    return jax.jit(jax.vmap(draw, in_axes=(0, None, None)))


def _draw(
    name: str, calls: int, grid: df.Grid, ends: tuple[float, float], params: Params, config: Config
) -> tuple[np.ndarray, np.ndarray]:
    num_steps = SAMPLERS[name][1](calls)
    log_snrs = grid(_diffusion(name, ends), params, num_steps)
    keys = jax.random.split(jax.random.key(config.seed), config.num_draws)
    x, z = _program(name, num_steps, GAUSSIAN_ENDS)(keys, params, log_snrs)
    return np.asarray(x, np.float64), np.asarray(z, np.float64)


def _ring_data(rng: np.random.Generator, num: int) -> np.ndarray:
    return MODES[rng.integers(8, size=num)] + 0.1 * rng.standard_normal((num, 2))


@functools.cache
def _ring_error(config: Config) -> Callable[[jax.Array], jax.Array]:
    data = _ring_data(np.random.default_rng(config.seed + 1), config.num_draws).astype(np.float32)
    key, model = jax.random.key(config.seed), _diffusion("posterior", RING_ENDS)
    log_snrs = np.linspace(RING_ENDS[1], RING_ENDS[0], 145, dtype=np.float32)
    errors = df.denoising_error(model, _params(MODES, 0.1), key, data, log_snrs, chunk_size=config.num_draws)
    return df.interpolated_error(log_snrs, errors)


def _variances(mse: Callable) -> dict[str, Callable]:
    return {
        "posterior variance": functools.partial(df.posterior_variance().apply, ()),
        "optimal variance": functools.partial(df.optimal_variance(mse).apply, ()),
    }


@functools.cache
def _grids(mse: Callable) -> dict[str, Callable[[int], np.ndarray]]:
    """Name the grids; each is a function of the number of latents."""
    model = _diffusion("posterior", RING_ENDS)
    cosine = model._replace(
        log_snr=lambda params, t: df.cosine_log_snr(*RING_ENDS).apply((), jnp.asarray(t, jnp.float32))
    )
    grids = {
        "uniform log-SNR": lambda n: np.asarray(df.uniform_log_snr(model, Params(), n)),
        "uniform cosine time": lambda n: np.asarray(df.uniform_time(cosine, Params(), n)),
        "karras(7)": lambda n: np.asarray(df.karras()(model, Params(), n)),
    }
    for name, variance in _variances(mse).items():
        best = functools.cache(functools.partial(df.elbo_optimal, mse, variance, *RING_ENDS))
        grids[f"ELBO-optimal ({name.split()[0]})"] = best
    return grids


def _sliced_w2(x: np.ndarray, y: np.ndarray, num_directions: int = 32) -> float:
    """Return the root of the mean squared distance of sorted projections."""
    angles = np.arange(num_directions) * math.pi / num_directions
    directions = np.stack([np.cos(angles), np.sin(angles)])
    gap = np.sort(x @ directions, axis=0) - np.sort(y @ directions, axis=0)
    return float(np.sqrt(np.mean(gap**2)))


if __name__ == "__main__":
    run(tyro.cli(Config))
