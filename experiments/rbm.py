"""Train a restricted Boltzmann machine on binarised images and judge it in nats.

python -m experiments.rbm digits
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vdiff as vd
from experiments import exits, exporting, judging, pixels, runs, training
from vdiff import baselines, data, evaluate, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    """Train a restricted Boltzmann machine on binarised images and judge it in nats."""

    algorithm: Literal["persistent", "contrastive"] = "persistent"
    """Chains that go on from step to step (PCD), or that start anew at the data (CD)."""
    learning_rate: float = 0.1
    """Rate of plain gradient ascent at the start; falls by a cosine to zero."""
    num_sweeps: int = 5
    """Gibbs sweeps of a chain in one step."""
    num_hidden: int = 200
    """Hidden bits; with at most 20 the page also has the exact log Z."""
    temperatures: int = 5000
    """Of the annealing that estimates log Z, forward and in reverse."""
    chains: int = 100
    """Annealing chains, each way."""
    sample_sweeps: int = 5000
    """Length of the chains whose ends are the model's draws: for pictures, and where the reverse annealing starts."""
    eval_images: int = 10_000
    """How many test images are judged, from the first."""


PRESETS = {
    "smoke": (
        "seconds: a small machine, a few steps, to see that everything works",
        Config(
            num_hidden=16,
            num_sweeps=1,
            num_steps=200,
            temperatures=200,
            chains=20,
            sample_sweeps=200,
            eval_images=100,
            checkpoint_every=100,
        ),
    ),
    "digits": (
        "minutes: the embedded 8x8 digits, binarised anew at every step",
        Config(num_steps=6000, learning_rate=0.3, log_every=50),
    ),
    "mnist": (
        "half an hour on a core: binarised MNIST, 500 hidden bits",
        Config(
            data="mnist",
            num_hidden=500,
            num_steps=40_000,
            learning_rate=0.05,
            temperatures=30_000,
            log_every=250,
            checkpoint_every=5000,
        ),
    ),
}


class Problem(NamedTuple):
    """Hold a machine and its data, as `build` makes them.

    Attributes:
        model: the machine, of binary images.
        objective: what is raised, of one binary image.
        batching: how it is lifted to a batch.
        dataset: the images, as integer levels.
        transform: `(key, levels) -> x`, the binarisation.
        below: `(key, params) -> LogPartition`, by annealing from pixels with the training data's mean.
        above: `(key, params, draws) -> LogPartition`, by annealing back to them.
        watch: as `below`, a tenth as long: to follow while training.
    """

    model: baselines.RBM
    objective: Callable[..., vd.types.PyTree]
    batching: Callable[..., Callable]
    dataset: data.Dataset
    transform: Callable[[jax.Array, jax.Array], jax.Array]
    below: Callable[..., baselines.LogPartition]
    above: Callable[..., baselines.LogPartition]
    watch: Callable[..., baselines.LogPartition]


def build(config: Config) -> Problem:
    """Build the machine and the objective that a config describes, and load its data.

    Raises:
        ValueError: if the data set is unknown, or there are fewer than two chains.
    """
    of = pixels.load(config.data, "bernoulli")
    bias = of.out_bias
    model = baselines.rbm(of.shape, config.num_hidden, visible_bias=bias, num_steps=config.sample_sweeps)
    if config.algorithm == "persistent":
        raised, batching = baselines.persistent_contrastive_divergence, vd.persistent
    else:
        raised, batching = baselines.contrastive_divergence, vd.per_example
    betas, fewer = temperatures(config.temperatures), temperatures(max(1, config.temperatures // 10))
    below, watch = (
        baselines.annealed_log_partition(model, bias, places, config.chains) for places in (betas, fewer)
    )
    above = baselines.reverse_log_partition(model, bias, betas)
    objective = raised(model, config.num_sweeps)
    return Problem(model, objective, batching, of.dataset, of.transform, below, above, watch)


def temperatures(num: int) -> np.ndarray:
    """Place inverse temperatures from 0 to 1, 1 - (1 - u)^2 for even u: closer to each other near the machine."""
    return 1.0 - np.linspace(1.0, 0.0, num + 1) ** 2


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """Make plain gradient ascent, clipped, at a rate that falls to zero by a cosine.

    Not Adam, by which MNIST's machine ended 5 nats lower, at a law that annealing could not hold (docs/baselines.md).
    """
    fall = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.sgd(fall))


def run(config: Config) -> dict:
    """Train, judge and picture a machine; returns the content of `result.json`."""
    with exits.refusing():
        runs.check_settings(config)
        problem = build(config)
        directory = runs.open_run(config)
    keys = runs.keys_of(config.seed)
    model, train = problem.model, problem.dataset.train
    test = training.transformed(problem.transform, keys.test, problem.dataset.test[: config.eval_images])
    chains = ()
    if config.algorithm == "persistent":
        first = train[np.arange(config.batch_size) % len(train)]
        chains = training.transformed(problem.transform, keys.train, first)
    state = training.train(
        config,
        directory,
        model,
        vd.preprocessed(problem.objective, problem.transform),
        train,
        optimizer=optimizer_of(config),
        batching=problem.batching,
        unit="nats of free energy",
        aux=chains,
        hooks=(watching(problem, keys.watch, test[:500], every=20 * config.log_every),),
    )

    began = time.perf_counter()
    draws = drawn(config, problem, keys.show, state, max(100, config.chains))
    with runs.console.status(f"annealing over {config.temperatures:,} temperatures, both ways"):
        below = jax.block_until_ready(jax.jit(problem.below)(keys.judge, state.ema))
        above = jax.jit(problem.above)(keys.judge, state.ema, draws[: config.chains])
    free_energy = evaluate.evaluate(
        lambda key, params, x: model.free_energy(params, x), keys.judge, state.ema, test, batch_size=500
    )
    seconds = judging.seconds_since(began, directory)

    annealed = f"{config.chains} chains, {config.temperatures:,} temperatures"
    metrics = {
        "log_prob": log_prob_metric(free_energy, below, f"log Z by AIS, {annealed}"),
        "log_prob_reverse": log_prob_metric(free_energy, above, f"log Z by reverse AIS, {annealed}"),
    }
    if config.num_hidden <= baselines.log_partition.MAX_UNITS:
        exact = jax.jit(baselines.exact_log_partition(model))(state.ema)
        certain = baselines.LogPartition(exact, jnp.zeros(()), jnp.zeros(()), jnp.zeros(0))
        metrics["log_prob_exact"] = log_prob_metric(free_energy, certain, "exact log Z")
    nats, num_dims = metrics["log_prob"], test[0].size
    metrics |= {
        "log_z": {"value": float(below.value), "std_error": float(below.std_error), "unit": "nats"},
        "log_z_reverse": {"value": float(above.value), "std_error": float(above.std_error), "unit": "nats"},
        "bits_per_dim": {"value": vd.bits_per_dim(nats["value"], num_dims), "unit": "bits/dim"},
        "ess": {"value": float(below.ess), "unit": f"of {config.chains} chains"},
        "ess_reverse": {"value": float(above.ess), "unit": f"of {len(above.log_weights)} chains"},
    }
    for name, log_z in (("k_hat_log_z", below), ("k_hat_log_z_reverse", above)):
        k_hat = float(evaluate.k_hat(log_z.log_weights))
        if not math.isnan(k_hat):
            metrics[name] = {"value": k_hat, "unit": "of the chains' weights, not to be trusted above 0.7"}
    result = runs.write_result(directory, metrics, state.ema, seconds)
    page = show(config, problem, directory, state.ema, test, draws, result)
    runs.console.print(
        f"log p(x) {nats['value']:.2f} +- {nats['std_error']:.2f} nats by log Z from below, "
        f"{metrics['log_prob_reverse']['value']:.2f} from above, on {len(test)} test images, "
        f"{judging.told(metrics)}"
    )
    exporting.export_functions(config, directory, state, x=test[0], sample=model.sample)
    runs.console.print(f"report   {page}")
    return result


def watching(problem: Problem, key: jax.Array, images: np.ndarray, *, every: int) -> vd.Hook:
    """Make the hook that follows log p(x) of held-out images, with log Z by a short annealing."""

    @jax.jit
    def mean_log_prob(params: vd.Params, images: jax.Array) -> jax.Array:
        free_energy = jax.vmap(problem.model.free_energy, in_axes=(None, 0))(params, images)
        return -jnp.mean(free_energy) - problem.watch(key, params).value

    def call(step: int, state: vd.TrainState, metrics: dict[str, float]) -> dict[str, float]:
        return {"test_log_prob": float(mean_log_prob(vd.on_one_device(state.ema), images))}

    return vd.Hook(every, call)


def drawn(config: Config, problem: Problem, key: jax.Array, state: vd.TrainState, num: int) -> jax.Array:
    """Draw from the machine: long chains that start where the persistent ones are, or at training images."""
    key_start, key_chain = jax.random.split(key)
    start = state.aux
    if config.algorithm == "contrastive":
        train = problem.dataset.train
        start = training.transformed(problem.transform, key_start, train[np.arange(num) % len(train)])
    start = jnp.asarray(start)[jnp.arange(num) % len(start)]
    chain = jax.jit(jax.vmap(baselines.gibbs(problem.model, config.sample_sweeps), in_axes=(0, None, 0)))
    with runs.console.status(f"running chains of {config.sample_sweeps:,} sweeps"):
        return jax.block_until_ready(chain(jax.random.split(key_chain, num), state.ema, start))


def log_prob_metric(free_energy: np.ndarray, log_z: baselines.LogPartition, bound: str) -> dict:
    """Record the mean of log p(x) = - F(x) - log Z; its error is that of the mean over images and that of log Z."""
    nats = evaluate.summarize(-free_energy - float(log_z.value))
    return runs.metric(nats, bound) | {"std_error": math.hypot(nats.std_error, float(log_z.std_error))}


def show(
    config: Config,
    problem: Problem,
    directory: Path,
    params: vd.Params,
    test: np.ndarray,
    draws: jax.Array,
    result: dict,
) -> Path:
    """Draw the run's pictures and its page."""
    model = problem.model

    @jax.jit
    @jax.vmap
    def mean_given(x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(model.visible_logits(params, jax.nn.sigmoid(model.hidden_logits(params, x))))

    report.image_grid(mean_given(draws[:100]), directory / "samples.png", columns=20)
    report.reconstruction_grid(
        test[:20], mean_given(jnp.asarray(test[:20])), directory / "reconstructions.png"
    )
    report.image_grid(filters(params, model.shape, 100), directory / "filters.png", columns=20)
    rows = report.load_metrics(directory / "metrics.jsonl")
    report.training_curves(rows, directory / "curves.png", bound="free_energy_difference", terms=["log_prob"])
    metrics = result["metrics"]
    nats = metrics["log_prob"]
    about = {"log_prob": f"{nats['bound']}, {judging.told(metrics)}", "log_prob_reverse": "reverse AIS"}
    about["log_prob_exact"] = "exact log Z"
    tiles = [
        report.Tile("log p(x)", metrics[name]["value"], metrics[name]["std_error"], "nats per datum", line)
        for name, line in about.items()
        if name in metrics
    ]
    tiles.append(
        report.Tile("bits/dim", metrics["bits_per_dim"]["value"], None, "", f"{test[0].size} dimensions")
    )
    return report.write_page(
        directory,
        title=f"Restricted Boltzmann machine on {problem.dataset.name}",
        lead="Visible and hidden bits, an energy for each pair; trained by contrastive divergence, judged by log p(x) "
        "with log Z estimated from both sides.",
        headline=tiles,
        figures=[
            report.FigureEntry(
                "samples.png",
                f"What it imagines: E[x | h] at the ends of chains of {config.sample_sweeps:,} sweeps.",
            ),
            report.FigureEntry(
                "reconstructions.png", "Test images above, and below what one mean sweep makes of them."
            ),
            report.FigureEntry(
                "filters.png",
                "Weights of hidden bits, the longest first: white turns a pixel on, black off, each on its own scale.",
            ),
            report.FigureEntry(
                "curves.png",
                "The free-energy difference, which is no bound, and log p(x) of test images by a short annealing.",
            ),
        ],
        config=dataclasses.asdict(config) | {"run_dir": str(config.run_dir)},
        result=result,
    )


def filters(params: vd.Params, shape: tuple[int, ...], num: int) -> np.ndarray:
    """Bring the weights of the hidden bits with the longest ones to [0, 1], zero in the middle: [num, *shape]."""
    weight = np.asarray(params.theta["weight"]).T
    longest = np.argsort(-np.linalg.norm(weight, axis=1))[:num]
    weight = weight[longest]
    top = np.quantile(np.abs(weight), 0.995, axis=1, keepdims=True)
    return np.clip(0.5 + 0.5 * weight / np.maximum(top, 1e-9), 0.0, 1.0).reshape(-1, *shape)


if __name__ == "__main__":
    exits.main(run, PRESETS)
