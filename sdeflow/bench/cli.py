"""`sdeflow bench` and `sdeflow report`."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sdeflow.bench import tables
from sdeflow.bench.methods import METHODS
from sdeflow.bench.page import report
from sdeflow.bench.problem import load
from sdeflow.bench.results import Result
from sdeflow.bench.runner import run
from sdeflow.cli_options import (
    Address,
    AsJson,
    Device,
    EngineName,
    Seed,
    Workers,
    check_file,
    check_folder,
    complete_grids,
    complete_methods,
    complete_suite,
    device_named,
    dtype_named,
    progress_shown,
)
from sdeflow.cli_outcome import running, say_json
from sdeflow.engine import named
from sdeflow.names import check_names

_DTYPES = ("float32", "float64")
_BULKY = ("about", "environment", "preview")
"""Fields of a result that are left out of the JSON on standard output; results.jsonl has them."""


def bench_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, report.html and the figures.")],
    suite: Annotated[
        str | None,
        typer.Option(help="A built-in set of problems: quick (the default), zoo, ...", autocompletion=complete_suite),
    ] = None,
    problem: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="Your own problem instead: an sf.bench.Problem, or a function that returns one. Runs the file.",
        ),
    ] = None,
    solvers: Annotated[
        str | None,
        typer.Option(
            help='Names with commas between, see sdeflow solvers; "NAME eta=1" runs one on the reverse SDE, "NAME '
            'adaptive" to tolerances; or files of plans (.json).',
            autocompletion=complete_methods,
        ),
    ] = None,
    grids: Annotated[
        str | None, typer.Option(help="Names of time grids, such as karras,logsnr.", autocompletion=complete_grids)
    ] = None,
    nfe: Annotated[str | None, typer.Option(help="Budgets of model calls a sample, such as 5,10,20.")] = None,
    samples: Annotated[int | None, typer.Option(help="Trajectories of deterministic solvers.")] = None,
    draws: Annotated[int | None, typer.Option(help="Samples of stochastic solvers.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="rtol = atol of the reference.")] = None,
    seed: Seed = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of network and states: float32 or float64; the widest that works unless given.")
    ] = None,
    device: Device = "cpu",
    engine: EngineName = "local",
    address: Address = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Measure error against model calls, of solvers on grids, and draw the report.

    Deterministic solvers are compared with the exact flow of the same model, stochastic ones in distribution.
    A run that fails is drawn as failed. After Ctrl-C, what was finished is in OUT/results.jsonl, and the same command
    goes on from it. A folder with results of another benchmark is refused.
    """
    file, began = out / "results.jsonl", time.time() - 1.0  # clocks of file systems are coarse

    def kept() -> str:
        if not file.exists() or file.stat().st_mtime < began:
            return "nothing was finished; to start anew: {again}"
        count = len(file.read_bytes().splitlines())
        drawn = shlex.join(["sdeflow", "report", str(file), "--out", str(out / "report.html")])
        return f"{count} finished runs are in {file}; to draw them: {drawn}; to go on: {{again}}"

    with running(context, kept, as_json=as_json):
        if suite is not None and problem is not None:
            raise ValueError("give --suite or --problem, not both")
        check_folder(out)
        at = named(engine, address=address, workers=workers)
        names = None if solvers is None else _names(solvers)
        check_names([n for n in names or () if not n.endswith(".json")], METHODS, "solver",
                    'names from sdeflow solvers, "NAME eta=1", "NAME adaptive" or PLAN.json')  # fmt: skip
        results = run(
            (suite or "quick") if problem is None else load(problem),
            solvers=names,
            grids=None if grids is None else _names(grids),
            nfe=None if nfe is None else _numbers(nfe),
            samples=samples,
            draws=draws,
            tolerance=tolerance,
            seed=seed,
            dtype=None if dtype is None else dtype_named(dtype, _DTYPES),
            device=device_named(device),
            engine=None if engine == "local" and workers is None and address is None else at,
            out=out,
            progress=progress_shown(),
        )
    failed = [r for r in results if r.status != "ok"]
    if as_json:
        say_json({"runs": len(results), "failed": len(failed), "file": str(file), "report": str(out / "report.html"),
                  "results": [_brief(r) for r in results]})  # fmt: skip
    else:
        tables.show(results)
    _conclude(results, failed, out, as_json)


def report_command(
    context: typer.Context,
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS...", help="Files results.jsonl of sdeflow bench, or its folders, compared if several."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
    as_json: AsJson = False,
) -> None:
    """Draw the report of one or several runs of the benchmark as one HTML file."""
    with running(context, lambda: "nothing was written; to draw it: {again}", as_json=as_json):
        check_file(out)
        report(results, out)
    if as_json:
        say_json({"file": str(out), "bytes": out.stat().st_size, "results": [str(path) for path in results]})
    else:
        print(f"wrote {out}")


def _brief(result: Result) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(result.line())
    return {name: value for name, value in values.items() if name not in _BULKY}


def _conclude(results: list[Result], failed: list[Result], out: Path, as_json: bool) -> None:
    """Say where the files are; exit with an error when nothing ran."""
    for result in failed[:5]:
        where = f"{result.problem}, {result.solver}, {result.grid}, budget {result.budget}"
        typer.echo(f"failed: {where}: {result.message}", err=True)
    if len(failed) > 5:
        typer.echo(f"... and {len(failed) - 5} more, all in the report", err=True)
    typer.echo(f"{len(results)} runs, {len(failed)} failed; wrote {out / 'report.html'}", err=as_json)
    if len(failed) == len(results):
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    """Comma-separated names; commas inside parentheses belong to the name."""
    return [name.strip() for name in re.split(r",(?![^()]*\))", text) if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise ValueError(f"expected whole numbers such as 5,10,20 for --nfe, got {text!r}") from None
