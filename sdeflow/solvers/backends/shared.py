"""What the other packages' solvers have in common: the march they run, the problem as they call it, the verdict."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from sdeflow.noise import Noise
from sdeflow.pid import PID
from sdeflow.sde import Problem
from sdeflow.solution import Solution, State, Stats, Status
from sdeflow.solvers.base import Solver, refuse_noise

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
    """A solver of another package, which to a tolerance chooses its own steps."""

    def check(self, problem: Problem) -> None:
        refuse_noise(self.name, problem)

    @abstractmethod
    def march(
        self, problem: Problem, x: Tensor, t_span: Span, control: PID, save: Tensor | None, noise: Noise | None = None
    ) -> March:
        """A solve from x (batch, *event) over `t_span` to the tolerance of `control`.

        Args:
            save: times in the span (n,) to save; None for none.
            noise: of a problem that has some; None for a fresh seed.
        """


def needs_tolerance(name: str) -> ValueError:
    return ValueError(f"{name} chooses its own steps: expected rtol and atol, got steps or a grid")


class Drift:
    """The problem's drift, counted, for states and slopes of dtype `work` at times clamped to the span."""

    def __init__(self, problem: Problem, x: Tensor, t_span: Span, work: torch.dtype = torch.float64) -> None:
        self.calls = 0
        self.last: Tensor | None = None
        self._problem, self._shape, self._dtype, self._work = problem, x.shape, x.dtype, work
        self._low, self._high = min(t_span), max(t_span)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        value = self._problem.drift(y.to(self._dtype), t.clamp(self._low, self._high))
        if value.shape != self._shape:
            raise ValueError(f"the drift returned {tuple(value.shape)} for x of shape {tuple(self._shape)}")
        self.last = value.detach()
        return value.to(self._work)

    def broken(self) -> Tensor:
        """The samples whose last slope was not finite, bool (batch,)."""
        assert self.last is not None
        return ~torch.isfinite(self.last).reshape(self._shape[0], -1).all(1)

    def check_start(self) -> None:
        """Stop at a first slope that is not finite: a step estimated from it is NaN, for all samples or for ever."""
        if self.calls == 1 and bool(self.broken().any()):
            raise NonFiniteStart


class NonFiniteStart(Exception):
    """The first slope is not finite."""


class StepLimit(Exception):
    """More attempts than allowed."""


def verdict(x: Tensor, status: Status, broken: Tensor | None = None) -> Tensor:
    """`status` for the samples that are finite and not broken, NON_FINITE for the others."""
    bad = ~torch.isfinite(x.detach()).reshape(x.shape[0], -1).all(1)
    bad = bad if broken is None else bad | broken
    return torch.where(bad, int(Status.NON_FINITE), int(status)).cpu()


def unsaved(save: Tensor | None, x: Tensor) -> Tensor | None:
    """The states to be saved (n, *x.shape), NaN until they are reached; None when none are."""
    return None if save is None else torch.full((save.numel(), *x.shape), torch.nan, dtype=x.dtype, device=x.device)


def stats_of(calls: int, accepted: int, rejected: int) -> Stats:
    return Stats(nfe=calls, steps=accepted + rejected, accepted=accepted, rejected=rejected, calls=calls)
