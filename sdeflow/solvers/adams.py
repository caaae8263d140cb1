"""Adams methods of order 1 to 5 on any grid: the slope interpolated through its last evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdeflow.checked import checked, checked_class
from sdeflow.plan import Plan, corrected_weights, spliced
from sdeflow.quadrature import gauss_legendre
from sdeflow.sde import Problem
from sdeflow.solvers import tableaus
from sdeflow.solvers.base import LinearSolver, refuse_noise
from sdeflow.solvers.runge_kutta import RungeKutta

_MOST = 5


@checked_class
@dataclass(frozen=True)
class Adams(LinearSolver):
    """Adams-Bashforth, x' = x + int p(t) dt with p through the last `order` slopes, one call a step.

    With `corrector`, Adams-Bashforth-Moulton: each new slope also corrects the step that led to it (the
    interpolant is refitted with the new slope, of order + 1), at no further call: predict, evaluate, correct.
    Weights are those of the grid, whatever its spacing. (Hairer, Norsett and Wanner 1993, Solving ODEs I, III.1.)

    Args:
        order: slopes interpolated, 1 to 5; the order of the predictor.
        corrector: correct each step by the next evaluation. The last step is predicted only, as its
            correction would take one call more.
        start: "ramp" begins with orders 1, 2, ..., which caps the order at 2 as steps shrink; "runge-kutta"
            makes the first order - 1 steps with the classical method of order 4, three calls more each.
    """

    order: int = 4
    corrector: bool = False
    start: Literal["ramp", "runge-kutta"] = "ramp"

    def __post_init__(self) -> None:
        if self.order not in range(1, _MOST + 1):
            raise ValueError(f"Adams: expected order 1 to {_MOST}, got {self.order!r}")
        if self.start not in ("ramp", "runge-kutta"):
            raise ValueError(f'Adams: expected start "ramp" or "runge-kutta", got {self.start!r}')

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{'ABM' if self.corrector else 'AB'}{self.order}"

    def check(self, problem: Problem) -> None:
        refuse_noise(self.name, problem)

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        steps = grid.numel() - 1
        ready = 0 if self.start == "ramp" else min(self.order - 1, steps)
        predict = _weights(grid[:-1], grid[1:], _past(grid[:-1], self.order), self.order)
        weights = predict
        if self.corrector and steps > 1:
            # the correction of step n enters when its end has been evaluated, with the prediction of step n + 1
            nodes = torch.cat([grid[1:-1, None], _past(grid[:-2], self.order)], dim=1)
            count = torch.clamp(torch.arange(steps - 1) + 1, max=self.order)
            used = torch.arange(self.order + 1) <= count[:, None]
            correct = lagrange_integrals(grid[:-2], grid[1:-1], nodes, used)
            exact = min(ready, steps - 1)
            correct[:exact, 0] = 0.0  # steps of the start are not corrected
            correct[:exact, 1:] = predict[:exact]
            weights = corrected_weights(torch.ones(steps, dtype=torch.float64), predict, correct)
        multistep = Plan(
            name=self.name,
            target="drift",
            grid=grid,
            times=grid[:-1].clone(),
            step_of_row=torch.arange(steps),
            ratio=torch.ones(steps, dtype=torch.float64),
            weights=weights,
            noise=torch.zeros(steps, dtype=torch.float64),
        )
        return spliced(RungeKutta(tableaus.RK4).plan(problem, grid), multistep, ready)


def _past(ends: Tensor, count: int) -> Tensor:
    """The evaluation times t_n, t_{n-1}, ... before each step, (steps, count); the first repeats where none is."""
    back = (torch.arange(ends.numel())[:, None] - torch.arange(count)).clamp(min=0)
    return ends[back]


def _weights(start: Tensor, end: Tensor, nodes: Tensor, order: int) -> Tensor:
    """Adams-Bashforth weights (steps, order), ramping the order up from 1."""
    count = torch.clamp(torch.arange(start.numel()) + 1, max=order)
    return lagrange_integrals(start, end, nodes, torch.arange(order) < count[:, None])


def lagrange_integrals(start: Tensor, end: Tensor, nodes: Tensor, used: Tensor) -> Tensor:
    """int_start^end l_j dt of the Lagrange polynomials through the `used` of `nodes` (steps, count)."""
    points, rule = gauss_legendre(4)  # exact to degree 7
    h = (end - start)[:, None]
    t = start[:, None] + h * points
    return torch.stack([(h * rule * b).sum(1) for b in lagrange_basis(t, nodes, used)], dim=1)


def lagrange_basis(at: Tensor, nodes: Tensor, used: Tensor) -> list[Tensor]:
    """The Lagrange polynomials through the `used` of `nodes` (rows, count), at points (rows, points); 0 if unused."""
    count, basis = nodes.shape[1], []
    for j in range(count):
        value = used[:, j, None].to(at.dtype).expand_as(at)
        for i in range(count):
            if i != j:
                factor = (at - nodes[:, i, None]) / (nodes[:, j] - nodes[:, i])[:, None]
                value = torch.where((used[:, i] & used[:, j])[:, None], value * factor, value)
        basis.append(torch.where(used[:, j, None], value, 0.0))
    return basis


@checked
def AdamsBashforth(order: int = 4, *, start: Literal["ramp", "runge-kutta"] = "ramp") -> Adams:
    """Adams-Bashforth of order 1 to 5, one call a step. Arguments as in `Adams`."""
    return Adams(order, corrector=False, start=start)


@checked
def AdamsBashforthMoulton(order: int = 4, *, start: Literal["ramp", "runge-kutta"] = "ramp") -> Adams:
    """Adams-Bashforth-Moulton: predictor of `order`, corrector of order + 1, one call a step. As in `Adams`."""
    return Adams(order, corrector=True, start=start)
