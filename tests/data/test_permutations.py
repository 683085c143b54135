from collections import Counter
from itertools import permutations as all_orders

import numpy as np
import pytest

from vdiff.data.permutations import drawn, keyed

both = pytest.mark.parametrize("permutation", [drawn, keyed])


def whole(permutation, num_rows, seed=0, epoch=0):
    return permutation(seed, epoch, num_rows)(np.arange(num_rows))


def z_of_chi_square(counts, expected):
    """How far a chi-square statistic lies from its mean, in standard deviations."""
    freedom = len(counts) - 1
    return (np.sum((counts - expected) ** 2 / expected) - freedom) / np.sqrt(2 * freedom)


@both
def test_every_size_is_permuted_one_to_one(permutation):
    for num_rows in [*range(1, 130), 4095, 4096, 4097, 99_991]:
        indices = whole(permutation, num_rows, seed=3, epoch=1)
        assert indices.dtype == np.int64
        assert (np.sort(indices) == np.arange(num_rows)).all(), num_rows


@both
def test_any_positions_in_any_order_give_the_same_indices(permutation):
    indices = whole(permutation, 1000)
    positions = np.random.default_rng(0).integers(0, 1000, 300)
    again = permutation(0, 0, 1000)
    assert (again(positions) == indices[positions]).all()
    assert again(np.arange(0)).shape == (0,)


@both
def test_seeds_and_epochs_are_independent(permutation):
    # Two independent permutations agree at about one position.
    for other in ({"seed": 1}, {"epoch": 1}):
        assert (whole(permutation, 5000) == whole(permutation, 5000, **other)).sum() < 10
    first, second = whole(permutation, 5000, seed=0, epoch=1), whole(permutation, 5000, seed=1, epoch=0)
    assert (first == second).sum() < 10


def test_drawn_is_numpys_permutation():
    assert (whole(drawn, 50, seed=7, epoch=2) == np.random.default_rng((7, 2)).permutation(50)).all()


@pytest.mark.slow
def test_keyed_gives_all_orders_alike():
    num_rows, num_epochs = 4, 1200
    orders = list(all_orders(range(num_rows)))
    seen = Counter(tuple(whole(keyed, num_rows, epoch=epoch).tolist()) for epoch in range(num_epochs))
    counts = np.array([seen[order] for order in orders])
    assert counts.sum() == num_epochs
    assert abs(z_of_chi_square(counts, num_epochs / len(orders))) < 5


@pytest.mark.slow
def test_keyed_sends_each_position_and_neighbours_anywhere():
    num_rows, num_epochs = 20, 1500
    epochs = np.stack([whole(keyed, num_rows, epoch=epoch) for epoch in range(num_epochs)])
    for position in (0, 1, 10, 19):
        counts = np.bincount(epochs[:, position], minlength=num_rows)
        assert abs(z_of_chi_square(counts, num_epochs / num_rows)) < 5
    # The distance of two neighbours modulo N is any but zero.
    distances = np.bincount((epochs[:, 1] - epochs[:, 0]) % num_rows, minlength=num_rows)
    assert distances[0] == 0
    assert abs(z_of_chi_square(distances[1:], num_epochs / (num_rows - 1))) < 5
    # And a random permutation has one fixed point on average, with variance one.
    fixed = (epochs == np.arange(num_rows)).sum(1)
    assert abs(fixed.mean() - 1) < 5 / np.sqrt(num_epochs)


def test_keyed_holds_nothing_however_many_rows():
    num_rows = 10**15 + 37
    indices = keyed(0, 3, num_rows)(np.arange(1000))
    assert len(set(indices.tolist())) == 1000 and 0 <= indices.min() and indices.max() < num_rows
    # Uniform on [0, N): the mean has a standard error of N / sqrt(12 n).
    assert abs(indices.mean() / num_rows - 0.5) < 5 / np.sqrt(12 * 1000)
    # The last position is sent somewhere else than the first thousand.
    assert keyed(0, 3, num_rows)(np.array([num_rows - 1]))[0] not in set(indices.tolist())


def test_keyed_is_the_documented_network():
    """By hand, in Python's integers, for 7 = 3 x 3 - 2 data."""
    keys = [int(key) for key in np.random.SeedSequence((5, 2)).generate_state(24, np.uint64)]
    mask = 2**64 - 1

    def mixed(value):
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    def sent(index):
        halves = list(divmod(index, 3))
        for i, key in enumerate(keys):
            halves[i % 2] = (halves[i % 2] + mixed(halves[1 - i % 2] ^ key)) % 3
        index = halves[0] * 3 + halves[1]
        return index if index < 7 else sent(index)

    assert whole(keyed, 7, seed=5, epoch=2).tolist() == [sent(index) for index in range(7)]
