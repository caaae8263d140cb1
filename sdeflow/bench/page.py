"""The report: one HTML page that needs no network, with linked plots, rankings and sample images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sdeflow.bench import charts
from sdeflow.bench.extras import need
from sdeflow.bench.figures import vega_lite_version
from sdeflow.bench.merged import Run, compare, gather, numbered, results_file
from sdeflow.bench.results import Result, put
from sdeflow.bench.tables import Cell, Table, by_problem, initials, order, short_number, tables, twins
from sdeflow.files import check_not_read

LIMIT = 4_800_000
"""Characters that a page is kept below, by leaving out sample pictures."""
_PODIUM = 5
_ALWAYS = ("solver", "grid", "budget", "tolerance", "status", "median", "sliced_w2")
"""What every run on the page has, null or not; of the rest only what says something."""
_DIGITS = dict.fromkeys(("q90", "rms", "flip_rate", "low", "high"), 7) | dict.fromkeys(("wall_ms", "model_ms"), 4)
"""Of what does not rank: more than is shown is in the file of results."""


def report(results: str | Path | Iterable[Result | str | Path], out: str | Path) -> None:
    """The report of results, or of JSON lines files of them, as one HTML file. Several runs are compared.

    A folder stands for the `results.jsonl` in it.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, given twice, or no file of results; no results; or `out`
            is one of the files.
        ImportError: the extra "bench" is not installed.
    """
    items = [results] if isinstance(results, (str, Path)) else list(results)
    check_not_read(out, (results_file(item) for item in items if not isinstance(item, Result)))
    put(out, _html(items).encode())


def _html(items: Iterable[Result | str | Path]) -> str:
    runs = gather(items)
    results = numbered(runs)
    jinja2, convert, alt = need("jinja2"), need("vl_convert"), need("altair")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"error": _error, "seconds": _seconds, "ratio": _ratio}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "sort_keys": False}
    marks = {kind: _marks(runs, kind) for kind in ("trajectory", "distribution")}
    legend = {kind: _legend(runs, mark) for kind, mark in marks.items()}
    anchors = _anchors(r.problem for r in results)
    compared = [compare(runs[0], run) for run in runs[1:]]
    same = _twins(runs)
    sections = [
        _section(part, table, anchors[part[0].problem], marks[part[0].kind])
        | {"compared": [c[key] for c in compared if (key := (part[0].problem, part[0].kind)) in c]}
        | {"twins": same.get((part[0].problem, part[0].kind), [])}
        for part, table in zip(by_problem(results), tables(results), strict=True)
    ]
    solvers = [{"name": s["name"], "kind": kind, "run": s["run"]} for kind, listed in legend.items() for s in listed]
    page: dict[str, Any] = {
        "charts": [
            {k: s[k] for k in ("id", "anchor", "kind", "spec", "runs", "grid")} | {"letters": s["legend"]}
            for s in sections
        ],
        "solvers": solvers,
        "pictures": [],
    }
    template = environment.get_template("report.html")
    bundle = convert.javascript_bundle(vl_version=vega_lite_version(alt, convert))

    def render(left_out: int) -> str:
        return template.render(
            problems=_grouped(sections),
            page=page,
            legend=[{"kind": kind, "solvers": listed} for kind, listed in legend.items() if listed],
            runs=[_described(run) for run in runs],
            results=results,
            methods=len({r.solver for run in runs for r in run.results}),
            anchors=anchors,
            left_out=left_out,
            failures=[r for r in results if r.status != "ok"],
            grids=list(dict.fromkeys(r.grid for r in results if r.grid != "adaptive")),
            budgets=sorted({r.budget for r in results if r.budget is not None}),
            css=_template("report.css"),
            js=_template("report.js"),
            bundle=bundle,
        )

    waiting = [(s["grid"], r, r.pop("preview")) for s in sections for r in s["runs"] if "preview" in r]
    page["pictures"], left_out = _pictures(waiting, LIMIT - len(render(0)))
    return render(left_out)


def _template(name: str) -> str:
    return (resources.files("sdeflow.bench") / "templates" / name).read_text(encoding="utf-8")


def _described(run: Run) -> dict[str, Any]:
    """What the page says of a run, with the number and the time of its results."""
    seconds = sum(r.wall_seconds or 0.0 for r in run.results)
    return {"number": run.number, "label": run.label, "environment": run.environment, "count": len(run.results),
            "seconds": seconds}  # fmt: skip


def _marks(runs: Sequence[Run], kind: str) -> dict[str, tuple[str, str]]:
    """The marks of the solvers of a kind, the same in the charts of all problems; one colour in all runs."""
    names = dict.fromkeys(r.solver for run in runs for r in run.results if r.kind == kind)
    if len(runs) == 1:
        return charts.marks(names)
    turned = [charts.marks(names, turn=run.number - 1) for run in runs]
    ran = [{r.solver for r in run.results if r.kind == kind} for run in runs]
    # the runs of a solver stand together
    return {f"{n} [{run.number}]": turned[i][n] for n in names for i, run in enumerate(runs) if n in ran[i]}


def _legend(runs: Sequence[Run], marks: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """The solvers with their marks and the number of their run, None where there is one."""
    number = {f"{r.solver} [{run.number}]": run.number for run in runs for r in run.results} if len(runs) > 1 else {}
    return [{"name": s, "colour": c, "shape": shape, "run": number.get(s)} for s, (c, shape) in marks.items()]


def _twins(runs: Sequence[Run]) -> dict[tuple[str, str], list[list[str]]]:
    """For each problem and kind, groups of solvers that are the same method in every run that has them."""
    found: dict[tuple[str, str], list[list[str]]] = {}
    for run in runs:
        for part in by_problem(run.results):
            known = found.setdefault((part[0].problem, part[0].kind), [])
            known += [group for group in twins(part) if group not in known]
    return found


def _anchors(problems: Iterable[str]) -> dict[str, str]:
    """What each problem's section is linked to by: its name, where that can stand in an address."""
    anchors: dict[str, str] = {}
    for name in dict.fromkeys(problems):
        anchor = plain = "problem-" + re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-")
        if anchor in anchors.values():
            anchor = f"{plain}-{len(anchors) + 1}"
        anchors[name] = anchor
    return anchors


def _section(part: list[Result], table: Table, anchor: str, marks: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """What the page shows of one problem and kind."""
    short = initials(r.grid for r in part if r.budget is not None)
    first = part[0]
    columns = [_ranked(table, column) for column in range(len(table.budgets))]
    rank = {id(c): n for ranked in columns for n, (_, c) in enumerate(ranked, 1)}
    return {
        "id": f"{anchor}-{first.kind}",
        "anchor": anchor,
        "problem": first.problem,
        "kind": first.kind,
        "about": first.about,
        "scale": first.scale,
        "samples": first.samples,
        "dtype": first.dtype,
        "table": table,
        "cells": {s: [_cell(c, short, rank) for c in cells] for s, cells in table.rows.items()},
        "podium": _podium(columns, short),
        "legend": short,
        "solvers": {r.solver for r in part},
        "spec": charts.interactive(part, marks),
        "runs": [_compact(r) for r in charts.records(part)],
        "grid": charts.default_grid(part),
        "pictures": first.about.get("preview"),
    }


def _grouped(sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sections by problem."""
    problems: dict[str, list[dict[str, Any]]] = {}
    for section in sections:
        problems.setdefault(section["problem"], []).append(section)
    return [
        {"name": name, "anchor": parts[0]["anchor"], "about": parts[0]["about"], "parts": parts}
        for name, parts in problems.items()
    ]


def _ranked(table: Table, column: int) -> list[tuple[str, Cell]]:
    """The solvers of a column that finished, best first."""
    cells = ((solver, row[column]) for solver, row in table.rows.items())
    done = [(s, c) for s, c in cells if c and c.result.status == "ok" and c.result.error is not None]
    return sorted(done, key=lambda pair: order(pair[1].result))


def _podium(columns: list[list[tuple[str, Cell]]], short: dict[str, str]) -> list[list[dict[str, Any] | None]]:
    """Rows of places: the first, second, ... of each budget."""
    rows = []
    for place in range(min(_PODIUM, max(map(len, columns), default=0))):
        row = [(*column[place], short) if place < len(column) else None for column in columns]
        rows.append([entry and {"solver": entry[0], **(_cell(entry[1], short) or {})} for entry in row])
    return rows


def _cell(cell: Cell | None, short: dict[str, str], rank: dict[int, int] | None = None) -> dict[str, Any] | None:
    if cell is None:
        return None
    r = cell.result
    place = (rank or {}).get(id(cell))
    grid = "" if r.steps == 1 else short[r.grid]
    title = r.message or f"{'' if r.error is None else f'{r.error:.6g}'} on the {r.grid} grid, {r.nfe or 0:g} calls"
    return {"error": r.error, "grid": grid, "first": cell.first, "resolved": r.resolved, "failed": r.status != "ok",
            "rank": place, "title": title}  # fmt: skip


def _compact(record: dict[str, Any]) -> dict[str, Any]:
    """A run without what is empty or follows from the rest."""
    usual = {"resolved": True, "best": False, "single": False, "x": record["calls"]}
    kept = {k: v for k, v in record.items() if k in _ALWAYS or (v is not None and v != usual.get(k))}
    kept |= {name: float(f"{kept[name]:.{digits}g}") for name, digits in _DIGITS.items() if name in kept}
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in kept.items()}


def _pictures(waiting: list[tuple[str | None, dict[str, Any], str]], room: int) -> tuple[list[str], int]:
    """Each different picture once, and how many runs go without; runs then refer to pictures by number.

    When there is no room for all, those of the default grid come first, then those of the best.
    """
    number: dict[str, int] = {}
    left_out = 0
    for _, run, picture in sorted(waiting, key=lambda w: 0 if w[1]["grid"] == w[0] else 1 if "best" in w[1] else 2):
        room -= 16  # what its number takes
        if picture not in number:
            if len(picture) + 3 > room:
                left_out += 1
                continue
            room -= len(picture) + 3
            number[picture] = len(number)
        run["picture"] = number[picture]
    return list(number), left_out


def _error(value: float | None) -> str:
    return "" if value is None else short_number(value)


def _ratio(value: float | None) -> str:
    """Three digits; "1", not "1.00", for what is equal to 6."""
    if value is None:
        return ""
    if math.isinf(value):
        return "\N{INFINITY}"
    return "1" if abs(value - 1) <= 1e-6 else f"{value:#.3g}"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.1f} min"
