"""What a finished run leaves for other programs: its trained functions, read by `vd.load_run`."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import jax

import vdiff as vd
from experiments import runs
from vdiff.exported.run import ExportWarning
from vdiff.types import Key, Params, PyTree


def export_functions(
    config: runs.RunConfig,
    directory: Path,
    state: vd.TrainState,
    *,
    x: PyTree,
    z: PyTree = (),
    **functions: Callable[..., PyTree] | None,
) -> None:
    """Export a run's functions beside its result; what cannot be is said and left out, for the run itself is saved.

    Args:
        config: the settings.
        directory: the run directory.
        state: the trained state.
        x: an example of one datum.
        z: an example of what `decode` takes.
        functions: see `vd.export_run`.
    """
    if not config.export:
        return
    if "sample" in functions:
        functions["sample"] = _like_data(functions["sample"], x)
    began = time.perf_counter()
    with warnings.catch_warnings(), runs.console.status("exporting") as status:
        warnings.simplefilter("always", ExportWarning)
        warnings.showwarning = lambda message, *rest, **more: runs.tell(str(message))
        try:
            vd.export_run(
                directory,
                state.params,
                state.ema,
                functions,
                x=x,
                z=z,
                on_function=lambda name: status.update(f"exporting {name}"),
            )
        except OSError as error:
            runs.tell(f"the run is saved, its functions are not: {error}")
            return
    runs.console.print(f"exported {directory / 'exported'}, {time.perf_counter() - began:.1f} s")


def export_model(
    config: runs.RunConfig,
    directory: Path,
    state: vd.TrainState,
    model: vd.ModelLike,
    num_samples: int,
    x: PyTree,
) -> None:
    """Export a model of latents: its ELBO, its log p(x) by importance sampling, its draws, its encoder and decoder.

    Args:
        config: the settings.
        directory: the run directory.
        state: the trained state.
        model: what was trained; `encode` and `decode` are exported where it has them.
        num_samples: draws per datum that log p(x) is estimated by.
        x: an example of one datum.
    """
    names = ("elbo_estimate", "sample", "encode", "decode")
    export_functions(
        config,
        directory,
        state,
        x=x,
        z=jax.eval_shape(model.sample, state.key, state.ema)[1],
        log_prob=by_importance(model, num_samples),
        **{name: getattr(model, name, None) for name in names},
    )


def _like_data(
    sample: Callable[..., tuple[PyTree, PyTree]], x: PyTree
) -> Callable[..., tuple[PyTree, PyTree]]:
    """Give what is drawn the dtype of the data, so that it can be given to the other functions."""

    def sample_like_data(key: Key, params: Params) -> tuple[PyTree, PyTree]:
        """Draw (x, z)."""
        drawn, z = sample(key, params)
        return drawn.astype(x.dtype), z

    return sample_like_data


def by_importance(model: vd.ModelLike, num_samples: int) -> Callable[[Key, Params, PyTree], jax.Array]:
    """Make the estimate of log p(x) that judges the run, `(key, params, x) -> []`."""
    estimate = vd.importance_log_prob(model, num_samples, chunk_size=50)

    def log_prob(key: Key, params: Params, x: PyTree) -> jax.Array:
        return estimate(key, params, x).value

    log_prob.__doc__ = f"Estimate log p(x) by importance sampling, {num_samples:,} draws per datum; nats."
    return log_prob


def exact(log_prob: Callable[[Params, PyTree], jax.Array]) -> Callable[[Key, Params, PyTree], jax.Array]:
    """Take an exact log p(x), `(params, x) -> []`, where an estimate of it is looked for: the key is not used."""

    def log_prob_exact(key: Key, params: Params, x: PyTree) -> jax.Array:
        """Compute log p(x), exact; nats."""
        return log_prob(params, x)

    return log_prob_exact
