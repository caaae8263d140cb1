"""Brownian paths from counter-based normals: increments W and space-time areas H, by splitting intervals.

On an interval of length L that starts at s, W = W_t - W_s ~ N(0, L) and
H = (1/L) int_s^t (W_u - W_s - (u - s)/L W) du ~ N(0, L/12), independent; I_(1,0) = int (W_u - W_s) du = L (W/2 + H).
A node of a tree splits an interval into a left part of length p and a right part of length q by the exact
conditional law given what is known of the whole (Foster, Lyons and Oberhauser 2020, An optimal polynomial
approximation of Brownian motion; the formulas for unequal parts are derived in docs/noise.md):

    U = (6 p q / L^2) H + sqrt((p q / L) (1 - 3 p q / L^2)) z_1,   W_1 = (p/L) W + U,   W_2 = (q/L) W - U,
    S = H - U/2,   H_1 = p^2 L/(p^3 + q^3) S + q k z_2,   H_2 = q^2 L/(p^3 + q^3) S - p k z_2,
    k = sqrt(p q / (12 (p^3 + q^3)));   without areas U = sqrt(p q / L) z_1.

Every normal belongs to a node, so it does not matter in which order, or whether, other nodes are asked for.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sdeflow.noise import AREA, BLOCK, PATH, Noise

DEPTH = 40
"""Levels of the tree in time: times are told apart down to 2^-40 (1e-12) of its span."""
_ROOT_LEVEL = 63


class Increment(NamedTuple):
    """W and H of an interval, each (batch, *event); H is None where areas are not asked for."""

    w: Tensor
    h: Tensor | None


class Walk(Protocol):
    """`walk(k)`: the increment over the k-th interval of a grid; k in order, some may be left out."""

    lengths: Tensor
    """The lengths (variances of W) of the intervals, float64 (steps,)."""

    def __call__(self, k: int) -> Increment: ...


class Split(NamedTuple):
    """Coefficients of splits of lengths p, q: arrays, or numbers."""

    left: Tensor | float
    right: Tensor | float
    lift: Tensor | float
    std: Tensor | float
    keep_left: Tensor | float
    keep_right: Tensor | float
    tilt_left: Tensor | float
    tilt_right: Tensor | float


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def split_coefficients(p: np.ndarray, q: np.ndarray, areas: bool) -> tuple[np.ndarray, ...]:
    """The coefficients of the module's formulas for lengths p, q >= 0 (float64), in the order of `Split`."""
    whole = p + q
    a, b = _ratio(p, whole), _ratio(q, whole)  # p/L, q/L
    if not areas:
        zero = np.zeros_like(a)
        return a, b, zero, np.sqrt(p * b), zero, zero, zero, zero
    cubes = a**3 + b**3
    cubes = np.where(cubes > 0, cubes, 1.0)
    tilt = np.sqrt(a * b * whole / (12 * cubes))
    return a, b, 6 * a * b, np.sqrt(p * b * (1 - 3 * a * b)), a**2 / cubes, b**2 / cubes, b * tilt, a * tilt


def split(whole: Increment, c: Split, z1: Tensor, z2: Tensor | None) -> Increment:
    """Intervals (nodes, ...) in their two parts, (2 nodes, ...) in order; z1 and (for areas) z2 are used up.

    One rounding after another, whatever shape the coefficients have: the bits do not depend on how many are split.
    """
    if whole.h is None or z2 is None:
        return Increment(_parts(whole.w, c.left, c.right, z1.mul_(c.std)), None)
    u = (whole.h * c.lift).add_(z1.mul_(c.std))
    s = whole.h - 0.5 * u
    h = whole.h.new_empty((2 * len(s), *s.shape[1:]))
    torch.mul(s, c.keep_left, out=h[0::2]).add_(z2 * c.tilt_left)
    torch.mul(s, c.keep_right, out=h[1::2]).sub_(z2.mul_(c.tilt_right))
    return Increment(_parts(whole.w, c.left, c.right, u), h)


def _parts(w: Tensor, left: Tensor | float, right: Tensor | float, u: Tensor) -> Tensor:
    out = w.new_empty((2 * len(w), *w.shape[1:]))
    torch.mul(w, left, out=out[0::2]).add_(u)
    torch.mul(w, right, out=out[1::2]).sub_(u)
    return out


def _only(one: Increment) -> Increment:
    """The increment (batch, *event) of the only interval of (1, batch, *event)."""
    return Increment(one.w[0], None if one.h is None else one.h[0])


def join(first: Increment, p: float, second: Increment, q: float) -> Increment:
    """The increment over two adjacent intervals of lengths p, q (Chen's relation)."""
    w = first.w + second.w
    if first.h is None or second.h is None:
        return Increment(w, None)
    whole = p + q
    return Increment(w, (p * first.h + q * second.h) / whole + (q * first.w - p * second.w) / (2 * whole))


class NodeNormals:
    """The normals of nodes (level, position) of one tree of a noise."""

    def __init__(
        self, noise: Noise, tree: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype, areas: bool
    ) -> None:
        self.noise, self.event, self.dtype, self.areas = noise, tuple(event), dtype, areas
        self._stream = AREA if areas else PATH
        self._tree = tree
        self._size = math.prod(self.event)

    def of(self, levels: np.ndarray | Tensor, positions: np.ndarray | Tensor) -> tuple[Tensor, Tensor | None]:
        """(z1, z2) of nodes (nodes,), or of one node a sample (1, batch): (nodes, batch, *event) each."""
        # one word a node: the level in 6 bits, the position in 41, the tree's number (odd) hashed over all of them
        words = (torch.as_tensor(positions) << 6) | torch.as_tensor(levels)
        words = words ^ (self._tree >> 1) * 0x5851F42D4C957F2D % (1 << 62)
        if not self.areas:
            return self.noise.draw(self._stream, words, self.event, self.dtype), None
        flat = self.noise.draw(self._stream, words, (2 * self._size,), self.dtype)
        shape = (*flat.shape[:-1], *self.event)
        return flat[..., : self._size].reshape(shape), flat[..., self._size :].reshape(shape)

    def take(self, rows: Tensor) -> NodeNormals:
        """The same for some samples of the batch."""
        part = copy.copy(self)
        part.noise = self.noise.take(rows)
        return part

    def root(self, length: float) -> Increment:
        """The whole span, (1, batch, *event)."""
        z1, z2 = self.of(np.array([_ROOT_LEVEL]), np.array([0]))
        return Increment(z1 * math.sqrt(length), None if z2 is None else z2 * math.sqrt(length / 12))


class GridWalk:
    """The increments over a grid of m 2^k intervals (m odd), in order, at about one normal an interval.

    The m groups of 2^k intervals are the leaves of a balanced tree over the whole, each group is halved k times; a
    grid with every interval halved is the same tree, one level deeper: the same path. Memory: one block of numbers
    and log2(intervals) increments.
    """

    def __init__(
        self, noise: Noise, lengths: Tensor, event: tuple[int, ...] | torch.Size, dtype: torch.dtype, areas: bool
    ) -> None:
        self.lengths = lengths
        self._clock = np.concatenate([np.zeros(1), np.cumsum(lengths.numpy())])
        count = len(lengths)
        self._group = count & -count
        self._levels = int(self._group).bit_length() - 1
        self._normals = NodeNormals(noise, count // self._group, event, dtype, areas)
        numbers = max(1, noise.index.numel() * math.prod(event) * (2 if areas else 1))
        self._size = max(1, BLOCK // numbers)
        self._stack = [(0, count, self._normals.root(float(self._clock[-1])))]
        self._start = self._end = 0
        self._block = Increment(torch.empty(0), None)

    def __call__(self, k: int) -> Increment:
        while k >= self._end:
            self._next_block()
        if k < self._start:
            raise RuntimeError("a walk along a path goes forwards")
        i = k - self._start
        return Increment(self._block.w[i], None if self._block.h is None else self._block.h[i])

    def _next_block(self) -> None:
        a, b, whole = self._stack.pop()
        while b - a > self._size:
            at = self._middles(np.array([a]), np.array([b]))
            parts = self._split(whole, *self._draw(at), self._lengths(np.array([a]), at, np.array([b])))
            middle = int(at[0])
            self._stack.append((middle, b, _rows_of(parts, slice(1, 2))))
            b, whole = middle, _rows_of(parts, slice(0, 1))
        self._start, self._end, self._block = a, b, self._expand(a, b, whole)

    def _middles(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Where [a, b) is split: between groups first, in the middle of a group then."""
        groups = (b - a) // self._group
        return np.where(groups > 1, a + (groups + 1) // 2 * self._group, (a + b) // 2)

    def _expand(self, a: int, b: int, whole: Increment) -> Increment:
        """The increments of [a, b), level by level: all nodes of a level in one operation, all normals in one draw."""
        levels, ends = [], np.array([a, b])
        while len(ends) <= b - a:
            inner = np.nonzero(np.diff(ends) > 1)[0]
            left, right = ends[inner], ends[inner + 1]
            at = self._middles(left, right)
            levels.append((inner, len(ends) - 1, at, self._lengths(left, at, right)))
            ends = np.sort(np.concatenate([ends, at]))
        if not levels:
            return whole
        z1, z2 = self._draw(np.concatenate([at for _, _, at, _ in levels]))
        first = 0
        for inner, count, at, lengths in levels:
            rows = slice(first, first + len(at))
            first += len(at)
            own = (z1[rows], None if z2 is None else z2[rows])
            if len(inner) == count:
                whole = self._split(whole, *own, lengths)
            else:
                parts = self._split(_rows_of(whole, torch.from_numpy(inner)), *own, lengths)
                whole = _merge(whole, parts, inner, count)
        return whole

    def _lengths(self, a: np.ndarray, at: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._clock[at] - self._clock[a], self._clock[b] - self._clock[at]

    def _draw(self, at: np.ndarray) -> tuple[Tensor, Tensor | None]:
        halvings = np.minimum(_trailing_zeros(at), self._levels)
        return self._normals.of(self._levels - halvings, at >> halvings)

    def _split(
        self, whole: Increment, z1: Tensor, z2: Tensor | None, lengths: tuple[np.ndarray, np.ndarray]
    ) -> Increment:
        return split(whole, _columns(split_coefficients(*lengths, z2 is not None), z1), z1, z2)


def _trailing_zeros(n: np.ndarray) -> np.ndarray:
    return np.log2((n & -n).astype(np.float64)).astype(np.int64)


def _columns(coefficients: tuple[np.ndarray, ...], like: Tensor) -> Split:
    """Numbers where all nodes agree, else columns that broadcast against `like` (nodes, batch, *event)."""
    shape = (-1, *[1] * (like.ndim - 1))

    def column(c: np.ndarray) -> Tensor | float:
        first = float(c[0])
        return first if bool((c == first).all()) else torch.from_numpy(c).reshape(shape).to(like)

    return Split(*map(column, coefficients))


def _rows_of(increment: Increment, rows: Tensor | slice) -> Increment:
    return Increment(increment.w[rows], None if increment.h is None else increment.h[rows])


def _merge(whole: Increment, parts: Increment, inner: np.ndarray, count: int) -> Increment:
    """`count` intervals with those of `inner` replaced by their two parts."""
    width = np.ones(count, dtype=np.int64)
    width[inner] = 2
    place = np.cumsum(width) - width
    new = torch.from_numpy(np.stack([place[inner], place[inner] + 1], axis=1).reshape(-1))
    kept = torch.from_numpy(np.nonzero(width == 1)[0])
    stay = torch.from_numpy(place[width == 1])

    def lay(old: Tensor, split_up: Tensor) -> Tensor:
        out = old.new_empty((int(width.sum()), *old.shape[1:]))
        return out.index_copy_(0, new, split_up).index_copy_(0, stay, old[kept])

    h = None if whole.h is None or parts.h is None else lay(whole.h, parts.h)
    return Increment(lay(whole.w, parts.w), h)


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
        self._areas = areas
        clock = (times - times[0]).abs().numpy()
        self._span = float(clock[-1])
        self._ticks = _ticks(clock, 0.0, self._span)
        # the intervals still ahead, the nearest last: (level, position, increment)
        self._ahead: list[tuple[int, int, Increment]] = [(0, 0, self._normals.root(self._span))]
        self._k, self._last = -1, self._ahead[0][2]

    def __call__(self, k: int) -> Increment:
        while self._k < k:
            self._k += 1
            self._last = self._until(self._ticks[self._k + 1])
        if k < self._k:
            raise RuntimeError("a walk along a path goes forwards")
        return _only(self._last if self._areas else Increment(self._last.w, None))

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
            passed = part if passed is None else join(passed, length, part, own)
            length += own
        if passed is None:  # an interval below the resolution
            zero = torch.zeros_like(self._last.w)
            return Increment(zero, zero)
        return passed


def _ticks(clock: np.ndarray, start: float, span: float) -> list[int]:
    return np.rint((clock - start) / (span or 1.0) * 2.0**DEPTH).astype(np.int64).tolist()


def split_halves(normals: NodeNormals, nodes: tuple[Tensor, Tensor], whole: Increment, length: Tensor) -> Increment:
    """The halves (2, batch, *event) of one node (1, batch, *event) a sample: (level, position) of their
    middles and lengths of the wholes (batch,)."""
    z1, z2 = normals.of(nodes[0][None], nodes[1][None])
    half = 0.5 * length.cpu().numpy()
    shape = (1, -1, *[1] * (z1.ndim - 2))
    c = Split(*(torch.from_numpy(v).reshape(shape).to(z1) for v in split_coefficients(half, half, True)))
    return split(whole, c, z1, z2)


def _halves(
    normals: NodeNormals, level: int, position: int, part: Increment, span: float
) -> tuple[Increment, Increment]:
    """The halves of a node of the tree in time. Its normals are those of a `GridWalk` of 2^k equal intervals."""
    half = np.array([span * 2.0 ** -(level + 1)])
    z1, z2 = normals.of(np.array([level + 1]), np.array([2 * position + 1]))
    parts = split(part, _columns(split_coefficients(half, half, True), z1), z1, z2)
    return _rows_of(parts, slice(0, 1)), _rows_of(parts, slice(1, 2))


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
                parts.append((part, self._length * 2.0**-level))
                continue
            left, right = _halves(self._normals, level, position, part, self._length)
            ahead += [(level + 1, 2 * position + 1, right), (level + 1, 2 * position, left)]
        if not parts:
            zero = torch.zeros_like(self._root.w)
            return _only(Increment(zero, zero))
        whole, length = parts[0]
        for part, own in parts[1:]:
            whole = join(whole, length, part, own)
            length += own
        return _only(whole if s <= t else Increment(-whole.w, whole.h))
