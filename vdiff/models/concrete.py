r"""The relaxed model: a discrete latent replaced by a soft copy of it, so that the pathwise gradient is exact.

    y ~ perturbed logits of p(z),      x | y ~ p(x | z = soften(y, temperature)),      q(y | x): perturbed logits of q

It is another model than the discrete one: its p(x) depends on the temperature, and what bounds it does not bound the
discrete model's, to which it tends as the temperature falls, while the variance of the gradient rises.

Source: Maddison, Mnih and Teh, The Concrete Distribution, 2017, section 3.3 and appendix C.
"""

from collections.abc import Callable

import jax
from jax.typing import ArrayLike
from jaxtyping import Array

from vdiff.relaxations import Relaxation, bernoulli, check_temperature, key_per_leaf
from vdiff.types import Distribution, Key, Model, ModelLike, Params, PyTree, check_key, fused, in_turn


def concrete(
    model: ModelLike,
    logits: Callable[[Params, PyTree], PyTree],
    temperature: ArrayLike,
    *,
    prior_logits: Callable[[Params], PyTree],
    sample_x: Callable[[Key, Params, PyTree], PyTree],
    relaxation: Relaxation = bernoulli,
) -> Model:
    """Relax a model with discrete z; its latent is y, the perturbed logits, of which z would be the hard function.

        log p(x, y) = log p(x | z = soften(y, temperature)) + log_density(prior_logits, y)
        log q(y | x) = log_density(logits, y)

    Any bound of it, and `importance_log_prob`, speak of log p(x) of THIS model, not of the discrete one's: report the
    discrete one's by the discrete model, which has the same params. On a toy of two bits (x ~ N(W z, I)) the two are
    up to 0.161, 0.081 and 0.033 nats apart at temperatures 1, 0.5 and 0.1, and the gradients of log p(x) by theta by
    20.4, 15.3 and 4.2 % of the norm. log p(x | z) at a soft z is
    `model.log_joint - log p(z)`, with log p(z) extended linearly; it does not depend on the prior if the model's own
    prior is written in that form too, as `vd.sbn`'s is. With `one_hot` a constant added to the logits is
    immaterial to z and yet costs nats here, and a prior that gives y a density of e^(-e^88) or less overflows.

    Args:
        model: a `Model` with discrete z, independent elements under its prior, whose `log_joint` accepts floats.
        logits: `(params, x) -> ` logits of q, in the leaves and shapes of z, e.g. `vd.sbn(...).logits` of one layer.
        temperature: positive; the same for p and q, and for evaluation.
        prior_logits: `(params) -> ` logits of the model's prior, likewise.
        sample_x: `(key, params, z) -> x`, drawn from p(x | z), for a soft z.
        relaxation: `relaxations.bernoulli`, or `relaxations.one_hot` for categories on the last axis.

    Returns:
        A `Model` with a continuous latent, for `pathwise` or `doubly_reparameterized`; its params are the discrete
        model's, everything in nats per datum.

    Raises:
        ValueError: if `temperature` is a Python number that is not positive.
        TypeError: at trace time, if the logits of prior and q are not of the same leaves and shapes.
    """
    check_temperature(temperature)

    def soften(y: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: relaxation.soften(leaf, temperature), y)

    def perturb(key: Key, eta: PyTree) -> PyTree:
        return jax.tree.map(relaxation.perturb, key_per_leaf(check_key(key), eta), eta)

    def log_joint(params: Params, x: PyTree, y: PyTree) -> Array:
        eta, z = _checked_prior(prior_logits(params), y), soften(y)
        log_likelihood = model.log_joint(params, x, z) - _summed(relaxation.log_prob, eta, z)
        return log_likelihood + _summed(relaxation.log_density, eta, y)

    def q(params: Params, x: PyTree) -> Distribution:
        eta = logits(params, x)
        return in_turn(lambda key: perturb(key, eta), lambda y: _summed(relaxation.log_density, eta, y))

    def sample(key: Key, params: Params) -> tuple[PyTree, PyTree]:
        key_y, key_x = jax.random.split(check_key(key))
        y = perturb(key_y, prior_logits(params))
        return sample_x(key_x, params, soften(y)), y

    sample_q, log_q = fused(q)
    return Model(model.init, log_joint, log_q, sample_q, sample)


def _summed(of: Callable[[Array, Array], Array], logits: PyTree, value: PyTree) -> Array:
    """Add up what a relaxation gives leaf by leaf."""
    return sum(jax.tree.leaves(jax.tree.map(of, logits, value)))


def _checked_prior(eta: PyTree, y: PyTree) -> PyTree:
    shapes, expected = (jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (eta, y))
    if jax.tree.structure(eta) != jax.tree.structure(y) or shapes != expected:
        raise TypeError(
            f"prior_logits: got leaves of shapes {shapes}, expected {expected}, those that logits gives q; give each "
            "element of z a logit in both"
        )
    return eta
