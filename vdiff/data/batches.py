"""Batches as a pure function of the step, so that the step is the whole state of the iterator.

    stream  = perm_0, perm_1, perm_2, ...        one permutation of the N images for every epoch
    batch t = images[stream[t B : (t + 1) B]]    B = batch_size

No image is dropped: a batch may straddle two epochs, and B may exceed N. A run resumed at step t sees the
very batches that the uninterrupted run would have seen.
"""

import operator
from collections.abc import Callable

import numpy as np


def batches(images: np.ndarray, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """Build `batch(step)`, positions step * B .. step * B + B - 1 of the stream of shuffled epochs.

    Args:
        images: [N, ...], one array; it is indexed, never changed.
        batch_size: B, how many images a batch has; it may exceed N.
        seed: a non-negative integer; epoch e is shuffled by `np.random.default_rng((seed, e))`.

    Returns:
        `(step) -> [B, ...]`, a fresh array of the dtype of `images`; a pure function of the step.

    Raises:
        TypeError: if `images` is not one NumPy array, or a number is not an integer.
        ValueError: if there is no image, `batch_size` is below 1, or `seed` or a step is negative.
    """
    if not isinstance(images, np.ndarray):
        raise TypeError(
            f"images: got {type(images).__name__}, expected one NumPy array; use np.asarray(images)"
        )
    if images.ndim == 0 or len(images) == 0:
        raise ValueError(f"images: got shape {list(images.shape)}, expected [N, ...] with N at least 1")
    num_images = len(images)
    batch_size = _check_integer(batch_size, "batch_size", at_least=1)
    seed = _check_integer(seed, "seed", at_least=0)
    permutations: dict[int, np.ndarray] = {}

    def batch(step: int | np.integer) -> np.ndarray:
        nonlocal permutations
        start = _check_integer(step, "step", at_least=0) * batch_size
        stop = start + batch_size
        # Only the epochs of this batch are kept. The dict is replaced and never changed, so that a
        # prefetching thread may call this too.
        known = permutations
        in_use = {}
        for epoch in range(start // num_images, (stop - 1) // num_images + 1):
            fresh = known.get(epoch)
            in_use[epoch] = _permutation(seed, epoch, num_images) if fresh is None else fresh
        permutations = in_use
        pieces = [
            perm[max(start - epoch * num_images, 0) : stop - epoch * num_images]
            for epoch, perm in in_use.items()
        ]
        return images[np.concatenate(pieces)]

    return batch


def _permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_images)


def _check_integer(value: int | np.integer, name: str, *, at_least: int) -> int:
    try:
        value = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: got {value!r}, expected an integer; convert it with int(...)") from error
    if value < at_least:
        raise ValueError(f"{name}: got {value}, expected an integer of at least {at_least}")
    return value
