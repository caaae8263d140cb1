"""Time grids: `(process, steps, t_start, t_end) -> float64 tensor (steps + 1,)`, both ends exact.

`t_start` and `t_end` default to the process's sampling span (t1 down to t_min); grids run in
either direction. Every function here can be given as `grid=` to `solve` and `sample`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sdeflow.gaussian import GaussianSDE
    from sdeflow.sde import Problem

GridFunction = Callable[..., Tensor]


def _ends(process: Problem, steps: int, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"expected an integer number of steps, got {steps!r}")
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    start = process.t1 if t_start is None else float(t_start)
    end = process.t_min if t_end is None else float(t_end)
    if start == end:
        raise ValueError(f"expected two different ends, got t_start = t_end = {start:g}")
    return start, end


def _pin(ts: Tensor, start: float, end: float) -> Tensor:
    """The ends exactly: a clock that misses t_end by a rounding error leaves a phantom step."""
    ts[0], ts[-1] = start, end
    return ts


def _gaussian(process: Any, name: str) -> GaussianSDE:
    process = getattr(process, "process", process)
    if not hasattr(process, "time_of_lam"):
        raise ValueError(f"grids.{name} needs the noise levels of a GaussianSDE, got {type(process).__name__}")
    return process


def uniform(process: Problem, steps: int, t_start: float | None = None, t_end: float | None = None) -> Tensor:
    """Equal steps in t."""
    start, end = _ends(process, steps, t_start, t_end)
    return _pin(torch.linspace(start, end, steps + 1, dtype=torch.float64), start, end)


def power(
    process: Problem,
    steps: int,
    t_start: float | None = None,
    t_end: float | None = None,
    *,
    exponent: float = 3.0,
) -> Tensor:
    """Equal steps in (t - t0)^(1/exponent): t fine near the data. Cubic by default.

    Uniform in t^(1/3) is the best single default measured below 20 calls on VP-like processes.
    """
    start, end = _ends(process, steps, t_start, t_end)
    if not exponent > 0:
        raise ValueError(f"expected exponent > 0, got {exponent}")
    base = process.t0
    a, b = ((start - base) ** (1 / exponent), (end - base) ** (1 / exponent))
    return _pin(base + torch.linspace(a, b, steps + 1, dtype=torch.float64) ** exponent, start, end)


def quadratic(process: Problem, steps: int, t_start: float | None = None, t_end: float | None = None) -> Tensor:
    """Equal steps in sqrt(t - t0) (Song et al. 2021, DDIM, appendix D.2)."""
    return power(process, steps, t_start, t_end, exponent=2.0)


def logsnr(process: Problem, steps: int, t_start: float | None = None, t_end: float | None = None) -> Tensor:
    """Equal steps in lam = log(alpha/sigma) (Lu et al. 2022, DPM-Solver, section 3.3).

    Raises:
        ValueError: lam is infinite at an end (sigma = 0 or alpha = 0); end the grid before it.
    """
    start, end = _ends(process, steps, t_start, t_end)
    gaussian = _gaussian(process, "logsnr")
    lam = gaussian.lam(torch.tensor([start, end], dtype=torch.float64))
    if not torch.isfinite(lam).all():
        raise ValueError(
            f"grids.logsnr needs a finite lam at both ends, got lam({start:g}) = {float(lam[0]):g} "
            f"and lam({end:g}) = {float(lam[1]):g}"
        )
    levels = torch.linspace(float(lam[0]), float(lam[1]), steps + 1, dtype=torch.float64)
    return _pin(gaussian.time_of_lam(levels), start, end)


def karras(
    process: Problem,
    steps: int,
    t_start: float | None = None,
    t_end: float | None = None,
    *,
    rho: float = 7.0,
) -> Tensor:
    """Equal steps in (sigma/alpha)^(1/rho) (Karras et al. 2022, EDM, equation 5).

    An end at sigma = 0 is kept (its level is 0); an end at alpha = 0 is refused.
    """
    start, end = _ends(process, steps, t_start, t_end)
    gaussian = _gaussian(process, "karras")
    if not rho > 0:
        raise ValueError(f"expected rho > 0, got {rho}")
    ends = torch.tensor([start, end], dtype=torch.float64)
    level = gaussian.sigma(ends) / gaussian.alpha(ends)
    if not torch.isfinite(level).all():
        raise ValueError(f"grids.karras needs alpha > 0 at both ends, got ends {start:g}, {end:g}")
    root = level ** (1 / rho)
    roots = torch.linspace(float(root[0]), float(root[1]), steps + 1, dtype=torch.float64)
    return _pin(gaussian.time_of_lam(-rho * torch.log(roots)), start, end)
