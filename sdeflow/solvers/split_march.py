"""`GaussianSplit` to a tolerance in data units: variable steps, variable order, one size and history a sample.

With y = x/alpha, s = sigma/alpha, v an eigenvalue of C, z = (y - mean)/sqrt(v + s^2), and the clock
c = log(1 + b/s), b^2 the mean of v, the flow is

    dz/dc = w rho,   w = exp(c)/b (1 + v/s^2)^(-3/2),

rho the residual of `sdeflow.solvers.gaussian_split`. The clock is log(1/s) for little noise, where rho has the
structure of the data; it is b/s for much noise, where rho is a power series in 1/s, and finite at alpha = 0. rho is
interpolated through its last k nodes by Newton's formula, and the step refitted with the evaluation at its end
(predict, evaluate, correct: one call a step):

    z_pred = z + sum_{i<k} m_i rho[0..i],   z_corr = z_pred + m_k rho[new, 0..k-1],
    m_i = int w prod_{j<i} (c - c_j) dc,

with divided differences rho[...], c_0 the newest node. z is constant on the flow of N(mean, C) and ends as
(x_0 - mean)/sqrt(v): an error dz of a step is, to first order, an error sqrt(v) dz of x at t = 0, and that is what is
held against the tolerance (of x/alpha at the end, sqrt(v + s^2) dz, where some noise is left). The next size follows
from the same integral: the predicted error of a step h is |sqrt(v) rho[0..k]| m_k(h), so that the known change of w
along the step costs no rejections.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.model import row_of
from sdeflow.pid import PID
from sdeflow.quadrature import gauss_legendre
from sdeflow.reverse import ReverseSDE
from sdeflow.solution import Solution, State, Stats, Status
from sdeflow.times import align

_POINTS = 32
_KEEP = 8
"""The batch stays a multiple of this, as in `control.Adaptive`."""
_SHARE = 1.3
"""What the estimate, the error of the predictor, may be in tolerances: the corrected step errs less. Chosen once, with
_AIM, so that the median error at t = 0 of the exact problems is in [0.1, 1] tolerances."""
_AIM = 0.6
"""The predicted estimate that a step size is chosen for, in those shares."""
_LEAP = 0.85
"""The part of the next step that a last step may take without a call: it is not corrected."""
_SLOPE = 0.3
"""The least that the first slope of rho on the clock is taken for, in deviations of the data."""
_FLOOR = 0.01
"""The least eigenvalue, in their mean: C says that errors along smaller ones vanish, and C may miss directions."""
_GROW, _SHRINK = 4.0, 0.1
_LEAST = 1e-10
"""The least step of the clock."""


class SplitMarch:
    """The march of `GaussianSplit` to a tolerance: one time, one step, one history a sample.

    A sample's tolerance is atol + rtol sqrt(mean of v): rtol is relative to the standard deviation of the data, as C
    says it. The error is the root mean square over components. Rejected steps keep the history; finished and
    failed samples leave the batch.

    Args:
        reverse: a probability flow (eta = 0).
        mean: (D,) float64, D the components of an event.
        variance: (1,) or (D,) float64, in the axes; not all 0.
        axes: (D, D), or None for those of the components.
        order: nodes of the predictor, at most.
        control: rtol, atol and max_steps are read.
        save: times for dense output.

    Raises:
        ValueError: the start has no noise.
    """

    def __init__(
        self,
        reverse: ReverseSDE,
        x: Tensor,
        t_span: tuple[float, float],
        *,
        mean: Tensor,
        variance: Tensor,
        axes: Tensor | None,
        order: int,
        control: PID,
        save: Tensor | None,
    ) -> None:
        batch, device = x.shape[0], x.device
        self._reverse = self._whole = reverse
        self._process, self._order, self._control, self._span = reverse.gaussian, order, control, t_span
        self._event, self._dtype = x.shape[1:], x.dtype
        work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        self._variance = variance.to(device)
        self._mean = mean.to(device, work)
        self._axes = None if axes is None else axes.to(device, work)
        self._unit = float(variance.mean().sqrt())
        self._allowed = _SHARE * (control.atol + control.rtol * self._unit)
        self._begin, self._goal = (float(self._clock(t)) for t in t_span)
        if self._begin == torch.inf:
            raise ValueError(f"GaussianSplit starts at noise, got sigma = 0 at t = {t_span[0]:g}")
        self._variance = self._variance.clamp(min=_FLOOR * self._unit**2)
        least = self._unit / math.expm1(max(self._begin, self._goal))  # the noise at the data's end
        self._scale = torch.sqrt(self._variance + least**2)
        self._sign = 1.0 if self._goal > self._begin else -1.0

        def per_sample(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        # of all samples, in the caller's order
        self._x, self._ended_t = x.to(work), per_sample(t_span[0])
        self._status = per_sample(-1, torch.int64)
        self._nfe, self._accepted, self._rejected = (per_sample(0, torch.int64) for _ in range(3))
        self._save = save
        self._saved = None
        if save is not None:
            self._saved = torch.full((save.numel(), *x.shape), torch.nan, dtype=work, device=device)
            self._saved[save == t_span[0]] = self._x
        self._calls = self._attempts = 0
        # of the samples still in the batch
        self._rows = torch.arange(batch, device=device)
        self._live = torch.ones(batch, dtype=torch.bool, device=device)
        self._t, self._c = per_sample(t_span[0]), per_sample(self._begin)
        alpha, sigma = (f(self._t)[:, None] for f in (self._process.alpha, self._process.sigma))
        centred = self._into(self._x.flatten(1) - alpha.to(work) * self._mean)
        self._z = centred / torch.sqrt(alpha**2 * self._variance + sigma**2).to(work)
        residual = self._evaluate(self._z, self._t)
        self._count = per_sample(1, torch.int64)
        kept = max(order, 2)
        self._nodes = [self._c] * kept  # newest first; those beyond the count are not used
        self._differences = [residual, *[torch.zeros_like(residual)] * (kept - 1)]
        # sqrt(v) |rho[0..k]|, k the count: at first as if rho had grown from 0 at c = 0
        slope = self._units(residual) / self._begin if self._begin > 0 else torch.zeros_like(self._units(residual))
        self._error_of = slope.clamp(min=_SLOPE * self._unit**2)
        self._h = self._first_step()
        self._retire(~torch.isfinite(residual.detach()).all(1))

    # ---- the march

    @property
    def state(self) -> State:
        x = self._x if self._attempts == 0 else self._states()
        return State(x.to(self._dtype), self._times(), self._attempts, None)

    @property
    def done(self) -> bool:
        return self._rows.numel() == 0

    def advance(self) -> None:
        """One attempted step of every sample in the batch; a last step predicted well enough follows without a call."""
        left = (self._goal - self._c).abs()
        last = 1.1 * self._h >= left
        h = torch.where(last, left, self._h)
        c = torch.where(last, self._goal, self._c + self._sign * h)
        t = torch.where(last, self._span[1], self._time(c))
        moments = self._moments(self._c, c, self._nodes)
        predicted = self._z + self._newton(moments, self._differences, self._count)
        residual = self._evaluate(predicted, t)
        fresh = self._refitted(c, residual)
        highest, weight = self._pick(fresh, self._count), self._pick(moments, self._count)
        coefficient = self._units(highest)
        error = self._size(coefficient, weight)
        finite = torch.isfinite(error)
        accept = self._live & finite & (error <= 1)
        self._attempts += 1
        self._accepted[self._rows] += accept.to(torch.int64)
        self._rejected[self._rows] += (self._live & ~accept).to(torch.int64)
        self._record(accept, t, highest)

        mask = accept[:, None]
        self._z = torch.where(mask, predicted + weight.to(predicted.dtype) * highest, self._z)
        self._t, self._c = torch.where(accept, t, self._t), torch.where(accept, c, self._c)
        nodes = [c, *self._nodes[:-1]]
        self._nodes = [torch.where(accept, new, old) for new, old in zip(nodes, self._nodes, strict=True)]
        self._differences = [
            torch.where(mask, new, old) for new, old in zip(fresh[:-1], self._differences, strict=True)
        ]
        more = accept & (self._count < self._order)
        self._count = self._count + more.to(torch.int64)
        # a difference of one order more than seen yet: exp(c) has the k-th difference 1/k!
        unseen = torch.where(more, 1 / self._count.to(torch.float64), 1.0)[:, None]
        self._error_of = torch.where(finite[:, None], coefficient * unseen, self._error_of)
        size = self._next_step(h)
        # a rejected step never grows; a non-finite one says nothing of the error, so it is quartered
        size = torch.where(accept, size, torch.minimum(size, 0.9 * h))
        self._h = torch.where(finite, size, 0.25 * h)
        self._leap(accept)
        self._retire(self._live & ~finite & (self._h < _LEAST))

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

    # ---- one step

    def _evaluate(self, z: Tensor, t: Tensor) -> Tensor:
        """rho at z and times t, (batch, D) in the axes; one call, counted for the samples running."""
        self._calls += 1
        self._nfe[self._rows] += self._live.to(torch.int64)
        x = self._state_of(z, t).reshape(-1, *self._event).to(self._dtype)
        at = align(t, x)
        v = self._reverse.model.value(x, at, row_of("v", self._process, at)).to(z.dtype).flatten(1)
        alpha, sigma = (f(t)[:, None] for f in (self._process.alpha, self._process.sigma))
        square, flat = alpha**2 + sigma**2, x.to(z.dtype).flatten(1)
        x0 = (alpha / square).to(z.dtype) * flat - (sigma / square).to(z.dtype) * v
        eps = (sigma / square).to(z.dtype) * flat + (alpha / square).to(z.dtype) * v
        slope = self._variance * (alpha / sigma)
        return self._into(x0 - self._mean) - slope.to(z.dtype) * self._into(eps)

    def _moments(self, start: Tensor, end: Tensor, nodes: list[Tensor]) -> list[Tensor]:
        """m_0 to m_k, k the nodes: int w prod_{j<i} (c - c_j) dc from start to end (batch,), (batch, 1 or D)."""
        points, rule = (v.to(start.device) for v in gauss_legendre(_POINTS))
        h = (end - start)[:, None]
        at = start[:, None] + h * points
        value = (h * rule)[..., None] * self._weight(at)
        moments = [value.sum(1)]
        for node in nodes:
            value = value * (at - node[:, None])[..., None]
            moments.append(value.sum(1))
        return moments

    def _weight(self, c: Tensor) -> Tensor:
        """w at clocks c (...), (..., 1 or D)."""
        inverse = torch.expm1(c) / self._unit  # 1/s
        total = 1 + self._variance * inverse.square()[..., None]
        return (torch.exp(c) / self._unit)[..., None] / (total * total.sqrt())

    def _newton(self, moments: list[Tensor], differences: list[Tensor], count: Tensor) -> Tensor:
        """sum_{i < count} m_i rho[0..i], (batch, D)."""
        total = moments[0].to(differences[0].dtype) * differences[0]
        for i in range(1, len(differences)):
            weight = torch.where((count > i)[:, None], moments[i], 0.0)
            total = total + weight.to(differences[i].dtype) * differences[i]
        return total

    def _refitted(self, c: Tensor, residual: Tensor) -> list[Tensor]:
        """rho[new], rho[new, 0], ... to one order more than the nodes kept; those of unused nodes are 0."""
        fresh = [residual]
        for i, (node, old) in enumerate(zip(self._nodes, self._differences, strict=True)):
            gap = torch.where(c == node, 1.0, c - node)[:, None].to(residual.dtype)
            fresh.append(torch.where((self._count > i)[:, None], (fresh[-1] - old) / gap, 0.0))
        return fresh

    def _pick(self, values: list[Tensor], which: Tensor) -> Tensor:
        """Row by row, the value of the order asked for."""
        return torch.stack(values)[which, torch.arange(which.numel(), device=which.device)]

    # ---- sizes

    def _units(self, difference: Tensor) -> Tensor:
        """sqrt(v) |difference|, float64 (batch, D); with one v its root mean square over components, (batch, 1)."""
        size = difference.detach().to(torch.float64)
        if self._variance.numel() == 1:
            size = size.square().mean(1, keepdim=True).sqrt()
        return self._scale * size.abs()

    def _size(self, coefficient: Tensor, weight: Tensor) -> Tensor:
        """The error at t = 0 of weight times a difference of that size, in what is allowed, (batch,)."""
        return (coefficient * weight).square().mean(1).sqrt() / self._allowed

    def _first_step(self) -> Tensor:
        """By the Gaussian model's slope of rho, and no further than to twice the data's deviation."""
        near = math.log1p(0.5) - self._c
        most = near.clamp(min=0.1) if self._sign > 0 else torch.full_like(near, 0.1)
        return self._solved(most, 1e-3 * most, most, 6)

    def _next_step(self, h: Tensor) -> Tensor:
        return self._solved(h, _SHRINK * h, _GROW * h, 3)

    def _solved(self, h: Tensor, least: Tensor, most: Tensor, rounds: int) -> Tensor:
        """The step whose predicted error is the aim, by iteration from h."""
        for _ in range(rounds):
            end = self._c + self._sign * h.clamp(max=20.0)
            weight = self._pick(self._moments(self._c, end, self._nodes), self._count)
            error = self._size(self._error_of, weight)
            factor = (_AIM / error.clamp(min=1e-12)) ** (1 / (self._count + 1).to(torch.float64))
            h = torch.minimum(torch.maximum(h * factor, least), most)
        return h

    def _leap(self, accept: Tensor) -> None:
        """The last step without a call, for the samples whose predicted error allows it."""
        left = (self._goal - self._c).abs()
        leap = accept & (left > 0)
        if self._goal < torch.inf:
            leap = leap & (_LEAP * self._h >= left)
        else:
            # to s = 0 with rho held; as it settles like s^2, it changes by its last change times s0^2/(s1^2 - s0^2)
            back = self._c - self._nodes[1]
            settle = torch.clamp(1 / ((torch.expm1(self._c) / torch.expm1(self._nodes[1])) ** 2 - 1), min=1.0) * back
            change = self._units(self._differences[1]) * settle[:, None]
            leap = leap & (self._size(change, self._held(self._goal)) <= _AIM)
        if not bool(leap.any()):
            return
        self._record(leap, torch.full_like(self._t, self._span[1]), None)
        self._z = torch.where(leap[:, None], self._z + self._leapt(self._goal), self._z)
        self._t = torch.where(leap, self._span[1], self._t)
        self._c = torch.where(leap, self._goal, self._c)
        self._accepted[self._rows] += leap.to(torch.int64)

    def _leapt(self, c: float) -> Tensor:
        """The change of z from here to c in a last step without a call."""
        if self._goal == torch.inf:
            return self._held(c).to(self._z.dtype) * self._differences[0]
        moments = self._moments(self._c, torch.full_like(self._c, c), self._nodes)
        return self._newton(moments, self._differences, self._count)

    def _held(self, c: float) -> Tensor:
        """int w dc from here to c, (batch, 1 or D)."""
        here, there = (
            self._variance + (self._unit / torch.expm1(at)).square()[:, None]
            for at in (self._c, torch.full_like(self._c, c))
        )
        return 1 / torch.sqrt(there) - 1 / torch.sqrt(here)

    def _clock(self, t: float | Tensor) -> Tensor:
        """c at time t."""
        return torch.log1p(self._unit * torch.exp(self._process.lam(t)))

    def _time(self, c: Tensor) -> Tensor:
        """The times of clocks c."""
        return self._process.time_of_lam(torch.log(torch.expm1(c) / self._unit))

    # ---- states

    def _state_of(self, z: Tensor, t: Tensor) -> Tensor:
        """x (batch, D) from z at times t."""
        alpha, sigma = (f(t)[:, None] for f in (self._process.alpha, self._process.sigma))
        root = torch.sqrt(alpha**2 * self._variance + sigma**2).to(z.dtype)
        return self._out(z * root) + alpha.to(z.dtype) * self._mean

    def _into(self, flat: Tensor) -> Tensor:
        return flat if self._axes is None else flat @ self._axes

    def _out(self, flat: Tensor) -> Tensor:
        return flat if self._axes is None else flat @ self._axes.T

    def _states(self) -> Tensor:
        rows = self._rows[self._live]
        if rows.numel() == 0:
            return self._x
        x = self._state_of(self._z[self._live], self._t[self._live]).reshape(-1, *self._event)
        return self._x.index_copy(0, rows, x)

    def _times(self) -> Tensor:
        return self._ended_t.index_copy(0, self._rows[self._live], self._t[self._live])

    # ---- who is still in the batch

    def _retire(self, stuck: Tensor) -> None:
        """Give finished and failed samples their status and let them leave the batch."""
        attempts = (self._accepted + self._rejected)[self._rows]
        verdict = torch.full_like(self._rows, -1)
        verdict[attempts >= self._control.max_steps] = Status.STEP_LIMIT
        verdict[self._h < _LEAST] = Status.STEP_UNDERFLOW
        verdict[stuck] = Status.NON_FINITE
        verdict[self._c == self._goal] = Status.FINISHED
        ended = self._live & (verdict >= 0)
        if not bool(ended.any()):
            return
        self._status[self._rows[ended]] = verdict[ended]
        self._x, self._ended_t = self._states(), self._times()
        self._live = self._live & ~ended
        alive = int(self._live.sum())
        keep = 0 if alive == 0 else min(-(-alive // _KEEP) * _KEEP, self._rows.numel())
        if keep == self._rows.numel():
            return
        # the live samples, in order, and enough ended ones to fill the batch
        order = torch.argsort((~self._live).to(torch.int8), stable=True)[:keep].sort().values
        for name in ("_rows", "_live", "_z", "_t", "_c", "_count", "_h", "_error_of"):
            setattr(self, name, getattr(self, name)[order])
        self._nodes = [v[order] for v in self._nodes]
        self._differences = [v[order] for v in self._differences]
        self._reverse = self._whole.take(self._rows)

    # ---- saved times

    def _record(self, accept: Tensor, t: Tensor, highest: Tensor | None) -> None:
        """Dense output at the saved times that a step to t passed: the integral of the interpolant to there."""
        if self._saved is None or self._save is None:
            return
        way = self._span[1] - self._span[0]
        for j, at in enumerate(self._save.tolist()):
            here = accept & ((at - self._t) * way > 0) & ((t - at) * way >= 0)
            if not bool(here.any()):
                continue
            c = float(self._clock(at))
            if highest is None:
                z = self._z + self._leapt(c)
            else:
                moments = self._moments(self._c, torch.full_like(self._c, c), self._nodes)
                z = self._z + self._newton(moments, self._differences, self._count)
                z = z + self._pick(moments, self._count).to(z.dtype) * highest
            x = self._state_of(z, torch.full_like(self._t, at)).reshape(-1, *self._event)
            self._saved[j, self._rows[here]] = x[here]
