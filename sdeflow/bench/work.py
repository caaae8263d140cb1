"""The runs of a benchmark as independent pieces of work, and the folder of one that is not finished."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdeflow.bench.case import Case
from sdeflow.bench.methods import Job, Method
from sdeflow.bench.problem import Problem
from sdeflow.bench.results import Result, put, read
from sdeflow.identity import POINTS, of_model, same

MARK = "unfinished.json"
"""There while a run is going on, with what it is: how the same run knows its results again."""

_LISTED = 3
"""Values that a message lists, at most."""

Item = tuple[int, int]
"""(number of the problem, number of the job)."""


@dataclass
class RunWork:
    """One run of one method on one problem; what is sent to each worker once.

    Attributes:
        problems: all of them; the case of one is made when its first run comes, and kept until another's does.
        jobs: all of them, for every problem.
        threads: of torch; those that are best for the network unless given.
    """

    problems: Sequence[Problem]
    jobs: Sequence[Job]
    seed: int
    dtype: torch.dtype | None
    device: torch.device
    threads: int | None
    _at: int | None = field(default=None, init=False)
    _case: Case | None = field(default=None, init=False)
    _fitted: dict[str, Method] = field(default_factory=dict, init=False)

    def __call__(self, item: Item) -> Result:
        number, job = item[0], self.jobs[item[1]]
        problem, own = self.problems[number], torch.get_num_threads()
        try:
            if self._case is None or self._at != number:
                self._case, self._at, self._fitted = Case(problem, self.seed, self.dtype, self.device), number, {}
            case, name = self._case, job.method.name
            torch.set_num_threads(self.threads or case.threads)
            if name not in self._fitted:
                self._fitted[name] = job.method.fitted(problem.model, problem.shape)
            with torch.no_grad():
                return case.run(Job(self._fitted[name], job.grid, job.times, job.budget, job.tolerance))
        finally:
            torch.set_num_threads(own)


class Unfinished:
    """What an earlier call of the same run left in its folder.

    Args:
        out: the folder; None keeps nothing.
        about: what the run is; of another run nothing is taken.
        environment: of this call.

    Attributes:
        environment: of the call that began the run.
        results: those of it, by (problem, solver, grid, budget, tolerance).
    """

    def __init__(self, out: str | Path | None, about: dict[str, Any], environment: dict[str, Any]) -> None:
        self.environment = environment
        self.results: dict[tuple[Any, ...], Result] = {}
        self._mark = None if out is None else Path(out) / MARK
        self._begun = False
        if self._mark is None:
            return
        self._about = wanted = json.loads(json.dumps(about))
        with suppress(OSError, ValueError, KeyError, TypeError):  # nothing there, or not to be used
            known = json.loads(self._mark.read_text(encoding="utf-8"))
            if same(known["about"], wanted):
                found = read(self._mark.with_name("results.jsonl"))
                self.results = {key(r): r for r in found if r.environment == known["environment"]}
                self.environment = known["environment"]

    def begin(self) -> None:
        """There is a result: what follows may be broken off. Before that a run that fails leaves nothing."""
        if self._mark is not None and not self._begun:
            put(self._mark, json.dumps({"about": self._about, "environment": self.environment}, indent=1).encode())
            self._begun = True

    def end(self) -> None:
        """The run is finished."""
        if self._mark is not None:
            self._mark.unlink(missing_ok=True)


def key(result: Result) -> tuple[Any, ...]:
    """Which run of its benchmark a result is of."""
    return result.problem, result.solver, result.grid, result.budget, result.tolerance


def check_folder(out: str | Path, keys: Iterable[tuple[Any, ...]], seed: int) -> None:
    """Refuse a folder with results that this run would not replace by newer ones, but drop.

    Args:
        keys: of the results of this run.

    Raises:
        ValueError: it holds results of other problems, solvers, grids, budgets, tolerances or of another seed; or its
            results.jsonl is no file of results.
    """
    file = Path(out) / "results.jsonl"
    if not file.is_file():
        return
    found, wanted = read(file), {(*own, seed) for own in keys}
    lost = [own for r in found if (own := (*key(r), r.seed)) not in wanted]
    if not lost:
        return
    others = []
    for i, name in enumerate(("problem", "solver", "grid", "budget", "tolerance", "seed")):
        values = list(dict.fromkeys(str(v[i]) for v in lost if v[i] not in {w[i] for w in wanted}))
        if values:
            others.append(f"{name} {', '.join(values[:_LISTED])}{', ...' if len(values) > _LISTED else ''}")
    which = f" ({'; '.join(others)})" if others else ""
    raise ValueError(
        f"{out} holds another benchmark, and {len(lost)} of its {len(found)} results would be lost{which}: give "
        "another folder"
    )


def described(problem: Problem) -> dict[str, Any]:
    """What the figures of a problem depend on."""
    return {
        "name": problem.name,
        "shape": list(problem.shape),
        "sizes": [problem.samples, problem.draws, problem.tolerance, problem.target_tolerance],
        **of_model(problem.model, problem.start(POINTS, 0, torch.float32)),
    }
