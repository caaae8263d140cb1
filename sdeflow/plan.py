"""Plans: every coefficient of a linear method on a grid, as one table, and the runner of any plan.

Row k of a plan is one model call at time `times[k]` and one linear combination of the state x at
the start of the row's step and the last evaluations e_k, e_{k-1}, ...:

    y = ratio[k] x + sum_j weights[k, j] e_{k-j} + noise[k] xi

y is where the next row evaluates; after the last row of a step it is the new state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sdeflow.noise import PATH, Noise
from sdeflow.sde import SDE, Problem, multiply_noise, noise_shape
from sdeflow.solvers.base import LinearSolver, View, refuse_noise, semilinear


def eta_key(eta: object) -> float | str | None:
    """What a plan remembers of a problem's eta: the number, or the repr of a function."""
    return float(eta) if isinstance(eta, (int, float)) else None if eta is None else repr(eta)


@dataclass(frozen=True, eq=False)
class Plan(LinearSolver):
    """A linear method on a grid, usable wherever a solver is.

    Attributes:
        name: of the method.
        view: the view of the problem it was made from.
        target: what a model call returns: "drift", or a prediction ("x0", "eps").
        grid: float64 (steps + 1,).
        times: float64 (rows,), where each row evaluates.
        step_of_row: int64 (rows,), non-decreasing.
        ratio, weights, noise: float64 (rows,), (rows, history), (rows,).
        noise_kind: "unit" multiplies `noise` with standard normals, "diffusion" with G(x, t) times them.
        process, eta: what the coefficients belong to (its repr, and `eta_key`); None when they do not depend on it.
    """

    name: str
    target: str
    grid: Tensor
    times: Tensor
    step_of_row: Tensor
    ratio: Tensor
    weights: Tensor
    noise: Tensor
    noise_kind: Literal["unit", "diffusion"] = "unit"
    process: str | None = None
    eta: float | str | None = None
    view: View = "drift"

    def __post_init__(self) -> None:
        bad = ~(torch.isfinite(self.ratio) & torch.isfinite(self.weights).all(1) & torch.isfinite(self.noise))
        if bool(bad.any()):
            k = int(torch.nonzero(bad)[0])
            raise ValueError(
                f"{self.name}: the coefficients of row {k} (t = {float(self.times[k]):g}) are not finite: "
                "the process is singular there; start or end the grid short of it"
            )

    @property
    def steps(self) -> int:
        """Steps of the grid."""
        return self.grid.numel() - 1

    @property
    def nfe(self) -> int:
        """Model calls of a run: one a row."""
        return self.times.numel()

    def __repr__(self) -> str:
        return f"Plan({self.name}, {self.steps} steps, {self.nfe} model calls, {self.target})"

    def __str__(self) -> str:
        lines = [
            repr(self),
            f"{'row':>4} {'step':>4} {'t':>12} {'ratio':>12} {'noise':>12}  weights (newest first)",
        ]
        for k in range(self.nfe):
            weights = " ".join(f"{w:12.5g}" for w in self.weights[k].tolist())
            lines.append(
                f"{k:4d} {int(self.step_of_row[k]):4d} {float(self.times[k]):12.6g} "
                f"{float(self.ratio[k]):12.6g} {float(self.noise[k]):12.6g}  {weights}"
            )
        return "\n".join(lines)

    def check(self, problem: Problem) -> None:
        if self.view == "transition":
            semilinear(self.name, problem)
        if self.process is not None:
            process, eta = getattr(problem, "process", problem), getattr(problem, "eta", None)
            if repr(process) != self.process:
                raise ValueError(f"this plan was made for {self.process}, not for {process!r}")
            if eta_key(eta) != self.eta:
                raise ValueError(f"this plan was made for eta = {self.eta}, not for eta = {eta!r}")
        if not bool((self.noise != 0).any()):
            refuse_noise(self.name, problem)

    def draws_noise(self, problem: Problem) -> bool:
        return bool((self.noise != 0).any())

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        if not torch.equal(grid, self.grid):
            raise ValueError(
                f"this plan has its own grid of {self.steps} steps from {float(self.grid[0]):g} to "
                f"{float(self.grid[-1]):g}; give no other"
            )
        return self

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> PlanRun:
        return PlanRun(self.plan(problem, grid), problem, x, noise)

    @cached_property
    def _rows(self) -> list[range]:
        """The rows of each step."""
        edges = torch.searchsorted(self.step_of_row, torch.arange(self.steps + 1)).tolist()
        return [range(a, b) for a, b in pairwise(edges)]

    @cached_property
    def _by_slot(self) -> Tensor:
        """The weights by slot of a ring buffer that evaluation k enters at slot k mod history."""
        rows, history = self.weights.shape
        ages = (torch.arange(rows).unsqueeze(1) - torch.arange(history)) % history
        return torch.gather(self.weights, 1, ages)


class PlanRun:
    """The runner of any plan: one model call, one fused combination and one noise draw a row."""

    def __init__(self, plan: Plan, problem: Problem, x: Tensor, noise: Noise | None) -> None:
        self.calls = 0
        self._plan = plan
        self._evaluate = problem.evaluator(plan.target, plan.times)
        self._ratio = plan.ratio.tolist()
        self._scale = plan.noise.tolist()
        self._rows = plan._rows
        # 16-bit states are combined in float32: their 8 to 11 bits would swallow the increments
        self._work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        self._reached = self._returned = torch.empty(0)
        self._combine = _combiner(plan, x, self._work)
        self._add_noise = _noise_adder(plan, problem, x, noise, self._work)

    def step(self, i: int, x: Tensor) -> Tensor:
        # a 16-bit state goes on from what was computed, not from its rounding, unless somebody changed it
        base = self._reached if x is self._returned else x.to(self._work)
        y = base
        for k in self._rows[i]:
            e = self._evaluate(k, y.to(x.dtype))
            self.calls += 1
            y = self._combine(k, base, e)
            if self._scale[k] != 0.0:
                y = self._add_noise(k, i, y, x)
        self._reached, self._returned = y, y.to(x.dtype)
        return self._returned


def _combiner(plan: Plan, x: Tensor, work: torch.dtype) -> Callable[[int, Tensor, Tensor], Tensor]:
    """`combine(k, base, e)`: enter evaluation k in the history and form row k's combination."""
    ratio, history = plan.ratio.tolist(), plan.weights.shape[1]
    weights = plan.weights.tolist()
    if history == 1:

        def single(k: int, base: Tensor, e: Tensor) -> Tensor:
            return torch.add(base if ratio[k] == 1.0 else ratio[k] * base, e.to(work), alpha=weights[k][0])

        return single

    if torch.is_grad_enabled():  # no writes into shared buffers: autograd keeps what it needs
        past: deque[Tensor] = deque(maxlen=history)

        def chain(k: int, base: Tensor, e: Tensor) -> Tensor:
            past.appendleft(e.to(work))
            y = ratio[k] * base
            for w, value in zip(weights[k], past, strict=False):
                if w != 0.0:
                    y = torch.add(y, value, alpha=w)
            return y

        return chain

    ring = torch.zeros(history, x.numel(), dtype=work, device=x.device)
    columns, slots = ring.T, plan._by_slot.to(dtype=work, device=x.device).unbind()

    def fused(k: int, base: Tensor, e: Tensor) -> Tensor:
        ring[k % history].copy_(e.reshape(-1))
        return torch.addmv(base.reshape(-1), columns, slots[k], beta=ratio[k]).view(base.shape)

    return fused


def _noise_adder(
    plan: Plan, problem: Problem, x: Tensor, noise: Noise | None, work: torch.dtype
) -> Callable[[int, int, Tensor, Tensor], Tensor]:
    """`add(k, i, y, x)`: y plus the noise of row k, the last of step i, which began at x."""
    if noise is None:
        return lambda k, i, y, x: y
    scale = plan.noise.tolist()
    if plan.noise_kind == "unit":
        unit = noise.sequence(PATH, plan.steps, x.shape[1:], work)
        return lambda k, i, y, x: torch.add(y, unit(i), alpha=scale[k])
    assert isinstance(problem, SDE)
    sde, ts = problem, plan.grid.unbind()
    draw = noise.sequence(PATH, plan.steps, noise_shape(sde, x, ts[0])[1:], x.dtype)

    def add(k: int, i: int, y: Tensor, x: Tensor) -> Tensor:
        return torch.add(y, multiply_noise(sde, sde.diffusion(x, ts[i]), draw(i)), alpha=scale[k])

    return add
