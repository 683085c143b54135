"""A trace opens, by JAX's reader of TensorBoard's files and as the JSON that Perfetto takes, and has its steps."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from vdiff.train.profile import traced

OPTIMIZER = optax.sgd(0.1)


def objective(key, params, x):
    return {"fit": -jnp.sum(jnp.square(x - params.theta))}


def start():
    model = vd.Model(lambda key: vd.Params(theta=jnp.zeros(3)), *[None] * 4)
    return vd.init_state(jax.random.key(0), model, OPTIMIZER)


def batches(step):
    return np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def step():
    return vd.jit_step(vd.make_train_step(objective, OPTIMIZER))


def steps_in(directory):
    """The steps that a trace marks, from each of its two files."""
    (xplane,) = directory.glob("plugins/profile/*/*.xplane.pb")
    (perfetto,) = directory.glob("plugins/profile/*/perfetto_trace.json.gz")
    planes = jax.profiler.ProfileData.from_file(str(xplane)).planes
    marked = [
        event for plane in planes for line in plane.lines for event in line.events if event.name == "train"
    ]
    numbers = sorted(int(dict(event.stats)["step_num"]) for event in marked)
    assert all(event.duration_ns > 0 for event in marked)
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    spans = [event for event in events if event.get("ph") == "X"]
    assert all(event["dur"] >= 0 and {"name", "pid", "tid", "ts"} <= event.keys() for event in spans)
    assert sorted(int(event["args"]["step_num"]) for event in spans if event["name"] == "train") == numbers
    assert len(spans) > 10 * len(numbers)  # what is in the steps, too
    return numbers


def test_the_trace_has_the_steps_after_the_first_two_calls(tmp_path, step):
    with traced(step, tmp_path / "trace", 3) as looked_into:
        state = vd.fit(start(), looked_into, batches, 9)
    assert steps_in(tmp_path / "trace") == [2, 3, 4]
    # Looking changes nothing.
    np.testing.assert_array_equal(state.params.theta, vd.fit(start(), step, batches, 9).params.theta)


def test_whole_calls_are_traced_from_where_a_run_resumed(tmp_path, step):
    """Calls of 4 steps from step 10 on; one goes before, and 5 steps are two calls, at 14 and 18."""
    state = start()._replace(step=jnp.int32(10))
    with traced(step, tmp_path / "trace", 5, num_calls_before=1) as looked_into:
        vd.fit(state, looked_into, batches, 30, steps_per_call=4)
    assert steps_in(tmp_path / "trace") == [14, 18]


def test_a_run_that_ends_before_its_trace_writes_what_there_is(tmp_path, step):
    with pytest.raises(RuntimeError, match="stop"), traced(step, tmp_path / "trace", 100) as looked_into:

        def stop(step, state, metrics):
            raise RuntimeError("stop")

        vd.fit(start(), looked_into, batches, 9, hooks=[vd.Hook(4, stop)])
    assert steps_in(tmp_path / "trace") == [2, 3]


def test_no_steps_are_refused(tmp_path, step):
    with pytest.raises(ValueError, match="num_steps: got 0, expected at least 1"), traced(step, tmp_path, 0):
        pass
