"""The pictures and the page of `experiments.diffusion`."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd
from experiments import judging
from experiments.diffusion_build import GRIDS, Config, Problem, diffusion_of, num_times
from vdiff import diffusion, evaluate, report
from vdiff.types import Key, Params


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
    rows = report.load_metrics(directory / "metrics.jsonl")
    # A term of next to nothing has a panel of its own noise.
    parts = set(metrics) - {"elbo"}
    names = [name for name in rows[-1] if name in parts and abs(metrics[name]["value"]) > 0.05]
    names = [] if len(names) < 2 else names
    titles = list(_titled(dict.fromkeys(names)))
    report.training_curves([_titled(row) for row in rows], directory / "curves.png", terms=titles)

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


def _titled(row: dict) -> dict:
    """Name the objective of a row as its value on test images is named, and the terms of a prior so that they fit."""
    names = {"objective": "elbo", "prior_reconstruction": "p(z) end", "prior_diffusion": "p(z) diffusion"}
    return {names.get(name, name): value for name, value in row.items()}


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
    log_snrs = np.asarray(GRIDS[config.grid](denoising, problem.own(params), config.sample_steps))
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

    with judging.counting("sampling", num) as on_progress:
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
    count = max(count, 64) if config.num_latents is None else count
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
                diffusion_of(config, problem.diffusion.shape, problem.dataset, name), own, 1000
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
