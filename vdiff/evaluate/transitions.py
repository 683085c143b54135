r"""Markov transitions that leave a density invariant, by BlackJAX, an optional dependency.

A transition is a function `(key, log_density, z) -> z`: `log_density: z -> []` is in nats and need not be normalised, z
is any pytree of floats, and the law of z, if it is exp(log_density), stays. With g the gradient of log_density and eps,
rho standard normal,

    langevin:   z' = z + h g(z) + sqrt(2 h) eps,            taken or refused by Metropolis and Hastings
    hmc:        (z', rho') = L leapfrog steps of length h from (z, rho), taken with probability
                min(1, exp(log_density(z') - |rho'|^2 / 2 - log_density(z) + |rho|^2 / 2)); else z stays
    nuts:       as many leapfrog steps as it takes the path to turn back, and a draw from that path

`unadjusted_langevin` takes every z': cheap, and the law that it keeps is another one.

Source: Roberts and Tweedie, Exponential Convergence of Langevin Distributions and Their Discrete Approximations, 1996;
Neal, MCMC Using Hamiltonian Dynamics, 2011; Hoffman and Gelman, The No-U-Turn Sampler, 2014; Cabezas et al., BlackJAX:
Composable Bayesian Inference in JAX, 2024.
"""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from vdiff.types import Key, PyTree, check_key, is_discrete

LogDensity = Callable[[PyTree], Array]
"""A function `z -> []`, nats, normalised or not."""

Transition = Callable[[Key, LogDensity, PyTree], PyTree]
"""A function `(key, log_density, z) -> z`, one step of a Markov chain."""


def langevin(step_size: float | Array) -> Transition:
    """Build the Metropolis-adjusted Langevin step (MALA): a step up the gradient and noise, taken or refused.

        z' = z + step_size * grad log_density(z) + sqrt(2 * step_size) * eps

    Args:
        step_size: h, positive, in units of z squared; a number or a traced scalar.

    Returns:
        A `Transition` that leaves exp(log_density) invariant; two gradients a step.

    Raises:
        ImportError: if BlackJAX is missing.
        ValueError: if `step_size` is not positive; at trace time, if `log_density` does not return a scalar.
        TypeError: at trace time, if z has a leaf that is not floating point.
    """
    mala = _blackjax("langevin").mala
    _check_step_size(step_size)
    return _stepping(lambda log_density, z: mala(log_density, step_size))


def unadjusted_langevin(step_size: float | Array) -> Transition:
    """Build the Langevin step without correction (ULA), which keeps exp(log_density) only as `step_size` vanishes.

        z' = z + step_size * grad log_density(z) + sqrt(2 * step_size) * eps

    Instead of N(loc, s^2) it keeps N(loc, s^2 / (1 - step_size / (2 s^2))), and nothing from step_size = 2 s^2 on.
    Annealed importance sampling, which reckons with what stays, needs one of the others.

    Args:
        step_size: h, positive, in units of z squared; a number or a traced scalar.

    Returns:
        A `Transition`; one gradient a step.

    Raises:
        ImportError: if BlackJAX is missing.
        ValueError: if `step_size` is not positive; at trace time, if `log_density` does not return a scalar.
        TypeError: at trace time, if z has a leaf that is not floating point.
    """
    sgld = _blackjax("unadjusted_langevin").sgld
    _check_step_size(step_size)

    def transition(key: Key, log_density: LogDensity, z: PyTree) -> PyTree:
        _check_position(z)
        slope = jax.grad(_checked(log_density))
        return sgld(lambda z, batch: slope(z)).step(check_key(key), z, (), step_size)

    return transition


def hmc(step_size: float | Array, num_integration_steps: int) -> Transition:
    """Build Hamiltonian Monte Carlo: a fresh momentum, L leapfrog steps, and their end taken or refused.

    A path of half a period ends where it began, mirrored, and one of a whole period at its beginning: on N(loc, s^2 I)
    keep step_size * L well off multiples of pi s.

    Args:
        step_size: length of a leapfrog step, positive, in units of z; a number or a traced scalar.
        num_integration_steps: L, at least 1.

    Returns:
        A `Transition` that leaves exp(log_density) invariant; L + 1 gradients a step.

    Raises:
        ImportError: if BlackJAX is missing.
        ValueError: if `step_size` is not positive or `num_integration_steps` less than one; at trace time, if
            `log_density` does not return a scalar.
        TypeError: at trace time, if z has a leaf that is not floating point.
    """
    kernel = _blackjax("hmc").hmc
    _check_step_size(step_size)
    if num_integration_steps < 1:
        raise ValueError(f"num_integration_steps: got {num_integration_steps}, expected at least 1")
    return _stepping(lambda log_density, z: kernel(log_density, step_size, _unit(z), num_integration_steps))


def nuts(step_size: float | Array, max_num_doublings: int = 10) -> Transition:
    """Build the no-U-turn sampler: Hamiltonian Monte Carlo that finds the length of its path by itself.

    Under `vmap` all chains take as many gradients as the one with the longest path.

    Args:
        step_size: length of a leapfrog step, positive, in units of z; a number or a traced scalar.
        max_num_doublings: a path has at most 2 ** max_num_doublings steps, at least 1.

    Returns:
        A `Transition` that leaves exp(log_density) invariant.

    Raises:
        ImportError: if BlackJAX is missing.
        ValueError: if `step_size` is not positive or `max_num_doublings` less than one; at trace time, if
            `log_density` does not return a scalar.
        TypeError: at trace time, if z has a leaf that is not floating point.
    """
    kernel = _blackjax("nuts").nuts
    _check_step_size(step_size)
    if max_num_doublings < 1:
        raise ValueError(f"max_num_doublings: got {max_num_doublings}, expected at least 1")
    return _stepping(
        lambda log_density, z: kernel(log_density, step_size, _unit(z), max_num_doublings=max_num_doublings)
    )


def repeated(transition: Transition, num_steps: int) -> Transition:
    """Build the transition that takes a transition's step `num_steps` times: it leaves invariant what that one does.

    Args:
        transition: `(key, log_density, z) -> z`.
        num_steps: at least 1.

    Returns:
        A `Transition`, one scan.

    Raises:
        ValueError: if `num_steps` is less than one.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected at least 1")

    def steps(key: Key, log_density: LogDensity, z: PyTree) -> PyTree:
        keys = jax.random.split(check_key(key), num_steps)
        return jax.lax.scan(lambda z, key: (transition(key, log_density, z), None), z, keys)[0]

    return steps


def _stepping(algorithm: Callable) -> Transition:
    """Make a transition of one of BlackJAX's algorithms, `(log_density, z) -> SamplingAlgorithm`."""

    def transition(key: Key, log_density: LogDensity, z: PyTree) -> PyTree:
        _check_position(z)
        chain = algorithm(_checked(log_density), z)
        return chain.step(check_key(key), chain.init(z))[0].position

    return transition


def _unit(z: PyTree) -> Array:
    """Give the diagonal of the unit mass matrix: the momentum is N(0, I) over the entries of z."""
    return jnp.ones_like(ravel_pytree(z)[0])


def _checked(log_density: LogDensity) -> LogDensity:
    def checked(z: PyTree) -> Array:
        value = log_density(z)
        if jnp.shape(value) != ():
            raise ValueError(
                f"log_density: got an output of shape {jnp.shape(value)}, expected a scalar; sum over the entries of z"
            )
        return value

    return checked


def _check_position(z: PyTree) -> None:
    if not jax.tree.leaves(z):
        raise ValueError(f"z: got {z!r}, which has no leaf, expected something to move")
    if is_discrete(z):
        dtypes = sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(z)})
        raise TypeError(
            f"z: got leaves of dtype {dtypes}, expected floating point, as the transition follows a gradient; sum the "
            "discrete part out, or give a transition of your own, such as Gibbs sampling"
        )


def _check_step_size(step_size: float | Array) -> None:
    if not isinstance(step_size, jax.core.Tracer) and not step_size > 0:
        raise ValueError(f"step_size: got {step_size}, expected a positive number")


def _blackjax(name: str) -> ModuleType:
    try:
        import blackjax
    except ImportError as error:
        raise ImportError(
            f"{name}: got no blackjax, expected it to be installed; pip install 'vdiff[blackjax]', or give a function "
            "(key, log_density, z) -> z of your own"
        ) from error
    return blackjax
