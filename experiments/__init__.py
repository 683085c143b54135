"""Runnable experiments: `python -m experiments.NAME PRESET`."""

import os

# With a thread for each of few cores, jaxlib waits for itself when a program has as many batched solves: docs/runs.md.
num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if num_cores < 8:
    os.environ.setdefault("PJRT_NPROC", "8")
