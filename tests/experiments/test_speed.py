"""The figures that `experiments.speed` computes, not times."""

import pytest

from experiments import speed


@pytest.mark.slow
def test_products_are_counted_and_nothing_is_compiled_twice():
    figures = speed.run(speed.Config(hidden=(16,), batch_size=4, num_calls=2, num_measurements=3))
    # 784-16-100 and 50-16-784, forward and back by weights, back by inputs but for the first.
    layers = 784 * 16 + 16 * 100 + 50 * 16 + 16 * 784
    assert figures["its matrix products, GFLOP"] == pytest.approx(2 * 4 * (3 * layers - 784 * 16) / 1e9)
    assert figures["compiled by a second fit"] == 0
    assert figures["share of the peak"] > 0
