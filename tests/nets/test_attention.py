"""Attention against a loop over positions in float64, and what symmetry says of it."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.nets import oracles
from vdiff.nets.attention import attend, self_attention

HEADS, N, D = 2, 5, 3


def draw(*shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def test_each_position_averages_the_values():
    q, k, v = draw(3, HEADS, N, D, scale=2.0)
    out = attend(q, k, v)
    for i in range(HEADS):
        expected = oracles.attention(*(np.asarray(a[i], np.float64) for a in (q, k, v)))
        np.testing.assert_allclose(out[i], expected, rtol=1e-5, atol=1e-6)


def test_queries_keys_and_values_lie_side_by_side():
    qkv = draw(N, 3 * HEADS * D)
    q, k, v = np.split(np.asarray(qkv, np.float64), 3, axis=-1)
    heads = [slice(i * D, (i + 1) * D) for i in range(HEADS)]
    expected = np.concatenate([oracles.attention(q[:, s], k[:, s], v[:, s]) for s in heads], axis=-1)
    out = jax.jit(self_attention, static_argnums=1)(qkv, HEADS)
    assert out.shape == (N, HEADS * D)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_positions_have_no_order():
    qkv, order = draw(N, 3 * HEADS * D), jnp.array([3, 0, 4, 1, 2])
    np.testing.assert_allclose(
        self_attention(qkv[order], HEADS), self_attention(qkv, HEADS)[order], rtol=1e-5, atol=1e-6
    )


def test_without_a_preference_the_mean_and_with_a_strong_one_the_value():
    v = draw(1, N, D)
    mean = attend(jnp.zeros((1, N, D)), draw(1, N, D), v)
    np.testing.assert_allclose(
        mean, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), rtol=1e-5, atol=1e-6
    )
    one_hot = 1e4 * jnp.eye(N).reshape(1, N, N)
    np.testing.assert_allclose(attend(one_hot, one_hot, v), v, rtol=1e-6)
    gradient = jax.grad(lambda q: jnp.sum(attend(q, one_hot, v)))(one_hot)
    assert np.all(np.isfinite(gradient))


def test_softmax_in_float32_products_in_bf16():
    """Logits near 300 are a bf16 apart by 2: their differences, of which the weights are made, would be lost."""
    q, k, v = (
        a.astype(jnp.bfloat16) for a in (jnp.full((1, N, D), 13.0), draw(1, N, D) / 50 + 13.0, draw(1, N, D))
    )
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    expected = oracles.attention(*(np.asarray(a[0], np.float64) for a in (q, k, v)))
    np.testing.assert_allclose(np.asarray(out[0], np.float64), expected, rtol=2e-2, atol=1e-2)
    jaxpr = jax.make_jaxpr(attend)(q, k, v).jaxpr
    names = {(e.primitive.name, str(e.invars[0].aval.dtype)) for e in oracles.equations(jaxpr)}
    assert ("exp", "float32") in names and ("exp", "bfloat16") not in names
    assert ("dot_general", "bfloat16") in names and ("dot_general", "float32") not in names
