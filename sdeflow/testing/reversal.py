"""Identities of a time reversal that hold for every density in place of p_t: no known law is needed.

With a trial density q, s = grad log q, the equation dX = f dt + G dW, D = G G^T, and what the library derives from it:
the reversal's drift b at stochasticity eta and the flow's drift v. Residuals are relative to the sizes of their terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sdeflow.pushforward import Pushforward
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import SDE
from sdeflow.testing.fields import (
    Flat,
    LogDensity,
    Terms,
    divergence,
    dot,
    gradient,
    jacobian,
    kolmogorov_forward,
    row_divergence,
    times,
)
from sdeflow.testing.report import Finding

ETAS = (0.0, 0.5, 1.0, 2.0)
TOLERANCE = 1e-9

HandWritten = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A user's own drift(x, t, score) of the reverse SDE or of the flow, the score given as its value at x."""


@dataclass(frozen=True)
class Setting:
    """A process at points, with a trial density for its law."""

    flat: Flat
    points: Tensor
    clock: Tensor
    density: LogDensity

    @property
    def sde(self) -> SDE:
        """The process."""
        return self.flat.sde

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log q at states as the process takes them, differentiable."""
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            return gradient(self.density(leaf, t), leaf)

    @cached_property
    def x(self) -> Tensor:
        """The points, as what is differentiated."""
        return self.points.detach().clone().requires_grad_()

    @cached_property
    def s(self) -> Tensor:
        """grad log q, (n, d)."""
        return gradient(self.flat.log_density(self.density, self.x, self.clock), self.x)

    @cached_property
    def hessian(self) -> Tensor:
        """hess log q, (n, d, d)."""
        return jacobian(self.s, self.x)

    @cached_property
    def g(self) -> Tensor:
        """G, (n, d, m)."""
        return self.flat.diffusion(self.x, self.clock)

    @cached_property
    def covariance(self) -> Tensor:
        """D, (n, d, d)."""
        return self.g @ self.g.mT

    @cached_property
    def f(self) -> Tensor:
        """The Ito drift, (n, d)."""
        return self.flat.ito(self.x, self.clock)

    @cached_property
    def forward(self) -> tuple[Tensor, ...]:
        """The terms of d_t log q by the Fokker-Planck equation."""
        return kolmogorov_forward(self.f, self.covariance, self.x, self.s, self.hessian)

    def reversed(self, eta: Any) -> Flat:
        """The library's reversal."""
        return Flat(ReverseSDE(self.sde, self.score, eta), self.flat.event)

    def finding(self, identity: str, formula: str, terms: Terms, note: str = "", extra: dict | None = None) -> Finding:
        """The verdict on a sum that should vanish at every point."""
        residual, place = terms.residual()
        where: dict[str, Any] = {"x": self.points[place].tolist(), "t": float(self.clock[place])} | (extra or {})
        if 1e-8 < residual < 1e-4:
            note = (note + "; " if note else "") + "so small a residual looks like float32 arithmetic in the class"
        return Finding.of(identity, formula, residual, TOLERANCE, where, note)


def reversal_identities(at: Setting, hand_reverse: HandWritten | None, hand_flow: HandWritten | None) -> list[Finding]:
    """All of this module's verdicts."""
    findings = [
        derivatives(at),
        marginals_kept(at, hand_reverse, hand_flow),
        continuity(at),
        stratonovich_conversion(at),
        stratonovich_flow(at),
        stratonovich_reverse(at),
        duality(at),
        general_reversal(at),
        involution(at),
        time_change(at),
        *naturality(at),
    ]
    if hand_reverse is not None:
        findings.append(hand_written(at, hand_reverse, 1.0, "hand-written reverse drift"))
    if hand_flow is not None:
        findings.append(hand_written(at, hand_flow, 0.0, "hand-written flow drift"))
    return findings


_REACH = 3e-3
"""Of the differences, as a share of the room that a state has in the domain."""


def reach(at: Setting) -> Tensor:
    """The step (n, 1) of differences at the points: six of them stay inside the domain."""
    low, high = at.sde.domain
    return _REACH * torch.minimum(at.points - low, high - at.points).clamp(max=1.0).amin(1, keepdim=True)


def derivatives(at: Setting) -> Finding:
    """Autograd's directional derivatives of drift and diffusion against differences of sixth order.

    What the other identities cannot see: a function without a graph has the derivative 0 in the derivation and in its
    check alike, and float32 inside a function cancels.
    """
    generator = torch.Generator().manual_seed(11)
    direction = torch.randn(at.points.shape, generator=generator, dtype=torch.float64)
    move = reach(at) * direction / direction.abs().amax(1, keepdim=True)

    def values(x: Tensor) -> Tensor:
        return torch.cat([at.flat.drift(x, at.clock), at.flat.diffusion(x, at.clock).flatten(1)], dim=1)

    with torch.no_grad():
        far = {k: values(at.points + k * move) for k in (-3, -2, -1, 1, 2, 3)}
    want = (far[3] - far[-3] - 9 * (far[2] - far[-2]) + 45 * (far[1] - far[-1])) / 60
    got = times(jacobian(values(at.x), at.x), move)
    size = torch.stack([v.abs() for v in far.values()]).mean(0) * _REACH
    terms = Terms.of(got, -want, inside=(size + 1e-6,))
    residual, place = terms.residual()
    where = {"x": at.points[place].tolist(), "t": float(at.clock[place])}
    note = "drift or diffusion is not differentiated by autograd (numpy, detach), or computes in float32"
    return Finding.of("derivatives", "autograd = differences, of f and G", residual, 1e-7, where, note)


def _worst(at: Setting, identity: str, formula: str, cases: list[tuple[Terms, dict]], note: str = "") -> Finding:
    found = [at.finding(identity, formula, terms, note, extra) for terms, extra in cases]
    return max(found, key=lambda f: f.residual)


def _backward(at: Setting, drift: Tensor, eta: float) -> Terms:
    """d_t log q by the process's equation, less that of a reversal with this drift and noise eta G."""
    spread = eta**2 * at.covariance
    terms = kolmogorov_forward(drift, spread, at.x, at.s, at.hessian)
    first, second, *noise = terms
    return Terms.of(*at.forward, -first, -second, *noise)


def marginals_kept(at: Setting, *_: object) -> Finding:
    """The reversal's Fokker-Planck equation is the process's, for several eta and a function eta."""
    cases: list[tuple[Terms, dict]] = []
    for eta in (*ETAS, lambda t: 0.5 + t):
        drift = at.reversed(eta).drift(at.x, at.clock)
        if callable(eta):
            weight = (0.5 + at.clock).reshape(-1, 1, 1)
            terms = kolmogorov_forward(drift, weight**2 * at.covariance, at.x, at.s, at.hessian)
            cases.append((Terms.of(*at.forward, -terms[0], -terms[1], *terms[2:]), {"eta": "0.5 + t"}))
        else:
            cases.append((_backward(at, drift, eta), {"eta": eta}))
    return _worst(
        at,
        "reversal keeps the marginals",
        "FP(f, D) q = -FP(-b, eta^2 D) q, any eta",
        cases,
        "a dropped or wrong div D, a wrong weight (1 + eta^2)/2, or G^T G for G G^T",
    )


def continuity(at: Setting) -> Finding:
    """The flow's continuity equation is the process's Fokker-Planck equation."""
    v = at.reversed(0.0).drift(at.x, at.clock)
    terms = Terms.of(*at.forward, divergence(v, at.x), dot(v, at.s))
    return at.finding("continuity of the flow", "d_t log p + div v + v.s = 0", terms)


def stratonovich_conversion(at: Setting) -> Finding:
    """The library's Ito and Stratonovich drifts differ by c."""
    x, t = at.flat.shaped(at.x), at.flat.time(at.clock)
    pairs = (
        (at.sde.ito_drift(x, t), at.f),
        (at.sde.stratonovich_drift(x, t), at.flat.stratonovich(at.x, at.clock)),
    )
    parts = (at.f, at.flat.correction(at.x, at.clock))  # they may cancel
    cases: list[tuple[Terms, dict]] = [(Terms.of(got.flatten(1), -want, inside=parts), {}) for got, want in pairs]
    return _worst(at, "Ito and Stratonovich drifts", "f_ito - f_strat = 1/2 sum_k (dG_k) G_k", cases)


def _columns_part(at: Setting) -> Tensor:
    """sum_k G_k (div G_k + G_k.s), (n, d)."""
    total = torch.zeros_like(at.x)
    for k in range(at.g.shape[-1]):
        column = at.g[..., k]
        total = total + column * (divergence(column, at.x) + dot(column, at.s)).unsqueeze(-1)
    return total


def stratonovich_flow(at: Setting) -> Finding:
    """The flow in Stratonovich form."""
    v = at.reversed(0.0).drift(at.x, at.clock)
    terms = Terms.of(v, -at.flat.stratonovich(at.x, at.clock), 0.5 * _columns_part(at))
    return at.finding("flow, Stratonovich form", "v = f~ - 1/2 sum_k G_k (div G_k + G_k.s)", terms)


def stratonovich_reverse(at: Setting) -> Finding:
    """The reversals in Stratonovich form."""
    cases = []
    part, base = _columns_part(at), at.flat.stratonovich(at.x, at.clock)
    for eta in ETAS[1:]:
        reverse = at.reversed(eta).sde
        got = reverse.stratonovich_drift(at.flat.shaped(at.x), at.flat.time(at.clock)).flatten(1)
        cases.append((Terms.of(got, -base, 0.5 * (1 + eta**2) * part), {"eta": eta}))
    formula = "b~ = f~ - (1 + eta^2)/2 sum_k G_k (div G_k + G_k.s)"
    return _worst(at, "reverse, Stratonovich form", formula, cases)


def duality(at: Setting) -> Finding:
    """The generator and that of the reversal add up to a symmetric form, on trial functions u."""
    cases: list[tuple[Terms, dict]] = []
    b = at.reversed(1.0).drift(at.x, at.clock)
    for k in range(3):
        phase = torch.arange(1, at.flat.d + 1, dtype=at.x.dtype) * (0.7 + 0.4 * k) + k
        u = torch.sin(at.x * phase).sum(-1) + torch.cos(at.x.sum(-1) * (0.5 + k)) + 0.1 * at.x.square().sum(-1)
        slope = gradient(u, at.x)
        curve = 0.5 * (at.covariance * jacobian(slope, at.x)).sum((-2, -1))
        field = times(at.covariance, slope)
        terms = Terms.of(
            dot(at.f, slope), curve, -dot(b, slope), curve, -divergence(field, at.x), -dot(field, at.s)
        )  # time runs down: the reversal's generator has the drift -b
        cases.append((terms, {"u": k}))
    return _worst(at, "generator duality", "L u + L_rev u = div(p D grad u)/p", cases)


def general_reversal(at: Setting) -> Finding:
    """Any covariance A(x) and any skew Q(x) keep the marginals, with the library's flow drift."""
    d, x = at.flat.d, at.x
    generator = torch.Generator().manual_seed(5)
    w1, w2 = (torch.randn(d, d, d, generator=generator, dtype=x.dtype) for _ in range(2))
    root = torch.eye(d, dtype=x.dtype) + 0.5 * torch.sin(torch.einsum("ijk,nk->nij", w1, x))
    a, m = root @ root.mT, torch.tanh(torch.einsum("ijk,nk->nij", w2, x))
    q = m - m.mT
    v = at.reversed(0.0).drift(x, at.clock)
    b = v - 0.5 * (row_divergence(a, x) + times(a, at.s)) - (row_divergence(q, x) + times(q, at.s))
    first, second, *noise = kolmogorov_forward(b, a, x, at.s, at.hessian)
    terms = Terms.of(*at.forward, -first, -second, *noise)
    formula = "b = v - 1/2 (div A + A s) - (div Q + Q s) with noise A"
    return at.finding("general (A, Q) reversal", formula, terms)


def involution(at: Setting) -> Finding:
    """Reversing twice with the same score gives the process back: eta, then 1/eta."""
    cases = []
    for eta in ETAS[1:]:
        once = ReverseSDE(at.sde, at.score, eta)
        twice = Flat(ReverseSDE(once, at.score, 1 / eta), at.flat.event)
        terms = Terms.of(twice.drift(at.x, at.clock), -at.f, inside=(times(at.covariance, at.s),))
        cases.append((terms, {"eta": eta}))
    return _worst(at, "involution", "reverse(reverse(f)) = f", cases)


class TimeChanged(SDE):
    """`base` on the clock r, t = h(r): drift h' f, diffusion sqrt(h') G (Oksendal 2003, theorem 8.5.1)."""

    def __init__(self, base: SDE, h: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> None:
        self.base, self._h, self._slope = base, h, slope
        self.noise, self.event, self.domain = base.noise, base.event, base.domain
        self.interpretation = base.interpretation
        self.t0, self.t1 = base.t0, base.t1

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self._slope(t) * self.base.drift(x, self._h(t))

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        slope = torch.sqrt(self._slope(t))
        return (slope.unsqueeze(-1) if self.noise == "general" and slope.ndim else slope) * self.base.diffusion(
            x, self._h(t)
        )


def time_change(at: Setting) -> Finding:
    """A change of clock commutes with the reversal. The span maps onto itself."""
    t0, length = at.sde.t0, at.sde.t1 - at.sde.t0

    def share(r: Tensor) -> Tensor:
        return (r - t0) / length

    def h(r: Tensor) -> Tensor:
        return t0 + length * share(r) * (0.5 + 0.5 * share(r))

    def slope(r: Tensor) -> Tensor:
        return 0.5 + share(r)

    changed = TimeChanged(at.sde, h, slope)
    cases = []
    for eta in ETAS:
        got = Flat(ReverseSDE(changed, at.score, eta), at.flat.event).drift(at.x, at.clock)
        want = slope(at.clock) * at.reversed(eta).drift(at.x, h(at.clock))
        cases.append((Terms.of(got, -want), {"eta": eta}))
    return _worst(at, "time change", "reverse(h' f, sqrt(h') G)(r) = h' reverse(f, G)(h(r))", cases)


def naturality(at: Setting) -> list[Finding]:
    """The family of reversals of the image under a diffeomorphism is the image of the family; affine maps too."""
    d = at.flat.d
    if len(at.flat.event) != 1:
        why = f"needs states (batch, d); the event is {at.flat.event}"
        return [
            Finding.skipped("naturality", "reverse(push Y) = push(reverse Y)", why),
            Finding.skipped("affine equivariance", "x = M y + c", why),
        ]
    generator = torch.Generator().manual_seed(7)
    b = 0.6 * torch.randn(d, d, generator=generator, dtype=torch.float64)
    shift = torch.randn(d, generator=generator, dtype=torch.float64)
    matrix = torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(d, d, generator=generator, dtype=torch.float64)

    def curved(y: Tensor) -> Tensor:
        return y + torch.tanh(y @ b.T + shift) @ b  # its Jacobian, I + B^T diag(sech^2) B, is positive definite

    def affine(y: Tensor) -> Tensor:
        return y @ matrix.T + shift

    return [
        _image(at, curved, "naturality", "reverse(phi(Y)) = phi(reverse(Y)), any eta"),
        _image(at, affine, "affine equivariance", "reverse(M Y + c) = M reverse(Y) + c"),
    ]


def _image(at: Setting, phi: Callable[[Tensor], Tensor], identity: str, formula: str) -> Finding:
    y = at.x
    known = at.points.detach()

    def inverse(x: Tensor) -> Tensor:
        # the points are images of `known`: start there, and stay differentiable
        return pushed._step(pushed._step(known if x.shape == known.shape else pushed._newton(x), x), x)

    pushed = Pushforward(phi, at.sde, inverse=inverse)

    def log_density(x: Tensor, t: Tensor) -> Tensor:
        back = inverse(x)
        return at.density(back, t) - torch.linalg.slogdet(jacobian(phi(back), back))[1]

    def score(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            return gradient(log_density(leaf, t), leaf)

    j = jacobian(phi(y), y)
    curve = torch.stack([(at.covariance * jacobian(j[:, i], y)).sum((-2, -1)) for i in range(y.shape[1])], dim=1)
    x = phi(y).detach()
    cases = []
    for eta in ETAS:
        got = ReverseSDE(pushed, score, eta).drift(x, at.clock)
        want = times(j, at.reversed(eta).drift(y, at.clock))
        cases.append((Terms.of(got, -want, 0.5 * eta**2 * curve), {"eta": eta}))  # Ito's term, time running down
    return _worst(at, identity, formula, cases)


def hand_written(at: Setting, drift: HandWritten, eta: float, identity: str) -> Finding:
    """A drift that the user wrote keeps the marginals."""
    shaped, time = at.flat.shaped(at.x), at.flat.time(at.clock)
    value = drift(shaped, time, at.flat.shaped(at.s)).flatten(1)
    return at.finding(
        identity,
        "FP(f, D) q = -FP(-b, eta^2 D) q",
        _backward(at, value, eta),
        "b = f - (1 + eta^2)/2 (div D + D s) on the process's clock; look for div D, its weight, or a sign",
        {"eta": eta},
    )
