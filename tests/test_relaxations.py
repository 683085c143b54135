"""Perturbed logits: their laws against SciPy's, y given z against the law of y, derivatives, and the far tails."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests import toys
from vdiff import relaxations

LOGITS = np.array([[-1.2, 0.4, 2.0], [0.3, -0.5, 1.0]], np.float32)
NUM_DRAWS = 40_000
RELAXATIONS = {"bernoulli": relaxations.bernoulli, "one_hot": relaxations.one_hot}
every_relaxation = pytest.mark.parametrize("name", RELAXATIONS)


def support(name, shape=LOGITS.shape):
    """Every z of a shape, [n, *shape] float32."""
    if name == "bernoulli":
        bits = itertools.product([0.0, 1.0], repeat=int(np.prod(shape)))
        return np.array(list(bits), np.float32).reshape(-1, *shape)
    rows = itertools.product(np.eye(shape[-1]), repeat=int(np.prod(shape[:-1])))
    return np.array(list(rows), np.float32).reshape(-1, *shape)


def probabilities(name):
    """E z, float64."""
    logits = LOGITS.astype(np.float64)
    if name == "bernoulli":
        return 1 / (1 + np.exp(-logits))
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def law(name, loc=0.0):
    """SciPy's law of y."""
    return (scipy.stats.logistic if name == "bernoulli" else scipy.stats.gumbel_r)(loc=loc)


@functools.cache
def draws(name):
    """Draw y, and apart from it z of its law and y given z; each [N, 2, 3]."""
    of = RELAXATIONS[name]

    def one(key):
        keys = jax.random.split(key, 3)
        if name == "bernoulli":
            z = jax.random.bernoulli(keys[1], jax.nn.sigmoid(LOGITS)).astype(jnp.float32)
        else:
            z = jax.nn.one_hot(jax.random.categorical(keys[1], LOGITS), 3, dtype=jnp.float32)
        y = of.perturb(keys[0], jnp.asarray(LOGITS))
        given = of.condition(keys[2], jnp.asarray(LOGITS), z)
        return y, of.harden(y), z, given, of.harden(given)

    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    return jax.device_get(toys.quick_jit(jax.vmap(one))(keys))


def flat(draws):
    return np.asarray(draws, np.float64).reshape(len(draws), -1)


def ks(sample, distribution):
    """The two-sided p-value as a z-score."""
    return -scipy.stats.norm.ppf(scipy.stats.kstest(sample, distribution.cdf).pvalue / 2)


@every_relaxation
def test_a_hard_draw_has_the_probability_of_its_logits(name):
    _, hard, *_ = draws(name)
    assert set(np.unique(hard)) == {0.0, 1.0}
    assert np.max(toys.z_scores(flat(hard), probabilities(name).ravel())) < 5.0
    # Elements of different rows, and for bits of one row too, are independent.
    pairs = hard[:, 0, :, None] * hard[:, 1, None, :]
    expected = probabilities(name)[0][:, None] * probabilities(name)[1][None, :]
    assert np.max(toys.z_scores(flat(pairs), expected.ravel())) < 5.0


@every_relaxation
@pytest.mark.parametrize("which", ["perturb", "condition"])
def test_perturbed_logits_have_their_law(name, which):
    """Drawn at once, and drawn given a z of its own law: moments, a KS test on each coordinate, each difference."""
    y = draws(name)[0 if which == "perturb" else 3].astype(np.float64)
    centred = flat(y - LOGITS)
    exact = law(name)
    for order in (1, 2, 3):
        assert np.max(toys.z_scores(centred**order, np.full(6, exact.moment(order)))) < 5.0, order
    products = centred[:, :, None] * centred[:, None, :]
    independent = np.full((6, 6), exact.mean() ** 2) + np.eye(6) * exact.var()
    assert np.max(toys.z_scores(flat(products), independent.ravel())) < 5.0
    assert all(ks(column, exact) < 5.0 for column in centred.T)
    if name == "one_hot":  # where z ties the coordinates of a row together
        for i, j in itertools.combinations(range(3), 2):
            assert ks(centred[:, i] - centred[:, j], scipy.stats.logistic) < 5.0
        assert ks(y[:, 0].max(axis=-1), law(name, np.logaddexp.reduce(LOGITS[0].astype(float)))) < 5.0


@every_relaxation
def test_a_draw_given_z_hardens_to_z(name):
    _, _, z, _, hard = draws(name)
    np.testing.assert_array_equal(hard, z)


@pytest.mark.parametrize("which", [0, 1])
def test_a_draw_given_z_hardens_to_z_also_in_a_tie(monkeypatch, which):
    """The rest's noise 21 above the top's, once in a billion draws: to float32 both are the top."""
    noise = {(1,): -4.4, (2,): 16.6}
    monkeypatch.setattr(jax.random, "gumbel", lambda key, shape, dtype: jnp.full(shape, noise[shape], dtype))
    for shift in (0.0, 80.0, -80.0, 4.4):
        z = jnp.eye(2)[which]
        y = relaxations.one_hot.condition(jax.random.key(0), jnp.full(2, shift), z)
        np.testing.assert_array_equal(relaxations.one_hot.harden(y), z)
        assert np.ptp(y) < 1e-4


@every_relaxation
def test_log_prob_sums_to_one(name):
    z = support(name)
    of = RELAXATIONS[name].log_prob
    log_p = np.asarray(jax.vmap(of, in_axes=(None, 0))(jnp.asarray(LOGITS), jnp.asarray(z)), np.float64)
    assert np.sum(np.exp(log_p)) == pytest.approx(1.0, rel=1e-5)
    mean = np.tensordot(np.exp(log_p), z, axes=1)
    np.testing.assert_allclose(mean, probabilities(name), rtol=1e-5)
    as_ints = jax.vmap(of, in_axes=(None, 0))(jnp.asarray(LOGITS), jnp.asarray(z, jnp.int32))
    np.testing.assert_array_equal(as_ints, log_p.astype(np.float32))
    # A soft z: linear between its corners.
    middle = of(jnp.asarray(LOGITS), jnp.asarray(0.25 * z[0] + 0.75 * z[-1]))
    assert float(middle) == pytest.approx(0.25 * log_p[0] + 0.75 * log_p[-1], rel=1e-5)


@every_relaxation
def test_log_density_is_scipys_and_integrates_to_one(name):
    y, *_ = draws(name)
    of = jax.jit(jax.vmap(RELAXATIONS[name].log_density, in_axes=(None, 0)))
    expected = law(name).logpdf(y[:100].astype(np.float64) - LOGITS).sum(axis=(1, 2))
    np.testing.assert_allclose(of(jnp.asarray(LOGITS), y[:100]), expected, rtol=1e-5)
    # 60 to either side: the logistic's tails hold 2e-25 more.
    grid = np.linspace(-60.0, 60.0, 4001, dtype=np.float32)[:, None]
    log_p = of(jnp.array([0.7]), jnp.asarray(grid))
    assert np.trapezoid(np.exp(np.asarray(log_p, np.float64)), grid[:, 0]) == pytest.approx(1.0, abs=1e-5)


@every_relaxation
def test_derivatives_by_the_logits_are_finite_differences(name):
    """Of perturb and condition at every z, key by key, float64: the noise is drawn from the same key."""
    of, z = RELAXATIONS[name], support(name, (3,))
    logits, step = LOGITS[0].astype(np.float64), 1e-5
    keys = jax.random.split(jax.random.key(1), 20)

    def both(eta, key, z):
        return of.perturb(key, eta), of.condition(key, eta, z)

    def run(eta, z):
        at = jax.vmap(jax.vmap(both, in_axes=(None, 0, None)), in_axes=(None, None, 0))
        columns = [
            jax.tree.map(
                lambda a, b: (a - b) / (2 * step), at(eta + step * e, keys, z), at(eta - step * e, keys, z)
            )
            for e in jnp.eye(3, dtype=eta.dtype)
        ]
        by_differences = jax.tree.map(lambda *c: jnp.stack(c, axis=-1), *columns)
        jacobian = jax.vmap(jax.vmap(jax.jacrev(both), in_axes=(None, 0, None)), in_axes=(None, None, 0))
        return jacobian(eta, keys, z), by_differences

    exact, by_differences = toys.in_float64(run, logits, z)
    for one, other in zip(exact, by_differences, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8)
    assert np.max(np.abs(exact[1])) > 0.1


FAR = [[80.0, -80.0], [-80.0, 80.0], [20.0, -20.0], [-20.0, 20.0], [80.0, 80.0], [-80.0, -80.0], [80.0, 20.0]]


def every_field(name, key, logits, z):
    """Each field's values and the gradients of their sums, by the logits and by y."""
    of, keys = RELAXATIONS[name], jax.random.split(key)
    fields = {
        "perturb": lambda eta: of.perturb(keys[0], eta),
        "soften": lambda eta: of.soften(of.perturb(keys[0], eta), 0.1),
        "condition": lambda eta: of.condition(keys[1], eta, z),
        "soften given z": lambda eta: of.soften(of.condition(keys[1], eta, z), 0.1),
        "log_prob": lambda eta: of.log_prob(eta, z),
        "log_density": lambda eta: of.log_density(eta, of.perturb(keys[0], eta)),
        "log_density given z": lambda eta: of.log_density(eta, of.condition(keys[1], eta, z)),
    }
    found = {name: (f(logits), jax.jacrev(f)(logits)) for name, f in fields.items()}
    by_y = jax.grad(of.log_density, argnums=1)(logits, of.condition(keys[1], logits, z))
    return found | {"by y": by_y, "hard given z": of.harden(of.condition(keys[1], logits, z))}


@functools.cache
def compiled(name):
    over_keys = jax.vmap(functools.partial(every_field, name), in_axes=(0, None, None))
    over_z = jax.vmap(over_keys, in_axes=(None, None, 0))
    return toys.quick_jit(jax.vmap(over_z, in_axes=(None, 0, None)))


@every_relaxation
def test_finite_in_the_far_tails(name):
    """Logits of +-20 and +-80, every z, the all but impossible one too: values and gradients of every field."""
    z = support(name, (2,))
    found = jax.device_get(compiled(name)(jax.random.split(jax.random.key(2), 300), jnp.array(FAR), z))
    for field, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert np.all(np.isfinite(leaf)), field
    np.testing.assert_array_equal(
        found["hard given z"], np.broadcast_to(z[None, :, None], found["hard given z"].shape)
    )


@every_relaxation
def test_gradients_in_the_far_tails_are_those_of_float64(name):
    """Not only finite: the y that an improbable z draws, and its derivative, from the same uniforms."""
    if name == "bernoulli":
        u, eta = np.array([1e-6, 0.3, 0.999]), np.array([-80.0, -20.0, 0.0, 20.0, 80.0])
        u, eta = (v.ravel() for v in np.meshgrid(u, eta))
        for z in (0.0, 1.0):
            p_z = np.longdouble(1) / (1 + np.exp(-(2 * z - 1) * eta.astype(np.longdouble)))
            # The quantile of y beyond zero, in the tail where it does not cancel; then by the implicit function.
            tail = p_z * (1 - u)
            y = (2 * z - 1) * ((2 * z - 1) * eta + np.log1p(-tail) - np.log(tail))
            got, slope = _condition_at(u.astype(np.float32), eta.astype(np.float32), z)
            np.testing.assert_allclose(got, y.astype(float), rtol=2e-5)
            step = np.longdouble(1e-6)
            ends = []
            for moved in (eta + step, eta - step):
                p_z = 1 / (1 + np.exp(-(2 * z - 1) * moved))
                tail = p_z * (1 - u)
                ends.append((2 * z - 1) * ((2 * z - 1) * moved + np.log1p(-tail) - np.log(tail)))
            np.testing.assert_allclose(slope, ((ends[0] - ends[1]) / (2 * step)).astype(float), atol=2e-5)
        return
    # one_hot: the top moves with the sum, by softmax; a free element that is far below it moves alone.
    logits, key = jnp.array([80.0, -80.0, 79.0]), jax.random.key(0)
    for which in range(3):
        z = jnp.eye(3)[which]
        slope = jax.jacrev(lambda eta, z=z: relaxations.one_hot.condition(key, eta, z))(logits)
        softmax = np.exp([0.0, -160.0, -1.0]) / np.exp([0.0, -160.0, -1.0]).sum()
        np.testing.assert_allclose(slope[which], softmax, atol=1e-6)
        np.testing.assert_allclose(slope.sum(axis=1), 1.0, rtol=1e-5)
        if which != 1:
            np.testing.assert_allclose(slope[1], [0.0, 1.0, 0.0], atol=1e-6)


def _condition_at(u, logits, z):
    """y and dy/dl of bits, from the given uniforms."""
    original = relaxations._open_uniform
    relaxations._open_uniform = lambda key, like: jnp.asarray(u)
    try:
        of = functools.partial(relaxations.bernoulli.condition, jax.random.key(0))
        z = jnp.full(logits.shape, z)
        return of(jnp.asarray(logits), z), jax.grad(lambda eta: jnp.sum(of(eta, z)))(jnp.asarray(logits))
    finally:
        relaxations._open_uniform = original


@pytest.mark.parametrize("z", [0.0, 1.0])
def test_the_ends_of_the_uniform(z):
    """The least and the largest number that a draw of U(0, 1) can give: finite, and on the side of z."""
    info = jnp.finfo(jnp.float32)
    for u in (info.tiny, 1.0 - info.epsneg):
        logits = np.array([-80.0, -20.0, 0.0, 20.0, 80.0], np.float32)
        y, slope = _condition_at(np.full(5, u, np.float32), logits, z)
        assert np.all(np.isfinite(y)) and np.all(np.isfinite(slope))
        np.testing.assert_array_equal(relaxations.bernoulli.harden(y), z)


@every_relaxation
def test_a_soft_draw_tends_to_the_hard_one(name):
    """The largest distance falls with the temperature, to nothing where y is not within .02 of a tie."""
    of, y = RELAXATIONS[name], draws(name)[0]
    ordered = np.sort(y, axis=-1)
    gap = np.abs(y) if name == "bernoulli" else (ordered[..., -1:] - ordered[..., -2:-1]) + 0 * y
    y = y[gap.min(axis=(1, 2)) > 0.02][:1000]
    distances = [np.max(np.abs(of.soften(y, t) - of.harden(y))) for t in (1.0, 0.1, 0.01, 0.001)]
    assert distances == sorted(distances, reverse=True) and distances[0] > 0.3 and distances[-1] < 1e-6
    soft = np.asarray(of.soften(y, 0.5))
    assert 0 <= soft.min() and soft.max() <= 1
    if name == "one_hot":
        np.testing.assert_allclose(soft.sum(axis=-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("bernoulli", ()), ("bernoulli", (2, 2, 3)), ("one_hot", (4,)), ("one_hot", (2, 2, 3))],
)
def test_other_shapes(name, shape):
    """Every field keeps the shape; densities are summed over all of it, the categories of one_hot on the last axis."""
    of = RELAXATIONS[name]

    @toys.quick_jit
    def run(key):
        logits = jax.random.normal(key, shape)
        y = of.perturb(key, logits)
        z = of.harden(y)
        given = of.condition(key, logits, z)
        rows = [leaf.reshape(-1, shape[-1]) if shape else leaf.reshape(1, 1) for leaf in (logits, y, z)]
        by_row = jax.vmap(lambda eta, y, z: (of.log_density(eta, y), of.log_prob(eta, z)))(*rows)
        whole = of.log_density(logits, y), of.log_prob(logits, z)
        return (y, z, of.harden(given), given, of.soften(y, 0.5)), whole, by_row

    leaves, whole, by_row = run(jax.random.key(3))
    assert all(leaf.shape == shape and leaf.dtype == jnp.float32 for leaf in leaves)
    np.testing.assert_array_equal(leaves[1], leaves[2])
    np.testing.assert_allclose(whole, np.sum(np.asarray(by_row), axis=1), rtol=1e-5)


def test_a_key_per_leaf():
    tree = {"a": jnp.zeros(2), "b": (jnp.zeros(()), jnp.zeros(3))}
    keys = relaxations.key_per_leaf(jax.random.key(0), tree)
    assert jax.tree.structure(keys) == jax.tree.structure(tree)
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in jax.tree.leaves(keys)}) == 3


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan")])
def test_temperatures_that_are_not_positive_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature: got .*, expected a positive number; .* 0.5"):
        relaxations.check_temperature(temperature)
    relaxations.check_temperature(1)
    relaxations.check_temperature(jnp.float32(0.5))
