"""Patches by their formula, and back without loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.nets.patches import patchify, unpatchify


def numbered(*shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


@pytest.mark.parametrize(("shape", "patch"), [((4, 6, 1), 2), ((6, 3, 2), 3), ((5, 4, 3), 1), ((4, 4, 2), 4)])
def test_patches_are_squares_of_pixels(shape, patch):
    height, width, channels = shape
    x = numbered(*shape)
    out = patchify(x, patch)
    assert out.shape == (height // patch, width // patch, patch**2 * channels)
    for i, j in np.ndindex(height // patch, width // patch):
        square = np.asarray(x)[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
        np.testing.assert_array_equal(out[i, j], square.ravel())


@pytest.mark.parametrize(("shape", "patch"), [((4, 6, 1), 2), ((6, 3, 2), 3), ((5, 4, 3), 1)])
def test_each_undoes_the_other(shape, patch):
    x = numbered(*shape)
    np.testing.assert_array_equal(unpatchify(patchify(x, patch), patch), x)
    grid = numbered(shape[0], shape[1], patch**2 * shape[2])
    np.testing.assert_array_equal(patchify(unpatchify(grid, patch), patch), grid)
