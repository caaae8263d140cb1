"""`run`: every method on every grid at every budget, one result each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdeflow.bench import environment
from sdeflow.bench.extras import need
from sdeflow.bench.methods import Job, Method, budgets, grids_named, methods_named
from sdeflow.bench.problem import Problem, as_problem
from sdeflow.bench.results import Log, Result, put
from sdeflow.bench.suites import QUICK, SUITES, Suite
from sdeflow.bench.tables import ranking
from sdeflow.bench.work import Item, RunWork, Unfinished, check_folder, described
from sdeflow.checked import checked
from sdeflow.engine import Engine, Local
from sdeflow.grids import GridFunction
from sdeflow.names import check_names


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


@checked
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
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    out: str | Path | None = None,
    engine: Engine | None = None,
    progress: bool = False,
    command: str | None = None,
) -> list[Result]:
    """Error against model calls of solvers on a problem or on a suite of them.

    A method of m calls a step runs budget // m steps on each grid. Every method of a kind starts
    from the same noise. A run that fails is a result of status "failed"; the others go on.

    Args:
        problem: the name of a suite, a `Problem`, or a function without arguments that returns one.
        solvers: names in `METHODS`, or a `Method` of your own; those of the suite unless given.
        grids: names in `GRIDS`, or grid functions; likewise, without those that a problem's process does not have.
        nfe: budgets of model calls; likewise.
        samples, draws, tolerance: instead of the problems' own.
        seed: of starts and noise.
        dtype: of networks and states, float32 or float64; the widest that a network runs in unless given.
        device: where networks run and samples are; what they are compared with is kept on the CPU.
        out: a folder for `results.jsonl` (kept complete while it runs), `report.html`, `ranking.csv` and the figures;
            None writes nothing. A run that was broken off goes on from what it finished there, if it is the same run
            of the same commit. Results of the same jobs and seed are replaced; a folder with others is refused.
        engine: where runs are computed, `sdeflow.engine.Ray(...)` for instance, with one thread each; in this process,
            with the number of threads that is best for the network, unless given.
        progress: show a progress bar.
        command: how the run was called, for the record; the process's command line unless given.

    Raises:
        ValueError, TypeError: unknown names or unusable arguments, or a folder of another benchmark, before anything
            runs.
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
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"expected the dtype torch.float32 or torch.float64, got {dtype!r}")
    changes = {"samples": samples, "draws": draws, "tolerance": tolerance}
    changes = {k: v for k, v in changes.items() if v is not None}
    if out is not None:
        for module in ("altair", "jinja2", "vl_convert", "PIL"):
            need(module)
    problems = [dataclasses.replace(make(), **changes) for make in makers]  # type: ignore[arg-type]
    jobs = list(axes.jobs())
    wanted = [
        (p, j) for p, problem in enumerate(problems) for j, job in enumerate(jobs)
        if _measurable(problem, job) and (grids is not None or _has_grid(problem, job))
    ]  # fmt: skip
    if out is not None:
        check_folder(out, (_key(problems[p], jobs[j]) for p, j in wanted), seed)
    work = RunWork(problems, jobs, seed, dtype, torch.device(device), None if engine is None else 1)
    about = {
        "problems": [described(problem) for problem in problems],
        "jobs": [[job.method.name, job.grid, job.budget, job.tolerance] for job in jobs],
        "seed": seed, "dtype": str(dtype), "device": str(device), "threads": work.threads,
    }  # fmt: skip
    where = environment.describe(command)
    about |= {name: where[name] for name in ("sdeflow", "commit", "torch", "numpy", "scipy")}
    before = Unfinished(out, about, where)
    log = Log(None if out is None else Path(out) / "results.jsonl")
    found: dict[Item, Result] = {}
    try:
        with _progress(progress, len(wanted)) as advance:
            for item, result in _results(wanted, work, before, engine, advance):
                found[item] = dataclasses.replace(result, environment=before.environment)
                before.begin()
                log.add(found[item])
    finally:
        log.save()
    log.replace([found[item] for item in wanted])
    before.end()
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
    check_names([problem], SUITES, "suite")
    return SUITES[problem], SUITES[problem].problems


def _measurable(problem: Problem, job: Job) -> bool:
    """Whether the reference is finer than the tolerance: a run would be measured against itself otherwise."""
    return job.tolerance is None or problem.reference is not None or job.tolerance >= 10 * problem.tolerance


def _has_grid(problem: Problem, job: Job) -> bool:
    """Whether the process has such a grid: not one by lam, for instance, where alpha goes to 0."""
    if job.times is None:
        return True
    process = problem.model.sde
    try:
        job.times(process, 4, process.t1, process.t_min)
    except ValueError:
        return False
    return True


def _key(problem: Problem, job: Job) -> tuple[Any, ...]:
    """That of its result: see `work.key`."""
    return problem.name, job.method.name, job.grid, job.budget, job.tolerance


def _results(
    wanted: list[Item], work: RunWork, before: Unfinished, engine: Engine | None, advance: Callable[[str, int], None]
) -> Iterator[tuple[Item, Result]]:
    """Every result: those of an earlier call, and those computed now, of which two budgets may share one."""
    sharing: dict[tuple[Any, ...], list[Item]] = {}
    for number, (p, j) in enumerate(wanted):
        job, problem = work.jobs[j], work.problems[p]
        known = before.results.get(_key(problem, job))
        if known is not None:
            advance(f"{problem.name}: from before", 1)
            yield (p, j), known
            continue
        same = (p, job.method.name, job.grid, number if job.budget is None else job.steps)
        sharing.setdefault(same, []).append((p, j))
    items = {group[0]: group for group in sharing.values()}
    for first, result in (Local() if engine is None else engine).map(work, items):
        for p, j in items[first]:
            job = work.jobs[j]
            advance(f"{work.problems[p].name}: {job.method.name}, {job.grid}", 1)
            yield (p, j), dataclasses.replace(result, budget=job.budget)


@contextmanager
def _progress(shown: bool, total: int) -> Iterator[Callable[[str, int], None]]:
    """`advance(text, runs)`: show what is being done, and that runs are done."""
    if not shown:
        yield lambda text, runs: None
        return
    rich = need("rich.progress")
    columns = (
        rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[rate]}"), rich.TimeElapsedColumn(), rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    )  # fmt: skip
    with rich.Progress(*columns, console=need("rich.console").Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=total, rate="")

        def advance(text: str, runs: int) -> None:
            speed = bar.tasks[0].speed
            rate = "" if speed is None else f"{speed:.1f} runs/s"
            bar.update(task, advance=runs, rate=rate, **({"description": text} if text else {}))

        yield advance
