"""Training states compared, and the small VAE whose states they are: what the tests of several devices share."""

import jax
import numpy as np

import vdiff as vd

LATENT_DIM = 4


def small_vae():
    """A VAE of the digits, and the images that it is trained on."""
    data = vd.data.load("digits")
    shape, likelihood = data.train.shape[1:], vd.likelihoods.categorical(data.levels)
    model = vd.vae(
        vd.nets.mlp(shape, (2 * LATENT_DIM,), hidden=(24,)),
        vd.nets.mlp((LATENT_DIM,), likelihood.out_shape(shape), hidden=(24,)),
        latent_dim=LATENT_DIM,
        likelihood=likelihood,
    )
    return model, data.train


def leaves_of(tree):
    """The leaves of a state, or of another tree, by path, on the host."""
    if isinstance(tree, vd.TrainState):
        tree = tree._replace(key=jax.random.key_data(tree.key))
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def numbers(tree):
    """The same in float64."""
    return {name: leaf.astype(np.float64) for name, leaf in leaves_of(tree).items()}


def distance(one, other):
    """The largest over the leaves of |a - b| / |b|, norms over a leaf."""
    assert one.keys() == other.keys()
    norms = [
        np.linalg.norm(one[name] - other[name]) / max(np.linalg.norm(other[name]), 1e-30) for name in one
    ]
    return float(max(norms))
