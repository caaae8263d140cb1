"""Losses on the nodes of a time grid: drawing their times, and finding the step that a time begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE
from sdeflow.losses.times import check_count
from sdeflow.model import Model


@checked
def grid_times(
    grid: Tensor | Sequence[float], *, generator: torch.Generator | None = None
) -> Callable[[GaussianSDE, int], Tensor]:
    """`(process, n)` -> n independent times, uniform over the nodes at which the steps of `grid` begin, float64.

    For `train(times=)` with a loss on that grid. The law of times is the grid's: it has more nodes where there is more
    to learn.

    Args:
        grid: falling times (steps + 1,), as the functions of `sdeflow.grids` make them; its last node begins no step.
        generator: of the draws, on the CPU; None for torch's global one.

    Raises:
        ValueError: not such a grid; or, when drawing, a node outside the process's span.
    """
    nodes = falling(grid, "grid_times")

    def times(process: GaussianSDE, n: int) -> Tensor:
        check_count(n)
        check_span(nodes, process, "grid_times")
        return nodes[torch.randint(nodes.numel() - 1, (n,), generator=generator)]

    return times


def falling(grid: Tensor | Sequence[float], what: str) -> Tensor:
    """The grid as float64 on the CPU, checked to fall."""
    nodes = torch.as_tensor(grid, dtype=torch.float64).detach().cpu()
    if nodes.ndim != 1 or nodes.numel() < 2 or not bool((torch.diff(nodes) < 0).all()):
        raise ValueError(f"{what}: expected a grid of falling times (steps + 1,), got {_shown(nodes)}")
    return nodes


def check_span(nodes: Tensor, process: GaussianSDE, what: str) -> None:
    """Refuse a grid that leaves the process's span."""
    if float(nodes[0]) > process.t1 or float(nodes[-1]) < process.t0:
        raise ValueError(
            f"{what}: expected a grid in [{process.t0:g}, {process.t1:g}], got {float(nodes[0]):g} to "
            f"{float(nodes[-1]):g}"
        )


def step_of(starts: Tensor, t: Tensor, what: str) -> Tensor:
    """int64 of the shape of t: which of the falling `starts` each time is, to a billionth of their span."""
    at = starts.to(t.device)
    index = (t.unsqueeze(-1) - at).abs().argmin(-1)
    bad = (t - at[index]).abs() > 1e-9 * float(starts.abs().max())
    if t.device.type == "cpu" and bool(bad.any()):
        raise ValueError(
            f"{what}: expected times at which a step of its grid begins, got t = {float(t[bad][0]):g}: draw them by "
            "grid_times of that grid"
        )
    return index


def check_teacher(teacher: Model, what: str) -> None:
    """Refuse a teacher that is not a Model of a GaussianSDE."""
    if not isinstance(teacher, Model):
        raise TypeError(f"{what}: expected a Model as teacher, got {type(teacher).__name__}")
    _ = teacher.gaussian


def bound_teacher(teacher: Model, model: Model) -> Model:
    """The teacher with the conditions that the student has (labels of a batch); of the student's process."""
    if teacher.sde is not model.sde and teacher.sde != model.sde:
        raise ValueError(f"expected a teacher and a student of one process, got {teacher.sde!r} and {model.sde!r}")
    return teacher.bind(**model.conditions) if model.conditions else teacher


def _shown(nodes: Tensor) -> str:
    if nodes.ndim != 1 or nodes.numel() < 2:
        return f"shape {tuple(nodes.shape)}"
    values = [f"{v:g}" for v in nodes.tolist()]
    return "[" + ", ".join(values if len(values) <= 8 else [*values[:4], "...", *values[-3:]]) + "]"
