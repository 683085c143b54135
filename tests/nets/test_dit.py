"""The transformer against NumPy, float64; its products counted, its start, its symmetry, its precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nets import oracles
from tests.nets.oracles import dense, draw_params, wide
from vdiff.nets import dit
from vdiff.nets.dit import grid_positions
from vdiff.nets.patches import patchify, unpatchify


def film_norm(h, scale, shift):
    centred = h - h.mean(-1, keepdims=True)
    return (1 + scale) * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) + shift


def gelu(h):
    return 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))


def block(p, h, e, heads):
    scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = np.split(dense(p["adaptive"], e), 6)
    q, k, v = np.split(dense(p["qkv"], film_norm(h, scale_a, shift_a)), 3, axis=-1)
    cut = [np.split(a, heads, axis=-1) for a in (q, k, v)]
    a = np.concatenate([oracles.attention(*head) for head in zip(*cut, strict=True)], axis=-1)
    h = h + gate_a * dense(p["mix"], a)
    return h + gate_m * dense(p["down"], gelu(dense(p["up"], film_norm(h, scale_m, shift_m))))


def reference(params, z, log_snr, label, patch, depth, heads):
    p, e = wide(params), oracles.embedding(wide(params["TimeEmbedding_0"]), log_snr, label)
    height, width, _ = z.shape
    squares = np.split(np.asarray(z, np.float64), height // patch)
    tokens = [a.ravel() for row in squares for a in np.split(row, width // patch, axis=1)]
    h = dense(p["embed"], np.stack(tokens)) + p["positions"]
    for i in range(depth):
        h = block(p[f"block_{i}"], h, e, heads)
    out = dense(p["out"], film_norm(h, *np.split(dense(p["adaptive"], e), 2)))
    squares = iter(out.reshape(len(out), patch, patch, -1))
    rows = [np.concatenate([next(squares) for _ in range(width // patch)], 1) for _ in range(height // patch)]
    return np.concatenate(rows, axis=0)


@pytest.mark.parametrize(
    ("shape", "patch", "width", "depth", "heads", "num_labels", "out_channels"),
    [
        ((4, 6, 1), 2, 8, 2, 2, 0, None),
        ((6, 3, 3), 3, 6, 1, 1, 3, 2),
        ((2, 3, 2), 1, 12, 1, 4, 1, None),
    ],
)
def test_is_attention_and_perceptrons(shape, patch, width, depth, heads, num_labels, out_channels):
    net = dit(
        shape,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        num_labels=num_labels,
        out_channels=out_channels,
    )
    params, z = draw_params(net), jax.random.normal(jax.random.key(1), shape)
    label = (num_labels,) if num_labels else ()
    out = jax.jit(net.apply)(params, z, jnp.float32(-2.6), *(jnp.int32(y) for y in label))
    expected = reference(params, z, -2.6, label, patch, depth, heads)
    assert out.shape == (*shape[:2], out_channels or shape[2]) and out.dtype == jnp.float32
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4 * np.std(expected))


SMALL = {"width": 16, "depth": 2, "heads": 2}


@pytest.mark.parametrize(("shape", "patch"), [((8, 8, 1), 2), ((28, 28, 1), 4), ((16, 16, 3), 4)])
def test_starts_at_zero(key, shape, patch):
    net = dit(shape, patch=patch, width=16, depth=1, heads=2)
    out = net.apply(net.init(key), jax.random.normal(key, shape), jnp.float32(-3.0))
    assert out.shape == shape and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0.0)


def test_the_last_layer_learns_at_once_the_rest_after_it(key):
    """Of the squared error to y, the last bias has gradient -2 sum y over patches; drawn, all have some."""
    net = dit((4, 6, 1), num_labels=3, **SMALL)
    z, y = jax.random.normal(key, (2, 4, 6, 1))

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(jnp.square(net.apply(params, z, jnp.float32(-3.0), jnp.int32(1)) - y))

    first = gradient(net.init(key))
    expected = -2 * np.sum(patchify(y, 2), (0, 1))
    np.testing.assert_allclose(first["out"]["bias"], expected, rtol=1e-4, atol=1e-4)
    assert np.any(np.asarray(first["out"]["kernel"]) != 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(first))
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(draw_params(net)))[0]:
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), jax.tree_util.keystr(path)


def test_each_block_starts_as_the_identity(key):
    """With an end that is drawn, three blocks at their start and no blocks give the same output."""
    deep, flat = (dit((4, 4, 1), width=16, depth=depth, heads=2) for depth in (3, 0))
    params = {**deep.init(key), **{name: draw_params(flat)[name] for name in ("out", "adaptive")}}
    kept = {name: p for name, p in params.items() if not name.startswith("block")}
    assert len(kept) == len(params) - 3
    z = jax.random.normal(key, (4, 4, 1))
    out, expected = deep.apply(params, z, jnp.float32(2.0)), flat.apply(kept, z, jnp.float32(2.0))
    assert np.std(expected) > 0.1
    np.testing.assert_array_equal(out, expected)


def test_positions_start_as_waves_of_row_and_column(key):
    table = grid_positions(3, 4, 10)
    assert table.shape == (12, 10)
    for i in range(3):
        for j in range(4):
            waves = [f(at * w) for at in (i, j) for f in (np.sin, np.cos) for w in (1.0, 0.1)]
            np.testing.assert_allclose(table[4 * i + j], [*waves, 0.0, 0.0], atol=1e-6)
    params = dit((6, 8, 1), width=10, depth=0, heads=1).init(key)
    np.testing.assert_array_equal(params["positions"], table)


def test_without_positions_patches_have_no_order(key):
    net = dit((4, 6, 1), **SMALL)
    params, z = draw_params(net), jax.random.normal(key, (4, 6, 1))

    def shuffle(x):
        patches = patchify(x, 2).reshape(6, -1)[jnp.array([4, 2, 0, 5, 1, 3])]
        return unpatchify(patches.reshape(2, 3, -1), 2)

    apply = jax.jit(net.apply)
    for positions, same in ((jnp.zeros_like(params["positions"]), True), (params["positions"], False)):
        p = {**params, "positions": positions}
        there, here = apply(p, shuffle(z), jnp.float32(0.3)), shuffle(apply(p, z, jnp.float32(0.3)))
        assert np.allclose(there, here, rtol=1e-4, atol=1e-4 * np.std(here)) == same


def test_matrix_products_only_and_as_many_as_by_hand(key):
    """2 x the multiplications of each product: of N patches of d numbers, width w, expansion 4."""
    size, patch, channels, w, depth, heads, features = 12, 2, 3, 16, 3, 4, 64
    net = dit((size, size, channels), patch=patch, width=w, depth=depth, heads=heads, out_channels=2)
    inputs = jnp.zeros((size, size, channels)), jnp.zeros(())
    jaxpr = jax.make_jaxpr(net.apply)(jax.eval_shape(net.init, key), *inputs).jaxpr
    found = 0
    for eqn in oracles.equations(jaxpr):
        assert "conv_general" not in eqn.primitive.name
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            found += 2 * eqn.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
    n = (size // patch) ** 2
    time = features * w + w * w
    layer = w * 6 * w + n * (w * 3 * w + w * w + 2 * w * 4 * w) + 2 * n * n * w
    ends = n * patch**2 * channels * w + w * 2 * w + n * w * patch**2 * 2
    assert found == 2 * (time + depth * layer + ends)


def test_number_of_parameters():
    patch, c, w, depth, n, features = 2, 3, 16, 2, 5, 64
    time = (features * w + w) + (w * w + w) + (n + 1) * w
    layer = (w * 6 * w + 6 * w) + (w * 3 * w + 3 * w) + (w * w + w) + (w * 4 * w + 4 * w) + (4 * w * w + w)
    ends = (patch**2 * c * w + w) + 4 * 3 * w + (w * 2 * w + 2 * w) + (w * patch**2 + patch**2)
    net = dit((8, 6, c), patch=patch, num_labels=n, out_channels=1, **SMALL)
    assert oracles.num_params(net) == time + depth * layer + ends


def test_time_and_label_matter(key):
    net = dit((8, 8, 1), num_labels=3, **SMALL)
    oracles.check_time_and_label_matter(
        net, jax.tree.map(jnp.add, net.init(key), draw_params(net, scale=0.05)), key
    )


def test_a_batch_is_a_loop(key):
    oracles.check_a_batch_is_a_loop(dit((4, 6, 2), num_labels=2, **SMALL), (4, 6, 2), key)


def test_bf16_inside_float32_outside(key):
    """Every product is bf16 but the two of the time."""
    nets = [dit((8, 8, 1), num_labels=2, dtype=dtype, **SMALL) for dtype in (jnp.float32, jnp.bfloat16)]
    inputs = (jax.random.normal(key, (8, 8, 1)), jnp.float32(2.0), jnp.int32(1))
    products = oracles.check_bf16_inside_float32_outside(*nets, inputs)
    assert products.count(jnp.bfloat16) == 2 * 7 + 3


def test_refusals(key):
    with pytest.raises(ValueError, match=r"shape: got \(8, 8\), expected \(H, W, C\); add a channel axis"):
        dit((8, 8))
    with pytest.raises(
        ValueError, match=r"patch: got 3 for an image of \(28, 16\), expected a divisor of both .*\[1, 2, 4\]"
    ):
        dit((28, 16, 1), patch=3)
    with pytest.raises(ValueError, match="patch: got 0 "):
        dit((28, 16, 1), patch=0)
    with pytest.raises(ValueError, match="heads: got 3 for width 16, expected a divisor of the width; use 1"):
        dit((8, 8, 1), width=16, heads=3)
    net = dit((8, 8, 1), num_labels=2, **SMALL)
    params, z = jax.eval_shape(net.init, key), jnp.zeros((8, 8, 1))
    for inputs, match in [
        ((z[:6], jnp.zeros(()), jnp.int32(0)), r"inputs\[0\]: got shape \(6, 8, 1\), expected \(8, 8, 1\)"),
        ((z, jnp.zeros(3), jnp.int32(0)), r"inputs\[1\]: got shape \(3,\), expected \(\)"),
        ((z, jnp.zeros(())), "zip"),
    ]:
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(net.apply, params, *inputs)
