"""Train an autoregressive model of images, MADE or PixelCNN, and judge it by its exact log p(x).

python -m experiments.autoregressive digits
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

import vdiff as vd
from experiments import exits, exporting, judging, pixels, runs, training
from vdiff import baselines, data, nets, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    """Train an autoregressive model of images, MADE or PixelCNN, and judge it by its exact log p(x)."""

    family: Literal["made", "pixelcnn"] = "made"
    """A masked perceptron, or gated convolutions."""
    likelihood: Literal["bernoulli", "categorical", "logistic"] = "bernoulli"
    """What a pixel is: a binary draw of its grey level, one of the levels, or a binned logistic."""
    binarization: Literal["dynamic", "fixed"] = "dynamic"
    """Bernoulli only: draw the binary pixels anew at every step, or once by the seed."""
    hidden: tuple[int, ...] = (512,)
    """MADE: widths of the hidden layers."""
    num_orders: int = 1
    """MADE: orders of the pixels, the first row by row; trained in turn, a step each, judged as a mixture."""
    features: int = 32
    """PixelCNN: channels."""
    layers: int = 6
    """PixelCNN: gated layers in each stack."""
    kernel: int = 3
    """PixelCNN: rows and columns that a layer looks back."""
    reach: int = 2
    """PixelCNN: columns to either side that a layer looks at in the rows above."""
    eval_images: int = 10_000
    """How many test images are judged, from the first."""
    num_shown: int = 100
    """How many draws are pictured."""


PRESETS = {
    "smoke": (
        "seconds: a small MADE, a few steps, to see that everything works",
        Config(hidden=(32,), num_steps=200, eval_images=100, num_shown=20, checkpoint_every=100),
    ),
    "digits": (
        "half a minute: MADE under eight orders on the embedded 8x8 digits, binarised anew at every step",
        Config(hidden=(256,), num_orders=8, num_steps=4000, batch_size=64),
    ),
    "digits_pixelcnn": (
        "a small PixelCNN on the same digits",
        Config(family="pixelcnn", features=16, layers=4, num_steps=1500, batch_size=64),
    ),
    "mnist": (
        "40 passes over binarised MNIST: MADE, one order, one hidden layer of 2,000 units",
        Config(
            data="mnist",
            hidden=(2000,),
            num_steps=24_000,
            batch_size=100,
            log_every=100,
            checkpoint_every=4000,
        ),
    ),
    "mnist_pixelcnn": (
        "three passes over binarised MNIST: PixelCNN, six layers of 32 channels",
        Config(
            data="mnist",
            family="pixelcnn",
            num_steps=12_000,
            batch_size=16,
            log_every=100,
            checkpoint_every=1000,
        ),
    ),
}


class Problem(NamedTuple):
    """Hold a model and its data, as `build` makes them.

    Attributes:
        model: of what `transform` makes of an image.
        objective: what is raised, of one such image, at a step.
        dataset: the images, as integer levels.
        transform: `(key, levels) -> x`, the binarisation, or nothing.
        levels: how many values a pixel of x has.
    """

    model: baselines.MADE | baselines.PixelCNN
    objective: Callable[[jax.Array], vd.Objective]
    dataset: data.Dataset
    transform: Callable[[jax.Array, jax.Array], jax.Array]
    levels: int


def build(config: Config) -> Problem:
    """Build the model that a config describes, and load its data.

    Raises:
        ValueError: if the data set is unknown or does not fit.
    """
    of = pixels.load(config.data, config.likelihood)
    if config.binarization == "fixed":
        pixels.check_drawn_once(config.data, of.dataset)
    shape, out_shape = of.shape, of.likelihood.out_shape(of.shape)
    if config.family == "made":
        net = nets.masked_mlp(shape, out_shape, hidden=config.hidden, out_bias=of.out_bias)
        orders = baselines.shuffled_orders(int(np.prod(shape)), config.num_orders, seed=config.seed)
        model = baselines.made(net, shape, likelihood=of.likelihood, orders=orders)
    else:
        sizes = {name: getattr(config, name) for name in ("features", "layers", "kernel", "reach")}
        model = baselines.pixelcnn(
            nets.gated_pixelcnn(shape, out_shape, **sizes, out_bias=of.out_bias),
            shape,
            likelihood=of.likelihood,
        )

    def objective(step: jax.Array) -> vd.Objective:
        if config.family == "made":
            return baselines.under_order(model, step % config.num_orders)
        return model.elbo_terms

    return Problem(model, objective, of.dataset, of.transform, of.levels)


def run(config: Config) -> dict:
    """Train, judge and picture a model; returns the content of `result.json`."""
    with exits.refusing():
        runs.check_settings(config)
        problem = build(config)
        directory = runs.open_run(config)
    keys = runs.keys_of(config.seed)
    train, model = problem.dataset.train, problem.model
    test = training.transformed(problem.transform, keys.test, problem.dataset.test[: config.eval_images])
    is_fixed = config.binarization == "fixed"
    at_step = lambda key, x: x if is_fixed else problem.transform(key, x)  # noqa: E731
    state = training.train(
        config,
        directory,
        model,
        vd.scheduled(lambda step: vd.preprocessed(problem.objective(step), at_step)),
        training.transformed(problem.transform, keys.train, train) if is_fixed else train,
        hooks=(
            training.held_out(
                model.elbo_terms, keys.watch, test[:500], every=10 * config.log_every, name="test_log_prob"
            ),
        ),
        best="test_log_prob",
    )

    exact = "exact"
    if config.family == "made" and config.num_orders > 1:
        exact = f"exact, a mixture of {config.num_orders} orders"
    log_prob = vd.total(model.elbo_terms)
    judged = judging.judge_exact(log_prob, exact, keys.judge, state.ema, test, directory)
    result = runs.write_result(directory, judged.metrics, state.ema, judged.seconds)
    page = show(config, problem, directory, state.ema, test, keys.show, result)
    judging.tell(judged.metrics)
    export(config, problem, directory, state, test[0])
    runs.console.print(f"report   {page}")
    return result


def export(config: Config, problem: Problem, directory: Path, state: vd.TrainState, x: np.ndarray) -> None:
    """Export the model, its log p(x) exact."""
    model = problem.model
    exporting.export_functions(
        config,
        directory,
        state,
        x=x,
        elbo_estimate=model.elbo_estimate,
        log_prob=exporting.exact(lambda params, x: model.log_joint(params, x, ())),
        sample=model.sample,
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
    top = problem.levels - 1
    draw = jax.jit(
        lambda keys: jax.lax.map(lambda k: problem.model.sample(k, params)[0], keys, batch_size=20)
    )
    samples = np.asarray(draw(jax.random.split(key, config.num_shown))) / top
    report.image_grid(samples, directory / "samples.png", columns=20)
    report.image_grid(test[: config.num_shown] / top, directory / "data.png", columns=20)
    rows = report.load_metrics(directory / "metrics.jsonl")
    report.training_curves(rows, directory / "curves.png", bound="log_prob")
    family = "MADE" if config.family == "made" else "PixelCNN"
    return report.write_page(
        directory,
        title=f"{family} on {problem.dataset.name}",
        lead="Each pixel's law given those before it: no latent, no bound, and a draw that goes pixel by pixel.",
        headline=judging.tiles(result["metrics"], test[0].size),
        figures=[
            report.FigureEntry("samples.png", "What the model imagines: draws, pixel by pixel."),
            report.FigureEntry("data.png", "Test images, as the model is shown them."),
            report.FigureEntry("curves.png", "Log p(x) over training, in nats per datum."),
        ],
        config=dataclasses.asdict(config) | {"run_dir": str(config.run_dir)},
        result=result,
    )


if __name__ == "__main__":
    exits.main(run, PRESETS)
