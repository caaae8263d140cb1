"""Dense output: states at given times, interpolated inside the steps that passed them."""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.attempt import Step
from sdeflow.solvers.base import Evaluate, Interpolant


class DenseOutput:
    """States at the clocks `at` (n,), in that order; NaN where a sample never came.

    Steps wait in a list and are looked through together, so that the host asks once for several of them.

    Args:
        inside: the states inside a step.
        at: clocks to save.
        x: start states (batch, *event).
        start, sign: the march's first clock, and its direction as +-1.
    """

    def __init__(self, inside: Interpolant, at: Tensor, x: Tensor, start: float, sign: float) -> None:
        self._inside, self._at, self._sign = inside, at, sign
        self._sorted, self._order = torch.sort(sign * at.to(x.device))
        self.values = torch.full((at.numel(), *x.shape), torch.nan, dtype=x.dtype, device=x.device)
        self.values[at == start] = x
        self._waiting: list[tuple[int, Step]] = []

    def add(self, attempt: int, step: Step) -> None:
        """Keep a step until `flush`."""
        self._waiting.append((attempt, step))

    def flush(self, rows: Tensor, evaluate: Evaluate) -> list[int]:
        """Interpolate in the steps that wait, of the samples `rows`; the attempts for which it had to evaluate."""
        if not self._waiting:
            return []
        # the saved clocks in (s, to] are those from `low` up to `high` of the sorted ones
        low, high = (
            torch.searchsorted(self._sorted, self._sign * torch.stack([getattr(step, end) for _, step in waiting]),
                               right=True)
            for waiting in [self._waiting] for end in ("s", "to")
        )  # fmt: skip
        passed = torch.where(torch.stack([step.accept for _, step in self._waiting]), high - low, 0)
        totals: list[int] = passed.sum(1).tolist()
        asked = []
        for (attempt, step), first, count, total in zip(self._waiting, low, passed, totals, strict=True):
            if total:
                asked.append(attempt)
                self._save(step, rows, evaluate, first, count, total)
        self._waiting = []
        return asked

    def _save(self, step: Step, rows: Tensor, evaluate: Evaluate, first: Tensor, count: Tensor, total: int) -> None:
        """Every pair of a sample and a clock that it passed in this step, in one interpolation."""
        stages = self._inside.stages(evaluate, step.y, step.s, step.step, step.stages)
        who = torch.repeat_interleave(torch.arange(len(count), device=count.device), count, output_size=total)
        before = torch.cumsum(count, 0) - count
        place = first[who] + torch.arange(total, device=count.device) - before[who]
        h = step.step[who]
        theta = (self._sign * self._sorted[place] - step.s[who]) / h
        state = self._inside.state(step.y[who], h, theta, [k[who] for k in stages])
        self.values[self._order[place], rows[who]] = state
