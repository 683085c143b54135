"""Train every family on the same digits and compare them in the same nats.

python -m experiments.demo
"""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.table import Table

from experiments import diffusion, gmm, runs, vae
from vdiff import report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train a Gaussian mixture, a VAE and a diffusion model on the digits and compare them."""

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
    families = (
        ("Gaussian mixture", "gmm", gmm, "log_prob", "latents.png", "Its component means."),
        ("VAE", "vae", vae, "log_prob", "samples.png", "What it imagines, from the prior."),
        ("Diffusion", "diffusion", diffusion, "elbo", "samples.png", "What it imagines, from pure noise."),
    )
    entries = [_entry(directory, config.preset, *family) for family in families]
    page = report.write_index(
        directory / "index.html",
        title="Handwritten digits, in nats",
        lead="Models with one latent, a vector of them and a whole path, trained by their ELBO on the same images and "
        "judged in the same nats: by log p(x), or by the ELBO, which lies below it.",
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
    directory: Path,
    preset: str,
    label: str,
    name: str,
    experiment: ModuleType,
    metric: str,
    picture: str,
    caption: str,
) -> report.RunEntry:
    runs.console.rule(label)
    config = dataclasses.replace(experiment.PRESETS[preset][1], run_dir=directory / name)
    result: dict[str, Any] = experiment.run(config)
    nats = result["metrics"][metric]
    bits = result["metrics"].get("bits_per_dim", {}).get("value")
    return report.RunEntry(
        data=config.data,
        model=label,
        bound=nats["bound"],
        nats=nats["value"],
        std_error=nats["std_error"],
        bits_per_dim=bits,
        seconds=result["seconds"]["training"],
        report=Path(name) / "report.html",
        picture=Path(name) / picture,
        caption=caption,
    )


if __name__ == "__main__":
    runs.main(run, PRESETS)
