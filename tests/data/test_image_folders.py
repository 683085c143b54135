"""What a folder's images are read as; `test_sets.py` asks the rest by way of `load`."""

import numpy as np
import pytest

from vdiff.data.image_folders import hold_out_tenth, open_images
from vdiff.data.rows import Rows
from vdiff.data.shards import write_shards


def test_what_is_read_is_what_was_asked_for(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 2, 3), np.uint8)
    write_shards(tmp_path / "grey", images, rows_per_shard=4)
    rows, levels = open_images(tmp_path / "grey")
    assert levels == 256 and rows.shape == (9, 2, 3, 1)
    assert (rows[[8, 0]][..., 0] == images[[8, 0]]).all() and (rows[5][..., 0] == images[5]).all()
    assert rows[[]].shape == (0, 2, 3, 1)


@pytest.mark.parametrize(("num_rows", "num_test"), [(2, 1), (9, 1), (20, 2), (39, 3)])
def test_a_tenth_is_held_out_and_nothing_read(num_rows, num_test):
    asked = []
    rows = Rows((num_rows,), np.dtype(np.int64), lambda indices: asked.append(indices) or indices)
    kept, held_out, order = hold_out_tenth(rows, "mine")
    assert asked == [] and (len(kept), len(held_out)) == (num_rows - num_test, num_test)
    both = [*np.asarray(kept), *np.asarray(held_out)]
    assert both == order(np.arange(num_rows)).tolist() and sorted(both) == list(range(num_rows))
    with pytest.raises(ValueError, match="mine: got 1 image"):
        hold_out_tenth(rows[:1], "mine")
