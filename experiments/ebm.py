"""Train an energy-based model by score matching, draw from it by Hamiltonian Monte Carlo, and judge both.

python -m experiments.ebm rings
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

import vdiff as vd
from experiments import exits, exporting, judging, runs, training
from vdiff import baselines, data, evaluate, nets, report, transforms
from vdiff.types import Key, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    """Train an energy-based model by score matching, draw from it by Hamiltonian Monte Carlo, and judge both."""

    data: str = "rings"
    """rings (two, in the plane, their density known), digits, mnist, fashion_mnist, or your own .npy or .npz."""
    loss: Literal["denoising", "explicit", "sliced"] = "denoising"
    """Of the score: against noisy data, or by its derivative, exact or along random directions (small dimensions)."""
    sigma: float = 0.1
    """Denoising: standard deviation of the noise; what is learned is the data's density blurred by it."""
    num_projections: int = 1
    """Sliced: random directions per datum."""
    hidden: tuple[int, ...] = (128, 128)
    """Widths of the energy's hidden layers, of swish units."""
    num_chains: int = 500
    """Markov chains, each giving one sample."""
    anneal_steps: int = 200
    """Transitions from the confinement, a Gaussian, to the model, the energy's weight rising from 0 to 1."""
    chain_steps: int = 200
    """Transitions at the model itself, after those."""
    step_size: float = 0.1
    """Of a leapfrog step, in units of x."""
    leapfrog_steps: int = 10
    """In a transition."""
    num_cells: int = 300
    """In the plane: cells of the grid along each axis, whose sum is the normaliser."""


PRESETS = {
    "smoke": (
        "seconds: two rings, a few steps, to see that everything works",
        Config(
            hidden=(32, 32),
            num_steps=100,
            num_chains=60,
            anneal_steps=10,
            chain_steps=10,
            num_cells=60,
            checkpoint_every=100,
        ),
    ),
    "rings": (
        "minutes: two rings in the plane, whose log p(x) is exact",
        Config(num_steps=4000, batch_size=256, learning_rate=2e-3),
    ),
    "digits": (
        "minutes: the embedded 8x8 digits in [-1, 1], blurred by noise of 0.3",
        Config(
            data="digits",
            sigma=0.3,
            hidden=(256, 256),
            num_steps=3000,
            num_chains=360,
            anneal_steps=200,
            chain_steps=100,
            step_size=0.2,
        ),
    ),
}

RADII, SPREAD = (1.0, 2.2), 0.12
LOW, HIGH = (-3.6, -3.6), (3.6, 3.6)


class Problem(NamedTuple):
    """Hold a model and its data, as `build` makes them.

    Attributes:
        model: the `EBM`, of points or of images in [-1, 1].
        train: [N, ...], points or levels.
        test: [M, ...].
        levels: of an image; 0 where data are points.
        prepare: `(key, x) -> float array`, from a datum to what the model knows.
        confinement: (centre, scale) of the Gaussian in the model.
    """

    model: baselines.EBM
    train: np.ndarray
    test: np.ndarray
    levels: int
    prepare: transforms.Transform
    confinement: tuple[np.ndarray, float]


def build(config: Config) -> Problem:
    """Build the model that a config describes, and load its data.

    Raises:
        ValueError: if the data set is unknown, does not fit in memory, or the settings do not go together.
    """
    if config.data == "rings":
        train, test, levels = two_rings(config.seed, 2000), two_rings(config.seed + 1, 2000), 0
        prepare = _as_it_is
    else:
        dataset = data.load(config.data)
        if not isinstance(dataset.train, np.ndarray):
            raise ValueError(
                f"data: got {config.data}, which stays on disk, expected an .npy or .npz in memory"
            )
        train, test, levels = dataset.train, dataset.test, dataset.levels
        prepare = _centred(levels)
    shape = train.shape[1:]
    known = train.astype(np.float32) if not levels else 2 * (train.astype(np.float32) + 0.5) / levels - 1
    centre = known.mean(0)
    scale = 1.5 * float(np.sqrt(np.mean(np.square(known - centre)) + config.sigma**2))
    energy = nets.mlp(shape, (), hidden=config.hidden, activation=jax.nn.swish)
    return Problem(
        baselines.ebm(energy, centre=centre, scale=scale), train, test, levels, prepare, (centre, scale)
    )


def _as_it_is(key: Key, x: jax.Array) -> jax.Array:
    return x


def _centred(levels: int) -> transforms.Transform:
    """Spread levels evenly over [-1, 1]: level k is anywhere in its cell."""
    dequantize = transforms.dequantize(levels)
    return lambda key, x: 2 * dequantize(key, x) - 1


def two_rings(seed: int, num_data: int) -> np.ndarray:
    """Draw points around two circles, as many around each: the point of an angle, and noise."""
    rng = np.random.default_rng((seed, 7))
    radius = np.asarray(RADII)[rng.integers(len(RADII), size=num_data)]
    angle = rng.uniform(0, 2 * np.pi, num_data)
    on_circle = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (on_circle + SPREAD * rng.normal(size=(num_data, 2))).astype(np.float32)


def rings_log_prob(x: np.ndarray, spread: float) -> np.ndarray:
    """Compute the rings' own log p(x) [...] of x [..., 2]: over the angle the noise sums to a Bessel function; nats."""
    distance = np.linalg.norm(x.astype(np.float64), axis=-1)[..., None]
    radii = np.asarray(RADII)
    # log I_0(u) = log i0e(u) + u, and u goes into the square.
    log_bessel = np.log(special.i0e(distance * radii / spread**2))
    log_ring = log_bessel - np.square(distance - radii) / (2 * spread**2)
    return special.logsumexp(log_ring, axis=-1) - np.log(len(RADII)) - np.log(2 * np.pi * spread**2)


def objective_of(config: Config, problem: Problem) -> vd.Objective:
    """Make the score-matching objective of a datum as it is stored."""
    log_density = problem.model.log_density
    if config.loss == "denoising":
        objective = baselines.denoising_score_matching(log_density, config.sigma)
    elif config.loss == "explicit":
        objective = baselines.explicit_score_matching(log_density)
    else:
        objective = baselines.sliced_score_matching_vr(log_density, config.num_projections)
    return vd.preprocessed(objective, problem.prepare)


class Chain(NamedTuple):
    """Hold where a chain ended: x, its share of steps that moved, and E[clean x | x] under noise of sigma."""

    x: jax.Array
    moved: jax.Array
    denoised: jax.Array


def annealed_chain(config: Config, problem: Problem, key: Key, params: Params) -> Chain:
    """Run one chain of Hamiltonian Monte Carlo, from the confinement to the model, and on at the model."""
    key_start, key_chain = jax.random.split(key)
    centre, scale = (jnp.asarray(part, jnp.float32) for part in problem.confinement)
    transition = evaluate.hmc(config.step_size, config.leapfrog_steps)
    log_density = problem.model.log_density

    def tempered(x: jax.Array, beta: jax.Array) -> jax.Array:
        start = -0.5 * jnp.sum(jnp.square((x - centre) / scale))
        return (1 - beta) * start + beta * log_density(params, x)

    def step(x: jax.Array, at: tuple[Key, jax.Array]) -> tuple[jax.Array, jax.Array]:
        key, beta = at
        new = transition(key, lambda x: tempered(x, beta), x)
        return new, jnp.any(new != x).astype(jnp.float32)

    rising = np.arange(1, config.anneal_steps + 1) / max(config.anneal_steps, 1)
    betas = jnp.asarray(np.concatenate([rising, np.ones(config.chain_steps)]), jnp.float32)
    start = centre + scale * jax.random.normal(key_start, problem.train.shape[1:])
    x, moved = jax.lax.scan(step, start, (jax.random.split(key_chain, len(betas)), betas))
    denoised = x + config.sigma**2 * jax.grad(log_density, argnums=1)(params, x)
    return Chain(x, jnp.mean(moved[-max(config.chain_steps, 1) :]), denoised)


def run(config: Config) -> dict:
    """Train a model, draw from it, judge and picture it; returns the content of `result.json`."""
    with exits.refusing():
        runs.check_settings(config)
        problem = build(config)
        objective = objective_of(config, problem)
        directory = runs.open_run(config)
    console = runs.console
    key_watch, key_chains, key_noise = jax.random.split(jax.random.key(config.seed + 1), 3)
    hook = training.held_out(
        objective, key_watch, problem.test[:500], every=10 * config.log_every, name="test_objective"
    )
    state = training.train(config, directory, problem.model, objective, problem.train, hooks=(hook,), unit="")

    began = time.perf_counter()
    chains = jax.jit(jax.vmap(lambda key: annealed_chain(config, problem, key, state.ema)))
    with console.status("Hamiltonian Monte Carlo"):
        samples = jax.tree.map(np.asarray, chains(jax.random.split(key_chains, config.num_chains)))
    seconds = {"training": judging.training_seconds(directory), "sampling": time.perf_counter() - began}
    began = time.perf_counter()
    metrics = judge(config, problem, state.ema, samples, key_noise)
    seconds["evaluation"] = time.perf_counter() - began
    result = runs.write_result(directory, metrics, state.ema, seconds)
    page = show(config, problem, directory, state.ema, samples, result)
    for name, metric in metrics.items():
        error = f" +- {metric['std_error']:.3f}" if "std_error" in metric else ""
        console.print(f"{name:20} {metric['value']:.3f}{error} {metric['unit']}")
    export(config, problem, directory, state)
    console.print(f"report    {page}")
    return result


def judge(config: Config, problem: Problem, params: Params, samples: Chain, key: Key) -> dict:
    """Judge the density in the plane, where its normaliser is a sum, and samples by a classifier."""
    metrics = {}
    if not problem.levels:
        log_z = jax.jit(evaluate.grid_log_normalizer(problem.model.log_density, LOW, HIGH, config.num_cells))(
            params
        )

        def log_prob(key: Key, params: Params, x: jax.Array) -> jax.Array:
            return problem.model.log_density(params, x) - log_z

        values = evaluate.evaluate(log_prob, key, params, problem.test)
        metrics["log_prob"] = runs.metric(evaluate.summarize(values), "grid")
        best = config.sigma if config.loss == "denoising" else 0.0
        for name, blur in (("log_prob_truth", 0.0), ("log_prob_best", best)):
            exact = rings_log_prob(problem.test, float(np.hypot(SPREAD, blur)))
            metrics[name] = runs.metric(evaluate.summarize(exact), "exact")
    key_prepare, key_noise = jax.random.split(key)
    real = np.asarray(
        jax.vmap(problem.prepare)(jax.random.split(key_prepare, len(problem.test)), jnp.asarray(problem.test))
    )
    blur = config.sigma if config.loss == "denoising" else 0.0
    noisy = real + blur * np.asarray(jax.random.normal(key_noise, real.shape))
    found = evaluate.classifier_two_sample(noisy, samples.x, seed=config.seed)
    metrics["told_apart"] = {
        "value": found.accuracy,
        "std_error": found.std_error,
        "unit": "accuracy",
        "p_value": found.p_value,
        "num_data": found.num_test,
    }
    metrics["moved"] = {"value": float(np.mean(samples.moved)), "unit": "share of transitions"}
    return metrics


def export(config: Config, problem: Problem, directory: Path, state: vd.TrainState) -> None:
    """Export a chain as `sample` and, in the plane, log p(x) with the grid's normaliser."""

    def sample(key: Key, params: Params) -> tuple[jax.Array, tuple]:
        """Draw (x, ()), x the end of a chain of annealed Hamiltonian Monte Carlo."""
        return annealed_chain(config, problem, key, params).x, ()

    normalizer = evaluate.grid_log_normalizer(problem.model.log_density, LOW, HIGH, config.num_cells)

    def log_prob(key: Key, params: Params, x: jax.Array) -> jax.Array:
        """Compute log p(x), its normaliser by a grid; the key is not used; nats."""
        return problem.model.log_density(params, x) - normalizer(params)

    exporting.export_functions(
        config,
        directory,
        state,
        x=np.zeros(problem.train.shape[1:], np.float32),
        log_prob=None if problem.levels else log_prob,
        sample=sample,
    )


def show(
    config: Config, problem: Problem, directory: Path, params: Params, samples: Chain, result: dict
) -> Path:
    """Draw the run's pictures and its page."""
    rows = report.load_metrics(directory / "metrics.jsonl")
    terms = () if config.loss == "denoising" else ("norm", "trace")
    report.training_curves(
        rows, directory / "curves.png", bound="objective", terms=terms, unit="minus the loss"
    )
    metrics = result["metrics"]
    apart = metrics["told_apart"]
    tiles = [
        report.Tile(
            "told apart",
            apart["value"],
            std_error=apart["std_error"],
            unit="accuracy",
            note=f"1/2 is chance; p = {apart['p_value']:.2g}",
        )
    ]
    if problem.levels:

        def picture(x: np.ndarray) -> np.ndarray:
            return np.clip((x + 1) / 2, 0, 1)

        report.image_grid(picture(samples.x[:60]), directory / "samples.png", columns=20)
        report.image_grid(picture(samples.denoised[:60]), directory / "denoised.png", columns=20)
        captions = {
            "denoised.png": "The same samples, each replaced by the mean of the clean image given it.",
            "samples.png": f"Samples of the density that was learned, that of images with noise of {config.sigma}.",
        }
    else:
        points = evaluate.grid_points(LOW, HIGH, config.num_cells)
        heights = jax.jit(
            lambda params: jax.lax.map(
                lambda x: problem.model.log_density(params, x), jnp.asarray(points), batch_size=3000
            )
        )(params)
        panels = [("data", problem.test[:500]), ("samples", samples.x[:500])]
        report.landscape(
            np.reshape(heights, (config.num_cells, -1)), LOW, HIGH, panels, directory / "landscape.png"
        )
        captions = {"landscape.png": "The learned density, under test data and under samples of its own."}
        judged = ("log p(x)", "log_prob", "the model, normalised on a grid")
        truth = ("log p(x), the truth's", "log_prob_truth", "the rings' own density")
        best = ("log p(x), the best", "log_prob_best", "the density that the loss aims at")
        tiles = [
            report.Tile(title, unit="nats per datum", note=note, **_value(metrics[name]))
            for title, name, note in (judged, truth, best)
        ] + tiles
    captions["curves.png"] = "Minus the loss and its terms over training: no nats, and no bound."
    return report.write_page(
        directory,
        title=f"Energy-based model of {Path(config.data).stem}",
        lead="A network says how likely x is up to a constant; score matching learns it without the constant.",
        headline=tiles,
        figures=[report.FigureEntry(name, caption) for name, caption in captions.items()],
        config=dataclasses.asdict(config) | {"run_dir": str(config.run_dir)},
        result=result,
    )


def _value(metric: dict) -> dict[str, float]:
    return {"value": metric["value"], "std_error": metric["std_error"]}


if __name__ == "__main__":
    exits.main(run, PRESETS)
