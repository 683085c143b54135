"""Runnable experiments: `python -m experiments.NAME PRESET`."""

import os

# With a thread for each of few cores, jaxlib waits for itself when a program has as many batched solves: docs/runs.md.
if (os.cpu_count() or 1) < 8:
    os.environ.setdefault("PJRT_NPROC", "8")
