"""Antithetic pairs: the mean of two samples of opposite noise.

Var = (1 + r)/2 of two independent samples', r the correlation of the pair: 0 for odd functionals of the noise, twice as
bad as independent samples for even ones (Glasserman 2003, Monte Carlo Methods in Financial Engineering, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdeflow.expectation.simulation import Simulation
from sdeflow.expectation.sums import Drawn
from sdeflow.noise import Antithetic


@dataclass(frozen=True)
class Pairs:
    """Unit i is the mean of the functional over samples 2 i and 2 i + 1 (+ offset, even), whose noise is opposite."""

    simulation: Simulation
    offset: int = 0

    def __call__(self, a: int, b: int) -> Drawn:
        drawn = self.simulation(torch.arange(2 * a, 2 * b) + self.offset, Antithetic(self.simulation.seed))
        pairs = drawn.values.reshape(b - a, 2, -1)
        return Drawn(pairs.mean(1), drawn.ok.reshape(-1, 2).all(1), drawn.calls)
