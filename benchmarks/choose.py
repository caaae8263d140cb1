"""The figures of docs/choose.md: `python -m benchmarks.choose --json docs/data/choose.json` (some minutes).

One small experiment a question, every number from a fixed seed; `--question NAME` runs one and prints it. Errors are
root mean square per component and sample, their median over samples unless said otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sdeflow as sf
from benchmarks.choose_sde import general_noise, stiff
from benchmarks.timing import show
from sdeflow.bench.suites import digits_exact, digits_network, mixture
from sdeflow.solvers.reversible import reversible_decode, reversible_encode

Table = dict[str, Any]
"""{"columns": names, "rows": lists that begin with a solver}."""

FLOW = (
    "Heun", "RK4", "EDMHeun", "DDIM", "DPMSolverPP(2)", "DPMSolverPP(3)", "UniPC(3)", "DEIS(3)", "IPNDM(4)",
    "StraightABM(4)", "GaussianSplit(2)", "GaussianSplit(3)",
)  # fmt: skip
GRIDS = ("uniform", "quadratic", "power", "logsnr", "karras", "logistic")
FEW, MANY = (5, 8, 10, 20), (50, 100)


def flow_or_noise() -> Table:
    """Distance of 4000 samples to the data of the mixture, with the exact score and with one that is off."""
    data = mixture()
    exact = data.model
    vp = exact.gaussian
    wrong = sf.Model(lambda x, t: exact.eps(x, t) + 0.1 * torch.sin(3 * x), vp, "eps")
    assert data.sample is not None
    target, other = data.sample(4000, 1).double(), data.sample(4000, 2).double()
    rows = []
    for title, model in (("exact", exact), ("off by 0.1 sin 3x", wrong)):
        for name, eta, solver in (
            ("GaussianSplit(2)", 0.0, sf.solvers.GaussianSplit(2)),
            ("DPMSolverPP(2)", 0.0, sf.solvers.DPMSolverPP(2)),
            ("DPMSolverPP(2)", 1.0, sf.solvers.DPMSolverPP(2)),
            ("GaussianSplit(2)", 1.0, sf.solvers.GaussianSplit(2)),
            ("DDPM", 1.0, sf.solvers.DDPM()),
        ):
            found = []
            for calls in (10, 20, 50, 200):
                x = sf.sample(
                    model, 4000, shape=(2,), solver=solver, steps=calls, eta=eta, seed=0,
                    dtype=torch.float64,
                ).x  # fmt: skip
                found.append(sf.metrics.sliced_w2(x, target, seed=0).value)
            rows.append([name, f"{eta:g}", title, *found])
    rows.append(["another exact sample", "", "", *[sf.metrics.sliced_w2(other, target, seed=0).value] * 4])
    return {"columns": ["eta", "score", "10 calls", "20", "50", "200"], "rows": rows}


def calls(budgets: tuple[int, ...]) -> Table:
    """Median error at the best of six grids."""
    rows: dict[str, list[Any]] = {name: [name] for name in FLOW}
    columns = []
    for make in (mixture, digits_exact, digits_network):
        problem = make()
        results = sf.bench.run(problem, solvers=FLOW, grids=GRIDS, nfe=budgets, samples=64)
        for budget in budgets:
            columns.append(f"{problem.name}, {budget} calls")
            for name in FLOW:
                found = [(r.median, r.grid) for r in results if (r.solver, r.budget) == (name, budget) and r.median]
                rows[name].append(list(min(found)) if found else None)
    return {"columns": columns, "rows": list(rows.values())}


def tolerance() -> Table:
    """Median error and mean calls of solves to a tolerance, rtol = atol, on the flow of the mixture."""
    model = mixture().model
    vp = model.gaussian
    flow = vp.probability_flow(model)
    x = vp.prior_sample((256, 2), 0, dtype=torch.float64)
    exact = sf.solve(flow, x, sf.solvers.DOP853(), rtol=1e-11).x
    rows = []
    for name in (
        "BogackiShampine",
        "RK45",
        "Tsit5",
        "DOP853",
        "DPMSolverPP(3S)",
        "ExponentialRK(3)",
        "GaussianSplit(3)",
    ):
        row: list[Any] = [name]
        for rtol in (1e-2, 1e-4, 1e-6):
            y = sf.solve(flow, x, sf.solvers.by_name(name).make(), rtol=rtol, atol=rtol, throw=False)
            row += [_median(y.x, exact), _calls(y.stats.nfe)]
        rows.append(row)
    columns = [f"{rtol:g}: {what}" for rtol in (1e-2, 1e-4, 1e-6) for what in ("error", "calls")]
    return {"columns": columns, "rows": rows}


def likelihood() -> Table:
    """Error of log p in nats at 64 points of a mixture in 8 dimensions (VP, t_min, rtol 1e-6)."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    data = sf.problems.GaussianMixture(means, 0.3)
    vp = sf.VP()
    model, x = data.model(vp), data.sample(64, seed=0).double()
    true = data.log_prob(x, vp, vp.t_min)
    rows: list[list[Any]] = []
    for name, options in (
        ('divergence="exact"', {"divergence": "exact"}),
        ('divergence="hutchinson", probes=1', {"divergence": "hutchinson", "probes": 1, "seed": 0}),
        ('divergence="hutchinson", probes=16', {"divergence": "hutchinson", "probes": 16, "seed": 0}),
        ('divergence="hutch++", probes=6', {"divergence": "hutch++", "probes": 6, "seed": 0}),
    ):
        found = sf.log_prob(model, x, rtol=1e-6, **options)
        rows.append([name, float((found.log_prob - true).abs().median()), _calls(found.nfe)])
    return {"columns": ["median error, nats", "calls"], "rows": rows}


def inversion() -> Table:
    """Largest difference of data encoded and decoded again."""
    data = mixture()
    assert data.sample is not None
    x = data.sample(64, 0).double()
    rows: list[list[Any]] = []
    for name in ("DDIM", "Heun", "RK4", "UniPC(3)"):
        row: list[Any] = [name]
        for steps in (10, 50):
            solver = sf.solvers.by_name(name).make()
            latent = sf.encode(data.model, x, solver=solver, steps=steps).x
            row.append(_largest(sf.decode(data.model, latent, solver=solver, steps=steps).x - x))
        rows.append(row)
    row = ["Reversible"]
    for steps in (10, 50):
        row.append(_largest(reversible_decode(data.model, reversible_encode(data.model, x, steps=steps)).x - x))
    rows.append(row)
    for rtol in (1e-4, 1e-8):
        again = sf.decode(data.model, sf.encode(data.model, x, rtol=rtol).x, rtol=rtol).x
        rows.append([f"rtol={rtol:g}", _largest(again - x), None])
    return {"columns": ["10 steps", "50 steps"], "rows": rows}


class Neural(sf.ODE):
    """A small network as drift."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)).double()

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.as_tensor(self.net(x))


def gradient() -> Table:
    """Error of the gradient of a loss at t1 = 1 in a neural ODE, 64 steps, relative to its largest entry."""
    ode = Neural()
    x = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = list(ode.net.parameters())

    def measured(solver: sf.solvers.Solver, steps: int, way: Any) -> Tensor:
        loss = sf.solve(ode, x, solver, steps=steps, gradient=way).x.square().mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    exact = measured(sf.solvers.DOP853(), 40, "direct")
    rows: list[list[Any]] = []
    for name, solver in (("RK4", sf.solvers.RK4()), ("ReversibleHeun", sf.solvers.ReversibleHeun())):
        own = measured(solver, 64, "direct")
        for way in ("direct", "checkpointed", "adjoint"):
            found = measured(solver, 64, way)
            rows.append(
                [name, f'"{way}"', _largest(found - own) / _largest(own), _largest(found - exact) / _largest(exact)]
            )
    return {"columns": ["gradient", "to that of the steps", "to that of the solution"], "rows": rows}


def _calls(nfe: int | Tensor) -> float:
    return float(torch.as_tensor(nfe, dtype=torch.float64).mean())


def _median(x: Tensor, exact: Tensor) -> float:
    return sf.metrics.trajectory_error(x, exact).median


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


QUESTIONS: dict[str, Callable[[], Table]] = {
    "flow-or-noise": flow_or_noise,
    "few": lambda: calls(FEW),
    "many": lambda: calls(MANY),
    "tolerance": tolerance,
    **{f"{kind}-noise": partial(general_noise, kind) for kind in ("additive", "diagonal", "commutative", "general")},
    "stiff": stiff,
    "likelihood": likelihood,
    "inversion": inversion,
    "gradient": gradient,
}
"""Every experiment by name."""


def rounded(value: Any) -> Any:
    """Two digits, whole numbers from 10 on: what differs from one machine to the next is no news."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if not isinstance(value, float) or isinstance(value, bool):
        return value
    if not math.isfinite(value):
        return None
    return round(value) if abs(value) >= 10 else float(f"{value:.1e}")


def main() -> None:
    """Run the questions asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--question", choices=QUESTIONS, help="One of them; all unless given.")
    parser.add_argument("--json", type=Path, help="A file to write; tables of other questions in it are kept.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables: dict[str, Table] = {}
    if arguments.json is not None and arguments.json.exists():
        tables = json.loads(arguments.json.read_text())
    for name in [arguments.question] if arguments.question else list(QUESTIONS):
        started = time.perf_counter()
        table = QUESTIONS[name]()
        tables[name] = {"columns": table["columns"], "rows": [rounded(row) for row in table["rows"]]}
        show(
            f"{name} ({time.perf_counter() - started:.0f} s)",
            ["", *table["columns"]],
            [[str(value) for value in row] for row in tables[name]["rows"]],
        )
        if arguments.json is not None:
            ordered = {key: tables[key] for key in QUESTIONS if key in tables}
            arguments.json.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
