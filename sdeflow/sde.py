"""Problems a solver accepts: `ODE` (drift) and `SDE` (drift and diffusion).

Time is one clock for everything: t = 0 is data, forward noising runs t0 -> t1, and a reversed
process runs on the same clock from t1 down, with signed steps h = t_next - t < 0.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from sdeflow import grids
from sdeflow.calculus import correction
from sdeflow.interop import OdeCallable, SdeCallable
from sdeflow.times import Each

if TYPE_CHECKING:
    from sdeflow.linear import LinearSDE
    from sdeflow.model import Model
    from sdeflow.reverse import ReverseSDE
    from sdeflow.solution import Solution
    from sdeflow.solvers.base import Solver
    from sdeflow.structure import Structure

Evaluator = Callable[[int, Tensor], Tensor]
"""`evaluate(k, x)`: the k-th evaluation of a plan, at the k-th of the times it was made for."""

Score = Callable[[Tensor, Tensor], Tensor]
"""`score(x, t)`: grad log p_t at x; t is 0-d, or (batch, 1, ..., 1) when steps are per sample."""


def checked_shape(value: object, x: Tensor, what: str) -> Tensor:
    """`value` in the dtype of x; an error if what a user's function returned has not the shape of x."""
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} returned {got} for x of shape {tuple(x.shape)}: expected the shape of x")
    if value.dtype != x.dtype:
        if value.is_complex():
            raise ValueError(f"{what} returned {value.dtype} for x of {x.dtype}: expected real numbers")
        value = value.to(x.dtype)
    if value.is_meta and not x.is_meta:
        raise ValueError(f"{what} returned a tensor on meta, without values: expected one on {x.device}")
    return value


class Problem(ABC, OdeCallable):
    """What `solve` integrates. Users derive from `ODE` or `SDE`, not from this class."""

    t0: float = 0.0
    t1: float = 1.0
    direction: int = 1
    """+1: runs from t0 up to t1; -1: runs from t1 down."""
    per_sample: ClassVar[tuple[str, ...]] = ()
    """Names of attributes whose first dimension is the batch: kept in step with the samples
    when finished ones leave the batch (adaptive solving)."""

    @abstractmethod
    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift f(x, t), of the shape of x. `t` is 0-d float64, or (batch, 1, ..., 1)."""

    @property
    def t_min(self) -> float:
        """Where a reversed run ends unless told otherwise (the process's sampling end)."""
        return self.t0

    @property
    def span(self) -> tuple[float, float]:
        """(start, end) of a run when the caller gives no `t_span`."""
        return (self.t0, self.t1) if self.direction > 0 else (self.t1, self.t_min)

    @property
    def stochastic(self) -> bool:
        """Whether a path of this problem needs noise."""
        return False

    def default_grid(self, steps: int, t_start: float, t_end: float) -> Tensor:
        """The grid that `steps` alone means."""
        return grids.uniform(self, steps, t_start, t_end)

    def evaluator(self, target: str, times: Tensor) -> Evaluator:
        """The function that a plan calls: `target` (here only "drift") at each of `times`."""
        if target != "drift":
            raise ValueError(
                f"this solver needs the {target!r} of a Gaussian process with a model "
                f"(sde.reverse(model) of a GaussianSDE); {type(self).__name__} has only a drift: "
                "use a solver of the drift view, such as Heun, RK45 or EulerMaruyama"
            )
        ts = Each(times)

        def evaluate(k: int, x: Tensor) -> Tensor:
            return checked_shape(self.drift(x, ts[k]), x, "the drift")

        return evaluate

    def models(self) -> tuple[Model, ...]:
        """The models that its drift asks: a solve counts their calls of networks. None unless it is a reversal."""
        return ()

    def check_batch(self, batch: int) -> None:
        """Refuse per-sample attributes or conditions of another batch size than the samples'."""
        for name in self.per_sample:
            rows = getattr(self, name).shape[:1]
            if tuple(rows) != (batch,):
                raise ValueError(f"per_sample attribute {name!r}: expected {batch} rows, got {tuple(rows)}")

    def take(self, rows: Tensor) -> Self:
        """The same problem for the samples `rows` of the batch only."""
        if not self.per_sample:
            return self
        part = copy.copy(self)
        for name in self.per_sample:
            object.__setattr__(part, name, getattr(self, name)[rows])
        return part


class ODE(Problem):
    """A user's ordinary differential equation dx = f(x, t) dt on [t0, t1].

    Write `drift(self, x, t)`; set `t0`, `t1` (class or instance attributes).
    """


class SDE(Problem, SdeCallable):
    """A user's equation dx = f(x, t) dt + G(x, t) dW on [t0, t1].

    Write `drift(self, x, t)` and `diffusion(self, x, t)`; set `t0`, `t1` and `noise`:

    - "diagonal": `diffusion` broadcasts against x and multiplies noise of the shape of x;
    - "general": `diffusion` returns (*x.shape, m) and multiplies noise of m components a sample.

    `interpretation` says which equation f belongs to, Ito's or Stratonovich's; everything that needs the other
    converts. `affine` (drift), `homogeneous` (in time), `additive` and `commutative` (noise) declare what probing
    should not decide; None leaves it to the probes.
    `event` is the shape of one sample where only one will do, `domain` the open interval that every component of x
    stays in: what probes and checks of the process draw their points from.
    """

    noise: Literal["diagonal", "general"] = "diagonal"
    interpretation: Literal["ito", "stratonovich"] = "ito"
    affine: bool | None = None
    homogeneous: bool | None = None
    additive: bool | None = None
    commutative: bool | None = None
    event: tuple[int, ...] | None = None
    domain: tuple[float, float] = (-math.inf, math.inf)

    @abstractmethod
    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """The diffusion G(x, t): broadcasts against x, or (*x.shape, m) for general noise."""

    @property
    def stochastic(self) -> bool:
        return True

    def ito_drift(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift of the Ito equation: f, or f + c for a Stratonovich one, c_i = 1/2 sum_jk G_jk d_j G_ik."""
        f = self.drift(x, t)
        return f if self._is("ito") else f + self.direction * correction(self, x, t)

    def stratonovich_drift(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift of the Stratonovich equation: f, or f - c for an Ito one."""
        f = self.drift(x, t)
        return f if self._is("stratonovich") else f - self.direction * correction(self, x, t)

    def _is(self, interpretation: str) -> bool:
        if self.interpretation not in ("ito", "stratonovich"):
            raise ValueError(f'expected interpretation "ito" or "stratonovich", got {self.interpretation!r}')
        return self.interpretation == interpretation

    def evaluator(self, target: str, times: Tensor) -> Evaluator:
        if target != "drift" or self._is("ito"):
            return super().evaluator(target, times)
        ts = Each(times)
        return lambda k, x: checked_shape(self.ito_drift(x, ts[k]), x, "the drift")

    @property
    def smooth_window(self) -> tuple[float, float]:
        """An interval in which the coefficients are smooth functions of time: what checks integrate over."""
        return self.t0, self.t1

    def structure(self, event: tuple[int, ...] | None = None) -> Structure:
        """What this equation is: affine, additive, commutative, ...; see `sdeflow.structure.Structure`."""
        from sdeflow.structure import structure

        return structure(self, event)

    def linear(self, event: tuple[int, ...] | None = None) -> LinearSDE:
        """This equation as a `LinearSDE`, with its exact Gaussian kernels, read off from its values.

        Raises:
            ValueError: the drift is not affine, or the noise not additive, or states are not (batch, d).
        """
        from sdeflow.structure import linear_form

        return linear_form(self, self.structure(event))

    def scalar_diffusion(self, times: Tensor) -> Tensor | None:
        """The diffusion at `times` (n,) where it is one number for all of x, known without x; else None."""
        return None

    def reverse(self, model: Model | Score, eta: float | Callable[[Tensor], Any] = 1.0) -> ReverseSDE:
        """The reverse-time process with stochasticity `eta`; see `ReverseSDE`.

        Args:
            model: a `Model`, or a callable score(x, t).
            eta: 0 the probability flow, 1 Anderson's reverse SDE; a number or a function of t.
        """
        from sdeflow.reverse import ReverseSDE

        return ReverseSDE(self, model, eta)

    def probability_flow(self, model: Model | Score) -> ReverseSDE:
        """The deterministic member of the family, `reverse(model, eta=0)`."""
        return self.reverse(model, eta=0.0)

    def simulate(
        self,
        x0: Tensor,
        *,
        steps: int | None = None,
        grid: Any = None,
        seed: int | None = None,
        index: int | Tensor | None = None,
        solver: Solver | None = None,
        save: Any = None,
        t_span: tuple[float, float] | None = None,
        progress: bool = False,
        throw: bool = True,
    ) -> Solution:
        """Paths of this process from `x0` (batch, *event), by Euler-Maruyama unless told otherwise."""
        from sdeflow.solve import solve
        from sdeflow.solvers import EulerMaruyama

        return solve(
            self, x0, solver or EulerMaruyama(), steps=steps, grid=grid, seed=seed, index=index,
            save=save, t_span=t_span, progress=progress, throw=throw,
        )  # fmt: skip


def multiply_noise(problem: SDE, g: Tensor, z: Tensor) -> Tensor:
    """G z: elementwise for diagonal noise, a matrix-vector product a sample for general noise."""
    if problem.noise == "diagonal":
        return g * z
    return torch.matmul(g.reshape(len(g), -1, g.shape[-1]), z.unsqueeze(-1)).reshape(g.shape[:-1])


def noise_shape(problem: SDE, x: Tensor, t: Tensor) -> tuple[int, ...]:
    """The shape of the standard normals that drive x: that of x, or (batch, m).

    Raises:
        ValueError: `diffusion` returns a shape that its declared noise does not allow.
    """
    with torch.no_grad():
        g = torch.as_tensor(problem.diffusion(x, t))
    if problem.noise == "diagonal":
        try:
            fits = g.shape == x.shape or torch.broadcast_shapes(g.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if fits:
            return tuple(x.shape)
        want = f"a shape that broadcasts against x, {tuple(x.shape)}"
    elif problem.noise == "general":
        if g.ndim == x.ndim + 1 and g.shape[:-1] == x.shape:
            return (x.shape[0], g.shape[-1])
        want = f"(*x.shape, m) = ({', '.join(map(str, x.shape))}, m)"
    else:
        raise ValueError(f'expected noise "diagonal" or "general", got {problem.noise!r}')
    raise ValueError(
        f"{type(problem).__name__}.diffusion with {problem.noise} noise: expected {want}, got {tuple(g.shape)}"
    )
