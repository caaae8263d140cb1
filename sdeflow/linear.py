"""Linear SDEs with matrix coefficients, dx = (F(t) x + b(t)) dt + G(t) dW, and critically damped Langevin diffusion.

Their kernels are Gaussian, x_t = Phi x_s + c + N(0, Q), where with D = G G^T

    dPhi/dt = F Phi,   dc/dt = F c + b,   dQ/dt = F Q + Q F^T + D

(Sarkka and Solin 2019, Applied SDEs, section 6.2). `sdeflow.matrix_kernel` integrates the three together. Coefficients
act on the first dimension of an event: a state is (batch, k, *rest), and every column of `rest` is an independent copy.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from sdeflow import grids
from sdeflow.checked import checked_class
from sdeflow.coefficient import Coefficient, probe_times
from sdeflow.gaussian import _checked_span
from sdeflow.matrix_kernel import (
    LinearKernel,
    Method,
    Triple,
    commute,
    compose,
    exponential,
    factor_of,
    multiply,
    propagate,
    running,
)
from sdeflow.noise import PRIOR, Noise
from sdeflow.sde import SDE
from sdeflow.times import Time, align, as_time, check_within

Values = Any
"""Coefficients as users give them: an array, or a function of a float64 tensor of times."""

_KEPT = 4096
_ANCHORS = 32


@checked_class
class LinearSDE(SDE):
    """dx = (F(t) x + b(t)) dt + G(t) dW on [t0, t1], acting on the first dimension of an event.

    Coefficients are arrays, or functions of a float64 tensor of times of shape (...) that return (..., *shape);
    functions that take one time only are called time by time. Kernels are float64; states keep their dtype.
    `event` is (k,) with general noise and None with diagonal noise, where any (k, *rest) will do.

    Args:
        F: (k, k).
        G: (k,), diagonal noise; or (k, m), general noise, for states (batch, k) only.
        t0, t1: the span, data at t0.
        offset: b, (k,); None for 0.
        t_min: where sampling ends; None for t0 + (t1 - t0)/1000.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, no noise at all, or a span that is none.
    """

    additive = True
    affine = True

    def __init__(
        self,
        F: Values,
        G: Values,
        t0: float = 0.0,
        t1: float = 1.0,
        *,
        offset: Values = None,
        t_min: float | None = None,
    ) -> None:
        self.t0, self.t1, self._t_min = _checked_span(t0, t1, t_min)
        probes = probe_times(self.t0, self.t1)
        self._F, self._G = Coefficient("F", F, probes), Coefficient("G", G, probes)
        shape = self._F.shape
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
            raise ValueError(f"expected F of shape (k, k), got {shape}")
        self.k = shape[0]
        if len(self._G.shape) not in (1, 2) or self._G.shape[0] != self.k or 0 in self._G.shape:
            raise ValueError(f"expected G of shape ({self.k},) or ({self.k}, m) with F {shape}, got {self._G.shape}")
        self._offset = Coefficient("offset", torch.zeros(self.k) if offset is None else offset, probes)
        if self._offset.shape != (self.k,):
            raise ValueError(f"expected an offset of shape ({self.k},) with F {shape}, got {self._offset.shape}")
        self.noise = "diagonal" if len(self._G.shape) == 1 else "general"
        self.event = None if self.noise == "diagonal" else (self.k,)
        self._parts = (self._F, self._offset, self._G)
        self.homogeneous = all(part.constant is not None for part in self._parts)
        values = self.coefficients(probes)
        if not bool((values.noise != 0).any()):
            raise ValueError("expected a diffusion G that is not 0 everywhere; use ODE for no noise")
        self.method: Method = "constant" if self.homogeneous else "commuting" if commute(values) else "magnus"
        """How kernels are computed: "constant", "commuting" (F, b and G G^T at 17 probed times commute as one block
        matrix: the exponential of an integral), or "magnus"."""
        self._kernels: dict[tuple[float, float], LinearKernel] = {}
        self._factors: dict[tuple[float, float], Tensor] = {}

    def __repr__(self) -> str:
        extra = "" if self._offset.is_zero else f", offset={self._offset!r}"
        return f"{type(self).__name__}(F={self._F!r}, G={self._G!r}, t0={self.t0:g}, t1={self.t1:g}{extra})"

    def __eq__(self, other: object) -> bool:
        """Constant coefficients are compared by value, functions by identity."""
        if type(self) is not type(other):
            return NotImplemented
        assert isinstance(other, LinearSDE)
        spans = (self.t0, self.t1, self._t_min) == (other.t0, other.t1, other._t_min)
        return (
            spans
            and all(p.same(q) for p, q in zip(self._parts, other._parts, strict=True))
            and torch.equal(self.start_covariance, other.start_covariance)
        )

    def __hash__(self) -> int:
        return hash((type(self), self.t0, self.t1, self.k))

    # ---- the equation

    @property
    def t_min(self) -> float:
        return self._t_min

    def default_grid(self, steps: int, t_start: float, t_end: float) -> Tensor:
        return grids.power(self, steps, t_start, t_end)

    def drift_matrix(self, t: Time) -> Tensor:
        """F(t), float64 (*t.shape, k, k)."""
        return self._F(as_time(t))

    def diffusion_coeff(self, t: Time) -> Tensor:
        """G(t), float64 (*t.shape, k) or (*t.shape, k, m)."""
        return self._G(as_time(t))

    def offset(self, t: Time) -> Tensor:
        """b(t), float64 (*t.shape, k)."""
        return self._offset(as_time(t))

    def coefficients(self, t: Tensor) -> Triple:
        """(F, b, G G^T) at times t, with leading dimensions of t."""
        g = self._G(t)
        return Triple(self._F(t), self._offset(t), torch.diag_embed(g**2) if g.ndim == t.ndim + 1 else g @ g.mT)

    def drift(self, x: Tensor, t: Time) -> Tensor:
        self._check_event(x)
        times = _flat(align(t, x))
        value = multiply(self._F(times), x)
        if self._offset.is_zero:
            return value
        return value + _columns(self._offset(times), x)

    def diffusion(self, x: Tensor, t: Time) -> Tensor:
        self._check_event(x)
        g = self._G(_flat(align(t, x))).to(device=x.device, dtype=x.dtype)
        if self.noise == "diagonal":
            return _columns(g, x)
        return g.expand(x.shape[0], *g.shape[-2:])

    def _check_event(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[1] != self.k or (self.noise == "general" and x.ndim != 2):
            rest = "" if self.noise == "general" else ", *rest"
            raise ValueError(f"expected states of shape (batch, {self.k}{rest}), got {tuple(x.shape)}")

    # ---- kernels

    def transition(self, s: Time, t: Time) -> LinearKernel:
        """(matrix, shift, covariance) of x_t given x_s for s <= t, one time each; float64.

        Raises:
            ValueError: times outside [t0, t1] or s > t, or coefficients that cannot be integrated.
        """
        key = (self._one_time(s), self._one_time(t))
        if key not in self._kernels:
            kernel = self.kernels(key[0], torch.tensor([key[1]], dtype=torch.float64))
            if len(self._kernels) >= _KEPT:
                self._kernels.clear()
                self._factors.clear()
            self._kernels[key] = LinearKernel(*(v[0] for v in kernel))
        return self._kernels[key]

    def kernels(self, s: Time, ts: Tensor) -> LinearKernel:
        """The kernels from one time s to each of ts (n,), s <= ts: (n, k, k), (n, k), (n, k, k); float64."""
        start, ts = self._one_time(s), ts.detach().to(device="cpu", dtype=torch.float64)
        if ts.ndim != 1:
            raise ValueError(f"expected times of shape (n,), got {tuple(ts.shape)}")
        check_within(torch.tensor(start), self.t0, self.t1)
        check_within(ts, self.t0, self.t1)
        if bool((ts < start).any()):
            raise ValueError(f"expected s <= t, got s = {start:g} and t = {float(ts.min()):g}: kernels run forward")
        if self.method == "constant":
            return self._integrated(torch.full_like(ts, start), ts)
        if start == self.t0:
            edges, reached = self._anchors
            place = (torch.searchsorted(edges, ts, right=True) - 1).clamp(0, _ANCHORS)
            return compose(self._integrated(edges[place], ts), LinearKernel(*(v[place] for v in reached)))
        ends, place = torch.unique(ts, return_inverse=True)
        starts = torch.cat([torch.tensor([start], dtype=torch.float64), ends[:-1]])
        total = running(self._integrated(starts, ends))
        return LinearKernel(*(v[place] for v in total))

    @cached_property
    def _anchors(self) -> tuple[Tensor, LinearKernel]:
        """(times from t0 to t1, denser near t0; the kernels from t0 to each of them)."""
        share = torch.linspace(0, 1, _ANCHORS + 1, dtype=torch.float64) ** 3
        edges = self.t0 + (self.t1 - self.t0) * share
        steps = self._integrated(torch.cat([edges[:1], edges[:-1]]), edges)
        return edges, running(steps)

    def _integrated(self, starts: Tensor, ends: Tensor) -> LinearKernel:
        """The kernels (n, ...) over intervals, either way in time."""
        if self.method == "constant":
            return exponential(self.coefficients(ends).times(ends - starts))
        return propagate(self.coefficients, starts, ends, method=self.method)

    def transition_kernel(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """(matrix, factor) of x_t = matrix x_s + shift + factor eps for s <= t, float64 (k, k) each.

        The factor is lower-triangular; the shift, 0 without an offset, is that of `transition`.
        """
        kernel, key = self.transition(s, t), (self._one_time(s), self._one_time(t))
        if key not in self._factors:
            self._factors[key] = factor_of(kernel.covariance)
        return kernel.matrix, self._factors[key]

    def marginal(self, x0: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """(mean, factor) of x_t given x_{t0} = x0: (batch, k, *rest), and lower-triangular (k, k) in the dtype of x0.

        Args:
            x0: states (batch, k, *rest).
            t: one time, or one a sample (batch,), in [t0, t1]; the factor is then (batch, k, k).
        """
        self._check_event(x0)
        times = _flat(align(t, x0))
        if times.ndim == 0:
            matrix, factor = self.transition_kernel(self.t0, times)
            shift = self.transition(self.t0, times).shift
        else:
            matrix, shift, covariance = self.kernels(self.t0, times)
            factor = factor_of(covariance)
        mean = multiply(matrix, x0)
        if not self._offset.is_zero:
            mean = mean + _columns(shift, x0)
        return mean, factor.to(device=x0.device, dtype=x0.dtype)

    def perturb(self, x0: Tensor, t: Time, eps: Tensor) -> Tensor:
        """x_t = matrix x0 + shift + factor eps."""
        if eps.shape != x0.shape:
            raise ValueError(f"expected eps of the shape of x0, {tuple(x0.shape)}, got {tuple(eps.shape)}")
        mean, factor = self.marginal(x0, t)
        return mean + multiply(factor, eps)

    # ---- laws

    @property
    def start_covariance(self) -> Tensor:
        """The covariance (k, k) that every datum has at t0 by the process's own definition: 0, a point."""
        return torch.zeros(self.k, self.k, dtype=torch.float64)

    def stationary_covariance(self) -> Tensor:
        """P (k, k) with F P + P F^T + G G^T = 0 at every time, float64.

        Raises:
            ValueError: no such law: F has an eigenvalue without negative real part, or P changes with time.
        """
        law = self._stationary
        if law is None:
            raise ValueError(
                "there is no stationary law: expected eigenvalues of F with negative real parts, and one solution of "
                "F P + P F^T + G G^T = 0 and F m + b = 0 for all times"
            )
        return law[1]

    @cached_property
    def _stationary(self) -> tuple[Tensor, Tensor] | None:
        values = self.coefficients(probe_times(self.t0, self.t1))
        if not bool((torch.linalg.eigvals(values.a[0]).real < 0).all()):
            return None
        covariance = torch.from_numpy(solve_continuous_lyapunov(values.a[0].numpy(), -values.noise[0].numpy()))
        covariance = 0.5 * (covariance + covariance.mT)
        mean = -torch.linalg.solve(values.a[0], values.b[0])
        still = values.a @ covariance
        flow = (values.a @ mean + values.b).abs().amax(), (still + still.mT + values.noise).abs().amax()
        size = values.b.abs().amax(), values.noise.abs().amax()
        steady = all(bool(f <= 1e-10 * s) or bool(f == 0) for f, s in zip(flow, size, strict=True))
        return (mean, covariance) if steady else None

    @cached_property
    def _prior(self) -> tuple[Tensor, Tensor]:
        """The stationary law where there is one, else that of x_t1 from a point at 0, with `start_covariance`."""
        if self._stationary is not None:
            return self._stationary
        kernel = self.transition(self.t0, self.t1)
        return kernel.shift, kernel.matrix @ self.start_covariance @ kernel.matrix.mT + kernel.covariance

    @property
    def prior_mean(self) -> Tensor:
        """The mean (k,) of the prior, 0 without an offset."""
        return self._prior[0]

    @property
    def prior_covariance(self) -> Tensor:
        """The covariance (k, k) of the prior: the stationary one, else that of x_t1 from a point at 0."""
        return self._prior[1]

    def prior_sample(
        self,
        shape: tuple[int, ...],
        seed: int,
        *,
        index: int | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """`shape` = (batch, k, *rest) draws of N(prior_mean, prior_covariance); draw i depends on (seed, index i)."""
        z = Noise(seed, shape[0], index=index, device=device).normal(PRIOR, 0, shape[1:], dtype)
        self._check_event(z)
        value = multiply(factor_of(self.prior_covariance), z)
        return value + _columns(self.prior_mean, z) if bool((self.prior_mean != 0).any()) else value

    def prior_mismatch(self, mean: Any, covariance: Any) -> float:
        """KL(p_t1 || prior) in nats for data N(mean, covariance), p_t1 their exact law at t1.

        Args:
            mean: (k, *rest).
            covariance: (k, k), of each column of rest, 0 allowed.

        Raises:
            ValueError: other shapes, a covariance that is not symmetric, or a law that is singular.
        """
        mean = torch.as_tensor(mean, dtype=torch.float64)
        covariance = torch.as_tensor(covariance, dtype=torch.float64)
        if mean.ndim < 1 or mean.shape[0] != self.k or covariance.shape != (self.k, self.k):
            raise ValueError(
                f"expected a mean ({self.k}, *rest) and a covariance ({self.k}, {self.k}), "
                f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
        if not torch.allclose(covariance, covariance.mT, rtol=0, atol=1e-10 * float(covariance.abs().amax())):
            raise ValueError("expected a symmetric covariance")
        kernel = self.transition(self.t0, self.t1)
        final = kernel.matrix @ covariance @ kernel.matrix.mT + kernel.covariance
        factors = [factor_of(v) for v in (final, self.prior_covariance)]
        log_det = [2 * torch.log(torch.diagonal(v)).sum() for v in factors]
        if not all(bool(torch.isfinite(v)) for v in log_det):
            raise ValueError("expected laws at t1 with a density: a coordinate gets no noise")
        gap = kernel.matrix @ mean.reshape(self.k, -1) + (kernel.shift - self.prior_mean)[:, None]
        columns = gap.shape[1]
        white = torch.linalg.solve_triangular(factors[1], torch.cat([gap, factors[0]], dim=1), upper=False)
        square = (white[:, :columns] ** 2).sum() + columns * (white[:, columns:] ** 2).sum()
        return float(0.5 * (square - columns * (self.k + log_det[0] - log_det[1])))

    def _one_time(self, t: Time) -> float:
        if isinstance(t, Tensor) and t.numel() != 1:
            raise ValueError(f"expected one time, got times of shape {tuple(t.shape)}: use kernels(s, ts)")
        return float(t)


def _flat(t: Tensor) -> Tensor:
    """Aligned times as 0-d or (batch,)."""
    return t if t.ndim == 0 else t.flatten()


def _columns(v: Tensor, x: Tensor) -> Tensor:
    """(k,) or (batch, k) against x (batch, k, *rest), in its dtype."""
    v = v.to(device=x.device, dtype=x.dtype)
    return v.reshape(*v.shape, *[1] * (x.ndim - 2))
