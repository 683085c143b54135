"""Train an autoencoder of discrete codes, with a MADE as the codes' prior, on binarised images and judge it in nats.

python -m experiments.vqvae digits
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

import vdiff as vd
from experiments import exits, exporting, judging, pixels, runs, training
from vdiff import baselines, data, evaluate, likelihoods, nets, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    """Train an autoencoder of discrete codes, with a MADE as the codes' prior, on binarised images and judge it."""

    estimator: Literal["straight_through", "relaxed", "vimco", "rloo"] = "straight_through"
    """How lambda gets its gradient: by soft draws, or by scores (which need several samples)."""
    num_latents: int = 8
    """Codes per image."""
    num_codes: int = 16
    """Entries of the codebook."""
    code_dim: int = 8
    """Length of an entry."""
    hidden: tuple[int, ...] = (256,)
    """Widths of the encoder's hidden layers; the decoder has them in reverse."""
    prior_hidden: tuple[int, ...] = (128,)
    """Widths of the prior's hidden layers."""
    temperature: float = 0.5
    """Of the soft draws of straight_through and relaxed."""
    num_samples: int = 1
    """Draws of z per datum in the bound: the ELBO, of vimco IWAE."""
    eval_samples: int = 1000
    """Importance samples per test image."""
    eval_images: int = 10_000
    """How many test images are judged, from the first."""


PRESETS = {
    "smoke": (
        "seconds: a small network, a few steps, to see that everything works",
        Config(
            **{"hidden": (32,), "prior_hidden": (16,), "num_latents": 4, "num_codes": 4},
            num_steps=100,
            eval_samples=50,
            eval_images=100,
            checkpoint_every=100,
        ),
    ),
    "digits": (
        "minutes: the embedded 8x8 digits, binarised anew at every step, eight codes of sixteen",
        Config(num_steps=3000),
    ),
    "mnist": (
        "43 passes over binarised MNIST: 32 codes of 64",
        Config(
            data="mnist",
            num_latents=32,
            num_codes=64,
            code_dim=16,
            hidden=(512, 512),
            prior_hidden=(512,),
            num_steps=20_000,
            log_every=100,
            checkpoint_every=4000,
        ),
    ),
}


class Problem(NamedTuple):
    """Hold a model and its data, as `build` makes them.

    Attributes:
        model: the autoencoder, of binary images.
        objective: what is raised, of one binary image.
        dataset: the images, as integer levels.
        transform: `(key, levels) -> x`, the binarisation.
    """

    model: vd.VQVAE
    objective: vd.Objective
    dataset: data.Dataset
    transform: Callable[[jax.Array, jax.Array], jax.Array]


def build(config: Config) -> Problem:
    """Build the model and the objective that a config describes, and load its data.

    Raises:
        ValueError: if the data set is unknown, or the estimator needs more draws.
    """
    of = pixels.load(config.data, "bernoulli")
    shape, codes = of.shape, (config.num_latents, config.num_codes)
    entries = (config.num_latents, config.code_dim)
    sizes = {name: getattr(config, name) for name in ("num_latents", "num_codes", "code_dim")}
    prior = baselines.made(
        nets.masked_mlp(codes, codes, num_variables=config.num_latents, hidden=config.prior_hidden),
        codes,
        likelihood=likelihoods.one_hot(config.num_codes),
        orders=baselines.shuffled_orders(config.num_latents, 1),
    )
    model = vd.vqvae(
        nets.mlp(shape, entries, hidden=config.hidden),
        nets.mlp(entries, of.likelihood.out_shape(shape), hidden=config.hidden[::-1], out_bias=of.out_bias),
        **sizes,
        likelihood=of.likelihood,
        prior=prior,
    )
    k, soft = config.num_samples, (model.logits, config.temperature, vd.elbo, config.num_samples)
    objective = {
        "straight_through": lambda: vd.straight_through(model, *soft, relaxation=vd.relaxations.one_hot),
        "relaxed": lambda: vd.relaxed(model, *soft, relaxation=vd.relaxations.one_hot),
        "vimco": lambda: vd.score_function(model, vd.iwae, k),
        "rloo": lambda: vd.score_function(model, vd.elbo, k),
    }[config.estimator]()
    return Problem(model, objective, of.dataset, of.transform)


def run(config: Config) -> dict:
    """Train, judge and picture a model; returns the content of `result.json`."""
    with exits.refusing():
        runs.check_settings(config)
        problem = build(config)
        directory = runs.open_run(config)
    keys = runs.keys_of(config.seed)
    model = problem.model
    test = training.transformed(problem.transform, keys.test, problem.dataset.test[: config.eval_images])
    one_draw = vd.likelihood_gradient(model, 1)
    state = training.train(
        config,
        directory,
        model,
        vd.preprocessed(problem.objective, problem.transform),
        problem.dataset.train,
        hooks=(training.held_out(one_draw, keys.watch, test[:500], every=10 * config.log_every),),
        best="test_elbo",
    )

    beside = judging.Beside("elbo", "ELBO, one draw", one_draw)
    metrics, _, seconds = judging.judge(
        model, config.eval_samples, keys.judge, state.ema, test, directory, beside
    )
    codes = evaluate.evaluate(lambda key, params, x: model.encode(params, x), keys.judge, state.ema, test)
    share = np.bincount(codes.ravel(), minlength=config.num_codes) / codes.size
    perplexity = float(np.exp(-np.sum(share[share > 0] * np.log(share[share > 0]))))
    metrics["code_perplexity"] = {"value": perplexity, "unit": f"of {config.num_codes} codes"}
    result = runs.write_result(directory, metrics, state.ema, seconds)
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
    model, keys = problem.model, jax.random.split(key, 100)
    decode = jax.vmap(model.decode, in_axes=(None, 0))
    imagined = jax.jit(lambda: decode(params, jax.vmap(model.sample, in_axes=(0, None))(keys, params)[1]))()
    drawn = jax.jit(jax.vmap(model.sample_q, in_axes=(0, None, 0)))(keys[:20], params, test[:20])
    report.image_grid(imagined, directory / "samples.png", columns=20)
    report.reconstruction_grid(test[:20], jax.jit(decode)(params, drawn), directory / "reconstructions.png")
    rows = report.load_metrics(directory / "metrics.jsonl")
    name = "iwae" if "iwae" in rows[-1] else "elbo"
    report.training_curves(rows, directory / "curves.png", bound=name)
    metrics = result["metrics"]
    return report.write_page(
        directory,
        title=f"Discrete codes on {problem.dataset.name}, by {config.estimator}",
        lead="An image is a few entries of a codebook, whose law a MADE learns; judged by log p(x).",
        headline=[
            *judging.tiles(metrics, test[0].size),
            report.Tile(
                "codes in use",
                metrics["code_perplexity"]["value"],
                None,
                f"of {config.num_codes}",
                "perplexity",
            ),
        ],
        figures=[
            report.FigureEntry(
                "samples.png", "What the model imagines: E[x | z] for codes drawn from the prior."
            ),
            report.FigureEntry("reconstructions.png", "Test images above, E[x | z] at a draw of q below."),
            report.FigureEntry("curves.png", "The objective over training, in nats per datum."),
        ],
        config=dataclasses.asdict(config) | {"run_dir": str(config.run_dir)},
        result=result,
    )


if __name__ == "__main__":
    exits.main(run, PRESETS)
