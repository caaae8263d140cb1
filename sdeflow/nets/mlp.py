"""A residual network on flattened samples."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sdeflow.checked import checked_class
from sdeflow.nets.embedding import Conditioned, check_sizes


@checked_class
class MLP(Conditioned):
    """A residual network on flattened samples, each block scaled and shifted by the time and the class.

        h <- h + B silu(A (norm(h) (1 + scale(e)) + shift(e))),   e the embedding of (lam, label)

    The output starts at 0. (The modulation is that of Peebles and Xie 2023, DiT, section 3.2.)

    Args:
        shape: of one sample, such as (1, 8, 8) or (2,).
        width: of the hidden state h.
        depth: number of residual blocks.
        embedding: width of the time embedding.
        harmonics: frequencies of lam that the embedding reads; more make the network rougher in time.
        classes: number of labels; 0 for a network without.
        learned_variance: whether `both` gives the v of a learned variance.

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
        classes: int = 0,
        learned_variance: bool = False,
    ) -> None:
        if not shape:
            raise ValueError("expected shape with at least one size, got ()")
        config: dict[str, Any] = {
            "shape": list(shape), "width": width, "depth": depth, "embedding": embedding, "harmonics": harmonics,
        }  # fmt: skip
        if classes:
            config["classes"] = classes
        if learned_variance:
            config["learned_variance"] = True
        check_sizes(config, *shape, width, depth, embedding, harmonics)
        super().__init__(shape, embedding, harmonics, classes, learned_variance)
        self.config = config
        size = math.prod(self.shape)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_Block(width, embedding) for _ in range(depth))
        self.last = _Modulated(width, embedding)
        self.leave = nn.Linear(width, 2 * size if learned_variance else size)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def _heads(self, x: Tensor, lam: Tensor, label: Tensor | None) -> Tensor:
        embedded = self._embedded(x, lam, label)
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = h + block(h, embedded)
        out = self.leave(self.last(h, embedded))
        channels = self.shape[0] * (2 if self.learned_variance else 1)
        return out.reshape(len(x), channels, *self.shape[1:])


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
