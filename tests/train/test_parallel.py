"""The parallel steps on the devices that this process has, one as a rule; test_devices.py has eight."""

import contextlib
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd

OPTIMIZER = optax.sgd(0.1)


def objective(key, params, x):
    return {"fit": -jnp.sum(jnp.square(x["y"] - params.theta + jax.random.normal(key, (3,))))}


def start(shardings=None):
    model = vd.Model(lambda key: vd.Params(theta=jnp.zeros(3)), *[None] * 4)
    return vd.init_state(jax.random.key(4), model, OPTIMIZER, shardings=shardings)


def build(mode):
    plain = vd.make_train_step(objective, OPTIMIZER)
    if mode == "plain":
        return vd.jit_step(plain)
    if mode == "mesh":
        return vd.jit_step(plain, vd.data_mesh())
    if mode == "fsdp":
        return vd.fsdp_step(plain, vd.data_mesh(), min_size=1)
    name = {"pmap": "data", "pmap other name": "devices"}[mode]
    return vd.pmap_step(vd.make_train_step(objective, OPTIMIZER, axis_name=name), axis_name=name)


@pytest.fixture
def batch():
    size = 4 * jax.device_count()
    return {"y": np.random.default_rng(0).normal(size=(size, 3)).astype(np.float32)}


@pytest.mark.parametrize("mode", ["plain", "mesh", "pmap", "pmap other name"])
def test_a_step_is_the_mean_gradient_and_takes_the_states_buffers(batch, mode):
    state = start()
    key_step = jax.random.fold_in(state.key, 0)
    keys = [jax.random.fold_in(key_step, i) for i in range(len(batch["y"]))]
    noise = np.stack([np.asarray(jax.random.normal(k, (3,)), np.float64) for k in keys])
    grad = np.mean(2 * (batch["y"] + noise), axis=0)  # at theta = 0

    new, metrics = build(mode)(state, batch)
    np.testing.assert_allclose(new.params.theta, 0.1 * grad, rtol=2e-6)
    np.testing.assert_allclose(float(metrics["grad_norm"]), np.linalg.norm(grad), rtol=2e-6)
    np.testing.assert_allclose(
        float(metrics["fit"]), -np.mean(np.sum((batch["y"] + noise) ** 2, axis=1)), rtol=2e-6
    )
    assert new.params.theta.shape == (3,) and new.step.shape == () and metrics["fit"].shape == ()
    # Donated means gone: nothing is held twice. The key goes through unchanged.
    for leaf in (state.params.theta, state.ema.theta):
        assert leaf.is_deleted()
        with pytest.raises(RuntimeError, match="deleted"):
            np.asarray(leaf)
    assert not new.params.theta.is_deleted()


@pytest.mark.parametrize("mode", ["plain", "mesh", "pmap", "fsdp"])
def test_a_step_is_compiled_once(batch, mode):
    """States as `init_state` makes them, here or there, and those that a step returned are the same to the compiler."""
    step, state = build(mode), start()
    there, names = start(step.shardings), []
    for leaf, same, sharding in zip(
        *map(jax.tree.leaves, (there, state, step.shardings(state))), strict=True
    ):
        assert leaf.dtype == same.dtype and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    # For one device, a state that was put there is compiled for apart from one that is there by default.
    state, there = step(state, batch)[0], step(there, batch)[0]
    with jax.log_compiles(), _collecting(names):
        for _ in range(3):
            state, _ = step(state, batch)
            there, _ = step(there, batch)
    assert names == []


@contextlib.contextmanager
def _collecting(names):
    handler = logging.Handler()
    handler.emit = lambda record: names.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    yield
    logging.getLogger("jax").removeHandler(handler)


@pytest.mark.parametrize("mode", ["plain", "mesh", "pmap"])
def test_batches_on_the_device_are_taken_too(batch, mode):
    step = build(mode)
    from_host, _ = step(start(), batch)
    from_device, _ = step(start(), jax.tree.map(jnp.asarray, batch))
    np.testing.assert_array_equal(from_device.params.theta, from_host.params.theta)


def test_devices_stand_in_the_order_of_their_processes(unchecked):
    """As shares of a batch do, however JAX lists them; and none shares features with another process's."""

    @dataclasses.dataclass(frozen=True)
    class Device:
        process_index: int
        id: int

    devices = [Device(i % 2, i) for i in (0, 3, 2, 1)]
    assert [device.id for device in vd.data_mesh(devices=devices).devices] == [0, 2, 3, 1]
    mesh = vd.data_mesh(model=2, devices=devices)
    assert [[device.id for device in row] for row in mesh.devices] == [[0, 2], [3, 1]]
    with pytest.raises(ValueError, match=r"got 4 for 4 devices in 2 processes, .* of each; use one of 1, 2$"):
        vd.data_mesh(model=4, devices=devices)
    uneven = [Device(0, 0), Device(0, 1), Device(1, 2)]
    with pytest.raises(ValueError, match="got 3 for 3 devices in 2 processes, .*; use one of 1$"):
        vd.data_mesh(model=3, devices=uneven)


def test_a_sharded_batch_and_its_mesh(batch):
    mesh = vd.data_mesh()
    assert mesh.axis_names == ("data",) and mesh.size == jax.device_count()
    # Auto axes: a vmap over a sharded and a whole input must not raise.
    sharded = vd.shard_batch(batch, mesh)
    total = jax.vmap(lambda x, w: x @ w, in_axes=(0, None))(sharded["y"], jnp.ones(3))
    np.testing.assert_allclose(total, batch["y"].sum(axis=1), rtol=1e-5, atol=1e-6)
    assert sharded["y"].sharding.spec == jax.sharding.PartitionSpec("data")
    np.testing.assert_array_equal(sharded["y"], batch["y"])


@pytest.mark.parametrize("mode", ["mesh", "pmap"])
def test_an_empty_batch_is_refused(mode):
    num_devices = jax.device_count()
    with pytest.raises(ValueError, match=f"batch: got 0 data for {num_devices} devices, .* {num_devices}$"):
        build(mode)(start(), {"y": np.zeros((0, 3), np.float32)})


@pytest.mark.parametrize("mode", ["plain", "mesh", "pmap"])
def test_run_takes_the_first_of_the_placed_batches(batch, mode):
    """`run(state, place(stack), count)`: what `fit` calls; the batches after `count` are not looked at."""
    step = build(mode)
    stack = {"y": np.stack([batch["y"], 2 * batch["y"], np.full_like(batch["y"], np.nan)])}
    state, metrics = step.run(start(), step.place(stack), 2)
    single, rows = start(), []
    for i in range(2):
        single, row = step(single, {"y": stack["y"][i]})
        rows.append(float(row["fit"]))
    assert int(state.step) == 2
    np.testing.assert_allclose(state.params.theta, single.params.theta, rtol=1e-6)
    np.testing.assert_allclose(metrics["fit"][:2], rows, rtol=1e-6)


@pytest.mark.parametrize("mode", ["plain", "mesh", "pmap", "fsdp"])
def test_what_lower_compiled_is_what_the_first_call_runs(batch, mode):
    """From shapes alone; its FLOPs are at least the 2 B d additions and squares of the objective."""
    step, compilations = build(mode), []
    state = start(step.shardings)

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), batch)
    placed = step.place(jax.tree.map(lambda leaf: leaf[None], batch))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        compiled = step.lower(state, shapes).compile()
        assert len(compilations) == 1
        step.run(state, placed, 1)
        assert len(compilations) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled.cost_analysis()["flops"] > 2 * batch["y"].size / jax.device_count()
