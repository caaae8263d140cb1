"""The spacings of DDPM tables, for a `DiscreteVP` of N entries: entry n (0 to N - 1) is the time (n + 1)/N.

A step runs from one entry to the next entry visited, and the last one to t_end: entry 0 at the default
t_min = 1/N, the data at t_end = 0. (Where a step's end is taken to be its start minus N/steps instead, whatever
the spacing, steps do not meet, and the last one runs past the data.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.grids.shared import ends, finish

if TYPE_CHECKING:
    from sdeflow.sde import Problem


def _by_entry(
    name: str,
    process: Problem,
    steps: int,
    t_start: float | None,
    t_end: float | None,
    entries: Callable[[int, float, float], Tensor],
) -> Tensor:
    """The grid that visits `entries(N, first, last)` (steps,), the first of them t_start itself, then t_end.

    first and last are the entries of the ends, last < 0 below the table.
    """
    start, end = ends(process, steps, t_start, t_end)
    betas = getattr(getattr(process, "process", process), "betas", None)
    if betas is None:
        raise ValueError(f"grids.{name} needs the table of a DiscreteVP, got {type(process).__name__}")
    size, low, high = betas.numel(), min(start, end), max(start, end)
    visited = entries(size, high * size - 1, low * size - 1)
    return finish(name, torch.cat([(visited + 1) / size, visited.new_tensor([low])]), start, end)


@checked
def trailing(process: Problem, steps: int, t_start: float | None = None, t_end: float | None = None) -> Tensor:
    """Entries round(N - i N/steps) - 1, i = 0 ... steps - 1: from the last one down, N/steps apart.

    1000 entries, 10 steps: 999, 899, ..., 99, then t_end. (Lin et al. 2024, Common diffusion noise schedules,
    section 3.3: sampling starts at the last entry.) From another t_start, equal parts of the way to the data.
    """

    def entries(size: int, first: float, last: float) -> Tensor:
        # the steps' ends are equal parts of the way to the data; only the last is replaced by t_end
        parts = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
        return torch.round((first + 1) * parts) - 1

    return _by_entry("trailing", process, steps, t_start, t_end, entries)


@checked
def leading(
    process: Problem,
    steps: int,
    t_start: float | None = None,
    t_end: float | None = None,
    *,
    offset: int = 1,
) -> Tensor:
    """Entries (steps - 1 - i) q + offset, i = 1 ... steps - 1, with q = N // steps; the first one is t_start.

    1000 entries, 10 steps, offset 1: 999, 801, 701, ..., 101, 1, then t_end. As published (Song et al. 2021, DDIM,
    with offset 0 and t_end = 0; Stable Diffusion, with offset 1 and t_end = 1/N) the first is 901: the table's
    end, which is the noise that sampling begins from, is left out. t_start = ((steps - 1) q + offset + 1)/N gives that.

    Args:
        offset: of all entries, >= 0; 0 visits entry 0, so that t_end must be below it.
    """
    if offset < 0:
        raise ValueError(f"expected an integer offset >= 0, got {offset!r}")

    def entries(size: int, first: float, last: float) -> Tensor:
        return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (size // steps) + offset

    return _by_entry("leading", process, steps, t_start, t_end, entries)


@checked
def linspace(process: Problem, steps: int, t_start: float | None = None, t_end: float | None = None) -> Tensor:
    """Entries rounded from equal parts of the table between its last entry and entry 0, both visited.

    1000 entries, 10 steps to t_end = 0: 999, 888, ..., 111, 0, then the data. To the default t_end, which is entry 0
    itself, it is the end: 999, 899, 799, ..., 100, then 0. (Nichol and Dhariwal 2021, Improved DDPM, section 4.)
    """

    def entries(size: int, first: float, last: float) -> Tensor:
        if last < -1e-9 or steps == 1:  # below the table
            return torch.round(torch.linspace(first, 0 if steps > 1 else first, steps, dtype=torch.float64))
        return torch.round(torch.linspace(first, last, steps + 1, dtype=torch.float64)[:-1])

    return _by_entry("linspace", process, steps, t_start, t_end, entries)
