"""What to take when nothing has been measured: a solver and a grid for a budget of model calls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sdeflow import grids
from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE
from sdeflow.grids import GridFunction
from sdeflow.sde import SDE
from sdeflow.solvers.base import Solver
from sdeflow.solvers.euler_maruyama import EulerMaruyama
from sdeflow.solvers.gaussian_split import GaussianSplit
from sdeflow.solvers.runge_kutta import RK4, Euler, Heun


@dataclass(frozen=True)
class Recommendation:
    """A solver, its grid, and how many steps spend the budget.

    Attributes:
        solver: for `solve` and `sample`.
        grid: a grid function, for `grid=`.
        steps: for `steps=`.
        eta: of the reversal it is for, 0 or 1.
        why: where it comes from.
    """

    solver: Solver
    grid: GridFunction
    steps: int
    eta: float
    why: str


@checked
def recommend(process: SDE, *, nfe: int, stochastic: bool = False) -> Recommendation:
    """The solver and grid that the benchmark found best without tuning, for `nfe` model calls.

    For the reversal of a GaussianSDE it is `GaussianSplit` on `grids.logistic`, of an order that grows with the budget
    (`python -m benchmarks.recommend`; docs/tuning.md has the table and what it was measured on). For other SDEs, which
    have no exact linear part: Runge-Kutta on the probability flow, Euler-Maruyama on the reverse SDE. `sf.tune` gains
    more: it fits the grid to the model.

    Args:
        process: the forward process.
        nfe: model calls, at least 1.
        stochastic: for the reverse SDE (eta = 1) instead of the probability flow.

    Raises:
        TypeError, ValueError: arguments that do not fit.
    """
    process = getattr(process, "process", process)
    if not isinstance(process, SDE):
        raise TypeError(f"expected an SDE, got {type(process).__name__}")
    if nfe < 1:
        raise ValueError(f"expected nfe >= 1 model calls, got {nfe!r}")
    eta = 1.0 if stochastic else 0.0
    if not isinstance(process, GaussianSDE):
        if stochastic:
            return Recommendation(EulerMaruyama(), grids.uniform, nfe, eta, "any SDE: Euler-Maruyama, equal steps")
        solver, calls = (RK4(), 4) if nfe >= 40 else (Heun(), 2) if nfe >= 2 else (Euler(), 1)
        return Recommendation(solver, grids.uniform, nfe // calls, eta, "any flow: Runge-Kutta, equal steps")
    order, width = _choice(nfe, stochastic)
    grid: GridFunction = partial(grids.logistic, width=width)
    why = f"GaussianSplit({order}) on grids.logistic(width={width:g}): best at {nfe} calls of the untuned"
    return Recommendation(GaussianSplit(order), grid, nfe, eta, why)


def _choice(nfe: int, stochastic: bool) -> tuple[int, float]:
    """(order of the split, width of the grid)."""
    if stochastic:
        return 2, 1.5
    if nfe < 12:
        return 2, 1.0
    return 4, 1.5 if nfe < 30 else 2.0
