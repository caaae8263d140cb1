"""Processes whose law is a closed form: oracles for reversals, and models of data that are not Gaussian.

A process of this module starts from atoms z_k of weights w_k (its data) and has the density

    p_t(x) = sum_k w_k p(x, t | z_k),     score = grad log p_t,

in float64, differentiable by reverse mode, as often as wanted in x and t. The processes are in `sdeflow.known` (those
that a change of variables makes Gaussian, and Student's) and `sdeflow.special` (those that need special functions).
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from sdeflow.checked import LARGEST, event_shape, numbers
from sdeflow.model import Model, as_model
from sdeflow.noise import DATA, PRIOR, Noise
from sdeflow.sde import SDE
from sdeflow.times import Time, align

_SAMPLING_SHARE = 1e-3
"""The part of the span next to the data that sampling leaves out by default, as for Gaussian processes."""


def positive(**values: float) -> None:
    """Refuse parameters that are not finite numbers > 0."""
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and 0 < value <= LARGEST):
            raise ValueError(f"expected {name} to be a finite number > 0 (at most {LARGEST:g}), got {value!r}")


def finite(**values: float) -> None:
    """Refuse parameters that are not finite numbers."""
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and abs(value) <= LARGEST):
            raise ValueError(f"expected {name} to be a finite number (at most {LARGEST:g}), got {value!r}")


class Draws:
    """Independent numbers (batch, *event) of one call, float64: number i of each depends on (seed, index i) alone."""

    def __init__(self, seed: int, batch: int, index: int | Tensor | None, stream: int) -> None:
        self._noise, self._stream, self._node = Noise(seed, batch, index=index), stream, 0

    def normal(self, *event: int) -> Tensor:
        """Standard normals, fresh at every call."""
        self._node += 1
        return self._noise.normal(self._stream, self._node - 1, event, torch.float64)

    def uniform(self, *event: int) -> Tensor:
        """Uniforms in (0, 1): the inverse cdf of a law turns them into draws of it."""
        return torch.special.ndtr(self.normal(*event))


class KnownSDE(SDE):
    """An SDE of states (batch, d) with a known density `log_density(x, t)`, and so a known score.

    `feller` tells whether the boundaries of `domain` are never reached; where it is False they are, the density is
    that of the reflected process, and the identities of time reversal lose boundary terms.

    Args:
        dim: d.
        t1: the end of the span [0, t1] > 0.
    """

    t0 = 0.0

    def __init__(self, dim: int, t1: float) -> None:
        positive(t1=t1)
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"expected dim to be an integer >= 1, got {dim!r}")
        event_shape((dim,))
        self.event = (dim,)
        self.dim = dim
        self.t1 = float(t1)

    @property
    def t_min(self) -> float:
        """Where a reversed run ends unless told otherwise: t1/1000."""
        return _SAMPLING_SHARE * self.t1

    @property
    def feller(self) -> bool:
        """Whether the process never reaches the boundary of its domain."""
        return True

    # ---- the law

    @abstractmethod
    def _log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t (batch,) of checked float64 x (batch, d), at t 0-d or (batch, 1)."""

    @abstractmethod
    def _log_stationary(self, x: Tensor) -> Tensor:
        """The log density (batch,) of the stationary law at checked float64 x (batch, d)."""

    @abstractmethod
    def _prior_draw(self, draws: Draws, n: int) -> Tensor:
        """`n` draws (n, d) of the law that a reversed run starts from."""

    def log_density(self, x: Tensor, t: Time) -> Tensor:
        """log p_t(x) (batch,), float64; -inf outside the domain.

        Args:
            x: states (batch, d).
            t: one time, or one a sample, (batch,) or (batch, 1); > 0, and not only within the span.

        Raises:
            ValueError: the shape of x or t, or a time that is not positive.
        """
        return self._on_domain(x, lambda safe: self._log_density(safe, _positive_time(align(t, x), len(x))))

    def stationary_log_density(self, x: Tensor) -> Tensor:
        """The log density (batch,) of the stationary law at x (batch, d), float64; -inf outside the domain.

        Raises:
            ValueError: the shape of x, or the process has no stationary law.
        """
        return self._on_domain(x, self._log_stationary)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """grad log p_t(x), of the shape and dtype of x; NaN outside the domain.

        Part of the graph of x and t where they require grad, else detached. Arguments and errors as `log_density`.
        """
        t = align(t, x)
        keep = torch.is_grad_enabled() and (x.requires_grad or t.requires_grad)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x if keep and x.requires_grad else x.detach().to(torch.float64, copy=True).requires_grad_()
            time = t if keep else t.detach().clone()
            (slope,) = torch.autograd.grad(self.log_density(leaf, time).sum(), leaf, create_graph=keep)
        # 0, the slope of -inf, would let a sample that left the domain go on as if all were well
        return torch.where(self.inside(x).unsqueeze(-1), slope, math.nan).to(x.dtype)

    def model(self) -> Model:
        """The exact score as a `Model` of this process."""
        return as_model(self.score, self)

    def prior_sample(
        self,
        shape: tuple[int, ...],
        seed: int,
        *,
        index: int | Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """`shape` = (batch, d) draws to start a reversed run from: of the stationary law, else of the law at t1.

        The stationary law is that at t1 only in the limit: take a long t1, or start from `marginal_sample`. Sample i
        depends on (seed, index i) alone. Made in float64 on the CPU, by inverse cdfs.

        Raises:
            ValueError: `shape` is not (batch, d).
        """
        if len(shape) != 2 or shape[1] != self.dim:
            raise ValueError(f"expected shape (batch, {self.dim}), got {tuple(shape)}")
        return self._prior_draw(Draws(seed, shape[0], index, PRIOR), shape[0]).to(device=device, dtype=dtype)

    # ---- states

    def inside(self, x: Tensor) -> Tensor:
        """Whether x (batch, d) lies in the domain, (batch,)."""
        low, high = self.domain
        return ((x > low) & (x < high)).all(-1)

    def _on_domain(self, x: Tensor, log: Callable[[Tensor], Tensor]) -> Tensor:
        """log(x) in float64 inside the domain, -inf outside."""
        self._check_state(x)
        inside = self.inside(x)
        # a state of the domain in place of those outside: their own log has no value, nor a gradient
        safe = torch.where(inside.unsqueeze(-1), x.to(torch.float64), self._anchor().to(x.device))
        return torch.where(inside, log(safe), -math.inf)

    def _anchor(self) -> Tensor:
        """A state inside the domain, (d,)."""
        low, high = self.domain
        middle = 0.5 * (low + high) if math.isfinite(high - low) else 1.0
        return torch.full((self.dim,), middle, dtype=torch.float64)

    def _check_state(self, x: Tensor, what: str = "x") -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 2 or x.shape[1] != self.dim:
            got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected {what} to be a floating-point tensor (batch, {self.dim}), got {got}")


class KernelSDE(KnownSDE):
    """A process with a known transition density: it starts from any atoms.

    Args:
        start: (K, d) initial states inside the domain.
        weights: (K,) weights >= 0, normalised here; None for equal ones.
        t1: the end of the span.

    A density costs memory and time in proportion to K times the batch.

    Raises:
        ValueError: shapes, weights, or states outside the domain.
    """

    closed: ClassVar[bool] = False
    """Whether a start on the boundary of the domain is one, too."""
    start: Tensor
    weights: Tensor

    def __init__(self, start: Any, weights: Any, t1: float) -> None:
        self._begin(start, weights, t1)

    def with_start(self, data: Any, weights: Any = None) -> Self:
        """The same process from other atoms `data` (K, d), with weights (K,) >= 0 or equal ones."""
        other = copy.copy(self)
        other._begin(data, weights, self.t1)
        return other

    def _begin(self, start: Any, weights: Any, t1: float) -> None:
        atoms = numbers(start, "start")
        if atoms.ndim != 2 or atoms.numel() == 0:
            raise ValueError(f"expected start of shape (K, d) with K, d >= 1, got {tuple(atoms.shape)}")
        KnownSDE.__init__(self, atoms.shape[1], t1)
        self.start = self._checked_start(atoms.detach().cpu().clone(), "start")
        k = len(atoms)
        w = torch.ones(k, dtype=torch.float64) if weights is None else numbers(weights, "weights")
        if w.shape != (k,) or not bool(torch.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
            raise ValueError(f"expected {k} finite weights >= 0 with a sum > 0, got {w.tolist()}")
        self.weights = w / w.sum()

    def _checked_start(self, atoms: Tensor, what: str) -> Tensor:
        low, high = self.domain
        ok = (atoms >= low) & (atoms <= high) if self.closed else (atoms > low) & (atoms < high)
        if not bool((ok & torch.isfinite(atoms)).all()):
            ends = "[]" if self.closed else "()"
            raise ValueError(
                f"expected {what} of {type(self).__name__} in {ends[0]}{low:g}, {high:g}{ends[1]}, "
                f"got values from {float(atoms.min()):g} to {float(atoms.max()):g}"
            )
        return atoms

    # ---- the kernel

    @abstractmethod
    def _log_kernel(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """log p(x, t | x0) (...,) of float64 x and x0 that broadcast to (..., batch, d), t 0-d or (batch, 1)."""

    @abstractmethod
    def _kernel_draw(self, x0: Tensor, t: Tensor, draws: Draws) -> Tensor:
        """Draws (batch, d) of x_t from x_0 = x0 (batch, d), t 0-d or (batch, 1)."""

    def log_kernel(self, x: Tensor, t: Time, x0: Tensor) -> Tensor:
        """log p(x_t = x | x_0 = x0) (batch,), float64; -inf outside the domain. The process is homogeneous in time.

        Args:
            x: states (batch, d).
            t: the time passed, > 0: one, or one a sample, (batch,) or (batch, 1).
            x0: initial states that broadcast to (batch, d).

        Raises:
            ValueError: the shapes, a time that is not positive, or x0 that is no start (outside the domain).
        """
        self._check_state(x)
        try:
            initial = torch.as_tensor(x0, dtype=torch.float64).expand(x.shape)
        except RuntimeError:
            raise ValueError(f"expected x0 to broadcast to {tuple(x.shape)}, got {tuple(x0.shape)}") from None
        initial = self._checked_start(initial, "x0")
        time = _positive_time(align(t, x), len(x))
        return self._on_domain(x, lambda safe: self._log_kernel(safe, time, initial.to(x.device)))

    def _log_density(self, x: Tensor, t: Tensor) -> Tensor:
        atoms, log_weights = self.start.to(x.device), torch.log(self.weights).to(x.device)
        if len(atoms) == 1:
            return self._log_kernel(x, t, atoms)
        return torch.logsumexp(self._log_kernel(x, t, atoms.unsqueeze(1)) + log_weights.unsqueeze(-1), dim=0)

    def kernel_sample(self, x0: Tensor, t: Time, seed: int, *, index: int | Tensor | None = None) -> Tensor:
        """Exact draws (batch, d) of x_t given x_0 = x0 (batch, d), float64 on the CPU, by inverse cdfs.

        Draw i depends on (seed, index i), x0[i] and t alone; t > 0 is one time, or one a sample.

        Raises:
            ValueError: the shape of x0 or t, a time that is not positive, or states that are no start.
        """
        self._check_state(x0, "x0")
        initial = self._checked_start(x0.detach().cpu().to(torch.float64), "x0")
        time = _positive_time(align(t, x0).detach().cpu(), len(x0))
        return self._kernel_draw(initial, time, Draws(seed, len(x0), index, DATA))

    def marginal_sample(self, n: int, t: Time, seed: int, *, index: int | Tensor | None = None) -> Tensor:
        """Exact draws (n, d) of the law p_t: an atom by its weight, then its kernel. Errors as `kernel_sample`."""
        time = _positive_time(align(t, torch.empty(n, self.dim)).detach().cpu(), n)
        return self._marginal_draw(time, Draws(seed, n, index, DATA))

    def _marginal_draw(self, t: Tensor, draws: Draws) -> Tensor:
        u = draws.uniform(1).squeeze(-1)
        which = torch.searchsorted(torch.cumsum(self.weights, 0), u).clamp(max=len(self.weights) - 1)
        return self._kernel_draw(self.start[which], t, draws)

    def _log_stationary(self, x: Tensor) -> Tensor:
        raise ValueError(f"{self!r} has no stationary law: it never settles, whatever the time")

    def _prior_draw(self, draws: Draws, n: int) -> Tensor:
        return self._marginal_draw(torch.tensor(self.t1, dtype=torch.float64), draws)


def _positive_time(t: Tensor, batch: int) -> Tensor:
    if t.ndim > 0 and t.shape not in ((batch, 1), (1, 1)):
        raise ValueError(f"expected one time, or one a sample, ({batch}, 1), got times of shape {tuple(t.shape)}")
    if t.device.type == "cpu" and t.numel() > 0 and not bool((t > 0).all() and torch.isfinite(t).all()):
        raise ValueError(f"expected finite times > 0 (at 0 the law is that of the atoms), got {float(t.min()):g}")
    return t


def log_normal_density(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(y; mean, variance), elementwise."""
    return -0.5 * ((y - mean) ** 2 / variance + torch.log(2 * math.pi * variance))


def from_numpy(values: Any) -> Tensor:
    """What a function of scipy returned, as float64."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
