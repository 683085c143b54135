"""A program of two batched solves ends: with as many threads, jaxlib 0.10.2 waits for ever (docs/runs.md)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import experiments  # which sets the number of threads

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular


@jax.jit
def solutions(one, other, x):
    solve = jax.vmap(lambda factor, x: solve_triangular(factor, x, lower=True))
    return solve(one, x), solve(other, x)


one, other = (
    jnp.eye(5) + jnp.tril(jax.random.normal(jax.random.key(seed), (20_000, 5, 5))) for seed in range(2)
)
for _ in range(300):
    jax.block_until_ready(solutions(one, other, jnp.ones((20_000, 5))))
"""


@pytest.mark.slow
def test_two_batched_solves_end():
    # With the tests' own XLA_FLAGS the solves are compiled otherwise, and end on two threads too.
    ours = {"PJRT_NPROC", "XLA_FLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
