"""Measure how biased contrastive divergence is, where the likelihood's gradient is a sum.

python -m experiments.contrastive
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

import vdiff as vd
from experiments import runs
from vdiff import baselines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure how biased contrastive divergence is, where the likelihood's gradient is a sum."""

    num_sweeps: tuple[int, ...] = (1, 2, 5, 10, 25)
    """The lengths k of the chains that start at the data."""
    train_steps: tuple[int, ...] = (0, 100, 1000, 5000)
    """After how many steps of exact likelihood training the bias is measured."""
    num_visible: int = 6
    """Visible bits."""
    num_hidden: int = 4
    """Hidden bits."""
    seed: int = 0
    """Of the machine's start, and of the law of the data: a random one over all states."""


def bits(num_units: int) -> np.ndarray:
    """List all states of so many bits, [2^n, n]."""
    return (np.arange(2**num_units)[:, None] >> np.arange(num_units)) & 1


def transition_matrix(model: baselines.RBM, params: vd.Params) -> np.ndarray:
    """Compute T[x, x'] = sum_h p(h | x) p(x' | h), [2^n, 2^n], of a machine of vectors."""

    def table(logits: jax.Array, states: np.ndarray) -> np.ndarray:
        p = jax.nn.sigmoid(np.asarray(logits, np.float64))[:, None, :]
        return np.prod(np.where(states[None] == 1, p, 1 - p), axis=-1)

    x, h = bits(model.shape[0]), bits(model.num_hidden)
    of_h = jax.vmap(model.hidden_logits, in_axes=(None, 0))(params, jnp.asarray(x))
    of_x = jax.vmap(model.visible_logits, in_axes=(None, 0))(params, jnp.asarray(h))
    return table(of_h, h) @ table(of_x, x)


def biases(
    model: baselines.RBM, params: vd.Params, data_law: np.ndarray, num_sweeps: tuple[int, ...]
) -> dict[int, tuple[float, float]]:
    """Compare the expected CD-k gradient with the likelihood's, both over a law of the data and exact.

    Args:
        model: a machine of vectors of few bits.
        params: where.
        data_law: [2^n], the probability of each state.
        num_sweeps: the lengths k.

    Returns:
        k -> (|difference| / |likelihood's gradient|, cosine between the two).
    """
    x = jnp.asarray(bits(model.shape[0]))
    of_states = jax.jit(jax.vmap(jax.grad(model.free_energy), in_axes=(None, 0)))(params, x)
    leaves = [np.asarray(leaf, np.float64).reshape(len(x), -1) for leaf in jax.tree.leaves(of_states)]
    gradients = np.concatenate(leaves, axis=1)
    free_energy = np.asarray(jax.vmap(model.free_energy, in_axes=(None, 0))(params, x), np.float64)
    law = np.exp(free_energy.min() - free_energy)
    likelihood = (law / law.sum() - data_law) @ gradients
    transition, found = transition_matrix(model, params), {}
    for k in num_sweeps:
        contrastive = (data_law @ np.linalg.matrix_power(transition, k) - data_law) @ gradients
        norms = np.linalg.norm(contrastive), np.linalg.norm(likelihood)
        off = np.linalg.norm(contrastive - likelihood) / norms[1]
        found[k] = (float(off), float(contrastive @ likelihood / (norms[0] * norms[1])))
    return found


def run(config: Config) -> dict[int, dict[int, tuple[float, float]]]:
    """Train a machine by its exact likelihood, print the bias along the way; returns step -> k -> (bias, cosine)."""
    model = baselines.rbm((config.num_visible,), config.num_hidden, init_scale=0.1)
    log_z = baselines.exact_log_partition(model)
    x = jnp.asarray(bits(config.num_visible))
    data_law = np.random.default_rng(config.seed).dirichlet(np.full(len(x), 0.1))
    weights = jnp.asarray(data_law, jnp.float32)

    def log_likelihood(params: vd.Params) -> jax.Array:
        return -weights @ jax.vmap(model.free_energy, in_axes=(None, 0))(params, x) - log_z(params)

    optimizer = optax.adam(1e-2)

    @jax.jit
    def climb(state: tuple, num_steps: int) -> tuple:
        def step(_: int, state: tuple) -> tuple:
            downhill = jax.tree.map(jnp.negative, jax.grad(log_likelihood)(state[0]))
            # Optax's own arithmetic mixes dtypes.
            with jax.numpy_dtype_promotion("standard"):
                updates, inner = optimizer.update(downhill, state[1])
            return optax.apply_updates(state[0], updates), inner

        return jax.lax.fori_loop(0, num_steps, step, state)

    params = model.init(jax.random.key(config.seed))
    state, found, done = (params, optimizer.init(params)), {}, 0
    title = "share of the likelihood's gradient by which CD-k is off, and the cosine between the two"
    table = Table("steps", "log p(x), nats", *(f"k = {k}" for k in config.num_sweeps), title=title)
    for steps in sorted(config.train_steps):
        state, done = climb(state, steps - done), steps
        found[steps] = biases(model, state[0], data_law, config.num_sweeps)
        cells = (f"{off:.1%}, {cosine:.3f}" for off, cosine in found[steps].values())
        table.add_row(str(steps), f"{float(log_likelihood(state[0])):.3f}", *cells)
    runs.console.print(table)
    return found


if __name__ == "__main__":
    run(tyro.cli(Config))
