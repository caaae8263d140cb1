"""Noise that belongs to the sample: a counter-based generator keyed by (seed, sample, stream, node).

Each (seed, stream, sample index, node) is hashed to the 64-bit seed of its own SplitMix64 sequence
(Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators: the generator passes
BigCrush); its outputs become pairs of normals by Box-Muller. Nothing is drawn in order, so a
sample's numbers do not change with the batch around it, with its position, or with the device.
The Brownian paths made of these numbers are in `sdeflow.brownian`.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sdeflow.brownian import Walk

PATH, PRIOR, CORRECTOR, DATA, RESTART, AREA, CHURN, WEAK = 0, 1, 2, 3, 4, 5, 6, 7
"""Streams: the driving path, the prior, Langevin correctors, draws of a problem's data, restarts, the path with its
areas, noise added back by churn, and the two-point variables of weak methods."""

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
BLOCK = 1 << 18
"""Numbers drawn at once for coming steps: enough to spread the cost of the ~20 kernel launches."""


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch holds."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _xor_shift(z: Tensor, bits: int, work: Tensor) -> Tensor:
    """z ^ (z >> bits) with a logical shift; torch's shift of int64 is arithmetic, hence the mask."""
    torch.bitwise_right_shift(z, bits, out=work)
    return z.bitwise_xor_(work.bitwise_and_((1 << (64 - bits)) - 1))


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function (variant 13 of Stafford's mixers), in place; z is int64, products wrap."""
    work = torch.empty_like(z)
    z = _xor_shift(z, 30, work).mul_(_signed(_MULTIPLIERS[0]))
    z = _xor_shift(z, 27, work).mul_(_signed(_MULTIPLIERS[1]))
    return _xor_shift(z, 31, work)


def _advance(key: Tensor, word: Tensor | int) -> Tensor:
    """The key of the child `word` of `key`: its (word + 1)-th output."""
    if isinstance(word, int):
        return _mix(key + _signed((word + 1) * _GOLDEN))
    return _mix(key + (word + 1) * _signed(_GOLDEN))


def _normals(keys: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """`count` standard normals a key: keys (...,) -> (..., count), float64 or float32."""
    half = (count + 1) // 2
    counter = torch.arange(1, half + 1, device=keys.device).mul_(_signed(_GOLDEN))
    bits = _mix(keys.unsqueeze(-1) + counter)
    scale = 2.0**-32
    angle = (bits >> 32).to(dtype).mul_(2 * math.pi * scale)
    radius = bits.bitwise_and_(0xFFFFFFFF).to(dtype).add_(0.5).mul_(scale).log_().mul_(-2.0).sqrt_()
    out = torch.empty((*keys.shape, 2 * half), dtype=dtype, device=keys.device)
    torch.mul(radius, torch.cos(angle), out=out[..., :half])
    torch.mul(radius, torch.sin(angle), out=out[..., half:])
    return out[..., :count]


def fresh_seed() -> int:
    """A seed from torch's global generator, for callers who gave none."""
    return int(torch.randint(0, 2**62, ()))


class Noise:
    """Standard normals of a batch of samples, each a function of (seed, sample index, stream, node).

    Args:
        seed: an integer of 64 bits; two seeds give independent noise (negative ones count from 2^64, as in torch).
        batch: number of samples.
        index: the samples' indices: None for 0..batch-1, an int for an offset, or a 1-d integer tensor.
        device: where the numbers are made.
        antithetic: samples 2j and 2j + 1 share their numbers, with opposite signs.
        one_path: walk along the path of the tree in time, the same for every grid (`sdeflow.brownian`).
    """

    def __init__(
        self,
        seed: int,
        batch: int,
        *,
        index: int | Tensor | None = None,
        device: torch.device | str = "cpu",
        antithetic: bool = False,
        one_path: bool = False,
    ) -> None:
        self.one_path = one_path
        self.seed = checked_seed(seed)
        self.index = checked_index(index, batch).to(device)
        self._sign: Tensor | None = None
        self._owner = self.index
        if antithetic:
            self._owner = self.index >> 1
            self._sign = 1 - 2 * (self.index & 1)
        self._keys: dict[int, Tensor] = {}

    def _stream(self, stream: int) -> Tensor:
        """The key of each sample's stream, (batch,)."""
        if stream not in self._keys:
            root = torch.tensor(_signed(self.seed), dtype=torch.int64, device=self.index.device)
            self._keys[stream] = _advance(_advance(_mix(root), stream), self._owner)
        return self._keys[stream]

    def take(self, rows: Tensor) -> Noise:
        """The noise of some samples of the batch."""
        part = copy.copy(self)
        part.index, part._owner = self.index[rows], self._owner[rows]
        part._sign = None if self._sign is None else self._sign[rows]
        part._keys = {stream: keys[rows] for stream, keys in self._keys.items()}
        return part

    def normal(self, stream: int, node: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """Standard normals (batch, *event) of one node of a stream."""
        return self.draw(stream, torch.tensor([node]), event, dtype)[0]

    def sequence(
        self, stream: int, nodes: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype
    ) -> Callable[[int], Tensor]:
        """`draw(k)`, k in 0..nodes-1, the same numbers as `normal(stream, k, ...)` drawn in blocks."""
        numbers = max(1, self.index.numel() * math.prod(event))
        size = max(1, min(nodes, BLOCK // numbers))
        block, start = torch.empty(0), -size

        def draw(k: int) -> Tensor:
            nonlocal block, start
            if not start <= k < start + size:
                start = k - k % size
                block = self.draw(stream, torch.arange(start, min(start + size, nodes)), event, dtype)
            return block[k - start]

        return draw

    def walk(
        self,
        times: Tensor,
        event: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        *,
        areas: bool = False,
        lengths: Tensor | None = None,
    ) -> Walk:
        """The increments (W, H) of the driving Brownian path over the intervals of a grid, in order.

        Args:
            times: float64 (steps + 1,), monotone.
            event, dtype: of the increments of a sample.
            areas: whether H is wanted. A path with areas is another one than a path without, unless `one_path`.
            lengths: (steps,), the variances of W where the path's own clock is not the time; `one_path`, which
                knows only the time, ignores it. `walk.lengths` are those of the increments it gives.
        """
        from sdeflow.brownian import GridWalk, TreeWalk

        if self.one_path:
            return TreeWalk(self, times, event, dtype, areas)
        return GridWalk(self, torch.diff(times).abs() if lengths is None else lengths, event, dtype, areas)

    def draw(self, stream: int, nodes: Tensor, event: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """Standard normals (nodes, batch, *event) of several nodes, an int64 tensor: (nodes,), or (nodes, batch)."""
        nodes = nodes.to(self.index.device)
        keys = _advance(self._stream(stream), nodes.unsqueeze(-1) if nodes.ndim == 1 else nodes)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        flat = _normals(keys, math.prod(event), work)
        if self._sign is not None:
            flat = flat * self._sign.unsqueeze(-1)
        return flat.reshape(*keys.shape, *event).to(dtype)


class NoiseSource(ABC):
    """What `solve` takes as `noise`."""

    @abstractmethod
    def bind(self, batch: int, index: int | Tensor | None, device: torch.device | str) -> Noise:
        """The noise of a batch of samples."""


@dataclass(frozen=True)
class Seeded(NoiseSource):
    """What a seed alone means: a path that grids of m 2^k steps, m odd, share when they refine each other."""

    seed: int

    def bind(self, batch: int, index: int | Tensor | None, device: torch.device | str) -> Noise:
        return Noise(self.seed, batch, index=index, device=device)


@dataclass(frozen=True)
class SamePath(NoiseSource):
    """One Brownian path a sample, whatever the grid and the solver: that of `BrownianPath` on the solve's span.

    Costs up to 40 splits a step where times are no fractions of the span by a power of 2; see docs/noise.md.
    """

    seed: int

    def bind(self, batch: int, index: int | Tensor | None, device: torch.device | str) -> Noise:
        return Noise(self.seed, batch, index=index, device=device, one_path=True)


@dataclass(frozen=True)
class Antithetic(NoiseSource):
    """Samples of index 2j and 2j + 1 see opposite numbers: the path, and every other draw of the solve.

    Args:
        same_path: as `SamePath`, else as a seed.
    """

    seed: int
    same_path: bool = False

    def bind(self, batch: int, index: int | Tensor | None, device: torch.device | str) -> Noise:
        return Noise(self.seed, batch, index=index, device=device, antithetic=True, one_path=self.same_path)


def checked_seed(seed: object) -> int:
    """The seed, if it is an integer of 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"expected an integer seed, got {seed!r}")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"expected a seed of 64 bits, in [-2^63, 2^64), got {seed}")
    return seed


def checked_index(index: int | Tensor | None, batch: int) -> Tensor:
    """One index a sample, int64 (batch,)."""
    if index is None or (isinstance(index, int) and not isinstance(index, bool)):
        return torch.arange(batch) + (index or 0)
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"expected index to be an int offset or a 1-d integer tensor, got {index!r}")
    if index.shape != (batch,):
        raise ValueError(f"expected one index a sample, shape ({batch},), got shape {tuple(index.shape)}")
    return index.to(torch.int64)
