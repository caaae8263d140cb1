"""Exact-score problems: distributions whose noised density, score and posterior are closed forms.

Under x_t = alpha x_0 + sigma eps a mixture of Gaussians stays one, with means alpha m_k and
covariances alpha^2 C_k + sigma^2 I; `distribution.model(process)` is the exact `Model` of any
GaussianSDE. Models predict v, the row that is well conditioned at both ends of time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import LARGEST, checked, checked_class, numbers
from sdeflow.gaussian import GaussianSDE
from sdeflow.linear import LinearSDE
from sdeflow.linear_law import LinearLaw
from sdeflow.model import Model
from sdeflow.noise import DATA, Noise
from sdeflow.times import Time, align


class Distribution(ABC):
    """A data distribution with exact noised laws. `event` is the shape of one sample."""

    event: tuple[int, ...]
    _block = 64
    """Rows are padded to a multiple of this, four of the widest vectors of a CPU: the rest of a row count is
    done by kernels that round differently, and a sample's score must not depend on how many others are
    evaluated with it."""

    @abstractmethod
    def sample(self, n: int, seed: int) -> Tensor:
        """`n` draws (n, *event), float64; draw i depends on (seed, i) only."""

    @abstractmethod
    def _levels(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """All that the law at (alpha, sigma) of shape (...) needs, packed: (..., numbers), float64."""

    @abstractmethod
    def _log_density(self, x: Tensor, level: Tensor) -> Tensor:
        """log p_t of flat x (batch, dim) at packed levels (1 or batch, numbers)."""

    @abstractmethod
    def _v(self, x: Tensor, level: Tensor) -> Tensor:
        """E[alpha eps - sigma x_0 | x] of flat x (batch, dim), rows a multiple of `_block`."""

    def log_prob(self, x: Tensor, process: GaussianSDE | None = None, t: Time | None = None) -> Tensor:
        """log p(x) (batch,), or log p_t(x) under `process` at time t (one, or one a sample).

        Raises:
            ValueError: x has another event shape, or only one of process and t is given.
        """
        self._check_event(x)
        if (process is None) != (t is None):
            raise ValueError("expected process and t together, for the noised density, or neither")
        if process is None or t is None:
            alpha = torch.ones((), dtype=torch.float64, device=x.device)
            sigma = torch.zeros_like(alpha)
        else:
            times = align(t, x)
            alpha, sigma = process.alpha(times), process.sigma(times)
        return self._log_density(x.flatten(1), _rows(self._levels(alpha, sigma)))

    def model(self, process: GaussianSDE) -> Model:
        """The exact model of this data under `process`, in the dtype of the states it is given."""
        if not isinstance(process, GaussianSDE):
            raise TypeError(f"expected a GaussianSDE, got {type(process).__name__}")

        return Model(self._exact_v, process, "v", partial(self._levels_at, process), expand=False)

    def _levels_at(self, process: GaussianSDE, t: Tensor) -> Tensor:
        return self._levels(process.alpha(t), process.sigma(t))

    def _exact_v(self, x: Tensor, level: Tensor) -> Tensor:
        self._check_event(x)
        flat, rows, batch = x.flatten(1), _rows(level), x.shape[0]
        extra = -batch % self._block
        if extra:
            flat = torch.cat([flat, flat[-1:].expand(extra, -1)])
            if rows.shape[0] > 1:
                rows = torch.cat([rows, rows[-1:].expand(extra, -1)])
        return self._v(flat, rows)[:batch].reshape(x.shape)

    def _check_event(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.event:
            raise ValueError(f"expected x of shape (batch, {', '.join(map(str, self.event))}), got {tuple(x.shape)}")


def _rows(level: Tensor) -> Tensor:
    """Packed levels as (1 or batch, numbers), whatever dimensions the times were aligned with."""
    return level.reshape(-1, level.shape[-1])


@checked_class
class GaussianMixture(Distribution):
    """A mixture sum_k w_k N(m_k, C_k) in any dimension.

    Args:
        means: (K, *event).
        covariances: (K, D, D) full, (K, D) diagonal, (K,) or a number isotropic (variances), with D
            the number of components of one sample.
        weights: (K,), positive; normalised here. None for equal weights.

    Raises:
        ValueError: shapes that do not fit, weights that are not positive, or a covariance that is not
            symmetric and positive semi-definite.
    """

    def __init__(self, means: Any, covariances: Any, weights: Any = None) -> None:
        means = numbers(means, "means")
        if means.ndim < 2:
            raise ValueError(f"expected means of shape (K, *event), got {tuple(means.shape)}")
        self.event = tuple(means.shape[1:])
        self.means = means.flatten(1)
        k, d = self.means.shape
        self.weights = _weights(weights, k)
        self.variances, self.axes = _eigen(numbers(covariances, "covariances"), k, d)
        self._rotated = self.means if self.axes is None else (self.means.unsqueeze(1) @ self.axes).squeeze(1)
        self._cast: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.means.shape[0]} components, event {self.event})"

    @property
    def mean(self) -> Tensor:
        """The mean of the distribution, float64 (*event,)."""
        return (self.weights @ self.means).reshape(self.event)

    @property
    def covariance(self) -> Tensor:
        """The covariance of the distribution, float64 (D, D)."""
        inside = torch.einsum("k,kij,kj,klj->il", self.weights, self._full_axes(), self.variances, self._full_axes())
        centred = self.means - self.mean.flatten()
        return inside + torch.einsum("k,ki,kj->ij", self.weights, centred, centred)

    def model(self, process: GaussianSDE | LinearSDE) -> Model:
        """The exact model of this data under `process`; its score, in float64 inside, for a LinearSDE."""
        if not isinstance(process, LinearSDE):
            return super().model(process)
        return Model(LinearLaw(self, process).score, process, "score", expand=False)

    def log_prob(self, x: Tensor, process: GaussianSDE | LinearSDE | None = None, t: Time | None = None) -> Tensor:
        if not isinstance(process, LinearSDE):
            return super().log_prob(x, process, t)
        if t is None:
            raise ValueError("expected process and t together, for the noised density, or neither")
        self._check_event(x)
        return LinearLaw(self, process).log_density(x, align(t, x))

    def _full_axes(self) -> Tensor:
        k, d = self.means.shape
        return torch.eye(d, dtype=torch.float64).expand(k, d, d) if self.axes is None else self.axes

    def sample(self, n: int, seed: int) -> Tensor:
        k, d = self.means.shape
        z = Noise(seed, n).normal(DATA, 0, (d + 1,), torch.float64)
        share = torch.special.ndtr(z[:, 0])
        which = torch.clamp(torch.searchsorted(self.weights.cumsum(0), share), max=k - 1)
        x = torch.sqrt(self.variances[which]) * z[:, 1:]
        if self.axes is not None:
            x = (self.axes[which] @ x.unsqueeze(-1)).squeeze(-1)
        return (self.means[which] + x).reshape(n, *self.event)

    def _levels(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Per component: alpha m (in its axes), precision 1/(alpha^2 l + sigma^2), the two factors of v, log norm."""
        k, d = self.means.shape
        a, s = (v[..., None, None] for v in (alpha, sigma))
        means, rotated, variances, weights = (
            v.to(alpha.device) for v in (self.means, self._rotated, self.variances, self.weights)
        )
        precision = 1 / (a**2 * variances + s**2)
        norm = torch.log(weights) + 0.5 * (torch.log(precision).sum(-1) - d * math.log(2 * math.pi))
        parts = (a * rotated, precision, a * s * (1 - variances) * precision, s * means)
        flat = [v.expand(*alpha.shape, k, d).flatten(-2) for v in parts]
        return torch.cat([*flat, norm], dim=-1)

    def _unpack(self, level: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The parts of `_levels`, samples last: four (K, D, 1 or batch) and one (K, 1 or batch)."""
        k, d = self.means.shape
        columns = level.to(dtype).T
        return (*columns[: 4 * k * d].reshape(4, k, d, -1).unbind(), columns[4 * k * d :])

    def _axes_like(self, x: Tensor) -> Tensor | None:
        """The components' axes in the dtype and on the device of x."""
        key = (x.dtype, x.device)
        if self.axes is not None and key not in self._cast:
            self._cast[key] = self.axes.to(device=x.device, dtype=x.dtype)
        return self._cast.get(key)

    # Samples are the last dimension inside: reductions over components then run along whole vectors,
    # several times faster than over a short last dimension. Rotations keep them first, where the
    # products of one sample do not depend on the number of others.

    def _whitened(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """x along each component's axes, from its centre (K, D, batch); log w_k N_k (K, batch); the level's parts."""
        axes, parts = self._axes_like(x), self._unpack(level, x.dtype)
        columns = x.T.contiguous() if axes is None else torch.matmul(x, axes).mT.contiguous()
        y = columns - parts[0]
        return y, parts[4] - 0.5 * (y.square() * parts[1]).sum(1), parts

    def _log_density(self, x: Tensor, level: Tensor) -> Tensor:
        return torch.logsumexp(self._whitened(x, level)[1], dim=0)

    def _v(self, x: Tensor, level: Tensor) -> Tensor:
        """sum_k r_k [alpha sigma U_k (1 - l_k)/(alpha^2 l_k + sigma^2) y_k - sigma m_k], r_k the responsibilities."""
        y, logits, (_, _, factor, means, _) = self._whitened(x, level)
        axes, share = self._axes_like(x), torch.softmax(logits, dim=0).unsqueeze(1)
        if axes is None:
            return (share * (factor * y - means)).sum(0).T
        pull = torch.matmul((share * factor * y).mT.contiguous(), axes.mT).sum(0)
        return pull - (share * means).sum(0).T


@checked_class
class Gaussian(GaussianMixture):
    """A Gaussian N(mean, C): the one problem whose flow and reverse SDE are affine maps.

    Args:
        mean: (*event,), or a number for one dimension.
        covariance: (D, D) full, (D,) diagonal, or a number, isotropic (variances).
    """

    def __init__(self, mean: Any, covariance: Any) -> None:
        mean = numbers(mean, "mean")
        covariance = numbers(covariance, "covariance")
        super().__init__(torch.atleast_1d(mean)[None], covariance[None])


@checked_class
class Empirical(Distribution):
    """Data points blurred by N(0, bandwidth^2 I): the exact score of a training set.

    The posterior mean is a softmax over all points (Karras et al. 2022, EDM, appendix B.3). Distances
    are formed in float64 whatever the dtype of x: float32 loses them below sigma = 0.01.

    Args:
        data: (N, *event).
        bandwidth: standard deviation around each point, >= 0.
    """

    _block = 16  # only matrix products and reductions along rows

    def __init__(self, data: Any, bandwidth: float = 0.0) -> None:
        data = numbers(data, "data")
        if data.ndim < 2 or data.shape[0] < 1:
            raise ValueError(f"expected data of shape (N, *event), got {tuple(data.shape)}")
        if not bool(torch.isfinite(data).all()):
            raise ValueError("expected finite data")
        if not 0 <= bandwidth <= LARGEST:
            raise ValueError(f"expected bandwidth >= 0, got {bandwidth!r} (at most {LARGEST:g})")
        self.event = tuple(data.shape[1:])
        self.data = data.flatten(1)
        self.bandwidth = float(bandwidth)
        self._centre = self.data.mean(0)
        self._centred = self.data - self._centre
        self._norms = (self._centred**2).sum(1)

    def __repr__(self) -> str:
        return f"Empirical({self.data.shape[0]} points, event {self.event}, bandwidth {self.bandwidth:g})"

    def sample(self, n: int, seed: int) -> Tensor:
        z = Noise(seed, n).normal(DATA, 0, (self.data.shape[1] + 1,), torch.float64)
        count = self.data.shape[0]
        which = torch.clamp((torch.special.ndtr(z[:, 0]) * count).long(), max=count - 1)
        return (self.data[which] + self.bandwidth * z[:, 1:]).reshape(n, *self.event)

    def _levels(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.stack([alpha, sigma, alpha**2 * self.bandwidth**2 + sigma**2], dim=-1)

    def _logits(self, x: Tensor, alpha: Tensor, variance: Tensor) -> Tensor:
        """-|x - alpha d_i|^2/(2 variance) (batch, N), float64."""
        y = x.to(torch.float64) - alpha * self._centre.to(x.device)
        square = (y**2).sum(1, keepdim=True) + alpha**2 * self._norms.to(x.device)
        return (y @ self._centred.T.to(x.device) * (2 * alpha) - square) / (2 * variance)

    def _log_density(self, x: Tensor, level: Tensor) -> Tensor:
        alpha, _, variance = (v.unsqueeze(1) for v in level.unbind(-1))
        constant = 0.5 * x.shape[1] * torch.log(2 * math.pi * variance).squeeze(1)
        return torch.logsumexp(self._logits(x, alpha, variance), dim=1) - constant - math.log(self.data.shape[0])

    def _v(self, x: Tensor, level: Tensor) -> Tensor:
        alpha, sigma, variance = (v.unsqueeze(1) for v in level.unbind(-1))
        share = torch.softmax(self._logits(x, alpha, variance), dim=1)
        mean = share @ self.data.to(x.device)
        pull = alpha * sigma * (1 - self.bandwidth**2) / variance * (x - alpha * mean)
        return (pull - sigma * mean).to(x.dtype)


def _check_size(**sizes: float) -> None:
    """Refuse what cannot be squared."""
    for name, size in sizes.items():
        if not abs(size) <= LARGEST:
            raise ValueError(f"expected {name} of at most {LARGEST:g}, got {size!r}")


@checked
def EightGaussians(radius: float = 2.0, std: float = 0.15) -> GaussianMixture:
    """Eight equal Gaussians on a circle in the plane."""
    _check_size(radius=radius, std=std)
    angle = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], dim=1), std**2)


@checked
def TwoMoons(std: float = 0.1, components: int = 16) -> GaussianMixture:
    """Two interleaved half circles of radius 1 in the plane, each a chain of Gaussians."""
    _check_size(std=std)
    if not 1 <= components <= 1_000_000:
        raise ValueError(f"expected components >= 1, got {components} (at most a million)")
    angle = math.pi * (torch.arange(components, dtype=torch.float64) + 0.5) / components
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    return GaussianMixture(torch.cat([upper, lower]) - torch.tensor([0.5, 0.25], dtype=torch.float64), std**2)


def _weights(weights: Any, k: int) -> Tensor:
    weights = torch.ones(k, dtype=torch.float64) if weights is None else numbers(weights, "weights")
    if weights.shape != (k,) or not bool((weights > 0).all() and torch.isfinite(weights).all()):
        raise ValueError(f"expected {k} positive weights, got {weights.tolist()}")
    return weights / weights.sum()


def _eigen(covariances: Tensor, k: int, d: int) -> tuple[Tensor, Tensor | None]:
    """(eigenvalues (K, D), eigenvectors (K, D, D) or None for the coordinate axes)."""
    if covariances.shape == (k, d, d):
        scale = covariances.abs().amax()
        if not bool(torch.isfinite(scale)):
            raise ValueError("expected finite covariances, got NaN or infinity")
        if not torch.allclose(covariances, covariances.mT, rtol=0, atol=float(1e-10 * scale)):
            raise ValueError("expected symmetric covariances")
        variances, axes = torch.linalg.eigh(covariances)
        floor = -1e-10 * scale
    elif covariances.ndim == 0 or covariances.shape in ((k,), (k, d)):
        column = covariances if covariances.ndim != 1 else covariances[:, None]
        variances, axes, floor = column.expand(k, d).clone(), None, torch.zeros(())
    else:
        raise ValueError(
            f"expected covariances of shape ({k}, {d}, {d}), ({k}, {d}), ({k},) or a number, "
            f"got {tuple(covariances.shape)}"
        )
    if not bool((variances >= floor).all()):
        raise ValueError(f"expected covariances without negative eigenvalues, got one of {float(variances.min()):g}")
    return variances.clamp(min=0), axes
