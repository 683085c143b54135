"""Train every family on the same binary images and judge all of them in the same nats, on one page.

python -m experiments.yardstick digits
"""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import vdiff as vd
from experiments import (
    autoregressive,
    comparison,
    diffusion,
    exits,
    hvae,
    mixture,
    rbm,
    runs,
    sbn,
    vae,
    vqvae,
)
from vdiff import report

Name = Literal[
    *("mixture", "made", "pixelcnn", "rbm", "sbn", "vae", "iwae", "hvae", "ladder", "vqvae", "diffusion")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train every family on the same binary images and judge all of them in the same nats, on one page."""

    data: str = "digits"
    """A data set (digits, mnist, fashion_mnist), or your own images; grey levels are drawn to bits."""
    run_dir: Path | None = None
    """Where the runs and the page that compares them live; runs/yardstick-PRESET when not given."""
    size: Literal["smoke", "digits", "mnist"] = "digits"
    """Whose settings each family takes: for small images, minutes in all; for 28x28, hours; or seconds each."""
    families: tuple[Name, ...] = ()
    """Which to train; all when not given. What was trained before is not trained again, and is compared too."""
    seed: int = 0
    """Seed of every run, and of the bits that all are judged on."""
    eval_images: int = 10_000
    """How many test images are judged, from the first."""


PRESETS = {
    "smoke": ("minutes: small networks, a few steps", Config(size="smoke", eval_images=50)),
    "digits": ("twenty minutes or so: the embedded 8x8 digits, binary", Config()),
    "mnist": ("hours on two cores: binary MNIST", Config(data="mnist", size="mnist")),
    "fashion_mnist": ("hours on two cores: binary Fashion-MNIST", Config(data="fashion_mnist", size="mnist")),
}

# The lecture's ways to a density (12.1), and what is known of each before anything is measured.
SUMMED = ("a latent variable, summed", "exact, a sum", "p(z | x), exact", "one pass")
AUTOREGRESSIVE = ("autoregressive", "exact", "none", "pixel after pixel")
ENERGY = ("energy-based", "up to log Z, which annealing estimates", "hidden bits", "a Markov chain")
LATENT = ("latent variables", "a bound, tight as draws grow", "q(z | x)", "one pass")
CHAIN = ("latent variables, a chain", "a bound, the ELBO", "a path as large as x", "a pass for each step")


class Row(NamedTuple):
    """Hold how a family is trained: its experiment's preset at each size, and what this page changes of it.

    Attributes:
        label: the model, as the table has it.
        kind: its way to a density, and what is known of that.
        experiment: the module that trains it.
        presets: size -> the preset's name.
        changes: what this page sets otherwise at every size.
        metric: the number of its result that is compared.
        at: size -> what this page sets otherwise at that size.
    """

    label: str
    kind: tuple[str, str, str, str]
    experiment: ModuleType
    presets: dict[str, str]
    changes: dict[str, Any] = {}
    metric: str = "log_prob"
    at: dict[str, dict[str, Any]] = {}


SIZES = {"smoke": "smoke", "digits": "digits", "mnist": "mnist"}
BINARY = {"likelihood": "bernoulli"}
ROWS: dict[str, Row] = {
    "mixture": Row("mixture of Bernoullis", SUMMED, mixture, SIZES),
    "made": Row("MADE", AUTOREGRESSIVE, autoregressive, SIZES),
    "pixelcnn": Row(
        "PixelCNN",
        AUTOREGRESSIVE,
        autoregressive,
        {"smoke": "smoke", "digits": "digits_pixelcnn", "mnist": "mnist_pixelcnn"},
        {"family": "pixelcnn"},
        at={"smoke": {"features": 4, "layers": 2, "num_steps": 50}},
    ),
    "rbm": Row("RBM, persistent CD", ENERGY, rbm, SIZES),
    "sbn": Row("sigmoid belief network, VIMCO", LATENT, sbn, SIZES),
    "vae": Row(
        "VAE, ELBO",
        LATENT,
        vae,
        SIZES,
        BINARY | {"bound": "elbo", "num_samples": 1},
        at={"mnist": {"eval_samples": 1000}},
    ),
    "iwae": Row(
        "VAE, IWAE, K = 50",
        LATENT,
        vae,
        SIZES,
        BINARY | {"bound": "iwae", "num_samples": 50},
        at={
            "mnist": {
                "num_steps": 40_000,
                "batch_size": 20,
                "learning_rate": 2e-3,
                "checkpoint_every": 2000,
                "eval_samples": 1000,
            }
        },
    ),
    "hvae": Row("VAE, two layers", LATENT, hvae, SIZES, BINARY | {"network": "mlp"}),
    "ladder": Row(
        "ladder VAE",
        LATENT,
        hvae,
        {"smoke": "smoke", "digits": "digits", "mnist": "mnist_ladder"},
        BINARY | {"network": "ladder"},
    ),
    "vqvae": Row("VQ-VAE, codes by MADE", LATENT, vqvae, SIZES),
    "diffusion": Row(
        "diffusion",
        CHAIN,
        diffusion,
        {"smoke": "smoke", "digits": "digits", "mnist": "mnist_binary"},
        BINARY | {"log_snr_max": 6.0},
        "elbo",
    ),
}


def families_of(config: Config) -> list[comparison.Family]:
    """Make every family's settings of a size."""
    made = []
    for name, row in ROWS.items():
        preset = row.presets[config.size]
        settings = row.experiment.PRESETS[preset][1]
        settings = dataclasses.replace(
            settings,
            data=config.data,
            seed=config.seed,
            eval_images=min(config.eval_images, settings.eval_images),
            **row.changes,
            **row.at.get(config.size, {}),
        )
        made.append(comparison.Family(name, row.label, row.experiment, settings, row.metric, row.kind[0]))
    return made


def run(config: Config) -> Path:
    """Train each family, print one table and write one page; returns the page's path."""
    with exits.refusing():
        vd.data.load(config.data)
        directory = config.run_dir
        directory.mkdir(parents=True, exist_ok=True)
        families = families_of(config)
    comparison.train([family for family in families if family.name in (config.families or ROWS)], directory)
    entries, facts, gains, draws = [], [], [], {}
    for family, result in comparison.finished(families, directory):
        run_dir = directory / family.name
        with runs.console.status(f"timing {family.label}"):
            cost = comparison.cost_of(run_dir)
            picture = Path(f"{family.name}.png")
            draws[family.name] = comparison.draws_of(run_dir)
            report.image_grid(draws[family.name], directory / picture, columns=comparison.NUM_DRAWS)
        entries.append(comparison.entry_of(family, result, picture, cost))
        gains.append(comparison.gains_of_doubling(run_dir))
        facts.append(_facts(family, entries[-1], cost, gains[-1]))
    report.image_rows(draws, directory / "draws.png")
    page = report.write_index(
        directory / "index.html",
        title=f"One yardstick: binary {config.data}",
        lead="Every family trained on the same images, their pixels drawn anew from grey levels at every step, and "
        "judged on the same draw of the test images: by log p(x) where it can be had, or by a bound below it.",
        runs=entries,
        tables=[report.FactTable("What each way to a density gives and takes", HEAD, facts)],
    )
    comparison.print_table(entries)
    command = (
        f"python -m experiments.yardstick {config.size} --data {config.data} --seed {config.seed} --families"
    )
    lines = comparison.markdown(entries, gains, [f"{command} {name}" for name in draws])
    (directory / "table.md").write_text(lines)
    runs.console.print(f"page  {page.resolve()}")
    return page


HEAD = ("model", "kind", "log p(x)", "one log p(x)", "a code of x", "a draw", "one draw", "nats", "doubling")


def _facts(
    family: comparison.Family,
    entry: report.RunEntry,
    cost: comparison.Cost,
    gain: comparison.Gains | None,
) -> tuple[str, ...]:
    """Fill a row of the lecture's comparison: what is known of the kind, and what this run measured."""
    kind, known, code, draw = ROWS[family.name].kind
    nats = report.format_value(entry.nats, entry.std_error)
    judge, drawn = report.format_milliseconds(cost.judge), report.format_milliseconds(cost.draw)
    grown = "–" if gain is None else f"{gain.last:+.2f}{gain.of}, next {gain.next:+.2f}"
    return (family.label, kind, known, judge, code, draw, drawn, nats, grown)


if __name__ == "__main__":
    exits.main(run, PRESETS)
