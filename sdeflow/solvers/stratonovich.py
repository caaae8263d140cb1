"""Heun's and the midpoint method for Stratonovich equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sdeflow.calculus import NoiseKind
from sdeflow.solvers.stochastic import AdaptiveStochasticSolver, H, StochasticSolver, Terms, plus


@dataclass(frozen=True)
class StochasticHeun(AdaptiveStochasticSolver):
    """y = x + f h + G W; x' = x + 1/2 (f + f(y)) h + 1/2 (G + G(y)) W, of the Stratonovich equation.

    (Rumelin 1982, Numerical treatment of stochastic differential equations.) Strong order 1 for noise that commutes,
    1/2 for general noise; weak order 1, 2 for additive noise; two drifts a step. Solves to a tolerance: its error
    estimate is 1/2 h (f(y) - f).
    """

    name = "StochasticHeun"
    form: ClassVar[Literal["ito", "stratonovich"]] = "stratonovich"
    strong: ClassVar[float] = 1.0

    def order_for(self, kind: NoiseKind) -> float:
        return 0.5 if kind == "general" else 1.0

    def step(self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None) -> Tensor:
        return self.estimate(terms, x, t, h, w, area)[0]

    def estimate(
        self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        f, noise = terms.drift(x, t), terms.apply(terms.diffusion(x, t), w)
        y = plus(x, h, f) + noise
        half = (terms.drift(y, t + h) - f) * (0.5 * h)
        other = terms.apply(terms.diffusion(y, t + h), w)
        return torch.add(y + half, other - noise, alpha=0.5), half


@dataclass(frozen=True)
class StochasticMidpoint(StochasticSolver):
    """y = x + 1/2 f h + 1/2 G W; x' = x + f(y, t + h/2) h + G(y, t + h/2) W, of the Stratonovich equation.

    (Kloeden and Platen 1992, section 8.1, with W a smooth driver.) Strong orders as `StochasticHeun`, weak order 1; two
    drifts a step.
    """

    name = "StochasticMidpoint"
    form: ClassVar[Literal["ito", "stratonovich"]] = "stratonovich"
    strong: ClassVar[float] = 1.0

    def order_for(self, kind: NoiseKind) -> float:
        return 0.5 if kind == "general" else 1.0

    def step(self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None) -> Tensor:
        y = plus(plus(x, 0.5 * h, terms.drift(x, t)), 0.5, terms.apply(terms.diffusion(x, t), w))
        middle = t + 0.5 * h
        return plus(x, h, terms.drift(y, middle)) + terms.apply(terms.diffusion(y, middle), w)
