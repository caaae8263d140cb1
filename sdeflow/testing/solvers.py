"""`check_solver`: what a solver declares, its contract with `solve`, and its orders, one verdict an identity.

Orders are fitted against closed forms: a curved rotation for ordinary equations, tanh(W/2 + artanh x) and geometric
Brownian motion for multiplicative noise, Taylor's scheme of strong order 1.5 on a fine grid for additive noise, the
flow and the law of a Gaussian for reversals; the flow of a mixture by a method of order 8 on a fine grid. Weak errors
have no sampling error: a step of a linear equation is affine in its normals, and each sample carries one unit of one.
"""

from __future__ import annotations

from collections.abc import Mapping

from sdeflow.checked import checked
from sdeflow.plan import Plan
from sdeflow.sde import Problem
from sdeflow.solvers.base import Solver
from sdeflow.testing.report import Report
from sdeflow.testing.solver_checks.claims import claims_of
from sdeflow.testing.solver_checks.contract import contract_findings
from sdeflow.testing.solver_checks.given_problem import given_finding
from sdeflow.testing.solver_checks.ode_orders import ode_findings
from sdeflow.testing.solver_checks.plans import plan_findings
from sdeflow.testing.solver_checks.setups import setups_for
from sdeflow.testing.solver_checks.strong_orders import constant_noise_finding, strong_findings
from sdeflow.testing.solver_checks.weak_orders import moments_finding, weak_finding


@checked
def check_solver(
    solver: Solver,
    *,
    order: float | None = None,
    weak_order: float | None = None,
    strong_order: float | Mapping[str, float] | None = None,
    nfe_per_step: int | None = None,
    problem: Problem | None = None,
    seed: int = 0,
) -> Report:
    """Hold a solver to what it declares and to the contract of `solve`, on built-in problems that fit it.

    What it declares is the catalogue's row that made it (by equality, else by type and name), for methods that derive
    from `StochasticSolver` their `order_for`, or the arguments, which win. Orders are one-sided: a fitted order may
    be 0.25 below the one declared, and anything above. Orders of multistep methods are those with a start-up of full
    order, where they have a `start` to choose.

    Args:
        solver: a solver that steps along a grid, of the library or your own.
        order: of convergence without noise.
        weak_order: with additive noise.
        strong_order: with noise; a number for additive and diagonal noise alike, or {"additive": 1.5, "diagonal": 1}.
        nfe_per_step: evaluations of the drift or model a step.
        problem: one of your own, added to the built-in ones (states standard normal, of its `event` or (2,)). Its
            drift must be elementwise over the batch to the bit, as the identities of bits need.
        seed: of the noise and of the paths: strong orders are fits over 64 to 256 paths, good to about 0.05.

    Raises:
        TypeError: `solver` is none, or a `Plan`, which has its own grid.
        ValueError: the solver does not take `problem`.
    """
    if not isinstance(solver, Solver) or isinstance(solver, Plan):
        raise TypeError(f"expected a solver such as sf.solvers.Heun(), not a plan, got {solver!r}")
    claims = claims_of(solver, order, weak_order, strong_order, nfe_per_step)
    setups, refused = setups_for(solver, problem, seed)
    findings = contract_findings(solver, setups, claims, seed)
    findings += ode_findings(solver, claims)
    findings.append(constant_noise_finding(solver, setups, seed))
    findings += strong_findings(solver, setups, claims, seed)
    findings += [weak_finding(solver, claims), moments_finding(solver, claims)]
    findings += plan_findings(solver, setups, claims, seed)
    findings += [given_finding(solver, s, claims, seed) for s in setups if s.label == "the given problem"]
    facts = {"declares": claims.words(), "problems": ", ".join(s.label for s in setups) or "none"}
    warnings = () if setups else tuple(f"no problem: {why}" for why in refused)
    return Report(f"{solver.name} ({solver.view} view)", tuple(findings), facts, warnings)
