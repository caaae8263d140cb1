"""The solvers of the library as data: tables, tests and the benchmark read these rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sdeflow.calculus import NOISE_KINDS
from sdeflow.checked import checked
from sdeflow.solvers.adams import AdamsBashforth, AdamsBashforthMoulton
from sdeflow.solvers.adaptive_sde import AdaptiveSDE
from sdeflow.solvers.ancestral import DDPM, AncestralPredictor, EulerAncestral, ReverseDiffusion
from sdeflow.solvers.base import LinearSolver, Solver, View
from sdeflow.solvers.edm import EDMEuler, EDMHeun
from sdeflow.solvers.euler_maruyama import EulerMaruyama
from sdeflow.solvers.exponential import DDIM, DEIS, DPMSolver, DPMSolverPP, UniPC
from sdeflow.solvers.exponential_rk import ExponentialRK
from sdeflow.solvers.gaussian_split import GaussianSplit
from sdeflow.solvers.langevin import AnnealedLangevin, Langevin, PredictorCorrector
from sdeflow.solvers.milstein import LevyMilstein, Milstein
from sdeflow.solvers.named import DPM2, ERSDE, IPNDM, PNDM, RhoRK, SASolver, StraightABM
from sdeflow.solvers.rosenbrock import ROS2, ROS34PW2
from sdeflow.solvers.runge_kutta import (
    DOP853,
    RK4,
    RK38,
    RK45,
    BogackiShampine,
    Euler,
    Heun,
    Midpoint,
    Ralston,
    RungeKutta,
    Tsit5,
)  # fmt: skip
from sdeflow.solvers.seeds import SEEDS
from sdeflow.solvers.stabilised import SKROCK
from sdeflow.solvers.stochastic import StochasticSolver
from sdeflow.solvers.stochastic_rk import SRA1, SRA3, SRIW1, ShARK
from sdeflow.solvers.stratonovich import StochasticHeun, StochasticMidpoint
from sdeflow.solvers.weak import PlatenWeak2


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: unique, as in tables and on the command line.
        make: constructor without arguments.
        order: order of convergence on problems without noise, with a start-up of full order where the method has
            one (`start`); None if it is not meant for them. A corrector adds one to the order in its name.
        strong_order, weak_order: on problems with additive noise, as that of every Gaussian process; None if it
            refuses noise.
        strong_diagonal, strong_general: strong orders with diagonal (or scalar) and with general noise; None if it
            refuses it.
        nfe_per_step: model calls a step on a fixed grid.
        view: of the problem.
        noise: kinds of noise it integrates (`sdeflow.calculus.NOISE_KINDS`).
        adaptive: whether it solves to a tolerance.
        start_calls: model calls that its start-up adds, whatever the number of steps.
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
    start_calls: int = 0
    strong_diagonal: float | None = None
    strong_general: float | None = None


def _runge_kutta(make: Callable[[], RungeKutta]) -> Row:
    solver = make()
    used = len(solver.tableau.b) - solver.tableau.first_same_as_last
    return Row(solver.name, make, solver.order, used, "drift", solver.tableau.reference, adaptive=solver.adaptive)


def _stochastic(make: Callable[[], StochasticSolver], calls: int, weak: float, reference: str) -> Row:
    """A one-step method for SDEs of any kind of noise that it fits."""
    solver = make()
    orders = [solver.order_for(kind) if kind in solver.fits else None for kind in ("additive", "diagonal", "general")]
    return Row(
        solver.name, make, None, calls, "drift", reference, orders[0], weak, solver.fits, solver.adaptive,
        strong_diagonal=orders[1], strong_general=orders[2],
    )  # fmt: skip


def _exponential(
    make: Callable[[], LinearSolver], order: float, reference: str, *, calls: int = 1, adaptive: bool = False,
    weak: float | None = None,
) -> Row:  # fmt: skip
    """A method of the transition view; with `weak`, one that also takes the problem's noise."""
    noise: tuple[str, ...] = () if weak is None else ("additive",)
    strong = None if weak is None else 1
    return Row(make().name, make, order, calls, "transition", reference, strong, weak, noise, adaptive)


_DPM, _DPMPP = "Lu et al. 2022, DPM-Solver", "Lu et al. 2022, DPM-Solver++"
_DEIS, _UNIPC = "Zhang and Chen 2023, DEIS, section 3.3", "Zhao et al. 2023, UniPC, algorithms 1-3"
_ETD = "Hochbruck and Ostermann 2005, Explicit exponential Runge-Kutta methods, section 5"
_EDM = "Karras et al. 2022, EDM, algorithms 1-2"
_ADAMS = "Hairer, Norsett, Wanner 1993, Solving ODEs I, III.1"
_SONG = "Song et al. 2021, Score-based generative modeling"
_SEEDS = "Gonzalez et al. 2023, SEEDS, section 4"

FAMILY: tuple[Row, ...] = (
    *(
        _runge_kutta(make)
        for make in (
            Euler, Midpoint, Heun, Ralston, RK4, RK38, BogackiShampine, RK45, Tsit5, DOP853,
        )
    ),
    Row("ROS2", ROS2, 2, 3, "drift", ROS2().tableau.reference),
    Row("ROS34PW2", ROS34PW2, 3, 5, "drift", ROS34PW2().tableau.reference, adaptive=True),
    *(
        Row(f"AdamsBashforth({k})", partial(AdamsBashforth, k), k, 1, "drift", _ADAMS)
        for k in (2, 3, 4, 5)
    ),
    *(
        Row(f"AdamsBashforthMoulton({k})", partial(AdamsBashforthMoulton, k), k + 1, 1, "drift", _ADAMS)
        for k in (1, 2, 3, 4)
    ),
    Row(
        "EulerMaruyama", EulerMaruyama, 1, 1, "drift", "Maruyama 1955; Kloeden and Platen 1992, section 10.2",
        strong_order=1, weak_order=1, noise=NOISE_KINDS, strong_diagonal=0.5, strong_general=0.5,
    ),
    _stochastic(Milstein, 1, 1, "Milstein 1974; Kloeden and Platen 1992, section 10.3"),
    _stochastic(LevyMilstein, 1, 1, "Kloeden and Platen 1992, section 10.3; areas: Foster 2020, chapter 7"),
    _stochastic(StochasticHeun, 2, 2, "Rumelin 1982"),
    _stochastic(StochasticMidpoint, 2, 1, "Kloeden and Platen 1992, section 8.1"),
    _stochastic(SRA1, 2, 2, "Rossler 2010, table 6.2"),
    _stochastic(SRA3, 3, 2, "Rossler 2010, table 6.3"),
    _stochastic(ShARK, 2, 2, "Foster, dos Reis and Strange 2023, section 5"),
    _stochastic(SRIW1, 2, 2, "Rossler 2010, table 5.2"),
    _stochastic(PlatenWeak2, 2, 2, "Kloeden and Platen 1992, section 15.1, equation 1.3"),
    _stochastic(SKROCK, 5, 1, "Abdulle, Almuslimani and Vilmart 2018, equation 9"),
    _stochastic(AdaptiveSDE, 2, 2, "Jolicoeur-Martineau et al. 2021, algorithm 1"),
    _exponential(DDIM, 1, "Song et al. 2021, DDIM, equation 12"),
    Row(
        "DDPM", DDPM, None, 1, "transition", "Ho et al. 2020, DDPM, equations 6-7",
        strong_order=1, weak_order=1, noise=("additive",),
    ),
    *(
        Row(f"DPMSolver({k}S)", partial(DPMSolver, k), k, k, "transition", _DPM, adaptive=k > 1)
        for k in (2, 3)
    ),
    *(
        Row(f"DPMSolver({k}M)", partial(DPMSolver, k, True), k, 1, "transition", _DPM, 1, 2, ("additive",))
        for k in (2, 3)
    ),
    *(
        Row(
            f"DPMSolverPP({k})", partial(DPMSolverPP, k), k, 1, "transition",
            _DPMPP + (", with the full second difference" if k == 3 else ""), 1, min(k, 2), ("additive",),
        )
        for k in (1, 2, 3)
    ),
    *(
        Row(f"DPMSolverPP({k}S)", partial(DPMSolverPP, k, False), k, k, "transition", _DPMPP, adaptive=True)
        for k in (2, 3)
    ),
    *(Row(f"DEIS({k})", partial(DEIS, k), k, 1, "transition", _DEIS + " (tAB)") for k in (2, 3, 4)),
    *(Row(f"RhoRK({k})", partial(RhoRK, k), k, k, "transition", _DEIS + " (rhoRK)") for k in (3, 4)),
    *(Row(f"IPNDM({k})", partial(IPNDM, k), k, 1, "transition", _DEIS + " (rhoAB)") for k in (2, 3, 4)),
    Row("PNDM", PNDM, 4, 1, "transition", "Liu et al. 2022, PNDM, equations 11-12", start_calls=9),
    *(
        Row(f"UniPC({k})", partial(UniPC, k), k + 1, 1, "transition", _UNIPC, 1, 2, ("additive",))
        for k in (1, 2, 3)
    ),
    *(
        Row(f"ExponentialRK({k})", partial(ExponentialRK, k), k, calls, "transition", _ETD, adaptive=k in (2, 3))
        for k, calls in ((2, 2), (3, 3), (4, 5))
    ),
    _exponential(DPM2, 2, _DPM + ", algorithm 1", calls=2, adaptive=True),
    Row("EDMEuler", EDMEuler, 1, 1, "transition", _EDM),
    Row("EDMHeun", EDMHeun, 2, 2, "transition", _EDM),
    *(
        Row(f"StraightABM({k})", partial(StraightABM, k), k + 1, 1, "transition", _ADAMS + ", in x/(alpha + sigma)")
        for k in (3, 4)
    ),
    *(
        Row(
            f"GaussianSplit({k})", partial(GaussianSplit, k), k + 1, 1, "transition", "this project: docs/solvers.md",
            1, 1, ("additive",), True,
        )
        for k in (2, 3)
    ),
    _exponential(partial(SEEDS, 1), 1, _SEEDS, weak=1),
    Row(
        "ReverseDiffusion", ReverseDiffusion, None, 1, "transition", _SONG + ", appendix E",
        strong_order=1, weak_order=1, noise=("additive",),
    ),
    Row(
        "EulerMaruyama+Langevin", lambda: PredictorCorrector(EulerMaruyama(), Langevin()), None, 2, "drift",
        "Song et al. 2021, Score-based generative modeling, algorithm 1", noise=("additive",),
    ),
)  # fmt: skip
"""The methods that read the problem's noise, with one normal a step, or take none."""

SAMPLERS: tuple[Row, ...] = (
    *(
        Row(f"SEEDS({k})", partial(SEEDS, k), k, k, "transition", _SEEDS, 1, 2, ("additive",))
        for k in (2, 3)
    ),
    Row("EulerAncestral", EulerAncestral, 1, 1, "transition", "k-diffusion; Song et al. 2021, DDIM, equation 16",
        1, 1, ("own",)),
    Row("DDPM(forward)", partial(DDPM, "forward"), None, 1, "transition", "Ho et al. 2020, DDPM, section 3.2",
        1, 1, ("own",)),
    Row("AncestralPredictor", AncestralPredictor, None, 1, "transition", _SONG + ", appendix F", 1, 1, ("own",)),
    Row("SASolver(3, 4)", SASolver, 4, 1, "transition", "Xue et al. 2023, SA-Solver, algorithm 1", 1, 2, ("own",)),
    *(
        Row(
            f"ERSDE({k})", partial(ERSDE, k), k, 1, "transition",
            "Cui et al. 2023, ER-SDE-Solvers, section 3" + (", with the parabola's slope" if k == 3 else ""),
            1, min(k, 2), ("own",),
        )
        for k in (1, 2, 3)
    ),
    Row("AnnealedLangevin", AnnealedLangevin, None, 100, "transition",
        "Song and Ermon 2019, Generative modeling by estimating gradients, algorithm 1", noise=("own",)),
)  # fmt: skip
"""Samplers of diffusion models with a stochasticity of their own (noise "own": they run on the flow; `order` is that
without it), or with several normals a step: docs/stochasticity.md, held to their orders in
tests/test_diffusion_laws.py.
"""

CATALOGUE: tuple[Row, ...] = FAMILY + SAMPLERS
"""Every method, in the order of the documentation's table."""


@checked
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
    head = (
        "| solver | order (ODE) | strong, additive noise | diagonal | general | weak | calls a step | view | noise | "
        "adaptive | reference |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in CATALOGUE:
        columns = (row.order, row.strong_order, row.strong_diagonal, row.strong_general, row.weak_order)
        orders = " | ".join("-" if v is None else f"{v:g}" for v in columns)
        noise = "any" if row.noise == NOISE_KINDS else ", ".join(row.noise) or "-"
        adaptive = "yes" if row.adaptive else "-"
        lines.append(
            f"| `{row.name}` | {orders} | {row.nfe_per_step} | {row.view} | {noise} | {adaptive} | {row.reference} |"
        )
    return "\n".join(lines)
