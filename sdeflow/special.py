"""Processes with closed-form laws that need special functions: square-root processes, Wright-Fisher, the sphere.

The square-root and Wright-Fisher processes have boundaries. Within Feller's condition (`feller` is True) these are
never reached and time reversal holds as it stands; outside it the density given is that of the reflected process,
which touches the boundary: there the reversal's integrations by parts leave boundary terms, and a simulated state
crosses it. Past the boundary the noise is 0 (full truncation: Lord, Koekkoek and van Dijk 2010, A comparison of biased
simulation schemes for stochastic volatility models), so that the drift brings a state that a step took there back.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from scipy import special
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.known import angle_between, log_wrapped_normal, rotated
from sdeflow.known_base import Draws, KernelSDE, from_numpy, positive
from sdeflow.special_functions import (
    AncestralWeights,
    ancestral_weights,
    log_heat_sphere,
    log_hyp0f1,
    most_lineages,
    sphere_cosine,
)

__all__ = ["CIR", "Jacobi", "Sphere", "SquaredBessel"]


class SquareRoot(KernelSDE):
    """Processes on [0, inf) whose kernel, with b, c(t) and u(t, x_0) of their own, is a mixture of Gammas:

        p(x, t | x_0) = sum_n Poisson(n; u) Gamma(x; shape b + n, rate c) = c e^{-u-v} v^{b-1}/Gamma(b) 0F1(; b; u v),

    v = c x: 2 c x_t is noncentral chi-square with 2 b degrees of freedom and noncentrality 2 u.
    """

    domain = (0.0, math.inf)
    closed = True

    @property
    @abstractmethod
    def _shape(self) -> float:
        """b."""

    @abstractmethod
    def _rates(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c, u)."""

    @property
    def feller(self) -> bool:
        """Whether 0 is never reached (Feller 1951): b >= 1."""
        return self._shape >= 1

    def _log_kernel(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        b = self._shape
        c, u = self._rates(x0, t)
        v = c * x
        value = torch.log(v) * b - torch.log(x) - u - v - math.lgamma(b) + log_hyp0f1(b, u * v)
        return value.sum(-1)

    def _kernel_draw(self, x0: Tensor, t: Tensor, draws: Draws) -> Tensor:
        from scipy.stats import poisson

        c, u = self._rates(x0, t)
        n = poisson.ppf(draws.uniform(self.dim).numpy(), u.numpy())
        return from_numpy(special.gammaincinv(self._shape + n, draws.uniform(self.dim).numpy())) / c


@checked_class
class CIR(SquareRoot):
    """The square-root process of Cox, Ingersoll and Ross (1985, A theory of the term structure of interest rates):

        dx = kappa (theta - x) dt + sigma sqrt(x) dW on [0, inf), in each coordinate.

    Their equation 18: with c = 2 kappa/(sigma^2 (1 - e^{-kappa t})), u = c x_0 e^{-kappa t}, b = 2 kappa theta/sigma^2,
    2 c x_t is noncentral chi-square with 2 b degrees of freedom, noncentrality 2 u. Stationary: Gamma(b, rate
    2 kappa/sigma^2). E x_t = theta + (x_0 - theta) e^{-kappa t}. Feller's condition is 2 kappa theta >= sigma^2.

    Raises:
        ValueError: parameters that are not > 0, or a start outside [0, inf).
    """

    def __init__(
        self,
        kappa: float = 1.0,
        theta: float = 1.0,
        sigma: float = 1.0,
        *,
        start: Any = None,
        weights: Any = None,
        t1: float = 1.0,
    ) -> None:
        positive(kappa=kappa, theta=theta, sigma=sigma)
        self.kappa, self.theta, self.sigma = kappa, theta, sigma
        super().__init__([[theta]] if start is None else start, weights, t1)

    def __repr__(self) -> str:
        return f"CIR(kappa={self.kappa:g}, theta={self.theta:g}, sigma={self.sigma:g})"

    @property
    def _shape(self) -> float:
        return 2 * self.kappa * self.theta / self.sigma**2

    def _rates(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        c = -2 * self.kappa / self.sigma**2 / torch.expm1(-self.kappa * t)
        return c, c * x0 * torch.exp(-self.kappa * t)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.kappa * (self.theta - x)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.sigma * torch.sqrt(torch.clamp(x, min=0.0))

    def _log_stationary(self, x: Tensor) -> Tensor:
        b, rate = self._shape, 2 * self.kappa / self.sigma**2
        return (b * math.log(rate) - math.lgamma(b) + (b - 1) * torch.log(x) - rate * x).sum(-1)

    def _prior_draw(self, draws: Draws, n: int) -> Tensor:
        gamma = special.gammaincinv(self._shape, draws.uniform(self.dim).numpy())
        return from_numpy(gamma) * self.sigma**2 / (2 * self.kappa)


@checked_class
class SquaredBessel(SquareRoot):
    """The squared Bessel process of dimension delta, |W|^2 of a Brownian motion for integer delta:

        dx = delta dt + 2 sqrt(x) dW on [0, inf), in each coordinate.

    x_t/t is noncentral chi-square with delta degrees of freedom and noncentrality x_0/t (Revuz and Yor 1999, Continuous
    martingales and Brownian motion, chapter XI, corollary 1.4): b = delta/2, c = 1/(2t), u = x_0/(2t). Feller's
    condition is delta >= 2. No stationary law: `prior_sample` draws from its own law at t1.

    Raises:
        ValueError: delta <= 0, or a start outside [0, inf).
    """

    def __init__(self, delta: float = 3.0, *, start: Any = ((1.0,),), weights: Any = None, t1: float = 1.0) -> None:
        positive(delta=delta)
        self.delta = delta
        super().__init__(start, weights, t1)

    def __repr__(self) -> str:
        return f"SquaredBessel(delta={self.delta:g})"

    @property
    def _shape(self) -> float:
        return 0.5 * self.delta

    def _rates(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        c = 0.5 / t
        return c, c * x0

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, self.delta)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 2 * torch.sqrt(torch.clamp(x, min=0.0))


_LEAST_TIME = 0.01
"""Below this the ancestral process of the Jacobi kernel has hundreds of lineages: no longer a fast closed form."""


@checked_class
class Jacobi(KernelSDE):
    """The Jacobi process, the Wright-Fisher diffusion with mutation rates a and b, on [0, 1] in each coordinate:

        dx = (a (1 - x) - b x)/2 dt + sqrt(x (1 - x)) dW.

    With q_m(t) the law of the ancestral process (`AncestralWeights`, theta = a + b), the kernel is a mixture of Betas,

        p(x, t | x_0) = sum_m q_m(t) sum_l Binomial(l; m, x_0) Beta(x; a + l, b + m - l)

    (Griffiths and Spano 2010, Diffusion processes and coalescent trees), Beta(a, b) times a polynomial
    of x x_0 and (1 - x)(1 - x_0) with positive coefficients. It equals the expansion in Jacobi polynomials, but has
    no cancellation: logarithms are accurate in the tails, too. Times below 0.01 are refused; a new time costs 5 ms
    at 0.1, 0.1 s at 0.02 and 0.8 s at 0.01, once. `kernel_sample` draws m, l and x in turn (Jenkins and Spano 2017,
    Exact simulation of the Wright-Fisher diffusion). Stationary: Beta(a, b). Feller's condition is
    a >= 1 and b >= 1.

    Raises:
        ValueError: a <= 0, b <= 0, a start outside [0, 1], or a density at a time below 0.01.
    """

    domain = (0.0, 1.0)
    closed = True

    def __init__(
        self, a: float = 2.0, b: float = 2.0, *, start: Any = None, weights: Any = None, t1: float = 1.0
    ) -> None:
        positive(a=a, b=b)
        self.a, self.b = a, b
        super().__init__([[a / (a + b)]] if start is None else start, weights, t1)

    def __repr__(self) -> str:
        return f"Jacobi(a={self.a:g}, b={self.b:g})"

    @property
    def feller(self) -> bool:
        return self.a >= 1 and self.b >= 1

    @property
    def t_min(self) -> float:
        """Where a reversed run ends unless told otherwise: t1/1000, but not below 0.02."""
        return max(super().t_min, min(2 * _LEAST_TIME, 0.5 * self.t1))

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (self.a * (1 - x) - self.b * x)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sqrt(torch.clamp(x * (1 - x), min=0.0))

    def _log_kernel(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        self._check_time(t)
        a, b, theta = self.a, self.b, self.a + self.b
        top = most_lineages(float(t.detach().min()))
        q: Tensor = AncestralWeights.apply(t, theta, top)
        n = torch.arange(top + 1, dtype=torch.float64, device=x.device)
        # (a+b)_m m!/(l! j! (a)_l (b)_j), m = l + j, as a table of (l, j): at most about 4^m, which float64 holds
        log_ratio = torch.lgamma(theta + n) - math.lgamma(theta) + torch.lgamma(n + 1)
        log_l = torch.lgamma(n + 1) + torch.lgamma(a + n) - math.lgamma(a)
        log_j = torch.lgamma(n + 1) + torch.lgamma(b + n) - math.lgamma(b)
        total = (n.unsqueeze(-1) + n).to(torch.int64)
        within = total <= top
        total = total.clamp(max=top)
        table = torch.where(within, torch.exp(log_ratio[total] - log_l.unsqueeze(-1) - log_j), 0.0)
        coefficients = q[..., total] * table
        # the powers of x and x_0 apart: those of 0 have no second derivative, and x_0 may be 0 or 1
        both = x.unsqueeze(-1) ** n * x0.unsqueeze(-1) ** n
        neither = (1 - x).unsqueeze(-1) ** n * (1 - x0).unsqueeze(-1) ** n
        if t.ndim == 0:
            polynomial = ((both @ coefficients) * neither).sum(-1)
        else:
            polynomial = ((both.unsqueeze(-2) @ coefficients).squeeze(-2) * neither).sum(-1)
        return (torch.log(polynomial) + self._log_beta(x)).sum(-1)

    def _check_time(self, t: Tensor) -> None:
        least = float(t.detach().min())
        if least < _LEAST_TIME:
            raise ValueError(f"expected times >= {_LEAST_TIME:g} for the kernel of {self!r}, got {least:g}")

    def _log_beta(self, x: Tensor) -> Tensor:
        a, b = self.a, self.b
        constant = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        return constant + (a - 1) * torch.log(x) + (b - 1) * torch.log1p(-x)

    def _kernel_draw(self, x0: Tensor, t: Tensor, draws: Draws) -> Tensor:
        from scipy.stats import binom

        self._check_time(t)
        u, m = draws.uniform(self.dim), torch.zeros(len(x0), self.dim, dtype=torch.float64)
        times = t.reshape(-1, 1).expand(m.shape)
        for time in torch.unique(times).tolist():
            cdf = torch.cumsum(torch.from_numpy(ancestral_weights(self.a + self.b, time)), 0)
            here = times == time
            m[here] = torch.searchsorted(cdf, u[here]).clamp(max=len(cdf) - 1).to(torch.float64)
        share = from_numpy(binom.ppf(draws.uniform(self.dim).numpy(), m.numpy(), x0.numpy()))
        v = draws.uniform(self.dim)
        return from_numpy(special.betaincinv((self.a + share).numpy(), (self.b + m - share).numpy(), v.numpy()))

    def _log_stationary(self, x: Tensor) -> Tensor:
        return self._log_beta(x).sum(-1)

    def _prior_draw(self, draws: Draws, n: int) -> Tensor:
        return from_numpy(special.betaincinv(self.a, self.b, draws.uniform(self.dim).numpy()))


@checked_class
class Sphere(KernelSDE):
    """Brownian motion on the unit sphere of R^dim, dim 2 or 3, by projection, a Stratonovich equation:

        dx = P(x) o dW,   P(x) = I - x x^T/|x|^2   (general noise, m = dim; Hsu 2002, Stochastic analysis on manifolds,
        theorem 3.1.4), whose Ito drift is -(dim - 1)/2 x/|x|^2.

    Densities are per length of the circle or area of the sphere: the wrapped normal, and the heat kernel
    sum_l (2l+1)/(4 pi) e^{-l(l+1)t/2} P_l(x . x_0). Off the sphere x stands for x/|x|: a function homogeneous of degree
    0, whose gradients are tangential, and which solves the Fokker-Planck equation of the ambient space at |x| = 1. (P
    is written with |x|^2 for that: it keeps every sphere, not the unit one alone.) Stationary: uniform.

    Args:
        start: (K, dim) unit vectors; None for the last axis.

    Raises:
        ValueError: another dim, or a start that is not of unit vectors (to 1e-6).
    """

    noise = "general"
    interpretation = "stratonovich"
    domain = (-1.0, 1.0)

    def __init__(self, dim: int = 3, *, start: Any = None, weights: Any = None, t1: float = 1.0) -> None:
        if not isinstance(dim, int) or dim not in (2, 3):
            raise ValueError(f"expected dim 2 (the circle) or 3 (the sphere), got {dim!r}")
        self.ambient = dim
        super().__init__([[0.0] * (dim - 1) + [1.0]] if start is None else start, weights, t1)

    def __repr__(self) -> str:
        return f"Sphere({self.ambient})"

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        outer = x.unsqueeze(-1) * x.unsqueeze(-2)
        square = (x**2).sum(-1)[..., None, None]
        return torch.eye(self.ambient, dtype=x.dtype, device=x.device) - outer / square

    def inside(self, x: Tensor) -> Tensor:
        return torch.isfinite(x).all(-1) & (x != 0).any(-1)

    def onto(self, x: Tensor) -> Tensor:
        """The nearest points of the sphere: where its identities hold."""
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    def _anchor(self) -> Tensor:
        return torch.eye(self.ambient, dtype=torch.float64)[0]

    def _checked_start(self, atoms: Tensor, what: str) -> Tensor:
        norm = atoms.norm(dim=-1, keepdim=True)
        if atoms.shape[-1] != self.ambient or not bool(((norm - 1).abs() <= 1e-6).all()):
            raise ValueError(
                f"expected {what} of {self!r} to be unit vectors (K, {self.ambient}), got shape {tuple(atoms.shape)} "
                f"with norms from {float(norm.min()):g} to {float(norm.max()):g}"
            )
        return atoms / norm

    def _log_kernel(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        t = t.reshape(-1) if t.ndim else t
        if self.ambient == 2:
            return log_wrapped_normal(angle_between(x0, x), t)
        chord = x / x.norm(dim=-1, keepdim=True) - x0
        return log_heat_sphere(0.25 * (chord**2).sum(-1), t)

    def _kernel_draw(self, x0: Tensor, t: Tensor, draws: Draws) -> Tensor:
        if self.ambient == 2:
            return rotated(x0, (torch.sqrt(t) * draws.normal(1)).squeeze(-1))
        c = sphere_cosine(draws.uniform(1).squeeze(-1), t).unsqueeze(-1)
        tangent = draws.normal(3)
        tangent = tangent - (tangent * x0).sum(-1, keepdim=True) * x0
        tangent = tangent / tangent.norm(dim=-1, keepdim=True)
        return c * x0 + torch.sqrt(torch.clamp(1 - c**2, min=0.0)) * tangent

    def _log_stationary(self, x: Tensor) -> Tensor:
        return torch.full_like(x[:, 0], -math.log(2 * math.pi if self.ambient == 2 else 4 * math.pi))

    def _prior_draw(self, draws: Draws, n: int) -> Tensor:
        z = draws.normal(self.ambient)
        return z / z.norm(dim=-1, keepdim=True)
