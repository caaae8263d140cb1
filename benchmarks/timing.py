"""Timing by turns: every candidate once a round, medians over the rounds, so that a slow moment hits all."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table


def by_turns(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate over `rounds` rounds, after one run each to warm up."""
    return {name: statistics.median(times) for name, times in every_turn(candidates, rounds).items()}


def every_turn(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate, one a round, after one run each to warm up.

    With one thread the clock is the process's own time, which others on the machine disturb least.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table, with the machine below it."""
    table = Table(title=title, caption=f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_machine()}")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def _machine() -> str:
    return f"{platform.machine()}, Python {platform.python_version()}"
