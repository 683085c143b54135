"""How every experiment trains: Adam on an objective, from the last checkpoint, with all that a run reports."""

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import vdiff as vd
from experiments import exits, hosts, performance, runs, settings
from vdiff.train.hooks import DivergedError, progress_bar, stop_if_skipping, tensorboard, write_metrics
from vdiff.train.hosts import from_first, is_first, largest, on_one_device
from vdiff.train.loop import default_steps_per_call
from vdiff.train.profile import traced
from vdiff.train.step import check_divides
from vdiff.types import PyTree


def optimizer_of(config: runs.RunConfig, *, rise_steps: int = 0) -> optax.GradientTransformation:
    """Make Adam with a rate that falls to zero by a cosine, its gradient clipped at the norm `config.clip`.

    What an estimator learns is clipped by itself: the gradient of a variance may be large, and would drown the model's.

    Args:
        config: the settings.
        rise_steps: steps over which the rate first rises from nothing to its peak, fewer than the run has.

    Returns:
        The Optax transformation.
    """
    fall = optax.cosine_decay_schedule(config.learning_rate, config.num_steps - rise_steps)
    rate = fall
    if rise_steps:
        rise = optax.linear_schedule(
            config.learning_rate / (rise_steps + 1), config.learning_rate, rise_steps
        )
        rate = optax.join_schedules([rise, fall], [rise_steps])
    clipped_adam = optax.chain(optax.clip_by_global_norm(config.clip), optax.adam(rate))
    parts = vd.Params(theta="model", phi="model", lam="model", cv="cv")
    return optax.partition({"model": clipped_adam, "cv": clipped_adam}, parts)


def train(
    config: runs.RunConfig,
    directory: Path,
    model: vd.types.Startable,
    objective: Callable[..., PyTree] | vd.Scheduled,
    images: np.ndarray | vd.data.Rows,
    *,
    optimizer: optax.GradientTransformation | None = None,
    batching: Callable[..., Callable] = vd.per_example,
    aux: PyTree = (),
    combine: Callable[[vd.types.Terms], jax.Array] = vd.objectives.sum_terms,
    hooks: tuple[vd.Hook, ...] = (),
    best: str | None = None,
    unit: str = "nats",
) -> vd.TrainState:
    """Train a model on images, from its last checkpoint if there is one.

    Args:
        config: the settings.
        directory: the run directory.
        model: what is trained; only its `init` is used.
        objective: `(key, params, x) -> Terms`, or a scheduled one.
        images: [N, ...], the training data; `Rows` are read from disk batch by batch, shuffled without memory.
        optimizer: `optimizer_of(config)` when left out.
        batching: lifts the objective to a batch; `vd.stratified` for one that takes a time, `vd.persistent` for chains.
        aux: what the chains of `vd.persistent` start from, [batch_size, ...].
        combine: what is raised of the mean terms, such as `vd.free_bits({...})`.
        hooks: called before the metrics are written; what they return is written too.
        best: name of a metric, larger is better, whose best checkpoint stays.
        unit: of the objective, for the progress bar.

    Returns:
        The trained `TrainState`, without the optimizer's: ema on this process's first device, params on the host. Until
        then no device holds more of a state than the step puts there.

    Raises:
        Refused: if the input does not fit, or the checkpoint cannot be read.
        exits.Stopped: if a signal came, to any process; the state is saved.
        exits.Finished: in all processes but the first, when training is done.
        DivergedError: if too many updates in a row were skipped; the last good state is saved.
        OSError: if the disk does not take a checkpoint.
    """
    checkpoints = directory / "checkpoints"
    # Apart, since a process that refuses its input in the same block would leave the others waiting here.
    with exits.refusing():
        hosts.check_shared(directory)
    with exits.refusing():
        optimizer = optimizer_of(config) if optimizer is None else optimizer
        parts = {"ema_decay": config.ema_decay, "batching": batching, "combine": combine}
        raw_step = vd.make_train_step(objective, optimizer, num_accumulate=config.accumulate, **parts)
        step = compiled_step(config, raw_step)
        undivided = None
        if config.accumulate > 1:
            undivided = compiled_step(config, vd.make_train_step(objective, optimizer, **parts))
        share = (jax.process_index(), jax.process_count())
        check_divides(
            config.batch_size,
            num_devices=jax.device_count() // config.split_features,
            num_parts=config.accumulate,
        )
        in_memory = isinstance(images, np.ndarray)
        shuffle = vd.data.permutations.drawn if in_memory else vd.data.permutations.keyed
        batches = exits.as_refused()(
            vd.data.batches(images, config.batch_size, config.seed, permutation=shuffle, share=share)
        )
        key = jax.random.key(config.seed)
        shapes = jax.eval_shape(lambda: vd.init_state(key, model, optimizer, aux=aux))
        at_start = objective.at(jnp.int32(0)) if isinstance(objective, vd.Scheduled) else objective
        one = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
        position = jax.ShapeDtypeStruct((1,), np.int32)
        slot = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), shapes.aux)
        jax.eval_shape(batching(at_start), key, shapes.params, one, position, slot)
        step.place(batches(0)[None])
    is_begun = from_first(vd.latest_step(checkpoints) is not None)
    with exits.refusing():
        if is_begun:
            state = vd.restore(checkpoints, shapes, shardings=step.shardings, on_skip=runs.tell)
        elif config.resume == "must":
            raise ValueError(f"resume: got must, but {checkpoints} holds no checkpoint; use --resume auto")
        else:
            state = vd.init_state(key, model, optimizer, aux=aux, shardings=step.shardings)
        kept = settings.record(config, directory) if is_first() else None
        if kept is not None:
            runs.tell(
                f"the settings changed; those before are kept in {kept}, and with them what their run left at its end"
            )

    start = int(state.step)
    if start:
        runs.console.print(f"resuming at step {start} of {config.num_steps}")
    number = 0
    if start < config.num_steps:
        # Signals are minded until the last checkpoint is written: leaving the inner context waits for it.
        with vd.stop_on_signals() as stop:
            # Twice as often as what may be lost: a kill takes the checkpoint that is being written too.
            interval = config.checkpoint_every // 2
            interval -= interval % config.log_every if interval > config.log_every else 0
            with vd.checkpoint_every(interval, checkpoints, best=best) as saving:
                watch = stop_if_skipping(
                    config.max_skips,
                    start=start,
                    every=math.gcd(config.log_every, interval),
                    save=saving.call,
                    finder="--debug-nans",
                )
                hooks = (watch, *hooks)
                state, *cost = _fitted(
                    config, directory, state, step, undivided, batches, hooks, saving, stop, unit
                )
            precision = getattr(config, "precision", "float32")
            costs = performance.figures(*cost, config.batch_size, config.log_every, precision)
        if is_first():
            runs.write_json(directory / "performance.json", costs)
        number = largest(stop.received or 0)
    if not number:
        state = _gathered(state)
    hosts.part()
    if number:
        raise exits.Stopped(number)
    if not is_first():
        raise exits.Finished
    return state._replace(ema=jax.device_put(state.ema))


def _gathered(state: vd.TrainState) -> vd.TrainState:
    """Bring what is judged and kept to the host, a leaf at a time, and let go of what only training needs."""
    params, ema = (
        jax.tree.map(lambda leaf: np.asarray(on_one_device(leaf)), tree) for tree in (state.params, state.ema)
    )
    return on_one_device(state._replace(params=params, ema=ema, opt_state=()))


def _fitted(
    config: runs.RunConfig,
    directory: Path,
    state: vd.TrainState,
    step: vd.train.parallel.CompiledStep,
    undivided: vd.train.parallel.CompiledStep | None,
    batches: Callable[[int], np.ndarray],
    hooks: tuple[vd.Hook, ...],
    saving: vd.Hook,
    stop: Callable[[], bool],
    unit: str,
) -> tuple[vd.TrainState, performance.Compiled, list[float]]:
    """Train to the end, or until `stop` says so; what compiling told and the seconds per step come along."""
    tracing = config.profile and is_first()
    with (
        traced(step, directory / "profile", config.profile)
        if tracing
        else contextlib.nullcontext(step) as step,
        naming_nans() if config.debug_nans else contextlib.nullcontext(),
        (reporting if is_first() else silence)(config, directory, int(state.step), unit) as reports,
    ):
        steps_per_call = 1 if config.debug_nans else default_steps_per_call()
        start = int(state.step)
        compiled = performance.compile_step(
            step, state, batches(start), config.batch_size, steps_per_call, undivided
        )
        hooks, seconds = performance.timed((*hooks, *reports, saving), config.log_every, start)
        state = vd.fit(
            state,
            step,
            batches,
            config.num_steps,
            hooks=hooks,
            steps_per_call=steps_per_call,
            should_stop=stop,
        )
    if tracing:
        runs.console.print(f"trace     {directory / 'profile'}, for ui.perfetto.dev or TensorBoard")
    return state, compiled, seconds


@contextlib.contextmanager
def reporting(
    config: runs.RunConfig, directory: Path, start: int, unit: str = "nats"
) -> Iterator[tuple[vd.Hook, ...]]:
    """Make the hooks that tell of a run: a progress bar, a file of metrics, TensorBoard."""
    with (
        tensorboard(directory / "tensorboard", start=start, every=config.log_every) as events,
        progress_bar("training", config.num_steps, start=start, unit=unit) as bar,
    ):
        yield bar, write_metrics(directory / "metrics.jsonl", start=start, every=config.log_every), events


@contextlib.contextmanager
def silence(
    config: runs.RunConfig, directory: Path, start: int, unit: str = "nats"
) -> Iterator[tuple[vd.Hook, ...]]:
    """Make hooks that tell nothing, at the pace of those that do: all processes stop at the same steps."""
    with progress_bar("training", config.num_steps, start=start) as bar:
        yield bar, vd.Hook(config.log_every, lambda step, state, metrics: None)


@contextlib.contextmanager
def naming_nans() -> Iterator[None]:
    """Let JAX look at every result, and turn the first NaN into a `DivergedError` that says where it was made."""
    try:
        with jax.debug_nans(True):  # noqa: FBT003
            yield
    except FloatingPointError as error:
        frames = traceback.extract_tb(error.__traceback__)
        made = [frame for frame in frames if not frame.filename.startswith(jax.__path__[0])][-1]
        raise DivergedError(f"got {error}, made at {made.filename}:{made.lineno} by `{made.line}`") from error


def compiled_step(config: runs.RunConfig, step: vd.train.step.TrainStep) -> vd.train.parallel.CompiledStep:
    """Compile a step for the devices that there are, in the way that the settings ask for.

    Raises:
        ValueError: if features cannot be split over so many devices, or pmap is asked to join processes.
    """
    if config.parallel == "pmap" and jax.process_count() > 1:
        raise ValueError(
            f"parallel: got pmap for {jax.process_count()} processes, expected a mode that joins them; use --parallel "
            "jit or fsdp"
        )
    if config.parallel == "pmap":
        return vd.pmap_step(step)
    if config.parallel == "fsdp":
        try:
            mesh = vd.data_mesh(model=config.split_features)
        except ValueError as error:
            raise ValueError("split_features" + str(error).removeprefix("model")) from error
        return vd.fsdp_step(step, mesh)
    return vd.jit_step(step, vd.data_mesh() if jax.device_count() > 1 else None)


def held_out(
    objective: vd.Objective, key: jax.Array, images: np.ndarray, *, every: int, name: str = "test_elbo"
) -> vd.Hook:
    """Make the hook that judges held-out images under the moving average and adds that to the metrics."""
    evaluator = vd.total(objective)

    def call(step: int, state: vd.TrainState, metrics: dict[str, float]) -> dict[str, float]:
        values = vd.evaluate.evaluate(evaluator, key, on_one_device(state.ema), images, batch_size=500)
        return {name: float(np.mean(values))}

    return vd.Hook(every, call)


def transformed(
    transform: Callable[[jax.Array, jax.Array], jax.Array], key: jax.Array, images: np.ndarray | vd.data.Rows
) -> np.ndarray:
    """Transform images once, e.g. draw the binary pixels that a test set is judged on; returns uint8."""
    drawn = vd.evaluate.evaluate(lambda key, params, x: transform(key, x), key, vd.Params(), images)
    return drawn.astype(np.uint8)
