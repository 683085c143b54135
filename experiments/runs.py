"""What every experiment shares: its settings, its directory, its result.

A run directory belongs to one set of settings, kept in `config.json`; the same command goes on where it stopped,
other settings are refused, or taken on with `--override`.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from rich.console import Console

import vdiff as vd
from experiments import settings
from experiments.settings import write_json as write_json
from vdiff.train.hosts import is_first

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every experiment has."""

    data: str = "digits"
    """A data set (digits, mnist, fashion_mnist), or your own images: .npy or .npz, or a folder of shards or records."""
    run_dir: Path | None = None
    """Where the run lives; runs/EXPERIMENT-PRESET when not given."""
    resume: Literal["never", "auto", "must"] = "auto"
    """What to do where this run was begun before: refuse it, go on if it was, or insist that it was."""
    override: bool = False
    """Go on with these settings where the run was begun with others; the old ones stay beside the new."""
    seed: int = 0
    """Seed of the parameters, the order of the data and all noise."""
    num_steps: int = 3000
    """Training steps."""
    batch_size: int = 128
    """Data per step, over all devices."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam; decays by a cosine to zero."""
    clip: float = 200.0
    """Norm at which the gradient is clipped; the default is rarely met."""
    ema_decay: float = 0.999
    """Decay of the moving average of the parameters, which evaluation and pictures use."""
    parallel: Literal["jit", "pmap", "fsdp"] = "jit"
    """How devices share a step: each the whole state by jit or jax.pmap, or each a slice of it by fsdp."""
    accumulate: int = 1
    """Into how many parts a device cuts its share of a batch, to hold one part's activations; changes no result."""
    split_features: int = 1
    """fsdp only: how many devices share the features of each large layer, a divisor of their number."""
    coordinator: str | None = None
    """Of a run of several processes: HOST:PORT of the first, or auto under Slurm, a TPU pod, Open MPI or Kubernetes."""
    num_processes: int | None = None
    """How many processes there are, where the coordinator is given by its address."""
    process_id: int | None = None
    """Which one this is, from 0."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    checkpoint_every: int = 1000
    """Steps that a kill costs at most: a checkpoint is begun every half as many, since one half written is lost."""
    max_skips: int = 20
    """Updates in a row that may be skipped, for a loss or gradient that is not finite, before the run ends with 3."""
    debug_nans: bool = False
    """Stop at the first operation that makes a NaN and name it; slow."""
    profile: int = 0
    """Steps to trace into RUN_DIR/profile, for Perfetto or TensorBoard, after the first two calls; 0 for none."""
    export: bool = True
    """Whether the trained functions are exported at the end, for programs without this code; seconds."""


def tell(line: str) -> None:
    """Print a line that a user should not overlook."""
    console.print(f"[bold yellow]note[/] {plain(line)}")


def plain(message: object) -> str:
    """Keep Rich from reading markup into a message."""
    return str(message).replace("[", r"\[")


class Keys(NamedTuple):
    """Hold the keys of a run beside those of its training; `test` draws the binary pixels of the test set."""

    train: jax.Array
    test: jax.Array
    watch: jax.Array
    judge: jax.Array
    show: jax.Array


def keys_of(seed: int) -> Keys:
    """Make a run's keys: models of one seed are judged on the same pixels."""
    return Keys(*jax.random.split(jax.random.key(seed + 1), 5))


def check_settings(config: RunConfig) -> None:
    """Refuse numbers that cannot be, before any work is done.

    Raises:
        ValueError: if a count is less than one (a few may be zero), or a rate is out of its range.
    """
    may_be_zero = ("seed", "warmup_steps", "encoder_hidden", "profile", "process_id")
    leasts = dict.fromkeys(may_be_zero, 0) | {"checkpoint_every": 2}
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), leasts.get(field.name, 1)
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise ValueError(f"{field.name}: got {value}, expected at least {least}")
    if config.split_features > 1 and config.parallel != "fsdp":
        raise ValueError(
            f"split_features: got {config.split_features} with parallel {config.parallel}, whose devices hold whole "
            "layers, expected 1; use --parallel fsdp"
        )
    if not (config.learning_rate > 0 and np.isfinite(config.learning_rate)):
        raise ValueError(f"learning_rate: got {config.learning_rate}, expected a positive number, e.g. 1e-3")
    if not config.clip > 0:
        raise ValueError(f"clip: got {config.clip}, expected a positive norm, e.g. 200")


def open_run(config: RunConfig) -> Path:
    """Make the run directory, or find in it the same run.

    Args:
        config: the settings; `run_dir` must be given.

    Returns:
        The run directory. Its `config.json` holds these settings, or will, once `train` has found that everything fits
        them: what is refused before leaves an empty directory or the run as it was.

    Raises:
        ValueError: if the directory holds another run, other files or damaged settings, or `resume` forbids what it
            holds.
    """
    directory = Path(config.run_dir)
    if not is_first():
        return directory
    if not (directory / "config.json").exists():
        # A temporary one is left by a run killed as it began.
        if directory.is_dir() and any(path.suffix != ".tmp" for path in directory.iterdir()):
            raise ValueError(
                f"run_dir: got {directory}, which holds files but no run, expected an empty or new directory; "
                "choose another --run-dir"
            )
        if config.resume == "must":
            raise ValueError(f"resume: got must, but {directory} holds no run; start it with --resume auto")
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    if config.resume == "never":
        raise ValueError(f"resume: got never, but {directory} holds a run; choose another --run-dir")
    try:
        different = settings.differences(config, directory)
    except settings.DamagedError:
        if not config.override:
            raise
        tell(f"{directory / 'config.json'} is damaged; if the state fits these settings, they take its place")
        return directory
    if different:
        console.print(settings.as_table(different))
        if not config.override:
            changes = ", ".join(f"{name} {saved} -> {asked}" for name, (saved, asked) in different.items())
            raise ValueError(
                f"run_dir: got {directory}, which holds another run ({changes}), expected the same settings; "
                "choose another --run-dir, or go on with the new ones by --override"
            )
    return directory


def metric(summary: vd.evaluate.Summary, bound: str) -> dict[str, Any]:
    """Record a mean over a data set in `result.json`; bound says what was averaged."""
    return {
        "value": summary.mean,
        "std_error": summary.std_error,
        "unit": "nats per datum",
        "bound": bound,
        "num_data": summary.num_data,
    }


def write_result(
    directory: Path, metrics: Mapping[str, Any], params: vd.Params, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Write `result.json`: the numbers, a digest of the parameters, what computed them and what it cost."""
    packages = ("vdiff", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    result = {
        "metrics": dict(metrics),
        "params_digest": digest(params),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform}), {os.cpu_count()} cores",
    }
    performance = directory / "performance.json"
    if performance.exists():
        result["performance"] = json.loads(performance.read_text())
    write_json(directory / "result.json", result)
    return result


def digest(params: vd.Params) -> str:
    """Hash parameters: their names, shapes and bits."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        value = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()
