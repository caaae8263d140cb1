"""Strang splitting of a linear drift, whose flow is exact."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdeflow.calculus import NoiseKind
from sdeflow.checked import checked_class, numbers
from sdeflow.sde import SDE
from sdeflow.solvers.stochastic import H, StochasticSolver, Terms
from sdeflow.solvers.stratonovich import StochasticHeun


@checked_class
@dataclass(frozen=True, eq=False)
class Splitting(StochasticSolver):
    """Strang splitting for a stiff or oscillating linear part: dx = A x dt + (f - A x) dt + G dW.

    Half a step of the linear flow exp(A h/2), a step of `inner` on the rest, half a step of the flow. (Strang 1968;
    Foster, dos Reis and Strange 2023, High order splitting methods for SDEs.) The flow is exact, so the step is bound
    by the rest alone; orders as `inner`, up to strong 1 and weak 2.

    Args:
        linear: A: a number, a tensor of the event's shape (diagonal A), or a matrix (D, D), D the components of a
            sample; the same at all times.
        inner: a one-step method for SDEs that draws nothing but its path (not LevyMilstein, PlatenWeak2);
            `StochasticHeun` unless given.
    """

    linear: Any
    inner: StochasticSolver = field(default_factory=StochasticHeun)
    areas: ClassVar[bool] = True

    def __post_init__(self) -> None:
        linear = numbers(self.linear, "linear")
        if not bool(torch.isfinite(linear).all()):
            raise ValueError(f"Splitting: expected a finite linear part, got {self.linear!r}")
        if not isinstance(self.inner, StochasticSolver):
            raise TypeError(f"Splitting: expected a one-step method for SDEs as inner, got {self.inner!r}")
        if isinstance(self.inner, Splitting) or type(self.inner).stepper is not StochasticSolver.stepper:
            raise ValueError(
                f"Splitting: expected an inner method of (W, H) alone, such as StochasticHeun, Milstein or SRA1, "
                f"got {self.inner.name}"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"Splitting({self.inner.name})"

    @property
    def form(self) -> str:  # type: ignore[override]
        return self.inner.form

    @property
    def fits(self) -> tuple[NoiseKind, ...]:  # type: ignore[override]
        return self.inner.fits

    @property
    def strong(self) -> float:  # type: ignore[override]
        return min(self.inner.strong, 1.0)

    def order_for(self, kind: NoiseKind) -> float:
        return min(self.inner.order_for(kind), 1.0)

    def step(self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None) -> Tensor:
        assert isinstance(terms, _Rest)
        return terms.flow(h, self.inner.step(terms, terms.flow(h, x), t, h, w, area))

    def terms(self, problem: SDE, x: Tensor, t: Tensor) -> Terms:
        return _Rest(super().terms(problem, x, t), torch.as_tensor(self.linear, dtype=torch.float64), x)


class _Rest(Terms):
    """The terms without the linear part of the drift, and its flow over half steps."""

    def __init__(self, terms: Terms, linear: Tensor, x: Tensor) -> None:
        self.__dict__.update(terms.__dict__)
        size = x[0].numel()
        self._matrix = linear.shape == (size, size) and linear.shape != x.shape[1:]
        if not self._matrix and not _broadcasts(linear.shape, x.shape[1:]):
            raise ValueError(
                f"Splitting: expected a linear part that is a number, of the event's shape {tuple(x.shape[1:])}, or a "
                f"matrix ({size}, {size}), got shape {tuple(linear.shape)}"
            )
        self._linear = linear.to(x.device)
        # in the dtype of the steps
        self._part = self._linear.to(x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32)
        self._h: H = 0.0
        self._half = self._part

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return super().drift(x, t) - self._times(self._part, x)

    def flow(self, h: H, x: Tensor) -> Tensor:
        """exp(A h/2) x; kept for as long as h is the same to rounding."""
        if isinstance(h, Tensor):
            raise ValueError("Splitting: expected steps shared by the batch")
        if abs(h - float(self._h)) > 1e-12 * abs(h):
            scaled = self._linear * (0.5 * h)
            self._half = (torch.linalg.matrix_exp(scaled) if self._matrix else torch.exp(scaled)).to(x.dtype)
            self._h = h
        return self._times(self._half, x)

    def _times(self, a: Tensor, x: Tensor) -> Tensor:
        if not self._matrix:
            return a * x
        # a product a sample, of two samples at least: others round by the size of the batch
        rows = x.reshape(len(x), -1, 1).expand(max(2, len(x)), -1, -1)
        return torch.matmul(a.expand(len(rows), *a.shape), rows)[: len(x)].reshape(x.shape)


def _broadcasts(shape: torch.Size, event: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(event), strict=False)
    return len(shape) <= len(event) and all(n in (1, size) for n, size in pairs)
