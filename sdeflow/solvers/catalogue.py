"""The solvers of the library as data: tables, tests and the benchmark read these rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sdeflow.solvers.base import Solver, View
from sdeflow.solvers.euler_maruyama import EulerMaruyama
from sdeflow.solvers.exponential import DDIM, DDPM, DPMSolverPP
from sdeflow.solvers.langevin import Langevin, PredictorCorrector
from sdeflow.solvers.runge_kutta import RK4, RK45, Euler, Heun


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: unique, as in tables and on the command line.
        make: constructor without arguments.
        order: order of convergence on problems without noise; None if it is not meant for them.
        strong_order, weak_order: on problems with noise (additive, the case of Gaussian processes);
            None if it refuses them.
        nfe_per_step: model calls a step on a fixed grid.
        view: of the problem.
        noise: kinds of noise it integrates.
        adaptive: whether it solves to a tolerance.
        reference: paper and equation.
    """

    name: str
    make: Callable[[], Solver]
    order: float | None
    nfe_per_step: int
    view: View
    reference: str
    strong_order: float | None = None
    weak_order: float | None = None
    noise: tuple[str, ...] = ()
    adaptive: bool = False


CATALOGUE: tuple[Row, ...] = (
    Row("Euler", Euler, 1, 1, "drift", Euler().tableau.reference),
    Row("Heun", Heun, 2, 2, "drift", Heun().tableau.reference),
    Row("RK4", RK4, 4, 4, "drift", RK4().tableau.reference),
    Row("RK45", RK45, 5, 6, "drift", RK45().tableau.reference, adaptive=True),
    Row(
        "EulerMaruyama", EulerMaruyama, 1, 1, "drift", "Maruyama 1955; Kloeden and Platen 1992, section 10.2",
        strong_order=1, weak_order=1, noise=("diagonal", "general"),
    ),
    Row("DDIM", DDIM, 1, 1, "transition", "Song et al. 2021, DDIM, equation 12"),
    Row(
        "DDPM", DDPM, None, 1, "transition", "Ho et al. 2020, DDPM, equations 6-7",
        strong_order=1, weak_order=1, noise=("diagonal",),
    ),
    Row(
        "DPMSolverPP(1)", lambda: DPMSolverPP(1), 1, 1, "transition", "Lu et al. 2022, DPM-Solver++, equation 8",
        strong_order=1, weak_order=1, noise=("diagonal",),
    ),
    Row(
        "DPMSolverPP(2)", lambda: DPMSolverPP(2), 2, 1, "transition", "Lu et al. 2022, DPM-Solver++, algorithm 2",
        strong_order=1, weak_order=2, noise=("diagonal",),
    ),
    Row(
        "DPMSolverPP(3)", lambda: DPMSolverPP(3), 3, 1, "transition",
        "Lu et al. 2022, DPM-Solver++, section 4.2, with the full second difference",
        strong_order=1, weak_order=2, noise=("diagonal",),
    ),
    Row(
        "EulerMaruyama+Langevin", lambda: PredictorCorrector(EulerMaruyama(), Langevin()), None, 2, "drift",
        "Song et al. 2021, Score-based generative modeling, algorithm 1", noise=("diagonal",),
    ),
)  # fmt: skip
"""Every method, in the order of the documentation's table."""


def by_name(name: str) -> Row:
    """The row of that name.

    Raises:
        ValueError: no such method; the message lists all.
    """
    for row in CATALOGUE:
        if row.name == name:
            return row
    raise ValueError(f"unknown solver {name!r}: expected one of {', '.join(row.name for row in CATALOGUE)}")


def markdown_table() -> str:
    """The catalogue as the Markdown table of the documentation."""
    head = "| solver | order (ODE) | strong | weak | calls a step | view | noise | adaptive | reference |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in CATALOGUE:
        orders = " | ".join("-" if v is None else f"{v:g}" for v in (row.order, row.strong_order, row.weak_order))
        noise, adaptive = ", ".join(row.noise) or "-", "yes" if row.adaptive else "-"
        lines.append(
            f"| `{row.name}` | {orders} | {row.nfe_per_step} | {row.view} | {noise} | {adaptive} | {row.reference} |"
        )
    return "\n".join(lines)
