"""Euler-Maruyama, for any Ito equation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.plan import Plan, eta_key
from sdeflow.sde import SDE, Problem
from sdeflow.solvers.base import LinearSolver


@dataclass(frozen=True)
class EulerMaruyama(LinearSolver):
    """x' = x + h f(x, t) + sqrt(|h|) G(x, t) xi (Maruyama 1955; Kloeden and Platen 1992, section 10.2).

    Strong order 1/2, order 1 when G does not depend on x; weak order 1; one call a step. Any noise;
    on a problem without noise it is Euler's method.
    """

    name = "EulerMaruyama"

    def check(self, problem: Problem) -> None:
        """Every problem has the drift view."""

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        h, steps = torch.diff(grid), grid.numel() - 1
        scale, kind, made_for = torch.zeros(steps, dtype=torch.float64), "unit", None
        if isinstance(problem, SDE) and problem.stochastic:
            g = problem.scalar_diffusion(grid[:-1])
            kind = "unit" if g is not None else "diffusion"
            made_for = getattr(problem, "process", problem) if g is not None else None
            scale = h.abs().sqrt() * (1.0 if g is None else g)
        return Plan(
            name=self.name,
            target="drift",
            grid=grid,
            times=grid[:-1].clone(),
            step_of_row=torch.arange(steps),
            ratio=torch.ones(steps, dtype=torch.float64),
            weights=h[:, None].clone(),
            noise=scale,
            noise_kind=kind,  # type: ignore[arg-type]
            process=None if made_for is None else repr(made_for),
            eta=None if made_for is None else eta_key(getattr(problem, "eta", None)),
        )
