"""Train every family on the same digits and compare them in the same nats.

python -m experiments.demo
"""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.table import Table

from experiments import gmm, runs, vae
from vdiff import report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train a Gaussian mixture and a VAE on the digits and compare them."""

    run_dir: Path = Path("runs/demo")
    """Where the runs and the page that compares them live."""
    preset: str = "digits"
    """The preset of each experiment: digits, or smoke to see in seconds that everything works."""


PRESETS = {
    "digits": ("minutes: the embedded 8x8 digits", Config()),
    "smoke": (
        "seconds: to see that everything works",
        Config(run_dir=Path("runs/demo-smoke"), preset="smoke"),
    ),
}


def run(config: Config) -> Path:
    """Train each family, print one table and write one page; returns the page's path."""
    directory = config.run_dir
    with runs.refusing():
        directory.mkdir(parents=True, exist_ok=True)
    entries = [
        _entry(
            directory, "Gaussian mixture", "gmm", gmm, config.preset, "latents.png", "Its component means."
        ),
        _entry(
            directory, "VAE", "vae", vae, config.preset, "samples.png", "What it imagines, from the prior."
        ),
    ]
    page = report.write_index(
        directory / "index.html",
        title="Handwritten digits, in nats",
        lead="Two latent-variable models trained by their ELBO on the same images and judged by the same log p(x).",
        runs=entries,
    )
    table = Table("model", "bound", "nats per datum", "bits/dim", "seconds")
    for entry in entries:
        nats = report.format_value(entry.nats, entry.std_error)
        row = (
            entry.model,
            entry.bound,
            nats,
            report.format_value(entry.bits_per_dim),
            f"{entry.seconds:.1f}",
        )
        table.add_row(*row)
    runs.console.print(table)
    runs.console.print(f"page  {page.resolve()}")
    return page


def _entry(
    directory: Path, label: str, name: str, experiment: ModuleType, preset: str, picture: str, caption: str
) -> report.RunEntry:
    runs.console.rule(label)
    config = dataclasses.replace(experiment.PRESETS[preset][1], run_dir=directory / name)
    result: dict[str, Any] = experiment.run(config)
    log_prob = result["metrics"]["log_prob"]
    bits = result["metrics"].get("bits_per_dim", {}).get("value")
    return report.RunEntry(
        data=config.data,
        model=label,
        bound=log_prob["bound"],
        nats=log_prob["value"],
        std_error=log_prob["std_error"],
        bits_per_dim=bits,
        seconds=result["seconds"]["training"],
        report=Path(name) / "report.html",
        picture=Path(name) / picture,
        caption=caption,
    )


if __name__ == "__main__":
    runs.main(run, PRESETS)
