"""The march of an SDE to a tolerance: steps per sample that halve intervals of a fixed Brownian path.

Every step is a node of the tree in time (`sdeflow.brownian`): a rejected step is split in two by the conditional law
of its halves, so that a retry sees the same path and rejections do not bias the law. The path of a seed is the one that
a grid of 2^k equal steps sees; what was drawn and not used yet waits in one slot a level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.bridge import Increment, NodeNormals
from sdeflow.brownian import DEPTH, split_halves
from sdeflow.noise import Noise
from sdeflow.pid import PID
from sdeflow.sde import SDE, noise_shape
from sdeflow.solution import Solution, State, Stats, Status
from sdeflow.solvers.base import per_row
from sdeflow.solvers.stochastic import AdaptiveStochasticSolver

_KEEP = 8
"""The batch stays a multiple of this, as in `control.Adaptive`."""


class AdaptivePath:
    """One time, one step and one path a sample.

    Single estimates of a random error can be small by chance: the controller takes one for no less than 4/5 of the
    last, scaled to the new step, and begins at a step of 2^-10 of the span.

    A step is accepted when its error estimate, which is of size h^(3/2), times (span/h)^(3/2 - p) is within
    tolerance, p the method's strong order: the error of the solution is then proportional to the tolerance.
    """

    def __init__(
        self,
        solver: AdaptiveStochasticSolver,
        problem: SDE,
        x: Tensor,
        t_span: tuple[float, float],
        control: PID,
        noise: Noise,
    ) -> None:
        batch, device = x.shape[0], x.device
        self._solver, self._control, self._noise = solver, control, noise
        self._start, self._span = t_span[0], t_span[1] - t_span[0]
        start = torch.tensor(self._start, dtype=torch.float64, device=device)
        self._terms = solver.terms(problem, x, start)
        self._order = solver.order_for(self._terms.kind)
        self._weight = solver.per_unit(self._terms.kind)
        self._dtype = x.dtype
        work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        event = tuple(noise_shape(problem, x, start)[1:])
        self._normals = NodeNormals(noise, 1, event, work, areas=True)
        # of all samples
        self._x = x.to(work)
        self._status = torch.zeros(batch, dtype=torch.int64, device=device)
        self._accepted, self._rejected, self._nfe = (torch.zeros_like(self._status) for _ in range(3))
        self._attempts = 0
        self._t = torch.full((batch,), self._start, dtype=torch.float64, device=device)
        # of the samples still in the batch: node, its increment, the parts that wait by level
        self._rows = torch.arange(batch, device=device)
        self._live = torch.ones(batch, dtype=torch.bool, device=device)
        self._y = self._previous = self._x
        self._level, self._position = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        root = self._normals.root(abs(self._span))
        assert root.h is not None
        self._now = torch.stack([root.w[0], root.h[0]])  # (2, batch, *event)
        self._waiting = self._now.new_zeros((1, *self._now.shape))  # (levels, 2, batch, *event)
        self._h = torch.full((batch,), solver.first_step * abs(self._span), dtype=torch.float64, device=device)
        self._error, self._last = torch.zeros_like(self._h), self._h

    @property
    def state(self) -> State:
        t = self._t.index_copy(0, self._rows[self._live], self._clock()[self._live])
        return State(self._states().to(self._dtype), t, self._attempts, None)

    @property
    def done(self) -> bool:
        return self._rows.numel() == 0

    def advance(self) -> None:
        """One attempted step of every sample in the batch."""
        self._refine()
        length = self._length()
        t, h = per_row(self._clock(), self._y), per_row(length * (1 if self._span > 0 else -1), self._y)
        terms, before = self._terms, self._terms.calls
        w, area = (terms.lift(v, self._y) for v in self._now)
        y, estimate = self._solver.estimate(terms, self._y, t, h.to(self._y.dtype), w, area)
        self._attempts += 1
        self._nfe[self._rows] += (terms.calls - before) * self._live.to(torch.int64)
        lower = y - estimate
        error = self._control.norm(estimate, lower, self._previous)
        error = error * (abs(self._span) / length) ** self._weight
        finite = torch.isfinite(error) & torch.isfinite(y.detach()).reshape(len(y), -1).all(1)
        accept = self._live & finite & (error <= 1)
        self._accepted[self._rows] += accept.to(torch.int64)
        self._rejected[self._rows] += (self._live & ~accept).to(torch.int64)

        # an estimate that is small by chance says little: it counts for no less than 4/5 of the last one, scaled
        expected = 0.8 * self._error * (length / self._last) ** (1.5 - self._weight)
        seen = torch.where(finite, torch.maximum(error, expected), 1.0)
        factor = self._control.factor(seen, self._error.clamp(min=1e-4), self._order)
        # a rejected step is at least halved; a non-finite one says nothing of the error
        factor = torch.where(accept, factor, torch.clamp(factor, max=0.5))
        self._h = torch.where(finite, length * factor, 0.25 * length)
        self._error = torch.where(accept, seen, self._error)
        self._last = torch.where(accept, length, self._last)
        mask = per_row(accept, y)
        self._y, self._previous = torch.where(mask, y, self._y), torch.where(mask, lower, self._previous)
        deepest = self._live & ~accept & (self._level >= DEPTH)
        self._go_on(accept)
        self._retire(deepest, finite)

    # ---- the path

    def _length(self) -> Tensor:
        return abs(self._span) * torch.exp2(-self._level.to(torch.float64))

    def _clock(self) -> Tensor:
        share = self._position.to(torch.float64) * torch.exp2(-self._level.to(torch.float64))
        return self._start + self._span * share

    def _refine(self) -> None:
        """Split the nodes that are longer than the step wanted, their right halves put to wait."""
        while True:
            longer = self._live & (self._length() > self._h * (1 + 1e-9)) & (self._level < DEPTH)
            if not bool(longer.any()):
                return
            level = self._level + longer.to(torch.int64)
            top = int(level.max())
            if top >= len(self._waiting):
                self._waiting = torch.cat(
                    [self._waiting, torch.zeros_like(self._waiting[:1]).expand(top, *self._now.shape)]
                )
            nodes = (self._level + 1, self._position)
            whole = Increment(self._now[0][None], self._now[1][None])
            halves = split_halves(self._normals, nodes, whole, self._length())
            assert halves.h is not None
            left, right = (torch.stack([halves.w[i], halves.h[i]]) for i in (0, 1))
            rows = torch.nonzero(longer).squeeze(1)
            self._waiting[level[rows], :, rows] = right[:, rows].transpose(0, 1)
            mask = longer.reshape(1, -1, *[1] * (self._now.ndim - 2))
            self._now = torch.where(mask, left, self._now)
            self._position = torch.where(longer, 2 * self._position, self._position)
            self._level = level

    def _go_on(self, accept: Tensor) -> None:
        """The next node of the samples that accepted: the right part that waits at the lowest level passed."""
        after = self._position + 1
        up = torch.log2((after & -after).to(torch.float64)).to(torch.int64)
        self._level = torch.where(accept, self._level - up, self._level)
        self._position = torch.where(accept, after >> up, self._position)
        rows = torch.nonzero(accept & (self._level >= 0)).squeeze(1)
        waiting = self._waiting[self._level[rows].clamp(max=len(self._waiting) - 1), :, rows]
        self._now = self._now.clone()
        self._now[:, rows] = waiting.transpose(0, 1)

    # ---- who is still in the batch

    def _retire(self, deepest: Tensor, finite: Tensor) -> None:
        attempts = (self._accepted + self._rejected)[self._rows]
        verdict = torch.full_like(self._rows, -1)
        verdict[attempts >= self._control.max_steps] = Status.STEP_LIMIT
        verdict[deepest] = Status.STEP_UNDERFLOW
        verdict[deepest & ~finite] = Status.NON_FINITE
        verdict[(self._level == 0) & (self._position == 1)] = Status.FINISHED
        ended = self._live & (verdict >= 0)
        if not bool(ended.any()):
            return
        self._status[self._rows[ended]] = verdict[ended]
        self._x, self._t = self._states(), self._t.index_copy(0, self._rows[self._live], self._clock()[self._live])
        self._live = self._live & ~ended
        alive = int(self._live.sum())
        keep = 0 if alive == 0 else min(-(-alive // _KEEP) * _KEEP, self._rows.numel())
        if keep == self._rows.numel():
            return
        order = torch.argsort((~self._live).to(torch.int8), stable=True)[:keep].sort().values
        for name in ("_rows", "_live", "_y", "_previous", "_level", "_position", "_h", "_error", "_last"):
            setattr(self, name, getattr(self, name)[order])
        self._now, self._waiting = self._now[:, order], self._waiting[:, :, order]
        self._terms, self._normals = self._terms.take(order), self._normals.take(order)

    def _states(self) -> Tensor:
        rows = self._rows[self._live]
        return self._x if rows.numel() == 0 else self._x.index_copy(0, rows, self._y[self._live])

    def solution(self) -> Solution:
        accepted, rejected = self._accepted.cpu(), self._rejected.cpu()
        return Solution(
            x=self._x.to(self._dtype),
            ts=None,
            xs=None,
            status=self._status.cpu(),
            stats=Stats(self._nfe.cpu(), accepted + rejected, accepted, rejected, calls=self._terms.calls),
            seed=self._noise.seed,
        )
