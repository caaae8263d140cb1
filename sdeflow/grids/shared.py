"""What grids share: their ends, their checks, their direction."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdeflow.checked import described, number

MOST_STEPS = 10_000_000
"""A grid of more would hold a gigabyte of coefficients before the first step."""

if TYPE_CHECKING:
    from sdeflow.gaussian import GaussianSDE
    from sdeflow.sde import Problem


def ends(process: Problem, steps: int, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"expected an integer number of steps, got {steps!r}")
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"expected steps >= 1, got {steps} (at most {MOST_STEPS})")
    if not hasattr(process, "t1") or isinstance(process, type):
        raise TypeError(f"expected a process to make a grid for, got {process!r:.60}")
    for name, value in (("t_start", t_start), ("t_end", t_end)):
        if value is not None and not number(value):
            raise ValueError(f"expected {name} as a number, got {described(value)}")
    start = process.t1 if t_start is None else float(t_start)
    end = process.t_min if t_end is None else float(t_end)
    if start == end:
        raise ValueError(f"expected two different ends, got t_start = t_end = {start:g}")
    slack = 1e-9 * (process.t1 - process.t0)
    if not all(process.t0 - slack <= t <= process.t1 + slack for t in (start, end)):
        raise ValueError(f"expected both ends in [{process.t0:g}, {process.t1:g}], got {start:g} and {end:g}")
    return start, end


def finish(name: str, ts: Tensor, start: float, end: float) -> Tensor:
    """`ts`, which run down, between the ends exactly, in the direction asked for.

    A clock that misses an end by a rounding error would leave a phantom step.
    """
    ts[0], ts[-1] = max(start, end), min(start, end)
    if not bool((torch.diff(ts) < 0).all()):
        raise ValueError(
            f"grids.{name}: {ts.numel() - 1} steps from {start:g} to {end:g} are not distinct times: "
            "expected fewer steps or ends further apart"
        )
    return ts if start > end else ts.flip(0)


def gaussian_of(process: Any, name: str) -> GaussianSDE:
    process = getattr(process, "process", process)
    if not hasattr(process, "time_of_lam"):
        raise ValueError(f"grids.{name} needs the noise levels of a GaussianSDE, got {type(process).__name__}")
    return process


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not number(value):
            raise ValueError(f"expected a finite {name} > 0, got {described(value)}")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"expected a finite {name} > 0, got {value!r}")
