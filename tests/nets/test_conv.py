"""Convolutions against loops in NumPy, float64: sizes of any parity, shifts, cropping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.nets import conv_decoder, conv_encoder

SHAPES = [(8, 6, 1), (7, 5, 3), (1, 1, 2)]


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def draw_params(net):
    """Parameters of the network's shapes, the biases too."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)


def convolve(x, kernel, bias, stride):
    """3 x 3 cross-correlation; zeros around such that ceil(n / stride) outputs come out ("SAME")."""
    sizes = [-(-n // stride) for n in x.shape[:2]]
    pads = [max((m - 1) * stride + 3 - n, 0) for m, n in zip(sizes, x.shape[:2], strict=True)]
    padded = np.pad(x, [*((p // 2, p - p // 2) for p in pads), (0, 0)])
    out = np.empty((*sizes, kernel.shape[-1]))
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            patch = padded[i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[i, j] = np.einsum("abc,abco->o", patch, kernel) + bias
    return out


def transpose(x, kernel, bias):
    """Doubling: input i reaches outputs 2 i, 2 i + 1, 2 i + 2, the last of which falls off at the edge."""
    height, width, _ = x.shape
    out = np.zeros((2 * height + 1, 2 * width + 1, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            # The kernel of a transposed convolution is applied flipped.
            out[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += np.einsum("c,abco->abo", x[i, j], kernel[::-1, ::-1])
    return out[: 2 * height, : 2 * width] + bias


@pytest.mark.parametrize("shape", SHAPES)
def test_encoder_is_strided_convolutions(key, shape):
    net = conv_encoder(shape, 4, features=(3, 5), hidden=6, activation=jnp.tanh)
    params = draw_params(net)
    x = jax.random.normal(jax.random.key(1), shape)
    p, h = wide(params), np.asarray(x, np.float64)
    for i in range(2):
        h = np.tanh(convolve(h, p[f"Conv_{i}"]["kernel"], p[f"Conv_{i}"]["bias"], 2))
    h = np.tanh(h.reshape(-1) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
    out = jax.jit(net.apply)(params, x)
    assert out.shape == (4,)
    np.testing.assert_allclose(out, h @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [*SHAPES[::2], (7, 5, 3, 2)])
def test_decoder_is_transposed_convolutions_cropped(key, shape):
    """Trailing axes are channels, row by row; what is cropped is the far end."""
    net = conv_decoder(2, shape, features=(3, 5), hidden=6, activation=jnp.tanh, out_bias=0.7)
    params = draw_params(net)
    z = jax.random.normal(jax.random.key(1), (2,))
    p, h = wide(params), np.asarray(z, np.float64)
    for name in ("Dense_0", "Dense_1"):
        h = np.tanh(h @ p[name]["kernel"] + p[name]["bias"])
    h = h.reshape(-(-shape[0] // 4), -(-shape[1] // 4), 3)
    for i in range(2):
        h = np.tanh(transpose(h, p[f"ConvTranspose_{i}"]["kernel"], p[f"ConvTranspose_{i}"]["bias"]))
    h = convolve(h, p["Conv_0"]["kernel"], p["Conv_0"]["bias"], 1)
    expected = h[: shape[0], : shape[1]].reshape(shape)
    out = jax.jit(net.apply)(params, z)
    assert out.shape == shape
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-6)


def test_decoder_of_an_odd_image_is_the_even_one_cropped(key):
    odd, even = (conv_decoder(2, shape, features=(3, 4), hidden=5) for shape in ((7, 5, 2), (8, 8, 2)))
    params, z = draw_params(even), jnp.array([0.4, -1.0])
    np.testing.assert_array_equal(odd.apply(params, z), even.apply(params, z)[:7, :5])


def test_decoder_shifts_with_what_it_is_given(key):
    """One step on the coarse grid is 2 x 2 = 4 pixels of the image, away from its edges."""
    net = conv_decoder(1, (32, 32, 1), features=(3, 4), hidden=2, activation=jnp.tanh)

    kept = jax.jit(net.init)(key)

    def image(i, j):
        params = {**kept}
        grid = np.zeros((8, 8, 3), np.float32)
        grid[i, j] = [1.0, -2.0, 0.5]
        params["Dense_1"] = {"kernel": jnp.zeros((2, 192)), "bias": jnp.asarray(grid.ravel())}
        return np.asarray(jax.jit(net.apply)(params, jnp.zeros(1)))[..., 0]

    here, there = image(2, 3), image(4, 4)
    assert np.abs(here).max() > 1e-2
    np.testing.assert_allclose(there, np.roll(here, (8, 4), axis=(0, 1)), atol=1e-6)


def test_decoder_starts_at_out_bias(key):
    net = conv_decoder(2, (7, 5, 3), features=(3,), hidden=4, out_bias=-1.3)
    np.testing.assert_array_equal(
        net.apply(jax.jit(net.init)(key), jnp.zeros(2)), np.full((7, 5, 3), -1.3, np.float32)
    )


@pytest.mark.parametrize("build", [lambda: conv_encoder((7, 5, 3), 4), lambda: conv_decoder(2, (7, 5, 3))])
def test_init_is_a_function_of_the_key(key, build):
    net = build()
    init = jax.jit(net.init)
    one, same, other = init(key), init(key), init(jax.random.key(1))
    for a, b, c in zip(*(jax.tree.leaves(p) for p in (one, same, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.ndim == 1 or np.any(np.asarray(a) != np.asarray(c))


def test_shapes_that_are_no_images_are_refused(key):
    with pytest.raises(ValueError, match=r"in_shape: got \(8, 8\), expected \(H, W, C\); add a channel axis"):
        conv_encoder((8, 8), 4)
    with pytest.raises(ValueError, match=r"out_shape: got \(8, 8\), expected \(H, W, C\) or more; add"):
        conv_decoder(2, (8, 8))
    with pytest.raises(
        ValueError, match="features: got none, expected the channels of at least one doubling"
    ):
        conv_decoder(2, (8, 8, 1), features=())
    net = conv_encoder((8, 6, 1), 4)
    with pytest.raises(ValueError, match=r"inputs\[0\]: got shape \(6, 8, 1\), expected \(8, 6, 1\)"):
        jax.eval_shape(net.apply, jax.eval_shape(net.init, key), jax.ShapeDtypeStruct((6, 8, 1), jnp.float32))
