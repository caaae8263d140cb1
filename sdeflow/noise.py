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
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sdeflow.checked import checked_class

if TYPE_CHECKING:
    from sdeflow.bridge import Walk

PATH, PRIOR, CORRECTOR, DATA, RESTART, AREA, CHURN, WEAK, OBSERVED = 0, 1, 2, 3, 4, 5, 6, 7, 8
"""Streams: the driving path, the prior, Langevin correctors, draws of a problem's data, restarts, the path with its
areas, noise added back by churn, the two-point variables of weak methods, and noise added to observations."""

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
BLOCK = 1 << 20
"""Numbers drawn at once for coming steps: enough to spread the cost of the ~20 kernel launches."""

_NEAR = 1 << 17
"""Pairs made in one go, so that what lies between the operations stays in a core's cache."""


_ALL = (1 << 64) - 1


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch holds."""
    value &= _ALL
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


def _mix_number(z: int) -> int:
    """`_mix` of one number, as the 64-bit pattern."""
    z &= _ALL
    z = (z ^ z >> 30) * _MULTIPLIERS[0] & _ALL
    z = (z ^ z >> 27) * _MULTIPLIERS[1] & _ALL
    return z ^ z >> 31


def hashed_words(nodes: Tensor) -> Tensor:
    """Nodes (int64) spread over 64 bits: what `normal_pairs` adds to a sample's seeds."""
    return _mix((nodes + 1) * _signed(_GOLDEN))


def hashed_word(node: int) -> Tensor:
    """`hashed_words` of one node, (1,)."""
    return torch.tensor([_signed(_mix_number((node + 1) * _GOLDEN))])


def normal_pairs(seeds: Tensor, words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent standard normals for each of the 64-bit inputs seeds + words, which broadcast.

    Box-Muller on SplitMix64's output z: the angle is pi z/2^63 of the signed z, of which float32 keeps the upper and
    float64 all but the lowest bits, the radius is of the lower 32 bits; float64 or float32. A pure function, for
    `torch.compile`, which makes one kernel of it; `Noise` makes the same numbers in place.
    """
    z = seeds + words
    for bits, factor in zip((30, 27), _MULTIPLIERS, strict=True):
        z = (z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))) * _signed(factor)
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    angle = z.to(dtype) * (math.pi * 2.0**-63)
    radius = torch.sqrt(-2.0 * torch.log(((z & 0xFFFFFFFF).to(dtype) + 0.5) * 2.0**-32))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _box_muller(seeds: Tensor, words: Tensor, out: Tensor) -> None:
    """`out` (n, 2, batch, size) from the inputs seeds (batch, size) + words (n, 1 or batch, 1)."""
    shape, device = torch.Size((len(words), *seeds.shape)), seeds.device
    bits, work = (SCRATCH.take(name, shape, torch.int64, device) for name in ("bits", "work"))
    angle, radius = (SCRATCH.take(name, shape, out.dtype, device) for name in ("angle", "radius"))
    _mix(torch.add(seeds, words, out=bits), work)
    angle.copy_(bits).mul_(math.pi * 2.0**-63)
    radius.copy_(bits.bitwise_and_(0xFFFFFFFF)).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    torch.cos(angle, out=out[:, 0]).mul_(radius)
    torch.sin(angle, out=out[:, 1]).mul_(radius)


class _Scratch(threading.local):
    """Memory that blocks of noise are made in, kept from one to the next: fresh pages cost more than the numbers."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
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

    def lend(self, owner: object, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of so many numbers for as long as `owner` lives; then it is lent again."""
        for i, memory in enumerate(self._free):
            if memory.dtype == dtype and memory.device == device and memory.numel() >= count:
                del self._free[i]
                break
        else:
            with torch.inference_mode(False):
                memory = torch.empty(count, dtype=dtype, device=device)
        if count <= 4 * BLOCK:
            weakref.finalize(owner, _give_back, self._free, memory).atexit = False
        return memory


def _give_back(free: list[Tensor], memory: Tensor) -> None:
    free.append(memory)
    if len(free) > _FREE:
        del free[0]


_FREE = 6
"""Lent memory that is kept for the next to borrow: two blocks of W and two of H for one walk, and some more."""

SCRATCH = _Scratch()


def fresh_seed() -> int:
    """A seed from torch's global generator, for callers who gave none."""
    return int(torch.randint(0, 2**62, ()))


@checked_class
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
            # a key's child number n is its (n + 1)-th output
            key = _mix_number(_mix_number(self.seed) + (stream + 1) * _GOLDEN)
            keys = _mix((self._owner + 1).mul_(_signed(_GOLDEN)).add_(_signed(key)))
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

    def other(self, number: int) -> Noise:
        """The noise of another seed, made of this one's and a number > 0, for the same samples: a repetition's own."""
        part = copy.copy(self)
        part.seed = (self.seed + number * _GOLDEN) & _ALL
        part._seeds = {}
        return part

    def normal(self, stream: int, node: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """Standard normals (batch, *event) of one node >= 0 of a stream."""
        return self.pairs(stream, hashed_word(node >> 1), event, dtype)[0, node & 1]

    def sequence(
        self, stream: int, nodes: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype
    ) -> Callable[[int], Tensor]:
        """`draw(k)`, k in 0..nodes-1, the same numbers as `normal(stream, k, ...)` drawn in blocks.

        In memory that is used again after the next block, unless gradients are recorded.
        """
        return _Sequence(self, stream, nodes, tuple(event), dtype)

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
        from sdeflow.brownian import TreeWalk
        from sdeflow.grid_walk import GridWalk

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
        work = torch.float64 if dtype == torch.float64 else torch.float32
        shape = torch.Size((len(words), 2, self.index.numel(), math.prod(event)))
        device = self.index.device
        room = torch.empty(shape, dtype=work, device=device) if keep else SCRATCH.take("pairs", shape, work, device)
        return self.write_pairs(stream, words, room).reshape(*shape[:-1], *event).to(dtype)

    def write_pairs(self, stream: int, words: Tensor, room: Tensor) -> Tensor:
        """`pairs` in the memory `room` (n, 2, batch, size), float64 or float32."""
        seeds, words = self._stream(stream, room.shape[-1]), words.to(self.index.device)
        words = words[..., None, None] if words.ndim == 1 else words[..., None]
        nodes = max(1, _NEAR // max(1, seeds.numel()))
        for first in range(0, len(words), nodes):
            _box_muller(seeds, words[first : first + nodes], room[first : first + nodes])
        return room if self._sign is None else room.mul_(self._sign.unsqueeze(-1))


class _Sequence:
    """Normals of nodes 0, 1, ... of a stream, drawn in blocks."""

    def __init__(self, noise: Noise, stream: int, nodes: int, event: tuple[int, ...], dtype: torch.dtype) -> None:
        self._noise, self._stream, self._event, self._dtype = noise, stream, event, dtype
        self._pairs = (nodes + 1) // 2
        self._one = torch.Size((noise.index.numel(), math.prod(event)))
        self._size = max(1, min(self._pairs, BLOCK // (2 * max(1, self._one.numel()))))
        self._start, self._drawn, self._block = -self._size, 0, torch.empty(0)
        self._lent: list[Tensor] = []

    def __call__(self, k: int) -> Tensor:
        pair = k >> 1
        if not self._start <= pair < self._start + self._size:
            self._start = pair - pair % self._size
            self._draw(min(self._start + self._size, self._pairs))
        return self._block[pair - self._start, k & 1]

    def _draw(self, end: int) -> None:
        words = hashed_words(torch.arange(self._start, end))
        shape = torch.Size((len(words), 2, *self._one))
        work = torch.float64 if self._dtype == torch.float64 else torch.float32
        device = self._noise.index.device
        if torch.is_grad_enabled():
            room = torch.empty(shape, dtype=work, device=device)
        else:
            if len(self._lent) < 2:
                self._lent.append(SCRATCH.lend(self, 2 * self._size * self._one.numel(), work, device))
            room = self._lent[self._drawn % len(self._lent)][: shape.numel()].view(shape)
        self._drawn += 1
        block = self._noise.write_pairs(self._stream, words, room)
        self._block = block.reshape(*shape[:-1], *self._event).to(self._dtype)


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


@checked_class
@dataclass(frozen=True)
class SamePath(NoiseSource):
    """One Brownian path a sample, whatever the grid and the solver: that of `BrownianPath` on the solve's span.

    Costs up to 40 splits a step where times are no fractions of the span by a power of 2; see docs/noise.md.

    Args:
        seed: an integer of 64 bits; with the index of a sample it names the path.
    """

    seed: int

    def bind(self, batch: int, index: int | Tensor | None, device: torch.device | str) -> Noise:
        return Noise(self.seed, batch, index=index, device=device, one_path=True)


@checked_class
@dataclass(frozen=True)
class Antithetic(NoiseSource):
    """Samples of index 2j and 2j + 1 see opposite numbers: the path, and every other draw of the solve.

    Args:
        seed: an integer of 64 bits.
        same_path: as `SamePath`, else as a seed.
    """

    seed: int
    same_path: bool = False

    def bind(self, batch: int, index: int | Tensor | None, device: torch.device | str) -> Noise:
        return Noise(self.seed, batch, index=index, device=device, antithetic=True, one_path=self.same_path)


def checked_seed(seed: object) -> int:
    """The seed, if it is an integer of 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"expected an integer seed, got {seed!r}")
    seed = int(seed)
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"expected a seed of 64 bits, in [-2^63, 2^64), got {seed}")
    return seed


def checked_index(index: int | Tensor | None, batch: int) -> Tensor:
    """One index a sample, int64 (batch,)."""
    batch = int(batch)  # numpy's integers would overflow in the sums below
    index = int(index) if isinstance(index, np.integer) else index
    if not 1 <= batch < 1 << 40:
        raise ValueError(f"expected at least one sample, and fewer than 2^40, got {batch}")
    if isinstance(index, int) and not -(1 << 63) <= index < (1 << 63) - batch:
        raise ValueError(f"expected an index of 64 bits, got {index}")
    if index is None or (isinstance(index, int) and not isinstance(index, bool)):
        return torch.arange(batch) + (index or 0)
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"expected index to be an int offset or a 1-d integer tensor, got {index!r}")
    if index.shape != (batch,):
        raise ValueError(f"expected one index a sample, shape ({batch},), got shape {tuple(index.shape)}")
    return index.to(torch.int64)
