"""A run's functions, written by one process and called in another that has neither its model nor a network library."""

import inspect
import json
import pickle
import subprocess
import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests.processes import with_devices
from vdiff.exported.run import ExportWarning
from vdiff.types import Params

SHAPE, LATENT = (3, 2), 2
MODEL = vd.vae(
    vd.nets.mlp(SHAPE, (2 * LATENT,), hidden=(4,)),
    vd.nets.mlp((LATENT,), vd.likelihoods.categorical(5).out_shape(SHAPE), hidden=(4,)),
    latent_dim=LATENT,
    likelihood=vd.likelihoods.categorical(5),
)
KEY = jax.random.key(11)
PARAMS, EMA = MODEL.init(jax.random.key(0)), MODEL.init(jax.random.key(1))
IMAGES = jax.random.randint(jax.random.key(2), (4, *SHAPE), 0, 5).astype(jnp.uint8)
IMPORTANCE = vd.importance_log_prob(MODEL, 6, chunk_size=4)


def log_prob(key, params, x):
    """Estimate log p(x) from 6 draws.

    More of this docstring.
    """
    return IMPORTANCE(key, params, x).value


FUNCTIONS = {
    "elbo_estimate": MODEL.elbo_estimate,
    "log_prob": log_prob,
    "sample": MODEL.sample,
    "encode": MODEL.encode,
    "decode": MODEL.decode,
}


def write_run(directory, functions=FUNCTIONS):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"latent_dim": LATENT}))
    (directory / "result.json").write_text("{}")
    vd.export_run(directory, PARAMS, EMA, functions, x=IMAGES[0], z=jnp.zeros(LATENT))
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


def results(run):
    """Everything a caller may do, by name; `run` may be a loaded one or the model."""
    keys, axes = jax.random.split(KEY, 4), (0, None, 0)
    out = {}
    for name in ("elbo_estimate", "log_prob"):
        f = getattr(run, name)
        out[name] = jax.vmap(f, in_axes=axes)(keys, run.ema, IMAGES)
        out[f"{name} of params"] = jax.jit(f)(keys[0], run.params, IMAGES[0])
        mean = lambda params, f=f: jnp.mean(jax.vmap(f, in_axes=axes)(keys, params, IMAGES) ** 2)  # noqa: E731
        out[f"{name} slope of the mean"] = jax.jit(jax.grad(mean))(run.ema)
        of_each = jax.vmap(jax.grad(f, argnums=1), in_axes=axes)
        out[f"{name} slope by datum"] = jax.jit(of_each)(keys, run.ema, IMAGES)
    out["sample"] = jax.vmap(run.sample, in_axes=(0, None))(keys, run.ema)
    out["encode"] = jax.vmap(run.encode, in_axes=(None, 0))(run.ema, IMAGES)
    z = jnp.linspace(-1.0, 1.0, 4 * LATENT).reshape(4, LATENT)
    out["decode"] = jax.vmap(run.decode, in_axes=(None, 0))(run.ema, z)
    out["decode by z"] = jax.vmap(jax.jacrev(run.decode, argnums=1), in_axes=(None, 0))(run.ema, z)
    return out


FRESH = """
import importlib.util, pickle, sys, types

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flax", "optax", "orbax", "chex", "experiments") or name in (
            "vdiff.models", "vdiff.nets", "vdiff.diffusion", "vdiff.train", "vdiff.estimators"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Blocked())
house = types.ModuleType("vdiff")  # without its __init__, which imports all the parts
house.__path__ = [sys.argv[1]]
sys.modules["vdiff"] = house

import jax
import jax.numpy as jnp
from vdiff.exported.run import load_run

LATENT = 2
KEY = jax.random.key(11)
IMAGES = jax.random.randint(jax.random.key(2), (4, 3, 2), 0, 5).astype(jnp.uint8)

RESULTS
run = load_run(sys.argv[2])
assert run.config == {"latent_dim": 2} and type(run.ema).__name__ == "Params"
out = [jax.device_get(jax.tree.leaves(value)) for value in results(run).values()]
pickle.dump(out, open(sys.argv[3], "wb"))

# And of data that lie on four devices.
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
keys, images = jax.device_put((jax.random.split(KEY, 4), IMAGES), split)
nats = jax.jit(jax.vmap(run.elbo_estimate, in_axes=(0, None, 0)))(keys, run.ema, images)
assert len(nats.sharding.device_set) == 4
assert jnp.allclose(nats, jnp.asarray(out[0][0]), rtol=1e-6, atol=0.0)
"""


@pytest.mark.slow
def test_a_fresh_interpreter_computes_what_the_model_does(directory, tmp_path):
    program = FRESH.replace("RESULTS", inspect.getsource(results))
    command = [sys.executable, "-c", program, *vd.__path__, str(directory), str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=with_devices(4)
    )
    assert done.returncode == 0, done.stderr
    got = pickle.loads((tmp_path / "out").read_bytes())
    model = SimpleNamespace(params=PARAMS, ema=EMA, **FUNCTIONS)
    for (name, expected), values in zip(results(model).items(), got, strict=True):
        expected = jax.tree.leaves(expected)
        # A Params has its parts in another order than the dict it is in the file, but here only these two.
        for a, b in zip(values, expected, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, name
            off, size = (np.linalg.norm(np.float64(v).ravel()) for v in (np.float64(a) - np.float64(b), b))
            assert off <= 1e-6 * size, (name, off / size)


@pytest.fixture(scope="module")
def run(directory):
    return vd.load_run(directory)


def test_parameters_come_back_bit_by_bit(run):
    for got, expected in ((run.params, PARAMS), (run.ema, EMA)):
        assert isinstance(got, Params) and jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_batch_and_one_key_are_what_evaluate_computes(run):
    of_evaluate = vd.evaluate.evaluate(MODEL.elbo_estimate, KEY, EMA, np.asarray(IMAGES))
    np.testing.assert_allclose(run.elbo_estimate(KEY, run.ema, IMAGES), of_evaluate, rtol=1e-6)


def test_docstrings_and_names_go_along(run):
    assert run.log_prob.__doc__ == "Estimate log p(x) from 6 draws."
    assert run.encode.__doc__ == "Compute the parameters of q(z | x)."
    with pytest.raises(TypeError, match="x: got dtype float32, expected uint8"):
        run.encode(run.ema, jnp.ones(SHAPE))
    with pytest.raises(TypeError, match=r"key: got dtype uint32.*jax.random.key"):
        run.sample(jax.random.key_data(KEY), run.ema)
    with pytest.raises(TypeError, match="params: got a tree"):
        run.sample(KEY, run.ema.theta)


def test_what_a_model_lacks_is_none_and_what_fails_is_said_twice(tmp_path):
    def decode(params, z):
        raise RuntimeError("no such thing\nand more")

    with pytest.warns(ExportWarning, match=r"decode: could not be exported \(no such thing\)"):
        write_run(tmp_path / "run", {"encode": MODEL.encode, "decode": decode, "sample": None})
    with pytest.warns(
        ExportWarning, match=r"decode: could not be exported when the run ended \(no such thing\)"
    ):
        run = vd.load_run(tmp_path / "run")
    assert run.decode is None and run.sample is None and run.log_prob is None
    loc, _ = run.encode(run.ema, IMAGES)
    assert loc.shape == (4, LATENT)
    with pytest.raises(ValueError, match="functions: got score, expected one of elbo_estimate"):
        vd.export_run(tmp_path / "run", PARAMS, EMA, {"score": MODEL.encode}, x=IMAGES[0])
    # Written anew, in the place of the old.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_run(tmp_path / "run", {"decode": MODEL.decode})
        assert vd.load_run(tmp_path / "run").encode is None
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "exported", "result.json"]


def test_a_mixture_has_a_derivative_of_its_samples(tmp_path):
    mixture = vd.gmm(2, 3)
    params = mixture.init(KEY)
    (tmp_path / "config.json").write_text("{}")
    vd.export_run(tmp_path, params, params, {"sample": mixture.sample}, x=jnp.zeros(3))
    sample = vd.load_run(tmp_path).sample
    of_loc = lambda f, loc: f(KEY, params._replace(theta=params.theta | {"loc": loc}))[0].sum()  # noqa: E731
    slope = jax.grad(lambda loc: of_loc(sample, loc))(params.theta["loc"])
    np.testing.assert_array_equal(
        slope, jax.grad(lambda loc: of_loc(mixture.sample, loc))(params.theta["loc"])
    )
    assert slope.sum() == 3.0


def one_line(directory, error, message):
    with pytest.raises(error, match=message) as raised:
        vd.load_run(directory)
    assert "\n" not in str(raised.value)


def test_what_is_no_finished_run_is_refused_in_one_line(tmp_path):
    one_line(tmp_path / "none", FileNotFoundError, "none, expected a run directory")
    one_line(tmp_path, FileNotFoundError, "with a config.json")
    (tmp_path / "config.json").write_text("{}")
    one_line(tmp_path, FileNotFoundError, "holds an unfinished run.*let the same command finish it")
    (tmp_path / "result.json").write_text("{}")
    one_line(tmp_path, FileNotFoundError, "holds no exported functions.*--export")


def test_damaged_and_newer_files_are_refused_in_one_line(tmp_path):
    folder = write_run(tmp_path, {"decode": MODEL.decode}) / "exported"
    for name in ("ema.npz", "decode.jaxexport"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + b"?")
        one_line(tmp_path, ValueError, f"{name}: got a file that is not as it was written")
        (folder / name).write_bytes(whole)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    one_line(
        tmp_path, ValueError, r"got functions in format 2, expected 1; use vdiff 0.1.0, which wrote them"
    )
    (folder / "manifest.json").write_text("{")
    one_line(tmp_path, ValueError, "manifest.json: got a damaged file, expected JSON")
