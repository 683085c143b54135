r"""Expectation-maximisation: coordinate ascent on a mixture's ELBO, in closed form.

    E    q_n(z) = p(z | x_n)                              the ELBO becomes log p(x_n) (12.2.3)
    M    N_k = sum_n q_n(k),   p(z = k) = N_k / N,   loc_k = sum_n q_n(k) x_n / N_k
         Sigma_k = (N_k S_k + nu s^2 I) / (N_k + nu),
         S_k = sum_n q_n(k) (x_n - loc_k)(x_n - loc_k)^T / N_k

No step lowers the penalised log-likelihood

    sum_n log p(x_n) - nu/2 sum_k ( log |Sigma_k| + s^2 tr Sigma_k^-1 ),

whose penalty is the logarithm of an inverse-Wishart density, up to a constant: nu pseudo-data of covariance
s^2 I for each covariance matrix. With nu = 0 it is the likelihood, which for matrices of their own is
unbounded: a component may shrink onto one datum.

The M step is the maximum, since as a function of one matrix the expected objective is

    -(N_k + nu)/2 ( log |Sigma| + tr( Sigma^-1 A ) ),      A = (N_k S_k + nu s^2 I) / (N_k + nu),

largest at Sigma = A when Sigma is free. When Sigma is diagonal, only the diagonal of A counts:
sigma_j^2 = A_jj. When ONE Sigma is shared, the penalty counts it once (not C times) and
Sigma = (sum_k N_k S_k + nu s^2 I) / (N + nu).

Source: Dempster, Laird and Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977; Neal
and Hinton, A View of the EM Algorithm that Justifies Incremental, Sparse, and other Variants, 1998 (EM as
ascent on the ELBO); Fraley and Raftery, Bayesian Regularization for Normal Mixture Estimation and
Model-Based Clustering, 2007 (the prior).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from vdiff.models.covariance import component_log_prob
from vdiff.models.gmm import GMM
from vdiff.models.kmeans import kmeans_plus_plus, square_distances
from vdiff.types import Key, Params, check_key

_EMPTY = 1e-20
"""A component that expects fewer data than this is empty: its moments are lost to underflow."""


@partial(jax.jit, static_argnames="model")
def em_step(
    model: GMM,
    params: Params,
    data: Array | np.ndarray,
    *,
    prior_strength: Array | float = 0.0,
    prior_scale: Array | float = 1.0,
) -> Params:
    """Take one E step and one M step (module docstring), compiled; lam and cv are left as they are.

    The penalised log-likelihood does not fall. Where a maximum does not exist, part of the step is left out,
    which keeps that promise: an empty component keeps its location, and with prior_strength = 0 its
    covariance too, at a weight of zero (a log-weight near -87, finite); a covariance that float32 cannot
    tell from a singular one (for `diagonal_covariance` a single variance) stays as it was.

    Memory: [N, C] responsibilities and, one component at a time, [N, dim].

    Args:
        model: a `GMM`.
        params: its parameters.
        data: [N, dim].
        prior_strength: nu, in pseudo-data per covariance matrix, at least 0.
        prior_scale: s, the prior's standard deviation, in units of x, positive.

    Returns:
        The new `Params`.

    Raises:
        ValueError: at trace time, if data are not [N, dim].

    Source: Dempster, Laird and Rubin, 1977; the prior as in Fraley and Raftery, 2007.
    """
    _check_shape(data, params.theta["loc"].shape[1])
    return _step(model, params, data, prior_strength, prior_scale)[1]


def fit_em(
    key: Key,
    model: GMM,
    data: Array | np.ndarray,
    *,
    num_steps: int = 100,
    tolerance: float = 1e-5,
    num_restarts: int = 1,
    prior_strength: float = 0.0,
    prior_scale: float = 1.0,
) -> tuple[Params, np.ndarray]:
    """Fit a mixture by EM from k-means++ starts, and return the best run.

    A run starts at the moments of the clusters around its k-means++ locations and ends when a step gains less
    than `tolerance`; a step that loses, by rounding, is not taken. Everything is one compiled function, made
    once per model and shape of data.

    Args:
        key: a typed key.
        model: a `GMM` without an encoder.
        data: [N, dim], floating point, N >= num_components.
        num_steps: the most steps of a run, at least 1.
        tolerance: nats per datum.
        num_restarts: how many runs, at least 1.
        prior_strength: nu, in pseudo-data per covariance matrix. Above zero the objective is bounded; choose
            it so for dim near N / num_components, or where some dimension of the data is constant.
        prior_scale: s, in units of x.

    Returns:
        `(params, history)`: the fitted parameters, and the penalised log-likelihood in nats per datum before
        each step and after the last, a NumPy array [1 + steps taken] that never falls; its last entry is
        that of `params`.

    Raises:
        ValueError: if the model has an encoder, if the data are unsuitable, or a setting is out of range.

    Source: Dempster, Laird and Rubin, 1977; Arthur and Vassilvitskii, 2007 (the start).
    """
    if model.encoder is not None:
        raise ValueError(
            "model: got a mixture with an encoder, expected one without, as EM uses the exact posterior and "
            "would leave lam untrained; build gmm(..., encoder=None), or train this one by its elbo_terms"
        )
    loc = jax.eval_shape(model.init, check_key(key)).theta["loc"]
    data = _check_data(data, *loc.shape).astype(loc.dtype)
    for name, count in (("num_steps", num_steps), ("num_restarts", num_restarts)):
        if count < 1:
            raise ValueError(f"{name}: got {count}, expected at least 1")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance}, expected nats per datum, 0 or more")
    if not (prior_strength >= 0 and np.isfinite(prior_strength)):
        raise ValueError(f"prior_strength: got {prior_strength}, expected a number of pseudo-data, 0 or more")
    if not (prior_scale > 0 and np.isfinite(prior_scale)):
        raise ValueError(f"prior_scale: got {prior_scale}, expected a positive standard deviation")
    keys = jax.random.split(key, num_restarts)
    params, history, lengths = _run_all(
        keys, data, float(tolerance), float(prior_strength), float(prior_scale), model, num_steps
    )
    lengths = np.asarray(lengths)
    if np.any(lengths == 0):
        raise ValueError(
            "data: got values whose squares overflow or underflow float32, expected a moderate scale; "
            "standardise them"
        )
    history = [np.asarray(run[:length]) for run, length in zip(history, lengths, strict=True)]
    best = int(np.argmax([run[-1] for run in history]))
    return jax.tree.map(lambda leaf: leaf[best], params), history[best]


@partial(jax.jit, static_argnames=("model", "num_steps"))
def _run_all(
    keys: Key,
    data: Array,
    tolerance: Array | float,
    prior_strength: Array | float,
    prior_scale: Array | float,
    model: GMM,
    num_steps: int,
) -> tuple[Params, Array, Array]:
    """Run EM once per key, one after another; the data are an argument, so nothing is baked in."""

    def run(key: Key) -> tuple[Params, Array, Array]:
        start = _start(key, model, data, prior_strength, prior_scale)

        def body(state: tuple) -> tuple:
            length, _, params, proposal, value, history = state
            new_value, next_proposal = _step(model, proposal, data, prior_strength, prior_scale)
            gain = new_value - value
            is_kept = gain >= 0  # False for NaN
            params = jax.tree.map(partial(jnp.where, is_kept), proposal, params)
            history = jnp.where(is_kept, history.at[length].set(new_value), history)
            length = length + is_kept.astype(length.dtype)
            return length, ~(gain >= tolerance), params, next_proposal, new_value, history

        value = jnp.full((), -jnp.inf, data.dtype)
        history = jnp.zeros((num_steps + 1,), data.dtype)
        state = jnp.int32(0), jnp.zeros((), bool), start, start, value, history
        state = jax.lax.while_loop(lambda state: (state[0] <= num_steps) & ~state[1], body, state)
        length, _, params, _, _, history = state
        return params, history, length

    return jax.lax.map(run, keys)


def _start(
    key: Key, model: GMM, data: Array, prior_strength: Array | float, prior_scale: Array | float
) -> Params:
    """Assign every datum to the nearest of C k-means++ locations and take those clusters' moments."""
    key_init, key_loc = jax.random.split(key)
    params = model.init(key_init)
    loc = kmeans_plus_plus(key_loc, data, params.theta["loc"].shape[0])
    # What a cluster too small for a covariance of its own keeps: the data's variance, the same in all
    # directions, as the M step itself makes it from one empty cluster and a prior of that scale.
    variance = jnp.mean(jnp.var(data, axis=0))
    spread = jnp.sqrt(jnp.where(variance > 0, variance, 1.0))
    params = params._replace(theta=params.theta | {"loc": loc})
    none = jnp.zeros((loc.shape[0], data.shape[0]), data.dtype)
    params = _maximize(model, params, data, none, 1.0, spread)
    nearest = jnp.argmin(jax.lax.map(partial(square_distances, data), loc), axis=0)
    hard = jax.nn.one_hot(nearest, loc.shape[0], dtype=data.dtype, axis=0)
    return _maximize(model, params, data, hard, prior_strength, prior_scale)


def _step(
    model: GMM, params: Params, data: Array, prior_strength: Array | float, prior_scale: Array | float
) -> tuple[Float[Array, ""], Params]:
    """Return the penalised log-likelihood in nats per datum AT params, and the params after one step."""
    theta, num_data = params.theta, data.shape[0]

    # One component at a time: [N, dim] in memory, never [N, C, dim].
    def log_likelihood(z: Array) -> Float[Array, " N"]:
        return jax.vmap(lambda x: component_log_prob(model.covariance, theta, z, x))(data)

    components = jnp.arange(theta["loc"].shape[0], dtype=jnp.int32)
    log_prior = jax.nn.log_softmax(params.phi["logits"])
    log_joint = log_prior[:, None] + jax.lax.map(log_likelihood, components)
    log_prob = logsumexp(log_joint, axis=0)
    penalty = prior_strength / num_data * model.covariance.log_prior(theta, prior_scale)
    responsibility = jnp.exp(log_joint - log_prob[None, :])
    new = _maximize(model, params, data, responsibility, prior_strength, prior_scale)
    return jnp.mean(log_prob) + penalty, new


def _maximize(
    model: GMM,
    params: Params,
    data: Float[Array, "N dim"],
    responsibility: Float[Array, "C N"],
    prior_strength: Array | float,
    prior_scale: Array | float,
) -> Params:
    """Take the M step for given responsibilities; a component without data keeps its location."""

    def moments(args: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        loc_old, weight = args
        count = jnp.sum(weight)
        is_empty = count <= _EMPTY
        mean = jnp.matmul(weight / jnp.where(is_empty, 1.0, count), data, precision=Precision.HIGHEST)
        loc = jnp.where(is_empty, loc_old, mean)
        return jnp.where(is_empty, 0.0, count), loc, model.covariance.scatter(data - loc[None, :], weight)

    counts, loc, scatters = jax.lax.map(moments, (params.theta["loc"], responsibility))
    theta = params.theta | {"loc": loc}
    theta = theta | model.covariance.maximize(theta, counts, scatters, prior_strength, prior_scale)
    weights = jnp.maximum(counts / data.shape[0], jnp.finfo(data.dtype).tiny)
    return params._replace(theta=theta, phi={"logits": jnp.log(weights)})


def _check_shape(data: Array | np.ndarray, dim: int) -> None:
    if np.ndim(data) != 2 or np.shape(data)[1] != dim:
        raise ValueError(
            f"data: got shape {list(np.shape(data))}, expected [N, {dim}]; stack one flat vector per datum "
            "on axis 0, as data.reshape(len(data), -1) does"
        )


def _check_data(data: Array | np.ndarray, num_components: int, dim: int) -> Array:
    _check_shape(data, dim)
    if data.shape[0] < num_components:
        raise ValueError(
            f"data: got {data.shape[0]} rows, expected at least num_components = {num_components}; give more "
            "data or build a smaller mixture"
        )
    if not jnp.issubdtype(data.dtype, jnp.floating):
        raise ValueError(
            f"data: got dtype {data.dtype}, expected floating point; dequantise integer levels, on which a "
            "density is unbounded, or convert them as they are by data.astype('float32')"
        )
    data = jnp.asarray(data)
    num_bad = int(jnp.sum(~jnp.isfinite(data)))
    if num_bad:
        raise ValueError(
            f"data: got {num_bad} entries NaN or infinite, expected none; drop those rows or fill them in"
        )
    return data
