"""The problems that a solver takes, with states and a grid, for the checks that need no known solution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.plan import Plan
from sdeflow.processes import VP
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solution import Solution
from sdeflow.solve import solve
from sdeflow.solvers.base import Solver
from sdeflow.testing.solver_checks.problems import MIXTURE, Counted, Curved, Tanh, Well, states

F64 = torch.float64


@dataclass(frozen=True)
class Setup:
    """A problem for the checks that need no known solution."""

    label: str
    problem: Problem
    x: Tensor
    grid: Tensor

    def run(self, solver: Solver, x: Tensor | None = None, grid: Tensor | None = None, **options: Any) -> Solution:
        with torch.no_grad():
            return self.run_grad(solver, self.x if x is None else x, grid, **options)

    def run_grad(self, solver: Solver, x: Tensor, grid: Tensor | None = None, **options: Any) -> Solution:
        grid = None if isinstance(solver, Plan) else self.grid if grid is None else grid
        return solve(self.problem, x, solver, grid=grid, throw=False, **options)

    def calls(self) -> int | None:
        """Evaluations the problem has seen."""
        if isinstance(self.problem, ReverseSDE):
            return self.problem.model.nfe
        return self.problem.calls if isinstance(self.problem, Counted) else None


def setups_for(solver: Solver, problem: Problem | None, seed: int) -> tuple[list[Setup], list[str]]:
    """(those the solver takes, why it refuses the others)."""
    process = VP()
    model = MIXTURE.model(process)
    up, down = torch.tensor([0.0, 0.1, 0.3, 0.55, 0.7], dtype=F64), torch.tensor([0.8, 0.6, 0.45, 0.3, 0.2], dtype=F64)
    plane, small = states(7, 2, 5), torch.tanh(states(7, 2, 6))
    own = [
        Setup("an ordinary equation", Curved(), plane, up), Setup("additive noise", Well(), plane, up),
        Setup("diagonal noise", Tanh(), small, up),
    ]  # fmt: skip
    reversals = [
        Setup("the probability flow", process.probability_flow(model), plane, down),
        Setup("the reverse SDE", process.reverse(model, 1.0), plane, down),
    ]
    groups = [reversals] if solver.view == "transition" else [own, reversals]
    taken: list[Setup] = []
    refused: list[str] = []
    for group in groups:
        for setup in group if not taken else []:
            why = _refusal(solver, setup, seed)
            if why is None:
                taken.append(setup)
            else:
                refused.append(f"{setup.label}: {why}")
    if problem is not None:
        event = getattr(getattr(problem, "process", problem), "event", None) or (2,)
        start, end = problem.span
        grid = torch.linspace(start, end, 5, dtype=F64)
        mine = Setup("the given problem", problem, states(7, math.prod(event), 7).reshape(7, *event), grid)
        why = _refusal(solver, mine, seed)
        if why is not None:
            raise ValueError(f"{solver.name} does not take the given problem: {why}")
        taken.append(mine)
    return taken, refused


def _refusal(solver: Solver, setup: Setup, seed: int) -> str | None:
    try:
        setup.run(solver, seed=seed)
    except (ValueError, TypeError) as error:
        return str(error)
    return None
