"""Milstein's method: strong order 1 by the iterated integrals of the noise, for commutative and for general noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sdeflow.calculus import NoiseKind, lie_products
from sdeflow.checked import checked_class
from sdeflow.noise import Noise
from sdeflow.sde import SDE, Problem, multiply_noise
from sdeflow.solvers.base import Stepper
from sdeflow.solvers.stochastic import GridRun, H, StochasticSolver, Terms, plus, root, size


@checked_class
@dataclass(frozen=True)
class Milstein(StochasticSolver):
    """x' = x + f h + G W + 1/2 sum_jk L^j G_k (W_j W_k - delta_jk h), L^j = G_j . grad (Milstein 1974).

    Strong order 1 and weak order 1 for noise that commutes (additive, diagonal, scalar included); one drift a step.
    (Kloeden and Platen 1992, section 10.3, equations 3.1 and 3.16.)

    Args:
        derivative: "autodiff", exact; or "central", by (G(x + G_j sqrt(h)) - G(x - G_j sqrt(h)))/(2 sqrt(h)), two
            evaluations of G a noise component (a one-sided difference would add an error of size h^(3/2) a step).
    """

    derivative: Literal["autodiff", "central"] = "autodiff"
    name = "Milstein"
    fits: ClassVar[tuple[NoiseKind, ...]] = ("additive", "diagonal", "scalar", "commutative")
    strong: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.derivative not in ("autodiff", "central"):
            raise ValueError(f'Milstein: expected derivative "autodiff" or "central", got {self.derivative!r}')

    def step(self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None) -> Tensor:
        drifted = plus(x, h, terms.drift(x, t))
        if terms.kind == "additive":
            return drifted + terms.apply(terms.diffusion(x, t), w)
        if terms.kind == "commutative":
            g, products = self._products(terms, x, t, h)
            twice = w.unsqueeze(-1) * w.unsqueeze(-2)
            twice = twice - torch.eye(w.shape[-1], dtype=w.dtype, device=w.device) * _flat(size(h))
            return drifted + multiply_noise(terms.problem, g, w) + 0.5 * _contract(products, twice)
        if self.derivative == "autodiff":
            g, slope = terms.slope(x, t)
        else:
            g = terms.diffusion(x, t)
            ahead, behind = terms.diffusion(x + root(h) * g, t), terms.diffusion(x - root(h) * g, t)
            slope = (ahead - behind) / (2 * root(h))
        return torch.addcmul(drifted, g, w).addcmul(slope, w * w - size(h), value=0.5)

    def _products(self, terms: Terms, x: Tensor, t: Tensor, h: H) -> tuple[Tensor, Tensor]:
        if self.derivative == "autodiff":
            return lie_products(terms.problem, x, t)
        g, r = terms.diffusion(x, t), root(h)
        ends = [(terms.diffusion(x + r * v, t), terms.diffusion(x - r * v, t)) for v in g.unbind(-1)]
        scale = 2 * (r.unsqueeze(-1) if isinstance(r, Tensor) else r)
        return g, torch.stack([(ahead - behind) / scale for ahead, behind in ends], dim=-2)


def _flat(h: H) -> H:
    """h (batch, 1, ...) against (batch, m, m)."""
    return h.reshape(-1, 1, 1) if isinstance(h, Tensor) and h.ndim > 0 else h


def _contract(products: Tensor, weights: Tensor) -> Tensor:
    """sum_jk L^j G_k weights_jk: (batch, *event, m, m) with (batch, m, m)."""
    flat = products.flatten(-2)
    return (flat * weights.reshape(len(weights), *[1] * (flat.ndim - 2), -1)).sum(-1)


@checked_class
@dataclass(frozen=True)
class LevyMilstein(StochasticSolver):
    """Milstein's method for any noise: x' = x + f h + G W + sum_jk L^j G_k (I_(j,k) - 1/2 delta_jk h), strong order 1.

    I_(j,k) = int W_j dW_k = 1/2 W_j W_k + A_jk. The Levy area A of a step is the sum over its `substeps` of what
    their (W, H) tell, P_j w_k - P_k w_j over 2 plus H_j w_k - w_j H_k (its conditional mean: Foster 2020, Numerical
    approximations for SDEs, chapter 7), P the path so far. What is left has variance h^2/(12 substeps) a pair, so
    strong order 1 needs substeps in proportion to the steps; a smaller step sees a refinement of the same path.
    One drift and m directional derivatives of G a step.

    Args:
        substeps: a power of 2; None takes the least that is not below a quarter of the number of steps.
    """

    substeps: int | None = None
    name = "LevyMilstein"
    areas: ClassVar[bool] = True
    strong: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        k = self.substeps
        if k is not None and (k < 1 or k & (k - 1)):
            raise ValueError(f"LevyMilstein: expected substeps as a power of 2, got {k!r}")

    def step(self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None) -> Tensor:
        """A step of one substep."""
        assert area is not None
        w, area = w.reshape(len(x), -1), area.reshape(len(x), -1)
        return _with_iterated(terms, x, t, h, w, _iterated(w.new_zeros(()), w, area))

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        assert isinstance(problem, SDE)
        assert noise is not None
        return _LevyRun(self, problem, x, grid, noise)


class _LevyRun(GridRun):
    def __init__(self, solver: LevyMilstein, problem: SDE, x: Tensor, grid: Tensor, noise: Noise) -> None:
        self._count = solver.substeps or 1 << max(0, math.ceil(math.log2((grid.numel() - 1) / 4)))
        share = torch.arange(self._count, dtype=torch.float64) / self._count
        fine = (grid[:-1, None] + torch.diff(grid)[:, None] * share).flatten()
        super().__init__(solver, problem, x, grid, noise, path=torch.cat([fine, grid[-1:]]))

    def _advance(self, i: int, x: Tensor) -> Tensor:
        path, iterated = x.new_zeros(()), x.new_zeros(())  # of the step so far
        for j in range(self._count):  # a batched product would round by the size of the batch
            part = self._walk(i * self._count + j)
            assert part.h is not None
            w = part.w.reshape(len(x), -1)
            iterated = iterated + _iterated(path, w, part.h.reshape(len(x), -1))
            path = path + w
        return _with_iterated(self._terms, x, self._times[i], self._steps[i], path, iterated)


def _iterated(path: Tensor, w: Tensor, area: Tensor) -> Tensor:
    """P_j W_k + 1/2 W_j W_k + H_j W_k - W_j H_k: what (W, H) of a substep from P adds to I_(j,k) + 1/2 delta_jk h."""
    return (path + 0.5 * w + area).unsqueeze(-1) * w.unsqueeze(-2) - w.unsqueeze(-1) * area.unsqueeze(-2)


def _with_iterated(terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, iterated: Tensor) -> Tensor:
    """x + f h + G W + sum_jk L^j G_k (iterated_jk - 1/2 delta_jk h)."""
    weights = iterated - 0.5 * _flat(size(h)) * torch.eye(w.shape[-1], dtype=x.dtype, device=x.device)
    drift = terms.drift(x, t)
    g, products = lie_products(terms.problem, x, t)
    g, products = g.to(x.dtype), products.to(x.dtype)
    noise = (g * w.reshape(len(x), *[1] * (x.ndim - 1), -1)).sum(-1)
    return plus(x, h, drift) + noise + _contract(products, weights)
