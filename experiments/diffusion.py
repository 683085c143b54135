"""Train a diffusion model on images, or on a VAE's latents, and judge it in nats by the ELBO over its whole path.

python -m experiments.diffusion digits
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import vdiff as vd
from experiments import diffusion_page, exits, exporting, judging, runs, training
from experiments.diffusion_build import Config, Problem, build, num_times
from vdiff import diffusion, evaluate
from vdiff.diffusion import weights
from vdiff.types import Key, Params, Terms

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
        "an hour of training on two cores: MNIST with 256 grey levels, in bits/dim",
        Config(
            data="mnist",
            log_snr_max=13.3,
            log_snr_min=-8.0,
            width=16,
            depth=3,
            num_steps=10_000,
            batch_size=32,
            warmup_steps=100,
            eval_times=4,
            log_every=50,
            checkpoint_every=500,
        ),
    ),
    "mnist_samples": (
        "an hour of training on two cores: the same data, trained for samples and not for nats",
        Config(
            data="mnist",
            log_snr_max=13.3,
            log_snr_min=-8.0,
            schedule="cosine",
            weight="sigmoid",
            prediction="velocity",
            patch=2,
            width=32,
            depth=3,
            num_steps=7000,
            batch_size=64,
            warmup_steps=100,
            eval_times=32,
            eval_images=1000,
            log_every=50,
            checkpoint_every=500,
        ),
    ),
    "latent": (
        "a minute: a diffusion as the prior of a VAE of the 8x8 digits, trained as one ELBO",
        Config(
            latent_dim=12,
            hidden=(256, 256),
            likelihood="discretized",
            network="mlp",
            width=128,
            depth=3,
            prediction="velocity",
            log_snr_max=6.0,
            num_steps=1000,
            log_every=25,
            checkpoint_every=500,
        ),
    ),
}

_WEIGHTS = {
    "simple": weights.simple,
    "min_snr": weights.min_snr(),
    "edm": weights.edm(),
    "sigmoid": weights.sigmoid(),
}


def objective_of(config: Config, problem: Problem) -> Callable[[Key, Params, jax.Array, jax.Array], Terms]:
    """Choose what is raised: of one stored image, at a time."""
    terms_at = problem.diffusion.elbo_terms_at
    if config.weight != "elbo":
        terms_at = diffusion.weighted_terms(problem.diffusion, _WEIGHTS[config.weight])

    def objective(key: Key, params: Params, x: jax.Array, u: jax.Array) -> Terms:
        return problem.within(lambda key, params, y: terms_at(key, params, y, u))(key, params, x)

    return vd.preprocessed(objective, problem.transform)


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
    with exits.refusing():
        runs.check_settings(config)
        if config.warmup_steps >= config.num_steps:
            raise ValueError(
                f"warmup_steps: got {config.warmup_steps}, expected fewer than the {config.num_steps} steps of the run"
            )
        problem = build(config)
        directory = runs.open_run(config)
    console = runs.console
    # As the VAE experiment splits its seed, so that both are judged on the same binary test images.
    keys = runs.keys_of(config.seed)
    test = problem.dataset.test[: config.eval_images]
    test = training.transformed(problem.transform, keys.test, test)
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
                keys.watch,
                test[:500],
                every=10 * config.log_every,
            ),
        ),
        best="test_elbo",
    )

    began = time.perf_counter()
    sweeps = sweeps_of(problem, num_times(config), config.eval_sweeps)
    with judging.counting("judging", len(test)) as on_progress:
        terms = evaluate.evaluate(sweeps, keys.judge, state.ema, test, batch_size=50, on_progress=on_progress)
    seconds = judging.seconds_since(began, directory)

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
    page = diffusion_page.show(config, problem, directory, state.ema, test, keys.show, result)
    console.print(
        f"ELBO {nats.mean:.2f} +- {nats.std_error:.2f} nats on {nats.num_data} test images ({judged})"
    )
    export(config, problem, directory, state, test[0])
    console.print(f"report   {page}")
    return result


def export(config: Config, problem: Problem, directory: Path, state: vd.TrainState, x: np.ndarray) -> None:
    """Export the model with the sampler that was asked for, and of one in latents its VAE."""
    vae = problem.vae
    exporting.export_functions(
        config,
        directory,
        state,
        x=x,
        z=jax.ShapeDtypeStruct((config.latent_dim or 1,), np.float32),
        elbo_estimate=problem.model.elbo_estimate,
        sample=problem.model.sample,
        encode=None if vae is None else vae.encode,
        decode=None if vae is None else vae.decode,
    )


if __name__ == "__main__":
    exits.main(run, PRESETS)
