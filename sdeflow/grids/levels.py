"""Grids placed by the noise level sigma/alpha = exp(-lam) of a GaussianSDE."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.grids.shared import check_positive, ends, finish, gaussian_of

if TYPE_CHECKING:
    from sdeflow.sde import Problem


def _by_level(
    name: str,
    process: Problem,
    steps: int,
    t_start: float | None,
    t_end: float | None,
    place: Callable[[float, float, Tensor], Tensor],
) -> Tensor:
    """The grid whose lam at shares 0 to 1 of the way down is place(lam_high, lam_low, shares).

    An end at sigma = 0, which has no level, is reached by one last step from the process's t_min.
    """
    start, end = ends(process, steps, t_start, t_end)
    gaussian = gaussian_of(process, name)
    low, high = sorted((start, end))
    to_zero = float(gaussian.sigma(low)) == 0
    if to_zero and steps == 1:
        return finish(name, torch.tensor([high, low], dtype=torch.float64), start, end)
    last, inner = (gaussian.t_min, steps - 1) if to_zero else (low, steps)
    if last >= high:
        raise ValueError(
            f"grids.{name} goes to sigma = 0 by a last step from t_min = {last:g}: expected the other end above, "
            f"got {high:g}"
        )
    lam_high, lam_low = (float(gaussian.lam(t)) for t in (high, last))
    if not math.isfinite(lam_high):
        raise ValueError(
            f"grids.{name} needs alpha > 0: start short of t = {high:g}, or use power, cosine or flow_shift"
        )
    ts = gaussian.time_of_lam(place(lam_high, lam_low, torch.linspace(0, 1, inner + 1, dtype=torch.float64)))
    ts[-1] = last
    return finish(name, torch.cat([ts, ts.new_tensor([low])]) if to_zero else ts, start, end)


@checked
def logsnr(process: Problem, steps: int, t_start: float | None = None, t_end: float | None = None) -> Tensor:
    """Equal steps in lam = log(alpha/sigma) (Lu et al. 2022, DPM-Solver, section 3.3).

    An end at sigma = 0 is reached by one last step from t_min.

    Raises:
        ValueError: alpha = 0 at an end: lam is infinite there, end the grid short of it.
    """
    return _by_level("logsnr", process, steps, t_start, t_end, _geometric)


def _geometric(lam_high: float, lam_low: float, shares: Tensor) -> Tensor:
    return lam_high + (lam_low - lam_high) * shares


@checked
def exponential(process: Problem, steps: int, t_start: float | None = None, t_end: float | None = None) -> Tensor:
    """Levels sigma/alpha in geometric progression: the same times as `logsnr`, under the name of k-diffusion."""
    return _by_level("exponential", process, steps, t_start, t_end, _geometric)


@checked
def polyexponential(
    process: Problem,
    steps: int,
    t_start: float | None = None,
    t_end: float | None = None,
    *,
    rho: float = 1.0,
) -> Tensor:
    """lam = lam_low - r^rho (lam_low - lam_high), r from 1 to 0 in equal steps (k-diffusion's grid of that name).

    rho = 1 is `logsnr`; larger values place more steps at low noise. Ends as in `logsnr`.
    """
    check_positive(rho=rho)

    def place(lam_high: float, lam_low: float, shares: Tensor) -> Tensor:
        return lam_low - (1 - shares) ** rho * (lam_low - lam_high)

    return _by_level("polyexponential", process, steps, t_start, t_end, place)


@checked
def karras(
    process: Problem,
    steps: int,
    t_start: float | None = None,
    t_end: float | None = None,
    *,
    rho: float = 7.0,
) -> Tensor:
    """Equal steps in (sigma/alpha)^(1/rho) (Karras et al. 2022, EDM, equation 5).

    An end at sigma = 0 is reached, as there, by one last step from t_min; an end at alpha = 0 is refused.
    """
    check_positive(rho=rho)

    def place(lam_high: float, lam_low: float, shares: Tensor) -> Tensor:
        root_high, root_low = math.exp(-lam_high / rho), math.exp(-lam_low / rho)
        return -rho * torch.log(root_high + (root_low - root_high) * shares)

    return _by_level("karras", process, steps, t_start, t_end, place)


def _by_clock(
    name: str,
    process: Problem,
    steps: int,
    t_start: float | None,
    t_end: float | None,
    clock: Callable[[Tensor, Tensor], Tensor],
    lam: Callable[[Tensor], Tensor],
) -> Tensor:
    """Equal steps in clock(alpha, sigma), which is finite at alpha = 0 and at sigma = 0; lam(clock) inverts it."""
    start, end = ends(process, steps, t_start, t_end)
    gaussian = gaussian_of(process, name)
    both = torch.tensor([max(start, end), min(start, end)], dtype=torch.float64)
    high, low = clock(gaussian.alpha(both), gaussian.sigma(both)).tolist()
    ts = torch.empty(steps + 1, dtype=torch.float64)
    ts[1:-1] = gaussian.time_of_lam(lam(torch.linspace(high, low, steps + 1, dtype=torch.float64)[1:-1]))
    return finish(name, ts, start, end)


@checked
def cosine(process: Problem, steps: int, t_start: float | None = None, t_end: float | None = None) -> Tensor:
    """Equal steps of the angle atan(sigma/alpha): uniform t of the cosine schedule, on any GaussianSDE.

    (Nichol and Dhariwal 2021, Improved DDPM, equation 17, with s = 0.) Defined to alpha = 0 and to sigma = 0.
    """
    return _by_clock(
        "cosine", process, steps, t_start, t_end,
        clock=lambda alpha, sigma: torch.atan2(sigma, alpha), lam=lambda angle: -torch.log(torch.tan(angle)),
    )  # fmt: skip


@checked
def flow_shift(
    process: Problem,
    steps: int,
    t_start: float | None = None,
    t_end: float | None = None,
    *,
    shift: float = 3.0,
) -> Tensor:
    """u' = shift u/(1 + (shift - 1) u) of equal steps in u, u' = sigma/(alpha + sigma) the time of a rectified flow.

    The resolution shift of flow models, on any GaussianSDE (Esser et al. 2024, Stable Diffusion 3, equation 23:
    shift = sqrt(m/n) from n to m pixels; 3 there). shift = 1: equal steps of the flow's time; larger values place
    more steps at high noise. Defined to alpha = 0 and to sigma = 0.
    """
    check_positive(shift=shift)
    return _by_clock(
        "flow_shift", process, steps, t_start, t_end,
        clock=lambda alpha, sigma: sigma / (sigma + shift * alpha), lam=lambda u: torch.log((1 - u) / (shift * u)),
    )  # fmt: skip


@checked
def logistic(
    process: Problem,
    steps: int,
    t_start: float | None = None,
    t_end: float | None = None,
    *,
    scale: float = 0.5,
    width: float = 1.5,
) -> Tensor:
    """Equal steps of 1/(1 + (scale alpha/sigma)^(1/width)), a logistic function of lam.

    Dense in lam around sigma/alpha = `scale`, where a flow bends: the standard deviation of the data, or its guess.
    Towards both ends steps in lam grow, the slower the larger `width`; width = 1 is `flow_shift` with shift = scale.
    Defined to alpha = 0 and to sigma = 0. The grid that `sf.recommend` gives: docs/tuning.md has the measurement.
    """
    check_positive(scale=scale, width=width)
    return _by_clock(
        "logistic", process, steps, t_start, t_end,
        clock=lambda alpha, sigma: sigma ** (1 / width) / (sigma ** (1 / width) + (scale * alpha) ** (1 / width)),
        lam=lambda w: width * torch.log((1 - w) / w) - math.log(scale),
    )  # fmt: skip
