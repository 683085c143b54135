"""Train every family on the same digits and compare them in the same nats.

python -m experiments.demo
"""

import dataclasses
from pathlib import Path

from experiments import comparison, diffusion, exits, gmm, runs, vae
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


FAMILIES = (
    ("gmm", "Gaussian mixture", gmm, "log_prob", "latents.png", "Its component means."),
    ("vae", "VAE", vae, "log_prob", "samples.png", "What it imagines, from the prior."),
    ("diffusion", "Diffusion", diffusion, "elbo", "samples.png", "What it imagines, from pure noise."),
)


def run(config: Config) -> Path:
    """Train each family, print one table and write one page; returns the page's path."""
    directory = config.run_dir
    with exits.refusing():
        directory.mkdir(parents=True, exist_ok=True)
    families = [
        comparison.Family(name, label, module, module.PRESETS[config.preset][1], metric, caption)
        for name, label, module, metric, _, caption in FAMILIES
    ]
    comparison.train(families, directory)
    pictures = {name: Path(name) / picture for name, _, _, _, picture, _ in FAMILIES}
    entries = [
        comparison.entry_of(family, result, pictures[family.name])
        for family, result in comparison.finished(families, directory)
    ]
    page = report.write_index(
        directory / "index.html",
        title="Handwritten digits, in nats",
        lead="Models with one latent, a vector of them and a whole path, trained by their ELBO on the same images and "
        "judged in the same nats: by log p(x), or by the ELBO, which lies below it.",
        runs=entries,
    )
    comparison.print_table(entries)
    runs.console.print(f"page  {page.resolve()}")
    return page


if __name__ == "__main__":
    exits.main(run, PRESETS)
