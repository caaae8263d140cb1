"""EDM's samplers: Euler or Heun in x/alpha on the clock sigma/alpha, each step begun by adding noise back ("churn")."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.checked import checked, checked_class
from sdeflow.plan import Plan, eta_key
from sdeflow.sde import Problem
from sdeflow.solvers.base import LinearSolver, View, refuse_noise, semilinear


@checked_class
@dataclass(frozen=True)
class EDMSampler(LinearSolver):
    """A step from level u = sigma/alpha: noise up to (1 + gamma) u, then Euler or Heun in x/alpha down.

    gamma = min(s_churn/steps, sqrt(2) - 1) for s_tmin <= u <= s_tmax, else 0 (Karras et al. 2022, EDM, algorithm 2).
    A step to sigma = 0 is an Euler step. Noise is never raised above the level of the process's t1. s_noise above 1
    adds a bias that does not vanish with the step: 1 keeps the marginals.

    Args:
        order: 1 (Euler, one call a step) or 2 (Heun, two calls; one on a step to sigma = 0).
        s_churn, s_tmin, s_tmax, s_noise: as in the paper; s_tmin and s_tmax are levels sigma/alpha.
    """

    order: int = 2
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    view: View = "transition"

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"EDMSampler: expected order 1 or 2, got {self.order!r}")
        for name in ("s_churn", "s_tmin", "s_noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{self.name}: expected {name} >= 0, got {value!r}")
        if not self.s_tmax >= self.s_tmin:
            raise ValueError(f"{self.name}: expected s_tmax >= s_tmin, got {self.s_tmax!r} and {self.s_tmin!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return ("EDMEuler" if self.order == 1 else "EDMHeun") + (f"(churn {self.s_churn:g})" if self.s_churn else "")

    def check(self, problem: Problem) -> None:
        semilinear(self.name, problem)
        refuse_noise(self.name, problem)  # churn is the method's own noise, on the flow

    def draws_noise(self, problem: Problem) -> bool:
        return self.s_churn > 0

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        process, steps = semilinear(self.name, problem).gaussian, grid.numel() - 1
        alpha, level = process.alpha(grid), process.sigma(grid) / process.alpha(grid)
        if not bool(torch.isfinite(level).all()):
            raise ValueError(f"{self.name}: expected alpha > 0 on the grid, got alpha {alpha.tolist()}")
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1)
        inside = (level[:-1] >= self.s_tmin) & (level[:-1] <= self.s_tmax)
        top = max(float(process.sigma(process.t1) / process.alpha(process.t1)), float(level.max()))
        raised = torch.where(inside, torch.clamp((1 + gamma) * level[:-1], max=top), level[:-1])
        churned = raised > level[:-1]
        start = grid[:-1].clone()
        start[churned] = process.time_of_lam(-torch.log(raised[churned]))
        kick = self.s_noise * process.alpha(start) * torch.sqrt(torch.clamp(raised**2 - level[:-1] ** 2, min=0.0))

        heun = (level[1:] > 0) if self.order == 2 else torch.zeros(steps, dtype=torch.bool)
        h = alpha[1:] * (level[1:] - raised)
        zero = torch.zeros_like(h)
        weights = torch.stack(
            [torch.stack([h, zero], dim=1), torch.stack([0.5 * h, 0.5 * h], dim=1)], dim=1
        )  # (steps, row, age)
        keep = torch.stack([torch.ones(steps, dtype=torch.bool), heun], dim=1)
        step = torch.arange(steps)[:, None].expand(steps, 2)[keep]
        return Plan(
            name=self.name,
            view="transition",
            target="eps",
            grid=grid,
            times=torch.stack([start, grid[1:]], dim=1)[keep],
            step_of_row=step,
            ratio=(alpha[1:] / process.alpha(start))[step],
            weights=weights[keep],
            noise=torch.zeros(step.numel(), dtype=torch.float64),
            process=repr(process),
            eta=eta_key(semilinear(self.name, problem).eta),
            kick_ratio=process.alpha(start) / alpha[:-1],
            kick_noise=kick,
        )


@checked
def EDMHeun(s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> EDMSampler:
    """EDM's sampler (Karras et al. 2022, algorithms 1 and 2): Heun, order 2, two calls a step. As in `EDMSampler`."""
    return EDMSampler(2, s_churn, s_tmin, s_tmax, s_noise)


@checked
def EDMEuler(s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> EDMSampler:
    """EDM's sampler without its second call: Euler in x/alpha, DDIM when s_churn = 0. As in `EDMSampler`."""
    return EDMSampler(1, s_churn, s_tmin, s_tmax, s_noise)
