"""The bridge of Brownian motion: increments W and space-time areas H of an interval, split in two by counted normals.

On an interval of length L that starts at s, W = W_t - W_s ~ N(0, L) and
H = (1/L) int_s^t (W_u - W_s - (u - s)/L W) du ~ N(0, L/12), independent; I_(1,0) = int (W_u - W_s) du = L (W/2 + H).
A node of a tree splits an interval into a left part of length p and a right part of length q by the exact
conditional law given what is known of the whole (Foster, Lyons and Oberhauser 2020, An optimal polynomial
approximation of Brownian motion; the formulas for unequal parts are derived in docs/noise.md):

    U = (6 p q / L^2) H + sqrt((p q / L) (1 - 3 p q / L^2)) z_1,   W_1 = (p/L) W + U,   W_2 = (q/L) W - U,
    S = H - U/2,   H_1 = p^2 L/(p^3 + q^3) S + q k z_2,   H_2 = q^2 L/(p^3 + q^3) S - p k z_2,
    k = sqrt(p q / (12 (p^3 + q^3)));   without areas U = sqrt(p q / L) z_1.

A node holds the rate r = (u/L) W in place of W, u a unit of length that the tree's nodes share: the parts of r are
r + (u/p) U and r - (u/q) U, two operations, and where all leaves have the length u their rates are their W.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sdeflow.noise import AREA, PATH, Noise, hashed_word, hashed_words

_ROOT_LEVEL = 63


class Increment(NamedTuple):
    """W and H of an interval, each (batch, *event); H is None where areas are not asked for."""

    w: Tensor
    h: Tensor | None


class Walk(Protocol):
    """`walk(k)`: the increment over the k-th interval of a grid; made for k in order, some may be left out.

    Any other order gives the same numbers: going back costs a way down from the root of the tree.
    """

    lengths: Tensor
    """The lengths (variances of W) of the intervals, float64 (steps,)."""

    def __call__(self, k: int) -> Increment: ...


class Split(NamedTuple):
    """Coefficients of splits, each a column of one a node; those after the second only with areas.

    Attributes:
        rise_left, rise_right: of U in the parts' rates; without areas of z_1.
        std, lift: of z_1 and of H in U.
        keep_left, keep_right: of S in the parts' areas; None where all are 1, those of halves.
        tilt_left, tilt_right: of z_2 there.
    """

    rise_left: Tensor
    rise_right: Tensor
    std: Tensor | None = None
    lift: Tensor | None = None
    keep_left: Tensor | None = None
    keep_right: Tensor | None = None
    tilt_left: Tensor | None = None
    tilt_right: Tensor | None = None


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def split_coefficients(p: np.ndarray, q: np.ndarray, unit: float | np.ndarray, areas: bool) -> tuple[np.ndarray, ...]:
    """The coefficients of the module's formulas for lengths p, q >= 0 (float64), in the order of `Split`."""
    whole, unit = p + q, np.broadcast_to(np.asarray(unit, dtype=np.float64), p.shape)
    a, b = _ratio(p, whole), _ratio(q, whole)  # p/L, q/L
    if not areas:
        std = np.sqrt(p * b)
        return std * _ratio(unit, p), std * _ratio(unit, q)
    cubes = a**3 + b**3
    cubes = np.where(cubes > 0, cubes, 1.0)
    tilt = np.sqrt(a * b * whole / (12 * cubes))
    std, lift = np.sqrt(p * b * (1 - 3 * a * b)), 6 * a * b
    return _ratio(unit, p), _ratio(unit, q), std, lift, a**2 / cubes, b**2 / cubes, b * tilt, a * tilt


def as_split(columns: Sequence[Tensor], halves: bool) -> Split:
    """`Split` of the columns of `split_coefficients`; `halves`: the parts of each node are equal."""
    if len(columns) == 2 or not halves:
        return Split(*columns)
    return Split(*columns)._replace(keep_left=None, keep_right=None)


def split(
    whole: Increment, c: Split, z1: Tensor, z2: Tensor | None, room: tuple[Tensor, Tensor | None] | None = None
) -> Increment:
    """The first len(z1) of the nodes (nodes, ...) in their two parts, the others as they are, in order.

    z1 and (for areas) z2 are used up. One rounding after another, whatever shape the coefficients have: the bits do
    not depend on how many are split. The result is in `room`, if it is given.
    """
    n = len(z1)
    w, h = room or (_room(whole.w, n), None if whole.h is None else _room(whole.h, n))
    if whole.h is None or h is None or z2 is None or c.std is None or c.lift is None:
        u = z1
    else:
        assert c.tilt_left is not None
        assert c.tilt_right is not None
        u = z1.mul_(c.std).addcmul_(whole.h[:n], c.lift)
        s = left = right = torch.add(whole.h[:n], u, alpha=-0.5)
        if c.keep_left is not None and c.keep_right is not None:
            left, right = s * c.keep_left, s * c.keep_right
        torch.addcmul(left, z2, c.tilt_left, out=h[0 : 2 * n : 2])
        torch.addcmul(right, z2, c.tilt_right, value=-1, out=h[1 : 2 * n : 2])
        h[2 * n :] = whole.h[n:]
    torch.addcmul(whole.w[:n], u, c.rise_left, out=w[0 : 2 * n : 2])
    torch.addcmul(whole.w[:n], u, c.rise_right, value=-1, out=w[1 : 2 * n : 2])
    w[2 * n :] = whole.w[n:]
    return Increment(w, h)


def _room(w: Tensor, more: int) -> Tensor:
    return w.new_empty(torch.Size((len(w) + more, *w.shape[1:])))


def rows_of(increment: Increment, rows: Tensor | slice) -> Increment:
    """Some nodes of (nodes, ...)."""
    return Increment(increment.w[rows], None if increment.h is None else increment.h[rows])


def only_row(one: Increment) -> Increment:
    """The increment (batch, *event) of the only interval of (1, batch, *event)."""
    return Increment(one.w[0], None if one.h is None else one.h[0])


def join(first: Increment, p: float, second: Increment, q: float) -> Increment:
    """The increment over two adjacent intervals of lengths p, q (Chen's relation)."""
    w = first.w + second.w
    if first.h is None or second.h is None:
        return Increment(w, None)
    whole = p + q
    return Increment(w, (p * first.h + q * second.h) / whole + (q * first.w - p * second.w) / (2 * whole))


def node_words(levels: np.ndarray | Tensor, places: np.ndarray | Tensor, tree: int, areas: bool) -> Tensor:
    """The hashed words of a tree's nodes, int64; without areas those of the pair that a node shares."""
    levels, places = torch.as_tensor(levels), torch.as_tensor(places)
    places = places if areas else places >> 1
    # the level in 6 bits, the place in 41, the tree's number (odd) hashed over all of them
    return hashed_words((places << 6 | levels) ^ (tree >> 1) * 0x5851F42D4C957F2D % (1 << 62))


class NodeNormals:
    """The normals of nodes (level, place) of one tree of a noise, in float64 or, for any other dtype, in float32.

    With areas a node takes a pair of normals; without, the two nodes below one share a pair.
    """

    def __init__(
        self, noise: Noise, tree: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype, areas: bool
    ) -> None:
        self.noise, self.event, self.areas = noise, tuple(event), areas
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._stream = AREA if areas else PATH
        self._tree = tree

    def words(self, levels: np.ndarray | Tensor, places: np.ndarray | Tensor) -> Tensor:
        """`node_words` of this tree."""
        return node_words(levels, places, self._tree, self.areas)

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
        both = self.noise.pairs(self._stream, hashed_word(_ROOT_LEVEL), self.event, self.dtype, keep=False)
        h = both[:, 1] * math.sqrt(length / 12) if self.areas else None
        return Increment(both[:, 0] * math.sqrt(length), h)
