"""Solvers: construct one and pass it to `solve` or `sample`; `CATALOGUE` lists all."""

from sdeflow.solvers.base import LinearSolver, Solver
from sdeflow.solvers.catalogue import CATALOGUE, Row, by_name
from sdeflow.solvers.euler_maruyama import EulerMaruyama
from sdeflow.solvers.exponential import DDIM, DDPM, DPMSolverPP, ExponentialMultistep
from sdeflow.solvers.langevin import Langevin, PredictorCorrector
from sdeflow.solvers.runge_kutta import RK4, RK45, Euler, Heun, RungeKutta
from sdeflow.solvers.tableaus import Tableau

__all__ = [
    "CATALOGUE",
    "DDIM",
    "DDPM",
    "RK4",
    "RK45",
    "DPMSolverPP",
    "Euler",
    "EulerMaruyama",
    "ExponentialMultistep",
    "Heun",
    "Langevin",
    "LinearSolver",
    "PredictorCorrector",
    "Row",
    "RungeKutta",
    "Solver",
    "Tableau",
    "by_name",
]
