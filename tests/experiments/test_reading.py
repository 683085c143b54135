"""What is read comes back, and every source is measured by itself."""

import jax
import numpy as np
import pytest

from experiments import reading


@pytest.mark.parametrize("name", list(reading.SOURCES))
def test_a_source_holds_what_was_written(tmp_path, name):
    pytest.importorskip("grain" if name == "records" else "numpy")
    write, open_ = reading.SOURCES[name]
    write(tmp_path / "data", reading.noise(10))
    rows = open_(tmp_path / "data")
    assert rows.shape == (10, *reading.SHAPE) and rows.dtype == np.uint8
    np.testing.assert_array_equal(np.asarray(rows[np.arange(10)]), np.stack(list(reading.noise(10))))


@pytest.mark.slow
def test_one_process_measures_its_own_memory_and_pace(tmp_path):
    write, _ = reading.SOURCES["shards"]
    write(tmp_path / "data", reading.noise(300))
    with jax.numpy_dtype_promotion("standard"):
        figures = reading.measure("shards", tmp_path / "data", reading.Config(batch_size=8, num_steps=5))
    # At least the interpreter, at most the machine's.
    assert 50 < figures.peak < 100_000
    assert figures.batches > 0 and figures.steps > 0
