"""The named Gaussian processes, with closed forms.

Each overrides what `GaussianSDE` would derive; the tests hold every closed form against the derivation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdeflow import grids
from sdeflow.checked import checked_class, described, number
from sdeflow.gaussian import GaussianSDE


def _store(process: object, **values: float) -> None:
    """Keep parameters as floats: VP(1, 20) is VP(1.0, 20.0), also where it is printed and compared."""
    for name, value in values.items():
        object.__setattr__(process, name, float(value))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not number(value):
            raise ValueError(f"expected a finite {name} > 0, got {described(value)}")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"expected a finite {name} > 0, got {value!r}")


def _increasing(**values: float) -> None:
    _positive(**values)
    (low_name, low), (high_name, high) = values.items()
    if not low < high:
        raise ValueError(f"expected {low_name} < {high_name}, got {low:g} and {high:g}")


class _ByLogAlpha(GaussianSDE):
    """What the processes that are given by log alpha share: f = -beta/2 with beta = -2 (log alpha)'."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha at times t, falling from 0 at t = 0."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """The rate beta = -2 d(log alpha)/dt at times t."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def drift_coeff(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    @property
    def prior_std(self) -> float:
        """1: the prior of this family is N(0, I), although sigma(t1) is a little below 1."""
        return 1.0


class VariancePreserving(_ByLogAlpha):
    """sigma^2 = 1 - alpha^2, g^2 = beta."""

    @abstractmethod
    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """The time at which log alpha has that value."""

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def lam(self, t: Tensor) -> Tensor:
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))

    def time_of_lam(self, lam: Tensor) -> Tensor:
        return self.time_of_log_alpha(-0.5 * torch.logaddexp(torch.zeros_like(lam), -2 * lam))

    def diffusion_coeff(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.beta(t))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        beta, alpha = self.beta(t), self.alpha(t)
        return -0.5 * beta * alpha, 0.5 * beta * alpha**2 / self.sigma(t)


@dataclass(frozen=True)
class _LinearBeta:
    """beta(t) = beta_min + t (beta_max - beta_min) on [0, 1]."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        _positive(beta_min=self.beta_min, beta_max=self.beta_max)
        _store(self, beta_min=self.beta_min, beta_max=self.beta_max)

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """The root of the quadratic, in the form that does not cancel near 0."""
        b = 0.5 * self.beta_min
        root = torch.sqrt(b**2 - (self.beta_max - self.beta_min) * log_alpha)
        return -2 * log_alpha / (b + root)


@checked_class
@dataclass(frozen=True)
class VP(_LinearBeta, VariancePreserving):
    """Variance preserving: f = -beta/2, g = sqrt(beta), beta linear from beta_min to beta_max on [0, 1].

    alpha = exp(-t^2 (beta_max - beta_min)/4 - t beta_min/2), sigma^2 = 1 - alpha^2
    (Song et al. 2021, Score-based generative modeling, equation 32). Sampling ends at t = 1e-3.
    """

    t_min = 1e-3


@checked_class
@dataclass(frozen=True)
class SubVP(_LinearBeta, _ByLogAlpha):
    """Sub-VP: the drift and mean of VP with g^2 = beta (1 - alpha^4); its std is 1 - alpha^2, not the root.

    (Song et al. 2021, Score-based generative modeling, equations 12 and 35.) Sampling ends at t = 1e-3.
    """

    t_min = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self.log_alpha(t))

    def time_of_lam(self, lam: Tensor) -> Tensor:
        """alpha solves alpha^2 + alpha e^-lam - 1 = 0, so alpha = 1/(q + sqrt(1 + q^2)), q = e^-lam/2."""
        return self.time_of_log_alpha(-torch.asinh(0.5 * torch.exp(-lam)))

    def diffusion_coeff(self, t: Tensor) -> Tensor:
        return torch.sqrt(-self.beta(t) * torch.expm1(4 * self.log_alpha(t)))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        beta, alpha = self.beta(t), self.alpha(t)
        return -0.5 * beta * alpha, beta * alpha**2


@checked_class
@dataclass(frozen=True)
class CosineVP(VariancePreserving):
    """Cosine schedule: alpha(t) = cos(theta(t))/cos(theta(0)), theta = (pi/2)(t + s)/(1 + s), sigma^2 = 1 - alpha^2.

    (Nichol and Dhariwal 2021, Improved DDPM, equation 17.) alpha is 0 at t = 1, where beta is
    infinite, so the process stops at t1 = 0.9946 (alpha = 0.0084; Lu et al. 2022, DPM-Solver,
    appendix D). Sampling ends at t = 1e-3.
    """

    s: float = 0.008
    t1: float = 0.9946

    def __post_init__(self) -> None:
        _positive(s=self.s)
        if not self.t_min < self.t1 < 1:
            raise ValueError(f"expected t1 in ({self.t_min:g}, 1), got {self.t1:g}")
        _store(self, s=self.s, t1=self.t1)

    t_min = 1e-3

    @property
    def _speed(self) -> float:
        return 0.5 * math.pi / (1 + self.s)

    def log_alpha(self, t: Tensor) -> Tensor:
        """log(cos(theta)/cos(theta_0)) with the angle's increment, which does not cancel near t = 0."""
        angle = self._speed * t
        return torch.log1p(-2 * torch.sin(0.5 * angle) ** 2 - torch.sin(angle) * math.tan(self._speed * self.s))

    def beta(self, t: Tensor) -> Tensor:
        return 2 * self._speed * torch.tan(self._speed * (t + self.s))

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """cos(angle + theta_0) = alpha cos(theta_0), through sines of half angles near t = 0."""
        start = self._speed * self.s
        # sin^2(theta/2) = (1 - alpha cos(theta_0))/2 without cancellation
        half = math.sin(0.5 * start) ** 2 - 0.5 * math.cos(start) * torch.expm1(log_alpha)
        return 2 * torch.asin(torch.sqrt(half)) / self._speed - self.s


class _VarianceExploding(GaussianSDE):
    """alpha = 1, f = 0, g^2 = (sigma^2)'."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def lam(self, t: Tensor) -> Tensor:
        return -torch.log(self.sigma(t))

    def drift_coeff(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def default_grid(self, steps: int, t_start: float, t_end: float) -> Tensor:
        return grids.karras(self, steps, t_start, t_end)


@checked_class
@dataclass(frozen=True)
class VE(_VarianceExploding):
    """Variance exploding: sigma(t) = sigma_min (sigma_max/sigma_min)^t on [0, 1], f = 0, g^2 = (sigma^2)'.

    (Song et al. 2021, Score-based generative modeling, equations 30 and 31.) Convention: sigma(t)
    is the *declared marginal*, x_t = x_0 + sigma(t) eps, so x at t = 0 already carries noise of
    sigma_min. The SDE started from a point mass at t = 0 has variance sigma(t)^2 - sigma_min^2,
    which is what `transition_kernel(0, t)` returns. Sampling ends at t = 1e-5.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        _increasing(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        _store(self, sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    t_min = 1e-5

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._rate * t)

    def time_of_lam(self, lam: Tensor) -> Tensor:
        return (-lam - math.log(self.sigma_min)) / self._rate

    def diffusion_coeff(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self._rate)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), self._rate * self.sigma(t)


@checked_class
@dataclass(frozen=True)
class EDM(_VarianceExploding):
    """The sigma clock: sigma(t) = t, alpha = 1, f = 0, g = sqrt(2 t) on [0, sigma_max].

    (Karras et al. 2022, EDM, table 1.) Sampling ends at t = sigma_min.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    t1: float = field(init=False, repr=False, compare=False, default=80.0)

    def __post_init__(self) -> None:
        _increasing(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        _store(self, sigma_min=self.sigma_min, sigma_max=self.sigma_max, t1=self.sigma_max)

    @property
    def t_min(self) -> float:
        return self.sigma_min

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time_of_lam(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)

    def diffusion_coeff(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * t)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class RectifiedFlow(GaussianSDE):
    """The straight path x_t = (1 - t) x_0 + t eps on [0, 1]; velocity eps - x_0.

    f = -1/(1 - t), g^2 = 2 t/(1 - t): infinite at t = 1, where alpha = 0 (Liu et al. 2023,
    Rectified flow; Lipman et al. 2023, Flow matching). t = 0 is data, the reverse of the clock of
    some flow-matching codes. The flow (eta = 0) starts at t = 1 exactly; with noise start below 1.
    Sampling ends at t = 1e-3.
    """

    t_min = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def lam(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - torch.log(t)

    def time_of_lam(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)

    def drift_coeff(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def diffusion_coeff(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * t / (1 - t))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)
