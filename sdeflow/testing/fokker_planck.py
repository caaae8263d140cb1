"""The Fokker-Planck equation on a grid in one or two dimensions: a law for a process that has no known one.

Coordinates are the state's on the line, its logarithm or logit where the domain has ends. Centred differences of
fourth order in flux form, the trapezoidal rule in time; two grids tell the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

from sdeflow.reverse import ReverseSDE
from sdeflow.sde import SDE
from sdeflow.structure import coefficients
from sdeflow.testing.chart import Chart
from sdeflow.testing.fields import Flat
from sdeflow.testing.report import Finding

_CELLS = {1: 200, 2: 42}
_STEPS = {1: 80, 2: 24}


@dataclass(frozen=True)
class Mesh:
    """A uniform grid of `cells` points a dimension over a box of z."""

    axes: tuple[Tensor, ...]

    @property
    def points(self) -> Tensor:
        """(cells^d, d)."""
        return torch.cartesian_prod(*self.axes).reshape(-1, len(self.axes))

    @property
    def volume(self) -> float:
        """Of a cell."""
        return math.prod(float(a[1] - a[0]) for a in self.axes)

    def derivatives(self) -> list[sparse.csr_matrix]:
        """d/dz_i, by centred differences of fourth order; what leaves the box is lost."""
        found = []
        for i, axis in enumerate(self.axes):
            n, h = len(axis), float(axis[1] - axis[0])
            one = sparse.diags([1 / 12, -2 / 3, 2 / 3, -1 / 12], [-2, -1, 1, 2], shape=(n, n)) / h
            parts = [sparse.identity(len(a)) for a in self.axes]
            parts[i] = one
            whole = parts[0]
            for part in parts[1:]:
                whole = sparse.kron(whole, part)
            found.append(whole.tocsr())
        return found


def evolve(
    mesh: Mesh, law: np.ndarray, terms: Callable[[int], tuple[Tensor, Tensor]], step: float, count: int, fixed: bool
) -> list[np.ndarray]:
    """The density after 0, 1, ..., count steps, by the trapezoidal rule (Crank and Nicolson 1947).

    Args:
        terms: (drift, D) at the mesh's points after k steps, on a clock that rises.
        fixed: they do not depend on time.
    """
    slopes, one = mesh.derivatives(), sparse.identity(len(law), format="csc")

    def matrix(k: int) -> sparse.csc_matrix:
        drift, spread = (v.numpy() for v in terms(k))
        total = sparse.csr_matrix(slopes[0].shape)
        for i, slope in enumerate(slopes):
            inner = -sparse.diags(drift[:, i])
            for j, other in enumerate(slopes):
                inner = inner + 0.5 * other @ sparse.diags(spread[:, i, j])
            total = total + slope @ inner
        return sparse.csc_matrix(total)

    found, now = [law], matrix(0)
    solver = splu(sparse.csc_matrix(one - 0.5 * step * now)) if fixed else None
    for k in range(1, count + 1):
        right = found[-1] + 0.5 * step * (now @ found[-1])
        if not fixed:
            now = matrix(k)
            solver = splu(sparse.csc_matrix(one - 0.5 * step * now))
        assert solver is not None
        found.append(solver.solve(right))
    if not np.isfinite(found[-1]).all():
        raise ArithmeticError("the Fokker-Planck equation did not end")
    return found


def grid_identity(sde: SDE, event: tuple[int, ...], homogeneous: bool) -> Finding:
    """The law from a Gaussian, carried forwards by the process and back by the library's reversal.

    Both directions are solved on two grids; the residual is the L1 distance to the law at the start, and the tolerance
    is three times what the two grids differ by, at least 1e-3.
    """
    identity, formula = "Fokker-Planck on a grid", "reverse(forward(p)) = p, L1, reversed with eta = 1"
    d = math.prod(event)
    if d not in _CELLS:
        return Finding.skipped(identity, formula, f"needs 1 or 2 dimensions, the event has {d}")
    flat, chart = Flat(sde, event), Chart(sde.domain)
    start, end = sde.t0 + 0.2 * (sde.t1 - sde.t0), sde.t0 + 0.6 * (sde.t1 - sde.t0)
    low, high = _box(sde, flat, chart, start, end)
    try:
        found = [_there_and_back(flat, chart, low, high, cells, start, end, homogeneous) for cells in _sizes(d)]
    except ArithmeticError as error:
        return Finding.skipped(identity, formula, str(error))
    tolerance = max(1e-3, 3 * abs(found[0] - found[-1]))
    where = {"from": start, "to": end, "cells": _sizes(d)[-1]}
    if tolerance > 0.05:
        return Finding.skipped(
            identity, formula, f"the grid does not resolve the law (grids differ by {tolerance:.1e})"
        )
    return Finding.of(identity, formula, found[-1], tolerance, where, "the reverse drift does not undo the process")


def _sizes(d: int) -> tuple[int, int]:
    return (_CELLS[d] * 2 // 3, _CELLS[d])


_HELD = 1e-7
"""Share of the highest density below which the grid's density is rounding."""
_SPREAD = {1: 0.35, 2: 0.8}
"""The deviation, in z, of the law at the start."""


def _box(sde: SDE, flat: Flat, chart: Chart, start: float, end: float) -> tuple[Tensor, Tensor]:
    """A box of z that holds the law on the way, from Euler-Maruyama paths in z."""
    generator = torch.Generator().manual_seed(3)
    z = _SPREAD[flat.d] * torch.randn(1000, flat.d, generator=generator, dtype=torch.float64)
    steps = 50
    h = (end - start) / steps
    low, high = z.amin(0), z.amax(0)
    for k in range(steps):
        drift, spread = _terms(flat, chart, z, start + k * h, sde)
        root = torch.linalg.cholesky(spread + 1e-12 * torch.eye(flat.d, dtype=z.dtype))
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        z = z + h * drift + math.sqrt(h) * (root @ noise.unsqueeze(-1)).squeeze(-1)
        z = torch.nan_to_num(z).clamp(-60, 60)
        low, high = torch.minimum(low, z.amin(0)), torch.maximum(high, z.amax(0))
    margin = 0.15 * (high - low) + 0.2
    return low - margin, high + margin


def _terms(flat: Flat, chart: Chart, z: Tensor, t: float, sde: SDE) -> tuple[Tensor, Tensor]:
    x = chart.state(z)
    clock = torch.tensor(t, dtype=torch.float64)
    f, g = coefficients(sde, flat.shaped(x), clock)
    if sde.interpretation == "stratonovich":
        leaf = x.clone().requires_grad_()
        f = flat.ito(leaf, clock).detach()
    return chart.coefficients(z, f, g @ g.mT)


def _there_and_back(
    flat: Flat, chart: Chart, low: Tensor, high: Tensor, cells: int, start: float, end: float, fixed: bool
) -> float:
    sde = flat.sde
    axes = tuple(torch.linspace(float(a), float(b), cells, dtype=torch.float64) for a, b in zip(low, high, strict=True))
    mesh = Mesh(axes)
    z = mesh.points
    law = torch.exp(-0.5 * (z**2).sum(1) / _SPREAD[flat.d] ** 2).numpy()
    law /= law.sum() * mesh.volume
    count = _STEPS[flat.d] * cells // _CELLS[flat.d]
    step = (end - start) / count
    forward = evolve(mesh, law, lambda k: _terms(flat, chart, z, start + k * step, sde), step, count, fixed)
    x = chart.state(z)
    slopes, (first, second) = mesh.derivatives(), chart.slopes(z)
    scores = []
    for p in forward:  # grad log p in x, from the grid: p_x = p_z/x'; where p is rounding nothing is known, or moves
        held = np.where(p > _HELD * p.max(), p, np.inf)
        slope = torch.from_numpy(np.stack([s @ p / held for s in slopes], axis=1))
        scores.append((slope - second / first) / first)

    def backward(k: int) -> tuple[Tensor, Tensor]:
        p, t = forward[count - k], end - k * step
        back = Flat(ReverseSDE(sde, lambda y, _: flat.shaped(scores[count - k]), 1.0), flat.event)
        clock = torch.full((len(z), 1), t, dtype=torch.float64)
        with torch.no_grad():
            b, spread = back.drift(x, clock), flat.covariance(x, clock)
        # on a clock that runs from end to start the drift is -b
        drift, spread = chart.coefficients(z, -b, spread)
        inside = torch.from_numpy(p > _HELD * p.max())[:, None]
        return torch.where(inside, drift, 0.0), torch.where(inside[..., None], spread, 0.0)

    again = evolve(mesh, np.maximum(forward[-1], 0), backward, step, count, False)[-1]
    return float(np.abs(again - law).sum() * mesh.volume)
