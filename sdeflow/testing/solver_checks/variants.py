"""The same solver as its orders are declared: begun at its full order, without noise of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from sdeflow.solvers.base import Solver


def full_start(solver: Any) -> Any:
    """A multistep method that begins at its full order, where it has a `start` to choose: a ramp is of order 2."""
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        return solver
    names = {f.name for f in dataclasses.fields(solver)}
    inner = getattr(solver, "solver", None)
    if "solver" in names and isinstance(inner, Solver):
        return dataclasses.replace(solver, solver=full_start(inner))
    if "start" not in names or (getattr(solver, "order", 2) == 1 and not getattr(solver, "corrector", False)):
        return solver
    for start in ("runge-kutta", "singlestep"):
        try:
            return dataclasses.replace(solver, start=start)
        except ValueError:
            continue
    return solver


def without_noise(solver: Any) -> Any | None:
    """The solver with its own stochasticity at 0, by its argument `eta`; None if it has none."""
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        return None
    return dataclasses.replace(solver, eta=0.0) if "eta" in {f.name for f in dataclasses.fields(solver)} else None
