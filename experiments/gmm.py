"""Train a Gaussian mixture by EM and by the gradient of its ELBO, and judge both in nats.

python -m experiments.gmm digits
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd
from experiments import exits, exporting, judging, runs, training
from vdiff import data, evaluate, nets, report
from vdiff.types import Key, Params, Terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    """Train a Gaussian mixture by EM and by the gradient of its ELBO, and judge both in nats."""

    data: str = "digits"
    """clusters (the lecture's two, in the plane), digits, mnist, fashion_mnist, or your own .npy or .npz of images."""
    num_components: int = 10
    """Components of the mixture."""
    covariance: Literal["full", "diagonal", "shared"] = "full"
    """A full matrix or a diagonal one per component, or one full matrix for all."""
    encoder_hidden: int = 0
    """0 for the exact posterior as q; else the hidden units of a network for q, trained with the rest."""
    em_steps: int = 200
    """The most steps of EM."""
    prior_strength: float = 20.0
    """Pseudo-data per covariance matrix, which keep a component from shrinking onto a datum; 0 for none."""
    prior_scale: float = 0.1
    """Their standard deviation, in units of the whole range of a pixel."""
    eval_samples: int = 1000
    """Draws of the dequantisation noise per test image."""
    eval_images: int = 10_000
    """How many test images are judged, from the first."""


PRESETS = {
    "smoke": (
        "seconds: the two clusters, a few steps, to see that everything works",
        Config(data="clusters", num_components=2, prior_strength=0.0, num_steps=100, learning_rate=1e-2),
    ),
    "clusters": (
        "seconds: the lecture's two clusters in the plane, where every number is exact",
        Config(
            data="clusters",
            num_components=2,
            prior_strength=0.0,
            num_steps=2000,
            batch_size=1000,
            learning_rate=1e-2,
        ),
    ),
    "digits": (
        "under a minute: the embedded 8x8 digits with 17 grey levels, dequantised",
        Config(num_steps=3000, learning_rate=3e-3),
    ),
    "mnist": (
        "minutes: MNIST with 256 grey levels, dequantised, 50 diagonal components",
        Config(
            data="mnist",
            num_components=50,
            covariance="diagonal",
            num_steps=5000,
            em_steps=50,
            eval_samples=100,
        ),
    ),
}

_COVARIANCES = {
    "full": vd.full_covariance,
    "diagonal": vd.diagonal_covariance,
    "shared": vd.shared_covariance,
}


class Problem(NamedTuple):
    """Hold a mixture and its data, as `build` makes them.

    Attributes:
        model: a model of one row of `train`.
        mixture: the `GMM` in it, with the exact posterior or an encoder.
        train: [N, dim], float points in the plane or integer levels.
        test: [M, dim].
        levels: how many values an integer has; 0 where data are points.
        shape: of an image, () where data are points.
    """

    model: vd.Model
    mixture: vd.GMM
    train: np.ndarray
    test: np.ndarray
    levels: int
    shape: tuple[int, ...]


def build(config: Config) -> Problem:
    """Build the mixture that a config describes, and load its data.

    Raises:
        ValueError: if the data set is unknown or does not fit.
    """
    if config.data == "clusters":
        train, test = _two_clusters(config.seed, 1000), _two_clusters(config.seed + 1, 1000)
        levels, shape = 0, ()
    else:
        dataset = data.load(config.data)
        if not isinstance(dataset.train, np.ndarray):
            raise ValueError(
                f"data: got {config.data}, which stays on disk, expected data in memory, as EM takes all at once; use "
                "an .npy or .npz"
            )
        train, test = (images.reshape(len(images), -1) for images in (dataset.train, dataset.test))
        levels, shape = dataset.levels, dataset.train.shape[1:]
    test = test[: config.eval_images]
    dim = train.shape[1]
    encoder = None
    if config.encoder_hidden:
        encoder = nets.mlp((dim,), (config.num_components,), hidden=(config.encoder_hidden,))
    mixture = vd.gmm(config.num_components, dim, covariance=_COVARIANCES[config.covariance], encoder=encoder)
    model = vd.dequantized(mixture, levels) if levels else mixture
    return Problem(model, mixture, train, test, levels, shape)


def _two_clusters(seed: int, num_data: int) -> np.ndarray:
    """Draw the two clusters of the lecture: one round and larger, one long and tilted."""
    rng = np.random.default_rng((seed, 2))
    is_first = rng.random((num_data, 1)) < 0.6
    first = rng.normal(size=(num_data, 2)) * 0.8 + np.array([-2.0, 0.5])
    second = rng.normal(size=(num_data, 2)) @ np.array([[1.2, 0.6], [0.0, 0.4]]) + np.array([2.0, -0.5])
    return np.where(is_first, first, second).astype(np.float32)


def objective_of(config: Config, problem: Problem) -> vd.Objective:
    """Raise the ELBO and, spread over the data, the same log-prior of the covariances as EM."""
    weight = config.prior_strength / len(problem.train)

    def objective(key: Key, params: Params, x: jax.Array) -> Terms:
        log_prior = problem.mixture.covariance.log_prior(params.theta, config.prior_scale)
        return problem.model.elbo_terms(key, params, x) | {"log_prior": weight * log_prior}

    return objective if config.prior_strength else problem.model.elbo_terms


def run(config: Config) -> dict:
    """Train a mixture both ways, judge and picture it; returns the content of `result.json`."""
    with exits.refusing():
        runs.check_settings(config)
        problem = build(config)
        directory = runs.open_run(config)
    console = runs.console
    key_noise, key_em, key_watch, key_judge, key_show = jax.random.split(jax.random.key(config.seed + 1), 5)
    exact = vd.gmm(config.num_components, problem.train.shape[1], covariance=problem.mixture.covariance)
    points = problem.train.astype(np.float32)
    if problem.levels:
        points = (points + np.asarray(jax.random.uniform(key_noise, points.shape))) / problem.levels

    began = time.perf_counter()
    prior = {"prior_strength": config.prior_strength, "prior_scale": config.prior_scale}
    with console.status("EM"), exits.refusing():
        start, _ = vd.fit_em(key_em, exact, points, num_steps=1, **prior)
        by_em, history = vd.fit_em(key_em, exact, points, num_steps=config.em_steps, **prior)
    em_seconds = time.perf_counter() - began
    console.print(f"EM        {len(history) - 1} steps, {em_seconds:.1f} s")

    def init(key: Key) -> Params:
        return start._replace(lam=problem.mixture.init(key).lam)

    watched = problem.model.elbo_terms
    hook = training.held_out(watched, key_watch, problem.test[:500], every=10 * config.log_every)
    model = problem.model._replace(init=init)
    state = training.train(
        config,
        directory,
        model,
        objective_of(config, problem),
        problem.train,
        hooks=(hook,),
        best="test_elbo",
    )

    began = time.perf_counter()
    scores, trust = {}, {}
    for name, params in (("em", by_em), ("gradient", state.ema)):
        scores[name], trust[name] = _judge(config, problem, exact, key_judge, params, f"judging {name}")
    elbo = evaluate.evaluate(vd.total(problem.model.elbo_terms), key_judge, state.ema, problem.test)
    seconds = {"training": judging.training_seconds(directory), "em": em_seconds}
    seconds["evaluation"] = time.perf_counter() - began

    bound = f"importance, K = {config.eval_samples:,}" if problem.levels else "exact"
    metrics = {
        "log_prob": runs.metric(scores["gradient"], bound),
        "log_prob_em": runs.metric(scores["em"], bound),
        "elbo": runs.metric(evaluate.summarize(elbo), "ELBO, one draw"),
        **trust["gradient"],
    }
    if problem.levels:
        bits = vd.bits_per_dim(scores["gradient"].mean, problem.train.shape[1])
        metrics["bits_per_dim"] = {"value": bits, "unit": "bits/dim"}
    result = runs.write_result(directory, metrics, state.ema, seconds)
    page = show(config, problem, exact, directory, state.ema, history, key_show, result)
    for name, score in scores.items():
        said = (
            f"log p(x)  {score.mean:.2f} +- {score.std_error:.2f} nats by {name}, {score.num_data} test data"
        )
        console.print(judging.joined(said, judging.told(trust[name])))
    export(config, problem, directory, state, problem.test[0])
    console.print(f"report    {page}")
    return result


def export(config: Config, problem: Problem, directory: Path, state: vd.TrainState, x: np.ndarray) -> None:
    """Export the model, with log p(x) as it is judged and the posterior over components for `encode`."""
    exact = problem.mixture  # its own densities are exact, whatever its q

    def encode(params: Params, x: jax.Array) -> jax.Array:
        """Compute log p(z | x) of each component; of levels, at their middles."""
        return exact.log_posterior(
            params, (x.astype(jnp.float32) + 0.5) / problem.levels if problem.levels else x
        )

    log_prob = exporting.exact(exact.log_prob)
    if problem.levels:
        posterior = vd.gmm(config.num_components, x.size, covariance=exact.covariance)
        log_prob = exporting.by_importance(vd.dequantized(posterior, problem.levels), config.eval_samples)
    exporting.export_functions(
        config,
        directory,
        state,
        x=x,
        elbo_estimate=problem.model.elbo_estimate,
        log_prob=log_prob,
        sample=problem.model.sample,
        encode=encode,
    )


def _judge(
    config: Config, problem: Problem, exact: vd.GMM, key: Key, params: Params, label: str
) -> tuple[evaluate.Summary, dict[str, dict]]:
    """Average log p(x) over the test data, exact for points, over dequantisation noise for levels, and say how sure."""
    if not problem.levels:
        values = evaluate.evaluate(
            lambda key, params, x: exact.log_prob(params, x), key, params, problem.test
        )
        return evaluate.summarize(values), {}
    model = vd.dequantized(exact, problem.levels)
    judged = judging.estimate_log_prob(model, config.eval_samples, key, params, problem.test, label)
    return evaluate.summarize(judged.value), judging.trust(judged, config.eval_samples)


def show(
    config: Config,
    problem: Problem,
    exact: vd.GMM,
    directory: Path,
    params: Params,
    history: np.ndarray,
    key: Key,
    result: dict,
) -> Path:
    """Draw the run's pictures and its page."""
    draws, components = jax.vmap(problem.mixture.sample, in_axes=(0, None))(
        jax.random.split(key, 400), params
    )
    rows = report.load_metrics(directory / "metrics.jsonl")
    rows = [row | {"elbo": row["objective"] - row.get("log_prior", 0.0)} for row in rows]
    report.training_curves(rows, directory / "curves.png", terms=("reconstruction", "kl"))
    loc, weights = np.asarray(params.theta["loc"]), np.asarray(jax.nn.softmax(params.phi["logits"]))
    if problem.levels:
        test = problem.test[:20]
        centred = (jnp.asarray(test, jnp.float32) + 0.5) / problem.levels
        posterior = jnp.exp(jax.vmap(exact.log_posterior, in_axes=(None, 0))(params, centred))

        def picture(y: jax.Array) -> np.ndarray:
            return np.clip(np.reshape(y, (-1, *problem.shape)), 0.0, 1.0)

        report.image_grid(picture(draws[:100]), directory / "samples.png", columns=20)
        report.reconstruction_grid(
            picture(centred), picture(posterior @ loc), directory / "reconstructions.png"
        )
        report.image_grid(picture(loc[np.argsort(-weights)]), directory / "latents.png", columns=10)
        captions = {
            "samples.png": "What the model imagines: draws of x.",
            "latents.png": "The component means, by falling weight: what each value of z stands for.",
            "reconstructions.png": "Test images above, the posterior mean of their component's mean below.",
        }
    else:
        axes = ("$x_1$", "$x_2$")
        report.latent_scatter(draws, components, directory / "samples.png", axis_labels=axes)
        unwhiten = jax.vmap(problem.mixture.covariance.unwhiten, in_axes=(None, None, 0))
        roots = [np.asarray(unwhiten(params.theta, z, jnp.eye(2))).T for z in range(len(loc))]
        covariances = np.stack([root @ root.T for root in roots])
        report.mixture_plot(problem.test, loc, covariances, weights, directory / "latents.png")
        captions = {
            "latents.png": "Test data, coloured by p(z | x), under the components at one and two sigma.",
            "samples.png": "What the model imagines: draws of x, labelled by their component z.",
        }
    captions["curves.png"] = "The ELBO and its terms over training, in nats per datum."

    metrics, judged = result["metrics"], "exact"
    if problem.levels:
        judged = f"{config.eval_samples:,} draws of the dequantisation noise, {judging.told(metrics)}"
    tiles = [
        report.Tile(
            "log p(x), by gradient", unit="nats per datum", note=judged, **_value(metrics["log_prob"])
        ),
        report.Tile("log p(x), by EM", unit="nats per datum", note=judged, **_value(metrics["log_prob_em"])),
        report.Tile("ELBO", unit="nats per datum", note="by gradient, one draw", **_value(metrics["elbo"])),
    ]
    if problem.levels:
        bits = metrics["bits_per_dim"]["value"]
        tiles.append(report.Tile("bits/dim", bits, note=f"{problem.train.shape[1]} dimensions"))
    return report.write_page(
        directory,
        title=f"Gaussian mixture on {Path(config.data).stem}",
        lead="One discrete latent, its posterior exact: here the ELBO is tight, and EM and its gradient climb it.",
        headline=tiles,
        figures=[report.FigureEntry(name, caption) for name, caption in captions.items()],
        tables=[
            report.Table(
                "EM, from k-means++",
                ("step", "penalised log-likelihood, nats per datum"),
                [(i, float(history[i])) for i in _thin(len(history))],
            )
        ],
        config=dataclasses.asdict(config) | {"run_dir": str(config.run_dir)},
        result=result,
    )


def _value(metric: dict) -> dict[str, float]:
    return {"value": metric["value"], "std_error": metric["std_error"]}


def _thin(length: int) -> list[int]:
    """Pick at most a dozen positions of a history, close together where it is steep."""
    return sorted({round(i) - 1 for i in np.geomspace(1, length, 12)})


if __name__ == "__main__":
    exits.main(run, PRESETS)
