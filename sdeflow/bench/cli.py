"""`sdeflow bench` and `sdeflow report`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from sdeflow.bench import tables
from sdeflow.bench.methods import GRIDS, METHODS
from sdeflow.bench.page import report
from sdeflow.bench.problem import load
from sdeflow.bench.results import Result
from sdeflow.bench.runner import run
from sdeflow.bench.suites import SUITES


def bench_command(
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, report.html and the figures.", file_okay=False)],
    suite: Annotated[str | None, typer.Option(help=f"What to run, one of: {', '.join(SUITES)} (the default).")] = None,
    problem: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="Your own problem instead: an sf.bench.Problem, or a function that returns one. Runs the file.",
        ),
    ] = None,
    solvers: Annotated[str | None, typer.Option(help=f"Some of: {', '.join(METHODS)}.")] = None,
    grids: Annotated[str | None, typer.Option(help=f"Some of: {', '.join(GRIDS)}.")] = None,
    nfe: Annotated[str | None, typer.Option(help="Budgets of model calls a sample, such as 5,10,20.")] = None,
    samples: Annotated[int | None, typer.Option(help="Trajectories of deterministic solvers.")] = None,
    draws: Annotated[int | None, typer.Option(help="Samples of stochastic solvers.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="rtol = atol of the reference.")] = None,
    seed: Annotated[int, typer.Option(help="Of the starts and the noise.")] = 0,
) -> None:
    """Measure error against model calls, of solvers on grids, and draw the report.

    Deterministic solvers are compared with the exact flow of the same model, stochastic ones in distribution.
    A run that fails is drawn as failed. After Ctrl-C, what was finished is in OUT/results.jsonl.
    """
    if suite is not None and problem is not None:
        raise _bad("give --suite or --problem, not both", "--problem")
    file = out / "results.jsonl"
    try:
        results = run(
            (suite or "quick") if problem is None else load(problem),
            solvers=None if solvers is None else _names(solvers),
            grids=None if grids is None else _names(grids),
            nfe=None if nfe is None else _numbers(nfe),
            samples=samples,
            draws=draws,
            tolerance=tolerance,
            seed=seed,
            out=out,
            progress=True,
        )
    except KeyboardInterrupt:
        kept = f"what was finished is in {file}; draw it with: sdeflow report {file} --out {out / 'report.html'}"
        typer.echo(f"sdeflow bench: interrupted; {kept if file.exists() else 'nothing was finished'}", err=True)
        raise typer.Exit(130) from None
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise _stop("bench", error) from error
    tables.show(results)
    _conclude(results, out)


def report_command(
    results: Annotated[list[Path], typer.Argument(help="Files results.jsonl of sdeflow bench, compared if several.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.", dir_okay=False)],
) -> None:
    """Draw the report of one or several runs of the benchmark as one HTML file."""
    try:
        report(results, out)
    except (ValueError, ImportError, OSError) as error:
        raise _stop("report", error) from error
    typer.echo(f"wrote {out}")


def _conclude(results: list[Result], out: Path) -> None:
    """Say where the files are; exit with an error when nothing ran."""
    failed = [r for r in results if r.status != "ok"]
    for result in failed[:5]:
        where = f"{result.problem}, {result.solver}, {result.grid}, budget {result.budget}"
        typer.echo(f"failed: {where}: {result.message}", err=True)
    if len(failed) > 5:
        typer.echo(f"... and {len(failed) - 5} more, all in the report", err=True)
    typer.echo(f"{len(results)} runs, {len(failed)} failed; wrote {out / 'report.html'}")
    if len(failed) == len(results):
        raise typer.Exit(1)


def _stop(command: str, error: Exception) -> SystemExit:
    return SystemExit(f"sdeflow {command}: {error}")


def _bad(message: str, option: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=option)


def _names(text: str) -> list[str]:
    """Comma-separated names; commas inside parentheses belong to the name."""
    return [name.strip() for name in re.split(r",(?![^()]*\))", text) if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise _bad(f"expected whole numbers such as 5,10,20, got {text!r}", "--nfe") from None
