"""k-means++ draws by squared distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.models.kmeans import kmeans_plus_plus


def test_kmeans_plus_plus_picks_by_squared_distance():
    # Points 0, 1 and 4 on a line. First uniform, then by square: P(0, 1) = 1/3 * 1/17, and so on.
    points = np.array([0.0, 1.0, 4.0])
    expected = (points[:, None] - points) ** 2
    expected = expected / expected.sum(axis=1, keepdims=True) / 3
    data = jnp.asarray(points[:, None], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 40_000)
    picked = jax.vmap(kmeans_plus_plus, in_axes=(0, None, None))(keys, data, 2)
    assert picked.shape == (40_000, 2, 1)
    index = np.searchsorted(points, np.asarray(picked)[..., 0])
    pairs = np.eye(9)[index[:, 0] * 3 + index[:, 1]]
    std_error = np.maximum(np.sqrt(expected * (1 - expected) / len(keys)), 1e-6)
    assert np.max(np.abs(pairs.mean(axis=0).reshape(3, 3) - expected) / std_error) < 5


def test_kmeans_plus_plus_third_pick_minds_both_others():
    # Whatever comes first, all three are visited: a pick at distance zero has probability zero.
    data = jnp.array([[0.0, 0.0], [0.0, 0.0], [1e-3, 0.0], [5.0, 5.0]])
    for seed in range(20):
        picked = np.asarray(kmeans_plus_plus(jax.random.key(seed), data, 3))
        assert len(np.unique(picked, axis=0)) == 3
    assert kmeans_plus_plus(jax.random.key(0), data, 1).shape == (1, 2)


def test_raw_keys_are_refused():
    with pytest.raises(TypeError, match=r"expected a typed key"):
        kmeans_plus_plus(jax.random.PRNGKey(0), jnp.zeros((4, 2)), 2)
