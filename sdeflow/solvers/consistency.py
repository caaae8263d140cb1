"""Multistep sampling of consistency models: data from noise in one call, noise again, and so on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.plan import Plan, eta_key
from sdeflow.sde import Problem
from sdeflow.solvers.base import LinearSolver, View, semilinear
from sdeflow.solvers.own_eta import check_falling


@dataclass(frozen=True)
class ConsistencySampler(LinearSolver):
    """Each step takes the model's x_0 for the data and draws the state at the step's end from it:

        x_s = r f(x_t, t) + q z,   f = model.x0,   x_s | x_t0 ~ N(r x_t0, q^2) the process's own kernel from t0

    (Song et al. 2023, Consistency models, algorithm 1.) One call a step, and no memory of x_t. At t0 r = 1, q = 0 and
    the sample is f itself: `sample(model, n, solver=ConsistencySampler(), steps=2, final="zero")`, of which one step is
    one call at t1. A grid that ends above t0 gives draws of the law there, as any solver does.

    The law is right at every node for a consistency model, f(x_t, t) the end of the flow from x_t
    (`sdeflow.losses.consistency`), in any number of steps. For a denoiser, f = E[x_0 | x_t], it is not, and more steps
    do not converge: the solver is not in the catalogue, whose methods solve the reversal for the exact score. The nodes
    in between are a choice without an order; the cubic default grid has that of two steps at t0 + (t1 - t0)/8.

    It runs on the flow (eta = 0), as all of its noise is its own, and only from noise to data.

    Raises:
        ValueError: a problem with noise, without the transition view, or a grid of rising times.
    """

    name = "ConsistencySampler"
    view: View = "transition"

    def check(self, problem: Problem) -> None:
        reverse = semilinear(self.name, problem)
        if reverse.stochastic:
            raise ValueError(
                f"{self.name} renews all of the noise in every step: expected a problem without noise (eta = 0), got "
                f"eta = {reverse.eta!r}"
            )

    def draws_noise(self, problem: Problem) -> bool:
        return True

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        reverse = semilinear(self.name, problem)
        check_falling(self.name, grid)
        process, steps = reverse.gaussian, grid.numel() - 1
        ratio, std = process.transition_kernel(process.t0, grid[1:].clamp(min=process.t0))
        return Plan(
            name=self.name,
            view="transition",
            target="x0",
            grid=grid,
            times=grid[:-1].clone(),
            step_of_row=torch.arange(steps),
            ratio=torch.zeros(steps, dtype=torch.float64),
            weights=ratio[:, None],
            noise=std,
            process=repr(process),
            eta=eta_key(reverse.eta),
        )
