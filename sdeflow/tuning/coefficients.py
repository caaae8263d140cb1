"""Coefficients fitted to the trajectories of a model: step by step by least squares, then all together by gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.reverse import ReverseSDE
from sdeflow.tuning.tables import Tables, run

_RIDGE = 1e-6
"""Of the normal equations, relative to their diagonal: evaluations of neighbours are nearly the same."""


def single_rows(table: Tables) -> bool:
    """Whether every step is one row, so that its coefficients make the step."""
    return table.plan.nfe == table.plan.steps


def fit_steps(problem: ReverseSDE, table: Tables, x: Tensor, states: Tensor) -> Tables:
    """The ratio and weights of each step that take its start nearest to the flow's state at its end, in turn.

    Least squares over all samples and components, from the state that the fitted steps before have reached.

    Args:
        states: of the flow at the grid, (steps + 1, batch, *event).
    """
    fitted = table.with_numbers(*(v.detach().clone() for v in table.numbers))

    def fit(k: int, base: Tensor, history: list[Tensor]) -> None:
        used = [j for j in range(len(history)) if bool(table.weights[k, j] != 0)]
        columns = torch.stack([base, *(history[j] for j in used)], dim=-1).to(torch.float64).flatten(0, -2)
        start = torch.cat([fitted.ratio[k : k + 1], fitted.weights[k, used]]).to(columns.device)
        left = states[k + 1].to(torch.float64).flatten() - columns @ start
        normal = columns.T @ columns
        ridge = torch.diag(_RIDGE * torch.diagonal(normal))
        change = torch.linalg.lstsq(normal + ridge, (columns.T @ left)[:, None]).solution[:, 0].cpu()
        fitted.ratio[k] += change[0]
        fitted.weights[k, used] += change[1:]

    with torch.no_grad():
        run(problem, fitted, x, fit)
    return fitted


def scaled(table: Tables, ratio: Tensor, weights: Tensor) -> Tables:
    """The table with its ratios and weights times 1 + what is given, of their shapes."""
    return table.with_numbers(table.ratio * (1 + ratio), table.weights * (1 + weights), *table.numbers[2:])
