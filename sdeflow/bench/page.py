"""The report: one HTML page that needs no network, with linked plots, rankings and sample images."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sdeflow.bench import charts
from sdeflow.bench.extras import need
from sdeflow.bench.figures import vega_lite_version
from sdeflow.bench.results import Result, put, read
from sdeflow.bench.tables import Cell, Table, by_problem, initials, order, tables, twins

LIMIT = 4_800_000
"""Characters that a page is kept below, by leaving out sample pictures."""
_PODIUM = 5
_ALWAYS = ("solver", "grid", "budget", "tolerance", "status", "median", "sliced_w2")
"""What every run on the page has, null or not; of the rest only what says something."""
_DIGITS = dict.fromkeys(("q90", "rms", "flip_rate", "low", "high"), 7) | dict.fromkeys(("wall_ms", "model_ms"), 4)
"""Of what does not rank: more than is shown is in the file of results."""


def report(results: str | Path | Iterable[Result | str | Path], out: str | Path) -> None:
    """The report of results, or of JSON lines files of them, as one HTML file. Several runs are compared.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, or no file of results, or no results.
        ImportError: the extra "bench" is not installed.
    """
    items = [results] if isinstance(results, (str, Path)) else list(results)
    every: list[Result] = []
    for item in items:
        every += [item] if isinstance(item, Result) else read(item)
    if not every:
        raise ValueError("expected at least one result, got none")
    put(out, _html(every).encode())


def _html(results: Sequence[Result]) -> str:
    runs = _runs(results)
    if len(runs) > 1:  # the same method in another run is another curve
        number = {run["name"]: run["number"] for run in runs}
        results = [dataclasses.replace(r, solver=f"{r.solver} [{number[r.run]}]") for r in results]
    jinja2, convert, alt = need("jinja2"), need("vl_convert"), need("altair")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"error": _error, "seconds": _seconds}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "sort_keys": False}
    legend = [_legend(results, "trajectory"), _legend(results, "distribution")]
    anchors = _anchors(r.problem for r in results)
    solvers = {entry["kind"]: [s["name"] for s in entry["solvers"]] for entry in legend}
    sections = [
        _section(part, table, anchors[part[0].problem], solvers[part[0].kind])
        for part, table in zip(by_problem(results), tables(results), strict=True)
    ]
    page: dict[str, Any] = {
        "charts": [{k: s[k] for k in ("id", "anchor", "kind", "spec", "runs", "grid")} for s in sections],
        "solvers": [{"name": s["name"], "kind": entry["kind"]} for entry in legend for s in entry["solvers"]],
        "pictures": [],
    }
    template = environment.get_template("report.html")
    bundle = convert.javascript_bundle(vl_version=vega_lite_version(alt, convert))

    def render(left_out: int) -> str:
        return template.render(
            problems=_grouped(sections),
            page=page,
            legend=[entry for entry in legend if entry["solvers"]],
            runs=runs,
            results=results,
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


def _runs(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Each run once: its number and environment, and the number and the time of its results."""
    runs: dict[str, dict[str, Any]] = {}
    for r in results:
        new = {"name": r.run, "number": len(runs) + 1, "environment": r.environment, "count": 0, "seconds": 0.0}
        run = runs.setdefault(r.run, new)
        run["count"] += 1
        run["seconds"] += r.wall_seconds or 0.0
    return list(runs.values())


def _legend(results: Sequence[Result], kind: str) -> dict[str, Any]:
    """The solvers of a kind with their marks, which are the same in the charts of all problems."""
    mark = charts.marks(r.solver for r in results if r.kind == kind)
    return {"kind": kind, "solvers": [{"name": s, "colour": c, "shape": shape} for s, (c, shape) in mark.items()]}


def _anchors(problems: Iterable[str]) -> dict[str, str]:
    """What each problem's section is linked to by: its name, where that can stand in an address."""
    anchors: dict[str, str] = {}
    for name in dict.fromkeys(problems):
        anchor = plain = "problem-" + re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-")
        if anchor in anchors.values():
            anchor = f"{plain}-{len(anchors) + 1}"
        anchors[name] = anchor
    return anchors


def _section(part: list[Result], table: Table, anchor: str, solvers: list[str]) -> dict[str, Any]:
    """What the page shows of one problem and kind."""
    short = initials(c.result.grid for row in table.rows.values() for c in row if c)
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
        "twins": twins(part),
        "solvers": {r.solver for r in part},
        "spec": charts.interactive(part, solvers),
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
    usual = {"resolved": True, "best": False, "x": record["calls"]}
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
    return "" if value is None else f"{value:.1e}"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.1f} min"
