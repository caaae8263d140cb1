"""Solvers that hold the state to linear observations after each of their steps: replacement, and the published DPS."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.combined import usable_time, x0_of
from sdeflow.noise import OBSERVED, Noise
from sdeflow.observations import LinearObservation, check_fit, check_observation
from sdeflow.plan import Plan
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.base import LinearSolver, Solver, Stepper, semilinear

_MOST = 1000
"""Times that a step is taken anew."""


@dataclass(frozen=True, eq=False)
class _AfterStep(Solver):
    """A one-step solver and the observation."""

    solver: Solver
    observation: LinearObservation
    y: Tensor
    view = "transition"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver) or isinstance(self.solver, _AfterStep):
            raise TypeError(f"{self.name}: expected a solver such as DDIM(), got {self.solver!r}")
        check_observation(self.observation, self.y)

    def check(self, problem: Problem) -> None:
        semilinear(self.name, problem)
        self.solver.check(problem)

    def steppers(self, problem: Problem, x: Tensor, grid: Tensor, noises: list[Noise | None]) -> list[Stepper]:
        """The solver's steppers, one for each noise; refused if a step reads evaluations of an earlier one."""
        check_fit(self.observation, self.y, x)
        if isinstance(self.solver, LinearSolver) and _remembers(self.solver.plan(problem, grid)):
            raise ValueError(
                f"{self.name}: {self.solver.name} uses evaluations of earlier steps, whose states this changes: "
                "expected a one-step solver, such as DDIM(), DDPM() or EDMHeun()"
            )
        return [self.solver.stepper(problem, x, grid, noise) for noise in noises]


def _remembers(plan: Plan) -> bool:
    """Whether a row of the plan weighs an evaluation of an earlier step (weights are newest first)."""
    rows = torch.arange(plan.nfe)
    return any(
        bool((plan.weights[j:, j] != 0)[plan.step_of_row[rows[j:]] != plan.step_of_row[rows[j:] - j]].any())
        for j in range(1, plan.weights.shape[1])
    )


@checked_class
@dataclass(frozen=True, eq=False)
class Replacement(_AfterStep):
    """`solver`, and after each step to time t the observed part of x drawn from the observation noised to t:

        x <- x + A^T (A A^T)^-1 (alpha y + sigma A z - A x),   z ~ N(0, I)

    (Song et al. 2021, Score-based generative modeling, appendix I.2; with `resample` > 1 Lugmayr et al. 2022,
    RePaint, algorithm 1: the step is taken `resample` times, noised back up in between by the process's kernel.)
    Biased: the rest of x is moved by the score of p_t given an observed part redrawn at each level, not by that of
    p_t(x | y). Resampling lessens it at resample times the calls. For exact observations and A A^T invertible.

    Args:
        solver: a one-step solver.
        observation: with noise_std = 0.
        y: observations, one row a sample, or one row for all.
        resample: times each step is taken, >= 1.
    """

    resample: int = 1
    name = "Replacement"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.resample <= _MOST:
            raise ValueError(f"Replacement: expected resample >= 1, got {self.resample!r} (at most {_MOST})")
        if self.observation.noise_std != 0:
            raise ValueError(
                f"Replacement: takes y as exact: expected noise_std = 0, got {self.observation.noise_std:g}; "
                "build the observation with 0, or use pigdm"
            )

    def draws_noise(self, problem: Problem) -> bool:
        return True

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        assert noise is not None
        return _ReplacementRun(self, semilinear(self.name, problem), x, grid, noise)


class _ReplacementRun:
    def __init__(self, solver: Replacement, problem: ReverseSDE, x: Tensor, grid: Tensor, noise: Noise) -> None:
        process, again = problem.gaussian, solver.resample
        # a repeated step needs a path of its own: that of another seed for the same samples
        if again > 1 and (type(noise) is not Noise or noise.one_path or noise._sign is not None):
            raise ValueError("Replacement: resample > 1 draws paths of its own: expected seed, not noise=")
        self._steppers = solver.steppers(problem, x, grid, [noise, *(noise.other(j) for j in range(1, again))])
        self._alpha, self._sigma = process.alpha(grid[1:]).tolist(), process.sigma(grid[1:]).tolist()
        ratio, std = process.transition_kernel(grid[1:], grid[:-1])
        self._up = list(zip(ratio.tolist(), std.tolist(), strict=True))
        self._observation, self._y = solver.observation, solver.y.to(x)
        self._draw = noise.sequence(OBSERVED, 2 * again * (grid.numel() - 1), x.shape[1:], x.dtype)
        self._drawn = 0

    @property
    def calls(self) -> int:
        return sum(stepper.calls for stepper in self._steppers)

    def step(self, i: int, x: Tensor) -> Tensor:
        one = torch.ones((), dtype=x.dtype)
        for j, stepper in enumerate(self._steppers):
            if j > 0:
                ratio, std = self._up[i]
                x = ratio * x + std * self._next()
            x = stepper.step(i, x)
            seen = self._alpha[i] * self._y - self._observation.forward(x - self._sigma[i] * self._next())
            x = x + self._observation.adjoint(self._observation.solve(seen, one, 0 * one))
        return x

    def _next(self) -> Tensor:
        self._drawn += 1
        return self._draw(self._drawn - 1)


@checked_class
@dataclass(frozen=True, eq=False)
class DPSStep(_AfterStep):
    """`solver`, and after each step from x at t the published DPS correction, x_next - zeta grad_x |y - A D(x, t)|.

    (Chung et al. 2023, Diffusion posterior sampling, algorithm 1, with step sizes zeta'/|y - A D|: the gradient of
    the square over the norm is twice that of the norm, so zeta = 2 zeta'. The norm is of each sample.) The strength
    is per step: twice as many steps guide twice as hard, and no limit of small steps is the posterior. Near the data
    the gradient keeps its length as the residual goes to 0, so that x ends within about zeta of A x = y, whatever the
    noise of y. `dps` is the form that has a limit. One more call a step, differentiated.

    Args:
        solver: a one-step solver.
        observation: its noise_std is not used: |y - A D| knows no scale.
        y: observations, one row a sample, or one row for all.
        zeta: > 0.
    """

    zeta: float = 1.0
    name = "DPSStep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.zeta) and self.zeta > 0):
            raise ValueError(f"DPSStep: expected zeta > 0, got {self.zeta!r}")

    def draws_noise(self, problem: Problem) -> bool:
        return self.solver.draws_noise(problem)

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        return _DPSRun(self, semilinear(self.name, problem), x, grid, noise)


class _DPSRun:
    def __init__(self, solver: DPSStep, problem: ReverseSDE, x: Tensor, grid: Tensor, noise: Noise | None) -> None:
        (self._stepper,) = solver.steppers(problem, x, grid, [noise])
        self._model, self._grid = problem.model, grid
        self._observation, self._y, self._zeta = solver.observation, solver.y.to(x), solver.zeta
        self._own = 0

    @property
    def calls(self) -> int:
        return self._stepper.calls + self._own

    def step(self, i: int, x: Tensor) -> Tensor:
        keep = torch.is_grad_enabled() and x.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x if keep else x.detach().clone().requires_grad_()
            t = usable_time(self._grid[i])
            value = self._model(leaf, t, self._model.prediction)
            self._own += 1
            residual = self._y - self._observation.forward(x0_of(self._model, leaf, t, value))
            distance = torch.linalg.vector_norm(residual.flatten(1), dim=1).sum()
            (gradient,) = torch.autograd.grad(distance, leaf, create_graph=keep)
        return self._stepper.step(i, x) - self._zeta * gradient
