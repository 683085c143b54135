"""Schedules against the formulas of their papers in float64; learned ones against NumPy and differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from tests.diffusion import cases
from vdiff import diffusion


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diffusion.linear_log_snr(-5.0, 5.0), "log_snr_max, log_snr_min: got -5.0, 5.0"),
        (lambda: diffusion.cosine_log_snr(1.0, 1.0), "log_snr_max, log_snr_min: got 1.0, 1.0"),
        (lambda: diffusion.variance_preserving(rate_first=0.0), "rates and time_min: got 0.0"),
        (lambda: diffusion.variance_preserving(rate_last=-1.0), "rates and time_min: got 0.1, -1.0"),
        (lambda: diffusion.variance_preserving(time_min=0.0), "time in"),
        (lambda: diffusion.variance_exploding(0.0), "noise_min, noise_max: got 0.0"),
        (lambda: diffusion.variance_exploding(3.0, 2.0), "noise_min, noise_max: got 3.0, 2.0"),
        (lambda: diffusion.edm(2.0, 1.0), "noise_min, noise_max: got 2.0, 1.0"),
        (lambda: diffusion.edm(rho=0.0), "rho: got 0.0"),
        (lambda: diffusion.rectified_flow(0.0), "time_min, time_max: got 0.0"),
        (lambda: diffusion.rectified_flow(0.1, 1.0), "time_min, time_max: got 0.1, 1.0"),
        (lambda: diffusion.learned_log_snr(0.0, 1.0), "log_snr_max, log_snr_min: got 0.0, 1.0"),
        (lambda: diffusion.learned_log_snr(num_bins=0), "num_bins: got 0"),
        (lambda: diffusion.monotone_log_snr(0.0, 0.0), "log_snr_max, log_snr_min: got 0.0, 0.0"),
        (lambda: diffusion.monotone_log_snr(num_units=0), "num_units: got 0"),
    ],
)
def test_settings_that_make_no_schedule_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Continuous time: (a(t), s(t)) of a process a x + s eps, float64.


def geometric(noise_min, noise_max):
    return lambda t: (1.0, noise_min * (noise_max / noise_min) ** t)


def preserving(rate_first, rate_last, time_min):
    def process(t):
        time = time_min + (1 - time_min) * t
        log_alpha = -0.25 * time**2 * (rate_last - rate_first) - 0.5 * time * rate_first
        return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))

    return process


def karras(noise_min, noise_max, rho):
    return lambda t: (
        1.0,
        (noise_min ** (1 / rho) + t * (noise_max ** (1 / rho) - noise_min ** (1 / rho))) ** rho,
    )


def straight(time_min, time_max):
    return lambda t: (1 - time_min - (time_max - time_min) * t, time_min + (time_max - time_min) * t)


def by_log_snr(log_snr_max, log_snr_min):
    return lambda t: cases.scales(log_snr_max + (log_snr_min - log_snr_max) * t)


def by_angle(log_snr_max, log_snr_min):
    # The angle from the noise's end too: near a right angle its cosine has lost its digits even in float64.
    first, last = np.arctan(np.exp(-0.5 * log_snr_max)), np.arctan(np.exp(0.5 * log_snr_min))
    whole = np.pi / 2 - first - last
    return lambda t: (np.sin(last + whole * (1 - t)), np.sin(first + whole * t))


FIXED = {
    "linear": (diffusion.linear_log_snr, by_log_snr, [(13.3, -5.0), (30.0, -30.0), (20.0, -2.0)]),
    "cosine": (diffusion.cosine_log_snr, by_angle, [(13.3, -5.0), (20.0, -20.0), (30.0, -30.0)]),
    "preserving": (
        diffusion.variance_preserving,
        preserving,
        [(0.1, 20.0, 1e-3), (0.1, 60.0, 1e-12), (5.0, 5.0, 0.1)],
    ),
    "exploding": (diffusion.variance_exploding, geometric, [(0.01, 50.0), (3e-7, 3e6)]),
    "edm": (diffusion.edm, karras, [(0.002, 80.0, 7.0), (3e-7, 3e6, 7.0), (0.01, 3.0, 1.0)]),
    "rectified": (diffusion.rectified_flow, straight, [(1e-3, 0.999), (3e-7, 1 - 3e-7), (0.2, 0.5)]),
}
FIXED_CASES = [(name, settings) for name, (_, _, every) in FIXED.items() for settings in every]


@pytest.mark.parametrize(("name", "settings"), FIXED_CASES, ids=str)
def test_schedule_is_that_of_its_process(name, settings):
    """At both ends and between: log_snr = 2 log(a / s), its slope, and the scale sqrt(a^2 + s^2)."""
    make, process, _ = FIXED[name]
    schedule, process = make(*settings), process(*settings)
    assert schedule.init(jax.random.key(0)) == ()

    def log_snr(t):
        a, s = process(t)
        return 2.0 * (np.log(a) - np.log(s))

    for t in (0.0, 0.3, 0.9, 1.0):
        t = float(np.float32(t))
        value, derivative = jax.value_and_grad(schedule.apply, argnums=1)((), jnp.float32(t))
        assert float(value) == pytest.approx(log_snr(t), rel=2e-6, abs=3e-6), t
        # Differences that look inwards: a process may not exist beyond its ends.
        inward, narrow = (1.0 if t < 0.5 else -1.0), 1e-9 if name in {"rectified", "cosine"} else 1e-6
        if name == "preserving":
            narrow = 1e-3 * max(t, settings[-1])
        steps = np.array([0.0, 1.0, 2.0, 3.0]) * narrow * inward
        exact = np.dot([-11.0, 18.0, -9.0, 2.0], [log_snr(t + h) for h in steps]) / (6.0 * narrow * inward)
        assert float(derivative) == pytest.approx(exact, rel=2e-4), t
        a, s = process(t)
        assert float(schedule.scale(jnp.float32(log_snr(t)))) == pytest.approx(np.hypot(a, s), rel=1e-5)


@pytest.mark.parametrize(("name", "settings"), FIXED_CASES, ids=str)
def test_schedule_falls_strictly(name, settings):
    schedule = FIXED[name][0](*settings)
    values = jax.vmap(schedule.apply, in_axes=(None, 0))((), jnp.linspace(0.0, 1.0, 501))
    assert values.dtype == jnp.float32 and np.all(np.diff(values) < 0)


# Learned schedules.

ENDS = (9.0, -7.0)
BINS = 6


def binned(lam, t):
    """Piecewise linear, by NumPy's own interpolation."""
    ends = np.concatenate([[0.0], np.cumsum(0.999 * softmax(lam) + 0.001 / len(lam))])
    return np.interp(t, ends, np.linspace(*ENDS, len(lam) + 1))


def smooth(lam, t):
    def raw(t):
        steepness, centre = 4 * np.exp(lam["steepness"]), lam["centre"]
        bumps = np.exp(lam["height"]) / (1 + np.exp(-steepness * (t - centre)))
        return np.exp(lam["slope"]) * t + bumps.mean()

    return ENDS[0] + (ENDS[1] - ENDS[0]) * (raw(t) - raw(0.0)) / (raw(1.0) - raw(0.0))


LEARNED = {
    "bins": (functools.partial(diffusion.learned_log_snr, num_bins=BINS), binned),
    "monotone": (functools.partial(diffusion.monotone_log_snr, num_units=BINS), smooth),
}


def moved(schedule, seed, size=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + size * rng.normal(size=leaf.shape).astype(np.float32),
        schedule.init(jax.random.key(seed)),
    )


@pytest.mark.parametrize("size", [1.0, 5.0, 40.0])
@pytest.mark.parametrize("name", LEARNED)
def test_both_ends_are_pinned_whatever_is_learned(name, size):
    """Also where softmax leaves a stretch nothing, or a sigmoid has saturated."""
    schedule = LEARNED[name][0](*ENDS)
    for seed in range(20):
        lam = moved(schedule, seed, size if name == "bins" else min(size, 5.0))
        for t, end in zip((0.0, 1.0), ENDS, strict=True):
            assert float(schedule.apply(lam, jnp.float32(t))) == pytest.approx(end, abs=3e-6), seed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", LEARNED)
def test_learned_schedule_and_its_slopes(name, seed):
    """Value, slope by time and by each of lam against NumPy and its differences; monotone; continuous."""
    make, exact = LEARNED[name]
    schedule = make(*ENDS)
    lam = moved(schedule, seed, 0.7)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), lam)
    times = np.linspace(0.0, 1.0, 4001)
    values = jax.vmap(schedule.apply, in_axes=(None, 0))(lam, jnp.asarray(times, jnp.float32))
    np.testing.assert_allclose(values, [exact(wide, t) for t in times], atol=3e-5)
    assert np.all(np.diff(values) <= 0) and float(values[0] - values[-1]) == pytest.approx(16.0, abs=1e-5)
    assert np.max(-np.diff(values)) < 16.0 * 0.05  # no jump
    leaves, structure = jax.tree.flatten(wide)
    for t in (0.03, 0.31, 0.62, 0.97):
        t = float(np.float32(t))
        by_lam, by_time = jax.grad(schedule.apply, argnums=(0, 1))(lam, jnp.float32(t))
        assert float(by_time) == pytest.approx(cases.slope(lambda t: exact(wide, t), t), rel=1e-4)
        for i, leaf in enumerate(leaves):
            for j in np.ndindex(leaf.shape):

                def along(h, i=i, j=j):
                    parts = [p.copy() for p in leaves]
                    parts[i][j] += h
                    return exact(jax.tree.unflatten(structure, parts), t)  # noqa: B023

                found = float(np.asarray(jax.tree.leaves(by_lam)[i])[j])
                assert found == pytest.approx(cases.slope(along, 0.0), rel=3e-4, abs=2e-5), (t, i, j)


def test_bins_are_linear_at_the_start():
    schedule = diffusion.learned_log_snr()
    lam = schedule.init(jax.random.key(0))
    assert lam.shape == (32,) and not np.any(lam)
    for t in (0.0, 0.111, 0.5, 1.0):
        expected = 13.3 - 18.3 * t
        assert float(schedule.apply(lam, jnp.float32(t))) == pytest.approx(expected, abs=1e-5)
        assert float(jax.grad(schedule.apply, 1)(lam, jnp.float32(t))) == pytest.approx(-18.3, rel=1e-5)


@pytest.mark.parametrize("size", [10.0, 60.0])
def test_a_forgotten_stretch_is_still_visited(size):
    """Every log-SNR has some time: else the estimate of the ELBO would leave it out. Slopes stay finite."""
    schedule = diffusion.learned_log_snr(*ENDS, num_bins=BINS)
    for forgotten in ([0], [2, 3], [5], [1, 2, 3, 4, 5]):
        lam = jnp.zeros(BINS).at[np.array(forgotten)].set(-size)
        times = jnp.linspace(0.0, 1.0, 200_001)
        values, slopes = jax.vmap(jax.value_and_grad(schedule.apply, 1), (None, 0))(lam, times)
        assert np.all(np.diff(values) <= 0) and np.max(-np.diff(values)) < 2.0
        # The slopes integrate to the whole fall.
        assert float(np.mean(np.asarray(slopes, np.float64))) == pytest.approx(-16.0, rel=1e-2)
        assert np.all(slopes < 0) and np.all(np.isfinite(slopes))


def test_initial_monotone_schedule_depends_on_the_key_alone():
    schedule = diffusion.monotone_log_snr(num_units=3)
    one, same, other = (schedule.init(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one["steepness"], same["steepness"])
    assert np.all(one["steepness"] != other["steepness"]) and one["centre"].shape == (3,)
