"""Runs of the benchmark put side by side: which result is of which run, and the ratios between runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdeflow.bench.results import Result, read
from sdeflow.bench.tables import best_of_grids, by_problem

_TELLING = ("torch", "numpy", "python", "platform", "cpu", "cores", "memory_gb")
"""What a label says of a run beside its commit and its start, where runs differ in it."""
_SAME = 1e-6
"""Relative: errors that agree to this are the same numbers, rounded elsewhere."""


@dataclass
class Run:
    """Results of one environment, which includes the commit and the start.

    Attributes:
        number: 1, 2, ... in the order given.
        label: its commit or version, its start, and in what else it differs from the others.
        copy_of: the number of the run whose results these are too, from another file.
    """

    number: int
    environment: dict[str, Any]
    results: list[Result]
    file: Path | None = None
    label: str = ""
    copy_of: int | None = None


def gather(items: Iterable[Result | str | Path]) -> list[Run]:
    """The runs of results, or of files of them, or of the folders of runs.

    Files of one run that hold different parts of it are one run; a file that holds what another has already is a run
    of its own, labelled as a copy.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, given twice, without results or no file of results, or
            a result that is twice in the same file.
    """
    runs: list[Run] = []
    seen: set[Path] = set()
    loose: list[Result] = []
    for item in items:
        if isinstance(item, Result):
            loose.append(item)
            continue
        path = results_file(item)
        if path.resolve() in seen:
            raise ValueError(f"{path}: given twice; expected different files")
        seen.add(path.resolve())
        results = read(path)
        if not results:
            raise ValueError(f"{path}: expected at least one result, got none")
        _add(runs, results, path)
    _add(runs, loose, None)
    if not runs:
        raise ValueError("expected at least one result, got none")
    _label(runs)
    return runs


def results_file(path: str | Path) -> Path:
    """The file of results that a path names: of the folder of a run, its results.jsonl.

    Raises:
        ValueError: a folder without one.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if not (path / "results.jsonl").is_file():
        raise ValueError(f"{path} is a folder without results.jsonl: expected one of sdeflow bench, or the file itself")
    return path / "results.jsonl"


def job(result: Result) -> tuple[Any, ...]:
    """What was run: results of two runs are compared where this is the same."""
    r = result
    return r.problem, r.kind, r.solver, r.grid, r.budget, r.tolerance


def numbered(runs: Sequence[Run]) -> list[Result]:
    """All results; those of several runs with the number of the run after the solver, which is another curve."""
    if len(runs) == 1:
        return runs[0].results
    return [replace(r, solver=f"{r.solver} [{run.number}]") for run in runs for r in run.results]


def _add(runs: list[Run], results: Sequence[Result], file: Path | None) -> None:
    parts: dict[str, list[Result]] = {}
    for r in results:
        parts.setdefault(_key(r), []).append(r)
    for key, part in parts.items():
        _once(part, file)
        same = [run for run in runs if _key(run.results[0]) == key]
        mine = {job(r) for r in part}
        free = next((run for run in same if not mine & {job(r) for r in run.results}), None)
        if free is not None:
            free.results.extend(part)
        else:
            copy_of = same[0].number if same else None
            runs.append(Run(len(runs) + 1, part[0].environment, part, file, copy_of=copy_of))


def _key(result: Result) -> str:
    return json.dumps(result.environment, sort_keys=True)


def _once(part: Sequence[Result], file: Path | None) -> None:
    seen = set()
    for r in part:
        if job(r) in seen:
            what = f"tolerance {r.tolerance:g}" if r.tolerance is not None else f"budget {r.budget}"
            where = "the results" if file is None else str(file)
            raise ValueError(f"{where}: twice the same run: {r.problem}, {r.solver}, {r.grid}, {what}")
        seen.add(job(r))


def _label(runs: list[Run]) -> None:
    telling = [k for k in _TELLING if len({str(run.environment.get(k)) for run in runs}) > 1]
    for run in runs:
        where = run.environment
        version = f"commit {where['commit']}" if where.get("commit") else f"sdeflow {where.get('sdeflow', 'unknown')}"
        started = str(where.get("started", "unknown date")).replace("T", " ").removesuffix("Z")
        differs = [_fact(k, where[k]) for k in telling if where.get(k) is not None]
        copied = f"the same run as [{run.copy_of}], from another file" if run.copy_of else None
        if copied and run.file is not None:
            copied = f"{copied} ({run.file.parent.name}/{run.file.name})".replace("(/", "(")
        run.label = ", ".join([version, started, *differs, *([copied] if copied else [])])


def _fact(name: str, value: Any) -> str:
    unit = {"cores": " cores", "memory_gb": " GB"}.get(name)
    if unit:
        return f"{value}{unit}"
    return str(value) if name in ("platform", "cpu") else f"{name} {value}"


@dataclass(frozen=True)
class Ratio:
    """A run of the second over the same of the first: error and wall time; None where one has none.

    Attributes:
        note: "failed in [2]" and the like, or "".
    """

    first: Result
    second: Result
    error: float | None
    time: float | None
    note: str = ""

    @property
    def same(self) -> bool:
        return not self.note and (self.error is None or abs(self.error - 1) <= _SAME)


@dataclass(frozen=True)
class Comparison:
    """Two runs on one problem and kind.

    Attributes:
        first, second: their numbers.
        budgets: of the columns.
        rows: for each solver and budget, on the grid that is the first run's best there.
        ratios: all that both ran, on every grid.
        only: how many runs only the first, and only the second, has.
        differs: what else differs, so that the errors are not of the same samples.
    """

    first: int
    second: int
    budgets: list[int]
    rows: dict[str, list[Ratio | None]]
    ratios: list[Ratio]
    only: tuple[int, int]
    differs: list[str]

    @property
    def changed(self) -> list[Ratio]:
        """Those whose errors differ, the largest change first."""
        return sorted((r for r in self.ratios if not r.same), key=_change, reverse=True)

    def median(self, what: str) -> float | None:
        """Of the ratios of "error" or "time"."""
        values = [v for r in self.ratios if (v := getattr(r, what)) is not None]
        return statistics.median(values) if values else None


def _change(ratio: Ratio) -> float:
    if ratio.note or not ratio.error:
        return float("inf")
    return max(ratio.error, 1 / ratio.error)


def compare(first: Run, second: Run) -> dict[tuple[str, str], Comparison]:
    """The comparison of each problem and kind that both ran."""
    mine, theirs = ({(p[0].problem, p[0].kind): p for p in by_problem(run.results)} for run in (first, second))
    return {k: _compare(first.number, second.number, mine[k], theirs[k]) for k in mine if k in theirs}


def _compare(one: int, two: int, mine: list[Result], theirs: list[Result]) -> Comparison:
    other = {job(r): r for r in theirs}
    ratios = {job(r): _ratio(r, other[job(r)], (one, two)) for r in mine if job(r) in other}
    # the best of what both ran, else a row would be empty where the first has one grid more
    best = best_of_grids(r.first for r in ratios.values())
    budgets = sorted({b for _, b in best})
    rows = {
        s: [ratios[job(best[s, b])] if (s, b) in best else None for b in budgets]
        for s in dict.fromkeys(s for s, _ in best)
    }
    return Comparison(
        one, two, budgets, rows, list(ratios.values()),
        (len(mine) - len(ratios), len(theirs) - len(ratios)), _differences(mine[0], theirs[0]),
    )  # fmt: skip


def _ratio(a: Result, b: Result, numbers: tuple[int, int]) -> Ratio:
    failed = [f"[{n}]" for n, r in zip(numbers, (a, b), strict=True) if r.status != "ok" or r.error is None]
    time = b.wall_seconds / a.wall_seconds if a.wall_seconds and b.wall_seconds else None
    if failed:
        # both failed is no change
        return Ratio(a, b, None, None, "" if len(failed) == 2 else f"failed in {failed[0]}")
    assert a.error is not None
    assert b.error is not None
    if a.error == b.error:
        return Ratio(a, b, 1.0, time)
    return Ratio(a, b, b.error / a.error if a.error else float("inf"), time)


def _differences(a: Result, b: Result) -> list[str]:
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in ("seed", "samples", "dtype")}
    pairs |= {n: (a.about.get(n), b.about.get(n)) for n in ("process", "shape", "truth", "threads")}
    return [f"{name} ({x} and {y})" for name, (x, y) in pairs.items() if x != y]
