"""Strictness for every test: rank and dtype promotion are errors, annotations are checked."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

# Most of the time goes into compiling; these take away most of it, here and in each process that a test starts.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users compile.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    quick = "--xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10."):  # a later one ends at a flag that it does not know
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}".strip()

import jax
import jaxtyping
import pytest

import experiments  # noqa: F401, asks for enough threads, before jax starts

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


FURTHER_CASES = Path(__file__).with_name("further_cases.txt")


def pytest_collection_modifyitems(items):
    further = {line for line in FURTHER_CASES.read_text().splitlines() if not line.startswith("#")}
    for item in items:
        if item.nodeid in further:
            item.add_marker("long")


def forget_programs():
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Forget compiled programs after each file: each holds memory maps, of which Linux grants a process 65,530."""
    yield
    forget_programs()


@pytest.fixture(autouse=True)
def _few_maps():
    """And within a file, before the compiler runs out of them: it does not say so but crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 30_000:
        forget_programs()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def unchecked():
    """Let a wrong type pass the tests' own check of annotations, as it does at a user's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
