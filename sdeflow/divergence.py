"""Estimates of the divergence tr J of a vector field at a batch of states, from vector-Jacobian products J^T v.

    exact               sum_i e_i . J^T e_i                                   D products
    hutchinson          v . J^T v, v of independent signs                     1 a probe (Hutchinson 1990)
    hutchinson-gaussian the same, v standard normal                           1 a probe
    hutch++             tr(Q^T J^T Q) + g . J^T g                             3 a probe (Meyer et al. 2021, algorithm 1)

In the last Q is an orthonormal basis of J^T S, S as many normal vectors as there are probes, and g normal, projected to
the complement of Q and scaled to |g|^2 = D - rank Q (Epperly, Tropp and Webber 2024, XTrace: without the
scaling the multiple of the identity that every score's Jacobian holds makes it worse than plain Hutchinson).

Each estimate is unbiased: E v v^T = I, E g g^T = I - Q Q^T given Q. With J_s = (J + J^T)/2 and J_o its part off the
diagonal, one probe has variance 2 |J_o|^2 (signs) or 2 |J_s|^2 (normals), Frobenius norms. The field must act on
each sample alone: a network that mixes its batch (batch normalisation in training) has no divergence per sample.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from sdeflow.model import Model
from sdeflow.noise import Noise
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import ODE, checked_shape

DivergenceName = Literal["exact", "hutchinson", "hutchinson-gaussian", "hutch++"]
DIVERGENCES: tuple[str, ...] = get_args(DivergenceName)

PROBES = 101
"""The stream of the probes, clear of those of `sdeflow.noise`."""

_TOGETHER = 64
"""Directions pulled back by one batched call. A constant: a sample's bits must not depend on the batch size."""


class Divergence(ABC):
    """A way to estimate the divergence. `columns` independent estimates come of one evaluation."""

    columns: int = 1

    @abstractmethod
    def products(self, dim: int) -> int:
        """Vector-Jacobian products that one evaluation costs, for samples of `dim` components."""

    @abstractmethod
    def draw(self, noise: Noise, dim: int) -> Tensor:
        """The probes (batch, n, dim), float64, of the samples of `noise`."""

    @abstractmethod
    def estimate(self, value: Tensor, leaf: Tensor, probes: Tensor, keep: bool = False) -> Tensor:
        """Estimates (batch, columns) of tr d value/d leaf, both flat (batch, dim).

        Args:
            value: computed from `leaf`, which requires grad.
            probes: of these samples, from `draw`.
            keep: whether the estimates will be differentiated themselves.
        """


@dataclass(frozen=True)
class Exact(Divergence):
    """All D diagonal entries."""

    def products(self, dim: int) -> int:
        return dim

    def draw(self, noise: Noise, dim: int) -> Tensor:
        return torch.zeros(noise.index.numel(), 0, dim, dtype=torch.float64, device=noise.index.device)

    def estimate(self, value: Tensor, leaf: Tensor, probes: Tensor, keep: bool = False) -> Tensor:
        batch, dim = leaf.shape
        total = torch.zeros(batch, dtype=torch.float64, device=leaf.device)
        for first in range(0, dim, _TOGETHER):
            count = min(_TOGETHER, dim - first)
            k = torch.arange(count, device=leaf.device)
            unit = torch.zeros(count, batch, dim, dtype=leaf.dtype, device=leaf.device)
            unit[k, :, first + k] = 1.0
            entries = pull(value, leaf, unit, keep)[k, :, first + k]
            total = total + entries.to(torch.float64).sum(0)
        return total.unsqueeze(1)


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """Quadratic forms of random probes."""

    probes: int
    gaussian: bool = False

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.probes

    def products(self, dim: int) -> int:
        return self.probes

    def draw(self, noise: Noise, dim: int) -> Tensor:
        return _probes(noise, dim, self.probes, self.gaussian)

    def estimate(self, value: Tensor, leaf: Tensor, probes: Tensor, keep: bool = False) -> Tensor:
        v = probes.to(leaf.dtype).transpose(0, 1)
        return _dot(v, pull(value, leaf, v, keep)).T


@dataclass(frozen=True)
class HutchPP(Divergence):
    """The trace on a sketched range exactly, the rest by probes; `probes` of each. Exact for probes >= D."""

    probes: int

    @property
    def columns(self) -> int:  # type: ignore[override]
        return self.probes

    def products(self, dim: int) -> int:
        return 2 * self.probes + min(self.probes, dim)

    def draw(self, noise: Noise, dim: int) -> Tensor:
        return _probes(noise, dim, 2 * self.probes, True)

    def estimate(self, value: Tensor, leaf: Tensor, probes: Tensor, keep: bool = False) -> Tensor:
        sketch, rest = probes.to(leaf.dtype).split(self.probes, dim=1)
        image = pull(value, leaf, sketch.transpose(0, 1), keep)
        basis = torch.linalg.qr(image.permute(1, 2, 0))[0]  # (batch, D, min(probes, D))
        columns = basis.permute(2, 0, 1)
        inside = _dot(columns, pull(value, leaf, columns, keep)).sum(0)
        outside = rest.mT - basis @ (basis.mT @ rest.mT)
        left = max(leaf.shape[1] - self.probes, 0)
        outside = (math.sqrt(left) * torch.nn.functional.normalize(outside, dim=1)).permute(2, 0, 1)
        return (inside + _dot(outside, pull(value, leaf, outside, keep))).T


class FlowWithDivergence(ODE):
    """(x, sums)' = (v(x, t), estimates of div v): flat states (batch, D + columns), float64.

    Args:
        flow: the probability flow.
        event: the shape of one sample of it.
        estimator: of the divergence.
        probes: its probes (batch, n, D), the same all along: the sums are then smooth functions of time.
        dtype: in which the model is called.
    """

    per_sample = ("probes",)

    def __init__(
        self, flow: ReverseSDE, event: tuple[int, ...], estimator: Divergence, probes: Tensor, dtype: torch.dtype
    ) -> None:
        self.flow, self.event, self.estimator, self.probes, self.dtype = flow, event, estimator, probes, dtype
        self.dim = math.prod(event)
        self.t0, self.t1 = flow.t0, flow.t1

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        keep = torch.is_grad_enabled() and x.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            # outside of the graph unless the caller differentiates through it; a copy leaves inference mode
            state = x if keep else x.detach().clone()
            leaf = state[:, : self.dim].to(self.dtype)
            leaf = leaf if keep else leaf.requires_grad_()
            time = t if t.ndim == 0 else t.reshape(-1, *[1] * len(self.event))
            time = time.clone() if time.is_inference() else time
            probes = self.probes.clone() if self.probes.is_inference() else self.probes
            states = leaf.reshape(-1, *self.event)
            value = checked_shape(self.flow.drift(states, time), states, "the drift").reshape(leaf.shape)
            sums = self.estimator.estimate(value, leaf, probes, keep)
            both = torch.cat([value.to(x.dtype), sums.to(x.dtype)], dim=1)
        return both if keep else both.detach()

    def default_grid(self, steps: int, t_start: float, t_end: float) -> Tensor:
        return self.flow.default_grid(steps, t_start, t_end)

    def take(self, rows: Tensor) -> Self:
        part = copy.copy(self)
        part.flow, part.probes = self.flow.take(rows), self.probes[rows]
        return part

    def models(self) -> tuple[Model, ...]:
        return self.flow.models()

    def check_batch(self, batch: int) -> None:
        self.flow.check_batch(batch)


MOST_PROBES = 100_000
"""More is a slip: the exact divergence costs less, and the error is below a three-hundredth of one probe's."""


def divergence_of(name: str, probes: int) -> Divergence:
    """The estimator of that name.

    Raises:
        ValueError, TypeError: no such name, probes that are no count, or probes for the exact divergence.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}: expected one of {', '.join(DIVERGENCES)}")
    if not 1 <= probes <= MOST_PROBES:
        raise ValueError(f"expected probes >= 1, got {probes} (at most {MOST_PROBES})")
    if name == "exact":
        if probes != 1:
            raise ValueError(f'the exact divergence has no probes: got probes={probes}; did you mean "hutchinson"?')
        return Exact()
    return HutchPP(probes) if name == "hutch++" else Hutchinson(probes, name == "hutchinson-gaussian")


def pull(value: Tensor, leaf: Tensor, directions: Tensor, keep: bool = False) -> Tensor:
    """J^T v, J = d value/d leaf, for each of `directions` (n, *value.shape): one batched backward pass where it can."""
    if not value.requires_grad:
        return torch.zeros_like(directions)
    if len(directions) > 1:
        try:
            parts = [
                _grad(value, leaf, part, keep, True) if len(part) > 1 else _grad(value, leaf, part[0], keep)[None]
                for part in directions.split(_TOGETHER)
            ]
            return torch.cat(parts)
        except RuntimeError:  # an operation without a batched backward; other errors come again below
            pass
    return torch.stack([_grad(value, leaf, v, keep) for v in directions])


def _grad(value: Tensor, leaf: Tensor, directions: Tensor, keep: bool, batched: bool = False) -> Tensor:
    (grad,) = torch.autograd.grad(
        value, leaf, directions, retain_graph=True, create_graph=keep, allow_unused=True, is_grads_batched=batched
    )
    return torch.zeros_like(directions) if grad is None else grad


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.to(torch.float64) * b.to(torch.float64)).sum(-1)


def _probes(noise: Noise, dim: int, count: int, gaussian: bool) -> Tensor:
    z = torch.stack([noise.normal(PROBES, n, (dim,), torch.float64) for n in range(count)], dim=1)
    return z if gaussian else torch.where(z < 0, -1.0, 1.0).to(torch.float64)
