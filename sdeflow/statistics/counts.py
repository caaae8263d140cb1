"""Counts in bins: histograms, and quantiles to a relative accuracy. Integers, so that merging is exact."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from sdeflow.checked import checked, checked_class, numbers
from sdeflow.statistics.base import Statistic, checked_block


class _Counts(Statistic):
    """Counts (components, bins) of the flattened event; what is not a number is counted apart."""

    def __init__(self) -> None:
        self.count = 0
        self.nans = 0
        self._event: tuple[int, ...] | None = None
        self._counts = np.zeros((0, 0), dtype=np.int64)

    @abstractmethod
    def _bins(self) -> int:
        """How many bins there are."""

    @abstractmethod
    def _bin(self, x: np.ndarray) -> np.ndarray:
        """The bin of each value."""

    def add(self, x: Tensor) -> None:
        x = checked_block(x, self._event)
        if len(x) == 0:
            return
        if self._event is None:
            self._event = tuple(x.shape[1:])
            self._counts = np.zeros((math.prod(self._event), self._bins()), dtype=np.int64)
        values = x.reshape(len(x), -1).numpy()
        bins, width = self._bin(values), self._bins()
        known = ~np.isnan(values)
        places = (np.arange(values.shape[1]) * width + bins)[known]
        self._counts += np.bincount(places, minlength=self._counts.size).reshape(self._counts.shape)
        self.nans += int((~known).sum())
        self.count += len(x)

    def merge(self, other: Self) -> None:
        self._refuse_other(other)
        if other._event is None:
            return
        if self._event is None:
            self._event, self._counts = other._event, np.zeros_like(other._counts)
        if other._event != self._event:
            raise ValueError(f"expected counts of events {self._event}, got {other._event}")
        self._counts += other._counts
        self.nans += other.nans
        self.count += other.count

    def arrays(self) -> dict[str, Tensor]:
        held = {"samples": torch.tensor([self.count, self.nans])}
        if self._event is not None:
            held["event"] = torch.tensor(self._event, dtype=torch.int64)
            held["counts"] = torch.from_numpy(self._counts.copy())
        return held

    def load(self, arrays: Mapping[str, Tensor]) -> None:
        self.count, self.nans = (int(n) for n in arrays["samples"])
        self._event = None
        if "counts" in arrays:
            self._event, self._counts = tuple(arrays["event"].tolist()), arrays["counts"].numpy().copy()


class Histogram(_Counts):
    """Counts between given edges, a component: [edges[k], edges[k+1]), the last closed; and what lies outside.

    Args:
        edges: at least two increasing numbers.
    """

    def __init__(self, edges: Sequence[float] | Tensor) -> None:
        super().__init__()
        self.edges = numbers(edges, "edges").detach().to("cpu")
        if self.edges.ndim != 1 or len(self.edges) < 2 or not bool((self.edges[1:] > self.edges[:-1]).all()):
            raise ValueError("expected at least two increasing edges")

    def empty(self) -> Self:
        return type(self)(self.edges)

    def _bins(self) -> int:
        return len(self.edges) + 1

    def _bin(self, x: np.ndarray) -> np.ndarray:
        edges = self.edges.numpy()
        bins = np.searchsorted(edges, x, side="right")
        return np.where(x == edges[-1], len(edges) - 1, bins)

    @property
    def counts(self) -> Tensor:
        """int64 (*event, bins), between the edges."""
        return self._read()[..., 1:-1]

    @property
    def below(self) -> Tensor:
        """int64 (*event): of values under the first edge."""
        return self._read()[..., 0]

    @property
    def above(self) -> Tensor:
        """int64 (*event): of values over the last edge."""
        return self._read()[..., -1]

    def _read(self) -> Tensor:
        if self._event is None:
            raise ValueError("expected at least one sample, got none")
        return torch.from_numpy(self._counts.copy()).reshape(*self._event, -1)


_LEAST = 1e-150
"""A magnitude whose ratio to its reciprocal is a number."""


@checked_class
class Quantiles(_Counts):
    """Quantiles of each component to a relative accuracy, from counts in geometric bins.

    Bin k > 0 holds gamma^(k-1) < |x|/least <= gamma^k, gamma = (1 + accuracy)/(1 - accuracy), apart for each sign, and
    says 2 gamma^k/(gamma + 1): within `accuracy` of all it holds (Masson, Rim and Lee 2019, DDSketch, section 2.1).

    Args:
        accuracy: relative, in (0, 1).
        least, most: magnitudes told apart: below `least` is 0, above `most` is `most`.
    """

    def __init__(self, accuracy: float = 0.01, *, least: float = 1e-9, most: float = 1e9) -> None:
        super().__init__()
        if not 1e-6 <= accuracy < 1 or not _LEAST <= least < most <= 1 / _LEAST:
            raise ValueError(
                f"expected accuracy in (0, 1), at least 1e-6, and 0 < least < most, from {_LEAST:g} to "
                f"{1 / _LEAST:g}, got {accuracy!r}, {least!r} and {most!r}"
            )
        self.accuracy, self.least, self.most = float(accuracy), float(least), float(most)
        self._log = math.log((1 + accuracy) / (1 - accuracy))
        self._side = math.ceil(math.log(most / least) / self._log) + 1

    def empty(self) -> Self:
        return type(self)(self.accuracy, least=self.least, most=self.most)

    def _bins(self) -> int:
        return 2 * self._side + 1

    def _bin(self, x: np.ndarray) -> np.ndarray:
        size = np.clip(np.abs(np.nan_to_num(x)), 0, self.most)
        with np.errstate(divide="ignore"):
            k = np.ceil(np.log(size / self.least) / self._log)
        k = np.where(size < self.least, 0, np.clip(k, 1, self._side)).astype(np.int64)
        return self._side + np.where(x < 0, -k, k)

    @checked
    def quantile(self, q: float) -> Tensor:
        """The q-quantile of each component, float64 (*event): the value of rank floor(q (n - 1)).

        Raises:
            ValueError: q outside of [0, 1], or no samples.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"expected q in [0, 1], got {q!r}")
        if self._event is None:
            raise ValueError("expected at least one sample, got none")
        total = self._counts.cumsum(1)
        rank = np.floor(q * (total[:, -1:] - 1))
        k = (total > rank).argmax(1) - self._side
        gamma = math.exp(self._log)
        size = self.least * 2 * gamma ** np.abs(k) / (gamma + 1)
        value = np.where(k == 0, 0.0, np.sign(k) * np.minimum(size, self.most))
        value = np.where(total[:, -1] == 0, np.nan, value)
        return torch.from_numpy(value).reshape(self._event)

    @property
    def median(self) -> Tensor:
        """The quantile of 1/2."""
        return self.quantile(0.5)
