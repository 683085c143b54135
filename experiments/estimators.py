"""Measure every gradient estimator where the exact gradient is known, and train a sigmoid belief network by several.

python -m experiments.estimators digits
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track
from rich.table import Table

import vdiff as vd
from experiments import cases, exits, judging, runs, sbn
from vdiff import report
from vdiff.types import Params, PyTree

MODELS = {"Gaussian": cases.gaussian, "bits": cases.bits, "mixture": cases.mixture}
DRAWS_FOR_SNR = (1, 4, 16, 64, 256)
DRAWS_OF_THE_RATIO = (1, 2, 3, 4, 6, 8, 12)
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure every gradient estimator where the exact gradient is known, and train a sigmoid belief network."""

    run_dir: Path | None = None
    """Where the run lives; runs/estimators-PRESET when not given."""
    num_draws: int = 20_000
    """Draws of each gradient."""
    models: tuple[Literal["Gaussian", "bits", "mixture"], ...] = ("Gaussian", "bits", "mixture")
    """The models with known gradients that fill the table."""
    max_samples: int = 256
    """The largest K of the figures."""
    network: Literal["smoke", "digits", "mnist"] = "digits"
    """The preset of experiments.sbn that is trained by several estimators."""
    network_steps: int = 4000
    """Training steps of each network."""
    network_samples: int = 20
    """Draws of z per datum in its bound."""
    network_images: int = 1000
    """How many test images judge it, from the first."""
    estimators: tuple[str, ...] = ("vimco", "rloo", "wake_wake", "wake_sleep")
    """What the network is trained by, as experiments.sbn names it."""
    seed: int = 0
    """Seed of the models, their data and all draws."""


PRESETS = {
    "smoke": (
        "a minute: few draws, tiny networks, to see that everything works",
        Config(
            num_draws=500,
            models=("Gaussian",),
            max_samples=4,
            network="smoke",
            network_steps=100,
            network_samples=5,
            estimators=("vimco", "wake_sleep"),
        ),
    ),
    "digits": ("minutes: the table, the figures, and networks of 50-50 bits on the 8x8 digits", Config()),
    "mnist": (
        "a quarter of an hour: the same with networks of 200-200-200 bits on binarised MNIST",
        Config(network="mnist", network_steps=15_000, network_samples=10),
    ),
}


def measure(config: Config) -> list[dict]:
    """Measure bias, noise and cost of every estimator on every model, far from the optimum and near to it.

    Biases and standard deviations are shares of the exact gradient's norm at the far point, by part.
    """
    todo, key = [], jax.random.key(config.seed)
    for name in config.models:
        key_data, key_far = jax.random.split(jax.random.fold_in(key, list(MODELS).index(name)))
        case = MODELS[name](key_data)
        start = cases.far(case, key_far)
        for place, params in {"far": start, "near": cases.near(case, start)}.items():
            todo += [(name, case, place, params, start, label) for label in case.estimators]
    rows = []
    for name, case, place, params, start, label in track(todo, "estimators", console=runs.console):
        estimator, x = case.estimators[label], case.data[0]
        unit = estimator.aim(start, x)
        exact = unit if params is start else estimator.aim(params, x)
        if estimator.init_cv is not None:
            params = params._replace(cv=cases.trained_cv(case, estimator, params, key))
        found = vd.gradient_report(
            estimator.objective, params, x, key, config.num_draws, exact=exact._replace(cv=params.cv)
        )
        row = {"model": name, "where": place, "estimator": label, "us": 1e6 * found.seconds_per_draw}
        row["flops"] = found.flops_per_draw
        for part in ("theta", "lam"):
            mean, aim = (_flat(getattr(tree, part)) for tree in (found.mean, exact))
            norm, std = np.linalg.norm(_flat(getattr(unit, part))), found.parts[part].std
            row[part] = {
                "bias": np.linalg.norm(mean - aim) / norm,
                "std": std / norm,
                "noise": std / math.sqrt(found.num_draws) / norm,
                "z": found.parts[part].z_score,
            }
        rows.append(row)
    return rows


def snr_panels(config: Config) -> list[report.Panel]:
    """Measure signal to noise against the number of draws K on the Gaussian: Rainforth et al., 2018."""
    case = cases.gaussian(jax.random.key(config.seed))
    params = cases.wide_posterior(case, jax.random.key(config.seed + 1), 0.01)
    x, key = case.data[0], jax.random.key(config.seed + 2)
    estimators = {
        "pathwise IWAE": lambda k: vd.pathwise(case.model, vd.iwae, k),
        "doubly reparametrized IWAE (DReG)": lambda k: vd.doubly_reparameterized(case.model, vd.iwae, k),
        "score function IWAE (VIMCO)": lambda k: vd.score_function(case.model, vd.iwae, k),
    }
    reports = {}
    for name, make in track(estimators.items(), "signal to noise", console=runs.console):
        draws = [k for k in _up_to(config, DRAWS_FOR_SNR) if k > 1 or "VIMCO" not in name]
        reports[name] = {k: vd.gradient_report(make(k), params, x, key, 5 * config.num_draws) for k in draws}
    # All of them have one mean, and the least noisy of them knows it best: the others' own would be their noise.
    signal = reports["doubly reparametrized IWAE (DReG)"]
    found = {
        part: {
            name: (list(of_k), [signal[k].parts[part].mean_norm / r.parts[part].std for k, r in of_k.items()])
            for name, of_k in reports.items()
        }
        for part in ("theta", "lam")
    }
    rising, falling = {"$K^{1/2}$": 0.5}, {"$K^{-1/2}$": -0.5}
    return [
        report.Panel(r"SNR of $\lambda$'s gradient", found["lam"], rising | falling, "draws K"),
        report.Panel(r"SNR of $\theta$'s gradient", found["theta"], rising, "draws K"),
    ]


def ratio_panels(config: Config) -> list[report.Panel]:
    """Measure the lecture's obstacle: the bias of a ratio of integrals, by theta and by x (12.2.2)."""
    case = cases.bits(jax.random.key(config.seed))
    params, x = cases.far(case, jax.random.key(config.seed + 1)), case.data[0]
    limit = _flat(cases.gradient_of(cases.bits_log_prob(case.model))(params, x).theta)
    support = (jnp.asarray(np.unpackbits(np.arange(8, dtype=np.uint8)[:, None], axis=1)[:, -3:], bool),)
    by_theta, ratio_draws = [], _up_to(config, DRAWS_OF_THE_RATIO)
    for k in track(ratio_draws, "ratio of integrals", console=runs.console):
        # The ratio's mean is the gradient of IWAE_K, which is a finite sum here.
        mean = _flat(cases.gradient_of(vd.enumerated(case.model, support, vd.iwae, k))(params, x).theta)
        by_theta.append(np.linalg.norm(mean - limit) / np.linalg.norm(limit))
    exact = case.estimators["score, leave-one-out (RLOO)"].aim(params, x)
    unbiased = []
    for k in ratio_draws[1:]:
        found = vd.gradient_report(
            vd.score_function(case.model, vd.elbo, k), params, x, jax.random.key(k), config.num_draws
        )
        mean, aim = _flat(found.mean.theta), _flat(exact.theta)
        unbiased.append(np.linalg.norm(mean - aim) / np.linalg.norm(aim))

    case = cases.gaussian(jax.random.key(config.seed))
    params, x = cases.wide_posterior(case, jax.random.key(config.seed + 1), 0.2), case.data[0]
    score = np.asarray(cases.gaussian_score(params, x))
    by_x = []
    for k in ratio_draws:
        objective = vd.total(vd.likelihood_gradient(case.model, k))
        mean_score = jax.jit(
            lambda keys, objective=objective: jnp.mean(
                jax.vmap(jax.grad(objective, argnums=2), in_axes=(0, None, None))(keys, params, x), axis=0
            )
        )
        keys = jax.random.split(jax.random.key(k), (10, config.num_draws))
        mean = np.mean([np.asarray(mean_score(chunk), np.float64) for chunk in keys], axis=0)
        by_x.append(np.linalg.norm(mean - score) / np.linalg.norm(score))
    lines = {
        r"$\nabla_\theta \log p(x)$ as a ratio, bits": (ratio_draws, by_theta),
        r"$\nabla_x \log p(x)$ as a ratio, Gaussian": (ratio_draws, by_x),
        rf"the ELBO's own gradient, bits ({config.num_draws:,} draws)": (ratio_draws[1:], unbiased),
    }
    return [report.Panel("bias, share of the gradient's norm", lines, {"1/K": -1.0}, "draws K")]


def temperature_panels(config: Config) -> list[report.Panel]:
    """Measure what a soft draw's temperature trades: bias against noise, on the bits."""
    case = cases.bits(jax.random.key(config.seed))
    params, x = cases.far(case, jax.random.key(config.seed + 1)), case.data[0]
    aim = _flat(case.estimators["REBAR"].aim(params, x).lam)
    estimators = {"relaxed": vd.relaxed, "straight-through": vd.straight_through}
    bias, noise = {}, {}
    for name, estimator in track(estimators.items(), "temperatures", console=runs.console):
        # At low temperatures a bias of a hundredth of the norm is drowned by anything less.
        reports = [
            vd.gradient_report(
                estimator(case.model, case.model.logits, t),
                params,
                x,
                jax.random.key(1),
                50 * config.num_draws,
            )
            for t in TEMPERATURES
        ]
        means = [_flat(found.mean.lam) for found in reports]
        norm = np.linalg.norm(aim)
        bias[name] = (TEMPERATURES, [np.linalg.norm(mean - aim) / norm for mean in means])
        noise[name] = (TEMPERATURES, [found.parts["lam"].std / norm for found in reports])
    return [
        report.Panel(r"bias of $\lambda$'s gradient / its norm", bias, xlabel="temperature"),
        report.Panel("standard deviation / its norm", noise, xlabel="temperature"),
    ]


def train_networks(config: Config, directory: Path) -> tuple[list[report.Panel], list[dict]]:
    """Train one sigmoid belief network by each estimator; return their test curves and results."""
    by_step, by_second, results = {}, {}, []
    for name in config.estimators:
        runs.console.rule(name)
        settings = dataclasses.replace(
            sbn.PRESETS[config.network][1],
            estimator=name,
            num_steps=config.network_steps,
            num_samples=config.network_samples,
            eval_images=config.network_images,
            run_dir=directory / name,
            seed=config.seed,
        )
        result = sbn.run(settings)
        rows = [row for row in report.load_metrics(directory / name / "metrics.jsonl") if "test_iwae" in row]
        values = [row["test_iwae"] for row in rows]
        by_step[name] = ([row["step"] for row in rows], values)
        by_second[name] = ([row["seconds"] for row in rows], values)
        of_run = {"weights": judging.told(result["metrics"]), "seconds": result["seconds"]["training"]}
        results.append({"estimator": name, **result["metrics"]["log_prob"], **of_run})
    shared = {"log_x": False, "log_y": False}
    title = f"IWAE of {config.network_samples} draws on test images, nats"
    panels = [
        report.Panel(title, by_step, xlabel="step", **shared),
        report.Panel("the same", by_second, xlabel="seconds of training", **shared),
    ]
    return panels, results


def run(config: Config) -> dict:
    """Measure, train, draw and write the page; returns the content of `result.json`."""
    directory = Path(config.run_dir)
    with exits.refusing():
        directory.mkdir(parents=True, exist_ok=True)
        if config.num_draws < 2:
            raise ValueError(f"num_draws: got {config.num_draws}, expected at least 2, to know a variance")
        unknown = sorted(set(config.estimators) - set(sbn.ESTIMATORS))
        if unknown:
            raise ValueError(f"estimators: got {unknown}, expected names among {list(sbn.ESTIMATORS)}")
    began = time.perf_counter()
    rows = measure(config)
    report.line_panels(snr_panels(config), directory / "snr.png")
    report.line_panels(ratio_panels(config), directory / "ratio.png")
    report.line_panels(temperature_panels(config), directory / "temperature.png")
    seconds = {"measuring": time.perf_counter() - began}
    panels, networks = train_networks(config, directory)
    report.line_panels(panels, directory / "networks.png")
    seconds["training"] = sum(network["seconds"] for network in networks)
    runs.write_json(directory / "gradients.json", {"rows": rows})
    metrics = {
        f"log_prob, {n['estimator']}": {k: v for k, v in n.items() if k != "estimator"} for n in networks
    }
    result = runs.write_result(directory, metrics, Params(), seconds)

    header = ("model", "where", "estimator", "bias, theta", "std", "bias, lambda", "std", "us")
    table = [
        (r["model"], r["where"], r["estimator"], *_cells(r["theta"]), *_cells(r["lam"]), f"{r['us']:.3g}")
        for r in rows
    ]
    shown = Table(*header)
    for row in table:
        shown.add_row(*row)
    runs.console.print(shown)
    best = max(networks, key=lambda network: network["value"])
    page = report.write_page(
        directory,
        title="Gradient estimators",
        lead="Each measured where the exact gradient is known; then the same network trained by several of them.",
        headline=[
            report.Tile("best network", best["estimator"], None, "", f"of {len(networks)} estimators"),
            report.Tile("its log p(x)", best["value"], best["std_error"], "nats per datum", best["bound"]),
            report.Tile("draws per gradient", f"{config.num_draws:,}", None, "", "one datum"),
        ],
        figures=[
            report.FigureEntry(
                "snr.png",
                "Signal to noise against K: IWAE's lambda loses it as K to the -1/2; doubly reparametrized it gains.",
            ),
            report.FigureEntry(
                "ratio.png",
                "The likelihood's gradient is a ratio of integrals: biased at every K. The ELBO's is not.",
            ),
            report.FigureEntry(
                "temperature.png", "Soft draws: a lower temperature buys less bias with more noise."
            ),
            report.FigureEntry("networks.png", "A sigmoid belief network, trained by each estimator."),
        ],
        tables=[
            report.Table(
                "One gradient: bias and standard deviation as shares of the exact norm at the far point, microseconds",
                header,
                table,
            ),
            report.Table(
                "Networks",
                ("estimator", "log p(x), nats", "standard error", "weights", "seconds"),
                [
                    (n["estimator"], n["value"], n["std_error"], n["weights"], f"{n['seconds']:.0f}")
                    for n in networks
                ],
            ),
        ],
        config=dataclasses.asdict(config) | {"run_dir": str(config.run_dir)},
        result=result,
    )
    runs.console.print(f"report   {page}")
    return result


def _flat(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def _up_to(config: Config, draws: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(k for k in draws if k <= config.max_samples)


def _cells(part: dict) -> tuple[str, str]:
    """Write a bias, or that it is less than so many draws can see, and the standard deviation of one draw."""
    # The norm of a mean of pure noise is about `noise`; three of it and a z-score of 5, and it is a bias.
    least = max(3 * part["noise"], 1e-3)
    bias = f"{part['bias']:.1%}" if part["bias"] > least and part["z"] > 5 else f"< {least:.1%}"
    return bias, f"{part['std']:.2g}"


if __name__ == "__main__":
    exits.main(run, PRESETS)
