"""Partial sums of independent units: what a range of indices gives, and how ranges are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.engine.base import Engine


class Drawn(NamedTuple):
    """Units that were simulated.

    Attributes:
        values: float64 (n, k).
        ok: bool (n,), False for a unit with a sample that failed or a value that is not finite.
        calls: model calls, summed over the samples.
    """

    values: Tensor
    ok: Tensor
    calls: float


def concatenated(parts: Sequence[Drawn]) -> Drawn:
    """Units of adjacent ranges, in order."""
    return Drawn(torch.cat([p.values for p in parts]), torch.cat([p.ok for p in parts]), sum(p.calls for p in parts))


class SamplesFailed(ArithmeticError):
    """Units with a sample that failed, or a functional that is not finite.

    Attributes:
        calls: model calls made until then.
    """

    def __init__(self, message: str, calls: float = 0.0) -> None:
        super().__init__(message)
        self.calls = calls


Units = Callable[[int, int], Drawn]
"""`units(a, b)`: the units of indices a..b-1; a pure function, so that any range can be computed anywhere."""


class Sums(NamedTuple):
    """Of units: how many, how many of them failed, their calls, and mean and sum of squared deviations (k,)."""

    size: int
    failed: int
    calls: float
    mean: Tensor
    squares: Tensor

    @property
    def good(self) -> int:
        """Units that did not fail."""
        return self.size - self.failed

    @property
    def variance(self) -> Tensor:
        """The sample variance (k,) of a unit; NaN of fewer than two."""
        return self.squares / (self.good - 1) if self.good > 1 else torch.full_like(self.squares, torch.nan)


def sums_of(drawn: Drawn) -> Sums:
    """The sums of a range; failed units are only counted."""
    good = drawn.values[drawn.ok]
    mean = good.mean(0) if len(good) else torch.zeros_like(drawn.values[0])
    return Sums(len(drawn.ok), len(drawn.ok) - len(good), drawn.calls, mean, (good - mean).square().sum(0))


def merge(first: Sums, second: Sums) -> Sums:
    """The sums of two disjoint ranges (Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance)."""
    n, m = first.good, second.good
    gap, share = second.mean - first.mean, m / max(n + m, 1)
    return Sums(
        first.size + second.size,
        first.failed + second.failed,
        first.calls + second.calls,
        first.mean + share * gap,
        first.squares + second.squares + n * share * gap.square(),
    )


def sums_in(units: Units, bounds: tuple[int, int]) -> Sums:
    """The sums of one range of indices."""
    return sums_of(units(*bounds))


class Gather(NamedTuple):
    """How sums are come by: `gather(units, first, last, block)`.

    Attributes:
        throw: whether a unit that failed is an error.
        engine: where ranges are computed; in this process unless given.
    """

    throw: bool = True
    engine: Engine | None = None

    def __call__(self, units: Units, first: int, last: int, block: int) -> Sums:
        """The sums of the indices first..last-1, computed `block` at a time and joined in order.

        Raises:
            SamplesFailed: a unit failed, and `throw` is set.
        """
        ranges = ((a, min(a + block, last)) for a in range(first, last, block))
        work = partial(sums_in, units)
        if self.engine is None:
            return joined(map(work, ranges), self.throw)
        return joined(in_order(self.engine.map(work, ranges), first), self.throw)


def in_order(parts: Iterable[tuple[tuple[int, int], Sums]], first: int) -> Iterator[Sums]:
    """The sums of adjacent ranges (a, b) from `first` on, that come in any order."""
    waiting: dict[int, tuple[int, Sums]] = {}
    for (a, b), sums in parts:
        waiting[a] = b, sums
        while first in waiting:
            first, ready = waiting.pop(first)
            yield ready


def joined(parts: Iterable[Sums], throw: bool) -> Sums:
    """The sums of all parts; errors as `Gather`."""
    total: Sums | None = None
    for part in parts:
        total = part if total is None else merge(total, part)
        refuse_failed(total.failed, total.size, throw, total.calls)
    assert total is not None
    return total


def refuse_failed(failed: int, count: int, throw: bool, calls: float = 0.0) -> None:
    """Raise if a unit failed and `throw` is set, or if all did; after so many model calls."""
    if failed and (throw or failed == count):
        way = "" if failed == count else "; pass throw=False to get the mean over the others, with their number"
        raise SamplesFailed(
            f"{failed} of {count} samples (or pairs) failed: the solve did not finish, or the functional is not "
            f"finite{way}",
            calls,
        )
