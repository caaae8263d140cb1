"""What can be benchmarked, from the catalogue of solvers: a method is a solver and the eta it runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from sdeflow import grids
from sdeflow.checked import described, whole
from sdeflow.grids import GridFunction
from sdeflow.model import Model
from sdeflow.names import check_names
from sdeflow.solvers.base import Solver
from sdeflow.solvers.catalogue import CATALOGUE, Row
from sdeflow.solvers.gaussian_split import GaussianSplit, estimate_split

if TYPE_CHECKING:
    from sdeflow.plan import Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """One curve of the benchmark.

    Args:
        name: unique.
        make: constructor of the solver, without arguments.
        calls: model calls a step on a grid.
        eta: stochasticity of the reversal it solves: 0 the flow, 1 the reverse SDE.
        adaptive: solve to tolerances instead of on grids.
        fit: the solver made for a model and the shape of its samples, once a problem, instead of `make`; its calls
            are not counted.
        plan: the plan that it is, which has a grid of its own; None for solvers.
    """

    name: str
    make: Callable[[], Solver]
    calls: int = 1
    eta: float = 0.0
    adaptive: bool = False
    fit: Callable[[Model, tuple[int, ...]], Solver] | None = None
    plan: Plan | None = None

    def fitted(self, model: Model, shape: tuple[int, ...]) -> Method:
        """The method for one problem."""
        if self.fit is None:
            return self
        solver = self.fit(model, shape)
        return replace(self, make=lambda: solver, fit=None)


@dataclass(frozen=True)
class Job:
    """One run: a method on a grid within a budget of model calls, or (grid "adaptive") to a tolerance."""

    method: Method
    grid: str
    times: GridFunction | None = None
    budget: int | None = None
    tolerance: float | None = None

    @property
    def steps(self) -> int | None:
        """Steps that the budget allows, rounded down; None where the grid or the tolerance says."""
        if self.method.plan is not None:
            return None
        return None if self.budget is None else self.budget // self.method.calls


def _of(row: Row) -> Iterable[Method]:
    """On the flow under its own name, with noise as "NAME eta=1" (under its own name if that is all it does).

    A sampler that brings its own noise runs on the flow.
    """
    if row.noise == ("own",):
        yield Method(row.name, row.make, row.nfe_per_step)
        return
    if row.order is not None:
        yield Method(row.name, row.make, row.nfe_per_step)
    if row.adaptive:
        yield Method(f"{row.name} adaptive", row.make, row.nfe_per_step, adaptive=True)
    if row.noise:
        name = row.name if row.order is None else f"{row.name} eta=1"
        yield Method(name, row.make, row.nfe_per_step, eta=1.0)


def _estimated_split(model: Model, shape: tuple[int, ...]) -> Solver:
    mean, variance = estimate_split(model, shape, probes=64)
    return GaussianSplit(3, mean=mean, variance=variance)


METHODS: dict[str, Method] = {m.name: m for row in CATALOGUE for m in _of(row)}
METHODS["GaussianSplit(3) estimated"] = Method(
    "GaussianSplit(3) estimated", partial(GaussianSplit, 3), fit=_estimated_split
)
"""Every method by name, in the order of the catalogue."""

GRIDS: dict[str, GridFunction] = {name: row.make for name, row in grids.GRIDS.items()}
"""Every grid by name."""


def methods_named(names: Iterable[str | Method]) -> list[Method]:
    """The methods of those names; a Method is kept, a name that ends in .json is the file of a plan.

    Raises:
        ValueError: unknown names; the message lists what exists.
    """
    names = list(names)
    for n in names:
        if not isinstance(n, (Method, str)):
            raise TypeError(f"expected names of solvers, or Methods, got {described(n)}")
    names = [tuned(n) if isinstance(n, str) and n.endswith(".json") else n for n in names]
    check_names([n for n in names if isinstance(n, str)], METHODS, "solver")
    return _nonempty([n if isinstance(n, Method) else METHODS[n] for n in names], "solver")


def tuned(path: str) -> Method:
    """A plan that `sf.tune` made and `Plan.save` wrote: on its own grid, whatever the budgets.

    Raises:
        ValueError: the file is not a plan.
        OSError: it cannot be read.
    """
    from sdeflow.plan import Plan  # itself built on the solvers

    plan = Plan.load(path)
    return Method(f"{plan.name} ({plan.steps} steps)", lambda: plan, plan=plan)


def grids_named(names: Iterable[str | GridFunction]) -> dict[str, GridFunction]:
    """The grids of those names; a grid function is kept, under its own name.

    Raises:
        ValueError: unknown names; the message lists what exists.
    """
    names = list(names)
    check_names([n for n in names if isinstance(n, str)], GRIDS, "grid")
    for n in names:
        if not isinstance(n, str) and not callable(n):
            raise TypeError(f"expected names of grids, or functions of sf.grids, got {described(n)}")
    pairs = [(n, GRIDS[n]) if isinstance(n, str) else (getattr(n, "__name__", repr(n)), n) for n in names]
    return dict(_nonempty(pairs, "grid"))


def budgets(nfe: Iterable[int]) -> list[int]:
    """NFE budgets, ascending and each once.

    Raises:
        ValueError: one that is not a positive integer, or none.
    """
    if isinstance(nfe, (set, frozenset, dict, str, bytes)):
        raise TypeError(f"expected budgets as a list of integers, got {described(nfe)}")
    nfe = list(nfe)
    bad = [n for n in nfe if not whole(n) or not 1 <= n <= 10_000_000]
    if bad:
        raise ValueError(f"expected NFE budgets as positive integers, at most ten million, got {described(bad[0])}")
    return _nonempty(sorted({int(n) for n in nfe}), "NFE budget")


def _nonempty(values: list[T], what: str) -> list[T]:
    if not values:
        raise ValueError(f"expected at least one {what}")
    return values
