"""Multilevel Monte Carlo: a telescoping sum of solves of the same noise, from cheap ones to accurate ones.

    E P_L = E P_l0 + sum_{l > l0} E[P_l - P_(l-1)],   each term by samples of its own

(Giles 2008, Multilevel Monte Carlo path simulation, section 2, equations 8 to 12). The two solves of a difference see
one Brownian path: steps that are halved refine the path's tree, and starts are the same. With variances that fall as
2^(-beta l), costs that grow as 2^l and a bias that falls as 2^(-alpha l), the cost of an error eps is O(eps^-2) for
beta > 1, O(eps^-2 log^2 eps) for beta = 1 and O(eps^(-2 - (1 - beta)/alpha)) below; plain Monte Carlo takes
O(eps^(-2 - 1/alpha)) (his theorem 3.1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdeflow.expectation.allocation import Sampled, Term, sample_terms, spread_of
from sdeflow.expectation.bias import bias_bound, differences, fall, weak_order
from sdeflow.expectation.estimate import Level
from sdeflow.expectation.regions import of_level
from sdeflow.expectation.simulation import Simulation
from sdeflow.expectation.sums import Drawn, Gather, Sums, merge, sums_of

BIAS_SHARE = 0.25
"""Of a tolerance on the exact law: what the bias may take."""
_FINEST = 1 << 14
"""Steps beyond which no level is added."""


@dataclass(frozen=True)
class Difference:
    """Unit i is the functional of sample i + offset by `fine`, less that by `coarse` of the same noise."""

    fine: Simulation
    coarse: Simulation | None
    offset: int = 0

    def __call__(self, a: int, b: int) -> Drawn:
        index = torch.arange(a, b) + self.offset
        x = self.fine(index)
        return x if self.coarse is None else less(x, self.coarse(index))


def less(x: Drawn, y: Drawn) -> Drawn:
    """The differences of two solves of the same samples, with the cost of both."""
    return Drawn(x.values - y.values, x.ok & y.ok, x.calls + y.calls)


def halved(steps: int, coarsest: int) -> list[int]:
    """steps, steps/2, ... while they are whole and at least `coarsest`; rising."""
    found = [steps]
    while found[-1] % 2 == 0 and found[-1] // 2 >= coarsest:
        found.append(found[-1] // 2)
    return found[::-1]


def terms_of(levels: Sequence[Simulation], drawn: Sequence[Drawn], first: int, batch: int) -> list[Term]:
    """The terms of the sum that starts at level `first`, with what the pilot's samples say of them.

    Args:
        drawn: the functional at each level, of the same samples.
    """
    terms = []
    for l in range(first, len(levels)):
        seen = drawn[l] if l == first else less(drawn[l], drawn[l - 1])
        coarse = None if l == first else levels[l - 1]
        units = Difference(levels[l], coarse, of_level(l))
        terms.append(term_of(name_of(levels[l], coarse), units, seen, batch))
    return terms


def term_of(name: str, units: Difference, seen: Drawn, batch: int) -> Term:
    """A term with the variance and the cost of the samples `seen`."""
    good = seen.values[seen.ok]
    n = len(seen.ok)
    variance = good.var(0) if len(good) > 1 else torch.full((seen.values.shape[1],), math.inf, dtype=torch.float64)
    return Term(name, units, 1, variance, max(seen.calls / n, 1e-9), spread_of(seen), batch)


def name_of(fine: Simulation, coarse: Simulation | None) -> str:
    """For people: "64 - 32 steps"."""
    if coarse is None:
        return f"{fine.steps} steps"
    if fine.solver == coarse.solver:
        return f"{fine.steps} - {coarse.steps} steps"
    return f"{fine.solver!r}, {fine.steps} steps - {coarse.solver!r}, {coarse.steps} steps"


def work(terms: Sequence[Term]) -> float:
    """(sum sqrt(V C))^2, the cost of a variance of 1 of the component that needs most."""
    roots = torch.stack([(term.variance * term.cost).sqrt() for term in terms])
    return float(roots.sum(0).square().max())


def best_start(levels: Sequence[Simulation], drawn: Sequence[Drawn], last: int, batch: int) -> int:
    """The first level, at most `last`, of the cheapest sum."""
    works = [work(terms_of(levels, drawn, first, batch)) for first in range(last + 1)]
    return min(range(len(works)), key=lambda l: works[l] if works[l] == works[l] else math.inf)


def shown(terms: Sequence[Term], sampled: Sampled) -> tuple[Level, ...]:
    """The terms for the result."""
    return tuple(
        Level(term.name, own.size, own.mean, float(own.variance.max()), own.calls / own.size)
        for term, own in zip(terms, sampled.sums, strict=True)
    )


@dataclass(frozen=True)
class Exact:
    """A sum long enough that the bias of its last level is small.

    Attributes:
        bias: bound of |E P_L - E P| (k,).
        rates: (alpha, beta).
        reached: whether the bias is.
    """

    terms: list[Term]
    sampled: Sampled
    bias: Tensor
    rates: tuple[float, float]
    reached: bool


def to_the_exact_law(
    levels: Sequence[Simulation], drawn: Sequence[Drawn], first: int, tol: float, confidence: float, max_num: int,
    batch: int, gather: Gather,
) -> Exact:  # fmt: skip
    """Add levels until the bias, extrapolated from the differences, is at most `BIAS_SHARE` of `tol`.

    The bound is that of `sdeflow.expectation.bias`, for the smallest weak order that the differences leave possible.
    """
    known = terms_of(levels, drawn, first, batch)
    tried = [sums_of(less(*pair)) for pair in zip(drawn[1:], drawn[:-1], strict=True)]
    terms = known[:3]
    state: Sampled | None = None
    while True:
        state = sample_terms(
            terms, (1 - BIAS_SHARE) * tol, confidence, max_num, gather, before=() if state is None else state.sums
        )
        seen = _pooled(tried, state.sums[1:], first)
        beta = fall([float(own.variance.max()) for own in seen], 8.0)
        means, errors = differences(seen, beta)
        bias = bias_bound(means, errors, beta)
        finest = terms[-1].units
        assert isinstance(finest, Difference)
        assert finest.fine.steps is not None
        fine = finest.fine.steps
        small = bool((bias <= BIAS_SHARE * tol).all())
        if small or not state.reached or 2 * fine > _FINEST:
            return Exact(terms, state, bias, (weak_order(means, errors), beta), small and state.reached)
        if len(terms) < len(known):
            added = known[len(terms)]
        else:
            finer = dataclasses.replace(finest.fine, steps=2 * fine)
            units = Difference(finer, finest.fine, of_level(first + len(terms)))
            spread = state.sums[-1].variance * 2**-beta
            added = Term(name_of(finer, finest.fine), units, 1, spread, 2 * terms[-1].cost, 0.0, batch)
        terms = _guarded([*terms, added], state, beta)


def _pooled(pilot: Sequence[Sums], own: Sequence[Sums], first: int) -> list[Sums]:
    """What is known of each difference, from the pilot too: also of those below the level `first` of the sum."""
    finite = [bool(torch.isfinite(part.mean).all()) for part in pilot[:first]]
    usable = pilot[max((k + 1 for k in range(first) if not finite[k]), default=0) : first]
    both = [merge(part, pilot[first + k]) if first + k < len(pilot) else part for k, part in enumerate(own)]
    return [*usable, *both]


def _guarded(terms: list[Term], state: Sampled, beta: float) -> list[Term]:
    """Variances of a level not below half of what the one before it makes likely (Giles 2015, section 3.1).

    A level of few samples, few of which differ, would else be thought exact.
    """
    guarded = terms[:2]
    for k in range(2, len(terms)):
        own = state.sums[k - 1].variance if k - 1 < len(state.sums) else guarded[-1].variance
        guarded.append(dataclasses.replace(terms[k], floor=0.5 * own * 2**-beta))
    return guarded
