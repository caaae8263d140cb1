"""Small networks for vectors and small images, called as `net(x, lam)`.

They read the time as lam = log(alpha/sigma), so a `Model` of one takes `time="lam"`, and its output
is smooth in lam and in x (SiLU, a few harmonics of a bounded function of lam): the order of a solver
can be seen on them. Their `config` holds the constructor's arguments, which is what a checkpoint keeps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SPREAD = 5.0
"""lam/_SPREAD goes through tanh: VP at t = 1e-3 .. 1 has lam = 4.6 .. -5, and both infinities are finite."""


def time_features(lam: Tensor, harmonics: int) -> Tensor:
    """cos and sin of (pi k/2) tanh(lam/5), k = 1..harmonics: (batch,) -> (batch, 2 harmonics).

    The slowest has a period of twice the range, so no two times share their features.
    """
    angle = torch.tanh(lam / _SPREAD).unsqueeze(-1) * (
        0.5 * math.pi * torch.arange(1, harmonics + 1, device=lam.device, dtype=lam.dtype)
    )
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class MLP(nn.Module):
    """A residual network on flattened samples, each block scaled and shifted by the time.

        h <- h + B silu(A (norm(h) (1 + scale(lam)) + shift(lam)))

    The output starts at 0. (The modulation is that of Peebles and Xie 2023, DiT, section 3.2.)

    Args:
        shape: of one sample, such as (1, 8, 8) or (2,).
        width: of the hidden state h.
        depth: number of residual blocks.
        embedding: width of the time embedding.
        harmonics: frequencies of lam that the embedding reads; more make the network rougher in time.

    Raises:
        ValueError: a size that is not from 1 to 65536.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        width: int = 232,
        depth: int = 3,
        embedding: int = 64,
        harmonics: int = 8,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.config: dict[str, Any] = {
            "shape": list(self.shape), "width": width, "depth": depth,
            "embedding": embedding, "harmonics": harmonics,
        }  # fmt: skip
        sizes = (*self.shape, width, depth, embedding, harmonics)
        if not all(isinstance(n, int) and 1 <= n <= 1 << 16 for n in sizes):
            raise ValueError(f"expected sizes from 1 to 65536, got {self.config}")
        size = math.prod(self.shape)
        self.harmonics = harmonics
        self.time = nn.Sequential(
            nn.Linear(2 * harmonics, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, embedding) for _ in range(depth))
        self.last = _Modulated(width, embedding)
        self.leave = nn.Linear(width, size)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        """(batch, *shape), (batch,) -> (batch, *shape)."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"expected x of shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        time = self.time(time_features(lam, self.harmonics))
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = h + block(h, time)
        return self.leave(self.last(h, time)).reshape(x.shape)


class _Modulated(nn.Module):
    """Layer norm with scale and shift from the time embedding."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding, 2 * width)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.linear(time).chunk(2, dim=-1)
        return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


class _Block(nn.Module):
    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.norm = _Modulated(width, embedding)
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        nn.init.zeros_(self.b.weight)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        return self.b(F.silu(self.a(self.norm(h, time))))
