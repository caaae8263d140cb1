"""Stochasticity that a sampler brings itself: a number, a function of t, or an object with the exact mean of a step.

A step of a semilinear method depends on eta through the mean of eta^2 over lam = log(alpha/sigma) alone. Where that
mean is known, a jump of eta inside a step, or an eta given by its integral, costs no quadrature.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.checked import LARGEST, checked_class, described, tensor
from sdeflow.gaussian import GaussianSDE
from sdeflow.reverse import Eta, ReverseSDE
from sdeflow.times import Time, as_time


class OwnEta(ABC):
    """eta as a function of a process's levels, with its mean square over a step."""

    @abstractmethod
    def at(self, process: GaussianSDE, t: Tensor) -> Tensor:
        """eta at times t, float64 of the shape of t."""

    @abstractmethod
    def mean_square(self, process: GaussianSDE, t0: Tensor, t1: Tensor) -> Tensor:
        """The mean of eta^2 over lam from t0 to t1, float64; 0 where the step is infinitely long in lam."""


@checked_class
@dataclass(frozen=True)
class Window(OwnEta):
    """`value` while the share (t - t0)/(t1 - t0) of the time range is in [low, high], else 0.

    (Xue et al. 2023, SA-Solver, section 6: value 1 on [0.2, 0.8].)
    """

    low: float = 0.2
    high: float = 0.8
    value: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"Window: expected 0 <= low < high <= 1, got {self.low!r} and {self.high!r}")
        if not 0 <= self.value <= LARGEST:
            raise ValueError(f"Window: expected value >= 0, got {self.value!r} (at most {LARGEST:g})")

    def _ends(self, process: GaussianSDE) -> tuple[float, float]:
        span = process.t1 - process.t0
        return process.t0 + self.low * span, process.t0 + self.high * span

    def at(self, process: GaussianSDE, t: Tensor) -> Tensor:
        low, high = self._ends(process)
        return torch.where((t >= low) & (t <= high), self.value, 0.0).to(torch.float64)

    def mean_square(self, process: GaussianSDE, t0: Tensor, t1: Tensor) -> Tensor:
        first, last = (process.lam(as_time(t)) for t in reversed(self._ends(process)))
        lam0, lam1 = process.lam(t0), process.lam(t1)
        inside = torch.minimum(torch.maximum(lam0, lam1), last) - torch.maximum(torch.minimum(lam0, lam1), first)
        return self.value**2 * torch.clamp(inside, min=0.0) / (lam1 - lam0).abs()


@checked_class
@dataclass(frozen=True)
class NoiseScale(OwnEta):
    """eta^2 = d log phi/d log x - 1 at the level x = sigma/alpha: phi = x is the flow, phi = x^2 the reverse SDE.

    The mean over a step is log((phi(x0)/x0)/(phi(x1)/x1))/h, without a derivative or an integral
    (Cui et al. 2023, Elucidating the solution space of extended reverse-time SDE, section 3).

    Args:
        phi: of a float64 tensor of levels, phi(x)/x not decreasing; None is the paper's x (exp(x^0.3) + 10).
    """

    phi: Callable[[Tensor], Tensor] | None = None

    def _log_gain(self, lam: Tensor) -> Tensor:
        """log(phi(x)/x) at x = exp(-lam)."""
        x = torch.exp(-lam)
        if self.phi is None:  # by logarithms: exp(x^0.3) overflows at the start of a rectified flow
            return torch.logaddexp(x**0.3, torch.tensor(math.log(10.0), dtype=torch.float64, device=x.device))
        scale = self.phi(x)
        if not tensor(scale) or scale.numel() not in (1, x.numel()) or scale.ndim > x.ndim:
            got = described(scale)
            raise ValueError(f"NoiseScale: expected phi to return real numbers of shape {tuple(x.shape)}, got {got}")
        return torch.log(scale) + lam

    def at(self, process: GaussianSDE, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            lam = process.lam(t).detach().clone().requires_grad_()
            gain = self._log_gain(lam)
            (slope,) = torch.autograd.grad(gain.sum(), lam) if gain.requires_grad else (torch.zeros_like(lam),)
        return torch.sqrt(torch.clamp(-slope, min=0.0))

    def mean_square(self, process: GaussianSDE, t0: Tensor, t1: Tensor) -> Tensor:
        lam0, lam1 = process.lam(t0), process.lam(t1)
        finite = torch.isfinite(lam0) & torch.isfinite(lam1)
        lam0, lam1 = torch.where(finite, lam0, 0.0), torch.where(finite, lam1, 1.0)
        start, end = self._log_gain(lam0), self._log_gain(lam1)
        # rounding of two logarithms is no noise: its root would be 1e-8
        rounding = 1e-14 * (1 + start.abs() + end.abs() + lam0.abs() + lam1.abs())
        mean = torch.where((start - end).abs() < rounding, 0.0, start - end) / (lam1 - lam0)
        mean = torch.where(finite, mean, 0.0)
        bad = ~(mean >= 0)
        if bool(bad.any()):
            level = float(torch.exp(-lam0[bad].flatten()[0]))
            raise ValueError(
                f"expected a noise scale phi > 0 with phi(x)/x not decreasing (eta^2 >= 0); it decreases, or is not "
                f"finite, in the step from sigma/alpha = {level:g}"
            )
        return mean


class _WithOwnEta(ReverseSDE):
    """The reversal with an `OwnEta`, whose mean square replaces the quadrature."""

    def __init__(self, reverse: ReverseSDE, own: OwnEta) -> None:
        process = reverse.gaussian
        super().__init__(process, reverse.model, lambda t: own.at(process, t))
        self._own = own

    def mean_eta2(self, t0: Time, t1: Time) -> Tensor:
        start, end = torch.broadcast_tensors(as_time(t0), as_time(t1))
        return self._own.mean_square(self.gaussian, start, end)


def check_falling(name: str, grid: Tensor) -> None:
    """Refuse a grid towards noise: a sampler with noise of its own is no flow, which runs both ways."""
    if bool(grid[-1] > grid[0]):
        raise ValueError(
            f"{name} brings noise of its own and runs from noise to data: expected a grid of falling times, got "
            f"{float(grid[0]):g} to {float(grid[-1]):g}"
        )


def with_eta(reverse: ReverseSDE, eta: Eta | OwnEta) -> ReverseSDE:
    """The reversal of the same process by the same model with another eta."""
    if isinstance(eta, OwnEta):
        return _WithOwnEta(reverse, eta)
    return reverse.process.reverse(reverse.model, eta)
