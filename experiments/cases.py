"""Small models whose gradients are known, near to and far from their optimum: what estimators are measured on."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import logsumexp
from jax.scipy.stats import multivariate_normal

import vdiff as vd
from vdiff import families, likelihoods, nets
from vdiff.types import Key, Params, PyTree

NUM_SAMPLES = 5
NOISE = 0.7


class Estimator(NamedTuple):
    """Hold an objective and the exact gradient of what it aims at.

    Attributes:
        objective: `(key, params, x) -> Terms`.
        aim: `(params, x) -> Params`, the exact gradient by theta, phi and lam, or a mean of many more draws.
        init_cv: `(key) -> cv`, for one that learns; trained before it is measured.
    """

    objective: vd.Objective
    aim: Callable[[Params, PyTree], Params]
    init_cv: Callable[[Key], PyTree] | None = None


class Case(NamedTuple):
    """Hold a model, data that it can explain, its exact ELBO, and the estimators that suit it."""

    model: vd.ModelLike
    data: jax.Array
    elbo: vd.Objective
    estimators: dict[str, Estimator]


def gradient_of(objective: vd.Objective) -> Callable[[Params, PyTree], Params]:
    """Differentiate an objective that needs no key."""
    return jax.jit(lambda params, x: jax.grad(vd.total(objective), argnums=1)(jax.random.key(0), params, x))


def mean_of(objective: vd.Objective, num_draws: int = 200_000) -> Callable[[Params, PyTree], Params]:
    """Average an unbiased gradient over many draws, where no exact one is known."""

    @jax.jit
    def aim(params: Params, x: PyTree) -> Params:
        gradient = jax.vmap(jax.grad(vd.total(objective), argnums=1), in_axes=(0, None, None))
        keys = jax.random.split(jax.random.key(0x61696D), (num_draws // 1000, 1000))

        def of_chunk(keys: Key) -> Params:
            return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), gradient(keys, params, x))

        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.lax.map(of_chunk, keys))

    return aim


def gaussian(key: Key) -> Case:
    """Z ~ N(phi, I) in two dimensions, x = W z + b + noise in four, q a Gaussian amortised by a linear map."""

    def log_joint(params: Params, x: jax.Array, z: jax.Array) -> jax.Array:
        loc = params.theta["w"] @ z + params.theta["b"]
        log_scale = jnp.full_like(x, np.log(NOISE))
        prior = vd.densities.standard_normal_log_prob(z - params.phi)
        return jnp.sum(prior) + jnp.sum(vd.densities.normal_log_prob(x, loc, log_scale))

    def sample(key: Key, params: Params) -> tuple[jax.Array, jax.Array]:
        key_z, key_x = jax.random.split(key)
        z = params.phi + jax.random.normal(key_z, (2,))
        return params.theta["w"] @ z + params.theta["b"] + NOISE * jax.random.normal(key_x, (4,)), z

    def init(key: Key) -> Params:
        return Params(theta={"w": jax.random.normal(key, (4, 2)), "b": jnp.zeros(4)}, phi=jnp.zeros(2))

    family, encoder = families.mean_field(2), nets.mlp((4,), (4,), hidden=())
    p = vd.Model(
        init, log_joint, lambda params, x, z: jnp.zeros(()), lambda key, params, x: jnp.zeros(2), sample
    )
    model = vd.with_q(p, vd.amortized(encoder, family))

    def elbo(key: Key, params: Params, x: jax.Array) -> vd.Terms:
        out = encoder.apply(params.lam, x)
        loc, log_scale = out[:2], out[2:]
        w = params.theta["w"]
        residual = x - w @ loc - params.theta["b"]
        spread = jnp.sum(jnp.square(w) * jnp.exp(2 * log_scale)[None])
        fit = -0.5 * (jnp.sum(residual**2) + spread) / NOISE**2 - 4 * (
            np.log(NOISE) + 0.5 * np.log(2 * np.pi)
        )
        return {"elbo": fit - jnp.sum(vd.densities.normal_kl(loc - params.phi, log_scale))}

    k, aim = NUM_SAMPLES, gradient_of(elbo)
    estimators = {
        "pathwise": Estimator(vd.pathwise(model, vd.elbo, k), aim),
        "sticking the landing": Estimator(vd.doubly_reparameterized(model, vd.elbo, k), aim),
        "score, leave-one-out (RLOO)": Estimator(vd.score_function(model, vd.elbo, k), aim),
        "score, no baseline": Estimator(vd.score_function(model, vd.elbo, k, baseline=vd.no_baseline), aim),
    }
    pathwise, doubly = (of(model, vd.iwae, k) for of in (vd.pathwise, vd.doubly_reparameterized))
    # No closed form: the least noisy one's mean, so that the other two show what it would be wrong by.
    aim_iwae = mean_of(doubly)
    estimators |= {
        "pathwise, IWAE": Estimator(pathwise, aim_iwae),
        "doubly reparametrized, IWAE (DReG)": Estimator(doubly, aim_iwae),
        "score, IWAE (VIMCO)": Estimator(vd.score_function(model, vd.iwae, k), aim_iwae),
    }
    return Case(model, _data(model, key), elbo, estimators)


def wide_posterior(case: Case, key: Key, scale: float) -> Params:
    """Put the Gaussian where q is the posterior with 4/3 of its variance, every parameter moved by N(0, scale^2).

    Rainforth et al., 2018, measure here: q is wider than the posterior, so that every weight is bounded.
    """
    start, w = case.model.init(key), jnp.eye(4, 2)
    variance = NOISE**2 / (1.0 + NOISE**2)
    dense = {
        "kernel": jnp.concatenate([variance / NOISE**2 * w, jnp.zeros((4, 2))], axis=1),
        "bias": jnp.concatenate([jnp.zeros(2), jnp.full(2, 0.5 * np.log(4 / 3 * variance))]),
    }
    lam = jax.tree.unflatten(jax.tree.structure(start.lam), jax.tree.leaves({"Dense_0": dense}))
    return _spread(key, Params(theta={"w": w, "b": jnp.zeros(4)}, phi=jnp.zeros(2), lam=lam), scale)


def gaussian_score(params: Params, x: jax.Array) -> jax.Array:
    """Differentiate the Gaussian case's log p(x) by x."""
    w = params.theta["w"]
    covariance = w @ w.T + NOISE**2 * jnp.eye(4)
    return jax.grad(multivariate_normal.logpdf)(x, w @ params.phi + params.theta["b"], covariance)


def bits(key: Key) -> Case:
    """Build three bits z, six binary pixels x through a small network: every sum over z, and over x, can be done."""
    decoder = nets.mlp((3,), (6,), hidden=(8,), activation=jnp.tanh)
    encoder = nets.mlp((6,), (3,), hidden=(8,), activation=jnp.tanh)
    model = vd.sbn([encoder], [decoder], num_units=3, likelihood=likelihoods.bernoulli())
    support = (jnp.asarray(np.unpackbits(np.arange(8, dtype=np.uint8)[:, None], axis=1)[:, -3:], bool),)
    pixels = jnp.asarray(np.unpackbits(np.arange(64, dtype=np.uint8)[:, None], axis=1)[:, -6:], jnp.int32)
    k, elbo = NUM_SAMPLES, vd.enumerated(model, support)
    aim, aim_iwae = gradient_of(elbo), gradient_of(vd.enumerated(model, support, vd.iwae, k))

    def log_joints(params: Params, x: jax.Array) -> jax.Array:
        return jax.vmap(model.log_joint, in_axes=(None, None, 0))(params, x, support)

    def log_qs(lam: PyTree, params: Params, x: jax.Array) -> jax.Array:
        return jax.vmap(model.log_q, in_axes=(None, None, 0))(params._replace(lam=lam), x, support)

    def awake(lam: PyTree, params: Params, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.nn.softmax(log_joints(params, x)) * log_qs(lam, params, x))

    def asleep(lam: PyTree, params: Params, x: jax.Array) -> jax.Array:
        mass = jnp.exp(jax.vmap(log_joints, in_axes=(None, 0))(params, pixels))
        return jnp.sum(mass * jax.vmap(log_qs, in_axes=(None, None, 0))(lam, params, pixels))

    def with_lam_of(raised: Callable) -> Callable[[Params, PyTree], Params]:
        of_lam = jax.jit(jax.grad(raised))
        return lambda params, x: aim_iwae(params, x)._replace(lam=of_lam(params.lam, params, x))

    baseline = nets.mlp((6,), (), hidden=(8,))
    free = nets.mlp((9,), (), hidden=(16,), activation=jnp.tanh)
    control = vd.Network(
        free.init, lambda cv, z, x: free.apply(cv, jnp.concatenate([z[0], x.astype(jnp.float32)]))
    )
    learned = vd.score_function(model, vd.elbo, 1, baseline=vd.learned_baseline(baseline))
    estimators = {
        "score, leave-one-out (RLOO)": Estimator(vd.score_function(model, vd.elbo, k), aim),
        "score, no baseline": Estimator(vd.score_function(model, vd.elbo, k, baseline=vd.no_baseline), aim),
        "score, learned baseline": Estimator(vd.repeat(learned, k), aim, baseline.init),
        "REBAR": Estimator(vd.repeat(vd.rebar(model, model.logits), k), aim, vd.rebar_init),
        "RELAX": Estimator(vd.repeat(vd.relax(model, model.logits, control), k), aim, vd.relax_init(control)),
        "straight-through": Estimator(vd.straight_through(model, model.logits, 1.0, vd.elbo, k), aim),
        **{
            f"relaxed, temperature {t}": Estimator(vd.relaxed(model, model.logits, t, vd.elbo, k), aim)
            for t in (0.1, 0.5, 1.0)
        },
        "score, IWAE (VIMCO)": Estimator(vd.score_function(model, vd.iwae, k), aim_iwae),
        "wake-sleep, wake phase": Estimator(vd.wake_sleep(model, k), with_lam_of(awake)),
        "wake-sleep, sleep phase": Estimator(
            vd.wake_sleep(model, k, phase=vd.sleep_phase), with_lam_of(asleep)
        ),
    }
    return Case(model, _data(model, key), elbo, estimators)


def bits_log_prob(model: vd.ModelLike) -> vd.Objective:
    """Build log p(x) of the bits, by enumeration, as an objective."""
    support = (jnp.asarray(np.unpackbits(np.arange(8, dtype=np.uint8)[:, None], axis=1)[:, -3:], bool),)

    def objective(key: Key, params: Params, x: jax.Array) -> vd.Terms:
        return {"log_prob": logsumexp(jax.vmap(model.log_joint, in_axes=(None, None, 0))(params, x, support))}

    return objective


def mixture(key: Key) -> Case:
    """Build four Gaussian components in the plane; q a small network."""
    model = vd.gmm(4, 2, encoder=nets.mlp((2,), (4,), hidden=(8,), activation=jnp.tanh))
    k, support = NUM_SAMPLES, jnp.arange(4, dtype=jnp.int32)
    elbo = vd.enumerated(model, support)
    aim, aim_iwae = gradient_of(elbo), gradient_of(vd.enumerated(model, support, vd.iwae, k))
    estimators = {
        "score, leave-one-out (RLOO)": Estimator(vd.score_function(model, vd.elbo, k), aim),
        "score, no baseline": Estimator(vd.score_function(model, vd.elbo, k, baseline=vd.no_baseline), aim),
        "score, IWAE (VIMCO)": Estimator(vd.score_function(model, vd.iwae, k), aim_iwae),
        "summed by the model": Estimator(model.elbo_terms, aim),
    }
    return Case(model, _data(model, key), elbo, estimators)


def _data(model: vd.ModelLike, key: Key) -> jax.Array:
    """Draw 64 data from the model at parameters of their own."""
    key_params, key_data = jax.random.split(key)
    truth = _spread(key_params, model.init(key_params))
    return jax.vmap(model.sample, in_axes=(0, None))(jax.random.split(key_data, 64), truth)[0]


def _spread(key: Key, params: Params, scale: float = 0.5) -> Params:
    """Move every parameter by N(0, scale^2)."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [leaf + scale * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, moved)


def far(case: Case, key: Key) -> Params:
    """Start at random."""
    return _spread(key, case.model.init(key))


def near(case: Case, params: Params, num_steps: int = 1000) -> Params:
    """Climb the exact ELBO of the data by Adam."""

    def loss(params: Params, key: Key) -> jax.Array:
        values = jax.vmap(vd.total(case.elbo), in_axes=(None, None, 0))(key, params, case.data)
        return -jnp.mean(values)

    return _descend(loss, params, num_steps, 1e-2)


def trained_cv(case: Case, estimator: Estimator, params: Params, key: Key, num_steps: int = 500) -> PyTree:
    """Train what an estimator learns, the model held fixed."""
    key_init, key_run = jax.random.split(key)

    def loss(cv: PyTree, key: Key) -> jax.Array:
        keys = jax.random.split(key, len(case.data))
        total = vd.total(vd.frozen(estimator.objective, "theta", "phi", "lam"))
        return -jnp.mean(jax.vmap(total, in_axes=(0, None, 0))(keys, params._replace(cv=cv), case.data))

    return _descend(loss, estimator.init_cv(key_init), num_steps, 1e-2, key_run)


def _descend(loss: Callable, start: PyTree, num_steps: int, rate: float, key: Key | None = None) -> PyTree:
    optimizer = optax.adam(rate)
    keys = jax.random.split(jax.random.key(0) if key is None else key, num_steps)

    @jax.jit
    def run(start: PyTree, keys: Key) -> PyTree:
        def step(carry: tuple, key: Key) -> tuple:
            values, state = carry
            gradient = jax.grad(loss)(values, key)
            # Optax's own arithmetic mixes dtypes.
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(values, updates), state), None

        return jax.lax.scan(step, (start, optimizer.init(start)), keys)[0][0]

    return run(start, keys)
