"""Far from where training begins: logits of +-80, log-weights thousands of nats apart, scales of exp(+-20).

What is expected is put together in float64 from the draws' own log p, log q and their derivatives.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

import vdiff as vd
from tests import toys
from vdiff import Network, relaxations
from vdiff.estimators.log_weights import draw, log_joints, log_qs
from vdiff.estimators.perturbed import perturb

pytestmark = pytest.mark.slow

K = 3
KEY = jax.random.key(0)
TEMPERATURE = 0.5
RELAXATION = {"bernoulli": relaxations.bernoulli, "categorical": relaxations.one_hot}
SUPPORT = {"bernoulli": jnp.asarray(toys.BITS), "categorical": jnp.eye(3, dtype=jnp.int32)}
NETWORK = Network(lambda key: jnp.float32(0.3), lambda cv, z, x: cv * (jnp.sum(z) + jnp.tanh(jnp.sum(x))))
REBAR = {"log_temperature": jnp.log(jnp.float32(TEMPERATURE)), "scale": jnp.float32(0.8)}
CV = {"running_mean": jnp.float32(-3.0), "rebar": REBAR, "relax": REBAR | {"network": jnp.float32(0.3)}}
# One implementation, of which every bound compiles long: each has some of them.
ALPHAS = {"rebar": (0.5, 2.0), "relax": (1.0, 0.0, "tvo")}
# Whose draws, and all that is known of them, are those of another.
DRAWS_OF = {
    "running_mean": "score_function",
    "likelihood_gradient": "score_function",
    "wake_phase": "sleep_phase",
}
SOFT = ("relaxed", "straight_through", "rebar", "relax")
CASES = [
    *(("linear", of) for of in ("pathwise", "doubly_reparameterized", "score_function")),
    *(("linear", of) for of in ("likelihood_gradient", "wake_phase", "sleep_phase")),
    ("mixed c, u", "mixed"),
    *(("bernoulli", of) for of in ("score_function", "running_mean")),
    *(("bernoulli", of) for of in ("likelihood_gradient", "wake_phase", "sleep_phase")),
    *(("bernoulli", of) for of in ("straight_through", "relax")),
    *(("categorical", of) for of in ("relaxed", "rebar")),
]


def objectives(name, estimator):
    """Return {alpha: objective}."""
    toy = toys.toy(name)
    more, settings = (), {}
    if estimator == "likelihood_gradient":
        return {0.0: vd.likelihood_gradient(toy.model, K)}
    if estimator in ("wake_phase", "sleep_phase"):
        return {0.0: vd.wake_sleep(toy.model, K, phase=getattr(vd, estimator))}
    if estimator in SOFT:
        last = {"relax": (NETWORK,), "rebar": ()}.get(estimator, (TEMPERATURE,))
        more, settings = (toy.logits, *last), {"relaxation": RELAXATION[name]}
    if estimator == "mixed":
        more = (toy.logits,)
    if estimator == "running_mean":
        settings = {"baseline": vd.running_mean}
    build = getattr(vd, "score_function" if estimator == "running_mean" else estimator)
    bounds = {alpha: toys.BOUNDS[alpha] for alpha in ALPHAS.get(estimator, toys.BOUNDS)}
    return {alpha: build(toy.model, *more, bound, K, **settings) for alpha, bound in bounds.items()}


@functools.cache
def places(name):
    """Return {place: (params, x)}, the same shapes in all of them."""
    toy = toys.toy(name)
    params, x = toy.params, toy.data[0]
    # Log-weights 50 to 180 nats apart, and thousands.
    found = {f"x * {by}": (params, by * x) for by in (40.0, 2000.0)}
    if name in RELAXATION:
        size = len(params.lam["bias"])
        # q sure of what the prior all but excludes: there is one draw, and log q of it is zero.
        for bias in itertools.product([-80.0, -20.0, 20.0, 80.0], repeat=size):
            if name == "bernoulli" or len(set(bias)) == size:
                bias = jnp.array(bias)
                lam = {"weight": jnp.zeros((size, 2)), "bias": bias}
                found[f"logits {bias}"] = (params._replace(phi={"logits": -bias}, lam=lam), x)
        # q that knows nothing, so that its draws differ, where the likelihood or the prior is sure.
        lam = {"weight": jnp.zeros((size, 2)), "bias": jnp.zeros(size)}
        found |= {place: (params._replace(lam=lam), at[1]) for place, at in found.items() if "x" in place}
        sure = {"logits": 80.0 * jnp.sign(params.phi["logits"])}
        found["prior"] = (params._replace(phi=sure, lam=lam), x)
    else:
        # About zero, where a draw of a narrow q keeps its digits.
        names, log_scale = (
            (("weight", "bias"), "log_diag") if name == "linear" else (("slope", "of_c"), "log_scale")
        )
        centred = params.lam | {leaf: jnp.zeros_like(params.lam[leaf]) for leaf in names}
        for by in (-20.0, 20.0):
            lam = centred | {log_scale: jnp.full_like(params.lam[log_scale], by)}
            found[f"log scale {by}"] = (params._replace(lam=lam), x)
    return found


def stacked(name, cv=()):
    """The places' params and x, one a row."""
    rows = [(params._replace(cv=cv), jnp.asarray(x)) for params, x in places(name).values()]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def by_place(name, tree):
    """Split rows into {place: tree}, float64."""
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(tree))
    return {place: jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i, place in enumerate(places(name))}


def drawn(name, estimator, params, x):
    """The K draws that an estimator makes with KEY."""
    toy, key = toys.toy(name), KEY
    if estimator in ("sleep_phase", "rebar", "relax"):
        key = jax.random.split(key)[0]
    if estimator in SOFT:
        relaxation = RELAXATION[name]
        return relaxation.harden(perturb(relaxation, key, toy.logits(params, x), K))
    return draw(vd.q_at(toy.model, params, x), key, K)


@functools.cache
def pieces(name, estimator):
    """Return {place: log p and log q of each of an estimator's draws, and their derivatives by the parameters}."""
    toy = toys.toy(name)
    model = toy.model

    def one(params, x):
        fixed = stop_gradient(params)
        z = drawn(name, estimator, fixed, x)

        def log_p(params, z=z):
            return log_joints(model, params, x, z, K)

        def log_q(params, z=z):
            return log_qs(vd.q_at(model, params, x), z, K)

        found = {"log_p": log_p(params), "log_q": log_q(params)}
        found |= {"d_p": jax.jacrev(log_p)(params), "d_q": jax.jacrev(log_q)(params)}

        def along(path_of):
            return jax.jacrev(lambda params: path_of(params, drawn(name, estimator, params, x)))(params)

        if estimator in ("pathwise", "mixed"):
            found["path"] = along(lambda params, z: log_p(params, z) - log_q(params, z))
        if estimator == "doubly_reparameterized":
            found["path"] = along(lambda params, z: log_p(params, z) - log_q(fixed, z))
        if estimator == "mixed":
            log_q_discrete = jax.vmap(toy.logits, in_axes=(None, None, 0))
            found["d_q_discrete"] = along(lambda params, z: log_q_discrete(params, x, z))
        if estimator == "sleep_phase":
            dream = model.sample(jax.random.split(KEY)[1], params)
            found["d_dream"] = jax.grad(model.log_q)(params, *dream)
        return found

    return by_place(name, toys.quick_jit(jax.vmap(one))(*stacked(name)))


@functools.cache
def coefficients(name, estimator, alpha):
    """Return {place: w [K], w - H_kk [K]}, the bound's derivatives by the log-weights."""
    log_weights = np.stack([piece["log_p"] - piece["log_q"] for piece in pieces(name, estimator).values()])
    bound = toys.exact_bound(alpha)

    def one(row):
        weights = jax.grad(bound)(row)
        return weights, weights - jnp.diagonal(jax.hessian(bound)(row))

    return by_place(name, toys.in_float64(jax.vmap(one), log_weights))


def advantage(alpha, estimator, log_weights):
    """bound - b_k for every draw."""
    bound = functools.partial(toys.numpy_bound, alpha)
    if estimator == "running_mean":
        return np.full(K, bound(log_weights) - CV["running_mean"])
    others = [np.mean(np.delete(log_weights, k)) for k in range(K)]
    return np.array(
        [bound(log_weights) - bound(np.where(np.arange(K) == k, others[k], log_weights)) for k in range(K)]
    )


def by_lam(estimator, piece, weights, doubly, ahead):
    """The terms of the gradient by lambda, [(coefficients [K], derivatives [K, ...])]."""
    return {
        "pathwise": lambda: [(weights, piece["path"])],
        "doubly_reparameterized": lambda: [(doubly, piece["path"])],
        "score_function": lambda: [(ahead - weights, piece["d_q"])],
        "running_mean": lambda: [(ahead - weights, piece["d_q"])],
        "mixed": lambda: [(weights, piece["path"]), (ahead, piece["d_q_discrete"])],
        "likelihood_gradient": lambda: [(0.0 * weights, piece["d_q"])],
        "wake_phase": lambda: [(weights, piece["d_q"])],
        "sleep_phase": lambda: [(np.ones(1), jax.tree.map(lambda leaf: leaf[None], piece["d_dream"]))],
    }[estimator]()


def check(found, terms, rounding, message):
    """Compare a part's leaves with a sum of terms c_k d_k, where c and d have roundings of their own."""
    leaves = jax.tree.leaves(found)
    for i, leaf in enumerate(leaves):
        of_leaf = [(c, jax.tree.leaves(derivative)[i]) for c, derivative in terms]
        expected = sum(np.tensordot(c, d, axes=1) for c, d in of_leaf)
        atol = sum(
            np.max(np.abs(d)) * (1e-4 * np.max(np.abs(c)) + rounding[0]) + np.max(np.abs(c)) * rounding[1]
            for c, d in of_leaf
        )
        assert leaf.shape == expected.shape
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=atol, err_msg=message)


@pytest.mark.parametrize(("name", "estimator"), CASES)
def test_value_and_gradients(name, estimator):
    members, draws_of = objectives(name, estimator), DRAWS_OF.get(estimator, estimator)

    def all_of_them(params, x):
        return [jax.value_and_grad(vd.total(o), argnums=1)(KEY, params, x) for o in members.values()]

    runs = toys.quick_jit(jax.vmap(all_of_them))(*stacked(name, CV.get(estimator, ())))
    for alpha, run in zip(members, runs, strict=True):
        both = coefficients(name, draws_of, alpha)
        for place, (value, gradient) in by_place(name, run).items():
            message = f"{place}, alpha {alpha}"
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((value, gradient))), message
            piece, (weights, doubly) = pieces(name, draws_of)[place], both[place]
            log_weights = piece["log_p"] - piece["log_q"]
            # The last digits of log-weights, and of z - E z times x.
            rounding = 1e-6 * np.max(np.abs(log_weights))
            of_score = 1e-7 * max(1.0, np.max(np.abs(places(name)[place][1])))
            assert abs(value - toys.numpy_bound(alpha, log_weights)) <= rounding, message
            for part in ("theta", "phi"):
                terms = [(weights, getattr(piece["d_p"], part))]
                check(getattr(gradient, part), terms, (0.0, 1e-7), f"{message}, {part}")
            if estimator not in SOFT:
                ahead = advantage(alpha, estimator, log_weights)
                terms = [(c, d.lam) for c, d in by_lam(estimator, piece, weights, doubly, ahead)]
                check(gradient.lam, terms, (rounding, of_score), f"{message}, lam")
            elif place.startswith("logits"):
                # q cannot be moved from where it is, and a control variate has nothing to learn.
                flat = toys.flat_single((gradient.lam, gradient.cv))
                assert np.max(np.abs(flat)) < 1e-3, (message, flat)
            if estimator == "running_mean":
                assert abs(gradient.cv - ahead[0]) <= rounding, message


@pytest.mark.parametrize("name", SUPPORT)
def test_enumerated(name):
    """Against the sum over pairs of values, in float64."""
    toy, support = toys.toy(name), SUPPORT[name]
    params, x = stacked(name)

    def ours(params, x):
        of = (vd.enumerated(toy.model, support, bound, 2) for bound in toys.BOUNDS.values())
        return [jax.value_and_grad(vd.total(o), argnums=1)(KEY, params, x) for o in of]

    def pairs(alpha, params, x):
        log_q = log_qs(vd.q_at(toy.model, params, x), support, len(support))
        log_weights = log_joints(toy.model, params, x, support, len(support)) - log_q
        index = np.array(list(itertools.product(range(len(support)), repeat=2)))
        return jnp.sum(jnp.exp(jnp.sum(log_q[index], axis=-1)) * toys.exact_bound(alpha)(log_weights[index]))

    def exact(params, x):
        return [jax.value_and_grad(functools.partial(pairs, alpha))(params, x) for alpha in toys.BOUNDS]

    found = toys.quick_jit(jax.vmap(ours))(params, x)
    expected = toys.in_float64(jax.vmap(exact), params, x)
    for alpha, one, other in zip(toys.BOUNDS, found, expected, strict=True):
        one, other = by_place(name, one), by_place(name, other)
        for place, (value, gradient) in one.items():
            np.testing.assert_allclose(value, other[place][0], rtol=1e-5, err_msg=f"{place} {alpha}")
            of_score = 1e-6 * abs(value) * max(1.0, np.max(np.abs(places(name)[place][1])))
            for part, atol in (("theta", 1e-5), ("phi", 1e-5), ("lam", of_score)):
                one_flat, exact_flat = (
                    toys.flat_single(getattr(g, part)) for g in (gradient, other[place][1])
                )
                scale = atol + 1e-5 * np.max(np.abs(exact_flat))
                message = f"{place}, alpha {alpha}, {part}"
                np.testing.assert_allclose(one_flat, exact_flat, rtol=0, atol=scale, err_msg=message)


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.5, 2.0, 0.3, 1.7, -1.3, "tvo"])
def test_bounds_of_huge_log_weights(alpha):
    """Compiled, where order * l and its maximum may be rounded apart: up to 1e17, as a wide q has them."""
    bound = toys.BOUNDS[alpha] if alpha in toys.BOUNDS else vd.renyi(alpha)
    log_weights = np.float32([-1.0, -1.3333334, -0.77, -1.1])
    by = np.float32(10.0 ** np.arange(3, 18))[:, None]
    rows = np.concatenate([by * log_weights, -by * log_weights])
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(bound)))(jnp.asarray(rows))
    exact = toys.in_float64(jax.vmap(jax.grad(toys.exact_bound(alpha))), rows)
    np.testing.assert_allclose(values, [toys.numpy_bound(alpha, row) for row in rows], rtol=1e-6)
    np.testing.assert_allclose(gradients, exact, rtol=0, atol=1e-6)
