"""Scores for the discrete, paths for the continuous: against enumeration times quadrature, in both orders of q."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys

ORDERS = ["mixed c, u", "mixed u, c"]
every_order = pytest.mark.parametrize("name", ORDERS)


def mixed_of(name, bound, num_samples, **settings):
    toy = toys.toy(name)
    return vd.mixed(toy.model, toy.logits, bound, num_samples, **settings)


@every_order
@pytest.mark.parametrize(
    ("num_samples", "alphas"),
    [
        (2, (1.0, 0.0, "tvo")),
        pytest.param(5, (0.0, 0.5), marks=pytest.mark.slow),
        pytest.param(8, (1.0,), marks=pytest.mark.slow),
    ],
)
def test_gradients_are_unbiased(name, num_samples, alphas):
    toy = toys.toy(name)
    objectives = {a: mixed_of(name, toys.BOUNDS[a], num_samples) for a in alphas}
    runs = toys.gradient_draws(objectives, toy.params, toy.data, 120_000, seed=num_samples)
    for alpha, (values, draws) in runs.items():
        # The ELBO does not depend on the number of draws.
        value, gradient = toys.exact(name, 1 if alpha == 1.0 else num_samples)[alpha]
        assert toys.z_scores(values[:, None], value) < 5.0, alpha
        toys.check_unbiased(draws, gradient)


@every_order
def test_weights_shared_between_p_and_q(name):
    """Q's slope is p's w, q's shift of u is p's m: theta's gradient goes through p, the path and the score."""
    toy = toys.toy(name)

    def own(params):
        return params._replace(lam=params.lam | {"slope": params.theta["w"], "of_c": params.theta["m"]})

    model = toy.model._replace(
        log_q=lambda params, x, z: toy.model.log_q(own(params), x, z),
        sample_q=lambda key, params, x: toy.model.sample_q(key, own(params), x),
    )
    lam = {leaf: toy.params.lam[leaf] for leaf in ("weight", "of_u", "log_scale")}
    shared = toys.Toy(
        *(model, toy.params._replace(lam=lam), toy.data, None, 1),
        support=lambda params, x, eps, log_mass: toy.support(own(params), x, eps, log_mass),
        logits=lambda params, x, z: toy.logits(own(params), x, z),
    )
    objectives = {a: vd.mixed(model, shared.logits, toys.BOUNDS[a], 2) for a in (1.0, 0.0)}
    exact = toys.exact_expectations(shared, 2, (1.0, 0.0))
    runs = toys.gradient_draws(objectives, shared.params, shared.data, 120_000)
    for alpha, (values, draws) in runs.items():
        value, gradient = exact[alpha]
        assert toys.z_scores(values[:, None], value) < 5.0, alpha
        toys.check_unbiased(draws, gradient)


@every_order
def test_the_reference_has_converged(name):
    for alpha, (_, coarse) in toys.exact_expectations(toys.toy(name), 2, num_nodes=16).items():
        one, other = (toys.flat_single(g) for g in (coarse, toys.exact(name, 2)[alpha][1]))
        assert np.linalg.norm(one - other) < 1e-3 * np.linalg.norm(other), alpha


@every_order
def test_the_value_is_the_bound(name):
    toy = toys.toy(name)
    keys = jax.random.split(jax.random.key(0), 3)
    objectives = {a: mixed_of(name, bound, 5) for a, bound in toys.BOUNDS.items()}
    runs = toys.single_draws(objectives, keys, toy.params, toy.data)
    for i, key in enumerate(keys):
        log_weights = toys.log_weights(toy.model, key, toy.params, jnp.asarray(toy.data[i]), 5)
        for alpha, (terms, _) in runs.items():
            value = terms[toys.BOUNDS[alpha].__name__][i]
            assert float(value) == pytest.approx(toys.numpy_bound(alpha, log_weights), rel=1e-6)


@every_order
def test_the_score_of_all_of_q_would_count_the_path_twice(name):
    """The whole of q in place of its discrete part, at stopped draws, is seen by the same test."""
    toy = toys.toy(name)

    def whole(params, x, z):
        return toy.model.log_q(params, x, jax.lax.stop_gradient(z))

    objective = vd.mixed(toy.model, whole, vd.elbo, 2)
    _, draws = toys.gradient_draws({"it": objective}, toy.params, toy.data, 20_000)["it"]
    exact = toys.flat_single(toys.exact(name, 2)[1.0][1].lam)
    assert np.max(toys.z_scores(toys.flat(draws.lam), exact)) > 10.0


def test_it_varies_less_than_the_score_function():
    """Of the same model, K = 5: the continuous part has lost its score."""
    toy = toys.toy("mixed c, u")
    objectives = {
        "mixed": mixed_of("mixed c, u", vd.elbo, 5),
        "score": vd.score_function(toy.model, vd.elbo, 5),
    }
    runs = toys.gradient_draws(objectives, toy.params, toy.data, 4_000)
    ours, score = (toys.variance(runs[name][1], "lam") for name in objectives)
    assert ours < 0.7 * score, ours / score


def test_a_learned_baseline():
    """One draw, a baseline in cv: still unbiased."""
    toy = toys.toy("mixed c, u")
    params = toy.params._replace(cv=jnp.float32(-5.0))
    objective = mixed_of("mixed c, u", vd.elbo, 1, baseline=vd.running_mean)
    _, draws = toys.gradient_draws({"it": objective}, params, toy.data, 200_000)["it"]
    toys.check_unbiased(draws, toys.exact_expectations(toy, 1, (1.0,))[1.0][1])


def test_other_latents_are_told_where_to_go():
    for name, instead in (("bernoulli", "score_function"), ("linear", "pathwise")):
        toy = toys.toy(name)
        objective = vd.mixed(toy.model, toy.model.log_q)
        with pytest.raises(
            TypeError, match=f"expected discrete and continuous ones for mixed; use {instead}"
        ):
            jax.eval_shape(objective, jax.random.key(0), toy.params, jnp.asarray(toy.data[0]))


def test_one_draw_and_leave_one_out_are_refused():
    with pytest.raises(ValueError, match="num_samples: got 1, expected at least 2"):
        mixed_of("mixed c, u", vd.elbo, 1)


def test_a_vector_is_refused():
    toy = toys.toy("mixed c, u")
    objective = vd.mixed(toy.model, lambda params, x, z: jnp.zeros(3))
    with pytest.raises(ValueError, match="log_q_discrete: got an output of shape"):
        jax.eval_shape(objective, jax.random.key(0), toy.params, jnp.asarray(toy.data[0]))
