"""How far two results are from each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

F64 = torch.float64


def relative_gap(a: Tensor, b: Tensor) -> float:
    """max |a - b| over max |b|; infinite where one is not finite."""
    a, b = a.detach().to(F64), b.detach().to(F64)
    if a.shape != b.shape or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    return float((a - b).abs().max()) / max(float(b.abs().max()), 1e-300)


def different(a: Tensor, b: Tensor) -> float:
    """0 for equal bits, else the relative gap (at least the smallest number)."""
    return 0.0 if a.shape == b.shape and torch.equal(a, b) else max(relative_gap(a, b), 5e-324)


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())
