"""How an objective of one datum is lifted to a batch, and what it is given besides the datum.

    per_example     (key, params, x)             nothing but a key
    stratified      (key, params, x, u)          a coordinate of a low-discrepancy lattice, for times
    persistent      (key, params, x, slot)       what the position kept from the last step

Each gives `(key, params, batch [B, ...], positions [B], aux) -> (terms, each [B]; aux)`. Positions are those in the
GLOBAL batch: whatever belongs to one is the same on one device and on eight.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vdiff.types import Key, Objective, Params, PyTree, Terms


def per_example(objective: Objective) -> Callable[..., tuple[Terms, PyTree]]:
    """Lift an objective of one datum to a batch, giving each datum its own key and nothing else.

    Args:
        objective: `(key, params, x) -> Terms`.

    Returns:
        `(key, params, batch [B, ...], positions [B], aux) -> (terms, each [B]; aux)`.
    """

    def lifted(
        key: Key, params: Params, batch: PyTree, positions: Int[Array, " B"], aux: PyTree
    ) -> tuple[dict[str, Float[Array, " B"]], PyTree]:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)
        return jax.vmap(objective, in_axes=(0, None, 0))(keys, params, batch), aux

    return lifted


def stratified(
    objective: Callable[[Key, Params, PyTree, Array], Terms],
) -> Callable[..., tuple[Terms, PyTree]]:
    """Lift an objective that samples a time, giving each datum its coordinate of a low-discrepancy lattice.

        u_i = frac(u_0 + i phi),   phi = 2654435769 / 2^32, the golden ratio's fraction

    u_0 is uniform and new at every step, so each u_i is uniform and the estimate as unbiased as with independent draws;
    but any run of data covers [0, 1) evenly. i is the position in the GLOBAL batch, in whole numbers modulo 2^32: the
    same on any number of devices, and exact however large i.

    Args:
        objective: `(key, params, x, u []) -> Terms`, u in [0, 1), e.g. a diffusion's `elbo_terms_at`.

    Returns:
        What `make_train_step(batching=stratified)` takes.

    Source: Kingma et al., Variational Diffusion Models, 2021, appendix I.1; Roberts, The Unreasonable Effectiveness of
    Quasirandom Sequences, 2018 (the lattice).
    """

    def lifted(
        key: Key, params: Params, batch: PyTree, positions: Int[Array, " B"], aux: PyTree
    ) -> tuple[dict[str, Float[Array, " B"]], PyTree]:
        key_data, key_time = jax.random.split(key)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key_data, positions)
        start = jax.random.bits(key_time, (), jnp.uint32)
        lattice = start + positions.astype(jnp.uint32) * jnp.uint32(2654435769)
        # The upper 24 bits are all that float32 holds; so u stays below one.
        u = (lattice >> 8).astype(jnp.float32) * (1.0 / (1 << 24))
        return jax.vmap(objective, in_axes=(0, None, 0, 0))(keys, params, batch, u), aux

    return lifted


def persistent(
    objective: Callable[[Key, Params, PyTree, PyTree], tuple[Terms, PyTree]],
) -> Callable[..., tuple[Terms, PyTree]]:
    """Lift an objective that hands something on to the next step, such as the chain of persistent CD.

    Each position of the GLOBAL batch has a slot of `TrainState.aux`, which `init_state(..., aux=...)` fills: the
    datum that comes to that position is judged with what is in it, and leaves what it returns. Slots stay with their
    positions, whatever the devices. No gradient goes through them, and an update that is skipped leaves them as they
    were.

    Args:
        objective: `(key, params, x, slot) -> (Terms, slot)`, e.g. `persistent_contrastive_divergence(rbm, 1)`.

    Returns:
        What `make_train_step(batching=persistent)` takes.
    """

    def lifted(
        key: Key, params: Params, batch: PyTree, positions: Int[Array, " B"], aux: PyTree
    ) -> tuple[dict[str, Float[Array, " B"]], PyTree]:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)
        return jax.vmap(objective, in_axes=(0, None, 0, 0))(keys, params, batch, aux)

    return lifted


def check_slots(aux: PyTree, size: int) -> None:
    """Refuse an aux that has not one slot for each datum of a batch.

    Raises:
        ValueError: if a leaf of aux has another length than `size`.
    """
    for leaf in jax.tree.leaves(aux):
        if leaf.shape[:1] != (size,):
            raise ValueError(
                f"aux: got a leaf of shape {list(leaf.shape)} for a batch of {size}, expected [{size}, ...], one slot "
                "per position; start it with init_state(..., aux=...) for this batch size"
            )
