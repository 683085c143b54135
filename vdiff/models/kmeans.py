r"""Starting locations for a mixture: k-means++ draws them from the data, spread out.

    the first uniformly, each further one with probability proportional to min_k |x_n - c_k|^2

Source: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007, 2.2.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vdiff.types import Key, check_key


@partial(jax.jit, static_argnames="num_components")
def kmeans_plus_plus(key: Key, data: Float[Array, "N dim"], num_components: int) -> Float[Array, "C dim"]:
    """Pick data as starting locations, spread out at random.

        the first uniformly, each further one with probability proportional to min_k |x_n - c_k|^2

    Args:
        key: a typed key.
        data: [N, dim].
        num_components: C, how many to pick.

    Returns:
        [C, dim], rows of data; distinct while the data have that many distinct rows.

    Source: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007, 2.2.
    """
    key_first, key_rest = jax.random.split(check_key(key))
    first = data[jax.random.randint(key_first, (), 0, data.shape[0])]

    def pick(nearest: Array, key: Key) -> tuple[Array, Array]:
        centre = data[jax.random.categorical(key, jnp.log(nearest))]
        return jnp.minimum(nearest, square_distances(data, centre)), centre

    keys = jax.random.split(key_rest, num_components - 1)
    _, others = jax.lax.scan(pick, square_distances(data, first), keys)
    return jnp.concatenate([first[None], others])


def square_distances(data: Float[Array, "N dim"], loc: Float[Array, " dim"]) -> Float[Array, " N"]:
    """Evaluate |x_n - loc|^2 for every datum."""
    return jnp.sum(jnp.square(data - loc[None, :]), axis=1)
