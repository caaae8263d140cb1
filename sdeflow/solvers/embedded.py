"""Embedded Runge-Kutta pairs, stepped per sample by `sdeflow.control.Adaptive`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.sde import Problem
from sdeflow.solvers.base import Evaluate, Norm, per_row
from sdeflow.solvers.tableaus import Coefficient, SparseRow, Tableau, sparse_row


@dataclass(frozen=True)
class RungeKuttaPair:
    """The pair of a tableau with an error estimate; its clock is time."""

    tableau: Tableau

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def dense(self) -> RungeKuttaInterpolant | None:
        return None if self.tableau.dense is None else RungeKuttaInterpolant(self.tableau)

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
        table, step = self.tableau.sparse, per_row(h, x)
        step = step if step.dtype == x.dtype else step.to(x.dtype)
        stages, y, times = [k], x, clocks(s, h, table.c)
        for at, row in zip(times[1:], table.a[1:], strict=True):
            y = x + step * weighted(row, stages)
            stages.append(evaluate(y, at))
        last = stages[-1] if self.tableau.first_same_as_last else None
        if last is None:
            y = x + step * weighted(table.b, stages)
        return y, [step * weighted(row, stages) for row in table.error], last, stages

    def size(self, norms: list[Tensor]) -> Tensor:
        if len(norms) == 1:
            return norms[0]
        high, low = norms
        scale = torch.sqrt(high**2 + 0.01 * low**2)
        return torch.where(scale > 0, high**2 / scale, scale)


@dataclass(frozen=True)
class RungeKuttaInterpolant:
    """y(s + theta h) = x + h sum_i b_i(theta) k_i, of a tableau that has the polynomials b_i."""

    tableau: Tableau

    def stages(self, evaluate: Evaluate, x: Tensor, s: Tensor, h: Tensor, stages: list[Tensor]) -> list[Tensor]:
        table, step, stages = self.tableau.sparse, per_row(h, x).to(x.dtype), list(stages)
        for at, row in zip(clocks(s, h, table.extra_c), table.extra_a, strict=True):
            stages.append(evaluate(x + step * weighted(row, stages), at))
        return stages

    def state(self, x: Tensor, h: Tensor, theta: Tensor, stages: list[Tensor]) -> Tensor:
        dense = self.tableau.sparse.dense
        assert dense is not None
        powers = [theta ** (p + 1) for p in range(max(p for row in dense for p, _ in row) + 1)]
        value = torch.zeros_like(x)
        for row, k in zip(dense, stages, strict=True):
            if row:
                value = value + per_row(h * weighted(row, powers), x).to(x.dtype) * k
        return x + value


def clocks(s: Tensor, h: Tensor, shares: tuple[float, ...]) -> tuple[Tensor, ...]:
    """s + c h for each share c."""
    if not shares:
        return ()
    return (s + torch.tensor(shares, dtype=h.dtype, device=h.device)[:, None] * h).unbind()


def weighted(row: SparseRow, stages: list[Tensor]) -> Tensor:
    """sum_j w_j stages_j over the (j, w_j) of a row, elementwise: the same bits whatever the batch."""
    (first, weight), *rest = row
    total = weight * stages[first]
    for j, w in rest:
        total = torch.add(total, stages[j], alpha=w)
    return total


def combine(weights: Sequence[Coefficient], stages: list[Tensor]) -> Tensor:
    """sum_j weights_j stages_j over the stages there are."""
    return weighted(sparse_row(weights[: len(stages)]), stages)
