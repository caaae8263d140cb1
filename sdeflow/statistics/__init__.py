"""Statistics of many samples that are not kept: accumulators that workers fill and that merge in any order.

A statistic takes a block of values (n, *event) at a time; `merge` joins two. Counts are integers. Sums are of float64:
a block's own sum is rounded, in an order that only the block decides, and the sum over blocks is exact (`ExactSum`), so
that the result depends on the blocks and not on who computed them, when, or in which order, to the last bit.
"""

from sdeflow.statistics.base import Functional, Statistic
from sdeflow.statistics.counts import Histogram, Quantiles
from sdeflow.statistics.exact import ExactSum
from sdeflow.statistics.moments import Covariance, Frechet, Moments

__all__ = ["Covariance", "ExactSum", "Frechet", "Functional", "Histogram", "Moments", "Quantiles", "Statistic"]
