"""Rosenbrock-W methods for stiff drifts: linearly implicit Runge-Kutta, one linear system a sample and step.

One step of size h from (x, t), with J the Jacobian of the drift f there and f_t its time derivative, solves

    (I - h gamma J) k_i = h f(x + sum_j a_ij k_j, t + c_i h) + h J sum_j g_ij k_j + h^2 (gamma + sum_j g_ij) f_t

for each stage (j < i, c_i = sum_j a_ij) and ends at x + sum_i b_i k_i (Hairer and Wanner 1996, Solving ODEs II,
section IV.7). There is no iteration and no tolerance of one. A W-method keeps its order whatever J and f_t are, so
that errors of theirs cost stability, not order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdeflow.noise import Noise
from sdeflow.sde import Problem
from sdeflow.solvers.base import Evaluate, Memory, Norm, Solver, Stepper, per_row, refuse_noise

_TIME_SHARE = 1 / 256
"""f_t is the difference of f over this part of the step: the measured error of solves does not feel it between 1/100
and 1/200000 in float64, and float32 keeps its digits. A difference, because a drift may read t as a number."""


@dataclass(frozen=True)
class RosenbrockTableau:
    """Coefficients gamma, a_ij, g_ij (strictly lower rows) and b of a Rosenbrock method; `b_hat` of an embedded one.

    Raises:
        ValueError: rows of the wrong sizes, or weights that do not sum to 1.
    """

    name: str
    order: int
    gamma: float
    a: tuple[tuple[float, ...], ...]
    g: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    b_hat: tuple[float, ...] | None
    reference: str

    def __post_init__(self) -> None:
        for rows, what in ((self.a, "a"), (self.g, "g")):
            if [len(row) for row in rows] != list(range(len(self.b))):
                raise ValueError(f"{self.name}: expected row i of {what} to have i entries, one row a stage")
        for weights in (self.b, self.b_hat):
            if weights is not None and (len(weights) != len(self.b) or abs(math.fsum(weights) - 1) > 1e-14):
                raise ValueError(f"{self.name}: expected {len(self.b)} weights of sum 1, got {weights}")

    @cached_property
    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """(A, Gamma), square: Gamma carries gamma on its diagonal."""
        stages = len(self.b)
        a, g = np.zeros((stages, stages)), self.gamma * np.eye(stages)
        for i in range(stages):
            a[i, :i], g[i, :i] = self.a[i], self.g[i]
        return a, g

    @cached_property
    def shares(self) -> list[float]:
        """c_i: where in the step the stages evaluate."""
        return self.matrices[0].sum(1).tolist()

    @cached_property
    def transformed(self) -> _Transformed:
        """The coefficients of u = Gamma k."""
        a, gamma = self.matrices
        inverse = np.linalg.inv(gamma)
        b = np.array(self.b)
        b_hat = b if self.b_hat is None else np.array(self.b_hat)
        return _Transformed(
            point=(a @ inverse).tolist(),
            coupling=(np.eye(len(b)) / self.gamma - inverse).tolist(),
            time=gamma.sum(1).tolist(),
            result=(b @ inverse).tolist(),
            error=((b - b_hat) @ inverse).tolist(),
        )


class _Transformed(NamedTuple):
    """Coefficients in u_i = sum_j Gamma_ij k_j, which needs no product with J:

        (I/(h gamma) - J) u_i = f(x + sum_j point_ij u_j, t + c_i h) + sum_j coupling_ij u_j/h + time_i h f_t

    (Hairer and Wanner 1996, Solving ODEs II, section IV.7, implementation).
    """

    point: list[list[float]]
    coupling: list[list[float]]
    time: list[float]
    result: list[float]
    error: list[float]


_ROS2_GAMMA = 1 - 1 / math.sqrt(2)
ROS2_TABLEAU = RosenbrockTableau(
    "ROS2", 2, _ROS2_GAMMA, ((), (1.0,)), ((), (-2 * _ROS2_GAMMA,)), (0.5, 0.5), None,
    "Verwer, Spee, Blom and Hundsdorfer 1999, A second-order Rosenbrock method, with gamma = 1 - 1/sqrt(2)",
)  # fmt: skip

ROS34PW2_TABLEAU = RosenbrockTableau(
    "ROS34PW2", 3, 4.3586652150845900e-01,
    (
        (),
        (8.7173304301691801e-01,),
        (8.4457060015369423e-01, -1.1299064236484185e-01),
        (0.0, 0.0, 1.0),
    ),
    (
        (),
        (-8.7173304301691801e-01,),
        (-9.0338057013044082e-01, 5.4180672388095326e-02),
        (2.4212380706095346e-01, -1.2232505839045147e00, 5.4526025533510214e-01),
    ),
    (2.4212380706095346e-01, -1.2232505839045147e00, 1.5452602553351020e00, 4.3586652150845900e-01),
    (3.7810903145819369e-01, -9.6042292212423178e-02, 0.5, 2.1793326075422950e-01),
    "Rang and Angermann 2005, New Rosenbrock W-methods of order 3 for PDAEs of index 1, ROS34PW2",
)  # fmt: skip


@dataclass(frozen=True)
class Rosenbrock(Solver):
    """A Rosenbrock-W method, for drifts too stiff for explicit steps: on a grid, or to a tolerance with its estimate.

    A step costs stages + 1 drift calls (the one more for f_t), which are its NFE, and, counted apart, d products
    with the Jacobian, d the components of one sample. They are batched: the Jacobian of each sample, (batch, d, d), is
    built a row at a time by reverse mode, and each sample solves its own d x d system. For d up to some hundreds.

    Where the drift hides x from autograd (`detach`, `no_grad`), it passes for constant in x, which keeps the order and
    loses the stability. Under `torch.inference_mode` the problem's own tensors must have been made outside it.

    Args:
        tableau: its coefficients; with `b_hat` it also solves to a tolerance.
    """

    tableau: RosenbrockTableau

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.tableau.name

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def pair(self) -> RosenbrockPair | None:
        return None if self.tableau.b_hat is None else RosenbrockPair(self.tableau)

    def __repr__(self) -> str:
        return f"{self.name}()"

    def check(self, problem: Problem) -> None:
        refuse_noise(self.name, problem)

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        return _RosenbrockRun(self.tableau, problem, x, grid)


def ROS2() -> Rosenbrock:
    """ROS2: order 2, L-stable. 3 calls and d products with the Jacobian a step."""
    return Rosenbrock(ROS2_TABLEAU)


def ROS34PW2() -> Rosenbrock:
    """ROS34PW2: order 3, L-stable, stiffly accurate. 5 calls and d products with the Jacobian a step; adaptive."""
    return Rosenbrock(ROS34PW2_TABLEAU)


class _RosenbrockRun:
    def __init__(self, table: RosenbrockTableau, problem: Problem, x: Tensor, grid: Tensor) -> None:
        self.calls = 0
        self.products = 0
        self._table, self._rows = table, len(table.b) + 1
        with _no_inference_mode():
            grid = grid.clone()
            self._h = torch.diff(grid).to(device=x.device).unbind()
            shares = torch.tensor([*table.shares, _TIME_SHARE], dtype=torch.float64)
            times = torch.where(shares == 1, grid[1:, None], grid[:-1, None] + torch.diff(grid)[:, None] * shares)
            self._evaluate = problem.evaluator("drift", times.reshape(-1))

    def step(self, i: int, x: Tensor) -> Tensor:
        first = i * self._rows
        with _no_inference_mode():
            later = self._drift(first + self._rows - 1, x.clone() if x.is_inference() else x)
        slope, jacobian = linearised(lambda y: self._evaluate(first, y), x, keep=later.requires_grad)
        self.calls += 1
        self.products += jacobian.shape[-1]
        return _step(self._table, lambda k, y: self._drift(first + k, y), x, self._h[i], slope, later, jacobian)[0]

    def remember(self) -> Memory:
        return {}

    def restore(self, memory: Memory, x: Tensor) -> None:
        pass

    def _drift(self, row: int, x: Tensor) -> Tensor:
        self.calls += 1
        return _checked(self._evaluate(row, x), x)


@dataclass(frozen=True)
class RosenbrockPair:
    """A tableau with an embedded method, stepped per sample; its clock is time."""

    tableau: RosenbrockTableau

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def dense(self) -> None:
        return None

    def clock(self, problem: Problem, t: float) -> float:
        return t

    def time(self, problem: Problem, s: Tensor) -> Tensor:
        return s

    def evaluate(self, problem: Problem, x: Tensor, s: Tensor) -> Tensor:
        return problem.drift(x, per_row(s, x))

    def first_step(self, evaluate: Evaluate, norm: Norm, x: Tensor, s: Tensor, k: Tensor, span: float) -> Tensor:
        """1 % of the time in which x would change by itself; the controller does the rest."""
        length, change = abs(span), norm(k, x)
        h = torch.where(change > 0, 0.01 * norm(x, x) / change, length).clamp(1e-6 * length, length)
        return torch.where(torch.isfinite(h), h, 1e-6 * length)

    def attempt(
        self, evaluate: Evaluate, problem: Problem, x: Tensor, s: Tensor, h: Tensor, k: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]:
        shares = self.tableau.shares
        later = evaluate(x, s + _TIME_SHARE * h)
        _, jacobian = linearised(lambda y: self.evaluate(problem, y, s.clone()), x, keep=later.requires_grad)
        y, error = _step(self.tableau, lambda i, y: evaluate(y, s + shares[i] * h), x, h, k, later, jacobian)
        return y, [error], None, []

    def size(self, norms: list[Tensor]) -> Tensor:
        return norms[0]


def _step(
    tableau: RosenbrockTableau,
    drift: Callable[[int, Tensor], Tensor],
    x: Tensor,
    h: Tensor,
    slope: Tensor,
    later: Tensor,
    jacobian: Tensor,
) -> tuple[Tensor, Tensor]:
    """(result, error estimate) of a step h, 0-d or (batch,).

    Args:
        drift: `drift(i, y)` evaluates stage i at y.
        slope, later: the drift at x at the start, and `_TIME_SHARE` of the step later.
        jacobian: (batch, d, d).
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32  # 16-bit states are solved for in float32
    base, slope, later, jacobian, h = (v.to(work) for v in (x, slope, later, jacobian, h))
    table, size = tableau.transformed, per_row(h, x)
    eye = torch.eye(jacobian.shape[-1], dtype=work, device=x.device)
    # a singular system makes its own sample infinite, not an exception for the batch
    factors, pivots, _ = torch.linalg.lu_factor_ex(eye / (tableau.gamma * h.reshape(-1, 1, 1)) - jacobian)
    in_time = (later - slope) / _TIME_SHARE  # h f_t
    us: list[Tensor] = []
    for i in range(len(tableau.b)):
        if i > 0:
            slope = drift(i, (base + _sum(table.point[i], us)).to(x.dtype)).to(work)
        right = slope + table.time[i] * in_time
        if i > 0:
            right = right + _sum(table.coupling[i], us) / size
        us.append(torch.linalg.lu_solve(factors, pivots, right.reshape(x.shape[0], -1, 1)).reshape(x.shape))
    return (base + _sum(table.result, us)).to(x.dtype), _sum(table.error, us).to(x.dtype)


def linearised(drift: Callable[[Tensor], Tensor], x: Tensor, keep: bool = False) -> tuple[Tensor, Tensor]:
    """The drift at x (batch, *event) and the Jacobian of each sample (batch, d, d), by d batched reverse products.

    Reverse mode: in eager torch a forward-mode product costs 30 to 40 calls of a small drift, this one 2, and
    forward mode has no rule for some of the operations that networks are made of.

    Args:
        keep: record the graph of the result, for gradients through the solve.
    """
    batch, size = x.shape[0], x[0].numel()
    rows: list[Tensor] = []
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().clone().requires_grad_()
        value = _checked(drift(leaf), x)
        for j in range(size):
            unit = torch.zeros(batch, size, dtype=value.dtype, device=x.device)
            unit[:, j] = 1.0
            row = None
            if value.requires_grad:
                unit = unit.reshape(x.shape)
                (row,) = torch.autograd.grad(value, leaf, unit, create_graph=keep, retain_graph=True, allow_unused=True)
            rows.append((torch.zeros_like(x) if row is None else row).reshape(batch, size))
        jacobian = torch.stack(rows, dim=1)
    return (value, jacobian) if keep else (value.detach(), jacobian.detach())


@contextmanager
def _no_inference_mode() -> Iterator[None]:
    """Leave that mode, whose tensors autograd does not take, but not `no_grad`."""
    with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
        yield


def _checked(value: Tensor, x: Tensor) -> Tensor:
    if value.shape != x.shape:
        raise ValueError(f"the drift returned {tuple(value.shape)} for x of shape {tuple(x.shape)}")
    return value


def _sum(weights: list[float], us: list[Tensor]) -> Tensor:
    """sum_j weights_j us_j over the stages there are, elementwise: the same bits whatever the batch."""
    total = torch.zeros_like(us[0])
    for w, u in zip(weights, us, strict=False):
        if w != 0.0:
            total = torch.add(total, u, alpha=w)
    return total
