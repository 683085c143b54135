"""Train a sigmoid belief network on binarised images by an estimator of your choice and judge it in nats.

python -m experiments.sbn digits --estimator wake_sleep
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd
from experiments import exits, exporting, judging, pixels, runs, training
from vdiff import data, nets, report

Estimator = Literal[
    *("vimco", "rloo", "learned_baseline", "wake_wake", "wake_sleep"),
    *("straight_through", "relaxed", "rebar", "relax"),
]
ESTIMATORS = get_args(Estimator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    """Train a sigmoid belief network on binarised images by an estimator of your choice and judge it in nats."""

    estimator: Estimator = "vimco"
    """How theta, phi and lambda get their gradients; the last four need one layer."""
    widths: tuple[int, ...] = (200, 200, 200)
    """Bits per layer, from the data upwards."""
    num_samples: int = 50
    """Draws of z per datum in the bound."""
    temperature: float = 0.5
    """Of the soft draws of straight_through and relaxed; rebar and relax learn theirs."""
    eval_samples: int = 1000
    """Importance samples per test image."""
    eval_images: int = 10_000
    """How many test images are judged, from the first."""


PRESETS = {
    "smoke": (
        "seconds: a small network, a few steps, to see that everything works",
        Config(
            widths=(20, 20),
            num_samples=5,
            num_steps=100,
            eval_samples=50,
            eval_images=100,
            checkpoint_every=100,
        ),
    ),
    "digits": (
        "a minute: the embedded 8x8 digits, binarised anew at every step",
        Config(widths=(50, 50), num_samples=20, num_steps=4000, batch_size=64, learning_rate=3e-3),
    ),
    "mnist": (
        "half an hour on two cores: binarised MNIST, three layers of 200 bits",
        Config(
            data="mnist",
            num_steps=50_000,
            batch_size=24,
            log_every=250,
            checkpoint_every=10_000,
        ),
    ),
}


class Problem(NamedTuple):
    """Hold a model and its data, as `build` makes them.

    Attributes:
        model: the network, of binary images.
        objective: what is raised, of one binary image.
        dataset: the images, as integer levels.
        transform: `(key, levels) -> x`, the binarisation.
    """

    model: vd.SBN
    objective: vd.Objective
    dataset: data.Dataset
    transform: Callable[[jax.Array, jax.Array], jax.Array]


def _control_network(config: Config, shape: tuple[int, ...]) -> vd.Network:
    """Build RELAX's network of the soft bits beside the image."""
    net = nets.mlp((config.widths[0] + int(np.prod(shape)),), (), hidden=(100,))

    def apply(params: vd.types.PyTree, z: tuple[jax.Array], x: jax.Array) -> jax.Array:
        return net.apply(params, jnp.concatenate([z[0], x.ravel().astype(jnp.float32)]))

    return vd.Network(net.init, apply)


def build(config: Config) -> Problem:
    """Build the model and the objective that a config describes, and load its data.

    Raises:
        ValueError: if the data set is unknown, or the estimator does not fit the layers.
    """
    of = pixels.load(config.data, "bernoulli")
    shape, likelihood, widths = of.shape, of.likelihood, config.widths
    below = (shape, *((width,) for width in widths[:-1]))
    encoders = [nets.mlp(size, (width,), hidden=()) for size, width in zip(below, widths, strict=True)]
    decoders = [
        nets.mlp((width,), size, hidden=(), out_bias=of.out_bias if i == 0 else 0.0)
        for i, (size, width) in enumerate(zip(below, widths, strict=True))
    ]
    model = vd.sbn(encoders, decoders, num_units=widths[-1], likelihood=likelihood)
    k, temperature = config.num_samples, config.temperature
    net = nets.mlp(shape, (), hidden=(100,))
    baseline = vd.Network(net.init, lambda cv, x: net.apply(cv, likelihood.embed(x)))
    control = _control_network(config, shape)
    objectives = {
        "vimco": (None, lambda: vd.score_function(model, vd.iwae, k)),
        "rloo": (None, lambda: vd.score_function(model, vd.elbo, k)),
        "learned_baseline": (
            baseline.init,
            lambda: vd.repeat(
                vd.score_function(model, vd.elbo, 1, baseline=vd.learned_baseline(baseline)), k
            ),
        ),
        "wake_wake": (None, lambda: vd.wake_sleep(model, k)),
        "wake_sleep": (None, lambda: vd.wake_sleep(model, k, phase=vd.sleep_phase)),
        "straight_through": (None, lambda: vd.straight_through(model, model.logits, temperature, vd.elbo, k)),
        "relaxed": (None, lambda: vd.relaxed(model, model.logits, temperature, vd.elbo, k)),
        "rebar": (vd.rebar_init, lambda: vd.repeat(vd.rebar(model, model.logits), k)),
        "relax": (vd.relax_init(control), lambda: vd.repeat(vd.relax(model, model.logits, control), k)),
    }
    init_cv, make = objectives[config.estimator]
    if init_cv is not None:
        model = vd.with_cv(model, init_cv)
    return Problem(model, make(), of.dataset, of.transform)


def run(config: Config) -> dict:
    """Train, judge and picture a network; returns the content of `result.json`."""
    with exits.refusing():
        runs.check_settings(config)
        problem = build(config)
        directory = runs.open_run(config)
    keys = runs.keys_of(config.seed)
    model = problem.model
    test = training.transformed(problem.transform, keys.test, problem.dataset.test[: config.eval_images])
    watched = vd.likelihood_gradient(model, config.num_samples)
    state = training.train(
        config,
        directory,
        model,
        vd.preprocessed(problem.objective, problem.transform),
        problem.dataset.train,
        hooks=(
            training.held_out(watched, keys.watch, test[:200], every=10 * config.log_every, name="test_iwae"),
        ),
        best="test_iwae",
    )

    beside = judging.Beside("iwae", f"IWAE, K = {config.num_samples:,}", watched)
    metrics, _, seconds = judging.judge(
        model, config.eval_samples, keys.judge, state.ema, test, directory, beside
    )
    result = runs.write_result(directory, metrics, state.ema, seconds)

    sample = jax.jit(jax.vmap(model.sample, in_axes=(0, None)))
    decode = jax.jit(jax.vmap(model.decode, in_axes=(None, 0)))
    encode = jax.jit(jax.vmap(model.sample_q, in_axes=(0, None, 0)))
    of_draws = jax.random.split(keys.show, 100)
    report.image_grid(
        decode(state.ema, sample(of_draws, state.ema)[1]), directory / "samples.png", columns=20
    )
    imagined = decode(state.ema, encode(of_draws[:20], state.ema, test[:20]))
    report.reconstruction_grid(test[:20], imagined, directory / "reconstructions.png")
    rows = report.load_metrics(directory / "metrics.jsonl")
    name = "iwae" if "iwae" in rows[-1] else "elbo"
    report.training_curves(rows, directory / "curves.png", bound=name)
    page = report.write_page(
        directory,
        title=f"Sigmoid belief network on {problem.dataset.name}, by {config.estimator}",
        lead="Layers of bits, trained without a derivative through a draw, judged by log p(x).",
        headline=judging.tiles(metrics, test[0].size),
        figures=[
            report.FigureEntry(
                "samples.png", "What the model imagines: E[x | z] for z drawn from the prior."
            ),
            report.FigureEntry("reconstructions.png", "Test images above, E[x | z] at a draw of q below."),
            report.FigureEntry("curves.png", "The objective and its terms over training, in nats per datum."),
        ],
        config=dataclasses.asdict(config) | {"run_dir": str(config.run_dir)},
        result=result,
    )
    judging.tell(metrics)
    exporting.export_model(config, directory, state, model, config.eval_samples, test[0])
    runs.console.print(f"report   {page}")
    return result


if __name__ == "__main__":
    exits.main(run, PRESETS)
