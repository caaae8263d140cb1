"""Valid calls of the constructors of solvers: each result integrates a problem that suits it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sdeflow as sf
from benchmarks.fuzzing.target import FREE_TEXT, Target, allow
from benchmarks.fuzzing.targets_constructors import data
from sdeflow import solvers

MODEL = sf.problems.Gaussian(torch.zeros(2), 0.25 * torch.eye(2)).model(sf.VP())


class Spring(sf.ODE):
    """x' = -x."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """-x."""
        return -x


def flow() -> sf.ReverseSDE:
    """The flow of a Gaussian."""
    return sf.VP().probability_flow(MODEL)


def reverse() -> sf.ReverseSDE:
    """The reverse SDE of a Gaussian."""
    return sf.VP().reverse(MODEL)


def run(problem: Callable[[], Any]) -> Callable[[Any], Any]:
    """What a solver makes of three steps."""
    return lambda solver: sf.solve(problem(), data(), solver, steps=3, seed=0, throw=False)


def _of_defaults(make: Callable[..., Any], problem: Callable[[], Any], **values: Any) -> Target:
    """The constructor with its own defaults, and `values` where they have none."""
    parameters = inspect.signature(make).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in ("view", "name")}
    given = {k: v for k, v in given.items() if type(v).__name__ != "_HAS_DEFAULT_FACTORY_CLASS"}
    given |= values
    optional = {name: frozenset({"None"}) for name, value in given.items() if value is None}
    optional |= allow(label=FREE_TEXT, final_orders="an empty list", tau="None")  # of those that have one
    optional |= {"eta": frozenset({"None", "a number"})} if given.get("eta", 0) is None else {}
    return Target(f"solvers.{make.__name__}", make, lambda: dict(given), run(problem), optional)


FLOW: tuple[Any, ...] = (
    solvers.AdamsBashforth, solvers.AdamsBashforthMoulton, solvers.DDIM, solvers.DEIS, solvers.DPMSolver,
    solvers.DPMSolverPP, solvers.EDMEuler, solvers.EDMHeun, solvers.ExponentialRK, solvers.ExponentialMultistep,
    solvers.GaussianSplit, solvers.IPNDM, solvers.LMS, solvers.RhoRK, solvers.StraightABM, solvers.UniPC,
    solvers.ERSDE, solvers.EulerAncestral, solvers.SEEDS, solvers.Reversible, solvers.EDMSampler,
)  # fmt: skip
NOISY: tuple[Any, ...] = (
    solvers.DDPM, solvers.Milstein, solvers.LevyMilstein, solvers.SKROCK, solvers.AdaptiveSDE,
)  # fmt: skip


def _kept(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: value * torch.ones_like(t)


TARGETS: tuple[Target, ...] = (
    *(_of_defaults(make, flow) for make in FLOW),
    *(_of_defaults(make, reverse) for make in NOISY),
    _of_defaults(solvers.DPMSolverFast, flow, nfe=6),
    _of_defaults(solvers.SASolver, flow, tau=0.5),
    _of_defaults(solvers.AnnealedLangevin, flow, steps=2),
    Target("solvers.Scipy", solvers.Scipy, lambda: {"method": "RK45", "first_step": 0.1, "max_step": 1.0},
           lambda solver: sf.solve(flow(), data(), solver, rtol=1e-3, throw=False), allow(first_step="None")),
    Target("solvers.LinearExponential", solvers.LinearExponential,
           lambda: {"order": 2, "start": "ramp", "covariance": 0.25 * torch.eye(2)},
           lambda solver: sf.solve(sf.CLD().reverse(lambda z, t: -z), torch.zeros(3, 2, 2), solver, steps=2, seed=0,
                                   throw=False), allow(covariance="None")),
    Target("solvers.Adams", solvers.Adams, lambda: {"order": 3, "corrector": False, "start": "ramp"}, run(Spring)),
    Target("solvers.Torchdiffeq", solvers.Torchdiffeq,
           lambda: {"method": "dopri5", "first_step": 0.1, "min_step": 0.0, "max_step": 1.0, "safety": 0.9,
                    "ifactor": 10.0, "dfactor": 0.2},
           lambda solver: sf.solve(flow(), data(), solver, rtol=1e-3, throw=False), allow(first_step="None")),
    Target("solvers.Torchsde", solvers.Torchsde,
           lambda: {"method": "srk", "first_step": 1e-3, "min_step": 1e-5},
           lambda solver: sf.solve(reverse(), data(), solver, steps=3, seed=0, throw=False)),
    Target("solvers.Compensated", solvers.Compensated, lambda: {"solver": solvers.Euler()}, run(Spring)),
    Target("solvers.Langevin", solvers.Langevin, lambda: {"snr": 0.16, "steps": 1, "size": "level"},
           lambda made: run(reverse)(solvers.PredictorCorrector(solvers.EulerMaruyama(), made))),
    Target("solvers.PredictorCorrector", solvers.PredictorCorrector,
           lambda: {"predictor": solvers.EulerMaruyama(), "corrector": solvers.Langevin()}, run(reverse)),
    Target("solvers.RestartInterval", solvers.RestartInterval,
           lambda: {"low": 0.2, "high": 1.0, "repeats": 1, "steps": 2},
           lambda made: run(flow)(solvers.Restart((made,)))),
    Target("solvers.Restart", solvers.Restart,
           lambda: {"intervals": (solvers.RestartInterval(0.2, 1.0, 1, 2),), "solver": solvers.Heun()}, run(flow)),
    Target("solvers.Window", solvers.Window, lambda: {"low": 0.2, "high": 0.8, "value": 1.0},
           lambda made: run(flow)(solvers.SASolver(tau=made))),
    Target("solvers.NoiseScale", solvers.NoiseScale, lambda: {"phi": lambda ratio: ratio * 0 + ratio},
           lambda made: run(flow)(solvers.ExponentialMultistep(2, eta=made)), allow(phi="None")),
    Target("solvers.InVariable", solvers.InVariable,
           lambda: {"solver": solvers.AdamsBashforth(2), "name_of_variable": "straight", "label": ""}, run(flow),
           allow(label=FREE_TEXT)),
    Target("solvers.Splitting", solvers.Splitting,
           lambda: {"linear": torch.tensor([[-1.0, 0.0], [0.0, -2.0]], dtype=torch.float64),
                    "inner": solvers.StochasticHeun()}, run(reverse)),
    Target("solvers.for_tolerance", solvers.for_tolerance, lambda: {"rtol": 1e-3}),
    Target("solvers.by_name", solvers.by_name, lambda: {"name": "Heun"}, lambda row: row.name),
    Target("solvers.estimate_split", solvers.estimate_split,
           lambda: {"model": MODEL, "shape": (2,), "probes": 8, "level": 20.0, "seed": 0}),
    Target("solvers.RungeKutta", solvers.RungeKutta, lambda: {"tableau": solvers.Heun().tableau}, run(Spring)),
    Target("solvers.Tableau", solvers.Tableau,
           lambda: {"name": "own", "order": 2, "c": (0, 1), "a": ((), (1,)), "b": (0.5, 0.5), "reference": "own"},
           lambda tableau: run(Spring)(solvers.RungeKutta(tableau)), allow(name=FREE_TEXT, reference=FREE_TEXT)),
)  # fmt: skip
"""The constructors of solvers that take arguments."""


def _in_a_solve(row: solvers.Row) -> dict[str, Any]:
    """Arguments of a solve with the method of a row."""
    problem = reverse() if row.noise and "own" not in row.noise else flow()
    return {"problem": problem, "x": data(), "solver": row.make(), "steps": 2, "seed": 0, "throw": False}


OF_CATALOGUE: tuple[Target, ...] = tuple(
    Target(f"solve with {row.name}", sf.solve, partial(_in_a_solve, row), allows=allow(seed="None"))
    for row in solvers.CATALOGUE
    if row.name != "AnnealedLangevin"
)
"""Every row of the catalogue, in a solve."""
