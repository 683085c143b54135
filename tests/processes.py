"""Processes that tests start, with as many devices as they ask for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import vdiff as vd


def with_devices(num_devices):
    """Return an environment in which jax has so many CPU devices, and which compiles as it does here."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    return os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}


def printed_by(program, num_devices, *arguments):
    """Run a Python file on so many devices; return what its last line says, in JSON."""
    # The vdiff that is tested here is the one tested there, wherever it was imported from.
    roots = [Path(vd.__file__).parents[1], Path(__file__).parents[1]]
    environment = with_devices(num_devices) | {"PYTHONPATH": os.pathsep.join(map(str, roots))}
    command = [sys.executable, str(program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
