r"""Self-attention among the N positions of one datum.

out_i = sum_j softmax_j( q_i . k_j / sqrt(d) ) v_j          for each head, d its width
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attend(
    q: Float[Array, "heads N d"], k: Float[Array, "heads N d"], v: Float[Array, "heads N c"]
) -> Float[Array, "heads N c"]:
    """Let each position average the values of all, by its query and their keys.

    The products are in the dtype of the arguments, the softmax in float32. Heads lead because products over
    a leading axis are fast on every device; over a middle one, a CPU takes up to six times as long.

    Args:
        q: queries, [heads, N, d].
        k: keys, [heads, N, d].
        v: values, [heads, N, c].

    Returns:
        [heads, N, c].

    Source:
        Vaswani et al., Attention Is All You Need, 2017, equation 1.
    """
    logits = jnp.einsum("hnd,hmd->hnm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1]), axis=-1).astype(v.dtype)
    return jnp.einsum("hnm,hmd->hnd", weights, v)


def self_attention(qkv: Float[Array, "N d"], heads: int) -> Float[Array, "N c"]:
    """Attend with queries, keys and values that lie side by side, each cut into heads.

    Args:
        qkv: [N, 3 C], from one product.
        heads: number of heads, a divisor of C.

    Returns:
        [N, C], the heads side by side.
    """
    num, triple = qkv.shape
    q, k, v = qkv.reshape(num, 3, heads, triple // (3 * heads)).transpose(1, 2, 0, 3)
    return attend(q, k, v).swapaxes(0, 1).reshape(num, triple // 3)
