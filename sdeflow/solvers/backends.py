"""The ODE solvers of torchdiffeq and scipy behind the library's own call, with its checks, counts and statuses.

Both step the whole batch with one step size, steered by an error norm over the batch: unlike under `RK45`, a sample's
error depends on its batch, and one that fails ends the solve of all. Their arithmetic is in float64 whatever the
state's dtype, so that times are; the drift is called with states of the caller's dtype, and never outside the span.
"""

from __future__ import annotations

import importlib
import math
from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sdeflow.control import PID
from sdeflow.noise import Noise
from sdeflow.sde import Problem
from sdeflow.solution import Solution, State, Stats, Status
from sdeflow.solvers.base import Solver, Stepper, refuse_noise

Span = tuple[float, float]


class March(Protocol):
    """A solve under way, as `iterate` drives it."""

    @property
    def state(self) -> State: ...

    @property
    def done(self) -> bool: ...

    def advance(self) -> None: ...

    def solution(self) -> Solution: ...


class Backend(Solver):
    """A solver of another package, which chooses its own steps."""

    def check(self, problem: Problem) -> None:
        refuse_noise(self.name, problem)

    @abstractmethod
    def march(self, problem: Problem, x: Tensor, t_span: Span, control: PID, save: Tensor | None) -> March:
        """A solve from x (batch, *event) over `t_span` to the tolerance of `control`.

        Args:
            save: times in the span (n,) for dense output; None for none.
        """


def _needs_tolerance(name: str) -> ValueError:
    return ValueError(f"{name} chooses its own steps: expected rtol and atol, got steps or a grid")


class _Drift:
    """The problem's drift, counted, for states and slopes in float64 at times clamped to the span."""

    def __init__(self, problem: Problem, x: Tensor, t_span: Span) -> None:
        self.calls = 0
        self.last: Tensor | None = None
        self._problem, self._shape, self._dtype = problem, x.shape, x.dtype
        self._low, self._high = min(t_span), max(t_span)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        value = self._problem.drift(y.to(self._dtype), t.clamp(self._low, self._high))
        if value.shape != self._shape:
            raise ValueError(f"the drift returned {tuple(value.shape)} for x of shape {tuple(self._shape)}")
        self.last = value.detach()
        return value.to(torch.float64)

    def broken(self) -> Tensor:
        """The samples whose last slope was not finite, bool (batch,)."""
        assert self.last is not None
        return ~torch.isfinite(self.last).reshape(self._shape[0], -1).all(1)

    def check_start(self) -> None:
        """Stop at a first slope that is not finite: a step estimated from it is NaN, for all samples or for ever."""
        if self.calls == 1 and bool(self.broken().any()):
            raise _NonFiniteStart


class _NonFiniteStart(Exception):
    pass


# ---- torchdiffeq

_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")


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
            raise _needs_tolerance(self.name)
        return _TorchdiffeqGrid(self.method, problem, x, grid)

    def march(self, problem: Problem, x: Tensor, t_span: Span, control: PID, save: Tensor | None) -> March:
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
        self._drift = _Drift(problem, x, (float(grid[0]), float(grid[-1])))
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


class _StepLimit(Exception):
    pass


class _Watched:
    """A drift as torchdiffeq takes it, with what it reports of its steps."""

    def __init__(self, drift: _Drift, start: float, x: Tensor, max_steps: int) -> None:
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
            raise _StepLimit

    def callback_accept_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
        self.rejected += 1


class _TorchdiffeqMarch:
    def __init__(
        self, solver: Torchdiffeq, problem: Problem, x: Tensor, t_span: Span, control: PID, save: Tensor | None
    ) -> None:
        self._solver, self._control, self._span, self._save = solver, control, t_span, save
        self._drift = _Drift(problem, x, t_span)
        self._watched = _Watched(self._drift, t_span[0], x.to(torch.float64), control.max_steps)
        self._x = self._start = x
        self._t = t_span[0]
        self._xs = (
            None if save is None else torch.full((save.numel(), *x.shape), torch.nan, dtype=x.dtype, device=x.device)
        )
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
        except _StepLimit:
            return self._fail(Status.STEP_LIMIT)
        except _NonFiniteStart:
            return self._fail(Status.STEP_UNDERFLOW)
        except AssertionError as error:
            if not str(error).startswith(("underflow in dt", "non-finite values in state")):
                raise
            return self._fail(Status.STEP_UNDERFLOW)
        path = path.to(self._start.dtype)
        self._x, self._t = path[-1], end
        if self._xs is not None:
            self._xs = path[[times.index(t) for t in saved]]
        self._status = _verdict(self._x, Status.FINISHED)
        return None

    def _fail(self, status: Status) -> None:
        self._x, self._t = self._watched.x.to(self._start.dtype), self._watched.t
        if self._xs is not None and self._save is not None:
            self._xs[self._save == self._span[0]] = self._start
        self._status = _verdict(self._x, status, self._drift.broken())

    def solution(self) -> Solution:
        assert self._status is not None
        stats = _stats(self._drift.calls, self._watched.accepted, self._watched.rejected)
        return Solution(x=self._x, ts=self._save, xs=self._xs, status=self._status, stats=stats)


def _verdict(x: Tensor, status: Status, broken: Tensor | None = None) -> Tensor:
    """`status` for the samples that are finite and not broken, NON_FINITE for the others."""
    bad = ~torch.isfinite(x.detach()).reshape(x.shape[0], -1).all(1)
    bad = bad if broken is None else bad | broken
    return torch.where(bad, int(Status.NON_FINITE), int(status)).cpu()


def _stats(calls: int, accepted: int, rejected: int) -> Stats:
    return Stats(nfe=calls, steps=accepted + rejected, accepted=accepted, rejected=rejected, calls=calls)


# ---- scipy

_SCIPY = ("RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA")


@dataclass(frozen=True)
class Scipy(Backend):
    """A method of `scipy.integrate.solve_ivp`, step by step: "RK23", "RK45", "DOP853", "Radau", "BDF" or "LSODA".

    The batch is flattened into one system: the step is shared, and the implicit methods (the last three) form the
    dense Jacobian of the whole batch by one call a component: for few and small samples. rtol is not taken below
    100 machine epsilons. Runs on the CPU, whatever the state's device, and records no gradients. Rejected steps are
    reported for the explicit methods; scipy does not tell them for the others.

    Args:
        method: one of the above.
        first_step: the first step's size; None for scipy's estimate.
        max_step: the largest.
    """

    method: str = "RK45"
    first_step: float | None = None
    max_step: float = math.inf

    def __post_init__(self) -> None:
        if self.method not in _SCIPY:
            raise ValueError(f"Scipy: expected one of {', '.join(_SCIPY)}, got {self.method!r}")
        if not (self.max_step > 0 and (self.first_step is None or self.first_step > 0)):
            raise ValueError(f"{self.name}: expected positive step sizes, got {self!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"scipy {self.method}"

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        raise _needs_tolerance(self.name)

    def march(self, problem: Problem, x: Tensor, t_span: Span, control: PID, save: Tensor | None) -> March:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{self.name} records no gradients: detach x, or use RK45 or Torchdiffeq")
        return _ScipyMarch(self, problem, x, t_span, control, save)


class _ScipyMarch:
    def __init__(
        self, solver: Scipy, problem: Problem, x: Tensor, t_span: Span, control: PID, save: Tensor | None
    ) -> None:
        from scipy import integrate

        self._like, self._span, self._max_steps, self._save = x, t_span, control.max_steps, save
        self._drift = _Drift(problem, x, t_span)
        self._attempts = self._accepted = 0
        self._x, self._t = x, t_span[0]
        self._xs = (
            None if save is None else torch.full((save.numel(), *x.shape), torch.nan, dtype=x.dtype, device=x.device)
        )
        if self._xs is not None and save is not None:
            self._xs[save == t_span[0]] = x
        self._status: Tensor | None = None
        options = {} if solver.first_step is None else {"first_step": solver.first_step}
        y = x.detach().to("cpu", torch.float64).reshape(-1).numpy()
        try:
            with np.errstate(all="ignore"):
                self._solver = getattr(integrate, solver.method)(
                    self._slope, t_span[0], y, t_span[1], rtol=max(control.rtol, 100 * np.finfo(float).eps),
                    atol=control.atol, max_step=solver.max_step, **options,
                )  # fmt: skip
        except _NonFiniteStart:
            self._fail(Status.STEP_UNDERFLOW)

    def _slope(self, t: float, y: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            value = self._drift(torch.tensor(t, dtype=torch.float64), self._state_of(y, torch.float64))
        self._drift.check_start()
        return value.cpu().reshape(-1).numpy()

    def _state_of(self, y: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.tensor(y, dtype=torch.float64).reshape(self._like.shape).to(self._like.device, dtype)

    @property
    def state(self) -> State:
        return State(self._x, self._t, self._attempts, None)

    @property
    def done(self) -> bool:
        return self._status is not None

    def advance(self) -> None:
        """One accepted step."""
        solver, before = self._solver, self._drift.calls
        if self._attempts >= self._max_steps:
            return self._fail(Status.STEP_LIMIT)
        try:
            with np.errstate(all="ignore"):
                solver.step()
        except (_NonFiniteStart, ValueError, np.linalg.LinAlgError):
            # the implicit methods factorise what the drift gave them
            if not bool(self._drift.broken().any()):
                raise
            return self._fail(Status.STEP_UNDERFLOW)
        stages = getattr(solver, "n_stages", None)  # of the explicit methods
        self._attempts += 1 if stages is None else (self._drift.calls - before) // stages
        if solver.status == "failed" or not np.isfinite(solver.y).all():  # LSODA goes on with NaN, its norm blind
            return self._fail(Status.STEP_UNDERFLOW)
        self._accepted += 1
        self._record()
        self._x, self._t = self._state_of(solver.y, self._like.dtype), float(solver.t)
        if solver.status == "finished":
            self._status = _verdict(self._x, Status.FINISHED)
        return None

    def _fail(self, status: Status) -> None:
        self._status = _verdict(self._x, status, self._drift.broken().cpu())

    def _record(self) -> None:
        """Dense output at the saved times that this step passed."""
        if self._xs is None or self._save is None:
            return
        low, high = sorted((self._t, float(self._solver.t)))
        inside = [(j, t) for j, t in enumerate(self._save.tolist()) if low <= t <= high and t != self._t]
        if inside:
            dense = self._solver.dense_output()
            for j, t in inside:
                self._xs[j] = self._state_of(dense(t), self._like.dtype)

    def solution(self) -> Solution:
        assert self._status is not None
        stats = _stats(self._drift.calls, self._accepted, self._attempts - self._accepted)
        return Solution(x=self._x, ts=self._save, xs=self._xs, status=self._status, stats=stats)
