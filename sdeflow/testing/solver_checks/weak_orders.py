"""Weak orders, without sampling: the exact law of the result of linear equations."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sdeflow import grids
from sdeflow.problems import Gaussian
from sdeflow.processes import VP
from sdeflow.sde import Problem
from sdeflow.solve import solve
from sdeflow.solvers.base import Solver
from sdeflow.solvers.stochastic import StochasticSolver
from sdeflow.testing.noise import Given
from sdeflow.testing.report import Finding
from sdeflow.testing.solver_checks.claims import Claims
from sdeflow.testing.solver_checks.fitting import lowest, order_finding
from sdeflow.testing.solver_checks.problems import Geometric
from sdeflow.testing.solver_checks.references import END, START
from sdeflow.testing.solver_checks.residuals import relative_gap

F64 = torch.float64
_NORMALS = 1100
"""The most normals a level of a weak order may have: one sample each."""
_NOT_AFFINE = "a step of a linear equation is not affine in its normals: no exact moments without sampling"
_LAW_MEAN, _LAW_VARIANCE = torch.tensor([0.7, -0.4, 1.0], dtype=F64), torch.tensor([0.3, 1.5, 0.05], dtype=F64)


def _unit_rows(total: int, probe: Tensor) -> Callable[[int, int, tuple[int, ...]], Tensor]:
    """Sample k has one unit of normal k, the last sample has probe[k]; the two before it have none."""

    def unit(k: int, rows: int, event: tuple[int, ...]) -> Tensor:
        z = torch.zeros(rows, *event, dtype=F64)
        if k < total:
            z[k], z[-1] = 1.0, float(probe[k])
        return z

    return unit


def _normals(solver: Solver, problem: Problem, grid: Tensor) -> int:
    """The normals that a run along the grid asks for."""
    counter = Given(lambda k, rows, event: torch.zeros(rows, *event, dtype=F64))
    with torch.no_grad():
        solve(problem, torch.zeros(1, 3, dtype=F64), solver, grid=grid, noise=counter, throw=False)
    return counter.asked


def _law_after(
    solver: Solver, problem: Problem, grid: Tensor, total: int, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor] | str | None:
    """The exact law of the result after `total` normals, a component each; a string if there is none.

    None if the run asks for more normals than a level may have.
    """
    probe = torch.cos(torch.arange(total, dtype=F64))
    x = torch.zeros(total + 3, 3, dtype=F64)
    x[total + 1] = 1.0  # a unit of start; row `total` has neither
    source = Given(_unit_rows(total, probe))
    with torch.no_grad():
        y = solve(problem, x, solver, grid=grid, noise=source, throw=False).x
    if source.asked != total:  # their number does not grow with the steps alone
        few = source.asked <= _NORMALS
        return _law_after(solver, problem, grid, source.asked, mean, variance) if few else None
    offset = y[total]
    gain, columns = y[total + 1] - offset, y[:total] - offset
    if relative_gap(offset + (probe[:, None] * columns).sum(0), y[-1]) > 1e-8:
        if isinstance(solver, StochasticSolver):
            return _law_by_steps(solver, problem, grid, mean, variance)
        return _NOT_AFFINE
    return gain * mean + offset, gain**2 * variance + columns.square().sum(0)


@lru_cache(maxsize=1)
def _quadrature() -> tuple[Tensor, Tensor]:
    """Nodes (n, 2) of the normals of W and H, and their weights: exact to degrees 17 and 9."""
    rules = [np.polynomial.hermite_e.hermegauss(n) for n in (9, 5)]
    pairs = torch.tensor([(a, b) for a in rules[0][0] for b in rules[1][0]])
    chance = torch.tensor([u * v for u in rules[0][1] for v in rules[1][1]])
    return pairs, chance / chance.sum()


def _law_by_steps(
    solver: Solver, problem: Problem, grid: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor] | str:
    """`_law_after` for one-step methods whose steps have powers of W: x' = gain x + noise, by quadrature over noise."""
    pairs, chance = _quadrature()
    pairs = torch.cat([pairs, pairs[:1]])
    x = torch.zeros(len(pairs), 3, dtype=F64)
    x[-1] = 1.0  # with the noise of the first
    source = Given(lambda k, rows, event: pairs[:, min(k, 1), None].expand(rows, *event))
    for ends in pairwise(grid.unbind()):
        with torch.no_grad():
            y = solve(problem, x, solver, grid=torch.stack(ends), noise=source, throw=False).x
        if source.asked > 2:
            return _NOT_AFFINE
        gain, noise = y[-1] - y[0], y[:-1]
        shift = (chance[:, None] * noise).sum(0)
        mean, variance = gain * mean + shift, gain**2 * variance + (chance[:, None] * (noise - shift) ** 2).sum(0)
    return mean, variance


def _exact_law(eta: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(mean, variance) at START and at END of the reverse equation of Gaussian data.

    A deviation from the marginal N(a m, P), P = a^2 v + s^2, decays by (P1/P0)^(1/2) ((a0/a1) (P1/P0)^(1/2))^(eta^2).
    """
    process = VP()
    a, s = (v(torch.tensor([START, END], dtype=F64)) for v in (process.alpha, process.sigma))
    p = a[:, None] ** 2 * _LAW_VARIANCE + s[:, None] ** 2
    root = torch.sqrt(p[1] / p[0])
    decay = root * (a[0] / a[1] * root) ** (eta**2)
    shift, wider = torch.tensor([0.4, -0.3, 0.2], dtype=F64), torch.tensor([-0.2, 0.3, 0.4], dtype=F64)
    start = (a[0] * _LAW_MEAN + shift, p[0] + wider)
    return start, (a[1] * _LAW_MEAN + decay * shift, p[1] + decay**2 * wider)


def weak_finding(solver: Solver, claims: Claims) -> Finding:
    identity, formula = "weak order", "max(0, declared - slope of the error of mean and deviation of a Gaussian)"
    note = (
        "noise of the wrong size (sqrt(h) against h, a missing factor), or drift and noise that do not belong together"
    )
    if claims.weak is None:
        return Finding.skipped(identity, formula, "none is declared")
    process = VP()
    model = Gaussian(_LAW_MEAN, _LAW_VARIANCE).model(process)
    start, end = _exact_law(1.0)
    problem = process.reverse(model, 1.0)
    grid = grids.logsnr if solver.view == "transition" else grids.uniform
    try:
        solver.check(problem)
        solve(problem, torch.zeros(1, 3, dtype=F64), solver, grid=grid(process, 4, START, END), seed=0)
    except ValueError:  # a stochasticity of its own, on the flow: from the marginal, which every eta keeps
        problem = process.probability_flow(model)
        start, end = ((v, p) for v, p in zip(*_marginals(process), strict=True))
    levels: list[int] = []
    errors: list[float] = []
    try:
        few, more = (_normals(solver, problem, grid(process, n, START, END)) for n in (8, 16))
    except ValueError as error:
        return Finding.skipped(identity, formula, f"refuses the problem: {error}")
    # their number grows linearly with the steps, or `_law_after` counts again
    for n in (512, 256, 128, 64, 32, 16, 8) if solver.view == "transition" else (128, 64, 32, 16, 8):
        total = few + (more - few) * (n - 8) // 8
        if total > _NORMALS:
            continue
        try:
            law = _law_after(solver, problem, grid(process, n, START, END), total, *start)
        except ValueError as error:
            return Finding.skipped(identity, formula, f"refuses the problem: {error}")
        if isinstance(law, str):
            return Finding.skipped(identity, formula, law)
        if law is not None:
            levels.append(n)
            errors.append(float(torch.hypot(law[0] - end[0], law[1].sqrt() - end[1].sqrt()).norm()))
        if len(levels) == 4:
            break
    return order_finding(identity, formula, claims.weak, levels, errors, note)


def _marginals(process: VP) -> tuple[list[Tensor], list[Tensor]]:
    """(means, variances) of the data noised to START and END."""
    times = torch.tensor([START, END], dtype=F64)
    levels = list(zip(process.alpha(times).tolist(), process.sigma(times).tolist(), strict=True))
    return [a * _LAW_MEAN for a, _ in levels], [a**2 * _LAW_VARIANCE + s**2 for a, s in levels]


def moments_finding(solver: Solver, claims: Claims) -> Finding:
    """E X and E X^2 of geometric Brownian motion: powers of those of one step, by Gauss-Hermite in (W, H)."""
    identity, formula = "moments, diagonal noise", "max(0, 1 - slope of the error of E X, E X^2 of geometric motion)"
    note = "the drift of the other interpretation, or a second-order term whose mean is not 0"
    if "diagonal" not in claims.strong:
        return Finding.skipped(identity, formula, "no strong order for diagonal noise is declared")
    pairs, chance = _quadrature()
    cases = []
    for interpretation in ("ito", "stratonovich"):
        sde, levels = Geometric(interpretation), (32, 64, 128, 256)
        rate = torch.tensor([sde.rate() + 0.32, 2 * sde.rate() + 1.28], dtype=F64)
        errors = []
        for n in levels:
            source = Given(lambda k, rows, event: pairs[:, min(k, 1), None].expand(rows, *event))
            x = torch.ones(len(pairs), 1, dtype=F64)
            with torch.no_grad():
                y = solve(sde, x, solver, grid=torch.tensor([0.0, 1 / n], dtype=F64), noise=source, throw=False).x[:, 0]
            if source.asked > 2:
                return Finding.skipped(identity, formula, "a step takes more normals than W and H")
            step = torch.stack([(chance * y).sum(), (chance * y**2).sum()])
            errors.append(float((step**n - torch.exp(rate)).abs().max()))
        cases.append(order_finding(identity, formula, 1.0, levels, errors, note, problem=interpretation))
    return lowest(cases)
