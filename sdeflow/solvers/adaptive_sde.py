"""The adaptive sampler of reverse SDEs: Euler-Maruyama against stochastic improved Euler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sdeflow.calculus import NoiseKind
from sdeflow.checked import checked_class
from sdeflow.pid import PID
from sdeflow.solvers.stochastic import AdaptiveStochasticSolver, H, Terms


@checked_class
@dataclass(frozen=True)
class AdaptiveSDE(AdaptiveStochasticSolver):
    """x' = x + h f + G W, x'' = 1/2 (x' + x + h f(x', t + h) + G(t + h) W); x'' is kept and x'' - x' is the error.

    (Jolicoeur-Martineau et al. 2021, Gotta go fast when generating data with score-based models, algorithm 1.) Its
    tolerance semantics: a step is accepted when the root mean square of (x'' - x')/max(atol, rtol max(|x'|, |x'_prev|))
    is at most 1, and h <- 0.9 h e^(-0.9); two drifts an attempt, a step a sample. The paper takes atol = 0.0078 (two
    grey levels of 256 on [-1, 1] data, halved) and rtol from 0.01 to 0.1. Its retries draw new noise; here they see
    the same path. For noise that does not depend on x, as in every reverse SDE of a Gaussian process.

    Args:
        first: the first step, as a share of the span.
        safety, exponent: of the step size rule.
    """

    first: float = 0.01
    safety: float = 0.9
    exponent: float = 0.9
    name = "AdaptiveSDE"
    fits: ClassVar[tuple[NoiseKind, ...]] = ("additive",)
    strong: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        for field in ("first", "safety", "exponent"):
            value = getattr(self, field)
            if not (math.isfinite(value) and 0 < value <= 1):
                raise ValueError(f"AdaptiveSDE: expected {field} in (0, 1], got {value!r}")

    @property
    def first_step(self) -> float:
        """`first`, as a share of the span."""
        return self.first

    def per_unit(self, kind: NoiseKind) -> float:
        """0: the error of a step is held against the tolerance as it is, whatever its size."""
        return 0.0

    def control(self, rtol: float, atol: float, max_steps: int) -> PID:
        return PID(
            rtol, atol, max_steps, safety=self.safety, shrink=1e-3, proportional=self.exponent, integral=0.0,
            combine="max",
        )  # fmt: skip

    def step(self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None) -> Tensor:
        return self.estimate(terms, x, t, h, w, area)[0]

    def estimate(
        self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        euler = x + h * terms.drift(x, t) + terms.apply(terms.diffusion(x, t), w)
        other = x + h * terms.drift(euler, t + h) + terms.apply(terms.diffusion(x, t + h), w)
        half = 0.5 * (other - euler)
        return euler + half, half
