"""Methods for the law alone: weak order 2 for any noise, without iterated integrals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdeflow.calculus import NoiseKind
from sdeflow.noise import WEAK, Noise
from sdeflow.sde import SDE, Problem, noise_shape
from sdeflow.solvers.base import Stepper
from sdeflow.solvers.stochastic import GridRun, H, StochasticSolver, Terms, root, size


@dataclass(frozen=True)
class PlatenWeak2(StochasticSolver):
    """Platen's explicit method of weak order 2, for any noise (Kloeden and Platen 1992, section 15.1, equation 1.3).

        x' = x + 1/2 (f(y) + f) h
             + 1/4 sum_j [G_j(R+_j) + G_j(R-_j) + 2 G_j + sum_(r != j) (G_j(U+_r) + G_j(U-_r) - 2 G_j)] W_j
             + 1/4 sum_j [(G_j(R+_j) - G_j(R-_j)) (W_j^2 - h)
                          + sum_(r != j) (G_j(U+_r) - G_j(U-_r)) (W_j W_r + V_rj)] / sqrt(h),

    y = x + f h + G W, R+-_j = x + f h +- G_j sqrt(h), both at t + h, U+-_r = x +- G_r sqrt(h) at t; V_rj = +-h with
    equal chances for r < j, V_jr = -V_rj. W is Gaussian, of the driving path, so the method is also of strong order
    1/2 (1 for noise that commutes: there V cancels). Two drifts a step; 3 diffusions for diagonal and scalar noise, 2
    for additive, 1 + 4 m for others.
    """

    name = "PlatenWeak2"
    strong: ClassVar[float] = 0.5

    def order_for(self, kind: NoiseKind) -> float:
        return 0.5 if kind == "general" else 1.0

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        assert isinstance(problem, SDE)
        assert noise is not None
        return _WeakRun(self, problem, x, grid, noise)

    def step(
        self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None, v: Tensor | None = None
    ) -> Tensor:
        f, g = terms.drift(x, t), terms.diffusion(x, t)
        moved = x + h * f
        new = x + 0.5 * h * (terms.drift(moved + terms.apply(g, w), t + h) + f)
        if terms.kind == "additive":
            return new + 0.5 * terms.apply(g + terms.diffusion(x, t + h), w)
        r, length = root(h), size(h)
        if terms.kind in ("diagonal", "scalar"):
            ahead, behind = terms.diffusion(moved + r * g, t + h), terms.diffusion(moved - r * g, t + h)
            return new + 0.25 * ((ahead + behind + 2 * g) * w + (ahead - behind) * (w * w - length) / r)
        assert v is not None
        return new + self._general(terms, x, moved, t, h, g, w.flatten(1), v)

    def _general(
        self, terms: Terms, x: Tensor, moved: Tensor, t: Tensor, h: H, g: Tensor, w: Tensor, v: Tensor
    ) -> Tensor:
        diagonal = terms.problem.noise == "diagonal"
        r, length = root(h), size(h)

        def matrix(y: Tensor, s: Tensor) -> Tensor:
            """G as (*x.shape, m)."""
            value = terms.diffusion(y, s)
            return torch.diag_embed(value.expand(x.shape).flatten(1)).reshape(*x.shape, -1) if diagonal else value

        columns = matrix(x, t)
        lead = [1] * (x.ndim - 1)

        def against(value: Tensor) -> Tensor:
            """One number a sample against x."""
            return value.reshape(-1, *lead)

        total = torch.zeros_like(x)
        for k, column in enumerate(columns.unbind(-1)):
            ahead, behind = matrix(moved + r * column, t + h)[..., k], matrix(moved - r * column, t + h)[..., k]
            own = w[:, k]
            total = total + (ahead + behind + 2 * column) * against(own)
            total = total + (ahead - behind) * (against(own**2) - length) / r
            up, down = matrix(x + r * column, t), matrix(x - r * column, t)
            # the terms of G_j along G_r, j != r
            others = torch.ones(w.shape[1], dtype=x.dtype, device=x.device)
            others[k] = 0
            second = (up + down - 2 * columns) * (w * others).reshape(len(w), *lead, -1)
            cross = w * own[:, None] + v[:, k]
            first = (up - down) * (cross * others).reshape(len(w), *lead, -1)
            total = total + (second + first / (r.unsqueeze(-1) if isinstance(r, Tensor) else r)).sum(-1)
        return 0.25 * total


class _WeakRun(GridRun):
    """The run, with the two-point variables V (batch, m, m)."""

    def __init__(self, solver: PlatenWeak2, problem: SDE, x: Tensor, grid: Tensor, noise: Noise) -> None:
        super().__init__(solver, problem, x, grid, noise)
        self._platen = solver
        self._draw: Callable[[int], Tensor] | None = None
        if self._terms.kind in ("commutative", "general"):
            m = math.prod(noise_shape(problem, x, grid[0])[1:])
            self._draw = noise.sequence(WEAK, grid.numel() - 1, (m, m), self._work)

    def _advance(self, i: int, x: Tensor) -> Tensor:
        if self._draw is None:
            return super()._advance(i, x)
        upper = torch.triu(torch.where(self._draw(i) < 0, -1.0, 1.0).to(self._work), diagonal=1)
        v = (upper - upper.mT) * abs(self._steps[i])
        return self._platen.step(self._terms, x, self._times[i], self._steps[i], self._walk(i).w, None, v)
