"""Warnings for what is allowed, and usually a mistake."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.gaussian import GaussianSDE
from sdeflow.linear import LinearSDE
from sdeflow.sde import SDE
from sdeflow.structure import Structure, coefficients


def pitfalls(sde: SDE, known: Structure) -> tuple[str, ...]:
    """Named warnings, each "name: what and why"."""
    found = []
    if sde.interpretation == "stratonovich" and not known.additive:
        found.append(
            "Stratonovich drift: `drift` is that of the Stratonovich equation; Ito methods and the reversal add "
            '1/2 sum_k (dG_k) G_k to it. Declare interpretation = "ito" if it is not.'
        )
    if isinstance(sde, GaussianSDE):
        found += _gaussian(sde)
    if isinstance(sde, LinearSDE):
        found += _linear(sde)
    found += _boundaries(sde, known)
    return tuple(found)


def _gaussian(sde: GaussianSDE) -> list[str]:
    found = []
    left = float(sde.alpha(sde.t1)) / sde.prior_std
    if left > 0.05:
        found.append(
            f"prior: alpha(t1)/prior_std = {left:.2g}: data of size 1 are still seen in x at t1, the prior is not its "
            "law; take a longer span, or start from the marginal at t1"
        )
    if float(sde.sigma(sde.t0)) == 0.0 and sde.t_min <= sde.t0:
        found.append("score at t0: sigma(t0) = 0 and t_min = t0, where the score is singular: end sampling short of it")
    ends = torch.tensor([sde.t0 + 1e-6 * (sde.t1 - sde.t0), sde.t1], dtype=torch.float64)
    g = sde.diffusion_coeff(ends)
    if float(g[0]) < 1e-2 * float(g[1]) and float(sde.alpha(ends[0])) > 0.99:
        sigma, alpha = sde.sigma(ends[1] * 0.3 + ends[0] * 0.7), sde.alpha(ends[1] * 0.3 + ends[0] * 0.7)
        if abs(float(sigma - (1 - alpha**2))) < 1e-6:
            found.append(
                "sub-VP: the standard deviation is 1 - alpha^2 (not its root) and g(t0) = 0: samplers in log-SNR see "
                "log(alpha/(1 - alpha^2))"
            )
    return found


def _linear(sde: LinearSDE) -> list[str]:
    kernel = sde.transition(sde.t0, sde.t1)
    factor = torch.linalg.cholesky(kernel.covariance + 1e-12 * kernel.covariance.trace() * torch.eye(len(kernel.shift)))
    left = float(torch.linalg.solve_triangular(factor, kernel.matrix, upper=False).abs().max())
    if left > 0.05:
        return [
            f"prior: data of size 1 move the mean at t1 by {left:.2g} deviations: the prior is not the law there; "
            "take a longer span, or start from the marginal at t1"
        ]
    return []


def _boundaries(sde: SDE, known: Structure) -> list[str]:
    """Feller's condition at the finite ends of the domain, for components that move on their own."""
    if not known.own_coordinate:
        return []
    found = []
    low, high = sde.domain
    for end, inward in ((low, 1.0), (high, -1.0)):
        if math.isinf(end):
            continue
        width = min(1.0, high - low)
        gaps = torch.tensor([1e-5, 1e-6], dtype=torch.float64) * width
        f, spread = _near(sde, known, end, inward, gaps)
        if not bool(torch.isfinite(f).all() and torch.isfinite(spread).all() and (spread > 0).all()):
            continue
        power = float(torch.log(spread[0] / spread[1]) / math.log(10.0))
        pull = float(2 * inward * f[1] * gaps[1] / spread[1])
        if power < 1.5 and pull < 1 - 1e-3:
            found.append(
                f"Feller's condition: at x = {end:g} the drift does not keep paths away (2 f (x - end)/D = {pull:.3g} "
                "< 1): they reach the boundary, where the identities of a reversal have boundary terms; restrict the "
                "parameters, or reflect"
            )
    return found


def _near(sde: SDE, known: Structure, end: float, inward: float, gaps: Tensor) -> tuple[Tensor, Tensor]:
    low, high = sde.domain
    middle = 0.5 * (low + high) if not math.isinf(low + high) else end + inward
    x = torch.full((len(gaps), *known.event), middle, dtype=torch.float64)
    x.flatten(1)[:, 0] = end + inward * gaps
    f, g = coefficients(sde, x, torch.tensor(0.5 * (sde.t0 + sde.t1), dtype=torch.float64))
    return f[:, 0], (g @ g.mT)[:, 0, 0]
