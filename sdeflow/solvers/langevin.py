"""Langevin steps: as the corrector after any predictor, and annealed, alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.gaussian import GaussianSDE
from sdeflow.noise import CORRECTOR, Noise
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.base import Solver, Stepper, View, semilinear


@checked_class
@dataclass(frozen=True)
class Langevin:
    """Langevin corrector: x <- x + e s(x, t) + sqrt(2 e) z, with e = 2 (snr sigma(t))^2 or 2 (snr |z|/|s|)^2.

    (Song et al. 2021, Score-based generative modeling, algorithms 4 and 5 with alpha = 1.) At the level of noise
    the score of x has the norm |z|/sigma of its noise, and the two sizes agree. The first does not depend on the
    state, so the law of x_t is stationary up to the step's own error. The second, with norms per sample, does:
    its stationary law is p |s|^2 (mean square 1 + 2/d for N(0, I) in d dimensions), which only large d forgives.
    The published code takes the ratio of the norms' means over the batch, size="batch": nearly independent of the
    state in large batches, but a sample then depends on its neighbours. It changes with the number of samples asked
    for, with their `index`, and with how a run is cut into batches or devices, which no other size does.

    Args:
        snr: the signal-to-noise ratio r of a step, > 0.
        steps: Langevin steps a level, each one model call.
        size: "level" (sigma(t), of a Gaussian process), "sample" (the norms of the sample) or "batch" (their means).
    """

    snr: float = 0.16
    steps: int = 1
    size: Literal["level", "sample", "batch"] = "level"

    def __post_init__(self) -> None:
        if not 0 < self.snr <= 1e15:  # its square multiplies float32 states
            raise ValueError(f"Langevin: expected snr > 0, got {self.snr!r} (at most 1e15)")
        if not 1 <= self.steps <= 1_000_000:
            raise ValueError(f"Langevin: expected steps >= 1, got {self.steps!r} (at most a million)")
        if self.size not in ("level", "sample", "batch"):
            raise ValueError(f'Langevin: expected size "level", "sample" or "batch", got {self.size!r}')

    def correct(self, x: Tensor, score: Tensor, z: Tensor, sigma: float) -> Tensor:
        """One corrector step from x, given its score, standard normals z, and the level sigma(t)."""
        if self.size == "level":
            size = 2 * (self.snr * sigma) ** 2
            return torch.add(torch.add(x, score, alpha=size), z, alpha=math.sqrt(2 * size))
        ratio = _norm(z).mean() / _norm(score).mean() if self.size == "batch" else _norm(z) / _norm(score)
        steps = (2 * (self.snr * ratio) ** 2).reshape(-1, *[1] * (x.ndim - 1))
        return x + steps * score + torch.sqrt(2 * steps) * z


def _norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample, (batch,)."""
    return torch.linalg.vector_norm(x.reshape(x.shape[0], -1), dim=1)


@checked_class
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
        if isinstance(self.predictor, PredictorCorrector | AnnealedLangevin):
            raise TypeError(
                f"PredictorCorrector: {self.predictor.name} as predictor takes the corrector's own numbers: give its "
                "Langevin steps to the corrector (Langevin(steps=...))"
            )
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


@checked_class
@dataclass(frozen=True)
class AnnealedLangevin(Solver):
    """Annealed Langevin dynamics: `steps` Langevin steps at each level of the grid after the first.

    In y = x/alpha at the levels u = sigma/alpha of the grid, u_L the last,

        y <- y + e/2 grad log p(y) + sqrt(e) z,   e = step_size u^2/u_L^2

    (Song and Ermon 2019, Generative modeling by estimating gradients of the data distribution, algorithm 1, which is
    this with alpha = 1; the first of their levels is the prior's here). Between levels y stays as it is. It samples
    by mixing, it integrates nothing: it runs on the flow (eta = 0), all of its noise is its own, the number of levels
    changes no law, and the error is what `steps` leave unmixed and, in a direction of variance w, a relative e/(4 w)
    of the variance, of first order in step_size. The noise is numbered by level and step: grids of two sizes have no
    path in common.

    Args:
        steps: Langevin steps a level, each one model call.
        step_size: e at the last level, below 4 u_L^2, where a step across a thin set of data grows it instead.
    """

    steps: int = 100
    step_size: float = 2e-5
    name = "AnnealedLangevin"
    view: View = "transition"

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1_000_000:
            raise ValueError(f"AnnealedLangevin: expected steps >= 1, got {self.steps!r} (at most a million)")
        if not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ValueError(f"AnnealedLangevin: expected step_size > 0, got {self.step_size!r}")

    def check(self, problem: Problem) -> None:
        if semilinear(self.name, problem).stochastic:
            raise ValueError(
                f"{self.name} brings its own noise: solve the probability flow (sde.probability_flow(model), or "
                "eta=0), not a problem with noise"
            )

    def draws_noise(self, problem: Problem) -> bool:
        return True

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        assert noise is not None
        return _AnnealedRun(self, semilinear(self.name, problem), x, grid, noise)


class _AnnealedRun:
    def __init__(self, solver: AnnealedLangevin, problem: ReverseSDE, x: Tensor, grid: Tensor, noise: Noise) -> None:
        alpha, sigma = problem.gaussian.alpha(grid), problem.gaussian.sigma(grid)
        level = sigma[1:] / alpha[1:]
        if not bool((level > 0).all() and torch.isfinite(level).all()):
            raise ValueError(
                f"{solver.name}: the score is not finite at sigma = 0 or alpha = 0: end the grid short of it"
            )
        if not solver.step_size < 4 * float(level[-1]) ** 2:
            raise ValueError(
                f"{solver.name}: expected step_size < 4 (sigma/alpha)^2 = {4 * float(level[-1]) ** 2:.3g} at the last "
                f"level, t = {float(grid[-1]):g}, got {solver.step_size:g}: the steps would grow, not mix"
            )
        size = alpha[1:] ** 2 * solver.step_size * (level / level[-1]) ** 2  # of a step in x
        self._ratio, self._size = (alpha[1:] / alpha[:-1]).tolist(), size.tolist()
        self._steps = solver.steps
        self._score = problem.score_evaluator(grid[1:])
        self._draw = noise.sequence(CORRECTOR, (grid.numel() - 1) * solver.steps, x.shape[1:], x.dtype)
        self.calls = 0

    def step(self, i: int, x: Tensor) -> Tensor:
        x = self._ratio[i] * x
        for j in range(self._steps):
            score = self._score(i, x)
            self.calls += 1
            x = torch.add(x, score, alpha=0.5 * self._size[i])
            x = torch.add(x, self._draw(i * self._steps + j), alpha=math.sqrt(self._size[i]))
        return x
