"""One layer's density against NumPyro's, for latents of any shape."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions.kl import kl_divergence

from tests import toys
from vdiff.models import gaussian_layer

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_density_and_divergence(shape):
    """Log-density, entropy and KL divergence, summed over all units."""
    q, p = (gaussian_layer.halved("net", jnp.asarray(RNG.normal(size=shape), jnp.float32)) for _ in range(2))
    assert q.loc.shape == q.log_scale.shape == (*shape[:-1], shape[-1] // 2)
    of_q, of_p = (dist.Normal(g.loc, jnp.exp(g.log_scale)) for g in (q, p))

    @toys.quick_jit
    def run():
        z = gaussian_layer.drawn(jax.random.key(0), q)
        ours = [gaussian_layer.log_prob(z, p), gaussian_layer.entropy(q), gaussian_layer.kl(q, p)]
        theirs = [of_p.log_prob(z), of_q.entropy(), kl_divergence(of_q, of_p)]
        return z, ours, [jnp.sum(of) for of in theirs], gaussian_layer.kl(q, q)

    z, ours, theirs, zero = run()
    assert z.shape == q.loc.shape and float(zero) == 0.0
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_draws_are_loc_plus_scaled_noise():
    key, of = jax.random.key(3), gaussian_layer.Gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, -1.0]))
    eps = np.asarray(jax.random.normal(key, (2,)))
    np.testing.assert_allclose(gaussian_layer.drawn(key, of), of.loc + np.exp(of.log_scale) * eps, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 5), (0,)])
def test_what_cannot_be_halved_is_refused(shape):
    with pytest.raises(ValueError, match=r"priors\[1\]: got output of shape .*expected an even last axis"):
        gaussian_layer.halved("priors[1]", jnp.zeros(shape))
