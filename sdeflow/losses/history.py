"""Importance sampling of times by the history of their losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdeflow.checked import checked, checked_class
from sdeflow.gaussian import GaussianSDE
from sdeflow.losses.times import MOST_TIMES, lowest


@checked_class
class LossHistory:
    """The last losses of each of `bins` bins of time, and the probabilities that they ask for:

        p_b = (1 - uniform) sqrt(mean L_b^2)/sum + uniform/bins,   weight = 1/(bins p_b),

    so that the mean of weight L over draws is the mean of L over the bins whatever p is, with the least variance where
    L does not vary inside a bin; uniform until every bin has `history` losses (Nichol and Dhariwal 2021, Improved
    DDPM, section 3.3, equation 18; the uniform part is that of their code). Bins are parts of a span
    (`importance_times`), or the entries n of a table for `hybrid` and `step_bits`.

    Args:
        bins: their number.
        history: losses kept a bin.
        uniform: the share of uniform draws, in [0, 1], which bounds the weights by 1/uniform.

    Raises:
        ValueError: a number that does not fit.
    """

    def __init__(self, bins: int, *, history: int = 10, uniform: float = 1e-3) -> None:
        for name, value in (("bins", bins), ("history", history)):
            if value < 1:
                raise ValueError(f"expected {name} to be an integer >= 1, got {value!r}")
        if bins * history > MOST_TIMES:
            raise ValueError(f"expected at most {MOST_TIMES} losses, bins times history, got {bins} times {history}")
        if not (math.isfinite(uniform) and 0 <= uniform <= 1):
            raise ValueError(f"expected uniform in [0, 1], got {uniform!r}")
        self.bins, self.uniform = bins, float(uniform)
        self._losses = torch.zeros(bins, history, dtype=torch.float64)
        self._count = torch.zeros(bins, dtype=torch.long)

    def __repr__(self) -> str:
        return f"LossHistory({self.bins} bins, {'in use' if self.ready else 'filling'})"

    @property
    def ready(self) -> bool:
        """Whether every bin has its losses."""
        return bool((self._count >= self._losses.shape[1]).all())

    @property
    def probabilities(self) -> Tensor:
        """p (bins,), float64."""
        even = torch.full((self.bins,), 1 / self.bins, dtype=torch.float64)
        size = torch.sqrt(self._losses.square().mean(1))
        if not self.ready or not float(size.sum()) > 0:
            return even
        return (1 - self.uniform) * size / size.sum() + self.uniform * even

    def draw(self, n: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` independent bins (n,) and their weights (n,), float64; from torch's global generator unless given one."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"expected n to be an integer >= 1, got {n!r}")
        p = self.probabilities
        index = torch.multinomial(p, n, replacement=True, generator=generator)
        return index, 1 / (self.bins * p[index])

    def update(self, index: Tensor, losses: Tensor) -> None:
        """Keep the losses (n,), without their weights, of the bins `index` (n,); the oldest go.

        Raises:
            ValueError: shapes that do not fit, a bin that is none, or a loss that is not finite.
        """
        index, losses = index.detach().cpu(), losses.detach().cpu().to(torch.float64)
        if index.ndim != 1 or index.shape != losses.shape or index.is_floating_point():
            raise ValueError(
                f"expected bins (n,) as integers and losses (n,), got {index.dtype} {tuple(index.shape)} "
                f"and {tuple(losses.shape)}"
            )
        if index.numel() > 0 and not (int(index.min()) >= 0 and int(index.max()) < self.bins):
            raise ValueError(f"expected bins in 0..{self.bins - 1}, got {int(index.min())} to {int(index.max())}")
        if not bool(torch.isfinite(losses).all()):
            raise ValueError("expected finite losses")
        keep = self._losses.shape[1]
        order = torch.argsort(index, stable=True)
        bins, total = index[order], torch.bincount(index, minlength=self.bins)
        rank = torch.arange(len(bins)) - (total.cumsum(0) - total)[bins]  # among the losses of its bin
        newest = rank >= total[bins] - keep
        slot = (self._count[bins] + rank) % keep
        self._losses[bins[newest], slot[newest]] = losses[order][newest]
        self._count += total


@checked
def importance_times(
    process: GaussianSDE,
    n: int,
    history: LossHistory,
    t_min: float | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(times, weights, bins), (n,) each: a bin of [t_min, t1] by `history`, and a time uniform in it.

    The mean of weight times loss is the mean over t uniform on [t_min, t1]. After the losses are known, tell them:
    `history.update(bins, losses)`. Times and weights are float64.

    Args:
        n: the number of times.
        history: its bins are equal parts of the span.
        t_min: the lower end; a hundred-thousandth of the span above t0 unless given.
        generator: None for torch's global one.
    """
    low = lowest(process, t_min)
    index, weights = history.draw(n, generator=generator)
    share = (index + torch.rand(n, dtype=torch.float64, generator=generator)) / history.bins
    return low + (process.t1 - low) * share, weights, index


class ImportanceTimes:
    """`importance_times` with the history that it learns: what `sdeflow.training.train` takes as `times`.

    Called with a process and n it gives (times, weights); `update` tells it the losses of those times.

    Args:
        history: its bins are equal parts of the span; 100 bins unless given.
        t_min: the lower end, as of `importance_times`.
    """

    def __init__(self, history: LossHistory | None = None, t_min: float | None = None) -> None:
        self.history, self.t_min = LossHistory(100) if history is None else history, t_min
        self._bins = torch.zeros(0, dtype=torch.long)

    def __repr__(self) -> str:
        return f"ImportanceTimes({self.history!r})"

    def __call__(self, process: GaussianSDE, n: int) -> tuple[Tensor, Tensor]:
        """(times, weights), (n,) float64, from torch's global generator."""
        times, weights, self._bins = importance_times(process, n, self.history, self.t_min)
        return times, weights

    def update(self, losses: Tensor) -> None:
        """Keep the losses (n,), without their weights, of the times of the last call."""
        self.history.update(self._bins, losses)
