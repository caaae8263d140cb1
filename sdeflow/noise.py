"""Noise that belongs to the sample: a counter-based generator keyed by (seed, sample, stream, node).

Each (seed, stream, sample index, node) is hashed to the 64-bit seed of its own SplitMix64 sequence
(Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators: the generator passes
BigCrush); its outputs become pairs of normals by Box-Muller. Nothing is drawn in order, so a
sample's numbers do not change with the batch around it, with its position, or with the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

PATH, PRIOR, CORRECTOR, DATA, RESTART = 0, 1, 2, 3, 4
"""Streams: increments of the driving path, the prior, Langevin correctors, draws of a problem's data, restarts."""

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_BLOCK = 1 << 18
"""Numbers drawn at once for coming steps: enough to spread the cost of the ~20 kernel launches."""


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch holds."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _xor_shift(z: Tensor, bits: int) -> Tensor:
    """z ^ (z >> bits) with a logical shift; torch's shift of int64 is arithmetic, hence the mask."""
    return z.bitwise_xor_((z >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function (variant 13 of Stafford's mixers), in place; z is int64, products wrap."""
    z = _xor_shift(z, 30).mul_(_signed(_MULTIPLIERS[0]))
    z = _xor_shift(z, 27).mul_(_signed(_MULTIPLIERS[1]))
    return _xor_shift(z, 31)


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
    low = bits.bitwise_and(0xFFFFFFFF).to(dtype).add_(0.5).mul_(scale)
    high = (bits >> 32).to(dtype).add_(0.5).mul_(2 * math.pi * scale)
    radius = low.log_().mul_(-2.0).sqrt_()
    out = torch.empty((*keys.shape, 2 * half), dtype=dtype, device=keys.device)
    torch.mul(radius, torch.cos(high), out=out[..., :half])
    torch.mul(radius, torch.sin(high), out=out[..., half:])
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
    """

    def __init__(
        self,
        seed: int,
        batch: int,
        *,
        index: int | Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"expected an integer seed, got {seed!r}")
        if not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"expected a seed of 64 bits, in [-2^63, 2^64), got {seed}")
        self.seed = seed
        self.index = _checked_index(index, batch).to(device)
        self._keys: dict[int, Tensor] = {}

    def _stream(self, stream: int) -> Tensor:
        """The key of each sample's stream, (batch,)."""
        if stream not in self._keys:
            root = torch.tensor(_signed(self.seed), dtype=torch.int64, device=self.index.device)
            self._keys[stream] = _advance(_advance(_mix(root), stream), self.index)
        return self._keys[stream]

    def normal(self, stream: int, node: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """Standard normals (batch, *event) of one node of a stream."""
        return self._draw(stream, torch.tensor([node], device=self.index.device), event, dtype)[0]

    def sequence(
        self, stream: int, nodes: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype
    ) -> Callable[[int], Tensor]:
        """`draw(k)`, k in 0..nodes-1, the same numbers as `normal(stream, k, ...)` drawn in blocks."""
        numbers = max(1, self.index.numel() * math.prod(event))
        size = max(1, min(nodes, _BLOCK // numbers))
        block, start = torch.empty(0), -size

        def draw(k: int) -> Tensor:
            nonlocal block, start
            if not start <= k < start + size:
                start = k - k % size
                ks = torch.arange(start, min(start + size, nodes), device=self.index.device)
                block = self._draw(stream, ks, event, dtype)
            return block[k - start]

        return draw

    def _draw(self, stream: int, nodes: Tensor, event: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        keys = _advance(self._stream(stream), nodes.unsqueeze(-1))
        work = torch.float64 if dtype == torch.float64 else torch.float32
        flat = _normals(keys, math.prod(event), work)
        return flat.reshape(*keys.shape, *event).to(dtype)


def _checked_index(index: int | Tensor | None, batch: int) -> Tensor:
    if index is None or (isinstance(index, int) and not isinstance(index, bool)):
        return torch.arange(batch) + (index or 0)
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"expected index to be an int offset or a 1-d integer tensor, got {index!r}")
    if index.shape != (batch,):
        raise ValueError(f"expected one index a sample, shape ({batch},), got shape {tuple(index.shape)}")
    return index.to(torch.int64)
