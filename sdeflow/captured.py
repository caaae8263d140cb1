"""A plan run in compiled blocks of steps: for models so cheap that the launch of each operation is the cost.

A compiled single step loses to plain torch on small models (10 to 20 us of guards a call); several steps in one
function win, and on a GPU they are one CUDA graph. A block returns the states of all its steps, so that the loop, saved
states and previews are as without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from sdeflow.kept import Kept
from sdeflow.model import Model, RowEvaluator
from sdeflow.noise import Noise
from sdeflow.plan import Plan
from sdeflow.sde import Problem
from sdeflow.solvers.base import Solver

_LONGEST = 10
"""Steps in a block, at most: compiling takes longer than in proportion."""

Ask = Callable[..., Tensor]


def run_block(
    ask: Ask, conditions: dict[str, Any], x: Tensor, history: list[Tensor], told: list[Tensor], numbers: Tensor,
    rows: tuple[tuple[int, ...], ...],
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """(the states after each of the block's steps, the last evaluations, newest first).

    Args:
        ask: the network, or a drift.
        history: evaluations of the rows before, newest first.
        told: of each row.
        numbers: (rows, 3 + history): of each row p and q of the evaluation p y + q ask(y, told), the ratio of the
            step's start, and the weights of the evaluations.
        rows: those of each step.
    """
    states, span = [], numbers.shape[1] - 3
    for step in rows:
        y = x
        for k in step:
            p, q, ratio = numbers[k, 0], numbers[k, 1], numbers[k, 2]
            history = [p * y + q * ask(y, told[k], **conditions), *history[: span - 1]]
            y = ratio * x
            for j, past in enumerate(history):
                y = y + numbers[k, 3 + j] * past
        x = y
        states.append(x)
    return states, history


@dataclass(frozen=True)
class Captured(Solver):
    """A solver with a plan, run in compiled blocks: what `solve(compiled=True)` makes of it."""

    solver: Solver

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.solver.name

    def check(self, problem: Problem) -> None:
        """The solver itself was asked."""

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> CapturedRun:
        if not hasattr(self.solver, "plan"):
            raise ValueError(f"compiled=True on a grid takes a solver with a plan, got {self.solver.name}")
        return CapturedRun(self.solver.plan(problem, grid), problem, x)


class CapturedRun:
    """The stepper of a plan by compiled blocks; the states of a block are made when its first step is asked for.

    Raises:
        ValueError: a plan with noise or a shift, 16-bit states, gradients, or a model made of several networks.
        RuntimeError: at the first step, if the network does not compile or the machine has no C++ compiler.
    """

    def __init__(self, plan: Plan, problem: Problem, x: Tensor, backend: str = "inductor") -> None:
        self.calls = 0
        _check(plan, problem, x)
        evaluate = problem.evaluator(plan.target, plan.times)
        self._count: Callable[[int], None] = lambda calls: None
        self._conditions: dict[str, Any] = {}
        owner: Any
        ask: Any
        if isinstance(evaluate, RowEvaluator):
            (model,) = problem.models()
            owner = ask = model.net
            self._conditions, p, q = model.conditions_for(x), evaluate.p, evaluate.q
            table = model.time_table(plan.times)
            if model.expand:
                told = list(table.to(x.device, x.dtype)[:, None].expand(-1, x.shape[0]).contiguous().unbind())
            else:
                told = list(table.to(x.device).unbind())
            self._count = model.count
        else:
            owner, ask = problem, _drift_of(problem)
            p, q, told = [0.0] * plan.nfe, [1.0] * plan.nfe, list(plan.times.unbind())
        self._told = told
        own = torch.tensor([p, q], dtype=torch.float64).T
        self._numbers = torch.cat([own, plan.ratio[:, None], plan.weights], dim=1).to(x)
        self._rows = plan._rows
        self._length = max(n for n in range(1, _LONGEST + 1) if plan.steps % n == 0 or n == plan.steps)
        if self._length == 1 and plan.steps > _LONGEST:  # a prime number of steps: blocks, and a shorter last one
            self._length = _LONGEST
        # the function holds what it is kept by, so that the identity is not given to another one
        self._run = _BLOCKS.get((id(owner), backend), lambda: _compiled(ask, backend))
        self._history: list[Tensor] = [torch.zeros_like(x) for _ in range(plan.weights.shape[1] - 1)]
        self._span = plan.weights.shape[1]
        self._first = -1
        self._states: list[Tensor] = []

    def step(self, i: int, x: Tensor) -> Tensor:
        known = i - self._first
        if self._first < 0 or known >= len(self._states) or (known > 0 and x is not self._states[known - 1]):
            self._make(i, x)
            known = 0
        self.calls += len(self._rows[i])
        return self._states[known]

    def _make(self, i: int, x: Tensor) -> None:
        """The block that begins with step i."""
        last = min(i + self._length, len(self._rows))
        base = self._rows[i].start
        rows = tuple(tuple(k - base for k in self._rows[n]) for n in range(i, last))
        part = slice(base, self._rows[last - 1].stop)
        with torch.no_grad():
            states, history = self._run(self._conditions, x, self._history, self._told[part], self._numbers[part], rows)
        self._count(part.stop - part.start)
        self._history = history[: self._span - 1]
        self._first, self._states = i, states


def _check(plan: Plan, problem: Problem, x: Tensor) -> None:
    if bool((plan.noise != 0).any()) or plan.kick_noise is not None:
        raise ValueError(f"compiled=True runs deterministic plans: {plan.name} draws noise")
    if plan.shift is not None and bool((plan.shift != 0).any()):
        raise ValueError(f"compiled=True: {plan.name} has a mean; center the data instead")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"compiled=True takes float32 or float64 states, got {x.dtype}")
    nets = [model.net for model in problem.models() if isinstance(model.net, torch.nn.Module)]
    learning = x.requires_grad or any(p.requires_grad for net in nets for p in net.parameters())
    if torch.is_grad_enabled() and learning:
        raise ValueError("compiled=True records no gradients: solve under torch.no_grad(), or with compiled=False")
    if any(type(model) is not Model for model in problem.models()):
        raise ValueError("compiled=True takes a model of one network; compile the networks of a guided one themselves")


def _drift_of(problem: Problem) -> Ask:
    return lambda x, t: problem.drift(x, t)


def _compiled(ask: Ask, backend: str) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    # a code object of its own: torch counts the variants of each, and stops at eight
    own = FunctionType(run_block.__code__.replace(), globals(), "run_block")
    gpu = torch.cuda.is_available()
    block = torch.compile(own, dynamic=False, backend=backend, mode="reduce-overhead" if gpu else None)

    def run(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
        try:
            return block(ask, *arguments)
        except Exception as error:
            raise RuntimeError(
                f"blocks of steps could not be compiled or run ({type(error).__name__}: {str(error)[:200]}): solve "
                "with compiled=False. The compiler needs a C++ compiler on this machine"
            ) from error

    return run


_BLOCKS: Kept[Callable[..., tuple[list[Tensor], list[Tensor]]]] = Kept(16)
