"""The trace of a Jacobian, exactly and by probes whose mean and variance are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.diffusion.divergence import exact_divergence, hutchinson

SHAPE = (3, 2, 2)
MIX = np.random.default_rng(0).normal(size=(12, 12)) / 3


def field(z):
    flat = z.reshape(-1)
    return jnp.sin(jnp.asarray(MIX, z.dtype) @ flat + jnp.square(flat)).reshape(z.shape)


def jacobian(z):
    """Of `field`, in float64."""
    z = np.asarray(z, np.float64).reshape(-1)
    return np.cos(MIX @ z + z**2)[:, None] * (MIX + np.diag(2 * z))


Z = jax.random.normal(jax.random.key(3), SHAPE)


@pytest.mark.parametrize("chunk_size", [1, 5, 12, 64])
def test_exact_on_any_shape_and_chunk(key, chunk_size):
    value, div = jax.jit(lambda z: exact_divergence(chunk_size)(key, SHAPE)(field, z))(Z)
    np.testing.assert_allclose(value, field(Z), rtol=1e-6)
    np.testing.assert_allclose(div, np.trace(jacobian(Z)), atol=4e-6)


@pytest.mark.parametrize("num_probes", [1, 3])
def test_hutchinsons_mean_and_variance(num_probes):
    """Over 40,000 keys; a variance with one pair of entries missing would be off by 2 %, four of its errors."""
    keys = jax.random.split(jax.random.key(1), 40_000)
    estimate = jax.jit(jax.vmap(lambda key: hutchinson(num_probes)(key, SHAPE)(field, Z)[1]))
    draws = np.asarray(estimate(keys), np.float64)
    z_score = (draws.mean() - np.trace(jacobian(Z))) / (draws.std() / np.sqrt(len(draws)))
    assert abs(z_score) < 5
    symmetric = (jacobian(Z) + jacobian(Z).T) / 2
    off_diagonal = symmetric - np.diag(np.diag(symmetric))
    np.testing.assert_allclose(draws.var(), 2 * np.sum(off_diagonal**2) / num_probes, rtol=0.04)


def test_no_variance_where_dimensions_do_not_interact(key):
    _, div = hutchinson()(key, SHAPE)(jnp.sin, Z)
    np.testing.assert_allclose(div, np.sum(np.cos(np.asarray(Z, np.float64))), rtol=1e-6)


@pytest.mark.parametrize("divergence", [exact_divergence(2), hutchinson(4)], ids=["exact", "hutchinson"])
def test_the_field_is_evaluated_once(key, divergence):
    evaluated = []

    def counted(z):
        jax.debug.callback(lambda: evaluated.append(1))
        return field(z)

    jax.block_until_ready(jax.jit(lambda z: divergence(key, SHAPE)(counted, z))(Z))
    jax.effects_barrier()
    assert len(evaluated) == 1


def test_probes_belong_to_the_key(key):
    first, again = (hutchinson()(key, SHAPE)(field, Z)[1] for _ in range(2))
    other = hutchinson()(jax.random.key(9), SHAPE)(field, Z)[1]
    assert first == again != other


def test_refusals():
    with pytest.raises(ValueError, match="chunk_size: got 0, expected at least 1"):
        exact_divergence(0)
    with pytest.raises(ValueError, match="num_probes: got 0, expected at least 1"):
        hutchinson(0)
    for divergence in (exact_divergence(), hutchinson()):
        with pytest.raises(TypeError, match="expected a typed key"):
            divergence(jax.random.PRNGKey(0), SHAPE)
