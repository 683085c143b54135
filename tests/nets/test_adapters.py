"""Modules of Linen, NNX and Equinox as networks: the module's own outputs, and every parameter trained."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vdiff as vd
from vdiff.nets import from_equinox, from_linen, from_nnx

IN_DIM, WIDTH, OUT_DIM = 3, 5, 4


class Linen(nn.Module):
    """Two inputs, layers in a list, a parameter of its own, and normalisation that one datum allows."""

    out_dim: int = OUT_DIM

    @nn.compact
    def __call__(self, x, shift):
        scale = self.param("scale", nn.initializers.normal(1.0), (WIDTH,))
        h = nn.LayerNorm()(nn.Dense(WIDTH)(x))
        return nn.Dense(self.out_dim)(jnp.tanh(h * scale)) + nn.Dense(self.out_dim)(shift)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(IN_DIM, WIDTH, rngs=rngs), nnx.Linear(WIDTH, OUT_DIM, rngs=rngs)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.shift = nnx.Linear(2, OUT_DIM, rngs=rngs)
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (WIDTH,)))

    def __call__(self, x, shift):
        return self.layers[1](jnp.tanh(self.norm(self.layers[0](x)) * self.scale[...])) + self.shift(shift)


class Equinox(eqx.Module):
    layers: list
    shift: eqx.nn.Linear
    scale: jax.Array
    activation: object
    width: int

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.layers = [
            eqx.nn.Linear(IN_DIM, WIDTH, key=keys[0]),
            eqx.nn.LayerNorm(WIDTH),
            eqx.nn.Linear(WIDTH, OUT_DIM, key=keys[1]),
        ]
        self.shift = eqx.nn.Linear(2, OUT_DIM, key=keys[2])
        self.scale = jax.random.normal(keys[3], (WIDTH,))
        self.activation, self.width = jnp.tanh, WIDTH

    def __call__(self, x, shift):
        h = self.layers[1](self.layers[0](x))
        return self.layers[2](self.activation(h * self.scale)) + self.shift(shift)


def linen_reference(key):
    module = Linen()
    variables = module.init(key, jnp.zeros(IN_DIM), jnp.zeros(2))
    return lambda x, shift: module.apply(variables, x, shift)


# kind: the network, its module built by the library's own means, and how many parameters that has.
KINDS = {
    "linen": (lambda: from_linen(Linen(), jnp.zeros(IN_DIM), jnp.zeros(2)), linen_reference),
    "nnx": (lambda: from_nnx(NNX), lambda key: NNX(nnx.Rngs(key))),
    "equinox": (lambda: from_equinox(Equinox), Equinox),
}
NUM_PARAMS = (IN_DIM + 1) * WIDTH + (WIDTH + 1) * OUT_DIM + (2 + 1) * OUT_DIM + 3 * WIDTH

every_kind = pytest.mark.parametrize("kind", KINDS)
X, SHIFT = jnp.array([0.5, -1.0, 2.0]), jnp.array([0.3, 0.7])


@every_kind
def test_outputs_are_the_modules_own(key, kind):
    build, reference = KINDS[kind]
    net = build()
    params = net.init(key)
    expected = reference(key)(X, SHIFT)
    assert expected.shape == (OUT_DIM,)
    np.testing.assert_array_equal(net.apply(params, X, SHIFT), expected)
    np.testing.assert_allclose(jax.jit(net.apply)(params, X, SHIFT), expected, rtol=1e-5, atol=1e-6)
    batch = jax.vmap(net.apply, in_axes=(None, 0, None))(params, jnp.stack([X, -X]), SHIFT)
    np.testing.assert_allclose(batch[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batch[1], reference(key)(-X, SHIFT), rtol=1e-5, atol=1e-6)


@every_kind
def test_params_are_all_and_only_the_parameters(key, kind):
    leaves = jax.tree.leaves(KINDS[kind][0]().init(key))
    assert sum(leaf.size for leaf in leaves) == NUM_PARAMS
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in leaves)


@every_kind
def test_init_is_a_function_of_the_key(key, kind):
    net = KINDS[kind][0]()
    init, apply = jax.jit(net.init), jax.jit(net.apply)
    outs = [apply(init(k), X, SHIFT) for k in (key, key, jax.random.key(1))]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.all(np.abs(outs[0] - outs[2]) > 1e-4)
    for a, b in zip(jax.tree.leaves(init(key)), jax.tree.leaves(net.init(key)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    with pytest.raises(TypeError, match="expected a typed key"):
        net.init(jax.random.PRNGKey(0))


@every_kind
def test_gradient_reaches_every_parameter_and_is_right(key, kind):
    """Against central differences along the gradient itself, and along a random direction."""
    net = KINDS[kind][0]()
    params = jax.jit(net.init)(key)

    @jax.jit
    def f(params):
        return jnp.sum(jnp.sin(net.apply(params, X, SHIFT) + 1.0))

    grads = jax.grad(f)(params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        assert np.any(np.asarray(leaf) != 0), jax.tree_util.keystr(path)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    random = treedef.unflatten(
        [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )
    for direction in (grads, random):
        step = 3e-3
        ahead, behind = (
            f(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction)) for s in (step, -step)
        )
        slope = sum(
            jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
        )
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=5e-3, atol=1e-3)


@every_kind
def test_a_vae_of_these_networks_trains(key, kind):
    """Inside a VAE, under jit, vmap and grad: a step of training changes every leaf of theta and lam."""
    import optax

    def one_input(net):
        return vd.Network(net.init, lambda params, x: net.apply(params, x, jnp.ones(2)))

    net = one_input(KINDS[kind][0]())
    decoder = vd.Network(net.init, lambda params, z: net.apply(params, jnp.concatenate([z, jnp.ones(1)]))[:3])
    model = vd.vae(net, decoder, latent_dim=2, likelihood=vd.likelihoods.gaussian(0.5))
    optimizer = optax.sgd(0.1)
    step = vd.jit_step(vd.make_train_step(model.elbo_terms, optimizer))
    state = vd.init_state(key, model, optimizer)
    before = jax.tree.map(np.array, state.params)
    state, metrics = step(state, np.random.default_rng(0).normal(size=(4, IN_DIM)).astype(np.float32))
    changes = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), state.params, before)
    assert all(jax.tree.leaves(changes)) and len(jax.tree.leaves(changes)) > 10
    assert set(metrics) == {"reconstruction", "kl", "objective", "grad_norm", "skipped"}


def test_batch_statistics_are_refused_with_the_fix(key):
    class LinenNorm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))

    pattern = (
        r"module: got LinenNorm with collections \['batch_stats'\], expected 'params' only; .*by LayerNorm"
    )
    with pytest.raises(ValueError, match=pattern):
        from_linen(LinenNorm(), jnp.zeros(IN_DIM)).init(key)

    class NNXNorm(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.norm = nnx.Linear(IN_DIM, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    pattern = (
        r"build: got a module with state of kinds \['BatchStat'\], expected nnx.Param only; .*by LayerNorm"
    )
    with pytest.raises(ValueError, match=pattern):
        from_nnx(NNXNorm)


def test_linen_inputs_of_another_shape_or_number_are_refused(key):
    net = from_linen(Linen(), jnp.zeros(IN_DIM), jnp.zeros(2))
    params = net.init(key)
    with pytest.raises(
        ValueError, match=r"inputs\[0\]: got shape \(1, 3\), expected \(3,\) for Linen; .*vmap"
    ):
        net.apply(params, X[None], SHIFT)
    with pytest.raises(ValueError, match=r"inputs\[1\]: got shape \(3,\), expected \(2,\) for Linen"):
        net.apply(params, X, X)
    with pytest.raises(ValueError, match="zip"):
        net.apply(params, X)


def test_a_linen_module_without_parameters(key):
    class Double(nn.Module):
        def __call__(self, x):
            return 2 * x

    net = from_linen(Double(), jnp.zeros(IN_DIM))
    assert net.init(key) == {}
    np.testing.assert_array_equal(net.apply({}, X), 2 * X)


def test_nnx_modules_that_keep_only_random_keys_are_taken(key):
    """Dropout, switched off, keeps a key and a count; they are no parameters."""

    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(IN_DIM, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.dense(x))

    net = from_nnx(Dropping)
    params = net.init(key)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == (IN_DIM + 1) * 4
    np.testing.assert_array_equal(net.apply(params, X), Dropping(nnx.Rngs(key))(X))


def test_equinox_modules_keep_their_constants(key):
    """A Python number is no parameter: it is not trained, and not lost."""

    class Scaled(eqx.Module):
        dense: eqx.nn.Linear
        gain: float

        def __init__(self, key):
            self.dense, self.gain = eqx.nn.Linear(IN_DIM, 4, key=key), 2.5

        def __call__(self, x):
            return self.gain * self.dense(x)

    net = from_equinox(Scaled)
    params = net.init(key)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == (IN_DIM + 1) * 4
    np.testing.assert_array_equal(net.apply(params, X), Scaled(key)(X))


def test_equinox_modules_keep_their_integer_arrays(key):
    """A permutation held by the module, as flows have: no parameter either, and not lost."""

    class Permuted(eqx.Module):
        dense: eqx.nn.Linear
        order: jax.Array

        def __init__(self, key):
            self.dense, self.order = eqx.nn.Linear(IN_DIM, 4, key=key), jnp.array([2, 0, 1])

        def __call__(self, x):
            return self.dense(x[self.order])

    net = from_equinox(Permuted)
    params = net.init(key)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == (IN_DIM + 1) * 4
    np.testing.assert_array_equal(net.apply(params, X), Permuted(key)(X))
