"""Train a variational autoencoder on images and judge it in nats.

python -m experiments.vae digits
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd
from experiments import bounds, exits, exporting, judging, pixels, runs, training
from vdiff import data, evaluate, nets, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    """Train a variational autoencoder on images and judge it in nats."""

    likelihood: Literal["bernoulli", "categorical", "logistic", "gaussian"] = "categorical"
    """What a pixel is: a binary draw of its grey level, one of the levels, a binned logistic, or dequantised."""
    binarization: Literal["dynamic", "fixed"] = "dynamic"
    """Bernoulli only: draw the binary pixels anew at every step, or once by the seed."""
    network: Literal["mlp", "conv"] = "mlp"
    """Perceptrons or small convolutional networks."""
    hidden: tuple[int, ...] = (512, 512)
    """Widths of the perceptrons' hidden layers, in the encoder; the decoder has them in reverse."""
    remat: bool = False
    """Compute the networks' hidden layers again for the gradient, and so hold less."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation inside the networks."""
    latent_dim: int = 16
    """Units of z."""
    prior_components: int = 1
    """1 for a standard normal prior; more for a mixture whose parts are learned (phi)."""
    bound: Literal["elbo", "iwae"] = "elbo"
    """What is raised: the ELBO with its closed-form KL, or the importance-weighted bound (DReG gradient)."""
    num_samples: int = 1
    """Draws of z per datum in the bound."""
    warmup_steps: int = 0
    """Steps over which the weight of the KL terms rises to one (ELBO only)."""
    eval_samples: int = 1000
    """Importance samples per test image."""
    eval_images: int = 10_000
    """How many test images are judged, from the first."""


PRESETS = {
    "smoke": (
        "seconds: a small network, a few steps, to see that everything works",
        Config(
            hidden=(64,), latent_dim=4, num_steps=200, eval_samples=50, eval_images=100, checkpoint_every=100
        ),
    ),
    "digits": (
        "half a minute: the embedded 8x8 digits with 17 grey levels",
        Config(likelihood="logistic", hidden=(256, 256), latent_dim=12, num_steps=1500, log_every=25),
    ),
    "mnist": (
        "ten minutes of training on two cores, and as long for judging: binarised MNIST, one layer of 50 units",
        Config(
            data="mnist",
            likelihood="bernoulli",
            latent_dim=50,
            bound="iwae",
            num_samples=5,
            num_steps=60_000,
            batch_size=64,
            eval_samples=5000,
            log_every=200,
            checkpoint_every=10_000,
        ),
    ),
}


class Problem(NamedTuple):
    """Hold a model and its data, as `build` makes them.

    Attributes:
        model: a model of what `transform` makes of an image.
        vae: the `VAE` in it, with `encode` and `decode`.
        dataset: the images, as integer levels.
        transform: `(key, levels) -> x`, the model's datum.
        to_vae: `(x) -> the VAE's datum`; another only where the model dequantises.
        levels: how many values a pixel of x has.
    """

    model: vd.Model
    vae: vd.VAE
    dataset: data.Dataset
    transform: Callable[[jax.Array, jax.Array], jax.Array]
    to_vae: Callable[[jax.Array], jax.Array]
    levels: int


def build(config: Config) -> Problem:
    """Build the model that a config describes, and load its data.

    Raises:
        ValueError: if the data set is unknown or does not fit.
    """
    of = pixels.load(config.data, config.likelihood)
    if config.binarization == "fixed":
        pixels.check_drawn_once(config.data, of.dataset)
    shape, out_shape, levels = of.shape, of.likelihood.out_shape(of.shape), of.levels
    inside = {} if config.precision == "float32" else {"dtype": jnp.dtype(config.precision)}
    if config.network == "conv":
        encoder = nets.conv_encoder(shape, 2 * config.latent_dim, **inside)
        decoder = nets.conv_decoder(config.latent_dim, out_shape, **inside)
    else:
        encoder = nets.mlp(shape, (2 * config.latent_dim,), hidden=config.hidden, **inside)
        layers = {"hidden": config.hidden[::-1], "out_bias": of.out_bias}
        decoder = nets.mlp((config.latent_dim,), out_shape, **layers, **inside)
    if config.remat:
        encoder, decoder = nets.rematerialized(encoder), nets.rematerialized(decoder)
    prior = None
    if config.prior_components > 1:
        mixture = vd.gmm(config.prior_components, config.latent_dim, covariance=vd.diagonal_covariance)
        prior = vd.collapsed(mixture)
    vae = vd.vae(encoder, decoder, latent_dim=config.latent_dim, likelihood=of.likelihood, prior=prior)
    problem = Problem(vae, vae, of.dataset, of.transform, lambda x: x, levels)
    if config.likelihood == "gaussian":
        centre = lambda x: (x.astype(jnp.float32) + 0.5) / levels  # noqa: E731
        return problem._replace(model=vd.dequantized(vae, levels), to_vae=centre)
    return problem


def objective_of(config: Config, problem: Problem) -> vd.Scheduled:
    """Choose what is raised: of one stored image, at a step."""
    transform = problem.transform if config.binarization == "dynamic" else lambda key, x: x
    kl = ("entropy", "prior_log_prob") if config.prior_components > 1 else ("kl",)
    return bounds.objective_of(config, problem.model, transform, kl)


def run(config: Config) -> dict:
    """Train, judge and picture a VAE; returns the content of `result.json`."""
    with exits.refusing():
        runs.check_settings(config)
        problem = build(config)
        directory = runs.open_run(config)
    keys = runs.keys_of(config.seed)
    train, test = problem.dataset.train, problem.dataset.test[: config.eval_images]

    test = training.transformed(problem.transform, keys.test, test)
    watched, name = bounds.bound_of(config, problem.model), f"test_{config.bound}"
    state = training.train(
        config,
        directory,
        problem.model,
        objective_of(config, problem),
        training.transformed(problem.transform, keys.train, train)
        if config.binarization == "fixed"
        else train,
        hooks=(training.held_out(watched, keys.watch, test[:500], every=10 * config.log_every, name=name),),
        best=name,
    )

    beside = judging.Beside("elbo", "ELBO, one draw", problem.model.elbo_terms)
    metrics, _, seconds = judging.judge(
        problem.model, config.eval_samples, keys.judge, state.ema, test, directory, beside
    )
    loc, scale = evaluate.evaluate(
        lambda key, params, x: problem.vae.encode(params, problem.to_vae(x)), keys.judge, state.ema, test
    )
    metrics["active_units"] = {"value": int(evaluate.active_units(loc).is_active.sum()), "unit": "units"}
    result = runs.write_result(directory, metrics, state.ema, seconds)
    page = show(config, problem, directory, state.ema, test, loc, scale, keys.show, result)
    judging.tell(metrics)
    export(config, problem, directory, state, test[0])
    runs.console.print(f"report   {page}")
    return result


def export(config: Config, problem: Problem, directory: Path, state: vd.TrainState, x: np.ndarray) -> None:
    """Export the model, and encode and decode in the units of x."""

    def decode(params: vd.Params, z: jax.Array) -> jax.Array:
        mean = problem.vae.decode(params, z)
        # The likelihood of dequantised images is of levels in [0, 1), from the middle of one to that of the next.
        return mean * problem.levels - 0.5 if config.likelihood == "gaussian" else mean

    def encode(params: vd.Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return problem.vae.encode(params, problem.to_vae(x))

    encode.__doc__ = "Compute (loc, scale) of q(z | x)."
    exporting.export_functions(
        config,
        directory,
        state,
        x=x,
        z=jax.ShapeDtypeStruct((config.latent_dim,), jnp.float32),
        elbo_estimate=problem.model.elbo_estimate,
        log_prob=exporting.by_importance(problem.model, config.eval_samples),
        sample=problem.model.sample,
        encode=encode,
        decode=decode,
    )


def show(
    config: Config,
    problem: Problem,
    directory: Path,
    params: vd.Params,
    test: np.ndarray,
    loc: np.ndarray,
    scale: np.ndarray,
    key: jax.Array,
    result: dict,
) -> Path:
    """Draw the run's pictures and its page."""
    top = problem.levels - 1
    decode = jax.jit(jax.vmap(problem.vae.decode, in_axes=(None, 0)))
    to_unit = (lambda x: x) if config.likelihood == "gaussian" else (lambda x: np.asarray(x) / top)
    sample = jax.jit(jax.vmap(problem.vae.sample, in_axes=(0, None)))
    _, z = sample(jax.random.split(key, 100), params)
    z = z[0] if config.prior_components > 1 else z
    samples = np.clip(to_unit(decode(params, z)), 0.0, 1.0)
    reconstructions = np.clip(to_unit(decode(params, loc[:20])), 0.0, 1.0)

    report.image_grid(samples, directory / "samples.png", columns=20)
    report.reconstruction_grid(test[:20] / top, reconstructions, directory / "reconstructions.png")
    seen = jax.vmap(problem.to_vae)(test[:10])
    replicas = pixels.predicted(problem.vae, key, params, seen)
    draws, means = (np.clip(to_unit(x), 0.0, 1.0) for x in replicas)
    report.predictive_grid(test[:10] / top, draws, means, directory / "predictive.png")
    points, names = loc, ("$z_1$", "$z_2$")
    if config.latent_dim > 2:
        points, share = report.principal_plane(loc)
        names = tuple(f"direction {i + 1}: {s:.0%} of the variance" for i, s in enumerate(share))
    labels = problem.dataset.test_labels
    labels = None if labels is None else labels[: len(loc)]
    if config.latent_dim > 1:
        report.latent_scatter(points, labels, directory / "latents.png", axis_labels=names)
    report.training_curves(report.load_metrics(directory / "metrics.jsonl"), directory / "curves.png")

    metrics = result["metrics"]
    figures = [
        report.FigureEntry("samples.png", "What the model imagines: E[x | z] for z drawn from the prior."),
        report.FigureEntry("reconstructions.png", "Test images above, E[x | posterior mean] below."),
        report.FigureEntry(
            "predictive.png",
            "What is predicted of a test image, seen: the mean, x drawn anew, and its spread, in all and through z.",
        ),
        report.FigureEntry(
            "latents.png", "Posterior means of the test images, coloured by a label never trained on."
        ),
        report.FigureEntry("curves.png", "The objective and its terms over training, in nats per datum."),
    ]
    if config.prior_components == 1:  # under a mixture no unit has a divergence of its own
        report.kl_per_unit(evaluate.unit_kl(loc, scale), directory / "kl_per_unit.png")
        figures.append(
            report.FigureEntry("kl_per_unit.png", "How many nats each latent unit carries on average.")
        )
    return report.write_page(
        directory,
        title=f"Variational autoencoder on {problem.dataset.name}",
        lead="A deep latent Gaussian, its posterior amortised by a network, trained by a bound on log p(x).",
        headline=[
            *judging.tiles(metrics, test[0].size),
            report.Tile("active units", metrics["active_units"]["value"], None, f"of {config.latent_dim}"),
        ],
        figures=[entry for entry in figures if (directory / entry.path).exists()],
        config=dataclasses.asdict(config) | {"run_dir": str(config.run_dir)},
        result=result,
    )


if __name__ == "__main__":
    exits.main(run, PRESETS)
