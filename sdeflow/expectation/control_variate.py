"""A control variate: the functional of a Gaussian map of the same noise, whose own mean is known or cheap.

    mean of [f(X) - b f(Y)] + b E f(Y),   b = Cov(f(X), f(Y))/Var f(Y)

Unbiased for any b that does not depend on these samples: b is the pilot's (Glasserman 2003, Monte Carlo Methods in
Financial Engineering, section 4.1.1). E f(Y) is given, or drawn from the exact law of Y, or from more runs of Y; its
own error is then a part of the interval (Emsermann and Simon 2002, Improving simulation efficiency with quasi control
variates, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.expectation.simulation import Simulation
from sdeflow.expectation.sums import Drawn, Units


@dataclass(frozen=True)
class Controlled:
    """Unit i is f(X_i) - b f(Y_i), of sample i + offset.

    Attributes:
        simulation, control: of X and of Y.
        slope: b (k,).
        call_cost: of a call of the control, in calls of the problem.
    """

    simulation: Simulation
    control: Simulation
    slope: Tensor
    call_cost: float
    offset: int = 0

    def __call__(self, a: int, b: int) -> Drawn:
        x, y = self.both(a, b)
        return Drawn(x.values - self.slope * y.values, x.ok & y.ok, x.calls + self.call_cost * y.calls)

    def both(self, a: int, b: int) -> tuple[Drawn, Drawn]:
        """f(X) and f(Y) of the same noise."""
        index = torch.arange(a, b) + self.offset
        x, y = self.simulation(index), self.control(index)
        if x.values.shape != y.values.shape:
            raise ValueError(
                f"expected a control of the problem's shape: the functional is {tuple(x.values.shape)} of the problem "
                f"and {tuple(y.values.shape)} of the control"
            )
        return x, y


@dataclass(frozen=True)
class Scaled:
    """Unit i is b times unit i + offset of others: the term b E f(Y)."""

    units: Units
    slope: Tensor
    call_cost: float
    offset: int = 0

    def __call__(self, a: int, b: int) -> Drawn:
        drawn = self.units(a + self.offset, b + self.offset)
        return Drawn(self.slope * drawn.values, drawn.ok, self.call_cost * drawn.calls)


def slope_of(x: Drawn, y: Drawn) -> Tensor:
    """b (k,) of the pilot's pairs; 0 for a control that does not vary."""
    ok = x.ok & y.ok
    fx, fy = (v.values[ok] - v.values[ok].mean(0) for v in (x, y))
    spread = fy.square().sum(0)
    return torch.where(spread > 0, (fx * fy).sum(0) / spread, 0.0)
