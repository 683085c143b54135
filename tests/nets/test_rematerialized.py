"""Less memory, the same numbers: of a transformer, a U-Net and a network without blocks; and what bfloat16 costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff import nets

SHAPE = (8, 8, 1)
BUILD = {
    "dit": lambda **settings: nets.dit(SHAPE, patch=4, width=16, depth=3, heads=2, **settings),
    "unet": lambda **settings: nets.unet(SHAPE, features=(8,), num_blocks=1, attention=(), **settings),
    "mlp": lambda **settings: with_time(nets.mlp(SHAPE, SHAPE, hidden=(512, 512), **settings)),
}


def with_time(network):
    return network._replace(apply=lambda params, z, log_snr: network.apply(params, log_snr * z))


def again(name):
    if name == "mlp":
        return nets.rematerialized(BUILD[name]())
    return BUILD[name](around=nets.rematerialized_block)


def apply_each(network, params, z):
    return jax.vmap(network.apply, in_axes=(None, 0, None))(params, z, jnp.float32(1.0))


def value_and_gradient(network, batch_size=4):
    """Of a batch's mean square; params are drawn anew, since last layers start at zero."""
    noise = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: 0.2 * noise.standard_normal(leaf.shape, np.float32), network.init(jax.random.key(0))
    )
    z = jax.random.normal(jax.random.key(2), (batch_size, *SHAPE))

    def loss(params, z):
        return jnp.mean(
            jnp.square(jax.vmap(network.apply, in_axes=(None, 0, None))(params, z, jnp.float32(1.0)))
        )

    return jax.jit(jax.value_and_grad(loss)), params, z


def distances(one, other):
    """Of each leaf by its norm, a norm no smaller than a hundredth of the whole's."""
    whole = float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(other))))
    return [
        float(jnp.linalg.norm(a - b)) / max(float(jnp.linalg.norm(b)), 0.01 * whole)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    ]


@pytest.mark.parametrize("name", BUILD)
def test_the_same_parameters_value_and_gradient(name):
    fn, params, z = value_and_gradient(BUILD[name]())
    fn_again, params_again, _ = value_and_gradient(again(name))
    assert jax.tree.structure(params) == jax.tree.structure(params_again)
    (value, gradient), (other, other_gradient) = fn(params, z), fn_again(params, z)
    np.testing.assert_allclose(value, other, rtol=2e-6)
    assert max(distances(other_gradient, gradient)) < 5e-6


@pytest.mark.parametrize(("name", "largest"), [("dit", 0.2), ("unet", 0.3)])
def test_inner_activations_are_not_held(name, largest):
    """What the way back keeps of the way forward, beside the parameters: of each block its input."""

    def held(network):
        _, params, z = value_and_gradient(network)

        def back(params):
            return jax.vjp(lambda params: apply_each(network, params, z), params)[1]

        kept = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(back, params)))
        return kept - sum(leaf.size for leaf in jax.tree.leaves(params))

    assert held(again(name)) < largest * held(BUILD[name]())


@pytest.mark.parametrize("name", BUILD)
def test_bfloat16_is_within_its_rounding(name):
    """Eight bits of mantissa: value within 2 %, each leaf of the gradient within 10 % of its norm."""
    fn, params, z = value_and_gradient(BUILD[name]())
    low, _, _ = value_and_gradient(BUILD[name](dtype=jnp.bfloat16))
    (value, gradient), (other, other_gradient) = fn(params, z), low(params, z)
    np.testing.assert_allclose(other, value, rtol=0.02)
    assert 1e-4 < max(distances(other_gradient, gradient)) < 0.1
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(other_gradient))


@pytest.mark.parametrize("name", ["mlp", "encoder", "decoder"])
def test_networks_of_vaes_take_bfloat16_inside(name):
    build, x = {
        "mlp": (lambda **kw: nets.mlp((8, 8, 1), (6,), hidden=(32,), **kw), (8, 8, 1)),
        "encoder": (lambda **kw: nets.conv_encoder((8, 8, 1), 6, features=(4,), hidden=8, **kw), (8, 8, 1)),
        "decoder": (lambda **kw: nets.conv_decoder(6, (8, 8, 1), features=(4,), hidden=8, **kw), (6,)),
    }[name]
    x = jax.random.normal(jax.random.key(2), x)
    network, low = build(), build(dtype=jnp.bfloat16)
    params = low.init(jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    exact, rough = network.apply(params, x), low.apply(params, x)
    assert rough.dtype == jnp.float32 and not np.array_equal(exact, rough)
    assert np.linalg.norm(exact - rough) < 0.02 * np.linalg.norm(exact)
