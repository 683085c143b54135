"""Train a diffusion model on images, or on a VAE's latents, and judge it in nats by the ELBO over its whole path.

python -m experiments.diffusion digits
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd
from experiments import pixels, runs, training
from vdiff import data, diffusion, evaluate, nets, report
from vdiff.diffusion import predict, weights
from vdiff.types import Key, Params, Terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    """Train a diffusion model on images, or on a VAE's latents, and judge it in nats."""

    model: Literal["vdm", "ddpm"] = "vdm"
    """log-SNR as a function of time, or a chain under fixed betas."""
    num_latents: int | None = None
    """Latents of the chain; when not given, continuous time (vdm only)."""
    schedule: Literal["learned", "monotone", "linear", "cosine"] = "learned"
    """How log-SNR falls; the first two are learned (lam) and for a vdm only."""
    log_snr_max: float = 9.0
    """log-SNR at the data's end (vdm only)."""
    log_snr_min: float = -8.0
    """log-SNR at the noise's end (vdm only)."""
    likelihood: Literal["levels", "discretized", "bernoulli"] = "levels"
    """p(x | z_1): Bayes' rule over the levels, a discretised Gaussian, or levels of a binary draw of the grey level.
    In latents, what the VAE takes a pixel for: categorical, binned logistic, Bernoulli."""
    network: Literal["unet", "dit", "mlp"] = "unet"
    """U-Net, transformer over patches, or perceptron."""
    width: int = 32
    """Channels of the U-Net's finest level, doubled at each next; units of a layer of the others."""
    depth: int = 2
    """Levels of the U-Net, blocks of the transformer, hidden layers of the perceptron."""
    patch: int = 2
    """Side of the transformer's patches."""
    prediction: Literal["level", "preconditioned", "velocity", "noise", "data"] = "level"
    """What the network gives: logits of each pixel's levels, or one of the readings in vdiff.predict."""
    reverse_variance: Literal["posterior", "beta", "learned"] = "posterior"
    """The spread of a reverse step: of the chain's ELBO, and of the samples."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation inside the network."""
    latent_dim: int | None = None
    """Units of a VAE's z, on which the diffusion is then a prior (phi); when not given, it is one of pixels."""
    hidden: tuple[int, ...] = (512, 512)
    """That VAE's hidden layers, in the encoder; the decoder has them in reverse."""
    weight: Literal["elbo", "simple", "min_snr", "edm", "sigmoid"] = "elbo"
    """How the loss weighs log-SNRs in training; judged is the ELBO itself."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to its peak."""
    eval_times: int = 64
    """Times of one sweep along the path, in continuous time; a chain's sweep takes each of its steps once."""
    eval_sweeps: int = 2
    """Independent sweeps per test image."""
    eval_images: int = 10_000
    """How many test images are judged, from the first."""
    sampler: Literal["ancestral", "ddim", "heun", "dpm_solver", "dpm_solver_sde"] = "ancestral"
    """How samples are drawn: by the chain's own steps, or by a solver of few steps."""
    grid: Literal["time", "log_snr", "karras"] = "time"
    """Where a sample's latents lie: even in the schedule's time, in log-SNR, or as Karras et al. place them."""
    sample_steps: int = 200
    """Latents that a sample visits: calls of the network."""


PRESETS = {
    "smoke": (
        "seconds: a small network, a few steps, to see that everything works",
        Config(
            width=16,
            num_steps=100,
            eval_times=8,
            eval_images=100,
            sample_steps=20,
            log_every=10,
            checkpoint_every=50,
        ),
    ),
    "digits": (
        "a minute or two: the embedded 8x8 digits with 17 grey levels",
        Config(
            num_steps=1500,
            batch_size=64,
            learning_rate=2e-3,
            warmup_steps=50,
            ema_decay=0.995,
            log_every=25,
            checkpoint_every=500,
        ),
    ),
    "mnist_binary": (
        "half an hour of training on two cores: binarised MNIST, in nats as the VAE's",
        Config(
            data="mnist",
            likelihood="bernoulli",
            log_snr_max=6.0,
            log_snr_min=-9.0,
            width=16,
            depth=3,
            num_steps=4000,
            batch_size=32,
            warmup_steps=100,
            eval_times=4,
            log_every=50,
            checkpoint_every=500,
        ),
    ),
    "mnist": (
        "half an hour of training on two cores: MNIST with 256 grey levels, in bits/dim",
        Config(
            data="mnist",
            log_snr_max=13.3,
            log_snr_min=-8.0,
            width=16,
            depth=3,
            num_steps=4000,
            batch_size=32,
            warmup_steps=100,
            eval_times=4,
            log_every=50,
            checkpoint_every=500,
        ),
    ),
    "latent": (
        "a minute or two: a diffusion as the prior of a VAE of the 8x8 digits, trained as one ELBO",
        Config(
            latent_dim=12,
            hidden=(256, 256),
            likelihood="discretized",
            network="mlp",
            width=128,
            depth=3,
            prediction="velocity",
            log_snr_max=6.0,
            num_steps=3000,
            log_every=50,
        ),
    ),
}

_BETAS = {"linear": diffusion.linear_betas, "cosine": diffusion.cosine_betas}
_SCHEDULES = {
    "learned": diffusion.learned_log_snr,
    "monotone": diffusion.monotone_log_snr,
    "linear": diffusion.linear_log_snr,
    "cosine": diffusion.cosine_log_snr,
}
_VARIANCES = {
    "posterior": diffusion.posterior_variance,
    "beta": diffusion.beta_variance,
    "learned": diffusion.learned_variance,
}
_WEIGHTS = {
    "simple": weights.simple,
    "min_snr": weights.min_snr(),
    "edm": weights.edm(),
    "sigmoid": weights.sigmoid(),
}
_SAMPLERS = {
    "ancestral": diffusion.ancestral,
    "ddim": diffusion.ddim,
    "heun": diffusion.heun,
    "dpm_solver": diffusion.dpm_solver,
    "dpm_solver_sde": diffusion.dpm_solver_sde,
}
_GRIDS = {
    "time": diffusion.uniform_time,
    "log_snr": diffusion.uniform_log_snr,
    "karras": diffusion.karras(),
}


class Problem(NamedTuple):
    """Hold a model and its data, as `build` makes them.

    Attributes:
        model: what is trained: the diffusion itself, or a VAE whose prior it is.
        diffusion: the diffusion in it, with the sampler that was asked for.
        vae: the VAE, or None.
        within: `(objective of the diffusion) -> objective of the model`, in which that one takes the place of the
            diffusion's own terms.
        own: `(params) -> params` of the diffusion in it.
        latent: `(key, params, x) -> y`, the diffusion's datum.
        dataset: the images, as integer levels.
        transform: `(key, levels) -> x`, the model's datum.
        levels: how many values a pixel of x has.
    """

    model: vd.ModelLike
    diffusion: vd.Diffusion
    vae: vd.VAE | None
    within: Callable[[vd.Objective], vd.Objective]
    own: Callable[[Params], Params]
    latent: Callable[[Key, Params, jax.Array], jax.Array]
    dataset: data.Dataset
    transform: Callable[[Key, jax.Array], jax.Array]
    levels: int


def build(config: Config) -> Problem:
    """Build the model that a config describes, and load its data.

    Raises:
        ValueError: if the data set is unknown, or settings do not fit each other.
    """
    dataset = data.load(config.data)
    transform, levels = (lambda key, x: x), dataset.levels
    if config.likelihood == "bernoulli":
        transform, levels = vd.transforms.binarize(dataset.levels), 2
    of_latents = config.latent_dim is not None
    shape = (config.latent_dim,) if of_latents else dataset.train.shape[1:]
    denoising = _diffusion(config, shape, dataset, config.schedule)
    sampler = _SAMPLERS[config.sampler](denoising, config.sample_steps, grid=_GRIDS[config.grid])
    denoising = denoising._replace(sample=sampler)
    if not of_latents:
        return Problem(
            denoising,
            denoising,
            None,
            lambda objective: objective,
            lambda params: params,
            lambda key, params, x: x,
            dataset,
            transform,
            levels,
        )

    name = {"bernoulli": "bernoulli", "levels": "categorical", "discretized": "logistic"}[config.likelihood]
    likelihood, out_bias = pixels.LIKELIHOODS[name](dataset.train, dataset.levels)
    image_shape = dataset.train.shape[1:]
    encoder = nets.mlp(image_shape, (2 * config.latent_dim,), hidden=config.hidden)
    out_shape = likelihood.out_shape(image_shape)
    decoder = nets.mlp((config.latent_dim,), out_shape, hidden=config.hidden[::-1], out_bias=out_bias)

    def vae(prior: vd.ModelLike) -> vd.VAE:
        return vd.vae(encoder, decoder, latent_dim=config.latent_dim, likelihood=likelihood, prior=prior)

    whole = vae(denoising)

    def own(params: Params) -> Params:
        return Params(params.phi["theta"], params.phi["phi"], params.lam["prior"])

    def latent(key: Key, params: Params, x: jax.Array) -> jax.Array:
        loc, scale = whole.encode(params, x)
        return loc + scale * jax.random.normal(key, loc.shape)

    return Problem(
        whole,
        denoising,
        whole,
        lambda objective: vae(denoising._replace(elbo_terms=objective)).elbo_terms,
        own,
        latent,
        dataset,
        transform,
        levels,
    )


def _diffusion(config: Config, shape: tuple[int, ...], dataset: data.Dataset, schedule: str) -> vd.Diffusion:
    """Build the diffusion of data of this shape, under a schedule that may be another than the config's."""
    levels = 2 if config.likelihood == "bernoulli" else dataset.levels
    if config.latent_dim is not None:
        if (config.network, config.prediction == "level") != ("mlp", False):
            raise ValueError(
                f"network, prediction: got {config.network} and {config.prediction} for latents, expected mlp and any "
                "prediction but level; use --network mlp --prediction velocity"
            )
        likelihood, data_scale = diffusion.gaussian(), 1.0
    else:
        of_pixels = {"levels": diffusion.levels, "discretized": diffusion.discretized_gaussian}
        likelihood = of_pixels.get(config.likelihood, diffusion.levels)(levels)
        data_scale = 2.0 / levels * _spread(dataset.train, levels)
    settings = {
        "shape": shape,
        "predict": _prediction(config, data_scale),
        "reverse_variance": _VARIANCES[config.reverse_variance](),
        "likelihood": likelihood,
    }
    network = _network(config, shape, levels)
    if config.model == "ddpm":
        if config.num_latents is None or schedule not in _BETAS:
            raise ValueError(
                f"num_latents, schedule: got {config.num_latents} and {schedule} for a ddpm, expected a number and "
                f"one of {', '.join(_BETAS)}; use --num-latents 1000 --schedule cosine"
            )
        return vd.ddpm(network, _BETAS[schedule](config.num_latents), **settings)
    log_snr = _SCHEDULES[schedule](config.log_snr_max, config.log_snr_min)
    return vd.vdm(network, log_snr, num_steps=config.num_latents, **settings)


def _spread(images: np.ndarray, levels: int) -> float:
    """Return the standard deviation of a pixel, in levels; with two, of a binary draw of the grey level."""
    if levels > 2:
        return float(images.std()) or 1.0
    mean = float(images.mean() / images.max())
    return float(np.sqrt(mean * (1.0 - mean)))


def _prediction(config: Config, data_scale: float) -> predict.Prediction:
    if config.prediction == "preconditioned":
        return predict.preconditioned(data_scale)
    name = "data" if config.prediction == "level" else config.prediction
    return {"data": predict.data, "noise": predict.noise, "velocity": predict.velocity}[name]


def _network(config: Config, shape: tuple[int, ...], levels: int) -> vd.Network:
    dtype = jnp.dtype(config.precision)
    if config.network == "mlp":
        if config.prediction == "level":
            raise ValueError(
                "prediction: got level for the network mlp, expected another; use --prediction data"
            )
        return nets.time_mlp(shape, hidden=(config.width,) * config.depth, dtype=dtype)
    channels = shape[-1] * (levels if config.prediction == "level" else 1)
    if config.network == "unet":
        features = tuple(config.width * 2**level for level in range(config.depth))
        coarsest = (config.depth - 1,)
        net = nets.unet(shape, out_channels=channels, features=features, attention=coarsest, dtype=dtype)
    else:
        heads = next(heads for heads in (4, 3, 2, 1) if config.width % heads == 0)
        size = {"patch": config.patch, "width": config.width, "depth": config.depth, "heads": heads}
        net = nets.dit(shape, out_channels=channels, dtype=dtype, **size)
    return diffusion.expected_level(net, levels) if config.prediction == "level" else net


def objective_of(config: Config, problem: Problem) -> Callable[[Key, Params, jax.Array, jax.Array], Terms]:
    """Choose what is raised: of one stored image, at a time."""
    terms_at = problem.diffusion.elbo_terms_at
    if config.weight != "elbo":
        terms_at = diffusion.weighted_terms(problem.diffusion, _WEIGHTS[config.weight])

    def objective(key: Key, params: Params, x: jax.Array, u: jax.Array) -> Terms:
        return problem.within(lambda key, params, y: terms_at(key, params, y, u))(key, params, x)

    return vd.preprocessed(objective, problem.transform)


def num_times(config: Config) -> int:
    """Count the times of one sweep along the path: a chain's steps, or as many as were asked for."""
    return config.eval_times if config.num_latents is None else max(config.num_latents - 1, 1)


def along_path(problem: Problem, num_times: int) -> vd.Objective:
    """Make the model's ELBO with the diffusion's term summed over the path: one sweep, one draw of the rest."""
    path_elbo = diffusion.path_elbo(problem.diffusion, num_times, num_sweeps=1)
    return problem.within(lambda key, params, y: path_elbo(key, params, y).terms)


def sweeps_of(problem: Problem, num_times: int, num_sweeps: int) -> Callable[[Key, Params, jax.Array], Terms]:
    """Make the evaluator of independent sweeps: `(key, params, x) -> Terms`, each [num_sweeps]."""
    sweep = along_path(problem, num_times)

    def sweeps(key: Key, params: Params, x: jax.Array) -> Terms:
        return jax.vmap(sweep, in_axes=(0, None, None))(jax.random.split(key, num_sweeps), params, x)

    return sweeps


def run(config: Config) -> dict:
    """Train, judge and picture a diffusion model; returns the content of `result.json`."""
    with runs.refusing():
        runs.check_settings(config)
        if config.warmup_steps >= config.num_steps:
            raise ValueError(
                f"warmup_steps: got {config.warmup_steps}, expected fewer than the {config.num_steps} steps of the run"
            )
        problem = build(config)
        directory = runs.open_run(config)
    console = runs.console
    # As the VAE experiment splits its seed, so that both are judged on the same binary test images.
    _, key_test, key_watch, key_judge, key_show = jax.random.split(jax.random.key(config.seed + 1), 5)
    test = problem.dataset.test[: config.eval_images]
    test = training.transformed(problem.transform, key_test, test)
    state = training.train(
        config,
        directory,
        problem.model,
        objective_of(config, problem),
        problem.dataset.train,
        optimizer=training.optimizer_of(config, rise_steps=config.warmup_steps),
        batching=vd.stratified,
        hooks=(
            training.held_out(
                along_path(problem, min(num_times(config), 16)),
                key_watch,
                test[:500],
                every=10 * config.log_every,
            ),
        ),
    )

    began = time.perf_counter()
    sweeps = sweeps_of(problem, num_times(config), config.eval_sweeps)
    with training.counting("judging", len(test)) as on_progress:
        terms = evaluate.evaluate(sweeps, key_judge, state.ema, test, batch_size=50, on_progress=on_progress)
    seconds = {"training": training.training_seconds(directory), "evaluation": time.perf_counter() - began}

    values = sum(terms.values())  # [N, sweeps]
    nats = evaluate.summarize(values.mean(1))
    judged = f"ELBO over the path, {config.eval_sweeps} x {num_times(config)} times"
    metrics = {
        "elbo": runs.metric(nats, judged),
        "bits_per_dim": {"value": vd.bits_per_dim(nats.mean, test[0].size), "unit": "bits/dim"},
        **{name: runs.metric(evaluate.summarize(term.mean(1)), "term") for name, term in terms.items()},
    }
    if config.eval_sweeps > 1:
        noise = np.sqrt(np.mean(values.var(1, ddof=1)) / values.size)
        bound = "standard error of the mean that is due to the draws of time and noise"
        metrics["elbo_noise"] = {"value": float(noise), "unit": "nats", "bound": bound}
    result = runs.write_result(directory, metrics, state.ema, seconds)
    page = show(config, problem, directory, state.ema, test, key_show, result)
    console.print(
        f"ELBO {nats.mean:.2f} +- {nats.std_error:.2f} nats on {nats.num_data} test images ({judged})"
    )
    console.print(f"report   {page}")
    return result


def show(
    config: Config,
    problem: Problem,
    directory: Path,
    params: Params,
    test: np.ndarray,
    key: Key,
    result: dict,
) -> Path:
    """Draw the run's pictures and its page."""
    key_sample, key_path = jax.random.split(key)
    _show_samples(config, problem, params, directory, key_sample)
    if config.num_latents != 1:
        _show_path(config, problem, params, directory, test[:200], key_path)
    metrics = result["metrics"]
    rows = [_with_elbo(row) for row in report.load_metrics(directory / "metrics.jsonl")]
    # A term of next to nothing has a panel of its own noise.
    parts = set(metrics) - {"elbo"}
    names = [name for name in rows[-1] if name in parts and abs(metrics[name]["value"]) > 0.05]
    names = [] if len(names) < 2 else names
    report.training_curves(rows, directory / "curves.png", terms=names)

    of_latents = problem.vae is not None
    unit = "nats per datum" if config.weight == "elbo" else "weighted nats, but for test elbo"
    figures = [
        report.FigureEntry(
            "samples.png",
            f"What the model imagines: {config.sampler} sampling, {config.sample_steps} steps from pure noise.",
        ),
        report.FigureEntry(
            "denoising.png",
            "How a sample comes about, from noise on the left, under its log-SNR: the latent z above, what the network "
            "takes it for below" + (", both decoded." if of_latents else "."),
        ),
        report.FigureEntry(
            "rates.png",
            "Where on the path the nats are spent: the area under the curve is minus the diffusion term.",
        ),
        report.FigureEntry(
            "schedules.png",
            "The schedule beside fixed ones with the same ends, and how much one draw of the diffusion term, at a "
            "random time, varies about its mean under each: the ELBO is the same, its noise is not.",
        ),
        report.FigureEntry("curves.png", f"The objective and its larger terms over training, {unit}."),
    ]
    elbo, terms = metrics["elbo"], {"prior", "reconstruction", "diffusion"}
    tiles = [
        report.Tile(
            "ELBO",
            elbo["value"],
            elbo["std_error"],
            "nats per datum",
            f"{elbo['bound'].removeprefix('ELBO ')}, {elbo['num_data']:,} test images",
        ),
        report.Tile("bits/dim", metrics["bits_per_dim"]["value"], None, "", f"{test[0].size} dimensions"),
    ]
    for name, metric in metrics.items():
        if name.removeprefix("prior_") in terms or name == "entropy":
            is_nothing = abs(metric["value"]) < 0.005
            value, error = ("0.00", None) if is_nothing else (metric["value"], metric["std_error"])
            tiles.append(report.Tile(name.replace("_", " "), value, error, "nats"))
    return report.write_page(
        directory,
        title=f"Diffusion model on {problem.dataset.name}" + (", in a VAE's latents" if of_latents else ""),
        lead="A hierarchy of latents whose posterior is fixed noise: the same ELBO at full depth, at a random time in "
        "training and along the whole path here.",
        headline=tiles,
        figures=[entry for entry in figures if (directory / entry.path).exists()],
        config=dataclasses.asdict(config) | {"run_dir": str(config.run_dir)},
        result=result,
    )


def _with_elbo(row: dict) -> dict:
    """Name the objective of a row as its value on test images is named."""
    return {name: value for name, value in row.items() if name != "objective"} | {"elbo": row["objective"]}


def _show_samples(
    config: Config,
    problem: Problem,
    params: Params,
    directory: Path,
    key: Key,
    *,
    num: int = 100,
    rows: int = 3,
    columns: int = 10,
) -> None:
    denoising, vae = problem.diffusion, problem.vae
    log_snrs = np.asarray(_GRIDS[config.grid](denoising, problem.own(params), config.sample_steps))
    shown = _evenly_noisy(log_snrs, columns)

    def to_unit(x: jax.Array) -> jax.Array:
        return jnp.clip(x / (problem.levels - 1), 0.0, 1.0)

    def view(params: Params, y: jax.Array) -> jax.Array:
        return to_unit(denoising.likelihood.unembed(y) if vae is None else vae.decode(params, y))

    def sample(key: Key, params: Params, _: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        own = problem.own(params)
        y, path = denoising.sample(key, own)
        guesses = jax.vmap(denoising.denoise, in_axes=(None, 0, 0))(own, path[shown], log_snrs[shown])
        views = jax.vmap(view, in_axes=(None, 0))
        x = to_unit(y if vae is None else vae.decode(params, y))
        return x, views(params, path[shown]), views(params, guesses)

    with training.counting("sampling", num) as on_progress:
        images, latents, guesses = evaluate.evaluate(
            sample, key, params, np.arange(num), batch_size=20, on_progress=on_progress
        )
    report.image_grid(images, directory / "samples.png", columns=20)
    report.denoising_rows(latents[:rows], guesses[:rows], log_snrs[shown], directory / "denoising.png")


def _evenly_noisy(log_snrs: np.ndarray, num: int) -> np.ndarray:
    """Choose places of a path, noise first, at even angles of signal to noise: where there is something to see."""
    angles = np.arctan(np.exp(-0.5 * log_snrs.astype(np.float64)))
    wanted = np.linspace(angles[0], angles[-1], num)
    return np.unique(np.abs(angles[:, None] - wanted).argmin(0))[::-1]


def _show_path(
    config: Config, problem: Problem, params: Params, directory: Path, test: np.ndarray, key: Key
) -> None:
    """Draw where on the path the nats are spent and, in continuous time, what that means for schedules."""
    count = num_times(config)
    rates = diffusion.rates(problem.diffusion, count)

    def look(key: Key, params: Params, x: jax.Array) -> diffusion.Rate:
        key_latent, key_rates = jax.random.split(key)
        return rates(key_rates, problem.own(params), problem.latent(key_latent, params, x))

    found = evaluate.evaluate(look, key, params, test, batch_size=50)
    starts = np.arange(0, count, -(-count // 64))
    nats = np.add.reduceat(-found.value / count, starts, axis=1)
    _, edges = _curve(problem.diffusion, problem.own(params), count)
    errors = nats.std(0, ddof=1) / np.sqrt(len(nats)) if len(nats) > 1 else None
    report.rate_curve(edges[[*starts, count]], nats.mean(0), directory / "rates.png", std_errors=errors)
    if config.num_latents is None:
        curves, spreads = {}, {}
        for name in dict.fromkeys((config.schedule, "linear", "cosine")):
            own = problem.own(params)
            own = own if name == config.schedule else own._replace(lam=())
            curves[name] = _curve(
                _diffusion(config, problem.diffusion.shape, problem.dataset, name), own, 1000
            )
            spreads[name] = _spread_under(*curves[name], found)
        report.schedule_comparison(curves, spreads, directory / "schedules.png")


def _curve(denoising: vd.Diffusion, params: Params, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Tabulate a schedule: times [num + 1] and log-SNRs."""
    t = jnp.linspace(0.0, 1.0, num + 1)
    return np.asarray(t), np.asarray(jax.vmap(denoising.log_snr, in_axes=(None, 0))(params, t))


def _spread_under(t: np.ndarray, log_snr: np.ndarray, drawn: diffusion.Rate) -> float:
    """Estimate how much one draw of the diffusion term would spread under another schedule.

        E_q[f^2] = E_p[ (|eps_hat - eps|^2 / 2)^2 / (q p) ],   f = -|eps_hat - eps|^2 / (2 q)

    Args:
        t: [n] times of the other schedule.
        log_snr: [n], its log-SNRs; 1/q is their slope.
        drawn: leaves [N, times], drawn under the model's own.

    Returns:
        The root of the mean variance over data, nats.
    """
    slope = -np.gradient(log_snr.astype(np.float64), t)
    at = np.interp(drawn.log_snr, log_snr[::-1], slope[::-1])
    second = np.mean(np.square(0.5 * drawn.squared_error) * at / drawn.density, axis=1)
    return float(np.sqrt(np.mean(second - np.square(drawn.value.mean(1)))))


if __name__ == "__main__":
    runs.main(run, PRESETS)
