"""Any linear method for ordinary equations, run in another variable of the probability flow."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.gaussian import GaussianSDE
from sdeflow.plan import Plan, eta_key
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.base import Evaluate, LinearSolver, Norm, Pair, View, per_row, refuse_noise, semilinear
from sdeflow.times import as_time
from sdeflow.variables import Variable, variable


@checked_class
@dataclass(frozen=True)
class InVariable(LinearSolver):
    """`solver` applied to y = x/L(t) on the clock u(t): x' = L' (x/L + sum_j w_j E_j), E = dy/du.

    The plan of `solver` on the grid of clocks, each row rescaled by L at its two ends; stages fall on the clock. A
    solver with an error estimate also solves to a tolerance there. Heun in "x/alpha" is EDM's sampler, Euler there
    is DDIM, Adams methods there DEIS's rho-AB.

    Args:
        solver: a linear solver of the drift view (Runge-Kutta, Adams).
        name_of_variable: "x", "x/alpha", "x/sigma", "straight" or "angle" (`sdeflow.variables`).
        label: a name of its own for tables.
    """

    solver: LinearSolver
    name_of_variable: str
    label: str = ""
    view: View = "transition"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LinearSolver) or self.solver.view != "drift":
            raise TypeError(f"InVariable: expected a linear solver of the drift view, got {self.solver!r}")
        variable(self.name_of_variable)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label or f"{self.solver.name} in {self.name_of_variable}"

    @property
    def pair(self) -> Pair | None:
        inner = self.solver.pair
        return None if inner is None else VariablePair(inner, variable(self.name_of_variable))

    def check(self, problem: Problem) -> None:
        semilinear(self.name, problem)
        refuse_noise(self.name, problem)

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        process, chosen = semilinear(self.name, problem).gaussian, variable(self.name_of_variable)
        clock = chosen.clock(process, grid)
        if not bool(torch.isfinite(clock).all()):
            raise ValueError(
                f"{self.name}: the clock of {chosen.name} is infinite on the grid (from t = {float(grid[0]):g} to "
                f"{float(grid[-1]):g}): start or end short of it, or choose another variable"
            )
        inner = self.solver.plan(problem, clock)
        times = _times(inner, process, chosen, grid)
        ends = torch.cat([times[1:], grid[-1:]])
        base, reached = (chosen.scale(process, t) for t in (grid[inner.step_of_row], ends))
        return dataclasses.replace(
            inner,
            name=self.name,
            view="transition",
            target=chosen.name if chosen.name != "x" else "drift",
            grid=grid,
            times=times,
            ratio=inner.ratio * reached / base,
            weights=inner.weights * reached[:, None],
            process=repr(process),
            eta=eta_key(semilinear(self.name, problem).eta),
        )


@dataclass(frozen=True)
class VariablePair:
    """An embedded pair in another variable: steps of y = x/L per sample on the clock u, errors measured in x."""

    inner: Pair
    chosen: Variable

    @property
    def order(self) -> int:
        return self.inner.order

    @property
    def dense(self) -> None:
        return None

    def clock(self, problem: Problem, t: float) -> float:
        clock = float(self.chosen.clock(_process(problem), as_time(t)))
        if not math.isfinite(clock):
            raise ValueError(f"the clock of {self.chosen.name} is infinite at t = {t:g}: start or end short of it")
        return clock

    def time(self, problem: Problem, s: Tensor) -> Tensor:
        return self.chosen.time(_process(problem), s)

    def evaluate(self, problem: Problem, x: Tensor, s: Tensor) -> Tensor:
        assert isinstance(problem, ReverseSDE)
        t = per_row(self.time(problem, s), x)
        return problem.model.value(x, t, self.chosen.row(problem.gaussian, t))

    def first_step(self, evaluate: Evaluate, norm: Norm, x: Tensor, s: Tensor, k: Tensor, span: float) -> Tensor:
        """A thousandth of the clock's span; the control grows it tenfold a step."""
        return torch.full_like(s, 1e-3 * abs(span))

    def attempt(
        self, evaluate: Evaluate, problem: Problem, x: Tensor, s: Tensor, h: Tensor, k: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]:
        def scale(clock: Tensor) -> Tensor:
            return per_row(self.chosen.scale(_process(problem), self.time(problem, clock)), x).to(x.dtype)

        def inside(y: Tensor, clock: Tensor) -> Tensor:
            return evaluate(scale(clock) * y, clock)

        y, errors, last, stages = self.inner.attempt(inside, problem, x / scale(s), s, h, k)
        end = scale(s + h)
        return end * y, [end * e for e in errors], last, stages

    def size(self, norms: list[Tensor]) -> Tensor:
        return self.inner.size(norms)


def _process(problem: Problem) -> GaussianSDE:
    assert isinstance(problem, ReverseSDE)
    return problem.gaussian


def _times(inner: Plan, process: object, chosen: Variable, grid: Tensor) -> Tensor:
    """The times of the inner plan's clocks, those of grid points exactly."""
    first = torch.cat([torch.ones(1, dtype=torch.bool), torch.diff(inner.step_of_row) > 0])
    times = torch.empty_like(inner.times)
    times[first] = grid[:-1]
    inside = ~first
    times[inside] = chosen.time(process, inner.times[inside])  # type: ignore[arg-type]
    # a stage at the end of its step is at the grid's time, not a rounding error beside it
    at_end = inside & (inner.times == inner.grid[inner.step_of_row + 1])
    times[at_end] = grid[inner.step_of_row[at_end] + 1]
    return times
