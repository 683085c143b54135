"""What estimators cost: passes through the networks, counted in the compiled program; arithmetic; traces."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import vdiff as vd
from tests.nets.oracles import equations
from vdiff import Network, Params

# No two layers, and no two directions, share a pair of sizes; K differs from all of them.
NUM_PIXELS, WIDTH_Q, WIDTH_P, LATENT_DIM, K = 11, 13, 17, 3, 5
BITS = [[bool(i >> bit & 1) for bit in range(LATENT_DIM)] for i in range(2**LATENT_DIM)]
REBAR = {"log_temperature": jnp.float32(-0.7), "scale": jnp.float32(0.8)}
RELAX = REBAR | {"network": jnp.float32(0.3)}


def networks(num_pixels, num_outputs):
    """An encoder and a decoder of one hidden layer each."""
    encoder = vd.nets.mlp((num_pixels,), (num_outputs,), hidden=(WIDTH_Q,))
    return encoder, vd.nets.mlp((LATENT_DIM,), (num_pixels,), hidden=(WIDTH_P,))


def network_of_bits(num_pixels=NUM_PIXELS):
    encoder, decoder = networks(num_pixels, LATENT_DIM)
    return vd.sbn([encoder], [decoder], num_units=LATENT_DIM, likelihood=vd.likelihoods.gaussian(1.0))


def gaussian_vae(prior=None):
    likelihood = vd.likelihoods.gaussian(1.0)
    both = networks(NUM_PIXELS, 2 * LATENT_DIM)
    return vd.vae(*both, latent_dim=LATENT_DIM, likelihood=likelihood, prior=prior)


MIXTURE = vd.gmm(2, LATENT_DIM)
MODELS = {"bits": network_of_bits(), "vae": gaussian_vae(), "mixture": gaussian_vae(MIXTURE)}


def log_q_of_component(params, x, z):
    """Log p(u | z), exact, of the component u: the discrete part of q where the prior is a mixture."""
    return MIXTURE.log_q(Params(params.phi["theta"], params.phi["phi"], params.lam["prior"]), *z)


def scalar(cv, *inputs):
    return cv * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(inputs))


# A network of no matrix, so that none of its products is taken for the model's.
FREE = Network(lambda key: jnp.float32(0.3), scalar)


def unfused(model):
    """The same functions, written apart as a user may."""
    return model._replace(sample_q=lambda *args: model.sample_q(*args))


class Case(NamedTuple):
    """An estimator and what it may cost, in rows: vectors that a matrix is applied to."""

    model: str
    build: Callable  # (model) -> objective
    encoded: int = 1
    encoder_back: int = 1  # from the encoder's output to its hidden layer, in the gradient
    decoded: int = K
    back: int = 0  # from the decoder's hidden layer to its input, in the gradient
    back_in_value: int = 0  # the same where the value alone is asked for
    traces: int = 1  # of log_joint
    cv: Any = ()


CASES = {
    "pathwise": Case("vae", lambda m: vd.pathwise(m, vd.iwae, K), back=K),
    # By z and by log q, which the compiler cannot add up before it goes back.
    "pathwise_unfused": Case("vae", lambda m: vd.pathwise(unfused(m), vd.iwae, K), back=K, encoder_back=2),
    # Written twice, for the compiler to merge.
    "doubly_reparameterized": Case(
        "vae", lambda m: vd.doubly_reparameterized(m, vd.iwae, K), back=K, traces=2
    ),
    "leave_one_out": Case("bits", lambda m: vd.score_function(m, vd.iwae, K)),
    "learned_baseline": Case(
        "bits",
        lambda m: vd.score_function(m, vd.iwae, K, baseline=vd.learned_baseline(FREE)),
        cv=jnp.float32(0.3),
    ),
    "likelihood_gradient": Case("bits", lambda m: vd.likelihood_gradient(m, K), encoder_back=0),
    "wake_phase": Case("bits", lambda m: vd.wake_sleep(m, K)),
    # And one of each for the dream.
    "sleep_phase": Case(
        "bits", lambda m: vd.wake_sleep(m, K, phase=vd.sleep_phase), encoded=2, decoded=K + 1
    ),
    "mixed": Case("mixture", lambda m: vd.mixed(m, log_q_of_component, vd.iwae, K), back=K),
    "straight_through": Case("bits", lambda m: vd.straight_through(m, m.logits, 1.0, vd.iwae, K), back=K),
    "relaxed": Case(
        "bits", lambda m: vd.relaxed(m, m.logits, 0.5, vd.iwae, K), decoded=2 * K, back=K, traces=2
    ),
    "rebar": Case(
        "bits",
        lambda m: vd.frozen(vd.rebar(m, m.logits, vd.iwae, K), "cv"),
        decoded=3 * K,
        back=2 * K,
        back_in_value=2 * K,
        traces=3,
        cv=REBAR,
    ),
    "relax": Case(
        "bits",
        lambda m: vd.frozen(vd.relax(m, m.logits, FREE, vd.iwae, K), "cv"),
        decoded=3 * K,
        back=2 * K,
        back_in_value=2 * K,
        traces=3,
        cv=RELAX,
    ),
    "enumerated": Case(
        "bits", lambda m: vd.enumerated(m, (jnp.array(BITS),), vd.iwae, 2), decoded=2**LATENT_DIM
    ),
}


def start(case):
    return MODELS[case.model].init(jax.random.key(0))._replace(cv=case.cv)


@functools.cache
def jitted(name, asked):
    """Return the jitted value, or value and gradient, and the list to which every trace of log_joint adds."""
    case, traces = CASES[name], []
    model = MODELS[case.model]

    def log_joint(params, x, z):
        traces.append(z)
        return model.log_joint(params, x, z)

    function = vd.total(case.build(model._replace(log_joint=log_joint)))
    return jax.jit(function if asked == "value" else jax.value_and_grad(function, argnums=1)), traces


def sizes(text):
    return [int(size) for size in text.split(",") if size]


def matrix_products(text):
    """Return (contracted size, shape of the result) of every matrix product in a compiled program's text."""
    shapes = {name: sizes(shape) for name, shape in re.findall(r"%([\w.-]+) = \w+\[([\d,]*)\]", text)}
    for parameters in re.findall(r"^%[\w.-]+ \((.*)\) -> ", text, re.MULTILINE):
        shapes |= {
            name: sizes(shape) for name, shape in re.findall(r"([\w.-]+): \w+\[([\d,]*)\]", parameters)
        }
    pattern = r"= \w+\[([\d,]*)\]\S* dot\(%?([\w.-]+), .*lhs_contracting_dims=\{([\d,]*)\}"
    return [
        (math.prod(shapes[left][axis] for axis in sizes(axes)), sizes(result))
        for result, left, axes in re.findall(pattern, text)
    ]


def rows(products, size_in, size_out):
    """How many vectors [size_in] a matrix [size_in, size_out] was applied to."""
    return sum(
        math.prod(shape) // size_out for size, shape in products if size == size_in and size_out in shape
    )


@pytest.mark.parametrize(
    ("name", "asked"),
    [(name, "gradient") for name in CASES]
    + [(name, "value") for name in ("doubly_reparameterized", "leave_one_out", "rebar")],
)
def test_passes_through_the_networks(name, asked):
    """K draws are one encoding and K decodings, in both layers of each network, however often they are written."""
    case = CASES[name]
    step, _ = jitted(name, asked)
    lowered = step.lower(jax.random.key(0), start(case), jnp.zeros(NUM_PIXELS))
    products = matrix_products(lowered.compile().as_text())
    num_outputs = LATENT_DIM if case.model == "bits" else 2 * LATENT_DIM
    assert rows(products, NUM_PIXELS, WIDTH_Q) == rows(products, WIDTH_Q, num_outputs) == case.encoded
    assert rows(products, LATENT_DIM, WIDTH_P) == rows(products, WIDTH_P, NUM_PIXELS) == case.decoded
    assert rows(products, WIDTH_P, LATENT_DIM) == (case.back if asked == "gradient" else case.back_in_value)
    assert rows(products, num_outputs, WIDTH_Q) == (case.encoder_back if asked == "gradient" else 0)
    assert rows(products, WIDTH_Q, NUM_PIXELS) == 0, "no derivative by x was asked for"


@pytest.mark.parametrize("name", ["pathwise", "leave_one_out", "mixed"])
def test_written_once(name):
    """Each network is one call in the jaxpr, before any compiler merges what is alike."""
    case = CASES[name]
    objective = vd.total(case.build(MODELS[case.model]))
    jaxpr = jax.make_jaxpr(objective)(jax.random.key(0), start(case), jnp.zeros(NUM_PIXELS))
    shapes = [
        tuple(eqn.outvars[0].aval.shape)
        for eqn in equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert shapes.count((WIDTH_Q,)) == 1 and not any(
        WIDTH_Q in shape for shape in shapes if shape != (WIDTH_Q,)
    )
    assert shapes.count((K, WIDTH_P)) == 1 and not any(
        WIDTH_P in shape for shape in shapes if shape != (K, WIDTH_P)
    )


def test_the_arithmetic_of_control_variates():
    """One draw, relative to the plain score function: at most 3 at a fixed cv, 5 where cv is learned."""
    num_pixels = 256
    model = network_of_bits(num_pixels)

    def flops(objective, cv=()):
        step = jax.jit(jax.value_and_grad(vd.total(objective), argnums=1))
        params = model.init(jax.random.key(0))._replace(cv=cv)
        lowered = step.lower(jax.random.key(0), params, jnp.ones(num_pixels))
        return lowered.compile().cost_analysis()["flops"]

    plain = flops(vd.score_function(model, vd.elbo, 1, baseline=vd.no_baseline))
    rebar, relax = vd.rebar(model, model.logits), vd.relax(model, model.logits, FREE)
    for name, objective, cv in (("rebar", rebar, REBAR), ("relax", relax, RELAX)):
        fixed, learned = flops(vd.frozen(objective, "cv"), cv) / plain, flops(objective, cv) / plain
        print(name, round(fixed, 2), round(learned, 2))
        # The model's other two evaluations are there: the count is not of an empty program.
        assert 1.5 < fixed < 3.0 and fixed < learned < 5.0, (name, fixed, learned)


@pytest.mark.parametrize("name", CASES)
def test_traced_once(name):
    """Other keys, params and data of the same shapes neither trace nor compile again."""
    case = CASES[name]
    step, traces = jitted(name, "gradient")
    values = set()
    for seed in range(3):
        params = jax.tree.map(lambda leaf, seed=seed: leaf + 0.1 * seed, start(case))
        values.add(float(step(jax.random.key(seed), params, 0.5 * seed * jnp.ones(NUM_PIXELS))[0]))
        assert len(traces) == case.traces, seed
    # Three different computations, by one program.
    assert len(values) == 3 and step._cache_size() == 1
