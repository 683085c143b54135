"""Who may import whom, read off the source: the direction of imports is the architecture."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "vdiff").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))

# A part may import itself and parts of a lower rank; parts of one rank do not know each other.
RANK = {
    "types": 0,
    "densities": 0,
    "likelihoods": 1,
    "bounds": 1,
    "transforms": 1,
    "relaxations": 1,
    "nets": 1,
    "data": 1,
    "exported": 1,
    "models": 2,
    "baselines": 2,
    "diffusion": 2,
    "estimators": 2,
    "objectives": 2,
    "evaluate": 3,
    "train": 3,
    "report": 4,
}
MODELS = {"models", "baselines", "diffusion"}
ONLY_IN = {
    "flax": ("vdiff/nets/",),
    "equinox": ("vdiff/nets/",),
    "blackjax": ("vdiff/evaluate/transitions.py",),
    "diffrax": ("vdiff/diffusion/adaptive.py",),
    "grain": ("vdiff/data/records.py",),
    "array_record": ("vdiff/data/records.py",),
    "optax": ("vdiff/train/", "experiments/"),
    "orbax": ("vdiff/train/checkpoint.py", "vdiff/train/restore.py"),
    "tyro": ("experiments/",),
    "matplotlib": ("vdiff/report/",),
    "rich": ("vdiff/train/", "experiments/"),
    "tensorboardX": ("vdiff/train/",),
    "numpyro": (),
    "distrax": (),
    "torch": (),
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """Every module that a file imports anywhere in it, with its dots: "vdiff.train.step", "jax.numpy"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: a relative import; write it in full"
            # "from vdiff import data" imports vdiff.data; "from vdiff.bounds import elbo", vdiff.bounds.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(path):
    """The part of vdiff a file belongs to, or None for vdiff/__init__.py, which re-exports all of them."""
    first = path.relative_to(ROOT / "vdiff").parts[0]
    return None if first == "__init__.py" else first.removesuffix(".py")


every_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)
every_file = pytest.mark.parametrize("path", SOURCES + EXPERIMENTS, ids=name_of)


def test_the_walk_sees_the_house():
    """A test that walks no files would pass for ever."""
    assert {part_of(path) for path in SOURCES} - {None} <= set(RANK), "give the new part a rank"
    assert len(SOURCES) > 25 and len(EXPERIMENTS) > 2
    assert "optax" in imports(ROOT / "vdiff/train/step.py")
    assert "vdiff.bounds.elbo" in imports(ROOT / "vdiff/estimators/pathwise.py")
    assert "jax.lax.stop_gradient" in imports(ROOT / "vdiff/estimators/pathwise.py")


@every_source
def test_imports_go_down(path):
    part = part_of(path)
    if part is None:
        return
    for module in sorted(imports(path)):
        if module.split(".")[0] == "vdiff":
            names = module.split(".")
            assert len(names) > 1 and names[1] in RANK, f"{module}: import the part, not the whole"
            other = names[1]
            assert other == part or RANK[other] < RANK[part], f"{part} must not import {module}"


def test_types_and_densities_import_nothing_of_vdiff():
    for name in ("types", "densities"):
        assert not [m for m in imports(ROOT / f"vdiff/{name}.py") if m.split(".")[0] == "vdiff"]


@every_source
def test_learning_never_imports_a_model(path):
    if part_of(path) in {"bounds", "estimators", "objectives", "train"}:
        assert not [m for m in imports(path) if m.startswith("vdiff.") and m.split(".")[1] in MODELS]


@every_source
def test_the_library_never_imports_experiments_or_tests(path):
    assert not [m for m in imports(path) if m.split(".")[0] in {"experiments", "tests"}]


@every_file
def test_libraries_stay_at_home(path):
    for module in sorted(imports(path)):
        homes = ONLY_IN.get(module.split(".")[0])
        assert homes is None or name_of(path).startswith(homes), f"{module}: only in {homes}"


@every_source
def test_data_imports_no_jax(path):
    if part_of(path) == "data":
        assert not [m for m in imports(path) if m.split(".")[0] in {"jax", "jaxtyping", "flax", "optax"}]


@every_file
def test_no_private_jax(path):
    assert not [m for m in imports(path) if m.startswith("jax._src")]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "_src":
            pytest.fail(f"{name_of(path)}:{node.lineno}: jax._src")


MODULES = [path for path in SOURCES if path.stem not in {"__init__", "__main__"}]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_a_test_file(path):
    relative = path.relative_to(ROOT / "vdiff")
    test = ROOT / "tests" / relative.parent / f"test_{relative.name}"
    assert test.exists(), f"{name_of(path)} has no {name_of(test)}"


def test_further_cases_are_tests():
    for line in (ROOT / "tests/further_cases.txt").read_text().splitlines()[1:]:
        path, name = line.split("::")
        assert f"\ndef {name.split('[')[0]}(" in (ROOT / path).read_text(), line
