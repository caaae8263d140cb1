"""Is a tolerance of `GaussianSplit` the error of x at t = 0: `python -m benchmarks.data_tolerance [--threads N]`.

Every exact problem under every process, rtol = 1e-1 to 1e-4. The error of a sample is the root mean square over its
components of the difference to the flow from the same start at rtol = atol = 1e-9 (DOP853), over its tolerance
atol + rtol sqrt(variance). Then, under VP, the calls that other solvers take for the same median error.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import sdeflow as sf
from benchmarks.timing import show
from sdeflow.data import digits
from sdeflow.metrics import trajectory_error
from sdeflow.problems import EightGaussians, Empirical, GaussianMixture, TwoMoons
from sdeflow.reverse import ReverseSDE
from sdeflow.solvers import DOP853, RK45, DPMSolverPP, GaussianSplit
from sdeflow.solvers.base import Solver

F64 = torch.float64
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
PROCESSES: dict[str, Callable[[], sf.GaussianSDE]] = {
    "VP": sf.VP,
    "EDM": sf.EDM,
    "VE": sf.VE,
    "RectifiedFlow": sf.RectifiedFlow,
}


def weighted_circle() -> GaussianMixture:
    """Eight Gaussians with weights 1 to 8."""
    circle = EightGaussians()
    return GaussianMixture(circle.means, circle.variances, weights=range(1, 9))


def mixture_8d() -> GaussianMixture:
    """Five Gaussians with full covariances."""
    generator = torch.Generator().manual_seed(0)
    means = 1.5 * torch.randn(5, 8, generator=generator, dtype=F64)
    roots = torch.randn(5, 8, 8, generator=generator, dtype=F64)
    return GaussianMixture(means, 0.05 * roots @ roots.mT + 0.02 * torch.eye(8, dtype=F64))


def power_law() -> GaussianMixture:
    """Twenty Gaussians with a power-law spectrum in 48-D, a tenth of the variance in the means."""
    spectrum = 1 / (1.0 + torch.arange(48, dtype=F64)) ** 1.5
    spectrum = 12 * spectrum / spectrum.sum()
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(20, 48, generator=generator, dtype=F64) * (0.1 * spectrum).sqrt()
    return GaussianMixture(means, (0.9 * spectrum).expand(20, 48))


def blurred_digits() -> Empirical:
    """The handwritten digits, 64-D, each blurred by 0.2."""
    return Empirical(digits()[0].to(F64), bandwidth=0.2)


PROBLEMS: dict[str, Callable[[], GaussianMixture | Empirical]] = {
    "circle": EightGaussians,
    "weighted circle": weighted_circle,
    "two moons": TwoMoons,
    "mixture 8-D": mixture_8d,
    "power law 48-D": power_law,
    "digits 64-D": blurred_digits,
}


@dataclass(frozen=True)
class Case:
    """A flow, start states, where they end, and the split's moments of the data."""

    flow: ReverseSDE
    x: Tensor
    end: Tensor
    centres: Tensor
    mean: Tensor
    variance: float

    def errors(self, x: Tensor) -> Tensor:
        """Per sample, (batch,)."""
        return trajectory_error(x, self.end).per_sample


def case(data: GaussianMixture | Empirical, process: sf.GaussianSDE, samples: int) -> Case:
    flow = process.probability_flow(data.model(process))
    x = process.prior_sample((samples, *data.event), seed=3, dtype=F64)
    with torch.no_grad():
        end = sf.solve(flow, x, DOP853(), rtol=1e-9).x
    if isinstance(data, Empirical):
        points = data.data
        mean, variance = points.mean(0), float(points.var(0, correction=0).mean()) + data.bandwidth**2
    else:
        points = data.means
        mean, variance = data.mean.flatten(), float(torch.diagonal(data.covariance).mean())
    return Case(flow, x, end, points.reshape(-1, *data.event), mean.reshape(data.event), variance)


def calibration(at: Case, tolerance: float, factor: float = 1.0) -> list[float]:
    """[median and 0.9 quantile of error/tolerance, share above 1, flip rate, mean calls, mean rejected steps].

    Args:
        factor: by which the split's variance is off.
    """
    variance = factor * at.variance
    with torch.no_grad():
        found = sf.solve(at.flow, at.x, GaussianSplit(3, mean=at.mean, variance=variance), rtol=tolerance)
    ratio = at.errors(found.x) / (tolerance * (1 + math.sqrt(variance)))
    flips = trajectory_error(found.x, at.end, centres=at.centres).flip_rate
    calls, rejected = (torch.as_tensor(v, dtype=F64) for v in (found.stats.nfe, found.stats.rejected))
    return [
        float(ratio.median()),
        float(torch.quantile(ratio, 0.9)),
        float((ratio > 1).to(F64).mean()),
        flips,
        float(calls.mean()),
        float(rejected.mean()),
    ]


def work(at: Case, solver: Solver, budgets: Sequence[float]) -> tuple[list[float], list[float]]:
    """(mean calls, median errors): on default grids of so many steps, or to so many tolerances."""
    calls, errors = [], []
    for budget in budgets:
        with torch.no_grad():
            if budget >= 1:
                found = sf.solve(at.flow, at.x, solver, steps=int(budget))
            else:
                found = sf.solve(at.flow, at.x, solver, rtol=budget)
        calls.append(float(torch.as_tensor(found.stats.nfe, dtype=F64).mean()))
        errors.append(float(at.errors(found.x).median()))
    return calls, errors


def calls_for(error: float, calls: Sequence[float], errors: Sequence[float]) -> float:
    """Interpolated on logarithms; NaN outside of the errors measured."""
    for (n0, e0), (n1, e1) in pairwise(zip(calls, errors, strict=True)):
        if e1 <= error <= e0:
            share = math.log(e0 / error) / math.log(e0 / e1)
            return math.exp(math.log(n0) + share * math.log(n1 / n0))
    return math.nan


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Errors over tolerances of GaussianSplit, and calls at equal error.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=128)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    under_vp: dict[str, Case] = {}
    rows: list[list[str]] = []
    for process, make in PROCESSES.items():
        for name, data in PROBLEMS.items():
            at = case(data(), make(), given.samples)
            if process == "VP":
                under_vp[name] = at
            rows += [[process, name, *_line(tol, calibration(at, tol))] for tol in TOLERANCES]
    columns = ["rtol", "median", "q90", "above 1", "flips", "calls", "rejected"]
    show("error at t = 0 / tolerance, GaussianSplit(3)", ["process", "problem", *columns], rows)
    medians = [float(row[3]) for row in rows]
    print(f"medians of error/tolerance: {min(medians):.3g} to {max(medians):.3g} over {len(medians)} runs\n")
    off = [
        [name, f"{factor:g}", *_line(1e-3, calibration(at, 1e-3, factor))]
        for name, at in under_vp.items()
        for factor in (0.25, 4.0)
    ]
    show("the same with a wrong variance, under VP", ["problem", "variance x", *columns], off)
    show("calls at equal median error, under VP", ["problem", "error", "GaussianSplit", *_OTHERS], _compared(under_vp))


_OTHERS: dict[str, tuple[Callable[[Case], Solver], Sequence[float]]] = {
    "RK45, rtol": (lambda at: RK45(), [10.0**-k for k in range(1, 9)]),
    "DPM++(2M), grid": (lambda at: DPMSolverPP(2), (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)),
    "GaussianSplit, grid": (
        lambda at: GaussianSplit(3, mean=at.mean, variance=at.variance),
        (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128),
    ),
}


def _compared(cases: dict[str, Case]) -> list[list[str]]:
    rows = []
    for name, at in cases.items():
        ours = work(at, GaussianSplit(3, mean=at.mean, variance=at.variance), TOLERANCES)
        others = [work(at, make(at), budgets) for make, budgets in _OTHERS.values()]
        for calls, error in zip(*ours, strict=True):
            theirs = [f"{calls_for(error, *other):.1f}" for other in others]
            rows.append([name, f"{error:.2g}", f"{calls:.1f}", *theirs])
    return rows


def _line(tolerance: float, found: list[float]) -> list[str]:
    median, q90, above, flips, calls, rejected = found
    shown = [f"{median:.3f}", f"{q90:.2f}", f"{above:.2f}", f"{flips:.2f}", f"{calls:.1f}", f"{rejected:.1f}"]
    return [f"{tolerance:.0e}", *shown]


if __name__ == "__main__":
    main()
