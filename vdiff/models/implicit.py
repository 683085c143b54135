r"""Implicit reparametrization: the derivative of a mixture's draw by all of its parameters.

A draw of a mixture picks a component, which has no derivative. But z can be read as the solution of
S(z, lambda) = constant, S the triangular map that takes z to uniforms, S_j = F(z_j | z_1..z_{j-1}), and so

    dz = -(dS/dz)^-1 (dS/dlambda) dlambda

is a right pathwise derivative: d/dlambda E[f(z)] = E[(df/dz) (dz/dlambda)]. For sum_k pi_k N(loc_k, diag scale_k^2)
let r_kj be the weight of component k given z_1..z_{j-1}, u_kj = (z_j - loc_kj) / scale_kj,

    F_j = sum_k r_kj Phi(u_kj),   f_j = sum_k r_kj N(z_j; loc_kj, scale_kj^2),   r_k(j+1) f_j = r_kj N_kj

Divided by the density f_j, which may be tiny, row j of the system becomes

    dz_j = sum_k r_k(j+1) (dloc_kj + (z_j - loc_kj) dlog scale_kj)  -  sum_k t_kj da_kj,
    t_kj = r_kj (Phi(u_kj) - F_j) / f_j,   a_kj = log pi_k + sum_{i<j} log N_ki

The first sum is the mean velocity of the components under weights that KNOW z_j: no small number divides. The
second is the flow of mass between them; it is computed by logarithms, from whichever tail is the smaller:
Phi - F = (1 - F) - (1 - Phi). Through a_kj the sum holds dz_i of the dimensions before, a triangular system.

In an empty place between components f_j is tiny and the flow truly as large as 1 / f_j: the estimator is
unbiased, but its variance, of order int 1/f, is what well separated components cost.

Source: Figurnov, Mohamed and Mnih, Implicit Reparameterization Gradients, 2018; Graves, Stochastic
Backpropagation through Mixture Density Distributions, 2016.
"""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import log_ndtr, logsumexp
from jaxtyping import Array, Float

from vdiff.densities import standard_normal_log_prob

_FAR_OUT = 1e9
"""A component this many scales away from a draw has no weight; u^2 stays inside float32, for 0 * inf is NaN."""


@jax.custom_jvp
def reparametrized(
    z: Float[Array, " d"],
    log_weight: Float[Array, " K"],
    loc: Float[Array, "K d"],
    log_scale: Float[Array, "K d"],
) -> Float[Array, " d"]:
    """Return a draw z of a mixture as it is, with its derivative by the mixture's parameters.

    Args:
        z: a draw of sum_k exp(log_weight_k) N(loc_k, diag exp(log_scale_k)^2); its own derivative is dropped.
        log_weight: logarithms of weights that sum to one, nats.
        loc: the components' means.
        log_scale: logarithms of the components' standard deviations.

    Returns:
        z. The derivative works in forward and reverse mode, and can itself be differentiated.
    """
    return z


@reparametrized.defjvp
def _reparametrized_jvp(
    primals: tuple[Array, Array, Array, Array], tangents: tuple[Array, Array, Array, Array]
) -> tuple[Array, Array]:
    z, log_weight, loc, log_scale = primals
    _, log_weight_dot, loc_dot, log_scale_dot = tangents
    z = reparametrized(z, log_weight, loc, log_scale)  # again, for the sake of second derivatives

    per_scale = jnp.exp(-log_scale)
    residual = z[None] - loc
    u = jnp.clip(residual * per_scale, -_FAR_OUT, _FAR_OUT)
    log_component = standard_normal_log_prob(u) - log_scale
    log_joint = jnp.cumsum(jnp.concatenate([log_weight[:, None], log_component], axis=1), axis=1)
    log_before = jax.nn.log_softmax(log_joint[:, :-1], axis=0)  # log r_kj
    after = jax.nn.softmax(log_joint[:, 1:], axis=0)  # r_k(j+1)
    log_density = logsumexp(log_before + log_component, axis=0)  # log f_j

    is_left = logsumexp(log_before + log_ndtr(u), axis=0) < jnp.log(0.5)
    sign = jnp.where(is_left, 1.0, -1.0).astype(z.dtype)[None]
    tail = jnp.exp(log_before + log_ndtr(sign * u) - log_density[None])
    transfer = sign * (tail - jnp.exp(log_before) * jnp.sum(tail, axis=0, keepdims=True))  # t_kj

    # d log N_kj at fixed z, then its slope by z_j.
    log_component_dot = (jnp.square(u) - 1.0) * log_scale_dot + u * per_scale * loc_dot
    slope = -u * per_scale
    inputs = jnp.concatenate([log_weight_dot[:, None], log_component_dot[:, :-1]], axis=1)
    velocity = jnp.sum(after * (loc_dot + residual * log_scale_dot), axis=0)
    flow = jnp.sum(transfer * jnp.cumsum(inputs, axis=1), axis=0)
    coupling = jnp.tril(jnp.matmul(transfer.T, slope, precision=Precision.HIGHEST), -1)
    return z, solve_triangular(coupling, velocity - flow, lower=True, unit_diagonal=True)
