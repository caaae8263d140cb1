"""Ensembles: statistics of many paths that are not kept, or the paths themselves as a dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import checked, described, tensor
from sdeflow.columns import FORMATS, Format
from sdeflow.dataset import Dataset
from sdeflow.engine.base import Engine
from sdeflow.identity import POINTS, of_problem, said
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.shard_run import MOST_SAMPLES, own_folder, run_shards
from sdeflow.solution import Solution
from sdeflow.solve import solve
from sdeflow.solve_input import Grid, Save
from sdeflow.solvers.base import Solver
from sdeflow.statistics.base import Functional, Statistic

Start = Tensor | Callable[[Tensor], Tensor]
"""One state (*event) that all paths start from, or `start(index)`: states (n, *event) of indices int64 (n,)."""


@dataclass
class PathWork:
    """A block of paths: what `solve` gives for its indices."""

    problem: Problem
    start: Start
    solver: Solver
    how: Mapping[str, Any]

    def __call__(self, first: int, count: int) -> Solution:
        index = torch.arange(first, first + count)
        x = self.start.expand(count, *self.start.shape).clone() if isinstance(self.start, Tensor) else self.start(index)
        if not isinstance(x, Tensor) or len(x) != count:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"expected start(index) to give {count} states ({count}, *event), got {got}")
        with torch.no_grad():
            return solve(self.problem, x, self.solver, index=index, throw=False, **self.how)


@dataclass
class PriorStart:
    """The prior of a process, sample by sample: a start for its reversal.

    Args:
        problem: the reversal; its process draws the prior.
        shape: of one sample.
        seed: of the prior.
    """

    problem: ReverseSDE
    shape: tuple[int, ...]
    seed: int

    def __call__(self, index: Tensor) -> Tensor:
        """States (n, *shape) of the indices (n,)."""
        process: Any = self.problem.process
        return process.prior_sample((len(index), *self.shape), self.seed, index=index)


@dataclass(frozen=True)
class Ensemble:
    """What `ensemble` gives.

    Attributes:
        statistics: those that were asked for, filled with the paths that finished.
        num: paths.
        failed: of those, how many did not finish; they are in no statistic.
        nfe: model or drift calls a path, the mean over those computed in this call.
        dataset: the paths' ends, if a folder was given and `store`.
    """

    statistics: dict[str, Statistic]
    num: int
    failed: int
    nfe: float
    dataset: Dataset | None

    def __getitem__(self, name: str) -> Any:
        """The statistic of that name; of a `Functional`, that of its values."""
        statistic = self.statistics[name]
        return statistic.statistic if isinstance(statistic, Functional) else statistic


@checked
def ensemble(
    problem: Problem,
    start: Start,
    num: int,
    solver: Solver | None = None,
    *,
    statistics: Mapping[str, Statistic] | None = None,
    steps: int | None = None,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    t_span: tuple[float, float] | None = None,
    seed: int = 0,
    save: Save = None,
    batch: int = 4096,
    out: str | Path | None = None,
    store: bool = False,
    kind: Format = "safetensors",
    engine: Engine | None = None,
    shard: int | None = None,
    threads: int = 1,
    on_done: Callable[[int], None] | None = None,
) -> Ensemble:
    """Statistics of `num` paths of a problem, in shards on an engine; path i is the one of index i of `seed`.

    The same numbers to the last bit whatever the engine, its workers, their deaths, the shards and interruptions: see
    `sdeflow.statistics`. Paths that fail are counted and left out.

    Args:
        problem: an `ODE`, `SDE` or `ReverseSDE`.
        start: one state (*event), or `start(index)` that gives the states of indices, from nothing but them
            (`PriorStart` for a reversal).
        num: of paths.
        solver: Euler-Maruyama unless given.
        statistics: empty ones by name, such as {"end": sf.statistics.Moments()}. With `Functional` of whole paths, give
            `save`.
        steps, grid, rtol, atol, t_span, save: as in `solve`.
        seed: of the noise.
        batch: paths in one solve; a part of what the bits depend on, when the problem multiplies matrices.
        out: a folder to go on from after an interruption; None keeps nothing.
        store: also keep the ends (and with `save` the paths) in `out`, as files of the format `kind`.
        engine: `sdeflow.engine.Local(workers)` or `Ray(...)`; in this process unless given.
        shard: paths a shard, rounded to whole batches; by memory and workers unless given.
        threads: of torch in a batch; a part of what the bits depend on.
        on_done: called with the number of paths that are finished.

    Raises:
        ValueError, TypeError: input that cannot be solved, a folder of another run, or nothing asked for.
    """
    from sdeflow.solvers import EulerMaruyama

    for name, value in (("num", num), ("batch", batch), ("threads", threads)):
        if not 1 <= value < MOST_SAMPLES:
            raise ValueError(f"expected {name} >= 1 and below {MOST_SAMPLES}, got {value!r}")
    empty = dict(statistics or {})
    for name, statistic in empty.items():
        if not isinstance(statistic, Statistic) or not isinstance(name, str) or "/" in name:
            raise TypeError(f"expected statistics by name, such as {{'end': Moments()}}, got {name!r}: {statistic!r}")
    if kind not in FORMATS:
        raise ValueError(f"expected the format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {kind!r}")
    if store and out is None:
        raise ValueError("store=True needs a folder: give out")
    if not store and not empty:
        raise ValueError("nothing is asked for: give statistics, or store=True with a folder")
    if isinstance(start, Tensor) and (not tensor(start) or not start.is_floating_point() or start.numel() == 0):
        raise TypeError(f"expected start as one state (*event) of floating-point numbers, got {described(start)}")
    if not isinstance(start, Tensor) and not callable(start):
        raise TypeError(f"expected start to be a state (*event) or a function of indices, got {type(start).__name__}")
    solver = EulerMaruyama() if solver is None else solver
    given = {"steps": steps, "grid": grid, "rtol": rtol, "atol": atol, "t_span": t_span, "seed": seed, "save": save}
    how = {name: value for name, value in given.items() if value is not None}
    size, about = _bytes(start), _about(problem, start, num, solver, how, threads)
    with nullcontext() if out is None else own_folder(out) as folder:
        outcome = run_shards(
            PathWork(problem, start, solver, how), num, block=batch, about=about,
            out=folder, kind=kind, store=store, statistics=empty, engine=engine, shard=shard,
            sample_bytes=size * (1 if save is None else max(1, _saved(save, steps))), threads=threads,
            on_done=on_done,
        )  # fmt: skip
    return Ensemble(outcome.statistics, num, outcome.failed, outcome.nfe, outcome.dataset if store else None)


def _saved(save: Save, steps: int | None) -> int:
    """How many states of a path are kept."""
    if isinstance(save, bool):
        return 1 + (steps or 100)
    return len(save) if save is not None else 1


def _bytes(start: Start) -> int:
    x = start if isinstance(start, Tensor) else start(torch.arange(1))
    if not tensor(x) or x.ndim < 1:
        raise ValueError(f"expected start(index) to give states (n, *event), got {described(x)}")
    return x.numel() * x.element_size()


def _about(
    problem: Problem, start: Start, num: int, solver: Solver, how: Mapping[str, Any], threads: int
) -> dict[str, Any]:
    """What the bits of the paths depend on, as far as it can be said of functions and classes of the user."""
    return {
        **of_problem(problem, start[None] if isinstance(start, Tensor) else start(torch.arange(min(num, POINTS)))),
        "start": said(start),
        "solver": said(solver),
        "options": {name: said(value) for name, value in how.items()},
        "threads": threads,
        "versions": {name: version(name) for name in ("sdeflow", "torch")},
    }
