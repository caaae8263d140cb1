"""Restart sampling: now and then noise back up to a higher level and come down again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdeflow import grids
from sdeflow.checked import checked_class
from sdeflow.noise import RESTART, Noise
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.base import Solver, Stepper, View, semilinear
from sdeflow.solvers.edm import EDMHeun


@checked_class
@dataclass(frozen=True)
class RestartInterval:
    """`repeats` times from level `low` up to `high` by fresh noise, and down in `steps` steps (levels sigma/alpha)."""

    low: float
    high: float
    repeats: int
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"RestartInterval: expected 0 < low < high, got {self.low!r} and {self.high!r}")
        if not (1 <= self.repeats <= 1_000_000 and 1 <= self.steps <= 1_000_000):
            raise ValueError(
                f"RestartInterval: expected repeats, steps >= 1, got {self.repeats!r}, {self.steps!r} (at most 10^6)"
            )


@checked_class
@dataclass(frozen=True)
class Restart(Solver):
    """`solver` with restarts: noise added at a level contracts the error accumulated above it.

    (Xu et al. 2023, Restart sampling, algorithm 1.) When a step reaches the grid point nearest to an interval's low
    level, x is noised to the high level by the process's own kernel, exact for its marginals, and `solver`
    steps back down on a Karras grid. NFE adds repeats * steps of the solver's calls per interval.

    Args:
        intervals: of restarts, each a `RestartInterval`.
        solver: of the flow; EDM's Heun by default, as in the paper.
    """

    intervals: tuple[RestartInterval, ...]
    solver: Solver = field(default_factory=EDMHeun)
    name = "Restart"
    view: View = "transition"

    def __post_init__(self) -> None:
        if not self.intervals or not all(isinstance(i, RestartInterval) for i in self.intervals):
            raise TypeError(f"Restart: expected a tuple of RestartInterval, got {self.intervals!r}")

    def check(self, problem: Problem) -> None:
        semilinear(self.name, problem)
        self.solver.check(problem)

    def draws_noise(self, problem: Problem) -> bool:
        return True

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        assert noise is not None
        return _RestartRun(self, semilinear(self.name, problem), x, grid, noise)


@dataclass
class _Loop:
    """One restart: the noise up and the stepper down."""

    ratio: float
    std: float
    down: Stepper
    steps: int


class _RestartRun:
    def __init__(self, solver: Restart, problem: ReverseSDE, x: Tensor, grid: Tensor, noise: Noise) -> None:
        self._main = solver.solver.stepper(problem, x, grid, noise)
        self._loops: dict[int, list[_Loop]] = {}
        process = problem.gaussian
        lam, count = process.lam(grid[1:]), 0
        for interval in solver.intervals:
            i = int((lam + math.log(interval.low)).abs().argmin())
            low, high = grid[i + 1], process.time_of_lam(-math.log(interval.high))
            if not float(low) < float(high) <= problem.t1 * (1 + 1e-9):
                raise ValueError(
                    f"Restart: expected levels between the grid's {float(torch.exp(-lam.max())):g} and t1's, "
                    f"got {interval.low:g} to {interval.high:g}"
                )
            ratio, std = process.transition_kernel(low, high)
            way = grids.karras(process, interval.steps, float(high), float(low))
            for _ in range(interval.repeats):
                count += 1
                # a stochastic solver must not see the same noise in every repetition
                down = solver.solver.stepper(problem, x, way, noise.other(count))
                self._loops.setdefault(i, []).append(_Loop(float(ratio), float(std), down, interval.steps))
        self._draw = noise.sequence(RESTART, max(count, 1), x.shape[1:], x.dtype)
        self._drawn = 0

    @property
    def calls(self) -> int:
        return self._main.calls + sum(loop.down.calls for loops in self._loops.values() for loop in loops)

    def step(self, i: int, x: Tensor) -> Tensor:
        x = self._main.step(i, x)
        for loop in self._loops.get(i, ()):
            x = torch.add(loop.ratio * x, self._draw(self._drawn), alpha=loop.std)
            self._drawn += 1
            for j in range(loop.steps):
                x = loop.down.step(j, x)
        return x
