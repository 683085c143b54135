import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion import exact_scores as exact
from vdiff.diffusion import beta_variance, inpaint, posterior_variance

MEAN, COV, KNOWN = np.array([0.3, -0.2]), 0.25**2 * np.array([[1.0, 0.8], [0.8, 1.0]]), 0.6
# The second coordinate given that the first is 0.6.
CONDITIONAL_MEAN = MEAN[1] + 0.8 * (KNOWN - MEAN[0])
CONDITIONAL_STD = 0.25 * np.sqrt(1 - 0.8**2)
MASK = np.array([True, False])


def share(log_snr):
    return 1 / (1 + np.exp(-log_snr))


def guess(theta, z, log_snr):
    """E[x | z] of correlated data."""
    a2 = jax.nn.sigmoid(log_snr)
    cov, mean = jnp.asarray(COV, jnp.float32), jnp.asarray(MEAN, jnp.float32)
    total = a2 * cov + jax.nn.sigmoid(-log_snr) * jnp.eye(2)
    return mean + jnp.sqrt(a2) * cov @ jnp.linalg.solve(total, z - jnp.sqrt(a2) * mean)


def law(log_snrs, num_resamples, noisy):
    """Mean and standard deviation of the unknown, by moments: every step is affine with Gaussian noise."""

    def of_guess(log_snr):
        a2 = share(log_snr)
        gain = np.sqrt(a2) * COV @ np.linalg.inv(a2 * COV + (1 - a2) * np.eye(2))
        return gain, MEAN - np.sqrt(a2) * gain @ MEAN

    def known(mean, cov, log_snr):
        mean, cov = mean.copy(), cov.copy()
        mean[0], cov[0], cov[:, 0] = np.sqrt(share(log_snr)) * KNOWN, 0.0, 0.0
        cov[0, 0] = 1 - share(log_snr)
        return mean, cov

    mean, cov = known(np.zeros(2), np.eye(2), log_snrs[-1])
    for s, t in zip(log_snrs[:-1][::-1], log_snrs[1:][::-1], strict=True):
        c, (gain, offset) = 1 - np.exp(t - s), of_guess(t)
        step = np.exp(t - s) * np.sqrt(share(s) / share(t)) * np.eye(2) + c * np.sqrt(share(s)) * gain
        for i in range(num_resamples):
            mean = step @ mean + c * np.sqrt(share(s)) * offset
            cov = step @ cov @ step.T + c * (1 - share(t if noisy else s)) * np.eye(2)
            mean, cov = known(mean, cov, s)
            if i < num_resamples - 1:
                kept = share(t) / share(s)
                mean, cov = np.sqrt(kept) * mean, kept * cov + (1 - kept) * np.eye(2)
    gain, offset = of_guess(log_snrs[0])
    return (gain @ mean + offset)[1], np.sqrt((gain @ cov @ gain.T)[1, 1])


@pytest.mark.parametrize(("num_resamples", "noisy"), [(1, True), (1, False), (5, True)])
def test_law_is_that_of_its_moments(num_resamples, noisy):
    variance = beta_variance() if noisy else posterior_variance()
    model = exact.diffusion(reverse_variance=variance, guess=guess)
    known = np.array([KNOWN, np.nan], np.float32)
    sample = inpaint(model, known, MASK, 20, num_resamples=num_resamples)
    x, z = exact.draw(sample, exact.gaussian(), 40_000)
    np.testing.assert_array_equal(x[:, 0], np.float32(KNOWN))
    mean, std = law(np.linspace(9.0, -9.0, 20), num_resamples, noisy)
    assert abs(np.mean(x[:, 1]) - mean) / (std / np.sqrt(len(x))) < 5
    assert abs(np.std(x[:, 1]) - std) / (std / np.sqrt(2 * len(x))) < 5
    # The known part of each latent is q's, given the datum.
    a2 = share(np.linspace(9.0, -9.0, 20))
    z_scores = (z[:, :, 0] - np.sqrt(a2) * KNOWN) / np.sqrt(1 - a2)
    assert np.max(np.abs(np.mean(z_scores, axis=0))) * np.sqrt(len(x)) < 5
    assert np.max(np.abs(np.var(z_scores, axis=0) - 1)) * np.sqrt(len(x) / 2) < 5


def test_the_conditional_law_is_neared_as_steps_are_redone():
    """By the moments that the last test holds the sampler to; each fourfold takes off more than half of the error."""
    at = functools.partial(law, np.linspace(9.0, -9.0, 100), noisy=True)
    means, stds = np.array([at(r) for r in (1, 4, 16, 64)]).T
    for errors in (np.abs(means - CONDITIONAL_MEAN), np.abs(stds - CONDITIONAL_STD)):
        assert np.all(errors[1:] < errors[:-1] / 2)
    assert abs(means[-1] - CONDITIONAL_MEAN) < 0.003 and abs(stds[-1] - CONDITIONAL_STD) < 0.001


def test_everything_known_and_nothing_known():
    model = exact.diffusion()
    known = jnp.array([0.3, -0.7])
    x, _ = inpaint(model, known, np.ones(2, bool), 5)(jax.random.key(0), exact.ring())
    np.testing.assert_array_equal(x, known)
    keys = jax.random.split(jax.random.key(0), 2)
    free = jax.vmap(inpaint(model, known, np.zeros(2, bool), 5), in_axes=(0, None))(keys, exact.ring())[0]
    assert np.all(np.asarray(free) != np.asarray(known)) and np.all(free[0] != free[1])


def test_the_number_of_calls():
    calls = []

    def counted(theta, z, log_snr):
        calls.append(1)
        return z

    with jax.disable_jit():
        inpaint(exact.diffusion(guess=counted), jnp.zeros(2), MASK, 4, num_resamples=3)(
            jax.random.key(0), exact.ring()
        )
    assert len(calls) == 3 * 3 + 1


@pytest.mark.parametrize(
    ("known", "mask", "num_resamples", "error", "message"),
    [
        (np.zeros(3), MASK, 1, ValueError, r"known: got shape \(3,\), expected \(2,\)"),
        (np.zeros(2), np.ones(3, bool), 1, ValueError, r"mask: got shape \(3,\), expected \(2,\)"),
        (np.zeros(2), np.ones(2), 1, TypeError, "mask: got float32, expected bool"),
        (np.zeros(2), MASK, 0, ValueError, "num_resamples: got 0, expected at least 1"),
    ],
)
def test_what_cannot_be_is_refused(known, mask, num_resamples, error, message):
    with pytest.raises(error, match=message):
        inpaint(exact.diffusion(), known, mask, 5, num_resamples=num_resamples)
