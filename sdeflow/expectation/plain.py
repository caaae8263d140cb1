"""Plain Monte Carlo: independent samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdeflow.expectation.simulation import Simulation
from sdeflow.expectation.sums import Drawn


@dataclass(frozen=True)
class Plain:
    """Unit i is the functional of sample i + offset."""

    simulation: Simulation
    offset: int = 0

    def __call__(self, a: int, b: int) -> Drawn:
        return self.simulation(torch.arange(a, b) + self.offset)
