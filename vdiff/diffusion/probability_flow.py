r"""A diffusion model as a deterministic flow: its density by the change of variables, its latent code.

    dz / dl = 1/2 (alpha x_hat(z) - alpha^2 z),   l the log-SNR,  x_hat = denoise(z, l)

has at every log-SNR the marginal law of the noised data, when x_hat is E[x | z]. From l_0, the model's log-SNR at
t = 0, to l_1, that at t = 1, and for an embedded datum y of d dimensions,

    z_0 = alpha_0 y,    log p(y) = log N(z_1; 0, I) + int_{l_0}^{l_1} div(dz / dl) dl + d log alpha_0

This is a density: it integrates to one over y for any denoiser, up to the error of the solver. It is that of the
flow's own model, z_1 ~ N(0, I), which differs from the law of the data at the two ends, even for a perfect denoiser:

    at t = 0    y stands where y + (sigma_0 / alpha_0) eps should: the density is that of slightly blurred data
    at t = 1    N(0, I) stands where the law of alpha_1 y + sigma_1 eps should

`end_gaps` says what either costs. The path is followed in u, l = centre + width sinh(u): short steps where the signal
drowns, long ones at the quiet ends.

Source: Song et al., Score-Based Generative Modeling through Stochastic Differential Equations, 2021, D.2; Kingma et
al., Variational Diffusion Models, 2021 (log-SNR); Chen et al., Neural Ordinary Differential Equations, 2018 (the
log-determinant).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vdiff.densities import normal_entropy, standard_normal_log_prob
from vdiff.diffusion.divergence import Divergence, exact_divergence
from vdiff.diffusion.forward import alpha, forward_marginal
from vdiff.diffusion.model import Diffusion
from vdiff.diffusion.runge_kutta import Solver, fixed_grid
from vdiff.diffusion.warp import Warp, sinh_warp
from vdiff.types import Key, Objective, Params, PyTree, Terms, check_key


def ode_log_prob(
    diffusion: Diffusion,
    *,
    solver: Solver | None = None,
    divergence: Divergence | None = None,
    warp: Warp | None = None,
) -> Callable[[Key, Params, Array], Float[Array, ""]]:
    """Evaluate the density of an embedded datum through the probability-flow differential equation.

        log p(y) = log N(z_1; 0, I) + int_{l_0}^{l_1} div(dz / dl) dl + d/2 log sigmoid(l_0),   z_0 = alpha_0 y

    Args:
        diffusion: whose `denoise` and ends of log-SNR are read.
        solver: `fixed_grid(7)` when left out, 77 calls of the denoiser; `adaptive()` for single data and hard flows.
        divergence: `exact_divergence()` when left out, one tangent per dimension at every call; `hutchinson(n)`.
        warp: the variable in which the solver's steps are even, `sinh_warp()` when left out.

    Returns:
        `(key, params, y) -> []` of one datum, nats, a density per unit of y; y is where noise is added, a float array
        [*shape]: real data as they are (`gaussian`), integers through `dequantized_log_prob`, or as
        `diffusion.likelihood.embed(x)`. The key is read by random probes alone. Differentiable in params and y.

    Raises:
        TypeError: at trace time, if y holds integers, or the key is no typed key.
        ValueError: at trace time, if y has another shape than the model.

    Source: Song et al., 2021, D.2; see the module for what the two ends leave out.
    """
    log_prob_of_z = _log_prob_at_start(diffusion, solver, divergence, warp)

    def log_prob(key: Key, params: Params, y: Array) -> Float[Array, ""]:
        check_key(key)
        _check_datum("x", y, diffusion.shape)
        first, last = _ends(diffusion, params, y.dtype)
        log_det = 0.5 * y.size * log_sigmoid(first)
        return log_prob_of_z(key, params, alpha(first) * y, first, last) + log_det

    return log_prob


def ode_elbo_terms(
    diffusion: Diffusion,
    *,
    solver: Solver | None = None,
    divergence: Divergence | None = None,
    warp: Warp | None = None,
) -> Objective:
    """Bound log p(x) with the flow as the prior of z_0: the start of the path with its noise, not without.

        log p(x) >= E_{q(z_0 | x)} [ log p(x | z_0) + log p_flow(z_0) ] + H(q),   q(z_0 | x) = N(alpha_0 y, sigma_0^2 I)

    For integers too, through the model's own p(x | z_0): no dequantisation, and nothing is lost at t = 0.

    Args:
        diffusion: the model; its likelihood is read as well.
        solver: see `ode_log_prob`.
        divergence: see `ode_log_prob`.
        warp: see `ode_log_prob`.

    Returns:
        An objective `(key, params, x) -> {"reconstruction", "flow", "entropy"}` with one draw of z_0, nats; its
        gradient is the pathwise one.

    Raises:
        ValueError: at trace time, if the embedded datum has another shape than the model.

    Source: Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, 2021; Zheng et al., 2023.
    """
    log_prob_of_z = _log_prob_at_start(diffusion, solver, divergence, warp)

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        key_z, key_probes = jax.random.split(check_key(key))
        y = diffusion.likelihood.embed(x)
        _check_datum("x", y, diffusion.shape)
        first, last = _ends(diffusion, params, y.dtype)
        z, _ = forward_marginal(key_z, y, first)
        x_hat = diffusion.denoise(params, z, first)
        log_scale = jnp.broadcast_to(0.5 * log_sigmoid(-first), y.shape)
        return {
            "reconstruction": diffusion.likelihood.log_prob(params.theta["likelihood"], x, x_hat, z, first),
            "flow": log_prob_of_z(key_probes, params, z, first, last),
            "entropy": jnp.sum(normal_entropy(log_scale)),
        }

    return objective


def flow_encode(
    diffusion: Diffusion, *, solver: Solver | None = None, warp: Warp | None = None
) -> Callable[[Params, Array], Array]:
    """Carry an embedded datum along the flow to its code z_1, about a standard normal; nothing is random.

    Args:
        diffusion: the model.
        solver: see `ode_log_prob`; the denoiser is called as often, without tangents.
        warp: see `ode_log_prob`.

    Returns:
        `(params, y) -> z`, both [*shape].

    Raises:
        TypeError: at trace time, if y holds integers.
        ValueError: at trace time, if y has another shape than the model.
    """
    follow = _follow(diffusion, solver, warp)

    def encode(params: Params, y: Array) -> Array:
        _check_datum("x", y, diffusion.shape)
        first, last = _ends(diffusion, params, y.dtype)
        return follow(params, alpha(first) * y, first, last)

    return encode


def flow_decode(
    diffusion: Diffusion, *, solver: Solver | None = None, warp: Warp | None = None
) -> Callable[[Params, Array], Array]:
    """Carry a code z_1 back along the flow to its datum: the inverse of `flow_encode`.

    Args:
        diffusion: the model.
        solver: see `ode_log_prob`.
        warp: see `ode_log_prob`.

    Returns:
        `(params, z) -> y`, both [*shape]; `diffusion.likelihood.unembed(y)` is in the data's units.

    Raises:
        TypeError: at trace time, if z holds integers.
        ValueError: at trace time, if z has another shape than the model.
    """
    follow = _follow(diffusion, solver, warp)

    def decode(params: Params, z: Array) -> Array:
        _check_datum("z", z, diffusion.shape)
        first, last = _ends(diffusion, params, z.dtype)
        return follow(params, z, last, first) / alpha(first)

    return decode


def _log_prob_at_start(
    diffusion: Diffusion, solver: Solver | None, divergence: Divergence | None, warp: Warp | None
) -> Callable[[Key, Params, Array, Array, Array], Array]:
    """Return `(key, params, z_0, first, last) -> log p(z_0)`, a density per unit of z_0."""
    solver, warp = solver or fixed_grid(), warp or sinh_warp()
    divergence = divergence or exact_divergence()

    def log_prob(key: Key, params: Params, z: Array, first: Array, last: Array) -> Array:
        traced = divergence(key, z.shape)

        def field(u: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            log_snr, slope = jax.value_and_grad(warp.log_snr)(u)
            velocity, div = traced(_velocity(diffusion, params, log_snr), state[0])
            return slope * velocity, slope * div

        start = (z, jnp.zeros((), z.dtype))
        z_last, log_det = solver(field, start, warp.inverse(first), warp.inverse(last))
        return jnp.sum(standard_normal_log_prob(z_last)) + log_det

    return log_prob


def _follow(
    diffusion: Diffusion, solver: Solver | None, warp: Warp | None
) -> Callable[[Params, Array, Array, Array], Array]:
    """Return `(params, z, start, stop) -> z` at the log-SNR stop, given z at start."""
    solver, warp = solver or fixed_grid(), warp or sinh_warp()

    def follow(params: Params, z: Array, start: Array, stop: Array) -> Array:
        def field(u: Array, z: Array) -> Array:
            log_snr, slope = jax.value_and_grad(warp.log_snr)(u)
            return slope * _velocity(diffusion, params, log_snr)(z)

        return solver(field, z, warp.inverse(start), warp.inverse(stop))

    return follow


def _velocity(diffusion: Diffusion, params: Params, log_snr: Array) -> Callable[[Array], Array]:
    """Return z -> dz / dl."""
    a = alpha(log_snr)
    return lambda z: 0.5 * a * (diffusion.denoise(params, z, log_snr) - a * z)


def _ends(diffusion: Diffusion, params: Params, dtype: DTypeLike) -> tuple[Array, Array]:
    return diffusion.log_snr(params, jnp.zeros((), dtype)), diffusion.log_snr(params, jnp.ones((), dtype))


def _check_datum(name: str, y: Array, shape: tuple[int, ...]) -> None:
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(
            f"{name}: got {y.dtype}, expected a float array where noise is added; wrap the log-density in "
            "dequantized_log_prob, or embed by diffusion.likelihood.embed(x)"
        )
    if y.shape != shape:
        raise ValueError(
            f"{name}: got an array of shape {y.shape}, expected {shape}; build the model with shape=x.shape, and map "
            "over a batch by jax.vmap"
        )
