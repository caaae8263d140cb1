"""What a network is told besides the state: the time as lam = log(alpha/sigma), and a class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.checked import checked, described

_SPREAD = 5.0
"""lam/_SPREAD goes through tanh: VP at t = 1e-3 .. 1 has lam = 4.6 .. -5, and both infinities are finite."""


@checked
def time_features(lam: Tensor, harmonics: int) -> Tensor:
    """cos and sin of (pi k/2) tanh(lam/5), k = 1..harmonics: (batch,) -> (batch, 2 harmonics).

    The slowest has a period of twice the range, so no two times share their features.
    """
    return _features(lam, harmonics)


def _features(lam: Tensor, harmonics: int) -> Tensor:
    """`time_features` of a network's own call, which may be on "meta" too."""
    if not isinstance(lam, Tensor):
        raise TypeError(f"expected lam as a tensor, got {described(lam)}")
    if not lam.is_floating_point() or not 1 <= harmonics * max(lam.numel(), 1) < 1 << 30:
        raise ValueError(
            f"expected lam as floating-point numbers and harmonics >= 1, got {lam.dtype} of shape {tuple(lam.shape)} "
            f"and {harmonics}"
        )
    angle = torch.tanh(lam / _SPREAD).unsqueeze(-1) * (
        0.5 * math.pi * torch.arange(1, harmonics + 1, device=lam.device, dtype=lam.dtype)
    )
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


class Conditioned(nn.Module, ABC):
    """A network of (x, lam, label): the embedding that its blocks read, and the two halves of its output.

    Attributes:
        shape: of one sample.
        classes: labels are 0..classes-1, and `classes` for none; 0 for a network without labels.
        learned_variance: whether it also returns the v of a learned variance (Nichol and Dhariwal 2021, Improved
            DDPM, equation 15), by `both`.
    """

    config: dict[str, Any]

    def __init__(
        self, shape: tuple[int, ...], embedding: int, harmonics: int, classes: int, learned_variance: bool
    ) -> None:
        super().__init__()
        self.shape, self.harmonics, self.classes = tuple(shape), harmonics, classes
        self.learned_variance = learned_variance
        self.time = nn.Sequential(
            nn.Linear(2 * harmonics, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        if classes:
            self.label = nn.Embedding(classes + 1, embedding)
            nn.init.normal_(self.label.weight, std=0.1)

    def _embedded(self, x: Tensor, lam: Tensor, label: Tensor | None) -> Tensor:
        """(batch, embedding) of the time and the label; x is checked for its shape."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"expected x of shape (batch, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        time = self.time(_features(lam, self.harmonics))
        if not self.classes:
            if label is not None:
                raise ValueError("expected no label: the network was made without classes")
            return time
        if label is None:
            label = torch.full(lam.shape, self.classes, dtype=torch.int64, device=lam.device)
        if label.shape != lam.shape or label.dtype != torch.int64:
            raise ValueError(
                f"expected one int64 label a sample, {tuple(lam.shape)}, got {label.dtype} of {tuple(label.shape)}"
            )
        return time + self.label(label)

    @abstractmethod
    def _heads(self, x: Tensor, lam: Tensor, label: Tensor | None) -> Tensor:
        """The output (batch, channels, ...), of twice the channels with a learned variance."""

    def forward(self, x: Tensor, lam: Tensor, label: Tensor | None = None) -> Tensor:
        """The prediction (batch, *shape) at x (batch, *shape), lam (batch,), label int64 (batch,) or None."""
        out = self._heads(x, lam, label)
        return out.chunk(2, dim=1)[0] if self.learned_variance else out

    def both(self, x: Tensor, lam: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(prediction, v), v in (0, 1) elementwise, from one pass.

        Raises:
            ValueError: the network has no learned variance.
        """
        if not self.learned_variance:
            raise ValueError("expected a network made with learned_variance=True")
        prediction, v = self._heads(x, lam, label).chunk(2, dim=1)
        return prediction, torch.sigmoid(v)


def check_sizes(config: dict[str, Any], *sizes: int) -> None:
    """Refuse sizes that are not from 1 to 65536, and a number of classes that is not from 0 to 65536."""
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= 1 << 16 for n in sizes)
    classes = config.get("classes", 0)
    if not whole or not isinstance(classes, int) or not 0 <= classes <= 1 << 16:
        raise ValueError(f"expected sizes from 1 to 65536, got {config}")
