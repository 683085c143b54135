"""What each batching hands to an objective: keys, times and slots that belong to positions of the global batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vdiff as vd
from tests.train import tiny


def start(theta, optimizer, *, aux=()):
    """A state whose only parameters are `theta`."""
    theta = jnp.asarray(theta, jnp.float32)
    model = vd.Model(lambda key: vd.Params(theta=theta), *[None] * 4)
    return vd.init_state(jax.random.key(0), model, optimizer, aux=aux)


# Low-discrepancy times.

PHI = 2654435769  # of 2^32: the golden ratio's fraction


def times(seed, positions, objective=None):
    """The u that `stratified` gives to each position."""
    objective = objective or (lambda key, params, x, u: {"u": u})
    positions = jnp.asarray(positions, jnp.int32)
    terms, aux = vd.stratified(objective)(
        jax.random.key(seed), vd.Params(), jnp.zeros(positions.shape), positions, ()
    )
    assert aux == ()
    return terms["u"]


def test_times_are_a_lattice_in_whole_numbers():
    """u_i = frac(u_0 + i phi / 2^32) in Python's integers, however large i; exact to float32's last bit below one."""
    positions = [0, 1, 2, 3, 127, 128, 9_999_999, 2**31 - 1]
    for seed in range(5):
        u = np.asarray(times(seed, positions), np.float64)
        _, key_time = jax.random.split(jax.random.key(seed))
        start = int(jax.random.bits(key_time, (), jnp.uint32))
        exact = [((start + i * PHI) % 2**32) / 2**32 for i in positions]
        assert np.all(u >= 0) and np.all(u < 1)
        assert np.all((exact - u >= 0) & (exact - u < 2.0**-24))
        # Told without knowing where u_0 comes from: the differences are the lattice's.
        apart = (u - u[0]) % 1.0
        expected = np.array([(i * PHI % 2**32) / 2**32 for i in positions])
        off = np.abs(apart - expected)
        assert np.max(np.minimum(off, 1 - off)) < 2.0**-23


def test_each_time_is_uniform_over_the_steps():
    """Each position over 50,000 steps: moments one to four, and each of 20 bins; u_0 is new at each step."""
    num = 50_000
    draw = lambda key: vd.stratified(lambda key, params, x, u: {"u": u})(  # noqa: E731
        key, vd.Params(), jnp.zeros(4), jnp.arange(4), ()
    )[0]["u"]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(num))
    u = np.asarray(jax.jit(jax.vmap(draw))(keys), np.float64)
    for column in u.T:
        for power in range(1, 5):
            spread = np.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / num)
            assert abs(np.mean(column**power) - 1 / (power + 1)) < 5 * spread, power
        counts = np.histogram(column, bins=20, range=(0, 1))[0]
        assert np.max(np.abs(counts / num - 0.05)) < 5 * np.sqrt(0.05 * 0.95 / num)
    # Steps are independent of each other.
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 5 / np.sqrt(num)


def star_discrepancy(u):
    u, n = np.sort(u), len(u)
    return max(np.max(np.arange(1, n + 1) / n - u), np.max(u - np.arange(n) / n))


def test_any_run_of_data_covers_time_evenly():
    """128 positions from anywhere: the star discrepancy is below 2.5 / 128; that of independent draws is .07 or so."""
    independent = np.random.default_rng(0).uniform(size=(200, 128))
    assert np.min([star_discrepancy(u) for u in independent]) > 2.5 / 128
    for seed, first in enumerate((0, 1, 128, 5_000, 12_345_678)):
        u = np.asarray(times(seed, np.arange(first, first + 128)), np.float64)
        assert star_discrepancy(u) < 2.5 / 128, first


def test_a_stratified_datum_has_a_key_of_its_own_apart_from_times():
    """Keys differ between positions, are those of the position alone, and are none of u_0's."""
    noise = lambda key, params, x, u: {"u": jax.random.normal(key)}  # noqa: E731
    one, other = (np.asarray(times(seed, np.arange(6), noise)) for seed in (0, 1))
    assert len(set(one.tolist())) == 6 and np.all(one != other)
    np.testing.assert_array_equal(np.asarray(times(0, [4, 2], noise)), one[[4, 2]])
    key_data, _ = jax.random.split(jax.random.key(0))
    expected = [float(jax.random.normal(jax.random.fold_in(key_data, i))) for i in range(6)]
    np.testing.assert_array_equal(one, np.float32(expected))


def test_stratified_gets_params_data_and_positions_of_the_global_batch():
    """As halves with their own positions, or as a whole: the same times. And a train step hands everything on."""
    whole = np.asarray(times(7, np.arange(8)))
    halves = [np.asarray(times(7, np.arange(k, k + 4))) for k in (0, 4)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)

    def objective(key, params, x, u):
        return {"fit": params.theta[x] * u}

    optimizer = optax.sgd(8.0)
    state = start(np.zeros(8), optimizer)._replace(step=jnp.int32(5))
    step = vd.make_train_step(objective, optimizer, batching=vd.stratified)
    after, _ = step(state, jnp.arange(8))
    key_step = jax.random.fold_in(state.key, 5)
    lifted = vd.stratified(lambda key, params, x, u: {"u": u})
    u = lifted(key_step, vd.Params(), jnp.zeros(8), jnp.arange(8), ())[0]["u"]
    np.testing.assert_allclose(after.params.theta, u, rtol=1e-6)
    # Under a mapped axis: one device of eight data is eight of one.
    mapped = vd.make_train_step(objective, optimizer, batching=vd.stratified, axis_name="data")
    split = jax.vmap(mapped, in_axes=(None, 0), axis_name="data")(state, jnp.arange(8).reshape(4, 2))
    np.testing.assert_allclose(split[0].params.theta[0], u, rtol=1e-6)


# Slots that go on from step to step.


def walking(key, params, x, slot):
    """A slot counts its steps, adds up its data and keeps its last noise; the gradient by theta is x + sum."""
    slot = {
        "count": slot["count"] + 1,
        "sum": slot["sum"] + x,
        "noise": jax.random.normal(key),
    }
    return {"fit": jnp.sum(params.theta * (x + slot["sum"]))}, slot


def slots(num):
    return {
        "count": jnp.arange(num, dtype=jnp.uint8),
        "sum": 10.0 * jnp.arange(2.0 * num).reshape(num, 2),
        "noise": jnp.zeros(num),
    }


@pytest.mark.parametrize("num_accumulate", [1, 3])
def test_a_slot_goes_on_with_its_position(num_accumulate):
    """Two steps in NumPy: what each position has seen, with the key of step and position, and the gradient of that."""
    optimizer = optax.sgd(1.0)
    data = np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32)
    state = start(np.zeros(2), optimizer, aux=slots(6))
    step = jax.jit(
        vd.make_train_step(walking, optimizer, batching=vd.persistent, num_accumulate=num_accumulate)
    )
    sums, theta = np.asarray(slots(6)["sum"], np.float64), np.zeros(2)
    for i, x in enumerate(data):
        state, _ = step(state, x)
        sums = sums + x
        theta = theta + np.mean(x + sums, axis=0)
        key = jax.random.fold_in(state.key, i)
        noise = [float(jax.random.normal(jax.random.fold_in(key, position))) for position in range(6)]
        np.testing.assert_allclose(state.aux["sum"], sums, rtol=1e-6)
        np.testing.assert_array_equal(state.aux["noise"], np.float32(noise))
    np.testing.assert_array_equal(state.aux["count"], np.arange(6) + 2)
    assert state.aux["count"].dtype == jnp.uint8
    np.testing.assert_allclose(state.params.theta, theta, rtol=1e-5)


def test_a_start_is_copied_and_comes_back_from_a_checkpoint(tmp_path):
    """A donated step must not eat the user's own array; slots are saved to the bit and go on as if never stopped."""
    optimizer = optax.sgd(0.1)
    step = vd.jit_step(vd.make_train_step(walking, optimizer, batching=vd.persistent))
    batches = lambda i: np.random.default_rng(i).normal(size=(4, 2)).astype(np.float32)  # noqa: E731
    own = slots(4)
    state = vd.fit(start(np.zeros(2), optimizer, aux=own), step, batches, 3)
    np.testing.assert_array_equal(own["count"], np.arange(4))
    vd.save(tmp_path, state)
    restored = vd.restore(tmp_path, start(np.ones(2), optimizer, aux=slots(4)))
    tiny.equal(restored, state)
    straight = vd.fit(start(np.zeros(2), optimizer, aux=own), step, batches, 5)
    tiny.equal(vd.fit(restored, step, batches, 5), straight)


def test_slots_for_another_batch_are_refused():
    optimizer = optax.sgd(1.0)
    raw = vd.make_train_step(walking, optimizer, batching=vd.persistent)
    for num in (3, 8):
        # In the order of their names: count, noise, sum.
        message = (
            rf"^aux: got a leaf of shape \[{num}\] for a batch of 4, expected \[4, ...\], one slot per position; "
            r"start it with init_state\(..., aux=...\) for this batch size"
        )
        for step in (raw, vd.jit_step(raw), vd.pmap_step(raw)):
            with pytest.raises(ValueError, match=message):
                step(start(np.zeros(2), optimizer, aux=slots(num)), np.zeros((4, 2), np.float32))
