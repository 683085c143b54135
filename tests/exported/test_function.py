"""A function in a file, called in an interpreter that has jax alone and in one that has vdiff."""

import json
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from vdiff.types import Params


class Out(NamedTuple):
    nats: object
    pixels: object


def score(key, params, x):
    """Of one datum: nats with noise in them, and a number that has no derivative."""
    hidden = jnp.tanh(params.theta["w"] @ (x.ravel().astype(jnp.float32) / 8.0))
    noise = jax.random.normal(key, hidden.shape)
    return Out(jnp.sum(hidden + params.lam * noise), jnp.sum(x, dtype=jnp.int32))


PARAMS = Params(theta={"w": jnp.sin(jnp.arange(12.0)).reshape(2, 6)}, lam=jnp.array(0.5))
IMAGES = jnp.arange(30, dtype=jnp.uint8).reshape(5, 3, 2)
KEYS = jax.random.split(jax.random.key(3), 5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "score.jaxexport"
    vd.export(path, score, KEYS[0], PARAMS, IMAGES[0], in_axes=(0, None, 0))
    return path


@pytest.fixture(scope="module")
def loaded(path):
    return vd.load_function(path)


def agree(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.linalg.norm(b))


ALONE = """
import importlib.machinery
import sys

ALLOWED = {"jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers"} | sys.stdlib_module_names

class OnlyJax:
    def find_spec(self, name, path=None, target=None):
        is_there = importlib.machinery.PathFinder.find_spec(name, path) is not None
        if is_there and name.split(".")[0] not in ALLOWED and not name.startswith(("_", "jax_")):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, OnlyJax())
for name in ("vdiff", "flax", "optax", "orbax", "chex", "jaxtyping"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " could be imported")

import json
import pathlib
import jax
import jax.export
import jax.numpy as jnp

score = jax.export.deserialize(pathlib.Path(sys.argv[1]).read_bytes())
w = jnp.sin(jnp.arange(12.0)).reshape(2, 6)
params = {"theta": {"w": w}, "phi": (), "lam": jnp.array(0.5), "cv": ()}
images = jnp.arange(30, dtype=jnp.uint8).reshape(5, 3, 2)
keys = jax.random.split(jax.random.key(3), 5)

mean = lambda params, n: jnp.mean(score.call(keys[:n], params, images[:n])["nats"])
out = score.call(keys, params, images)
gradient = jax.jit(jax.grad(mean), static_argnums=1)(params, 4)
numbers = out["nats"], out["pixels"], gradient["theta"]["w"], gradient["lam"]
print(json.dumps([n.tolist() for n in numbers]))
"""


def test_the_file_runs_where_there_is_only_jax(path):
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    nats, pixels, w, lam = json.loads(done.stdout)
    expected = jax.vmap(score, in_axes=(0, None, 0))(KEYS, PARAMS, IMAGES)
    agree(np.array(nats), expected.nats)
    assert pixels == expected.pixels.tolist()
    mean = lambda params: jnp.mean(jax.vmap(score, in_axes=(0, None, 0))(KEYS[:4], params, IMAGES[:4]).nats)  # noqa: E731
    gradient = jax.grad(mean)(PARAMS)
    agree([np.array(w), np.array(lam)], [gradient.theta["w"], gradient.lam])


def test_values_with_any_leading_axes(loaded):
    expected = jax.vmap(score, in_axes=(0, None, 0))(KEYS, PARAMS, IMAGES)._asdict()
    agree(loaded(KEYS[1], PARAMS, IMAGES[1]), score(KEYS[1], PARAMS, IMAGES[1])._asdict())
    agree(loaded(KEYS, PARAMS, IMAGES), expected)
    agree(jax.jit(jax.vmap(loaded, in_axes=(0, None, 0)))(KEYS, PARAMS, IMAGES), expected)
    tall = loaded(KEYS[:, None], PARAMS, IMAGES[:, None])
    assert tall["nats"].shape == (5, 1) and tall["pixels"].dtype == jnp.int32
    agree(tall["nats"][:, 0], expected["nats"])


def test_one_key_gives_every_datum_its_own_noise(loaded):
    """As `evaluate` does it."""
    key = jax.random.key(9)
    of_evaluate = vd.evaluate.evaluate(lambda *args: score(*args).nats, key, PARAMS, np.asarray(IMAGES))
    agree(loaded(key, PARAMS, IMAGES)["nats"], of_evaluate)


def test_derivatives_of_the_callers_own_code(loaded):
    mine = lambda *args: loaded(*args)["nats"] ** 2  # noqa: E731
    own = lambda *args: score(*args).nats ** 2  # noqa: E731
    axes = (0, None, 0)
    agree(
        jax.jit(jax.vmap(jax.grad(mine, 1), in_axes=axes))(KEYS, PARAMS, IMAGES),
        jax.vmap(jax.grad(own, 1), in_axes=axes)(KEYS, PARAMS, IMAGES),
    )
    agree(
        jax.grad(lambda p: jnp.mean(jax.vmap(mine, in_axes=axes)(KEYS, p, IMAGES)))(PARAMS),
        jax.grad(lambda p: jnp.mean(jax.vmap(own, in_axes=axes)(KEYS, p, IMAGES)))(PARAMS),
    )
    gradient = jax.grad(lambda p: jnp.sum(mine(KEYS, p, IMAGES)))(PARAMS)
    assert isinstance(gradient, Params)


def test_no_axes_mean_that_each_datum_has_its_own_of_all(tmp_path):
    vd.export(tmp_path / "f", lambda a, b: a * jnp.sum(b), jnp.ones(()), jnp.ones(2), vjp_order=2)
    f = vd.load_function(tmp_path / "f")
    a, b = jnp.arange(3.0), jnp.arange(6.0).reshape(3, 2)
    agree(f(a, b), a * b.sum(1))
    agree(jax.vmap(jax.grad(jax.grad(lambda a, b: f(a, b) ** 2)))(a, b), 2 * b.sum(1) ** 2)


def test_a_function_that_calls_a_loaded_one_is_exported_too(loaded, tmp_path):
    def doubled(key, params, x):
        return 2 * loaded(key, params, x)["nats"]

    vd.export(tmp_path / "f", doubled, KEYS[0], PARAMS, IMAGES[0], in_axes=(0, None, 0))
    f, axes = vd.load_function(tmp_path / "f"), (0, None, 0)
    own = lambda *args: 2 * score(*args).nats  # noqa: E731
    agree(f(KEYS, PARAMS, IMAGES), jax.vmap(own, in_axes=axes)(KEYS, PARAMS, IMAGES))
    slopes = [
        jax.grad(lambda p, f=f: jnp.sum(jax.vmap(f, in_axes=axes)(KEYS, p, IMAGES)))(PARAMS) for f in (f, own)
    ]
    agree(*slopes)


def test_it_is_exported_for_every_platform(path):
    exported = jax.export.deserialize(path.read_bytes())
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"} and exported.fun_name == "score"


@pytest.mark.parametrize("axes", [(0,), (None, None, None), (0, None, 1)])
def test_axes_that_do_not_fit_are_refused(axes, tmp_path):
    with pytest.raises(ValueError, match="in_axes: got"):
        vd.export(tmp_path / "f", score, KEYS[0], PARAMS, IMAGES[0], in_axes=axes)
    assert not list(tmp_path.iterdir())


def test_what_is_no_such_file_is_refused_in_one_line(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file written by vdiff.export"):
        vd.load_function(tmp_path / "none")
    for content in (b"", b"nothing of the kind", path.read_bytes()[:2000]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ValueError, match="bad: got a file that jax .* cannot read") as raised:
            vd.load_function(tmp_path / "bad")
        assert "\n" not in str(raised.value)


def test_arguments_are_named_by_position(loaded):
    with pytest.raises(TypeError, match="argument 2: got dtype float32, expected uint8"):
        loaded(KEYS, PARAMS, IMAGES.astype(jnp.float32))
