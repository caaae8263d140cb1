"""How a solve marches: along a grid that all samples share, or with a step size per sample."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sdeflow.attempt import Attempt, Progress, Step, finite
from sdeflow.compiled import compiled_step, evaluated
from sdeflow.dense import DenseOutput
from sdeflow.noise import Noise
from sdeflow.pid import PID
from sdeflow.sde import Problem
from sdeflow.solution import Solution, State, Stats, Status
from sdeflow.solvers.base import Pair, Solver, Stepper
from sdeflow.solvers.embedded import RungeKuttaPair


class FixedGrid:
    """The march over a grid: step i from grid[i] to grid[i + 1], all samples together."""

    def __init__(
        self, solver: Solver, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None, save: list[int]
    ) -> None:
        self._stepper = solver.stepper(problem, x, grid, noise)
        self._grid, self._times = grid, grid.tolist()
        self._save = set(save)
        self._kept = {0: x} if 0 in self._save else {}
        self._noise = noise
        self._x, self._i = x, 0

    @property
    def stepper(self) -> Stepper:
        """What makes the steps."""
        return self._stepper

    @property
    def saved(self) -> list[int]:
        """The grid's indices whose states are saved, in order."""
        return sorted(self._save)

    @property
    def grid(self) -> Tensor:
        """float64 (steps + 1,)."""
        return self._grid

    @property
    def state(self) -> State:
        return State(self._x, self._times[self._i], self._i, len(self._times) - 1)

    @property
    def done(self) -> bool:
        return self._i == len(self._times) - 1

    def advance(self) -> None:
        self._x = self._stepper.step(self._i, self._x)
        self._i += 1
        if self._i in self._save:
            self._kept[self._i] = self._x

    def solution(self) -> Solution:
        finite = torch.isfinite(self._x.detach()).reshape(self._x.shape[0], -1).all(1)
        calls = self._stepper.calls
        return Solution(
            x=self._x,
            ts=self._grid[list(self._kept)] if self._save else None,
            xs=torch.stack(list(self._kept.values())) if self._kept else None,
            status=torch.where(finite, int(Status.FINISHED), int(Status.NON_FINITE)),
            stats=Stats(nfe=calls, steps=self._i, accepted=self._i, rejected=0, calls=calls),
            seed=None if self._noise is None else self._noise.seed,
        )


_KEEP = 8
"""Finished samples leave the batch in such numbers that it stays a multiple of this: matrix
products then use the same kernel, so that who finishes first does not change the others' bits."""

_UNSEEN = 8
"""Attempts at most between two looks of the host at who has ended."""


class Adaptive:
    """The march of an embedded pair with one time and one step size a sample.

    Rejected samples keep their state; finished and failed ones are frozen at once, and leave the batch when the host
    next looks, so that they neither cost model calls nor touch the others. It looks after 1, 2, 4 and then every 8
    attempts, and oftener towards the end: no later than after half of the steps that the slowest sample would
    still take at its present size. A compiled step keeps the batch together.
    """

    def __init__(
        self,
        pair: Pair,
        problem: Problem,
        x: Tensor,
        t_span: tuple[float, float],
        control: PID,
        save: Tensor | None,
        compiled: bool = False,
    ) -> None:
        self._compiled = compiled_step(pair, problem, save is not None) if compiled else None
        start, end = (pair.clock(problem, t) for t in t_span)
        self._pair, self._control = pair, control
        self._attempt = Attempt(pair, control, start, end, x.device)
        self._problem = self._whole = problem
        batch, device = x.shape[0], x.device

        def per_sample(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        # 16-bit states are stepped in float32: their 8 to 11 bits would swallow the increments
        self._dtype = x.dtype
        x = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
        self._save = save
        self._dense = None
        if save is not None:
            assert pair.dense is not None
            self._dense = DenseOutput(pair.dense, save, x, start, 1.0 if end > start else -1.0)
        self._calls = 0
        s, running = per_sample(start), per_sample(True, torch.bool)
        k = self._evaluate(x, s)
        if compiled and (x.requires_grad or k.requires_grad):
            raise ValueError(
                "compiled=True records no gradients: solve under torch.no_grad(), or with compiled=False, or with "
                'gradient="adjoint"'
            )
        with torch.no_grad():
            h = pair.first_step(self._evaluate, control.norm, x, s, k, end - start)
        self._cost = [self._calls]
        """Evaluations before the first attempt, and of each attempt: all who still ran took part in them."""
        # of the samples still in the batch, and of all in the caller's order as they were when somebody last left
        self._rows = torch.arange(batch, device=device)
        self._now = Progress(
            x, s, k, h, per_sample(1.0), running, per_sample(0, torch.int64), per_sample(0, torch.int64)
        )
        self._all = self._now
        self._status = per_sample(-1, torch.int64)
        self._running, self._unseen, self._look = batch, 0, 1

    # ---- the march

    @property
    def state(self) -> State:
        reached = self._merged()
        return State(reached.y.to(self._dtype), self._pair.time(self._whole, reached.s), self._attempts, None)

    @property
    def done(self) -> bool:
        return self._running == 0

    @property
    def _attempts(self) -> int:
        return len(self._cost) - 1

    def advance(self) -> None:
        """One attempted step of every sample in the batch."""
        before = self._calls
        step: Step | None
        if self._compiled is None:
            self._now, step = self._attempt(self._evaluate, self._problem, self._now)
        else:
            keep = self._dense is not None
            self._now, step = self._compiled(self._attempt, self._problem, self._now, self._dtype, keep)
            assert isinstance(self._pair, RungeKuttaPair)
            self._calls += len(self._pair.tableau.c) - 1
        self._cost.append(self._calls - before)
        if self._dense is not None and step is not None:
            self._dense.add(self._attempts, step)
        self._unseen += 1
        if self._unseen >= self._look or self._attempts == self._control.max_steps:
            self._review()

    def solution(self) -> Solution:
        reached = self._merged()
        steps, accepted = reached.steps.cpu(), reached.accepted.cpu()
        return Solution(
            x=reached.y.to(self._dtype),
            ts=self._save,
            xs=None if self._dense is None else self._dense.values.to(self._dtype),
            status=self._status.cpu(),
            stats=Stats(
                nfe=torch.tensor(list(itertools.accumulate(self._cost)))[steps],
                steps=steps,
                accepted=accepted,
                rejected=steps - accepted,
                calls=self._calls,
            ),
        )

    def _evaluate(self, x: Tensor, s: Tensor) -> Tensor:
        """One evaluation of the batch."""
        self._calls += 1
        return evaluated(self._pair, self._problem, self._dtype, x, s)

    # ---- who is still in the batch

    def _review(self) -> None:
        """See who has ended since the last look: give them a status and let them leave the batch."""
        if self._dense is not None:
            before = self._calls
            asked = self._dense.flush(self._rows, self._evaluate)
            for attempt in asked:
                self._cost[attempt] += (self._calls - before) // len(asked)
        now, smallest = self._now, self._attempt.smallest
        # nobody fails of too short a step before so many attempts that divide it by 5
        to_end = (self._attempt.end - now.s).abs() / now.h / 2
        to_end = torch.minimum(to_end, torch.log(now.h / smallest) / math.log(1 / self._control.shrink))
        longest = torch.where(now.running, to_end, 0.0).amax()
        count, attempts_left = torch.stack([now.running.sum(), longest]).tolist()
        running, out_of_steps = int(count), self._attempts >= self._control.max_steps
        self._unseen, self._look = 0, max(1, min(2 * self._look, _UNSEEN, int(min(attempts_left, _UNSEEN))))
        if running == self._running and not out_of_steps:
            return
        self._running = 0 if out_of_steps else running
        self._status = self._status.index_copy(0, self._rows, self._verdict(out_of_steps))
        keep = min(-(-self._running // _KEEP) * _KEEP, self._rows.numel())
        if keep < self._rows.numel() and self._compiled is None:  # a compiled step is of one batch size
            self._leave(keep)

    def _verdict(self, out_of_steps: bool) -> Tensor:
        """The status of each sample of the batch, -1 while it runs. The frozen are what they were when they ended."""
        now = self._now
        verdict = torch.full_like(self._rows, int(Status.STEP_UNDERFLOW))
        verdict = torch.where(finite(now.k), verdict, int(Status.NON_FINITE))
        verdict = torch.where(now.s == self._attempt.end, int(Status.FINISHED), verdict)
        return torch.where(now.running, int(Status.STEP_LIMIT) if out_of_steps else -1, verdict)

    def _leave(self, keep: int) -> None:
        """Shrink the batch to the running samples, in order, and enough ended ones to fill it."""
        self._all = self._merged()
        if keep == 0:
            order = self._rows[:0]
        else:
            order = torch.argsort((~self._now.running).to(torch.int8), stable=True)[:keep].sort().values
        self._rows = self._rows[order]
        self._now = Progress(*(value[order] for value in self._now))
        self._problem = self._whole.take(self._rows)

    def _merged(self) -> Progress:
        """All samples as they are now, in the caller's order."""
        return Progress(
            *(whole.index_copy(0, self._rows, part) for whole, part in zip(self._all, self._now, strict=True))
        )
