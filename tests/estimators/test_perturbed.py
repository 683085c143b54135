"""What relaxed and control-variate estimators start from: refusals, keys, and log q from logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from vdiff import relaxations
from vdiff.estimators import perturbed

RELAXATION = {"bernoulli": relaxations.bernoulli, "categorical": relaxations.one_hot}
TREE = {"a": jnp.zeros((2, 2)), "b": (jnp.zeros((2, 2)), jnp.zeros(()))}


def check(model, logits, params, x):
    return perturbed.checked_logits(model, logits, jax.random.key(0), params, x, "rebar")


@pytest.mark.parametrize("name", RELAXATION)
def test_logits_of_zs_shapes_are_returned(name):
    toy = toys.toy(name)
    x = jnp.asarray(toy.data[0])
    np.testing.assert_array_equal(check(toy.model, toy.logits, toy.params, x), toy.logits(toy.params, x))


@pytest.mark.parametrize(("name", "advice"), [("linear", "pathwise"), ("mixed c, u", "mixed")])
def test_a_continuous_leaf_is_refused(name, advice):
    toy = toys.toy(name)
    z = jax.eval_shape(toy.model.sample_q, jax.random.key(0), toy.params, toy.data[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), z)
    with pytest.raises(TypeError, match=rf"z: got a continuous leaf, .* only for rebar; .*{advice}\(model"):
        check(toy.model, lambda params, x: zeros, toy.params, jnp.asarray(toy.data[0]))


def test_no_latent_is_refused():
    toy = toys.toy("bernoulli")
    model = toy.model._replace(sample_q=lambda key, params, x: ())
    with pytest.raises(TypeError, match="z: got no leaf, expected discrete ones only"):
        check(model, lambda params, x: (), toy.params, jnp.asarray(toy.data[0]))


@pytest.mark.parametrize(
    ("of", "got"),
    [
        (lambda eta: eta[:1], "(1,)"),
        (lambda eta: eta[None], "(1, 2)"),
        (lambda eta: (eta,), "((2,),)"),
        (lambda eta: {"bits": eta}, "{'bits': (2,)}"),
        (lambda eta: tuple(eta), "((), ())"),
        (lambda eta: 0.0, "()"),
        (lambda eta: (), "()"),
    ],
)
def test_other_leaves_or_shapes_are_refused(of, got):
    toy = toys.toy("bernoulli")
    message = re.escape(f"logits: got leaves of shapes {got}, expected those of z, (2,), for rebar; ")
    with pytest.raises(TypeError, match=message + ".*one-hot, or use score_function"):
        check(toy.model, lambda params, x: of(toy.logits(params, x)), toy.params, jnp.asarray(toy.data[0]))


def test_a_scalar_is_not_an_empty_tree():
    """Both have the shape ()."""
    toy = toys.toy("bernoulli")
    model = toy.model._replace(sample_q=lambda key, params, x: jnp.int32(1))
    x = jnp.asarray(toy.data[0])
    with pytest.raises(TypeError, match="logits: got leaves"):
        check(model, lambda params, x: (), toy.params, x)
    assert check(model, lambda params, x: 0.5, toy.params, x).shape == ()


def test_an_index_is_refused():
    """A mixture's z is the number of its component, its logits are a vector."""
    gmm = vd.gmm(3, 2)
    params, x = gmm.init(jax.random.key(0)), jnp.zeros(2)
    with pytest.raises(TypeError, match=r"got leaves of shapes \(3,\), expected those of z, \(\),"):
        check(gmm, lambda params, x: jnp.zeros(3), params, x)


def test_raw_keys_are_refused():
    toy = toys.toy("bernoulli")
    with pytest.raises(TypeError, match="expected a typed key"):
        perturbed.checked_logits(
            toy.model, toy.logits, jax.random.PRNGKey(0), toy.params, jnp.asarray(toy.data[0]), "rebar"
        )


def test_every_leaf_and_draw_has_noise_of_its_own():
    """No number occurs twice: not across draws, leaves, elements, nor between y and y given z."""

    @toys.quick_jit
    def run(key):
        of, (key_y, key_given_z) = relaxations.bernoulli, jax.random.split(key)
        y = perturbed.perturb(of, key_y, TREE, 50)
        given = perturbed.condition(of, key_given_z, TREE, jax.tree.map(of.harden, y), 50)
        return y, given, jax.tree.map(lambda a, b: of.harden(a) == of.harden(b), y, given)

    y, given, agree = run(jax.random.key(0))
    noise = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves((y, given))])
    assert len(np.unique(noise)) == 900
    for draws in (y, given):
        assert jax.tree.structure(draws) == jax.tree.structure(TREE)
        assert [leaf.shape for leaf in jax.tree.leaves(draws)] == [(50, 2, 2), (50, 2, 2), (50,)]
        noise = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(draws)])
        assert abs(np.mean(noise)) < 5 * np.pi / np.sqrt(3 * 450)
    assert all(np.all(leaf) for leaf in jax.tree.leaves(agree))


@pytest.mark.parametrize("name", RELAXATION)
def test_log_probs_are_the_models_log_q(name):
    toy, x = toys.toy(name), jnp.asarray(toys.toy(name).data[0])
    z, _ = toy.support(toy.params, x, None, None)
    got = perturbed.log_probs(RELAXATION[name], toy.logits(toy.params, x), jnp.asarray(z))
    expected = [toy.model.log_q(toy.params, x, value) for value in z]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_log_probs_are_summed_over_the_leaves():
    """Nine bits of probability one half, for each of two draws."""
    bits = jax.tree.map(lambda leaf: jnp.ones((2, *leaf.shape)), TREE)
    got = perturbed.log_probs(relaxations.bernoulli, TREE, bits)
    np.testing.assert_allclose(got, [-9 * np.log(2)] * 2, rtol=1e-6)
