"""NumPy, float64: what the tests of time-conditioned networks recompute, and how they look into a jaxpr."""

import jax
import jax.numpy as jnp
import numpy as np


def draw_params(net, scale=0.3, seed=0):
    """Parameters of the network's shapes, none of them zero: the last layer too."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), shapes)


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def num_params(net):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))))


def dense(layer, h):
    return h @ layer["kernel"] + layer["bias"]


def silu(h):
    return h / (1 + np.exp(-h))


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def embedding(params, log_snr, label=()):
    """silu(W_2 silu(W_1 features) + E[label]), with the periods written out."""
    n = 32
    omega = np.array([2 * np.pi / 80 * 80 ** (k / (n - 1)) for k in range(n)])
    features = np.concatenate([np.cos(omega * log_snr), np.sin(omega * log_snr)])
    e = dense(params["Dense_1"], silu(dense(params["Dense_0"], features)))
    return silu(e + sum(params["Embed_0"]["embedding"][y] for y in label))


def attention(q, k, v):
    """For [N, d] of one head, a position at a time."""
    return np.stack([softmax(k @ q_i / np.sqrt(q.shape[-1])) @ v for q_i in q])


def equations(jaxpr):
    """All equations of a jaxpr, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def dtypes_of(net, inputs, primitive):
    """The dtypes of the first operand, one for each equation of this primitive."""
    params = jax.eval_shape(net.init, jax.random.key(0))
    jaxpr = jax.make_jaxpr(net.apply)(params, *inputs).jaxpr
    return [eqn.invars[0].aval.dtype for eqn in equations(jaxpr) if eqn.primitive.name == primitive]


def check_time_and_label_matter(net, params, key):
    """A tenth of a unit of log-SNR shows, and each of three labels and "no label" are told apart, for [8, 8, 1]."""
    apply, z = jax.jit(net.apply), jax.random.normal(key, (8, 8, 1))
    outs = [apply(params, z, jnp.float32(t), jnp.int32(2)) for t in (-10.0, 3.0, 3.1, 10.0)]
    outs += [apply(params, z, jnp.float32(3.0), jnp.int32(y)) for y in (0, 1, 3)]
    scale = np.std(outs[0])
    assert scale > 1e-2
    for i, a in enumerate(outs):
        for b in outs[:i]:
            assert np.max(np.abs(a - b)) > 1e-3 * scale


def check_a_batch_is_a_loop(net, shape, key):
    params = draw_params(net, scale=0.2)
    z, log_snr, label = jax.random.normal(key, (3, *shape)), jnp.array([-8.0, 0.0, 8.0]), jnp.arange(3)
    batch = jax.jit(jax.vmap(net.apply, (None, 0, 0, 0)))(params, z, log_snr, label)
    apply = jax.jit(net.apply)
    for i in range(3):
        expected = apply(params, z[i], log_snr[i], label[i])
        np.testing.assert_allclose(batch[i], expected, rtol=1e-4, atol=1e-4 * np.std(expected))


def check_bf16_inside_float32_outside(net, rounding, inputs):
    """The result is off by what bf16 resolves; parameters, norms and softmaxes stay float32.

    Returns:
        The dtypes of the matrix products, of which two are of the time and not bf16.
    """
    params = draw_params(net, scale=0.15)
    exact, rounded = (jax.jit(one.apply)(params, *inputs) for one in (net, rounding))
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.02
    shapes = jax.eval_shape(rounding.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    for primitive in ("rsqrt", "exp", "reduce_sum", "reduce_max"):
        assert set(dtypes_of(rounding, inputs, primitive)) == {jnp.dtype(jnp.float32)}, primitive
    products = dtypes_of(rounding, inputs, "dot_general")
    assert products.count(jnp.float32) == 2 and products.count(jnp.bfloat16) == len(products) - 2
    return products
