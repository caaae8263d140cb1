"""Coordinates on all of the line for the components of a process with a domain."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Chart:
    """z with x = x(z) on all of the line, and its first two derivatives; componentwise."""

    def __init__(self, domain: tuple[float, float]) -> None:
        self.low, self.high = domain

    def state(self, z: Tensor) -> Tensor:
        """x(z)."""
        if math.isinf(self.low) and math.isinf(self.high):
            return z
        if math.isinf(self.high):
            return self.low + torch.exp(z)
        if math.isinf(self.low):
            return self.high - torch.exp(z)
        return self.low + (self.high - self.low) * torch.sigmoid(z)

    def place(self, x: Tensor) -> Tensor:
        """z(x)."""
        if math.isinf(self.low) and math.isinf(self.high):
            return x
        if math.isinf(self.high):
            return torch.log(x - self.low)
        if math.isinf(self.low):
            return torch.log(self.high - x)
        share = (x - self.low) / (self.high - self.low)
        return torch.log(share) - torch.log1p(-share)

    def slopes(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(x', x'')."""
        if math.isinf(self.low) and math.isinf(self.high):
            return torch.ones_like(z), torch.zeros_like(z)
        if math.isinf(self.high):
            return torch.exp(z), torch.exp(z)
        if math.isinf(self.low):
            return -torch.exp(z), -torch.exp(z)
        p = torch.sigmoid(z)
        first = (self.high - self.low) * p * (1 - p)
        return first, first * (1 - 2 * p)

    def coefficients(self, z: Tensor, f: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """(drift (n, d), D (n, d, d)) of z from those of x, by Ito's formula."""
        first, second = self.slopes(z)
        own = spread.diagonal(dim1=1, dim2=2)
        drift = (f - 0.5 * own * second / first**2) / first
        return drift, spread / (first.unsqueeze(-1) * first.unsqueeze(-2))
