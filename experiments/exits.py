"""How an experiment ends: in one line, with an exit code.

0 done, 1 could not write or failed, 2 refused input, 3 diverged, 130 and 143 stopped by Ctrl-C or SIGTERM after saving.
"""

import contextlib
import dataclasses
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import tyro

import vdiff as vd
from experiments import hosts
from experiments.runs import RunConfig, console, errors, plain
from vdiff.train.hooks import DivergedError
from vdiff.train.hosts import largest

# What JAX says when another process cannot be reached: from its collectives, or from its coordination service.
_GONE = re.compile("gloo|nccl|coordination|another task|heartbeat|connection|socket|barrier", re.IGNORECASE)

C = TypeVar("C", bound=RunConfig)


class Stopped(Exception):
    """Tell that a signal stopped the run, after saving."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}; the same command goes on from here")
        self.number = number


class Refused(Exception):
    """Tell that the input was refused; the message is one line."""


class Finished(Exception):
    """Tell that this process has done its part; the first one judges, pictures and writes."""


@contextlib.contextmanager
def as_refused() -> Iterator[None]:
    """Turn what is raised on bad input into `Refused`."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise Refused(str(error)) from error


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turn what is raised on bad input into `Refused`, in all processes of the run what is in one."""
    found = None
    try:
        with as_refused():
            yield
    except Refused as refused:
        found = refused
    if largest(found is not None):
        hosts.part()
        raise found or Refused("another process of this run refused its input, and says why")


def main(experiment: Callable[[C], Any], presets: Mapping[str, tuple[str, C]]) -> None:
    """Run an experiment from the command line and exit with its code.

    Args:
        experiment: `(config) -> anything`.
        presets: name -> (one line, settings).
    """
    name = experiment.__module__ if experiment.__module__ != "__main__" else Path(sys.argv[0]).stem
    name = name.removeprefix("experiments.")
    presets = {
        preset: (
            line,
            dataclasses.replace(config, run_dir=config.run_dir or Path("runs") / f"{name}-{preset}"),
        )
        for preset, (line, config) in presets.items()
    }
    config = tyro.extras.overridable_config_cli(presets, prog=f"python -m experiments.{name}")
    try:
        code = exit_code(experiment, config)
    except KeyboardInterrupt as interrupt:
        errors.print("[bold yellow]stopped[/] at once; the same command goes on from the last checkpoint")
        # The usual way would wait for a checkpoint that is being written.
        _leave(128 + next(iter(interrupt.args), signal.SIGINT))
    if code == 1 or (code == 2 and jax.process_count() > 1):
        # The usual way would try to write what is left, a traceback for each, or wait for processes that wait for this.
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End the process without what libraries do at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(experiment: Callable[[C], Any], config: C) -> int:
    """Run an experiment and turn how it ended into a message and an exit code."""
    try:
        if getattr(config, "coordinator", None) is not None:
            with as_refused():
                hosts.join(config.coordinator, config.num_processes, config.process_id, console)
        experiment(config)
    except Finished:
        return 0
    except Refused as error:
        errors.print(f"[bold red]refused[/] {plain(error)}")
        return 2
    except DivergedError as error:
        saved = vd.latest_step(Path(config.run_dir) / "checkpoints")
        good = (
            "no checkpoint was saved yet" if saved is None else f"step {saved} is saved in {config.run_dir}"
        )
        errors.print(f"[bold red]diverged[/] {plain(error)}; {good}")
        return 3
    except Stopped as stop:
        errors.print(f"[bold yellow]stopped[/] {plain(stop)}")
        return 128 + stop.number
    except OSError as error:
        # What a full disk raises names no file.
        where = f": {config.run_dir}" if error.errno and not error.filename else ""
        errors.print(f"[bold red]failed[/] {plain(error)}{plain(where)}")
        return 1
    except Exception as error:
        is_of_jax, line = isinstance(error, jax.errors.JaxRuntimeError), str(error).partition("\n")[0]
        if is_of_jax and "RESOURCE_EXHAUSTED" in line:
            errors.print(
                f"[bold red]failed[/] the device's memory is full ({plain(line)}); --accumulate N holds the "
                "activations of a part of the batch, --remat (where there is one) fewer of them, --parallel fsdp a "
                "part of the state"
            )
        elif jax.process_count() == 1:
            raise
        elif is_of_jax and _GONE.search(str(error)):
            errors.print(
                f"[bold red]failed[/] another process of this run is gone ({plain(line)}); start all of them again: "
                "the same command goes on from the last checkpoint"
            )
        else:
            # Raised, it would wait at the end for the others, which wait for this one.
            traceback.print_exc()
        return 1
    return 0
