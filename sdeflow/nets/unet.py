"""A compact U-Net for small images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdeflow.checked import checked_class
from sdeflow.nets.embedding import Conditioned, check_sizes

_GROUPS = 8


@checked_class
class UNet(Conditioned):
    """Residual convolutions at halving resolutions and back, with skip connections (Ho et al. 2020, DDPM, appendix B).

    Args:
        shape: (channels, height, width) of one image; height and width divisible by 2^(levels - 1).
        width: channels at the first level, a multiple of 8.
        multipliers: of the width, one a level.
        blocks: residual blocks a level, on the way down and on the way up.
        attention: whether the lowest level has self-attention.
        embedding: width of the embedding of time and label.
        harmonics: frequencies of lam that the embedding reads.
        classes: number of labels; 0 for a network without.
        learned_variance: whether `both` gives the v of a learned variance.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        attention: bool = False,
        embedding: int = 128,
        harmonics: int = 8,
        classes: int = 0,
        learned_variance: bool = False,
    ) -> None:
        config: dict[str, Any] = {
            "shape": list(shape), "width": width, "multipliers": list(multipliers), "blocks": blocks,
            "attention": bool(attention), "embedding": embedding, "harmonics": harmonics, "classes": classes,
            "learned_variance": bool(learned_variance),
        }  # fmt: skip
        check_sizes(config, *shape, width, *multipliers, blocks, embedding, harmonics)
        halvings = 1 << (len(multipliers) - 1) if multipliers else 0
        if len(shape) != 3 or not multipliers or shape[1] % halvings or shape[2] % halvings:
            raise ValueError(
                f"expected images (channels, height, width) that {len(multipliers)} levels halve, got {tuple(shape)}"
            )
        if width % _GROUPS:
            raise ValueError(f"expected a width that is a multiple of {_GROUPS}, got {width}")
        super().__init__(shape, embedding, harmonics, classes, learned_variance)
        self.config = config
        sizes = [width * m for m in multipliers]
        self.enter = nn.Conv2d(shape[0], width, 3, padding=1)
        kept, now = [width], width
        self.down = nn.ModuleList()
        for level, size in enumerate(sizes):
            for _ in range(blocks):
                self.down.append(_Block(now, size, embedding))
                kept.append(now := size)
            if level < len(sizes) - 1:
                self.down.append(_Halve(now))
                kept.append(now)
        self.middle = nn.ModuleList([_Block(now, now, embedding), _Block(now, now, embedding)])
        self.attention = _Attention(now) if attention else None
        self.up = nn.ModuleList()
        for level, size in reversed(list(enumerate(sizes))):
            for _ in range(blocks + 1):
                self.up.append(_Block(now + kept.pop(), size, embedding))
                now = size
            if level > 0:
                self.up.append(_Double(now))
        self.norm = nn.GroupNorm(_GROUPS, now)
        self.leave = nn.Conv2d(now, shape[0] * (2 if learned_variance else 1), 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        if self.leave.bias is not None:
            nn.init.zeros_(self.leave.bias)

    def _heads(self, x: Tensor, lam: Tensor, label: Tensor | None) -> Tensor:
        embedded = self._embedded(x, lam, label)
        h = self.enter(x)
        kept = [h]
        for layer in self.down:
            h = layer(h, embedded)
            kept.append(h)
        h = self.middle[0](h, embedded)
        h = h if self.attention is None else self.attention(h)
        h = self.middle[1](h, embedded)
        for layer in self.up:
            h = layer(torch.cat([h, kept.pop()], dim=1) if isinstance(layer, _Block) else h, embedded)
        return self.leave(F.silu(self.norm(h)))


class _Block(nn.Module):
    """Two convolutions, the second after a scale and a shift by the embedding."""

    def __init__(self, before: int, after: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.modulate = nn.Linear(embedding, 2 * after)
        self.norm = nn.GroupNorm(_GROUPS, after)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.modulate(embedded)[..., None, None].chunk(2, dim=1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.skip(x) + self.second(F.silu(h))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS if channels % _GROUPS == 0 else 1, channels)


class _Halve(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return self.conv(x)


class _Double(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class _Attention(nn.Module):
    """Self-attention over the places of an image, added to it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 32)
        while channels % self.heads:
            self.heads -= 1
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.enter = nn.Conv2d(channels, 3 * channels, 1)
        self.leave = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.enter(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        query, key, value = tokens.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.leave(mixed.transpose(-1, -2).reshape(x.shape))
