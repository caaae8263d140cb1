"""Embedded Runge-Kutta pairs, stepped per sample by `sdeflow.control.Adaptive`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.sde import Problem
from sdeflow.solvers.base import Evaluate, Norm, per_row
from sdeflow.solvers.tableaus import Coefficient, Tableau


@dataclass(frozen=True)
class RungeKuttaPair:
    """The pair of a tableau with an error estimate; its clock is time."""

    tableau: Tableau

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def dense(self) -> bool:
        return self.tableau.dense is not None

    def clock(self, problem: Problem, t: float) -> float:
        return t

    def time(self, problem: Problem, s: Tensor) -> Tensor:
        return s

    def evaluate(self, problem: Problem, x: Tensor, s: Tensor) -> Tensor:
        return problem.drift(x, per_row(s, x))

    def first_step(self, evaluate: Evaluate, norm: Norm, x: Tensor, s: Tensor, k: Tensor, span: float) -> Tensor:
        """Hairer, Norsett and Wanner 1993, Solving ODEs I, section II.4; one evaluation."""
        length = abs(span)
        d0, d1 = norm(x, x), norm(k, x)
        guess = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6 * length, 0.01 * d0 / d1).clamp(max=length)
        guess = torch.where(torch.isfinite(guess), guess, 1e-6 * length)
        step = guess if span > 0 else -guess
        slope = evaluate(x + per_row(step, x).to(x.dtype) * k, s + step)
        most = torch.maximum(d1, norm(slope - k, x) / guess)
        flat = torch.clamp(1e-3 * guess, min=1e-6 * length)
        h = torch.where(most <= 1e-15, flat, (0.01 / most) ** (1 / self.order))
        h = torch.minimum(100 * guess, h).clamp(max=length)
        return torch.where(torch.isfinite(h), h, 1e-6 * length)

    def attempt(
        self, evaluate: Evaluate, problem: Problem, x: Tensor, s: Tensor, h: Tensor, k: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]:
        table, step = self.tableau, per_row(h, x).to(x.dtype)
        stages, y = [k], x
        for c, row in zip(table.c[1:], table.a[1:], strict=True):
            y = x + step * combine(row, stages)
            stages.append(evaluate(y, s + float(c) * h))
        last = stages[-1] if table.first_same_as_last else None
        if last is None:
            y = x + step * combine(table.b, stages)
        errors = [step * combine(row, stages) for row in (table.b_error, table.b_error_low) if row is not None]
        return y, errors, last, stages

    def size(self, norms: list[Tensor]) -> Tensor:
        if len(norms) == 1:
            return norms[0]
        high, low = norms
        scale = torch.sqrt(high**2 + 0.01 * low**2)
        return torch.where(scale > 0, high**2 / scale, scale)

    def dense_stages(self, evaluate: Evaluate, x: Tensor, s: Tensor, h: Tensor, stages: list[Tensor]) -> list[Tensor]:
        stages, step = list(stages), per_row(h, x).to(x.dtype)
        for c, row in zip(self.tableau.extra_c, self.tableau.extra_a, strict=True):
            stages.append(evaluate(x + step * combine(row, stages), s + float(c) * h))
        return stages

    def interpolate(self, x: Tensor, h: Tensor, theta: Tensor, stages: list[Tensor]) -> Tensor:
        assert self.tableau.dense is not None
        value = torch.zeros_like(x)
        for row, k in zip(self.tableau.dense, stages, strict=True):
            weight = torch.zeros_like(theta)
            for p, c in enumerate(row):
                weight = weight + float(c) * theta ** (p + 1)
            value = value + per_row(h * weight, x).to(x.dtype) * k
        return x + value


def combine(weights: Sequence[Coefficient], stages: list[Tensor]) -> Tensor:
    """sum_j weights_j stages_j, elementwise: the same bits whatever the batch."""
    total: Tensor | None = None
    for w, k in zip(weights, stages, strict=False):
        if w != 0:
            total = float(w) * k if total is None else torch.add(total, k, alpha=float(w))
    assert total is not None
    return total
