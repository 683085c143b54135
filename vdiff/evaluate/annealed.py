r"""The log-likelihood by annealed importance sampling: from q(z | x) to the posterior, in steps.

    log pi_t(z) = (1 - b_t) log q(z | x) + b_t log p(x, z),      0 = b_0 < b_1 < ... < b_T = 1
    forward:    z_0 ~ q(z | x);    z_t from z_{t-1} by a transition that leaves pi_t invariant,    t = 1..T-1
    log w = sum_{t=1}^{T} (b_t - b_{t-1}) (log p(x, z_{t-1}) - log q(z_{t-1} | x)),                  E w = p(x)

The logarithm of the mean of w over chains is in expectation a lower bound on log p(x); with T = 1 it is importance
sampling. Run backwards from a draw of the posterior, by transitions in detailed balance, the sum gives an upper one:

    reverse:    z_{T-1} ~ p(z | x);    z_{t-1} from z_t by the transition of pi_t,    t = T-1..1,     E 1/w = 1/p(x)

Only simulated data come with a draw of the posterior: if (x, z) ~ p(x, z), then z ~ p(z | x). There both bounds
enclose log p(x), in the mean over data, and show how far annealing is from the truth (bidirectional Monte Carlo).

Source: Neal, Annealed Importance Sampling, 2001; Grosse, Ghahramani and Adams, Sandwiching the Marginal Likelihood
Using Bidirectional Monte Carlo, 2015; Wu, Burda, Salakhutdinov and Grosse, On the Quantitative Analysis of
Decoder-Based Generative Models, 2017.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vdiff.evaluate.dataset import Summary, summarize
from vdiff.evaluate.spread import Spread, in_units
from vdiff.evaluate.transitions import Transition
from vdiff.evaluate.weights import add_weights, log_prob_of, no_weights
from vdiff.types import Distribution, Key, LogProb, ModelLike, Params, PyTree, check_key, q_at

Temperatures = Callable[[int], np.ndarray]
"""A function `T -> b_0..b_T`, [T + 1], from 0 up to 1."""


class Bracket(NamedTuple):
    """Hold both bounds on log p(x) of simulated data, nats.

    Attributes:
        lower: by annealing from q to the posterior.
        upper: by annealing back from the z that x was made of.
    """

    lower: LogProb
    upper: LogProb


class Sandwich(NamedTuple):
    """Hold what encloses the mean of log p(x) over simulated data, nats.

    Attributes:
        lower: mean of the lower bounds.
        upper: mean of the upper bounds.
        gap: mean of their differences: at most so far, in the mean, is either of them from the truth.
    """

    lower: Summary
    upper: Summary
    gap: Summary


def linear_temperatures(num_steps: int) -> np.ndarray:
    """Space the inverse temperatures evenly: b_t = t / T."""
    return np.linspace(0.0, 1.0, num_steps + 1)


def sigmoidal_temperatures(num_steps: int, steepness: float = 4.0) -> np.ndarray:
    """Space the inverse temperatures closely at both ends, where the density changes most.

        b_t = (s_t - s_0) / (s_T - s_0),    s_t = sigmoid(steepness (2 t / T - 1))

    Source: Grosse, Ghahramani and Adams, 2015, 6.2.
    """
    s = 1.0 / (1.0 + np.exp(-steepness * np.linspace(-1.0, 1.0, num_steps + 1)))
    return (s - s[0]) / (s[-1] - s[0])


def annealed_log_prob(
    model: ModelLike,
    transition: Transition,
    num_steps: int,
    *,
    num_chains: int = 1,
    temperatures: Temperatures = sigmoidal_temperatures,
    units: Spread | None = None,
) -> Callable[[Key, Params, PyTree], LogProb]:
    """Build the estimate of log p(x) by annealed importance sampling.

    Chains start from the model's q. Exchange it to start elsewhere: `model._replace(sample_q=..., log_q=...)`.

    Args:
        model: any `Model`; z is what the transition can move.
        transition: `(key, log_density, z) -> z`, leaving exp(log_density) invariant, e.g. `hmc(0.1, 10)`.
        num_steps: T; the chain makes T - 1 transitions.
        num_chains: K independent chains, all at once in memory.
        temperatures: `T -> b_0..b_T`: `sigmoidal_temperatures`, `linear_temperatures` or your own.
        units: `(params, x) -> s`, like z, e.g. `spread_of_q(model, key)`: the transition moves z / s, so that one step
            size serves all of z. Without it, z itself.

    Returns:
        `(key, params, x) -> LogProb` of one datum, nats: value is the logarithm of the chains' mean weight, in
        expectation a lower bound; std_error, ess and k_hat are those of K weights, as in `importance_log_prob`.

    Raises:
        ValueError: if `num_steps` or `num_chains` is less than one, or the temperatures do not rise from 0 to 1; at
            trace time, if `units` are not like z.

    Source: Neal, 2001.
    """
    path, moves = _path(temperatures, num_steps, num_chains), in_units(transition, units)

    def log_prob(key: Key, params: Params, x: PyTree) -> LogProb:
        keys, q = jax.random.split(check_key(key), num_chains), q_at(model, params, x)
        return _mean_weight(_log_weights(model, q, moves(params, x), path, keys, params, x, q.sample))

    return log_prob


def reverse_annealed_log_prob(
    model: ModelLike,
    transition: Transition,
    num_steps: int,
    *,
    num_chains: int = 1,
    temperatures: Temperatures = sigmoidal_temperatures,
    units: Spread | None = None,
) -> Callable[[Key, Params, PyTree, PyTree], LogProb]:
    """Build the upper bound on log p(x) of simulated data, by annealing backwards from the z that x was made of.

    Args:
        model: as in `annealed_log_prob`.
        transition: as there, and in detailed balance with exp(log_density), as `hmc`, `langevin` and `nuts` are.
        num_steps: T; the chain makes T - 1 transitions.
        num_chains: K chains, all from the same z.
        temperatures: as in `annealed_log_prob`.
        units: as there.

    Returns:
        `(key, params, x, z) -> LogProb` of one datum, nats, for (x, z) ~ `model.sample`: value is minus the logarithm
        of the mean of 1/w, in expectation an upper bound. std_error, ess and k_hat are those of the chains' 1/w; that z
        is one draw is not in them, and shows in the spread over data alone.

    Raises:
        ValueError: as `annealed_log_prob` does.

    Source: Grosse, Ghahramani and Adams, 2015.
    """
    path, moves = _path(temperatures, num_steps, num_chains).back(), in_units(transition, units)

    def log_prob(key: Key, params: Params, x: PyTree, z: PyTree) -> LogProb:
        keys, q = jax.random.split(check_key(key), num_chains), q_at(model, params, x)
        log_w = _log_weights(model, q, moves(params, x), path, keys, params, x, lambda key: z)
        inverse = _mean_weight(-log_w)
        return inverse._replace(value=-inverse.value)

    return log_prob


def bdmc(
    model: ModelLike,
    transition: Transition,
    num_steps: int,
    *,
    num_chains: int = 1,
    temperatures: Temperatures = sigmoidal_temperatures,
    units: Spread | None = None,
) -> Callable[[Key, Params], Bracket]:
    """Build bidirectional Monte Carlo: simulate a datum and bound its log p(x) from both sides.

        brackets = jax.jit(jax.vmap(bdmc(model, transition, 1000), in_axes=(0, None)))(keys, params)
        print(sandwich(brackets).gap)

    Args:
        model: any `Model` with `sample`.
        transition: as in `reverse_annealed_log_prob`.
        num_steps: T.
        num_chains: K, each way.
        temperatures: as in `annealed_log_prob`.
        units: as there.

    Returns:
        `(key, params) -> Bracket` of one simulated datum, nats.

    Raises:
        ValueError: as `annealed_log_prob` does.

    Source: Grosse, Ghahramani and Adams, 2015.
    """
    settings = {"num_chains": num_chains, "temperatures": temperatures, "units": units}
    forward = annealed_log_prob(model, transition, num_steps, **settings)
    reverse = reverse_annealed_log_prob(model, transition, num_steps, **settings)

    def bracket(key: Key, params: Params) -> Bracket:
        key_data, key_forward, key_reverse = jax.random.split(check_key(key), 3)
        x, z = model.sample(key_data, params)
        return Bracket(forward(key_forward, params, x), reverse(key_reverse, params, x, z))

    return bracket


def sandwich(bracket: Bracket) -> Sandwich:
    """Average brackets, leaves [N], over simulated data: in expectation lower.mean <= E log p(x) <= upper.mean."""
    lower, upper = (np.asarray(bound.value, np.float64) for bound in bracket)
    return Sandwich(summarize(lower), summarize(upper), summarize(upper - lower))


class _Path(NamedTuple):
    """Hold a path of densities in the order in which a chain goes along it.

    Attributes:
        moves: [T - 1], the inverse temperatures of the transitions.
        rises: [T], by how much the inverse temperature changes where the chain starts and after each transition.
    """

    moves: np.ndarray
    rises: np.ndarray

    def back(self) -> "_Path":
        return _Path(self.moves[::-1], self.rises[::-1])


def _path(temperatures: Temperatures, num_steps: int, num_chains: int) -> _Path:
    for name, got in (("num_steps", num_steps), ("num_chains", num_chains)):
        if got < 1:
            raise ValueError(f"{name}: got {got}, expected at least 1")
    b = np.asarray(temperatures(num_steps), np.float64)
    if b.shape != (num_steps + 1,) or b[0] != 0 or b[-1] != 1 or not np.all(np.diff(b) >= 0):
        raise ValueError(
            f"temperatures: got {np.array2string(b, threshold=6)}, expected {num_steps + 1} numbers that rise from 0 "
            "to 1; give a function (num_steps) -> [num_steps + 1]"
        )
    return _Path(b[1:-1].astype(np.float32), np.diff(b).astype(np.float32))


def _log_weights(
    model: ModelLike,
    q: Distribution,
    transition: Transition,
    path: _Path,
    keys: Key,
    params: Params,
    x: PyTree,
    starts: Callable[[Key], PyTree],
) -> Array:
    """Run a chain for each key from `starts` of it, and return the logarithms of their weights, [K]."""

    def slope(z: PyTree) -> Array:
        return model.log_joint(params, x, z) - q.log_prob(z)

    def log_weight(key: Key) -> Array:
        key_start, key_moves = jax.random.split(key)
        z = starts(key_start)
        first = slope(z)
        # The rises add up to one: summed are differences to the first slope, which are small, in float32.
        anchor = jnp.where(jnp.isfinite(first), first, 0.0)

        def step(carry: tuple[PyTree, Array], at: tuple[Array, ...]) -> tuple[tuple[PyTree, Array], None]:
            (z, log_w), (t, b, rise) = carry, at

            def log_density(z: PyTree) -> Array:
                return (1.0 - b) * q.log_prob(z) + b * model.log_joint(params, x, z)

            z = transition(jax.random.fold_in(key_moves, t), log_density, z)
            return (z, log_w + rise * (slope(z) - anchor)), None

        along = (np.arange(len(path.moves)), path.moves, path.rises[1:])
        start = (z, anchor + path.rises[0] * (first - anchor))
        return jax.lax.scan(step, start, jax.tree.map(jnp.asarray, along))[0][1]

    return jax.vmap(log_weight)(keys)


def _mean_weight(log_weights: Array) -> LogProb:
    return log_prob_of(add_weights(no_weights(len(log_weights)), log_weights), len(log_weights))
