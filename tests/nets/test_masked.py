"""The masked perceptron: which output sees which input, its start, and its refusals; its densities are in test_made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from vdiff.nets import masked_mlp


def ones(net, key):
    """Parameters of ones, which count paths where nothing bends."""
    return jax.tree.map(lambda of: jnp.ones(of.shape, of.dtype), jax.eval_shape(net.init, key))


def test_is_masked_products_and_nonlinearities(key):
    """Against NumPy in float64, with masks written unit by unit."""
    net = masked_mlp((3, 2), (3, 4), num_variables=3, hidden=(5, 4), activation=jnp.tanh)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda of: jnp.asarray(rng.normal(size=of.shape), of.dtype), jax.eval_shape(net.init, key)
    )
    place = np.array([2, 0, 1], np.int32)
    x = rng.normal(size=(3, 2)).astype(np.float32)
    place_in, place_out = np.repeat(place, 2), np.repeat(place, 4)
    degrees = [np.array([k * 2 // width for k in range(width)]) for width in (5, 4)]
    masks = [
        np.array([[a <= b for b in degrees[0]] for a in place_in]),
        np.array([[a <= b for b in degrees[1]] for a in degrees[0]]),
        np.array([[a < b for b in place_out] for a in degrees[1]]),
    ]
    h = x.ravel().astype(np.float64)
    direct = np.asarray(params["direct"]) * np.array([[a < b for b in place_out] for a in place_in])
    across = h @ direct
    for i, (layer, mask) in enumerate(zip(params["layers"], masks, strict=True)):
        h = h @ (np.asarray(layer["kernel"]) * mask) + np.asarray(layer["bias"])
        h = np.tanh(h) if i < 2 else h + across
    got = toys.quick_jit(net.apply)(params, jnp.asarray(x), jnp.asarray(place))
    np.testing.assert_allclose(got, h.reshape(3, 4), rtol=1e-5, atol=1e-5)


def test_every_place_has_units_that_see_up_to_it(key):
    """Where a layer is as wide as there are places, a hidden unit sees each prefix: no information is merged."""
    net = masked_mlp((6,), (6,), hidden=(5,), activation=lambda h: h)
    params = ones(net, key) | {"direct": jnp.zeros((6, 6))}
    jacobian = toys.quick_jit(jax.jacfwd(net.apply, argnums=1))(params, jnp.zeros(6), jnp.arange(6))
    # Output d counts for input j the units of degree j..d-1.
    expected = np.array([[max(0, d - j) for j in range(6)] for d in range(6)])
    np.testing.assert_array_equal(jacobian, expected)


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_starts_at_out_bias(key, hidden):
    """The first place exactly, whatever comes after it; the others where they are shown zeros."""
    out_bias = np.arange(6.0).reshape(3, 2)
    net = masked_mlp((3,), (3, 2), hidden=hidden, out_bias=out_bias)
    params, place = toys.quick_jit(net.init)(key), jnp.array([1, 0, 2])
    at_ones, at_zeros = toys.quick_jit(jax.vmap(net.apply, in_axes=(None, 0, None)))(
        params, jnp.stack([jnp.ones(3), jnp.zeros(3)]), place
    )
    np.testing.assert_array_equal(at_ones[1], out_bias[1].astype(np.float32))
    np.testing.assert_array_equal(at_zeros, out_bias.astype(np.float32))
    assert params["direct"].shape == (3, 6) and not np.any(params["direct"])


def test_one_variable_sees_nothing(key):
    net = masked_mlp((1,), (1, 3), hidden=(4, 4))
    params = ones(net, key)
    apply = toys.quick_jit(net.apply)
    one, other = (apply(params, jnp.full(1, v), jnp.zeros(1, jnp.int32)) for v in (0.0, 5.0))
    np.testing.assert_array_equal(one, other)


def test_refusals(key):
    with pytest.raises(ValueError, match="num_variables: got 4 for an input of 6 numbers and 8 outputs"):
        masked_mlp((6,), (8,), num_variables=4)
    with pytest.raises(ValueError, match=r"out_bias: got shape \(2,\), expected \(3,\)"):
        masked_mlp((3,), (3,), out_bias=np.zeros(2))
    net = masked_mlp((3,), (3,), hidden=(2,))
    params = jax.eval_shape(net.init, key)
    for x, place in ((jnp.zeros(4), jnp.arange(3)), (jnp.zeros(3), jnp.arange(4))):
        with pytest.raises(ValueError, match="expected .3,. and"):
            net.apply(params, x, place)
    with pytest.raises(TypeError, match="expected a typed key"):
        net.init(jax.random.PRNGKey(0))
