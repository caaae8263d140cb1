"""Time grids: `(process, steps, t_start, t_end) -> float64 tensor (steps + 1,)`, both ends exact.

`t_start` and `t_end` default to the process's sampling span (t1 down to t_min); grids run in either direction,
upwards through the same times. Every function here can be given as `grid=` to `solve` and `sample`; `GRIDS` lists all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sdeflow.grids.levels import cosine, exponential, flow_shift, karras, logistic, logsnr, polyexponential
from sdeflow.grids.tables import leading, linspace, trailing
from sdeflow.grids.times import beta, power, quadratic, uniform

GridFunction = Callable[..., Tensor]
"""`(process, steps, t_start, t_end) -> times`: float64 (steps + 1,), strictly monotone, both ends exact."""


@dataclass(frozen=True)
class GridRow:
    """One grid.

    Attributes:
        make: the function.
        description: of where its steps are, one line.
        needs: "time" fits any problem; "levels" the noise levels of a GaussianSDE, alpha = 0 included;
            "finite levels" the same where alpha > 0 on the span; "table" a DiscreteVP.
    """

    make: GridFunction
    description: str
    needs: Literal["time", "levels", "finite levels", "table"]

    def fits(self, process: Any) -> bool:
        """Whether it makes grids over the default span of `process` (or of what a ReverseSDE reverses)."""
        process = getattr(process, "process", process)
        if self.needs == "time":
            return True
        if self.needs == "table":
            return hasattr(process, "betas")
        if not hasattr(process, "time_of_lam"):
            return False
        return self.needs == "levels" or math.isfinite(float(process.lam(process.t1)))


GRIDS: dict[str, GridRow] = {
    "uniform": GridRow(uniform, "equal steps in t", "time"),
    "quadratic": GridRow(quadratic, "equal steps in sqrt(t - t0)", "time"),
    "power": GridRow(power, "equal steps in (t - t0)^(1/exponent), cubic by default", "time"),
    "beta": GridRow(beta, "times at equal quantiles of Beta(0.6, 0.6): dense at both ends", "time"),
    "logsnr": GridRow(logsnr, "equal steps in lam = log(alpha/sigma)", "finite levels"),
    "exponential": GridRow(exponential, "levels in geometric progression: logsnr by another name", "finite levels"),
    "polyexponential": GridRow(polyexponential, "a power rho of equal steps in lam; 1 is logsnr", "finite levels"),
    "karras": GridRow(karras, "equal steps in (sigma/alpha)^(1/rho), rho = 7 by default", "finite levels"),
    "cosine": GridRow(cosine, "equal steps of the angle atan(sigma/alpha)", "levels"),
    "flow_shift": GridRow(flow_shift, "equal steps of a flow's time, shifted towards noise, 3 by default", "levels"),
    "logistic": GridRow(logistic, "equal steps of a logistic function of lam around sigma/alpha = 0.5", "levels"),
    "trailing": GridRow(trailing, "table entries N/steps apart, from the last one", "table"),
    "leading": GridRow(leading, "table entries N // steps apart, from the first one plus an offset", "table"),
    "linspace": GridRow(linspace, "table entries at equal parts of the table, first and last included", "table"),
}
"""Every grid by name."""

__all__ = [
    "GRIDS",
    "GridFunction",
    "GridRow",
    "beta",
    "cosine",
    "exponential",
    "flow_shift",
    "karras",
    "leading",
    "linspace",
    "logistic",
    "logsnr",
    "polyexponential",
    "power",
    "quadratic",
    "trailing",
    "uniform",
]
