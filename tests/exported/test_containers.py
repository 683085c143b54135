"""Trees in plain containers, and in a file: what went in comes out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.exported.containers import like, plain, read_tree, write_tree
from vdiff.types import Params


class Pair(NamedTuple):
    b: object
    a: object


TREE = Params(theta={"layers": [np.arange(3), (np.ones((2, 2)),)], "none": None}, phi=Pair(np.zeros(()), ()))


def test_namedtuples_become_dicts_and_come_back_in_their_order():
    flat = plain(TREE, "params")
    assert type(flat) is dict and set(flat) == {"theta", "phi", "lam", "cv"}
    assert type(flat["phi"]) is dict and flat["lam"] == () and flat["theta"]["none"] is None
    # jax orders a dict by its keys, a NamedTuple by its fields: a is not b.
    numbered = jax.tree.unflatten(jax.tree.structure(flat), range(3))
    back = like(TREE, flat)
    assert jax.tree.structure(back) == jax.tree.structure(TREE)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(TREE), strict=True):
        assert a is b
    assert like(Pair(0, 0), {"a": "first", "b": "second"}) == Pair("second", "first")
    assert numbered["theta"]["layers"][0] == 1


@pytest.mark.parametrize("bad", [{1: np.ones(2)}, {"x": {3}}, object(), [np.ones(1), "text"]])
def test_what_has_no_plain_form_is_refused_by_name(bad):
    with pytest.raises(TypeError, match=r"^params.*expected arrays in dicts"):
        plain(bad, "params")


def test_a_file_gives_back_structure_bits_and_dtypes(tmp_path):
    tree = {
        "int": np.array([1, -2], np.int8),
        "half": jnp.array([1.5, -0.0, jnp.inf], jnp.bfloat16),
        "empty": ({}, [], None),
        "deep": [{"w": np.float32(0.1)}, (np.array(True), np.zeros((0, 3), np.uint8))],
    }
    write_tree(tmp_path / "a.npz", tree, "tree")
    back = read_tree(tmp_path / "a.npz")
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == np.asarray(b).tobytes()


def test_arrays_are_found_by_their_names_with_numpy_alone(tmp_path):
    write_tree(tmp_path / "a.npz", TREE, "params")
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_array_equal(file["theta/layers/0"], np.arange(3))
        np.testing.assert_array_equal(file["phi/b"], 0.0)
        in_order = [file[name] for name in file.files[:-1]]
    for a, b in zip(in_order, jax.tree.leaves(plain(TREE, "params")), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_arrays_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two arrays called a/b"):
        write_tree(tmp_path / "a.npz", {"a": {"b": np.ones(1)}, "a/b": np.ones(1)}, "params")
