import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion import exact_scores as exact
from vdiff.diffusion import ancestral, between, clipped, ddim, dynamic_threshold, with_denoise


def test_sample_uses_the_new_guess():
    """A guess that is always 0.7: all that is left at z_1 is alpha_1 0.7 and a trace of noise."""
    changed = with_denoise(exact.diffusion(), lambda params, z, log_snr: jnp.full_like(z, 0.7))
    x, z = jax.jit(changed.sample)(jax.random.key(0), exact.ring())
    assert z.shape == (100, 2)
    np.testing.assert_allclose(x, [0.7, 0.7])
    np.testing.assert_allclose(z[0], [0.7, 0.7], atol=5 * np.exp(-4.5))


def test_the_same_guess_gives_the_same_samples():
    model = exact.diffusion()
    same = with_denoise(model, model.denoise)
    for got, expected in zip(
        same.sample(jax.random.key(1), exact.ring()),
        ancestral(model, 100)(jax.random.key(1), exact.ring()),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


def test_what_is_not_the_guess_stays():
    model, key, x = exact.diffusion(), jax.random.key(0), jnp.ones(2)
    changed = clipped(model, between(-1.0, 1.0))
    for name in ("init", "log_q", "sample_q", "log_snr", "reverse_variance", "likelihood", "shape"):
        assert getattr(changed, name) is getattr(model, name), name
    for call in (
        lambda: changed.log_joint(exact.ring(), x, x[None]),
        lambda: changed.elbo_terms(key, exact.ring(), x),
        lambda: changed.elbo_terms_at(key, exact.ring(), x, jnp.float32(0.5)),
        lambda: changed.end_terms(key, exact.ring(), x),
        lambda: changed.rate_at(key, exact.ring(), x, jnp.float32(0.5)),
        lambda: jax.jit(changed.elbo_estimate)(key, exact.ring(), x),
    ):
        with pytest.raises(ValueError, match="guesses were changed, expected the model as it was trained"):
            call()


def test_clipping_keeps_guesses_inside():
    """The ring reaches 1 + several tenths; clipped at 0.5 nothing does, by any sampler."""
    model = clipped(exact.diffusion(), between(-0.5, 0.5))
    sample = ddim(model, 10)
    x, _ = exact.draw(sample, exact.ring(), 50)
    assert (
        np.max(np.abs(x))
        <= 0.5
        < np.max(np.abs(exact.draw(ddim(exact.diffusion(), 10), exact.ring(), 50)[0]))
    )


def test_dynamic_threshold():
    """Scaled by the quantile where that is above the limit, left alone where it is not."""
    x = jnp.array([0.0, -1.0, 2.0, 4.0, 8.0])
    # The quantile 3/4 of the absolute values is 4.
    np.testing.assert_allclose(dynamic_threshold(0.75)(x), [0, -0.25, 0.5, 1, 1])
    np.testing.assert_allclose(dynamic_threshold(1.0, limit=2.0)(x), [0, -0.25, 0.5, 1, 2])
    np.testing.assert_allclose(dynamic_threshold(0.5)(0.3 * x), [0, -0.3, 0.6, 1, 1])
    inside = jnp.array([0.2, -0.9, 0.5])
    np.testing.assert_array_equal(dynamic_threshold(0.9)(inside), inside)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="low, high: got 1.0, -1.0"):
        between(1.0, -1.0)
    with pytest.raises(ValueError, match="quantile: got 0.0"):
        dynamic_threshold(0.0)
    with pytest.raises(ValueError, match="limit: got 0.0"):
        dynamic_threshold(0.9, limit=0.0)
    with pytest.raises(ValueError, match=r"bound: got \(\) from a guess of shape \(2,\)"):
        clipped(exact.diffusion(), jnp.sum).sample(jax.random.key(0), exact.ring())
