"""Time reversal: the family of processes with the marginals of a given SDE, run the other way.

For dX = f dt + G dW with D = G G^T, score s = grad log p_t and (div D)_i = sum_j d_j D_ij,

    dX = [f - (1 + eta^2)/2 (div D + D s)] dt + eta G dW,     t from t1 down,

has the marginals p_t for every eta (a number or a function of t): eta = 0 is the probability
flow, eta = 1 the reverse SDE of Anderson (1982); the family is that of Zhang and Chen (2023,
DEIS, section 2), with the divergence of Haussmann and Pardoux (1986).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from sdeflow.calculus import apply_covariance, divergence
from sdeflow.checked import LARGEST, checked_class
from sdeflow.gaussian import GaussianSDE
from sdeflow.kept import Kept, bits, constant
from sdeflow.model import Model, Row, RowEvaluator, as_model, row_of
from sdeflow.quadrature import gauss_legendre
from sdeflow.sde import SDE, Evaluator, Score
from sdeflow.times import Each, Time, as_time
from sdeflow.variables import VARIABLES

Eta = float | Callable[[Tensor], Any]


@checked_class
class ReverseSDE(SDE):
    """`process` reversed in time, its score given by `model`, with stochasticity `eta`.

    An SDE on the same clock, integrated from t1 down; reversing it again with the same score and 1/eta
    (eta for eta = 1) gives the forward process back. For a GaussianSDE the drift is one row of the model's table,
    alpha' x_0 + (sigma' + eta^2 g^2/(2 sigma)) eps, finite wherever the process and prediction are.

    Args:
        process: the SDE to reverse (also a ReverseSDE).
        model: a `Model` of the process, or a callable score(x, t).
        eta: >= 0, a number or a function of a float64 tensor of times.

    Raises:
        ValueError: negative eta, or a model made for another process.
        TypeError: `model` is not callable.
    """

    def __init__(self, process: SDE, model: Model | Score, eta: Eta = 1.0) -> None:
        if not isinstance(process, SDE):
            raise TypeError(f"expected an SDE to reverse, got {type(process).__name__}")
        if not callable(eta) and not (isinstance(eta, (int, float)) and 0 <= eta <= LARGEST):
            raise ValueError(f"expected eta >= 0 or a function of t, got {eta!r}")
        self.process = process
        self.model = as_model(model, process)
        self.eta = eta
        self.noise, self.event, self.domain = process.noise, process.event, process.domain
        self.t0, self.t1 = process.t0, process.t1
        self.direction = -process.direction

    def __repr__(self) -> str:
        return f"ReverseSDE({self.process!r}, {self.model!r}, eta={self.eta!r})"

    @property
    def t_min(self) -> float:
        return self.process.t_min

    @property
    def span(self) -> tuple[float, float]:
        return (self.t1, self.t_min) if self.direction < 0 else (self.t_min, self.t1)

    @property
    def stochastic(self) -> bool:
        return callable(self.eta) or self.eta != 0

    def eta_at(self, t: Time) -> Tensor:
        """eta at time t, float64 of the shape of t."""
        t = as_time(t)
        value = self.eta(t) if callable(self.eta) else self.eta
        return torch.as_tensor(value, dtype=torch.float64, device=t.device).expand(t.shape)

    # ---- the general view

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        if isinstance(self.process, GaussianSDE):
            return self.model.value(x, t, self._drift_row(self.process, t))
        process = self.process
        weight = process.direction * 0.5 * (1 + self.eta_at(t) ** 2)
        correction = self.divergence(x, t) + apply_covariance(process, x, t, self.model.score(x, t))
        return process.ito_drift(x, t).to(x.dtype) - weight.to(x.dtype) * correction

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        g = self.process.diffusion(x, t)
        eta = self.eta_at(t).to(x.dtype)
        return (eta.unsqueeze(-1) if self.noise == "general" and eta.ndim > 0 else eta) * g

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """(div D)_i = sum_j d_j D_ij of the process at (x, t), of the shape of x; 0 when G ignores x."""
        return divergence(self.process, x, t)

    # ---- the semilinear view of a Gaussian process

    @property
    def gaussian(self) -> GaussianSDE:
        """The reversed process, which must be a GaussianSDE.

        Raises:
            ValueError: it is not: there is no exact linear part.
        """
        if not isinstance(self.process, GaussianSDE):
            raise ValueError(
                "expected the reversal of a GaussianSDE (the transition view); "
                f"got that of {type(self.process).__name__}, which has only drift and diffusion: use a solver "
                "of the drift view, such as EulerMaruyama, Heun or RK45"
            )
        return self.process

    def transition(self, t0: Time, t1: Time, prediction: str = "x0") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ratio, amp, c, std) of the exact solution from t0 to t1 < t0, float64:

            x1 = ratio x0 + amp int_{lam0}^{lam1} c exp(-c (lam1 - v)) N(v) dv + std xi,

        N the prediction "x0" or "eps" along the path, h = lam1 - lam0:

            x0:  ratio = s1/s0 exp(-eta^2 h),  amp = a1,             c = 1 + eta^2,  std = s1 sqrt(1 - exp(-2 eta^2 h))
            eps: ratio = a1/a0,                amp = (1 + eta^2) s1,  c = -1,
                 std = eta a1 sqrt(exp(-2 lam0) - exp(-2 lam1))

        (Xue et al. 2023, SA-Solver, section 4; Lu et al. 2022, DPM-Solver++, equation 8, for eta = 0.)
        A function eta is held at its root mean square over the step, which keeps the marginals exact.
        """
        process, eta2 = self.gaussian, self.mean_eta2(t0, t1)
        t0, t1 = as_time(t0), as_time(t1)
        a0, s0, a1, s1 = process.alpha(t0), process.sigma(t0), process.alpha(t1), process.sigma(t1)
        h = process.lam(t1) - process.lam(t0)
        rate = torch.where(eta2 > 0, eta2 * h, torch.zeros_like(h))  # 0 times an infinite step is 0 here
        if prediction == "x0":
            ratio, amp, c = s1 / s0 * torch.exp(-rate), a1, 1 + eta2
            return ratio, amp, c, s1 * torch.sqrt(-torch.expm1(-2 * rate))
        if prediction == "eps":
            if bool((a0 == 0).any()):
                raise ValueError(
                    "noise prediction says nothing about x_0 where alpha = 0: use data prediction, or start below it"
                )
            fresh = torch.sqrt(
                torch.clamp(-torch.expm1(-2 * h), min=0.0)
            )  # exp(-2 lam0) - exp(-2 lam1) = (s0/a0)^2 (1 - exp(-2h))
            return a1 / a0, (1 + eta2) * s1, -torch.ones_like(h), torch.sqrt(eta2) * a1 * s0 / a0 * fresh
        raise ValueError(f'expected prediction "x0" or "eps", got {prediction!r}')

    def mean_eta2(self, t0: Time, t1: Time) -> Tensor:
        """The mean of eta^2 over lam between t0 and t1 (5-point Gauss-Legendre; over t at an infinite lam)."""
        start, end = torch.broadcast_tensors(as_time(t0), as_time(t1))
        if not callable(self.eta):
            return torch.full_like(start, float(self.eta) ** 2)
        nodes, weights = gauss_legendre(5)
        lam0, lam1 = (self.gaussian.lam(t).unsqueeze(-1) for t in (start, end))
        inside = self.gaussian.time_of_lam(lam0 + (lam1 - lam0) * nodes)
        straight = start.unsqueeze(-1) + (end - start).unsqueeze(-1) * nodes
        inside = torch.where(torch.isfinite(lam0) & torch.isfinite(lam1), inside, straight)
        return (self.eta_at(inside) ** 2 * weights).sum(-1)

    # ---- what plans and solvers use

    def _drift_row(self, process: GaussianSDE, t: Tensor) -> Row:
        d_alpha, d_sigma = row_of("velocity", process, t)
        eta = self.eta_at(t)
        if self.stochastic:
            d_sigma = d_sigma + eta**2 * process.diffusion_coeff(t) ** 2 / (2 * process.sigma(t))
        return d_alpha, d_sigma

    def row(self, target: str, times: Tensor) -> Row:
        """(c, d) of a plan's target, c x_0 + d eps, at times (n,): the drift, a prediction, a variable's slope."""
        process = self.gaussian
        return self._drift_row(process, times) if target == "drift" else _target_row(target, process, times)

    def evaluator(self, target: str, times: Tensor) -> Evaluator:
        if not isinstance(self.process, GaussianSDE) and target == "drift":
            return super().evaluator(target, times)
        process, model = self.gaussian, self.model

        def factors() -> tuple[list[float], list[float]]:
            return model.factors(times, self.row(target, times))

        fixed = constant(process) and constant(self.eta)
        key = (process, self.eta, model.prediction, target, bits(times)) if fixed else None
        return RowEvaluator(model, times, *_FACTORS.get(key, factors))

    def score_evaluator(self, times: Tensor) -> Evaluator:
        """`evaluate(k, x)`: the score at times[k]."""
        if isinstance(self.process, GaussianSDE):
            return self.evaluator("score", times)
        ts = Each(times)
        return lambda k, x: self.model.score(x, ts[k])

    def scalar_diffusion(self, times: Tensor) -> Tensor | None:
        g = self.process.scalar_diffusion(times)
        return None if g is None else self.eta_at(times) * g

    def default_grid(self, steps: int, t_start: float, t_end: float) -> Tensor:
        return self.process.default_grid(steps, t_start, t_end)

    def models(self) -> tuple[Model, ...]:
        return (self.model, *self.process.models())

    def take(self, rows: Tensor) -> Self:
        part = copy.copy(self)
        part.process, part.model = self.process.take(rows), self.model.take(rows)
        return part

    def check_batch(self, batch: int) -> None:
        self.model.check_batch(batch)
        self.process.check_batch(batch)


_FACTORS: Kept[tuple[list[float], list[float]]] = Kept(64)


def _target_row(target: str, process: GaussianSDE, times: Tensor) -> Row:
    if target in VARIABLES:
        return VARIABLES[target].row(process, times)
    if target.startswith(
        "split:"
    ):  # x_0 - (v/s) eps, the residual of a Gaussian of variance v (solvers.gaussian_split)
        variance = float(target.removeprefix("split:"))
        return torch.ones_like(times), -variance * process.alpha(times) / process.sigma(times)
    return row_of(target, process, times)
