"""A whole data set: every datum with its own key, whatever the batches, compiled once."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import vdiff as vd

NUM_DATA = 23
DATA = np.random.default_rng(1).normal(size=(NUM_DATA, 3)).astype(np.float32)
PARAMS = vd.Params(theta=jnp.asarray([0.5, -1.0, 2.0]))


def noisy(key, params, x):
    """A pytree of results, each a function of the datum's own key."""
    noise = jax.random.normal(key)
    return {"dot": x @ params.theta + noise, "pair": (x, noise)}


def expected(key):
    keys = [jax.random.fold_in(key, n) for n in range(NUM_DATA)]
    noise = np.array([float(jax.random.normal(k)) for k in keys])
    return DATA.astype(np.float64) @ np.asarray(PARAMS.theta, np.float64) + noise, noise


@pytest.mark.parametrize("batch_size", [1, 7, NUM_DATA, 100])
def test_a_datum_gets_its_own_key_whatever_the_batch(key, batch_size):
    out = vd.evaluate.evaluate(noisy, key, PARAMS, DATA, batch_size=batch_size)
    dot, noise = expected(key)
    assert set(out) == {"dot", "pair"} and all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(out))
    np.testing.assert_allclose(out["dot"], dot, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out["pair"][0], DATA)
    np.testing.assert_allclose(out["pair"][1], noise, rtol=1e-6)


def test_rows_are_judged_as_an_array_is_and_read_batch_by_batch(key):
    asked = []
    rows = vd.data.Rows(DATA.shape, DATA.dtype, lambda indices: asked.append(len(indices)) or DATA[indices])
    out = vd.evaluate.evaluate(noisy, key, PARAMS, rows[:20], batch_size=7)
    whole = vd.evaluate.evaluate(noisy, key, PARAMS, DATA[:20], batch_size=7)
    jax.tree.map(np.testing.assert_array_equal, out, whole)
    assert asked == [7, 7, 7]


def test_the_batch_size_does_not_change_a_vaes_evaluation(key):
    """Keys do not depend on the batches; products of another size may round another way, hence 1e-6."""
    model = vd.vae(
        vd.nets.mlp((3,), (4,), hidden=(5,)),
        vd.nets.mlp((2,), (3,), hidden=(5,)),
        latent_dim=2,
        likelihood=vd.likelihoods.gaussian(0.5),
    )
    params, evaluator = jax.jit(model.init)(key), vd.importance_log_prob(model, 30, 10)
    outs = [
        vd.evaluate.evaluate(evaluator, key, params, DATA, batch_size=batch_size)
        for batch_size in (7, NUM_DATA)
    ]
    assert type(outs[0]) is vd.LogProb
    for name, one, other in zip(vd.LogProb._fields, *outs, strict=True):
        assert one.shape == (NUM_DATA,)
        # The fit of a tail magnifies what rounding does to it.
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-4 if name == "k_hat" else 1e-6)
    assert np.all(np.diff(np.sort(outs[0].value)) > 0)


def test_progress_is_told_and_ends_at_the_number_of_data(key):
    told = []
    vd.evaluate.evaluate(noisy, key, PARAMS, DATA, batch_size=10, on_progress=told.append)
    assert told == [10, 20, 23]


def test_a_second_call_compiles_nothing(key):
    compilations = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    def evaluator(key, params, x):
        return jnp.sum(x) + jax.random.normal(key)

    other = jax.random.key(5)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        vd.evaluate.evaluate(evaluator, key, PARAMS, DATA, batch_size=7)
        assert compilations  # the listener hears
        compilations.clear()
        vd.evaluate.evaluate(evaluator, other, PARAMS, DATA + 1, batch_size=7)
        vd.evaluate.evaluate(evaluator, key, PARAMS, DATA[:10], batch_size=7)
        assert compilations == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(("num_data", "batch_size"), [(0, 10), (5, 0)])
def test_nothing_to_evaluate_is_refused(key, num_data, batch_size):
    pattern = f"data: got {num_data} data and batch_size {batch_size}, expected at least 1 of each"
    with pytest.raises(ValueError, match=pattern):
        vd.evaluate.evaluate(noisy, key, PARAMS, DATA[:num_data], batch_size=batch_size)


def test_a_raw_key_is_refused():
    with pytest.raises(TypeError, match="expected a typed key"):
        vd.evaluate.evaluate(noisy, jax.random.PRNGKey(0), PARAMS, DATA)


def test_summary_is_the_mean_and_its_standard_error():
    values = np.random.default_rng(0).normal(-90.0, 12.0, size=50)
    summary = vd.evaluate.summarize(values)
    np.testing.assert_allclose(summary.mean, np.mean(values), rtol=1e-12)
    np.testing.assert_allclose(summary.std_error, scipy.stats.sem(values), rtol=1e-12)
    assert summary.num_data == 50
    assert type(summary.mean) is float and type(summary.std_error) is float


def test_summary_adds_up_in_double_precision():
    """Float32 values: a float32 sum of two million of them would be off in the fourth digit."""
    values = np.full(2_000_001, -88.8, np.float32)
    values[0] = -1e4
    expected = (np.float64(np.float32(-88.8)) * 2_000_000 - 1e4) / 2_000_001
    np.testing.assert_allclose(vd.evaluate.summarize(values).mean, expected, rtol=1e-12)


def test_summary_of_one_datum_claims_no_precision():
    assert vd.evaluate.summarize(np.array([-3.0])) == (-3.0, np.inf, 1)


def test_the_share_of_data_whose_weights_are_not_trusted():
    nan = np.nan
    assert vd.evaluate.untrusted_share(np.array([0.1, 0.70, 0.71, np.inf, -np.inf])) == 0.4
    assert vd.evaluate.untrusted_share(np.array([0.1, 0.2, 0.3]), limit=0.15) == 2 / 3
    assert vd.evaluate.untrusted_share(np.array([nan, 0.9])) == 1.0
    assert np.isnan(vd.evaluate.untrusted_share(np.array([nan, nan])))
