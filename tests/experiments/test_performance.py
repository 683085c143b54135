"""What a training costs: FLOPs against arithmetic, times against a sleep, memory against what was allocated."""

import json
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from experiments import performance, runs, training

OPTIMIZER = optax.sgd(0.1)
WIDTH, BATCH_SIZE = 128, 32


def objective(key, params, x):
    return {"fit": -jnp.sum(jnp.square(x @ params.theta["kernel"]))}


MODEL = vd.Model(lambda key: vd.Params(theta={"kernel": jnp.zeros((WIDTH, WIDTH))}), *[None] * 4)


def start():
    return vd.init_state(jax.random.key(0), MODEL, OPTIMIZER)


@pytest.fixture
def compilations():
    seen = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(("steps_per_call", "num_parts"), [(1, 1), (4, 1), (1, 4)])
def test_flops_are_those_of_one_step(compilations, steps_per_call, num_parts):
    """x W and x^T g: two products of 2 B n^2; the update and the guard's norm are a few n^2, B = 32 being larger.

    In how many parts its batch ever goes. And the step is compiled once: its first call finds it.
    """
    undivided = vd.jit_step(vd.make_train_step(objective, OPTIMIZER))
    step = vd.jit_step(vd.make_train_step(objective, OPTIMIZER, num_accumulate=num_parts))
    state, batch = start(), np.ones((BATCH_SIZE, WIDTH), np.float32)
    compilations.clear()
    more = (undivided,) if num_parts > 1 else ()
    compiled = performance.compile_step(step, state, batch, BATCH_SIZE, steps_per_call, *more)
    products = 2 * 2 * BATCH_SIZE * WIDTH**2
    assert products < compiled.flops < 1.25 * products
    assert len(compilations) == 1 and compilations[0] < compiled.seconds < compilations[0] + 30
    vd.fit(state, step, lambda i: batch, 2 * steps_per_call, steps_per_call=steps_per_call)
    assert len(compilations) == 1


def test_times_are_of_the_steps_and_not_of_the_hooks():
    """Each batch takes 20 ms to make; the other hook 1 s, which would be 250 ms a step."""
    step = vd.jit_step(vd.make_train_step(objective, OPTIMIZER))
    batch = np.ones((BATCH_SIZE, WIDTH), np.float32)

    def batches(i):
        time.sleep(0.02)
        return batch

    def call(step, state, metrics):
        time.sleep(1.0)
        return {"judged": 1.0}

    seen = []
    hooks = [vd.Hook(8, call), vd.Hook(1, lambda step, state, metrics: seen.append("judged" in metrics))]
    state = vd.fit(start(), step, lambda i: batch, 2)
    hooks, seconds = performance.timed(hooks, 4, 2)
    vd.fit(state, step, batches, 14, hooks=hooks)
    # Looks at steps 4, 8, 12 and 14, the first after two steps; the other hook comes before the third look.
    assert len(seconds) == 4 and min(seconds) >= 0.02 and seconds[2] < 0.2
    assert seen == [i in (8, 14) for i in range(3, 15)]


def test_figures_are_in_proportion():
    """Twice as fast is twice the examples and twice the share; the first time is left out."""
    compiled = performance.Compiled(1.5, 1e6)
    slow, fast = (performance.figures(compiled, [9.0, t, t, 2 * t], 64, 50) for t in (0.02, 0.01))
    assert slow["compile_seconds"] == 1.5 and slow["step_flops"] == 1e6
    assert slow["step_ms"] == {"p50": 20.0, "p90": 36.0, "p99": 39.6, "num": 3, "mean_over_steps": 50}
    assert slow["examples_per_second"] == 3200.0 and fast["examples_per_second"] == 6400.0
    peak = slow["peak_flops_per_second"]["value"]
    assert slow["share_of_peak"] == pytest.approx(1e6 / 0.02 / peak, rel=1e-3)
    assert fast["share_of_peak"] == pytest.approx(2 * slow["share_of_peak"], rel=1e-3)
    json.dumps(slow, allow_nan=False)


def test_figures_of_one_time_and_no_flops():
    found = performance.figures(performance.Compiled(1.0, None), [0.5], 8, 50)
    assert found["step_ms"]["p50"] == 500.0 and found["share_of_peak"] is None


def test_peak_memory_grows_by_what_is_held():
    """By what the process has room for below the peak so far, it does not; by 64 MiB more, it does by those."""
    before, where = performance.peak_memory()
    pages = Path("/proc/self/statm")
    if where != "process" or not pages.exists():
        pytest.skip("the process does not tell what it holds now")
    room, more = before - int(pages.read_text().split()[1]) * resource.getpagesize(), 2**26
    assert room >= 0
    held = np.ones((room + more) // 8)
    after, _ = performance.peak_memory()
    assert held.nbytes and more / 2 < after - before < 2 * more


def test_the_peak_is_that_of_a_product():
    """A smaller product is about as fast: nine tenths and more are left to other load on the machine."""
    square = jnp.ones((512, 512))
    product = jax.jit(jnp.matmul)
    (seconds,) = performance.median_seconds(lambda: product(square, square), num_calls=3, num_measurements=5)
    assert performance.product_peak() > 0.05 * 2 * 512**3 / seconds
    assert performance.product_peak() == performance.product_peak()


def test_the_peak_is_in_the_precision_of_the_step(monkeypatch):
    asked = []
    monkeypatch.setattr(performance, "product_peak", lambda precision: asked.append(precision) or 1e9)
    found = performance.figures(performance.Compiled(1.0, 1e6), [0.5], 8, 50, "bfloat16")
    assert asked == ["bfloat16"] and found["peak_flops_per_second"]["of"].startswith("a bfloat16 matrix")


def test_median_seconds_are_of_each_function():
    def sleeping(seconds):
        def call():
            time.sleep(seconds)
            return jnp.zeros(())

        return call

    short, long = performance.median_seconds(sleeping(0.01), sleeping(0.05), num_calls=2, num_measurements=3)
    assert 0.01 <= short < long and long >= 0.05


def test_a_run_records_its_performance_and_its_trace(tmp_path):
    """`result.json` has it, also where the run was already trained; the trace lies in the run directory."""
    config = runs.RunConfig(
        run_dir=tmp_path / "run", num_steps=12, batch_size=8, log_every=4, checkpoint_every=12, profile=3
    )
    directory = runs.open_run(config)
    images = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
    for _ in range(2):
        state = training.train(config, directory, MODEL, objective, images)
        result = runs.write_result(directory, {}, state.ema, {"training": 1.0})
        found = json.loads((directory / "result.json").read_text())["performance"]
        assert found == result["performance"]
        assert found["step_ms"]["num"] == 2 and found["step_ms"]["mean_over_steps"] == 4
        assert found["examples_per_second"] == pytest.approx(8e3 / found["step_ms"]["p50"], rel=2e-3)
        assert 0 < found["share_of_peak"] < 1 and found["compile_seconds"] > 0
    assert len(list(directory.glob("profile/plugins/profile/*/*.xplane.pb"))) == 1
