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
import threading
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
BLOCK = 1 << 19
"""Numbers drawn at once for coming steps: enough to spread the cost of the ~20 kernel launches."""


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch holds."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _xor_shift(z: Tensor, bits: int, work: Tensor) -> Tensor:
    """z ^ (z >> bits) with a logical shift; torch's shift of int64 is arithmetic, hence the mask."""
    torch.bitwise_right_shift(z, bits, out=work)
    return z.bitwise_xor_(work.bitwise_and_((1 << (64 - bits)) - 1))


def _mix(z: Tensor, work: Tensor | None = None) -> Tensor:
    """SplitMix64's output function (variant 13 of Stafford's mixers), in place; z is int64, products wrap."""
    work = torch.empty_like(z) if work is None else work
    z = _xor_shift(z, 30, work).mul_(_signed(_MULTIPLIERS[0]))
    z = _xor_shift(z, 27, work).mul_(_signed(_MULTIPLIERS[1]))
    return _xor_shift(z, 31, work)


def _advance(key: Tensor, word: Tensor | int) -> Tensor:
    """The key of the child `word` of `key`: its (word + 1)-th output."""
    if isinstance(word, int):
        return _mix(key + _signed((word + 1) * _GOLDEN))
    return _mix(key + (word + 1) * _signed(_GOLDEN))


def hashed_words(nodes: Tensor) -> Tensor:
    """Nodes (int64) spread over 64 bits: what `normal_pairs` adds to a sample's seeds."""
    return _mix((nodes + 1) * _signed(_GOLDEN))


def normal_pairs(seeds: Tensor, words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent standard normals for each of the 64-bit inputs seeds + words, which broadcast.

    Box-Muller on the halves of SplitMix64's output function; float64 or float32. A pure function, for `torch.compile`,
    which makes one kernel of it; `Noise` makes the same numbers in place.
    """
    z = seeds + words
    for bits, factor in zip((30, 27), _MULTIPLIERS, strict=True):
        z = (z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))) * _signed(factor)
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    angle = (z >> 32).to(dtype) * (2 * math.pi * 2.0**-32)
    radius = torch.sqrt(-2.0 * torch.log(((z & 0xFFFFFFFF).to(dtype) + 0.5) * 2.0**-32))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _box_muller(bits: Tensor, work: Tensor, angle: Tensor, radius: Tensor, out: Tensor) -> Tensor:
    """`out` (n, 2, *rest) from the inputs `bits` (n, *rest); the others are scratch of that shape."""
    bits = _mix(bits, work)
    scale = 2.0**-32
    angle.copy_(torch.bitwise_right_shift(bits, 32, out=work)).mul_(2 * math.pi * scale)
    radius.copy_(bits.bitwise_and_(0xFFFFFFFF)).add_(0.5).mul_(scale).log_().mul_(-2.0).sqrt_()
    torch.cos(angle, out=out[:, 0]).mul_(radius)
    torch.sin(angle, out=out[:, 1]).mul_(radius)
    return out


class _Scratch(threading.local):
    """Memory that blocks of noise are made in, kept from one to the next: fresh pages cost more than the numbers."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of that shape; its contents last until the next call for `name`."""
        count = shape.numel()
        if count > 4 * BLOCK:
            return torch.empty(shape, dtype=dtype, device=device)
        key = (name, dtype, device)
        if key not in self._kept or self._kept[key].numel() < count:
            with torch.inference_mode(False):
                self._kept[key] = torch.empty(count, dtype=dtype, device=device)
        return self._kept[key][:count].view(shape)


SCRATCH = _Scratch()


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
        self._seeds: dict[tuple[int, int], Tensor] = {}

    def _stream(self, stream: int, size: int) -> Tensor:
        """The seeds of each component of each sample's stream, (batch, size)."""
        if (stream, size) not in self._seeds:
            root = torch.tensor(_signed(self.seed), dtype=torch.int64, device=self.index.device)
            keys = _advance(_advance(_mix(root), stream), self._owner)
            counter = torch.arange(1, size + 1, device=keys.device).mul_(_signed(_GOLDEN))
            self._seeds[stream, size] = keys.unsqueeze(-1) + counter
        return self._seeds[stream, size]

    def take(self, rows: Tensor) -> Noise:
        """The noise of some samples of the batch."""
        part = copy.copy(self)
        part.index, part._owner = self.index[rows], self._owner[rows]
        part._sign = None if self._sign is None else self._sign[rows]
        part._seeds = {key: seeds[rows] for key, seeds in self._seeds.items()}
        return part

    def normal(self, stream: int, node: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """Standard normals (batch, *event) of one node >= 0 of a stream."""
        return self.pairs(stream, hashed_words(torch.tensor([node >> 1])), event, dtype)[0, node & 1]

    def sequence(
        self, stream: int, nodes: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype
    ) -> Callable[[int], Tensor]:
        """`draw(k)`, k in 0..nodes-1, the same numbers as `normal(stream, k, ...)` drawn in blocks."""
        numbers = max(1, self.index.numel() * math.prod(event))
        size = max(1, min((nodes + 1) // 2, BLOCK // (2 * numbers)))  # in pairs
        start, block = -size, torch.empty(0)

        def draw(k: int) -> Tensor:
            nonlocal block, start
            pair = k >> 1
            if not start <= pair < start + size:
                start = pair - pair % size
                words = hashed_words(torch.arange(start, min(start + size, (nodes + 1) // 2)))
                block = self.pairs(stream, words, event, dtype)
            return block[pair - start, k & 1]

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

    def pairs(
        self,
        stream: int,
        words: Tensor,
        event: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        *,
        keep: bool = True,
    ) -> Tensor:
        """Two standard normals (n, 2, batch, *event) for each of n distinct `hashed_words`, (n,) or (n, batch).

        Not `keep`: in memory that the next such call writes over.
        """
        seeds, words = self._stream(stream, math.prod(event)), words.to(self.index.device)
        words = words[..., None, None] if words.ndim == 1 else words[..., None]
        work = torch.float64 if dtype == torch.float64 else torch.float32
        shape, device = torch.Size((len(words), *seeds.shape)), seeds.device
        bits = torch.add(seeds, words, out=SCRATCH.take("bits", shape, torch.int64, device))
        angle, radius = (SCRATCH.take(name, shape, work, device) for name in ("angle", "radius"))
        both = torch.Size((shape[0], 2, *shape[1:]))
        out = torch.empty(both, dtype=work, device=device) if keep else SCRATCH.take("pairs", both, work, device)
        _box_muller(bits, SCRATCH.take("work", shape, torch.int64, device), angle, radius, out)
        if self._sign is not None:
            out.mul_(self._sign.unsqueeze(-1))
        return out.reshape(*out.shape[:-1], *event).to(dtype)


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
