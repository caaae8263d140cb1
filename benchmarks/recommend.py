"""What `sf.recommend` rests on: `python -m benchmarks.recommend`, errors of untuned solvers on standard grids.

Median error of a sample, in units of the data's spread, against a fine solve from the same noise; for each process and
budget every solver with every grid, as a multiple of the best cell, and the geometric mean of that over problems.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch

import sdeflow as sf
from benchmarks.timing import show
from sdeflow import grids, solvers
from sdeflow.bench.suites import digits_network
from sdeflow.problems import EightGaussians, GaussianMixture, TwoMoons
from sdeflow.solvers import Solver

BUDGETS = (5, 8, 10, 15, 20, 40)
SOLVERS: dict[str, tuple[Solver, int]] = {
    "DDIM": (solvers.DDIM(), 1),
    "DPM++2M": (solvers.DPMSolverPP(2), 1),
    "DPM++3M": (solvers.DPMSolverPP(3), 1),
    "UniPC2": (solvers.UniPC(2), 1),
    "UniPC3": (solvers.UniPC(3), 1),
    "DEIS3": (solvers.DEIS(3), 1),
    "GaussianSplit2": (solvers.GaussianSplit(2), 1),
    "GaussianSplit3": (solvers.GaussianSplit(3), 1),
    "GaussianSplit4": (solvers.GaussianSplit(4), 1),
    "Heun": (solvers.Heun(), 2),
}
GRIDS = ("power", "quadratic", "logsnr", "karras", "cosine", "flow_shift")


def problems() -> Iterator[tuple[str, sf.Model, tuple[int, ...]]]:
    """(name, model, shape): what the recommendation was designed on."""
    circle = EightGaussians()
    uneven = GaussianMixture(circle.means, circle.variances, weights=range(1, 9))
    for process in (sf.VP(), sf.CosineVP(), sf.EDM(), sf.RectifiedFlow(), sf.SubVP(), sf.VE()):
        name = type(process).__name__
        yield f"mixture, {name}", uneven.model(process), (2,)
        yield f"moons, {name}", TwoMoons().model(process), (2,)
    network = digits_network()
    yield "digits network, VP", network.model, network.shape


def errors(model: sf.Model, shape: tuple[int, ...], batch: int) -> dict[tuple[str, str, int], float]:
    """Median errors by (solver, grid, calls)."""
    process = model.gaussian
    problem = process.reverse(model, 0.0)
    exact = not isinstance(model.net, torch.nn.Module)
    x = process.prior_sample((batch, *shape), 0, dtype=torch.float64 if exact else torch.float32)
    span = (process.t1, process.t_min)
    with torch.no_grad():
        end = sf.solve(problem, x, solvers.DOP853(), rtol=1e-9 if exact else 1e-6, t_span=span).x
        found = {}
        for grid in GRIDS:
            if not grids.GRIDS[grid].fits(process):
                continue
            for name, (solver, calls) in SOLVERS.items():
                for budget in BUDGETS:
                    try:
                        y = sf.solve(
                            problem, x, solver, steps=budget // calls, grid=grids.GRIDS[grid].make, t_span=span,
                            throw=False,
                        ).x  # fmt: skip
                    except ValueError:
                        continue
                    error = sf.metrics.trajectory_error(y, end).median / float(end.std())
                    found[name, grid, budget] = error if math.isfinite(error) else 1e3
    return found


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tables = {name: errors(model, shape, arguments.batch) for name, model, shape in problems()}
    for family, wanted in (("alpha > 0", lambda t: ("X", "logsnr", 10) in t), ("all", lambda t: True)):
        _ = wanted
        rows = []
        for budget in BUDGETS:
            scores: dict[tuple[str, str], list[float]] = {}
            for table in tables.values():
                if family == "alpha > 0" and not any(grid == "logsnr" for _, grid, _ in table):
                    continue
                cells = {(s, g): e for (s, g, b), e in table.items() if b == budget}
                best = min(cells.values())
                for cell, error in cells.items():
                    scores.setdefault(cell, []).append(math.log(error / best))
            full = max(map(len, scores.values()))
            ranked = sorted(
                (sum(v) / len(v), max(v), cell) for cell, v in scores.items() if len(v) == full
            )
            rows += [
                [f"{budget}", f"{solver} on {grid}", f"{math.exp(mean):.2f}", f"{math.exp(worst):.1f}"]
                for mean, worst, (solver, grid) in ranked[:5]
            ]
        show(f"Times the best cell's error, processes: {family}", ["calls", "choice", "mean", "worst"], rows)


if __name__ == "__main__":
    main()
