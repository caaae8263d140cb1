"""Problems with known solutions, and the states to start them from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sdeflow.problems import GaussianMixture
from sdeflow.sde import ODE, SDE

F64 = torch.float64


class Counted:
    """Counts the calls of its drift."""

    calls = 0


class Curved(Counted, ODE):
    """x = phi(e^(-t/2) R(2 t + sin t) w_0 + c(t)), phi(y) = (y_1, y_2 + y_1^2/2): nonlinear and non-autonomous."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        t = t.to(x.dtype)
        first, second = x[..., 0], x[..., 1] - 0.5 * x[..., 0] ** 2
        turn = 2 + torch.cos(t)
        u, v = first - 0.3 * torch.sin(3 * t), second - 0.2 * torch.cos(2 * t)
        du = -0.5 * u - turn * v + 0.9 * torch.cos(3 * t)
        dv = -0.5 * v + turn * u - 0.4 * torch.sin(2 * t)
        return torch.stack([du, dv + first * du], -1)

    @staticmethod
    def exact(x: Tensor, t: float) -> Tensor:
        """The solution at t from x at 0."""
        u, v = x[..., 0], x[..., 1] - 0.5 * x[..., 0] ** 2 - 0.2
        angle, decay = 2 * t + math.sin(t), math.exp(-0.5 * t)
        a = decay * (math.cos(angle) * u - math.sin(angle) * v) + 0.3 * math.sin(3 * t)
        b = decay * (math.sin(angle) * u + math.cos(angle) * v) + 0.2 * math.cos(2 * t)
        return torch.stack([a, b + 0.5 * a**2], -1)


class Constant(Counted, ODE):
    """x' = c."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, self.rate)


class Drifting(Counted, SDE):
    """dX = c dt + g dW."""

    def __init__(self, rate: float, size: float) -> None:
        self.rate, self.size = rate, size

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, self.rate)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, self.size)


class Well(Counted, SDE):
    """dX = (X - X^3 + cos 3t) dt + 0.7 (1 + sin(3t)/2) dW."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return x - x * x * x + torch.cos(3 * t).to(x.dtype)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * (1 + 0.5 * torch.sin(3 * t)).to(x.dtype) * torch.ones_like(x)


class Tanh(Counted, SDE):
    """X = tanh(W/2 + artanh x)."""

    def __init__(self, interpretation: Any = "ito") -> None:
        self.interpretation = interpretation

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return -0.25 * x * (1 - x * x) if self.interpretation == "ito" else torch.zeros_like(x)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (1 - x * x)

    def exact(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(0.5 * w + torch.atanh(x))


class Geometric(Counted, SDE):
    """X = x exp((a - b^2/2) t + b W), or x exp(a t + b W) in Stratonovich's sense; a = 0.6, b = 0.8."""

    def __init__(self, interpretation: Any = "ito") -> None:
        self.interpretation = interpretation

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return 0.6 * x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.8 * x

    def rate(self) -> float:
        """The drift of log X."""
        return 0.6 - (0.32 if self.interpretation == "ito" else 0.0)

    def exact(self, x: Tensor, w: Tensor) -> Tensor:
        return x * torch.exp(self.rate() + 0.8 * w)


MIXTURE = GaussianMixture(
    [[0.9, -0.4], [-0.7, 0.8], [0.2, 0.5]],
    [[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.05], [-0.05, 0.6]], [[0.35, 0.1], [0.1, 0.25]]],
    [0.5, 0.3, 0.2],
)


def states(rows: int, width: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(rows, width, dtype=F64, generator=torch.Generator().manual_seed(seed))
