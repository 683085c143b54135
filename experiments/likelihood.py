"""Measure the likelihood by the probability flow where the exact one is known; the tables of docs/likelihood.md.

python -m experiments.likelihood
"""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import vdiff as vd
from vdiff import diffusion as df


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the likelihood by the probability flow where the exact one is known."""

    num_data: int = 64
    """Data that an error is taken over."""
    seed: int = 0
    """Of the data."""


MEAN = 0.3
MASSES = (0.1, 0.4, 0.2, 0.3)


def run(config: Config) -> dict[str, float]:
    """Measure and print; returns the figures by name."""
    return {**exactness(config), **ends(config), **levels(config)}


def exactness(config: Config) -> dict[str, float]:
    """Errors of fixed and adaptive solvers on Gaussian data, against the linear map that the flow is, in float64."""
    table = Table(
        "data", "log-SNR", "solver", "calls", "rms", "largest", "ms a datum", title="errors, nats/dim"
    )
    figures = {}
    fixed = {f"fixed_grid({n})": df.fixed_grid(n) for n in (5, 7, 10, 14)}
    adaptive = {f"adaptive(1e-{n})": df.adaptive(10.0**-n, 10.0**-n) for n in (3, 5, 6)}
    cases = [((8,), 0.25, ends, fixed | adaptive) for ends in ((13.3, -5.0), (10.0, -10.0))]
    cases += [((28, 28, 1), 0.25, (13.3, -5.0), {"fixed_grid(7)": df.fixed_grid(7)})]
    cases += [((8,), 0.05, (13.3, -5.0), {f"fixed_grid({n})": df.fixed_grid(n) for n in (7, 10, 14)})]
    for shape, scale, schedule, solvers in cases:
        for name, solver in solvers.items():
            y, exact = _gaussian_data(shape, scale, schedule, config)
            count: list[int] = []
            log_prob = df.ode_log_prob(_gaussian(shape, scale, schedule, count), solver=solver)
            jax.block_until_ready(jax.jit(log_prob)(jax.random.key(0), _params(), y[0]))
            jax.effects_barrier()
            silent = df.ode_log_prob(_gaussian(shape, scale, schedule), solver=solver)
            batched = jax.jit(jax.vmap(silent, (None, None, 0)))
            got, seconds = _timed(lambda y=y, f=batched: f(jax.random.key(0), _params(), y))
            error = (np.asarray(got, np.float64) - exact) / math.prod(shape)
            rms, largest = math.sqrt(np.mean(error**2)), np.abs(error).max()
            row = (f"{shape} scale {scale}", str(schedule), name)
            table.add_row(
                *row, str(len(count)), f"{rms:.1e}", f"{largest:.1e}", f"{1e3 * seconds / len(y):.2f}"
            )
            figures[" ".join((*row, "rms"))] = float(rms)
    Console(width=140).print(table)
    return figures


def ends(config: Config) -> dict[str, float]:
    """What schedules lose at their ends, nats per dimension, on average over Gaussian data."""
    table = Table("scale", "log-SNR", "start", "end", title="gaps, nats/dim")
    figures = {}
    for scale in (0.25, 0.05):
        for schedule in ((13.3, -5.0), (10.0, -10.0), (5.0, -3.0)):
            model = _gaussian((1,), scale, schedule)
            start, end = df.end_gaps(model, jnp.asarray([MEAN]), jnp.asarray([scale**2]))(_params())
            table.add_row(str(scale), str(schedule), f"{start:.1e}", f"{end:.1e}")
            figures[f"{scale} {schedule} end"] = float(end)
    Console(width=140).print(table)
    return figures


def levels(config: Config) -> dict[str, float]:
    """Bounds on log P(k) of one pixel with four levels, by the noise that fills the bins and the model's data."""
    table = Table("trained on", "noise", "K", "lacks", "calls", title="nats/dim below log P(k), on average")
    figures = {}
    matched = "truncated normal, of the start"
    for data, denoise in (("bare levels", _bare), ("levels + uniform noise", _filled)):
        model = _diffusion(denoise, (1,), (10.0, -9.0))
        noises = {"uniform": df.uniform_noise(), matched: df.truncated_normal_noise(df.start_scale(model))}
        for noise in noises:
            for num_samples in (1, 20):
                log_prob = df.dequantized_log_prob(
                    df.ode_log_prob(model, solver=df.fixed_grid(30)),
                    4,
                    noises[noise],
                    num_samples=num_samples,
                    chunk_size=20,
                )
                k = np.tile(np.arange(4), 16 * config.num_data)
                got = vd.evaluate.evaluate(
                    log_prob, jax.random.key(1), _params(), k[:, None], batch_size=1024
                )
                lack = np.log(np.asarray(MASSES))[k] - got.value
                mean = float(np.sum(np.asarray(MASSES)[k] * lack) / np.sum(np.asarray(MASSES)[k]))
                table.add_row(data, noise, str(num_samples), f"{mean:.4f}", str(330 * num_samples))
                figures[f"{data} {noise} {num_samples}"] = mean
    Console(width=140).print(table)
    return figures


def _params() -> vd.Params:
    return vd.Params(theta={"denoiser": (), "likelihood": ()})


def _diffusion(
    denoise: Callable[[jax.Array, jax.Array], jax.Array], shape: tuple[int, ...], ends: tuple[float, float]
) -> df.Diffusion:
    denoiser = vd.Network(lambda key: (), lambda theta, z, log_snr: denoise(z, log_snr))
    return df.vdm(denoiser, df.linear_log_snr(*ends), shape=shape, predict=df.predict.data)


def _gaussian(
    shape: tuple[int, ...], scale: float, ends: tuple[float, float], count: list[int] | None = None
) -> df.Diffusion:
    def denoise(z: jax.Array, log_snr: jax.Array) -> jax.Array:
        if count is not None:
            jax.debug.callback(lambda: count.append(1))
        a, noise = df.alpha(log_snr), df.sigma(log_snr) ** 2
        return (noise * MEAN + scale**2 * a * z) / (scale**2 * a**2 + noise)

    return _diffusion(denoise, shape, ends)


def _gaussian_data(
    shape: tuple[int, ...], scale: float, ends: tuple[float, float], config: Config
) -> tuple[jax.Array, np.ndarray]:
    """Return data and their log-density under the flow's own model, in float64."""
    rng = np.random.default_rng(config.seed)
    y = (MEAN + scale * rng.normal(size=(config.num_data, *shape))).astype(np.float32)
    first, last = (float(np.float32(end)) for end in ends)
    a, b = (1 / math.sqrt(1 + math.exp(-end)) for end in (first, last))
    stretch = math.sqrt((b**2 * scale**2 + 1 - b**2) / (a**2 * scale**2 + 1 / (1 + math.exp(first))))
    z = b * MEAN + stretch * a * (y.astype(np.float64) - MEAN)
    each = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) + math.log(stretch * a)
    return jnp.asarray(y), each.reshape(len(y), -1).sum(1)


def _values() -> jax.Array:
    return (2.0 * jnp.arange(4.0) + 1.0) / 4.0 - 1.0


def _bare(z: jax.Array, log_snr: jax.Array) -> jax.Array:
    """Return E[x | z] for one pixel on four levels."""
    distance = z / df.alpha(log_snr) - _values()
    logits = jnp.log(jnp.asarray(MASSES)) - 0.5 * jnp.exp(log_snr) * distance**2
    return jnp.sum(jax.nn.softmax(logits) * _values())[None]


def _filled(z: jax.Array, log_snr: jax.Array) -> jax.Array:
    """Return E[x | z] for the same with uniform noise: means of normals cut to the bins, weighed by what they hold."""
    log_ndtr, log_pdf = jax.scipy.special.log_ndtr, jax.scipy.stats.norm.logpdf
    spread, centre = jnp.exp(-0.5 * log_snr), z / df.alpha(log_snr)
    low, high = (_values() - 0.25 - centre) / spread, (_values() + 0.25 - centre) / spread
    left, right = jnp.where(low > 0, -high, low), jnp.where(low > 0, -low, high)
    log_held = log_ndtr(right) + jnp.log(-jnp.expm1(log_ndtr(left) - log_ndtr(right)))
    mean = centre + spread * (jnp.exp(log_pdf(low) - log_held) - jnp.exp(log_pdf(high) - log_held))
    return jnp.sum(jax.nn.softmax(jnp.log(jnp.asarray(MASSES)) + log_held) * mean)[None]


def _timed(f: Callable[[], jax.Array]) -> tuple[jax.Array, float]:
    got = jax.block_until_ready(f())
    began = time.perf_counter()
    for _ in range(5):
        jax.block_until_ready(f())
    return got, (time.perf_counter() - began) / 5


if __name__ == "__main__":
    run(tyro.cli(Config))
