"""Normalisation against NumPy in float64, in either precision, far from zero too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.nets.norm import film, group_norm, layer_norm


def standard(h, axes):
    centred = h - h.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-6)


def draw(shape, offset=0.0):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape) * 2.0 + offset, jnp.float32)


@pytest.mark.parametrize("offset", [0.0, -3.0, 1000.0])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_group_norm(groups, offset):
    """Groups are neighbouring channels. A mean 500 times the deviation costs that much of float32, not more."""
    h = draw((5, 4, 6), offset)
    parts = np.split(np.asarray(h, np.float64), groups, axis=-1)
    expected = np.concatenate([standard(part, (0, 1, 2)) for part in parts], axis=-1)
    atol = 3e-6 + 2e-7 * abs(offset)
    np.testing.assert_allclose(group_norm(h, groups), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("shape", [(7, 6), (6,), (2, 3, 5)])
def test_layer_norm(shape):
    h = draw(shape, 1.5)
    expected = standard(np.asarray(h, np.float64), (-1,))
    np.testing.assert_allclose(layer_norm(h), expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("norm", [layer_norm, lambda h: group_norm(h, 2)])
def test_bf16_is_rounded_once(norm):
    """Statistics of a bf16 array are those of the same numbers in float32: the result is off by one rounding."""
    h = draw((5, 4, 6), 20.0).astype(jnp.bfloat16)
    out = norm(h)
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(norm(h.astype(jnp.float32)))
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("norm", [layer_norm, lambda h: group_norm(h, 2)])
def test_constants_become_zero_with_a_finite_gradient(norm):
    h = jnp.full((3, 2, 4), 5.0)
    np.testing.assert_array_equal(norm(h), 0.0)
    gradient = jax.grad(lambda h: jnp.sum(norm(h) * draw((3, 2, 4))))(h)
    assert np.all(np.isfinite(gradient))


def test_film():
    h, scale, shift = draw((2, 3, 4)), draw((4,)), draw((4,), 1.0)
    expected = (1 + np.asarray(scale)) * np.asarray(h) + np.asarray(shift)
    np.testing.assert_allclose(film(h, scale, shift), expected, rtol=1e-6)
    np.testing.assert_allclose(film(h[0], scale, shift), expected[0], rtol=1e-6)
    np.testing.assert_array_equal(film(h, jnp.zeros(4), jnp.zeros(4)), h)
