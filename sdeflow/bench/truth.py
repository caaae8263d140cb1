"""What runs are measured against: the flow's own end, sample by sample, or draws of the exact law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sdeflow.bench.problem import Problem
from sdeflow.metrics import sliced_w2, trajectory_error
from sdeflow.reverse import ReverseSDE
from sdeflow.solution import Solution
from sdeflow.solve import solve
from sdeflow.solvers import RK45

MEASURES = ("median", "q90", "rms")
_MAX_STEPS = 50_000
_DIRECTIONS = 64


@dataclass(frozen=True)
class Reference:
    """The ends of the flow from given starts; for deterministic solvers.

    Attributes:
        start: (samples, *shape), where every such solver starts, on the device of the runs; the rest is on the CPU.
        x: its end, float64 (kept, *shape).
        kept: bool (samples,); samples whose reference did not converge are left out of every comparison.
        centres: see `Problem`.
        floors: its own error in each measure; empty when it is not known.
        text: how it was made, for the report.
    """

    kind: ClassVar[Literal["trajectory"]] = "trajectory"
    start: Tensor
    x: Tensor
    kept: Tensor
    centres: Tensor | None
    floors: dict[str, float]
    text: str

    def measure(self, solution: Solution) -> dict[str, Any]:
        """The fields of a `Result` that say how far a solution is from it."""
        error = trajectory_error(solution.x[self.kept], self.x, centres=self.centres)
        floor = self.floors.get("median")
        return {
            "samples": self.x.shape[0],
            "median": error.median,
            "q90": error.q90,
            "rms": error.rms,
            "flip_rate": error.flip_rate,
            "floor": floor,
            "resolved": floor is None or not error.median < 2 * floor,
        }

    def failed(self, solution: Solution) -> bool:
        """Whether a sample that counts did not finish."""
        return not bool(solution.ok[self.kept].all())


def reference_of(problem: Problem, flow: ReverseSDE, start: Tensor) -> Reference:
    """The reference of a problem.

    Raises:
        RuntimeError: it converged for no sample.
        ValueError: the problem's own reference returns another shape.
    """
    every = torch.ones(start.shape[0], dtype=torch.bool)
    if problem.reference is not None:
        end = problem.reference(start.cpu()).to("cpu", torch.float64)
        if end.shape != start.shape:
            raise ValueError(f"expected reference(x) of the shape of x, {tuple(start.shape)}, got {tuple(end.shape)}")
        return Reference(start, end, every, problem.centres, {}, "given by the problem")
    tolerance = problem.tolerance
    fine, coarse = (
        solve(flow, start, RK45(), rtol=tol, throw=False, max_steps=_MAX_STEPS) for tol in (tolerance, 10 * tolerance)
    )
    kept = (fine.ok & coarse.ok).cpu()
    if int(kept.sum()) < 2:
        raise RuntimeError(
            f"the reference of {problem.name!r} at tolerance {tolerance:g} did not converge: {fine.failures()}; "
            "give a larger tolerance"
        )
    end = fine.x.cpu()[kept].to(torch.float64)
    own = trajectory_error(coarse.x.cpu()[kept], end)
    calls = torch.as_tensor(fine.stats.nfe, dtype=torch.float64).mean()
    text = f"RK45 at rtol = atol = {tolerance:g}, {calls:.0f} calls a sample"
    if not bool(kept.all()):
        text += f"; not converged for {int((~kept).sum())} of {kept.numel()} samples, which are left out"
    return Reference(start, end, kept, problem.centres, {m: getattr(own, m) for m in MEASURES}, text)


@dataclass(frozen=True)
class Target:
    """Draws of the law that stochastic solvers sample.

    Attributes:
        start: (draws, *shape), where every such solver starts.
        x: float64 (draws, *shape).
        floors: the sliced W2 of a second such set to it.
        text: how it was made, for the report.
    """

    kind: ClassVar[Literal["distribution"]] = "distribution"
    start: Tensor
    x: Tensor
    floors: dict[str, float]
    text: str

    def measure(self, solution: Solution) -> dict[str, Any]:
        """The fields of a `Result` that say how far a solution is from it."""
        values = {"samples": solution.x.shape[0], "floor": self.floors["sliced_w2"]}
        if self.failed(solution):
            return values
        distance = sliced_w2(solution.x.to(torch.float64), self.x, projections=_DIRECTIONS)
        resolved = not distance.value < 2 * self.floors["sliced_w2"]
        return values | {
            "sliced_w2": distance.value,
            "low": distance.low,
            "high": distance.high,
            "resolved": resolved,
        }

    def failed(self, solution: Solution) -> bool:
        """Whether a sample did not finish."""
        return not bool(solution.ok.all())


def target_of(problem: Problem, flow: ReverseSDE, start: Tensor, seed: int) -> Target:
    """The target of a problem, from other random numbers than any run's.

    Raises:
        RuntimeError: the flow that stands in for exact draws failed.
    """
    n = problem.draws
    if problem.sample is not None:
        x, other = (problem.exact_draws(n, seed + k) for k in (1, 2))
        text = "exact draws, noised to t_min"
    else:
        starts = torch.cat([problem.start(n, seed + k, start.dtype) for k in (1, 2)]).to(start.device)
        tolerance = problem.target_tolerance
        ends = solve(flow, starts, RK45(), rtol=tolerance, throw=False, max_steps=_MAX_STEPS)
        if not bool(ends.ok.all()):
            raise RuntimeError(f"the target of {problem.name!r} failed: {ends.failures()}")
        x, other = ends.x.to("cpu", torch.float64).chunk(2)
        text = f"the model's own probability flow (RK45 at rtol = atol = {tolerance:g}), not draws of data"
    return Target(start, x, {"sliced_w2": sliced_w2(other, x, projections=_DIRECTIONS).value}, text)


def spread(x: Tensor) -> float:
    """Root mean square per component of x (n, *shape) about its mean."""
    return float((x - x.mean(0)).square().mean().sqrt())
