"""How a trained model is judged on test images, what of that is recorded, and how a page says it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import vdiff as vd
from experiments import runs
from vdiff import evaluate, report
from vdiff.train.hooks import logged


class Beside(NamedTuple):
    """Hold a bound that is recorded beside log p(x).

    Attributes:
        name: of its metric, "elbo" or "iwae".
        label: what it is, for readers.
        objective: `(key, params, x) -> Terms`.
    """

    name: str
    label: str
    objective: vd.Objective


class Judged(NamedTuple):
    """Hold what judging a trained model gives.

    Attributes:
        metrics: `log_prob`, the bound beside it, `bits_per_dim`, and how far weights are to be trusted, as
            `result.json` has them.
        terms: the bound's terms of every test image, each [N], nats.
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
    beside: Beside,
) -> Judged:
    """Judge a model on test images by importance sampling, and by a bound, term by term."""
    began = time.perf_counter()
    judged = estimate_log_prob(model, num_samples, key, params, test)
    terms = evaluate.evaluate(beside.objective, key, params, test)
    nats = evaluate.summarize(judged.value)
    metrics = {
        "log_prob": runs.metric(nats, f"importance, K = {num_samples:,}"),
        beside.name: runs.metric(evaluate.summarize(sum(terms.values())), beside.label),
        "bits_per_dim": bits_per_dim(nats, test),
        **trust(judged, num_samples),
    }
    return Judged(metrics, terms, seconds_since(began, directory))


def judge_exact(
    log_prob: Callable[[jax.Array, vd.Params, jax.Array], jax.Array],
    label: str,
    key: jax.Array,
    params: vd.Params,
    test: np.ndarray,
    directory: Path,
) -> Judged:
    """Judge a density on test images by its own log p(x)."""
    began = time.perf_counter()
    with counting("judging", len(test)) as on_progress:
        values = evaluate.evaluate(log_prob, key, params, test, batch_size=50, on_progress=on_progress)
    nats = evaluate.summarize(values)
    metrics = {"log_prob": runs.metric(nats, label), "bits_per_dim": bits_per_dim(nats, test)}
    return Judged(metrics, {"log_prob": values}, seconds_since(began, directory))


def estimate_log_prob(
    model: vd.ModelLike,
    num_samples: int,
    key: jax.Array,
    params: vd.Params,
    images: np.ndarray,
    label: str = "judging",
) -> vd.LogProb:
    """Estimate log p(x) of every image by importance sampling, under a progress bar; leaves are [N]."""
    log_prob = evaluate.importance_log_prob(model, num_samples, chunk_size=50)
    with counting(label, len(images)) as on_progress:
        return evaluate.evaluate(log_prob, key, params, images, batch_size=20, on_progress=on_progress)


def trust(judged: vd.LogProb, num_samples: int) -> dict[str, dict]:
    """Say how far importance weights can be trusted, as metrics: their effective number, and how many have long tails.

    Args:
        judged: of every image, leaves [N].
        num_samples: K, the draws per image.

    Returns:
        "ess", and "k_hat" where there are draws enough to tell.
    """
    metrics = {"ess": {"value": float(np.median(judged.ess)), "unit": f"of {num_samples} draws, median"}}
    share = evaluate.untrusted_share(judged.k_hat)
    if not math.isnan(share):
        metrics["k_hat"] = {"value": share, "unit": "of the images above 0.7, where weights are not trusted"}
    return metrics


def bits_per_dim(nats: evaluate.Summary, test: np.ndarray) -> dict[str, Any]:
    """Record log p(x) in bits for each dimension of an image."""
    return {"value": vd.bits_per_dim(nats.mean, test[0].size), "unit": "bits/dim"}


def seconds_since(began: float, directory: Path) -> dict[str, float]:
    """Record how long training took, over all resumptions, and judging, since `began` by `time.perf_counter`."""
    return {"training": training_seconds(directory), "evaluation": time.perf_counter() - began}


def training_seconds(directory: Path) -> float:
    """Read how long training took, over all resumptions."""
    rows = report.load_metrics(directory / "metrics.jsonl")
    return float(rows[-1]["seconds"]) if rows else 0.0


def tell(metrics: Mapping[str, dict]) -> None:
    """Print log p(x), and how far its weights are to be trusted."""
    nats = metrics["log_prob"]
    said = f"log p(x) {nats['value']:.2f} +- {nats['std_error']:.2f} nats on {nats['num_data']} test images"
    runs.console.print(joined(said, told(metrics)))


def told(metrics: Mapping[str, dict]) -> str:
    """Put in words how far importance or annealing weights are to be trusted; "" where there are none."""
    if "ess" not in metrics:
        return ""
    ess, unit = metrics["ess"]["value"], metrics["ess"]["unit"].removesuffix(", median")
    said = f"ESS {ess:.0f} {unit}"
    if "k_hat" in metrics:
        said += f", k-hat above 0.7 for {metrics['k_hat']['value']:.1%}"
    if "k_hat_log_z" in metrics:
        said += f", k-hat {metrics['k_hat_log_z']['value']:.2f}"
    return said


def joined(*parts: str) -> str:
    """Join what there is to be said by commas."""
    return ", ".join(filter(None, parts))


def tiles(metrics: Mapping[str, dict], num_dims: int) -> list[report.Tile]:
    """Make the head of a page: log p(x), the bound beside it where there is one, bits/dim."""
    nats = metrics["log_prob"]
    how = joined(nats["bound"], f"{nats['num_data']:,} test images", told(metrics))
    made = [report.Tile("log p(x)", nats["value"], nats["std_error"], "nats per datum", how)]
    for name in ("elbo", "iwae"):
        if (of := metrics.get(name)) is None:
            continue
        made.append(report.Tile(name.upper(), of["value"], of["std_error"], "nats per datum", of["bound"]))
    bits = metrics["bits_per_dim"]["value"]
    return [*made, report.Tile("bits/dim", bits, None, "", f"{num_dims} dimensions")]


@contextlib.contextmanager
def counting(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over work that is counted in data; in a log, where there is none, a line a minute."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns) as progress:
        task, log = progress.add_task(label, total=total), logged(progress.console)

        def show(done: int) -> None:
            progress.update(task, completed=done)
            log(f"{label}: {done:,} of {total:,}")

        yield show
