"""What the kernels of `sdeflow.special` are made of: 0F1, the ancestral process, the heat kernel of the sphere.

All are sums of positive terms (up to corrections below 1), so that their logarithms are accurate to rounding in the
far tails, too, and are differentiable by reverse mode as often as wanted. Where scipy evaluates, on the CPU.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Polynomial
from scipy import special
from torch import Tensor

# ---- 0F1(; b; w), the entire part of the Bessel function I_{b-1}(2 sqrt w)


def log_hyp0f1(b: float, w: Tensor) -> Tensor:
    """log 0F1(; b; w) for b > 0 and w >= 0, float64; d/dw is `hyp0f1_ratio`.

    0F1(; b; w) = sum_n w^n/(n! (b)_n) = Gamma(b) w^{(1-b)/2} I_{b-1}(2 sqrt w)   (DLMF 10.39.9).
    """
    value: Tensor = _LogHyp0F1.apply(w, b)
    return value


def hyp0f1_ratio(b: float, w: Tensor) -> Tensor:
    """rho_b = d/dw log 0F1(; b; w) = 0F1(; b+1; w)/(b 0F1(; b; w)); rho_b' = rho_b (rho_{b+1} - rho_b)."""
    value: Tensor = _Hyp0F1Ratio.apply(w, b)
    return value


class _LogHyp0F1(torch.autograd.Function):
    @staticmethod
    def forward(w: Tensor, b: float) -> Tensor:
        values = _log_hyp0f1(b, w.detach().cpu().numpy())
        return torch.from_numpy(values).to(w.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        w, ctx.b = inputs
        ctx.save_for_backward(w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return grads[0] * hyp0f1_ratio(ctx.b, w), None


class _Hyp0F1Ratio(torch.autograd.Function):
    @staticmethod
    def forward(w: Tensor, b: float) -> Tensor:
        return torch.from_numpy(_ratio(b, w.detach().cpu().numpy())).to(w.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        w, ctx.b = inputs
        ctx.save_for_backward(w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        here = hyp0f1_ratio(ctx.b, w)
        return grads[0] * here * (hyp0f1_ratio(ctx.b + 1, w) - here), None


_TINY = 1e-280
"""Below this the scaled Bessel function is close to underflow: z < 1, or an order above 100."""


def _log_hyp0f1(b: float, w: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    z = 2 * np.sqrt(w)
    scaled = special.ive(b - 1, z)
    small, large = (z <= 1) | ((scaled <= _TINY) & (w <= 100 * b)), (scaled <= _TINY) & (w > 100 * b)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(scaled) + z - (b - 1) * np.log(0.5 * z) + special.gammaln(b)
    if small.any():
        value[small] = _log_series(b, w[small])
    if large.any():
        log_bessel = _large_order(b - 1, z[large])[0]
        value[large] = log_bessel - (b - 1) * np.log(0.5 * z[large]) + special.gammaln(b)
    return np.asarray(value)


def _log_series(b: float, w: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    term, total, n = np.ones_like(w), np.ones_like(w), 0
    while (term > 1e-17 * total).any():
        term = term * (w / ((n + 1) * (b + n)))
        total, n = total + term, n + 1
    return np.asarray(np.log(total))


def _ratio(b: float, w: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    z = 2 * np.sqrt(w)
    below, above = special.ive(b - 1, z), special.ive(b, z)
    small, large = (z <= 1) | ((below <= _TINY) & (z <= b)), (below <= _TINY) & (z > b) & (z > 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = above / (0.5 * z * below)
    if small.any():
        # Gauss's continued fraction rho_b = 1/(b + w rho_{b+1}), from an estimate 80 orders up
        few = w[small]
        order = b + 80
        rho = 2 / (order + np.sqrt(order**2 + 4 * few))
        for k in range(79, -1, -1):
            rho = 1 / (b + k + few * rho)
        value[small] = rho
    if large.any():
        value[large] = 2 / z[large] * _large_order(b - 1, z[large])[1]
    return np.asarray(value)


def _debye_polynomials(count: int) -> tuple[list[Polynomial], list[Polynomial]]:
    p = Polynomial([0.0, 1.0])
    u, v = [Polynomial([1.0])], [Polynomial([1.0])]
    for _ in range(count):
        last, slope = u[-1], u[-1].deriv()
        u.append(0.5 * p**2 * (1 - p**2) * slope + ((1 - 5 * p**2) * last).integ() / 8)
        v.append(u[-1] - 0.5 * p * (1 - p**2) * last - p**2 * (1 - p**2) * slope)
    return u, v


_U, _V = _debye_polynomials(7)


def _large_order(nu: float, z: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(log I_nu(z), I_{nu+1}(z)/I_nu(z)) for nu > 100, by Debye's expansion (DLMF 10.41.3, 10.41.5, 10.41.9-11)."""
    x = z / nu
    root = np.sqrt(1 + x**2)
    u, v = (np.sum([f(1 / root) / nu**k for k, f in enumerate(fs)], axis=0) for fs in (_U, _V))
    log = nu * (root + np.log(x / (1 + root))) - 0.5 * np.log(2 * math.pi * nu * root) + np.log(u)
    return np.asarray(log), np.asarray(x / (1 + root) + root / x * ((v - u) / u))


# ---- the ancestral process of Wright-Fisher diffusions


class AncestralWeights(torch.autograd.Function):
    """q_m(t), m = 0..M: the number of lineages left at time t of infinitely many, (*t.shape, M + 1).

    A pure death process of rates lam_m = m (m + theta - 1)/2, theta = a + b, so that

        q_m' = lam_{m+1} q_{m+1} - lam_m q_m                            (the derivative here, of any order)
        q_m = sum_{k>=m} (-1)^{k-m} (2k+theta-1) (theta+m)_{k-1}/(m! (k-m)!) e^{-k(k+theta-1)t/2}

    (Griffiths 1980, Lines of descent in the diffusion approximation of neutral Wright-Fisher models; Jenkins and Spano
    2017, Exact simulation of the Wright-Fisher diffusion). At t = 0.01 terms of 10^65 sum to 10^-213: it is done in
    decimals of as many digits as that needs.
    """

    @staticmethod
    def forward(t: Tensor, theta: float, top: int) -> Tensor:
        times = t.detach().cpu().flatten().tolist()
        rows = {time: ancestral_weights(theta, time) for time in set(times)}
        table = np.zeros((len(times), top + 1))
        for i, time in enumerate(times):
            row = rows[time][: top + 1]
            table[i, : len(row)] = row
        return torch.from_numpy(table).reshape(*t.shape, top + 1).to(t.device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, int], output: Tensor) -> None:
        t, ctx.theta, ctx.top = inputs
        ctx.save_for_backward(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (t,) = ctx.saved_tensors
        q: Tensor = AncestralWeights.apply(t, ctx.theta, ctx.top)
        m = torch.arange(ctx.top + 1, dtype=torch.float64, device=t.device)
        flow = 0.5 * m * (m + ctx.theta - 1) * q
        slope = torch.nn.functional.pad(flow[..., 1:], (0, 1)) - flow
        return (grads[0] * slope).sum(-1), None, None


def most_lineages(t: float) -> int:
    """M such that more lineages than that at time t have a probability below rounding: mean 2/t, variance 2/(3t)."""
    return int(2 / t + 7 / math.sqrt(t)) + 16


@lru_cache(maxsize=4096)
def ancestral_weights(theta: float, t: float) -> np.ndarray[Any, Any]:
    """q_0..q_M at one time, to the last digit of float64."""
    top = most_lineages(t)
    size = _largest_term(theta, t, top)  # decimal exponent of the largest term
    least = 0.5 * math.pi**2 / t / math.log(10) + 6  # ... of 1/q_0, about e^{pi^2/(2t)} for small t
    with localcontext() as context:
        context.prec = int(max(size, 0) + least) + 25
        context.Emin, context.Emax = -(10**8), 10**8
        small = Decimal(10) ** -int(least + 22)
        th, half = Decimal(theta), Decimal(t) / 2
        factors: list[Decimal] = []

        def factor(k: int) -> Decimal:
            while len(factors) <= k:
                n = len(factors)
                # the term of k = 0 is 1 whatever theta, also 1, where theta - 1 and its weight vanish
                factors.append((2 * n + th - 1) * (-n * (n + th - 1) * half).exp() if n else Decimal(1))
            return factors[k]

        values, first = [], Decimal(1)  # first = (theta + m)_{m-1}/m!
        for m in range(top + 1):
            k, weight, total, sign = m, first, Decimal(0), 1
            before = Decimal(0)
            while True:
                term = weight * factor(k)
                total += sign * term
                if k > m + 2 and term < small and term <= before:
                    break
                before = term
                weight = Decimal(1) if k == 0 else weight * (th + m + k - 1) / (k + 1 - m)
                k, sign = k + 1, -sign
            values.append(float(total))
            if m == 0:
                first = Decimal(1)
            else:
                first = first * (th + 2 * m) * (th + 2 * m - 1) / ((th + m) * (m + 1))
    return np.array(values)


def _largest_term(theta: float, t: float, top: int) -> float:
    m, k = np.arange(1, top + 1.0)[:, None], np.arange(0, 4.0 * top)[None, :]
    k = m + k
    log = np.log(2 * k + theta - 1) + special.gammaln(theta + m + k - 1) - special.gammaln(theta + m)
    log = log - special.gammaln(m + 1) - special.gammaln(k - m + 1) - 0.5 * k * (k + theta - 1) * t
    return float(log.max()) / math.log(10)


# ---- the heat kernel of the sphere


def log_heat_sphere(half: Tensor, t: Tensor) -> Tensor:
    """log K of dx = P o dW on the unit sphere of R^3, per surface; half = sin^2(gamma/2), gamma the angle travelled.

        K = sum_l (2l+1)/(4 pi) e^{-l(l+1)t/2} P_l(cos gamma)                                        (t >= 1)
          = 2 e^{t/8}/(2 pi t)^{3/2} int_0^{pi/2} S(phi)/sin(phi/2) dpsi,   cos(phi/2) = cos(gamma/2) sin psi   (t < 1)
        S(phi) = sum_k (-1)^k (phi + 2 pi k) e^{-(phi + 2 pi k)^2/(2t)} > 0.

    The second is the first with the Mehler-Dirichlet integral of P_l (DLMF 14.12.1) and Poisson's summation; by the
    trapezoidal rule, whose error falls below rounding at the number of nodes taken here (smooth, even and periodic).
    """
    cut = torch.ones_like(t)
    short, long = t.detach() < 1, t.detach() >= 1
    if bool(short.all()):
        return _heat_by_images(half, t)
    if bool(long.all()):
        return _heat_by_legendre(half, t)
    # a time of the right range where the other form is taken: its values and gradients must be finite
    images = _heat_by_images(half, torch.where(short, t, cut))
    return torch.where(short, images, _heat_by_legendre(half, torch.where(long, t, cut)))


def _heat_by_images(half: Tensor, t: Tensor) -> Tensor:
    nodes = 16 + int(7 / math.sqrt(float(t.detach().min())))
    psi = (torch.arange(nodes, dtype=torch.float64, device=half.device) + 0.5) * (0.5 * math.pi / nodes)
    half, t = half.unsqueeze(-1), t.unsqueeze(-1)
    sine2 = torch.cos(psi) ** 2 + half * torch.sin(psi) ** 2  # sin^2(phi/2), without cancellation near gamma = 0
    cosine2 = torch.clamp((1 - half) * torch.sin(psi) ** 2, min=1e-300)
    phi = 2 * torch.atan2(torch.sqrt(sine2), torch.sqrt(cosine2))
    others = torch.zeros_like(phi)
    for k in (-1, 1, -2):
        turn = 2 * math.pi * k
        others = others + (-1) ** k * (1 + turn / phi) * torch.exp(-turn * (2 * phi + turn) / (2 * t))
    log_terms = torch.log(phi) + torch.log1p(others) - phi**2 / (2 * t) - 0.5 * torch.log(sine2)
    integral = torch.logsumexp(log_terms, -1) + math.log(0.5 * math.pi / nodes)
    t = t.squeeze(-1)
    return math.log(2) + t / 8 - 1.5 * torch.log(2 * math.pi * t) + integral


def _heat_by_legendre(half: Tensor, t: Tensor) -> Tensor:
    c = 1 - 2 * half
    before, here, total = torch.zeros_like(c), torch.ones_like(c), torch.zeros_like(c)
    for degree in range(12):  # e^{-12 * 13/2} is below rounding
        total = total + (2 * degree + 1) * torch.exp(-0.5 * degree * (degree + 1) * t) * here
        before, here = here, ((2 * degree + 1) * c * here - degree * before) / (degree + 1)
    return torch.log(total / (4 * math.pi))


def sphere_cosine(u: Tensor, t: Tensor) -> Tensor:
    """cos gamma with P(gamma_t <= gamma) = u, of the heat kernel of the sphere; bisection to 2^-52, (batch,).

    The cdf is 1/2 sum_l e^{-l(l+1)t/2} (P_{l-1} - P_{l+1})(cos gamma), l = 0 giving 1 - cos gamma.
    """
    terms = 3 + int(9 / math.sqrt(float(t.min())))
    degree = np.arange(1, terms)
    decay = np.exp(-0.5 * degree * (degree + 1) * t.numpy().reshape(-1, 1))
    uniform = u.numpy()
    low, high = np.zeros_like(uniform), np.full_like(uniform, math.pi)
    for _ in range(52):
        middle = 0.5 * (low + high)
        c = np.cos(middle)
        before, here, total = np.ones_like(c), c, 1 - c
        for i, n in enumerate(degree):
            after = ((2 * n + 1) * c * here - n * before) / (n + 1)
            total = total + decay[:, i] * (before - after)
            before, here = here, after
        below = 0.5 * total < uniform
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return torch.from_numpy(np.cos(0.5 * (low + high)))
