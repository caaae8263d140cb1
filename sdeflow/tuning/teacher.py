"""What a tuner aims at: the flow of a model, solved finely from some noises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow import grids
from sdeflow.metrics import trajectory_error
from sdeflow.reverse import ReverseSDE
from sdeflow.solve import solve
from sdeflow.solvers.base import Solver
from sdeflow.solvers.gaussian_split import GaussianSplit
from sdeflow.solvers.runge_kutta import RK4

_STEPS = 400
_KEPT_EVERY = 4


@dataclass(frozen=True)
class Teacher:
    """Noises, where the flow takes them, and the states of the first few in between.

    Attributes:
        x: starts (batch, *event).
        end: of their flow.
        scale: the root mean square spread of the ends: errors are in its units.
        error: median error of `end` by its difference from a solve with half the steps, in units of `scale`.
        state: t -> the states of the first samples at times t (n,), (n, first, *event).
    """

    x: Tensor
    end: Tensor
    scale: float
    error: float
    state: Callable[[Tensor], Tensor]


def teacher(problem: ReverseSDE, x: Tensor, span: tuple[float, float], first: int) -> Teacher:
    """Solve the flow from x; the states of the samples before `first` are kept."""
    process = problem.gaussian
    low, high = sorted(span)
    inner = max(low, process.t_min)  # a last step to sigma = 0 has no level to go by
    split = bool(torch.isfinite(process.lam(high)))
    solver: Solver = GaussianSplit(order=3) if split else RK4()
    fine, coarse = (_STEPS, _STEPS // 2) if split else (_STEPS // 4, _STEPS // 8)
    ends = {}
    kept_times, kept = torch.empty(0), torch.empty(0)
    for steps in (coarse, fine):
        times = grids.power(problem, steps, high, inner)
        kept_times = times[::_KEPT_EVERY] if steps == fine else times[[0, -1]]
        solution = solve(problem, x, solver, grid=times, save=kept_times)
        assert solution.xs is not None
        kept, y = solution.xs[:, :first], solution.x
        if inner != low:
            y = solve(problem, y, GaussianSplit(order=1), grid=[inner, low]).x
        ends[steps] = y
    end = ends[fine]
    scale = float((end - end.mean(0)).to(torch.float64).square().mean().sqrt()) or 1.0
    clock = _clock(process.lam(kept_times), kept_times, split)
    from scipy.interpolate import CubicSpline  # slow to import

    spline = CubicSpline(clock.numpy(), kept.detach().to("cpu", torch.float64).numpy(), axis=0)

    def state(t: Tensor) -> Tensor:
        at = spline(_clock(process.lam(t.clamp(inner, high)), t, split).numpy())
        return torch.from_numpy(at).to(x)

    return Teacher(x, end, scale, trajectory_error(ends[coarse], end).median / scale, state)


def _clock(lam: Tensor, t: Tensor, split: bool) -> Tensor:
    """What rises along the flow and is finite: lam, or minus the time."""
    return lam if split else -t
