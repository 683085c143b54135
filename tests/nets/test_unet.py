"""The U-Net against loops in NumPy, float64; its sizes, its start, its conditioning and its precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nets import oracles
from tests.nets.oracles import dense, draw_params, silu, wide
from vdiff.nets import unet


def norm(h):
    """Over all positions and over groups of neighbouring channels, eight groups or what divides."""
    groups = next(g for g in (8, 4, 2, 1) if h.shape[-1] % g == 0)
    parts = np.split(h, groups, axis=-1)
    return np.concatenate([(a - a.mean()) / np.sqrt(a.var() + 1e-6) for a in parts], axis=-1)


def convolve(layer, x):
    """3 x 3 cross-correlation with zeros around."""
    height, width, _ = x.shape
    padded, out = np.pad(x, ((1, 1), (1, 1), (0, 0))), layer["bias"]
    for a in range(3):
        for b in range(3):
            out = out + padded[a : a + height, b : b + width] @ layer["kernel"][a, b]
    return out


def film_norm(p, h, e):
    scale, shift = np.split(dense(p["Dense_0"], e), 2)
    return silu((1 + scale) * norm(h) + shift)


def block(p, h, e):
    r = convolve(p["Conv_0"], film_norm(p["_FilmNorm_0"], h, e))
    r = convolve(p["Conv_1"], film_norm(p["_FilmNorm_1"], r, e))
    return r + (dense(p["Dense_0"], h) if "Dense_0" in p else h)


def attention(p, h):
    q, k, v = np.split(dense(p["Dense_0"], norm(h)).reshape(-1, 3 * h.shape[-1]), 3, axis=-1)
    return h + dense(p["Dense_1"], oracles.attention(q, k, v).reshape(h.shape))


def down(p, h):
    """Four pixels become one; the last row or column of an odd size stands in for the one that is missing."""
    height, width = (n + n % 2 for n in h.shape[:2])
    rows, columns = (
        np.minimum(np.arange(n), m - 1) for n, m in zip((height, width), h.shape[:2], strict=True)
    )
    h = h[rows][:, columns]
    return dense(p, np.concatenate([h[0::2, 0::2], h[0::2, 1::2], h[1::2, 0::2], h[1::2, 1::2]], axis=-1))


def up(p, h, like):
    four = np.split(dense(p, h), 4, axis=-1)
    out = np.empty((2 * h.shape[0], 2 * h.shape[1], four[0].shape[-1]))
    for a, part in enumerate(four):
        out[a // 2 :: 2, a % 2 :: 2] = part
    return out[: like.shape[0], : like.shape[1]]


def reference(params, z, log_snr, label, levels, num_blocks, attended):
    """Blocks, attentions and products are numbered in the order in which they are met."""
    p, count = wide(params), {"_Block": 0, "_Attention": 0, "Dense": 0}

    def following(name):
        count[name] += 1
        return p[f"{name}_{count[name] - 1}"]

    def stage(h, level):
        h = block(following("_Block"), h, e)
        return attention(following("_Attention"), h) if level in attended else h

    e = oracles.embedding(p["TimeEmbedding_0"], log_snr, label)
    h, skips = convolve(p["Conv_0"], np.asarray(z, np.float64)), []
    for level in range(levels):
        h = down(following("Dense"), h) if level else h
        for _ in range(num_blocks):
            h = stage(h, level)
            skips.append(h)
    h = stage(h, levels - 1)
    for level in range(levels - 1, -1, -1):
        for _ in range(num_blocks):
            h = stage(np.concatenate([h, skips.pop()], axis=-1), level)
        h = up(following("Dense"), h, skips[-1]) if level else h
    assert len(p) == sum(count.values()) + 4 and not skips
    return convolve(p["Conv_1"], film_norm(p["_FilmNorm_0"], h, e))


def test_patches_are_channels_of_a_smaller_image(key):
    """A U-Net with patches is the U-Net of the image whose positions are patches, its output laid out again."""
    z = jax.random.normal(key, (12, 6, 2))
    net = unet((12, 6, 2), patch=3, out_channels=1, features=(8, 16))
    inner = unet((4, 2, 18), out_channels=9, features=(8, 16))
    params = draw_params(net)
    gathered = np.asarray(z).reshape(4, 3, 2, 3, 2).transpose(0, 2, 1, 3, 4).reshape(4, 2, 18)
    grid = jax.jit(inner.apply)(params, jnp.asarray(gathered), jnp.float32(1.0))
    expected = np.asarray(grid).reshape(4, 2, 3, 3).transpose(0, 2, 1, 3).reshape(12, 6, 1)
    out = jax.jit(net.apply)(params, z, jnp.float32(1.0))
    assert out.shape == (12, 6, 1) and np.std(expected) > 0.1
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "features", "num_blocks", "attended", "num_labels", "out_channels"),
    [
        ((6, 4, 1), (8, 16), 1, (1,), 0, None),
        ((7, 5, 3), (8, 6), 2, (0,), 4, 2),
        ((1, 3, 2), (3, 4, 12), 1, (), 2, None),
    ],
)
def test_is_blocks_on_coarser_grids_and_back(shape, features, num_blocks, attended, num_labels, out_channels):
    net = unet(
        shape,
        features=features,
        num_blocks=num_blocks,
        attention=attended,
        num_labels=num_labels,
        out_channels=out_channels,
    )
    params, z = draw_params(net), jax.random.normal(jax.random.key(1), shape)
    label = (num_labels,) if num_labels else ()
    out = jax.jit(net.apply)(params, z, jnp.float32(1.7), *(jnp.int32(y) for y in label))
    expected = reference(params, z, 1.7, label, len(features), num_blocks, attended)
    assert out.shape == (*shape[:2], out_channels or shape[2]) and out.dtype == jnp.float32
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4 * np.std(expected))


SMALL = {"features": (8, 16), "attention": (1,)}


@pytest.fixture(scope="module")
def start():
    """Parameters as they start, for SMALL with one channel and three labels: of use for images of any size."""
    return jax.jit(unet((4, 4, 1), num_labels=3, **SMALL).init)(jax.random.key(0))


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (9, 14, 1)])
def test_starts_at_zero(key, shape, start):
    net = unet(shape, num_labels=3, **SMALL)
    out = jax.jit(net.apply)(start, jax.random.normal(key, shape), jnp.float32(-3.0), jnp.int32(1))
    assert out.shape == shape and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0.0)


def test_levels_count_from_the_coarsest_too():
    shapes = [
        jax.eval_shape(unet((8, 8, 1), features=(4, 8), attention=levels).init, jax.random.key(0))
        for levels in ((1,), (-1,), (0,), (-2,), ())
    ]
    assert shapes[0] == shapes[1] != shapes[2] == shapes[3] != shapes[4]
    names = [[name for name in s if name.startswith("_Attention")] for s in shapes]
    assert [len(n) for n in names] == [3, 3, 2, 2, 0]


def test_three_channels_and_three_levels(key):
    net = unet((16, 16, 3), features=(4, 8, 8), attention=(2,))
    out = jax.jit(net.apply)(draw_params(net), jax.random.normal(key, (16, 16, 3)), jnp.float32(0.0))
    assert out.shape == (16, 16, 3) and np.std(out) > 0.1


def test_the_last_layer_learns_at_once_the_rest_after_it(key, start):
    """Of the squared error to y, the last bias has gradient -2 sum y; with a last layer, all have some."""
    net = unet((5, 6, 1), num_labels=3, **SMALL)
    z, y = jax.random.normal(key, (2, 5, 6, 1))

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(jnp.square(net.apply(params, z, jnp.float32(-3.0), jnp.int32(1)) - y))

    first = gradient(start)
    np.testing.assert_allclose(first["Conv_1"]["bias"], -2 * np.sum(y, (0, 1)), rtol=1e-4, atol=1e-4)
    assert np.any(np.asarray(first["Conv_1"]["kernel"]) != 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(first))
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(draw_params(net)))[0]:
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), jax.tree_util.keystr(path)


def test_each_block_starts_as_the_identity(key, start):
    """With the last layer drawn, all that is left are stem, skip connections, changes of grid and the end."""
    net = unet((4, 4, 1), num_labels=3, **SMALL)
    params = {**start, "Conv_1": draw_params(net)["Conv_1"]}
    z, p = jax.random.normal(key, (4, 4, 1)), wide(params)
    fine = convolve(p["Conv_0"], np.asarray(z, np.float64))
    coarse = down(p["Dense_0"], fine)
    h = dense(p["_Block_3"]["Dense_0"], np.concatenate([coarse, coarse], axis=-1))
    h = np.concatenate([up(p["Dense_1"], h, fine), fine], axis=-1)
    h = dense(p["_Block_4"]["Dense_0"], h)
    e = oracles.embedding(p["TimeEmbedding_0"], 0.5, (2,))
    expected = convolve(p["Conv_1"], film_norm(p["_FilmNorm_0"], h, e))
    out = jax.jit(net.apply)(params, z, jnp.float32(0.5), jnp.int32(2))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * np.std(expected))


def test_number_of_parameters():
    """By hand, for features (f, g), one block a level, attention on the coarse one, n labels."""
    f, g, c, n, features = 8, 16, 3, 5, 64
    t = 4 * f
    time = (features * t + t) + (t * t + t) + (n + 1) * t

    def conv(a, b):
        return 9 * a * b + b

    def film(a):
        return (t + 1) * 2 * a

    def block(a, b):
        return film(a) + conv(a, b) + film(b) + conv(b, b) + (a != b) * (a * b + b)

    attention = (g * 3 * g + 3 * g) + (g * g + g)
    descent = conv(c, f) + block(f, f) + (4 * f * g + g) + block(g, g) + attention
    ascent = block(g, g) + attention + block(2 * g, g) + attention + (g * 4 * f + 4 * f) + block(2 * f, f)
    expected = time + descent + ascent + film(f) + conv(f, 2)
    assert oracles.num_params(unet((6, 6, c), num_labels=n, out_channels=2, **SMALL)) == expected


def test_time_and_label_matter(key, start):
    net = unet((8, 8, 1), num_labels=3, **SMALL)
    oracles.check_time_and_label_matter(net, jax.tree.map(jnp.add, start, draw_params(net, scale=0.05)), key)


def test_a_batch_is_a_loop(key):
    oracles.check_a_batch_is_a_loop(unet((5, 6, 2), num_labels=2, **SMALL), (5, 6, 2), key)


def test_bf16_inside_float32_outside(key):
    """Every product and convolution is bf16 but the two of the time."""
    nets = [unet((8, 7, 1), num_labels=2, dtype=dtype, **SMALL) for dtype in (jnp.float32, jnp.bfloat16)]
    inputs = (jax.random.normal(key, (8, 7, 1)), jnp.float32(2.0), jnp.int32(1))
    oracles.check_bf16_inside_float32_outside(*nets, inputs)
    convolutions = oracles.dtypes_of(nets[1], inputs, "conv_general_dilated")
    assert len(convolutions) == 2 + 2 * 5 and set(convolutions) == {jnp.dtype(jnp.bfloat16)}


def test_refusals(key):
    with pytest.raises(ValueError, match=r"shape: got \(8, 8\), expected \(H, W, C\); add a channel axis"):
        unet((8, 8))
    with pytest.raises(ValueError, match="features: got none, expected the channels of at least one level"):
        unet((8, 8, 1), features=())
    with pytest.raises(ValueError, match="num_blocks: got 0, expected at least 1 at each level; use 1"):
        unet((8, 8, 1), num_blocks=0)
    for levels in ((2,), (0, -3)):
        with pytest.raises(
            ValueError, match=r"attention: got levels \(.*\), expected some of 0 to 1, .*leave"
        ):
            unet((8, 8, 1), features=(8, 16), attention=levels)
    for patch in (3, 0):
        with pytest.raises(
            ValueError, match=rf"patch: got {patch} for an image of \(8, 4\), .* one of \[1, 2, 4\]"
        ):
            unet((8, 4, 1), patch=patch)
    net = unet((8, 8, 1), num_labels=2, **SMALL)
    params, z = jax.eval_shape(net.init, key), jnp.zeros((8, 8, 1))
    for inputs, match in [
        ((z[:7], jnp.zeros(()), jnp.int32(0)), r"inputs\[0\]: got shape \(7, 8, 1\), expected \(8, 8, 1\)"),
        ((z, jnp.zeros(3), jnp.int32(0)), r"inputs\[1\]: got shape \(3,\), expected \(\)"),
        ((z, jnp.zeros(()), jnp.zeros(3, jnp.int32)), r"inputs\[2\]: got shape \(3,\), expected \(\)"),
        ((z, jnp.zeros(())), "zip"),
    ]:
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(net.apply, params, *inputs)
