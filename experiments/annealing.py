"""Judge the yardstick's VAEs again by annealing, on some of their test images: how low is importance sampling?

python -m experiments.annealing mnist
"""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd
from experiments import comparison, exits, judging, runs, training, yardstick
from vdiff import evaluate, report

Name = Literal["vae", "iwae", "hvae", "ladder"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Judge the yardstick's VAEs again by annealing, on some of their test images."""

    run_dir: Path | None = None
    """The directory of a yardstick whose runs are read; runs/yardstick-PRESET when not given."""
    data: str = "digits"
    """The data set of that yardstick."""
    size: Literal["smoke", "digits", "mnist"] = "digits"
    """Its size."""
    families: tuple[Name, ...] = ("vae", "iwae", "hvae", "ladder")
    """Which of its families to judge: those with continuous latents, and of them those that are there."""
    seed: int = 0
    """Its seed, and that of the chains."""
    num_images: int = 100
    """How many test images are judged, from the first; as many are simulated for the sandwich."""
    num_steps: int = 300
    """Steps of annealing from q to the posterior."""
    num_chains: int = 4
    """Chains of each image."""
    step_sizes: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    """Of Hamiltonian Monte Carlo, in units of q's spread; the one with the best bound on training images is taken."""
    leapfrog_steps: int = 5
    """Leapfrog steps of a transition."""


PRESETS = {
    "smoke": (
        "seconds: few images, few steps",
        Config(run_dir=Path("runs/yardstick-smoke"), size="smoke", num_images=4, num_steps=10),
    ),
    "digits": ("minutes: the 8x8 digits' VAEs", Config(run_dir=Path("runs/yardstick-digits"))),
    "mnist": (
        "minutes for each VAE of perceptrons, hours for the ladder: MNIST",
        Config(run_dir=Path("runs/yardstick-mnist"), data="mnist", size="mnist"),
    ),
}
NUM_TUNED = 20  # training images that the step size is chosen on

HEAD = (
    "model",
    "images",
    "importance",
    "weights",
    "annealed",
    "chains",
    "difference",
    "bidirectional gap, simulated",
    "step size",
)


class Judged(NamedTuple):
    """Hold what two estimates say of a model, nats.

    Attributes:
        importance: log p(x) of the images, as the run was judged.
        weights: how far those weights are to be trusted.
        annealed: the same by annealing.
        chains: the effective number of chains.
        difference: the second less the first, image by image.
        gap: between the bounds from both sides on log p(x) of simulated images.
        step_size: that was taken.
    """

    importance: evaluate.Summary
    weights: str
    annealed: evaluate.Summary
    chains: str
    difference: evaluate.Summary
    gap: evaluate.Summary
    step_size: float


def run(config: Config) -> list[tuple[str, Judged]]:
    """Print and write the table; returns its rows."""
    preset = yardstick.PRESETS[config.size][1]
    of_yardstick = dataclasses.replace(preset, data=config.data, seed=config.seed)
    families = [family for family in yardstick.families_of(of_yardstick) if family.name in config.families]
    with exits.refusing():
        if not config.step_sizes:
            raise ValueError("step_sizes: got none, expected at least one, such as --step-sizes 0.1")
        for step_size in config.step_sizes:  # refused before any work, as is a missing BlackJAX
            evaluate.hmc(step_size, config.leapfrog_steps)
        found = comparison.finished(families, config.run_dir)
        if not found:
            names = ", ".join(config.families)
            raise ValueError(
                f"run_dir: got {config.run_dir}, expected finished runs of {names} with the yardstick's settings; "
                f"make them: python -m experiments.yardstick {config.size} --run-dir {config.run_dir} --families "
                + names.replace(",", "")
            )
    rows = [(family.label, judge(config, family)) for family, _ in found]
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for label, judged in rows:
        cells = (
            of if isinstance(of, str) else report.format_value(of.mean, of.std_error) for of in judged[:-1]
        )
        lines.append(f"| {label} | {judged.difference.num_data} | {' | '.join(cells)} | {judged.step_size} |")
    table = "\n".join(lines) + "\n"
    (config.run_dir / "annealing.md").write_text(table)
    runs.console.print(table, markup=False)
    return rows


def judge(config: Config, family: comparison.Family) -> Judged:
    """Judge one family's finished run by importance sampling, by annealing, and by annealing from both sides."""
    problem, keys = family.experiment.build(family.config), runs.keys_of(config.seed)
    model, params = problem.model, vd.load_run(config.run_dir / family.name).ema
    test, train = (
        training.transformed(problem.transform, keys.test, images)
        for images in (problem.dataset.test[: config.num_images], problem.dataset.train[:NUM_TUNED])
    )

    units = evaluate.spread_of_q(model, keys.train)

    @jax.jit
    def mean_bound(step_size: jax.Array) -> jax.Array:
        moves = evaluate.hmc(step_size, config.leapfrog_steps)
        annealed = evaluate.annealed_log_prob(model, moves, max(1, config.num_steps // 3), units=units)
        keys_of_each = jax.random.split(keys.watch, len(train))
        return jnp.mean(jax.vmap(annealed, in_axes=(0, None, 0))(keys_of_each, params, train).value)

    with runs.console.status(f"{family.label}: choosing the step size"):
        step_size = max(config.step_sizes, key=lambda size: float(mean_bound(jnp.float32(size))))
    moves = evaluate.hmc(step_size, config.leapfrog_steps)
    by_importance = judging.estimate_log_prob(
        model, family.config.eval_samples, keys.judge, params, test, f"{family.label}: importance"
    )
    annealed = evaluate.annealed_log_prob(
        model, moves, config.num_steps, num_chains=config.num_chains, units=units
    )
    with judging.counting(f"{family.label}: annealing", len(test)) as on_progress:
        by_annealing = evaluate.evaluate(
            annealed, keys.judge, params, test, batch_size=10, on_progress=on_progress
        )
    bracket = evaluate.bdmc(model, moves, config.num_steps, units=units)
    with judging.counting(f"{family.label}: from both sides", len(test)) as on_progress:
        brackets = evaluate.evaluate(
            lambda key, params, x: bracket(key, params),
            keys.show,
            params,
            np.zeros((config.num_images, 1)),
            batch_size=20,
            on_progress=on_progress,
        )
    return Judged(
        evaluate.summarize(by_importance.value),
        judging.told(judging.trust(by_importance, family.config.eval_samples)),
        evaluate.summarize(by_annealing.value),
        f"ESS {np.median(by_annealing.ess):.1f} of {config.num_chains}",
        evaluate.summarize(by_annealing.value - by_importance.value),
        evaluate.sandwich(brackets).gap,
        step_size,
    )


if __name__ == "__main__":
    exits.main(run, PRESETS)
