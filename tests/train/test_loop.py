"""The loop against a record kept step by step: hooks, means, stopping, and that it compiles once."""

import os
import signal
import time

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd

NUM_STEPS = 11
OPTIMIZER = optax.adam(0.05)


def objective(key, params, x):
    noise = jax.random.normal(key, x.shape)
    return {"fit": -jnp.sum(jnp.square(x - params.theta + noise)), "pull": 0.1 * jnp.sum(params.theta * x)}


def batches(step):
    return np.random.default_rng((7, step)).normal(1.0, 1.0, size=(4, 3)).astype(np.float32)


def start():
    model = vd.Model(lambda key: vd.Params(theta=jnp.ones(3)), *[None] * 4)
    return vd.init_state(jax.random.key(2), model, OPTIMIZER)


def leaves(state):
    """A state's numbers, copied to the host before the next step takes its buffers."""
    return [np.array(leaf) for leaf in jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))]


def equal(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def step():
    return vd.jit_step(vd.make_train_step(objective, OPTIMIZER))


@pytest.fixture(scope="module")
def record(step):
    """The run taken by hand, one step at a time: its states' leaves and metrics, by step."""
    state, rows = start(), {}
    for i in range(NUM_STEPS):
        state, metrics = step(state, batches(i))
        rows[i + 1] = {name: float(value) for name, value in metrics.items()}, leaves(state)
    return rows


def watcher(every, calls, returned=None):
    def call(step, state, metrics):
        calls.append((step, leaves(state), metrics))
        return returned

    return vd.Hook(every, call)


@pytest.mark.parametrize("steps_per_call", [1, 4, 7, 16, None])
def test_hooks_get_their_steps_states_and_means(step, record, steps_per_call):
    """Each hook's metrics are means over the steps since its own last call, every step weighing the same."""
    calls = {every: [] for every in (3, 5, 20)}
    asked = []

    def counted(i):
        asked.append(i)
        return batches(i)

    hooks = [watcher(every, calls[every]) for every in calls]
    final = vd.fit(start(), step, counted, NUM_STEPS, hooks=hooks, steps_per_call=steps_per_call)
    assert asked == list(range(NUM_STEPS))
    steps = {every: [call[0] for call in calls[every]] for every in calls}
    assert steps == {3: [3, 6, 9, 11], 5: [5, 10, 11], 20: [11]}
    for made in calls.values():
        before = 0
        for at, state_leaves, metrics in made:
            rows = [record[i][0] for i in range(before + 1, at + 1)]
            assert set(metrics) == {"fit", "pull", "objective", "grad_norm", "skipped"}
            for name, value in metrics.items():
                assert type(value) is float
                expected = np.mean([row[name] for row in rows])
                np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7, err_msg=f"{name} at {at}")
            for got, expected in zip(state_leaves, record[at][1], strict=True):
                np.testing.assert_array_equal(got, expected)
            before = at
    for got, expected in zip(leaves(final), record[NUM_STEPS][1], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_what_a_hook_returns_reaches_the_hooks_after_it(step, record):
    first, second, third = [], [], []
    hooks = [
        watcher(2, first),
        vd.Hook(4, lambda step, state, metrics: {"test_elbo": float(-step), "pull": 99.0}),
        watcher(4, second),
        watcher(2, third),
    ]
    vd.fit(start(), step, batches, 6, hooks=hooks)
    assert all("test_elbo" not in metrics and metrics["pull"] != 99.0 for _, _, metrics in first)
    assert [metrics["test_elbo"] for _, _, metrics in second] == [-4.0, -6.0]
    assert [metrics["pull"] for _, _, metrics in second] == [99.0, 99.0]
    # At step 2 the second hook was not due; what it returned at 4 is gone at 6, where it returns anew.
    assert [metrics.get("test_elbo") for _, _, metrics in third] == [None, -4.0, -6.0]


def test_what_a_hook_returns_is_forgotten_at_the_next_call(step):
    seen = []
    hooks = [vd.Hook(4, lambda step, state, metrics: {"extra": 1.0}), watcher(1, seen)]
    vd.fit(start(), step, batches, 6, hooks=hooks)
    assert ["extra" in metrics for _, _, metrics in seen] == [False, False, False, True, False, True]


def test_resumed_fit_goes_to_the_total_and_hooks_keep_their_steps(step, record):
    calls = []
    state = vd.fit(start(), step, batches, 5)
    state = vd.fit(state, step, batches, NUM_STEPS, hooks=[watcher(3, calls)], steps_per_call=4)
    assert [call[0] for call in calls] == [6, 9, 11]
    expected = np.mean([record[6][0]["fit"]])
    np.testing.assert_allclose(calls[0][2]["fit"], expected, rtol=1e-6)
    for got, expected in zip(leaves(state), record[NUM_STEPS][1], strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("num_steps", [0, 3, 5])
def test_a_finished_state_comes_back_untouched(step, num_steps):
    state = start()._replace(step=jnp.int32(5))
    calls = []

    def refuse(i):
        raise AssertionError(f"batch {i} was asked for")

    again = vd.fit(state, step, refuse, num_steps, hooks=[watcher(1, calls)])
    assert again is state and calls == []


def test_should_stop_ends_after_the_call_and_the_hooks_are_told(step, record):
    calls, asked = [], []

    def should_stop():
        asked.append(True)
        return len(asked) == 2

    hooks = [watcher(100, calls), watcher(4, [])]
    state = vd.fit(
        start(), step, batches, NUM_STEPS, hooks=hooks, steps_per_call=3, should_stop=should_stop
    )  # calls end at 3 and, for the second hook, at 4
    assert int(state.step) == 4
    assert [call[0] for call in calls] == [4]
    expected = np.mean([record[i][0]["fit"] for i in range(1, 5)])
    np.testing.assert_allclose(calls[0][2]["fit"], expected, rtol=1e-6)


def test_a_second_fit_compiles_nothing():
    """Other lengths, other hooks, short last calls: the shapes are the same, so is the program."""
    compilations = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    compiled = vd.jit_step(vd.make_train_step(objective, OPTIMIZER))
    hook = watcher(5, [])
    states = [start(), start(), start()]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        vd.fit(states[0], compiled, batches, 8, hooks=[hook], steps_per_call=4)
        assert compilations  # the listener hears
        compilations.clear()
        state = vd.fit(states[1], compiled, batches, NUM_STEPS, hooks=[hook], steps_per_call=4)
        vd.fit(state, compiled, batches, NUM_STEPS + 2, steps_per_call=4)
        vd.fit(states[2], compiled, batches, 5, hooks=[watcher(3, [])], steps_per_call=4)
        assert compilations == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_plain_functions_and_bad_numbers_are_refused(step, unchecked):
    plain = vd.make_train_step(objective, OPTIMIZER)
    with pytest.raises(
        TypeError,
        match=r"step: got TrainStep, expected jit_step\(step\), fsdp_step\(step, mesh\) or pmap_step\(step\)",
    ):
        vd.fit(start(), plain, batches, 3)
    with pytest.raises(ValueError, match="steps_per_call: got 0, expected at least 1"):
        vd.fit(start(), step, batches, 3, steps_per_call=0)
    with pytest.raises(ValueError, match="hooks: every: got 0, expected at least 1"):
        vd.fit(start(), step, batches, 3, hooks=[watcher(0, [])])


def test_batches_of_pytrees_are_stacked():
    """The padding of a short call must not be trained on: NaN would show."""

    def objective(key, params, x):
        return {"fit": -jnp.square(x["y"] - jnp.log(jnp.sum(x["in"])) * params.theta[0])}

    def pairs(step):
        rng = np.random.default_rng(step)
        return {
            "in": rng.uniform(1, 2, (4, 3)).astype(np.float32),
            "y": rng.normal(size=4).astype(np.float32),
        }

    compiled = vd.jit_step(vd.make_train_step(objective, OPTIMIZER))
    together = vd.fit(start(), compiled, pairs, 5, steps_per_call=4)
    single = start()
    for i in range(5):
        single, _ = compiled(single, pairs(i))
    for got, expected in zip(leaves(together), leaves(single), strict=True):
        assert np.all(np.isfinite(got.astype(np.float64)))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_call_and_the_old_handlers_return(step, number):
    def old(number, frame):
        raise AssertionError("the old handler was called")

    def signalling(i):
        if i == 4:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return batches(i)

    before = {n: signal.signal(n, old) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        calls = []
        with vd.stop_on_signals() as stop:
            assert stop() is False and stop.number is None
            hooks = [watcher(100, calls)]
            state = vd.fit(
                start(), step, signalling, NUM_STEPS, hooks=hooks, steps_per_call=3, should_stop=stop
            )
            assert stop() is True and stop.number == number
        assert int(state.step) == 6 and [call[0] for call in calls] == [6]
        assert all(signal.getsignal(n) is old for n in (signal.SIGTERM, signal.SIGINT))
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@pytest.mark.parametrize(("steps_per_call", "calls"), [(1, [10, 20]), (16, list(range(1, 26)))])
def test_several_processes_ask_each_other_every_ten_steps_or_at_every_longer_call(
    monkeypatch, steps_per_call, calls
):
    asked = []

    def largest(value):
        asked.append(number)
        return signal.SIGTERM if number >= 20 else value

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("vdiff.train.loop.largest", largest)
    monkeypatch.setattr("vdiff.train.loop.default_steps_per_call", lambda: steps_per_call)
    with vd.stop_on_signals() as stop:
        answers = {}
        for number in range(1, 26):
            answers[number] = stop()
    assert asked == calls and [number for number, answer in answers.items() if answer] == list(range(20, 26))
    assert stop.number == signal.SIGTERM and stop.received is None


def test_a_second_signal_interrupts_at_once(step):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    reached = []

    def signalling(i):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        reached.append(i)
        return batches(i)

    with pytest.raises(KeyboardInterrupt), vd.stop_on_signals():
        vd.fit(start(), step, signalling, NUM_STEPS, steps_per_call=3)
    assert reached == [0]
    assert {n: signal.getsignal(n) for n in before} == before


def test_steps_per_call_do_not_change_a_vaes_training():
    """16 Adam steps of a small VAE; a last call of 2 or 16 of 16.

    Measured: the same bits. A compiler may still order a sum another way in a loop, hence 1e-6 of each leaf's
    norm; a step too many or too few, or a wrong key, is 1e-2.
    """
    model = vd.vae(
        vd.nets.mlp((6,), (4,), hidden=(8,)),
        vd.nets.mlp((2,), (6,), hidden=(8,)),
        latent_dim=2,
        likelihood=vd.likelihoods.bernoulli(),
    )
    optimizer = optax.adam(1e-2)
    compiled = vd.jit_step(vd.make_train_step(model.elbo_terms, optimizer))

    def images(step):
        return np.random.default_rng((3, step)).integers(0, 2, size=(8, 6)).astype(np.uint8)

    def train(steps_per_call):
        state = vd.init_state(jax.random.key(0), model, optimizer)
        return leaves(vd.fit(state, compiled, images, 16, steps_per_call=steps_per_call))

    single = train(1)
    for steps_per_call in (7, 16):
        for got, expected in zip(train(steps_per_call), single, strict=True):
            difference = np.linalg.norm(got.astype(np.float64) - expected.astype(np.float64))
            assert difference <= 1e-6 * np.linalg.norm(expected.astype(np.float64))
