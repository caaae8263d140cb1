"""Errors at few calls: `python -m benchmarks.tuned`, what is recommended and a tuned plan against published samplers.

Four problems with an exact score, all under VP, none of them used to choose what `sf.recommend` gives or how `sf.tune`
works: (1) an 8-D mixture with full covariances, (2) a 48-D mixture whose covariances fall as a power law, (3) a 64-D
mixture of 40 digits blurred by 0.15, (4) three uneven Gaussians in the plane; and (5) the digits network that ships,
which was. Median over 256 paired noises of a sample's RMS error in units of the data's spread.

"Published" is the best cell, per problem and per number of calls, over DDIM, DPM-Solver (2M, 3M, 2S, 3S), DPM-Solver++
(2M as published, 3M), UniPC (2, 3, bh2), DEIS (2, 3), iPNDM (3, 4) and EDM's Heun, each on the uniform, log-SNR,
quadratic and Karras grids, in this package's implementations, which converge at their orders.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdeflow as sf
from benchmarks.timing import show
from sdeflow import grids, solvers
from sdeflow.data import digits
from sdeflow.metrics import trajectory_error
from sdeflow.problems import Empirical, GaussianMixture
from sdeflow.solvers import Solver

BUDGETS = (5, 8, 10, 15, 20)
GRIDS = {name: grids.GRIDS[name].make for name in ("uniform", "logsnr", "quadratic", "karras")}
PUBLISHED: list[tuple[Solver, int]] = [
    (solvers.DDIM(), 1),
    *((solvers.DPMSolver(order, multistep=True), 1) for order in (2, 3)),
    *((solvers.DPMSolver(order), order) for order in (2, 3)),
    (solvers.DPMSolverPP(2, second="midpoint"), 1),
    (solvers.DPMSolverPP(3), 1),
    (solvers.DPMSolverPP(2, lower_order_final=True), 1),
    *((solvers.UniPC(order), 1) for order in (2, 3)),
    *((solvers.UniPC(order, lower_order_final=True), 1) for order in (2, 3)),
    *((solvers.DEIS(order), 1) for order in (2, 3)),
    *((solvers.IPNDM(order), 1) for order in (3, 4)),
    (solvers.EDMHeun(), 2),
]
"""(solver, calls a step)."""


class Problem(NamedTuple):
    """A model and what its samples are."""

    name: str
    model: sf.Model
    shape: tuple[int, ...]
    dtype: torch.dtype
    centres: Tensor | None


def problems() -> Iterator[Problem]:
    """The five."""
    vp, f64 = sf.VP(), torch.float64
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=f64)

    roots = 0.35 * normal(5, 8, 8)
    data = GaussianMixture(normal(5, 8), roots @ roots.mT + 0.02 * torch.eye(8, dtype=f64), weights=range(1, 6))
    yield Problem("8-D mixture, full covariances", data.model(vp), (8,), f64, data.means)
    fall = 1 / (1 + torch.arange(48, dtype=f64) ** 2) ** 0.5
    data = GaussianMixture(normal(10, 48) * fall.sqrt() * 0.8, 0.3 * fall.expand(10, 48))
    yield Problem("48-D mixture, power law", data.model(vp), (48,), f64, data.means)
    images = digits()[0][100:140].to(f64).flatten(1)
    yield Problem("64-D mixture of digits", Empirical(images, bandwidth=0.15).model(vp), (64,), f64, images)
    means = torch.tensor([[-1.5, 0.4], [0.9, 1.1], [0.6, -1.3]], dtype=f64)
    spread = torch.tensor([[0.02, 0.3], [0.25, 0.05], [0.1, 0.1]], dtype=f64)
    data = GaussianMixture(means, spread, weights=[2, 1, 3])
    yield Problem("three Gaussians in the plane", data.model(vp), (2,), f64, means)
    network = sf.load_model("digits")
    yield Problem("digits network", network, (1, 8, 8), torch.float32, None)


class Judge:
    """Errors on one problem, from the same noises."""

    def __init__(self, problem: Problem, batch: int) -> None:
        self.problem, process = problem, problem.model.gaussian
        self.flow = process.reverse(problem.model, 0.0)
        self.x = process.prior_sample((batch, *problem.shape), 4321, dtype=problem.dtype)
        with torch.no_grad():
            tolerance = 1e-10 if problem.dtype == torch.float64 else 1e-6
            self.end = sf.solve(self.flow, self.x, solvers.DOP853(), rtol=tolerance).x
        self.scale = float((self.end - self.end.mean(0)).square().mean().sqrt())

    def __call__(self, solver: Solver, **how: Any) -> tuple[float, float, float]:
        """(median, 90% quantile, share that flipped), the first two in units of the spread; infinite if refused."""
        try:
            with torch.no_grad():
                y = sf.solve(self.flow, self.x, solver, throw=False, **how).x
        except ValueError:
            return math.inf, math.inf, math.inf
        found = trajectory_error(y, self.end, centres=self.problem.centres)
        return found.median / self.scale, found.q90 / self.scale, found.flip_rate


def rows_of(problem: Problem, batch: int, solver: Solver) -> list[list[str]]:
    """One row a budget."""
    judge, rows = Judge(problem, batch), []
    for budget in BUDGETS:
        published = min(
            (judge(method, steps=budget // calls, grid=grid)[0], f"{method.name} {name}")
            for method, calls in PUBLISHED
            for name, grid in GRIDS.items()
            if budget >= calls
        )
        choice = sf.recommend(problem.model.gaussian, nfe=budget)
        untuned = judge(choice.solver, steps=choice.steps, grid=choice.grid)
        plan = sf.tune(problem.model, solver, budget, shape=problem.shape, dtype=problem.dtype)
        tuned, note = judge(plan), plan.note or {}
        rows.append([
            problem.name, str(budget), f"{published[0]:.1e}", published[1],
            f"{untuned[0]:.1e}", f"{published[0] / untuned[0]:.1f}",
            f"{tuned[0]:.1e}", f"{published[0] / tuned[0]:.1f}", f"{note['held_out'] / note['train']:.2f}",
            f"{tuned[1]:.0e}", f"{100 * tuned[2]:.0f}%",
        ])  # fmt: skip
    return rows


def calls_for(error: float, judge: Judge) -> int:
    """The least number of calls, of the recommended choice, whose median error is below."""
    for budget in (*range(4, 40), *range(40, 200, 5)):
        choice = sf.recommend(judge.problem.model.gaussian, nfe=budget)
        if judge(choice.solver, steps=choice.steps, grid=choice.grid)[0] < error:
            return budget
    return -1


def plane(batch: int) -> list[list[str]]:
    """Calls for an error on two mixtures on a circle: of 8 components and of 16 narrower ones."""
    rows = []
    for count, spread in ((8, 0.2), (16, 0.08)):
        angle = torch.arange(count, dtype=torch.float64) * 2 * math.pi / count
        means = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
        model = GaussianMixture(means, spread**2).model(sf.VP())
        judge = Judge(Problem(f"{count} on a circle", model, (2,), torch.float64, means), batch)
        rows.append([judge.problem.name, *(str(calls_for(error, judge)) for error in (1e-2, 1e-3, 1e-4, 1e-6))])
    return rows


COLUMNS = ["problem", "calls", "published", "by", "untuned", "times", "tuned", "times", "held/train", "q90", "flips"]


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(2) as pool:
        tables = pool.map(lambda p: rows_of(p, arguments.batch, solvers.GaussianSplit(3)), problems())
    show("Calls of the recommended choice for a median error", ["problem", "1e-2", "1e-3", "1e-4", "1e-6"], plane(256))
    show("Median error, and times smaller than the published best", COLUMNS, [row for rows in tables for row in rows])


if __name__ == "__main__":
    main()
