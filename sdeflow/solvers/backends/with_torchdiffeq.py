"""The solvers of torchdiffeq."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.noise import Noise
from sdeflow.pid import PID
from sdeflow.sde import Problem
from sdeflow.solution import Solution, State, Status
from sdeflow.solvers.backends.shared import (
    Backend,
    Drift,
    March,
    NonFiniteStart,
    Span,
    StepLimit,
    needs_tolerance,
    stats_of,
    unsaved,
    verdict,
)
from sdeflow.solvers.base import Stepper

_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")


@checked_class
@dataclass(frozen=True)
class Torchdiffeq(Backend):
    """A method of torchdiffeq (Chen et al. 2018, Neural ODEs): `pip install 'sdeflow[peers]'`.

    "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun" solve to rtol and atol, in one go: `iterate` yields the
    start and the end, and a solve that fails has no saved states but the start. "euler", "midpoint", "heun2",
    "heun3", "rk4" (the 3/8 rule) step on a grid. Its Adams methods are not offered: they use the weights of equal
    steps on any grid (`AdamsBashforth` has the right ones). Gradients flow through the solve.

    Called by itself, torchdiffeq steps past the end and interpolates back, and probes for its first step wherever that
    leads; here steps end with the span, and the probe is clamped to it.

    Args:
        method: one of the above.
        first_step: the first step's size; None for torchdiffeq's estimate, two calls.
        min_step, max_step: bounds of the size; a step of min_step is taken whatever its error.
        safety, ifactor, dfactor: of the controller: h <- h clip(safety e^(-1/order), dfactor, ifactor).
    """

    method: str = "dopri5"
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2

    def __post_init__(self) -> None:
        if self.method not in _ADAPTIVE + _FIXED:
            raise ValueError(f"Torchdiffeq: expected one of {', '.join(_ADAPTIVE + _FIXED)}, got {self.method!r}")
        given = [f.name for f in fields(self) if f.name != "method" and getattr(self, f.name) != f.default]
        if given and not self.adaptive:
            raise ValueError(f"{self.name} steps on a grid: {', '.join(given)} belong to the adaptive methods")
        positive = [self.max_step, self.safety, self.ifactor, self.dfactor]
        if not (
            all(v > 0 for v in positive) and self.min_step >= 0 and (self.first_step is None or self.first_step > 0)
        ):
            raise ValueError(f"{self.name}: expected positive step sizes and factors, got {self!r}")
        if not (self.safety <= 1 and self.dfactor < 1 <= self.ifactor and self.min_step <= self.max_step):
            raise ValueError(  # a refused step that does not shrink is refused for ever
                f"{self.name}: expected safety <= 1, dfactor < 1 <= ifactor and min_step <= max_step, got {self!r}"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"torchdiffeq {self.method}"

    @property
    def adaptive(self) -> bool:
        """Whether it solves to a tolerance; otherwise it steps on a grid."""
        return self.method in _ADAPTIVE

    def check(self, problem: Problem) -> None:
        super().check(problem)
        _torchdiffeq()

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        if self.adaptive:
            raise needs_tolerance(self.name)
        return _TorchdiffeqGrid(self.method, problem, x, grid)

    def march(
        self, problem: Problem, x: Tensor, t_span: Span, control: PID, save: Tensor | None, noise: Noise | None = None
    ) -> March:
        if not self.adaptive:
            raise ValueError(f"{self.name} has no error estimate: expected steps or grid, got rtol/atol")
        return _TorchdiffeqMarch(self, problem, x, t_span, control, save)


def _torchdiffeq() -> Any:
    try:
        return importlib.import_module("torchdiffeq")
    except ImportError as error:
        raise ImportError("Torchdiffeq needs torchdiffeq: pip install 'sdeflow[peers]'") from error


class _TorchdiffeqGrid:
    def __init__(self, method: str, problem: Problem, x: Tensor, grid: Tensor) -> None:
        self._odeint, self._method = _torchdiffeq().odeint, method
        self._drift = Drift(problem, x, (float(grid[0]), float(grid[-1])))
        self._grid = grid.to(x.device)

    @property
    def calls(self) -> int:
        return self._drift.calls

    def step(self, i: int, x: Tensor) -> Tensor:
        # as a plain function: torchdiffeq would look for callbacks that these methods do not have
        ends = self._odeint(
            lambda t, y: self._drift(t, y), x.to(torch.float64), self._grid[i : i + 2], method=self._method
        )
        return ends[-1].to(x.dtype)


class _Watched:
    """A drift as torchdiffeq takes it, with what it reports of its steps."""

    def __init__(self, drift: Drift, start: float, x: Tensor, max_steps: int) -> None:
        self.accepted = self.rejected = 0
        self.t, self.x = start, x
        self._drift, self._max_steps = drift, max_steps

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        value = self._drift(t, y)
        self._drift.check_start()
        return value

    def callback_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        self.t, self.x = float(t), y
        if self.accepted + self.rejected >= self._max_steps:
            raise StepLimit

    def callback_accept_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        self.rejected += 1


class _TorchdiffeqMarch:
    def __init__(
        self, solver: Torchdiffeq, problem: Problem, x: Tensor, t_span: Span, control: PID, save: Tensor | None
    ) -> None:
        self._solver, self._control, self._span, self._save = solver, control, t_span, save
        self._drift = Drift(problem, x, t_span)
        self._watched = _Watched(self._drift, t_span[0], x.to(torch.float64), control.max_steps)
        self._x = self._start = x
        self._t = t_span[0]
        self._xs = unsaved(save, x)
        self._status: Tensor | None = None

    @property
    def state(self) -> State:
        return State(self._x, self._t, self._watched.accepted + self._watched.rejected, None)

    @property
    def done(self) -> bool:
        return self._status is not None

    def advance(self) -> None:
        """The whole solve."""
        start, end = self._span
        saved = [] if self._save is None else self._save.tolist()
        times = sorted({start, end, *saved}, reverse=start > end)
        ts = torch.tensor(times, dtype=torch.float64, device=self._start.device)
        chosen = {f.name: getattr(self._solver, f.name) for f in fields(self._solver) if f.name != "method"}
        try:
            path = _torchdiffeq().odeint(
                self._watched, self._start.to(torch.float64), ts, rtol=self._control.rtol, atol=self._control.atol,
                method=self._solver.method, options={**chosen, "step_t": ts[-1:]},
            )  # fmt: skip
        except StepLimit:
            return self._fail(Status.STEP_LIMIT)
        except NonFiniteStart:
            return self._fail(Status.STEP_UNDERFLOW)
        except AssertionError as error:
            if not str(error).startswith(("underflow in dt", "non-finite values in state")):
                raise
            return self._fail(Status.STEP_UNDERFLOW)
        path = path.to(self._start.dtype)
        self._x, self._t = path[-1], end
        if self._xs is not None:
            self._xs = path[[times.index(t) for t in saved]]
        self._status = verdict(self._x, Status.FINISHED)
        return None

    def _fail(self, status: Status) -> None:
        self._x, self._t = self._watched.x.to(self._start.dtype), self._watched.t
        if self._xs is not None and self._save is not None:
            self._xs[self._save == self._span[0]] = self._start
        self._status = verdict(self._x, status, self._drift.broken())

    def solution(self) -> Solution:
        assert self._status is not None
        stats = stats_of(self._drift.calls, self._watched.accepted, self._watched.rejected)
        return Solution(x=self._x, ts=self._save, xs=self._xs, status=self._status, stats=stats)
