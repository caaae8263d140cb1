"""The bias of a sum of levels: what the differences say of those that are not in it.

With E[P_l - P_(l-1)] = c 2^(-alpha l) from some level on, what is missing after level L is c 2^(-alpha L)/(2^alpha - 1)
(Giles 2015, Multilevel Monte Carlo methods, section 3): the smaller alpha, the more. A path's least value under
Euler-Maruyama has alpha = 1/2, a smooth functional of its end 1; nothing says in advance which it is. So c is fitted to
all the differences for each alpha, and the bound is that of the smallest alpha that they do not contradict.

By |E D|^2 <= E D^2 variances that fall as 2^(-beta l) about means that vanish need alpha >= beta/2, and variances are
seen long before means are: half of beta less 1/2, for its own error, is the least alpha. Below 1/2 nothing is looked
for: that weak order is required.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdeflow.expectation.sums import Sums

LEAST_ORDER = 0.5
"""The lowest weak order that is looked for."""
MOST_ORDER = 1.0
"""The highest that a bound rests on: what a higher one saves is a level or two, where levels are cheapest."""
_MODEL = 0.05
"""How far the last difference is from a pure power of the step, relative to its size; twice as far a level before."""
_ORDERS = torch.linspace(LEAST_ORDER, 4.0, 141, dtype=torch.float64)


def _fitted(means: Tensor, errors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `_ORDERS`: (misfit, c, its standard error), (orders, k); c of the last difference.

    Args:
        means, errors: of the differences, (levels, k), with their standard errors.
    """
    level = torch.arange(len(means), dtype=torch.float64) - (len(means) - 1)
    spread = errors.square() + (_MODEL * 2.0 ** -level[:, None] * means).square() + 1e-300
    shape = 2.0 ** (-_ORDERS[:, None] * level)  # (orders, levels), 1 at the last
    precision = torch.einsum("al,lk->ak", shape.square(), 1 / spread)
    c = torch.einsum("al,lk->ak", shape, means / spread) / precision
    misfit = ((means - shape[:, :, None] * c[:, None]).square() / spread).sum(1)
    return misfit, c, precision.rsqrt()


def weak_order(means: Tensor, errors: Tensor) -> float:
    """The alpha that fits best, of the largest component."""
    misfit = _fitted(means, errors)[0]
    return float(_ORDERS[misfit[:, int(means.abs().amax(0).argmax())].argmin()])


def bias_bound(means: Tensor, errors: Tensor, beta: float) -> Tensor:
    """Of |what is missing after the last difference|, (k,).

    The largest (|c| + its standard error)/(2^alpha - 1) over the alpha, at most 1, whose misfit is within 1 (a standard
    error of alpha) of the best; and what the last two differences make of the smallest such alpha by themselves, their
    standard errors taken off, where they do not fall as the others do.
    """
    misfit, c, error = _fitted(means, errors)
    least = min(max(LEAST_ORDER, (beta - 0.5) / 2), MOST_ORDER)
    orders = _ORDERS.clamp(max=MOST_ORDER)[:, None]
    inside = (misfit <= misfit.amin(0) + 1) & (_ORDERS[:, None] >= least - 1e-9)
    inside[torch.searchsorted(_ORDERS, least - 1e-9)] |= ~inside.any(0)
    tail = torch.where(inside, (c.abs() + error) / (2**orders - 1), 0.0).amax(0)
    lowest = torch.where(inside, orders, MOST_ORDER).amin(0)
    seen = (means.abs() - errors).clamp(min=0)[-2:]
    fallen = torch.stack([seen[k] * 2 ** (-lowest * (len(seen) - 1 - k)) for k in range(len(seen))]).amax(0)
    return torch.maximum(tail, fallen / (2**lowest - 1))


def differences(sums: Sequence[Sums], beta: float) -> tuple[Tensor, Tensor]:
    """(means, standard errors) of the differences, (levels, k).

    A variance counts at least as what the one before it makes likely: of a few samples none may differ.
    """
    errors: list[Tensor] = []
    least = torch.zeros_like(sums[0].mean)
    for own in sums:
        variance = torch.maximum(own.variance, least)
        errors.append((variance / max(own.good, 1)).sqrt())
        least = variance * 2**-beta
    return torch.stack([own.mean for own in sums]), torch.stack(errors)


def fall(values: Sequence[float], most: float) -> float:
    """beta of values that fall as 2^(-beta l), at least 1/2; zeros say that too few samples were taken to see any."""
    seen = [(float(l), math.log2(v)) for l, v in enumerate(values) if v > 0]
    if len(seen) < 2:
        return 1.0
    x, y = torch.tensor(seen, dtype=torch.float64).T
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return min(max(-slope, 0.5), most)
