"""A score claimed without a density: the gradient of the Fokker-Planck equation of log p knows no p.

With D = G G^T, s = grad log p and ds its Jacobian,

    d_t s = grad [-div f - f.s + 1/2 (dd:D + 2 (div D).s + D:(ds + s s^T))],

and ds is symmetric. They hold for every solution p of the equation, also one that is no law: a constant s without
drift. Where the domain has no end, p must fall faster than r^-d there, which is (x.s) < -d far out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.sde import checked_shape
from sdeflow.testing.fields import Terms, dot, gradient, jacobian, kolmogorov_forward
from sdeflow.testing.known_density import clock_slope
from sdeflow.testing.report import Finding
from sdeflow.testing.reversal import TOLERANCE, Setting, reach

Score = Callable[[Tensor, Tensor], Tensor]


def score_identities(at: Setting, score: Score) -> list[Finding]:
    """The verdicts at points."""
    x, span = at.x, at.sde.t1 - at.sde.t0

    def field(x: Tensor, t: Tensor) -> Tensor:
        states = at.flat.shaped(x)
        with torch.enable_grad():  # it may be a gradient itself
            return checked_shape(score(states, at.flat.time(t)), states, "the score").flatten(1)

    s, tolerance = field(x, at.clock), TOLERANCE
    seen = [s]
    if not _reaches(s, x):  # a constant, or torch did not see how it came about
        tolerance = 1e-7
        seen = [_seen(lambda y: field(y, at.clock), width * reach(at))(x) for width in _WIDTHS]
    rate, how = clock_slope(lambda clock: field(at.points, clock), at.clock, span)
    if how == "differences":
        tolerance = max(tolerance, 1e-8)
    evolution, turn = [], []
    for s in seen:
        slope = jacobian(s, x)
        potential = kolmogorov_forward(at.f, at.covariance, x, s, slope)
        evolution.append(Terms.of(rate, *(-gradient(term, x) for term in potential)))
        turn.append(Terms.of(slope.flatten(1), -slope.mT.flatten(1)))
    formula = "d_t s = grad[-div f - f.s + 1/2 (dd:D + 2 (div D).s + D:(ds + s s^T))]"
    note = "the score is that of no law of this drift and diffusion (a deviation for a variance, another clock?)"
    findings = [_finding(at, "score: Fokker-Planck", formula, evolution, tolerance, note)]
    if at.flat.d > 1:
        note = "the field is no gradient, so no score"
        findings.append(_finding(at, "score: a gradient", "d_i s_j = d_j s_i", turn, tolerance, note))
    if any(math.isinf(end) for end in at.sde.domain):
        findings.append(_tails(at, field))
    return findings


def _tails(at: Setting, field: Score) -> Finding:
    """Whether p falls far out, along a ray a point: how far is far the law knows, so that one distance is enough."""
    low, high = at.sde.domain
    origin = low if math.isfinite(low) else high if math.isfinite(high) else 0.0
    ray = torch.nn.functional.normalize(at.points - origin, dim=1)
    found = []
    for distance in _FAR:
        with torch.no_grad():
            fall = 1 + distance * dot(ray, field(origin + distance * ray, at.clock)) / at.flat.d
        worst = int(fall.argmax())  # a NaN, if there is one
        where = {"x": (origin + distance * ray[worst]).tolist(), "t": float(at.clock[worst])}
        found.append((float(fall[worst].clamp(min=0)), where))
    residual, where = min((v for v in found if math.isfinite(v[0])), key=lambda v: v[0], default=(math.nan, {}))
    formula = "x.s < -d far out: p falls faster than r^-d"
    if math.isnan(residual):
        return Finding.skipped("score: tails", formula, f"the score is not finite at distances {_FAR[0]:g} and more")
    return Finding.of("score: tails", formula, residual, 0.0, where, "no constant normalises p")


_FAR = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
_WIDTHS = (1.0, 10.0, 100.0)
"""Of the differences: narrow ones lose a wide law to rounding, wide ones step over a narrow one; the best counts."""


def _finding(at: Setting, identity: str, formula: str, found: list[Terms], tolerance: float, note: str) -> Finding:
    ratios = torch.stack([terms.value / terms.size.clamp(min=1e-6) for terms in found])
    best = torch.nan_to_num(ratios, nan=math.inf).argmin(0, keepdim=True)
    value, size = (torch.stack(parts).gather(0, best)[0] for parts in zip(*found, strict=True))
    residual, place = Terms(value, size).residual()
    where = {"x": at.points[place].tolist(), "t": float(at.clock[place])}
    return Finding.of(identity, formula, residual, tolerance, where, note)


def _reaches(value: Tensor, x: Tensor) -> bool:
    """Whether the value has x in its graph."""
    if not value.requires_grad:
        return False
    return torch.autograd.grad(value.sum(), x, retain_graph=True, allow_unused=True)[0] is not None


def _seen(function: Callable[[Tensor], Tensor], step: Tensor) -> Callable[[Tensor], Tensor]:
    """A function (n, d) -> (n, d) that autograd differentiates as often as wanted, by differences of sixth order.

    Args:
        step: of the differences, (n, 1).
    """

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return function(x).detach()

        @staticmethod
        def backward(ctx: Any, *above: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            columns = []
            for axis in torch.eye(x.shape[1], dtype=x.dtype):
                far = {k: Seen.apply(x + k * step * axis) for k in (-3, -2, -1, 1, 2, 3)}
                change = (far[3] - far[-3] - 9 * (far[2] - far[-2]) + 45 * (far[1] - far[-1])) / 60
                columns.append((above[0] * change / step).sum(1))
            return torch.stack(columns, 1)

    return Seen.apply
