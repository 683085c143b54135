import numpy as np
import pytest

from vdiff.data import Rows, batches
from vdiff.data.permutations import drawn, keyed

NUM_IMAGES = 10


def images(num_images=NUM_IMAGES):
    # Image i holds the number i in every pixel, so that a batch tells which images it has.
    return np.broadcast_to(np.arange(num_images, dtype=np.uint8)[:, None, None, None], (num_images, 2, 3, 1))


def stream(batch, num_steps):
    return np.concatenate([batch(step)[:, 0, 0, 0] for step in range(num_steps)])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 23])
def test_each_epoch_visits_every_image_exactly_once(batch_size):
    # 3 divides no multiple of 10 below 30 and 23 exceeds N: batches straddle, and span three epochs.
    batch = batches(images(), batch_size, seed=0)
    epochs = stream(batch, NUM_IMAGES * 3)[: 3 * batch_size * NUM_IMAGES].reshape(-1, NUM_IMAGES)
    assert len(epochs) == 3 * batch_size
    assert (np.sort(epochs, axis=1) == np.arange(NUM_IMAGES)).all()


def test_the_stream_is_the_documented_permutations_end_to_end():
    expected = np.concatenate(
        [np.random.default_rng((7, epoch)).permutation(NUM_IMAGES) for epoch in range(4)]
    )
    for batch_size in (4, 8, 20, 40):
        assert (stream(batches(images(), batch_size, seed=7), 40 // batch_size) == expected).all()


def test_a_batch_keeps_shape_and_dtype():
    got = batches(images(), 4, seed=0)(2)
    assert got.shape == (4, 2, 3, 1)
    assert got.dtype == np.uint8


def test_pure_function_of_the_step_in_any_order():
    in_order = batches(images(), 3, seed=1)
    expected = [in_order(step) for step in range(12)]
    shuffled = batches(images(), 3, seed=1)
    for step in (11, 0, 3, 3, 7, 2, 6, 10, 0):
        assert (shuffled(step) == expected[step]).all()


def test_a_resume_sees_what_the_uninterrupted_run_would_have():
    whole = stream(batches(images(), 4, seed=3), 20)
    resumed = batches(images(), 4, seed=3)
    assert (np.concatenate([resumed(step)[:, 0, 0, 0] for step in range(13, 20)]) == whole[13 * 4 :]).all()


def test_changing_a_batch_changes_nothing_else():
    source = images().copy()
    batch = batches(source, 3, seed=0)
    before = batch(0).copy()
    batch(0)[:] = 99
    assert (source < NUM_IMAGES).all()
    assert (batch(0) == before).all()


def test_seeds_and_epochs_differ():
    num_images = 200
    epochs = stream(batches(images(num_images), num_images, seed=0), 2).reshape(2, -1)
    other_seed = stream(batches(images(num_images), num_images, seed=1), 1)
    # Two independent permutations agree at about one position.
    assert (epochs[0] == epochs[1]).sum() < 10
    assert (epochs[0] == other_seed).sum() < 10
    # (seed, epoch) = (0, 1) and (1, 0) must not be the same draw.
    assert (epochs[1] == other_seed).sum() < 10


def test_a_permutation_is_drawn_once_an_epoch(monkeypatch):
    drawn = []
    rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or rng(seed))
    batch = batches(images(), 3, seed=5)
    for step in range(10):
        batch(step)
    assert drawn == [(5, 0), (5, 1), (5, 2)]


def test_steps_may_be_numpy_integers():
    batch = batches(images(), 3, seed=0)
    assert (batch(np.int32(4)) == batch(4)).all()


@pytest.mark.parametrize(
    ("arguments", "error", "line"),
    [
        ((images(), 0, 0), ValueError, "batch_size: got 0, expected an integer of at least 1"),
        ((images(), -3, 0), ValueError, "batch_size: got -3"),
        ((images(), 2.5, 0), TypeError, r"batch_size: got 2\.5, expected an integer"),
        ((images(), 2, -1), ValueError, "seed: got -1, expected an integer of at least 0"),
        ((images()[:0], 2, 0), ValueError, r"images: got shape \[0, 2, 3, 1\], expected \[N, ...\]"),
        (((images(), images()), 2, 0), TypeError, "images: got tuple, expected one NumPy array, or Rows"),
        ((np.zeros(()), 2, 0), ValueError, r"images: got shape \[\], expected"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, line, unchecked):
    with pytest.raises(error, match=line):
        batches(*arguments)


@pytest.mark.parametrize("permutation", [drawn, keyed])
@pytest.mark.parametrize(("batch_size", "count"), [(6, 2), (6, 3), (4, 4), (24, 2), (12, 1)])
def test_the_shares_of_all_hosts_are_the_batch_of_one(batch_size, count, permutation):
    # Ten images: shares straddle epochs, and of a batch of 24 each spans several.
    settings = {"seed": 2, "permutation": permutation}
    alone = batches(images(), batch_size, **settings)
    hosts = [batches(images(), batch_size, **settings, share=(index, count)) for index in range(count)]
    for step in (0, 1, 7, 3):
        parts = [host(step) for host in hosts]
        assert {len(part) for part in parts} == {batch_size // count}
        assert (np.concatenate(parts) == alone(step)).all()


@pytest.mark.parametrize("permutation", [drawn, keyed])
def test_a_host_reads_its_own_share_and_no_other_row(permutation):
    asked = []

    def read(indices):
        asked.append(indices.tolist())
        return images()[indices]

    rows = Rows(images().shape, images().dtype, read)
    host = batches(rows, 6, seed=2, share=(1, 3), permutation=permutation)
    got = np.concatenate([host(step)[:, 0, 0, 0] for step in range(5)])
    assert asked == got.reshape(5, 2).tolist()
    epochs = np.concatenate([permutation(2, epoch, NUM_IMAGES)(np.arange(NUM_IMAGES)) for epoch in range(3)])
    assert (got == epochs.reshape(5, 3, 2)[:, 1].ravel()).all()


def test_keyed_epochs_visit_every_image_once_and_resume():
    batch = batches(images(), 3, seed=0, permutation=keyed)
    epochs = stream(batch, 20).reshape(-1, NUM_IMAGES)
    assert (np.sort(epochs, axis=1) == np.arange(NUM_IMAGES)).all()
    again = batches(images(), 3, seed=0, permutation=keyed)
    assert (again(17)[:, 0, 0, 0] == epochs.ravel()[51:54]).all()


@pytest.mark.parametrize(
    ("batch_size", "share", "error", "line"),
    [
        (128, (0, 3), ValueError, "batch_size: got 128 for 3 hosts, .* multiple of 3; .* of 126 or 129"),
        (2, (0, 3), ValueError, "batch_size: got 2 for 3 hosts, .*; use a batch size of 3$"),
        (6, (3, 3), ValueError, r"share: got host 3 of 3, expected an index of 0\.\.2"),
        (6, (-1, 3), ValueError, "share: index: got -1"),
        (6, (0, 0), ValueError, "share: count: got 0, expected an integer of at least 1"),
        (6, (0.0, 1), TypeError, r"share: index: got 0\.0, expected an integer"),
    ],
)
def test_a_share_that_cannot_be_is_refused(batch_size, share, error, line, unchecked):
    with pytest.raises(error, match=line):
        batches(images(), batch_size, 0, share=share)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step: got -1, expected an integer of at least 0"):
        batches(images(), 2, seed=0)(-1)
