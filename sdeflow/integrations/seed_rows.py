"""Noise of samples that have a seed each, as callers with a generator an image want it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdeflow.noise import Noise


class SeedRows(Noise):
    """Row i is the noise of sample 0 of seeds[i]: that of a batch of one with that seed.

    Args:
        seeds: integers of 64 bits, one a sample; equal seeds give equal noise.
        device: where the numbers are made.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        index = torch.zeros(len(seeds), dtype=torch.int64)
        super().__init__(seeds[0], len(seeds), index=index, device=device)
        self._rows = [Noise(seed, 1, device=device) for seed in seeds]

    def _stream(self, stream: int, size: int) -> Tensor:
        if (stream, size) not in self._seeds:
            self._seeds[stream, size] = torch.cat([row._stream(stream, size) for row in self._rows])
        return self._seeds[stream, size]

    def take(self, rows: Tensor) -> Noise:
        part = super().take(rows)
        assert isinstance(part, SeedRows)
        part._rows = [self._rows[i] for i in torch.arange(len(self._rows))[rows.cpu()].tolist()]
        return part

    def other(self, number: int) -> Noise:
        part = super().other(number)
        assert isinstance(part, SeedRows)
        part._rows = [row.other(number) for row in self._rows]
        return part
