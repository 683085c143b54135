"""What needs no average: shapes by comparison, reading by spoiling a leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toys
from vdiff.evaluate.checks.structure import (
    component_name,
    describe,
    difference,
    first_line,
    floats_of,
    probe,
    shape_faults,
    what_is_read,
    with_leaves,
)
from vdiff.types import Params


def test_floats_are_taken_out_and_put_back():
    tree = {"a": jnp.arange(3), "b": jnp.ones(2), "c": (jnp.zeros(()), jnp.array(True))}
    floats = floats_of(tree)
    assert floats["a"] is None and floats["c"][1] is None and len(jax.tree.leaves(floats)) == 2
    doubled = with_leaves(tree, jax.tree.map(lambda v: v + 1, floats))
    assert jax.tree.structure(doubled) == jax.tree.structure(tree)
    np.testing.assert_array_equal(doubled["a"], tree["a"])
    np.testing.assert_array_equal(doubled["b"], [2, 2])


def test_names_and_descriptions():
    params = Params(theta={"w": jnp.zeros((2, 3))})
    (path, _), *_ = jax.tree_util.tree_leaves_with_path(params)
    assert component_name(path, (0, 1)) == "theta['w'][0, 1]" and component_name(path) == "theta['w']"
    assert describe(jnp.zeros(3)) == "float32[3]" and "int32[]" in describe({"a": jnp.int32(1)})
    assert (
        first_line(ValueError("one\ntwo")) == "ValueError: one" and first_line(ValueError()) == "ValueError: "
    )


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ({"a": jnp.zeros(2), "b": jnp.int32(0)}, ""),
        ({"a": jnp.zeros(3), "b": jnp.int32(0)}, "['a']: got float32[3], expected float32[2]"),
        ({"a": jnp.zeros(2), "b": jnp.zeros(())}, "['b']: got float32[], expected int32[]"),
        ({"a": jnp.zeros(2)}, "got {a: float32[2]}, expected {a: float32[2], b: int32[]}"),
    ],
)
def test_difference(got, message):
    assert difference(got, {"a": jnp.zeros(2), "b": jnp.int32(0)}) == message


def test_a_sound_model_has_no_fault_and_another_does():
    toy = toys.toy("linear")
    x = jnp.asarray(toy.data[0])
    assert shape_faults(toy.model, toy.params, x) == {}
    assert set(shape_faults(toy.model, toy.params, x[:2])) >= {"sample"}
    broken = toy.model._replace(log_q=lambda params, x, z: z)
    assert set(shape_faults(broken, toy.params, x)) == {"log_q"}
    vector = toy.model._replace(elbo_terms=lambda key, params, x: {"elbo": x})
    assert "expected a dict of scalars" in shape_faults(vector, toy.params, x)["elbo_terms"]
    other = toy.model._replace(init=lambda key: Params())
    assert shape_faults(other, toy.params, x)["init"].startswith("params: got")
    # An estimator's cv is no difference to what init makes.
    assert shape_faults(toy.model, toy.params._replace(cv=jnp.zeros(3)), x) == {}


def test_reading_sees_comparisons_and_not_mere_passing():
    params = Params(
        theta={"a": jnp.array(0.3), "b": jnp.array(2)}, lam={"c": jnp.array(1.0), "d": jnp.ones(2)}
    )

    def outputs(params):
        inner = jax.jit(lambda params: params.theta["a"] * 2.0)(params)
        return {"f": inner, "g": (params.lam["c"] > 0.5, jax.lax.stop_gradient(params.theta["b"]))}

    read = what_is_read(outputs, params)
    assert read == {"f": {"theta['a']"}, "g": {"lam['c']", "theta['b']"}}


def test_probe_evaluates_what_is_named():
    toy = toys.toy("linear")
    x, z = jnp.asarray(toy.data[0]), jnp.array([[0.3], [jnp.nan]])
    names = frozenset({"log_q", "sample_q"})
    values, is_finite = probe(toy.model, names, jax.random.key(0), toy.params, x, z, 2)
    assert set(values) == names and set(is_finite) == {"log_q"}
    np.testing.assert_allclose(values["log_q"][0], toy.model.log_q(toy.params, x, z[0]), rtol=1e-6)
    assert is_finite["log_q"].tolist() == [True, False]
    assert len(set(np.ravel(values["sample_q"]).tolist())) == len(values["sample_q"])
