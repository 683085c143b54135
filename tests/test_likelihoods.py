"""Every likelihood: its masses sum to one, its samples have its masses, its mean is the mean."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vdiff import likelihoods

SHAPE = (2,)
DISCRETE = {
    "bernoulli": (likelihoods.bernoulli(), 2),
    "categorical(3)": (likelihoods.categorical(3), 3),
    "categorical(2)": (likelihoods.categorical(2), 2),
    "discretized_logistic(2)": (likelihoods.discretized_logistic(2), 2),
    "discretized_logistic(5)": (likelihoods.discretized_logistic(5), 5),
}
GAUSSIAN = {"gaussian(0.3)": likelihoods.gaussian(0.3), "gaussian()": likelihoods.gaussian()}
EVERY = {name: likelihood for name, (likelihood, _) in DISCRETE.items()} | GAUSSIAN
every_discrete = pytest.mark.parametrize("name", DISCRETE)
every_gaussian = pytest.mark.parametrize("name", GAUSSIAN)
every = pytest.mark.parametrize("name", EVERY)


def output(likelihood, seed=0, scale=1.0, shape=SHAPE):
    """What a decoder might return."""
    rng = np.random.default_rng(seed)
    return jnp.asarray((scale * rng.normal(size=likelihood.out_shape(shape))).astype(np.float32))


def masses(likelihood, levels, out):
    """Every x of shape (2,), and its probability by log_prob."""
    xs = np.array(list(itertools.product(range(levels), repeat=2)), np.int32)
    return xs, np.exp(np.asarray(jax.vmap(likelihood.log_prob, in_axes=(None, 0))(out, xs), float))


@every_discrete
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_masses_sum_to_one(name, scale):
    likelihood, levels = DISCRETE[name]
    for seed in range(3):
        _, probability = masses(likelihood, levels, output(likelihood, seed, scale))
        # log_scale reaches -8 at scale 8, where the bins' edges are rounded by 3e-7 e^8.
        assert np.sum(probability) == pytest.approx(1.0, abs=2e-6 if scale == 1.0 else 1e-3)


@every_discrete
def test_samples_have_those_masses(name):
    """Frequencies of 100,000 draws; a probability wrong by 2 % of itself is 5 errors off where p > .4."""
    likelihood, levels = DISCRETE[name]
    num_draws = 100_000
    for seed in range(2):
        out = output(likelihood, seed)
        xs, probability = masses(likelihood, levels, out)
        draws = jax.vmap(likelihood.sample, in_axes=(0, None))(
            jax.random.split(jax.random.key(seed), num_draws), out
        )
        assert draws.dtype == jnp.int32 and draws.shape == (num_draws, *SHAPE)
        code = np.asarray(draws)[:, 0] * levels + np.asarray(draws)[:, 1]
        counts = np.bincount(code, minlength=levels**2)
        assert counts.sum() == num_draws and len(counts) == levels**2
        std_error = np.sqrt(num_draws * probability * (1 - probability))
        scores = np.abs(counts - num_draws * probability) / np.maximum(std_error, 1.0)
        assert np.max(scores) < 5.0, (scores, xs)


@every_discrete
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_mean_by_enumeration(name, scale):
    likelihood, levels = DISCRETE[name]
    out = output(likelihood, 5, scale)
    xs, probability = masses(likelihood, levels, out)
    np.testing.assert_allclose(likelihood.mean(out), probability @ xs, rtol=2e-5, atol=2e-5)


@every_gaussian
def test_gaussian_against_scipy(name):
    likelihood, rng = EVERY[name], np.random.default_rng(1)
    out, x = output(likelihood), rng.normal(size=SHAPE).astype(np.float32)
    loc = np.asarray(out, float) if name != "gaussian()" else np.asarray(out[..., 0], float)
    scale = 0.3 if name != "gaussian()" else np.exp(np.asarray(out[..., 1], float))
    exact = np.sum(scipy.stats.norm.logpdf(x.astype(float), loc, scale))
    assert float(likelihood.log_prob(out, jnp.asarray(x))) == pytest.approx(exact, rel=1e-6)
    np.testing.assert_array_equal(likelihood.mean(out), loc.astype(np.float32))


@every_gaussian
def test_gaussian_samples(name):
    """Mean, variance and their independence across pixels, of 100,000 draws."""
    likelihood, num_draws = EVERY[name], 100_000
    out = output(likelihood, 2)
    loc = np.asarray(out, float) if name != "gaussian()" else np.asarray(out[..., 0], float)
    scale = 0.3 if name != "gaussian()" else np.exp(np.asarray(out[..., 1], float))
    draws = jax.vmap(likelihood.sample, in_axes=(0, None))(
        jax.random.split(jax.random.key(2), num_draws), out
    )
    eps = (np.asarray(draws, float) - loc) / scale
    for sample, expected in ((eps, 0.0), (eps**2, 1.0), (eps**4, 3.0), (eps[:, :1] * eps[:, 1:], 0.0)):
        z = (np.mean(sample, axis=0) - expected) / (np.std(sample, axis=0) / np.sqrt(num_draws))
        assert np.max(np.abs(z)) < 5.0
    assert draws.dtype == jnp.float32


@every
def test_gradients_at_80(name):
    """At outputs of +-80 the gradient of log_prob is that of finite differences, or of its closed form."""
    likelihood = EVERY[name]
    for loc in (-80.0, 80.0):
        for level in (0, 1):
            x = jnp.full(SHAPE, level, jnp.float32 if name in GAUSSIAN else jnp.int32)
            out = jnp.full(likelihood.out_shape(SHAPE), 1.0)
            out = out.at[..., 0].set(loc) if out.ndim == 2 else jnp.full(SHAPE, loc)
            gradient = np.asarray(jax.grad(likelihood.log_prob)(out, x))
            if name == "bernoulli":
                exact = np.full(SHAPE, level - (loc > 0))
            elif name.startswith("categorical"):
                exact = np.eye(out.shape[-1])[level] - np.asarray(jax.nn.softmax(out))
            elif name == "gaussian(0.3)":
                exact = np.full(SHAPE, (level - loc) / 0.09)
            elif name == "gaussian()":
                residual = (level - loc) * np.exp(-1.0)
                exact = np.broadcast_to([residual * np.exp(-1.0), residual**2 - 1], (2, 2))
            else:
                # Far below the lowest bin, log P(0) is flat, and every other mass falls like exp(loc / scale).
                slope, at_edge = np.exp(-1.0), level == (0 if loc < 0 else 1)
                if name == "discretized_logistic(5)" and loc > 0:
                    at_edge = False
                assert np.all(np.isfinite(gradient))
                expected = 0.0 if at_edge else (slope if loc < 0 else -slope)
                np.testing.assert_allclose(gradient[..., 0], expected, rtol=1e-5, atol=1e-6)
                continue
            np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-30)


@every
def test_out_shape_and_embed(name):
    likelihood = EVERY[name]
    trailing = {"bernoulli": (), "gaussian(0.3)": (), "gaussian()": (2,)}.get(
        name, (DISCRETE[name][1],) if name.startswith("categorical") else (2,)
    )
    assert likelihood.out_shape((28, 28, 1)) == (28, 28, 1, *trailing)
    assert likelihood.out_shape(()) == trailing
    if name in GAUSSIAN:
        x = jnp.array([-0.3, 2.5])
        np.testing.assert_array_equal(likelihood.embed(x), x)
        return
    levels = DISCRETE[name][1]
    for dtype in (jnp.int32, jnp.uint8):
        embedded = likelihood.embed(jnp.arange(levels, dtype=dtype))
        np.testing.assert_allclose(embedded, np.linspace(-1, 1, levels), atol=1e-6)
        assert embedded.dtype == jnp.float32


def test_embed_has_the_units_of_the_discretized_logistic():
    """A narrow logistic at embed(k) puts its mass on k."""
    likelihood = likelihoods.discretized_logistic(17)
    k = jnp.arange(17)
    out = jnp.stack([likelihood.embed(k), jnp.full(17, -6.0)], axis=-1)
    assert float(likelihood.log_prob(out, k)) == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(likelihood.mean(out), k, atol=1e-4)
    np.testing.assert_array_equal(likelihood.sample(jax.random.key(0), out), k)


@every
@pytest.mark.parametrize("shape", [(), (2, 3, 1)])
def test_any_shape_of_x(name, shape):
    """Log p of an array is the sum over its pixels; sample and mean have its shape."""
    likelihood = EVERY[name]
    out = output(likelihood, 3, shape=shape)
    x = likelihood.sample(jax.random.key(1), out)
    assert x.shape == shape and likelihood.mean(out).shape == shape
    size = int(np.prod(shape))
    rows = out.reshape(size, *likelihood.out_shape(()))
    one_by_one = sum(float(likelihood.log_prob(rows[i], x.reshape(size)[i])) for i in range(size))
    value = likelihood.log_prob(out, x)
    assert value.shape == () and float(value) == pytest.approx(one_by_one, rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
@every_discrete
def test_integer_dtypes_agree(name, dtype):
    likelihood, levels = DISCRETE[name]
    out, x = output(likelihood), jnp.array([0, levels - 1])
    assert float(likelihood.log_prob(out, x.astype(dtype))) == pytest.approx(
        float(likelihood.log_prob(out, x))
    )


@pytest.mark.parametrize("levels", [-1, 0, 1])
@pytest.mark.parametrize("factory", [likelihoods.categorical, likelihoods.discretized_logistic])
def test_fewer_than_two_levels_are_refused(factory, levels):
    with pytest.raises(ValueError, match=f"levels: got {levels}, expected at least 2; count the values"):
        factory(levels)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match="scale: got .*, expected a positive number, or None to learn it"):
        likelihoods.gaussian(scale)


def test_one_hot_is_the_categorical_written_otherwise():
    """The same masses, draws and mean of codes as of their numbers; linear in a soft x; other lengths are refused."""
    codes, numbers = likelihoods.one_hot(3), likelihoods.categorical(3)
    out = output(numbers, 4)
    assert codes.out_shape((2, 3)) == (2, 3)
    xs, probability = masses(numbers, 3, out)
    log_prob = jax.vmap(codes.log_prob, in_axes=(None, 0))(out, jnp.asarray(np.eye(3, dtype=np.int32)[xs]))
    np.testing.assert_allclose(np.exp(log_prob), probability, rtol=1e-5)
    soft = jnp.asarray(np.eye(3, dtype=np.float32)[xs[[2, 7]]].mean(0))
    assert float(codes.log_prob(out, soft)) == pytest.approx(
        float(log_prob[jnp.array([2, 7])].mean()), rel=1e-5
    )
    np.testing.assert_allclose(codes.mean(out), jax.nn.softmax(out), rtol=1e-6)
    np.testing.assert_array_equal(codes.embed(jnp.eye(3, dtype=jnp.int32)), np.eye(3, dtype=np.float32))
    keys = jax.random.split(jax.random.key(0), 200)
    drawn, index = (jax.vmap(of.sample, in_axes=(0, None))(keys, out) for of in (codes, numbers))
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(jnp.argmax(drawn, axis=-1), index)
    np.testing.assert_array_equal(jnp.sum(drawn, axis=-1), 1)
    with pytest.raises(ValueError, match=r"out: got shape \(2, 3\), expected a last axis of 4"):
        likelihoods.one_hot(4).log_prob(out, xs)
    with pytest.raises(ValueError, match="levels: got 1"):
        likelihoods.one_hot(1)
