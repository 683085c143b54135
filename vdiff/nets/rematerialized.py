"""Networks that forget activations on the way forward and compute them again on the way back.

The forward pass is made twice, so that a training step takes about a third longer, and holds less.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
from jaxtyping import Array

from vdiff.types import Network

Around = Callable[[Callable[..., Array]], Callable[..., Array]]
"""What is put around a block: `(function of the block and its inputs) -> such a function`."""


def rematerialized(network: Network) -> Network:
    """Keep a network's inputs, and compute all that lies within again for the gradient.

    Of several networks, such as an encoder and a decoder, the activations of one are held at a time.

    Args:
        network: any `Network`.

    Returns:
        A `Network` with the same parameters, values and gradients.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    return Network(network.init, jax.checkpoint(network.apply))


def rematerialized_block(function: Callable[..., Array]) -> Callable[..., Array]:
    """Keep a block's inputs, and compute all that lies within again: `dit(shape, around=rematerialized_block)`.

    Args:
        function: `(block, *inputs) -> array`.

    Returns:
        The same function; of d equal blocks the inner activations of one are held at a time.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    return nn.remat(function)


def unchanged(function: Callable[..., Array]) -> Callable[..., Array]:
    """Put nothing around a block."""
    return function


def called(block: nn.Module, *inputs: Array) -> Array:
    """Apply a block: what `around` is put around."""
    return block(*inputs)
