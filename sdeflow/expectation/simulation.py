"""What is simulated: starts, a problem and a solver, as a pure function of the samples' indices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.checked import described, tensor
from sdeflow.expectation.sums import Drawn
from sdeflow.model import Model
from sdeflow.noise import PRIOR, Noise, NoiseSource, Seeded
from sdeflow.plan import Plan
from sdeflow.reverse import Eta, ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solution import Solution
from sdeflow.solve import solve
from sdeflow.solve_input import Grid, Save
from sdeflow.solvers.base import Solver

Functional = Callable[..., Tensor]
"""`functional(x)` of x (batch, *event), or with `save` `functional(xs, ts)` of xs (n, batch, *event): (batch,) or
(batch, k)."""

StartMap = Callable[[Tensor], Tensor]
"""Standard normals (batch, *shape) to start states (batch, *event), sample by sample."""


@dataclass(frozen=True)
class Start:
    """Where samples start: at one state, or at a function of standard normals of each sample.

    Attributes:
        state: (*event), or None.
        shape: of a sample's normals; None with a state.
        push: of the normals.
        dtype, device: of the normals.
    """

    state: Tensor | None
    shape: tuple[int, ...] | None
    push: StartMap | None
    dtype: torch.dtype
    device: torch.device | str

    @property
    def size(self) -> int:
        """Normals a sample."""
        return 0 if self.shape is None else torch.Size(self.shape).numel()

    def __call__(self, noise: Noise) -> Tensor:
        batch = noise.index.numel()
        if self.state is not None:
            return self.state.expand(batch, *self.state.shape)
        assert self.shape is not None
        assert self.push is not None
        return self.push(noise.normal(PRIOR, 0, self.shape, self.dtype))


@dataclass(frozen=True)
class FromPrior:
    """z -> prior_std z: the start of `sample`."""

    std: float

    def __call__(self, z: Tensor) -> Tensor:
        return self.std * z


@dataclass(frozen=True)
class Simulation:
    """A functional of samples, each a function of (seed, index)."""

    functional: Functional
    problem: Problem
    start: Start
    solver: Solver | None
    steps: int | None
    grid: Grid | None
    rtol: float | None
    atol: float | None
    t_span: tuple[float, float] | None
    save: Save
    seed: int

    def at(self, solver: Solver, steps: int) -> Simulation:
        """The same with another solver and number of steps."""
        return dataclasses.replace(self, solver=solver, steps=steps)

    def of(self, problem: Problem) -> Simulation:
        """The same noise through another problem."""
        return dataclasses.replace(self, problem=problem)

    @property
    def to_tolerance(self) -> bool:
        """Whether the steps are chosen by error control."""
        return self.rtol is not None or self.atol is not None

    def solution(self, index: Tensor, source: NoiseSource | None = None) -> Solution:
        """The samples of these indices (n,)."""
        source = Seeded(self.seed) if source is None else source
        with torch.no_grad():
            x = self.start(source.bind(len(index), index, self.start.device))
            return solve(
                self.problem, x, self.solver, steps=self.steps, grid=self.grid, rtol=self.rtol, atol=self.atol,
                t_span=self.t_span, index=index, noise=source, save=self.save, throw=False,
            )  # fmt: skip

    def __call__(self, index: Tensor, source: NoiseSource | None = None) -> Drawn:
        """The functional of these samples, and their cost."""
        solution = self.solution(index, source)
        values, ok = self.values(solution), solution.ok.cpu()
        nfe = solution.stats.nfe
        calls = float(nfe.sum()) if isinstance(nfe, Tensor) else float(nfe) * len(index)
        return Drawn(values, ok & torch.isfinite(values).all(1), calls)

    def values(self, solution: Solution) -> Tensor:
        """The functional, float64 (n, k) on the host."""
        with torch.no_grad():
            if self.save is None or self.save is False:
                value = self.functional(solution.x)
            else:
                value = self.functional(solution.xs, solution.ts)
        return checked_values(value, solution.x.shape[0])


def checked_values(value: object, batch: int) -> Tensor:
    """What a functional returned, as float64 (batch, k)."""
    if not isinstance(value, Tensor) or value.ndim not in (1, 2) or value.shape[0] != batch or value.shape[1:] == (0,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the functional returned {got}: expected a tensor ({batch},) or ({batch}, k), k >= 1")
    if not tensor(value):
        raise TypeError(f"the functional returned {described(value)}: expected real values")
    value = value.detach().to("cpu", torch.float64)
    return value.unsqueeze(1) if value.ndim == 1 else value


def simulation(
    functional: Functional, problem: Problem | Model, x: Tensor | StartMap | None, solver: Solver | None, *,
    shape: tuple[int, ...] | None, steps: int | None, grid: Grid | None, rtol: float | None, atol: float | None,
    t_span: tuple[float, float] | None, eta: Eta, save: Save, seed: int, dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Simulation:  # fmt: skip
    """The arguments of `expect`, checked."""
    if not callable(functional):
        raise TypeError(f"expected a functional of the states, got {type(functional).__name__}")
    if isinstance(problem, Model):
        like = _parameter(problem)
        dtype = dtype or (like.dtype if like is not None else None)
        device = device or (like.device if like is not None else None)
        problem = problem.gaussian.reverse(problem, eta)
    elif eta != 0.0:
        raise ValueError("eta belongs to a Model: expected one, or a problem with its own eta, sde.reverse(model, eta)")
    if not isinstance(problem, Problem):
        raise TypeError(f"expected a Model, ODE, SDE or ReverseSDE, got {type(problem).__name__}")
    if solver is not None and not isinstance(solver, Solver):
        raise TypeError(f"expected a solver such as sf.solvers.EulerMaruyama(), got {solver!r}")
    if solver is None and rtol is None and atol is None:
        raise TypeError("expected a solver: only a tolerance rtol chooses one")
    if isinstance(solver, Plan) and steps is not None:
        raise ValueError("a plan has its own grid: expected no steps with it")
    start = _start(problem, x, shape, dtype, device)
    return Simulation(functional, problem, start, solver, steps, grid, rtol, atol, t_span, save, seed)


def _start(
    problem: Problem, x: Tensor | StartMap | None, shape: tuple[int, ...] | None, dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Start:  # fmt: skip
    if isinstance(x, Tensor):
        if not x.is_floating_point() or x.ndim < 1:
            raise ValueError(f"expected x as one floating-point state (*event), got {x.dtype} {tuple(x.shape)}")
        if shape is not None or dtype is not None or device is not None:
            raise ValueError("a start state has its own shape, dtype and device: expected none of them with it")
        return Start(x.detach(), None, None, x.dtype, x.device)
    if shape is None or not all(isinstance(n, int) and n > 0 for n in shape):
        what = "of the normals that x maps" if callable(x) else "of one sample"
        raise ValueError(f"expected shape {what}, a tuple of positive integers, got {shape!r}")
    dtype, device = dtype or torch.float32, device or "cpu"
    if x is None:
        if not isinstance(problem, ReverseSDE):
            raise ValueError(f"{type(problem).__name__} has no prior: expected x, a start state or a map of normals")
        return Start(None, tuple(shape), FromPrior(problem.gaussian.prior_std), dtype, device)
    if not callable(x):
        raise TypeError(f"expected x as a state (*event), a map of normals, or None, got {type(x).__name__}")
    return Start(None, tuple(shape), x, dtype, device)


def _parameter(model: Model) -> Tensor | None:
    return next(model.net.parameters(), None) if isinstance(model.net, torch.nn.Module) else None
