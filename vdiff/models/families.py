r"""Variational families: densities q(z) of one datum, given a flat vector `out` of unconstrained parameters.

With loc m, scales s = exp(log scale), D = diag(s), eps and eta standard normal:

    mean_field   z = m + s * eps                            Sigma = D^2
    full_rank    z = m + D (I + N) eps                      Sigma = D (I + N) (I + N)^T D
    low_rank     z = m + D (eps + W eta), W [d, r]          Sigma = D (I + W W^T) D = D^2 + V V^T, V = D W
    mixture      z ~ sum_k pi_k N(m_k, D_k^2)               the component summed out

N is strictly lower triangular, so L = D (I + N) is the Cholesky factor of Sigma; N and W are in units of the
scales, which keeps tiny scales from blowing up the inverse. For low rank, with u = D^-1 (z - m),

    log |I + W W^T| = log |M|,   M = I + W^T W  [r, r]                   (the determinant lemma)
    u^T (I + W W^T)^-1 u = |u - W h|^2 + |h|^2,   h = M^-1 W^T u         (Woodbury, as a ridge regression)

a sum of squares: nothing cancels. Log scales, N and W pass through a function that is the identity up to 20
in size and grows like a logarithm beyond, so that no output of a network overflows float32.

Source: Woodbury's identity and the determinant lemma: Petersen and Pedersen, The Matrix Cookbook, 2012, 3.2
and 1.2; low rank as a posterior: Ong, Nott and Smith, Gaussian Variational Approximation with a Factor
Covariance Structure, 2018.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision, stop_gradient
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from vdiff.densities import normal_log_prob, standard_normal_log_prob
from vdiff.models.implicit import reparametrized
from vdiff.types import Key, check_key

_LINEAR_UP_TO = 20.0
"""exp(20) squared is still far inside float32, and exp(-20) is below the resolution of z."""


class Family(NamedTuple):
    """Hold a family of densities q(z), z [d], as pure functions of one datum's parameters `out` [size].

    Attributes:
        size: length of `out`, what an encoder must produce.
        log_prob: `(out [size], z [d]) -> []`, nats.
        sample: `(key, out [size]) -> z [d]`, differentiable in all of `out`.
        sample_and_log_prob: `(key, out [size]) -> (z [d], [])`, what the two give apart, in one pass.
    """

    size: int
    log_prob: Callable[[Array, Array], Array]
    sample: Callable[[Key, Array], Array]
    sample_and_log_prob: Callable[[Key, Array], tuple[Array, Array]]


def mean_field(latent_dim: int) -> Family:
    """Build the Gaussians with independent dimensions; `out` is loc beside log scale, as for `vae`.

    Args:
        latent_dim: length of z.

    Returns:
        A `Family` of size 2 * latent_dim.

    Raises:
        ValueError: if `latent_dim` is less than one; at trace time, if `out` has another shape.
    """
    _check_at_least_one("latent_dim", latent_dim)

    def parts(out: Array) -> tuple[Array, Array]:
        loc, log_scale = _parts(out, latent_dim, latent_dim)
        return loc, _bounded(log_scale)

    def log_prob(out: Array, z: Float[Array, " d"]) -> Float[Array, ""]:
        return jnp.sum(normal_log_prob(z, *parts(out)))

    def sample_and_log_prob(key: Key, out: Array) -> tuple[Array, Array]:
        loc, log_scale = parts(out)
        eps = jax.random.normal(check_key(key), loc.shape, loc.dtype)
        return loc + jnp.exp(log_scale) * eps, jnp.sum(standard_normal_log_prob(eps) - log_scale)

    return Family(2 * latent_dim, log_prob, _first(sample_and_log_prob), sample_and_log_prob)


def full_rank(latent_dim: int) -> Family:
    """Build all Gaussians; `out` is loc, log scale and N by rows, L = diag(scale) (I + N).

    Args:
        latent_dim: length of z.

    Returns:
        A `Family` of size 2 * latent_dim + latent_dim * (latent_dim - 1) / 2.

    Raises:
        ValueError: if `latent_dim` is less than one; at trace time, if `out` has another shape.
    """
    _check_at_least_one("latent_dim", latent_dim)
    num_lower = latent_dim * (latent_dim - 1) // 2
    below = jnp.tril_indices(latent_dim, -1)

    def parts(out: Array) -> tuple[Array, Array, Array]:
        loc, log_scale, lower = _parts(out, latent_dim, latent_dim, num_lower)
        factor = jnp.eye(latent_dim, dtype=out.dtype).at[below].set(_bounded(lower))
        return loc, _bounded(log_scale), factor

    def log_prob(out: Array, z: Float[Array, " d"]) -> Float[Array, ""]:
        loc, log_scale, factor = parts(out)
        white = jnp.exp(-log_scale) * (z - loc)
        eps = solve_triangular(factor, white, lower=True, unit_diagonal=True)
        return jnp.sum(standard_normal_log_prob(eps) - log_scale)

    def sample_and_log_prob(key: Key, out: Array) -> tuple[Array, Array]:
        loc, log_scale, factor = parts(out)
        eps = jax.random.normal(check_key(key), loc.shape, loc.dtype)
        z = loc + jnp.exp(log_scale) * jnp.matmul(factor, eps, precision=Precision.HIGHEST)
        return z, jnp.sum(standard_normal_log_prob(eps) - log_scale)

    size = 2 * latent_dim + num_lower
    return Family(size, log_prob, _first(sample_and_log_prob), sample_and_log_prob)


def low_rank(latent_dim: int, rank: int) -> Family:
    """Build the Gaussians with covariance D (I + W W^T) D; `out` is loc, log scale and W [d, rank] by rows.

    Args:
        latent_dim: length of z.
        rank: columns of W, at most latent_dim.

    Returns:
        A `Family` of size (2 + rank) * latent_dim; time and memory O(latent_dim * rank^2).

    Raises:
        ValueError: if `latent_dim` or `rank` is less than one, or `rank` more than latent_dim; at trace time, if
            `out` has another shape.
    """
    _check_at_least_one("latent_dim", latent_dim)
    _check_at_least_one("rank", rank)
    if rank > latent_dim:
        raise ValueError(
            f"rank: got {rank}, expected at most latent_dim = {latent_dim}; use full_rank(latent_dim)"
        )

    def parts(out: Array) -> tuple[Array, Array, Array]:
        loc, log_scale, directions = _parts(out, latent_dim, latent_dim, latent_dim * rank)
        return loc, _bounded(log_scale), _bounded(directions).reshape(latent_dim, rank)

    def log_prob(out: Array, z: Float[Array, " d"]) -> Float[Array, ""]:
        loc, log_scale, w = parts(out)
        white = jnp.exp(-log_scale) * (z - loc)
        gram = jnp.eye(rank, dtype=w.dtype) + jnp.matmul(w.T, w, precision=Precision.HIGHEST)
        factor = jnp.linalg.cholesky(gram)
        h = cho_solve((factor, True), jnp.matmul(w.T, white, precision=Precision.HIGHEST))
        rest = white - jnp.matmul(w, h, precision=Precision.HIGHEST)
        log_det = jnp.sum(log_scale) + jnp.sum(jnp.log(jnp.diagonal(factor)))
        return jnp.sum(standard_normal_log_prob(rest)) - 0.5 * jnp.sum(jnp.square(h)) - log_det

    def sample(key: Key, out: Array) -> Array:
        loc, log_scale, w = parts(out)
        noise = jax.random.normal(check_key(key), (latent_dim + rank,), loc.dtype)
        eps, eta = noise[:latent_dim], noise[latent_dim:]
        return loc + jnp.exp(log_scale) * (eps + jnp.matmul(w, eta, precision=Precision.HIGHEST))

    return Family((2 + rank) * latent_dim, log_prob, sample, _one_after_the_other(sample, log_prob))


def mixture(latent_dim: int, num_components: int) -> Family:
    """Build the mixtures of mean-field Gaussians; `out` is logits [K], loc [K, d] and log scale [K, d].

    z is the marginal draw. Its derivative is the implicit one (`models.implicit`), right for the weights too;
    its variance grows with the emptiness between components, without limit as they part.

    Args:
        latent_dim: length of z, d.
        num_components: K.

    Returns:
        A `Family` of size K * (1 + 2 * latent_dim).

    Raises:
        ValueError: if `latent_dim` or `num_components` is less than one; at trace time, if `out` has another
            shape.
    """
    _check_at_least_one("latent_dim", latent_dim)
    _check_at_least_one("num_components", num_components)
    shape = (num_components, latent_dim)

    def parts(out: Array) -> tuple[Array, Array, Array]:
        of_components = num_components * latent_dim
        logits, loc, log_scale = _parts(out, num_components, of_components, of_components)
        return jax.nn.log_softmax(logits), loc.reshape(shape), _bounded(log_scale).reshape(shape)

    def log_prob(out: Array, z: Float[Array, " d"]) -> Float[Array, ""]:
        log_weight, loc, log_scale = parts(out)
        per_component = normal_log_prob(jnp.broadcast_to(z, shape), loc, log_scale)
        return logsumexp(log_weight + jnp.sum(per_component, axis=1))

    def sample(key: Key, out: Array) -> Array:
        log_weight, loc, log_scale = parts(out)
        key_component, key_noise = jax.random.split(check_key(key))
        k = jax.random.categorical(key_component, log_weight)
        z = loc[k] + jnp.exp(log_scale[k]) * jax.random.normal(key_noise, (latent_dim,), loc.dtype)
        return reparametrized(stop_gradient(z), log_weight, loc, log_scale)

    size = num_components * (1 + 2 * latent_dim)
    return Family(size, log_prob, sample, _one_after_the_other(sample, log_prob))


def _first(sample_and_log_prob: Callable) -> Callable[[Key, Array], Array]:
    return lambda key, out: sample_and_log_prob(key, out)[0]


def _one_after_the_other(sample: Callable, log_prob: Callable) -> Callable[[Key, Array], tuple[Array, Array]]:
    def sample_and_log_prob(key: Key, out: Array) -> tuple[Array, Array]:
        z = sample(key, out)
        return z, log_prob(out, z)

    return sample_and_log_prob


def _parts(out: Array, *sizes: int) -> list[Array]:
    """Cut `out` into consecutive vectors of the given sizes."""
    if out.shape != (sum(sizes),):
        raise ValueError(f"out: got shape {out.shape}, expected ({sum(sizes)},), the size of the family")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [out[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _bounded(value: Float[Array, " n"]) -> Float[Array, " n"]:
    """Return the value, and beyond +-20 continue smoothly by a logarithm: its slope never vanishes."""
    excess = jnp.maximum(jnp.abs(value) - _LINEAR_UP_TO, 0.0)
    return jnp.where(excess > 0, jnp.sign(value) * (_LINEAR_UP_TO + jnp.log1p(excess)), value)


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
