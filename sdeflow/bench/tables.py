"""The ranking: for each problem, solvers against budgets, each at the best of its grids."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sdeflow.bench.extras import need
from sdeflow.bench.results import Result


@dataclass(frozen=True)
class Cell:
    """The best run of a solver at a budget; `first` marks the best of the column, when that is resolved."""

    result: Result
    first: bool = False


@dataclass(frozen=True)
class Table:
    """Attributes: problem and kind; budgets of the columns; cells by solver, None where nothing was run;
    adaptive runs, which have no budget."""

    problem: str
    kind: str
    budgets: list[int]
    rows: dict[str, list[Cell | None]]
    adaptive: list[Result]
    about: dict[str, Any]
    scale: float | None
    floor: float | None


def order(result: Result) -> tuple[bool, float]:
    """Sort key: finished runs by their error, then failed ones."""
    failed = result.status != "ok" or result.error is None
    return failed, float("inf") if failed or result.error is None else result.error


def best_of_grids(results: Iterable[Result]) -> dict[tuple[str, int], Result]:
    """The run with the smallest error for each (solver, budget) of one problem and kind."""
    best: dict[tuple[str, int], Result] = {}
    for result in results:
        if result.budget is None:
            continue
        key = (result.solver, result.budget)
        if key not in best or order(result) < order(best[key]):
            best[key] = result
    return best


def tables(results: Sequence[Result]) -> list[Table]:
    """One table a problem and kind, in the order of the results."""
    return [_table(part) for part in by_problem(results)]


def by_problem(results: Iterable[Result]) -> list[list[Result]]:
    """The results of each problem and kind."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.problem, result.kind), []).append(result)
    names = list(dict.fromkeys(problem for problem, _ in groups))
    return [groups[n, kind] for n in names for kind in ("trajectory", "distribution") if (n, kind) in groups]


def _table(results: list[Result]) -> Table:
    best = best_of_grids(results)
    budgets = sorted({budget for _, budget in best})
    solvers = list(dict.fromkeys(r.solver for r in results if r.budget is not None))
    leaders = {}
    for budget in budgets:
        leader = min((r for (_, b), r in best.items() if b == budget), key=order)
        if leader.status == "ok" and leader.resolved:
            leaders[budget] = leader.error
    rows = {
        s: [
            Cell(best[s, b], first=b in leaders and best[s, b].error == leaders[b]) if (s, b) in best else None
            for b in budgets
        ]
        for s in solvers
    }
    return Table(
        problem=results[0].problem,
        kind=results[0].kind,
        budgets=budgets,
        rows=rows,
        adaptive=[r for r in results if r.budget is None],
        about=results[0].about,
        scale=results[0].scale,
        floor=next((r.floor for r in results if r.floor is not None), None),
    )


RANKING = ("problem", "kind", "nfe", "rank", "solver", "grid", "error", "median", "q90", "rms", "flip_rate", "status")


def ranking(results: Sequence[Result]) -> str:
    """The ranking as CSV: for each problem, kind and budget the solvers, each at its best grid, best first.

    `error` is what they are ranked by: the median of a trajectory, the sliced W2 of a distribution.
    """
    rows: list[tuple[str, ...]] = [RANKING]
    for part in by_problem(results):
        best = best_of_grids(part)
        for budget in sorted({b for _, b in best}):
            ranked = sorted((r for (_, b), r in best.items() if b == budget), key=order)
            for rank, r in enumerate(ranked, 1):
                numbers = ("" if v is None else f"{v:.6g}" for v in (r.error, r.median, r.q90, r.rms, r.flip_rate))
                rows.append((r.problem, r.kind, str(budget), str(rank), r.solver, r.grid, *numbers, r.status))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def twins(results: Iterable[Result]) -> list[list[str]]:
    """Groups of solvers whose errors agree to 6 digits on every grid and budget that both ran."""
    runs: dict[str, dict[tuple[str, int], float]] = {}
    for r in results:
        if r.budget is not None and r.status == "ok" and r.error is not None:
            runs.setdefault(r.solver, {})[r.grid, r.budget] = r.error
    groups: list[list[str]] = []
    for solver, mine in runs.items():
        for group in groups:
            theirs = runs[group[0]]
            common = mine.keys() & theirs.keys()
            if common and all(abs(mine[k] - theirs[k]) <= 1e-6 * theirs[k] for k in common):
                group.append(solver)
                break
        else:
            groups.append([solver])
    return [g for g in groups if len(g) > 1]


def initials(grids: Iterable[str]) -> dict[str, str]:
    """The shortest beginnings that tell names apart."""
    names = list(dict.fromkeys(grids))
    short = {}
    for name in names:
        size = next(
            (n for n in range(1, len(name)) if not any(o != name and o.startswith(name[:n]) for o in names)),
            len(name),
        )
        short[name] = name[:size]
    return short


def show(results: Sequence[Result]) -> None:
    """The tables, in the terminal."""
    rich, box, console = need("rich.table"), need("rich.box"), need("rich.console").Console()
    # an ellipsis in a number is worse than a line that wraps
    console.width = max(console.width, 110)
    for table in tables(results):
        short = initials(c.result.grid for row in table.rows.values() for c in row if c)
        measure = "median error" if table.kind == "trajectory" else "sliced W2"
        legend = ", ".join(f"{v} {k}" for k, v in short.items())
        floor = "" if table.floor is None else f"; floor {short_number(table.floor)}"
        console.print(f"{table.problem}: {measure} at each budget of model calls, at the best grid", highlight=False)
        view = rich.Table(box=box.SIMPLE_HEAD, pad_edge=False)
        view.add_column("solver", no_wrap=True)
        for budget in table.budgets:
            view.add_column(str(budget), justify="right", no_wrap=True)
        for solver, cells in table.rows.items():
            view.add_row(solver, *(_text(c, short) for c in cells))
        console.print(view)
        notes = f"grids: {legend}; * below 2 floors, not resolved; spread {table.scale or 0:.2g}{floor}"
        console.print(notes, highlight=False)
        for solver, runs in groupby(table.adaptive, key=lambda r: r.solver):
            console.print(f"{solver}: {', '.join(map(_point, runs))}", highlight=False)
        console.print()


def _point(result: Result) -> str:
    if result.status != "ok" or result.error is None:
        return f"failed at tolerance {result.tolerance:g}"
    return f"{short_number(result.error)} with {result.nfe:.0f} calls"


def short_number(value: float) -> str:
    """Two digits, the exponent without its zero: 7.9e-3."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _text(cell: Cell | None, short: dict[str, str]) -> str:
    if cell is None:
        return ""
    if cell.result.status != "ok" or cell.result.error is None:
        return "[red]failed[/red]"
    grid = "-" if cell.result.steps == 1 else short[cell.result.grid]  # one step is the same on all grids
    text = f"{short_number(cell.result.error)}{' ' if cell.result.resolved else '*'}{grid}"
    return f"[bold green]{text}[/bold green]" if cell.first else text
