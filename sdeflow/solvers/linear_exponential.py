"""Exponential multistep integration of the reversal of a linear SDE with matrix coefficients.

With y = x - c_t, c the mean from a start at 0, Sigma_t the covariance from a reference Sigma_t0 and s the score, let

    m(x, t) = y + Sigma_t s(x, t)

(for data u + N(0, Sigma_t0), m = Phi_t E[u | x_t = x], the denoised state moved to time t). The reversal

    dy = [F y - (1 + eta^2)/2 D s] dt + eta G dW = [A_eta y - K m] dt + eta G dW,
    K = (1 + eta^2)/2 D Sigma^-1,   A_eta = F + K,

has a linear part A_eta that is integrated exactly. For data that are a point u with Sigma_t0 around it, m = Phi_t u
along every path, whatever eta. So N = Phi^-1 m is what is interpolated, by polynomials of t through its last
evaluations, and each polynomial is integrated exactly: order 1 solves such data in one step, as gDDIM (Zhang, Tao and
Chen 2022, arXiv:2206.05564) does for the flow. With scalar coefficients N is the prediction of x_0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow.checked import checked_class, numbers
from sdeflow.linear import LinearSDE
from sdeflow.matrix_kernel import LinearKernel, Triple, factor_of, inverse_factor, multiply, propagate
from sdeflow.noise import Noise
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.base import Solver, Stepper, View

_BLOCK = 256
"""Steps whose matrices are integrated together."""


@checked_class
@dataclass(frozen=True, eq=False)
class LinearExponential(Solver):
    """Exponential Adams-Bashforth for reversals of a LinearSDE at any eta, one model call a step.

    From t_k to t_{k+1}, with M_j = x_j + Sigma_j s_j at the last `order` times and Gaussian noise of exact covariance:

        x_{k+1} = Psi x_k + sum_j V_j M_j + d_k + N(0, Q_k)

    Every matrix is computed in float64 before the first model call. Exact in one step for data that are a point u, or
    N(u, covariance), at any eta.

    Args:
        order: 1, 2 or 3.
        start: how a history begins. "ramp": orders 1, 2, ..., one call a step, which caps the order at 2 as steps
            shrink. "sweep": the first order - 1 steps are repeated with the polynomial through their own evaluations
            until they have full order: 1 more call for order 2, 3 for order 3; for the flow (eta = 0) only.
        covariance: (k, k), the covariance Sigma_t0 of data around each point; None for the process's own
            (`start_covariance`: 0; for a CLD, that of its velocities).

    Raises:
        ValueError: another order or start, or a covariance that is not square, symmetric and positive semi-definite;
            in a solve, a problem that is not the reversal of a LinearSDE, or a Sigma_t without an inverse on the grid.
    """

    order: int = 2
    start: Literal["ramp", "sweep"] = "ramp"
    covariance: Any = None

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"LinearExponential: expected order 1, 2 or 3, got {self.order!r}")
        if self.start not in ("ramp", "sweep"):
            raise ValueError(f'LinearExponential: expected start "ramp" or "sweep", got {self.start!r}')
        if self.covariance is not None:
            c = numbers(self.covariance, "covariance")
            if c.ndim != 2 or c.shape[0] != c.shape[1]:
                raise ValueError(f"LinearExponential: expected a covariance (k, k), got {tuple(c.shape)}")
            if c.numel() == 0 or not bool(torch.isfinite(c).all()):
                raise ValueError("LinearExponential: expected a finite covariance, got NaN, infinity or none")
            size = float(c.abs().amax())
            if not torch.allclose(c, c.mT, rtol=0, atol=1e-10 * size) or not bool(
                (torch.linalg.eigvalsh(c) >= -1e-10 * size).all()
            ):
                raise ValueError("LinearExponential: expected a symmetric, positive semi-definite covariance")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"LinearExponential({self.order})"

    @property
    def view(self) -> View:  # type: ignore[override]
        return "transition"

    def check(self, problem: Problem) -> None:
        process = problem.process if isinstance(problem, ReverseSDE) else None
        if not isinstance(process, LinearSDE):
            got = type(problem).__name__ if process is None else f"that of {type(process).__name__}"
            raise ValueError(f"{self.name}: expected sde.reverse(model) of a LinearSDE, got {got}")
        if self.start == "sweep" and problem.stochastic:
            raise ValueError(f"{self.name}: start='sweep' is for the flow (eta = 0); with noise use start='ramp'")
        size = None if self.covariance is None else len(torch.as_tensor(self.covariance))
        if size not in (None, process.k):
            raise ValueError(f"{self.name}: expected a covariance ({process.k}, {process.k}), got ({size}, {size})")

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        assert isinstance(problem, ReverseSDE)
        assert isinstance(problem.process, LinearSDE)
        problem.process._check_event(x)
        return _Run(self, problem, x, grid, noise)


class _Tables:
    """The matrices of every step of a grid, float64.

    Let z_0 = Phi sum_i (u^i/i!) n_i, u = (t - t_k)/h, h = t_{k+1} - t_k, be m along a step, its N a polynomial of
    time. It obeys dz_i = F z_i + z_{i+1}/h from z_i = n_i, and the distance w = y - z_0 a linear equation without K:

        dw = A_eta w - z_1/h,   dz_i = F z_i + z_{i+1}/h for i >= 1.

    The first rows of its propagator are [Psi, W_1, W_2, ...], and y at the end of the step is
    Psi (y - n_0) + sum_{i >= 1} W_i n_i + Phi sum_i n_i/i!; the covariance of its noise is that of the step.
    """

    def __init__(self, problem: ReverseSDE, process: LinearSDE, grid: Tensor, order: int, start: Tensor) -> None:
        self._k, self._grid, self._order, self._problem = process.k, grid, order, problem
        self._process, self._start = process, start
        k = process.k
        at_grid = process.kernels(process.t0, grid)
        self.shift = at_grid.shift
        self.sigma = self._reference(at_grid)
        inverse_factor(factor_of(self.sigma), f"LinearExponential: a reference covariance on the grid to {grid[-1]:g}")
        self._h = torch.diff(grid)
        self.moved = process._integrated(grid[:-1], grid[1:]).matrix  # Phi(t_{k+1} <- t_k)
        pieces = [self._propagated(block) for block in torch.split(torch.arange(len(self._h)), _BLOCK)]
        whole = LinearKernel(*(torch.cat(v) for v in zip(*pieces, strict=True)))
        self.psi = whole.matrix[:, :k, :k]
        self.answers = [self.moved - self.psi]  # to each n_i
        for i in range(1, order):
            self.answers.append(whole.matrix[:, :k, i * k : (i + 1) * k] + self.moved / math.factorial(i))
        self.noise = factor_of(whole.covariance[:, :k, :k])

    def _reference(self, kernel: LinearKernel) -> Tensor:
        return kernel.matrix @ self._start @ kernel.matrix.mT + kernel.covariance

    def _propagated(self, block: Tensor) -> LinearKernel:
        start, end, direction = self._grid[:-1][block], self._grid[1:][block], torch.sign(self._h[0])

        def field(t: Tensor) -> Triple:
            # the size of the step that a time is in
            place = torch.searchsorted(start * direction, (t * direction).contiguous(), right=True) - 1
            return self._field(t, (end - start)[place])

        return propagate(field, start, end, method="magnus")

    def _field(self, t: Tensor, h: Tensor) -> Triple:
        k, order, n = self._k, self._order, len(t)
        coefficients = self._process.coefficients(t)
        eta2 = self._problem.eta_at(t) ** 2
        inverse = inverse_factor(
            factor_of(self._reference(self._process.kernels(self._process.t0, t))),
            f"LinearExponential: the reference covariance at t = {float(t.min()):g}",
        )
        gain = (0.5 * (1 + eta2))[:, None, None] * (coefficients.noise @ inverse.mT @ inverse)
        a, noise = (torch.zeros(n, k * order, k * order, dtype=torch.float64) for _ in range(2))
        rate = torch.eye(k, dtype=torch.float64) / h[:, None, None]
        for i in range(order):
            here, after = slice(i * k, (i + 1) * k), slice((i + 1) * k, (i + 2) * k)
            a[:, here, here] = coefficients.a + gain if i == 0 else coefficients.a
            if i + 1 < order:
                a[:, here, after] = -rate if i == 0 else rate
        # noise adds up along the run: its rate has the sign of h
        noise[:, :k, :k] = eta2[:, None, None] * coefficients.noise * torch.sign(h)[:, None, None]
        return Triple(a, torch.zeros(n, k * order, dtype=torch.float64), noise)

    def carried(self, j: int, i: int) -> Tensor:
        """Phi(t_i <- t_j)."""
        total = torch.eye(self._k, dtype=torch.float64)
        for step in range(j, i):
            total = self.moved[step] @ total
        for step in range(j - 1, i - 1, -1):
            total = torch.linalg.solve(self.moved[step], total)
        return total

    def weights(self, i: int, nodes: list[int]) -> list[Tensor]:
        """V_j of step i for the polynomial through the evaluations at grid points `nodes`."""
        u = [float((self._grid[j] - self._grid[i]) / self._h[i]) for j in nodes]
        vandermonde = torch.tensor([[v**p / math.factorial(p) for p in range(len(nodes))] for v in u]).to(torch.float64)
        lagrange = torch.linalg.inv(vandermonde)  # n_p = sum_j lagrange[p, j] N_j
        return [
            sum((lagrange[p, q] * self.answers[p] for p in range(len(nodes))), torch.zeros(()))[i] @ self.carried(j, i)
            for q, j in enumerate(nodes)
        ]

    def row(self, i: int, nodes: list[int]) -> tuple[Tensor, Tensor]:
        """(matrix (k, k (1 + len(nodes))) on [x_i, M_j ...], shift (k,)) of step i."""
        weights = self.weights(i, nodes)
        shift = self.shift[i + 1] - self.psi[i] @ self.shift[i]
        for v, j in zip(weights, nodes, strict=True):
            shift = shift - v @ self.shift[j]
        return torch.cat([self.psi[i], *weights], dim=1), shift


class _Run:
    def __init__(
        self, solver: LinearExponential, problem: ReverseSDE, x: Tensor, grid: Tensor, noise: Noise | None
    ) -> None:
        process = problem.process
        assert isinstance(process, LinearSDE)
        start = process.start_covariance if solver.covariance is None else solver.covariance
        self._tables = _Tables(problem, process, grid, solver.order, torch.as_tensor(start, dtype=torch.float64))
        # 16-bit states are combined in float32: their 8 to 11 bits would swallow the increments
        self._work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        self._steps, self._k, self._order, self._like = grid.numel() - 1, process.k, solver.order, x
        self._score = problem.score_evaluator(grid)
        self._sweep = solver.start == "sweep" and solver.order > 1
        self._ready = min(solver.order - 1, self._steps) if self._sweep else 0
        self._rows = [self._fused(i) for i in range(self._steps)]
        self._noise: Tensor | None = None
        if problem.stochastic and noise is not None:
            self._walk = noise.walk(grid, x.shape[1:], self._work)
            scale = torch.rsqrt(self._walk.lengths)
            self._noise = self._cast(self._tables.noise * scale[:, None, None].to(torch.float64))
        self._history: list[Tensor] = []
        self._planned: list[Tensor] = []
        self._planned_means: list[Tensor] = []
        self._reached = self._returned = torch.empty(0)
        self.calls = 0

    def _cast(self, v: Tensor) -> Tensor:
        return v.to(device=self._like.device, dtype=self._work)

    def _fused(self, i: int) -> tuple[Tensor, Tensor | None]:
        """(matrix on [x_i, s_i, M_{i-1}, ...] that gives x_{i+1}, and M_i below it where kept, shift (k,) or None)."""
        k, sigma = self._k, self._tables.sigma[i]
        nodes = list(range(i, max(-1, i - self._order), -1))
        matrix, shift = self._tables.row(i, nodes)
        now = matrix[:, k : 2 * k]
        rows = torch.cat([matrix[:, :k] + now, now @ sigma, matrix[:, 2 * k :]], dim=1)
        if self._order > 1:
            one, none = torch.eye(k, dtype=torch.float64), torch.zeros(k, rows.shape[1] - 2 * k, dtype=torch.float64)
            rows = torch.cat([rows, torch.cat([one, sigma, none], dim=1)])
        return self._cast(rows), self._cast(shift) if bool((shift != 0).any()) else None

    def step(self, i: int, x: Tensor) -> Tensor:
        # a 16-bit state goes on from what was computed, not from its rounding, unless somebody changed it
        y = self._reached if x is self._returned else x.to(self._work)
        self._reached = self._advance(i, y)
        self._returned = self._reached.to(x.dtype)
        return self._returned

    def _evaluate(self, i: int, y: Tensor) -> Tensor:
        self.calls += 1
        score = self._score(i, y.to(self._like.dtype))
        return score.to(self._work)

    def _advance(self, i: int, y: Tensor) -> Tensor:
        if self._sweep and i == 0:
            return self._begin(y)
        if 0 < i < self._ready and y is self._reached:
            self._history.insert(0, self._planned_means[i])
            return self._planned[i]
        matrix, shift = self._rows[i]
        used = matrix.shape[1] // self._k - 2
        out = multiply(matrix, torch.cat([y, self._evaluate(i, y), *self._history[:used]], dim=1))
        new = out[:, : self._k]
        if self._order > 1:
            self._history = [out[:, self._k :], *self._history][: self._order - 1]
        if shift is not None:
            new = new + shift.reshape(-1, *[1] * (y.ndim - 2))
        if self._noise is not None:
            new = new + multiply(self._noise[i], self._walk(i).w)
        return new

    def _begin(self, y: Tensor) -> Tensor:
        """The first order - 1 steps, repeated: every round raises the order of all of them by one."""
        ready = self._ready
        states, means = [y], [self._denoised(0, y)]
        for round_ in range(self._order):
            nodes = list(range(len(means)))
            new = [y]
            for i in range(ready):
                matrix, shift = self._tables.row(i, nodes)
                z = multiply(self._cast(matrix), torch.cat([new[i], *means], dim=1))
                new.append(z + self._cast(shift).reshape(-1, *[1] * (y.ndim - 2)))
            states = new
            if round_ < self._order - 1:
                means = [means[0], *(self._denoised(j, states[j]) for j in range(1, ready + 1))]
        self._planned, self._planned_means, self._history = states[1:], means, means[:1]
        return states[1]

    def _denoised(self, i: int, y: Tensor) -> Tensor:
        return y + multiply(self._cast(self._tables.sigma[i]), self._evaluate(i, y))
