"""The solvers of scipy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
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
    needs_tolerance,
    stats_of,
    unsaved,
    verdict,
)
from sdeflow.solvers.base import Stepper

_SCIPY = ("RK23", "RK45", "DOP853", "Radau", "BDF", "LSODA")


@checked_class
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
        raise needs_tolerance(self.name)

    def march(
        self, problem: Problem, x: Tensor, t_span: Span, control: PID, save: Tensor | None, noise: Noise | None = None
    ) -> March:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{self.name} records no gradients: detach x, or use RK45 or Torchdiffeq")
        return _ScipyMarch(self, problem, x, t_span, control, save)


class _ScipyMarch:
    def __init__(
        self, solver: Scipy, problem: Problem, x: Tensor, t_span: Span, control: PID, save: Tensor | None
    ) -> None:
        from scipy import integrate

        self._like, self._span, self._max_steps, self._save = x, t_span, control.max_steps, save
        self._drift = Drift(problem, x, t_span)
        self._attempts = self._accepted = 0
        self._x, self._t = x, t_span[0]
        self._xs = unsaved(save, x)
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
        except NonFiniteStart:
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
        except (NonFiniteStart, ValueError, np.linalg.LinAlgError):
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
            self._status = verdict(self._x, Status.FINISHED)
        return None

    def _fail(self, status: Status) -> None:
        self._status = verdict(self._x, status, self._drift.broken().cpu())

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
        stats = stats_of(self._drift.calls, self._accepted, self._attempts - self._accepted)
        return Solution(x=self._x, ts=self._save, xs=self._xs, status=self._status, stats=stats)
