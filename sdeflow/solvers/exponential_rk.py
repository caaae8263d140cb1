"""Exponential Runge-Kutta methods with the stiff order conditions: single steps, and pairs that solve to a tolerance.

In lam the flow of a Gaussian process is w' = z w + g with a constant z: w = x/alpha, z = -1, g = x_0 in data
prediction, w = x/sigma, z = 1, g = -eps in noise prediction. A method is a table of multiples of
phi_j(c z h) = int_0^1 exp((1 - u) c z h) u^(j - 1)/(j - 1)! du (Hochbruck and Ostermann 2010, Exponential integrators,
section 2.3); in diffusion: DPM-Solver-2 and -3, RES (Zhang et al. 2023, Improved order analysis, algorithm 1).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.gaussian import GaussianSDE
from sdeflow.plan import Plan, eta_key
from sdeflow.quadrature import gauss_legendre
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.base import Evaluate, LinearSolver, Norm, View, per_row, refuse_noise, semilinear

Phi = tuple[float, int, float]
"""(factor, j, c): factor phi_j(c z h)."""
Row = dict[int, tuple[Phi, ...]]
"""By stage: the sum that multiplies h g_stage."""


@dataclass(frozen=True)
class ExponentialTableau:
    """Nodes c, rows a (of stages 1, 2, ...), weights b, and the weights of a result one order lower."""

    order: int
    c: tuple[float, ...]
    a: tuple[Row, ...]
    b: Row
    b_low: Row | None
    reference: str


_HALF, _FIRST, _SECOND = 1 / 2, 1 / 3, 2 / 3

MIDPOINT = ExponentialTableau(
    2, (0.0, _HALF), ({0: ((_HALF, 1, _HALF),)},), {1: ((1, 1, 1),)}, {0: ((1, 1, 1),)},
    "Lu et al. 2022, DPM-Solver, algorithm 1 (DPM-Solver-2); DPM-Solver++, algorithm 1 (2S)",
)  # fmt: skip
"""DPM-Solver-2 as published: the midpoint's evaluation alone; of order 2, without the stiff order condition."""

TABLEAUS = {
    1: ExponentialTableau(
        1, (0.0,), (), {0: ((1, 1, 1),)}, None, "Hochbruck and Ostermann 2010, equation 2.4 (exponential Euler)"
    ),
    2: ExponentialTableau(
        2, (0.0, _HALF), ({0: ((_HALF, 1, _HALF),)},),
        {0: ((1, 1, 1), (-2, 2, 1)), 1: ((2, 2, 1),)},
        {0: ((1, 1, 1),)},
        "Hochbruck and Ostermann 2010, equation 2.39 with c_2 = 1/2; Zhang et al. 2023, RES",
    ),
    3: ExponentialTableau(
        3, (0.0, _FIRST, _SECOND),
        (
            {0: ((_FIRST, 1, _FIRST),)},
            {0: ((_SECOND, 1, _SECOND), (-4 / 3, 2, _SECOND)), 1: ((4 / 3, 2, _SECOND),)},
        ),
        {0: ((1, 1, 1), (-3 / 2, 2, 1)), 2: ((3 / 2, 2, 1),)},
        {0: ((1, 1, 1), (-3, 2, 1)), 1: ((3, 2, 1),)},
        "Hochbruck and Ostermann 2005, equation 5.8 with c_2 = 1/3; Lu et al. 2022, DPM-Solver-3",
    ),
    4: ExponentialTableau(
        4, (0.0, _HALF, _HALF, 1.0, _HALF),
        (
            {0: ((_HALF, 1, _HALF),)},
            {0: ((_HALF, 1, _HALF), (-1, 2, _HALF)), 1: ((1, 2, _HALF),)},
            {0: ((1, 1, 1), (-2, 2, 1)), 1: ((1, 2, 1),), 2: ((1, 2, 1),)},
            {
                # a_52 = a_53 = phi_2(1/2)/2 - phi_3(1) + phi_2(1)/4 - phi_3(1/2)/2, a_54 = phi_2(1/2)/4 - a_52,
                # a_51 = phi_1(1/2)/2 - 2 a_52 - a_54
                0: ((_HALF, 1, _HALF), (-3 / 4, 2, _HALF), (1, 3, 1), (-1 / 4, 2, 1), (_HALF, 3, _HALF)),
                1: ((_HALF, 2, _HALF), (-1, 3, 1), (1 / 4, 2, 1), (-_HALF, 3, _HALF)),
                2: ((_HALF, 2, _HALF), (-1, 3, 1), (1 / 4, 2, 1), (-_HALF, 3, _HALF)),
                3: ((-1 / 4, 2, _HALF), (1, 3, 1), (-1 / 4, 2, 1), (_HALF, 3, _HALF)),
            },
        ),
        {
            0: ((1, 1, 1), (-3, 2, 1), (4, 3, 1)),
            3: ((-1, 2, 1), (4, 3, 1)),
            4: ((4, 2, 1), (-8, 3, 1)),
        },
        None,
        "Hochbruck and Ostermann 2005, equation 5.19",
    ),
}  # fmt: skip


@checked_class
@dataclass(frozen=True)
class ExponentialRK(LinearSolver):
    """Exponential Runge-Kutta of order 1 to 4: 1, 2, 3 and 5 calls a step. Orders 2 and 3 are adaptive (rtol, atol).

    On a grid, a last step to sigma = 0 is one of order 1, which is exact there in data prediction.

    Args:
        order: 1 to 4.
        prediction: "x0" (DPM-Solver++-like) or "eps" (DPM-Solver-like).
        label: a name of its own for tables.
        second: for order 2, "exact" (the stiff order condition holds) or "midpoint" (DPM-Solver-2 as published).
        final_orders: orders of the last steps on a grid, if they are not `order`.
    """

    order: int = 2
    prediction: Literal["x0", "eps"] = "x0"
    label: str = ""
    second: Literal["exact", "midpoint"] = "exact"
    final_orders: tuple[int, ...] = ()
    view: View = "transition"

    def __post_init__(self) -> None:
        if self.order not in TABLEAUS:
            raise ValueError(f"{self.name}: expected order 1 to 4, got {self.order!r}")
        if self.prediction not in ("x0", "eps"):
            raise ValueError(f'{self.name}: expected prediction "x0" or "eps", got {self.prediction!r}')
        if self.second not in ("exact", "midpoint"):
            raise ValueError(f'{self.name}: expected second "exact" or "midpoint", got {self.second!r}')
        if any(order not in TABLEAUS for order in self.final_orders):
            raise ValueError(f"{self.name}: expected final_orders from 1 to 4, got {self.final_orders!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label or f"ExponentialRK({self.order})"

    @property
    def tableau(self) -> ExponentialTableau:
        """The method's coefficients."""
        return self._table(self.order)

    def _table(self, order: int) -> ExponentialTableau:
        return MIDPOINT if order == 2 and self.second == "midpoint" else TABLEAUS[order]

    @property
    def pair(self) -> ExponentialPair | None:
        return None if self.tableau.b_low is None else ExponentialPair(self.tableau, self.prediction)

    def check(self, problem: Problem) -> None:
        semilinear(self.name, problem)
        refuse_noise(self.name, problem)

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        process = semilinear(self.name, problem).gaussian
        lam = process.lam(grid)
        last = not bool(torch.isfinite(lam[-1]))
        if not bool(torch.isfinite(lam[:-1]).all()):
            raise ValueError(
                f"{self.name}: expected alpha > 0 and sigma > 0 before the last time, got lam {lam.tolist()}"
            )
        steps = grid.numel() - 1
        orders = [self.order] * steps
        for left, order in enumerate(reversed(self.final_orders[-steps:])):
            orders[steps - 1 - left] = order
        pieces: list[_Rows] = []
        for order, run in itertools.groupby(range(steps - last), key=orders.__getitem__):
            inside = list(run)
            pieces.append(_rows(self._table(order), process, grid[inside[0] : inside[-1] + 2], self.prediction))
        if last:
            pieces.append(_last_row(process, grid[-2:], self.prediction))
        history = max(piece.weights.shape[1] for piece in pieces)
        starts = torch.tensor([0] + [piece.steps for piece in pieces[:-1]]).cumsum(0).tolist()
        step = torch.cat([piece.step + start for piece, start in zip(pieces, starts, strict=True)])
        target, start = torch.cat([piece.targets for piece in pieces]), grid[step]
        scale = process.alpha if self.prediction == "eps" else process.sigma
        return Plan(
            name=self.name,
            view="transition",
            target=self.prediction,
            grid=grid,
            times=torch.cat([piece.times for piece in pieces]),
            step_of_row=step,
            ratio=scale(target) / scale(start),
            weights=torch.cat([torch.nn.functional.pad(p.weights, (0, history - p.weights.shape[1])) for p in pieces]),
            noise=torch.zeros(step.numel(), dtype=torch.float64),
            process=repr(process),
            eta=eta_key(semilinear(self.name, problem).eta),
        )


@dataclass(frozen=True)
class _Rows:
    """Rows of a run of steps: when each evaluates, the time it leads to, its step, its weights, newest first."""

    times: Tensor
    targets: Tensor
    step: Tensor
    weights: Tensor

    @property
    def steps(self) -> int:
        return int(self.step[-1]) + 1


def _rows(table: ExponentialTableau, process: GaussianSDE, grid: Tensor, prediction: str) -> _Rows:
    """Every row on a grid of finite lam."""
    lam, steps, stages = process.lam(grid), grid.numel() - 1, len(table.c)
    h = torch.diff(lam)
    c = torch.tensor(table.c, dtype=torch.float64)
    times = process.time_of_lam(lam[:-1, None] + h[:, None] * c)
    times[:, 0] = grid[:-1]
    times[:, c == 1] = grid[1:, None]
    targets = torch.cat([times[:, 1:], grid[1:, None]], dim=1)
    weights = torch.zeros(steps, stages, stages, dtype=torch.float64)
    for i, row in enumerate([*table.a, table.b]):
        for j, w in _weights(row, process, targets[:, i], h, prediction).items():
            weights[:, i, i - j] = w
    step = torch.arange(steps).repeat_interleave(stages)
    return _Rows(times.flatten(), targets.flatten(), step, weights.flatten(0, 1))


def _last_row(process: GaussianSDE, ends: Tensor, prediction: str) -> _Rows:
    """Exponential Euler to sigma = 0: x = alpha x_0, or the same by eps."""
    start, end = ends
    weight = process.alpha(end)
    if prediction == "eps":
        weight = -weight * process.sigma(start) / process.alpha(start)
    return _Rows(start[None], end[None], torch.zeros(1, dtype=torch.int64), weight.reshape(1, 1))


def _weights(row: Row, process: GaussianSDE, to: Tensor, h: Tensor, prediction: str) -> dict[int, Tensor]:
    """The weight of each stage's prediction in the state at times `to`, for steps h in lam."""
    front = h * (process.alpha(to) if prediction == "x0" else -process.sigma(to))
    z = -h if prediction == "x0" else h
    return {j: front * sum(factor * phi(p, c * z) for factor, p, c in terms) for j, terms in row.items()}


def phi(j: int, z: Tensor) -> Tensor:
    """phi_j(z) = int_0^1 exp((1 - u) z) u^(j - 1)/(j - 1)! du by quadrature: no cancellation near z = 0."""
    points, rule = gauss_legendre(48)
    return (torch.exp((1 - points) * z.unsqueeze(-1)) * points ** (j - 1) * rule).sum(-1) / math.factorial(j - 1)


@dataclass(frozen=True)
class ExponentialPair:
    """An exponential Runge-Kutta method and its embedded lower order, stepped per sample on the clock lam.

    (Lu et al. 2022, DPM-Solver, appendix C: DPM-Solver-12 and -23.)
    """

    tableau: ExponentialTableau
    prediction: Literal["x0", "eps"]

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def dense(self) -> None:
        return None

    def clock(self, problem: Problem, t: float) -> float:
        lam = float(_process(problem).lam(t))
        if not math.isfinite(lam):
            raise ValueError(f"adaptive exponential steps need a finite lam at both ends, got {lam} at t = {t:g}")
        return lam

    def time(self, problem: Problem, s: Tensor) -> Tensor:
        return _process(problem).time_of_lam(s)

    def evaluate(self, problem: Problem, x: Tensor, s: Tensor) -> Tensor:
        assert isinstance(problem, ReverseSDE)
        return problem.model(x, per_row(self.time(problem, s), x), as_=self.prediction)

    def first_step(self, evaluate: Evaluate, norm: Norm, x: Tensor, s: Tensor, k: Tensor, span: float) -> Tensor:
        """0.05 in lam (Lu et al. 2022, DPM-Solver, appendix C); the control grows it tenfold a step."""
        return torch.full_like(s, min(0.05, abs(span)))

    def attempt(
        self, evaluate: Evaluate, problem: Problem, x: Tensor, s: Tensor, h: Tensor, k: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]:
        process, table, stages = _process(problem), self.tableau, [k]
        scale = process.alpha if self.prediction == "eps" else process.sigma
        start = process.time_of_lam(s)

        def state(row: Row, c: float) -> Tensor:
            to = process.time_of_lam(s + c * h)
            y = per_row(scale(to) / scale(start), x).to(x.dtype) * x
            for j, w in _weights(row, process, to, h, self.prediction).items():
                y = y + per_row(w, x).to(x.dtype) * stages[j]
            return y

        for c, row in zip(table.c[1:], table.a, strict=True):
            stages.append(evaluate(state(row, c), s + c * h))
        assert table.b_low is not None
        y = state(table.b, 1.0)
        return y, [y - state(table.b_low, 1.0)], None, stages

    def size(self, norms: list[Tensor]) -> Tensor:
        return norms[0]


def _process(problem: Problem) -> GaussianSDE:
    assert isinstance(problem, ReverseSDE)
    return problem.gaussian
