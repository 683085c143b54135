"""Start a program as several processes on 127.0.0.1, each with two forced devices, and wait for all of them."""

import socket
import subprocess
import sys
from pathlib import Path

from tests.processes import with_devices

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def is_free(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def start(num_processes, arguments_of, log, environment_of=lambda i: {}):
    """Start `python arguments_of(port, process_id)` for each process; what it prints goes to LOG-ID.txt."""
    port, env = free_port(), with_devices(2) | {"COLUMNS": "200"}
    processes = []
    for i in range(num_processes):
        with Path(f"{log}-{i}.txt").open("w") as file:
            command = [sys.executable, *map(str, arguments_of(port, i))]
            of_it = env | environment_of(i)
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=of_it, stdout=file, stderr=subprocess.STDOUT)
            )
    return processes


def wait(processes, log, timeout=300):
    """Wait for all; return their exit codes and what each printed."""
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [Path(f"{log}-{i}.txt").read_text() for i in range(len(processes))]
