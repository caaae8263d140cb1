"""The order on a problem of the caller's, which has no reference but a run on a fine grid."""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.calculus import noise_kind
from sdeflow.noise import SamePath
from sdeflow.sde import SDE
from sdeflow.solve import solve
from sdeflow.solvers.base import Solver
from sdeflow.testing.report import Finding
from sdeflow.testing.solver_checks.claims import Claims
from sdeflow.testing.solver_checks.fitting import order_finding
from sdeflow.testing.solver_checks.setups import Setup
from sdeflow.testing.solver_checks.variants import full_start

F64 = torch.float64


def given_finding(solver: Solver, setup: Setup, claims: Claims, seed: int) -> Finding:
    """The order on the caller's problem, against the solver's own run on a fine grid."""
    identity, formula = "order, given problem", "max(0, declared - slope of the error against its own fine run)"
    problem, x = setup.problem, setup.x
    declared = claims.order
    if isinstance(problem, SDE) and problem.stochastic:
        declared = claims.strong.get(noise_kind(problem, x, setup.grid[0]))
    if declared is None:
        return Finding.skipped(identity, formula, "no order is declared for such a problem")
    start, end = float(setup.grid[0]), float(setup.grid[-1])
    full = full_start(solver) if not problem.stochastic else solver
    levels = (16, 32, 64, 128)

    def run(steps: int) -> Tensor:
        grid = torch.linspace(start, end, steps + 1, dtype=F64)
        with torch.no_grad():
            return solve(problem, x, full, grid=grid, noise=SamePath(seed), throw=False).x

    exact = run(2048)
    gaps = [(run(n) - exact).flatten(1).norm(dim=1) for n in levels]
    errors = [float(gap.median() if problem.stochastic else gap.max()) for gap in gaps]
    note = "coefficients that are not smooth, levels before the limit, or an order that the solver has not"
    return order_finding(identity, formula, declared, levels, errors, note)
