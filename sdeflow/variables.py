"""Changes of variables: the probability flow of a Gaussian process as dy/du = E(x, t), y = x/L(t), u = u(t).

    variable   y                      clock u               E, a row of the model's table
    x          x                      t                     alpha' x_0 + sigma' eps
    x/alpha    x/alpha                sigma/alpha           eps                              (EDM; DDIM is Euler here)
    x/sigma    x/sigma                alpha/sigma           x_0
    straight   x/(alpha + sigma)      sigma/(alpha+sigma)   eps - x_0                        (rectified flow)
    angle      x/|(alpha, sigma)|     atan(sigma/alpha)     (alpha eps - sigma x_0)/|(alpha, sigma)|

In each, x = alpha x_0 + sigma eps reads y = a(u) x_0 + b(u) eps with E its derivative along u, so any method
for ordinary equations runs in any of them with the same plan, rescaled by L.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.gaussian import GaussianSDE


@dataclass(frozen=True)
class Variable:
    """A scale L(t), a clock u(t) with its inverse, and the row (c, d) of E = c x_0 + d eps; all elementwise."""

    name: str
    scale: Callable[[GaussianSDE, Tensor], Tensor]
    clock: Callable[[GaussianSDE, Tensor], Tensor]
    time: Callable[[GaussianSDE, Tensor], Tensor]
    row: Callable[[GaussianSDE, Tensor], tuple[Tensor, Tensor]]


def _ones(process: GaussianSDE, t: Tensor) -> Tensor:
    return torch.ones_like(t)


def _share(process: GaussianSDE, t: Tensor) -> Tensor:
    return process.sigma(t) / (process.alpha(t) + process.sigma(t))


def _radius(process: GaussianSDE, t: Tensor) -> Tensor:
    return torch.hypot(process.alpha(t), process.sigma(t))


X = Variable("x", _ones, lambda p, t: t, lambda p, u: u, lambda p, t: p.derivatives(t))

X_OVER_ALPHA = Variable(
    "x/alpha",
    lambda p, t: p.alpha(t),
    lambda p, t: p.sigma(t) / p.alpha(t),
    lambda p, u: p.time_of_lam(-torch.log(u)),
    lambda p, t: (torch.zeros_like(t), torch.ones_like(t)),
)

X_OVER_SIGMA = Variable(
    "x/sigma",
    lambda p, t: p.sigma(t),
    lambda p, t: p.alpha(t) / p.sigma(t),
    lambda p, u: p.time_of_lam(torch.log(u)),
    lambda p, t: (torch.ones_like(t), torch.zeros_like(t)),
)

STRAIGHT = Variable(
    "straight",
    lambda p, t: p.alpha(t) + p.sigma(t),
    _share,
    lambda p, u: p.time_of_lam(torch.log1p(-u) - torch.log(u)),
    lambda p, t: (-torch.ones_like(t), torch.ones_like(t)),
)

ANGLE = Variable(
    "angle",
    _radius,
    lambda p, t: torch.atan2(p.sigma(t), p.alpha(t)),
    lambda p, u: p.time_of_lam(-torch.log(torch.tan(u))),
    lambda p, t: (-p.sigma(t) / _radius(p, t), p.alpha(t) / _radius(p, t)),
)

VARIABLES = {v.name: v for v in (X, X_OVER_ALPHA, X_OVER_SIGMA, STRAIGHT, ANGLE)}
"""Every variable by its name."""


def variable(name: str) -> Variable:
    """The variable of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in VARIABLES:
        raise ValueError(f"unknown variable {name!r}: expected one of {', '.join(VARIABLES)}")
    return VARIABLES[name]
