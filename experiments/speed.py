"""Measure the VAE's training step against its arithmetic, and count what a second fit compiles.

python -m experiments.speed
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

import vdiff as vd
from experiments import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the VAE's training step (784-512-512-50-512-512-784, float32) against its arithmetic."""

    batch_size: int = 128
    """Data per step."""
    num_calls: int = 30
    """Steps per measurement."""
    num_measurements: int = 11
    """Measurements; their median is printed."""


def run(config: Config) -> dict[str, float]:
    """Measure and print; returns the figures by name."""
    likelihood = vd.likelihoods.bernoulli()
    encoder = vd.nets.mlp((28, 28, 1), (100,))
    decoder = vd.nets.mlp((50,), (28, 28, 1))
    model = vd.vae(encoder, decoder, latent_dim=50, likelihood=likelihood)
    objective = vd.preprocessed(model.elbo_terms, vd.transforms.binarize(256))
    optimizer = optax.adam(1e-3)
    step = vd.jit_step(vd.make_train_step(objective, optimizer))
    images = np.random.default_rng(0).integers(0, 256, (1024, 28, 28, 1), dtype=np.uint8)
    batches = vd.data.batches(images, config.batch_size, 0)
    state = vd.init_state(jax.random.key(0), model, optimizer)

    began = time.perf_counter()
    state = vd.fit(state, step, batches, 20)
    jax.block_until_ready(state)
    first = time.perf_counter() - began
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **kwargs: compiled.append(event) if "backend_compile" in event else None
    )
    state = vd.fit(state, step, batches, 40)
    jax.block_until_ready(state)
    num_compiled = len(compiled)

    held = [state]
    batch = batches(0)

    def take() -> jax.Array:
        held[0], _ = step(held[0], batch)
        return held[0].step

    seconds = _median(take, config)
    square = jnp.ones((1024, 1024))
    product = jax.jit(jnp.matmul)
    peak = 2 * 1024**3 / _median(lambda: product(square, square), config)
    # Products only: forward, and backward by weights and by inputs, the first layer's inputs left out.
    widths = [(784, 512), (512, 512), (512, 100), (50, 512), (512, 512), (512, 784)]
    products = 2 * config.batch_size * (3 * sum(a * b for a, b in widths) - 784 * 512)
    figures = {
        "step, ms": seconds * 1e3,
        "its matrix products, GFLOP": products / 1e9,
        "those at the machine's peak, ms": products / peak * 1e3,
        "matrix-product peak (1024^3), GFLOP/s": peak / 1e9,
        "share of the peak": products / seconds / peak,
        "compiled by a second fit": num_compiled,
        "first fit of 20 steps with compilation, s": first,
    }
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}")
    runs.console.print(table)
    return figures


def _median(call: Callable[[], jax.Array], config: Config) -> float:
    """Take the median over measurements of the seconds per call."""
    jax.block_until_ready(call())
    times = []
    for _ in range(config.num_measurements):
        began = time.perf_counter()
        for _ in range(config.num_calls):
            last = call()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - began) / config.num_calls)
    return statistics.median(times)


if __name__ == "__main__":
    run(tyro.cli(Config))
