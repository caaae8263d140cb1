"""Gaussian-split exponential multistep: the score of N(mean, C) integrated exactly, the rest interpolated.

With y = x/alpha, s = sigma/alpha and v an eigenvalue of C, write the score of y as that of N(mean, C) noised to s,
-(y - mean)/(v + s^2), plus rho/(v + s^2). Then rho = x_0 - mean - (v/s) eps, a row of the model's table, 0 for
Gaussian data and smooth in lam where x_0 and eps are not; and per eigenmode, with k = (1 + eta^2)/2,

    y1 - mean = a (y0 - mean) + k int_{s1^2}^{s0^2} (v + s1^2)^k (v + s^2)^(-k - 1) rho ds^2 + sqrt(b) xi,
    a = ((v + s1^2)/(v + s0^2))^k,   b = (v + s1^2) (1 - ((v + s1^2)/(v + s0^2))^(eta^2)).

rho is interpolated in lam = -log s through its last evaluations. v = 0 is data prediction (DPM-Solver++), v to
infinity noise prediction; Gaussian data take one exact step, on the flow and with noise. (This project's method;
relatives: Lu et al. 2023, DPM-Solver-v3, a fitted linear part; Wang and Vastola 2024, the Gaussian as a jump.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow.checked import checked, checked_class, event_shape, numbers
from sdeflow.gaussian import GaussianSDE
from sdeflow.model import Model
from sdeflow.noise import DATA, Noise
from sdeflow.pid import PID
from sdeflow.plan import Plan, corrected_weights, eta_key, spliced
from sdeflow.quadrature import gauss_legendre
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers import tableaus
from sdeflow.solvers.adams import lagrange_basis
from sdeflow.solvers.base import Solver, Stepper, View, kept_plan, reversal_key, semilinear
from sdeflow.solvers.split_march import SplitMarch

_POINTS = 48
_REACH = 24.0
"""In lam, beyond which a step towards sigma = 0 adds less than exp(-48) to the integral."""


_LARGEST = 1e30
"""A variance whose coefficients are still numbers of float32."""


@checked_class
@dataclass(frozen=True, eq=False)
class GaussianSplit(Solver):
    """Exponential multistep of order 1 to 4 with the score of N(mean, C) split off; one call a step.

    On a grid, or the flow to a tolerance (rtol, atol) that is held against the error of x at t = 0: `split_march`.
    Reads the problem's eta. Needs only a rough C: a variance within a factor of 4 costs little.

    Args:
        order: evaluations of the residual interpolated.
        mean: of the data: a number, or a tensor of the event's shape.
        variance: a number (C = variance I; 0.25 is EDM's assumption of a data standard deviation of 0.5), a tensor of
            the event's shape (diagonal C), or a full covariance (D, D), D the components of an event.
        corrector: correct each step when the next one evaluates, at no further call; the last step is predicted only.
        start: "ramp" begins with orders 1, 2, ...; "runge-kutta" makes the first `order` steps with the classical
            method of order 4 in the split variable, three calls more each, which keeps the order as steps
            shrink (a scalar variance, on the flow).

    Raises:
        ValueError: an order outside 1 to 4, or a variance that is negative or not finite.
    """

    order: int = 3
    mean: Any = 0.0
    variance: Any = 0.25
    corrector: bool = True
    start: Literal["ramp", "runge-kutta"] = "ramp"
    view: View = "transition"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"GaussianSplit: expected order 1 to 4, got {self.order!r}")
        if self.start not in ("ramp", "runge-kutta"):
            raise ValueError(f'GaussianSplit: expected start "ramp" or "runge-kutta", got {self.start!r}')
        for name in ("mean", "variance"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, Tensor, list, tuple)):  # a fraction, a decimal, or one of numpy
                object.__setattr__(self, name, numbers(value, name))
        variance, mean = numbers(self.variance, "variance"), numbers(self.mean, "mean")
        if not bool(torch.isfinite(mean).all()) or mean.numel() == 0 or variance.numel() == 0:
            raise ValueError(
                f"GaussianSplit: expected a finite mean and variance, got {self.mean!r}, {self.variance!r}"
            )
        if bool((variance.abs() > _LARGEST).any()):
            raise ValueError(f"GaussianSplit: expected a variance of at most {_LARGEST:g}, got {self.variance!r}")
        if not bool(torch.isfinite(variance).all()) or (variance.ndim < 2 and bool((variance < 0).any())):
            raise ValueError(f"GaussianSplit: expected a finite variance >= 0, got {self.variance!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        kind = "" if torch.as_tensor(self.variance).ndim == 0 else "-cov"
        return f"GaussianSplit{kind}({self.order})"

    def check(self, problem: Problem) -> None:
        reverse = semilinear(self.name, problem)
        if self.start != "ramp" and (reverse.stochastic or not self._scalar):
            raise ValueError(f"{self.name}: start='runge-kutta' is for the flow (eta = 0) and a scalar variance")

    @property
    def _scalar(self) -> bool:
        return torch.as_tensor(self.variance).ndim == 0

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        """The plan on `grid`, for a scalar variance.

        Raises:
            ValueError: the variance has more than one value; its coefficients are vectors, not one table.
        """
        if not self._scalar:
            raise ValueError(f"{self.name}: a plan has one coefficient for all components: expected a scalar variance")
        reverse = semilinear(self.name, problem)
        process, steps = reverse.gaussian, grid.numel() - 1
        variance = torch.as_tensor(self.variance, dtype=torch.float64).reshape(1)
        ready = min(self.order, steps) if self.start == "runge-kutta" else 0
        table = _table(reverse, grid, variance, self.order, self.corrector, ready)
        alpha = process.alpha(grid)
        rows = (grid[:-1], alpha[:-1], alpha[1:], table.ratio[:, 0], table.weights[:, :, 0], table.std[:, 0])
        multistep = self._plan(reverse, grid, torch.arange(steps), *rows)
        if ready == 0:
            return multistep
        return spliced(self._plan(reverse, grid, *_runge_kutta_rows(process, grid, float(variance))), multistep, ready)

    def _plan(
        self, reverse: ReverseSDE, grid: Tensor, step: Tensor, times: Tensor, alpha0: Tensor, alpha1: Tensor,
        ratio: Tensor, weights: Tensor, std: Tensor,
    ) -> Plan:  # fmt: skip
        return Plan(
            name=self.name,
            view="transition",
            target=f"split:{float(torch.as_tensor(self.variance, dtype=torch.float64)):.17g}",
            grid=grid,
            times=times.clone(),
            step_of_row=step,
            ratio=ratio,
            weights=weights,
            noise=std,
            process=repr(reverse.process),
            eta=eta_key(reverse.eta),
            shift=torch.as_tensor(self.mean, dtype=torch.float64),
            shift_weight=alpha1 - ratio * alpha0 - weights.sum(1),
        )

    @property
    def adaptive(self) -> bool:
        """Whether it solves the flow to a tolerance."""
        return self.start == "ramp" and self.corrector

    def march(
        self, problem: Problem, x: Tensor, span: tuple[float, float], control: PID, save: Tensor | None
    ) -> SplitMarch:
        """The solve to a tolerance: the error of x at t = 0 against atol + rtol sqrt(mean variance), a sample.

        Raises:
            ValueError: a problem with noise, a variance of 0, or options that leave nothing to estimate the error with.
        """
        reverse = semilinear(self.name, problem)
        if reverse.stochastic:
            raise ValueError(f"{self.name} solves the probability flow to a tolerance: expected eta=0")
        if not self.adaptive:
            raise ValueError(f"{self.name} to a tolerance starts by a ramp and estimates its error by the corrector")
        event = x.shape[1:]
        given = torch.as_tensor(self.variance, dtype=torch.float64)
        variance, axes = (given.reshape(1), None) if self._scalar else _modes(given, event, event.numel())
        if not float(variance.max()) > 0:
            raise ValueError(
                f"{self.name} to a tolerance measures errors in deviations of the data: expected variance > 0"
            )
        mean = torch.as_tensor(self.mean, dtype=torch.float64).expand(event).flatten()
        return SplitMarch(
            reverse, x, span, mean=mean, variance=variance, axes=axes, order=self.order, control=control, save=save
        )

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        if self._scalar:
            plan = kept_plan(self, reversal_key(problem), grid, lambda: self.plan(problem, grid))
            return plan.stepper(problem, x, grid, noise)
        return _ModesRun(self, semilinear(self.name, problem), x, grid, noise)


@dataclass(frozen=True)
class _Table:
    """Coefficients of every step and mode: ratio, std (steps, modes), weights (steps, history, modes)."""

    ratio: Tensor
    std: Tensor
    weights: Tensor


def _runge_kutta_rows(process: GaussianSDE, grid: Tensor, variance: float) -> tuple[Tensor, ...]:
    """The rows of the classical method for z = (y - mean)/sqrt(v + s^2) in lam, where
    dz/dlam = s^2 (v + s^2)^(-3/2) rho."""
    table, steps = tableaus.RK4, grid.numel() - 1
    stages = len(table.b)
    lam = process.lam(grid)
    h = torch.diff(lam)
    c = torch.tensor([float(v) for v in table.c], dtype=torch.float64)
    at = lam[:-1, None] + h[:, None] * c
    times = process.time_of_lam(at)
    times[:, 0] = grid[:-1]
    times[:, c == 1] = grid[1:, None]
    reached = torch.cat([times[:, 1:], grid[1:, None]], dim=1)

    def scale(t: Tensor) -> Tensor:
        return process.alpha(t) * torch.sqrt(variance + torch.exp(-2 * process.lam(t)))

    slope = torch.exp(-2 * at) / (variance + torch.exp(-2 * at)) ** 1.5
    weights = torch.zeros(steps, stages, stages, dtype=torch.float64)
    for i, row in enumerate([*table.a[1:], table.b]):
        for j, w in enumerate(row):
            weights[:, i, i - j] = h * float(w) * slope[:, j] * scale(reached[:, i])
    step = torch.arange(steps).repeat_interleave(stages)
    start, end = grid[step], reached.flatten()
    return (
        step, times.flatten(), process.alpha(start), process.alpha(end), scale(end) / scale(start),
        weights.flatten(0, 1), torch.zeros(steps * stages, dtype=torch.float64),
    )  # fmt: skip


def _table(reverse: ReverseSDE, grid: Tensor, variance: Tensor, order: int, corrector: bool, ready: int = 0) -> _Table:
    process, steps = reverse.gaussian, grid.numel() - 1
    alpha, lam = process.alpha(grid), process.lam(grid)
    if not bool(torch.isfinite(lam[1:-1]).all() and (lam[0] < torch.inf)):
        raise ValueError(f"GaussianSplit needs sigma > 0 before the last time, got lam = {lam.tolist()}")
    eta2 = reverse.mean_eta2(grid[:-1], grid[1:])[:, None]
    total = alpha[:, None] ** 2 * variance + process.sigma(grid)[:, None] ** 2  # alpha^2 (v + s^2), finite at alpha = 0
    shrink = total[1:] / total[:-1]
    log_gain = torch.log(shrink) - 2 * torch.log(alpha[1:] / alpha[:-1])[:, None]  # of (v + s1^2)/(v + s0^2)
    stirred = torch.where(eta2 > 0, eta2 * log_gain, 0.0)
    ratio = torch.sqrt(shrink) * torch.exp(0.5 * stirred)
    std = torch.sqrt(total[1:] * -torch.expm1(stirred))

    count = torch.clamp(torch.arange(steps) + 1, max=order)
    back = (torch.arange(steps)[:, None] - torch.arange(order)).clamp(min=0)
    used = torch.arange(order) < count[:, None]
    used[~torch.isfinite(lam[1:]), 1:] = False  # towards sigma = 0 extrapolate no further than constantly
    predict = _integrals(alpha, lam, eta2, variance, slice(0, steps), lam[back], used)
    if not corrector or steps < 2:
        return _Table(ratio, std, predict)
    nodes = torch.cat([lam[1:-1, None], lam[back[:-1]]], dim=1)
    used = torch.arange(order + 1) <= count[:-1, None]
    correct = _integrals(alpha, lam, eta2, variance, slice(0, steps - 1), nodes, used)
    correct[:ready, 0] = 0.0  # steps of the start are not corrected
    correct[:ready, 1:] = predict[:-1][:ready]
    return _Table(ratio, std, corrected_weights(ratio, predict, correct))


def _integrals(
    alpha: Tensor, lam: Tensor, eta2: Tensor, variance: Tensor, steps: slice, nodes: Tensor, used: Tensor
) -> Tensor:
    """alpha1 k int (v + s1^2)^k (v + s^2)^(-k - 1) l_j ds^2 over the steps: (steps, count, modes)."""
    start, end = lam[:-1][steps], lam[1:][steps]
    points, rule = gauss_legendre(_POINTS)
    from_noise = ~torch.isfinite(start)  # alpha = 0: an evaluation there is no node of a polynomial in lam
    used = used & torch.isfinite(nodes)
    used[:, 0] |= ~used.any(1)
    start = torch.where(from_noise, end - _REACH, start)
    h = torch.clamp(end - start, max=_REACH)[:, None]
    at = start[:, None] + h * points
    level, last = torch.exp(-2 * at)[..., None], torch.exp(-2 * end)[:, None, None]
    k = 0.5 * (1 + eta2[steps])[..., None]
    gain = torch.exp(k * torch.log((variance + last) / (variance + level)))
    kernel = (h * rule)[..., None] * 2 * k * level / (variance + level) * gain * alpha[1:][steps][:, None, None]
    weights = torch.stack([(kernel * b[..., None]).sum(1) for b in lagrange_basis(at, nodes, used)], dim=1)
    # the integral of a constant from s = infinity, whole
    return torch.where(from_noise[:, None, None], used[..., None] * alpha[1:][steps][:, None, None], weights)


class _ModesRun:
    """A run with a variance per mode: the state rotated into the modes, one elementwise combination a step."""

    def __init__(
        self, solver: GaussianSplit, reverse: ReverseSDE, x: Tensor, grid: Tensor, noise: Noise | None
    ) -> None:
        event = x.shape[1:]
        size = event.numel()
        self.calls = 0
        self._event = event
        self._mean = torch.as_tensor(solver.mean, dtype=torch.float64).expand(event).flatten().to(x)
        variance, axes = _modes(torch.as_tensor(solver.variance, dtype=torch.float64), event, size)
        self._axes = None if axes is None else axes.to(x)
        table = _table(reverse, grid, variance, solver.order, solver.corrector)
        process = reverse.gaussian
        self._alpha = process.alpha(grid).tolist()
        self._ratio, self._std, self._weights = (v.to(x) for v in (table.ratio, table.std, table.weights))
        times = grid[:-1]
        self._slope = (variance * (process.alpha(times) / process.sigma(times))[:, None]).to(x)
        self._evaluate = reverse.evaluator("v", times)
        self._rows = _x0_and_eps(process.alpha(times), process.sigma(times))
        self._past: list[Tensor] = []
        self._noise: Callable[[int], Tensor] | None = None
        if noise is not None:
            walk = noise.walk(grid, event, x.dtype)
            length = walk.lengths.sqrt().tolist()
            self._noise = lambda i: walk(i).w / length[i]

    def step(self, i: int, x: Tensor) -> Tensor:
        value = self._evaluate(i, x)
        self.calls += 1
        (px, pv), (ex, ev) = self._rows[i]
        x0 = self._into((px * x + pv * value).flatten(1) - self._mean)
        eps = self._into((ex * x + ev * value).flatten(1))
        self._past = [x0 - self._slope[i] * eps, *self._past[: self._weights.shape[1] - 1]]
        y = self._ratio[i] * self._into(x.flatten(1) - self._alpha[i] * self._mean)
        for w, residual in zip(self._weights[i], self._past, strict=False):
            y = y + w * residual
        if self._noise is not None:
            y = y + self._std[i] * self._into(self._noise(i).flatten(1))
        return (self._out(y) + self._alpha[i + 1] * self._mean).reshape(-1, *self._event)

    def _into(self, flat: Tensor) -> Tensor:
        return flat if self._axes is None else flat @ self._axes

    def _out(self, flat: Tensor) -> Tensor:
        return flat if self._axes is None else flat @ self._axes.T


def _x0_and_eps(alpha: Tensor, sigma: Tensor) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """((p, q) of x_0, (p, q) of eps) from x and v at each time."""
    square = alpha**2 + sigma**2
    columns = zip(*(v.tolist() for v in (alpha / square, -sigma / square, sigma / square, alpha / square)), strict=True)
    return [((a, b), (c, d)) for a, b, c, d in columns]


def _modes(variance: Tensor, event: torch.Size, size: int) -> tuple[Tensor, Tensor | None]:
    """(variances (D,), axes (D, D) or None)."""
    if variance.shape == event and not (event == (size,) and variance.shape == (size, size)):
        return variance.flatten(), None
    if variance.shape != (size, size):
        raise ValueError(
            f"GaussianSplit: expected a variance of the event's shape {tuple(event)} or a covariance ({size}, {size}), "
            f"got {tuple(variance.shape)}"
        )
    values, axes = torch.linalg.eigh(0.5 * (variance + variance.T))
    if bool((values < -1e-10 * values.abs().max()).any()):
        raise ValueError(
            f"GaussianSplit: expected a covariance without negative eigenvalues, got {float(values.min())}"
        )
    return values.clamp(min=0), axes


@checked
def estimate_split(
    model: Model, shape: tuple[int, ...], *, probes: int = 128, level: float = 20.0, seed: int = 0
) -> tuple[Tensor, float]:
    """(mean, variance) of the data, for `GaussianSplit`, from `2 probes` evaluations of the model alone.

    At noise s = sigma/alpha far above the data, E[x_0 | y] = mean + v/(v + s^2) (y - mean): the mean is read off the
    average over y = +-s e, e standard normal, and v off the slope. `level` is s, at most that of the process's t1.

    Args:
        shape: of one sample.
        probes: antithetic pairs.
    """
    probes = int(probes)
    if probes < 1:
        raise ValueError(f"expected probes >= 1, got {probes}")
    shape = event_shape(shape, 2 * probes)
    if not (math.isfinite(level) and level > 0):
        raise ValueError(f"expected level > 0, got {level!r}")
    process = model.gaussian
    at = process.time_of_lam(
        torch.maximum(-torch.log(torch.tensor(level, dtype=torch.float64)), process.lam(process.t1))
    )
    s = float(process.sigma(at) / process.alpha(at))
    e = Noise(seed, probes).normal(DATA, 1, shape, torch.float32)
    with torch.no_grad():
        plus, minus = (model.x0(float(process.alpha(at)) * s * v, at).to(torch.float64) for v in (e, -e))
    e = e.to(torch.float64)
    slope = float(((plus - minus) * e).sum() / (2 * s * e.square().sum()))
    slope = min(max(slope, 1e-12), 1 - 1e-12)
    return 0.5 * (plus + minus).mean(0), slope * s**2 / (1 - slope)
