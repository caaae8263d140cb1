"""Sums of powers and products: mean, variance, skewness, kurtosis, covariance, Frechet distance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

from sdeflow.checked import checked_class, described, numbers, tensor
from sdeflow.metrics import w2_gaussian
from sdeflow.statistics.base import Statistic, checked_block
from sdeflow.statistics.exact import ExactSum


class _Sums(Statistic):
    """Sums over blocks, of one shape."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: ExactSum | None = None

    def _take(self, sums: Tensor, count: int) -> None:
        if self._sums is None:
            self._sums = ExactSum(tuple(sums.shape))
        self._sums.add(sums)
        self.count += count

    def merge(self, other: Self) -> None:
        self._refuse_other(other)
        if other._sums is None:
            return
        if self._sums is None:
            self._sums = ExactSum(other._sums.shape)
        self._sums.merge(other._sums)
        self.count += other.count

    def arrays(self) -> dict[str, Tensor]:
        held = {"samples": torch.tensor(self.count)}
        if self._sums is not None:
            held |= {"shape": torch.tensor(self._sums.shape), **self._sums.arrays()}
        return held

    def load(self, arrays: Mapping[str, Tensor]) -> None:
        self.count, self._sums = int(arrays["samples"]), None
        if "shape" in arrays:
            self._sums = ExactSum(tuple(arrays["shape"].tolist()))
            self._sums.load(dict(arrays))


def _centre(centre: float | Tensor) -> Tensor:
    """The centre, float64."""
    made = numbers(centre, "centre").detach()
    if made.numel() == 0 or not bool(torch.isfinite(made).all()):
        raise ValueError(f"expected a finite centre, got {described(centre)}")
    return made


def _centred(x: Tensor, centre: Tensor) -> Tensor:
    """x - centre, which must fit the event."""
    fits = zip(centre.shape[::-1], x.shape[:0:-1], strict=False)
    if (centre.ndim >= x.ndim and centre.ndim) or any(size not in (1, of_x) for size, of_x in fits):
        raise ValueError(f"expected a centre of the event's shape {tuple(x.shape[1:])}, got {tuple(centre.shape)}")
    return x - centre


def _rows(x: Tensor) -> Tensor:
    """Events as rows (n, D); of numbers (n,), D = 1."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


@checked_class
class Moments(_Sums):
    """Mean, variance, skewness and kurtosis of each component, from sums of (x - centre)^k, k = 1..order.

    The variance is that about the mean, with n - 1. It loses about (mean - centre)^2/variance roundings: for samples
    far from 0 give a centre near them.

    Args:
        order: 1 for the mean alone, 2 with the variance, 4 with skewness and kurtosis.
        centre: a number, or a tensor of the event's shape.
    """

    def __init__(self, order: int = 2, *, centre: float | Tensor = 0.0) -> None:
        if order not in (1, 2, 3, 4):
            raise ValueError(f"expected an order from 1 to 4, got {order!r}")
        super().__init__()
        self.order, self.centre = order, _centre(centre)

    def empty(self) -> Self:
        return type(self)(self.order, centre=self.centre)

    def add(self, x: Tensor) -> None:
        x = _centred(checked_block(x, None if self._sums is None else self._sums.shape[1:]), self.centre)
        if len(x) == 0:
            return
        self._take(torch.stack([(x**k).sum(0) for k in range(1, self.order + 1)]), len(x))

    def _raw(self, least: int) -> list[Tensor]:
        """E[(x - centre)^k], k = 1..order."""
        if self._sums is None or self.count < least:
            raise ValueError(f"expected at least {least} samples, got {self.count}")
        return list(self._sums.value() / self.count)

    def _need(self, order: int) -> None:
        if self.order < order:
            raise ValueError(f"this needs Moments({order}), got Moments({self.order})")

    @property
    def mean(self) -> Tensor:
        """float64, of the event's shape."""
        return self._raw(1)[0] + self.centre

    @property
    def variance(self) -> Tensor:
        """About the mean, divided by n - 1."""
        self._need(2)
        first, second = self._raw(2)[:2]
        return (second - first**2).clamp(min=0) * (self.count / (self.count - 1))

    @property
    def stderr(self) -> Tensor:
        """Of the mean: sqrt(variance/n)."""
        return (self.variance / self.count).sqrt()

    @property
    def skewness(self) -> Tensor:
        """E[(x - mean)^3]/std^3, with n."""
        self._need(3)
        m1, m2, m3 = self._raw(2)[:3]
        return (m3 - 3 * m1 * m2 + 2 * m1**3) / (m2 - m1**2) ** 1.5

    @property
    def kurtosis(self) -> Tensor:
        """E[(x - mean)^4]/variance^2, with n: 3 for a Gaussian."""
        self._need(4)
        m1, m2, m3, m4 = self._raw(2)
        return (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / (m2 - m1**2) ** 2


@checked_class
class Covariance(_Sums):
    """Mean and covariance of the flattened event, D numbers, from sums of x and x x^T.

    Args:
        centre: subtracted first, a number or a tensor of the event's shape: see `Moments`.
    """

    def __init__(self, *, centre: float | Tensor = 0.0) -> None:
        super().__init__()
        self.centre = _centre(centre)

    def empty(self) -> Self:
        return type(self)(centre=self.centre)

    def add(self, x: Tensor) -> None:
        x = _rows(_centred(checked_block(x, None), self.centre))
        if len(x) == 0:
            return
        if self.centre.numel() not in (1, x.shape[1]):
            raise ValueError(f"expected a centre of 1 or {x.shape[1]} numbers, got {tuple(self.centre.shape)}")
        if self._sums is not None and self._sums.shape[1] != x.shape[1]:
            raise ValueError(f"expected events of {self._sums.shape[1]} numbers, got {x.shape[1]}")
        self._take(torch.cat([x.sum(0)[None], x.T @ x]), len(x))

    @property
    def mean(self) -> Tensor:
        """float64 (D,)."""
        return self._moments()[0]

    @property
    def covariance(self) -> Tensor:
        """float64 (D, D), divided by n - 1."""
        return self._moments()[1]

    def _moments(self) -> tuple[Tensor, Tensor]:
        if self._sums is None or self.count < 2:
            raise ValueError(f"expected at least 2 samples, got {self.count}")
        total = self._sums.value()
        mean = total[0] / self.count
        covariance = (total[1:] - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean + self.centre.flatten(), covariance


@checked_class
class Frechet(Covariance):
    """Mean and covariance of features of the samples, and the Frechet distance between two of them.

    Args:
        features: of a block (n, *event), to (n, k): an importable function or a network; None for the samples.
    """

    def __init__(self, features: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        if features is not None and not callable(features):
            raise TypeError(f"expected features to be a function of a block, got {features!r}")
        self.features = features

    def empty(self) -> Self:
        return type(self)(self.features)

    def add(self, x: Tensor) -> None:
        if len(x) == 0:
            return
        with torch.no_grad():
            value = _rows(x) if self.features is None else self.features(x)
        if not tensor(value) or value.ndim != 2 or len(value) != len(x):
            raise ValueError(f"expected features ({len(x)}, k), got {described(value)}")
        super().add(value)

    def distance(self, other: Covariance) -> float:
        """The squared 2-Wasserstein distance of the Gaussians with the two's moments.

        (Heusel et al. 2017, GANs trained by a two time-scale update rule, equation 6; see `metrics.frechet`.)
        """
        return w2_gaussian(self.mean, self.covariance, other.mean, other.covariance) ** 2
