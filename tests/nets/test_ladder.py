"""A convolutional ladder: its grids, its start, its parts against NumPy, and that every layer is heard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from tests.nets.test_conv import convolve
from vdiff import nets

SIZES = {"features": (3, 4), "latents": (1, 2), "top": 3, "hidden": 5}


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("shape", "likelihood", "settings", "latents"),
    [
        ((28, 28, 1), vd.likelihoods.bernoulli(), {}, [(14, 14, 1), (7, 7, 2), (3,)]),
        (
            (8, 8, 1),
            vd.likelihoods.categorical(5),
            {"layers_per_level": 2},
            [(4, 4, 1)] * 2 + [(2, 2, 2)] * 2 + [(3,)],
        ),
        ((7, 5, 3), vd.likelihoods.discretized_logistic(4), {"num_blocks": 2}, [(4, 3, 1), (2, 2, 2), (3,)]),
        ((7, 5, 1), vd.likelihoods.gaussian(1.0), {"patch": 1}, [(7, 5, 1), (4, 3, 2), (3,)]),
        (
            (9, 6, 1),
            vd.likelihoods.bernoulli(),
            {"patch": 3, "features": (3,), "latents": (2,)},
            [(3, 2, 2), (3,)],
        ),
    ],
)
def test_grids(shape, likelihood, settings, latents, key):
    """Any image and any likelihood; by shapes alone."""
    networks = nets.conv_ladder(shape, likelihood.out_shape(shape), **(SIZES | settings))
    model = vd.ladder(*networks, likelihood=likelihood)
    params = jax.eval_shape(model.init, key)
    x, z = jax.eval_shape(model.sample, key, params)
    assert x.shape == shape and [leaf.shape for leaf in z] == latents
    terms = jax.eval_shape(model.elbo_terms, key, params, x)
    assert set(terms) == {"reconstruction", *(f"kl_{i + 1}" for i in range(len(latents)))}


@functools.cache
def small():
    """A ladder of 4 x 4 and a vector, on 8 x 7 pixels."""
    likelihood, bias = vd.likelihoods.bernoulli(), np.random.default_rng(0).normal(size=(8, 7, 1))
    networks = nets.conv_ladder(
        (8, 7, 1), (8, 7, 1), features=(3,), latents=(1,), top=2, hidden=4, out_bias=bias
    )
    return vd.ladder(*networks, likelihood=likelihood), networks, bias


def test_it_starts_at_its_prior_and_every_layer_is_heard(key):
    """KL zero and q = N(0, I) at the start; away from it each layer moves the picture, and x each layer."""
    model, networks, bias = small()
    rng = np.random.default_rng(1)
    one, other = jnp.asarray(rng.integers(0, 2, (2, 8, 7, 1)), jnp.int32)

    @toys.quick_jit
    def run(params, x, z):
        return model.elbo_terms(key, params, x), model.log_q(params, x, z), model.decode(params, z)

    start = toys.quick_jit(model.init)(key)
    z = (jnp.asarray(rng.normal(size=(4, 4, 1)), jnp.float32), jnp.asarray(rng.normal(size=2), jnp.float32))
    terms, log_q, _ = run(start, one, z)
    assert float(terms["kl_1"]) == float(terms["kl_2"]) == 0.0
    standard = sum(np.sum(-0.5 * np.square(leaf, dtype=np.float64) - 0.5 * np.log(2 * np.pi)) for leaf in z)
    np.testing.assert_allclose(log_q, standard, rtol=1e-5)
    silent = start.theta | {"Conv_0": jax.tree.map(jnp.zeros_like, start.theta["Conv_0"])}
    picture = run(start._replace(theta=silent), one, z)[2]
    np.testing.assert_allclose(picture, 1 / (1 + np.exp(-bias)), rtol=1e-5)

    noise = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), start)
    moved = jax.tree.map(jnp.add, start, noise)
    terms, _, picture = run(moved, one, z)
    for i in range(2):
        shifted = tuple(leaf + 1.0 if j == i else leaf for j, leaf in enumerate(z))
        assert np.max(np.abs(run(moved, one, shifted)[2] - picture)) > 1e-3
    of_other = run(moved, other, z)[0]
    assert all(abs(float(of_other[name] - terms[name])) > 1e-3 for name in ("kl_1", "kl_2"))


def test_blocks_and_latents_against_numpy(key):
    """What goes up at level 0 is patches, a product and a block; a prior is W silu(conv(silu(h))) + b."""
    _, networks, _ = small()
    rng = np.random.default_rng(3)
    x, h = rng.normal(size=(8, 7, 1)), rng.normal(size=(4, 4, 3))
    shapes = [jax.eval_shape(net.init, key) for net in (networks.encoders[0], networks.priors[0])]
    up, prior = jax.tree.map(lambda leaf: 0.4 * rng.normal(size=leaf.shape), shapes)

    def narrow(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)

    got = toys.quick_jit(
        lambda u, p, x, h: (networks.encoders[0].apply(u, x), networks.priors[0].apply(p, h))
    )(*narrow((up, prior, x, h)))

    def dense(p, v):
        return v @ p["kernel"] + p["bias"]

    def conv(p, v):
        return convolve(v, p["kernel"], p["bias"], 1)

    padded = np.pad(x, ((0, 0), (0, 1), (0, 0)), mode="edge")
    patches = padded.reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(4, 4, 4)
    e = dense(up["Dense_0"], patches)
    block = up["_Block_0"]
    e = e + dense(block["Dense_0"], silu(conv(block["Conv_0"], silu(e))))
    np.testing.assert_allclose(got[0], e, rtol=1e-4, atol=1e-5)
    out = dense(prior["Dense_0"], silu(conv(prior["Conv_0"], silu(h))))
    assert out.shape == (4, 4, 2)
    np.testing.assert_allclose(got[1], out, rtol=1e-4, atol=1e-5)


def test_refusals():
    good = (8, 8, 1)
    for shape, out_shape in (((8, 8), (8, 8)), (good, (8, 8)), (good, (8, 7, 1))):
        with pytest.raises(ValueError, match="out_shape: got .*, expected .*of one height and width"):
            nets.conv_ladder(shape, out_shape)
    for features, latents in (((), ()), ((3, 4), (1,))):
        with pytest.raises(ValueError, match=f"latents: got {len(latents)} levels for features of"):
            nets.conv_ladder(good, good, features=features, latents=latents)
    for changes in (
        {"patch": 0},
        {"top": 0},
        {"num_blocks": 0},
        {"layers_per_level": 0},
        {"latents": (0, 2)},
    ):
        with pytest.raises(ValueError, match="expected each at least 1"):
            nets.conv_ladder(good, good, **(SIZES | changes))
    with pytest.raises(ValueError, match=r"out_bias: got shape \(8, 8\), expected \(8, 8, 1\)"):
        nets.conv_ladder(good, good, out_bias=np.zeros((8, 8)))
