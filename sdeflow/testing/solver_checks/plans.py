"""Plans: that they are the solver, on disk too, and the degree that their weights integrate exactly."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdeflow.plan import Plan
from sdeflow.solvers.base import LinearSolver, Solver
from sdeflow.testing.report import Finding
from sdeflow.testing.solver_checks.claims import Claims
from sdeflow.testing.solver_checks.references import uneven
from sdeflow.testing.solver_checks.residuals import different
from sdeflow.testing.solver_checks.setups import Setup
from sdeflow.testing.solver_checks.variants import full_start
from sdeflow.testing.worst import Worst


def plan_findings(solver: Solver, setups: Sequence[Setup], claims: Claims, seed: int) -> list[Finding]:
    formulas = {
        "plan": "plan(problem, grid) run = solver run, bits",
        "plan saved": "load(save(plan)) run = plan run, bits",
        "plan's degree": "max(0, order - 1 - degree that the last step integrates exactly)",
    }
    if not isinstance(solver, LinearSolver):
        return [Finding.skipped(name, formula, "the solver makes no plan") for name, formula in formulas.items()]
    run, saved, degree = Worst(), Worst(), Worst()
    why = "no order is declared"
    for setup in setups:
        plan = solver.plan(setup.problem, setup.grid)
        want = setup.run(solver, seed=seed).x
        run.add(different(setup.run(plan, seed=seed).x, want), problem=setup.label)
        with tempfile.TemporaryDirectory() as folder:
            plan.save(Path(folder) / "plan.json")
            again = Plan.load(Path(folder) / "plan.json")
        saved.add(different(setup.run(again, seed=seed).x, want), problem=setup.label)
        if claims.order is not None and not setup.problem.stochastic:
            if plan.nfe - plan.steps > claims.start_calls:
                why = "a method with stages is bound by its quadrature alone, to leading order"
                continue
            if plan.kick_noise is not None or bool((plan.noise != 0).any()):
                why = "it brings noise of its own"
                continue
            if "bh" in str(getattr(solver, "second", "")):
                why = "its weights are those of the polynomials to leading order only"
                continue
            # a corrector's last step is not corrected; the last step has all its history
            wanted = claims.order - 1 - bool(getattr(getattr(solver, "solver", solver), "corrector", False))
            try:
                full = full_start(solver).plan(setup.problem, uneven(float(setup.grid[0]), float(setup.grid[-1]), 12))
                found = full.exact_degrees(setup.problem, _clock(solver))[-1]
            except ValueError as error:
                why = str(error)
                continue
            degree.add(max(0.0, wanted - found), degree=found, order=claims.order, problem=setup.label)
    note = "a coefficient that does not depend on the grid alone, or one rounded on its way"
    return [
        run.finding("plan", formulas["plan"], 0, note),
        saved.finding("plan saved", formulas["plan saved"], 0, note),
        degree.finding("plan's degree", formulas["plan's degree"], 0, "weights of a lower order", why),
    ]  # fmt: skip


def _clock(solver: Solver) -> Any:
    """The clock its polynomials are in, by its `coordinate`; rho = sigma/alpha in x/alpha; else the default."""
    return "rho" if getattr(solver, "name_of_variable", "") == "x/alpha" else getattr(solver, "coordinate", None)
