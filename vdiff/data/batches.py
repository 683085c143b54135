"""Batches as a pure function of the step, so that the step is the whole state of the iterator.

    stream  = perm_0, perm_1, perm_2, ...        one permutation of the N images for every epoch
    batch t = images[stream[t B : (t + 1) B]]    B = batch_size

No image is dropped: a batch may straddle two epochs, and B may exceed N. A run resumed at step t sees the
very batches that the uninterrupted run would have seen. Each of several hosts reads its own part of every batch, and no
other: the parts, one after the other, are the batch that a single host would read.
"""

import operator
from collections.abc import Callable

import numpy as np

from vdiff.data.permutations import Permutation, drawn
from vdiff.data.rows import Rows


def batches(
    images: np.ndarray | Rows,
    batch_size: int,
    seed: int,
    *,
    share: tuple[int, int] = (0, 1),
    permutation: Permutation = drawn,
) -> Callable[[int], np.ndarray]:
    """Build `batch(step)`, positions step * B .. step * B + B - 1 of the stream of shuffled epochs.

    Args:
        images: [N, ...], one array, or `Rows` that are read as they are needed; indexed, never changed.
        batch_size: B, how many images a batch has, over all hosts; it may exceed N.
        seed: a non-negative integer; `permutation` shuffles each epoch by it.
        share: (index, count), e.g. `(jax.process_index(), jax.process_count())`: the part of the batch that this host
            reads, positions index * B / count to (index + 1) * B / count.
        permutation: how an epoch is shuffled: `permutations.drawn`, by `np.random.default_rng((seed, epoch))` in 8 N
            bytes, or `permutations.keyed`, in none.

    Returns:
        `(step) -> [B / count, ...]`, a fresh array of the dtype of `images`; a pure function of the step.

    Raises:
        TypeError: if `images` is neither, or a number is not an integer.
        ValueError: if there is no image, `batch_size` is below 1 or does not divide among the hosts, or `seed` or a
            step is negative.
    """
    if not isinstance(images, np.ndarray | Rows):
        raise TypeError(
            f"images: got {type(images).__name__}, expected one NumPy array, or Rows; use np.asarray(images)"
        )
    if len(images.shape) == 0 or len(images) == 0:
        raise ValueError(f"images: got shape {list(images.shape)}, expected [N, ...] with N at least 1")
    num_images = len(images)
    batch_size = _check_integer(batch_size, "batch_size", at_least=1)
    seed = _check_integer(seed, "seed", at_least=0)
    first, size = _part_of(batch_size, *share)
    epochs: dict[int, Callable[[np.ndarray], np.ndarray]] = {}

    def batch(step: int | np.integer) -> np.ndarray:
        nonlocal epochs
        start = _check_integer(step, "step", at_least=0) * batch_size + first
        stop = start + size
        # Only the epochs of this batch are kept. The dict is replaced and never changed, so that a
        # prefetching thread may call this too.
        known = epochs
        in_use = {}
        for epoch in range(start // num_images, (stop - 1) // num_images + 1):
            fresh = known.get(epoch)
            in_use[epoch] = permutation(seed, epoch, num_images) if fresh is None else fresh
        epochs = in_use
        pieces = [
            index_of(
                np.arange(max(start - epoch * num_images, 0), min(stop - epoch * num_images, num_images))
            )
            for epoch, index_of in in_use.items()
        ]
        return images[np.concatenate(pieces)]

    return batch


def _part_of(batch_size: int, index: int, count: int) -> tuple[int, int]:
    """Find where a host's part of a batch begins, and its size."""
    count = _check_integer(count, "share: count", at_least=1)
    index = _check_integer(index, "share: index", at_least=0)
    if index >= count:
        raise ValueError(f"share: got host {index} of {count}, expected an index of 0..{count - 1}")
    if batch_size % count:
        lower = batch_size // count * count
        fits = " or ".join(str(n) for n in (lower, lower + count) if n)
        raise ValueError(
            f"batch_size: got {batch_size} for {count} hosts, expected a multiple of {count}; use a batch size of "
            f"{fits}"
        )
    size = batch_size // count
    return index * size, size


def _check_integer(value: int | np.integer, name: str, *, at_least: int) -> int:
    try:
        value = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: got {value!r}, expected an integer; convert it with int(...)") from error
    if value < at_least:
        raise ValueError(f"{name}: got {value}, expected an integer of at least {at_least}")
    return value
