"""A tiny run that the tests of checkpoints share, and ways to damage a file."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vdiff as vd

LATENT_DIM, SHAPE = 2, (3, 2)


def build(hidden=(5,), network=vd.nets.mlp):
    return vd.vae(
        network(SHAPE, (2 * LATENT_DIM,), hidden=hidden),
        network((LATENT_DIM,), SHAPE, hidden=hidden),
        latent_dim=LATENT_DIM,
        likelihood=vd.likelihoods.bernoulli(),
    )


MODEL, OPTIMIZER = build(), optax.adam(1e-2)


def start(model=MODEL, optimizer=OPTIMIZER, seed=1):
    return vd.init_state(jax.random.key(seed), model, optimizer)


def at(step, seed=1):
    return start(seed=seed)._replace(step=jnp.int32(step))


def batches(step):
    return np.random.default_rng((5, step)).integers(0, 2, size=(4, *SHAPE)).astype(np.uint8)


def equal(one, other):
    """Same structure, same dtypes, same bits; keys by their data."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def names_in(directory):
    """What lies in a directory, all of it."""
    return {path.name for path in directory.iterdir()}


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()
