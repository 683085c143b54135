"""Measure what training takes in memory and reading in time, from an array, from shards and from records.

python -m experiments.reading
"""

import concurrent.futures
import dataclasses
import multiprocessing
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.scipy.stats import norm
from rich.table import Table

import vdiff as vd
from experiments import runs

SHAPE = (64, 64, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what training takes in memory and reading in time, from an array, from shards and from records."""

    megabytes: tuple[int, ...] = (300, 3000)
    """Sizes of the data sets: images of 64 x 64 x 3 bytes, of noise."""
    batch_size: int = 128
    """Data per batch."""
    num_steps: int = 2000
    """Steps of training, and batches read."""


class Figures(NamedTuple):
    """Hold what one process measured.

    Attributes:
        peak: the most memory that it ever had, MB, files mapped into it included.
        batches: read per second, the files in the system's cache.
        steps: of training per second.
    """

    peak: float
    batches: float
    steps: float


def noise(num_images: int) -> Iterator[np.ndarray]:
    """Yield images of noise, 16 levels."""
    rng = np.random.default_rng(0)
    for _ in range(num_images):
        yield rng.integers(0, 16, SHAPE, np.uint8)


def in_memory(folder: Path) -> np.ndarray:
    """Read all shards into one array."""
    return np.asarray(vd.data.open_shards(folder))


SOURCES = {
    "array": (vd.data.write_shards, in_memory),
    "shards": (vd.data.write_shards, vd.data.open_shards),
    "records": (vd.data.write_records, vd.data.open_records),
}
"""Each: how the folder is written, and how it is opened."""


def run(config: Config) -> dict[str, Figures]:
    """Measure and print, each source in a process of its own; returns the figures by source and size."""
    figures = {}
    table = Table("data", "size, MB", "peak memory, MB", "batches/s read", "steps/s trained")
    for size in config.megabytes:
        for name, (write, _) in SOURCES.items():
            parent = Path(tempfile.mkdtemp(prefix="vdiff-reading-"))
            try:
                write(parent / "data", noise(size * 10**6 // int(np.prod(SHAPE))))
                context = multiprocessing.get_context("spawn")
                with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                    measured = pool.submit(measure, name, parent / "data", config).result()
            finally:
                shutil.rmtree(parent)
            figures[f"{name} {size}"] = measured
            table.add_row(name, str(size), *(f"{value:,.0f}" for value in measured))
            runs.console.print(f"{name} {size} MB: {measured}")
    runs.console.print(table)
    return figures


def measure(name: str, folder: Path, config: Config) -> Figures:
    """Train the mean of the images, the cheapest of models, and then read as many batches again."""
    images = SOURCES[name][1](folder)
    batches = vd.data.batches(images, config.batch_size, 0, permutation=vd.data.permutations.keyed)

    def objective(key: jax.Array, params: vd.Params, x: jax.Array) -> vd.Terms:
        return {"log_prob": norm.logpdf(x / 16.0, params.theta).sum()}

    optimizer = optax.sgd(1e-3)
    step = vd.jit_step(vd.make_train_step(objective, optimizer))
    model = SimpleNamespace(init=lambda key: vd.Params(theta=jnp.zeros(SHAPE)))
    state = vd.fit(vd.init_state(jax.random.key(0), model, optimizer), step, batches, 5)

    def train() -> None:
        jax.block_until_ready(vd.fit(state, step, batches, config.num_steps + 5))

    def read() -> None:
        for i in range(5, config.num_steps + 5):
            batches(i)

    steps = config.num_steps / _seconds(train)
    return Figures(peak_megabytes(), config.num_steps / _seconds(read), steps)


def peak_megabytes() -> float:
    """Read the most memory that this process ever had, as Linux counts it."""
    # Not getrusage, which goes on from what the parent had.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    run(tyro.cli(Config))
