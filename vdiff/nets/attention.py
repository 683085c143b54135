r"""Self-attention among the N positions of one datum.

out_i = sum_j softmax_j( q_i . k_j / sqrt(d) ) v_j          for each head, d its width
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attend(
    q: Float[Array, "N heads d"], k: Float[Array, "N heads d"], v: Float[Array, "N heads d"]
) -> Float[Array, "N heads d"]:
    """Let each position average the values of all, by its query and their keys.

    The products are in the dtype of the arguments, the softmax in float32.

    Args:
        q: queries, [N, heads, d].
        k: keys, [N, heads, d].
        v: values, [N, heads, d].

    Returns:
        [N, heads, d].

    Source:
        Vaswani et al., Attention Is All You Need, 2017, equation 1.
    """
    logits = jnp.einsum("nhd,mhd->hnm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1]), axis=-1).astype(v.dtype)
    return jnp.einsum("hnm,mhd->nhd", weights, v)
