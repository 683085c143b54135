"""A run killed with signal 9, at random moments and at each stage of a checkpoint, ends at the bits of no kill.

Each run is a process of its own, forked from a server that has imported everything: a start costs a compilation.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time

import jax
import pytest

from experiments import exits, runs
from tests import tiny_run

NUM_STEPS, EVERY, PAUSE = 40, 10, 0.03
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.tiny_run", "tests.test_kill"])


def config_of(directory):
    return tiny_run.Config(run_dir=directory, num_steps=NUM_STEPS, checkpoint_every=EVERY, pause=PAUSE)


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def patched(name, wrap):
    """Replace a function, "module:name", by `wrap(it)`."""
    module, attribute = name.split(":")
    target = sys.modules[module]
    for part in attribute.split(".")[:-1]:
        target = getattr(target, part)
    last = attribute.split(".")[-1]
    setattr(target, last, wrap(getattr(target, last)))


def at_call(count, do):
    """Do something in place of a function's call number `count`, and leave the others alone."""

    def wrap(function):
        calls = iter(range(1, 1_000_000))

        def called(*args, **kwargs):
            if next(calls) == count:
                return do(function, *args, **kwargs)
            return function(*args, **kwargs)

        return called

    return wrap


def before(function, *args, **kwargs):
    die()


def after(function, *args, **kwargs):
    function(*args, **kwargs)
    die()


def slowly(function, *args, **kwargs):
    time.sleep(20 * EVERY * PAUSE)  # until the run waits before it begins another
    die()


def half_a_manifest(function, path, *args):
    function(path, *args)
    path.write_bytes(path.read_bytes()[:100])
    die()


def die_compiling(event, seconds, *, fun_name="", **kwargs):
    """Called when the step's program goes to the compiler: die in the middle of what that does."""
    if event.endswith("jaxpr_to_mlir_module_duration") and "take" in fun_name:
        threading.Timer(0.05, die).start()


# Stage -> the steps that the run may then go on from; what is replaced, at which of its calls, by what.
STAGES = {
    "the first step": ({0}, "tests.tiny_run:time.sleep", 1, before),
    "a step": ({10, 15}, "tests.tiny_run:time.sleep", 19, before),
    "the second one waiting for the first": ({0}, "vdiff.train.checkpoint:write_manifest", 1, slowly),
    "the arrays written, no manifest": ({5}, "vdiff.train.checkpoint:write_manifest", 2, before),
    "the next one waiting for its manifest": ({5}, "vdiff.train.checkpoint:write_manifest", 2, slowly),
    "half a manifest written": ({5}, "vdiff.train.checksums:_write", 3, half_a_manifest),
    "the manifest written, not renamed": ({5}, "vdiff.train.checkpoint:write_manifest", 2, after),
    "renamed, two notes not in the manifest": ({10}, "vdiff.train.checkpoint:extend_manifest", 2, before),
    "half a longer manifest written": ({10}, "vdiff.train.checksums:_write", 4, half_a_manifest),
    "the longer manifest written": ({10}, "vdiff.train.checkpoint:extend_manifest", 2, after),
    "an old checkpoint half deleted": ({20, 25}, "os:unlink", 3, before),
}


def child(directory, log, stage=None):
    """Run the experiment with its output in a file, and leave with its exit code."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    runs.console.file = runs.errors.file = sys.stdout = open(log, "a", buffering=1)
    if stage == "the compilation":
        jax.monitoring.register_event_duration_secs_listener(die_compiling)
    elif stage is not None:
        _, name, count, do = STAGES[stage]
        patched(name, at_call(count, do))
    os._exit(exits.exit_code(tiny_run.run, config_of(directory)))


class Run:
    """One run directory, started as often as it takes, and what all starts printed."""

    def __init__(self, directory):
        self.directory, self.log = directory / "run", directory / "log"
        self.log.write_text("")

    def start(self, stage=None):
        process = SERVER.Process(target=child, args=(self.directory, self.log, stage))
        process.start()
        return process

    def digest(self):
        """The final parameters' digest, of a run that is done and measured each step once."""
        result = self.directory / "result.json"
        assert result.exists(), self.log.read_text()
        assert self.steps() == list(range(1, NUM_STEPS + 1))
        return json.loads(result.read_text())["params_digest"]

    def steps(self):
        """The steps that were measured, by the rows that are whole."""
        with contextlib.suppress(FileNotFoundError):
            rows = (self.directory / "metrics.jsonl").read_text().split("\n")
            return [json.loads(row)["step"] for row in rows[:-1]]
        return []

    def reached(self):
        return max(self.steps(), default=0)

    def beats(self):
        """How many steps were taken, those of all starts counted."""
        with contextlib.suppress(FileNotFoundError):
            return self.directory.with_suffix(".beats").stat().st_size
        return 0

    def resumes(self):
        return [int(step) for step in re.findall(r"resuming at step (\d+)", self.log.read_text())]


def wait_for(condition):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 120
        time.sleep(0.005)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The digest of the run that was not killed, and the seconds from its start to its first step."""
    run, began = Run(tmp_path_factory.mktemp("straight")), time.monotonic()
    process = run.start()
    wait_for(lambda: run.beats() or not process.is_alive())
    seconds = time.monotonic() - began
    process.join(120)
    return run.digest(), seconds


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["the compilation", *STAGES])
def test_killed_at_a_stage(stage, straight, tmp_path):
    run = Run(tmp_path)
    process = run.start(stage)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, run.log.read_text()
    reached = run.reached()
    run.start().join(120)
    assert run.digest() == straight[0]
    resumed = [0, *run.resumes()][-1]
    assert resumed in ({0} if stage == "the compilation" else STAGES[stage][0])
    assert reached - resumed <= EVERY and "skipped" not in run.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("times", [6, pytest.param(30, marks=pytest.mark.long)])
def test_killed_at_random_moments(times, straight, tmp_path):
    """So many times, over as many runs as that takes; each start goes on, and each run ends at the same bits."""
    moments, num_kills, num_starting, num_runs = random.Random(0), 0, 0, 0
    digest, seconds = straight
    while num_kills < times:
        num_runs += 1
        (tmp_path / str(num_runs)).mkdir()
        run, is_done = Run(tmp_path / str(num_runs)), False
        while not is_done:
            steps, beats, num_resumes = run.steps(), run.beats(), len(run.resumes())
            process = run.start()
            if num_kills == times:
                process.join(120)
            elif num_kills % 2:  # while it starts and compiles
                process.join(moments.uniform(0, seconds))
            else:  # after its first step, or in the checkpoints between
                began = time.monotonic()
                wait_for(lambda r=run, p=process, b=beats: r.beats() > b or not p.is_alive())
                seconds = min(seconds, time.monotonic() - began)  # the machine may be less busy than it was
                process.join(moments.uniform(0, NUM_STEPS * PAUSE / 2))
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), run.log.read_text()
            is_done = process.exitcode == 0
            num_kills += not is_done
            num_starting += not is_done and run.beats() == beats
            if run.steps() != steps or len(run.resumes()) > num_resumes:
                resumed = [0, *run.resumes()][-1] if len(run.resumes()) > num_resumes else 0
                assert max(steps, default=0) - resumed <= EVERY
        assert run.digest() == digest
    assert num_starting >= times // 6 and num_kills - num_starting >= times // 6
