"""One-step methods for SDEs: what they declare, what a step is given, and their run on a grid."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sdeflow import calculus
from sdeflow.calculus import NOISE_KINDS, NoiseKind, noise_kind
from sdeflow.noise import Noise
from sdeflow.pid import PID
from sdeflow.sde import SDE, Problem, checked_shape, multiply_noise, noise_shape
from sdeflow.solvers.base import Memory, Solver, Stepper
from sdeflow.times import Each

H = Tensor | float


class Terms:
    """The drift and diffusion of a problem in the interpretation a method needs, counted.

    Scalar noise comes as a diffusion of the shape of x, so that methods for diagonal noise take it unchanged.
    """

    def __init__(self, problem: SDE, form: str, kind: NoiseKind) -> None:
        self.problem, self.kind = problem, kind
        self._drift = problem.ito_drift if form == "ito" or kind == "additive" else problem.stratonovich_drift
        self._scalar = kind == "scalar"
        self._elementwise = self._scalar or problem.noise == "diagonal"
        self.calls = 0

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t)."""
        self.calls += 1
        return checked_shape(self._drift(x, t), x, "the drift")

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """G(x, t), in the dtype of x."""
        g = self.problem.diffusion(x, t)
        g = g[..., 0] if self._scalar else g
        return g if g.dtype == x.dtype else g.to(x.dtype)

    def apply(self, g: Tensor, v: Tensor) -> Tensor:
        """G v, v a vector of the noise."""
        return g * v if self._scalar else multiply_noise(self.problem, g, v)

    def add(self, y: Tensor, g: Tensor, v: Tensor, value: float = 1.0) -> Tensor:
        """y + value G v."""
        if self._elementwise and g.dtype == y.dtype:
            return torch.addcmul(y, g, v, value=value)
        return torch.add(y, self.apply(g, v), alpha=value)

    def slope(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(G, L G) for diagonal and scalar noise: G_i d_i G_i, or (G . grad) G."""
        if not self._scalar:
            g, slope = calculus.own_slope(self.problem, x, t)
            return g.to(x.dtype), slope.to(x.dtype)
        g = self.diffusion(x, t)
        return g, calculus.along(self.problem, x, t, g)[1][..., 0]

    def lift(self, w: Tensor, x: Tensor) -> Tensor:
        """The noise vector w as `apply` takes it: scalar noise (batch, 1) against x (batch, *event)."""
        return w.reshape(-1, *[1] * (x.ndim - 1)) if self._scalar else w

    def take(self, rows: Tensor) -> Terms:
        """The same for some samples of the batch."""
        part = Terms.__new__(Terms)
        part.__dict__ = dict(self.__dict__)
        part.problem = self.problem.take(rows)
        part._drift = getattr(part.problem, self._drift.__name__)
        return part


@dataclass(frozen=True)
class StochasticSolver(Solver):
    """A method that steps an SDE by the increments of its Brownian path.

    Attributes:
        form: the interpretation of the drift it needs; a problem of the other is converted.
        areas: whether it uses the space-time area H besides W.
        fits: the kinds of noise it integrates.
        strong: its strong order on those noises where it is highest.
        adaptive: whether it estimates its error, and so solves to a tolerance.
    """

    form: ClassVar[Literal["ito", "stratonovich"]] = "ito"
    areas: ClassVar[bool] = False
    fits: ClassVar[tuple[NoiseKind, ...]] = NOISE_KINDS
    strong: ClassVar[float] = 0.5
    adaptive: ClassVar[bool] = False

    @abstractmethod
    def step(self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None) -> Tensor:
        """The state at t + h from x at t; W and H of the step are those of a path in the direction of h."""

    def order_for(self, kind: NoiseKind) -> float:
        """The strong order for a kind of noise."""
        return self.strong

    def check(self, problem: Problem) -> None:
        if not isinstance(problem, SDE) or not problem.stochastic:
            raise ValueError(
                f"{self.name} is for problems with noise, and {type(problem).__name__} has none: "
                "use a solver of ordinary equations, such as Heun or RK45"
            )

    def draws_noise(self, problem: Problem) -> bool:
        return True

    def terms(self, problem: SDE, x: Tensor, t: Tensor) -> Terms:
        """The problem as this method sees it.

        Raises:
            ValueError: its noise is of a kind that the method does not integrate.
        """
        noise_shape(problem, x, t)
        kind = noise_kind(problem, x, t)
        if kind not in self.fits:
            raise ValueError(
                f"{self.name} integrates {' and '.join(self.fits)} noise; that of {type(problem).__name__} is {kind}: "
                f"use one of {', '.join(_fitting(kind))}"
            )
        return Terms(problem, self.form, kind)

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        assert isinstance(problem, SDE)
        assert noise is not None
        return GridRun(self, problem, x, grid, noise)


class AdaptiveStochasticSolver(StochasticSolver):
    """A `StochasticSolver` that estimates the error of its steps, and so solves to a tolerance too."""

    adaptive: ClassVar[bool] = True

    @abstractmethod
    def estimate(
        self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(the state at t + h as `step` gives it, an estimate of its error of size |h|^(3/2))."""

    @property
    def first_step(self) -> float:
        """The first step tried, as a share of the span."""
        return 2.0**-10

    def per_unit(self, kind: NoiseKind) -> float:
        """The power of span/h by which an estimate is weighted against the tolerance."""
        return 1.5 - self.order_for(kind)

    def control(self, rtol: float, atol: float, max_steps: int) -> PID:
        """How it chooses its steps."""
        return PID(rtol, atol, max_steps, grow=2.0)


def _fitting(kind: NoiseKind) -> list[str]:
    from sdeflow.solvers.catalogue import CATALOGUE

    return [row.name for row in CATALOGUE if kind in row.noise and row.view == "drift"]


class GridRun:
    """A one-step method along a grid, on the increments of its path between the times `path` (the grid's)."""

    def __init__(
        self,
        solver: StochasticSolver,
        problem: SDE,
        x: Tensor,
        grid: Tensor,
        noise: Noise,
        path: Tensor | None = None,
    ) -> None:
        self._solver, self._terms = solver, solver.terms(problem, x, grid[0])
        self._times, self._steps = Each(grid), torch.diff(grid).tolist()
        event = noise_shape(problem, x, grid[0])[1:]
        # 16-bit states are stepped in float32: their 8 to 11 bits would swallow the increments
        self._work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        self._walk = noise.walk(grid if path is None else path, event, self._work, areas=solver.areas)
        self._reached = self._returned = torch.empty(0)

    @property
    def calls(self) -> int:
        return self._terms.calls

    def step(self, i: int, x: Tensor) -> Tensor:
        # a 16-bit state goes on from what was computed, not from its rounding, unless somebody changed it
        y = self._reached if x is self._returned else x.to(self._work)
        self._reached = self._advance(i, y)
        self._returned = self._reached.to(x.dtype)
        return self._returned

    def remember(self) -> Memory:
        return {} if self._reached is self._returned else {"reached": self._reached}

    def restore(self, memory: Memory, x: Tensor) -> None:
        self._reached, self._returned = memory.get("reached", x), x

    def _advance(self, i: int, x: Tensor) -> Tensor:
        """The step, in the dtype it is made in."""
        w, area = self._walk(i)
        w = self._terms.lift(w, x)
        area = None if area is None else self._terms.lift(area, x)
        return self._solver.step(self._terms, x, self._times[i], self._steps[i], w, area)


def plus(x: Tensor, c: H, y: Tensor) -> Tensor:
    """x + c y, in one operation where c is a number."""
    return x + c * y if isinstance(c, Tensor) else torch.add(x, y, alpha=c)


def size(h: H) -> H:
    """|h|."""
    return h.abs() if isinstance(h, Tensor) else abs(h)


def root(h: H) -> H:
    """sqrt(|h|)."""
    return h.abs().sqrt() if isinstance(h, Tensor) else math.sqrt(abs(h))
