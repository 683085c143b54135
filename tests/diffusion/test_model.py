"""The record of a diffusion model: a `Model` with more fields, signatures by inspection, times drawn uniformly."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests import toys
from tests.diffusion import cases
from vdiff import diffusion
from vdiff.diffusion import predict, weights
from vdiff.diffusion.model import terms_from

MODELS = {
    "ddpm": lambda: diffusion.ddpm(cases.tiny_denoiser(6), [0.1, 0.2, 0.4], shape=(3, 2)),
    "ddpm, learned times": lambda: diffusion.ddpm(
        cases.tiny_denoiser(6), [0.1, 0.2, 0.4], shape=(3, 2), times=diffusion.learned_times(3)
    ),
    "ddpm, m = 1": lambda: diffusion.ddpm(cases.tiny_denoiser(6), [0.5], shape=(3, 2)),
    "vdm, chain": lambda: diffusion.vdm(
        cases.tiny_denoiser(6),
        diffusion.learned_log_snr(),
        shape=(3, 2),
        num_steps=4,
        reverse_variance=diffusion.learned_variance(),
        likelihood=diffusion.levels(5),
    ),
    "vdm, continuous": lambda: diffusion.vdm(
        cases.tiny_denoiser(6),
        diffusion.learned_log_snr(),
        shape=(3, 2),
        predict=predict.velocity,
        likelihood=diffusion.discretized_gaussian(5),
    ),
}
NUM_LATENTS = {"ddpm": 3, "ddpm, learned times": 3, "ddpm, m = 1": 1, "vdm, chain": 4}
every = pytest.mark.parametrize("name", MODELS)


def datum(name):
    """Real where p(x | z_1) is a Gaussian, levels else."""
    return jnp.zeros((3, 2)) if name.startswith("ddpm") else jnp.array([[0, 1], [2, 3], [4, 2]])


SIGNATURES = {
    "init": ["key"],
    "log_joint": ["params", "x", "z"],
    "log_q": ["params", "x", "z"],
    "sample_q": ["key", "params", "x"],
    "sample": ["key", "params"],
    "elbo_terms": ["key", "params", "x"],
    "elbo_estimate": ["key", "params", "x"],
    "elbo_terms_at": ["key", "params", "x", "u"],
    "end_terms": ["key", "params", "x"],
    "rate_at": ["key", "params", "x", "u"],
    "denoise": ["params", "z", "log_snr"],
    "log_snr": ["params", "t"],
}


def names(function):
    return list(inspect.signature(function).parameters)


@every
def test_signatures(name):
    """Fields of `Model` come first; a continuous model's refusals take anything."""
    model = MODELS[name]()
    assert model._fields[:6] == vd.Model._fields and isinstance(model, vd.ModelLike)
    for field, expected in SIGNATURES.items():
        found = names(getattr(model, field))
        assert found == expected or (found == ["args"] and name == "vdm, continuous"), field
    assert len(inspect.signature(model.reverse_variance).parameters) == 3
    assert model.shape == (3, 2) and isinstance(model.likelihood, diffusion.DataLikelihood)
    assert names(diffusion.weighted_terms(model, weights.simple)) == ["key", "params", "x", "u"]
    assert names(diffusion.path_elbo(model, 2)) == ["key", "params", "x"]
    assert names(diffusion.rates(model, 2)) == ["key", "params", "x"]
    assert names(diffusion.ancestral(model, 2)) == ["key", "params"]


@every
def test_shapes_dtypes_and_parts(name, key):
    """What each field promises to return, by abstract evaluation under strict promotion."""
    model = MODELS[name]()
    params = model.init(key)
    assert (
        isinstance(params, vd.Params) and set(params.theta) == {"denoiser", "likelihood"} and params.cv == ()
    )
    x, u = datum(name), jnp.float32(0.6)
    terms = jax.eval_shape(model.elbo_terms_at, key, params, x, u)
    assert set(terms) == {"prior", "reconstruction", "diffusion"}
    rate = jax.eval_shape(model.rate_at, key, params, x, u)
    assert isinstance(rate, diffusion.Rate)
    for leaf in (*terms.values(), *rate, jax.eval_shape(model.log_snr, params, u)):
        assert leaf.shape == () and leaf.dtype == jnp.float32
    assert set(jax.eval_shape(model.end_terms, key, params, x)) == {"prior", "reconstruction"}
    assert jax.eval_shape(model.denoise, params, jnp.zeros((3, 2)), u).shape == (3, 2)
    assert jax.eval_shape(model.reverse_variance, params, u, u).shape == ()
    if name in NUM_LATENTS:
        path = (NUM_LATENTS[name], 3, 2)
        z = jax.eval_shape(model.sample_q, key, params, x)
        assert z.shape == path and z.dtype == jnp.float32
        assert jax.eval_shape(model.log_joint, params, x, z).shape == ()
        assert jax.eval_shape(model.log_q, params, x, z).shape == ()
        new, z = jax.eval_shape(model.sample, key, params)
        assert new.shape == x.shape and new.dtype == x.dtype and z.shape == path


@every
def test_time_goes_from_the_data_to_the_noise(name, key):
    """log_snr(0) is z_1's, log_snr(1) z_m's; it falls."""
    model = MODELS[name]()
    at = jax.vmap(model.log_snr, in_axes=(None, 0))(model.init(key), jnp.linspace(0.0, 1.0, 11))
    if name.startswith("vdm"):
        np.testing.assert_allclose(at[np.array([0, -1])], [13.3, -5.0], atol=1e-5)
    else:
        abar = np.cumprod(1 - np.array([0.5] if name == "ddpm, m = 1" else [0.1, 0.2, 0.4]))
        np.testing.assert_allclose(at[np.array([0, -1])], np.log(abar / (1 - abar))[[0, -1]], rtol=1e-5)
    assert np.all(np.diff(at) < 0) or name == "ddpm, m = 1"


@pytest.mark.parametrize("field", ["log_joint", "log_q", "sample_q", "sample"])
def test_continuous_time_has_no_path(field):
    refused = getattr(MODELS["vdm, continuous"](), field)
    with pytest.raises(ValueError, match=f"{field}: got a model in continuous time.*num_steps"):
        refused(None, None, None)


def test_terms_at_are_the_ends_and_the_rate(key):
    """Exactly the parts given, each with a key of its own."""
    seen = {}

    def end_terms(key, params, x):
        seen["ends"] = key
        return {"prior": jnp.float32(1.0), "reconstruction": x}

    def rate_at(key, params, x, u):
        seen["rate"] = key
        return diffusion.Rate(10.0 * u, u, u, u)

    terms = terms_from(end_terms, rate_at)(key, vd.Params(), jnp.float32(3.0), jnp.float32(0.25))
    assert {name: float(term) for name, term in terms.items()} == {
        "prior": 1.0,
        "reconstruction": 3.0,
        "diffusion": 2.5,
    }
    bits = [jax.random.key_data(k).tolist() for k in (seen["ends"], seen["rate"], key)]
    assert len({tuple(b) for b in bits}) == 3


def test_a_random_time_is_uniform():
    """Moments one to four and bins, by z-scores; and the terms' own key is another than u's."""

    def terms_at(key, params, x, u):
        return {"u": u, "noise": jax.random.uniform(key), "x": x * params.theta}

    num = 100_000
    objective = diffusion.at_random_time(terms_at)
    assert names(objective) == ["key", "params", "x"]
    terms = jax.jit(jax.vmap(objective, in_axes=(0, None, None)))(
        jax.random.split(jax.random.key(0), num), vd.Params(theta=jnp.float32(2.0)), jnp.float32(3.0)
    )
    u, noise = (np.asarray(terms[name], np.float64) for name in ("u", "noise"))
    assert np.all(u >= 0) and np.all(u < 1) and np.all(terms["x"] == 6.0)
    for power in range(1, 5):
        spread = np.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / num)
        assert abs(np.mean(u**power) - 1 / (power + 1)) < 5 * spread
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert np.max(np.abs(counts / num - 0.05)) < 5 * np.sqrt(0.05 * 0.95 / num)
    assert abs(np.corrcoef(u, noise)[0, 1]) < 5 / np.sqrt(num)


def test_raw_keys_are_refused():
    objective = diffusion.at_random_time(lambda key, params, x, u: {"u": u})
    with pytest.raises(TypeError, match="expected a typed key"):
        objective(jax.random.PRNGKey(0), vd.Params(), jnp.zeros(()))
    with pytest.raises(TypeError, match="expected a typed key"):
        terms_from(lambda key, params, x: {}, lambda key, params, x, u: None)(
            jax.random.PRNGKey(0), vd.Params(), jnp.zeros(()), jnp.zeros(())
        )


@every
def test_one_estimate_is_the_sum_of_terms_and_compiles_once(name, key):
    model = MODELS[name]()
    params, x = model.init(key), datum(name)
    traces = []

    def both(key, params, x):
        traces.append(1)
        return model.elbo_estimate(key, params, x), model.elbo_terms(key, params, x)

    run = toys.quick_jit(both)
    for seed in range(3):
        estimate, terms = run(jax.random.key(seed), params, x)
        assert float(estimate) == pytest.approx(sum(float(t) for t in terms.values()), rel=1e-5)
    assert len(traces) == 1
