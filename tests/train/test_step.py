"""One step against NumPy in float64: keys, gradient ascent, moving average, metrics, batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from vdiff.train.step import many_steps

RATE = 0.25


def start(theta, optimizer, seed=0):
    """A state whose only parameters are `theta`."""
    theta = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), theta)
    model = vd.Model(lambda key: vd.Params(theta=theta), *[None] * 4)
    return vd.init_state(jax.random.key(seed), model, optimizer)


def quadratic(key, params, x):
    """Two terms, no noise; the gradient of the sum by theta is 2 (x - theta) + 3 x^2."""
    return {"fit": -jnp.sum(jnp.square(x - params.theta)), "pull": 3.0 * jnp.sum(x**2 * params.theta)}


def noisy(key, params, x):
    return {"fit": -jnp.sum(jnp.square(x - params.theta + jax.random.normal(key, x.shape)))}


def equal(one, other):
    """Same structure, same bits."""
    one, other = (
        jax.tree.map(
            lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a, t
        )
        for t in (one, other)
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def batch():
    return np.random.default_rng(3).normal(size=(5, 3)).astype(np.float32)


@pytest.mark.parametrize("step_number", [0, 7])
def test_a_datum_gets_the_key_of_step_and_position(step_number):
    """The gradient by theta_i is the noise of position i: SGD writes the noise into theta."""

    def objective(key, params, x):
        return {"noise": params.theta[x] * jax.random.normal(key)}

    optimizer = optax.sgd(4.0)
    state = start(np.zeros(4), optimizer)._replace(step=jnp.int32(step_number))
    state, _ = vd.make_train_step(objective, optimizer)(state, jnp.arange(4))
    key_step = jax.random.fold_in(state.key, step_number)
    expected = [float(jax.random.normal(jax.random.fold_in(key_step, i))) for i in range(4)]
    np.testing.assert_array_equal(np.asarray(state.params.theta), np.float32(expected))


def test_custom_batching_gets_key_positions_and_aux(batch):
    optimizer = optax.sgd(0.1)
    seen = {}

    def batching(objective):
        def lifted(key, params, batch, positions, aux):
            seen["key"], seen["positions"] = jax.random.key_data(key), positions
            return vd.per_example(objective)(key, params, batch, positions, aux)[0], aux + 2

        return lifted

    state = start(np.zeros(3), optimizer)._replace(aux=jnp.arange(5), step=jnp.int32(9))
    new, _ = vd.make_train_step(quadratic, optimizer, batching=batching)(state, batch)
    np.testing.assert_array_equal(seen["positions"], np.arange(5))
    np.testing.assert_array_equal(seen["key"], jax.random.key_data(jax.random.fold_in(state.key, 9)))
    np.testing.assert_array_equal(new.aux, np.arange(5) + 2)


def test_step_ascends_the_mean_gradient_and_reports_it(batch):
    theta = np.array([0.3, -1.0, 2.0])
    optimizer = optax.sgd(RATE)
    state, metrics = jax.jit(vd.make_train_step(quadratic, optimizer))(start(theta, optimizer), batch)
    x = batch.astype(np.float64)
    grad = np.mean(2 * (x - theta) + 3 * x**2, axis=0)
    np.testing.assert_allclose(state.params.theta, theta + RATE * grad, rtol=2e-6)
    fit, pull = -np.mean(np.sum((x - theta) ** 2, axis=1)), 3 * np.mean(np.sum(x**2 * theta, axis=1))
    expected = {"fit": fit, "pull": pull, "objective": fit + pull, "grad_norm": np.linalg.norm(grad)}
    expected["skipped"] = 0.0
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(float(metrics[name]), value, rtol=2e-6, err_msg=name)
    assert int(state.step) == 1 and state.step.dtype == jnp.int32


def test_optimizer_sees_the_parameters(batch):
    """Weight decay reads them: theta goes to (1 - rate * decay) theta where the gradient is zero."""
    optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(RATE))
    theta = np.array([1.0, -2.0, 4.0])
    step = vd.make_train_step(lambda key, params, x: {"zero": 0.0 * jnp.sum(params.theta)}, optimizer)
    state, _ = step(start(theta, optimizer), batch)
    np.testing.assert_allclose(state.params.theta, theta * (1 - RATE * 0.5), rtol=1e-6)


@pytest.mark.parametrize("ema_decay", [0.0, 0.3, 0.999])
def test_moving_average_warms_up(batch, ema_decay):
    optimizer = optax.sgd(RATE)
    step = jax.jit(vd.make_train_step(quadratic, optimizer, ema_decay=ema_decay))
    state = start(np.array([0.3, -1.0, 2.0]), optimizer)
    ema = np.asarray(state.params.theta, np.float64)
    for t in range(8):  # 0.3 takes over from (1 + t) / (10 + t) at t = 3
        state, _ = step(state, batch * (1 + t))
        decay = min(ema_decay, (1 + t) / (10 + t))
        ema = decay * ema + (1 - decay) * np.asarray(state.params.theta, np.float64)
        np.testing.assert_allclose(state.ema.theta, ema, rtol=3e-6, err_msg=f"step {t}")


def test_combine_acts_on_the_mean_over_the_batch():
    """Free bits: kl's mean, -0.6, is above the floor of -0.7, though single data lie on both sides."""
    x = jnp.asarray([[-1.2], [0.0]])

    def objective(key, params, x):
        return {"reconstruction": jnp.sum(params.theta), "kl": jnp.sum(x * params.theta)}

    def step(floor):
        optimizer = optax.sgd(1.0)
        combine = lambda terms: terms["reconstruction"] + jnp.minimum(terms["kl"], -floor)  # noqa: E731
        return vd.make_train_step(objective, optimizer, combine=combine)(start(np.ones(1), optimizer), x)

    state, metrics = step(0.7)  # the floor holds: no gradient from kl, though the first datum exceeds it
    assert float(metrics["objective"]) == pytest.approx(1.0 - 0.7)
    assert float(metrics["kl"]) == pytest.approx(-0.6)
    assert float(state.params.theta[0]) == pytest.approx(2.0)
    state, metrics = step(0.5)  # it does not: the whole gradient, though the second datum is below it
    assert float(metrics["objective"]) == pytest.approx(1.0 - 0.6)
    assert float(state.params.theta[0]) == pytest.approx(1.0 + 1.0 - 0.6)


def test_scheduled_objective_follows_the_step_and_compiles_once(batch):
    optimizer = optax.sgd(RATE)
    traces = []

    def at(step):
        traces.append(step)
        return vd.weighted(quadratic, {"pull": jnp.minimum(1.0, step / 4)})

    step = jax.jit(vd.make_train_step(vd.scheduled(at), optimizer))
    state = start(np.array([0.3, -1.0, 2.0]), optimizer)
    x = batch.astype(np.float64)
    for t in range(6):
        before = np.asarray(state.params.theta, np.float64)
        state, metrics = step(state, batch)
        weight = min(1.0, t / 4)
        grad = np.mean(2 * (x - before) + weight * 3 * x**2, axis=0)
        np.testing.assert_allclose(state.params.theta, before + RATE * grad, rtol=1e-5, atol=1e-6)
        pull = weight * 3 * np.mean(np.sum(x**2 * before, axis=1))
        np.testing.assert_allclose(float(metrics["pull"]), pull, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


def test_batch_may_be_a_pytree(batch):
    def objective(key, params, x):
        return {"fit": -jnp.square(x["y"] - x["in"] @ params.theta["w"] - params.theta["b"][0])}

    optimizer = optax.sgd(RATE)
    theta = {"w": np.array([0.1, 0.2, -0.3]), "b": np.array([0.5])}
    y = np.arange(5, dtype=np.float32)
    step = vd.make_train_step(objective, optimizer)
    state, _ = step(start(theta, optimizer), {"in": batch, "y": y})
    residual = y - batch.astype(np.float64) @ theta["w"] - theta["b"]
    w = theta["w"] + RATE * np.mean(2 * residual[:, None] * batch, axis=0)
    np.testing.assert_allclose(state.params.theta["w"], w, rtol=1e-5)
    np.testing.assert_allclose(state.params.theta["b"], theta["b"] + RATE * np.mean(2 * residual), rtol=1e-5)


@pytest.mark.parametrize(
    ("bad", "sizes"),
    [
        ({"a": np.zeros((4, 2)), "b": np.zeros(3)}, r"\[3, 4\]"),
        ({"a": np.zeros((4, 2)), "b": np.zeros(())}, r"\[0, 4\]"),
        ({"a": np.zeros((0, 2))}, r"\[0\]"),
        ({}, r"\[\]"),
    ],
)
def test_batches_without_one_length_are_refused(bad, sizes):
    optimizer = optax.sgd(RATE)
    step = vd.make_train_step(lambda key, params, x: {"a": jnp.sum(params.theta)}, optimizer)
    with pytest.raises(ValueError, match=f"batch: got leading axes {sizes}, expected one common length"):
        step(start(np.zeros(1), optimizer), bad)


@pytest.mark.parametrize("ema_decay", [-0.1, 1.0, 1.5, float("nan")])
def test_ema_decay_outside_its_range_is_refused(ema_decay):
    with pytest.raises(ValueError, match=r"ema_decay: got .*, expected a number in \[0, 1\)"):
        vd.make_train_step(quadratic, optax.sgd(RATE), ema_decay=ema_decay)


def test_init_state_is_a_function_of_the_key_and_may_be_donated(batch):
    net = vd.nets.mlp((3,), (2,), hidden=(4,))
    model = vd.Model(lambda key: vd.Params(theta=net.init(key)), *[None] * 4)
    optimizer = optax.adam(1e-3)
    one, same = (vd.init_state(jax.random.key(5), model, optimizer) for _ in range(2))
    other = vd.init_state(jax.random.key(6), model, optimizer)
    equal(one, same)
    equal(one.ema, one.params)
    equal(one.opt_state, optimizer.init(one.params))
    assert int(one.step) == 0 and one.aux == ()
    kernel = lambda state: np.asarray(state.params.theta["Dense_0"]["kernel"])  # noqa: E731
    assert np.all(kernel(one) != kernel(other))
    keys = [jax.random.key_data(k).tolist() for k in (one.key, other.key, jax.random.key(5))]
    assert keys[0] != keys[1] and keys[0] != keys[2]

    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((one.params, one.ema, one.opt_state))]
    assert len(set(buffers)) == len(buffers)
    doubled = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 2, (s.params, s.ema)), donate_argnums=0)(one)
    equal(doubled[0], doubled[1])
    assert one.params.theta["Dense_0"]["kernel"].is_deleted()


def test_init_state_refuses_a_raw_key():
    model = vd.Model(lambda key: vd.Params(), *[None] * 4)
    with pytest.raises(TypeError, match=r"key: got uint32\[2\], expected a typed key.*jax\.random\.key"):
        vd.init_state(jax.random.PRNGKey(0), model, optax.sgd(RATE))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_many_steps_are_single_steps_and_the_rest_is_ignored(count):
    optimizer = optax.adam(0.05)
    step = vd.make_train_step(noisy, optimizer, ema_decay=0.9)
    batches = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    batches[count:] = np.nan
    state, metrics = jax.jit(many_steps(step))(start(np.ones(3), optimizer), batches, jnp.int32(count))

    single, record = start(np.ones(3), optimizer), []
    compiled = jax.jit(step)
    for i in range(count):
        single, row = compiled(single, batches[i])
        record.append(row)
    assert int(state.step) == count
    equal(state, single)
    assert set(metrics) == {"fit", "objective", "grad_norm", "skipped"}
    for name, values in metrics.items():
        assert values.shape == (5,)
        alone = [float(row[name]) for row in record]
        np.testing.assert_allclose(values[:count], alone, rtol=1e-6, err_msg=name)


def test_many_steps_of_one_is_the_step_itself():
    optimizer = optax.adam(0.05)
    step = vd.make_train_step(noisy, optimizer)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    state, metrics = jax.jit(many_steps(step))(start(np.ones(3), optimizer), x[None], jnp.int32(1))
    single, row = jax.jit(step)(start(np.ones(3), optimizer), x)
    equal(state, single)
    equal(metrics, row)


def test_a_weakly_typed_start_compiles_the_step_once():
    def init(key):
        return vd.Params(theta=jnp.array(2.0))  # weakly typed, as users write

    model = vd.Model(init, None, None, None, None)
    traces = []

    def objective(key, params, x):
        traces.append(1)
        return {"elbo": -jnp.square(params.theta - x)}

    step = jax.jit(vd.make_train_step(objective, optax.sgd(0.1)))
    state = vd.init_state(jax.random.key(0), model, optax.sgd(0.1))
    for _ in range(3):
        state, _ = step(state, jnp.ones(4))
    assert len(traces) == 1
