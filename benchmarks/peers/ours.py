"""This library, called as a user calls it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import sdeflow as sf
from benchmarks.peers.problem import BETAS, Run, Sample, Sampling
from sdeflow import solvers
from sdeflow.solvers import Solver

DETERMINISTIC: dict[str, Solver] = {
    "DDIM": solvers.DDIM(),
    "Euler": solvers.EDMEuler(),
    "Heun": solvers.EDMHeun(),
    "DPM++2M": solvers.DPMSolverPP(2, second="midpoint"),
    "UniPC2": solvers.UniPC(2),
}
STOCHASTIC: dict[str, Solver] = {"DDPM": solvers.DDPM(), "DPM++2M SDE": solvers.DPMSolverPP(2, second="midpoint")}


def samplers(p: Sampling) -> dict[str, Run]:
    """On the trailing grid."""
    found = {}
    for eta, chosen in ((0.0, DETERMINISTIC), (1.0, STOCHASTIC)):
        problem = p.reverse(eta)
        for name, solver in chosen.items():
            found[name] = Run(_solve(problem, p.x, solver, p.times()), p.steps * (2 if name == "Heun" else 1))
    flow = sf.RectifiedFlow()
    straight = flow.reverse(sf.Model(p.net, flow, "velocity", time="sigma", expand=False), 0.0)
    grid = torch.linspace(1, 0, p.steps + 1, dtype=torch.float64)
    found["flow Euler"] = Run(_solve(straight, p.x, solvers.Euler(), grid), p.steps)
    return found


def _solve(problem: sf.ReverseSDE, x: Tensor, solver: Solver, grid: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return sf.solve(problem, x, solver, grid=grid, seed=0).x

    return run


class Autonomous(sf.ODE):
    """dx = net(x, 1/2) dt."""

    def __init__(self, p: Sampling) -> None:
        self.net, self.sigma = p.net, torch.tensor(0.5, dtype=torch.float64)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, self.sigma)


def steppers(p: Sampling) -> dict[str, Run]:
    """Runge-Kutta methods on equal steps of an ODE."""
    problem = Autonomous(p)

    def run(solver: Solver) -> Tensor:
        with torch.inference_mode():
            return sf.solve(problem, p.x, solver, steps=p.steps).x

    return {
        "Euler": Run(lambda: run(solvers.Euler()), p.steps),
        "midpoint": Run(lambda: run(solvers.Midpoint()), 2 * p.steps),
        "Heun": Run(lambda: run(solvers.Heun()), 2 * p.steps),
        "RK4": Run(lambda: run(solvers.RK38()), 4 * p.steps),
    }


def precise(p: Sampling) -> dict[str, Sample]:
    """What is recommended for `p.steps` calls: one choice, made without looking."""
    problem, choice = p.reverse(), sf.recommend(sf.DiscreteVP(BETAS), nfe=p.steps)

    def run() -> Tensor:
        with torch.no_grad():
            return sf.solve(problem, p.x, choice.solver, steps=choice.steps, grid=choice.grid).x

    return {f"{choice.solver.name}, recommended": Sample(run, choice.steps)}
