"""What a solver declares: by the row of the catalogue that made it, its attributes, or arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdeflow.solvers.base import Solver
from sdeflow.solvers.catalogue import CATALOGUE, Row
from sdeflow.solvers.stochastic import StochasticSolver


@dataclass(frozen=True)
class Claims:
    """The claims to hold the solver to; None where there is none."""

    order: float | None
    strong: Mapping[str, float]
    weak: float | None
    calls: int | None
    start_calls: int
    row: Row | None

    def words(self) -> str:
        parts = [f"order {self.order:g}"] if self.order is not None else []
        parts += [f"strong order {v:g} ({kind} noise)" for kind, v in self.strong.items()]
        parts += [f"weak order {self.weak:g}"] if self.weak is not None else []
        parts += [f"{self.calls} calls a step"] if self.calls is not None else []
        source = f"the catalogue's row {self.row.name}" if self.row else "arguments and attributes"
        return (", ".join(parts) or "nothing") + f" (by {source})"


def _row_of(solver: Solver) -> Row | None:
    """The row that made the solver: an equal one, else one of its type and name."""
    same = [(row, made) for row in CATALOGUE if type(made := row.make()) is type(solver)]
    equal = [row for row, made in same if made == solver]
    named = [row for row, made in same if made.name == solver.name]
    return equal[0] if equal else named[0] if named else None


def claims_of(
    solver: Solver,
    order: float | None,
    weak: float | None,
    strong: float | Mapping[str, float] | None,
    calls: int | None,
) -> Claims:
    row = _row_of(solver)
    found: dict[str, float] = {}
    if row is not None:
        pairs = (("additive", row.strong_order), ("diagonal", row.strong_diagonal))
        found = {kind: v for kind, v in pairs if v is not None}
    elif isinstance(solver, StochasticSolver):
        found = {kind: solver.order_for(kind) for kind in ("additive", "diagonal") if kind in solver.fits}
    if isinstance(strong, Mapping):
        unknown = set(strong) - {"additive", "diagonal"}
        if unknown:
            raise ValueError(f'expected strong_order for "additive" and "diagonal" noise, got {sorted(unknown)}')
        found = dict(strong)
    elif strong is not None:
        found = {"additive": strong, "diagonal": strong} if solver.view == "drift" else {"additive": strong}
    given_calls = calls is not None
    if row is not None:
        order, weak = row.order if order is None else order, row.weak_order if weak is None else weak
        calls = row.nfe_per_step if calls is None else calls
    return Claims(order, found, weak, calls, row.start_calls if row and not given_calls else 0, row)
