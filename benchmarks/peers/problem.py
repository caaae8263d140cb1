"""What every library is given: a network, a table of betas, start noise, a grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import sdeflow as sf
from benchmarks.overhead import Net, mixture

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
"""DDPM's linear table."""


class Run(NamedTuple):
    """One way to solve: what to call, its model calls, and what differs from the shared problem."""

    call: Callable[[], object]
    nfe: int
    note: str = ""


class Sample(NamedTuple):
    """A run whose end is compared: `zero` if it goes to sigma = 0, else it ends at the first entry of the table."""

    call: Callable[[], Tensor]
    nfe: int
    zero: bool = False


@dataclass(frozen=True)
class Sampling:
    """The probability flow of `net(x, sigma)`, which predicts noise under VP, from x in `steps` steps."""

    net: Net
    x: Tensor
    steps: int

    @property
    def table(self) -> Tensor:
        """rho = sigma/alpha of every entry, ascending."""
        total = torch.cumsum(torch.log1p(-BETAS), 0)
        return torch.sqrt(torch.expm1(-total))

    @property
    def indices(self) -> list[int]:
        """999, 999 - stride, ..., and the first entry, 0: what others call trailing spacing; steps + 1 of them."""
        if len(BETAS) % self.steps:
            raise ValueError(f"expected a number of steps that divides {len(BETAS)}, got {self.steps}")
        return [*range(len(BETAS) - 1, 0, -(len(BETAS) // self.steps)), 0]

    def rhos(self, grid: str = "trailing") -> Tensor:
        """The grid as rho = sigma/alpha, (steps + 1,) descending, float64."""
        first, last = float(self.table[-1]), float(self.table[0])
        if grid == "trailing":
            return self.table[torch.tensor(self.indices)]
        if grid == "logsnr":
            return torch.linspace(math.log(first), math.log(last), self.steps + 1, dtype=torch.float64).exp()
        if grid == "karras":
            root = torch.linspace(first ** (1 / 7), last ** (1 / 7), self.steps + 1, dtype=torch.float64)
            return root**7
        raise ValueError(f"expected trailing, logsnr or karras, got {grid!r}")

    def times(self) -> Tensor:
        """The trailing grid on the clock of `sf.DiscreteVP`."""
        return (torch.tensor(self.indices, dtype=torch.float64) + 1) / len(BETAS)

    def reverse(self, eta: float = 0.0) -> sf.ReverseSDE:
        """The problem as this library states it."""
        process = sf.DiscreteVP(BETAS)
        return process.reverse(sf.Model(self.net, process, "eps", time="sigma", expand=False), eta)


def told(rho: Tensor) -> list[Tensor]:
    """sigma under VP at each rho, as the network is told: 0-d float64 tensors, made before the clock starts."""
    return list((rho / torch.sqrt(1 + rho * rho)).unbind())


def plane(steps: int, batch: int = 256, dtype: torch.dtype = torch.float32) -> Sampling:
    """Eight Gaussians on a circle."""
    x = torch.randn(batch, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Sampling(mixture(dtype=dtype), x.to(dtype), steps)


def ends(p: Sampling) -> tuple[Tensor, Tensor]:
    """The flow's solution from p.x at the first entry of the table and at sigma = 0: classical RK4 by hand, float64.

    With z = x/alpha and rho = sigma/alpha it is dz/d rho = eps: 2000 steps that are equal in log rho, then 50 in rho.
    """

    def f(rho: Tensor, z: Tensor) -> Tensor:
        alpha = torch.rsqrt(1 + rho * rho)
        return p.net(z * alpha, rho * alpha)

    def rk4(z: Tensor, rho: Tensor, half: Tensor) -> Tensor:
        for start, middle, end in zip(rho[:-1], half, rho[1:], strict=True):
            k1 = f(start, z)
            k2 = f(middle, z + 0.5 * (end - start) * k1)
            k3 = f(middle, z + 0.5 * (end - start) * k2)
            k4 = f(end, z + (end - start) * k3)
            z = z + (end - start) / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z

    rho = replace(p, steps=2000).rhos("logsnr")
    with torch.no_grad():
        z = rk4(p.x.double() * torch.sqrt(1 + rho[0] ** 2), rho, 0.5 * (rho[:-1] + rho[1:]))
        first = z / torch.sqrt(1 + rho[-1] ** 2)
        rho = torch.linspace(float(rho[-1]), 0, 51, dtype=torch.float64)
        zero = rk4(z, rho, 0.5 * (rho[:-1] + rho[1:]))
    return first, zero
