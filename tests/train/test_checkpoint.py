"""Saving: every bit, while training goes on; what stays, what is refused, and what a full disk leaves."""

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vdiff as vd
from tests.train import tiny
from tests.train.tiny import at, equal, names_in, start
from vdiff.train import checkpoint, checksums


@pytest.fixture(scope="module")
def step():
    return vd.jit_step(vd.make_train_step(tiny.MODEL.elbo_terms, tiny.OPTIMIZER))


def test_checkpoint_every_saves_its_steps_and_the_last(tmp_path, step):
    with vd.checkpoint_every(4, tmp_path, keep_last=10) as saving:
        state = vd.fit(start(), step, tiny.batches, 10, hooks=[saving])
    assert names_in(tmp_path) == {"4", "8", "10"} and vd.saved_steps(tmp_path) == [4, 8, 10]
    equal(vd.restore(tmp_path, start()), state)
    assert checksums.verify(tmp_path / "10") == checksums.verify(tmp_path / "4") == 2


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The writer is held up until three steps have overwritten the donated state; it saves that of before."""
    go_on, write_manifest = threading.Event(), checkpoint.write_manifest

    def held_up(*args, **kwargs):
        assert go_on.wait(60)
        write_manifest(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_manifest", held_up)
    add = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), donate_argnums=0)
    state = start()._replace(key=(), aux=jax.random.uniform(jax.random.key(3), (4, 2_000_000)))
    kept = jax.tree.map(np.array, state)
    with vd.checkpoint_every(1, tmp_path) as saving:
        saving.call(0, state, {})
        for _ in range(3):
            state = add(state)
        jax.block_until_ready(state)
        assert vd.saved_steps(tmp_path) == []
        go_on.set()
    assert vd.saved_steps(tmp_path) == [0]
    with checkpoint.ocp.StandardCheckpointer() as reader:
        equal(reader.restore(tmp_path / "0/default", jax.tree.map(jnp.zeros_like, kept)), kept)


def test_a_checkpoint_waits_for_the_one_before(tmp_path, monkeypatch):
    """So that a kill never costs more than the interval and what the writing of one checkpoint takes."""
    write_manifest, at_manifest = checkpoint.write_manifest, []

    def noting(folder, *args, **kwargs):
        at_manifest.append((folder.name.split(".")[0], vd.saved_steps(tmp_path)))
        write_manifest(folder, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_manifest", noting)
    with vd.checkpoint_every(1, tmp_path, keep_last=5) as saving:
        for i in range(1, 4):
            saving.call(i, at(i), {})
    assert at_manifest == [("1", []), ("2", [1]), ("3", [1, 2])]


def test_the_last_is_waited_for_when_an_exception_passes(tmp_path):
    with pytest.raises(RuntimeError, match="of the user"), vd.checkpoint_every(1, tmp_path) as saving:
        saving.call(3, at(3), {})
        raise RuntimeError("of the user")
    equal(vd.restore(tmp_path, start()), at(3))


def test_an_interrupt_does_not_wait(tmp_path, monkeypatch):
    go_on, write_manifest = threading.Event(), checkpoint.write_manifest
    monkeypatch.setattr(
        checkpoint, "write_manifest", lambda *a, **k: (go_on.wait(60), write_manifest(*a, **k))
    )
    with pytest.raises(KeyboardInterrupt), vd.checkpoint_every(1, tmp_path) as saving:
        saving.call(3, at(3), {})
        raise KeyboardInterrupt
    assert vd.saved_steps(tmp_path) == []
    go_on.set()
    next(thread for thread in threading.enumerate() if thread.name == "async_save").join(60)


def test_the_newest_and_the_best_are_kept(tmp_path):
    values = {1: 0.5, 2: 3.0, 3: 1.0, 4: float("nan"), 5: None, 6: 2.0}
    for part in ({1: 0.5, 2: 3.0, 3: 1.0}, {4: float("nan"), 5: None, 6: 2.0}):  # and over a restart
        with vd.checkpoint_every(1, tmp_path, keep_last=2, best="score") as saving:
            for i in part:
                saving.call(i, at(i), {} if values[i] is None else {"score": values[i], "other": -values[i]})
    assert names_in(tmp_path) == {"2", "5", "6"}
    assert vd.best_step(tmp_path, "score") == 2
    equal(vd.restore(tmp_path, start(), step=2), at(2))
    equal(vd.restore(tmp_path, start()), at(6))


def test_a_metric_that_nobody_gives_is_named(tmp_path):
    with (
        pytest.raises(ValueError, match=r"best: got 'scroe', expected the name of a metric: loss, score"),
        vd.checkpoint_every(1, tmp_path, best="scroe") as saving,
    ):
        saving.call(1, at(1), {"score": 1.0, "loss": 2.0})
    equal(vd.restore(tmp_path, start()), at(1))


def test_a_metric_that_is_never_finite_is_no_error(tmp_path):
    with vd.checkpoint_every(1, tmp_path, best="score") as saving:
        saving.call(1, at(1), {"score": float("nan")})
    assert vd.best_step(tmp_path, "score") is None
    equal(vd.restore(tmp_path, start()), at(1))


def test_save_keeps_the_newest(tmp_path):
    for i in range(1, 6):
        vd.save(tmp_path, at(i, seed=i), keep_last=2)
    assert names_in(tmp_path) == {"4", "5"}
    equal(vd.restore(tmp_path, start()), at(5, seed=5))
    with pytest.raises(ValueError, match="keep_last: got 0, expected at least 1"):
        vd.save(tmp_path, at(6), keep_last=0)


def test_a_saved_step_stays_as_it_is(tmp_path):
    vd.save(tmp_path, at(3, seed=1))
    vd.save(tmp_path, at(3, seed=2))
    equal(vd.restore(tmp_path, start()), at(3, seed=1))


def test_a_step_before_the_newest_is_refused(tmp_path):
    """A new run in an old run's directory: a resume would go on from the old one, so say it at once."""
    vd.save(tmp_path, at(10))
    with pytest.raises(ValueError, match=f"directory: got {tmp_path}.* step 10") as error:
        vd.save(tmp_path, at(5))
    assert "\n" not in str(error.value)
    equal(vd.restore(tmp_path, start()), at(10))


def test_a_damaged_step_is_set_aside_when_it_is_reached_again(tmp_path):
    """Nothing of it is lost, and the new one is whole; twice, since the names must not collide."""
    vd.save(tmp_path, at(5))
    for i in (1, 2):
        vd.save(tmp_path, at(10, seed=i))
        tiny.flip(tmp_path / "10/default/_METADATA")
        before = (tmp_path / "10/default/_METADATA").read_bytes()
        vd.save(tmp_path, at(10, seed=7))
        equal(vd.restore(tmp_path, start()), at(10, seed=7))
        assert (tmp_path / f"10.damaged-{i}/default/_METADATA").read_bytes() == before
    assert names_in(tmp_path) == {"5", "10", "10.damaged-1", "10.damaged-2"}


def test_a_damaged_metric_does_not_stop_the_next_checkpoint(tmp_path):
    with vd.checkpoint_every(1, tmp_path, best="score") as saving:
        saving.call(1, at(1), {"score": 1.0})
        saving.call(2, at(2), {"score": 0.5})
    tiny.truncate(tmp_path / "1/metrics/metrics")
    with vd.checkpoint_every(1, tmp_path, best="score") as saving:
        saving.call(3, at(3), {"score": 0.1})
    assert names_in(tmp_path) == {"1.damaged-1", "2", "3"} and vd.best_step(tmp_path, "score") == 2


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    vd.save(tmp_path, at(1))
    (tmp_path / "2.orbax-checkpoint-tmp/default").mkdir(parents=True)
    (tmp_path / "2.orbax-checkpoint-tmp/default/d").write_bytes(b"half")
    (tmp_path / "1.manifest.json").write_text("half")
    assert vd.latest_step(tmp_path) == 1
    vd.save(tmp_path, at(3))
    assert names_in(tmp_path) == {"1", "3"}


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"checkpoint .*/file/3: could not be written \(.*\), and there is none"
    ) as error:
        vd.save(tmp_path / "file", at(3))
    assert "\n" not in str(error.value)


FULL = """
import sys, pathlib
import jax, numpy as np
import vdiff as vd
from tests.train import tiny

directory = pathlib.Path(sys.argv[1])
vd.save(directory, tiny.at(5))
noise = np.random.default_rng(0).integers(0, 256, 6_000_000, dtype=np.uint8)  # does not compress
try:
    with vd.checkpoint_every(1, directory) as saving:
        saving.call(6, tiny.at(6)._replace(aux=noise), {})
except OSError as error:
    print(error)
tiny.equal(vd.restore(directory, tiny.start()), tiny.at(5))
print(tiny.names_in(directory))
vd.save(directory, tiny.at(7))
tiny.equal(vd.restore(directory, tiny.start()), tiny.at(7))
"""


def run_full(directory, before=()):
    command = [*before, sys.executable, "-c", FULL, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "orbax" not in done.stderr  # a line, and not a page from every thread
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_leaves_the_checkpoint_before(tmp_path):
    """A small tmpfs; then the half is gone, the one before restores, and a smaller one is taken again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        line, left = run_full(disk / "checkpoints")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert line.startswith(
        f"checkpoint {disk}/checkpoints/6: could not be written (no space left on the disk), "
    )
    assert "the one of step 5 is as it was; free some space" in line
    assert left == "{'5'}"
