r"""Gradients through the draw: z = T(x, eps, lambda) (12.2.5).

    d/d lambda E_q[f(z)] = E_eps[ df/dz dT/d lambda ]

`pathwise` differentiates the bound as it stands. `doubly_reparameterized` replaces the part of
the gradient by lambda that goes through log q itself by its reparametrized form. With w = grad bound(l) and
H its Hessian,

    lambda:       sum_k c_k (d l_k / d z_k) (d z_k / d lambda),     c_k = w_k - H_kk
    theta, phi:   sum_k w_k  d log p(x, z_k) / d (theta, phi)

For `elbo` c_k = 1/K (sticking the landing), for `iwae` c_k = w_k^2 (DReG).

The lecture's 12.2.5 subtracts the noise density; what is subtracted here is log q_lambda(T), as it must be.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array

from vdiff.bounds import Bound, elbo
from vdiff.estimators.log_weights import check_num_samples, draw, draw_with_log_q, log_joints, log_qs
from vdiff.types import Key, ModelLike, Objective, Params, PyTree, Terms, is_discrete, q_at


def pathwise(model: ModelLike, bound: Bound = elbo, num_samples: int = 1) -> Objective:
    """Estimate a bound from K reparametrized draws and differentiate it through them.

    Value: bound(l), l_k = log p(x, z_k) - log q(z_k | x). Gradient: unbiased for theta, phi and lambda. One pass
    through the encoder and K through the decoder, where the model's q is `fused`; where it is not, two passes back
    through the encoder, by z and by log q.

    Args:
        model: a `Model` whose `sample_q` is differentiable.
        bound: `(log_weights [K]) -> []`, e.g. `elbo`, `iwae`, `renyi(0.5)`.
        num_samples: K.

    Returns:
        An objective with one term, named after the bound, nats.

    Raises:
        ValueError: if `num_samples` is less than one.
        TypeError: at trace time, if z has a discrete leaf.

    Source: lecture 12.2.5; Kingma and Welling, Auto-Encoding Variational Bayes, 2014.
    """
    check_num_samples(num_samples)

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        z, log_q = draw_with_log_q(q_at(model, params, x), key, num_samples)
        z = _check_continuous(z, "pathwise")
        log_weights = log_joints(model, params, x, z, num_samples) - log_q
        return {bound.__name__: bound(log_weights)}

    return objective


def doubly_reparameterized(model: ModelLike, bound: Bound = elbo, num_samples: int = 1) -> Objective:
    """Estimate a bound like `pathwise`, with the doubly reparametrized gradient for lambda.

    Value: bound(l), the same as `pathwise` on the same key. Gradient: unbiased for theta, phi and lambda;
    for lambda its variance vanishes where q is the posterior. Log q is evaluated at stopped parameters,
    all of them, so that weights shared between p and q stay right.

    Args:
        model: a `Model` whose `sample_q` is differentiable.
        bound: `(log_weights [K]) -> []`, twice differentiable.
        num_samples: K.

    Returns:
        An objective with one term, named after the bound, nats.

    Raises:
        ValueError: if `num_samples` is less than one.
        TypeError: at trace time, if z has a discrete leaf.

    Source: Roeder, Wu and Duvenaud, Sticking the Landing, 2017; Tucker et al., Doubly Reparameterized
    Gradient Estimators for Monte Carlo Objectives, 2019; the coefficient for any bound is vdiff's.
    """
    check_num_samples(num_samples)

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        z = _check_continuous(draw(q_at(model, params, x), key, num_samples), "doubly_reparameterized")
        fixed_q = q_at(model, stop_gradient(params), x)

        def log_weights_at(z: PyTree) -> Array:
            return log_joints(model, params, x, z, num_samples) - log_qs(fixed_q, z, num_samples)

        # The same values twice: the compiler keeps one forward pass.
        log_weights = stop_gradient(log_weights_at(z))
        weights = jax.grad(bound)(log_weights)
        coefficients = weights - jnp.diagonal(jax.hessian(bound)(log_weights))
        # The bound multiplies every path by w_k; a weight that underflows carries nothing either way.
        ratio = jnp.where(weights == 0, 0.0, coefficients / jnp.where(weights == 0, 1.0, weights))
        z = jax.tree.map(lambda leaf: jax.vmap(_scale_gradient)(leaf, ratio), z)
        return {bound.__name__: bound(log_weights_at(z))}

    return objective


@jax.custom_jvp
def _scale_gradient(z: Array, scale: Array) -> Array:
    """Return z unchanged, with its derivative multiplied by a constant scale."""
    return z


@_scale_gradient.defjvp
def _scale_gradient_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (z, scale), (z_dot, _) = primals, tangents
    return z, scale * z_dot


def _check_continuous(z: PyTree, name: str) -> PyTree:
    if is_discrete(z):
        dtypes = sorted({str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(z)})
        raise TypeError(
            f"z: got leaves of dtype {dtypes}, expected floating point for {name}, which differentiates "
            "through the draw; use score_function(model, bound, num_samples), or enumerated(model, support)"
        )
    return z
