import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion import exact_scores as exact
from vdiff.diffusion import heun, in_log_snr, in_sigma, karras


@pytest.mark.parametrize("weight", [in_log_snr, in_sigma])
def test_error_falls_with_the_square(weight):
    fitted = exact.slopes(lambda model, n: heun(model, n, weight=weight))
    np.testing.assert_allclose(fitted[-1], 2, atol=0.25)


def test_in_sigma_is_the_published_algorithm():
    """Algorithm 2 of Karras et al. in y = z / alpha, step by step, without churn."""
    with jax.enable_x64(True):
        model = exact.diffusion()
        _, z = jax.jit(heun(model, 12, weight=in_sigma, grid=karras()))(jax.random.key(0), exact.ring())
        z = np.asarray(z)
        noise = np.linspace(np.exp(-4.5 / 7), np.exp(4.5 / 7), 12) ** 7

        def guess(y, s):
            log_snr = jnp.asarray(-2 * np.log(s))
            return np.asarray(model.denoise(exact.ring(), jnp.asarray(y / np.sqrt(1 + s * s)), log_snr))

        y = z[-1] * np.sqrt(1 + noise[-1] ** 2)
        for i in range(11, 0, -1):
            slope = (y - guess(y, noise[i])) / noise[i]
            euler = y + (noise[i - 1] - noise[i]) * slope
            second = (euler - guess(euler, noise[i - 1])) / noise[i - 1]
            y = y + (noise[i - 1] - noise[i]) * (slope + second) / 2
            np.testing.assert_allclose(z[i - 1], y / np.sqrt(1 + noise[i - 1] ** 2), rtol=1e-9, atol=1e-9)


def test_without_churn_it_is_a_map_of_the_last_latent():
    """Two keys that begin at the same z_m would be chance: keys that differ in the steps alone must not matter."""
    model = exact.diffusion()
    _, z = exact.draw(heun(model, 12), exact.gaussian(), 64)
    # On a Gaussian the map is affine: a straight line explains all.
    design = np.stack([z[:, -1, 0], np.ones(64)], axis=1)
    for churn, exactly in ((0.0, True), (4.0, False)):
        _, z = exact.draw(heun(model, 12, churn=churn), exact.gaussian(), 64)
        left = z[:, 0, 0] - design @ np.linalg.lstsq(design, z[:, 0, 0])[0]
        assert (np.std(left) < 1e-5) == exactly


def test_churn_keeps_the_law():
    """Noise is put back as q does it: the spread stays that of the law, up to the solver's own error."""
    model = exact.diffusion()
    x, _ = exact.draw(heun(model, 120, churn=40.0), exact.gaussian(), 20_000)
    num = x.size
    assert abs(np.mean(x) - exact.MEAN) / (exact.STD / np.sqrt(num)) < 5
    assert abs(np.std(x) - exact.STD) / (exact.STD / np.sqrt(2 * num)) < 5


def test_churn_stays_where_it_is_allowed():
    model = exact.diffusion()
    plain = heun(model, 9)
    between = heun(model, 9, churn=9.0, churn_between=(-1.0, 1.0))
    (_, z), (_, churned) = (exact.draw(sampler, exact.ring(), 4) for sampler in (plain, between))
    # log-SNRs 9, 6.75, .. -9: index 4 is 0, the only one inside.
    np.testing.assert_array_equal(z[:, 4:], churned[:, 4:])
    assert np.all(np.abs(z[:, 3] - churned[:, 3]) > 1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"churn": -1.0}, "churn, churn_noise: got -1.0, 1.0"),
        ({"churn_between": (2.0, 1.0)}, "churn_between: got 2.0, 1.0, expected low < high"),
    ],
)
def test_impossible_churn_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        heun(exact.diffusion(), 10, **settings)
