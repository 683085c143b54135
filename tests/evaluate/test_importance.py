"""Importance sampling against closed forms, enumeration and NumPy in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import vdiff as vd
from vdiff.evaluate.psis import tail_size

A = np.array([[0.9, -0.4], [0.3, 0.8], [-0.5, 0.6]])
OFFSET = np.array([0.2, -0.1, 0.4])
SCALE = 0.7
X = np.array([0.8, -0.6, 1.1], np.float32)


def exact_log_prob(x=X):
    """x = A z + offset + scale eps, z ~ N(0, I): a Gaussian."""
    return scipy.stats.multivariate_normal(OFFSET, A @ A.T + SCALE**2 * np.eye(3)).logpdf(x)


def posterior():
    precision = np.eye(2) + A.T @ A / SCALE**2
    loc = np.linalg.solve(precision, A.T @ (X - OFFSET)) / SCALE**2
    return loc, np.linalg.inv(precision)


def linear_gaussian(widen=1.0, shift=0.0):
    """The model with q = the posterior at X, its scales widened and its mean shifted; z is a dictionary."""
    loc, covariance = posterior()
    loc, factor = jnp.asarray(loc + shift, jnp.float32), np.linalg.cholesky(covariance) * widen
    factor, inverse = jnp.asarray(factor, jnp.float32), jnp.asarray(np.linalg.inv(factor), jnp.float32)
    log_det = float(np.log(np.abs(np.linalg.det(np.asarray(factor, np.float64)))))
    a, offset = jnp.asarray(A, jnp.float32), jnp.asarray(OFFSET, jnp.float32)

    def normal(residual):
        return jnp.sum(jax.scipy.stats.norm.logpdf(residual))

    return vd.Model(
        init=lambda key: vd.Params(),
        log_joint=lambda params, x, z: (
            normal(z["z"]) + normal((x - a @ z["z"] - offset) / SCALE) - 3 * np.log(SCALE)
        ),
        log_q=lambda params, x, z: normal(inverse @ (z["z"] - loc)) - log_det,
        sample_q=lambda key, params, x: {"z": loc + factor @ jax.random.normal(key, (2,))},
        sample=lambda key, params: (_ for _ in ()).throw(NotImplementedError),
    )


def estimates(model, num_samples, num_keys, *, chunk_size=100, seed=0, x=X):
    """num_keys independent estimates at one datum, float64."""
    evaluator = vd.importance_log_prob(model, num_samples, chunk_size)
    keys = jax.random.split(jax.random.key(seed), num_keys)
    out = jax.jit(jax.vmap(evaluator, in_axes=(0, None, None)))(keys, vd.Params(), jnp.asarray(x))
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), out)


def z_score(values, expected):
    return (values.mean() - expected) / (values.std(ddof=1) / np.sqrt(len(values)))


@pytest.mark.parametrize(("num_samples", "chunk_size"), [(1, 100), (3, 2), (7, 7), (10, 4), (25, 1)])
def test_the_mean_weight_is_unbiased_whatever_the_chunks(num_samples, chunk_size):
    """E exp(value) = p(x) exactly, at any K; the standard error is below 1 %."""
    out = estimates(linear_gaussian(1.3, 0.3), num_samples, 20_000, chunk_size=chunk_size)
    ratio = np.exp(out.value - exact_log_prob())
    assert ratio.std() / np.sqrt(len(ratio)) < 0.01
    assert abs(z_score(ratio, 1.0)) < 5


@pytest.mark.parametrize("chunk_size", [100, 4000, 10_000, 333])
def test_value_and_std_error_are_calibrated(chunk_size):
    """At K = 4,000 value is exact within its std_error, and the spread over 400 keys is that std_error."""
    out = estimates(linear_gaussian(1.3, 0.3), 4000, 400, chunk_size=chunk_size)
    z = (out.value - exact_log_prob()) / out.std_error
    assert abs(z.mean()) * np.sqrt(400) < 5  # the bias of the logarithm is 1 % of a std_error here
    # The spread of a standard deviation over n keys is 1 / sqrt(2 n): 3.5 %.
    assert abs(z.std(ddof=1) - 1) * np.sqrt(2 * 400) < 5
    assert abs(out.value.std(ddof=1) / out.std_error.mean() - 1) * np.sqrt(2 * 400) < 5
    # sum w^2 / (sum w)^2 is 1 / ess by definition: the two fields tell one story.
    spread = np.sqrt((1 / out.ess - 1 / 4000) * 4000 / 3999)
    np.testing.assert_allclose(out.std_error, spread, rtol=1e-3)


@pytest.mark.parametrize(("num_samples", "chunk_size"), [(10, 4), (12, 4), (5, 100), (1, 1), (9, 8)])
def test_against_numpy_on_the_same_draws(num_samples, chunk_size):
    """Chunk i draws with fold_in(key, i); of the last chunk only what is missing to K counts.

    Over ten keys, so that the largest weight comes in the first chunk and in later ones.
    """
    model, params, x = linear_gaussian(1.4, 0.5), vd.Params(), jnp.asarray(X)
    evaluator = vd.importance_log_prob(model, num_samples, chunk_size)
    size = min(chunk_size, num_samples)

    def log_weight(key):
        z = model.sample_q(key, params, x)
        return model.log_joint(params, x, z) - model.log_q(params, x, z)

    def log_weights(key):
        chunks = [jax.random.fold_in(key, i) for i in range(-(-num_samples // size))]
        keys = jnp.concatenate([jax.random.split(chunk, size) for chunk in chunks])
        return jax.vmap(log_weight)(keys[:num_samples])

    keys = jax.random.split(jax.random.key(11), 10)
    out = jax.jit(jax.vmap(lambda key: evaluator(key, params, x)))(keys)
    log_w = np.asarray(jax.jit(jax.vmap(log_weights))(keys), np.float64)
    value = scipy.special.logsumexp(log_w, axis=1) - np.log(num_samples)
    w = np.exp(log_w - value[:, None]) / num_samples  # sums to one
    np.testing.assert_allclose(out.value, value, rtol=3e-6)
    np.testing.assert_allclose(out.ess, 1 / np.sum(w**2, axis=1), rtol=1e-5)
    if num_samples == 1:
        assert np.all(np.isposinf(out.std_error))
    else:
        std_error = np.std(num_samples * w, axis=1, ddof=1) / np.sqrt(num_samples)
        np.testing.assert_allclose(out.std_error, std_error, rtol=1e-4)


def test_at_the_posterior_every_weight_is_the_answer():
    out = estimates(linear_gaussian(), 5000, 20, chunk_size=300)
    np.testing.assert_allclose(out.value, exact_log_prob(), rtol=2e-6)
    np.testing.assert_allclose(out.ess, 5000, rtol=1e-4)
    assert np.all(out.std_error < 1e-4)


def test_more_draws_are_tighter_from_below():
    means = [estimates(linear_gaussian(1.6, 0.8), k, 4000, seed=k).value for k in (1, 20)]
    for lower, upper in zip(means, [*means[1:], np.full(4000, exact_log_prob())], strict=True):
        gap = upper.mean() - lower.mean()
        assert gap > 5 * np.sqrt((upper.var() + lower.var()) / 4000)


def weights_by_index(log_weights):
    """A model whose draws are integers and whose log-weights are looked up: any pattern of weights."""
    table = jnp.asarray(log_weights, jnp.float32)
    num = len(log_weights)
    return vd.Model(
        init=lambda key: vd.Params(),
        log_joint=lambda params, x, z: table[z] - jnp.log(float(num)),
        log_q=lambda params, x, z: -jnp.log(float(num)) * jnp.ones(()),
        sample_q=lambda key, params, x: jax.random.randint(key, (), 0, num),
        sample=lambda key, params: (_ for _ in ()).throw(NotImplementedError),
    )


def test_weights_of_zero_count_as_draws():
    """Half of the draws have weight zero: the mean is halved, and a first chunk of zeros alone does no harm."""
    out = estimates(weights_by_index([-np.inf, 0.0]), 6, 4000, chunk_size=2)
    ones = np.round(6 * np.exp(out.value))  # how many of the six draws had weight one
    np.testing.assert_allclose(np.exp(out.value), ones / 6, atol=1e-6)
    assert abs(z_score(ones, 3.0)) < 5
    assert set(ones) == set(range(7))
    some = ones > 0
    np.testing.assert_allclose(out.ess[some], ones[some], rtol=1e-6)
    expected = np.sqrt((1 / ones[some] - 1 / 6) * 6 / 5)
    np.testing.assert_allclose(out.std_error[some], expected, rtol=1e-4, atol=1e-3)
    assert np.all(np.isneginf(out.value[~some]))


def test_huge_log_weights_neither_overflow_nor_vanish():
    """Log-weights of thousands, rising and falling from chunk to chunk: only their differences matter."""
    model = weights_by_index([0.0, 1.0, -300.0])
    shifted = model._replace(log_joint=lambda params, x, z: model.log_joint(params, x, z) + x)
    evaluator = vd.importance_log_prob(shifted, 300, 7)
    bases, keys = jnp.array([-5000.0, 5000.0]), jax.random.split(jax.random.key(0), 50)
    over_keys = jax.vmap(evaluator, in_axes=(0, None, None))
    out = jax.jit(jax.vmap(over_keys, in_axes=(None, None, 0)))(keys, vd.Params(), bases)
    expected = np.asarray(bases)[:, None] + np.log((1 + np.e) / 3)
    se = np.sqrt(((1 + np.e**2) / 3 / ((1 + np.e) / 3) ** 2 - 1) / 300)
    assert np.all(np.abs(out.value - expected) < 5 * se + 1e-3)  # float32 resolves 5e-4 at 5000
    np.testing.assert_allclose(np.mean(out.std_error, axis=1), se, rtol=0.05)


def test_discrete_latents():
    """Three of five bits each, by enumeration; q is off, so the weights are not equal."""
    prior, q = np.array([0.4, -1.0, 0.2]), np.array([0.0, -0.3, 0.6])
    effect = np.array([1.0, 2.0, -1.5])

    def bits(logits, z):
        return jnp.sum(jnp.where(z, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)))

    def as_float(values):
        return jnp.asarray(values, jnp.float32)

    model = vd.Model(
        init=lambda key: vd.Params(),
        log_joint=lambda params, x, z: (
            bits(as_float(prior), z)
            + jax.scipy.stats.norm.logpdf(x, jnp.sum(jnp.where(z, as_float(effect), 0.0)))
        ),
        log_q=lambda params, x, z: bits(as_float(q), z),
        sample_q=lambda key, params, x: jax.random.bernoulli(key, jax.nn.sigmoid(as_float(q))),
        sample=lambda key, params: (_ for _ in ()).throw(NotImplementedError),
    )
    x, total = np.float32(0.7), 0.0
    for index in np.ndindex(2, 2, 2):
        z = np.array(index)
        p = np.prod(np.where(z, scipy.special.expit(prior), scipy.special.expit(-prior)))
        total += p * scipy.stats.norm.pdf(x, np.sum(z * effect))
    ratio = np.exp(estimates(model, 5, 20_000, x=x).value) / total
    assert ratio.std() / np.sqrt(len(ratio)) < 0.01
    assert abs(z_score(ratio, 1.0)) < 5


@pytest.mark.parametrize(
    ("num_samples", "chunk_size", "name"), [(0, 10, "num_samples"), (5, 0, "chunk_size")]
)
def test_numbers_below_one_are_refused(num_samples, chunk_size, name):
    with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
        vd.importance_log_prob(linear_gaussian(), num_samples, chunk_size)


def test_a_raw_key_is_refused():
    with pytest.raises(TypeError, match=r"expected a typed key"):
        vd.importance_log_prob(linear_gaussian(), 3)(jax.random.PRNGKey(0), vd.Params(), jnp.asarray(X))


def small_vae():
    """A VAE with layers of odd widths, to find them in the compiled program: 517 encodes, 523 decodes."""
    return vd.vae(
        vd.nets.mlp((9,), (4,), hidden=(517,)),
        vd.nets.mlp((2,), (9,), hidden=(523,)),
        latent_dim=2,
        likelihood=vd.likelihoods.bernoulli(),
    )


def compiled(model, num_samples, num_data=6):
    evaluator = jax.vmap(vd.importance_log_prob(model, num_samples, 10), in_axes=(0, None, 0))
    params = jax.eval_shape(model.init, jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_data))
    data = jax.ShapeDtypeStruct((num_data, 9), jnp.int32)
    return jax.jit(evaluator).lower(keys, params, data).compile()


def test_memory_does_not_grow_with_the_draws():
    model = small_vae()
    few, many = (compiled(model, k).memory_analysis().temp_size_in_bytes for k in (1_000, 100_000))
    # Four bytes a chunk, its index, and the largest weights, for k-hat: some 3 sqrt(K) a datum.
    assert 0 < many <= few + 4 * (100_000 - 1_000) // 10 + 6 * 8 * (tail_size(100_000) - tail_size(1_000))
    # All draws at once would take, for the decoder's hidden layer alone, more than ten times that.
    assert few < 6 * 1_000 * 523 * 4 / 5


def test_the_encoder_runs_once_per_datum():
    """In the compiled program no product with the encoder's width is inside the loop over chunks."""
    text = compiled(small_vae(), 1_000).as_text()
    computations = {}
    for block in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text):
        name = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", block)
        if name:
            computations[name.group(1)] = block
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert bodies
    inside, found = set(), list(bodies)
    while found:
        name = found.pop()
        inside.add(name)
        called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", computations[name])
        found += [other for other in called if other not in inside]
    in_loop = "\n".join(computations[name] for name in inside)
    outside = "\n".join(block for name, block in computations.items() if name not in inside)
    products = r"= f32\[[\d,]*\b{width}\b[\d,]*\]\S* (?:dot|custom-call|fusion|convolution)\("
    assert re.search(products.format(width=523), in_loop)  # the decoder's are: the search can find them
    assert re.search(products.format(width=517), outside)
    assert not re.search(r"\[[\d,]*\b517\b[\d,]*\]", in_loop)  # not as an operand either
