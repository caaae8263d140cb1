"""Noise whose leading numbers are given: components of the start, and the first nodes of the Brownian tree.

W over the whole span comes first, then the bridges in the middle of it, of its halves, and so on: the numbers that move
a path most (Moskowitz and Caflisch 1996, Smoothness and dimension reduction in quasi-Monte Carlo methods, section 4).
All other numbers are the sample's own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.bridge import Walk, node_words
from sdeflow.noise import AREA, PATH, PRIOR, Noise, NoiseSource, hashed_word

_ROOT = hashed_word(63)
"""The word of the whole span in every tree (`sdeflow.bridge.NodeNormals.root`)."""


@dataclass(frozen=True)
class Led(NoiseSource):
    """The noise of `seed` with given leading numbers.

    Args:
        start: standard normals (batch, r) of the start, along `axes`.
        axes: orthonormal (size, r) directions of the start's normals; None for its first r components.
        path: standard normals (batch, p): of the first nodes of the tree, as many whole nodes as fit.
    """

    seed: int
    start: Tensor
    axes: Tensor | None
    path: Tensor

    def bind(self, batch: int, index: int | Tensor | None, device: torch.device | str) -> Noise:
        if len(self.start) != batch:
            raise ValueError(f"expected leading numbers of {batch} samples, got {len(self.start)}")
        return _LedNoise(self, batch, index, device)


class _LedNoise(Noise):
    def __init__(self, led: Led, batch: int, index: int | Tensor | None, device: torch.device | str) -> None:
        super().__init__(led.seed, batch, index=index, device=device)
        self._start, self._path = led.start.to(device), led.path.to(device)
        self._axes = None if led.axes is None else led.axes.to(device)
        self._nodes: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        self._words = torch.zeros(0, dtype=torch.int64)

    def take(self, rows: Tensor) -> Noise:
        part = super().take(rows)
        assert isinstance(part, _LedNoise)
        part._start, part._path = self._start[rows], self._path[rows]
        part._nodes = {key: [(slot, z[rows]) for slot, z in led] for key, led in self._nodes.items()}
        return part

    def other(self, number: int) -> Noise:
        part = super().other(number)
        assert isinstance(part, _LedNoise)
        part._nodes, part._words = {}, self._words[:0]
        part._start, part._path = self._start[:, :0], self._path[:, :0]
        return part

    def normal(self, stream: int, node: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        z = super().normal(stream, node, event, dtype)
        r = self._start.shape[1]
        if stream != PRIOR or node != 0 or r == 0:
            return z
        flat, led = z.flatten(1), self._start.to(dtype)
        if self._axes is None:
            return torch.cat([led, flat[:, r:]], dim=1).reshape(z.shape)
        axes = self._axes.to(dtype)
        return (flat + (led - flat @ axes) @ axes.T).reshape(z.shape)

    def walk(
        self,
        times: Tensor,
        event: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        *,
        areas: bool = False,
        lengths: Tensor | None = None,
    ) -> Walk:
        own = copy.copy(self)  # another walk may have another tree
        own._lead(times.numel() - 1, tuple(event), areas)
        return super(_LedNoise, own).walk(times, event, dtype, areas=areas, lengths=lengths)

    def _lead(self, count: int, event: tuple[int, ...], areas: bool) -> None:
        """Give the tree of `count` intervals its first numbers, node by node."""
        groups = count // (count & -count)
        size = max(1, torch.Size(event).numel())
        nodes = leading_nodes(count, self._path.shape[1] // size, areas)
        self._nodes = {}
        for k, (level, place, slot) in enumerate(nodes):
            word = _ROOT if level < 0 else node_words(torch.tensor([level]), torch.tensor([place]), groups, areas)
            z = self._path[:, k * size : (k + 1) * size].reshape(-1, *event)
            self._nodes.setdefault((AREA if areas else PATH, int(word)), []).append((slot, z))
        self._words = torch.tensor([word for _, word in self._nodes], dtype=torch.int64)

    def pairs(
        self,
        stream: int,
        words: Tensor,
        event: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        *,
        keep: bool = True,
    ) -> Tensor:
        both = super().pairs(stream, words, event, dtype, keep=keep)
        if stream in (PATH, AREA) and words.ndim == 1:
            for row in torch.nonzero(torch.isin(words, self._words)).flatten().tolist():
                for slot, z in self._nodes.get((stream, int(words[row])), ()):
                    both[row, slot] = z.to(both.dtype)
        return both


def leading_nodes(count: int, most: int, areas: bool) -> list[tuple[int, int, int]]:
    """(level, place, which of its pair) of the first `most` normals of a tree of `count` intervals; level -1: the root.

    With areas that of the whole span follows its W.
    """
    group = count & -count
    groups = count // group
    found = [(-1, 0, 0), (-1, 0, 1)] if areas else [(-1, 0, 0)]
    found += [(0, place, 0 if areas else place & 1) for place in range(1, min(groups, most + 1))]
    for level in range(1, group.bit_length()):
        width = groups << (level - 1)
        found += [(level, place, 0 if areas else place & 1) for place in range(min(width, most))]
        if len(found) >= most:
            break
    return found[:most]
