"""Gradients through a solve in less memory than the record of all its steps.

`solve(..., gradient=...)` marches without a record and gives its result the gradient afterwards:

    "checkpointed"   states are kept every sqrt(steps) steps, and each stretch between two is made again, recorded, when
                     its gradient is asked for (Griewank and Walther 2000, revolve, with one level): the gradient of
                     "direct" to rounding, in memory of O(sqrt(steps)), for one more forward run
    "adjoint"        of `ReversibleHeun` and `Reversible`: each step is undone from the one after, and recorded: the
                     gradient of the steps made, to rounding, in memory that does not grow with their number
                     of a Runge-Kutta or Adams method on an ODE x' = f(x, t): the adjoint equation, with x solved back,

                         a' = -a^T df/dx,  g' = -a^T df/dp,   a(t1) = dL/dx(t1), g(t1) = 0;  dL/dx(t0) = a(t0)

                     (Chen, Rubanova, Bettencourt and Duvenaud 2018, Neural ordinary differential equations, algorithm
                     1) by the same method on the same grid, or to the same tolerance. It is the gradient of the
                     solution, not of the steps: it is off by the method's error, and where the flow contracts, x is
                     found back with an error that grows as the flow forgets.

Parameters are the tensors that require gradients and that the drift and the diffusion use, found in the record of one
evaluation of each at the start, and in the modules and tensors that are attributes of the problem. A tensor that only a
later evaluation uses is an error in the backward pass, not a gradient left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sdeflow.control import FixedGrid
from sdeflow.pullback import Pullback, check_known, parameters_of
from sdeflow.sde import ODE, Evaluator, Problem, checked_shape
from sdeflow.solution import Solution
from sdeflow.solvers.adams import Adams
from sdeflow.solvers.backends import March
from sdeflow.solvers.base import Memory, Replayable, Solver, Undoable
from sdeflow.solvers.runge_kutta import RungeKutta

Gradient = Literal["direct", "checkpointed", "adjoint"]


def check_gradient(gradient: str, problem: Problem, solver: Solver, to_tolerance: bool) -> None:
    """Refuse what has no such gradient, before the first model call.

    Raises:
        ValueError: an unknown way, or one that this solver or a solve to a tolerance does not have.
    """
    if gradient not in get_args(Gradient):
        raise ValueError(f'expected gradient "direct", "checkpointed" or "adjoint", got {gradient!r}')
    if gradient == "checkpointed" and to_tolerance:
        raise ValueError(
            'gradient="checkpointed" needs a grid: expected steps or grid, got rtol/atol, where steps are per sample; '
            'for ODEs gradient="adjoint" solves to a tolerance'
        )
    if gradient != "adjoint":
        return
    by_equation = isinstance(solver, (RungeKutta, Adams)) and not problem.stochastic
    if not by_equation and (to_tolerance or not _undoes(solver)):
        raise ValueError(
            f'gradient="adjoint" is not for {solver.name}{" to a tolerance" if to_tolerance else ""}: on ODEs use a '
            "Runge-Kutta or an Adams method, on a grid ReversibleHeun (ODEs and SDEs) or Reversible (probability "
            'flows), or gradient="checkpointed"'
        )


def _undoes(solver: Solver) -> bool:
    from sdeflow.solvers.reversible import Reversible
    from sdeflow.solvers.reversible_heun import ReversibleHeun

    return isinstance(solver, (Reversible, ReversibleHeun))


# ---- the result and its gradient


class _Attached(torch.autograd.Function):
    """The results of a solve that was not recorded, as functions of its start and of the parameters."""

    @staticmethod
    def forward(ctx: Any, record: Record, x_end: Tensor, xs: Tensor | None, *inputs: Tensor) -> Any:
        ctx.record = record
        ctx.set_materialize_grads(False)
        return x_end.clone(), None if xs is None else xs.clone()

    @staticmethod
    def backward(ctx: Any, end: Tensor | None, saved: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError('only gradient="direct" has second derivatives (create_graph=True)')
        start, parameters = ctx.record.backward(end, saved)
        return (None, None, None, start, *parameters)


class Record(ABC):
    """What a solve leaves behind for its gradient."""

    def __init__(self, problem: Problem, x: Tensor, march: March) -> None:
        self.problem, self.march = problem, march
        t = march.state.t
        first = torch.as_tensor(t, dtype=torch.float64).reshape(-1)[0].cpu()
        self.parameters = parameters_of(problem, x, first)
        self.start = x
        self.solution: Solution

    def watch(self, run: Iterator[March]) -> Iterator[March]:
        """The march, with what the gradient needs kept."""
        return run

    def attach(self, solution: Solution) -> Solution:
        """The solution with its gradient."""
        self.solution = solution
        if not any(v.requires_grad for v in (self.start, *self.parameters)):
            return solution
        x, xs = _Attached.apply(self, solution.x, solution.xs, self.start, *self.parameters)
        return dataclasses.replace(solution, x=x, xs=xs)

    @abstractmethod
    def backward(self, end: Tensor | None, saved: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of the start and of the parameters, from those of the end and of the saved states."""


class _OnGrid(Record):
    """A solve on a grid."""

    march: FixedGrid

    def _given(self, end: Tensor | None, saved: Tensor | None) -> dict[int, Tensor]:
        """Gradients of states by their places on the grid; that of the end is always among them."""
        last = self.march.grid.numel() - 1
        given = {last: torch.zeros_like(self.solution.x) if end is None else end}
        if saved is not None:
            for place, g in zip(self.march.saved, saved, strict=True):
                given[place] = given[place] + g if place in given else g
        return given


class Checkpoints(_OnGrid):
    """States, and the memory of the stepper, at every sqrt(steps)-th step."""

    def __init__(self, problem: Problem, x: Tensor, march: March) -> None:
        assert isinstance(march, FixedGrid)
        self._stepper = march.stepper
        if not isinstance(self._stepper, Replayable):
            raise ValueError(
                f'gradient="checkpointed": {type(self._stepper).__name__.strip("_")} keeps a memory that cannot be put '
                'back to an earlier step: use gradient="direct", or another solver'
            )
        super().__init__(problem, x, march)
        self._steps = march.grid.numel() - 1
        self._stride = math.isqrt(self._steps - 1) + 1
        self._kept: list[tuple[Tensor, Memory]] = []

    def watch(self, run: Iterator[March]) -> Iterator[March]:
        assert isinstance(self._stepper, Replayable)
        for march in run:
            state = march.state
            if state.step % self._stride == 0 and state.step < self._steps:
                self._kept.append((state.x, self._stepper.remember()))
            yield march

    def backward(self, end: Tensor | None, saved: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
        given, pullback = self._given(end, saved), Pullback(self.parameters)
        a, later = given[self._steps], dict[object, Tensor | None]()
        for number in reversed(range(len(self._kept))):
            first = number * self._stride
            a, later = self._stretch(first, *self._kept[number], a, later, given, pullback)
            if first in given:
                a = a + given[first]
        return a, pullback.sums

    def _stretch(
        self,
        first: int,
        x: Tensor,
        memory: Memory,
        a: Tensor,
        later: dict[object, Tensor | None],
        given: dict[int, Tensor],
        pullback: Pullback,
    ) -> tuple[Tensor, dict[object, Tensor | None]]:
        """Through one stretch: the gradients of its start and of the memory there, from those at its end."""
        stepper, last = self._stepper, min(first + self._stride, self._steps)
        assert isinstance(stepper, Replayable)
        with torch.enable_grad():
            y = leaf = x.detach().requires_grad_()
            inner = {key: v.detach().requires_grad_() for key, v in memory.items()}
            stepper.restore(inner, leaf)
            outputs, cotangents = list[Tensor](), list[Tensor | None]()
            for i in range(first, last):
                y = stepper.step(i, y)
                if i + 1 in given and i + 1 < last:
                    outputs.append(y)
                    cotangents.append(given[i + 1])
            reached = stepper.remember() if later else {}
        outputs += [y, *reached.values()]
        cotangents += [a, *(later.get(key) for key in reached)]
        start, *rest = pullback.pull(outputs, [leaf, *inner.values()], cotangents)
        stepper.restore({}, x)  # lets go of the record
        return torch.zeros_like(x) if start is None else start, dict(zip(inner, rest, strict=True))


class Undone(_OnGrid):
    """A reversible solve: nothing but its end is kept."""

    def backward(self, end: Tensor | None, saved: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
        assert isinstance(self.march.stepper, Undoable)
        pullback = Pullback(self.parameters)
        return self.march.stepper.gradient(self._given(end, saved), pullback), pullback.sums


class AdjointEquation(Record):
    """The adjoint equation, solved back from the end by way of the saved times."""

    def __init__(
        self,
        problem: Problem,
        x: Tensor,
        march: March,
        solver: Solver,
        span: tuple[float, float],
        control: dict[str, Any],
    ) -> None:
        super().__init__(problem, x, march)
        # each stretch between saved times begins anew: with steps of full order
        self._solver = dataclasses.replace(solver, start="runge-kutta") if isinstance(solver, Adams) else solver
        self._span, self._control = span, control

    def backward(self, end: Tensor | None, saved: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
        x, size = self.solution.x, self.solution.x.numel()
        work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        sizes = [p.numel() for p in self.parameters]
        adjoint = _Adjoint(self.problem, x, self.parameters)
        a = torch.zeros(size, dtype=work, device=x.device) if end is None else end.to(work).reshape(-1)
        g = torch.zeros(sum(sizes), dtype=work, device=x.device)
        stations = self._stations()
        for (after, rows, state), (before, _, _) in itertools.pairwise(reversed(stations)):
            a = a + self._jump(rows, saved, a)
            flat = torch.cat([state.to(work).reshape(-1), a, g]).unsqueeze(0)
            flat = self._solve_back(adjoint, flat, after, before)[0]
            a, g = flat[size : 2 * size], flat[2 * size :]
        a = a + self._jump(stations[0][1], saved, a)
        parts = g.split(sizes) if sizes else ()
        grads: list[Tensor | None] = [v.view(p.shape).to(p) for v, p in zip(parts, self.parameters, strict=True)]
        return a.view(x.shape).to(x.dtype), grads

    def _stations(self) -> list[tuple[float, list[int], Tensor]]:
        """(time, its rows among the saved, state) of the start, the saved times between, and the end."""
        (start, end), solution = self._span, self.solution
        rows: dict[float, list[int]] = {start: [], end: []}
        for row, t in enumerate([] if solution.ts is None else solution.ts.tolist()):
            rows.setdefault(t, []).append(row)
        stations = []
        for t in sorted(rows, reverse=end < start):
            state = solution.x if t == end or solution.xs is None or not rows[t] else solution.xs[rows[t][0]]
            stations.append((t, rows[t], state.detach()))
        return stations

    def _jump(self, rows: list[int], saved: Tensor | None, a: Tensor) -> Tensor:
        if saved is None or not rows:
            return torch.zeros_like(a)
        return saved[rows].sum(0).to(a.dtype).reshape(-1)

    def _solve_back(self, adjoint: _Adjoint, flat: Tensor, after: float, before: float) -> Tensor:
        from sdeflow.solve import solve

        with torch.no_grad():
            if self._control:
                return solve(adjoint, flat, self._solver, t_span=(after, before), **self._control).x
            assert isinstance(self.march, FixedGrid)
            ts = self.march.grid
            part = ts[(ts >= min(before, after)) & (ts <= max(before, after))]
            return solve(adjoint, flat, self._solver, grid=part.flip(0)).x


class _Adjoint(ODE):
    """(x, a, g) as one state (1, 2 size + parameters): x' = f, a' = -a^T df/dx, g' = -a^T df/dp."""

    def __init__(self, problem: Problem, like: Tensor, parameters: Sequence[Tensor]) -> None:
        self.t0, self.t1, self.direction = problem.t0, problem.t1, -problem.direction
        self._problem, self._shape, self._dtype = problem, like.shape, like.dtype
        self._parameters, self._known = tuple(parameters), {id(p) for p in parameters}

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        time = t.reshape(())
        return self._slope(lambda y: checked_shape(self._problem.drift(y, time), y, "the drift"), x)

    def evaluator(self, target: str, times: Tensor) -> Evaluator:
        evaluate = self._problem.evaluator(target, times)
        return lambda k, x: self._slope(lambda y: evaluate(k, y), x)

    def _slope(self, f: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        size = self._shape.numel()
        flat = state[0]
        with torch.enable_grad():
            x = flat[:size].view(self._shape).detach().to(self._dtype).requires_grad_()
            slope = f(x)
        minus = flat[size : 2 * size].view(self._shape).to(self._dtype).neg()
        grads: Sequence[Tensor | None] = [None] * (1 + len(self._parameters))
        if slope.requires_grad:
            check_known([slope], self._known, [x])
            grads = torch.autograd.grad(slope, [x, *self._parameters], minus, allow_unused=True, retain_graph=True)
        parts = [slope.detach()]
        for value, like in zip(grads, (x, *self._parameters), strict=True):
            parts.append(torch.zeros_like(like) if value is None else value)
        return torch.cat([v.reshape(-1).to(state.dtype) for v in parts]).unsqueeze(0)


def new_record(
    gradient: Gradient,
    problem: Problem,
    x: Tensor,
    solver: Solver,
    march: March,
    span: tuple[float, float],
    control: dict[str, Any],
) -> Record:
    """What a solve has to leave behind for its gradient.

    Args:
        x: the start, with its own record.
        span: (start, end) of a march to a tolerance, that has no grid.
        control: its rtol, atol and max_steps; empty on a grid.
    """
    if gradient == "checkpointed":
        return Checkpoints(problem, x, march)
    if _undoes(solver):
        return Undone(problem, x, march)
    if isinstance(march, FixedGrid):
        span = (float(march.grid[0]), float(march.grid[-1]))
    return AdjointEquation(problem, x, march, solver, span, control)
