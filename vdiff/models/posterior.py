r"""The variational posterior q_lambda(z | x) as a part of its own, and how it becomes the q of a model.

    amortized    q(z | x) = family(z; out),  out = encoder_lambda(embed(x))      one network for all data
    local        q(z | x) = family(z; out),  out = lambda                        free parameters for each datum

Both are lower bounds through the same ELBO; what amortisation loses, ELBO(local) - ELBO(amortized) at the best
lambda of each, is the amortisation gap, and log p(x) - ELBO(local) the approximation gap of the family.

Source: Gershman and Goodman, Amortized Inference in Probabilistic Reasoning, 2014; Cremer, Li and Duvenaud,
Inference Suboptimality in Variational Autoencoders, 2018.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
from jaxtyping import Array

from vdiff.models.families import Family
from vdiff.types import Distribution, Key, Model, ModelLike, Network, Params, PyTree, check_key, fused

AnyModel = TypeVar("AnyModel", bound=ModelLike)

# Keys of their own, derived so that no `split` by the model's own init comes upon them.
_KEY_OF_Q = 0x71000000
_KEY_OF_CV = 0x63760000


class Posterior(NamedTuple):
    """Hold q_lambda(z | x) as pure functions of one datum.

    Attributes:
        init: `(key) -> lam`.
        at: `(lam, x) -> Distribution` of z, whose draws are differentiable in lam.
    """

    init: Callable[[Key], PyTree]
    at: Callable[[PyTree, PyTree], Distribution]


def _as_it_is(x: PyTree) -> PyTree:
    return x


def amortized(encoder: Network, family: Family, embed: Callable[[PyTree], PyTree] = _as_it_is) -> Posterior:
    """Build the posterior whose parameters a network computes from x; lam is the network's parameters.

    Args:
        encoder: `Network` with apply(lam, embed(x)) -> [family.size].
        family: what the encoder's output means, e.g. `families.full_rank(latent_dim)`.
        embed: what the encoder is shown of x, e.g. `likelihood.embed`; x itself unless told.

    Returns:
        A `Posterior`.

    Raises:
        ValueError: at trace time, if the encoder's output does not fit the family.
    """

    def encode(lam: PyTree, x: PyTree) -> Array:
        out = encoder.apply(lam, embed(x))
        if out.shape != (family.size,):
            raise ValueError(
                f"encoder: got output of shape {out.shape}, expected ({family.size},), the size of the family; "
                "give the last layer family.size outputs"
            )
        return out

    return Posterior(encoder.init, lambda lam, x: _given(family, encode(lam, x)))


def local(family: Family, init_scale: float = 0.1) -> Posterior:
    """Build the posterior whose parameters are free: lam IS `out` [family.size] of this one datum.

    For N data keep lam [N, size] and map over it beside x: `jax.vmap(objective, in_axes=(0, Params(None, None,
    0, None), 0))`; `jax.vmap(posterior.init)(keys)` makes it.

    Args:
        family: e.g. `families.mean_field(latent_dim)`.
        init_scale: standard deviation of lam at the start; more than 0 for a mixture, whose components would
            otherwise stay equal.

    Returns:
        A `Posterior` that does not look at x.
    """

    def init(key: Key) -> Array:
        return init_scale * jax.random.normal(check_key(key), (family.size,))

    return Posterior(init, lambda lam, x: _given(family, lam))


def _given(family: Family, out: Array) -> Distribution:
    return Distribution(
        lambda key: family.sample(key, out),
        lambda z: family.log_prob(out, z),
        lambda key: family.sample_and_log_prob(key, out),
    )


def with_q(model: ModelLike, posterior: Posterior) -> Model:
    """Exchange the q of a model: log_q, sample_q and the start of lam; p stays as it is.

    Returned is a plain `Model`, without `elbo_terms` and without what a family adds, such as the `encode` of a
    `VAE`: they would go on describing the old q. Theta, phi and cv start as in `model.init(key)`.

    The new q must draw the model's whole latent, and log_joint is still given the whole params. For a `vae` with
    a learned prior that is the pair (z, u), u the prior's own latent (`()` for a `collapsed` mixture), and its
    log_joint looks into `params.lam` for "encoder" and "prior": a posterior for it must be written to draw the
    pair and to keep its lam as {"encoder": ..., "prior": ...}.

    Args:
        model: any `Model`.
        posterior: q_lambda(z | x), e.g. `amortized(encoder, family)`.

    Returns:
        A `Model` whose params.lam is the posterior's.
    """

    def init(key: Key) -> Params:
        lam = posterior.init(jax.random.fold_in(check_key(key), _KEY_OF_Q))
        return model.init(key)._replace(lam=lam)

    sample_q, log_q = fused(lambda params, x: posterior.at(params.lam, x))
    return Model(init, model.log_joint, log_q, sample_q, model.sample)


def with_cv(model: AnyModel, init_cv: Callable[[Key], PyTree]) -> AnyModel:
    """Give a model's params a start for what an estimator learns: `params.cv = init_cv(key)`.

    Theta, phi and lam start as in `model.init(key)`, so that runs with and without it begin alike.

    Args:
        model: any `Model`, or a record with its fields, such as a `VAE`.
        init_cv: `(key) -> cv`, e.g. the `init` of a baseline's `Network`.

    Returns:
        The same record with another `init`.
    """

    def init(key: Key) -> Params:
        cv = init_cv(jax.random.fold_in(check_key(key), _KEY_OF_CV))
        return model.init(key)._replace(cv=cv)

    return model._replace(init=init)
