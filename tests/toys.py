"""Toy models whose answers are known, and the z-score by which a Monte-Carlo gradient is judged.

Every latent here is a function of finitely many standard normals or takes finitely many values, so the
expectation of ANY bound over K draws is a finite sum: Gauss-Hermite nodes, or the values themselves, visited
as multisets since a bound is symmetric in its draws. That sum is differentiated in float64; no estimator of
vdiff takes part in it.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp

import vdiff as vd
from vdiff import Model, Params
from vdiff.estimators.log_weights import draw
from vdiff.types import q_at

CHUNK = 20_000
LOG_2_PI = math.log(2 * math.pi)


# Most of the time here goes into compiling: without optimisation it takes less than half of it.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def log_normal(x, loc, log_scale):
    """Log N(x; loc, exp(log_scale)^2) summed, written here so that vdiff's is not its own judge."""
    return jnp.sum(-0.5 * ((x - loc) / jnp.exp(log_scale)) ** 2 - log_scale - 0.5 * LOG_2_PI)


class Toy(NamedTuple):
    """A model, parameters with q far from the posterior, a batch of 3 data, and q's draw as a function of noise."""

    model: Model
    params: Params
    data: np.ndarray
    transport: Callable | None  # (params, x, eps [noise_dim]) -> z
    noise_dim: int = 0
    # Where z is not a function of normals alone: (params, x, eps [n, noise_dim], log_mass [n]) -> z [N], log p [N]
    support: Callable | None = None
    logits: Callable | None = None  # (params, x) -> logits of a discrete q


# A linear-Gaussian model: z ~ N(loc, I), x | z ~ N(weight z + bias, 0.7^2), q(z | x) = N(A x + c, L L^T).

SCALE = 0.7


def _factor(lam):
    return jnp.tril(lam["lower"], -1) + jnp.diag(jnp.exp(lam["log_diag"]))


def linear_gaussian(latent_dim=1):
    """Build the model; x is [3]."""
    dim = 3

    def transport(params, x, eps):
        lam = params.lam
        return lam["weight"] @ x + lam["bias"] + _factor(lam) @ eps

    def log_joint(params, x, z):
        theta = params.theta
        loc = theta["weight"] @ z + theta["bias"]
        return log_normal(z, params.phi["loc"], jnp.zeros_like(z)) + log_normal(
            x, loc, jnp.full_like(x, math.log(SCALE))
        )

    def log_q(params, x, z):
        lam = params.lam
        eps = jax.scipy.linalg.solve_triangular(_factor(lam), z - lam["weight"] @ x - lam["bias"], lower=True)
        return log_normal(eps, jnp.zeros_like(eps), jnp.zeros_like(eps)) - jnp.sum(lam["log_diag"])

    def init(key):
        keys = jax.random.split(key, 3)
        return Params(
            theta={"weight": jax.random.normal(keys[0], (dim, latent_dim)), "bias": jnp.zeros(dim)},
            phi={"loc": jax.random.normal(keys[1], (latent_dim,))},
            lam={
                "weight": 0.1 * jax.random.normal(keys[2], (latent_dim, dim)),
                "bias": jnp.zeros(latent_dim),
                "log_diag": jnp.zeros(latent_dim),
                "lower": jnp.zeros((latent_dim, latent_dim)),
            },
        )

    def sample(key, params):
        key_z, key_x = jax.random.split(key)
        z = params.phi["loc"] + jax.random.normal(key_z, (latent_dim,))
        x = params.theta["weight"] @ z + params.theta["bias"] + SCALE * jax.random.normal(key_x, (dim,))
        return x, z

    model = Model(
        init,
        log_joint,
        log_q,
        lambda key, params, x: transport(params, x, jax.random.normal(key, (latent_dim,))),
        sample,
    )
    weight = np.array([[0.6, -0.2], [-0.4, 0.5], [0.3, 0.7]], np.float32)[:, :latent_dim]
    encode = np.array([[0.2, -0.1, 0.1], [-0.2, 0.1, 0.3]], np.float32)[:latent_dim]
    params = Params(
        theta={"weight": jnp.asarray(weight), "bias": jnp.array([0.3, -0.5, 0.2])},
        phi={"loc": jnp.array([-1.8, -0.9])[:latent_dim]},
        lam={
            "weight": jnp.asarray(encode),
            "bias": jnp.array([-0.8, 0.2])[:latent_dim],
            "log_diag": jnp.array([-0.7, -0.4])[:latent_dim],
            "lower": jnp.array([[0.0, 0.0], [0.3, 0.0]])[:latent_dim, :latent_dim],
        },
    )
    data = np.array([[1.5, -1.6, 0.9], [1.2, -0.7, -0.2], [2.4, -0.9, 1.7]], np.float32)
    return Toy(model, params, data, transport, latent_dim)


def linear_gaussian_log_prob(params, x):
    """Log p(x) = log N(x; W loc + b, W W^T + 0.7^2 I)."""
    weight = params.theta["weight"]
    covariance = weight @ weight.T + SCALE**2 * jnp.eye(3, dtype=weight.dtype)
    return jax.scipy.stats.multivariate_normal.logpdf(
        x, weight @ params.phi["loc"] + params.theta["bias"], covariance
    )


def linear_gaussian_elbo(params, x):
    """E_q log p(x | z) + E_q log p(z) + H(q), in closed form."""
    theta, lam = params.theta, params.lam
    loc, factor = lam["weight"] @ x + lam["bias"], _factor(lam)
    residual = x - theta["weight"] @ loc - theta["bias"]
    spread = theta["weight"] @ factor
    dim, latent_dim = theta["weight"].shape
    likelihood = (
        -0.5 * (jnp.sum(residual**2) + jnp.sum(spread**2)) / SCALE**2
        - dim * math.log(SCALE)
        - dim / 2 * LOG_2_PI
    )
    prior = -0.5 * (jnp.sum((loc - params.phi["loc"]) ** 2) + jnp.sum(factor**2)) - latent_dim / 2 * LOG_2_PI
    return likelihood + prior + jnp.sum(lam["log_diag"]) + latent_dim / 2 * (1 + LOG_2_PI)


def at_posterior(params):
    """Return params with lam such that q(z | x) = p(z | x) for every x."""
    weight, bias, loc = (
        np.asarray(v, np.float64) for v in (params.theta["weight"], params.theta["bias"], params.phi["loc"])
    )
    latent_dim = len(loc)
    covariance = np.linalg.inv(np.eye(latent_dim) + weight.T @ weight / SCALE**2)
    encode = covariance @ weight.T / SCALE**2
    factor = np.linalg.cholesky(covariance)
    lam = {
        "weight": encode,
        "bias": covariance @ loc - encode @ bias,
        "log_diag": np.log(np.diag(factor)),
        "lower": np.tril(factor, -1),
    }
    return params._replace(lam={name: jnp.asarray(value, jnp.float32) for name, value in lam.items()})


# Weights shared between p and q, and a latent that is a pytree of two layers.


def shared_weights():
    """u ~ N(loc, 1), v | u ~ N(w u, 1), x | v ~ N(w v, 0.7^2); q uses the SAME w = theta: v from x, u from v."""

    def q(params, x, v):
        w, lam = params.theta["w"], params.lam
        return (w[1] * x + lam["bias"], lam["log_scale"]), (w[0] * v + 0.5 * lam["bias"], lam["log_scale"])

    def transport(params, x, eps):
        loc, log_scale = q(params, x, x)[0]
        v = loc + jnp.exp(log_scale) * eps[0]
        loc, log_scale = q(params, x, v)[1]
        return {"u": loc + jnp.exp(log_scale) * eps[1], "v": v}

    def log_joint(params, x, z):
        w, zero = params.theta["w"], jnp.zeros_like(z["u"])
        return (
            log_normal(z["u"], params.phi["loc"], zero)
            + log_normal(z["v"], w[0] * z["u"], zero)
            + log_normal(x, w[1] * z["v"], zero + math.log(0.7))
        )

    def log_q(params, x, z):
        of_v, of_u = q(params, x, z["v"])
        return log_normal(z["v"], *of_v) + log_normal(z["u"], *of_u)

    def sample(key, params):
        eps = jax.random.normal(key, (3,))
        u = params.phi["loc"] + eps[0]
        v = params.theta["w"][0] * u + eps[1]
        return params.theta["w"][1] * v + 0.7 * eps[2], {"u": u, "v": v}

    params = Params(
        theta={"w": jnp.array([0.6, 0.8])},
        phi={"loc": jnp.array(1.5)},
        lam={"bias": jnp.array(-1.0), "log_scale": jnp.array(-0.3)},
    )
    model = Model(
        lambda key: params,
        log_joint,
        log_q,
        lambda key, params, x: transport(params, x, jax.random.normal(key, (2,))),
        sample,
    )
    return Toy(model, params, np.array([1.4, 0.6, 2.0], np.float32), transport, 2)


# A Bernoulli latent: two bits, x in R^2.

BITS = np.array(list(itertools.product([0, 1], repeat=2)), np.int32)


def bernoulli_latent():
    """z in {0, 1}^2 (int32), p(z) = Bernoulli(phi), x | z ~ N(W z, I), q(z | x) = Bernoulli(A x + c)."""

    def log_bernoulli(z, logits):
        return jnp.sum(z.astype(logits.dtype) * logits - jnp.logaddexp(logits, jnp.zeros_like(logits)))

    def q_logits(params, x):
        return params.lam["weight"] @ x + params.lam["bias"]

    def log_joint(params, x, z):
        loc = params.theta["weight"] @ z.astype(x.dtype)
        return log_bernoulli(z, params.phi["logits"]) + log_normal(x, loc, jnp.zeros_like(x))

    def bits(key, logits):
        return jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(jnp.int32)

    def sample(key, params):
        key_z, key_x = jax.random.split(key)
        z = bits(key_z, params.phi["logits"])
        return params.theta["weight"] @ z.astype(jnp.float32) + jax.random.normal(key_x, (2,)), z

    params = Params(
        theta={"weight": jnp.array([[1.0, -0.5], [0.4, 0.8]])},
        phi={"logits": jnp.array([-0.9, 1.2])},
        lam={"weight": jnp.array([[0.3, -0.2], [0.1, 0.4]]), "bias": jnp.array([-1.8, -0.9])},
    )
    model = Model(
        lambda key: params,
        log_joint,
        lambda params, x, z: log_bernoulli(z, q_logits(params, x)),
        lambda key, params, x: bits(key, q_logits(params, x)),
        sample,
    )

    def support(params, x, eps, log_mass):
        return jnp.asarray(BITS), jax.vmap(model.log_q, in_axes=(None, None, 0))(params, x, jnp.asarray(BITS))

    data = np.array([[1.6, 0.2], [1.1, 0.9], [2.1, -0.8]], np.float32)
    return Toy(model, params, data, None, support=support, logits=q_logits)


# A categorical latent, one-hot.


def categorical_latent():
    """z one-hot in {0, 1}^3 (int32), p(z) = softmax(phi), x | z ~ N(tanh(W z), I), q(z | x) = softmax(A x + c)."""

    def log_categorical(z, logits):
        return jnp.sum(z.astype(logits.dtype) * jax.nn.log_softmax(logits))

    def q_logits(params, x):
        return params.lam["weight"] @ x + params.lam["bias"]

    def loc(params, z):
        return jnp.tanh(params.theta["weight"] @ z.astype(params.theta["weight"].dtype))

    def log_joint(params, x, z):
        return log_categorical(z, params.phi["logits"]) + log_normal(x, loc(params, z), jnp.zeros_like(x))

    def draw_one_hot(key, logits):
        return jax.nn.one_hot(jax.random.categorical(key, logits), 3, dtype=jnp.int32)

    def sample(key, params):
        key_z, key_x = jax.random.split(key)
        z = draw_one_hot(key_z, params.phi["logits"])
        return loc(params, z) + jax.random.normal(key_x, (2,)), z

    params = Params(
        theta={"weight": jnp.array([[1.0, -0.8, 0.3], [0.4, 0.9, -0.7]])},
        phi={"logits": jnp.array([-0.5, 0.9, 0.2])},
        lam={
            "weight": jnp.array([[0.3, -0.2], [0.1, 0.4], [-0.3, 0.2]]),
            "bias": jnp.array([-0.4, -0.9, 0.6]),
        },
    )
    model = Model(
        lambda key: params,
        log_joint,
        lambda params, x, z: log_categorical(z, q_logits(params, x)),
        lambda key, params, x: draw_one_hot(key, q_logits(params, x)),
        sample,
    )

    def support(params, x, eps, log_mass):
        z = jnp.eye(3, dtype=jnp.int32)
        return z, jax.vmap(model.log_q, in_axes=(None, None, 0))(params, x, z)

    data = np.array([[1.6, 0.2], [1.1, 0.9], [2.1, -0.8]], np.float32)
    return Toy(model, params, data, None, support=support, logits=q_logits)


# A discrete latent and a continuous one, q in either order.


def mixed_latents(is_discrete_first):
    """c in {0, 1, 2}, u | c ~ N(m_c, 1), x | u ~ N(w u, 0.7^2)^2; q(c | x) q(u | x, c), or q(u | x) q(c | x, u)."""

    def c_logits(params, x, u):
        lam = params.lam
        from_u = jnp.zeros_like(lam["of_u"]) if is_discrete_first else lam["of_u"] * u
        return lam["weight"] @ x + from_u

    def u_loc(params, x, c):
        shift = params.lam["of_c"][c] if is_discrete_first else params.lam["of_c"][0]
        return params.lam["slope"] @ x + shift

    def log_q_discrete(params, x, z):
        return jax.nn.log_softmax(c_logits(params, x, z["u"]))[z["c"]]

    def log_q(params, x, z):
        return log_q_discrete(params, x, z) + log_normal(
            z["u"], u_loc(params, x, z["c"]), params.lam["log_scale"]
        )

    def log_joint(params, x, z):
        theta, zero = params.theta, jnp.zeros_like(z["u"])
        return (
            jax.nn.log_softmax(params.phi["logits"])[z["c"]]
            + log_normal(z["u"], theta["m"][z["c"]], zero)
            + log_normal(x, theta["w"] * z["u"], jnp.full_like(x, math.log(SCALE)))
        )

    def transport(params, x, c, eps):
        return u_loc(params, x, c) + jnp.exp(params.lam["log_scale"]) * eps

    def sample_q(key, params, x):
        key_c, key_u = jax.random.split(key)
        eps = jax.random.normal(key_u)
        u = transport(params, x, jnp.int32(0), eps)
        c = jax.random.categorical(key_c, c_logits(params, x, u)).astype(jnp.int32)
        return {"c": c, "u": transport(params, x, c, eps)}

    def sample(key, params):
        key_c, key_u, key_x = jax.random.split(key, 3)
        c = jax.random.categorical(key_c, params.phi["logits"]).astype(jnp.int32)
        u = params.theta["m"][c] + jax.random.normal(key_u)
        return params.theta["w"] * u + SCALE * jax.random.normal(key_x, (2,)), {"c": c, "u": u}

    def support(params, x, eps, log_mass):
        c = jnp.repeat(jnp.arange(3, dtype=jnp.int32), len(eps))
        u = jax.vmap(transport, in_axes=(None, None, 0, 0))(params, x, c, jnp.tile(eps[:, 0], 3))
        z = {"c": c, "u": u}
        log_c = jax.vmap(log_q_discrete, in_axes=(None, None, 0))(params, x, z)
        return z, log_c + jnp.tile(log_mass, 3)

    params = Params(
        theta={"m": jnp.array([-1.0, 0.4, 1.8]), "w": jnp.array([0.9, -0.6])},
        phi={"logits": jnp.array([0.6, -0.3, 0.2])},
        lam={
            "weight": jnp.array([[0.3, -0.2], [0.1, 0.4], [-0.3, 0.2]]),
            "slope": jnp.array([0.3, 0.2]),
            "of_c": jnp.array([0.7, -0.2, -0.9]),
            "of_u": jnp.array([0.5, 0.2, -0.6]),
            "log_scale": jnp.array(-1.0),
        },
    )
    model = Model(lambda key: params, log_joint, log_q, sample_q, sample)
    data = np.array([[1.4, -1.2], [0.6, 0.5], [2.0, -0.4]], np.float32)
    return Toy(model, params, data, None, 1, support, log_q_discrete)


# A user's own model: five plain functions around numpyro's distributions.


def users_numpyro_model():
    """z ~ N(loc, 1)^2, x | z ~ Poisson(exp(W z)), q(z | x) = N(A x + c, exp(log_scale)^2); x is int32 [3]."""

    def rate(params, z):
        return jnp.exp(params.theta["weight"] @ z)

    def q(params, x):
        loc = params.lam["weight"] @ x.astype(jnp.float32) + params.lam["bias"]
        return dist.Normal(loc, jnp.exp(params.lam["log_scale"])).to_event(1)

    def prior(params):
        return dist.Normal(params.phi["loc"], jnp.ones(2)).to_event(1)

    def log_joint(params, x, z):
        likelihood = dist.Poisson(rate(params, z)).to_event(1)
        return prior(params).log_prob(z) + likelihood.log_prob(x)

    def sample(key, params):
        key_z, key_x = jax.random.split(key)
        z = prior(params).sample(key_z)
        return dist.Poisson(rate(params, z)).sample(key_x), z

    def init(key):
        keys = jax.random.split(key)
        return Params(
            theta={"weight": 0.3 * jax.random.normal(keys[0], (3, 2))},
            phi={"loc": jnp.zeros(2)},
            lam={
                "weight": 0.1 * jax.random.normal(keys[1], (2, 3)),
                "bias": jnp.zeros(2),
                "log_scale": jnp.full(2, -0.5),
            },
        )

    model = Model(
        init=init,
        log_joint=log_joint,
        log_q=lambda params, x, z: q(params, x).log_prob(z),
        sample_q=lambda key, params, x: q(params, x).sample(key),
        sample=sample,
    )
    return Toy(model, init(jax.random.key(3)), np.array([[2, 0, 1], [0, 3, 1], [1, 1, 0]], np.int32), None)


# Bounds in float64, written apart from vdiff.bounds.


PARTITION = (0.0, 0.1, 0.5, 1.0)
BOUNDS = {
    1.0: vd.elbo,
    0.0: vd.iwae,
    0.5: vd.renyi(0.5),
    2.0: vd.renyi(2.0),
    "tvo": vd.tvo(PARTITION),
}
"""The bounds under test by alpha, as `exact_bound` and `numpy_bound` know them."""


def exact_bound(alpha):
    """The Renyi bound over the last axis of jax log-weights; alpha = 1 is the ELBO, 0 is IWAE; or the TVO's."""
    if alpha == "tvo":
        return lambda log_weights: sum(
            (right - left) * jnp.sum(jax.nn.softmax(left * log_weights, axis=-1) * log_weights, axis=-1)
            for left, right in itertools.pairwise(PARTITION)
        )
    if alpha == 1.0:
        return lambda log_weights: jnp.mean(log_weights, axis=-1)
    order = 1.0 - alpha
    return lambda log_weights: (
        (logsumexp(order * log_weights, axis=-1) - math.log(log_weights.shape[-1])) / order
    )


def numpy_bound(alpha, log_weights):
    """The same in NumPy, float64."""
    log_weights = np.asarray(log_weights, np.float64)
    if alpha == 1.0:
        return np.mean(log_weights)
    if alpha == "tvo":
        powers = [np.exp(left * (log_weights - np.max(log_weights))) for left in PARTITION[:-1]]
        return np.diff(PARTITION) @ [np.average(log_weights, weights=power) for power in powers]
    order = 1.0 - alpha
    top = np.max(order * log_weights)
    return (top + np.log(np.mean(np.exp(order * log_weights - top)))) / order


# Exact expectations.


def _multisets(num_values, num_draws):
    """Return every multiset of K of the values, [n, K], and how many ordered tuples it stands for, [n]."""
    index = np.array(list(itertools.combinations_with_replacement(range(num_values), num_draws)), np.int32)
    counts = np.zeros((len(index), num_values), int)
    np.add.at(counts, (np.arange(len(index))[:, None], index), 1)
    factorial = np.array([math.factorial(n) for n in range(num_draws + 1)], np.float64)
    return index, math.factorial(num_draws) / np.prod(factorial[counts], axis=1)


def exact_expectations(toy, num_draws, alphas=tuple(BOUNDS), num_nodes=None, of=None):
    """Compute E over K draws of q of the bounds, mean over toy.data, and their gradients by params, in float64.

    Args:
        toy: what is judged.
        num_draws: K.
        alphas: keys of `BOUNDS`.
        num_nodes: Gauss-Hermite nodes per dimension of the noise.
        of: in place of the bounds, `(params, x, z [n, K, ...], log_weights [n, K]) -> [n]`: its expectation is
            returned under None, with the expected gradient of `of` alone, draws, law and log-weights fixed.

    Returns:
        {alpha: (value, Params of gradients)}, NumPy.
    """
    eps, log_mass = np.zeros((1, 0)), np.zeros(1)
    if toy.noise_dim:
        if num_nodes is None:
            per_dim = {1: 40, 2: 24, 3: 20, 5: 16, 8: 12} if toy.noise_dim < 2 else {1: 30, 2: 12, 3: 8}
            if toy.support is not None:
                per_dim = {1: 40, 2: 24, 5: 9, 8: 5}
            num_nodes = per_dim[num_draws]
        nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
        eps = np.array(list(itertools.product(nodes, repeat=toy.noise_dim)))
        log_mass = np.log(weights / weights.sum())
        log_mass = np.array([sum(m) for m in itertools.product(log_mass, repeat=toy.noise_dim)])
    alphas = (None,) if of is not None else alphas

    def visited(params, x):
        if toy.support is not None:
            return toy.support(params, x, jnp.asarray(eps), jnp.asarray(log_mass))
        z = jax.vmap(toy.transport, in_axes=(None, None, 0))(params, x, jnp.asarray(eps))
        return z, jnp.asarray(log_mass)

    def expectations(params, x):
        z, log_p = visited(params, x)
        index, count = _multisets(len(log_p), num_draws)
        log_q = jax.vmap(toy.model.log_q, in_axes=(None, None, 0))(params, x, z)
        log_weights = jax.vmap(toy.model.log_joint, in_axes=(None, None, 0))(params, x, z) - log_q
        mass = count * jnp.exp(jnp.sum(log_p[index], axis=-1))
        if of is not None:
            fixed_z, mass = jax.lax.stop_gradient((jax.tree.map(lambda leaf: leaf[index], z), mass))
            return jnp.stack(
                [jnp.sum(mass * of(params, x, fixed_z, jax.lax.stop_gradient(log_weights)[index]))]
            )
        return jnp.stack([jnp.sum(mass * exact_bound(alpha)(log_weights[index])) for alpha in alphas])

    def mean(params, data):
        return jnp.mean(jax.vmap(expectations, in_axes=(None, 0))(params, data), axis=0)

    values, gradients = in_float64(
        lambda params, data: (mean(params, data), jax.jacrev(mean)(params, data)), toy.params, toy.data
    )
    return {
        alpha: (values[i], jax.tree.map(lambda leaf, i=i: leaf[i], gradients))
        for i, alpha in enumerate(alphas)
    }


def in_float64(function, *args):
    """Call a jitted function on float64 copies of float arguments and return NumPy."""
    with jax.enable_x64(True):

        def widen(leaf):
            leaf = np.asarray(leaf)
            return jnp.asarray(leaf, jnp.float64 if leaf.dtype.kind == "f" else leaf.dtype)

        return jax.device_get(quick_jit(function)(*jax.tree.map(widen, args)))


# Monte Carlo, judged.


def flat(tree):
    """Flatten the leaves of a tree, each [N, ...], to one array [N, P], float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def gradient_draws(objectives, params, data, num_draws, seed=0):
    """Draw values [N] and gradients (Params of [N, ...]) of objectives' means over a batch of data.

    Args:
        objectives: name -> objective; all are given the same keys and compiled together.
        params: where.
        data: [M, ...].
        num_draws: N.
        seed: of the N keys.

    Returns:
        {name: (values, gradients)}, NumPy.
    """

    def mean(objective, params, key):
        keys = jax.random.split(key, len(data))
        terms = jax.vmap(objective, in_axes=(0, None, 0))(keys, params, jnp.asarray(data))
        return jnp.mean(sum(terms.values()))

    def all_of_them(params, key):
        return [jax.value_and_grad(functools.partial(mean, o))(params, key) for o in objectives.values()]

    run = quick_jit(jax.vmap(all_of_them, in_axes=(None, 0)))
    num_chunks = -(-num_draws // CHUNK)
    keys = jax.random.split(jax.random.key(seed), (num_chunks, min(num_draws, CHUNK)))
    runs = [jax.device_get(run(params, chunk)) for chunk in keys]
    runs = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num_draws], *runs)
    return dict(zip(objectives, runs, strict=True))


@functools.partial(quick_jit, static_argnums=(0, 4))
def log_weights(model, key, params, x, num_samples):
    """Evaluate log p(x, z_k) - log q(z_k | x) at the K draws that an estimator makes with this key."""
    z = draw(q_at(model, params, x), key, num_samples)
    over_draws = {"in_axes": (None, None, 0), "axis_size": num_samples}
    return jax.vmap(model.log_joint, **over_draws)(params, x, z) - jax.vmap(model.log_q, **over_draws)(
        params, x, z
    )


def z_scores(draws, exact):
    """Return |mean - exact| in standard errors, [P], for draws [N, P], with a floor of float32 rounding."""
    floor = 1e-6 * np.linalg.norm(exact) + 1e-12
    std_error = np.std(draws, axis=0, ddof=1) / math.sqrt(len(draws))
    return np.abs(np.mean(draws, axis=0) - exact) / np.maximum(std_error, floor)


def check_unbiased(draws, exact, parts=("theta", "phi", "lam")):
    """Compare the mean gradient with the exact one, by part: each component, and along the gradient.

    The mean's standard error along the exact gradient must be under .4 % of its norm, so that a bias of 2 %
    of the norm is 5 standard errors.
    """
    for part in parts:
        one, other = (
            flat(getattr(draws, part)),
            flat(jax.tree.map(lambda v: np.asarray(v)[None], getattr(exact, part)))[0],
        )
        norm = np.linalg.norm(other)
        along = one @ (other / norm)
        std_error = np.std(along, ddof=1) / math.sqrt(len(along))
        assert std_error < 0.004 * norm, f"{part}: too few draws, {std_error / norm:.2%} of the norm"
        scores = np.append(z_scores(one, other), z_scores(along[:, None], np.array([norm])))
        assert np.max(scores) < 5.0, f"{part}: z-scores {np.round(scores, 1)}"


def variance(draws, part):
    """Return the total variance of one part of the gradient draws."""
    return float(np.sum(np.var(flat(getattr(draws, part)), axis=0, ddof=1)))


@functools.cache
def exact(name, num_samples):
    """Compute `exact_expectations` of a toy, once."""
    return exact_expectations(toy(name), num_samples)


def single_draws(objectives, keys, params, data):
    """Return {name: (terms, Params of gradients)}, one key and datum a row, compiled together."""

    def one(objective, key, params, x):
        def summed(params):
            terms = objective(key, params, x)
            return sum(terms.values()), terms

        return jax.grad(summed, has_aux=True)(params)[::-1]

    def all_of_them(key, params, x):
        return [one(objective, key, params, x) for objective in objectives.values()]

    run = quick_jit(jax.vmap(all_of_them, in_axes=(0, None, 0)))
    return dict(zip(objectives, jax.device_get(run(keys, params, jnp.asarray(data))), strict=True))


@functools.cache
def toy(name):
    """Build a toy once."""
    return {
        "linear": linear_gaussian,
        "linear2": functools.partial(linear_gaussian, 2),
        "shared": shared_weights,
        "shared of 2": lambda: shared_weights()._replace(data=shared_weights().data[:2]),
        "bernoulli": bernoulli_latent,
        "categorical": categorical_latent,
        "mixed c, u": functools.partial(mixed_latents, True),
        "mixed u, c": functools.partial(mixed_latents, False),
        "numpyro": users_numpyro_model,
    }[name]()


def flat_single(tree):
    """Flatten the leaves of a tree to one array [P], float64."""
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
