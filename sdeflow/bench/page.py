"""The report: one HTML page that needs no network, with linked plots, rankings and sample images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sdeflow.bench import charts
from sdeflow.bench.extras import need
from sdeflow.bench.figures import vega_lite_version
from sdeflow.bench.results import Result, put, read
from sdeflow.bench.tables import Cell, Table, by_problem, initials, tables, twins


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
    sections = [_section(part, table) for part, table in zip(by_problem(results), tables(results), strict=True)]
    page = {
        "charts": [{"id": s["id"], "spec": s["spec"], "runs": s["records"], "grid": s["grid"]} for s in sections],
        "solvers": [s for section in sections for s in section["solvers"]],
    }
    return environment.get_template("report.html").render(
        problems=_grouped(sections),
        page=page,
        runs=runs,
        results=results,
        failures=[r for r in results if r.status != "ok"],
        grids=list(dict.fromkeys(r.grid for r in results if r.grid != "adaptive")),
        css=_template("report.css"),
        js=_template("report.js"),
        bundle=convert.javascript_bundle(vl_version=vega_lite_version(alt, convert)),
    )


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


def _section(part: list[Result], table: Table) -> dict[str, Any]:
    """What the page shows of one problem and kind."""
    colour = charts.colours(part)
    short = initials(c.result.grid for row in table.rows.values() for c in row if c)
    first = part[0]
    return {
        "id": f"{first.problem}-{first.kind}".replace(" ", "-"),
        "problem": first.problem,
        "kind": first.kind,
        "about": first.about,
        "scale": first.scale,
        "samples": first.samples,
        "dtype": first.dtype,
        "table": table,
        "cells": {s: [_cell(c, short) for c in cells] for s, cells in table.rows.items()},
        "legend": short,
        "twins": twins(part),
        "solvers": [{"name": s, "colour": colour[s], "kind": first.kind} for s in colour],
        "spec": charts.interactive(part),
        "records": charts.records(part),
        "grid": first.about.get("default_grid"),
        "pictures": first.about.get("preview"),
    }


def _grouped(sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sections by problem."""
    problems: dict[str, list[dict[str, Any]]] = {}
    for section in sections:
        problems.setdefault(section["problem"], []).append(section)
    return [{"name": name, "about": parts[0]["about"], "parts": parts} for name, parts in problems.items()]


def _cell(cell: Cell | None, short: dict[str, str]) -> dict[str, Any] | None:
    if cell is None:
        return None
    r = cell.result
    grid = "" if r.steps == 1 else short[r.grid]
    return {"error": r.error, "grid": grid, "first": cell.first, "resolved": r.resolved, "failed": r.status != "ok",
            "title": r.message or f"{r.grid} grid, {r.nfe:g} calls counted"}  # fmt: skip


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.1f} min"
