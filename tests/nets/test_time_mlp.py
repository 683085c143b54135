"""The time-conditioned perceptron against NumPy, float64, for shapes of any rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nets import oracles
from tests.nets.oracles import dense, draw_params, silu, wide
from vdiff.nets import time_mlp


def reference(params, z, log_snr, label):
    p, e = wide(params), oracles.embedding(wide(params["TimeEmbedding_0"]), log_snr, label)
    h, count = np.asarray(z, np.float64).ravel(), len(params) - 1
    for i in range(0, count - 1, 2):
        scale, shift = np.split(dense(p[f"Dense_{i}"], e), 2)
        h = silu((1 + scale) * dense(p[f"Dense_{i + 1}"], h) + shift)
    return dense(p[f"Dense_{count - 1}"], h).reshape(z.shape)


@pytest.mark.parametrize(
    ("shape", "hidden", "num_labels"), [((2,), (6, 8), 0), ((3, 2, 2), (5,), 4), ((), (4, 3, 2), 1)]
)
def test_is_products_scaled_and_shifted_by_the_time(shape, hidden, num_labels):
    net = time_mlp(shape, hidden=hidden, num_labels=num_labels)
    params, z = draw_params(net, scale=0.5), jax.random.normal(jax.random.key(1), shape)
    label = (num_labels,) if num_labels else ()
    out = jax.jit(net.apply)(params, z, jnp.float32(5.3), *(jnp.int32(y) for y in label))
    expected = reference(params, z, 5.3, label)
    assert out.shape == shape and out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-5)


def test_starts_at_zero_and_learns_at_once(key):
    """Of the squared error to y, the last bias has gradient -2 y."""
    net = time_mlp((2, 3), hidden=(8, 8))
    params, z, y = net.init(key), *jax.random.normal(key, (2, 2, 3))
    np.testing.assert_array_equal(net.apply(params, z, jnp.float32(1.0)), 0.0)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(jnp.square(net.apply(params, z, jnp.float32(1.0)) - y))

    np.testing.assert_allclose(gradient(params)["Dense_4"]["bias"], -2 * y.ravel(), rtol=1e-6)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient(draw_params(net)))[0]:
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), jax.tree_util.keystr(path)


def test_number_of_parameters():
    a, b, size, n, features = 6, 8, 5, 3, 64
    e = max(a, b)
    time = (features * e + e) + (e * e + e) + (n + 1) * e
    layers = (e + 1) * 2 * a + (size + 1) * a + (e + 1) * 2 * b + (a + 1) * b
    net = time_mlp((size,), hidden=(a, b), num_labels=n)
    assert oracles.num_params(net) == time + layers + (b + 1) * size


def test_time_and_label_matter_and_a_batch_is_a_loop(key):
    net = time_mlp((2,), hidden=(16, 16), num_labels=2)
    params = jax.tree.map(jnp.add, net.init(key), draw_params(net, scale=0.1))
    log_snr, label = jnp.array([-10.0, 3.0, 3.1, 10.0, 3.0, 3.0]), jnp.array([2, 2, 2, 2, 1, 0])
    z = jnp.broadcast_to(jnp.array([[0.3, -1.2]]), (6, 2))
    batch = jax.jit(jax.vmap(net.apply, (None, 0, 0, 0)))(params, z, log_snr, label)
    apply = jax.jit(net.apply)
    for i in range(6):
        np.testing.assert_allclose(batch[i], apply(params, z[i], log_snr[i], label[i]), rtol=1e-4, atol=1e-6)
        for j in range(i):
            assert np.max(np.abs(batch[i] - batch[j])) > 1e-3 * np.std(batch)


@pytest.mark.slow
def test_it_learns_the_noise_of_a_gaussian(key):
    """For x ~ N(0, s^2) the best guess of the noise in z = a x + b eps is b z / (a^2 s^2 + b^2), any log-SNR."""
    net, s = time_mlp((1,), hidden=(32, 32)), 0.5
    params = jax.jit(net.init)(key)

    def loss(params, key):
        keys = jax.random.split(key, 3)
        log_snr = jax.random.uniform(keys[0], (256,), minval=-6.0, maxval=6.0)
        x, eps = s * jax.random.normal(keys[1], (256, 1)), jax.random.normal(keys[2], (256, 1))
        a, b = (jnp.sqrt(jax.nn.sigmoid(sign * log_snr)).reshape(-1, 1) for sign in (1.0, -1.0))
        out = jax.vmap(net.apply, (None, 0, 0))(params, a * x + b * eps, log_snr)
        return jnp.mean(jnp.square(out - eps))

    def step(carry, i):
        params, speed = carry
        grads = jax.grad(loss)(params, jax.random.fold_in(key, i))
        speed = jax.tree.map(lambda v, g: 0.9 * v + g, speed, grads)
        return (jax.tree.map(lambda p, v: p - 0.02 * v, params, speed), speed), None

    start = params, jax.tree.map(jnp.zeros_like, params)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(1500)))(start)
    log_snr, z = jnp.meshgrid(jnp.linspace(-5.0, 5.0, 11), jnp.linspace(-1.0, 1.0, 9))
    a2, b2 = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
    best = jnp.sqrt(b2) * z / (a2 * s**2 + b2)
    out = jax.vmap(net.apply, (None, 0, 0))(params, z.reshape(-1, 1), log_snr.ravel()).reshape(z.shape)
    assert np.sqrt(np.mean(np.square(out - best))) < 0.1 * np.sqrt(np.mean(np.square(best)))


def test_bf16_inside_float32_outside(key):
    nets = [
        time_mlp((6,), num_labels=2, hidden=(16, 16), dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)
    ]
    params = draw_params(nets[0], scale=0.15)
    inputs = (jax.random.normal(key, (6,)), jnp.float32(2.0), jnp.int32(1))
    exact, rounded = (jax.jit(net.apply)(params, *inputs) for net in nets)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.02
    shapes = jax.eval_shape(nets[1].init, key)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    products = oracles.dtypes_of(nets[1], inputs, "dot_general")
    assert products.count(jnp.float32) == 2 and products.count(jnp.bfloat16) == 5 == len(products) - 2


def test_refusals(key):
    with pytest.raises(ValueError, match="hidden: got none, expected at least one width, .*use"):
        time_mlp((2,), hidden=())
    net = time_mlp((2,))
    params = jax.eval_shape(net.init, key)
    with pytest.raises(
        ValueError, match=r"inputs\[0\]: got shape \(3,\), expected \(2,\) .*vmap over a batch"
    ):
        jax.eval_shape(net.apply, params, jnp.zeros(3), jnp.zeros(()))
    with pytest.raises(ValueError, match=r"inputs\[1\]: got shape \(1,\), expected \(\)"):
        jax.eval_shape(net.apply, params, jnp.zeros(2), jnp.zeros(1))
