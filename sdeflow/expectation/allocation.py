"""A mean as a sum of independent terms, sampled until its interval is short enough.

With variances V_l and costs C_l a unit, the least cost for a variance sum V_l/N_l = v has

    N_l = sqrt(V_l/C_l) (sum_m sqrt(V_m C_m))/v

(Giles 2008, Multilevel Monte Carlo path simulation, equation 12). Plain Monte Carlo is the case of one term. The
first numbers come from a pilot that is not part of the mean; what the interval lacks then is added. The last check
conditions on little: the pilot's variances are taken a standard error high, so that most runs end after the first
allocation (Stein 1945, A two-sample test for a linear hypothesis, for two stages).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.expectation.estimate import quantile, welch
from sdeflow.expectation.sums import Drawn, Gather, SamplesFailed, Sums, Units, merge

LEAST = 128
"""Units of a term, at least: what the normal law of its mean rests on."""
_ROUNDS = 12


@dataclass(frozen=True)
class Term:
    """One of the independent means.

    Attributes:
        name: for people.
        units: what is averaged.
        samples: of the problem, a unit; 0 for a term that costs no samples.
        variance: of a unit, the pilot's (k,).
        cost: of a unit, in model calls.
        spread: relative standard error of `variance`.
        block: units at once.
        floor: a variance that the sample's own is not trusted to be below, (k,).
    """

    name: str
    units: Units
    samples: int
    variance: Tensor
    cost: float
    spread: float
    block: int
    floor: Tensor | None = None


@dataclass(frozen=True)
class Sampled:
    """The sums of every term, and whether the standard error is what was asked for."""

    sums: tuple[Sums, ...]
    reached: bool

    @property
    def mean(self) -> Tensor:
        """(k,)."""
        return torch.stack([part.mean for part in self.sums]).sum(0)

    @property
    def parts(self) -> list[Tensor]:
        """The variance of each term's mean, (k,) each."""
        return [part.variance / max(part.good, 1) for part in self.sums]

    @property
    def stderr(self) -> Tensor:
        """(k,)."""
        return torch.stack(self.parts).sum(0).sqrt()

    @property
    def dof(self) -> Tensor:
        """(k,)."""
        return welch(self.parts, [max(1, part.good - 1) for part in self.sums])

    def half(self, confidence: float) -> float:
        """The widest component's half-width."""
        return float((quantile(confidence, self.dof) * self.stderr).max())

    @property
    def calls(self) -> float:
        """Model calls."""
        return sum(part.calls for part in self.sums)


def spread_of(drawn: Drawn) -> float:
    """The relative standard error of a sample variance, sqrt((kurtosis - 1)/n), of the component that varies most."""
    good = drawn.values[drawn.ok]
    centred = good - good.mean(0)
    second = centred.square().mean(0)
    k = int(second.argmax())
    if len(good) < 2 or float(second[k]) == 0.0:
        return 0.0
    kurtosis = float(centred[:, k].pow(4).mean() / second[k].square())
    return math.sqrt(max(kurtosis - 1, 0.0) / len(good))


def numbers(variances: Sequence[Tensor], costs: Sequence[float], target: float) -> list[int]:
    """N_l for a variance `target` of every component: the largest that one of them needs."""
    v, c = torch.stack(list(variances)), torch.tensor(list(costs), dtype=torch.float64)[:, None]
    total = (v * c).sqrt().sum(0)
    return [math.ceil(n) for n in ((v / c).sqrt() * total / target).amax(1).tolist()]


def sample_terms(
    terms: Sequence[Term], tol: float, confidence: float, max_num: int, gather: Gather, *,
    before: Sequence[Sums] = (),
) -> Sampled:  # fmt: skip
    """Sample until the half-width is at most `tol`, or until `max_num` samples are spent.

    Args:
        before: sums that the first terms begin with.
    """
    sums: list[Sums | None] = [*before, *[None] * (len(terms) - len(before))]
    for _ in range(_ROUNDS):
        variances = [_variance(term, own) for term, own in zip(terms, sums, strict=True)]
        dof = sum(own.good if own is not None else LEAST for own in sums) - 1
        z = float(quantile(confidence, torch.tensor([float(dof)], dtype=torch.float64)))
        wanted = numbers(variances, [term.cost for term in terms], (tol / z) ** 2)
        # those that fail do not count
        wanted = [math.ceil(max(LEAST, n) / _success(own)) for n, own in zip(wanted, sums, strict=True)]
        spent = sum(term.samples * n for term, n in zip(terms, wanted, strict=True))
        if spent > max_num:
            wanted = [max(LEAST, int(n * max_num / spent)) for n in wanted]
        for k, (term, own) in enumerate(zip(terms, sums, strict=True)):
            have = 0 if own is None else own.size
            if wanted[k] > have:
                try:
                    new = gather(term.units, have, wanted[k], term.block)
                except SamplesFailed as error:
                    error.calls += sum(part.calls for part in sums if part is not None)
                    raise
                sums[k] = new if own is None else merge(own, new)
        state = Sampled(tuple(own for own in sums if own is not None), False)
        if state.half(confidence) <= tol:
            return Sampled(state.sums, True)
        if spent > max_num:
            break
    return state


def _success(own: Sums | None) -> float:
    """The share of units that did not fail."""
    return max(own.good, 1) / own.size if own is not None else 1.0


def _variance(term: Term, own: Sums | None) -> Tensor:
    """The pilot's, a standard error high; the sample's own once there is one, 2% high so that a rest is not chased."""
    if own is None or own.good < 2:
        return term.variance * (1 + term.spread)
    return own.variance * 1.02 if term.floor is None else torch.maximum(own.variance * 1.02, term.floor)
