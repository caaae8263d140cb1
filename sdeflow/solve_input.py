"""What `solve` is given, checked before the first model call: states, solvers, grids, times to save."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sdeflow.checked import described, number, numbers, tensor
from sdeflow.grids.shared import MOST_STEPS
from sdeflow.kept import Kept
from sdeflow.noise import NoiseSource
from sdeflow.plan import Plan
from sdeflow.sde import Problem
from sdeflow.solvers.base import Solver, reversal_key

Grid = Tensor | Sequence[float] | Callable[..., Tensor]
Save = bool | Sequence[float] | Tensor | None


def check_types(problem: object, x: object, solver: object) -> None:
    """Refuse a problem, a solver or states that are none."""
    if not isinstance(problem, Problem):
        raise TypeError(f"expected an ODE, SDE or ReverseSDE as problem, got {type(problem).__name__}")
    if not isinstance(solver, Solver):
        hint = "; call it to make one" if callable(solver) else ""
        raise TypeError(f"expected a solver such as sf.solvers.Heun(), got {solver!r}{hint}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected x as a floating-point tensor, got {got}")
    if not tensor(x):
        raise TypeError(f"expected x as a dense tensor with values, got {described(x)} ({x.layout})")
    if x.ndim < 1 or x.shape[0] < 1 or x.numel() == 0:
        raise ValueError(f"expected x of shape (batch, *event) with at least one sample, got {tuple(x.shape)}")
    finite = torch.isfinite(x.detach())
    if not bool(finite.all()):
        bad = ~finite.reshape(x.shape[0], -1).all(1)
        rows = torch.nonzero(bad).flatten().tolist()
        raise ValueError(f"expected finite x, got NaN or infinity in {len(rows)} samples (first: {rows[0]})")


def check_noise(noise: object, seed: int | None) -> None:
    """Refuse noise that is no source, or comes beside a seed."""
    if noise is None:
        return
    if seed is not None:
        raise ValueError("expected seed or noise, not both")
    if not isinstance(noise, NoiseSource):
        raise TypeError(
            f"expected noise as sf.SamePath(seed), sf.Antithetic(seed) or sf.RecordedPath(...), got {noise!r}"
        )


def checked_span(problem: Problem, t_span: tuple[float, float] | None) -> tuple[float, float]:
    """(start, end), the problem's own unless given."""
    if t_span is None:
        return problem.span
    try:
        whole = len(t_span) == 2 and all(number(t) or isinstance(t, float) for t in t_span)
    except TypeError:
        whole = False
    if not whole:
        raise ValueError(f"expected t_span as (start, end), got {t_span!r}")
    start, end = (float(t) for t in t_span)
    if not (problem.t0 <= min(start, end) < max(start, end) <= problem.t1) or problem.stochastic:
        _check_times(problem, torch.tensor([start, end], dtype=torch.float64), "t_span")
    return start, end


def _check_times(problem: Problem, ts: Tensor, what: str) -> None:
    """Refuse times that are not finite, leave [t0, t1], are not monotone, or run noise backwards."""
    values = ts.numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"expected finite times in {what}, got {ts.tolist()}")
    h = np.diff(values)
    if not ((h > 0).all() or (h < 0).all()):
        raise ValueError(f"expected strictly monotone times in {what}, got {_shown(ts)}")
    slack = 1e-9 * (problem.t1 - problem.t0)
    if values.min() < problem.t0 - slack or values.max() > problem.t1 + slack:
        raise ValueError(
            f"expected times of {what} in [{problem.t0:g}, {problem.t1:g}], got {float(ts[0]):g} to {float(ts[-1]):g}"
        )
    if problem.stochastic and h[0] * problem.direction < 0:
        way = "up from" if problem.direction > 0 else "down to"
        raise ValueError(f"{type(problem).__name__} runs {way} t0 = {problem.t0:g}: {what} runs the other way")


def _shown(ts: Tensor) -> str:
    values = [f"{v:g}" for v in ts.tolist()]
    return "[" + ", ".join(values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]) + "]"


def grid_of(
    problem: Problem, solver: Solver, steps: int | None, grid: Grid | None, t_span: tuple[float, float] | None
) -> Tensor:
    """The times of a solve on a grid (steps + 1,), float64 on the host."""
    if isinstance(solver, Plan):
        if grid is None and steps in (None, solver.steps) and t_span is None:
            return solver.grid
        raise ValueError("a plan has its own grid: give no steps, grid or t_span with it")
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"expected steps >= 1, got {steps} (at most {MOST_STEPS})")
    if grid is None or callable(grid):
        if steps is None:
            raise ValueError("expected steps=, grid=, or (for an adaptive solver) rtol= and atol=")
        start, end = checked_span(problem, t_span)
        made_for = reversal_key(problem) if grid is None else None  # a function of the user's may do anything
        key = None if made_for is None else (made_for, steps, start, end)
        make = problem.default_grid if grid is None else partial(grid, problem)
        return _GRIDS.get(key, lambda: _checked_grid(problem, make(steps, start, end), steps))
    else:
        if t_span is not None:
            raise ValueError("expected a grid of times or t_span, not both")
        ts = grid if isinstance(grid, Tensor) else numbers(grid, "grid")
        if ts.is_complex() or ts.dtype == torch.bool:
            raise TypeError(f"expected real times in grid, got {ts.dtype}")
    return _checked_grid(problem, ts, steps)


def checked_problem_grid(problem: Problem, grid: Tensor | Sequence[float]) -> Tensor:
    """The grid as `solve` takes it, for those who ask for a plan."""
    if not isinstance(problem, Problem):
        raise TypeError(f"expected an ODE, SDE or ReverseSDE as problem, got {described(problem)}")
    return _checked_grid(problem, grid if isinstance(grid, Tensor) else numbers(grid, "grid"), None)


def _checked_grid(problem: Problem, ts: Tensor, steps: int | None) -> Tensor:
    if not tensor(ts):
        raise TypeError(f"expected a grid of times, got {described(ts)}")
    ts = ts.detach().to(device="cpu", dtype=torch.float64)
    if ts.ndim != 1 or ts.numel() < 2:
        raise ValueError(f"expected grid as times of shape (steps + 1,), got shape {tuple(ts.shape)}")
    if steps is not None and ts.numel() != steps + 1:
        raise ValueError(f"expected {steps + 1} times for {steps} steps, got {ts.numel()}")
    _check_times(problem, ts, "grid")
    return ts


_GRIDS: Kept[Tensor] = Kept(64)


def _wanted(save: object) -> Tensor:
    wanted = numbers(save, "save")
    if wanted.numel() == 0 or wanted.ndim > 1:
        raise ValueError(f"expected one or more times in save, (n,), or None, got {described(save)}")
    wanted = wanted.reshape(-1)
    return wanted


def save_points(save: Save, ts: Tensor) -> list[int]:
    """The grid's indices to save, in order."""
    if save is None or save is False:
        return []
    if save is True:
        return list(range(ts.numel()))
    wanted = _wanted(save)
    points = []
    for t in wanted.tolist():
        nearest = int((ts - t).abs().argmin())
        if not math.isclose(float(ts[nearest]), t, rel_tol=1e-12, abs_tol=1e-15):
            raise ValueError(
                f"expected times of the grid in save, got {t:g} (nearest {float(ts[nearest]):g}): a path between "
                "grid points is not interpolated; put the time on the grid, or solve an ODE to a tolerance"
            )
        points.append(nearest)
    if sorted(set(points)) != points:
        raise ValueError("expected save times in the order of the solve, without repeats")
    return points


def save_times(save: Save, span: tuple[float, float], device: torch.device) -> Tensor | None:
    """Times for dense output."""
    if save is None or save is False:
        return None
    if save is True:
        raise ValueError("steps are per sample under error control: expected times in save, got True")
    ts = _wanted(save)
    low, high = min(span), max(span)
    if not bool(((ts >= low) & (ts <= high)).all()):
        raise ValueError(f"expected save times in [{low:g}, {high:g}], got {_shown(ts)}")
    return ts
