r"""Contrastive divergence: raise the data's unnormalised probability above that of what a short chain makes of them.

    d/dtheta log p(x) = - d/dtheta F(x) + E_{x' ~ p} d/dtheta F(x')                     needs a draw of the model
    value     F(x_k) - F(x)                        x_k the end of a chain of k sweeps
    gradient  d/dtheta F(x_k) - d/dtheta F(x)      x_k stopped: the chain's own dependence on theta is left out

The chain starts at the datum (CD-k), which is biased at every k, less so as k grows; or where it stood at the last
step (persistent CD), which is right in the limit of small steps. **The value is no bound**: a difference of free
energies, in nats of unnormalised probability, is near zero where the chain finds nothing more likely than the data,
good model or bad.

Source: Hinton, Training Products of Experts by Minimizing Contrastive Divergence, 2002; Tieleman, Training Restricted
Boltzmann Machines using Approximations to the Likelihood Gradient, 2008.
"""

from collections.abc import Callable

from jax.lax import stop_gradient
from jaxtyping import Array

from vdiff.baselines.rbm import RBM, gibbs
from vdiff.types import Key, Objective, Params, Terms

PersistentObjective = Callable[[Key, Params, Array, Array], tuple[Terms, Array]]
"""`(key, params, x, chain) -> (Terms, chain)`: what `batching=persistent` lifts to a batch."""


def contrastive_divergence(model: RBM, num_steps: int) -> Objective:
    """Build CD-k: the free-energy difference between a datum and the end of a chain that starts there.

    Args:
        model: an `RBM`.
        num_steps: k, the length of the chain.

    Returns:
        `(key, params, x) -> {"free_energy_difference": F(x_k) - F(x)}`, larger is better while training, in nats of
        unnormalised probability: not a bound on log p(x). Its gradient is that of the difference with x_k stopped.

    Raises:
        ValueError: if `num_steps` is less than one.
    """
    chain = gibbs(model, num_steps)

    def objective(key: Key, params: Params, x: Array) -> Terms:
        return _difference(model, params, x, chain(key, stop_gradient(params), x))

    return objective


def persistent_contrastive_divergence(model: RBM, num_steps: int) -> PersistentObjective:
    """Build persistent CD: chains that go on where they were at the last step, one for each position of a batch.

        step = vd.make_train_step(persistent_contrastive_divergence(model, 1), optimizer, batching=vd.persistent)
        state = vd.init_state(key, model, optimizer, aux=x)      # x [B, ...]: the chains start at a batch of data

    Args:
        model: an `RBM`.
        num_steps: by how many sweeps a chain goes on in a step.

    Returns:
        `(key, params, x, chain) -> (Terms, chain)`, the terms those of `contrastive_divergence`.

    Raises:
        ValueError: if `num_steps` is less than one.
    """
    go_on = gibbs(model, num_steps)

    def objective(key: Key, params: Params, x: Array, chain: Array) -> tuple[Terms, Array]:
        chain = go_on(key, stop_gradient(params), chain)
        return _difference(model, params, x, chain), chain

    return objective


def _difference(model: RBM, params: Params, x: Array, negative: Array) -> Terms:
    negative = stop_gradient(negative)
    return {"free_energy_difference": model.free_energy(params, negative) - model.free_energy(params, x)}
