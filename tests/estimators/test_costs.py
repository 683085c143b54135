"""What estimators cost: passes through the networks, counted in the compiled program, arithmetic, and traces."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import vdiff as vd
from vdiff import Network, Params

# No two layers, and no two directions, share a pair of sizes; K differs from all of them.
NUM_PIXELS, WIDTH_Q, WIDTH_P, LATENT_DIM, NUM_SAMPLES = 11, 13, 17, 3, 5
BITS = [[i >> bit & 1 for bit in range(LATENT_DIM)] for i in range(2**LATENT_DIM)]
CV = {"log_temperature": jnp.float32(-0.7), "scale": jnp.float32(0.8)}


def sigmoid_belief_network(size=NUM_PIXELS):
    encoder = vd.nets.mlp((size,), (LATENT_DIM,), hidden=(WIDTH_Q,))
    decoder = vd.nets.mlp((LATENT_DIM,), (size,), hidden=(WIDTH_P,))
    return vd.sbn([encoder], [decoder], num_units=LATENT_DIM, likelihood=vd.likelihoods.gaussian(1.0))


def gaussian_vae(prior=None):
    encoder = vd.nets.mlp((NUM_PIXELS,), (2 * LATENT_DIM,), hidden=(WIDTH_Q,))
    decoder = vd.nets.mlp((LATENT_DIM,), (NUM_PIXELS,), hidden=(WIDTH_P,))
    likelihood = vd.likelihoods.gaussian(1.0)
    return vd.vae(encoder, decoder, latent_dim=LATENT_DIM, likelihood=likelihood, prior=prior)


SBN, VAE = sigmoid_belief_network(), gaussian_vae()
RELAXED = (SBN, SBN.logits)
# A network of no matrix, so that none of its products is taken for the model's.
FREE = Network(lambda key: jnp.float32(0.3), lambda cv, *inputs: cv * sum(map(jnp.sum, inputs)))


def vae_with_a_mixture():
    """z continuous and its component u, drawn from the exact posterior p(u | z)."""
    prior = vd.gmm(2, LATENT_DIM)

    def log_q_discrete(params, x, z):
        return prior.log_q(Params(params.phi["theta"], params.phi["phi"], params.lam["prior"]), *z)

    return gaussian_vae(prior), log_q_discrete


MIXTURE, LOG_Q_OF_U = vae_with_a_mixture()


def frozen(of, *more, bound=vd.elbo, num_samples=NUM_SAMPLES):
    return vd.frozen(of(*RELAXED, *more, bound, num_samples), "cv")


K = NUM_SAMPLES
PASSES = {
    # name: model, objective, cv, rows through the encoder, through the decoder, back to the decoder's input
    "pathwise": (VAE, vd.pathwise(VAE, vd.iwae, K), (), 1, K, K),
    "doubly_reparameterized": (VAE, vd.doubly_reparameterized(VAE, vd.iwae, K), (), 1, K, K),
    "leave_one_out": (SBN, vd.score_function(SBN, vd.iwae, K), (), 1, K, 0),
    "learned baseline": (
        SBN,
        vd.score_function(SBN, vd.iwae, K, baseline=vd.learned_baseline(FREE)),
        jnp.float32(0.3),
        1,
        K,
        0,
    ),
    "leave_one_out, continuous": (VAE, vd.score_function(VAE, vd.iwae, K), (), 1, K, 0),
    "likelihood_gradient": (SBN, vd.likelihood_gradient(SBN, K), (), 1, K, 0),
    "wake_phase": (SBN, vd.wake_sleep(SBN, K), (), 1, K, 0),
    # And one of each for the dream.
    "sleep_phase": (SBN, vd.wake_sleep(SBN, K, phase=vd.sleep_phase), (), 2, K + 1, 0),
    "mixed": (MIXTURE, vd.mixed(MIXTURE, LOG_Q_OF_U, vd.iwae, K), (), 1, K, K),
    "straight_through": (SBN, vd.straight_through(*RELAXED, 1.0, vd.iwae, K), (), 1, K, K),
    "relaxed": (SBN, vd.relaxed(*RELAXED, 0.5, vd.iwae, K), (), 1, 2 * K, K),
    "rebar": (SBN, frozen(vd.rebar), CV, 1, 3 * K, 2 * K),
    "relax": (SBN, frozen(vd.relax, FREE), CV | {"network": jnp.float32(0.3)}, 1, 3 * K, 2 * K),
    "enumerated": (SBN, vd.enumerated(SBN, (jnp.array(BITS, bool),), vd.elbo), (), 1, 2**LATENT_DIM, 0),
}
WITHOUT_GRADIENT = {"relaxed": K, "doubly_reparameterized": K}


def matrix_products(function, *args):
    """Return (contracted size, size of the result's last axis, rows) of every matrix product that is compiled."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = {name: sizes(shape) for name, shape in re.findall(r"%([\w.-]+) = \w+\[([\d,]*)\]", text)}
    for computation in re.findall(r"^%[\w.-]+ \((.*)\) -> ", text, re.MULTILINE):
        shapes |= {
            name: sizes(shape) for name, shape in re.findall(r"([\w.-]+): \w+\[([\d,]*)\]", computation)
        }
    products = []
    pattern = r"= \w+\[([\d,]*)\]\S* dot\(%?([\w.-]+), .*lhs_contracting_dims=\{([\d,]*)\}"
    for result, lhs, contracted in re.findall(pattern, text):
        size = math.prod(shapes[lhs][axis] for axis in sizes(contracted))
        products.append((size, *sizes(result)))
    return products


def sizes(text):
    return [int(size) for size in text.split(",") if size]


def rows(products, size_in, size_out):
    """How many vectors [size_in] a matrix [size_in, size_out] was applied to."""
    hits = [result for size, *result in products if size == size_in and size_out in result]
    return sum(math.prod(result) // size_out for result in hits)


@pytest.mark.parametrize("name", PASSES)
def test_passes_through_the_networks(name):
    """Of value and gradient together: K draws are one encoding and K decodings, in either of the two layers."""
    model, objective, cv, encoded, decoded, back = PASSES[name]
    params = model.init(jax.random.key(0))._replace(cv=cv)
    gradient = jax.value_and_grad(vd.total(objective), argnums=1)
    products = matrix_products(gradient, jax.random.key(0), params, jnp.zeros(NUM_PIXELS))
    size = LATENT_DIM * (1 if model is SBN else 2)
    print(name, products)
    assert rows(products, NUM_PIXELS, WIDTH_Q) == rows(products, WIDTH_Q, size) == encoded
    assert rows(products, LATENT_DIM, WIDTH_P) == rows(products, WIDTH_P, NUM_PIXELS) == decoded
    assert rows(products, WIDTH_P, LATENT_DIM) == back
    # Nothing here asks for the derivative by x.
    assert rows(products, WIDTH_Q, NUM_PIXELS) == 0
