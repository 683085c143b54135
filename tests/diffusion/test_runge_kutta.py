"""Order of convergence on an equation with a known solution, what is evaluated how often, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdiff.diffusion.runge_kutta import cooper_verner, fixed_grid, tableau

RK4 = tableau([[0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6])


def pendulum(t, y):
    """Two coupled equations, nonlinear and with t in them, solved by a = sin t + 1/2 cos t, b = exp(-a^2)."""
    a, b = y["a"], y["b"]
    da = jnp.cos(t) - 0.5 * jnp.sin(t)
    exact_a = jnp.sin(t) + 0.5 * jnp.cos(t)
    return {"a": da + jnp.sin(a - exact_a), "b": -2.0 * a * da * b + jnp.square(b - jnp.exp(-jnp.square(a)))}


def solution(t):
    a = np.sin(t) + 0.5 * np.cos(t)
    return {"a": a, "b": np.exp(-(a**2))}


def error(method, num_steps, start=0.0, stop=3.0):
    with jax.enable_x64(True):
        y = jax.tree.map(lambda v: jnp.asarray([v], jnp.float64), solution(start))
        solve = fixed_grid(num_steps, tableau=method)
        got = solve(pendulum, y, jnp.float64(start), jnp.float64(stop))
        return max(abs(float(got[name][0]) - solution(stop)[name]) for name in got)


@pytest.mark.parametrize(("method", "order"), [(RK4, 4), (cooper_verner, 8)], ids=["rk4", "cooper_verner"])
@pytest.mark.parametrize(("start", "stop"), [(0.0, 3.0), (3.0, 0.0)])
def test_the_order_is_what_it_says(method, order, start, stop):
    """Halving the step divides the error by 2^order; that of order seven would divide by 128."""
    coarse, fine = error(method, 8, start, stop), error(method, 16, start, stop)
    assert abs(np.log2(coarse / fine) - order) < 0.7


def test_a_quadrature_is_lobattos():
    """With five points it is exact to degree seven, and not at eight."""
    with jax.enable_x64(True):
        for degree in range(9):
            slope = lambda t, y, degree=degree: t**degree  # noqa: E731
            got = float(fixed_grid(1)(slope, jnp.float64(0.0), jnp.float64(0.0), jnp.float64(1.0)))
            assert (abs(got - 1 / (degree + 1)) < 1e-14) == (degree < 8)


def test_the_field_is_traced_twice_at_most_and_evaluated_77_times():
    traced, evaluated = [], []

    def slope(t, y):
        traced.append(1)
        jax.debug.callback(lambda: evaluated.append(1))
        return -y

    solve = jax.jit(lambda y: fixed_grid()(slope, y, jnp.zeros(()), jnp.ones(())))
    np.testing.assert_allclose(solve(jnp.ones(3)), np.full(3, np.exp(-1)), rtol=1e-6)
    jax.effects_barrier()
    assert len(traced) <= 2 and len(evaluated) == 77
    solve(jnp.zeros(3))
    assert len(traced) <= 2


def test_refusals():
    with pytest.raises(ValueError, match="num_steps: got 0, expected at least 1"):
        fixed_grid(0)
    with pytest.raises(ValueError, match=r"rows, weights: got rows of lengths \[2\]"):
        tableau([[0.5, 0.5]], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"weights with sum 0.9"):
        tableau([[0.5]], [0.5, 0.4])
