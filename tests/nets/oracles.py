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
