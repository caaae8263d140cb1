"""What `sf.recommend` rests on: `python -m benchmarks.recommend`, errors of untuned solvers on grids.

Median error of a sample against a fine solve from the same noise, over problems and processes: each choice's error as a
share of the best published one's (DPM-Solver++ 2M and 3M, UniPC 2 and 3, DEIS 3, iPNDM 3 on the uniform, log-SNR,
quadratic and Karras grids) at the same number of calls. The choices are ranked by the geometric mean over problems.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import partial

import torch

import sdeflow as sf
from benchmarks.timing import show
from sdeflow import grids, solvers
from sdeflow.bench.suites import digits_network
from sdeflow.grids import GridFunction
from sdeflow.problems import EightGaussians, GaussianMixture, TwoMoons
from sdeflow.solvers import Solver

BUDGETS = (5, 8, 10, 15, 20, 40)
PUBLISHED: list[Solver] = [
    solvers.DPMSolverPP(2), solvers.DPMSolverPP(3), solvers.UniPC(2), solvers.UniPC(3), solvers.DEIS(3),
    solvers.IPNDM(3),
]  # fmt: skip
THEIR_GRIDS: dict[str, GridFunction] = {
    name: grids.GRIDS[name].make for name in ("uniform", "logsnr", "quadratic", "karras")
}
OURS: dict[str, Solver] = {f"GaussianSplit({order})": solvers.GaussianSplit(order) for order in (2, 3, 4)}
OUR_GRIDS: dict[str, GridFunction] = {
    **{f"logistic, width {w:g}": partial(grids.logistic, width=w) for w in (1.0, 1.5, 2.0, 3.0)},
    "cosine": grids.cosine, "power": grids.power, "quadratic": grids.quadratic, "logsnr": grids.logsnr,
    "karras": grids.karras,
}  # fmt: skip


def problems() -> Iterator[tuple[str, sf.Model, tuple[int, ...]]]:
    """(name, model, shape): what the recommendation was designed on."""
    circle = EightGaussians()
    uneven = GaussianMixture(circle.means, circle.variances, weights=range(1, 9))
    for process in (sf.VP(), sf.EDM(), sf.SubVP(), sf.VE(), sf.CosineVP(), sf.RectifiedFlow()):
        name = type(process).__name__
        yield f"mixture, {name}", uneven.model(process), (2,)
        yield f"moons, {name}", TwoMoons().model(process), (2,)
    network = digits_network()
    yield "digits network, VP", network.model, network.shape


class Errors:
    """Median errors on one problem."""

    def __init__(self, model: sf.Model, shape: tuple[int, ...], batch: int) -> None:
        process = model.gaussian
        exact = not isinstance(model.net, torch.nn.Module)
        self._flow = process.reverse(model, 0.0)
        self._x = process.prior_sample((batch, *shape), 0, dtype=torch.float64 if exact else torch.float32)
        with torch.no_grad():
            self._end = sf.solve(self._flow, self._x, solvers.DOP853(), rtol=1e-9 if exact else 1e-6).x

    def __call__(self, solver: Solver, grid: GridFunction, calls: int) -> float:
        """Infinite where it is refused or fails."""
        try:
            with torch.no_grad():
                y = sf.solve(self._flow, self._x, solver, steps=calls, grid=grid, throw=False).x
        except ValueError:
            return math.inf
        error = sf.metrics.trajectory_error(y, self._end).median
        return error if math.isfinite(error) else math.inf


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gains: dict[tuple[int, str], list[tuple[float, str]]] = {}
    for name, model, shape in problems():
        errors = Errors(model, shape, arguments.batch)
        for calls in BUDGETS:
            best = min(errors(solver, grid, calls) for solver in PUBLISHED for grid in THEIR_GRIDS.values())
            for solver_name, solver in OURS.items():
                for grid_name, grid in OUR_GRIDS.items():
                    gain = best / errors(solver, grid, calls)
                    gains.setdefault((calls, f"{solver_name} on {grid_name}"), []).append((gain, name))
    rows = []
    for calls in BUDGETS:
        ranked = sorted(
            (
                (math.exp(sum(math.log(max(gain, 1e-6)) for gain, _ in found) / len(found)), min(found), choice)
                for (budget, choice), found in gains.items()
                if budget == calls
            ),
            reverse=True,
        )
        rows += [[str(calls), choice, f"{mean:.1f}", f"{low:.1f}", where] for mean, (low, where), choice in ranked[:3]]
        own = sf.recommend(sf.VP(), nfe=calls)
        rows.append([str(calls), f"recommended: {own.why.split(':')[0]}", "", "", ""])
    show("Times smaller than the best published error", ["calls", "choice", "mean", "least", "where"], rows)


if __name__ == "__main__":
    main()
