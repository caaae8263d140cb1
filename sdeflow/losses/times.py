"""Laws of training times: `(process, n, t_min=None, ...) -> n times` in [t_min, t1], float64, on the CPU.

A law of times and a weight are one choice: the objective is their product. `t_min` is a hundred-thousandth of the span
above t0 unless given. Every function draws from torch's global generator, or from `generator` (of the CPU); all but the
laws' own parameters can be given to `sdeflow.training.train` as `times`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE

MOST_TIMES = 100_000_000
"""Times of one batch that anyone can hold."""

_LEFT_OUT = 1e-5
"""The part of the span next to the data that training leaves out."""


@checked
def stratified_times(
    process: GaussianSDE, n: int, t_min: float | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """`n` times in [t_min, t1], float64, rising, spread evenly over the angle atan(sigma/alpha).

    The angle runs from 0 (data) to pi/2 (noise) for any process, and v is the slope in it of a
    variance-preserving flow (Salimans and Ho 2022, Progressive distillation, appendix D), so that no part
    of it is worth more than another. On the digits it leaves a lower loss on held-out images than times
    uniform in t, and than times uniform in lam save where sigma < 0.1. Each of n equal parts gets one
    time, all with one random offset (Kingma et al. 2021, Variational diffusion models, appendix I.1): a
    batch covers the span, which lowers the variance of its mean loss. Draws one number.

    Args:
        t_min: the lower end; a hundred-thousandth of the span above t0 unless given, below where
            sampling ends and above the singular point of the rows that divide by sigma.
        generator: of the offset; None for torch's global one.
    """
    check_count(n)
    low = lowest(process, t_min)
    ends = torch.atan(torch.exp(-process.lam(torch.tensor([low, process.t1], dtype=torch.float64))))
    share = (torch.arange(n, dtype=torch.float64) + torch.rand((), dtype=torch.float64, generator=generator)) / n
    angle = ends[0] + share * (ends[1] - ends[0])
    return process.time_of_lam(-torch.log(torch.tan(angle))).clamp(low, process.t1)


@checked
def uniform_times(
    process: GaussianSDE, n: int, t_min: float | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """`n` independent times, uniform on [t_min, t1]."""
    check_count(n)
    low = lowest(process, t_min)
    return low + (process.t1 - low) * torch.rand(n, dtype=torch.float64, generator=generator)


@checked
def offset_times(
    process: GaussianSDE, n: int, t_min: float | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """`n` times, each uniform on [t_min, t1], evenly spaced modulo the span: low + (t1 - low) frac(u + i/n), one u.

    (Kingma et al. 2021, Variational diffusion models, appendix I.1.) Unlike those of `stratified_times` they are
    uniform in t, and each alone has the whole law, so that the mean loss is unbiased also where data are in order.
    """
    check_count(n)
    low = lowest(process, t_min)
    u = torch.rand((), dtype=torch.float64, generator=generator)
    return low + (process.t1 - low) * torch.frac(u + torch.arange(n, dtype=torch.float64) / n)


@checked
def log_normal_times(
    process: GaussianSDE,
    n: int,
    t_min: float | None = None,
    *,
    mean: float = -1.2,
    std: float = 1.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`n` independent times with log(sigma/alpha) ~ N(mean, std^2), given that t is in [t_min, t1].

    (Karras et al. 2022, EDM, table 1: P_mean and P_std, for data of standard deviation 0.5.)

    Raises:
        ValueError: std is not positive, or the law has no mass on the span to speak of (1e-9).
    """
    check_count(n)
    low = lowest(process, t_min)
    ends = -process.lam(torch.tensor([low, process.t1], dtype=torch.float64))
    level = _truncated_normal(ends, n, mean, std, generator)
    return process.time_of_lam(-level).clamp(low, process.t1)


@checked
def logit_normal_times(
    process: GaussianSDE,
    n: int,
    t_min: float | None = None,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`n` independent times with logit of (t - t0)/(t1 - t0) ~ N(mean, std^2), given that t >= t_min.

    (Esser et al. 2024, Scaling rectified flow transformers, section 3.1, for rectified flow: more times in the middle.)

    Raises:
        ValueError: std is not positive, or the law has no mass on the span to speak of (1e-9).
    """
    check_count(n)
    low, span = lowest(process, t_min), process.t1 - process.t0
    share = torch.tensor([(low - process.t0) / span, 1.0], dtype=torch.float64)
    logit = _truncated_normal(torch.logit(share), n, mean, std, generator)
    return (process.t0 + span * torch.sigmoid(logit)).clamp(low, process.t1)


def _truncated_normal(ends: Tensor, n: int, mean: float, std: float, generator: torch.Generator | None) -> Tensor:
    """`n` draws of N(mean, std^2) given that they lie between the two ends, by its inverse cdf."""
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"expected a finite mean and std > 0, got {mean!r} and {std!r}")
    cdf = torch.special.ndtr((ends - mean) / std)
    if float(cdf[1] - cdf[0]) < 1e-9:  # less would leave the draws few digits
        raise ValueError(
            f"N({mean:g}, {std:g}^2) has no mass on the span, from {float(ends[0]):g} to {float(ends[1]):g}"
        )
    u = torch.rand(n, dtype=torch.float64, generator=generator)
    value = mean + std * torch.special.ndtri(cdf[0] + u * (cdf[1] - cdf[0]))
    return value.clamp(float(ends[0]), float(ends[1]))


def check_count(n: int) -> None:
    """Refuse a number of times that is none."""
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST_TIMES:
        raise ValueError(f"expected n to be an integer from 1 to {MOST_TIMES}, got {n!r}")


def lowest(process: GaussianSDE, t_min: float | None) -> float:
    """The lower end of the times, checked."""
    low = process.t0 + _LEFT_OUT * (process.t1 - process.t0) if t_min is None else float(t_min)
    if not process.t0 <= low < process.t1:
        raise ValueError(f"expected t_min in [{process.t0:g}, {process.t1:g}), got {low:g}")
    return low
