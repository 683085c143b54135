"""Train a hierarchical variational autoencoder on images and judge it in nats, layer by layer.

python -m experiments.hvae digits
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

import vdiff as vd
from experiments import bounds, exits, exporting, judging, pixels, runs, training
from vdiff import data, nets, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    """Train a hierarchical variational autoencoder on images and judge it in nats, layer by layer."""

    likelihood: Literal["bernoulli", "categorical", "logistic"] = "bernoulli"
    """What a pixel is: a binary draw of its grey level, one of the levels, or a binned logistic."""
    network: Literal["mlp", "ladder"] = "ladder"
    """Perceptrons inferred from the data upwards, or a convolutional ladder inferred from the top down."""
    latent_dims: tuple[int, ...] = (100, 50)
    """mlp: units of each layer, from the data upwards."""
    hidden: tuple[int, ...] = (200, 100)
    """mlp: width of the two hidden layers between each layer of units and what is below it."""
    features: tuple[int, ...] = (16, 32)
    """ladder: channels of each grid, finest first; the first has one position for each 2 x 2 pixels."""
    latents: tuple[int, ...] = (2, 4)
    """ladder: channels of z on each grid."""
    layers_per_level: int = 1
    """ladder: layers of z on each grid."""
    num_blocks: int = 1
    """ladder: residual blocks between two layers, on the way up and on the way down."""
    top: int = 16
    """ladder: units of the topmost layer, a vector."""
    bound: Literal["elbo", "iwae"] = "elbo"
    """What is raised: the ELBO with its closed forms, or the importance-weighted bound (DReG gradient)."""
    num_samples: int = 1
    """Draws of z per datum in the bound."""
    warmup_steps: int = 0
    """Steps over which the weight of the KL terms rises to one (ELBO only)."""
    free_bits: float = 0.0
    """Nats of each layer's mean KL over a batch that cost nothing (ELBO only)."""
    eval_samples: int = 1000
    """Importance samples per test image."""
    eval_images: int = 10_000
    """How many test images are judged, from the first."""


PRESETS = {
    "smoke": (
        "seconds: a small ladder, a few steps, to see that everything works",
        Config(
            features=(4, 8),
            latents=(1, 2),
            top=4,
            num_steps=100,
            eval_samples=20,
            eval_images=100,
            checkpoint_every=100,
        ),
    ),
    "digits": (
        "two minutes: the embedded 8x8 digits with 17 grey levels",
        Config(
            likelihood="logistic",
            features=(24, 48),
            latents=(2, 4),
            num_steps=2500,
            batch_size=64,
            learning_rate=2e-3,
            warmup_steps=300,
            free_bits=1.0,
            eval_samples=500,
        ),
    ),
    "mnist": (
        "half an hour on a core, and as long for judging: binarised MNIST, two layers of 100 and 50 units",
        Config(
            data="mnist",
            network="mlp",
            hidden=(512, 512),
            num_steps=60_000,
            batch_size=64,
            learning_rate=2e-3,
            warmup_steps=1000,
            log_every=200,
            checkpoint_every=10_000,
        ),
    ),
    "mnist_ladder": (
        "three quarters of an hour on a core, and as long for judging: binarised MNIST, a ladder of five layers",
        Config(
            data="mnist",
            features=(16, 48),
            latents=(1, 4),
            layers_per_level=2,
            num_steps=12_000,
            batch_size=64,
            learning_rate=2e-3,
            warmup_steps=1000,
            free_bits=1.0,
            eval_samples=200,
            log_every=50,
            checkpoint_every=1000,
        ),
    ),
}


class Problem(NamedTuple):
    """Hold a model and its data, as `build` makes them.

    Attributes:
        model: the model of what `transform` makes of an image.
        dataset: the images, as integer levels.
        transform: `(key, levels) -> x`, the model's datum.
        levels: how many values a pixel of x has.
    """

    model: vd.HVAE
    dataset: data.Dataset
    transform: Callable[[jax.Array, jax.Array], jax.Array]
    levels: int


def build(config: Config) -> Problem:
    """Build the model that a config describes, and load its data.

    Raises:
        ValueError: if the data set is unknown or does not fit, or a setting has no effect on what is raised.
    """
    if config.bound == "iwae" and (config.free_bits or config.warmup_steps):
        raise ValueError("bound: got iwae with warm-up or free bits, which are weights on terms; use elbo")
    of = pixels.load(config.data, config.likelihood)
    out_shape = of.likelihood.out_shape(of.shape)
    if config.network == "ladder":
        networks = nets.conv_ladder(
            of.shape,
            out_shape,
            features=config.features,
            latents=config.latents,
            layers_per_level=config.layers_per_level,
            num_blocks=config.num_blocks,
            top=config.top,
            out_bias=of.out_bias,
        )
        model = vd.ladder(*networks, likelihood=of.likelihood)
    else:
        model = _of_perceptrons(config, of, out_shape)
    return Problem(model, of.dataset, of.transform, of.levels)


def _of_perceptrons(config: Config, of: pixels.Pixels, out_shape: tuple[int, ...]) -> vd.HVAE:
    """Build networks of two hidden layers each, of one width, as Burda et al. (2016) did with tanh."""
    dims, widths = config.latent_dims, config.hidden
    if len(widths) != len(dims):
        raise ValueError(
            f"hidden: got {len(widths)} widths for {len(dims)} latent_dims, expected one a layer; give as many"
        )
    below = (of.shape, *((dim,) for dim in dims[:-1]))
    layers = [{"hidden": (width, width)} for width in widths]
    encoders = [
        nets.mlp(size, (2 * dim,), **layer) for size, dim, layer in zip(below, dims, layers, strict=True)
    ]
    decoders = [nets.mlp(dims[:1], out_shape, out_bias=of.out_bias, **layers[0])]
    for low, high, layer in zip(dims[:-1], dims[1:], layers[1:], strict=True):
        decoders.append(nets.mlp((high,), (2 * low,), **layer))
    return vd.hvae(encoders, decoders, latent_dims=dims, likelihood=of.likelihood)


def names_of(problem: Problem) -> list[str]:
    """Name the KL terms, from the data upwards."""
    params = jax.eval_shape(problem.model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct(problem.dataset.train.shape[1:], np.uint8)
    z = jax.eval_shape(problem.model.sample_q, jax.random.key(0), params, x)
    return [f"kl_{i + 1}" for i in range(len(z))]


def run(config: Config) -> dict:
    """Train, judge and picture a model; returns the content of `result.json`."""
    with exits.refusing():
        runs.check_settings(config)
        problem = build(config)
        keys, model, names = runs.keys_of(config.seed), problem.model, names_of(problem)
        combine = vd.free_bits(dict.fromkeys(names if config.free_bits else (), config.free_bits))
        directory = runs.open_run(config)
    test = training.transformed(problem.transform, keys.test, problem.dataset.test[: config.eval_images])
    watched, name = bounds.bound_of(config, model), f"test_{config.bound}"
    state = training.train(
        config,
        directory,
        model,
        bounds.objective_of(config, model, problem.transform, names),
        problem.dataset.train,
        combine=combine,
        hooks=(training.held_out(watched, keys.watch, test[:500], every=10 * config.log_every, name=name),),
        best=name,
    )
    beside = judging.Beside("elbo", "ELBO, one draw", model.elbo_terms)
    judged = judging.judge(model, config.eval_samples, keys.judge, state.ema, test, directory, beside)
    metrics = judged.metrics
    for name in names:
        metrics[name] = {"value": float(-judged.terms[name].mean()), "unit": "nats per datum"}
    result = runs.write_result(directory, metrics, state.ema, judged.seconds)
    page = show(config, problem, directory, state.ema, test, keys.show, result)
    judging.tell(metrics)
    exporting.export_model(config, directory, state, model, config.eval_samples, test[0])
    runs.console.print(f"report   {page}")
    return result


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
    decode = jax.jit(jax.vmap(model.decode, in_axes=(None, 0)))
    complete = jax.jit(jax.vmap(model.complete, in_axes=(0, None, 0)))
    keys = jax.random.split(key, 100)
    z = complete(keys, params, ())
    report.image_grid(np.asarray(decode(params, z)) / top, directory / "samples.png", columns=20)
    z = jax.jit(jax.vmap(model.encode, in_axes=(None, 0)))(params, test[:20])
    kept = [np.asarray(decode(params, complete(keys[:20], params, z[i:]))) / top for i in range(len(z))]
    report.reconstruction_grid(test[:20] / top, kept[0], directory / "reconstructions.png")
    rows = np.concatenate([test[:20] / top, *kept])
    report.image_grid(rows, directory / "layers.png", columns=20)
    report.training_curves(report.load_metrics(directory / "metrics.jsonl"), directory / "curves.png")

    names = [f"kl_{i + 1}" for i in range(len(z))]
    sizes = [int(np.prod(leaf.shape[1:])) for leaf in z]
    layers = report.Table(
        "What each layer carries",
        ("layer", "units", "nats per datum"),
        [
            (name.removeprefix("kl_"), size, metrics[name]["value"])
            for name, size in zip(names, sizes, strict=True)
        ],
    )
    return report.write_page(
        directory,
        title=f"Hierarchical variational autoencoder on {problem.dataset.name}",
        lead=f"{len(z)} layers of Gaussians, trained by a bound on log p(x), judged in nats, layer by layer.",
        headline=judging.tiles(metrics, test[0].size),
        figures=[
            report.FigureEntry(
                "samples.png", "What the model imagines: E[x | z] for z drawn from the prior."
            ),
            report.FigureEntry("reconstructions.png", "Test images above, E[x | z] at the means of q below."),
            report.FigureEntry(
                "layers.png",
                "What each layer decides: test images, then all layers from q, then without the lowest, and so on up; "
                "what is left out is drawn from the prior given what is kept.",
            ),
            report.FigureEntry("curves.png", "The objective and its terms over training, in nats per datum."),
        ],
        tables=[layers],
        config=dataclasses.asdict(config) | {"run_dir": str(config.run_dir)},
        result=result,
    )


if __name__ == "__main__":
    exits.main(run, PRESETS)
