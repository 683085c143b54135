"""The perceptron against NumPy in float64, for shapes of any rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.nets import mlp


def dense(params, name, h):
    layer = params[name]
    return h @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)


@pytest.mark.parametrize(
    ("in_shape", "out_shape", "hidden"),
    [
        ((7, 5, 3), (4,), (6, 8)),
        ((3,), (7, 5, 3), (9,)),
        ((), (2, 3), (4,)),
        ((5,), (), ()),
        ((1, 1), (1,), (2,) * 3),
    ],
)
def test_is_products_and_nonlinearities(key, in_shape, out_shape, hidden):
    """Input flattened row by row, output shaped row by row, no nonlinearity after the last product."""
    net = mlp(in_shape, out_shape, hidden=hidden, activation=jnp.tanh, out_bias=0.3)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(net.init, key)
    params = jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), p.dtype), shapes)
    x = jax.random.normal(jax.random.key(1), in_shape)
    out = net.apply(params, x)
    assert out.shape == out_shape and out.dtype == jnp.float32
    h = np.asarray(x, np.float64).reshape(-1)
    for i in range(len(hidden)):
        h = np.tanh(dense(params, f"Dense_{i}", h))
    expected = dense(params, f"Dense_{len(hidden)}", h).reshape(out_shape)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-6)
    assert len(params) == len(hidden) + 1


@pytest.mark.parametrize("out_bias", [-1.7, jnp.arange(6.0).reshape(2, 3), np.eye(2, 3)])
def test_the_output_starts_at_out_bias(key, out_bias):
    """With the products at zero, exactly; as built, around it for inputs of both signs."""
    net = mlp((4,), (2, 3), hidden=(5,), out_bias=out_bias)
    params = jax.jit(net.init)(key)
    no_kernels = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key == "kernel" else leaf, params
    )
    expected = np.broadcast_to(np.asarray(out_bias, np.float32), (2, 3))
    np.testing.assert_array_equal(net.apply(no_kernels, jnp.ones(4)), expected)
    np.testing.assert_array_equal(net.apply(params, jnp.zeros(4)), expected)
    assert np.all(np.asarray(net.apply(params, jnp.ones(4))) != expected)


def test_kernels_are_glorot_uniform(key):
    params = jax.jit(mlp((300,), (200,), hidden=(100,)).init)(key)
    for name, fan_in, fan_out in (("Dense_0", 300, 100), ("Dense_1", 100, 200)):
        kernel, limit = np.asarray(params[name]["kernel"]), np.sqrt(6 / (fan_in + fan_out))
        assert kernel.shape == (fan_in, fan_out)
        assert 0.999 * limit < np.abs(kernel).max() <= limit * (1 + 1e-6)
        u = (kernel.ravel() / limit).astype(np.float64)
        assert abs(u.mean()) / np.sqrt(1 / 3 / u.size) < 5
        assert abs(np.mean(u**2) - 1 / 3) / np.sqrt(4 / 45 / u.size) < 5
        np.testing.assert_array_equal(params[name]["bias"], 0.0)


def test_init_is_a_function_of_the_key(key):
    net = mlp((3,), (2,), hidden=(4,))
    init = jax.jit(net.init)
    one, same, other = init(key), init(key), init(jax.random.key(1))
    for a, b, c in zip(*(jax.tree.leaves(p) for p in (one, same, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.ndim == 1 or np.all(np.asarray(a) != np.asarray(c))
    with pytest.raises(TypeError, match="expected a typed key"):
        net.init(jax.random.PRNGKey(0))


@pytest.mark.parametrize("shape", [(8,), (3, 2), (2, 3, 1), (4, 2, 3)])
def test_another_input_shape_is_refused(key, shape):
    """Also one with as many elements, which would run: its pixels would lie in another order."""
    net = mlp((2, 3), (1,), hidden=())
    with pytest.raises(
        ValueError, match=r"inputs\[0\]: got shape \(.*\), expected \(2, 3\) for .*vmap over a batch"
    ):
        jax.eval_shape(net.apply, jax.eval_shape(net.init, key), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3)])
def test_an_out_bias_of_another_shape_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"out_bias: got shape \(.*\), expected \(2, 3\), that of the output"
    ):
        mlp((4,), (2, 3), out_bias=jnp.zeros(shape))
