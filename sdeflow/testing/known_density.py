"""Identities that need the law of the process: log p_t(x), claimed by the class, by the user or by exact data.

In one dimension also those with integrals over the law, by quadrature of panels that hold it all but 1e-13.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sdeflow.quadrature import gauss_legendre
from sdeflow.reverse import ReverseSDE
from sdeflow.testing.fields import Flat, LogDensity, Terms, divergence, dot, gradient, kolmogorov_forward
from sdeflow.testing.report import Finding
from sdeflow.testing.reversal import TOLERANCE, Setting

_STEP = 1e-3
"""Of the central differences in time, as a share of the span."""


def density_identities(at: Setting, claimed_score: Callable[[Tensor, Tensor], Tensor] | None) -> list[Finding]:
    """The verdicts at points; `at.density` is the law."""
    rate, how = time_slope(at.flat, at.density, at.points, at.clock)
    tolerance = TOLERANCE if how == "autograd" else 1e-8
    terms = Terms.of(rate, *(-v for v in at.forward))
    v = at.reversed(0.0).drift(at.x, at.clock)
    flow = Terms.of(rate, divergence(v, at.x), dot(v, at.s), inside=at.forward)
    where, findings = {}, []
    for identity, formula, found, note in (
        (
            "Fokker-Planck",
            "d_t log p = -div f - f.s + 1/2 [dd:D + 2 (div D).s + D:(hess log p + s s^T)]",
            terms,
            "the density is not that of this drift and diffusion",
        ),
        ("continuity, the law's own", "d_t log p + div v + v.s = 0", flow, ""),
    ):
        residual, place = found.residual()
        where = {"x": at.points[place].tolist(), "t": float(at.clock[place])}
        findings.append(Finding.of(identity, formula, residual, tolerance, where, note))
    if claimed_score is not None:
        value = claimed_score(at.flat.shaped(at.points), at.flat.time(at.clock)).flatten(1).to(at.s.dtype)
        findings.append(at.finding("score", "score = grad log p", Terms.of(value.detach(), -at.s)))
    findings += [reverse_law(at), *along_the_flow(at)]
    return findings


def time_slope(flat: Flat, density: LogDensity, x: Tensor, t: Tensor) -> tuple[Tensor, str]:
    """(d_t log p (n,), how): as `clock_slope`."""
    span = flat.sde.t1 - flat.sde.t0
    slope, how = clock_slope(lambda clock: flat.log_density(density, x.detach(), clock)[:, None], t, span)
    return slope.squeeze(1), how


def clock_slope(values: Callable[[Tensor], Tensor], t: Tensor, span: float) -> tuple[Tensor, str]:
    """(d_t values (n, k), how): by autograd, or by differences of sixth order where they have no graph in t (n, 1)."""
    clock = t.detach().clone().requires_grad_()
    value = values(clock)
    if value.requires_grad:
        ones = torch.eye(value.shape[1], dtype=value.dtype).unsqueeze(1).expand(-1, len(t), -1)
        found = [torch.autograd.grad(value, clock, one, retain_graph=True, allow_unused=True)[0] for one in ones]
        if found[0] is not None:
            return torch.cat(found, dim=1), "autograd"
    h = _STEP * span
    with torch.no_grad():
        at = [values(t + k * h) for k in (-3, -2, -1, 1, 2, 3)]
    return (at[5] - at[0] - 9 * (at[4] - at[1]) + 45 * (at[3] - at[2])) / (60 * h), "differences"


def reverse_law(at: Setting) -> Finding:
    """The reversal with the exact score keeps the law itself, eta = 1."""
    rate, how = time_slope(at.flat, at.density, at.points, at.clock)
    b = at.reversed(1.0).drift(at.x, at.clock)
    first, second, *noise = kolmogorov_forward(b, at.covariance, at.x, at.s, at.hessian)
    terms = Terms.of(rate, -first, -second, *noise)
    residual, place = terms.residual()
    where = {"x": at.points[place].tolist(), "t": float(at.clock[place])}
    tolerance = TOLERANCE if how == "autograd" else 1e-8
    return Finding.of("reverse Fokker-Planck", "d_t log p = -FP(-b, D) p", residual, tolerance, where)


def along_the_flow(at: Setting) -> list[Finding]:
    """log p along the flow, and there and back again."""
    flat, sde = at.flat, at.sde
    low, high = sde.smooth_window
    start, end = low + 0.3 * (high - low), low + 0.8 * (high - low)
    x = at.points[:4]
    flow = ReverseSDE(sde, at.score, 0.0)

    def slope(t: float, packed: np.ndarray) -> np.ndarray:
        y = torch.from_numpy(packed.reshape(len(x), -1)[:, :-1].copy()).requires_grad_()
        v = flow.drift(flat.shaped(y), flat.time(_clock(t, len(x)))).flatten(1)
        return torch.cat([v, -divergence(v, y)[:, None]], dim=1).detach().numpy().ravel()

    def run(packed: np.ndarray, a: float, b: float) -> Tensor:
        from scipy.integrate import solve_ivp  # slow to import

        found = solve_ivp(slope, (a, b), packed, method="DOP853", rtol=1e-11, atol=1e-12)
        last = torch.from_numpy(found.y[:, -1].reshape(len(x), -1).copy())
        return last if found.success else torch.full_like(last, torch.nan)

    first = torch.cat([x, flat.log_density(at.density, x, _clock(start, len(x))).detach()[:, None]], dim=1)
    last = run(first.numpy().ravel(), start, end)
    want = flat.log_density(at.density, last[:, :-1], _clock(end, len(x))).detach()
    gap = (last[:, -1] - want).abs() / (1 + want.abs())
    place = int(gap.argmax())
    where = {"x": x[place].tolist(), "t": start}
    formula = "log p_t(x_t) = log p_s(x_s) - int div v along the flow"
    back = run(last.numpy().ravel(), end, start)
    trip = ((back - first).abs() / (1 + first.abs())).amax(1)
    far = int(trip.argmax())
    return [
        Finding.of("change of variables", formula, float(gap[place]), 1e-7, where),
        Finding.of(
            "encode and decode",
            "flow(t -> s) flow(s -> t) x = x",
            float(trip[far]),
            1e-7,
            {"x": x[far].tolist(), "t": start},
        ),
    ]


def _clock(t: float, n: int) -> Tensor:
    return torch.full((n, 1), t, dtype=torch.float64)


# ---- one dimension: integrals over the law


class Line:
    """Nodes and weights on the domain of a one-dimensional law that hold it at all of `times`."""

    def __init__(self, flat: Flat, density: LogDensity, times: list[float]) -> None:
        self.flat, self.density = flat, density
        low, high = flat.sde.domain
        self._low, self._high = low, high
        z = torch.linspace(-60, 60, 24_001, dtype=torch.float64)
        mass = torch.zeros_like(z)
        for t in times:
            with torch.no_grad():
                value = self.log(self._x(z), t) + self._log_slope(z)
            mass = torch.maximum(mass, torch.nan_to_num(torch.exp(value), nan=0.0, posinf=0.0))
        inside = torch.nonzero(mass > 1e-16 * mass.max()).flatten()
        a, b = float(z[max(int(inside[0]) - 1, 0)]), float(z[min(int(inside[-1]) + 1, len(z) - 1)])
        nodes, weights = gauss_legendre(20)
        panels = 60
        edges = torch.linspace(a, b, panels + 1, dtype=torch.float64)
        width = torch.diff(edges)
        self.z = (edges[:-1, None] + width[:, None] * nodes).flatten()
        self.x = self._x(self.z)[:, None]
        self.weights = (width[:, None] * weights).flatten() * torch.exp(self._log_slope(self.z))

    def _x(self, z: Tensor) -> Tensor:
        if math.isinf(self._low) and math.isinf(self._high):
            return torch.sinh(z / 6) * 6
        if math.isinf(self._high):
            return self._low + torch.exp(z / 3)
        if math.isinf(self._low):
            return self._high - torch.exp(z / 3)
        return self._low + (self._high - self._low) * torch.sigmoid(z / 2)

    def _log_slope(self, z: Tensor) -> Tensor:
        if math.isinf(self._low) and math.isinf(self._high):
            return torch.log(torch.cosh(z / 6))
        if math.isinf(self._high) or math.isinf(self._low):
            return z / 3 - math.log(3)
        half = z / 2
        return (
            math.log(0.5 * (self._high - self._low))
            + torch.nn.functional.logsigmoid(half)
            + (torch.nn.functional.logsigmoid(-half))
        )

    def log(self, x: Tensor, t: float) -> Tensor:
        """log p_t at x (n,) or (n, 1)."""
        return self.flat.log_density(self.density, x.reshape(-1, 1), _clock(t, x.numel()))

    def mean(self, values: Tensor, t: float) -> float:
        """E of values at the nodes under p_t."""
        with torch.no_grad():
            return float((values * torch.exp(self.log(self.x, t)) * self.weights).sum())


def line_identities(at: Setting, other: LogDensity | None) -> list[Finding]:
    """Mass, entropy, relative entropy and quantiles of a one-dimensional law.

    Args:
        other: log of another law of the same process, for the relative entropy.
    """
    sde, flat = at.sde, at.flat
    low, high = sde.smooth_window
    length = high - low
    start, end = low + 0.35 * length, low + 0.75 * length
    line = Line(flat, at.density, [start - 3 * _STEP * length, start, end])
    findings = []
    mass = max((abs(line.mean(torch.ones_like(line.weights), t) - 1), t) for t in (start, end))
    findings.append(Finding.of("mass", "int p_t dx = 1", mass[0], 1e-8, {"t": mass[1]}))

    x = line.x.clone().requires_grad_()
    clock = _clock(start, len(x))
    s = gradient(flat.log_density(at.density, x, clock), x)
    v = Flat(ReverseSDE(sde, at.score, 0.0), flat.event).drift(x, clock).detach()
    entropy = _rate(lambda t: -line.mean(line.log(line.x, t), t), start, length)
    production = -line.mean(dot(v, s.detach()), start)
    findings.append(
        Finding.of(
            "entropy (de Bruijn)",
            "dH/dt = -E[v.s]; E[div f] + 1/2 E[s.D s] for additive noise",
            abs(entropy - production) / (1 + abs(production)),
            1e-7,
            {"t": start},
        )
    )
    if other is not None:
        with torch.enable_grad():
            q = gradient(flat.log_density(other, x, clock), x).detach()
        gap, spread = s.detach() - q, flat.covariance(x.detach(), clock)[:, 0]
        want = -0.5 * line.mean((gap * spread * gap).sum(-1), start)

        def relative(t: float) -> float:
            with torch.no_grad():
                theirs = flat.log_density(other, line.x, _clock(t, len(line.x)))
            return line.mean(line.log(line.x, t) - theirs, t)

        found = _rate(relative, start, length)
        residual = abs(found - want) / (1 + abs(want))
        formula = "d/dt KL(p|q) = -1/2 E_p[(s_p - s_q).D (s_p - s_q)]"
        findings.append(Finding.of("KL dissipation", formula, residual, 1e-7, {"t": start}))
    findings.append(_quantiles(at, line, start, end))
    return findings


def _rate(function: Callable[[float], float], t: float, length: float) -> float:
    h = _STEP * length
    at = [function(t + k * h) for k in (-3, -2, -1, 1, 2, 3)]
    return (at[5] - at[0] - 9 * (at[4] - at[1]) + 45 * (at[3] - at[2])) / (60 * h)


def _quantiles(at: Setting, line: Line, start: float, end: float) -> Finding:
    """The flow is the quantile map."""
    formula = "CDF_t(x_t) = CDF_s(x_s) along the flow"
    x0 = at.points[:5, :1].clone()
    flow = ReverseSDE(at.sde, at.score, 0.0)

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        states = torch.from_numpy(y.copy())[:, None]
        return flow.drift(at.flat.shaped(states), at.flat.time(_clock(t, len(y)))).detach().numpy().ravel()

    from scipy.integrate import solve_ivp  # slow to import

    run = solve_ivp(slope, (start, end), x0.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-12)
    first, last = _cdf(line, x0[:, 0], start), _cdf(line, torch.from_numpy(run.y[:, -1].copy()), end)
    gap = (first - last).abs()
    place = int(gap.argmax())
    return Finding.of("quantile map", formula, float(gap[place]), 1e-8, {"x": x0[place].tolist(), "t": start})


def _cdf(line: Line, x: Tensor, t: float) -> Tensor:
    """P(x_t < x), by panels from the left end of the line to x."""
    nodes, weights = gauss_legendre(20)
    low = float(line.z[0])
    values = []
    for point in x.tolist():
        z = _invert(line, point)
        edges = torch.linspace(low, z, 61, dtype=torch.float64)
        width = torch.diff(edges)
        at = (edges[:-1, None] + width[:, None] * nodes).flatten()
        with torch.no_grad():
            density = torch.exp(line.log(line._x(at), t) + line._log_slope(at))
        values.append(float((density * (width[:, None] * weights).flatten()).sum()))
    return torch.tensor(values, dtype=torch.float64)


def _invert(line: Line, x: float) -> float:
    low, high = float(line.z[0]), float(line.z[-1])
    for _ in range(200):
        middle = 0.5 * (low + high)
        rising = float(line._x(torch.tensor(1.0)) - line._x(torch.tensor(0.0))) > 0
        below = float(line._x(torch.tensor(middle, dtype=torch.float64))) < x
        low, high = (middle, high) if below == rising else (low, middle)
    return 0.5 * (low + high)
