"""Brownian paths asked for in any order: the tree in time, which halves a span.

Every normal belongs to a node, so it does not matter in which order, or whether, other nodes are asked for
(the formulas of a split are in `sdeflow.bridge`).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sdeflow import bridge
from sdeflow.bridge import Increment, NodeNormals, Split, as_split, join, only_row, rows_of
from sdeflow.checked import checked_class, event_shape
from sdeflow.noise import Noise

DEPTH = 40
"""Levels of the tree in time: times are told apart down to 2^-40 (1e-12) of its span."""


class TreeWalk:
    """The increments over any grid of one span, in order, from the tree that halves the span: one path for all grids.

    An interval is the join of the tree's nodes inside it, so a time that is no fraction of a power of 2 costs up
    to `DEPTH` splits. Memory: `DEPTH` increments.
    """

    def __init__(
        self, noise: Noise, times: Tensor, event: tuple[int, ...] | torch.Size, dtype: torch.dtype, areas: bool
    ) -> None:
        self.lengths = torch.diff(times).abs()
        self._normals = NodeNormals(noise, 1, event, dtype, areas=True)
        self._areas, self._dtype = areas, dtype
        clock = (times - times[0]).abs().numpy()
        self._span = float(clock[-1])
        self._ticks = _ticks(clock, 0.0, self._span)
        # the intervals still ahead, the nearest last: (level, position, increment)
        self._root = (0, 0, self._normals.root(self._span))
        self._ahead: list[tuple[int, int, Increment]] = [self._root]
        self._k, self._last = -1, self._root[2]

    def __call__(self, k: int) -> Increment:
        if k < self._k:  # back, by way of the root
            self._ahead, self._k = [self._root], -1
        if k > self._k:
            if k > self._k + 1:
                self._until(self._ticks[k])
            self._k, self._last = k, self._until(self._ticks[k + 1])
        w, h = self._last
        return only_row(Increment(w.to(self._dtype), h.to(self._dtype) if self._areas and h is not None else None))

    def _until(self, tick: int) -> Increment:
        passed: Increment | None = None
        length = 0.0
        while self._ahead:
            level, position, part = self._ahead.pop()
            width = 1 << (DEPTH - level)
            if position * width >= tick:
                self._ahead.append((level, position, part))
                break
            if (position + 1) * width > tick:
                left, right = _halves(self._normals, level, position, part, self._span)
                self._ahead += [(level + 1, 2 * position + 1, right), (level + 1, 2 * position, left)]
                continue
            own = self._span * 2.0**-level
            part = _increment(part, level)
            passed = part if passed is None else join(passed, length, part, own)
            length += own
        if passed is None:  # an interval below the resolution
            zero = torch.zeros_like(self._last.w)
            return Increment(zero, zero)
        return passed


def _ticks(clock: np.ndarray, start: float, span: float) -> list[int]:
    return np.rint((clock - start) / (span or 1.0) * 2.0**DEPTH).astype(np.int64).tolist()


def split_halves(normals: NodeNormals, nodes: tuple[Tensor, Tensor], whole: Increment, length: Tensor) -> Increment:
    """The halves (2, batch, *event) of one node (1, batch, *event) a sample, as increments.

    Args:
        nodes: (level, place) of their middles, (batch,) each.
        length: of the wholes, (batch,).
    """
    z1, z2, _ = normals.of(normals.words(*nodes)[None], torch.zeros(1, dtype=torch.int64))
    whole_length = length.cpu().numpy()
    half, shape = 0.5 * whole_length, (1, -1, *[1] * (z1.ndim - 2))
    columns = bridge.split_coefficients(half, half, whole_length, True)
    c = as_split([torch.from_numpy(v).reshape(shape).to(z1) for v in columns], halves=True)
    parts = bridge.split(whole, c, z1, z2)
    return Increment(parts.w.mul_(0.5), parts.h)


def _halves(
    normals: NodeNormals, level: int, position: int, part: Increment, span: float
) -> tuple[Increment, Increment]:
    """The halves of a node of the tree in time. Its normals are those of a `GridWalk` of 2^k equal intervals."""
    words = normals.words(np.array([level + 1]), np.array([position]))
    z1, z2, _ = normals.of(words, torch.zeros(1, dtype=torch.int64))
    parts = bridge.split(part, _halving(span, level, z1.dtype, z1.device), z1, z2)
    return rows_of(parts, slice(0, 1)), rows_of(parts, slice(1, 2))


@lru_cache(maxsize=256)
def _halving(span: float, level: int, dtype: torch.dtype, device: torch.device) -> Split:
    half = np.array(span * 2.0 ** -(level + 1))
    with torch.inference_mode(False):
        columns = bridge.split_coefficients(half, half, span, True)
        return as_split([torch.tensor(float(v), dtype=dtype, device=device) for v in columns], halves=True)


def _increment(part: Increment, level: int) -> Increment:
    """Of a node of the tree in time, which holds W over its length as a share of the span."""
    return Increment(part.w * 2.0**-level, part.h)


@checked_class
class BrownianPath:
    """Brownian motion of a batch of samples on a span, asked for in any order.

    W(s, t) and its area are functions of (seed, sample index, span, s, t) alone, additive over adjacent intervals to
    rounding, with the exact joint law of times told apart by 2^-40 of the span. Nothing is stored between
    queries: O(40) increments of memory in one, no recursion. It is the path that `solve(..., noise=SamePath(seed))`
    integrates on that span.

    Args:
        seed: an integer of 64 bits.
        shape: (batch, *event) of an increment.
        span: (start, end), start < end.
        index: the samples' indices: an offset, or one a sample.
        dtype: float64 or float32; the numbers agree up to rounding.
        antithetic: samples 2j and 2j + 1 get opposite paths.
    """

    def __init__(
        self,
        seed: int,
        shape: tuple[int, ...],
        span: tuple[float, float] = (0.0, 1.0),
        *,
        index: int | Tensor | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        antithetic: bool = False,
    ) -> None:
        if len(shape) < 1 or any(n < 1 for n in shape):
            raise ValueError(f"expected shape as (batch, *event), got {shape!r}")
        event_shape(shape)
        start, end = (float(v) for v in span)
        if not (math.isfinite(start) and math.isfinite(end) and start < end):
            raise ValueError(f"expected a span (start, end) with start < end, got {span!r}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"expected float32 or float64, got {dtype}")
        noise = Noise(seed, shape[0], index=index, device=device, antithetic=antithetic)
        self._normals = NodeNormals(noise, 1, tuple(shape[1:]), dtype, areas=True)
        self._start, self._length = start, end - start
        self._root = self._normals.root(self._length)

    def __call__(self, s: float, t: float) -> Tensor:
        """W_t - W_s, (batch, *event); minus that of (t, s) for s > t."""
        return self.with_area(s, t).w

    def integral(self, s: float, t: float) -> Tensor:
        """I_(1,0) = int_s^t (W_u - W_s) du, for s < t."""
        w, h = self.with_area(s, t)
        assert h is not None
        return (t - s) * (0.5 * w + h)

    def with_area(self, s: float, t: float) -> Increment:
        """(W, H) of the interval; for s > t, W changes its sign and H does not.

        Raises:
            ValueError: a time outside the span.
        """
        low, high = sorted((float(s), float(t)))
        slack = 1e-12 * self._length
        if not (self._start - slack <= low and high <= self._start + self._length + slack):
            raise ValueError(
                f"expected times in [{self._start:g}, {self._start + self._length:g}], got {s:g} and {t:g}"
            )
        a, b = _ticks(np.array([low, high]), self._start, self._length)
        parts: list[tuple[Increment, float]] = []
        ahead = [(0, 0, self._root)]
        while ahead:
            level, position, part = ahead.pop()
            width = 1 << (DEPTH - level)
            first, last = position * width, (position + 1) * width
            if last <= a or first >= b:
                continue
            if a <= first and last <= b:
                parts.append((_increment(part, level), self._length * 2.0**-level))
                continue
            left, right = _halves(self._normals, level, position, part, self._length)
            ahead += [(level + 1, 2 * position + 1, right), (level + 1, 2 * position, left)]
        if not parts:
            zero = torch.zeros_like(self._root.w)
            return only_row(Increment(zero, zero))
        whole, length = parts[0]
        for part, own in parts[1:]:
            whole = join(whole, length, part, own)
            length += own
        return only_row(whole if s <= t else Increment(-whole.w, whole.h))
