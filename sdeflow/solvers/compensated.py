"""A linear method whose combinations are formed in float64, whatever the network's precision."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.noise import Noise
from sdeflow.plan import Plan
from sdeflow.plan_run import PlanRun
from sdeflow.sde import Problem
from sdeflow.solvers.base import LinearSolver, Solver, Stepper, View, kept_plan, reversal_key


@checked_class
@dataclass(frozen=True)
class Compensated(LinearSolver):
    """`solver` with the state kept and combined in float64 between the steps; the network sees its own dtype.

    A float32 solve of N steps loses about sqrt(N) roundings of the state; this loses one, and those of the network.
    Costs memory for the wider history, and slower combinations.

    Args:
        solver: a linear method (one with a plan).

    Raises:
        TypeError: a solver without a plan.
    """

    solver: Solver

    def __post_init__(self) -> None:
        if not hasattr(self.solver, "plan"):
            raise TypeError(f"Compensated: expected a solver with a plan, got {self.solver!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"Compensated({self.solver.name})"

    @property
    def view(self) -> View:  # type: ignore[override]
        return self.solver.view

    def check(self, problem: Problem) -> None:
        self.solver.check(problem)

    def draws_noise(self, problem: Problem) -> bool:
        return self.solver.draws_noise(problem)

    def plan_key(self, problem: Problem) -> Hashable | None:
        return self.solver.plan_key(problem) if isinstance(self.solver, LinearSolver) else reversal_key(problem)

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        plan: Plan = self.solver.plan(problem, grid)  # type: ignore[attr-defined]  # checked above
        return plan

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        plan = kept_plan(self, self.plan_key(problem), grid, lambda: self.plan(problem, grid))
        return PlanRun(plan, problem, x, noise, torch.float64)
