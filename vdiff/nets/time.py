r"""The embedding of a scalar log-SNR, the time of a diffusion, and of a class label beside it.

    gamma(l) = [ cos(omega_1 l), ..., cos(omega_n l), sin(omega_1 l), ..., sin(omega_n l) ]

omega_k is geometric between 2 pi / 80 and 2 pi. Over the log-SNRs in use, -20 to 20, the slowest pair goes
half way round, so no two of them look alike; the fastest turns once in a unit, so a difference of .01 moves
the features by as much as a single float32 feature could hold ten thousand times over. No frequency is
higher, so that the derivative by the log-SNR, which a learned schedule meets, stays of order one.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LONGEST, SHORTEST = 80.0, 1.0
"""Periods of the slowest and of the fastest feature, in units of log-SNR."""

NUM_FEATURES = 64


def fourier_features(log_snr: Float[Array, ""], num_features: int) -> Float[Array, " num_features"]:
    """Embed a log-SNR by cosines and sines of geometric frequencies.

    Args:
        log_snr: log(alpha^2 / sigma^2), a scalar, about -20 to 20.
        num_features: length of the embedding, even.

    Returns:
        [num_features], float32: the cosines, slowest first, then the sines.

    Raises:
        ValueError: if `num_features` is odd or below 2.

    Source:
        Vaswani et al., Attention Is All You Need, 2017, section 3.5; Kingma et al., Variational Diffusion
        Models, 2021, for the log-SNR as the network's time.
    """
    if num_features < 2 or num_features % 2:
        raise ValueError(
            f"num_features: got {num_features}, expected an even number of at least 2, a cosine and a sine "
            f"for each frequency; use {max(2, num_features + 1)}"
        )
    periods = jnp.geomspace(LONGEST, SHORTEST, num_features // 2, dtype=jnp.float32)
    angles = (2 * math.pi / periods) * log_snr
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


class TimeEmbedding(nn.Module):
    """Embed a log-SNR, and a label where there are any: e = W_2 silu(W_1 gamma(log_snr)) + E[label].

    In float32 whatever the network's own dtype: it is one vector for each datum, and cheap.

    Attributes:
        width: length of the embedding.
        num_labels: number of classes; E has one more row, the last, which says "no label".
    """

    width: int
    num_labels: int = 0

    @nn.compact
    def __call__(self, log_snr: Float[Array, ""], *label: Int[Array, ""]) -> Float[Array, " width"]:
        """Return silu(e), [width]: what the layers that scale and shift are given."""
        h = jax.nn.silu(nn.Dense(self.width)(fourier_features(log_snr, NUM_FEATURES)))
        e = nn.Dense(self.width)(h)
        for y in label:
            e = e + nn.Embed(self.num_labels + 1, self.width, embedding_init=nn.initializers.normal(0.3))(y)
        return jax.nn.silu(e)


def time_examples(num_labels: int) -> tuple[Array, ...]:
    """Return example inputs beside z, for `from_linen`: a log-SNR and, with labels, a label."""
    return (jnp.zeros(()), *([jnp.zeros((), jnp.int32)] if num_labels else []))
