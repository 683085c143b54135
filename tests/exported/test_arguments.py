"""Arguments with any leading axes, laid out in rows; what does not fit is refused in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.exported.arguments import Spec, lay_out, leaves_of

KEY = Spec("key", (), jax.random.key(0).dtype, True)
SCALE = Spec("params['scale']", (2,), np.dtype(np.float32), False)
IMAGE = Spec("x", (3, 2), np.dtype(np.uint8), True)
SPECS = [KEY, SCALE, IMAGE]


def arrays(*batch, key_batch=None):
    keys = jax.random.split(jax.random.key(1), batch if key_batch is None else key_batch)
    size = int(np.prod(batch)) * 6
    return [keys, jnp.ones(2), jnp.arange(size, dtype=jnp.uint8).reshape(*batch, 3, 2)]


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (2, 1, 2)])
def test_leading_axes_become_one(batch):
    leaves = arrays(*batch)
    got, (keys, scale, images) = lay_out(leaves, SPECS)
    size = int(np.prod(batch))
    assert got == batch and keys.shape == (size,) and images.shape == (size, 3, 2) and scale.shape == (2,)
    np.testing.assert_array_equal(images.reshape(*batch, 3, 2), leaves[2])
    np.testing.assert_array_equal(jax.random.key_data(keys.reshape(batch)), jax.random.key_data(leaves[0]))


def test_one_key_for_many_data_is_folded_with_their_positions():
    key = jax.random.key(7)
    _, (keys, *_) = lay_out([key, *arrays(2, 3)[1:]], SPECS)
    expected = jnp.stack([jax.random.fold_in(key, i) for i in range(6)])
    np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(expected))


def test_one_datum_with_many_keys_is_repeated():
    keys, scale, _ = arrays(4)
    x = arrays()[2]
    batch, (_, _, images) = lay_out([keys, scale, x], SPECS)
    assert batch == (4,)
    np.testing.assert_array_equal(images, jnp.stack([x] * 4))


@pytest.mark.parametrize(
    ("i", "bad", "error", "message"),
    [
        (0, jnp.zeros((5, 2), jnp.uint32), TypeError, "key: got dtype uint32, .*jax.random.key"),
        (2, jnp.zeros((5, 3, 2)), TypeError, "x: got dtype float32, expected uint8; convert it"),
        (2, jnp.zeros((5, 2, 2), jnp.uint8), ValueError, r"x: got shape \[5, 2, 2\], expected \[..., 3, 2\]"),
        (2, jnp.zeros((2,), jnp.uint8), ValueError, r"x: got shape \[2\], expected \[..., 3, 2\]"),
        (2, jnp.zeros((4, 3, 2), jnp.uint8), ValueError, r"x: got leading axes \[4\] beside \[5\]"),
        (1, jnp.zeros((5, 2)), ValueError, r"params\['scale'\]: got shape \[5, 2\], expected \[2\]"),
    ],
)
def test_what_does_not_fit_is_named(i, bad, error, message):
    leaves = arrays(5)
    leaves[i] = bad
    with pytest.raises(error, match=message) as raised:
        lay_out(leaves, SPECS)
    assert "\n" not in str(raised.value)


def test_no_data_are_refused():
    with pytest.raises(ValueError, match="at least one datum"):
        lay_out([jax.random.key(0), jnp.ones(2), jnp.zeros((0, 3, 2), jnp.uint8)], SPECS)


def test_another_number_or_structure_of_arguments_is_refused():
    tree = jax.tree.structure((0, {"scale": 0}))
    with pytest.raises(TypeError, match=r"got 1, expected 2 \(x, params\)"):
        leaves_of((1.0,), tree, ("x", "params"))
    with pytest.raises(TypeError, match=r"params: got a tree \{'loc': \*\}, expected \{'scale': \*\}"):
        leaves_of((1.0, {"loc": 1.0}), tree, ("x", "params"))
    x, scale = leaves_of((1.0, {"scale": np.ones(3)}), tree, ("x", "params"))
    assert x.shape == () and scale.shape == (3,)
