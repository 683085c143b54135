"""Hierarchies with known answers: a linear-Gaussian chain of three layers, and helpers to run and judge them.

    z_3 ~ N(0, I),  z_2 = a_2 z_3 + b_2 + s_2 eps,  z_1 = a_1 z_2 + b_1 + s_1 eps,  x = W z_1 + b_0 + s_0 eps

with a_l elementwise and the columns of W orthogonal, so that all posteriors have independent units, in either
direction; computed here in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import vdiff as vd
from tests import toys
from vdiff import Network

W = np.array([[0.8, 0.3], [-0.4, 0.9], [0.6, 0.2]])
W[:, 1] -= W[:, 0] * (W[:, 0] @ W[:, 1]) / (W[:, 0] @ W[:, 0])
B = (np.array([0.1, -0.2, 0.3]), np.array([0.4, -0.3]), np.array([-0.5, 0.2]))
A = (None, np.array([0.9, -1.2]), np.array([0.7, 1.1]))
S = (0.6, np.array([0.5, 0.8]), np.array([0.7, 0.4]))
X = np.array([0.7, -1.1, 0.4])

# Marginals of z_1..z_3 under the prior, by index 1..3.
MEAN, VAR = [None] * 4, [None] * 4
MEAN[3], VAR[3] = np.zeros(2), np.ones(2)
for layer in (2, 1):
    MEAN[layer] = A[layer] * MEAN[layer + 1] + B[layer]
    VAR[layer] = A[layer] ** 2 * VAR[layer + 1] + S[layer] ** 2

GAIN = np.diag(W.T @ W) / S[0] ** 2
"""The precision with which x tells of z_1."""


def log_prob(x):
    """Log p(x) = log N(x; W m_1 + b_0, W V_1 W^T + s_0^2 I)."""
    covariance = W @ np.diag(VAR[1]) @ W.T + S[0] ** 2 * np.eye(3)
    return scipy.stats.multivariate_normal(W @ MEAN[1] + B[0], covariance).logpdf(x)


def affine(weight, bias, *constants):
    """A network of one input: weight @ x + bias beside constants; all of them parameters, in the input's dtype."""
    start = {"w": weight, "b": bias, "c": np.concatenate([*constants, np.zeros(0)])}
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
    return Network(
        lambda key: start,
        lambda p, x: jnp.concatenate([p["w"] @ x.astype(p["w"].dtype) + p["b"], p["c"]]),
    )


def random_dense(num_in, num_out, seed, offset=0.0):
    """One input or two, side by side, to a tanh layer and a linear one; in the dtype of the weights."""
    rng = np.random.default_rng(seed)
    start = {"w": 0.7 * rng.normal(size=(num_out, num_in)), "v": 0.4 * rng.normal(size=(num_out, num_out))}
    start |= {"b": np.full(num_out, 0.7), "c": np.broadcast_to(offset, num_out)}
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)

    def apply(p, *inputs):
        x = jnp.concatenate([leaf.astype(p["w"].dtype) for leaf in inputs])
        return p["v"] @ jnp.tanh(p["w"] @ x + p["b"]) + p["c"]

    return Network(lambda key: start, apply)


def transport(out, eps):
    """loc + scale * eps of loc beside log scale."""
    loc, log_scale = jnp.split(out, 2)
    return loc + jnp.exp(log_scale) * eps


def check_against_exact(toy, num_draws=30_000):
    """Terms and estimators against exact expectations: values, and gradients part by part."""
    model, num_samples = toy.model, 2
    objectives = {
        (1.0, "terms"): model.elbo_terms,
        (1.0, "pathwise"): vd.pathwise(model, vd.elbo, num_samples),
        (1.0, "doubly"): vd.doubly_reparameterized(model, vd.elbo, num_samples),
        (0.0, "pathwise"): vd.pathwise(model, vd.iwae, num_samples),
        (0.0, "doubly"): vd.doubly_reparameterized(model, vd.iwae, num_samples),
    }
    exact = toys.exact_expectations(toy, num_samples, alphas=(1.0, 0.0), num_nodes=16)
    runs = toys.gradient_draws(objectives, toy.params, toy.data, num_draws)
    for (alpha, name), (values, draws) in runs.items():
        value, gradient = exact[alpha]
        assert toys.z_scores(values[:, None], value) < 5.0, (alpha, name)
        assert np.std(values) / np.sqrt(num_draws) < 0.004 * abs(value), (alpha, name)
        toys.check_unbiased(draws, gradient)


def check_importance_sampling(model, params, key, num_samples=20_000):
    """From a q beside the posterior: log p(x) within 5 standard errors, which are small, of weights that differ."""
    judged = toys.quick_jit(vd.importance_log_prob(model, num_samples, 5_000))(
        key, params, jnp.asarray(X, jnp.float32)
    )
    assert float(judged.std_error) < 0.02 and float(judged.ess) < 0.9 * num_samples
    assert float(judged.k_hat) < 0.7
    assert abs(float(judged.value) - log_prob(X)) < 5 * float(judged.std_error)


def products(function, *args):
    """The shapes of the results of all matrix products in a function's jaxpr."""
    found = []

    def look(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found.append(tuple(eqn.outvars[0].aval.shape))
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    look(inner)

    look(jax.make_jaxpr(function)(*args).jaxpr)
    return found
