"""Train a mixture of images whose pixels are independent, and judge it by its exact log p(x).

python -m experiments.mixture digits
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

import vdiff as vd
from experiments import exits, exporting, judging, pixels, runs, training
from vdiff import data, evaluate, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    """Train a mixture of images whose pixels are independent, and judge it by its exact log p(x)."""

    likelihood: Literal["bernoulli", "categorical", "logistic"] = "bernoulli"
    """What a pixel is: a binary draw of its grey level, anew at every step; one of the levels; or a binned logistic."""
    num_components: int = 100
    """How many images are mixed."""
    init_scale: float = 0.3
    """Noise on each component's start around the pixels' own law."""
    eval_images: int = 10_000
    """How many test images are judged, from the first."""


PRESETS = {
    "smoke": (
        "seconds: a few components, a few steps, to see that everything works",
        Config(num_components=5, num_steps=200, eval_images=100, checkpoint_every=100),
    ),
    "digits": (
        "seconds: a hundred binary images of the embedded 8x8 digits",
        Config(num_steps=3000, learning_rate=1e-2, ema_decay=0.99, log_every=25),
    ),
    "mnist": (
        "minutes on two cores: binarised MNIST, five hundred images",
        Config(
            data="mnist",
            num_components=500,
            num_steps=10_000,
            learning_rate=1e-2,
            log_every=100,
            checkpoint_every=5000,
        ),
    ),
}


class Problem(NamedTuple):
    """Hold a model and its data, as `build` makes them.

    Attributes:
        model: the mixture, of what `transform` makes of an image.
        mean: `(out) -> E[x]` of a component.
        dataset: the images, as integer levels.
        transform: `(key, levels) -> x`, the binarisation, or nothing.
        levels: how many values a pixel of x has.
    """

    model: vd.Mixture
    mean: Callable[[jax.Array], jax.Array]
    dataset: data.Dataset
    transform: Callable[[jax.Array, jax.Array], jax.Array]
    levels: int


def build(config: Config) -> Problem:
    """Build the mixture that a config describes, and load its data.

    Raises:
        ValueError: if the data set is unknown or does not fit.
    """
    of = pixels.load(config.data, config.likelihood)
    start = {"out_bias": of.out_bias, "init_scale": config.init_scale}
    components = vd.pixel_components(of.likelihood, of.levels, of.shape, **start)
    model = vd.mixture(config.num_components, components)
    return Problem(model, of.likelihood.mean, of.dataset, of.transform, of.levels)


def run(config: Config) -> dict:
    """Train, judge and picture a mixture; returns the content of `result.json`."""
    with exits.refusing():
        runs.check_settings(config)
        problem = build(config)
        directory = runs.open_run(config)
    keys, model = runs.keys_of(config.seed), problem.model
    density = vd.collapsed(model)
    test = training.transformed(problem.transform, keys.test, problem.dataset.test[: config.eval_images])
    state = training.train(
        config,
        directory,
        model,
        vd.preprocessed(density.elbo_terms, problem.transform),
        problem.dataset.train,
        hooks=(
            training.held_out(
                density.elbo_terms, keys.watch, test[:500], every=10 * config.log_every, name="test_log_prob"
            ),
        ),
        best="test_log_prob",
    )

    label = f"exact, {config.num_components:,} components"
    log_prob = vd.total(density.elbo_terms)
    metrics, _, seconds = judging.judge_exact(log_prob, label, keys.judge, state.ema, test, directory)
    likeliest = evaluate.evaluate(
        lambda key, params, x: model.log_posterior(params, x).argmax(), keys.judge, state.ema, test
    )
    metrics["used_components"] = {
        "value": len(np.unique(likeliest)),
        "unit": "components, the likeliest of some test image",
    }
    result = runs.write_result(directory, metrics, state.ema, seconds)
    page = show(config, problem, directory, state.ema, test, keys.show, result)
    judging.tell(metrics)
    export(config, problem, directory, state, test[0])
    runs.console.print(f"report   {page}")
    return result


def export(config: Config, problem: Problem, directory: Path, state: vd.TrainState, x: np.ndarray) -> None:
    """Export the mixture, its log p(x) exact."""
    model = problem.model

    def encode(params: vd.Params, x: jax.Array) -> jax.Array:
        """Compute log p(z | x) of every component z."""
        return model.log_posterior(params, x)

    exporting.export_functions(
        config,
        directory,
        state,
        x=x,
        elbo_estimate=model.elbo_estimate,
        log_prob=exporting.exact(model.log_prob),
        sample=model.sample,
        encode=encode,
    )


def show(
    config: Config,
    problem: Problem,
    directory: Path,
    params: vd.Params,
    test: np.ndarray,
    key: jax.Array,
    result: dict,
) -> Path:
    """Draw the run's pictures and its page."""
    model, top, metrics = problem.model, problem.levels - 1, result["metrics"]
    heaviest = np.argsort(-np.asarray(params.phi["logits"]))[:100]
    means = jax.jit(jax.vmap(problem.mean))(params.theta["out"][heaviest])
    report.image_grid(np.asarray(means) / top, directory / "components.png", columns=20)
    x, _ = jax.jit(jax.vmap(model.sample, in_axes=(0, None)))(jax.random.split(key, 100), params)
    report.image_grid(np.asarray(x) / top, directory / "samples.png", columns=20)
    nearest = jax.jit(jax.vmap(lambda x: model.log_posterior(params, x).argmax()))(test[:20])
    closest = jax.jit(jax.vmap(problem.mean))(params.theta["out"][nearest])
    report.reconstruction_grid(test[:20] / top, np.asarray(closest) / top, directory / "reconstructions.png")
    rows = report.load_metrics(directory / "metrics.jsonl")
    report.training_curves(rows, directory / "curves.png", bound="log_prob")
    return report.write_page(
        directory,
        title=f"Mixture on {problem.dataset.name}",
        lead="One choice among a few images, then every pixel by itself: the latent-variable model that can be summed.",
        headline=[
            *judging.tiles(metrics, test[0].size),
            report.Tile(
                "components used", metrics["used_components"]["value"], None, f"of {config.num_components}"
            ),
        ],
        figures=[
            report.FigureEntry("components.png", "What is mixed: E[x | z] of the heaviest components."),
            report.FigureEntry("samples.png", "What the model imagines: draws, every pixel by itself."),
            report.FigureEntry("reconstructions.png", "Test images above, the likeliest component below."),
            report.FigureEntry("curves.png", "Log p(x) over training, in nats per datum."),
        ],
        config=dataclasses.asdict(config) | {"run_dir": str(config.run_dir)},
        result=result,
    )


if __name__ == "__main__":
    exits.main(run, PRESETS)
