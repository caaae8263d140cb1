"""The result of `expect`: a mean with its interval, what it cost, and what the pilot saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import special
from torch import Tensor

Method = Literal["plain", "antithetic", "sobol", "control", "multilevel"]


@dataclass(frozen=True)
class Candidate:
    """A method in the pilot.

    Attributes:
        method: its name.
        variance: variance of its mean, times the samples that it took, in units of plain Monte Carlo's: below 1 it
            needs fewer samples. NaN if it was not tried.
        cost: model calls a sample, in units of plain Monte Carlo's.
        ratio: cost of plain Monte Carlo at equal error over that of the method, 1/(variance cost): above 1 it is
            cheaper.
        low: lower end of the pilot's interval of `ratio`, two standard errors.
        note: why it was not tried, or what it was tried with.
    """

    method: Method
    variance: float
    cost: float
    ratio: float
    low: float
    note: str = ""


@dataclass(frozen=True)
class Level:
    """A term of a telescoping sum: the difference between two solves of the same noise, or the coarsest solve.

    Attributes:
        name: what was solved, for example "64 - 32 steps".
        num: samples.
        mean: (k,) of the term.
        variance: of a sample of it, the largest of the components.
        calls: a sample.
    """

    name: str
    num: int
    mean: Tensor
    variance: float
    calls: float


@dataclass(frozen=True)
class Expectation:
    """E f(X) with a confidence interval.

    Attributes:
        mean: float64, () or (k,) as the functional is.
        stderr: standard error, of the shape of `mean`.
        bias: bound of the discretisation's bias that is part of the interval, of the shape of `mean`: 0 where the
            interval is about the law of the solver's own steps.
        interval: (low, high): mean -+ (quantile stderr + bias), each component at the confidence asked for. The
            quantile is Student's; of Sobol's few replicates, widened for their skewness.
        confidence: of each component's interval.
        dof: degrees of freedom of the Student quantile, of the shape of `mean`.
        num: samples simulated for the mean; those of the pilot come on top.
        failed: of those, samples that failed and are left out: the mean is then that of the others.
        nfe: model calls, summed over samples, with the pilot's.
        pilot_nfe: the pilot's, and those of a method that was given up as samples failed.
        method: what was used.
        converged: whether the half-width is at most `tol`; True without one.
        tol: what was asked for.
        pilot: what the pilot saw, a row a method; empty without one.
        levels: terms of a telescoping sum; empty for methods without.
        rates: (alpha, beta) of a multilevel run: |bias| falls as 2^(-alpha l), variances as 2^(-beta l).
    """

    mean: Tensor
    stderr: Tensor
    bias: Tensor
    interval: tuple[Tensor, Tensor]
    confidence: float
    dof: Tensor
    num: int
    failed: int
    nfe: float
    pilot_nfe: float
    method: Method
    converged: bool
    tol: float | None = None
    pilot: tuple[Candidate, ...] = ()
    levels: tuple[Level, ...] = ()
    rates: tuple[float, float] | None = None

    @property
    def half_width(self) -> float:
        """Half the length of the widest component's interval."""
        return float(((self.interval[1] - self.interval[0]) / 2).max())

    def __str__(self) -> str:
        values = zip(*(v.reshape(-1).tolist() for v in (self.mean, *self.interval)), strict=True)
        lines = [f"{m:.6g} in [{a:.6g}, {b:.6g}]" for m, a, b in values]
        lines[0] += f" at {self.confidence:.0%}, {self.method}, {self.num} samples, {self.nfe:.4g} model calls"
        if self.failed:
            lines.append(f"{self.failed} failed and are left out")
        if bool((self.stderr == 0).any()):
            lines.append(
                "standard error 0: all samples gave the same value; an event that none of them saw is not in it"
            )
        if not self.converged:
            lines.append(f"not converged: half-width {self.half_width:.3g}, asked for {self.tol:g}")
        for row in self.pilot:
            what = f"{row.ratio:8.2f} times cheaper than plain (at least {row.low:.2f})"
            lines.append(f"  {row.method:<11}" + (what if row.ratio == row.ratio else " not tried") + _aside(row.note))
        lines += [
            f"  {level.name:<20} {level.num:>10} samples, variance {level.variance:.3g}, {level.calls:.4g} calls each"
            for level in self.levels
        ]
        return "\n".join(lines)


def _aside(note: str) -> str:
    return f": {note}" if note else ""


def quantile(confidence: float, dof: Tensor) -> Tensor:
    """The two-sided Student quantile at `confidence`, of the shape of `dof`."""
    return torch.from_numpy(np.asarray(special.stdtrit(dof.numpy(), 0.5 + 0.5 * confidence))).reshape(dof.shape)


def welch(variances: list[Tensor], dofs: list[int]) -> Tensor:
    """Degrees of freedom of a sum of independent means with these variances (Welch 1947), (k,)."""
    total = torch.stack(variances).sum(0)
    below = torch.stack([v.square() / n for v, n in zip(variances, dofs, strict=True)]).sum(0)
    return torch.where(below > 0, total.square() / below, float(sum(dofs)))
