"""Identities of Gaussian transition laws x_t = Phi x_s + shift + N(0, Q): kernels and exact reversals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdeflow.gaussian import GaussianSDE
from sdeflow.model import Model
from sdeflow.problems import GaussianMixture
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import SDE
from sdeflow.testing.fields import Flat
from sdeflow.testing.known_density import Line
from sdeflow.testing.report import Finding

Kernel = Callable[[float, float], tuple[Tensor, Tensor, Tensor]]
"""(Phi (d, d), shift (d,), Q (d, d)) of (s, t), s <= t, float64."""


@dataclass(frozen=True)
class GaussianLaw:
    """A process with its claimed kernel, at four times of its span."""

    flat: Flat
    kernel: Kernel

    @property
    def sde(self) -> SDE:
        """The process."""
        return self.flat.sde

    @property
    def times(self) -> tuple[float, float, float]:
        """Three times inside the span."""
        low, high = self.sde.smooth_window
        low = max(self.sde.t_min, low)
        length = high - low
        return low + 0.25 * length, low + 0.5 * length, low + 0.85 * length

    def affine(self, sde: SDE, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """(A, b, D) of an affine drift and a diffusion that ignores x, read off from their values."""
        d, flat = self.flat.d, Flat(sde, self.flat.event)
        states = torch.cat([torch.zeros(1, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)])
        clock = torch.full((d + 1, 1), t, dtype=torch.float64)
        f = flat.drift(states, clock).detach()
        g = flat.diffusion(states[:1], clock[:1])[0].detach()
        return (f[1:] - f[0]).T, f[0], g @ g.T

    def integrated(self, sde: SDE, start: float, end: float) -> tuple[Tensor, Tensor, Tensor]:
        """(Phi, shift, Q) from start to end (either way) by the moment equations, in scipy's DOP853."""
        d, sign = self.flat.d, 1.0 if end > start else -1.0

        def slope(t: float, packed: np.ndarray) -> np.ndarray:
            phi, m, q = _unpack(packed, d)
            a, b, spread = (v.numpy() for v in self.affine(sde, t))
            return _pack(a @ phi, a @ m + b, a @ q + q @ a.T + sign * spread)

        first = _pack(np.eye(d), np.zeros(d), np.zeros((d, d)))
        from scipy.integrate import solve_ivp  # slow to import

        run = solve_ivp(slope, (start, end), first, method="DOP853", rtol=1e-11, atol=1e-13)
        if not run.success:
            raise ArithmeticError(run.message)
        return tuple(torch.from_numpy(np.array(v)) for v in _unpack(run.y[:, -1], d))  # type: ignore[return-value]


def kernel_of(sde: SDE, event: tuple[int, ...]) -> Kernel | None:
    """The kernel that the process has: that of a GaussianSDE or of one with `transition`; else None."""
    d = math.prod(event)
    if isinstance(sde, GaussianSDE):

        def scalar(s: float, t: float) -> tuple[Tensor, Tensor, Tensor]:
            ratio, std = sde.transition_kernel(s, t)
            eye = torch.eye(d, dtype=torch.float64)
            return ratio * eye, torch.zeros(d, dtype=torch.float64), std**2 * eye

        return scalar
    transition: Any = getattr(sde, "transition", None)
    if transition is None or isinstance(sde, ReverseSDE):
        return None

    def matrix(s: float, t: float) -> tuple[Tensor, Tensor, Tensor]:
        kernel = transition(s, t)
        copies = d // len(kernel.shift)  # the matrix acts on the first dimension of the event
        eye = torch.eye(copies, dtype=torch.float64)
        return (
            torch.kron(kernel.matrix, eye),
            kernel.shift.repeat_interleave(copies),
            torch.kron(kernel.covariance, eye),
        )

    return matrix


def kernel_identities(law: GaussianLaw) -> list[Finding]:
    """The kernel against the moment equations, its semigroup, and the exact reversals of a Gaussian law."""
    s, u, t = law.times
    findings = []
    got, want = law.kernel(s, t), law.integrated(law.sde, s, t)
    residual = max(_gap(a, b) for a, b in zip(got, want, strict=True))
    where = {"s": s, "t": t}
    findings.append(
        Finding.of(
            "kernel",
            "Phi' = A Phi, m' = A m + b, Q' = A Q + Q A^T + D",
            residual,
            1e-8,
            where,
            "the kernel is not that of this drift and diffusion (a standard deviation for a variance?)",
        )
    )
    (f1, b1, q1), (f2, b2, q2) = law.kernel(s, u), law.kernel(u, t)
    composed = (f2 @ f1, f2 @ b1 + b2, f2 @ q1 @ f2.T + q2)
    residual = max(_gap(a, b) for a, b in zip(got, composed, strict=True))
    formula = "Phi(s,t) = Phi(u,t) Phi(s,u), Q(s,t) = Phi Q Phi^T + Q"
    findings.append(Finding.of("Chapman-Kolmogorov", formula, residual, 1e-10, where | {"u": u}))
    findings += _reversals(law, s, t)
    return findings


def _laws(law: GaussianLaw, mean: Tensor, covariance: Tensor) -> Callable[[float], tuple[Tensor, Tensor]]:
    """(mean, covariance) at t of the Gaussian that has these at the process's first regular time."""
    start = law.sde.t0

    def at(t: float) -> tuple[Tensor, Tensor]:
        phi, shift, q = law.kernel(start, t)
        return phi @ mean + shift, phi @ covariance @ phi.T + q

    return at


def _test_law(d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), 0.6 * root @ root.T


def _reversals(law: GaussianLaw, s: float, t: float) -> list[Finding]:
    at = _laws(law, *_test_law(law.flat.d))

    def score(x: Tensor, time: Tensor) -> Tensor:
        mean, covariance = at(float(time.reshape(-1)[0]))
        flat = x.flatten(1)
        return -torch.linalg.solve(covariance, (flat - mean).T).T.reshape(x.shape)

    (m_s, p_s), (m_t, p_t), (phi, _, _) = at(s), at(t), law.kernel(s, t)
    worst = (0.0, 1.0)
    for eta in (0.0, 0.5, 1.0, 2.0):
        psi, shift, q = law.integrated(ReverseSDE(law.sde, score, eta), t, s)
        residual = max(_gap(psi @ p_t @ psi.T + q, p_s), _gap(psi @ m_t + shift, m_s))
        worst = max(worst, (residual, eta))
        if eta == 1.0:
            gain = torch.linalg.solve(p_t, phi @ p_s).T  # P_s Phi^T P_t^-1
            bayes = max(_gap(psi, gain), _gap(q, p_s - gain @ p_t @ gain.T))
    where = {"s": s, "t": t}
    return [
        Finding.of(
            "any eta keeps the marginals",
            "Psi P_t Psi^T + Q = P_s, Psi m_t + c = m_s",
            worst[0],
            1e-8,
            where | {"eta": worst[1]},
            "a wrong weight of the score in the reverse drift",
        ),
        Finding.of(
            "reverse kernel is the posterior",
            "gain P_s Phi^T P_t^-1, covariance P_s - gain P_t gain^T",
            bayes,
            1e-8,
            where,
        ),
    ]


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / (b.abs().max() + 1e-12))


def _pack(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ravel(p) for p in parts])


def _unpack(packed: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return packed[: d * d].reshape(d, d), packed[d * d : d * d + d], packed[d * d + d :].reshape(d, d)


# ---- scalar Gaussian processes: posteriors, samplers, path measures


def scalar_identities(sde: GaussianSDE) -> list[Finding]:
    """Posteriors on one-dimensional mixture data, samplers as the exact maps they are, the path measure."""
    data = GaussianMixture(
        torch.tensor([[-1.2], [0.4], [1.5]], dtype=torch.float64), torch.tensor([0.09, 0.25, 0.16]), [0.3, 0.5, 0.2]
    )
    flat = Flat(sde, (1,))
    s, _, t = GaussianLaw(flat, lambda a, b: kernel_of(sde, (1,))(a, b)).times  # type: ignore[misc]
    line = Line(flat, lambda x, clock: data.log_prob(x, sde, clock), [s])
    model = data.model(sde)
    return [
        _martingale(sde, model, line, s, t),
        *_tweedie(sde, model, data, t),
        _ddim_step(sde, s, t),
        _ddpm_step(sde, s, t),
        _girsanov(sde, s, t),
        *_changes_of_variable(sde, data, s, t),
    ]


def _posterior(line: Line, ratio: Tensor, std: Tensor, x: Tensor, t: float) -> Tensor:
    """p(x_t | x) at the line's nodes times their weights, normalised: (n, nodes)."""
    with torch.no_grad():
        prior = line.log(line.x, t)
        z = (x[:, None] - ratio * line.x[:, 0]) / std
        logits = prior - 0.5 * z**2 + torch.log(line.weights.clamp(min=1e-300))
        return torch.softmax(logits, dim=1)


def _martingale(sde: GaussianSDE, model: Model, line: Line, s: float, t: float) -> Finding:
    ratio, std = sde.transition_kernel(s, t)
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64) * float(sde.sigma(t) + sde.alpha(t))
    share = _posterior(line, ratio, std, x, s)
    want = (share @ model.score(line.x, s)) / ratio
    got = model.score(x[:, None], t)
    gap = (got - want).abs().squeeze(1) / (1 + want.abs().squeeze(1))
    place = int(gap.argmax())
    formula = "grad log p_t(x) = Phi^-T E[grad log p_s(x_s) | x_t = x]"
    return Finding.of("reverse martingale", formula, float(gap[place]), 1e-8, {"x": float(x[place]), "s": s, "t": t})


def _tweedie(sde: GaussianSDE, model: Model, data: GaussianMixture, t: float) -> list[Finding]:
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    point = Line(Flat(_Still(), (1,)), lambda x, clock: data.log_prob(x), [0.0])
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64) * float(alpha + sigma)
    share = _posterior(point, alpha, sigma, x, 0.0)
    mean = share @ point.x
    spread = share @ point.x**2 - mean**2
    leaf = x[:, None].clone().requires_grad_()
    got = model.x0(leaf, t)
    (slope,) = torch.autograd.grad(got.sum(), leaf)
    gaps = ((got.detach() - mean).abs(), (sigma**2 / alpha * slope - spread).abs())
    names = ("Tweedie mean", "Tweedie covariance")
    formulas = ("E[x_0|x] = (x + sigma^2 s)/alpha", "Cov[x_0|x] = sigma^2/alpha d E[x_0|x]/dx")
    return [
        Finding.of(name, formula, float(gap.max()), 1e-8, {"x": float(x[int(gap.argmax())]), "t": t})
        for name, formula, gap in zip(names, formulas, gaps, strict=True)
    ]


class _Still(SDE):
    """No motion: the data themselves."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _point_model(sde: GaussianSDE, at: float) -> Model:
    return Model(lambda x, t: torch.full_like(x, at), sde, "x0", expand=False)


def _ddim_step(sde: GaussianSDE, s: float, t: float) -> Finding:
    """DDIM is exact for point data, which the exponential Euler method is."""
    from sdeflow.solve import solve
    from sdeflow.solvers import DDIM

    x, at = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None], 0.7
    flow = ReverseSDE(sde, _point_model(sde, at), 0.0)
    got = solve(flow, x, DDIM(), grid=[t, s]).x
    ends = torch.tensor([s, t], dtype=torch.float64)
    alpha, sigma = sde.alpha(ends).tolist(), sde.sigma(ends).tolist()
    want = alpha[0] * at + sigma[0] / sigma[1] * (x - alpha[1] * at)
    residual = float((got - want).abs().max())
    formula = "x_s = alpha_s x_0 + sigma_s/sigma_t (x_t - alpha_t x_0) in one step"
    return Finding.of("DDIM is exponential Euler", formula, residual, 1e-12, {"s": s, "t": t})


def _ddpm_step(sde: GaussianSDE, s: float, t: float) -> Finding:
    """The ancestral step is the bridge p(x_s | x_t, x_0): mean, and variance by the spread of its noise."""
    from sdeflow.solvers import DDPM
    from sdeflow.solvers.base import LinearSolver

    flow = ReverseSDE(sde, _point_model(sde, 0.7), 1.0)
    solver = DDPM()
    assert isinstance(solver, LinearSolver)
    plan = solver.plan(flow, torch.tensor([t, s], dtype=torch.float64))
    ratio, std = sde.transition_kernel(s, t)
    alpha, sigma = sde.alpha(s), sde.sigma(s)
    precision = 1 / sigma**2 + ratio**2 / std**2
    want = torch.stack([ratio / std**2 / precision, alpha / sigma**2 / precision, 1 / precision])
    got = torch.stack([plan.ratio[0], plan.weights[0, 0], plan.noise.reshape(-1)[0] ** 2])
    residual = float(((got - want).abs() / want.abs()).max())
    formula = "x_s | x_t, x_0: precision 1/sigma_s^2 + ratio^2/std^2"
    return Finding.of("DDPM posterior is the bridge", formula, residual, 1e-10, {"s": s, "t": t})


def _girsanov(sde: GaussianSDE, s: float, t: float) -> Finding:
    """The relative entropy of two reversals' paths, by their exact kernels on grids and by Girsanov's integral."""
    laws = [(0.3, 0.5), (-0.2, 0.9)]  # (mean, variance) of the data

    def moments(which: int, time: Tensor) -> tuple[Tensor, Tensor]:
        m, v = laws[which]
        return sde.alpha(time) * m, sde.alpha(time) ** 2 * v + sde.sigma(time) ** 2

    def reverse(which: int) -> ReverseSDE:
        def score(x: Tensor, time: Tensor) -> Tensor:
            mean, variance = moments(which, time)
            return -(x - mean) / variance

        return ReverseSDE(sde, score, 1.0)

    def by_kernels(n: int) -> float:
        grid = torch.linspace(t, s, n + 1, dtype=torch.float64)
        ratio, _ = sde.transition_kernel(grid[1:], grid[:-1])
        parts = []
        for which in (0, 1):
            m0, p0 = moments(which, grid[1:])
            m1, p1 = moments(which, grid[:-1])
            gain = p0 * ratio / p1
            parts.append((gain, m0 - gain * m1, p0 - gain**2 * p1))
        (k, c, v), (k2, c2, v2) = parts
        mean, variance = moments(0, grid[:-1])
        gap = ((k - k2) * mean + c - c2) ** 2 + (k - k2) ** 2 * variance
        return float(0.5 * (v / v2 - 1 - torch.log(v / v2) + gap / v2).sum())

    grid = torch.linspace(s, t, 4001, dtype=torch.float64)
    probes = torch.tensor([0.0, 1.0], dtype=torch.float64)
    values = [reverse(w).drift(probes.repeat(len(grid))[:, None], grid.repeat_interleave(2)[:, None]) for w in (0, 1)]
    gap = (values[0] - values[1]).reshape(-1, 2)
    slope, mean, variance = gap[:, 1] - gap[:, 0], *moments(0, grid)
    square = (gap[:, 0] + slope * mean) ** 2 + slope**2 * variance
    want = float(torch.trapezoid(0.5 * square / sde.diffusion_coeff(grid) ** 2, grid))
    a, b, c = (by_kernels(n) for n in (400, 800, 1600))
    first, second = 2 * b - a, 2 * c - b
    got = (4 * second - first) / 3
    formula = "KL of paths = 1/2 E int |b - b'|^2/g^2 dt"
    return Finding.of("Girsanov", formula, abs(got - want) / want, 1e-5, {"s": s, "t": t})


def _changes_of_variable(sde: GaussianSDE, data: GaussianMixture, s: float, t: float) -> list[Finding]:
    """Samplers of the transition view do not see the scale of x nor the clock: DDIM and DPM-Solver++(2M) agree."""
    from sdeflow.solve import solve
    from sdeflow.solvers import DDIM, DPMSolverPP

    grid = torch.linspace(t, s, 6, dtype=torch.float64)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None] * float(sde.sigma(t) + sde.alpha(t)) / 2
    scaled = GaussianSDE.from_kernel(
        lambda r: torch.ones_like(r), lambda r: sde.sigma(r) / sde.alpha(r), s - 0.1 * (s - sde.t0), t + 1e-6 * (t - s)
    )

    def h(r: Tensor) -> Tensor:
        return s + (t - s) * ((r - s) / (t - s)) ** 2

    clocked = GaussianSDE.from_kernel(
        lambda r: sde.alpha(h(r)), lambda r: sde.sigma(h(r)), s + 1e-9 * (t - s), t + 1e-9 * (t - s)
    )
    own = s + (t - s) * torch.sqrt((grid - s) / (t - s))
    own = own.clamp(min=clocked.t0)
    worst_scale = worst_clock = 0.0
    for solver in (DDIM(), DPMSolverPP(2)):
        want = solve(ReverseSDE(sde, data.model(sde), 0.0), x, solver, grid=grid).x
        other = solve(ReverseSDE(scaled, data.model(scaled), 0.0), x / sde.alpha(t), solver, grid=grid).x
        worst_scale = max(worst_scale, float((other * sde.alpha(s) - want).abs().max()))
        other = solve(ReverseSDE(clocked, data.model(clocked), 0.0), x, solver, grid=own).x
        worst_clock = max(worst_clock, float((other - want).abs().max()))
    where = {"s": s, "t": t}
    return [
        Finding.of("VP <-> VE", "x_VP = alpha x_VE: the same samples", worst_scale, 1e-9, where),
        Finding.of("samplers and clock", "the mapped grid gives the same samples", worst_clock, 1e-6, where),
    ]
