"""REBAR and RELAX: exact in value, unbiased for every control variate, whose own gradient is that of the variance."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from tests import toys
from vdiff import Network, Params, relaxations
from vdiff.estimators.perturbed import perturb

RELAXATION = {"bernoulli": relaxations.bernoulli, "categorical": relaxations.one_hot}
SIZE = {"bernoulli": 2, "categorical": 3}
CV = {"log_temperature": jnp.float32(-0.7), "scale": jnp.float32(0.8)}
FAR_OFF = {"log_temperature": jnp.float32(1.0), "scale": jnp.float32(-0.5)}
"""Any cv is unbiased; this one is worse than none."""


def network(size):
    """A control variate of one hidden layer of 4, of a soft z [size] and x [2]."""

    def init(key):
        keys = jax.random.split(key)
        return {
            "w": 0.5 * jax.random.normal(keys[0], (4, size + 2)),
            "o": 0.3 * jax.random.normal(keys[1], (4,)),
        }

    return Network(init, lambda cv, z, x: cv["o"] @ jnp.tanh(cv["w"] @ jnp.concatenate([z, x])))


NETWORK = {name: network(size) for name, size in SIZE.items()}


def estimator(name, of, bound=vd.elbo, num_samples=1, toy=None):
    toy = toy or toys.toy(name)
    more = (NETWORK[name],) if of is vd.relax else ()
    return of(toy.model, toy.logits, *more, bound, num_samples, relaxation=RELAXATION[name])


def params_of(name, cv=CV):
    """The toy's params and a cv for both estimators: rebar does not read the network."""
    return toys.toy(name).params._replace(cv=cv | {"network": NETWORK[name].init(jax.random.key(9))})


def with_bias(params, bias):
    return params._replace(lam=params.lam | {"bias": bias})


@functools.partial(toys.quick_jit, static_argnums=(0, 4))
def log_weights(name, key, params, x, num_samples):
    """log p(x, z_k) - log q(z_k | x) at the draws of this key, by the model's own functions."""
    toy, of = toys.toy(name), RELAXATION[name]
    key_y, _ = jax.random.split(key)
    z = of.harden(perturb(of, key_y, toy.logits(params, x), num_samples))
    over = {"in_axes": (None, None, 0)}
    return jax.vmap(toy.model.log_joint, **over)(params, x, z) - jax.vmap(toy.model.log_q, **over)(
        params, x, z
    )


@pytest.mark.parametrize("name", RELAXATION)
def test_the_value_is_the_bound(name):
    toy = toys.toy(name)
    cases = [(vd.rebar, 1.0, 1), (vd.relax, 0.0, 4)]
    if name == "bernoulli":
        cases += [(vd.rebar, alpha, 4) for alpha in (1.0, 2.0, "tvo")]
    objectives = {
        case: vd.frozen(estimator(name, case[0], toys.BOUNDS[case[1]], case[2]), "cv") for case in cases
    }
    keys = jax.random.split(jax.random.key(0), len(toy.data))
    runs = toys.single_draws(objectives, keys, params_of(name), toy.data)
    for i, key in enumerate(keys):
        weights = {
            k: log_weights(name, key, toy.params, jnp.asarray(toy.data[i]), k)
            for k in {case[2] for case in cases}
        }
        for (_, alpha, num_samples), (terms, _) in runs.items():
            assert list(terms) == [toys.BOUNDS[alpha].__name__]
            (value,) = terms.values()
            expected = toys.numpy_bound(alpha, weights[num_samples])
            assert float(value[i]) == pytest.approx(expected, rel=1e-6)


def shifted(toy, value):
    """The toy with its bound near zero: what is left of the score's noise then, where scale is not 1, is small."""
    model = toy.model._replace(log_joint=lambda params, x, z: toy.model.log_joint(params, x, z) - value)
    return toy._replace(model=model)


@pytest.mark.parametrize(
    ("name", "num_samples", "cv", "cases", "num_draws"),
    [
        ("bernoulli", 1, CV, [(vd.rebar, 1.0), (vd.relax, 1.0)], 80_000),
        ("bernoulli", 1, FAR_OFF, [(vd.relax, 1.0)], 140_000),
        ("bernoulli", 2, CV, [(vd.rebar, 1.0), (vd.relax, 2.0), (vd.rebar, "tvo")], 140_000),
        ("bernoulli", 5, CV, [(vd.rebar, 1.0), (vd.relax, 1.0)], 60_000),
        pytest.param("bernoulli", 8, CV, [(vd.rebar, 1.0), (vd.relax, 1.0)], 90_000, marks=pytest.mark.slow),
        ("categorical", 1, CV, [(vd.relax, 1.0)], 180_000),
    ],
)
def test_gradients_are_unbiased(name, num_samples, cv, cases, num_draws):
    """Theta, phi and lambda, batch of 3, against enumeration of each bound."""
    exact = toys.exact(name, num_samples)
    toy = shifted(toys.toy(name), exact[cases[0][1]][0])
    objectives = {
        (of, alpha): vd.frozen(estimator(name, of, toys.BOUNDS[alpha], num_samples, toy=toy), "cv")
        for of, alpha in cases
    }
    runs = toys.gradient_draws(objectives, params_of(name, cv), toy.data, num_draws, seed=num_samples)
    for (of, alpha), (values, draws) in runs.items():
        value, gradient = exact[alpha]
        assert toys.z_scores(values[:, None], value - exact[cases[0][1]][0]) < 5.0, (of, alpha)
        toys.check_unbiased(draws, gradient)


def draws_without_the_noise_of_z(name, objectives, num_samples, params, num_draws):
    """Gradients g - E(g | z) + E g, batch of 3: in E g every z_1..z_K weighs its probability, not its frequency.

    Where a bound of several draws is flat in lambda, nearly all of the noise is theirs. E(g | z) is the mean over the
    draws of one multiset; those of fewer than 100 draws are one.

    Returns:
        {name: Params of [N, ...]}, as `toys.check_unbiased` takes them.
    """
    toy, of = toys.toy(name), RELAXATION[name]

    @toys.quick_jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def run(key, params, x):
        gradients = [jax.grad(vd.total(o), argnums=1)(key, params, x) for o in objectives.values()]
        key_y, _ = jax.random.split(key)
        z = of.harden(perturb(of, key_y, toy.logits(params, x), num_samples))
        values, _ = toy.support(params, x, None, None)
        index = jnp.argmax(jnp.all(z[:, None] == values[None].astype(z.dtype), axis=-1), axis=-1)
        return gradients, jnp.sort(index)

    def of_datum(i, x):
        num_chunks = -(-num_draws // toys.CHUNK)
        keys = jax.random.split(jax.random.key(i), (num_chunks, num_draws // num_chunks))
        chunks = [jax.device_get(run(chunk, params, jnp.asarray(x))) for chunk in keys]
        gradients, drawn = jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)
        drawn, group, numbers = np.unique(drawn, axis=0, return_inverse=True, return_counts=True)
        log_q = np.float64(toy.support(params, jnp.asarray(x), None, None)[1])
        orders = [np.bincount(row, minlength=len(log_q)) for row in drawn]
        orders = [math.factorial(num_samples) / math.prod(map(math.factorial, row)) for row in orders]
        is_rare = numbers < 100
        mass = np.where(is_rare, 0.0, orders * np.exp(np.sum(log_q[drawn], axis=1)))
        # What was never drawn is rare too.
        mass = np.append(mass, 1.0 - np.sum(mass))
        group = np.where(is_rare, len(drawn), np.arange(len(drawn)))[group.ravel()]
        numbers = np.bincount(group, minlength=len(mass))
        assert np.all(np.where(numbers == 0, mass, 0.0) < 1e-5)

        def leaf_without(leaf):
            flat = np.float64(leaf).reshape(len(leaf), -1)
            sums = np.stack([np.bincount(group, column, len(mass)) for column in flat.T], axis=1)
            means = sums / np.maximum(numbers, 1)[:, None]
            return (flat - means[group] + mass @ means).reshape(leaf.shape)

        return jax.tree.map(leaf_without, gradients)

    of_data = [of_datum(i, x) for i, x in enumerate(toy.data)]
    return dict(
        zip(objectives, jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *of_data), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "num_samples", "num_draws"),
    [
        ("bernoulli", 2, 60_000),
        ("bernoulli", 5, 100_000),
        pytest.param("bernoulli", 8, 160_000, marks=pytest.mark.long),
        ("categorical", 2, 120_000),
        pytest.param("categorical", 5, 400_000, marks=pytest.mark.long),
    ],
)
def test_gradients_of_iwae_are_unbiased(name, num_samples, num_draws):
    """Theta, phi and lambda, batch of 3, to 2 % of each norm, at a scale of .8."""
    value, gradient = toys.exact(name, num_samples)[0.0]
    toy = shifted(toys.toy(name), value)
    objectives = {
        of: vd.frozen(estimator(name, of, vd.iwae, num_samples, toy=toy), "cv") for of in (vd.rebar, vd.relax)
    }
    runs = draws_without_the_noise_of_z(name, objectives, num_samples, params_of(name), num_draws)
    for draws in runs.values():
        toys.check_unbiased(draws, gradient)


def two_leaves_and_shared_weights():
    """The bits as a tree of two leaves of shapes [] and [1], and q's logits from the weights of p."""
    toy = toys.toy("bernoulli")

    def joined(z):
        return jnp.concatenate([z["a"][None], z["b"]])

    def parted(z):
        return {"a": z[0], "b": z[1:]}

    def logits(params, x):
        return parted(params.theta["weight"].T @ x + params.lam["bias"])

    def own(params):
        return params._replace(lam={"weight": params.theta["weight"].T, "bias": params.lam["bias"]})

    model = toy.model._replace(
        log_joint=lambda params, x, z: toy.model.log_joint(params, x, joined(z)),
        log_q=lambda params, x, z: toy.model.log_q(own(params), x, joined(z)),
        sample_q=lambda key, params, x: parted(toy.model.sample_q(key, own(params), x)),
    )

    def support(params, x, eps, log_mass):
        z = jax.vmap(parted)(jnp.asarray(toys.BITS))
        return z, jax.vmap(model.log_q, in_axes=(None, None, 0))(params, x, z)

    params = toy.params._replace(lam={"bias": toy.params.lam["bias"]}, cv=CV)
    return toys.Toy(model, params, toy.data, None, support=support, logits=logits)


def test_weights_shared_between_p_and_q_and_two_leaves():
    toy = two_leaves_and_shared_weights()
    value, gradient = toys.exact_expectations(toy, 2, alphas=(0.0,))[0.0]
    more = NETWORK["bernoulli"]
    network = more._replace(apply=lambda cv, z, x: more.apply(cv, jnp.concatenate([z["a"][None], z["b"]]), x))
    model, params = shifted(toy, value).model, toy.params._replace(cv=params_of("bernoulli").cv)
    objectives = {
        "rebar": vd.frozen(vd.rebar(model, toy.logits, vd.iwae, 2), "cv"),
        "relax": vd.frozen(vd.relax(model, toy.logits, network, vd.iwae, 2), "cv"),
    }
    for values, draws in toys.gradient_draws(objectives, params, toy.data, 140_000).values():
        assert toys.z_scores(values[:, None], 0.0) < 5.0
        toys.check_unbiased(draws, gradient)


def exact_gradient_by_x(name, bound, num_samples, params, x):
    """d/dx of the sum over every tuple of K values of z, float64."""
    toy = toys.toy(name)

    def expectation(x, params):
        z, log_q = toy.support(params, x, None, None)
        weights = jax.vmap(toy.model.log_joint, in_axes=(None, None, 0))(params, x, z) - log_q
        index = np.array(list(itertools.product(range(len(z)), repeat=num_samples)))
        return jnp.sum(jnp.exp(jnp.sum(log_q[index], axis=1)) * bound(weights[index]))

    return toys.in_float64(jax.grad(expectation), x, params._replace(cv=()))


def test_x_and_what_cv_learns():
    """By x: unbiased. Learning cv moves nothing else: theta, phi, lam and x get what they get of a frozen one."""
    name, num_draws = "bernoulli", 40_000
    toy, params = toys.toy(name), params_of("bernoulli")
    x = jnp.asarray(toy.data[0])
    learned = {
        (alpha, k): estimator(name, vd.relax, toys.BOUNDS[alpha], k) for alpha, k in ((1.0, 1), (0.0, 3))
    }

    @toys.quick_jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def run(key, params, x):
        return [
            [jax.grad(vd.total(o), argnums=(1, 2))(key, params, x) for o in (one, vd.frozen(one, "cv"))]
            for one in learned.values()
        ]

    runs = jax.device_get(run(jax.random.split(jax.random.key(0), num_draws), params, x))
    for ((alpha, k), _), ((live, live_x), (frozen, frozen_x)) in zip(learned.items(), runs, strict=True):
        exact = exact_gradient_by_x(name, toys.exact_bound(alpha), k, params, toy.data[0])
        norm = np.linalg.norm(exact)
        assert np.max(np.std(frozen_x, axis=0)) / num_draws**0.5 < 0.004 * norm
        assert np.max(toys.z_scores(np.asarray(frozen_x, np.float64), exact)) < 5.0
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(frozen.cv))
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(live.cv))
        for part in ("theta", "phi", "lam"):
            one, other = (toys.flat(getattr(g, part)) for g in (live, frozen))
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(live_x, frozen_x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "of", "bound", "num_samples"),
    [
        ("bernoulli", vd.relax, vd.iwae, 5),
        ("bernoulli", vd.rebar, vd.iwae, 2),
        ("bernoulli", vd.rebar, vd.elbo, 8),
        ("categorical", vd.relax, vd.elbo, 2),
        ("categorical", vd.rebar, vd.iwae, 8),
    ],
)
def test_the_gradient_for_cv_is_that_of_the_variance(name, of, bound, num_samples):
    """Of -|g|^2, key by key, float64, g read off q's bias: the noise does not depend on cv, so that its mean by
    finite differences is the difference of means, and with E g fixed -|g|^2 has the gradient of -Var g.
    """
    objective, toy = estimator(name, of, bound, num_samples), toys.toy(name)
    cv = params_of(name).cv if of is vd.relax else CV
    keys, step = jax.random.split(jax.random.key(3), 50), 1e-5
    rng = np.random.default_rng(0)
    # Along each leaf: scalars as they are, weights in a random direction.
    leaves, tree = jax.tree.flatten(cv)
    directions = [
        jax.tree.unflatten(
            tree,
            [rng.normal(size=np.shape(b)) if i == j else np.zeros(np.shape(b)) for j, b in enumerate(leaves)],
        )
        for i in range(len(leaves))
    ]
    directions = jax.tree.map(lambda *rows: np.stack(rows), *directions)

    def run(params, cv, directions, x):
        def square(cv, key):
            at = params._replace(cv=cv)
            g = jax.grad(vd.total(vd.frozen(objective, "cv")), argnums=1)(key, at, x).lam["bias"]
            return jnp.sum(g**2)

        def moved(direction, h):
            return jax.tree.map(lambda leaf, d: leaf + h * d, cv, direction)

        def difference(direction, key):
            return (square(moved(direction, step), key) - square(moved(direction, -step), key)) / (2 * step)

        def along(direction, key):
            got = jax.grad(vd.total(objective), argnums=1)(key, params._replace(cv=cv), x).cv
            return sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), got, direction)))

        over = jax.vmap(jax.vmap(lambda d, k: (difference(d, k), along(d, k)), (None, 0)), (0, None))
        return over(directions, keys)

    differences, got = toys.in_float64(run, toy.params, cv, directions, toy.data[0])
    scale = np.max(np.abs(differences), axis=1, keepdims=True)
    assert np.all(scale > 1e-4)
    np.testing.assert_allclose(got / scale, -differences / scale, atol=1e-5)


def test_learning_cv_lowers_the_variance():
    """300 steps of Adam, from a cv that is worse than none: below half of that, and of the plain score function's."""
    toy, start = toys.toy("bernoulli"), toys.toy("bernoulli").params._replace(cv=FAR_OFF)
    objective, adam = estimator("bernoulli", vd.rebar), optax.adam(0.03)

    def loss(cv, key):
        def one(key, x):
            return vd.total(objective)(key, start._replace(cv=cv), x)

        keys = jax.random.split(key, 12)
        return -jnp.mean(jax.vmap(jax.vmap(one, (0, None)), (None, 0))(keys, jnp.asarray(toy.data)))

    def step(state, key):
        cv, moments = state
        updates, moments = adam.update(jax.grad(loss)(cv, key), moments)
        return (optax.apply_updates(cv, updates), moments), None

    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 count
        keys = jax.random.split(jax.random.key(1), 300)
        run = toys.quick_jit(lambda cv: jax.lax.scan(step, (cv, adam.init(cv)), keys)[0][0])
        learned = run(FAR_OFF)

    def with_given(cv):
        return lambda key, params, x: vd.frozen(objective, "cv")(key, params._replace(cv=cv), x)

    objectives = {
        "plain": vd.score_function(toy.model, vd.elbo, 1, baseline=vd.no_baseline),
        "before": with_given(FAR_OFF),
        "after": with_given(learned),
    }
    runs = toys.gradient_draws(objectives, start, toy.data, 4_000)
    of = {name: toys.variance(draws, "lam") for name, (_, draws) in runs.items()}
    assert of["before"] > of["plain"] and of["after"] < 0.5 * of["plain"], of


def wide_model(width=64):
    """8 bits, a decoder and an encoder of one hidden layer, x [width]: where nearly all work is theirs."""
    likelihood = vd.likelihoods.gaussian(1.0)
    model = vd.sbn(
        [vd.nets.mlp((width,), (8,), hidden=(width,))],
        [vd.nets.mlp((8,), (width,), hidden=(width,))],
        num_units=8,
        likelihood=likelihood,
    )
    return model, model.init(jax.random.key(0))._replace(cv=CV), jnp.ones(width)


def test_what_it_costs():
    """FLOPs of value and gradient over those of one score-function pass: 3 with a fixed cv, 5 with a learned one."""
    model, params, x = wide_model()
    objectives = {
        "score": vd.score_function(model, vd.elbo, 4, baseline=vd.no_baseline),
        "frozen": vd.frozen(vd.rebar(model, model.logits, vd.elbo, 4), "cv"),
        "learned": vd.rebar(model, model.logits, vd.elbo, 4),
    }
    flops = {}
    for name, objective in objectives.items():
        run = toys.quick_jit(jax.vmap(jax.value_and_grad(vd.total(objective), argnums=1), (0, None, None)))
        compiled = run.lower(jax.random.split(jax.random.key(0), 8), params, x).compile()
        flops[name] = compiled.cost_analysis()["flops"]
    assert flops["frozen"] < 3 * flops["score"] and flops["learned"] < 5 * flops["score"]


def test_three_evaluations_of_the_model_traced_once():
    """At z, at the soft y and at the soft y given z: no more, and none at a second call."""
    traces = []
    toy = toys.toy("bernoulli")

    def log_joint(params, x, z):
        traces.append(z.shape)
        return toy.model.log_joint(params, x, z)

    objective = vd.rebar(toy.model._replace(log_joint=log_joint), toy.logits, vd.iwae, 8)
    step = toys.quick_jit(jax.value_and_grad(vd.total(objective), argnums=1))
    for seed in range(3):
        params = jax.tree.map(lambda leaf, seed=seed: leaf + 0.1 * seed, toy.params._replace(cv=CV))
        step(jax.random.key(seed), params, jnp.asarray(toy.data[seed]))
    assert len(traces) == 3 and step._cache_size() == 1


@pytest.mark.parametrize("name", RELAXATION)
def test_finite_in_the_far_tails(name):
    """Logits of q of +-20 and +-80, by a prior of the opposite ones: value and gradients by all parts and by x."""
    toy = toys.toy(name)
    objectives = [estimator(name, vd.relax, bound, 3) for bound in (vd.elbo, vd.iwae)]
    far = np.array(list(itertools.product([-80.0, -20.0, 20.0, 80.0], repeat=SIZE[name])), np.float32)
    params = params_of(name, CV | {"log_temperature": jnp.log(jnp.float32(0.1))})

    @toys.quick_jit
    @functools.partial(jax.vmap, in_axes=(0, 0))
    def run(key, bias):
        at = with_bias(params._replace(phi={"logits": -bias}), bias)
        at.lam["weight"] = jnp.zeros_like(at.lam["weight"])
        x = jnp.asarray(toy.data[0])
        return [jax.value_and_grad(vd.total(o), argnums=(1, 2))(key, at, x) for o in objectives]

    found = jax.device_get(run(jax.random.split(jax.random.key(0), len(far)), jnp.asarray(far)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.all(np.isfinite(leaf)), path
    assert np.all(found[0][0] < 0) and np.min(found[0][0]) < -100


def test_starts():
    """Temperature .5, scale 1, and the network's own; the model's other parts start as they did."""
    toy = toys.toy("bernoulli")
    key = jax.random.key(0)
    for init in (vd.rebar_init, vd.relax_init(NETWORK["bernoulli"])):
        params = vd.with_cv(toy.model, init).init(key)
        assert jnp.exp(params.cv["log_temperature"]) == pytest.approx(0.5) and params.cv["scale"] == 1.0
        of = vd.relax if "network" in params.cv else vd.rebar
        objective = vd.total(estimator("bernoulli", of))
        assert jax.eval_shape(objective, key, params, jnp.asarray(toy.data[0])).shape == ()
    assert params.cv["network"]["w"].shape == (4, 4)
    assert isinstance(params, Params)


def test_refusals(key):
    toy, linear, mixed = (toys.toy(name) for name in ("bernoulli", "linear", "mixed c, u"))
    x, params = jnp.asarray(toy.data[0]), params_of("bernoulli")
    for of in (vd.rebar, vd.relax):
        more = (NETWORK["bernoulli"],) if of is vd.relax else ()
        name = of.__name__
        objective = of(toy.model, toy.logits, *more)
        with pytest.raises(ValueError, match="num_samples: got 0, expected at least 1"):
            of(toy.model, toy.logits, *more, vd.elbo, 0)
        for other in (linear, mixed):
            with pytest.raises(TypeError, match=f"z: got a continuous leaf, .* for {name}; use pathwise"):
                of(other.model, toy.logits, *more)(key, other.params, jnp.asarray(other.data[0]))
        with pytest.raises(TypeError, match=f"logits: .* for {name}; .* use score_function"):
            of(toy.model, lambda params, x: toy.logits(params, x)[:1], *more)(key, params, x)
        with pytest.raises(TypeError, match="expected a typed key"):
            objective(jax.random.PRNGKey(0), params, x)
        with pytest.raises(
            TypeError, match=rf"params.cv: got \(\), expected a dict .* for {name}; .* {name}_init"
        ):
            objective(key, toy.params, x)
    with pytest.raises(TypeError, match=r"params.cv: got \['log_temperature', 'scale'\], .*'network'"):
        objective(key, toy.params._replace(cv=CV), x)
    vector = NETWORK["bernoulli"]._replace(apply=lambda cv, z, x: z)
    with pytest.raises(ValueError, match=r"network: got an output of shape \(2,\), expected \(\)"):
        vd.relax(toy.model, toy.logits, vector)(key, params, x)
