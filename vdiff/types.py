r"""The contract: a latent-variable model is a handful of pure functions of one datum.

    p(x) = int p_theta(x | z) p_phi(z) dz                                        (12.2.1)
    ELBO(x) = E_{q_lambda(z | x)} [ log p(x, z) - log q_lambda(z | x) ]          (12.2.3)

The records below hold functions and no state: parameters travel as `Params`, randomness as a typed
key, and a batch is `jax.vmap`. Log-probabilities are in nats per datum, larger is better.

Section 12.2.3 of the lecture writes "- H(q)" with H = int q log q. With the usual sign of the
entropy that is "+ H(q)"; the ELBO above is what the code computes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

PyTree = Any
Key = Array
"""A typed key, made by `jax.random.key(seed)`."""

Terms = dict[str, Float[Array, ""]]
"""Named scalars whose sum is the estimate, in nats unless the objective states another unit."""


class Params(NamedTuple):
    """Hold everything that is learned, by its part in the lecture.

    Attributes:
        theta: parameters of the likelihood p_theta(x | z).
        phi: parameters of the prior p_phi(z); `()` when the prior is fixed.
        lam: parameters of the variational q_lambda(z | x); `()` when q has none.
        cv: what an estimator learns (a baseline, a control variate); no model reads it.
    """

    theta: PyTree = ()
    phi: PyTree = ()
    lam: PyTree = ()
    cv: PyTree = ()


Objective = Callable[[Key, Params, PyTree], Terms]
"""A function `(key, params, x) -> Terms` of one datum: all that can be trained or evaluated.

Law: the sum of the terms estimates the quantity that the objective's docstring names, and
`jax.grad` of that sum is the gradient estimator that the docstring names. Both are promises.
"""


class Network(NamedTuple):
    """Hold a parametrized function: all that a model knows of a neural-network library.

    Attributes:
        init: `(key) -> params`.
        apply: `(params, *inputs) -> array`, for one datum.
    """

    init: Callable[[Key], PyTree]
    apply: Callable[..., Array]


class Likelihood(NamedTuple):
    """Hold a conditional density p(x | out) of one datum, given a network's output.

    Attributes:
        log_prob: `(out, x) -> []`, nats, summed over the dimensions of x.
        sample: `(key, out) -> x`.
        mean: `(out) -> E[x | out]`, in the units of x, float.
        embed: `(x) -> float array` of x's shape, roughly in [-1, 1]: what a network is shown of x.
        out_shape: `(shape of x) -> shape of out`, for building and checking a decoder.
    """

    log_prob: Callable[[Array, Array], Array]
    sample: Callable[[Key, Array], Array]
    mean: Callable[[Array], Array]
    embed: Callable[[Array], Array]
    out_shape: Callable[[tuple[int, ...]], tuple[int, ...]]


class Distribution(NamedTuple):
    """Hold a distribution of z whose parameters are computed already, such as q(z | x) at one x.

    Attributes:
        sample: `(key) -> z`.
        log_prob: `(z) -> []`, nats.
        sample_and_log_prob: `(key) -> (z, [])`, what the two give apart, in one pass; see `in_turn`.
    """

    sample: Callable[[Key], PyTree]
    log_prob: Callable[[PyTree], Array]
    sample_and_log_prob: Callable[[Key], tuple[PyTree, Array]]


class LogProb(NamedTuple):
    """Hold an estimate of log p(x) in nats and how far to trust it.

    Attributes:
        value: the estimate of log p(x), nats.
        std_error: its standard error over the draws, nats (delta method).
        ess: the effective number of draws, between 1 and the number drawn.
        k_hat: the shape of the weights' tail, `vdiff.evaluate.k_hat`: above 0.7 do not trust the rest; NaN where there
            are too few draws to tell.
    """

    value: Float[Array, "..."]
    std_error: Float[Array, "..."]
    ess: Float[Array, "..."]
    k_hat: Float[Array, "..."] = math.nan


def is_discrete(z: PyTree) -> bool:
    """Tell whether any leaf of z has an integer or boolean dtype, i.e. cannot be differentiated."""
    return any(not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in jax.tree.leaves(z))


def gradient_only(value: Array) -> Array:
    """Return zero with the gradient of `value`: how a surrogate joins an estimate and leaves its value alone."""
    return value - stop_gradient(value)


class Model(NamedTuple):
    """Hold a latent-variable model as pure functions of ONE datum x.

    Five functions make a model; `elbo_terms` may be left out.

    Attributes:
        init: `(key) -> Params`.
        log_joint: `(params, x, z) -> []`, log p_phi(z) + log p_theta(x | z), nats.
        log_q: `(params, x, z) -> []`, log q_lambda(z | x), nats.
        sample_q: `(key, params, x) -> z`, differentiable in params where that is possible (12.2.5); a
            discrete leaf of z has an integer or boolean dtype.
        sample: `(key, params) -> (x, z)`, ancestral.
        elbo_terms: `(key, params, x) -> Terms`, the model's own sharpest ELBO, term by term.
    """

    init: Callable[[Key], Params]
    log_joint: Callable[[Params, PyTree, PyTree], Array]
    log_q: Callable[[Params, PyTree, PyTree], Array]
    sample_q: Callable[[Key, Params, PyTree], PyTree]
    sample: Callable[[Key, Params], tuple[PyTree, PyTree]]
    elbo_terms: Objective | None = None

    def elbo_estimate(self, key: Key, params: Params, x: PyTree) -> Float[Array, ""]:
        """Estimate the ELBO of one datum, without bias in value and in gradient.

        The sum of `elbo_terms`; where the model has none, log p(x, z) - log q(z | x) at one draw z of
        q, in score-function form (12.2.4) when z has a discrete leaf.

        Args:
            key: a typed key.
            params: the model's parameters.
            x: one datum.

        Returns:
            A scalar, nats.

        Raises:
            TypeError: if `key` is not a typed key.
        """
        if self.elbo_terms is not None:
            return sum(self.elbo_terms(check_key(key), params, x).values())
        q = q_at(self, params, x)
        z, log_q = q.sample_and_log_prob(check_key(key))
        if not is_discrete(z):
            return self.log_joint(params, x, z) - log_q
        z = stop_gradient(z)
        log_q = q.log_prob(z)
        log_weight = self.log_joint(params, x, z) - log_q
        return log_weight + gradient_only(stop_gradient(log_weight) * log_q)


@runtime_checkable
class ModelLike(Protocol):
    """Describe what estimators and evaluators read: the fields of `Model`, whatever record holds them.

    A family with functions of its own, such as `VAE` or `GMM`, is a NamedTuple with these fields first.
    """

    @property
    def init(self) -> Callable[[Key], Params]: ...  # noqa: D102

    @property
    def log_joint(self) -> Callable[[Params, PyTree, PyTree], Array]: ...  # noqa: D102

    @property
    def log_q(self) -> Callable[[Params, PyTree, PyTree], Array]: ...  # noqa: D102

    @property
    def sample_q(self) -> Callable[[Key, Params, PyTree], PyTree]: ...  # noqa: D102

    @property
    def sample(self) -> Callable[[Key, Params], tuple[PyTree, PyTree]]: ...  # noqa: D102

    @property
    def elbo_terms(self) -> Objective | None: ...  # noqa: D102

    def elbo_estimate(self, key: Key, params: Params, x: PyTree) -> Float[Array, ""]: ...  # noqa: D102


@runtime_checkable
class Startable(Protocol):
    """Describe what a run can start from: whatever record has an `init`, a `Model` or not."""

    @property
    def init(self) -> Callable[[Key], Params]: ...  # noqa: D102


def in_turn(sample: Callable[[Key], PyTree], log_prob: Callable[[PyTree], Array]) -> Distribution:
    """Build a `Distribution` that draws z first and then looks at its density."""

    def sample_and_log_prob(key: Key) -> tuple[PyTree, Array]:
        z = sample(key)
        return z, log_prob(z)

    return Distribution(sample, log_prob, sample_and_log_prob)


def fused(
    q: Callable[[Params, PyTree], Distribution],
) -> tuple[Callable[[Key, Params, PyTree], PyTree], Callable[[Params, PyTree, PyTree], Array]]:
    """Make the `sample_q` and `log_q` of a `Model` from one function, so that they share what it computes from x.

        def q(params, x):
            loc, scale = encoder(params.lam, x)                   # once, forward and back
            return in_turn(lambda key: ..., lambda z: ...)

        sample_q, log_q = fused(q)

    Written apart, the two call the encoder twice: the compiler merges the values, not the derivatives. A model in which
    either of the two was exchanged, by `_replace`, is treated as if they had been written apart.

    Args:
        q: `(params, x) -> Distribution` of z.

    Returns:
        `sample_q(key, params, x)` and `log_q(params, x, z)`; `q_at` finds q in them.
    """
    return functools.partial(_sample_of, q), functools.partial(_log_prob_of, q)


def q_at(model: ModelLike, params: Params, x: PyTree) -> Distribution:
    """Give a model's q(z | x) at one x; where its functions are `fused`, the encoder runs once for all that is asked.

    Args:
        model: any `Model`.
        params: the model's parameters.
        x: one datum.

    Returns:
        A `Distribution` of z.
    """
    of_sample, of_log_q = (
        of.args[0] if getattr(of, "func", None) is made_by else None
        for of, made_by in ((model.sample_q, _sample_of), (model.log_q, _log_prob_of))
    )
    if of_sample is not None and of_sample is of_log_q:
        return of_sample(params, x)
    return in_turn(lambda key: model.sample_q(key, params, x), lambda z: model.log_q(params, x, z))


def _sample_of(q: Callable, key: Key, params: Params, x: PyTree) -> PyTree:
    return q(params, x).sample(check_key(key))


def _log_prob_of(q: Callable, params: Params, x: PyTree, z: PyTree) -> Array:
    return q(params, x).log_prob(z)


def check_key(key: Key) -> Key:
    """Return the key, or refuse what is not one typed key.

    Raises:
        TypeError: if `key` is a raw integer array, as `jax.random.PRNGKey` makes, or an array of keys.
    """
    is_typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if is_typed and key.ndim == 0:
        return key
    if is_typed:
        raise TypeError(
            f"key: got {list(key.shape)} keys, expected a typed key, one; map over keys with jax.vmap"
        )
    got = f"{key.dtype}{list(key.shape)}" if hasattr(key, "dtype") else repr(key)
    raise TypeError(f"key: got {got}, expected a typed key; make it with jax.random.key(seed)")
