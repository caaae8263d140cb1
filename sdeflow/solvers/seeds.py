"""SEEDS: the single steps of DPM-Solver with noise whose every stage lies on one path."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.plan import Plan, eta_key
from sdeflow.sde import Problem
from sdeflow.solvers.base import LinearSolver, View, semilinear
from sdeflow.solvers.exponential_rk import ExponentialRK


@checked_class
@dataclass(frozen=True)
class SEEDS(LinearSolver):
    """SEEDS of order 1 to 3: single steps in noise prediction with `order` calls; reads the problem's eta.

    To a stage at u from the step's start s, with the weights W_j of DPM-Solver-`order` and the stages' times u_i,

        x_u = (alpha_u/alpha_s) x_s + (1 + eta^2) sum_j W_j eps_j + alpha_u sum_i v_i xi_i,
        v_i^2 = eta^2 (exp(-2 lam_(i-1)) - exp(-2 lam_i)),

    (Gonzalez et al. 2023, SEEDS, section 4, SEEDS-1 to -3, for eta = 1; an eta of t is held at its root mean square
    from s to u in the second term, between stages in v). The xi_i of a step are the increments of one path over its
    thirds or halves: that a stage and the result share them is what makes orders 2 and 3 weakly of order 2, not 1.
    With eta = 0 it is DPM-Solver of that order (2 with the midpoint's evaluation alone, as published). A last
    step to sigma = 0 returns the prediction of x_0: noise prediction frozen over it would leave noise of the level
    at its start.
    """

    order: int = 2
    view: View = "transition"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"SEEDS: expected order 1, 2 or 3, got {self.order!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"SEEDS({self.order})"

    def check(self, problem: Problem) -> None:
        semilinear(self.name, problem)

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        reverse = semilinear(self.name, problem)
        process, stages = reverse.gaussian, self.order
        flow = ExponentialRK(stages, "eps", self.name, second="midpoint").plan(reverse, grid)
        rows, step = flow.nfe, flow.step_of_row
        opens = torch.cat([torch.ones(1, dtype=torch.bool), torch.diff(step) > 0])
        closes = torch.cat([opens[1:], torch.ones(1, dtype=torch.bool)])
        ends = torch.where(closes, grid[step + 1], torch.cat([flow.times[1:], grid[-1:]]))
        # the stage of each row in its step, and what the stretch from its time to the next adds
        stage = torch.arange(rows) - torch.nonzero(opens).flatten()[step]
        whole = torch.isfinite(process.lam(ends))
        _, _, _, std = reverse.transition(flow.times, ends, "eps")
        added = torch.where(whole, std, 0.0) / torch.where(whole, process.alpha(ends), 1.0)
        noise = torch.zeros(rows, stages, dtype=torch.float64)
        for back in range(stages):  # a stretch lasts to the end of its step
            reached = stage >= back
            source = torch.arange(rows)[reached] - back
            noise[reached, stage[reached] - back] = process.alpha(ends[reached]) * added[source]
        factor = torch.where(whole, 1 + reverse.mean_eta2(grid[step], ends), 1.0)
        return dataclasses.replace(
            flow,
            weights=flow.weights * factor[:, None],
            noise=noise if stages > 1 else noise[:, 0],
            eta=eta_key(reverse.eta),
        )
