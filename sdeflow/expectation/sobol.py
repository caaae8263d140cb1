"""Randomised quasi-Monte Carlo: scrambled Sobol points for the leading numbers, Monte Carlo for the rest.

Each of R replicates is the mean over n = 2^m points of its own scramble: Matousek's linear matrix scramble with a
digital shift, for which, as for Owen's nested scramble, each point is uniform, so that every replicate is unbiased
(Owen 1997, Scrambled net variance for integrals of smooth functions; Matousek 1998, On the L2-discrepancy for anchored
boxes). Replicates are independent, so that their mean has an interval whatever the functional; but they can be skewed
(a point far out in a tail moves one of them), and there are few: Student's interval with R - 1 degrees of freedom is
widened for that. The error falls as n^(-3/2) for smooth functionals of the led numbers under Owen's scramble, as
n^(-1/2) for what the others contribute.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.expectation.estimate import quantile
from sdeflow.expectation.led_noise import Led
from sdeflow.expectation.simulation import Simulation
from sdeflow.expectation.sums import Drawn
from sdeflow.noise import hashed_words

REPLICATES = 32
"""R."""


@dataclass(frozen=True)
class Replicates:
    """Unit r is the mean over `points` points of scramble r + offset; failed if all its points failed.

    Attributes:
        start, path: numbers of the start and of the path that are led.
        axes: directions of the start's numbers (size, start), or None.
        batch: samples simulated at once.
    """

    simulation: Simulation
    points: int
    start: int
    path: int
    axes: Tensor | None = None
    offset: int = 0
    batch: int = 1 << 14

    def __call__(self, a: int, b: int) -> Drawn:
        return self.halves(a, b)[0]

    def halves(self, a: int, b: int) -> tuple[Drawn, Tensor, int]:
        """(the replicates, their means over the first half of their points, failed samples)."""
        totals: Tensor | None = None
        good = torch.zeros(2 * (b - a), 1, dtype=torch.float64)
        calls, failed = 0.0, 0
        for p in range(a * self.points, b * self.points, self.batch):
            at = torch.arange(p, min(p + self.batch, b * self.points))
            drawn = self._simulate(at)
            if totals is None:
                totals = torch.zeros(len(good), drawn.values.shape[1], dtype=torch.float64)
            cell = 2 * (at // self.points - a) + (at % self.points) * 2 // max(self.points, 2)
            totals.index_add_(0, cell, torch.where(drawn.ok[:, None], drawn.values, 0.0))
            good.index_add_(0, cell, drawn.ok[:, None].to(torch.float64))
            calls, failed = calls + drawn.calls, failed + int((~drawn.ok).sum())
        assert totals is not None
        cells, counts = totals.reshape(b - a, 2, -1), good.reshape(b - a, 2, 1)
        whole = cells.sum(1) / counts.sum(1)
        return Drawn(whole, counts.sum(1)[:, 0] > 0, calls), cells[:, 0] / counts[:, 0], failed

    def _simulate(self, at: Tensor) -> Drawn:
        replicate, point = at // self.points + self.offset, at % self.points
        parts = []
        for r in torch.unique_consecutive(replicate).tolist():
            mine = point[replicate == r]
            parts.append(scrambled_normals(self.simulation.seed, r, self.start + self.path, int(mine[0]), len(mine)))
        led = torch.cat(parts)
        source = Led(self.simulation.seed, led[:, : self.start], self.axes, led[:, self.start :])
        return self.simulation((replicate << 32) + point, source)

    def of(self, points: int, offset: int) -> Replicates:
        """The same with other numbers of points, and other scrambles."""
        return dataclasses.replace(self, points=points, offset=offset)


def scrambled_normals(seed: int, replicate: int, dimension: int, first: int, count: int) -> Tensor:
    """Points first..first + count - 1 of a scrambled Sobol sequence, as float64 normals (count, dimension)."""
    own = int(hashed_words(torch.tensor([replicate]))) ^ seed
    engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=own & ((1 << 62) - 1))
    if first:
        engine.fast_forward(first)
    # multiples of 2^-30: the middle of each cell is not 0, and has the points' own distribution
    return torch.special.ndtri(engine.draw(count, dtype=torch.float64) + 2.0**-31)


def skewed_quantile(confidence: float, values: Tensor) -> Tensor:
    """The quantile (k,) of the mean of `values` (R, k), by its standard error: Student's, widened for skewness.

    For Hall's transformation g(T) = T + c T^2/3 + c^2 T^3/27 + c/6 of the studentised mean T, c = skewness/sqrt(R),
    whose law is closer to symmetric, |g(T)| <= t is an interval about 0 (Hall 1992, On the removal of skewness by
    transformation); the longer of its two sides, never less than t.
    """
    count = len(values)
    t = quantile(confidence, torch.tensor([count - 1.0], dtype=torch.float64))
    centred = values - values.mean(0)
    second, third = centred.square().mean(0), centred.pow(3).mean(0)
    c = torch.where(second > 0, (third / second**1.5).abs(), 0.0).clamp(min=1e-6) / math.sqrt(count)
    inside = 1 - c * (t + c / 6)
    return torch.maximum(3 / c * (1 - inside.sign() * inside.abs() ** (1 / 3)), t)


def grown(points: int, whole: float, half: float, wanted: float) -> int:
    """Points a replicate, a power of 2, for a variance `wanted`, from those measured at `points` and at half as many.

    The rate of the variance is log2(half/whole), taken half an order lower and within [1, 2]: it is measured from few
    replicates.
    """
    rate = min(max(math.log2(half / whole) - 0.5, 1.0), 2.0) if whole > 0 and half > 0 else 1.0
    factor = (1.2 * whole / wanted) ** (1 / rate)
    return points << max(0, math.ceil(math.log2(max(factor, 1.0))))
