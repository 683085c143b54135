r"""The functions of a trained model beside its run: written when it ends, read without the model's code.

    run directory/exported/  manifest.json  params.npz  ema.npz  elbo_estimate.jaxexport  log_prob.jaxexport  ...

Every function has the arguments that it has as a model's: key, params, x, z, in that order. Parameters stay an
argument, so that one may choose the moving average or not, and differentiate by them.
"""

import hashlib
import inspect
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdiff.exported.containers import read_tree, write_tree
from vdiff.exported.function import PLATFORMS, from_bytes, to_bytes
from vdiff.types import Params, PyTree

FORMAT = 1
_FOLDER, _MANIFEST = "exported", "manifest.json"
_FUNCTIONS = {
    "elbo_estimate": (("key", "params", "x"), "Estimate the ELBO, unbiased in value and gradient; nats."),
    "log_prob": (("key", "params", "x"), "Compute log p(x); nats."),
    "sample": (("key", "params"), "Draw (x, z)."),
    "encode": (("params", "x"), "Compute the parameters of q(z | x)."),
    "decode": (("params", "z"), "Compute E[x | z], in the units of x."),
}


class ExportWarning(UserWarning):
    """Tell that a function of a run could not be exported."""


class Run(NamedTuple):
    """Hold a trained model as a run directory has it. A function that the model does not have is None.

    Each takes one datum, or any leading axes of data; a single key with many data is folded with each one's position.
    Each is jitted, and may be mapped and differentiated; see `load_function`.

    Attributes:
        params: the trained parameters.
        ema: their moving average, which evaluation and samples use.
        config: the run's settings.
        elbo_estimate: `(key, params, x) -> []`, nats; unbiased for the ELBO in value and gradient.
        log_prob: `(key, params, x) -> []`, nats; its docstring says by which estimate.
        sample: `(key, params) -> (x, z)`, ancestral, or by the run's sampler.
        encode: `(params, x) -> ` the parameters of q(z | x).
        decode: `(params, z) -> E[x | z]`, in the units of x.
    """

    params: Params
    ema: Params
    config: dict[str, Any]
    elbo_estimate: Callable[..., jax.Array] | None = None
    log_prob: Callable[..., jax.Array] | None = None
    sample: Callable[..., tuple[PyTree, PyTree]] | None = None
    encode: Callable[..., PyTree] | None = None
    decode: Callable[..., jax.Array] | None = None


def export_run(
    directory: str | Path,
    params: Params,
    ema: Params,
    functions: Mapping[str, Callable[..., PyTree]],
    *,
    x: PyTree,
    z: PyTree = (),
    on_function: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a run's parameters and functions for `load_run`, in the place of any that are there.

    A function that cannot be exported is left out, with a warning that says why: what can be, is written. Each can be
    differentiated once, `sample` only where x is floating-point. The first line of a docstring goes along.

    Args:
        directory: the run directory.
        params: the trained parameters.
        ema: their moving average.
        functions: of one datum, by name: elbo_estimate, log_prob, sample, encode, decode, as in `Run`; None for what
            the model does not have.
        x: an example of one datum, for its shape and dtype.
        z: an example of what `decode` takes.
        on_function: called with each function's name before it is exported.

    Raises:
        TypeError: if the parameters are not arrays in dicts, lists, tuples and NamedTuples.
        ValueError: if a function has another name.
        OSError: if the disk does not take it; functions written before stay.
    """
    unknown = sorted(set(functions) - set(_FUNCTIONS))
    if unknown:
        raise ValueError(f"functions: got {unknown[0]}, expected one of {', '.join(_FUNCTIONS)}")
    folder = Path(directory) / _FOLDER
    new = folder.with_name(f"{_FOLDER}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write_tree(new / "params.npz", params, "params")
    write_tree(new / "ema.npz", ema, "ema")
    examples = {"key": jax.eval_shape(jax.random.key, 0), "params": params, "x": x, "z": z}
    written, failed = {}, {}
    for name, function in functions.items():
        if function is None:
            continue
        on_function(name)
        arguments, about = _FUNCTIONS[name]
        try:
            content = _bytes_of(name, function, [examples[argument] for argument in arguments])
        except Exception as error:  # whatever a model raises when it is traced
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            warnings.warn(f"{name}: could not be exported ({failed[name]})", ExportWarning, stacklevel=2)
            continue
        about = (inspect.getdoc(function) or about).split("\n")[0]
        written[name] = {"file": f"{name}.jaxexport", "arguments": arguments, "about": about}
        (new / f"{name}.jaxexport").write_bytes(content)
    manifest = {
        "format": FORMAT,
        "versions": {"vdiff": metadata.version("vdiff"), "jax": jax.__version__},
        "platforms": PLATFORMS,
        "data": {"x": _shapes(x), "z": _shapes(z)},
        "functions": written,
        "failed": failed,
        "sha256": {path.name: _digest(path.read_bytes()) for path in sorted(new.iterdir())},
    }
    (new / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    old = folder.with_name(f"{_FOLDER}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_run(directory: str | Path) -> Run:
    """Read a finished run: its parameters, settings and functions, without the code of its model.

        run = vd.load_run("runs/vae-digits")
        nats = run.elbo_estimate(jax.random.key(0), run.ema, images)            # [N]

    Args:
        directory: the run directory.

    Returns:
        A `Run`.

    Raises:
        FileNotFoundError: if the directory holds no run, or none that is finished and exported.
        ValueError: if the files are damaged, or of a newer format.
    """
    directory = Path(directory)
    folder = directory / _FOLDER
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"directory: got {directory}, expected a run directory, with a config.json in it"
        )
    if not (folder / _MANIFEST).is_file():
        finished = (directory / "result.json").is_file()
        fix = "run the same command once more with --export" if finished else "let the same command finish it"
        state = "holds no exported functions" if finished else "holds an unfinished run"
        raise FileNotFoundError(f"directory: got {directory}, which {state}, expected {folder}; {fix}")
    manifest = _json(folder / _MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: got functions in format {manifest.get('format')}, expected {FORMAT}; use vdiff "
            f"{manifest.get('versions', {}).get('vdiff')}, which wrote them, or export the run anew"
        )
    for name, expected in manifest["sha256"].items():
        path = folder / name
        if not path.is_file() or _digest(path.read_bytes()) != expected:
            raise ValueError(
                f"{path}: got a file that is not as it was written, expected it unchanged; export it anew"
            )
    for name, reason in manifest["failed"].items():
        warnings.warn(
            f"{name}: could not be exported when the run ended ({reason})", ExportWarning, stacklevel=2
        )
    functions = {
        name: from_bytes(
            (folder / entry["file"]).read_bytes(),
            str(folder / entry["file"]),
            entry["arguments"],
            entry["about"],
        )
        for name, entry in manifest["functions"].items()
    }
    params, ema = (
        Params(**jax.tree.map(jnp.asarray, read_tree(folder / f"{name}.npz"))) for name in ("params", "ema")
    )
    return Run(params, ema, _json(directory / "config.json"), **functions)


def _bytes_of(name: str, function: Callable[..., PyTree], examples: list[PyTree]) -> bytes:
    order = 1
    if name == "sample":
        x, _ = jax.eval_shape(function, *examples)
        order = int(any(jnp.issubdtype(leaf.dtype, np.inexact) for leaf in jax.tree.leaves(x)))
    axes = [None if argument == "params" else 0 for argument in _FUNCTIONS[name][0]]
    return to_bytes(function, *examples, in_axes=axes, vjp_order=order)


def _shapes(tree: PyTree) -> list[str]:
    return [f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in jax.tree.leaves(tree)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: got a damaged file, expected JSON") from error
