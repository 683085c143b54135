"""A function of rows under jit, vmap and grad, against the function of one row that it is made of."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.exported.flattened import Rows, apply_rows, pullback

W = jnp.arange(6.0).reshape(2, 3) / 10
X = jnp.sin(jnp.arange(60.0)).reshape(4, 5, 3)


def one(w, x):
    """Of one row: a number, and another that has no derivative."""
    return jnp.sum(jnp.tanh(w @ x) ** 2), jnp.sum((x > 0).astype(jnp.int32))


def of_rows(order=2):
    """The same as a function of rows that JAX cannot map: it insists on a matrix x."""
    calls = []

    def call(w, x):
        assert w.shape == (2, 3) and x.ndim == 2
        calls.append(x.shape[0])
        return jax.vmap(one, in_axes=(None, 0))(w, x)

    return Rows(call, [False, True], [True, True], [True, False], order), calls


def first(rows):
    """The number alone, of one row, as the caller of `apply_rows` sees it."""
    return lambda w, x: apply_rows(rows, w, x[None])[0][0]


def agree(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_rows_values_under_jit_and_one_map():
    rows, calls = of_rows()
    expected = jax.vmap(one, in_axes=(None, 0))(W, X[0])
    agree(apply_rows(rows, W, X[0]), expected)
    calls.clear()
    mapped = jax.jit(jax.vmap(lambda x: apply_rows(rows, W, x[None])))(X[0])
    agree([leaf[:, 0] for leaf in mapped], expected)
    assert set(calls) == {5}


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product((0, 1, 2), (0, 1))))
def test_a_map_of_maps_over_any_axes_is_one_call(outer, inner):
    rows, calls = of_rows()
    x = jnp.stack([jnp.moveaxis(block, 0, inner) for block in X], outer)

    def mapped(f):
        inside = jax.vmap(lambda x: jnp.stack([f(W, x)] * 3), in_axes=inner, out_axes=1)
        return jax.vmap(inside, in_axes=outer, out_axes=2)(x)

    got = mapped(first(rows))
    assert got.shape == (3, 5, 4) and max(calls) == 20
    agree(got, mapped(lambda w, x: one(w, x)[0]))


def test_a_map_over_what_rows_share_is_one_call_after_another():
    rows, calls = of_rows()
    stack = jnp.stack([W, 2 * W, 3 * W])
    calls.clear()
    agree(
        jax.vmap(lambda w: apply_rows(rows, w, X[0]))(stack),
        jax.vmap(lambda w: jax.vmap(one, in_axes=(None, 0))(w, X[0]))(stack),
    )
    assert max(calls) == 5
    agree(
        jax.vmap(lambda w, x: apply_rows(rows, w, x))(stack, X[:3]),
        jax.vmap(lambda w, x: jax.vmap(one, in_axes=(None, 0))(w, x))(stack, X[:3]),
    )


ORDERS = {
    "grad": lambda f, i: jax.grad(f, i)(W, X[0, 1]),
    "grad of a mean of vmap": lambda f, i: jax.grad(
        lambda w, x: jnp.mean(jax.vmap(f, in_axes=(None, 0))(w, x)), i
    )(W, X[0]),
    "vmap of grad": lambda f, i: jax.vmap(jax.grad(f, i), in_axes=(None, 0))(W, X[0]),
    "jit of vmap of grad": lambda f, i: jax.jit(jax.vmap(jax.grad(f, i), in_axes=(None, 0)))(W, X[0]),
    "vmap of jit of grad": lambda f, i: jax.vmap(jax.jit(jax.grad(f, i)), in_axes=(None, 0))(W, X[0]),
    "vmap of grad of jit": lambda f, i: jax.vmap(jax.grad(jax.jit(f), i), in_axes=(None, 0))(W, X[0]),
    "ensemble": lambda f, i: jax.vmap(jax.grad(f, i))(jnp.stack([W, 2 * W]), X[0, :2]),
    "scan": lambda f, i: jax.grad(
        lambda w, x: jax.lax.scan(lambda total, x: (total + f(w, x), None), 0.0, x)[0], i
    )(W, X[0]),
    "checkpoint": lambda f, i: jax.grad(lambda w, x: jax.checkpoint(f)(w, x) ** 2, i)(W, X[0, 1]),
    "vmap of grad of scan": lambda f, i: jax.vmap(
        jax.grad(lambda w, x: jax.lax.scan(lambda t, x: (t + f(w, x), None), 0.0, x)[0], i), in_axes=(None, 0)
    )(W, X),
    "jacrev of grad": lambda f, i: jax.jacrev(jax.grad(f, i), 1)(W, X[0, 1]),
    "vmap of jacrev of grad": lambda f, i: jax.vmap(jax.jacrev(jax.grad(f, i), 0), in_axes=(None, 0))(
        W, X[0]
    ),
}


@pytest.mark.parametrize(("name", "argument"), list(itertools.product(ORDERS, (0, 1))))
def test_derivatives_in_any_order_with_maps(name, argument):
    rows, _ = of_rows()
    agree(ORDERS[name](first(rows), argument), ORDERS[name](lambda w, x: one(w, x)[0], argument))


def test_the_gradient_of_a_mean_is_one_call_of_all_rows():
    rows, calls = of_rows()
    gradient = jax.jit(jax.grad(lambda w: jnp.mean(jax.vmap(first(rows), in_axes=(None, 0))(w, X[0]))))
    calls.clear()
    text = str(jax.make_jaxpr(gradient)(W))
    assert "scan" not in text and "while" not in text
    gradient(W)
    assert max(calls) == 5


def test_only_the_gradients_that_are_asked_for_are_computed():
    rows, _ = of_rows()
    for moves in ((True, False), (False, True), (True, True)):
        outs = apply_rows(pullback(rows, moves), W, X[0], jnp.ones(5))
        expected = jax.grad(lambda w, x: jnp.sum(jax.vmap(one, in_axes=(None, 0))(w, x)[0]), (0, 1))(W, X[0])
        agree(outs, [g for g, m in zip(expected, moves, strict=True) if m])
    # By rows and not by what they share: still one call.
    text = str(jax.make_jaxpr(jax.vmap(jax.grad(first(rows), 1), in_axes=(None, 0)))(W, X[0]))
    assert "scan" not in text


def test_forward_mode_and_too_high_orders_are_refused():
    rows, _ = of_rows(order=1)
    f = first(rows)
    for push in (jax.jvp, jax.jit(jax.jvp, static_argnums=0)):
        with pytest.raises(NotImplementedError, match="reverse-mode"):
            push(lambda x: f(W, x), (X[0, 0],), (X[0, 0],))
    with pytest.raises(ValueError, match="larger vjp_order"):
        jax.jacrev(jax.grad(f, 1), 1)(W, X[0, 0])


def test_a_key_is_an_argument_like_any_other(key):
    def call(key, x):
        return [jax.vmap(lambda key, x: x + jax.random.normal(key))(key, x)]

    rows = Rows(call, [True, True], [True], [True], 1)
    keys, x = jax.random.split(key, (3, 4)), jnp.ones((3, 4))
    expected = jax.vmap(call)(keys, x)
    agree(jax.vmap(lambda key, x: apply_rows(rows, key, x))(keys, x), expected)
    slope = jax.vmap(jax.grad(lambda x, key: 2 * jnp.sum(apply_rows(rows, key, x)[0])))(x, keys)
    np.testing.assert_array_equal(slope, np.full((3, 4), 2.0))
