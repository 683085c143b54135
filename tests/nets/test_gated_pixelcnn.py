"""The causal network: its receptive field is every earlier pixel and no other, its rows are those of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from vdiff.nets import gated_pixelcnn

SHAPE, OUT = (4, 5, 2), (4, 5, 2, 3)


@pytest.fixture(scope="module")
def built():
    """A network that sees all of a 4 x 5 image, its parameters off their start, and an image."""
    net = gated_pixelcnn(
        SHAPE, OUT, features=4, layers=2, kernel=3, reach=2, out_bias=np.arange(120.0).reshape(OUT)
    )
    rng, shapes = np.random.default_rng(0), jax.eval_shape(net.init, jax.random.key(0))
    params = jax.tree.map(lambda of: jnp.asarray(0.5 * rng.normal(size=of.shape), of.dtype), shapes)
    return net, params, jnp.asarray(rng.normal(size=SHAPE), jnp.float32)


def test_sees_every_earlier_pixel_and_no_other(built):
    """No blind spot, nothing of itself or later, in raster order; channels of a pixel go together."""
    net, params, x = built
    jacobian = toys.quick_jit(jax.jacrev(net.apply, argnums=1))(params, x)
    between = np.abs(np.asarray(jacobian)).reshape(20, 6, 20, 2)
    assert np.all(between.max(1)[np.triu_indices(20)] == 0.0)
    assert np.all(between.max(1)[np.tril_indices(20, -1)] > 0.0)


def test_a_row_is_told_of_rows_above_only(built):
    """What `above` gives row i does not move with row i or later ones; `along` then gives the row of the whole."""
    net, params, x = built

    @toys.quick_jit
    def both(x):
        told = net.above(params, x)
        return told, jax.vmap(net.along, in_axes=(None, 0, 0))(params, told, x), net.apply(params, x)

    told, rows, whole = both(x)
    np.testing.assert_array_equal(rows, whole)
    other, _, _ = both(x.at[2:].add(1.0))
    for one, two in zip(jax.tree.leaves(told), jax.tree.leaves(other), strict=True):
        assert one.shape[0] == 4
        np.testing.assert_array_equal(one[:3], two[:3])
    assert np.all(np.any(told["layers"][0][3] != other["layers"][0][3], axis=-1))


def test_starts_near_out_bias(built):
    """Exactly, for what sees only zeros: biases are zero at the start."""
    net, _, _ = built
    out = toys.quick_jit(lambda key: net.apply(net.init(key), jnp.zeros(SHAPE)))(jax.random.key(1))
    np.testing.assert_array_equal(out, np.arange(120, dtype=np.float32).reshape(OUT))


def test_refusals(built):
    net, params, x = built
    with pytest.raises(ValueError, match=r"x: got shape \(3, 5, 2\), expected \(4, 5, 2\)"):
        net.apply(params, x[:3])
    for shape, out_shape in (((4, 5), (4, 5)), ((4, 5, 1), (5, 4, 1))):
        with pytest.raises(ValueError, match="expected .H, W, C. and .H, W, ..."):
            gated_pixelcnn(shape, out_shape)
    for name in ("features", "layers", "kernel"):
        with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
            gated_pixelcnn((2, 2, 1), (2, 2, 1), **{name: 0})
    with pytest.raises(ValueError, match=r"out_bias: got shape \(2,\)"):
        gated_pixelcnn((2, 2, 1), (2, 2, 1), out_bias=np.zeros(2))
    with pytest.raises(TypeError, match="expected a typed key"):
        net.init(jax.random.PRNGKey(0))
