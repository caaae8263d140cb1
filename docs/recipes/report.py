"""What the recipes share: images with the calls that they took, and the printed rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import judge
import torch
from torch import Tensor

import sdeflow as sf


class Samples(dict[str, Tensor]):
    """Images (num, 1, 8, 8) by the label of their sampler, with `nfe`, the calls of the network a sample.

    Args:
        solutions: of `sf.sample`, by label.
        decode: from their final states to images.
    """

    def __init__(self, solutions: Mapping[str, sf.Solution], decode: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__({label: s.x if decode is None else decode(s.x) for label, s in solutions.items()})
        self.nfe = {
            label: float(torch.as_tensor(s.stats.nfe, dtype=torch.float64).mean()) for label, s in solutions.items()
        }


Row = tuple[str, str, str]
"""A sampler's label, its calls a sample ("-" where the recipe does not say) and its Frechet distance."""


def rows(images: Mapping[str, Tensor]) -> list[Row]:
    """One row a sampler."""
    nfe = getattr(images, "nfe", {})
    return [
        (label, f"{nfe[label]:.0f}" if label in nfe else "-", f"{judge.distance(x):.2f}") for label, x in images.items()
    ]


def show(images: Mapping[str, Tensor]) -> None:
    """Print the rows, and the floor of as many real digits."""
    num = len(next(iter(images.values())))
    width = max(len(label) for label in images)
    for label, nfe, distance in [*rows(images), ("real digits", "-", f"{judge.floor(num):.2f}")]:
        print(f"{label:{width}}  NFE {nfe:>5}  Frechet distance {distance:>6}")
