"""Orders without noise, the constants or the linear part that are exact at any step, and the way back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdeflow.problems import Gaussian
from sdeflow.processes import VP
from sdeflow.sde import Problem
from sdeflow.solve import solve
from sdeflow.solvers.base import Solver
from sdeflow.solvers.gaussian_split import GaussianSplit
from sdeflow.solvers.stochastic import StochasticSolver
from sdeflow.testing.report import Finding
from sdeflow.testing.solver_checks.claims import Claims
from sdeflow.testing.solver_checks.fitting import order_finding
from sdeflow.testing.solver_checks.problems import Constant, Curved, states
from sdeflow.testing.solver_checks.references import END, START, flow_case, uneven
from sdeflow.testing.solver_checks.residuals import relative_gap, rms
from sdeflow.testing.solver_checks.variants import full_start, without_noise
from sdeflow.testing.worst import Worst

F64 = torch.float64
_LEVELS = {
    1: (32, 64, 128, 256), 2: (32, 64, 128, 256), 3: (32, 64, 128, 256), 4: (32, 64, 128, 256),
    5: (16, 32, 64, 128), 6: (8, 12, 16, 24), 7: (6, 8, 12, 16), 8: (12, 16, 20, 24, 28),
}  # fmt: skip


def _levels(solver: Solver, order: float, view: str, calls: int | None) -> tuple[int, ...]:
    """Where the leading term of the error rules: multistep methods are there later, their stencil is longer."""
    if order >= 2.5 and (calls or 1) == 1:
        return (64, 128, 256, 512) if order <= 3 or view == "drift" else (128, 256, 512, 1024)
    return _LEVELS[min(8, max(1, round(order)))]


_ORDER = "max(0, declared - slope of log error against log h)"
_ORDER_NOTE = (
    "a wrong coefficient (a weight costs all orders but one, a node those above 1), a stage at the wrong time, or a "
    "start of lower order"
)


def ode_findings(solver: Solver, claims: Claims) -> list[Finding]:
    """Order, constants or the exact linear part, and the way back."""
    names = ("order", "both ways", "constant" if solver.view == "drift" else "linear part")
    quiet = solver
    if claims.row is not None and "own" in claims.row.noise:
        found = without_noise(solver)
        if found is None:
            return [Finding.skipped(name, _ORDER, "its own noise cannot be switched off") for name in names]
        quiet = found
    full = full_start(quiet)
    drift_view = solver.view == "drift"
    if drift_view:
        problem: Problem = Curved()
        x = states(6, 2, 3)
        exact, span = Curved.exact(x, 1.0), (0.0, 1.0)
    else:
        problem, x, exact = flow_case(START, END)
        span = (START, END)

    def grid(_: Problem, steps: int, start: float, end: float) -> Tensor:
        """Steps that grow by half: the constants of equal steps cost a method its orders above 2."""
        if drift_view:
            return uneven(start, end, steps)
        process = VP()
        ends = process.lam(torch.tensor([start, end], dtype=F64)).tolist()
        times = process.time_of_lam(uneven(ends[0], ends[1], steps))
        times[0], times[-1] = start, end
        return times

    if isinstance(full, StochasticSolver) or full.draws_noise(problem):
        return [Finding.skipped(name, _ORDER, "it draws noise for every problem") for name in names]
    try:
        full.check(problem)
        with torch.no_grad():
            solve(problem, x, full, steps=8, grid=grid, t_span=span, seed=0)
    except ValueError as error:
        return [Finding.skipped(name, _ORDER, f"refuses a problem without noise: {error}") for name in names]

    def run(start: Tensor, steps: int, ends: tuple[float, float]) -> Tensor:
        with torch.no_grad():
            return solve(problem, start, full, steps=steps, grid=grid, t_span=ends, seed=0, throw=False).x

    out = []
    levels = _levels(full, claims.order or 1, solver.view, claims.calls)
    if claims.order is None:
        out.append(Finding.skipped("order", _ORDER, "no order without noise is declared"))
        there = run(x, levels[1], span)
    else:
        ends = [run(x, n, span) for n in levels]
        there, errors = ends[1], [rms(end - exact) for end in ends]
        where = {"problem": "a curved rotation" if drift_view else "the flow of a mixture under VP"}
        out.append(order_finding("order", _ORDER, claims.order, levels, errors, _ORDER_NOTE, **where))
    out.append(_both_ways(run, x, there, exact, span, levels[1]))
    if drift_view:
        out.append(_constant_ode(full))
    elif claims.order is not None:
        out.append(_linear_part(full))
    else:
        out.append(Finding.skipped("linear part", _ORDER, "no order without noise is declared"))
    return out


def _both_ways(
    run: Callable[[Tensor, int, tuple[float, float]], Tensor], x: Tensor, there: Tensor, exact: Tensor,
    span: tuple[float, float], steps: int,
) -> Finding:  # fmt: skip
    formula = "|back(there(x)) - x| / |there(x) - exact|"
    note = "a clock that is negated instead of signed steps, or |h| where h belongs"
    try:
        back = run(there, steps, (span[1], span[0]))
    except ValueError as error:
        return Finding.skipped("both ways", formula, f"refuses the other direction: {error}")
    size, gap = rms(there - exact), rms(back - x)
    residual = gap / max(size, 1e-11)
    return Finding.of("both ways", formula, residual, 100.0, {"steps": steps, "error": size, "gap": gap}, note)


def _constant_ode(solver: Solver) -> Finding:
    formula, note = "x' = 0 leaves x alone, x' = c gives x + c t", "weights that do not add up to the step"
    x, grid = states(5, 2, 8), torch.tensor([0.0, 0.07, 0.2, 0.3, 0.55, 0.6, 0.9, 1.0], dtype=F64)
    worst = Worst()
    for rate in (0.0, 0.7):
        end = solve(Constant(rate), x, solver, grid=grid, seed=0, throw=False).x
        worst.add(relative_gap(end, x + rate), drift=rate)
    return worst.finding("constant", formula, 1e-13, note)


def _linear_part(solver: Solver) -> Finding:
    """Data at a point, or the Gaussian that the solver is made for: x1 = a1 m + (P1/P0)^(1/2) (x0 - a0 m)."""
    formula = "data at a point: x1 = a1 m + s1/s0 (x0 - a0 m) at any step"
    note = "the linear part is not integrated exactly: alpha or sigma of the wrong end of the step"
    mean, variance = torch.tensor([0.6, -0.3], dtype=F64), torch.zeros(2, dtype=F64)
    if isinstance(solver, GaussianSplit):
        mean = torch.as_tensor(solver.mean, dtype=F64).expand(2)
        variance = torch.full((2,), float(solver.variance), dtype=F64)
        formula = "data of its mean and variance: x1 = a1 m + (P1/P0)^(1/2) (x0 - a0 m) at any step"
    process = VP()
    flow = process.probability_flow(Gaussian(mean, variance).model(process))
    x, grid = states(5, 2, 8), uneven(START, END, 7)
    a, s = process.alpha(grid[[0, -1]]), process.sigma(grid[[0, -1]])
    p = a[:, None] ** 2 * variance + s[:, None] ** 2
    with torch.no_grad():
        end = solve(flow, x, solver, grid=grid, seed=0, throw=False).x
    want = a[1] * mean + torch.sqrt(p[1] / p[0]) * (x - a[0] * mean)
    return Finding.of("linear part", formula, relative_gap(end, want), 1e-10, {"steps": 7}, note)
