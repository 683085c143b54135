"""An experiment of seconds, for tests that kill it: `python -m tests.tiny_run tiny --run-dir D`."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd
from experiments import exits, runs, training

SIZE = 3
IMAGES = np.random.default_rng(7).normal(size=(64, SIZE)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(runs.RunConfig):
    num_steps: int = 40
    batch_size: int = 8
    learning_rate: float = 1e-2
    log_every: int = 1
    checkpoint_every: int = 5
    width: int = 4
    pause: float = 0.0
    """Seconds by which a step is made longer; each step also leaves a byte beside the run directory."""


def build(width):
    """A linear-Gaussian model with a latent of `width` numbers and q a Gaussian around a linear map."""

    def init(key):
        return vd.Params(theta=jax.random.normal(key, (width, SIZE)), lam=jnp.zeros((SIZE, width)))

    def log_joint(params, x, z):
        return -0.5 * (jnp.sum(z**2) + jnp.sum((x - z @ params.theta) ** 2))

    def log_q(params, x, z):
        return -0.5 * jnp.sum((z - x @ params.lam) ** 2)

    def sample_q(key, params, x):
        return x @ params.lam + jax.random.normal(key, (width,))

    return vd.Model(init, log_joint, log_q, sample_q, sample=None)


def run(config):
    """Train and write `result.json`, nothing more."""
    with exits.refusing():
        runs.check_settings(dataclasses.replace(config, pause=1))
        directory = runs.open_run(config)
    model = build(config.width)
    score = vd.Hook(1, lambda step, state, metrics: {"score": metrics["objective"]})

    def beat(step, state, metrics):
        with directory.with_suffix(".beats").open("ab") as file:
            file.write(b".")
        time.sleep(config.pause)

    objective = vd.pathwise(model)
    state = training.train(
        config, directory, model, objective, IMAGES, hooks=(score, vd.Hook(1, beat)), best="score"
    )
    runs.write_result(directory, {}, state.params, {})


PRESETS = {"tiny": ("seconds", Config())}

if __name__ == "__main__":
    exits.main(run, PRESETS)
