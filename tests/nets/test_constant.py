"""A learned array is its own parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.nets import constant


def test_it_is_its_parameter(key):
    net = constant((2, 3), value=np.arange(3.0))
    params = net.init(key)
    np.testing.assert_array_equal(params, np.broadcast_to(np.arange(3.0), (2, 3)))
    assert params.dtype == jnp.float32 and net.apply(params) is params
    np.testing.assert_array_equal(jax.grad(lambda p: jnp.sum(net.apply(p)))(params), np.ones((2, 3)))
    np.testing.assert_array_equal(constant((2,)).init(key), np.zeros(2))


def test_raw_keys_are_refused():
    with pytest.raises(TypeError, match="expected a typed key"):
        constant((2,)).init(jax.random.PRNGKey(0))
