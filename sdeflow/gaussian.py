"""Scalar Gaussian processes dx = f(t) x dt + g(t) dW and their kernels x_t = alpha x_0 + sigma eps.

Two descriptions, each derived from the other: the kernel (`alpha`, `sigma`) by

    f = alpha'/alpha,   g^2 = 2 sigma (sigma' - f sigma) = -2 sigma^2 lam',   lam = log(alpha/sigma),

with derivatives by reverse-mode autodiff, and the coefficients (`drift_coeff`, `diffusion_coeff`) by

    alpha = exp(A),  A(t) = int_{t0}^t f,   sigma = alpha sqrt(V),  V(t) = int_{t0}^t g^2 exp(-2 A),

by Gauss-Legendre quadrature (Sarkka and Solin 2019, Applied SDEs, section 6.2). All in float64.
The named members give closed forms; the tests hold them against the derivations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor

from sdeflow import grids
from sdeflow.checked import checked, described, number, tensor
from sdeflow.noise import PRIOR, Noise
from sdeflow.quadrature import CumulativeKernel
from sdeflow.sde import SDE
from sdeflow.times import Time, align, as_time, check_within

_OF_TIME = ("alpha", "sigma", "lam", "drift_coeff", "diffusion_coeff", "derivatives", "time_of_lam")
_SAMPLING_SHARE = 1e-3
"""The part of the span next to the data that sampling leaves out by default."""
_INWARD = 1e-6
"""Of the span: how far from the data a limit there is extrapolated from."""


def _takes_numbers(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of time written for float64 tensors be called with numbers, and return one, too."""

    @wraps(method)
    def call(self: Any, t: Time) -> Any:
        t = as_time(t)
        value = method(self, t)
        return value if isinstance(value, tuple) else _like(value, t)

    return call


class GaussianSDE(SDE):
    """An SDE dx = f(t) x dt + g(t) dW with scalar coefficients.

    Derive from it with either pair of methods, functions of a float64 tensor of times of any
    shape, or use `from_kernel` / `from_coefficients`:

    - `alpha(t)`, `sigma(t)`: the declared marginal x_t = alpha(t) x_0 + sigma(t) eps;
    - `drift_coeff(t)`, `diffusion_coeff(t)`: f and g, from a point mass at t0.
    """

    noise = "diagonal"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _OF_TIME:
            if name in cls.__dict__:
                setattr(cls, name, _takes_numbers(cls.__dict__[name]))

    # ---- the kernel

    def alpha(self, t: Time) -> Tensor:
        """The scale alpha(t) of the data, float64 of the shape of t."""
        return self._kernel.alpha(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        """The standard deviation sigma(t) of the noise, float64 of the shape of t."""
        return self._kernel.sigma(as_time(t))

    def lam(self, t: Time) -> Tensor:
        """Half the log signal-to-noise ratio, lam = log(alpha/sigma): decreasing in t."""
        t = as_time(t)
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def time_of_lam(self, lam: Time) -> Tensor:
        """The time at which lam(t) = lam, to the spacing of float64 (bisection)."""
        lam = as_time(lam)
        low = torch.full_like(lam, self.t0)
        high = torch.full_like(lam, self.t1)
        for _ in range(64):
            middle = 0.5 * (low + high)
            above = self.lam(middle) > lam
            low = torch.where(above, middle, low)
            high = torch.where(above, high, middle)
        return 0.5 * (low + high)

    def derivatives(self, t: Time) -> tuple[Tensor, Tensor]:
        """(alpha'(t), sigma'(t)), float64 of the shape of t."""
        t = as_time(t)
        if self._from_coefficients:
            f, g, sigma = self.drift_coeff(t), self.diffusion_coeff(t), self.sigma(t)
            return f * self.alpha(t), g**2 / (2 * sigma) + f * sigma
        return _slope(self.alpha, t), _slope(self.sigma, t)

    # ---- the coefficients

    def drift_coeff(self, t: Time) -> Tensor:
        """f(t) of the drift f(t) x, float64 of the shape of t."""
        t = as_time(t)
        return self.derivatives(t)[0] / self.alpha(t)

    def diffusion_coeff(self, t: Time) -> Tensor:
        """g(t) of the noise g(t) dW, float64 of the shape of t."""
        t = as_time(t)
        square = self._derived_square(t)
        at_data = torch.isnan(square) & (self.sigma(t) == 0)  # where sigma grows as sqrt(t - t0): 0 times infinity
        if bool(at_data.any()):
            h = _INWARD * (self.t1 - self.t0)
            near, beyond = (self._derived_square(t + k * h) for k in (1, 2))
            square = torch.where(at_data, 2 * near - beyond, square)
        return torch.sqrt(torch.clamp(square, min=0.0))

    def _derived_square(self, t: Tensor) -> Tensor:
        """g^2 = (sigma^2)' - 2 f sigma^2."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        d_alpha, d_sigma = self.derivatives(t)
        return 2 * sigma * (d_sigma - d_alpha / alpha * sigma)

    # ---- the law

    @property
    def t_min(self) -> float:
        """Where sampling ends: t0 + (t1 - t0)/1000 unless the process sets its own."""
        return self.t0 + _SAMPLING_SHARE * (self.t1 - self.t0)

    @property
    def prior_std(self) -> float:
        """The standard deviation of the prior at t1: sigma(t1)."""
        return float(self.sigma(self.t1))

    def drift(self, x: Tensor, t: Time) -> Tensor:
        return self.drift_coeff(align(t, x)).to(x.dtype) * x

    def diffusion(self, x: Tensor, t: Time) -> Tensor:
        return self.diffusion_coeff(align(t, x)).to(x.dtype)

    def scalar_diffusion(self, times: Tensor) -> Tensor:
        return self.diffusion_coeff(times)

    def marginal(self, x0: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """(mean, std) of x_t given x_0: alpha(t) x0 and sigma(t), the latter broadcasting against x0.

        Args:
            x0: data (batch, *event).
            t: one time, or one a sample (batch,), in [t0, t1].
        """
        t = align(t, x0)
        if not tensor(x0):
            raise TypeError(f"expected x0 as a tensor of real numbers, got {described(x0)}")
        check_within(t, self.t0, self.t1)
        return self.alpha(t).to(x0.dtype) * x0, self.sigma(t).to(x0.dtype)

    def perturb(self, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps."""
        if not (tensor(x0) and tensor(eps)):
            raise TypeError(f"expected x0 and eps as tensors, got {described(x0)} and {described(eps)}")
        if eps.shape != x0.shape:
            raise ValueError(f"expected eps of the shape of x0, {tuple(x0.shape)}, got {tuple(eps.shape)}")
        mean, std = self.marginal(x0, t)
        return mean + std * eps

    def transition_kernel(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """(ratio, std) of x_t = ratio x_s + std eps for s <= t, float64.

        ratio = alpha_t/alpha_s, std = sigma_t sqrt(1 - exp(2 (lam_t - lam_s))) by `expm1`.
        """
        s, t = as_time(s), as_time(t)
        check_within(s, self.t0, self.t1)
        check_within(t, self.t0, self.t1)
        if t.device.type == "cpu" and s.device.type == "cpu" and bool((s > t).any()):
            raise ValueError("expected s <= t: the transition kernel runs forward in time")
        # rounding of lam must not make a short step negative, and equal infinities have no difference
        gap = torch.where(s == t, 0.0, torch.clamp(self.lam(t) - self.lam(s), max=0.0))
        return self.alpha(t) / self.alpha(s), self.sigma(t) * torch.sqrt(-torch.expm1(2 * gap))

    @checked
    def prior_sample(
        self,
        shape: tuple[int, ...],
        seed: int,
        *,
        index: int | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """`shape` = (batch, *event) draws of the prior N(0, prior_std^2); sample i depends on (seed, index i)."""
        if not shape or min(shape) < 1 or math.prod(shape) >= 1 << 40:
            raise ValueError(f"expected a shape (batch, *event) of fewer than 2^40 numbers, got {tuple(shape)}")
        noise = Noise(seed, shape[0], index=index, device=device)
        return self.prior_std * noise.normal(PRIOR, 0, shape[1:], dtype)

    def default_grid(self, steps: int, t_start: float, t_end: float) -> Tensor:
        return grids.power(self, steps, t_start, t_end)

    # ---- constructors

    @staticmethod
    @checked
    def from_kernel(
        alpha: Callable[[Tensor], Any],
        sigma: Callable[[Tensor], Any],
        t0: float = 0.0,
        t1: float = 1.0,
        *,
        t_min: float | None = None,
    ) -> GaussianSDE:
        """The process with declared marginal x_t = alpha(t) x_0 + sigma(t) eps.

        `alpha` and `sigma` map a float64 tensor of times to one of the same shape (or a number).

        Raises:
            ValueError: alpha is not positive, sigma negative, or lam does not decrease, inside (t0, t1).
        """
        process = _FromKernel(alpha, sigma, *_checked_span(t0, t1, t_min))
        ts = torch.linspace(t0, t1, 67, dtype=torch.float64)[1:-1]
        a, s = process.alpha(ts), process.sigma(ts)
        if not bool((a > 0).all() and (s > 0).all() and torch.isfinite(a).all() and torch.isfinite(s).all()):
            raise ValueError("expected alpha > 0 and sigma > 0, both finite, inside (t0, t1)")
        if not bool((torch.diff(torch.log(a / s)) < 0).all()):
            raise ValueError(
                "expected alpha/sigma to decrease from t0 (data) to t1 (noise); it does not: "
                "is the clock reversed (t = 0 is data here)?"
            )
        return process

    @staticmethod
    @checked
    def from_coefficients(
        drift_coeff: Callable[[Tensor], Any],
        diffusion_coeff: Callable[[Tensor], Any],
        t0: float = 0.0,
        t1: float = 1.0,
        *,
        t_min: float | None = None,
    ) -> GaussianSDE:
        """The process dx = f(t) x dt + g(t) dW from a point mass at t0 (alpha(t0) = 1, sigma(t0) = 0).

        Raises:
            ValueError: a coefficient is not finite, or g is 0 everywhere.
        """
        process = _FromCoefficients(drift_coeff, diffusion_coeff, *_checked_span(t0, t1, t_min))
        ts = torch.linspace(t0, t1, 67, dtype=torch.float64)[1:-1]
        f, g = process.drift_coeff(ts), process.diffusion_coeff(ts)
        if not bool(torch.isfinite(f).all() and torch.isfinite(g).all()):
            raise ValueError("expected finite drift and diffusion coefficients inside (t0, t1)")
        if not bool((g != 0).any()):
            raise ValueError("expected a diffusion coefficient that is not 0 everywhere; use ODE for no noise")
        return process

    @property
    def _from_coefficients(self) -> bool:
        cls = type(self)
        return cls.alpha is GaussianSDE.alpha or cls.sigma is GaussianSDE.sigma

    @cached_property
    def _kernel(self) -> CumulativeKernel:
        cls = type(self)
        if cls.drift_coeff is GaussianSDE.drift_coeff or cls.diffusion_coeff is GaussianSDE.diffusion_coeff:
            raise TypeError(f"{cls.__name__} must define alpha and sigma, or drift_coeff and diffusion_coeff")
        return CumulativeKernel(self.drift_coeff, self.diffusion_coeff, self.t0, self.t1)


def _checked_span(t0: float, t1: float, t_min: float | None) -> tuple[float, float, float]:
    for name, value in (("t0", t0), ("t1", t1), ("t_min", t_min)):
        if not (value is None and name == "t_min") and not (number(value) and math.isfinite(float(value or 0))):
            raise ValueError(f"expected {name} as a finite number, got {described(value)}")
    t_min = t0 + _SAMPLING_SHARE * (t1 - t0) if t_min is None else t_min
    if not t0 < t_min < t1:
        raise ValueError(f"expected t0 < t_min < t1, got t0 = {t0:g}, t_min = {t_min:g}, t1 = {t1:g}")
    return float(t0), float(t1), float(t_min)


def _slope(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of an elementwise function, by reverse mode; 0 where it is constant."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = t.detach().clone().requires_grad_()
        value = function(leaf)
        if not value.requires_grad:
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return slope


def _like(value: Any, t: Tensor) -> Tensor:
    try:
        if isinstance(value, Tensor) and not tensor(value):
            raise TypeError("no real numbers")
        return torch.as_tensor(value, dtype=torch.float64, device=t.device).expand(t.shape)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a function of time to return numbers of shape {tuple(t.shape)}, got {described(value)}"
        ) from error


@dataclass(frozen=True, eq=False)
class _FromKernel(GaussianSDE):
    kernel_alpha: Callable[[Tensor], Any]
    kernel_sigma: Callable[[Tensor], Any]
    t0: float
    t1: float
    t_min: float = _SAMPLING_SHARE

    def alpha(self, t: Tensor) -> Tensor:
        return _like(self.kernel_alpha(t), t)

    def sigma(self, t: Tensor) -> Tensor:
        return _like(self.kernel_sigma(t), t)


@dataclass(frozen=True, eq=False)
class _FromCoefficients(GaussianSDE):
    given_drift: Callable[[Tensor], Any]
    given_diffusion: Callable[[Tensor], Any]
    t0: float
    t1: float
    t_min: float = _SAMPLING_SHARE

    def drift_coeff(self, t: Tensor) -> Tensor:
        return _like(self.given_drift(t), t)

    def diffusion_coeff(self, t: Tensor) -> Tensor:
        return _like(self.given_diffusion(t), t)
