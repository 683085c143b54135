r"""Biased gradients for discrete latents: a soft draw's derivative in place of a hard draw's.

With logits eta of q, perturbed logits y = T(eps, eta), the hard z = H(y) and the soft s = soften(y, temperature),

    relaxed            value f(z, eta),    gradient by eta: d f(s(eta), eta)             a second pass, at s
    straight_through   value f(z, eta),    gradient by eta: df/dz at z  ds + df at fixed z        no further pass

Both are biased for lambda. As the temperature falls to zero the variance of both rises without bound, `relaxed` loses
its bias, and `straight_through` comes to take (df/dz at 0 + df/dz at 1) / 2 for a bit's f(1) - f(0): its bias goes too
where log p(x, z) is at most quadratic in each bit, and stays where it is not. By theta and phi the gradients are those
at the hard draw, without bias, except for parameters that the logits read too, such as a codebook, which are biased as
lambda is.

Source: Bengio, Leonard and Courville, Estimating or Propagating Gradients Through Stochastic Neurons, 2013;
Maddison, Mnih and Teh, The Concrete Distribution, 2017; Jang, Gu and Poole, Gumbel-Softmax, 2017.
"""

import jax
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from vdiff.bounds import Bound, elbo
from vdiff.estimators.log_weights import check_num_samples, log_joints
from vdiff.estimators.perturbed import Logits, checked_logits, log_probs, perturb
from vdiff.relaxations import Relaxation, bernoulli, check_temperature
from vdiff.types import Key, ModelLike, Objective, Params, PyTree, Terms, gradient_only


def relaxed(
    model: ModelLike,
    logits: Logits,
    temperature: ArrayLike,
    bound: Bound = elbo,
    num_samples: int = 1,
    *,
    relaxation: Relaxation = bernoulli,
) -> Objective:
    """Estimate a bound at hard draws, and its gradient for q at soft draws of the same noise.

    Value: bound(l) of the hard draws. Gradient: unbiased for theta and phi. Biased for lambda, less so at low
    temperatures: on a toy of two bits (x ~ N(W z, I), elbo, K = 1) by 1.3 % of the gradient's norm at temperature 0.1,
    11.8 % at 0.5, 43.6 % at 1.

    Args:
        model: a `Model` with discrete z, whose `log_joint` accepts floats between zero and one.
        logits: `(params, x) -> ` logits of q, in the leaves and shapes of z; `model.log_q` is not called.
        temperature: positive; a traced number too, so that `scheduled` can lower it.
        bound: `(log_weights [K]) -> []`.
        num_samples: K.
        relaxation: `relaxations.bernoulli`, or `relaxations.one_hot` for categories on the last axis.

    Returns:
        An objective with one term, named after the bound, nats.

    Raises:
        ValueError: if `num_samples` is less than one, or `temperature` is a Python number that is not positive.
        TypeError: at trace time, if z is not discrete or the logits have other shapes.
    """
    check_num_samples(num_samples)
    check_temperature(temperature)

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        eta = checked_logits(model, logits, key, params, x, "relaxed")
        y = perturb(relaxation, key, eta, num_samples)
        z = jax.tree.map(lambda leaf: relaxation.harden(stop_gradient(leaf)), y)
        soft = jax.tree.map(lambda leaf: relaxation.soften(leaf, temperature), y)
        log_q = stop_gradient(log_probs(relaxation, eta, z))
        value = bound(log_joints(model, params, x, z, num_samples) - log_q)
        log_joint = log_joints(model, stop_gradient(params), stop_gradient(x), soft, num_samples)
        path = bound(log_joint - log_probs(relaxation, eta, soft))
        return {bound.__name__: value + gradient_only(path)}

    return objective


def straight_through(
    model: ModelLike,
    logits: Logits,
    temperature: ArrayLike = 1.0,
    bound: Bound = elbo,
    num_samples: int = 1,
    *,
    relaxation: Relaxation = bernoulli,
) -> Objective:
    """Estimate a bound at hard draws, and its gradient for q as if a hard draw moved like the soft one.

    Value: bound(l) of the hard draws. Gradient: unbiased for theta and phi. Biased for lambda, also where log p(x, z)
    is linear in z: on a toy of two bits (x ~ N(W z, I), elbo, K = 1) by 2.7 % of the gradient's norm at temperature
    0.1, 7.2 % at 0.5, 11.8 % at 1.

    Args:
        model: a `Model` with discrete z, whose `log_joint` accepts floats and is differentiable in them.
        logits: `(params, x) -> ` logits of q, in the leaves and shapes of z; `model.log_q` is not called.
        temperature: positive, of the soft draw whose derivative is used.
        bound: `(log_weights [K]) -> []`.
        num_samples: K.
        relaxation: `relaxations.bernoulli`, or `relaxations.one_hot` for categories on the last axis.

    Returns:
        An objective with one term, named after the bound, nats.

    Raises:
        ValueError: if `num_samples` is less than one, or `temperature` is a Python number that is not positive.
        TypeError: at trace time, if z is not discrete or the logits have other shapes.
    """
    check_num_samples(num_samples)
    check_temperature(temperature)

    def objective(key: Key, params: Params, x: PyTree) -> Terms:
        eta = checked_logits(model, logits, key, params, x, "straight_through")

        def hard_with_soft_gradient(y: jax.Array) -> jax.Array:
            return relaxation.harden(stop_gradient(y)) + gradient_only(relaxation.soften(y, temperature))

        z = jax.tree.map(hard_with_soft_gradient, perturb(relaxation, key, eta, num_samples))
        log_weights = log_joints(model, params, x, z, num_samples) - log_probs(relaxation, eta, z)
        return {bound.__name__: bound(log_weights)}

    return objective
