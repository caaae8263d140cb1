"""Gauss-Legendre quadrature in float64, and kernels as integrals of the coefficients."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=8)
def gauss_legendre(points: int) -> tuple[Tensor, Tensor]:
    """(nodes, weights) of the rule with that many points on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return torch.from_numpy(0.5 * (nodes + 1)), torch.from_numpy(0.5 * weights)


class CumulativeKernel:
    """alpha = exp(A), A = int f, and sigma = alpha sqrt(V), V = int g^2 exp(-2A), from t0.

    Integrals up to the panel's edge are tabulated once; the rest of the way is one 16-point rule.
    Panels shrink towards t0 (cubic), where diffusion coefficients are least smooth.
    """

    PANELS, POINTS = 96, 16

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        g: Callable[[Tensor], Tensor],
        t0: float,
        t1: float,
    ) -> None:
        self.f, self.g = f, g
        share = torch.linspace(0, 1, self.PANELS + 1, dtype=torch.float64) ** 3
        self.edges = t0 + (t1 - t0) * share
        zero = torch.zeros(1, dtype=torch.float64)
        left, right = self.edges[:-1], self.edges[1:]
        self.drift_at_edge = torch.cat([zero, self._drift_over(left, right).cumsum(0)])
        pieces = self._variance_over(left, right, self.drift_at_edge[:-1])
        self.variance_at_edge = torch.cat([zero, pieces.cumsum(0)])

    def _drift_over(self, start: Tensor, end: Tensor) -> Tensor:
        nodes, weights = (v.to(start.device) for v in gauss_legendre(self.POINTS))
        h = (end - start).unsqueeze(-1)
        return (h * weights * self.f(start.unsqueeze(-1) + h * nodes)).sum(-1)

    def _variance_over(self, start: Tensor, end: Tensor, drift_at_start: Tensor) -> Tensor:
        nodes, weights = (v.to(start.device) for v in gauss_legendre(self.POINTS))
        h = (end - start).unsqueeze(-1)
        s = start.unsqueeze(-1) + h * nodes
        drift = drift_at_start.unsqueeze(-1) + self._drift_over(start.unsqueeze(-1).expand_as(s), s)
        return (h * weights * self.g(s) ** 2 * torch.exp(-2 * drift)).sum(-1)

    def _integrals(self, t: Tensor) -> tuple[Tensor, Tensor]:
        edges = self.edges.to(t.device)
        panel = torch.clamp(torch.searchsorted(edges, t.detach().contiguous(), right=True) - 1, 0, self.PANELS - 1)
        start = edges[panel]
        drift_at_start = self.drift_at_edge.to(t.device)[panel]
        drift = drift_at_start + self._drift_over(start, t)
        variance = self.variance_at_edge.to(t.device)[panel] + self._variance_over(start, t, drift_at_start)
        return drift, variance

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._integrals(t)[0])

    def sigma(self, t: Tensor) -> Tensor:
        drift, variance = self._integrals(t)
        return torch.exp(drift) * torch.sqrt(variance)
