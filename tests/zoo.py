"""One small model of every kind, with data and parameters off a symmetric start, and the baselines' own objectives."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import vdiff as vd
from tests import toys
from vdiff import baselines, likelihoods

PIXELS = (3,)
LIKELIHOODS = {
    "bernoulli": (likelihoods.bernoulli(), 2),
    "categorical": (likelihoods.categorical(4), 4),
    "discretized_logistic": (likelihoods.discretized_logistic(4), 4),
    "gaussian": (likelihoods.gaussian(0.3), None),
    "learned gaussian": (likelihoods.gaussian(), None),
}


def tiny_vae(likelihood, prior=None):
    encoder = vd.nets.mlp(PIXELS, (4,), hidden=(3,), activation=jnp.tanh)
    decoder = vd.nets.mlp((2,), likelihood.out_shape(PIXELS), hidden=(3,), activation=jnp.tanh)
    return vd.vae(encoder, decoder, latent_dim=2, likelihood=likelihood, prior=prior)


def tiny_data(levels, shape=PIXELS):
    rng = np.random.default_rng(0)
    if levels is None:
        return rng.normal(size=(3, *shape)).astype(np.float32)
    return rng.integers(0, levels, size=(3, *shape)).astype(np.int32)


def mixture(encoder=None):
    return vd.gmm(3, 2, encoder=encoder)


def mixture_encoder():
    return vd.nets.mlp((2,), (3,), hidden=(3,), activation=jnp.tanh)


def dense(num_in, num_out):
    return vd.nets.mlp((num_in,), (num_out,), hidden=(3,), activation=jnp.tanh)


def joined(num_in, num_out):
    """A network of two inputs, side by side."""
    net = dense(num_in, num_out)
    return vd.Network(net.init, lambda params, *inputs: net.apply(params, jnp.concatenate(inputs)))


def tiny_hvae():
    encoders, decoders = [dense(3, 4), dense(2, 2)], [dense(2, 3), dense(1, 4)]
    return vd.hvae(encoders, decoders, latent_dims=(2, 1), likelihood=likelihoods.bernoulli())


def tiny_ladder():
    """Two layers of two units along a path of three numbers."""
    start = vd.Network(lambda key: jnp.ones(3), lambda params: params)
    encoders, priors = [dense(3, 2), dense(2, 2)], [dense(3, 4), dense(3, 4)]
    posteriors, decoders = [joined(5, 4), joined(5, 4)], [joined(5, 3), joined(5, 3)]
    return vd.ladder(start, encoders, priors, posteriors, decoders, likelihood=likelihoods.bernoulli())


def tiny_made(shape, likelihood):
    net = vd.nets.masked_mlp(shape, likelihood.out_shape(shape), num_variables=shape[0], hidden=(5,))
    orders = baselines.shuffled_orders(shape[0], 2)
    return baselines.made(net, shape, likelihood=likelihood, orders=orders)


def tiny_pixelcnn():
    likelihood = likelihoods.categorical(4)
    net = vd.nets.gated_pixelcnn((2, 2, 1), likelihood.out_shape((2, 2, 1)), features=3, layers=1, kernel=2)
    return baselines.pixelcnn(net, (2, 2, 1), likelihood=likelihood)


def tiny_vqvae():
    """Two codes of three."""
    return vd.vqvae(
        dense(3, 4),
        vd.nets.mlp((2, 2), PIXELS, hidden=(3,), activation=jnp.tanh),
        num_latents=2,
        num_codes=3,
        code_dim=2,
        likelihood=likelihoods.bernoulli(),
        prior=tiny_made((2, 3), likelihoods.one_hot(3)),
    )


UNEQUAL = np.eye(3, dtype=np.int32)  # data that differ, for models with nothing or little that is drawn
CODES = np.eye(3, dtype=np.int32)[np.array(list(itertools.product(range(3), repeat=2)))]

# name -> () -> (model, data [3, ...]), and for a discrete latent the support.
CONTINUOUS = {
    "linear-Gaussian": lambda: (toys.toy("linear2").model, toys.toy("linear2").data),
    "shared weights": lambda: (toys.toy("shared").model, toys.toy("shared").data),
    "a user's, with numpyro": lambda: (toys.toy("numpyro").model, toys.toy("numpyro").data),
    "collapsed(gmm)": lambda: (vd.collapsed(mixture()), tiny_data(None, (2,))),
    **{
        f"vae, {name}": lambda likelihood=likelihood, levels=levels: (tiny_vae(likelihood), tiny_data(levels))
        for name, (likelihood, levels) in LIKELIHOODS.items()
    },
    "vae, mixture prior": lambda: (
        tiny_vae(likelihoods.bernoulli(), vd.collapsed(mixture())),
        tiny_data(2),
    ),
    "dequantized(vae)": lambda: (vd.dequantized(tiny_vae(likelihoods.gaussian()), 4), tiny_data(4)),
    "hvae": lambda: (tiny_hvae(), tiny_data(2)),
    "ladder": lambda: (tiny_ladder(), tiny_data(2)),
    "made, no latent": lambda: (tiny_made(PIXELS, likelihoods.bernoulli()), UNEQUAL),
    "pixelcnn, no latent": lambda: (tiny_pixelcnn(), tiny_data(4, (2, 2, 1))),
}
DISCRETE = {
    "Bernoulli latent": lambda: (toys.toy("bernoulli").model, toys.toy("bernoulli").data, toys.BITS),
    "gmm": lambda: (mixture(), tiny_data(None, (2,)), jnp.arange(3)),
    "gmm, encoder": lambda: (mixture(mixture_encoder()), tiny_data(None, (2,)), jnp.arange(3)),
    "vqvae": lambda: (tiny_vqvae(), UNEQUAL, jnp.asarray(CODES)),
}
MIXED = {
    "a category, then a number": lambda: (toys.toy("mixed c, u").model, toys.toy("mixed c, u").data),
    "a number, then a category": lambda: (toys.toy("mixed u, c").model, toys.toy("mixed u, c").data),
}

CONTROL = vd.Network(lambda key: jnp.ones(2), lambda params, z, x: params @ jnp.tanh(z + x))


@functools.cache
def built(name):
    """The model, its params moved off any symmetric start, and its data."""
    model, data = (CONTINUOUS | DISCRETE | MIXED)[name]()[:2]
    if name == "Bernoulli latent":
        model = vd.with_cv(model, vd.relax_init(CONTROL))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: leaf + 0.2 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        model.init(jax.random.key(7)),
    )
    return model, params, data


@functools.cache
def baselines_own():
    """name -> (objective, params, data): what is raised where there is no density to bound."""
    machine = baselines.rbm((3,), 2, init_scale=1.0)
    energy = baselines.ebm(vd.nets.mlp((3,), (), hidden=(4,), activation=jnp.tanh))
    of_machine, of_energy = (model.init(jax.random.key(2)) for model in (machine, energy))
    log_density = energy.log_density
    scores = {
        "explicit": baselines.explicit_score_matching(log_density),
        "sliced": baselines.sliced_score_matching(log_density, 2),
        "sliced, variance reduced": baselines.sliced_score_matching_vr(log_density, 2),
        "denoising": baselines.denoising_score_matching(log_density, 0.3),
    }
    divergence = baselines.contrastive_divergence(machine, 2)
    return {"contrastive divergence": (divergence, of_machine, UNEQUAL)} | {
        name: (objective, of_energy, tiny_data(None)) for name, objective in scores.items()
    }
