r"""An energy-based model: a network says how likely x is, up to a constant.

    log p(x) = -E_theta(x) - |x - centre|^2 / (2 scale^2) - log Z(theta)

A perceptron of swish units grows no faster than |x|, so the quadratic makes the whole normalisable, whatever theta is.
log Z is left out: what is called log_density here is in nats up to a constant, another one for every theta. Differences
at one theta are log-ratios of probabilities. Likelihoods, and two models, compare only once log Z is known: of up to
three dimensions by `evaluate.grid_log_normalizer`, of more by annealed importance sampling, with an error of its own.

Source: LeCun et al., A Tutorial on Energy-Based Learning, 2006; Saremi et al., Deep Energy Estimator Networks, 2018.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vdiff.types import Key, Network, Params


class EBM(NamedTuple):
    """Hold an energy-based model, all that score matching and Markov chains ask for.

    Attributes:
        init: `(key) -> Params`, the network's parameters as theta.
        log_density: `(params, x) -> []`, log p(x) + log Z(theta), nats up to that constant.
    """

    init: Callable[[Key], Params]
    log_density: Callable[[Params, Array], Float[Array, ""]]


def ebm(energy: Network, *, centre: ArrayLike = 0.0, scale: float = 1.0) -> EBM:
    """Build an energy-based model of arrays of any shape.

        log_density(params, x) = -energy(theta, x) - sum (x - centre)^2 / (2 scale^2)

    Its gradient trains by `denoising_score_matching` or, of few dimensions and with a smooth activation, by
    `explicit_score_matching` and `sliced_score_matching_vr`; it is sampled by `evaluate.hmc` and the like.

    Args:
        energy: `Network` with apply(theta, x) -> one number, [] or [1], e.g.
            `nets.mlp(shape, (), activation=jax.nn.swish)` or `nets.conv_encoder(shape, 1, activation=jax.nn.swish)`.
        centre: of the confinement, a number or an array of the shape of x, e.g. the mean of the data.
        scale: standard deviation of the confinement, positive, in units of x; wider than the data.

    Returns:
        An `EBM`.

    Raises:
        ValueError: if `scale` is not positive; at trace time, if the network returns more than one number, or `centre`
            has a shape of its own.
    """
    if not scale > 0:
        raise ValueError(f"scale: got {scale}, expected a positive number, in units of x")

    def init(key: Key) -> Params:
        return Params(theta=energy.init(key))

    def log_density(params: Params, x: Array) -> Float[Array, ""]:
        if jnp.shape(centre) not in ((), x.shape):
            raise ValueError(
                f"centre: got shape {jnp.shape(centre)}, expected that of x, {x.shape}, or a number; pass one datum, "
                "and map over a batch with jax.vmap"
            )
        out = energy.apply(params.theta, x)
        if out.size != 1:
            raise ValueError(
                f"energy: got an output of shape {out.shape}, expected one number; build the network with out_shape=()"
            )
        offset = (x - jnp.asarray(centre, x.dtype)) / scale
        return -out.reshape(()) - 0.5 * jnp.sum(jnp.square(offset))

    return EBM(init, log_density)
