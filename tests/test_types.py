"""The contract: records, keys, and the ELBO estimate of a model that has only five functions."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from tests import toys
from vdiff.types import check_key, is_discrete


def test_params():
    params = vd.Params()
    assert params._fields == ("theta", "phi", "lam", "cv") and params == ((), (), (), ())
    assert jax.tree.leaves(params) == []
    doubled = jax.tree.map(lambda leaf: 2 * leaf, vd.Params(theta={"w": 1}, lam=[2, 3]))
    assert doubled == vd.Params(theta={"w": 2}, lam=[4, 6])


def test_fields():
    assert vd.Model._fields == ("init", "log_joint", "log_q", "sample_q", "sample", "elbo_terms")
    assert vd.Model._field_defaults == {"elbo_terms": None}
    assert vd.Network._fields == ("init", "apply")
    assert vd.Likelihood._fields == ("log_prob", "sample", "mean", "embed", "out_shape")
    assert vd.LogProb._fields == ("value", "std_error", "ess")


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        (jnp.zeros(2), False),
        (jnp.zeros(2, jnp.bfloat16), False),
        (jnp.zeros(2, jnp.complex64), False),
        ((), False),
        (1.5, False),
        (jnp.zeros(2, jnp.int32), True),
        (jnp.zeros((), jnp.uint8), True),
        (jnp.zeros(2, bool), True),
        (3, True),
        ({"a": jnp.zeros(2), "b": (jnp.zeros(1, bool),)}, True),
        ((jnp.zeros(2), {"u": jnp.zeros(3)}), False),
    ],
)
def test_is_discrete(z, expected):
    assert is_discrete(z) is expected


# Keys.


def test_a_typed_key_passes_and_comes_back():
    key = jax.random.key(3)
    assert check_key(key) is key
    assert jax.jit(lambda k: jax.random.key_data(check_key(k)))(key).shape == (2,)
    split = jax.vmap(lambda k: jax.random.uniform(check_key(k)))(jax.random.split(key, 3))
    assert split.shape == (3,)
    assert check_key(jax.random.key(3, impl="rbg")).dtype == jax.random.key(0, impl="rbg").dtype


@pytest.mark.parametrize(
    ("raw", "got"),
    [
        (jax.random.PRNGKey(0), r"uint32\[2\]"),
        (np.zeros(2, np.uint32), r"uint32\[2\]"),
        (jnp.zeros(3), r"float32\[3\]"),
        (0, "0"),
        (None, "None"),
    ],
    ids=["PRNGKey", "numpy", "float", "int", "None"],
)
def test_what_is_no_typed_key_is_refused_with_the_fix(raw, got):
    unchecked = inspect.unwrap(check_key)  # the hook of these tests would refuse an int before
    expected = rf"^key: got {got}, expected a typed key; make it with jax.random.key\(seed\)$"
    with pytest.raises(TypeError, match=expected):
        unchecked(raw)
    with pytest.raises(TypeError):
        check_key(raw)


def test_several_keys_are_not_one_key():
    with pytest.raises(TypeError, match="expected a typed key"):
        check_key(jax.random.split(jax.random.key(0), 3))


def takers_of_a_key():
    """Return every public function that takes a key, as a function of the key alone."""
    likelihood = vd.likelihoods.bernoulli()
    network = vd.nets.mlp((3,), (4,), hidden=())
    vae = vd.vae(network, vd.nets.mlp((2,), (3,), hidden=()), latent_dim=2, likelihood=likelihood)
    mixture = vd.gmm(2, 2)
    deep = vd.vae(
        network,
        vd.nets.mlp((2,), (3,), hidden=()),
        latent_dim=2,
        likelihood=likelihood,
        prior=vd.collapsed(mixture),
    )
    real = vd.vae(
        network, vd.nets.mlp((2,), (3,), hidden=()), latent_dim=2, likelihood=vd.likelihoods.gaussian(0.3)
    )
    levels = vd.dequantized(real, 4)
    toy = toys.toy("linear")
    bits = toys.toy("bernoulli")
    x, datum = jnp.asarray(toy.data[0]), jnp.zeros(3, jnp.int32)
    key = jax.random.key(0)

    takers = {
        "total": lambda k: vd.total(vae.elbo_terms)(k, vae.init(key), datum),
        "repeat": lambda k: vd.repeat(vae.elbo_terms, 2)(k, vae.init(key), datum),
        "weighted": lambda k: vd.weighted(vae.elbo_terms, {"kl": 2.0})(k, vae.init(key), datum),
        "preprocessed": lambda k: vd.preprocessed(vae.elbo_terms, lambda k, x: x)(k, vae.init(key), datum),
        "pathwise": lambda k: vd.pathwise(toy.model)(k, toy.params, x),
        "doubly_reparameterized": lambda k: vd.doubly_reparameterized(toy.model)(k, toy.params, x),
        "score_function": lambda k: vd.score_function(bits.model)(k, bits.params, x[:2]),
        "importance_log_prob": lambda k: vd.importance_log_prob(toy.model, 2)(k, toy.params, x),
        "evaluate": lambda k: vd.evaluate.evaluate(
            vd.total(vae.elbo_terms), k, vae.init(key), np.zeros((2, 3), np.int32)
        ),
        "init_state": lambda k: vd.init_state(k, toy.model, optax.sgd(0.1)),
        "elbo_estimate": lambda k: toy.model.elbo_estimate(k, toy.params, x),
        "elbo_estimate of terms": lambda k: vae.elbo_estimate(k, vae.init(key), datum),
        "network": network.init,
        "fit_em": lambda k: vd.fit_em(k, mixture, np.zeros((4, 2), np.float32)),
        "binarize": lambda k: vd.transforms.binarize(2)(k, datum),
        "dequantize": lambda k: vd.transforms.dequantize(2)(k, datum),
        "bernoulli.sample": lambda k: likelihood.sample(k, jnp.zeros(3)),
        "categorical.sample": lambda k: vd.likelihoods.categorical(3).sample(k, jnp.zeros(3)),
        "discretized_logistic.sample": lambda k: vd.likelihoods.discretized_logistic(3).sample(
            k, jnp.zeros(2)
        ),
        "gaussian.sample": lambda k: vd.likelihoods.gaussian(1.0).sample(k, jnp.zeros(3)),
        "learned gaussian.sample": lambda k: vd.likelihoods.gaussian().sample(k, jnp.zeros(2)),
    }
    for name, model, z in (
        ("vae", vae, datum),
        ("deep", deep, datum),
        ("gmm", mixture, x[:2]),
        ("levels", levels, datum),
    ):
        takers |= {
            f"{name}.init": model.init,
            f"{name}.sample": lambda k, m=model: m.sample(k, m.init(key)),
            f"{name}.sample_q": lambda k, m=model, z=z: m.sample_q(k, m.init(key), z),
        }
        if name != "gmm":  # its terms are exact and use no key
            takers[f"{name}.elbo_terms"] = lambda k, m=model, z=z: m.elbo_terms(k, m.init(key), z)
    return takers


TAKERS = takers_of_a_key()


@pytest.mark.parametrize("name", TAKERS)
def test_a_raw_key_is_refused_everywhere(name):
    with pytest.raises(
        TypeError, match=r"key: got uint32\[2\], expected a typed key; make it with jax.random.key"
    ):
        TAKERS[name](jax.random.PRNGKey(0))


# The ELBO of five functions.


@pytest.mark.parametrize("name", ["linear", "shared", "bernoulli"])
def test_elbo_estimate_of_five_functions(name):
    """One draw: unbiased in value and in theta, phi and lam, for continuous and for discrete latents."""
    toy = toys.toy(name)
    assert toy.model.elbo_terms is None
    value, gradient = toys.exact(name, 1)[1.0]
    # Shifted so that the score form, which has no baseline, is not all noise.
    model = toy.model._replace(log_joint=lambda params, x, z: toy.model.log_joint(params, x, z) - value)
    objective = {"elbo": lambda key, params, x: {"elbo": model.elbo_estimate(key, params, x)}}
    values, draws = toys.gradient_draws(
        objective, toy.params, toy.data, 160_000 if name == "bernoulli" else 60_000
    )["elbo"]
    assert toys.z_scores(values[:, None], 0.0) < 5.0
    toys.check_unbiased(draws, gradient)


@pytest.mark.parametrize("name", ["linear2", "shared", "bernoulli"])
def test_elbo_estimate_is_the_log_weight_of_its_draw(key, name):
    toy = toys.toy(name)
    x = jnp.asarray(toy.data[0])
    z = toy.model.sample_q(key, toy.params, x)
    expected = toy.model.log_joint(toy.params, x, z) - toy.model.log_q(toy.params, x, z)
    assert toy.model.elbo_estimate(key, toy.params, x) == pytest.approx(float(expected), rel=1e-6)


def test_elbo_estimate_is_the_sum_of_elbo_terms(key):
    toy = toys.toy("linear2")
    model = toy.model._replace(
        elbo_terms=lambda key, params, x: {"a": jnp.sum(x), "b": jnp.sum(params.phi["loc"])}
    )
    x = jnp.asarray(toy.data[0])
    expected = np.sum(toy.data[0]) + np.sum(np.asarray(toy.params.phi["loc"]))
    assert model.elbo_estimate(key, toy.params, x) == pytest.approx(float(expected), rel=1e-6)
    gradient = jax.grad(model.elbo_estimate, argnums=1)(key, toy.params, x)
    np.testing.assert_array_equal(gradient.phi["loc"], np.ones(2))
    assert not np.any(toys.flat_single(gradient.lam))


def test_every_family_has_the_same_elbo_estimate():
    for family in (vd.VAE, vd.GMM):
        assert family._fields[:6] == vd.Model._fields
        assert inspect.unwrap(family.elbo_estimate) is inspect.unwrap(vd.Model.elbo_estimate)
