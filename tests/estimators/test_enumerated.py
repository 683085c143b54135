"""The sum over a support against the same sum in float64 NumPy, and where q or p is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys


def three_values():
    """z in {0, 1, 2}, every probability a parameter; x is a number."""

    def log_joint(params, x, z):
        log_prior = jax.nn.log_softmax(params.phi)[z]
        return log_prior - 0.5 * (x - params.theta[z]) ** 2

    def log_q(params, x, z):
        return jax.nn.log_softmax(params.lam)[z]

    def sample_q(key, params, x):
        return jax.random.categorical(key, params.lam).astype(jnp.int32)

    return vd.Model(lambda key: vd.Params(), log_joint, log_q, sample_q, lambda key, params: ((), ()))


SUPPORT = jnp.arange(3)
THETA, PHI = jnp.array([0.0, 1.0, -2.0]), jnp.array([0.1, 0.5, -0.3])


def test_value_and_gradient_are_exact():
    """Against the multiset sum of tests.toys in float64, to 1e-6."""
    toy = toys.toy("bernoulli")
    value, gradient = toys.exact_expectations(toy, 1, (1.0,))[1.0]
    objective = vd.enumerated(toy.model, toys.BITS)
    keys = jax.random.split(jax.random.key(0), 3)

    def mean(params):
        terms = jax.vmap(objective, in_axes=(0, None, 0))(keys, params, jnp.asarray(toy.data))
        assert list(terms) == ["elbo"]
        return jnp.mean(terms["elbo"])

    got, got_gradient = jax.jit(jax.value_and_grad(mean))(toy.params)
    assert float(got) == pytest.approx(value, rel=1e-6)
    for mine, other in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_it_is_the_mean_of_score_function():
    """And so an estimator of the same quantity; 40,000 draws."""
    toy = toys.toy("bernoulli")
    runs = toys.gradient_draws(
        {"elbo": vd.score_function(toy.model, vd.elbo, 5)}, toy.params, toy.data, 60_000
    )
    objective = vd.total(vd.enumerated(toy.model, toys.BITS))
    sums = [
        jax.value_and_grad(objective, argnums=1)(jax.random.key(0), toy.params, jnp.asarray(x))
        for x in toy.data
    ]
    gradient = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), axis=0), *[g for _, g in sums])
    assert toys.z_scores(runs["elbo"][0][:, None], np.mean([v for v, _ in sums])) < 5.0
    toys.check_unbiased(runs["elbo"][1], gradient)


def test_the_key_is_not_used():
    toy = toys.toy("bernoulli")
    objective, x = vd.enumerated(toy.model, toys.BITS), jnp.asarray(toy.data[0])
    one, other = (objective(jax.random.key(seed), toy.params, x)["elbo"] for seed in (0, 1))
    assert one == other


@pytest.mark.parametrize("also_in_p", [False, True])
def test_a_value_that_q_never_takes_adds_nothing(also_in_p):
    """Value and every gradient are those of the other two values alone, whether or not p allows the third."""
    phi = PHI.at[2].set(-jnp.inf) if also_in_p else PHI
    params = vd.Params(theta=THETA, phi=phi, lam=jnp.array([0.3, -0.4, -jnp.inf]))
    model, x, key = three_values(), jnp.array(0.7), jax.random.key(0)
    got, gradient = jax.value_and_grad(vd.total(vd.enumerated(model, SUPPORT)), argnums=1)(key, params, x)

    def by_hand(theta, phi, lam):
        q = jax.nn.softmax(lam)
        log_prior = jax.nn.log_softmax(phi)[:2]
        return jnp.sum(q * (log_prior - 0.5 * (x - theta) ** 2 - jnp.log(q)))

    exact, by = jax.value_and_grad(by_hand, argnums=(0, 1, 2))(THETA[:2], phi, params.lam[:2])
    assert got == pytest.approx(float(exact), rel=1e-6)
    np.testing.assert_allclose(gradient.theta, [*by[0], 0.0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient.phi, by[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient.lam, [*by[2], 0.0], rtol=1e-5, atol=1e-7)


def test_a_value_that_p_forbids_makes_the_elbo_minus_infinity():
    params = vd.Params(theta=THETA, phi=PHI.at[2].set(-jnp.inf), lam=jnp.zeros(3))
    objective = vd.enumerated(three_values(), SUPPORT)
    assert objective(jax.random.key(0), params, jnp.array(0.7))["elbo"] == -jnp.inf


def test_a_support_of_pytrees():
    """Two latents of two values each, as a dictionary: four rows."""
    bits = {"a": jnp.array([0, 0, 1, 1]), "b": jnp.array([False, True, False, True])}

    def log_q(params, x, z):
        on = z["b"].astype(jnp.float32)
        return (
            z["a"].astype(jnp.float32) * jnp.log(0.3)
            + (1 - z["a"]).astype(jnp.float32) * jnp.log(0.7)
            + (on * jnp.log(0.9) + (1 - on) * jnp.log(0.1))
        )

    def log_joint(params, x, z):
        return log_q(params, x, z) + params.theta * (
            z["a"].astype(jnp.float32) + 2 * z["b"].astype(jnp.float32)
        )

    model = vd.Model(lambda key: vd.Params(), log_joint, log_q, lambda *args: None, lambda *args: None)
    objective = vd.enumerated(model, bits)
    value = objective(jax.random.key(0), vd.Params(theta=jnp.array(1.5)), jnp.zeros(()))["elbo"]
    assert value == pytest.approx(1.5 * (0.3 + 2 * 0.9), rel=1e-6)


@pytest.mark.parametrize(
    "support", [(), jnp.array(3), jnp.zeros((0,), jnp.int32), {"a": jnp.arange(2), "b": jnp.arange(3)}]
)
def test_a_support_without_one_length_is_refused(support):
    with pytest.raises(ValueError, match="support: got leading axes .*, expected one common length"):
        vd.enumerated(toys.toy("bernoulli").model, support)


def test_traces_once():
    traces = []
    toy = toys.toy("bernoulli")

    def log_joint(params, x, z):
        traces.append(z.shape)
        return toy.model.log_joint(params, x, z)

    objective = vd.enumerated(toy.model._replace(log_joint=log_joint), toys.BITS)
    step = jax.jit(jax.value_and_grad(vd.total(objective), argnums=1))
    for x in toy.data:
        step(jax.random.key(0), toy.params, jnp.asarray(x))
    assert len(traces) == 1


@pytest.mark.parametrize("num_samples", [2, 5, 8])
def test_any_bound_of_several_draws(num_samples):
    """Value and gradient of each bound against the float64 sum of tests.toys."""
    toy = toys.toy("bernoulli")
    objectives = {a: vd.enumerated(toy.model, toys.BITS, b, num_samples) for a, b in toys.BOUNDS.items()}
    keys = jax.random.split(jax.random.key(0), len(toy.data))
    for alpha, (terms, gradient) in toys.single_draws(objectives, keys, toy.params, toy.data).items():
        value, exact = toys.exact("bernoulli", num_samples)[alpha]
        assert list(terms) == [toys.BOUNDS[alpha].__name__]
        assert np.mean(list(terms.values())[0]) == pytest.approx(value, rel=1e-5)
        for mine, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(np.mean(mine, axis=0), other, rtol=1e-4, atol=1e-5)


def test_a_value_that_q_never_takes_is_left_out_of_several_draws():
    """IWAE_2 over {0, 2} only, by hand."""
    log_q = np.log([0.3, 0.7])
    params = vd.Params(THETA, PHI, jnp.array([log_q[0], -jnp.inf, log_q[1]], jnp.float32))
    objective = vd.enumerated(three_values(), SUPPORT, vd.iwae, 2)
    value, gradient = jax.value_and_grad(vd.total(objective), 1)(jax.random.key(0), params, jnp.float32(0.4))
    log_prior = np.asarray(jax.nn.log_softmax(PHI), float)[[0, 2]]
    log_w = log_prior - 0.5 * (0.4 - np.array([0.0, -2.0])) ** 2 - log_q
    expected = sum(
        np.exp(log_q[i] + log_q[j]) * np.log((np.exp(log_w[i]) + np.exp(log_w[j])) / 2)
        for i in range(2)
        for j in range(2)
    )
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient)) and gradient.theta[1] == 0


def test_a_sum_that_would_not_end_is_refused():
    with pytest.raises(
        ValueError, match=r"num_samples: got 50 draws of 8 values, 264,385,836 terms.*score_function"
    ):
        vd.enumerated(three_values(), jnp.arange(8), vd.iwae, 50)


@pytest.mark.parametrize(("name", "advice"), [("linear", "pathwise"), ("mixed c, u", "mixed")])
def test_a_continuous_latent_is_told_where_to_go(name, advice):
    toy = toys.toy(name)
    z = jax.eval_shape(toy.model.sample_q, jax.random.key(0), toy.params, jnp.asarray(toy.data[0]))
    support = jax.tree.map(lambda leaf: jnp.zeros((3, *leaf.shape), leaf.dtype), z)
    objective = vd.enumerated(toy.model, support)
    with pytest.raises(TypeError, match=rf"z: got a continuous leaf, .* for enumerated, .*{advice}\(model"):
        jax.eval_shape(objective, jax.random.key(0), toy.params, jnp.asarray(toy.data[0]))
