"""Drift, diffusion and densities at points, with their derivatives by reverse-mode autodiff, in float64.

Nothing here uses the library's own derivations (`sdeflow.calculus`, `sdeflow.reverse`): it is what they are held
against. States are flat, (n, d); times are (n, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.sde import SDE
from sdeflow.testing.chart import Chart

LogDensity = Callable[[Tensor, Tensor], Tensor]
"""log p_t(x) of x (n, *event) at t, (n,)."""


class Flat:
    """An SDE on flat states (n, d), its noise as a matrix (n, d, m)."""

    def __init__(self, sde: SDE, event: tuple[int, ...]) -> None:
        self.sde, self.event, self.d = sde, event, math.prod(event)

    def shaped(self, x: Tensor) -> Tensor:
        """x as the process takes it."""
        return x.reshape(len(x), *self.event)

    def time(self, t: Tensor) -> Tensor:
        """t (n, 1) as the process takes it."""
        return t.reshape(-1, *[1] * len(self.event)) if t.ndim else t

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift as the class gives it."""
        return self.sde.drift(self.shaped(x), self.time(t)).flatten(1).to(x.dtype)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """G (n, d, m)."""
        y = self.shaped(x)
        g = torch.as_tensor(self.sde.diffusion(y, self.time(t))).to(x.dtype)
        if self.sde.noise == "diagonal":
            return torch.diag_embed(torch.broadcast_to(g, y.shape).flatten(1))
        return g.reshape(len(x), self.d, g.shape[-1])

    def covariance(self, x: Tensor, t: Tensor) -> Tensor:
        """D = G G^T, (n, d, d)."""
        g = self.diffusion(x, t)
        return g @ g.mT

    def correction(self, x: Tensor, t: Tensor) -> Tensor:
        """c = 1/2 sum_k (dG_k) G_k, (n, d)."""
        g = self.diffusion(x, t)
        total = torch.zeros_like(x)
        for k in range(g.shape[-1]):
            total = total + times(jacobian(g[..., k], x), g[..., k])
        return 0.5 * total

    def ito(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift of the Ito equation of a process that runs forwards."""
        f = self.drift(x, t)
        return f if self.sde.interpretation == "ito" else f + self.correction(x, t)

    def stratonovich(self, x: Tensor, t: Tensor) -> Tensor:
        """The drift of the Stratonovich equation of a process that runs forwards."""
        f = self.drift(x, t)
        return f if self.sde.interpretation == "stratonovich" else f - self.correction(x, t)

    def log_density(self, density: LogDensity, x: Tensor, t: Tensor) -> Tensor:
        """The density's log at flat states, (n,)."""
        value = density(self.shaped(x), self.time(t))
        if not isinstance(value, Tensor) or value.shape != (len(x),):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            states = (len(x), *self.event)
            raise ValueError(f"expected log_density of shape ({len(x)},) for x of shape {states}, got {got}")
        return value


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """A matrix times a vector a sample."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_i a_i b_i, (n,)."""
    return (a * b).sum(-1)


def gradient(value: Tensor, x: Tensor) -> Tensor:
    """The gradient of values (n,) each in its own row of x, (n, d), with its graph."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True, allow_unused=True)
    return torch.zeros_like(x) if slope is None else slope


def jacobian(value: Tensor, x: Tensor) -> Tensor:
    """d value_i/d x_j of values (n, k), (n, k, d), with its graph."""
    return torch.stack([gradient(column, x) for column in value.unbind(-1)], dim=1)


def divergence(value: Tensor, x: Tensor) -> Tensor:
    """sum_i d_i value_i of a vector field (n, d), (n,)."""
    return sum((gradient(value[:, i], x)[:, i] for i in range(x.shape[1])), start=torch.zeros_like(x[:, 0]))


def row_divergence(matrix: Tensor, x: Tensor) -> Tensor:
    """(div D)_i = sum_j d_j D_ij, (n, d)."""
    return torch.stack([divergence(matrix[:, i], x) for i in range(x.shape[1])], dim=1)


class Terms(NamedTuple):
    """A sum that should vanish, and the sum of the sizes of its terms, (n,) each."""

    value: Tensor
    size: Tensor

    @staticmethod
    def of(*terms: Tensor, inside: tuple[Tensor, ...] = ()) -> Terms:
        """The sum of terms (n,), or (n, d) of which the largest component counts.

        Args:
            inside: what the terms themselves are sums of, where it cancels in them: it counts for the size only.
        """
        total = sum(terms[1:], start=terms[0])
        size = sum((t.abs() for t in (*terms[1:], *inside)), start=terms[0].abs())
        if total.ndim > 1:  # a component that is small by symmetry is measured by the whole vector
            return Terms(total.abs().amax(-1), size.amax(-1))
        return Terms(total.abs(), size)

    def residual(self) -> tuple[float, int]:
        """(the largest value over its size, where)."""
        ratio = (self.value / self.size.clamp(min=1e-6)).detach()
        ratio = torch.where(torch.isfinite(ratio), ratio, torch.inf)
        place = int(ratio.argmax())
        return float(ratio[place]), place


def kolmogorov_forward(drift: Tensor, covariance: Tensor, x: Tensor, s: Tensor, hessian: Tensor) -> tuple[Tensor, ...]:
    """The terms of d_t log p by the Fokker-Planck equation, (n,) each:

    -div f, -f.s, 1/2 sum_ij d_i d_j D_ij, (div D).s, 1/2 D : (hess log p + s s^T).
    """
    rows = row_divergence(covariance, x)
    outer = hessian + s.unsqueeze(-1) * s.unsqueeze(-2)
    return (
        -divergence(drift, x),
        -dot(drift, s),
        0.5 * divergence(rows, x),
        dot(rows, s),
        0.5 * (covariance * outer).sum((-2, -1)),
    )


def trial_density(d: int, domain: tuple[float, float], seed: int = 0) -> LogDensity:
    """log q of a mixture of three Gaussians (in log or logistic coordinates where the domain is not the line).

    The identities of a reversal hold for any density in place of p_t, so that they can be tested without knowing it.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    centres = torch.randn(3, d, generator=generator, dtype=torch.float64)
    roots = 0.4 * torch.randn(3, d, d, generator=generator, dtype=torch.float64) + 0.8 * torch.eye(d)
    precisions = roots @ roots.mT + 0.2 * torch.eye(d)
    log_weights = torch.log_softmax(torch.randn(3, generator=generator, dtype=torch.float64), 0)
    chart = Chart(domain)

    def log_density(x: Tensor, t: Tensor) -> Tensor:
        z = chart.place(x.flatten(1))
        size = -torch.log(chart.slopes(z)[0].abs())
        y = z.unsqueeze(1) - centres
        logits = log_weights + 0.5 * torch.logdet(precisions) - 0.5 * (times(precisions, y) * y).sum(-1)
        return torch.logsumexp(logits, 1) + size.sum(1)

    return log_density
