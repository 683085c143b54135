r"""An adaptive solver: steps as long as a tolerance allows, by Diffrax, an optional dependency.

    |error_i| <= atol + rtol |y_i|   in the root mean square over all entries, at every step

Each datum takes its own number of steps, so a batch takes the largest: `fixed_grid` is for batches.

Source: Prince and Dormand, High Order Embedded Runge-Kutta Formulae, 1981; Kidger, On Neural Differential Equations,
2022 (Diffrax).
"""

from types import ModuleType

import jax
from jaxtyping import Array

from vdiff.diffusion.runge_kutta import Field, Solver
from vdiff.types import PyTree


def adaptive(rtol: float = 1e-5, atol: float = 1e-5, *, max_steps: int = 256) -> Solver:
    """Build a solver of order eight whose steps are as long as the tolerances allow.

    Args:
        rtol: relative tolerance of one step.
        atol: absolute tolerance of one step; in float32 below about 1e-6 it is roundings that are followed.
        max_steps: tried at most, refused ones included; beyond, the solve raises when it is run.

    Returns:
        A `Solver`; 13 evaluations of the field for every step tried and one more; differentiable in reverse mode.

    Raises:
        ImportError: if Diffrax is missing.
        ValueError: if a tolerance is not positive or `max_steps` is less than one.
    """
    if not (rtol > 0 and atol > 0 and max_steps >= 1):
        raise ValueError(
            f"rtol, atol, max_steps: got {rtol}, {atol}, {max_steps}, expected positive tolerances, e.g. 1e-5, and at "
            "least one step"
        )
    diffrax = _diffrax()

    def solve(field: Field, y: PyTree, start: Array, stop: Array) -> PyTree:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: field(t, y)),
            diffrax.Dopri8(),
            t0=start,
            t1=stop,
            dt0=None,
            y0=y,
            saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=max_steps,
        )
        return jax.tree.map(lambda leaf: leaf[-1], solution.ys)

    return solve


def _diffrax() -> ModuleType:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            "adaptive: got no diffrax, expected it to be installed; pip install 'vdiff[diffrax]', or use fixed_grid()"
        ) from error
    return diffrax
