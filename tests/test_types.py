"""The contract: records, keys, and the ELBO estimate of a model that has only five functions."""

import functools
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
    assert vd.LogProb._fields == ("value", "std_error", "ess", "k_hat")


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


# A q whose two functions share what they compute.


def models_of_pairs():
    """Return every way that the library makes a fused q, with a datum."""
    pixels, real = jnp.array([0, 1, 1], jnp.int32), jnp.array([0.3, -0.2, 0.5])
    likelihood = vd.likelihoods.gaussian(1.0)

    def net(size_in, size_out):
        return vd.nets.mlp((size_in,), (size_out,), hidden=(4,))

    vae = vd.vae(net(3, 4), net(2, 3), latent_dim=2, likelihood=likelihood)
    with_prior = vd.vae(net(3, 4), net(2, 3), latent_dim=2, likelihood=likelihood, prior=vd.gmm(2, 2))
    one_layer = vd.sbn([net(3, 2)], [net(2, 3)], num_units=2, likelihood=likelihood)
    relaxed = vd.concrete(
        one_layer, one_layer.logits, 0.5, prior_logits=one_layer.prior_logits, sample_x=one_layer.sample_x
    )
    bent = vd.flow(vd.amortized(net(3, 5), vd.families.full_rank(2)), [net(2, 4)] * 2)
    return {
        "vae": (vae, real),
        "with_prior": (with_prior, real),
        "gmm": (vd.gmm(3, 3, encoder=net(3, 3)), real),
        "sbn": (
            vd.sbn([net(3, 2), net(2, 2)], [net(2, 3), net(2, 2)], num_units=2, likelihood=likelihood),
            real,
        ),
        "concrete": (relaxed, real),
        "dequantized": (vd.dequantized(with_prior, 2), pixels),
        "conditional": (vd.conditional(lambda y: vae, jnp.int32(0)), (real, jnp.int32(1))),
        "with_q": (vd.with_q(vae, bent), real),
    }


FUSED = models_of_pairs()


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_draw_is_the_two_apart(name):
    """In value, and in the gradient by every parameter, through the draw too."""
    model, x = FUSED[name]
    params, keys = model.init(jax.random.key(0)), jax.random.split(jax.random.key(1), 20)

    def fused(params, key):
        return vd.q_at(model, params, x).sample_and_log_prob(key)

    def apart(params, key):
        z = model.sample_q(key, params, x)
        return z, model.log_q(params, x, z)

    def scalar(of, params, key):
        z, log_q = of(params, key)
        return log_q + sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(z) if not is_discrete(leaf))

    (z, _), (z_apart, _) = (jax.vmap(of, (None, 0))(params, keys) for of in (fused, apart))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), z, z_apart)
    results = [
        toys.quick_jit(jax.vmap(jax.value_and_grad(functools.partial(scalar, of)), (None, 0)))(params, keys)
        for of in (fused, apart)
    ]
    one, other = jax.tree.map(np.asarray, results)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), one, other)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(one[1].lam)), "the gradient is of something"


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_q_is_made_once(name):
    """And an exchanged `sample_q` or `log_q` is heeded: neither is passed over for what it replaced."""
    model, x = FUSED[name]
    params, key = model.init(jax.random.key(0)), jax.random.key(1)
    q = vd.q_at(model, params, x)
    drawn = q.sample(key)
    jax.tree.map(np.testing.assert_array_equal, drawn, model.sample_q(key, params, x))

    doubled = model._replace(log_q=lambda params, x, z: 2.0 * model.log_q(params, x, z))
    log_q = model.log_q(params, x, drawn)
    for got, factor in ((vd.q_at(doubled, params, x), 2.0), (q, 1.0)):
        np.testing.assert_allclose(got.log_prob(drawn), factor * log_q, rtol=1e-6)
        np.testing.assert_allclose(got.sample_and_log_prob(key)[1], factor * log_q, rtol=1e-5)

    other = jax.random.key(2)
    still = model._replace(sample_q=lambda key, params, x: model.sample_q(other, params, x))
    for got in (vd.q_at(still, params, x).sample(key), vd.q_at(still, params, x).sample_and_log_prob(key)[0]):
        jax.tree.map(np.testing.assert_array_equal, got, model.sample_q(other, params, x))


def test_functions_of_two_different_qs_are_not_taken_for_one():
    one, other = FUSED["vae"][0], FUSED["with_q"][0]
    params, x = one.init(jax.random.key(0)), FUSED["vae"][1]
    mixed = one._replace(log_q=other.log_q)
    z = jnp.zeros(2)
    params = params._replace(lam=other.init(jax.random.key(0)).lam)
    np.testing.assert_allclose(vd.q_at(mixed, params, x).log_prob(z), other.log_q(params, x, z), rtol=1e-6)


def test_what_is_computed_from_x_is_computed_once():
    """K draws and their densities are one call of q, whatever is asked of it."""
    calls = []

    def q(params, x):
        calls.append(x)
        loc = params.lam * x
        return vd.in_turn(lambda key: loc + jax.random.normal(key), lambda z: -0.5 * jnp.square(z - loc))

    sample_q, log_q = vd.fused(q)
    model = vd.Model(
        lambda key: vd.Params(lam=0.5), lambda params, x, z: -x * z, log_q, sample_q, lambda key, params: ()
    )
    params, x, key = model.init(jax.random.key(0)), jnp.float32(2.0), jax.random.key(0)
    for objective in (vd.pathwise(model, vd.iwae, 5), vd.score_function(model, vd.iwae, 5)):
        calls.clear()
        objective(key, params, x)
        assert len(calls) == 1
    calls.clear()
    vd.importance_log_prob(model, 10, chunk_size=5)(key, params, x)
    model.elbo_estimate(key, params, x)
    assert len(calls) == 2
