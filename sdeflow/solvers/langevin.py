"""Predictor-corrector sampling: any predictor, then Langevin steps at the level it reached."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.noise import CORRECTOR, Noise
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.base import Solver, Stepper


@dataclass(frozen=True)
class Langevin:
    """Langevin corrector: x <- x + e s(x, t) + sqrt(2 e) z,   e = 2 (snr |z|/|s|)^2, norms per sample.

    (Song et al. 2021, Score-based generative modeling, algorithms 4 and 5 with alpha = 1; their code
    averages the norms over the batch, which makes a sample depend on its neighbours.)

    Args:
        snr: the signal-to-noise ratio r of a step, > 0.
        steps: Langevin steps a level, each one model call.
    """

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        if not self.snr > 0:
            raise ValueError(f"Langevin: expected snr > 0, got {self.snr!r}")
        if not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(f"Langevin: expected steps >= 1, got {self.steps!r}")

    def correct(self, x: Tensor, score: Tensor, z: Tensor) -> Tensor:
        """One corrector step from x, given its score and standard normals z."""
        event = tuple(range(1, x.ndim))
        ratio = torch.linalg.vector_norm(z, dim=event, keepdim=True) / torch.linalg.vector_norm(
            score, dim=event, keepdim=True
        )
        size = 2 * (self.snr * ratio) ** 2
        return x + size * score + torch.sqrt(2 * size) * z


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
            x = self._corrector.correct(x, score, self._draw(i * self._corrector.steps + j))
        return x
