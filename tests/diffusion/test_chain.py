"""What a chain promises beside its ELBO: times, steps, and functions that agree with each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests.diffusion.cases import tiny_denoiser
from vdiff import diffusion

BETAS = np.array([0.2, 0.3, 0.4, 0.5], np.float32)


def model(**settings):
    settings = {"predict": vd.predict.velocity, "likelihood": diffusion.gaussian(0.5)} | settings
    return vd.ddpm(tiny_denoiser(2), BETAS, shape=(2,), **settings)


def test_time_passes_through_every_latent():
    made, exact = model(), np.log(np.cumprod(1 - BETAS) / (1 - np.cumprod(1 - BETAS)))
    params = made.init(jax.random.key(0))
    for i, log_snr in enumerate(exact):
        assert float(made.log_snr(params, jnp.float32(i / 3))) == pytest.approx(log_snr, rel=1e-5)
    half = float(made.log_snr(params, jnp.float32(0.5)))
    assert half == pytest.approx((exact[1] + exact[2]) / 2, rel=1e-5), "linear in between"


def test_every_step_is_drawn_and_no_other():
    """u in [i/3, (i+1)/3) is the step from latent i + 2 to latent i + 1; the first and the last are reached."""
    made, exact = model(), diffusion.log_snrs_of(BETAS)
    params, x = made.init(jax.random.key(0)), jnp.array([0.5, -1.0])
    for u, i in ((0.0, 0), (0.3333, 0), (0.3334, 1), (0.5, 1), (0.6667, 2), (0.99999994, 2)):
        rate = made.rate_at(jax.random.key(1), params, x, jnp.float32(u))
        assert float(rate.log_snr) == float(exact[i + 1])
        assert float(rate.density) == pytest.approx(1 / 3 / float(exact[i] - exact[i + 1]), rel=1e-5)


def test_steps_drawn_by_weights_cover_the_unit_interval():
    made = model(times=diffusion.learned_times(4))
    params = made.init(jax.random.key(0))._replace(lam=jnp.log(jnp.array([0.5, 0.2, 0.3])))
    x, exact = jnp.array([0.5, -1.0]), diffusion.log_snrs_of(BETAS)
    for u, i, p in ((0.0, 0, 0.5), (0.49, 0, 0.5), (0.51, 1, 0.2), (0.71, 2, 0.3), (0.99999994, 2, 0.3)):
        rate = made.rate_at(jax.random.key(1), params, x, jnp.float32(u))
        assert float(rate.log_snr) == float(exact[i + 1])
        assert float(rate.density) == pytest.approx(
            (0.999 * p + 0.001 / 3) / float(exact[i] - exact[i + 1]), rel=1e-5
        )


def test_it_samples_by_its_own_latents():
    made = model()
    params, key = made.init(jax.random.key(0)), jax.random.key(1)
    log_snrs = diffusion.log_snrs_of(BETAS)
    again = vd.ancestral(made, 4, grid=diffusion.fixed(log_snrs))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5),
        made.sample(key, params),
        again(key, params),
    )


@pytest.mark.slow
def test_its_functions_agree():
    """The linter for users' own models: q and its draws, the joint and its draws, what reads which parameters."""
    made = model()
    report = vd.check_model(
        made, made.init(jax.random.key(0)), jnp.array([0.5, -1.0]), jax.random.key(1), num_draws=4000
    )
    assert "FAIL" not in str(report), str(report)


@pytest.mark.parametrize(
    "estimator", [vd.pathwise, vd.doubly_reparameterized, vd.score_function], ids=lambda e: e.__name__
)
def test_generic_estimators_take_it(estimator):
    """The same bound of the same draws, whichever gradient is asked for."""
    made = model()
    params, x, key = made.init(jax.random.key(0)), jnp.array([0.5, -1.0]), jax.random.key(1)
    value = vd.total(estimator(made, vd.iwae, 3))(key, params, x)
    z = jax.vmap(made.sample_q, in_axes=(0, None, None))(jax.random.split(key, 3), params, x)
    weights = [float(made.log_joint(params, x, one) - made.log_q(params, x, one)) for one in z]
    assert float(value) == pytest.approx(float(np.log(np.mean(np.exp(weights)))), rel=1e-5)
