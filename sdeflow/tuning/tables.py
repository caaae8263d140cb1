"""A plan's numbers as tensors that gradients reach, and the grids that a start can be warped into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.model import conversion, row_of
from sdeflow.plan import Plan
from sdeflow.reverse import ReverseSDE
from sdeflow.solvers.base import Solver

_NUDGE = 1e-6
"""Of a finite difference in the logarithms of a grid's increments."""


@dataclass(frozen=True)
class Tables:
    """A plan and what a run of it multiplies with: float64, a row each.

    Attributes:
        plan: where the numbers come from; its structure (steps, rows) is theirs.
        ratio, weights, shift: of the combinations, as in `Plan`.
        p, q: row k evaluates p y + q net(y, told).
        told: what the network is told about the time.
    """

    plan: Plan
    ratio: Tensor
    weights: Tensor
    shift: Tensor
    p: Tensor
    q: Tensor
    told: Tensor

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.ratio, self.weights, self.shift, self.p, self.q, self.told

    def with_numbers(self, *numbers: Tensor) -> Tables:
        """The same plan with other numbers."""
        return Tables(self.plan, *numbers)


def tables(problem: ReverseSDE, solver: Solver, grid: Tensor) -> Tables:
    """The tables of `solver` on `grid`."""
    plan: Plan = solver.plan(problem, grid)  # type: ignore[attr-defined]  # checked by `tune`
    process, model = problem.gaussian, problem.model
    given = row_of(model.prediction, process, plan.times)
    p, q = conversion(process, plan.times, given, problem.row(plan.target, plan.times))
    shift = torch.zeros_like(plan.ratio) if plan.shift_weight is None else plan.shift_weight
    return Tables(plan, plan.ratio, plan.weights, shift, p, q, model.time_table(plan.times))


def run(problem: ReverseSDE, table: Tables, x: Tensor, watch: Callable[..., None] | None = None) -> Tensor:
    """The end of a run from x; gradients reach the numbers of `table`.

    Args:
        watch: called as watch(k, base, history) before row k is combined; it may change the row's numbers in place.
    """
    plan, model = table.plan, problem.model
    steps, span = plan.step_of_row.tolist(), table.weights.shape[1]
    constant = None if plan.shift is None or not bool((plan.shift != 0).any()) else plan.shift.to(x)
    history: list[Tensor] = []
    base = y = x
    for k in range(plan.nfe):
        if k > 0 and steps[k] != steps[k - 1]:
            base = y
        time = table.told[k].to(x.device)
        value = model.raw(y, time.to(x.dtype).expand(x.shape[0]) if model.expand else time)
        history = [table.p[k] * y + table.q[k] * value, *history[: span - 1]]
        if watch is not None:
            watch(k, base, history)
        y = table.ratio[k] * base
        for weight, past in zip(table.weights[k], history, strict=False):
            y = y + weight * past
        if constant is not None:
            y = y + table.shift[k] * constant
    return y


@dataclass(frozen=True)
class Warp:
    """Grids of `steps` steps through the same clock as a start, the increments of its clock in other shares.

    Attributes:
        name: of the start.
        clock: times at equal parts of the start's clock, (many + 1,).
    """

    name: str
    clock: Tensor

    def grid(self, logs: Tensor) -> Tensor:
        """The grid whose shares of the clock are softmax(logs), (steps + 1,); equal logs give the start itself."""
        shares = torch.cumsum(torch.softmax(logs, 0), 0)
        place = torch.cat([shares.new_zeros(1), shares / shares[-1]]) * (len(self.clock) - 1)
        below = place.floor().long().clamp(max=len(self.clock) - 2)
        grid = torch.lerp(self.clock[below], self.clock[below + 1], place - below)
        grid[0], grid[-1] = self.clock[0], self.clock[-1]
        return grid


def slopes(problem: ReverseSDE, solver: Solver, warp: Warp, logs: Tensor, at: Tables) -> list[list[Tensor]]:
    """d numbers/d logs by forward differences: plans need not be differentiable, and cost no model call."""
    found = []
    for i in range(len(logs)):
        nudged = logs.clone()
        nudged[i] += _NUDGE
        beside = tables(problem, solver, warp.grid(nudged)).numbers
        found.append([(b - a) / _NUDGE for a, b in zip(at.numbers, beside, strict=True)])
    return found
