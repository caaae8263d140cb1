"""How a solve marches: along a grid that all samples share, or with a step size per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.noise import Noise
from sdeflow.pid import PID
from sdeflow.sde import Problem, checked_shape
from sdeflow.solution import Solution, State, Stats, Status
from sdeflow.solvers.base import Pair, Solver, per_row


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


class Adaptive:
    """The march of an embedded pair with one time and one step size a sample.

    Rejected samples keep their state; finished and failed ones leave the batch, so that they
    neither cost model calls nor touch the others.
    """

    def __init__(
        self,
        pair: Pair,
        problem: Problem,
        x: Tensor,
        t_span: tuple[float, float],
        control: PID,
        save: Tensor | None,
    ) -> None:
        self._pair, self._control, self._span = pair, control, t_span
        self._start, self._end = (pair.clock(problem, t) for t in t_span)
        self._sign = 1.0 if self._end > self._start else -1.0
        self._problem = self._whole = problem
        batch, device = x.shape[0], x.device

        def per_sample(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        # of all samples, in the caller's order
        # 16-bit states are stepped in float32: their 8 to 11 bits would swallow the increments
        self._dtype = x.dtype
        x = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
        self._x, self._t = x, per_sample(self._start)
        self._status = per_sample(-1, torch.int64)
        self._nfe, self._accepted, self._rejected = (per_sample(0, torch.int64) for _ in range(3))
        self._save = save
        self._saved = (
            None if save is None else torch.full((save.numel(), *x.shape), torch.nan, dtype=x.dtype, device=device)
        )
        self._calls = self._attempts = 0
        # of the samples still in the batch
        self._rows = torch.arange(batch, device=device)
        self._live = torch.ones(batch, dtype=torch.bool, device=device)
        self._y, self._s = x, per_sample(self._start)
        self._k = self._evaluate(self._y, self._s)
        with torch.no_grad():
            self._h = pair.first_step(self._evaluate, control.norm, self._y, self._s, self._k, self._end - self._start)
        self._error = per_sample(1.0)
        if self._saved is not None:
            self._record_start(x)

    # ---- the march

    @property
    def state(self) -> State:
        times = self._pair.time(self._problem, self._clocks())
        return State(self._all_states().to(self._dtype), times, self._attempts, None)

    @property
    def done(self) -> bool:
        return self._rows.numel() == 0

    def advance(self) -> None:
        """One attempted step of every sample in the batch."""
        left = self._end - self._s
        last = self._h >= left.abs() * (1 - 1e-12)
        h = torch.where(last, left, self._sign * self._h)
        y, errors, last_slope, stages = self._pair.attempt(self._evaluate, self._problem, self._y, self._s, h, self._k)
        accept_error = self._pair.size([self._control.norm(e, self._y, y) for e in errors])
        finite = torch.isfinite(accept_error)
        accept = self._live & finite & (accept_error <= 1)
        t = torch.where(last, torch.full_like(self._s, self._end), self._s + h)
        self._attempts += 1
        self._count(accept)
        if self._saved is not None:
            self._record(accept, t, h, stages)

        previous = torch.clamp(self._error, min=1e-4)
        factor = self._control.factor(torch.where(finite, accept_error, 1.0), previous, self._pair.order)
        # a rejected step never grows; a non-finite one says nothing of the error, so it is quartered
        factor = torch.where(accept, factor, torch.clamp(factor, max=1.0))
        factor = torch.where(finite, factor, 0.25)
        self._h = torch.where(accept & last, self._h, h.abs() * factor)
        self._error = torch.where(accept, accept_error, self._error)

        mask = per_row(accept, y)
        self._y = torch.where(mask, y, self._y)
        self._s = torch.where(accept, t, self._s)
        if last_slope is None:  # the pair does not evaluate at its result
            last_slope = self._evaluate(self._y, self._s) if bool(accept.any()) else self._k
        self._k = torch.where(mask, last_slope, self._k)
        self._retire()

    def solution(self) -> Solution:
        return Solution(
            x=self._x.to(self._dtype),
            ts=self._save,
            xs=None if self._saved is None else self._saved.to(self._dtype),
            status=self._status.cpu(),
            stats=Stats(
                nfe=self._nfe.cpu(),
                steps=(self._accepted + self._rejected).cpu(),
                accepted=self._accepted.cpu(),
                rejected=self._rejected.cpu(),
                calls=self._calls,
            ),
        )

    def _evaluate(self, x: Tensor, s: Tensor) -> Tensor:
        """One evaluation of the batch, counted for the samples still running."""
        self._calls += 1
        self._nfe[self._rows] += self._live.to(torch.int64)
        state = x.to(self._dtype)
        return checked_shape(self._pair.evaluate(self._problem, state, s), state, "the drift").to(x.dtype)

    # ---- who is still in the batch

    def _count(self, accept: Tensor) -> None:
        self._accepted[self._rows] += accept.to(torch.int64)
        self._rejected[self._rows] += (self._live & ~accept).to(torch.int64)

    def _retire(self) -> None:
        """Give finished and failed samples their status and let them leave the batch."""
        attempts = (self._accepted + self._rejected)[self._rows]
        underflow = self._h < 1e-14 * max(abs(self._start), abs(self._end))
        stuck = ~torch.isfinite(self._k.detach()).reshape(self._k.shape[0], -1).all(1)
        verdict = torch.full_like(self._rows, -1)
        verdict[attempts >= self._control.max_steps] = Status.STEP_LIMIT
        verdict[underflow] = Status.STEP_UNDERFLOW
        verdict[stuck] = Status.NON_FINITE
        verdict[self._s == self._end] = Status.FINISHED
        ended = self._live & (verdict >= 0)
        if not bool(ended.any()):
            return
        self._status[self._rows[ended]] = verdict[ended]
        self._write_back()
        self._live = self._live & ~ended
        alive = int(self._live.sum())
        keep = 0 if alive == 0 else min(-(-alive // _KEEP) * _KEEP, self._rows.numel())
        if keep == self._rows.numel():
            return
        # the live samples, in order, and enough ended ones to fill the batch
        order = torch.argsort((~self._live).to(torch.int8), stable=True)[:keep].sort().values
        self._rows, self._live = self._rows[order], self._live[order]
        self._y, self._k = self._y[order], self._k[order]
        self._s, self._h, self._error = self._s[order], self._h[order], self._error[order]
        self._problem = self._whole.take(self._rows)

    def _write_back(self) -> None:
        self._x = self._all_states()
        self._t = self._clocks()

    def _all_states(self) -> Tensor:
        rows = self._rows[self._live]
        return self._x if rows.numel() == 0 else self._x.index_copy(0, rows, self._y[self._live])

    def _clocks(self) -> Tensor:
        return self._t.index_copy(0, self._rows[self._live], self._s[self._live])

    # ---- saved times

    def _record_start(self, x: Tensor) -> None:
        assert self._save is not None
        assert self._saved is not None
        self._saved[self._save == self._start] = x

    def _record(self, accept: Tensor, t: Tensor, h: Tensor, stages: list[Tensor]) -> None:
        """Dense output at the saved times that this step passed."""
        assert self._save is not None
        assert self._saved is not None
        passed = accept & (self._s != t)
        inside = [
            (j, at, passed & (self._sign * (at - self._s) > 0) & (self._sign * (t - at) >= 0))
            for j, at in enumerate(self._save.tolist())
        ]
        inside = [(j, at, here) for j, at, here in inside if bool(here.any())]
        if not inside:
            return
        stages = self._pair.dense_stages(self._evaluate, self._y, self._s, h, stages)
        for j, at, here in inside:
            theta = ((at - self._s) / h)[here]
            part = [k[here] for k in stages]
            self._saved[j, self._rows[here]] = self._pair.interpolate(self._y[here], h[here], theta, part)
