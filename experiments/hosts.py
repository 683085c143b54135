"""How the processes of one experiment find each other: by the cluster that started them, or by plain flags."""

import secrets
from pathlib import Path

import jax
import rich
from rich.console import Console

from vdiff.train.hosts import from_first, is_first, largest

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# A process that was silent for so long is taken for dead, and the others end.
_SILENCE_SECONDS = 30


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *consoles: Console
) -> None:
    """Join the other processes of this run, before anything touches a device; only the first goes on printing.

    Args:
        coordinator: None for a run of one process; "auto" where jax finds the others by itself (Slurm, TPU pods, Open
            MPI, Kubernetes); or HOST:PORT of the first process.
        num_processes: how many there are, when the coordinator is given by its address.
        process_id: which one this is, from 0.
        *consoles: fall silent but in the first process.

    Raises:
        ValueError: if the flags do not fit each other, or the others cannot be found.
    """
    numbers = (num_processes, process_id)
    if coordinator is None or coordinator == "auto":
        if numbers != (None, None):
            raise ValueError(
                f"num_processes, process_id: got {num_processes} and {process_id} with coordinator {coordinator}, "
                "expected the three together; give --coordinator HOST:PORT of the first process, or leave them out"
            )
        if coordinator is None:
            return
        settings = {}
    else:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdigit()):
            raise ValueError(
                f"coordinator: got {coordinator}, expected HOST:PORT of the first process, or auto"
            )
        if None in numbers or not 0 <= process_id < num_processes:
            raise ValueError(
                f"num_processes, process_id: got {num_processes} and {process_id}, expected how many processes there "
                "are, and this one's number from 0; e.g. --num-processes 2 --process-id 0"
            )
        settings = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
        }
        if host in _LOOPBACK:
            settings["coordinator_bind_address"] = coordinator
    # On CPU, programs that do not wait for each other would meet their collectives in different orders.
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # noqa: FBT003
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=_SILENCE_SECONDS)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"coordinator: got {coordinator}, but the processes did not find each other ({reason}); expected "
            "HOST:PORT that all of them reach, or auto under Slurm, a TPU pod, Open MPI or Kubernetes"
        ) from error
    if jax.process_index() > 0:
        for console in (rich.get_console(), *consoles):
            console.quiet = True


def check_shared(directory: Path) -> None:
    """Refuse a directory that not all processes see, in all of them; asks nobody where there is one.

    Raises:
        OSError: if the first process cannot write there.
        ValueError: in the others, and if one of them does not see what the first wrote.
    """
    if jax.process_count() == 1:
        return
    number, refused = 0, None
    if is_first():
        # Drawn, so that a file of this name is there for one reason only.
        number = secrets.randbelow(2**31)
        try:
            (directory / f"{number}.tmp").touch()
        except OSError as error:
            refused = error
    mark = directory / f"{from_first(number)}.tmp"
    blind = largest(-1 if mark.exists() else jax.process_index())
    if is_first():
        mark.unlink(missing_ok=True)
    if refused or blind >= 0:
        raise refused or ValueError(
            f"run_dir: got {directory}, which process {blind} does not see, expected a disk that all share"
        )


def part() -> None:
    """Let each process go its way, when all have come to this point; none where there is one."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()
