"""The increments of Brownian paths over a grid, in order, at about one normal an interval."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdeflow import bridge
from sdeflow.bridge import Increment, NodeNormals, as_split, node_words, rows_of
from sdeflow.noise import BLOCK, SCRATCH, Noise


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


_KEPT = 4096
"""Grids of no more intervals have their tables kept for the next walk."""
_ROUNDING = 1e-14
"""Lengths are taken as equal that differ by less than this: what sums of times lose."""
_KEEP = slice(4, 6)


class _Tables(NamedTuple):
    """What a walk needs to know of its grid, the nodes numbered by the points that they split.

    Attributes:
        span, unit: the whole length; the length in units of which the nodes hold rates, span/count.
        words, second: which normals a node takes.
        coefficients: of the splits, (columns, nodes).
        halves: whether a node's parts are equal.
        scale: of the leaves' rates to increments, (count,); None where all are 1.
    """

    span: float
    unit: float
    words: Tensor
    second: Tensor
    coefficients: Tensor
    halves: np.ndarray
    scale: Tensor | None


def _tables(intervals: bytes, areas: bool, work: torch.dtype, device: torch.device) -> _Tables:
    """Of a grid whose lengths (float64) are the bytes `intervals`."""
    lengths = np.frombuffer(intervals)
    count, shape = len(lengths), _shape(len(lengths))
    clock, lost = _running_sum(lengths)
    points = np.arange(count)
    p, q = ((clock[b] - clock[a]) + (lost[b] - lost[a]) for a, b in ((shape.left, points), (points, shape.right)))
    span = float(clock[-1])
    unit = span / count or 1.0
    parts = np.stack(bridge.split_coefficients(p, q, unit, areas))
    halves = np.abs(p - q) <= _ROUNDING * (p + q)
    if areas:
        parts[_KEEP, :] = np.where(halves, 1.0, parts[_KEEP, :])
    scale = torch.from_numpy(lengths / unit)
    even = bool((scale - 1).abs().max() <= _ROUNDING)
    return _Tables(
        span=span,
        unit=unit,
        words=node_words(shape.levels, shape.places, count // shape.group, areas),
        second=torch.from_numpy(shape.places & 1),
        coefficients=torch.from_numpy(parts).to(device=device, dtype=work),
        halves=halves,
        scale=None if even else scale.to(device=device, dtype=work),
    )


_kept_tables = lru_cache(maxsize=16)(_tables)


class GridWalk:
    """The increments over a grid of m 2^k intervals (m odd), in order, at about one normal an interval.

    The m groups of 2^k intervals are the leaves of a balanced tree over the whole, each group is halved k times; a
    grid with every interval halved is the same tree, one level deeper: the same path. Memory: one block of numbers
    for each time that the steps left are divided by the steps of a block. Increments are in memory that is used
    again after the next block, unless gradients are recorded.
    """

    def __init__(
        self, noise: Noise, lengths: Tensor, event: tuple[int, ...] | torch.Size, dtype: torch.dtype, areas: bool
    ) -> None:
        self.lengths, self._dtype = lengths, dtype
        count = len(lengths)
        self._group = _shape(count).group
        self._normals = NodeNormals(noise, count // self._group, event, dtype, areas)
        make = _kept_tables if count <= _KEPT else _tables
        with torch.inference_mode(False):
            self._tables = make(lengths.numpy().tobytes(), areas, self._normals.dtype, noise.index.device)
        numbers = max(1, noise.index.numel() * math.prod(event) * (2 if areas else 1))
        self._size = max(2, BLOCK // numbers)
        root, span = self._normals.root(self._tables.span), self._tables.span
        rate = root.w.mul_(self._tables.unit / span if span > 0 else 1.0)
        # the nodes ahead in runs of neighbours, the nearest run last: (ends, what they hold)
        self._root = (np.array([0, count]), Increment(rate, root.h))
        self._ahead = [self._root]
        self._start = self._end = self._blocks = 0
        self._lent: dict[tuple[str, int], Tensor] = {}
        self._block: tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None] = ((), None)

    def __call__(self, k: int) -> Increment:
        if k < self._start:  # back: from the root down to the block of k, and no other
            self._ahead, self._start, self._end = [self._root], 0, 0
        while k >= self._end:
            self._next_block(k)
        w, h = self._block
        return Increment(w[k - self._start], None if h is None else h[k - self._start])

    def _next_block(self, k: int) -> None:
        """The block of k, or one ahead of it; blocks are cut the same way however they are come by."""
        while True:
            ends, whole = self._ahead.pop()
            # as many nodes as fit in a block, at least one
            fits = max(1, int(np.searchsorted(ends, ends[0] + self._size, side="right")) - 1)
            if fits < len(ends) - 1:
                self._ahead.append((ends[fits:], rows_of(whole, slice(fits, None))))
                ends, whole = ends[: fits + 1], rows_of(whole, slice(0, fits))
            if ends[-1] <= k:
                continue
            plan = _expansion(tuple(np.diff(ends).tolist()), self._group, self._size)
            start, end = int(ends[0]), int(ends[-1])
            leaves = end - start == len(plan.ends) - 1
            whole = self._expand(whole, plan, start, leaves)
            if leaves:
                break
            self._ahead.append((start + plan.ends, whole))
        w = whole.w
        if self._tables.scale is not None:
            scale = self._tables.scale[start:end].reshape(-1, *[1] * (w.ndim - 1))
            w = w.mul_(scale) if plan.splits else w * scale
        self._start, self._end, self._blocks = start, end, self._blocks + 1
        h = None if whole.h is None else whole.h.to(self._dtype).unbind()
        self._block = (w.to(self._dtype).unbind(), h)

    def _expand(self, whole: Increment, plan: _Expansion, start: int, leaves: bool) -> Increment:
        """The run at `start` split by the plan: a level in one operation, all normals in one."""
        if not plan.splits:
            return whole
        at = torch.from_numpy(plan.at) + start
        z1, z2, place = self._normals.of(self._tables.words[at], self._tables.second[at])
        c = self._tables.coefficients[:, at.to(z1.device)]
        columns = c.reshape(len(c), -1, *[1] * (z1.ndim - 1)).split(plan.splits, dim=1)
        first = 0
        for i, count in enumerate(plan.splits):
            rows, nodes = _run(place[first : first + count]), plan.at[first : first + count] + start
            own = as_split(columns[i].unbind(), bool(self._tables.halves[nodes].all()))
            room = self._room(whole, count, i, leaves, last=i == len(plan.splits) - 1)
            whole = bridge.split(whole, own, z1[rows], None if z2 is None else z2[rows], room)
            first += count
        return whole

    def _room(self, whole: Increment, more: int, level: int, leaves: bool, last: bool) -> tuple[Tensor, Tensor | None]:
        """Memory for a level: kept for the next levels where it is not the run's last one."""

        def place(v: Tensor, name: str) -> Tensor:
            shape = torch.Size((len(v) + more, *v.shape[1:]))
            if not last:
                return SCRATCH.take(f"{name}, level {level % 2}", shape, v.dtype, v.device)
            if not leaves or torch.is_grad_enabled():
                return v.new_empty(shape)
            key = (name, self._blocks % 2)
            if key not in self._lent or self._lent[key].numel() < shape.numel():
                self._lent[key] = SCRATCH.lend(self, shape.numel(), v.dtype, v.device)
            return self._lent[key][: shape.numel()].view(shape)

        return place(whole.w, "w"), None if whole.h is None else place(whole.h, "h")


def _run(rows: list[int]) -> slice | list[int]:
    """Increasing rows, as a slice if there are no others between them."""
    return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else rows
