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
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sdeflow.noise import AREA, BLOCK, PATH, SCRATCH, Noise, hashed_words

DEPTH = 40
"""Levels of the tree in time: times are told apart down to 2^-40 (1e-12) of its span."""
_ROOT_LEVEL = 63
_EVEN = 1 / 16


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
    """Coefficients of splits, each a column of one a node; the last five only with areas.

    `even`: no right part is so short that it should not be the whole less the left one, at one rounding error.
    """

    even: bool
    left: Tensor
    right: Tensor
    std: Tensor
    lift: Tensor
    keep_left: Tensor
    keep_right: Tensor
    tilt_left: Tensor
    tilt_right: Tensor

    @classmethod
    def of(cls, columns: Sequence[Tensor], even: bool) -> Split:
        """From those of `split_coefficients`, as tensors."""
        return cls(even, *columns) if len(columns) == 8 else cls(even, *columns, *[columns[0]] * 5)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def split_coefficients(p: np.ndarray, q: np.ndarray, areas: bool) -> tuple[np.ndarray, ...]:
    """The coefficients of the module's formulas for lengths p, q >= 0 (float64), in the order of `Split`."""
    whole = p + q
    a, b = _ratio(p, whole), _ratio(q, whole)  # p/L, q/L
    if not areas:
        return a, b, np.sqrt(p * b)
    cubes = a**3 + b**3
    cubes = np.where(cubes > 0, cubes, 1.0)
    tilt = np.sqrt(a * b * whole / (12 * cubes))
    return a, b, np.sqrt(p * b * (1 - 3 * a * b)), 6 * a * b, a**2 / cubes, b**2 / cubes, b * tilt, a * tilt


def split(whole: Increment, c: Split, z1: Tensor, z2: Tensor | None, scratch: str | None = None) -> Increment:
    """The first len(z1) of the intervals (nodes, ...) in their two parts, the others as they are, in order.

    z1 and (for areas) z2 are used up. One rounding after another, whatever shape the coefficients have: the bits do
    not depend on how many are split. The result is in the memory of the name `scratch`, if one is given.
    """
    n = len(z1)
    if whole.h is None or z2 is None:
        return Increment(_parts(whole.w, c, z1.mul_(c.std), scratch), None)
    u = z1.mul_(c.std).addcmul_(whole.h[:n], c.lift)
    s = torch.add(whole.h[:n], u, alpha=-0.5)
    h = _room(whole.h, n, scratch and scratch + ", areas")
    torch.mul(s, c.keep_left, out=h[0 : 2 * n : 2]).addcmul_(z2, c.tilt_left)
    torch.mul(s, c.keep_right, out=h[1 : 2 * n : 2]).addcmul_(z2, c.tilt_right, value=-1)
    h[2 * n :] = whole.h[n:]
    return Increment(_parts(whole.w, c, u, scratch), h)


def _parts(w: Tensor, c: Split, u: Tensor, scratch: str | None) -> Tensor:
    n = len(u)
    out = _room(w, n, scratch)
    left, right = out[0 : 2 * n : 2], out[1 : 2 * n : 2]
    torch.addcmul(u, w[:n], c.left, out=left)
    if c.even:
        torch.sub(w[:n], left, out=right)
    else:
        torch.addcmul(u, w[:n], c.right, value=-1, out=right).neg_()
    out[2 * n :] = w[n:]
    return out


def _room(w: Tensor, more: int, scratch: str | None) -> Tensor:
    shape = torch.Size((len(w) + more, *w.shape[1:]))
    return w.new_empty(shape) if scratch is None else SCRATCH.take(scratch, shape, w.dtype, w.device)


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
    """The normals of nodes (level, place) of one tree of a noise.

    With areas a node takes a pair of normals; without, the two nodes below one share a pair.
    """

    def __init__(
        self, noise: Noise, tree: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype, areas: bool
    ) -> None:
        self.noise, self.event, self.dtype, self.areas = noise, tuple(event), dtype, areas
        self.work = torch.float64 if dtype == torch.float64 else torch.float32
        self._stream = AREA if areas else PATH
        self._tree = tree

    def words(self, levels: np.ndarray | Tensor, places: np.ndarray | Tensor) -> Tensor:
        """The hashed words of nodes, int64; without areas those of the pair that a node shares."""
        levels, places = torch.as_tensor(levels), torch.as_tensor(places)
        places = places if self.areas else places >> 1
        # the level in 6 bits, the place in 41, the tree's number (odd) hashed over all of them
        return hashed_words((places << 6 | levels) ^ (self._tree >> 1) * 0x5851F42D4C957F2D % (1 << 62))

    def of(self, words: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None, list[int]]:
        """(z1, z2, rows): normals (rows, batch, *event) and the row of each node; neighbours in a level stay so.

        In memory that the next call writes over.

        Args:
            words: of the nodes (nodes,), or (1, batch) for one node a sample.
            second: which of its pair a node takes, 0 or 1, without areas.
        """
        if self.areas:
            both = self.noise.pairs(self._stream, words, self.event, self.dtype, keep=False)
            return both[:, 0], both[:, 1], list(range(len(words)))
        shared, slot = torch.unique_consecutive(words, return_inverse=True)
        both = self.noise.pairs(self._stream, shared, self.event, self.dtype, keep=False)
        return both.flatten(0, 1), None, (2 * slot + second).tolist()

    def take(self, rows: Tensor) -> NodeNormals:
        """The same for some samples of the batch."""
        part = copy.copy(self)
        part.noise = self.noise.take(rows)
        return part

    def root(self, length: float) -> Increment:
        """The whole span, (1, batch, *event): the same in every tree."""
        z1, z2, _ = self.of(hashed_words(torch.tensor([_ROOT_LEVEL])), torch.zeros(1, dtype=torch.int64))
        return Increment(z1[:1] * math.sqrt(length), None if z2 is None else z2 * math.sqrt(length / 12))


class _Shape(NamedTuple):
    """The tree over m 2^k intervals: for each inner point i, the node that it splits.

    Attributes:
        group: 2^k.
        left, right: the node's ends.
        words: its (level, place): 0 and its number from the top for nodes of whole groups, else the halvings of a
            group and its number in that level; two nodes below one have the numbers 2 n and 2 n + 1.
    """

    group: int
    left: np.ndarray
    right: np.ndarray
    levels: np.ndarray
    places: np.ndarray


@lru_cache(maxsize=32)
def _shape(count: int) -> _Shape:
    """The complete binary tree over m groups of 2^k intervals, then halvings; twice as many are one level deeper."""
    group = count & -count
    points = np.arange(count)
    below = np.minimum(points & -points, group)  # the largest power of 2 in i, at most the group
    left, right = points - below, points + below
    halvings = np.log2(np.maximum(below, 1)).astype(np.int64)
    levels = group.bit_length() - 1 - halvings
    places = points >> halvings >> 1
    ends, first = np.array([0, count // group]), 1
    while len(ends) <= count // group:
        wide = int((np.diff(ends) > 1).sum())  # a complete tree: the wider nodes come first
        at = ends[:wide] + _left_size(np.diff(ends)[:wide])
        left[at * group], right[at * group] = ends[:wide] * group, ends[1 : wide + 1] * group
        places[at * group] = first + np.arange(wide)
        first *= 2
        ends = np.sort(np.concatenate([ends, at]))
    return _Shape(group, left, right, levels, places)


def _left_size(leaves: np.ndarray) -> np.ndarray:
    """Leaves in the left part of complete binary trees of so many leaves, >= 2."""
    height = np.ceil(np.log2(leaves)).astype(np.int64)
    return np.minimum(1 << (height - 1), leaves - (1 << height >> 2))


def _running_sum(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sum, what its rounding lost), (count + 1,) each: short intervals keep their lengths beside long ones."""
    total = np.concatenate([np.zeros(1), np.cumsum(lengths)])
    before, after = total[:-1], total[1:]
    added = after - before
    lost = (before - (after - added)) + (lengths - added)
    return total, np.concatenate([np.zeros(1), np.cumsum(lost)])


class _Expansion(NamedTuple):
    """How a run of nodes is split into smaller ones; the same for every run of nodes of these sizes.

    Attributes:
        at: where nodes are split, level by level, relative to the run's start.
        ends: of the nodes at the end, relative too.
        splits: of each level, how many of the first nodes are split.
    """

    at: np.ndarray
    ends: np.ndarray
    splits: tuple[int, ...]


@lru_cache(maxsize=256)
def _expansion(sizes: tuple[int, ...], group: int, most: int) -> _Expansion:
    """Split nodes of these sizes, non-increasing, level by level while there are at most `most`."""
    ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    points: list[np.ndarray] = []
    while True:
        widths = np.diff(ends)
        wide = int((widths > 1).sum())
        if wide == 0 or (len(widths) > 1 and len(widths) + wide > most):
            break
        groups = widths[:wide] // group
        at = ends[:wide] + np.where(groups > 1, _left_size(np.maximum(groups, 2)) * group, widths[:wide] // 2)
        points.append(at)
        ends = np.sort(np.concatenate([ends, at]))
    none = np.zeros(0, dtype=np.int64)
    return _Expansion(np.concatenate([none, *points]), ends, tuple(len(at) for at in points))


class GridWalk:
    """The increments over a grid of m 2^k intervals (m odd), in order, at about one normal an interval.

    The m groups of 2^k intervals are the leaves of a balanced tree over the whole, each group is halved k times; a
    grid with every interval halved is the same tree, one level deeper: the same path. Memory: one block of numbers
    for each time that the steps left are divided by the steps of a block.
    """

    def __init__(
        self, noise: Noise, lengths: Tensor, event: tuple[int, ...] | torch.Size, dtype: torch.dtype, areas: bool
    ) -> None:
        self.lengths = lengths
        count = len(lengths)
        shape = _shape(count)
        self._group = shape.group
        self._normals = NodeNormals(noise, count // shape.group, event, dtype, areas)
        self._words = self._normals.words(shape.levels, shape.places)
        self._second = torch.from_numpy(shape.places & 1)
        clock, lost = _running_sum(lengths.numpy())
        points = np.arange(count)
        p, q = ((clock[b] - clock[a]) + (lost[b] - lost[a]) for a, b in ((shape.left, points), (points, shape.right)))
        parts = split_coefficients(p, q, areas)
        self._even = bool((parts[1][1:] > _EVEN).all())
        self._coefficients = torch.from_numpy(np.stack(parts)).to(device=noise.index.device, dtype=self._normals.work)
        numbers = max(1, noise.index.numel() * math.prod(event) * (2 if areas else 1))
        self._size = max(2, BLOCK // numbers)
        # the nodes ahead in runs of neighbours, the nearest run last: (ends, their increments)
        self._ahead = [(np.array([0, count]), self._normals.root(float(clock[-1])))]
        self._start = self._end = 0
        self._block: tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None] = ((), None)

    def __call__(self, k: int) -> Increment:
        while k >= self._end:
            self._next_block()
        if k < self._start:
            raise RuntimeError("a walk along a path goes forwards")
        w, h = self._block
        return Increment(w[k - self._start], None if h is None else h[k - self._start])

    def _next_block(self) -> None:
        while True:
            ends, whole = self._ahead.pop()
            # as many nodes as fit in a block, at least one
            fits = max(1, int(np.searchsorted(ends, ends[0] + self._size, side="right")) - 1)
            if fits < len(ends) - 1:
                self._ahead.append((ends[fits:], _rows_of(whole, slice(fits, None))))
                ends, whole = ends[: fits + 1], _rows_of(whole, slice(0, fits))
            plan = _expansion(tuple(np.diff(ends).tolist()), self._group, self._size)
            whole = self._expand(whole, plan, int(ends[0]))
            ends = ends[0] + plan.ends
            if ends[-1] - ends[0] == len(ends) - 1:
                self._start, self._end = int(ends[0]), int(ends[-1])
                self._block = (whole.w.unbind(), None if whole.h is None else whole.h.unbind())
                return
            self._ahead.append((ends, whole))

    def _expand(self, whole: Increment, plan: _Expansion, start: int) -> Increment:
        """The run at `start` split by the plan: a level in one operation, all normals in one."""
        if not plan.splits:
            return whole
        at = torch.from_numpy(plan.at) + start
        z1, z2, place = self._normals.of(self._words[at], self._second[at])
        c = self._coefficients[:, at.to(z1.device)].reshape(len(self._coefficients), -1, *[1] * (z1.ndim - 1))
        first = 0
        for i, count in enumerate(plan.splits):
            rows = _run(place[first : first + count])
            own = Split.of([v[first : first + count] for v in c], self._even)
            last = i == len(plan.splits) - 1
            scratch = None if last else f"tree {i % 2}"
            whole = split(whole, own, z1[rows], None if z2 is None else z2[rows], scratch)
            first += count
        return whole


def _run(rows: list[int]) -> slice | list[int]:
    """Increasing rows, as a slice if there are no others between them."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else rows


def _rows_of(increment: Increment, rows: Tensor | slice) -> Increment:
    return Increment(increment.w[rows], None if increment.h is None else increment.h[rows])


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
    """The halves (2, batch, *event) of one node (1, batch, *event) a sample.

    Args:
        nodes: (level, place) of their middles, (batch,) each.
        length: of the wholes, (batch,).
    """
    z1, z2, _ = normals.of(normals.words(*nodes)[None], torch.zeros(1, dtype=torch.int64))
    half = 0.5 * length.cpu().numpy()
    shape = (1, -1, *[1] * (z1.ndim - 2))
    c = Split.of([torch.from_numpy(v).reshape(shape).to(z1) for v in split_coefficients(half, half, True)], True)
    return split(whole, c, z1, z2)


def _halves(
    normals: NodeNormals, level: int, position: int, part: Increment, span: float
) -> tuple[Increment, Increment]:
    """The halves of a node of the tree in time. Its normals are those of a `GridWalk` of 2^k equal intervals."""
    half = np.array(span * 2.0 ** -(level + 1))
    words = normals.words(np.array([level + 1]), np.array([position]))
    z1, z2, _ = normals.of(words, torch.zeros(1, dtype=torch.int64))
    c = Split.of(
        [torch.tensor(float(v), dtype=z1.dtype, device=z1.device) for v in split_coefficients(half, half, True)], True
    )
    parts = split(part, c, z1, z2)
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
