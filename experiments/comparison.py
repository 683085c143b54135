"""Runs of several families side by side: each trained by its own experiment, all in one table on one page.

What a row says beyond its nats is read from the run directory, by the functions that the run exported: no row knows
its model's code.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text

import vdiff as vd
from experiments import judging, runs, settings
from vdiff import report

NUM_DRAWS = 20


class Family(NamedTuple):
    """Hold how one row of a comparison is made.

    Attributes:
        name: of the run's folder.
        label: the model, as the table has it.
        experiment: a module with `run: (config) -> result`.
        config: the settings.
        metric: the number of the result by which it is compared: log_prob, or elbo where that is all there is.
        caption: one sentence below its picture.
    """

    name: str
    label: str
    experiment: ModuleType
    config: runs.RunConfig
    metric: str
    caption: str


class Cost(NamedTuple):
    """Hold what a trained model costs its user, by its exported functions.

    Attributes:
        num_params: how many numbers were learned.
        draw: seconds a sample takes, of NUM_DRAWS in one call.
        judge: seconds that log p(x) of a datum takes, by the estimate that judged the run, or one draw of its bound;
            None where neither is a function of the parameters alone, as under an RBM's log Z.
    """

    num_params: int
    draw: float
    judge: float | None


class Gains(NamedTuple):
    """Hold what doubling a run's steps gains, nats of test images.

    Attributes:
        last: from half of the steps to all.
        next: what twice as many would gain, if gains go on to shrink as they did from the doubling before.
        bound: of what: log_prob, elbo or iwae.
    """

    last: float
    next: float
    bound: str

    @property
    def of(self) -> str:
        """Name the bound in parentheses, where it is not log p(x) itself."""
        return "" if self.bound == "log_prob" else f" ({self.bound.upper()})"


def train(families: Sequence[Family], directory: Path) -> None:
    """Run each family's experiment, or find it done with the same settings."""
    for family in families:
        runs.console.rule(family.label)
        if _is_done(family, directory):
            runs.console.print(f"found    {directory / family.name}")
        else:
            family.experiment.run(dataclasses.replace(family.config, run_dir=directory / family.name))


def finished(families: Sequence[Family], directory: Path) -> list[tuple[Family, dict[str, Any]]]:
    """Find the families whose runs are done with these settings, each with its result."""
    return [
        (family, json.loads((directory / family.name / "result.json").read_text()))
        for family in families
        if _is_done(family, directory)
    ]


def _is_done(family: Family, directory: Path) -> bool:
    """Whether a run directory holds these settings and all that a finished run writes, its functions last."""
    run_dir = directory / family.name
    is_finished = (run_dir / "exported" / "manifest.json").exists()
    return is_finished and not settings.differences(
        dataclasses.replace(family.config, run_dir=run_dir), run_dir
    )


def cost_of(directory: Path) -> Cost:
    """Time a finished run's exported functions, compiled before, the fastest of three calls.

    Args:
        directory: the run directory; it has a sampler, whose draw is judged.

    Returns:
        The `Cost`.
    """
    run = vd.load_run(directory)
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    draw = _seconds(lambda: run.sample(keys, run.ema)) / NUM_DRAWS
    x = run.sample(keys[0], run.ema)[0]
    log_prob = run.log_prob or run.elbo_estimate
    judge = None if log_prob is None else _seconds(lambda: log_prob(keys[0], run.ema, x))
    return Cost(sum(leaf.size for leaf in jax.tree.leaves(run.ema)), draw, judge)


def gains_of_doubling(directory: Path) -> Gains | None:
    """Read from a run's curve what the steps were worth.

    The curve is taken between its rows as a line in log steps. Its rate fell to zero by the end, which the gain of the
    last doubling includes; a longer run would have fallen later.

    Args:
        directory: the run directory, whose `metrics.jsonl` has one metric named test_*.

    Returns:
        The `Gains`; None where the curve begins after a quarter of the steps.
    """
    rows = report.load_metrics(directory / "metrics.jsonl")
    points = [(row["step"], row[name], name) for row in rows for name in row if name.startswith("test_")]
    if not points or points[0][0] > points[-1][0] / 4:
        return None
    steps, nats = np.asarray([point[:2] for point in points], np.float64).T
    quarter, half, whole = np.interp(np.log2(steps[-1]) - np.array([2, 1, 0]), np.log2(steps), nats)
    before, last = half - quarter, whole - half
    following = last * np.clip(last / before, 0.0, 1.0) if before > 0 else last
    return Gains(last, following, points[0][2].removeprefix("test_"))


def draws_of(directory: Path) -> np.ndarray:
    """Draw NUM_DRAWS binary images of a finished run, by its exported sampler."""
    run = vd.load_run(directory)
    x, _ = run.sample(jax.random.split(jax.random.key(1), NUM_DRAWS), run.ema)
    return np.asarray(x, np.float32)


def _seconds(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times)


def entry_of(
    family: Family, result: dict[str, Any], picture: Path, cost: Cost | None = None
) -> report.RunEntry:
    """Make a family's row."""
    nats = result["metrics"][family.metric]
    bits = result["metrics"].get("bits_per_dim", {}).get("value")
    return report.RunEntry(
        data=family.config.data,
        model=family.label,
        bound=nats["bound"],
        nats=nats["value"],
        std_error=nats["std_error"],
        bits_per_dim=bits,
        seconds=result["seconds"]["training"],
        report=Path(family.name) / "report.html",
        picture=picture,
        caption=family.caption,
        num_params=cost and cost.num_params,
        seconds_per_sample=cost and cost.draw,
        weights=judging.told(result["metrics"]) or None,
        steps=f"{family.config.num_steps:,} steps of {family.config.batch_size}",
    )


def print_table(entries: Sequence[report.RunEntry]) -> None:
    """Print the rows, one table; on a narrow terminal words are folded, numbers never cut."""
    with_costs = any(entry.num_params is not None for entry in entries)
    numbers = ("nats per datum", "bits/dim", "seconds", *(("parameters", "per sample") if with_costs else ()))
    columns = (Column(name, justify="right", no_wrap=True) for name in numbers)
    table = Table("model", *columns, box=SIMPLE_HEAD, leading=1, pad_edge=False, collapse_padding=True)
    for entry in entries:
        about = "".join(f"\n{line}" for line in (entry.bound, entry.weights) if line)
        row = [
            Text.assemble((entry.model, "bold"), about),
            report.format_value(entry.nats, entry.std_error),
            report.format_value(entry.bits_per_dim),
            f"{entry.seconds:.1f}",
        ]
        if with_costs:
            draw = report.format_milliseconds(entry.seconds_per_sample)
            row += [report.format_value(entry.num_params), draw]
        table.add_row(*row)
    runs.console.print(table)


def markdown(
    entries: Sequence[report.RunEntry],
    gains: Sequence[Gains | None],
    commands: Sequence[str],
) -> str:
    """Write the rows as a table of Markdown, beside each what doubling its steps gains, and the command."""
    head = ("model", "parameters", "steps", "training", "bound", "nats", "weights", "bits/dim")
    head += ("last doubling", "next", "per sample", "command")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for entry, gain, command in zip(entries, gains, commands, strict=True):
        cells = (
            entry.model,
            report.format_value(entry.num_params),
            report.format_value(entry.steps),
            report.format_seconds(entry.seconds),
            entry.bound,
            report.format_value(entry.nats, entry.std_error),
            report.format_value(entry.weights),
            report.format_value(entry.bits_per_dim),
            *(("–", "–") if gain is None else (f"{gain.last:+.2f}{gain.of}", f"{gain.next:+.2f}")),
            report.format_milliseconds(entry.seconds_per_sample),
            f"`{command}`",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
