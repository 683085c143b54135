r"""Normalizing flow: a posterior bent by invertible affine coupling layers.

A layer keeps the dimensions of a mask b (every second one, in turn) and moves the others by what it read there:

    z' = b z + (1 - b) (exp(s) z + t),     (s, t) = conditioner(b z, context(x))
    log |det dz'/dz| = sum (1 - b) s
    log q(z_L) = log q_0(z_0) - sum_l log |det dz_l/dz_{l-1}|

The inverse needs no inverse of the conditioner, z = b z' + (1 - b) exp(-s) (z' - t), so log q of any z is exact.
s = 2 tanh(raw / 2): a layer stretches by at most e^2, whatever the network says.

Source: Dinh, Sohl-Dickstein and Bengio, Density Estimation using Real NVP, 2017; Rezende and Mohamed,
Variational Inference with Normalizing Flows, 2015; start at the identity: Kingma and Dhariwal, Glow, 2018.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.models.posterior import Posterior
from vdiff.nets.mlp import mlp
from vdiff.types import Distribution, Key, Network, PyTree, check_key

_MAX_LOG_SCALE = 2.0


def no_context(x: PyTree) -> Float[Array, " 0"]:
    """Show the conditioners nothing of x."""
    return jnp.zeros((0,))


def flow(
    base: Posterior, conditioners: Sequence[Network], context: Callable[[PyTree], Array] = no_context
) -> Posterior:
    """Bend a posterior by coupling layers; lam is {"base": the base's, "layers": one for each conditioner}.

    Args:
        base: q_0(z_0 | x), z_0 [d], e.g. `amortized(encoder, families.mean_field(d))`; it sees x. Around
            `local`, map over lam by in_axes {"base": 0, "layers": None}.
        conditioners: a `Network` for each layer with apply(params, [d + c]) -> [2 * d], raw log scale beside
            shift; e.g. `[conditioner(d)] * 4`, which begins at the identity.
        context: `(x) -> [c]`, float, what the conditioners are shown of x beside z; nothing unless told.

    Returns:
        A `Posterior`.

    Raises:
        ValueError: if there is no conditioner; at trace time, if z is not a vector or a conditioner's output
            does not fit.
    """
    if not conditioners:
        raise ValueError("conditioners: got none, expected at least 1; use [conditioner(latent_dim)] * 4")

    def coupling(i: int, lam: PyTree, z: Array, features: Array) -> tuple[Array, Array]:
        """Compute log scale and shift of layer i, both zero where the mask keeps z."""
        if z.ndim != 1:
            raise ValueError(f"z: got shape {z.shape}, expected (latent_dim,); flatten the base's latent")
        is_kept = (jnp.arange(z.shape[0]) + i) % 2 == 0
        inputs = jnp.concatenate([jnp.where(is_kept, z, 0.0), features])
        out = conditioners[i].apply(lam["layers"][i], inputs)
        if out.shape != (2 * z.shape[0],):
            raise ValueError(
                f"conditioners[{i}]: got output of shape {out.shape}, expected ({2 * z.shape[0]},), raw log "
                f"scale beside shift for z of length {z.shape[0]}"
            )
        raw, shift = out[: z.shape[0]], out[z.shape[0] :]
        log_scale = _MAX_LOG_SCALE * jnp.tanh(raw / _MAX_LOG_SCALE)
        return jnp.where(is_kept, 0.0, log_scale), jnp.where(is_kept, 0.0, shift)

    def forward(lam: PyTree, x: PyTree, z: Array) -> tuple[Array, Array]:
        """Bend z; returns log |det| of it too."""
        log_det, features = jnp.zeros((), z.dtype), context(x).astype(z.dtype)
        for i in range(len(conditioners)):
            log_scale, shift = coupling(i, lam, z, features)
            z, log_det = jnp.exp(log_scale) * z + shift, log_det + jnp.sum(log_scale)
        return z, log_det

    def back(lam: PyTree, x: PyTree, z: Array) -> tuple[Array, Array]:
        """Undo `forward`; the log |det| is still that of `forward`."""
        log_det, features = jnp.zeros((), z.dtype), context(x).astype(z.dtype)
        for i in reversed(range(len(conditioners))):
            log_scale, shift = coupling(i, lam, z, features)
            z, log_det = jnp.exp(-log_scale) * (z - shift), log_det + jnp.sum(log_scale)
        return z, log_det

    def init(key: Key) -> PyTree:
        key_base, *keys = jax.random.split(check_key(key), 1 + len(conditioners))
        layers = tuple(net.init(k) for net, k in zip(conditioners, keys, strict=True))
        return {"base": base.init(key_base), "layers": layers}

    def at(lam: PyTree, x: PyTree) -> Distribution:
        straight = base.at(lam["base"], x)

        def log_prob(z: Array) -> Array:
            z, log_det = back(lam, x, z)
            return straight.log_prob(z) - log_det

        def sample_and_log_prob(key: Key) -> tuple[Array, Array]:
            z, log_prob = straight.sample_and_log_prob(key)
            z, log_det = forward(lam, x, z)
            return z, log_prob - log_det

        return Distribution(
            lambda key: forward(lam, x, straight.sample(key))[0], log_prob, sample_and_log_prob
        )

    return Posterior(init, at)


def conditioner(latent_dim: int, *, context_dim: int = 0, hidden: Sequence[int] = (32,)) -> Network:
    """Build a small perceptron for a layer of `flow`, times a learned gain that starts at zero.

    Args:
        latent_dim: length of z.
        context_dim: length of context(x).
        hidden: widths of the hidden layers.

    Returns:
        A `Network` with apply(params, [latent_dim + context_dim]) -> [2 * latent_dim], zero at the start.

    Raises:
        ValueError: if `latent_dim` is less than one.
    """
    if latent_dim < 1:
        raise ValueError(f"latent_dim: got {latent_dim}, expected at least 1")
    net = mlp((latent_dim + context_dim,), (2 * latent_dim,), hidden=hidden)

    def init(key: Key) -> PyTree:
        return {"net": net.init(key), "gain": jnp.zeros((2 * latent_dim,))}

    def apply(params: PyTree, inputs: Array) -> Array:
        return params["gain"] * net.apply(params["net"], inputs)

    return Network(init, apply)
