"""`run`: every method on every grid at every budget, one result each."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdeflow.bench import environment
from sdeflow.bench.case import Case
from sdeflow.bench.extras import need
from sdeflow.bench.methods import Job, Method, budgets, grids_named, methods_named
from sdeflow.bench.problem import Problem, as_problem
from sdeflow.bench.results import Log, Result, put
from sdeflow.bench.suites import QUICK, SUITES, Suite
from sdeflow.bench.tables import ranking
from sdeflow.grids import GridFunction


@dataclass(frozen=True)
class Axes:
    """What is combined with each problem."""

    methods: list[Method]
    grids: dict[str, GridFunction]
    nfe: list[int]
    tolerances: tuple[float, ...]

    def jobs(self) -> Iterator[Job]:
        """Every run. Budgets below one step are left out."""
        for method in self.methods:
            if method.plan is not None:
                yield Job(method, "its own", budget=method.plan.nfe)
                continue
            if method.adaptive:
                yield from (Job(method, "adaptive", tolerance=tolerance) for tolerance in self.tolerances)
                continue
            for name, times in self.grids.items():
                yield from (Job(method, name, times, budget) for budget in self.nfe if budget >= method.calls)


def run(
    problem: str | Problem | Callable[[], Problem] = "quick",
    *,
    solvers: Iterable[str | Method] | None = None,
    grids: Iterable[str | GridFunction] | None = None,
    nfe: Iterable[int] | None = None,
    samples: int | None = None,
    draws: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = False,
    command: str | None = None,
) -> list[Result]:
    """Error against model calls of solvers on a problem or on a suite of them.

    A method of m calls a step runs budget // m steps on each grid. Every method of a kind starts
    from the same noise. A run that fails is a result of status "failed"; the others go on.

    Args:
        problem: the name of a suite, a `Problem`, or a function without arguments that returns one.
        solvers: names in `METHODS`, or a `Method` of your own; those of the suite unless given.
        grids: names in `GRIDS`, or grid functions; likewise.
        nfe: budgets of model calls; likewise.
        samples, draws, tolerance: instead of the problems' own.
        seed: of starts and noise.
        out: a folder for `results.jsonl` (kept complete while it runs), `report.html`, `ranking.csv` and the figures;
            None writes nothing.
        progress: show a progress bar.
        command: how the run was called, for the record; the process's command line unless given.

    Raises:
        ValueError, TypeError: unknown names or unusable arguments, before anything runs.
        ImportError: `out` is given and the extra "bench" is not installed.
        Exception: what a problem's own network or reference raises when it cannot be used at all.
    """
    suite, makers = _resolve(problem)
    axes = Axes(
        methods_named(suite.methods if solvers is None else solvers),
        grids_named(suite.grids if grids is None else grids),
        budgets(suite.nfe if nfe is None else nfe),
        suite.tolerances,
    )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"expected an integer seed, got {seed!r}")
    changes = {"samples": samples, "draws": draws, "tolerance": tolerance}
    changes = {k: v for k, v in changes.items() if v is not None}
    if out is not None:
        for module in ("altair", "jinja2", "vl_convert", "PIL"):
            need(module)
    where = environment.describe(command)
    log = Log(None if out is None else Path(out) / "results.jsonl")
    total = len(makers) * sum(1 for _ in axes.jobs())
    try:
        with _progress(progress, total) as advance, torch.no_grad():
            for make in makers:
                made = dataclasses.replace(make(), **changes)  # type: ignore[arg-type]
                for result in _run_problem(made, axes, seed, advance):
                    log.add(dataclasses.replace(result, environment=where))
    finally:
        log.save()
    if out is not None:
        from sdeflow.bench import figures, page

        page.report(log.results, Path(out) / "report.html")
        figures.save(log.results, Path(out))
        put(Path(out) / "ranking.csv", ranking(log.results).encode())
    return log.results


def _resolve(problem: Any) -> tuple[Suite, tuple[Callable[[], Problem], ...]]:
    if not isinstance(problem, str):
        made = as_problem(problem, "problem")
        return QUICK, (lambda: made,)
    if problem not in SUITES:
        close = difflib.get_close_matches(problem, SUITES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown suite {problem!r}{hint}: expected one of {', '.join(SUITES)}")
    return SUITES[problem], SUITES[problem].problems


def _run_problem(problem: Problem, axes: Axes, seed: int, advance: Callable[[str, int], None]) -> Iterator[Result]:
    advance(f"{problem.name}: preparing", 0)
    case = Case(problem, seed)
    axes = dataclasses.replace(axes, methods=[m.fitted(problem.model, problem.shape) for m in axes.methods])
    own = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    seen: dict[tuple[str, str, int | None], Result] = {}
    try:
        for method in axes.methods:
            advance(f"{problem.name}: what runs are measured against", 0)
            case.truth_of(method)
        for job in axes.jobs():
            advance(f"{problem.name}: {job.method.name}, {job.grid}", 0)
            if job.tolerance is not None and problem.reference is None and job.tolerance < 10 * problem.tolerance:
                advance("", 1)  # it would be measured against itself
                continue
            same = (job.method.name, job.grid, job.steps)
            if job.budget is None or same not in seen:
                seen[same] = case.run(job)
            advance("", 1)
            yield dataclasses.replace(seen[same], budget=job.budget)  # two budgets may allow the same steps
    finally:
        torch.set_num_threads(own)


@contextmanager
def _progress(shown: bool, total: int) -> Iterator[Callable[[str, int], None]]:
    """`advance(text, runs)`: show what is being done, and that runs are done."""
    if not shown:
        yield lambda text, runs: None
        return
    rich = need("rich.progress")
    columns = (
        rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn(),
    )  # fmt: skip
    with rich.Progress(*columns, console=need("rich.console").Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=total)

        def advance(text: str, runs: int) -> None:
            bar.update(task, advance=runs, **({"description": text} if text else {}))

        yield advance
