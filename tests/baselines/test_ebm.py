"""The energy-based model against the Gaussian that its confinement is, and its normaliser by a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests.toys import quick_jit
from vdiff.baselines.ebm import ebm
from vdiff.evaluate.grid import grid_log_normalizer


def nothing(shape=()):
    return vd.Network(lambda key: (), lambda theta, x: jnp.zeros(shape))


def swish_net(dim, width):
    def init(key):
        key_in, key_out = jax.random.split(key)
        return {"in": jax.random.normal(key_in, (width, dim)), "out": jax.random.normal(key_out, (width,))}

    return vd.Network(init, lambda theta, x: theta["out"] @ jax.nn.swish(theta["in"] @ x.ravel()))


def test_without_a_network_it_is_a_gaussian(key):
    centre, scale = np.array([0.3, -0.5], np.float32), 0.7
    model = ebm(nothing(), centre=centre, scale=scale)
    params = model.init(key)
    log_z = grid_log_normalizer(model.log_density, (-6.0, -6.0), (6.0, 6.0), 150)
    log_z = quick_jit(log_z)(params)
    assert float(log_z) == pytest.approx(np.log(2 * np.pi * scale**2), abs=1e-5)
    x = jnp.array([1.0, 0.2])
    expected = -0.5 * np.sum((np.asarray(x) - centre) ** 2) / scale**2
    assert float(model.log_density(params, x)) == pytest.approx(expected, rel=1e-6)


def test_the_energy_is_taken_off_and_learned(key):
    """log_density + the confinement is minus the network, value and gradient; theta is all that is learned."""
    network = swish_net(6, 8)
    model = ebm(network, scale=2.0)
    params = quick_jit(model.init)(key)
    assert jax.tree.structure(params) == jax.tree.structure(
        vd.Params(theta=jax.eval_shape(network.init, key))
    )
    x = jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)
    value, gradient = quick_jit(jax.value_and_grad(model.log_density))(params, x)
    energy, slope = quick_jit(jax.value_and_grad(network.apply))(params.theta, x)
    assert float(value) == pytest.approx(float(-energy - jnp.sum(x**2) / 8), rel=1e-6)
    for one, other in zip(jax.tree.leaves(gradient.theta), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(one, -other, rtol=1e-6)


def test_the_confinement_wins_far_away(key):
    """With weights twenty times the start's, the density still falls along every ray."""
    network = swish_net(2, 16)
    model = ebm(network, scale=3.0)
    params = jax.tree.map(lambda leaf: 20 * leaf, quick_jit(model.init)(key))
    angles = jnp.linspace(0, 2 * jnp.pi, 17)
    rays = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    near, far = (
        quick_jit(jax.vmap(model.log_density, in_axes=(None, 0)))(params, radius * rays)
        for radius in (1e6, 2e6)
    )
    assert np.all(far < near) and np.all(far < -1e10)


def test_one_output_of_a_network_is_a_number(key):
    model = ebm(nothing((1,)))
    assert model.log_density(model.init(key), jnp.ones(3)).shape == ()


def test_what_is_refused(key):
    with pytest.raises(ValueError, match=r"scale: got 0\.0"):
        ebm(nothing(), scale=0.0)
    with pytest.raises(ValueError, match=r"energy: got an output of shape \(2,\).*out_shape=\(\)"):
        ebm(nothing((2,))).log_density(vd.Params(), jnp.ones(3))
    with pytest.raises(ValueError, match=r"centre: got shape \(2,\).*\(3,\)"):
        ebm(nothing(), centre=jnp.ones(2)).log_density(vd.Params(), jnp.ones(3))
