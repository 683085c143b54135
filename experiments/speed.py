"""Measure the VAE's training step against its arithmetic, and count what a second fit compiles.

python -m experiments.speed
"""

import dataclasses
import itertools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

import vdiff as vd
from experiments import performance, runs
from vdiff.train.guard import unguarded
from vdiff.train.parallel import CompiledStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the VAE's training step (784-hidden-50-hidden-784, float32) against its arithmetic."""

    hidden: tuple[int, ...] = (512, 512)
    """Hidden units of each layer."""
    batch_size: int = 128
    """Data per step."""
    num_calls: int = 30
    """Steps per measurement."""
    num_measurements: int = 11
    """Measurements; their median is printed."""


def run(config: Config) -> dict[str, float]:
    """Measure and print; returns the figures by name."""
    likelihood = vd.likelihoods.bernoulli()
    encoder = vd.nets.mlp((28, 28, 1), (100,), hidden=config.hidden)
    decoder = vd.nets.mlp((50,), (28, 28, 1), hidden=config.hidden)
    model = vd.vae(encoder, decoder, latent_dim=50, likelihood=likelihood)
    objective = vd.preprocessed(model.elbo_terms, vd.transforms.binarize(256))
    optimizer = optax.chain(optax.clip_by_global_norm(200.0), optax.adam(1e-3))  # as experiments train
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

    def taking(step: CompiledStep) -> Callable[[], jax.Array]:
        held, batch = [vd.init_state(jax.random.key(0), model, optimizer)], batches(0)

        def take() -> jax.Array:
            held[0], _ = step(held[0], batch)
            return held[0].step

        return take

    measured = {"num_calls": config.num_calls, "num_measurements": config.num_measurements}
    plain = vd.jit_step(vd.make_train_step(objective, optimizer, guard=unguarded))
    both = taking(step), taking(plain)
    seconds, unguarded_seconds = performance.median_seconds(*both, **measured)
    # Other programs disturb it less.
    processor, unguarded_processor = performance.median_seconds(*both, clock=time.process_time, **measured)
    square = jnp.ones((1024, 1024))
    product = jax.jit(jnp.matmul)
    (product_seconds,) = performance.median_seconds(lambda: product(square, square), **measured)
    peak = 2 * 1024**3 / product_seconds
    # Products only: forward, and backward by weights and by inputs, the first layer's inputs left out.
    widths = [*itertools.pairwise((784, *config.hidden, 100)), *itertools.pairwise((50, *config.hidden, 784))]
    products = 2 * config.batch_size * (3 * sum(a * b for a, b in widths) - 784 * config.hidden[0])
    figures = {
        "step, ms": seconds * 1e3,
        "its matrix products, GFLOP": products / 1e9,
        "those at the machine's peak, ms": products / peak * 1e3,
        "matrix-product peak (1024^3), GFLOP/s": peak / 1e9,
        "share of the peak": products / seconds / peak,
        "step, over one without the guard against NaN": seconds / unguarded_seconds,
        "the same in processor time of the host": processor / unguarded_processor,
        "compiled by a second fit": num_compiled,
        "first fit of 20 steps with compilation, s": first,
    }
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}")
    runs.console.print(table)
    return figures


if __name__ == "__main__":
    run(tyro.cli(Config))
