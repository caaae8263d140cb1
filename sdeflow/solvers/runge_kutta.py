"""One engine for explicit Runge-Kutta methods: a method is a `Tableau`.

On a fixed grid a Runge-Kutta method is a plan with one row a stage; with tolerances, a tableau with
an error estimate is stepped per sample (`sdeflow.control.Adaptive`).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.checked import checked, checked_class
from sdeflow.plan import Plan
from sdeflow.sde import Problem
from sdeflow.solvers import tableaus
from sdeflow.solvers.base import LinearSolver, refuse_noise
from sdeflow.solvers.embedded import RungeKuttaPair
from sdeflow.solvers.tableaus import Tableau


@checked_class
@dataclass(frozen=True)
class RungeKutta(LinearSolver):
    """An explicit Runge-Kutta method x' = x + h sum_i b_i k_i, k_i = f(x + h sum_j a_ij k_j, t + c_i h).

    Args:
        tableau: its c, a and b; with `b_error` the method also solves to a tolerance.
    """

    tableau: Tableau

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.tableau.name

    @property
    def order(self) -> int:
        """The order of convergence that its tableau declares."""
        return self.tableau.order

    @property
    def pair(self) -> RungeKuttaPair | None:
        return None if self.tableau.b_error is None else RungeKuttaPair(self.tableau)

    @property
    def adaptive(self) -> bool:
        """Whether it has an error estimate, for solving to a tolerance."""
        return self.pair is not None

    def __repr__(self) -> str:
        return f"{self.name}()"

    def check(self, problem: Problem) -> None:
        refuse_noise(self.name, problem)

    def plan_key(self, problem: Problem) -> Hashable | None:
        return ()  # times and weights are those of the grid, whatever the problem

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        table = self.tableau
        used = len(table.b) - 1 if table.first_same_as_last else len(table.b)
        h, steps = torch.diff(grid), grid.numel() - 1
        # row i of a step forms the point of stage i + 1, the last row the step's result
        points = [*table.a[1:used], table.b[:used]]
        weights = torch.zeros(used, used, dtype=torch.float64)
        for i, row in enumerate(points):
            weights[i, : i + 1] = torch.tensor([float(v) for v in row][::-1], dtype=torch.float64)
        c = torch.tensor([float(v) for v in table.c[:used]], dtype=torch.float64)
        rows = steps * used
        return Plan(
            name=self.name,
            target="drift",
            grid=grid,
            times=(grid[:-1, None] + h[:, None] * c).reshape(rows),
            step_of_row=torch.arange(steps).repeat_interleave(used),
            ratio=torch.ones(rows, dtype=torch.float64),
            weights=(h[:, None, None] * weights).reshape(rows, used),
            noise=torch.zeros(rows, dtype=torch.float64),
        )


def Euler() -> RungeKutta:
    """Euler's method: x' = x + h f(x, t). Order 1, 1 call a step."""
    return RungeKutta(tableaus.EULER)


def Midpoint() -> RungeKutta:
    """The explicit midpoint rule. Order 2, 2 calls a step."""
    return RungeKutta(tableaus.MIDPOINT)


def Ralston() -> RungeKutta:
    """Ralston's method, of smallest error bound in its class. Order 2, 2 calls a step."""
    return RungeKutta(tableaus.RALSTON)


def Heun() -> RungeKutta:
    """Heun's method (the explicit trapezoid). Order 2, 2 calls a step."""
    return RungeKutta(tableaus.HEUN)


def RK4() -> RungeKutta:
    """The classical Runge-Kutta method. Order 4, 4 calls a step."""
    return RungeKutta(tableaus.RK4)


def RK38() -> RungeKutta:
    """Kutta's 3/8 rule. Order 4, 4 calls a step."""
    return RungeKutta(tableaus.RK38)


def BogackiShampine() -> RungeKutta:
    """Bogacki and Shampine's 3(2) pair with dense output. Order 3, 3 calls a step; adaptive with rtol, atol."""
    return RungeKutta(tableaus.BOGACKI_SHAMPINE)


def Tsit5() -> RungeKutta:
    """Tsitouras' 5(4) pair with dense output. Order 5, 6 calls a step; adaptive with rtol, atol."""
    return RungeKutta(tableaus.TSITOURAS)


def DOP853() -> RungeKutta:
    """Dormand and Prince's 8(5,3) method, dense output of order 7. Order 8, 12 calls a step; adaptive."""
    return RungeKutta(tableaus.DORMAND_PRINCE_8)


def RK45() -> RungeKutta:
    """Dormand and Prince's 5(4) pair with dense output. Order 5, 6 calls a step; adaptive with rtol, atol."""
    return RungeKutta(tableaus.DORMAND_PRINCE)


@checked
def for_tolerance(rtol: float) -> RungeKutta:
    """The pair for an ODE that is not stiff: Tsit5 for rtol above 1e-6, DOP853 from there down.

    Measured at equal error (`python -m benchmarks.adaptive`): on Lotka-Volterra and Van der Pol DOP853 is the cheaper
    one from 1e-5 and at every tolerance, on the probability flow of a mixture from about 1e-8. At loose tolerances
    Tsit5 is little behind, and where each call is a network's its shorter steps waste fewer of them.

    Args:
        rtol: the relative tolerance, > 0.

    Raises:
        ValueError: not a positive number.
    """
    if not rtol > 0:
        raise ValueError(f"expected rtol > 0, got {rtol!r}")
    return Tsit5() if rtol > 1e-6 else DOP853()
