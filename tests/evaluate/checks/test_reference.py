"""A reference density that sums to one, moves that are symmetric, coordinates that come back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from vdiff.evaluate.checks.reference import (
    Joint,
    coordinate_names,
    features,
    fit_reference,
    is_inside,
    log_prob,
    merge,
    move,
    positions,
    split,
    transport,
)

RNG = np.random.default_rng(0)
N = 1_000


def pilot():
    """Correlated reals, whole numbers as floats, integers with a gap, one-hot vectors, a point on the simplex."""
    reals = (RNG.normal(size=(N, 2)) @ np.array([[1.0, 0.8], [0.0, 0.5]]) + [3.0, -1.0]).astype(np.float32)
    return Joint(
        x={
            "bits": RNG.integers(0, 2, (N, 2)).astype(np.float32),
            "levels": RNG.choice([0, 1, 5], (N,)).astype(np.int32),
        },
        z={
            "hot": np.eye(3, dtype=np.int32)[RNG.integers(0, 3, N)],
            "real": reals,
            "simplex": RNG.dirichlet(np.ones(3), N).astype(np.float32),
        },
    )


DRAWS = pilot()
REFERENCE = fit_reference(DRAWS)
FIRST = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), DRAWS)


def test_leaves_are_told_apart():
    assert [atoms is None for atoms in REFERENCE.atoms] == [False, False, False, True, True]
    assert REFERENCE.atoms[1].levels.tolist() == [0, 1, 5]
    assert REFERENCE.is_exchanged.tolist() == [False] * 3 + [True] * 3
    assert np.all(REFERENCE.low[2:] == REFERENCE.high[2:])  # The simplex is left alone.
    np.testing.assert_allclose(REFERENCE.loc[:2], DRAWS.z["real"].mean(0), rtol=1e-5)
    names = coordinate_names(REFERENCE, FIRST)
    assert names.continuous[0] == "z['real'][0]" and names.moved[2] == "x['levels']"
    # Values seen elsewhere are levels too.
    other = DRAWS._replace(x={**DRAWS.x, "levels": np.full(N, 7, np.int32)})
    assert fit_reference(DRAWS, other).atoms[1].levels.tolist() == [0, 1, 5, 7]


def test_coordinates_come_back():
    c, d = split(REFERENCE, FIRST)
    assert c.shape == (5,) and d.shape == (6,) and np.all(d >= 0)
    back = merge(REFERENCE, FIRST, c, d)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(FIRST), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    unknown = FIRST._replace(x={**FIRST.x, "levels": jnp.int32(3)})
    c, d = split(REFERENCE, unknown)
    assert d[2] == -1 and not is_inside(REFERENCE, c, d)
    assert merge(REFERENCE, unknown, c, d).x["levels"] == 3
    assert positions(REFERENCE, d)[2] == 0.0


def test_inside_means_range_and_row_sums():
    c, d = split(REFERENCE, FIRST)
    c = c.at[2:].set(REFERENCE.loc[2:])
    assert is_inside(REFERENCE, c, d)
    assert not is_inside(REFERENCE, c.at[0].set(99.0), d)
    assert not is_inside(REFERENCE, c, d.at[3:].set(1))
    assert features(REFERENCE, c.at[0].set(99.0), d)[0] == 4.0


def test_moves_are_symmetric():
    """The kernel as a matrix, by its noise on a grid: P(d -> d') = P(d' -> d), and it moves."""
    noise = jnp.asarray([((i + 0.5) / 12, (j + 0.5) / 12) for i in range(12) for j in range(12)], jnp.float32)
    states = [
        (*bits, level, *hot)
        for bits in itertools.product([0, 1], repeat=2)
        for level in range(3)
        for hot in np.eye(3, dtype=int)
    ]
    index = {tuple(map(int, s)): i for i, s in enumerate(states)}
    for k in range(6):
        moved = jax.jit(
            jax.vmap(jax.vmap(lambda d, u, k=k: move(REFERENCE, d, jnp.int32(k), u), (None, 0)), (0, None))
        )(jnp.asarray(states, jnp.int32), noise)
        matrix = np.zeros((len(states), len(states)))
        for i, row in enumerate(np.asarray(moved)):
            for end in row:
                matrix[i, index[tuple(end.tolist())]] += 1  # A KeyError is a state outside the support.
        np.testing.assert_array_equal(matrix, matrix.T)
        assert np.trace(matrix) < 0.6 * matrix.sum()
    unknown = jnp.asarray([0, 0, -1, 1, 0, 0], jnp.int32)
    np.testing.assert_array_equal(move(REFERENCE, unknown, jnp.int32(2), jnp.array([0.2, 0.9])), unknown)


def test_the_reference_is_the_fitted_density():
    draws = Joint((), {"i": RNG.choice([2, 4], N, p=[0.3, 0.7]), "r": DRAWS.z["real"]})
    reference = fit_reference(draws)
    c, d = jnp.array([2.5, -1.2]), jnp.array([1], jnp.int32)
    normal = scipy.stats.multivariate_normal(draws.z["r"].mean(0), np.cov(draws.z["r"].T, ddof=0))
    expected = normal.logpdf(np.asarray(c)) + np.log((np.mean(draws.z["i"] == 4) * N + 0.5) / (N + 1))
    np.testing.assert_allclose(log_prob(reference, c, d), expected, rtol=1e-4)
    noise = jax.random.uniform(jax.random.key(0), (40_000, 3), minval=1e-6)
    c, d = jax.jit(jax.vmap(lambda u: transport(reference, u)))(noise)
    np.testing.assert_allclose(np.cov(c.T), np.cov(draws.z["r"].T), atol=0.05)
    np.testing.assert_allclose(c.mean(0), draws.z["r"].mean(0), atol=0.03)
    assert abs(float(d.mean()) - np.mean(draws.z["i"] == 4)) < 0.02
