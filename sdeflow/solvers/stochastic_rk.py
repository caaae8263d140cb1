"""Stochastic Runge-Kutta methods of strong order 1.5, as tableaus (Rossler 2010) and as ShARK."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sdeflow.calculus import NoiseKind
from sdeflow.solvers.stochastic import AdaptiveStochasticSolver, H, Terms, plus, root, size

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class AdditiveTableau:
    """A method SRA: with I = W, J = I_(1,0)/h,

        X_i = x + h sum_j a0[i][j] f(X_j, t + c0[j] h) + sum_j b0[i][j] G(t + c1[j] h) J,
        x' = x + h sum_i alpha[i] f(X_i, t + c0[i] h) + sum_i G(t + c1[i] h) (beta1[i] I + beta2[i] J).

    (Rossler 2010, Runge-Kutta methods for the strong approximation of solutions of SDEs, section 6.)
    """

    alpha: tuple[float, ...]
    a0: Rows
    b0: Rows
    c0: tuple[float, ...]
    beta1: tuple[float, ...]
    beta2: tuple[float, ...]
    c1: tuple[float, ...]


SRA1_TABLEAU = AdditiveTableau(
    alpha=(1 / 3, 2 / 3), a0=((), (3 / 4,)), b0=((), (3 / 2,)), c0=(0, 3 / 4),
    beta1=(1, 0), beta2=(-1, 1), c1=(1, 0),
)  # fmt: skip
SRA3_TABLEAU = AdditiveTableau(
    alpha=(1 / 6, 1 / 6, 2 / 3), a0=((), (1,), (1 / 4, 1 / 4)), b0=((), (), (1, 1 / 2)), c0=(0, 1, 1 / 2),
    beta1=(1, 0, 0), beta2=(-1, 1, 0), c1=(1, 0, 0),
)  # fmt: skip


def _at(t: Tensor, c: float, h: H) -> Tensor:
    return t if c == 0 else t + c * h


@dataclass(frozen=True)
class SRA(AdaptiveStochasticSolver):
    """A method for additive noise of strong order 1.5 (weak order 2), from its tableau. Solves to a tolerance.

    The error estimate is the difference to Euler-Maruyama's step, of size h^(3/2).
    """

    tableau: AdditiveTableau = SRA1_TABLEAU
    name: str = "SRA1"
    areas: ClassVar[bool] = True
    fits: ClassVar[tuple[NoiseKind, ...]] = ("additive",)
    strong: ClassVar[float] = 1.5

    def step(self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None) -> Tensor:
        return self._run(terms, x, t, h, w, area)[0]

    def estimate(
        self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        new, f, g = self._run(terms, x, t, h, w, area)
        return new, new - (plus(x, h, f) + terms.apply(g, w))

    def _run(
        self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x', f(x, t), G(t))."""
        assert area is not None
        table, j = self.tableau, 0.5 * w + area
        needed = [i for i, c in enumerate(table.c1) if table.beta1[i] or table.beta2[i] or _uses(table.b0, i)]
        g = {i: terms.diffusion(x, _at(t, table.c1[i], h)) for i in needed}
        lifted = {i: terms.apply(g[i], j) for i in needed}
        slopes: list[Tensor] = []
        for a, b, c in zip(table.a0, table.b0, table.c0, strict=True):
            y = x
            for v, slope in zip(a, slopes, strict=False):
                y = plus(y, v * h, slope)
            for i, v in enumerate(b):
                y = plus(y, v, lifted[i])
            slopes.append(terms.drift(y, _at(t, c, h)))
        new = x
        for v, f in zip(table.alpha, slopes, strict=True):
            new = plus(new, v * h, f)
        for i in needed:
            if table.beta1[i]:
                new = plus(new, table.beta1[i], terms.apply(g[i], w))
            if table.beta2[i]:
                new = plus(new, table.beta2[i], lifted[i])
        start = next((i for i in needed if table.c1[i] == 0), needed[0])
        return new, slopes[0], g[start]


def _uses(rows: Rows, i: int) -> bool:
    return any(len(row) > i and row[i] != 0 for row in rows)


def SRA1() -> SRA:
    """Rossler's SRA1: additive noise, strong order 1.5, weak 2; two drifts a step (Rossler 2010, table 6.2)."""
    return SRA(SRA1_TABLEAU, "SRA1")


def SRA3() -> SRA:
    """Rossler's SRA3: as SRA1, of order 3 without noise; three drifts a step (Rossler 2010, table 6.3)."""
    return SRA(SRA3_TABLEAU, "SRA3")


@dataclass(frozen=True)
class ShARK(AdaptiveStochasticSolver):
    """Shifted additive-noise Runge-Kutta: strong order 1.5 (weak 2) for additive noise, two drifts a step.

        y = x + G H,  z = y + 5/6 (h f(y, t) + G W),
        x' = x + h (2/5 f(y, t) + 3/5 f(z, t + 5/6 h)) + int G dW,

    with int G dW = G(t + h) W + (G(t) - G(t + h)) I_(1,0)/h, exact for G linear in t. (Foster, dos Reis and Strange
    2023, High order splitting methods for SDEs satisfying a commutativity condition, section 5.) Solves to a
    tolerance, with the estimate of `SRA`.
    """

    name = "ShARK"
    areas: ClassVar[bool] = True
    fits: ClassVar[tuple[NoiseKind, ...]] = ("additive",)
    strong: ClassVar[float] = 1.5

    def step(self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None) -> Tensor:
        return self.estimate(terms, x, t, h, w, area)[0]

    def estimate(
        self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert area is not None
        g, end = terms.diffusion(x, t), terms.diffusion(x, t + h)
        rise = terms.apply(g, w)
        y = x + terms.apply(g, area)
        f = terms.drift(y, t)
        other = terms.drift(y + (5 / 6) * (h * f + rise), t + (5 / 6) * h)
        noise = terms.apply(end, w) + terms.apply(g - end, 0.5 * w + area)
        new = x + h * (0.4 * f + 0.6 * other) + noise
        # f was taken at y, not at x: the difference to Euler-Maruyama's step from there is of the same size
        return new, new - (x + h * f + rise)


@dataclass(frozen=True)
class SRIW1(AdaptiveStochasticSolver):
    """Rossler's SRI1W1 for diagonal and scalar noise: strong order 1.5; 2 drifts and 4 diffusions a step.

    Weak order 2 for additive noise, and 1.5 where G''' is not 0. (Rossler 2010, section 5, table 5.2.) Solves to a
    tolerance: the error estimate is what the step adds to Milstein's, of size h^(3/2).
    """

    name = "SRIW1"
    areas: ClassVar[bool] = True
    fits: ClassVar[tuple[NoiseKind, ...]] = ("additive", "diagonal", "scalar")
    strong: ClassVar[float] = 1.5

    def step(self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None) -> Tensor:
        return self._run(terms, x, t, h, w, area)[0]

    def estimate(
        self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        new, f, g = self._run(terms, x, t, h, w, area)
        milstein = x + h * f + terms.apply(g[0], w)
        if terms.kind != "additive":
            milstein = milstein + (w * w - size(h)) * (g[1] - g[0]) / root(h)
        return new, new - milstein

    def _run(
        self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(x', f(x, t), the diffusions)."""
        assert area is not None
        r, length = root(h), size(h)
        f, g0 = terms.drift(x, t), terms.diffusion(x, t)
        quarter = plus(x, 0.25 * h, f)
        if terms.kind == "additive":  # G ignores its state, and may be a matrix
            g1, g2 = terms.diffusion(x, t + 0.25 * h), terms.diffusion(x, t + h)
            g3 = g1
        else:
            g1 = terms.diffusion(plus(quarter, 0.5 * r, g0), t + 0.25 * h)
            g2 = terms.diffusion(plus(plus(x, h, f), -r, g0), t + h)
            y = plus(plus(plus(quarter, -5 * r, g0), 3 * r, g1), 0.5 * r, g2)
            g3 = terms.diffusion(y, t + 0.25 * h)
        i10 = torch.add(area, w, alpha=0.5)
        square = w * w
        i11 = (square - length) * (0.5 / r)
        i111 = (square - 3 * length) * w * (1 / (6 * length))
        other = terms.drift(terms.add(plus(x, 0.75 * h, f), g0, i10, 1.5), t + 0.75 * h)
        new = plus(plus(x, h / 3, f), 2 * h / 3, other)
        # the tableau's beta1 is d; beta2 = d - (0, 0, 1, 0) and beta3 = (1, 0, 0, 0) - d
        d = torch.add(torch.sub(4 / 3 * g1, g0), g2, alpha=2 / 3)
        third = torch.add(torch.add(torch.add(g3, g1, alpha=5 / 3), g0, alpha=-2), g2, alpha=-2 / 3)
        new = terms.add(new, d, w + i11 - i10)
        new = terms.add(terms.add(new, g0, i10), g2, i11, -1.0)
        return terms.add(new, third, i111), f, [g0, g1, g2, g3]
