"""Strong orders: one path on grids of several sizes, and noise whose result is exact at any step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdeflow.noise import NoiseSource, SamePath, Seeded
from sdeflow.sde import Problem
from sdeflow.solve import solve
from sdeflow.solvers.base import LinearSolver, Solver
from sdeflow.testing.report import Finding
from sdeflow.testing.solver_checks.claims import Claims
from sdeflow.testing.solver_checks.fitting import lowest, order_finding
from sdeflow.testing.solver_checks.problems import Drifting, Geometric, Tanh, Well, states
from sdeflow.testing.solver_checks.references import PATHS, falling, reversal_case, rising, well_case, whole_path
from sdeflow.testing.solver_checks.residuals import relative_gap
from sdeflow.testing.solver_checks.setups import Setup
from sdeflow.testing.worst import Worst

F64 = torch.float64


def strong_findings(solver: Solver, setups: Sequence[Setup], claims: Claims, seed: int) -> list[Finding]:
    formula = "max(0, declared - slope of log E|x - exact| on one path)"
    out = []
    own = solver.view == "transition" and all(s.label != "the reverse SDE" for s in setups)
    for kind in ("additive", "diagonal"):
        identity = f"strong order, {kind} noise"
        declared = claims.strong.get(kind)
        if declared is None:
            out.append(Finding.skipped(identity, formula, "none is declared"))
        elif kind == "diagonal":
            out.append(_strong_diagonal(solver, declared, formula, seed))
        elif solver.view == "drift":
            start, end = well_case(seed)
            well = _paths(Well(), solver, start, end, rising, (8, 16, 32, 64), SamePath(seed))
            note = "increments of the wrong size or path, or (orders above 1) the area H left out or of the wrong sign"
            cases = [order_finding(identity, formula, declared, *well, note, problem="a double well")]
            cases.append(_strong_reversal(identity, formula, solver, declared, seed, False))
            out.append(lowest(cases))
        else:
            out.append(_strong_reversal(identity, formula, solver, declared, seed, own))
    return out


def _paths(
    problem: Problem, solver: Solver, x: Tensor, exact: Tensor, grid: Callable[[int], Tensor],
    levels: Sequence[int], noise: NoiseSource, *, median: bool = False,
) -> tuple[Sequence[int], list[float]]:  # fmt: skip
    """(levels, errors): mean over paths, or their median, so that those that change sides do not count."""
    errors = []
    for n in levels:
        with torch.no_grad():
            end = solve(problem, x, solver, grid=grid(n), noise=noise, throw=False).x
        gap = (end - exact).flatten(1).norm(dim=1)
        errors.append(float(gap.median() if median else gap.mean()))
    return levels, errors


def _strong_reversal(
    identity: str, formula: str, solver: Solver, declared: float, seed: int, own: bool
) -> Finding:  # fmt: skip
    problem, x, exact = reversal_case(seed)
    note = "noise that is not the path's, or not that of its step"
    noise: NoiseSource = SamePath(seed)
    if own:
        problem = problem.process.probability_flow(problem.model)
    thirds = _in_thirds(solver, problem)
    if own or thirds:
        # a stochasticity of its own has no other reference than its own fine run; on the clock of its own noise, which
        # `SamePath` does not know: a jump of that noise inside a step would cost half an order. So have stages at
        # thirds of a step, no fractions of the span by powers of 2, for which that path takes up to 40 splits
        noise = Seeded(seed)
        with torch.no_grad():
            exact = solve(problem, x, solver, grid=falling(512 if thirds else 1024), noise=noise).x
    levels = (8, 16, 32, 64) if solver.view == "drift" else (16, 32, 64, 128)
    found = _paths(problem, solver, x, exact, falling, levels, noise, median=True)
    label = "the reverse of a mixture" + (", against its own fine run" if own or thirds else "")
    return order_finding(identity, formula, declared, *found, note, problem=label)


def _in_thirds(solver: Solver, problem: Problem) -> bool:
    """Whether it divides its steps into a number of parts that is no power of 2."""
    if not isinstance(solver, LinearSolver):
        return False
    draws = solver.plan(problem, falling(4)).draws
    return draws & (draws - 1) != 0


def _strong_diagonal(solver: Solver, declared: float, formula: str, seed: int) -> Finding:
    note = "a correction term that is missing, one-sided or of the wrong sign, or the drift of the other interpretation"
    levels = (16, 32, 64, 128) if declared > 1 else (8, 16, 32, 64)  # high orders are later in their limit
    cases = []
    for sde in (Tanh(), Geometric("stratonovich")):
        x = torch.tensor([[0.5, -0.2]], dtype=F64).expand(PATHS, -1).contiguous()
        w = whole_path(seed, 2)
        found = _paths(sde, solver, x, sde.exact(x, w), rising, levels, SamePath(seed))
        label = f"{type(sde).__name__.strip('_').lower()}, {sde.interpretation}"
        cases.append(order_finding("strong order, diagonal noise", formula, declared, *found, note, problem=label))
    return lowest(cases)


def constant_noise_finding(solver: Solver, setups: Sequence[Setup], seed: int) -> Finding:
    identity, formula = "constant noise", "dX = c dt + g dW gives x + c t + g W"
    if all(s.label != "additive noise" for s in setups):
        return Finding.skipped(identity, formula, "the solver takes no equation with additive noise")
    x = states(PATHS, 2, 9)
    grid = torch.tensor([0.0, 0.125, 0.25, 0.5, 0.6875, 1.0], dtype=F64)
    worst = Worst()
    for rate, size in ((0.0, 0.0), (0.7, 0.0), (0.0, 1.3), (-0.4, 0.6)):
        with torch.no_grad():
            end = solve(Drifting(rate, size), x, solver, grid=grid, noise=SamePath(seed), throw=False).x
        worst.add(relative_gap(end, x + rate + size * whole_path(seed, 2)), drift=rate, noise=size)
    return worst.finding(identity, formula, 1e-12, "increments of the wrong size, or not those of the path of the seed")
