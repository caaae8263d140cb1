"""The step size controller."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny
"""The least tolerance of a component: 0/0 of one that stays 0 is no error."""


@dataclass(frozen=True)
class PID:
    """Step size control: h <- h clip(safety e^(-b1) e_prev^b2), e the error in units of the tolerance.

    (Soderlind 2003, Digital filters in adaptive time-stepping; the defaults are the PI controller
    of Hairer and Wanner 1996, Solving ODEs II, section IV.2, beta = 0.04 q.)

    Args:
        rtol, atol: the tolerance of a component is atol + rtol |x|, or the larger of the two ("max"); the norm of a
            sample is the root mean square over its components.
        max_steps: attempts a sample may make.
        combine: "sum" or "max".
    """

    rtol: float
    atol: float
    max_steps: int = 100_000
    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0
    proportional: float = 0.7
    integral: float = 0.4
    combine: Literal["sum", "max"] = "sum"

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"expected {name} >= 0, got {value!r}")
        if not self.rtol + self.atol > 0:
            raise ValueError("expected rtol or atol above 0, got 0 for both")
        if not self.max_steps >= 1:
            raise ValueError(f"expected max_steps >= 1, got {self.max_steps!r}")

    def norm(self, error: Tensor, *states: Tensor) -> Tensor:
        """The error of each sample in units of its tolerance, float64 (batch,).

        Carries no gradient: step sizes are choices, not part of the solution map.
        """
        with torch.no_grad():
            return self.size(error, self.allowed(*states))

    def allowed(self, *states: Tensor) -> Tensor:
        """The tolerance of each component, float64 (batch, *event)."""
        size = functools.reduce(torch.maximum, [s.abs() for s in states])
        size = self.rtol * (size if size.dtype == torch.float64 else size.to(torch.float64))
        if self.combine == "max":
            return torch.clamp(size, min=max(self.atol, _TINY))
        both = size + self.atol
        return both if self.atol >= _TINY else torch.clamp(both, min=_TINY)

    def size(self, error: Tensor, allowed: Tensor) -> Tensor:
        """The root mean square of error/allowed over the components of each sample, float64 (batch,)."""
        scaled = (error / allowed).reshape(error.shape[0], -1)  # float64, as `allowed` is
        return (scaled.square().sum(1) / scaled.shape[1]).sqrt()

    def factor(self, error: Tensor, previous: Tensor, order: float) -> Tensor:
        """The factor of the next step after one of `error` (in tolerances), (batch,)."""
        tiny = torch.clamp(error, min=1e-10)
        factor = self.safety * tiny ** (-self.proportional / order) * previous ** (self.integral / order)
        return torch.clamp(factor, self.shrink, self.grow)
