"""Far from where training begins: logits of +-80, log-weights thousands of nats apart, scales of exp(+-20).

What is expected is put together in float64 from the draws' own log p, log q and their derivatives.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from vdiff import Network, relaxations
from vdiff.estimators.log_weights import draw
from vdiff.estimators.perturbed import perturb

K = 3
KEY = jax.random.key(0)
TEMPERATURE = 0.5
REBAR = {"log_temperature": jnp.log(jnp.float32(TEMPERATURE)), "scale": jnp.float32(0.8)}
NETWORK = Network(lambda key: jnp.float32(0.3), lambda cv, z, x: cv * (jnp.sum(z) + jnp.tanh(jnp.sum(x))))
RELAXATION = {"bernoulli": relaxations.bernoulli, "categorical": relaxations.one_hot}


def settings(name):
    """Return {setting: (params, x)}, all of one shape."""
    toy = toys.toy(name)
    params, x = toy.params, toy.data[0]
    # Log-weights about 80 nats apart, and thousands.
    found = {f"x * {by}": (params, by * x) for by in (40.0, 2000.0)}
    if name in RELAXATION:
        size = params.lam["bias"].shape[0]
        at_bias = params._replace(lam=params.lam | {"weight": jnp.zeros_like(params.lam["weight"])})
        for bias in itertools.product([-80.0, -20.0, 20.0, 80.0], repeat=size):
            if size > 2 and len(set(bias)) < size:
                continue
            bias = jnp.array(bias)
            far = at_bias._replace(phi={"logits": -bias}, lam=at_bias.lam | {"bias": bias})
            found[f"logits {bias}"] = (far, x)
        even = params.lam | {"bias": jnp.zeros(size)}
        found["prior 80"] = (
            params._replace(phi={"logits": 80.0 * jnp.sign(params.phi["logits"])}, lam=even),
            x,
        )
    else:
        scale = "log_diag" if name == "linear2" else "log_scale"
        for by in (-20.0, 20.0):
            lam = params.lam | {scale: jnp.full_like(params.lam[scale], by)}
            found[f"log scale {by}"] = (params._replace(lam=lam), x)
    return found


def stacked(name, cv):
    """The settings' params and x, one a row."""
    rows = [(params._replace(cv=cv), jnp.asarray(x)) for params, x in settings(name).values()]
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *rows)


def drawn(name, estimator, params, x):
    """The draws that an estimator makes with KEY."""
    toy, key = toys.toy(name), KEY
    if estimator in ("wake_phase", "sleep_phase", "rebar", "relax"):
        key = jax.random.split(key)[0]
    if estimator in ("relaxed", "straight_through", "rebar", "relax"):
        relaxation = RELAXATION[name]
        return relaxation.harden(perturb(relaxation, key, toy.logits(params, x), K))
    return draw(toy.model, key, params, x, K)


def objectives(name, estimator):
    """Return ({alpha: objective}, cv)."""
    toy = toys.toy(name)
    model, bounds = toy.model, toys.BOUNDS
    if estimator in ("likelihood_gradient", "wake_phase", "sleep_phase"):
        phase = vd.sleep_phase if estimator == "sleep_phase" else vd.wake_phase
        of = vd.likelihood_gradient(model, K)
        return {0.0: of if estimator == "likelihood_gradient" else vd.wake_sleep(model, K, phase=phase)}, ()
    if estimator in ("relaxed", "straight_through", "rebar", "relax"):
        more = {
            "relaxed": (TEMPERATURE,),
            "straight_through": (TEMPERATURE,),
            "rebar": (),
            "relax": (NETWORK,),
        }[estimator]
        cv = {"rebar": REBAR, "relax": REBAR | {"network": jnp.float32(0.3)}}.get(estimator, ())
        build = functools.partial(
            getattr(vd, estimator), model, toy.logits, *more, relaxation=RELAXATION[name]
        )
        return {alpha: build(bound, K) for alpha, bound in bounds.items()}, cv
    if estimator == "enumerated":
        return {alpha: vd.enumerated(model, support(name), bound, 2) for alpha, bound in bounds.items()}, ()
    if estimator == "mixed":
        return {alpha: vd.mixed(model, toy.logits, bound, K) for alpha, bound in bounds.items()}, ()
    if estimator == "running_mean":
        build = functools.partial(vd.score_function, baseline=vd.running_mean)
        return {alpha: build(model, bound, K) for alpha, bound in bounds.items()}, jnp.float32(-3.0)
    return {alpha: getattr(vd, estimator)(model, bound, K) for alpha, bound in bounds.items()}, ()


def support(name):
    return jnp.asarray(toys.BITS) if name == "bernoulli" else jnp.eye(3, dtype=jnp.int32)


def run(name, estimator):
    """Return ({alpha: (value, gradient)}, one setting a row; params; x)."""
    members, cv = objectives(name, estimator)
    params, x = stacked(name, cv)

    def all_of_them(params, x):
        return [jax.value_and_grad(vd.total(o), argnums=1)(KEY, params, x) for o in members.values()]

    found = jax.device_get(toys.quick_jit(jax.vmap(all_of_them))(params, x))
    found = {str(a): v for a, v in zip(members, found)}
    bad = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        if not np.all(np.isfinite(leaf)):
            bad.append(
                (
                    jax.tree_util.keystr(path),
                    np.array(list(settings(name)))[~np.isfinite(leaf).reshape(len(leaf), -1).all(1)],
                    leaf,
                )
            )
    assert not bad, bad
    return found, params, x


CASES = [
    *(("linear2", of) for of in ("pathwise", "doubly_reparameterized", "score_function")),
    *(("linear2", of) for of in ("likelihood_gradient", "wake_phase", "sleep_phase")),
    ("mixed c, u", "mixed"),
    *(
        ("bernoulli", of)
        for of in ("score_function", "running_mean", "likelihood_gradient", "wake_phase", "sleep_phase")
    ),
    *(("bernoulli", of) for of in ("relaxed", "straight_through", "rebar", "relax")),
    *(("categorical", of) for of in ("relaxed", "straight_through", "rebar", "relax")),
    ("bernoulli", "enumerated"),
    ("categorical", "enumerated"),
]


@pytest.mark.parametrize(("name", "estimator"), CASES)
def test_finite(name, estimator):
    run(name, estimator)
