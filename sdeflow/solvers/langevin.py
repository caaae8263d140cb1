"""Predictor-corrector sampling: any predictor, then Langevin steps at the level it reached."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdeflow.gaussian import GaussianSDE
from sdeflow.noise import CORRECTOR, Noise
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.base import Solver, Stepper


@dataclass(frozen=True)
class Langevin:
    """Langevin corrector: x <- x + e s(x, t) + sqrt(2 e) z, with e = 2 (snr sigma(t))^2 or 2 (snr |z|/|s|)^2.

    (Song et al. 2021, Score-based generative modeling, algorithms 4 and 5 with alpha = 1.) At the level of noise
    the score of x has the norm |z|/sigma of its noise, and the two sizes agree. The first does not depend on the
    state, so the law of x_t is stationary up to the step's own error. The second, with norms per sample, does:
    its stationary law is p |s|^2 (mean square 1 + 2/d for N(0, I) in d dimensions), which only large d forgives.
    The published code averages the norms over the batch, which makes a sample depend on its neighbours.

    Args:
        snr: the signal-to-noise ratio r of a step, > 0.
        steps: Langevin steps a level, each one model call.
        size: "level" (sigma(t), of a Gaussian process) or "sample" (the norms of the sample).
    """

    snr: float = 0.16
    steps: int = 1
    size: Literal["level", "sample"] = "level"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.snr) and self.snr > 0):
            raise ValueError(f"Langevin: expected snr > 0, got {self.snr!r}")
        if isinstance(self.steps, bool) or not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(f"Langevin: expected steps >= 1, got {self.steps!r}")
        if self.size not in ("level", "sample"):
            raise ValueError(f'Langevin: expected size "level" or "sample", got {self.size!r}')

    def correct(self, x: Tensor, score: Tensor, z: Tensor, sigma: float) -> Tensor:
        """One corrector step from x, given its score, standard normals z, and the level sigma(t)."""
        if self.size == "level":
            size = 2 * (self.snr * sigma) ** 2
            return torch.add(torch.add(x, score, alpha=size), z, alpha=math.sqrt(2 * size))
        ratio = _norm(z) / _norm(score)
        steps = (2 * (self.snr * ratio) ** 2).reshape(-1, *[1] * (x.ndim - 1))
        return x + steps * score + torch.sqrt(2 * steps) * z


def _norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample, (batch,)."""
    return torch.linalg.vector_norm(x.reshape(x.shape[0], -1), dim=1)


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """A predictor's step to each level, then Langevin corrector steps there.

    (Song et al. 2021, Score-based generative modeling, algorithm 1.) 1 + corrector.steps calls a
    step with a one-call predictor. The predictor sees the problem's eta; the corrector adds its own noise.

    Args:
        predictor: any solver of the problem.
        corrector: a `Langevin`.
    """

    predictor: Solver
    corrector: Langevin = Langevin()

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, Solver):
            raise TypeError(f"PredictorCorrector: expected a solver as predictor, got {self.predictor!r}")
        if not isinstance(self.corrector, Langevin):
            raise TypeError(f"PredictorCorrector: expected a Langevin as corrector, got {self.corrector!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.predictor.name}+Langevin"

    @property
    def view(self) -> str:  # type: ignore[override]
        return self.predictor.view

    def check(self, problem: Problem) -> None:
        if not isinstance(problem, ReverseSDE):
            raise ValueError(f"{self.name} needs a score: expected sde.reverse(model), got {type(problem).__name__}")
        if self.corrector.size == "level" and not isinstance(problem.process, GaussianSDE):
            raise ValueError(
                f'{self.name}: Langevin steps of size "level" need sigma(t) of a GaussianSDE, '
                f'got {type(problem.process).__name__}: use Langevin(size="sample")'
            )
        self.predictor.check(problem)

    def draws_noise(self, problem: Problem) -> bool:
        return True

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        assert isinstance(problem, ReverseSDE)
        assert noise is not None
        return _PredictorCorrectorRun(self, problem, x, grid, noise)


class _PredictorCorrectorRun:
    def __init__(self, solver: PredictorCorrector, problem: ReverseSDE, x: Tensor, grid: Tensor, noise: Noise) -> None:
        self._corrector = solver.corrector
        self._predict = solver.predictor.stepper(problem, x, grid, noise)
        self._score = problem.score_evaluator(grid[1:])
        last = problem.gaussian.sigma(grid[1:]) if isinstance(problem.process, GaussianSDE) else torch.ones(1)
        if bool((last == 0).any()):
            raise ValueError(f"{solver.name}: the score is not finite at sigma = 0: end the grid above it")
        by_level = solver.corrector.size == "level"
        self._sigma = problem.gaussian.sigma(grid[1:]).tolist() if by_level else [0.0] * (grid.numel() - 1)
        draws = (grid.numel() - 1) * solver.corrector.steps
        self._draw = noise.sequence(CORRECTOR, draws, x.shape[1:], x.dtype)
        self._corrections = 0

    @property
    def calls(self) -> int:
        return self._predict.calls + self._corrections

    def step(self, i: int, x: Tensor) -> Tensor:
        x = self._predict.step(i, x)
        for j in range(self._corrector.steps):
            score = self._score(i, x)
            self._corrections += 1
            z = self._draw(i * self._corrector.steps + j)
            x = self._corrector.correct(x, score, z, self._sigma[i])
        return x
