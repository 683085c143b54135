r"""An epoch's permutation of N data as a function of a seed and the epoch: held in memory, or computed index by index.

    drawn    NumPy's shuffle: 8 N bytes, and a moment at the start of an epoch
    keyed    a Feistel network over Z_a x Z_b, a b >= N: no memory, and a bijection for every N

The network writes an index as i = l b + r and adds to one half a hash of the other, in turn:

    l <- l + F_0(r)  mod a,    r <- r + F_1(l)  mod b,    l <- l + F_2(r)  mod a,    ...

Each line can be undone, so the whole is a permutation of 0 .. a b - 1. What comes out as N or more goes through again
until it is below N ("cycle walking"), which leaves a permutation of 0 .. N - 1. a b - N is below the square root of N,
rounded up, so that of many data hardly any walk.

Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002; Steele, Lea and Flood, Fast Splittable
Pseudorandom Number Generators, 2014 (the hash).
"""

import math
from collections.abc import Callable

import numpy as np

Permutation = Callable[[int, int, int], Callable[[np.ndarray], np.ndarray]]
"""`(seed, epoch, num_rows) -> (positions int64 [n]) -> indices int64 [n]`, one to one on 0 .. num_rows - 1."""

_ROUNDS = 24  # of six data all 720 orders come up alike; 10 rounds would do for a thousand data, not for six


def drawn(seed: int, epoch: int, num_rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """Shuffle all indices by `np.random.default_rng((seed, epoch))`, and hold them.

    Args:
        seed: a non-negative integer.
        epoch: a non-negative integer.
        num_rows: N, at least 1.

    Returns:
        `(positions [n]) -> indices [n]`.
    """
    indices = np.random.default_rng((seed, epoch)).permutation(num_rows)
    return lambda positions: indices[positions]


def keyed(seed: int, epoch: int, num_rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """Compute where each position goes, and hold nothing.

    Args:
        seed: a non-negative integer.
        epoch: a non-negative integer.
        num_rows: N, at least 1.

    Returns:
        `(positions [n]) -> indices [n]`, the same under every version of NumPy.
    """
    high = math.isqrt(num_rows - 1) + 1
    low = -(-num_rows // high)
    # The algorithm of SeedSequence is frozen.
    keys = np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64)

    def once(indices: np.ndarray) -> np.ndarray:
        left, right = np.divmod(indices, np.uint64(low))
        for i, key in enumerate(keys):
            if i % 2 == 0:
                left = (left + _hash(right ^ key) % np.uint64(high)) % np.uint64(high)
            else:
                right = (right + _hash(left ^ key) % np.uint64(low)) % np.uint64(low)
        return left * np.uint64(low) + right

    def permutation(positions: np.ndarray) -> np.ndarray:
        indices = once(np.asarray(positions, np.uint64))
        while (outside := indices >= num_rows).any():
            indices[outside] = once(indices[outside])
        return indices.astype(np.int64)

    return permutation


def _hash(values: np.ndarray) -> np.ndarray:
    """Mix 64 bits, as the last lines of SplitMix64 do; products wrap."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
