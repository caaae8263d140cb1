"""Solvers: construct one and pass it to `solve` or `sample`; `CATALOGUE` lists all."""

from sdeflow.solvers.adams import Adams, AdamsBashforth, AdamsBashforthMoulton
from sdeflow.solvers.adaptive_sde import AdaptiveSDE
from sdeflow.solvers.ancestral import DDPM, AncestralPredictor, EulerAncestral, ReverseDiffusion
from sdeflow.solvers.backends import Scipy, Torchdiffeq, Torchsde
from sdeflow.solvers.base import LinearSolver, Solver
from sdeflow.solvers.catalogue import CATALOGUE, Row, by_name
from sdeflow.solvers.compensated import Compensated
from sdeflow.solvers.consistency import ConsistencySampler
from sdeflow.solvers.edm import EDMEuler, EDMHeun, EDMSampler
from sdeflow.solvers.euler_maruyama import EulerMaruyama
from sdeflow.solvers.exponential import (
    DDIM,
    DEIS,
    DPMSolver,
    DPMSolverFast,
    DPMSolverPP,
    ExponentialMultistep,
    UniPC,
)
from sdeflow.solvers.exponential_rk import ExponentialRK
from sdeflow.solvers.gaussian_split import GaussianSplit, estimate_split
from sdeflow.solvers.in_variable import InVariable
from sdeflow.solvers.langevin import AnnealedLangevin, Langevin, PredictorCorrector
from sdeflow.solvers.linear_exponential import LinearExponential
from sdeflow.solvers.milstein import LevyMilstein, Milstein
from sdeflow.solvers.named import DPM2, ERSDE, IPNDM, LMS, PNDM, RhoRK, SASolver, StraightABM
from sdeflow.solvers.own_eta import NoiseScale, OwnEta, Window
from sdeflow.solvers.restart import Restart, RestartInterval
from sdeflow.solvers.reversible import Reversible
from sdeflow.solvers.reversible_heun import ReversibleHeun
from sdeflow.solvers.rosenbrock import ROS2, ROS34PW2, Rosenbrock
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
    for_tolerance,
)
from sdeflow.solvers.seeds import SEEDS
from sdeflow.solvers.splitting import Splitting
from sdeflow.solvers.stabilised import SKROCK
from sdeflow.solvers.stochastic import AdaptiveStochasticSolver, StochasticSolver
from sdeflow.solvers.stochastic_rk import SRA1, SRA3, SRIW1, ShARK
from sdeflow.solvers.stratonovich import StochasticHeun, StochasticMidpoint
from sdeflow.solvers.tableaus import Tableau
from sdeflow.solvers.weak import PlatenWeak2

__all__ = [
    "CATALOGUE",
    "PlatenWeak2",
    "StochasticMidpoint",
    "StochasticHeun",
    "ShARK",
    "SRIW1",
    "SRA3",
    "SRA1",
    "AdaptiveStochasticSolver",
    "StochasticSolver",
    "SKROCK",
    "Splitting",
    "Milstein",
    "LevyMilstein",
    "AdaptiveSDE",
    "ERSDE",
    "SEEDS",
    "AncestralPredictor",
    "AnnealedLangevin",
    "EulerAncestral",
    "NoiseScale",
    "OwnEta",
    "ReverseDiffusion",
    "SASolver",
    "Window",
    "Compensated",
    "ConsistencySampler",
    "DDIM",
    "DDPM",
    "DEIS",
    "DOP853",
    "DPM2",
    "IPNDM",
    "LMS",
    "PNDM",
    "RK4",
    "RK38",
    "RK45",
    "ROS2",
    "ROS34PW2",
    "Adams",
    "AdamsBashforth",
    "AdamsBashforthMoulton",
    "BogackiShampine",
    "DPMSolver",
    "DPMSolverFast",
    "DPMSolverPP",
    "EDMEuler",
    "EDMHeun",
    "EDMSampler",
    "Euler",
    "EulerMaruyama",
    "ExponentialMultistep",
    "ExponentialRK",
    "GaussianSplit",
    "Heun",
    "InVariable",
    "Langevin",
    "LinearExponential",
    "LinearSolver",
    "Midpoint",
    "PredictorCorrector",
    "Ralston",
    "Restart",
    "RestartInterval",
    "Reversible",
    "ReversibleHeun",
    "RhoRK",
    "Rosenbrock",
    "Row",
    "RungeKutta",
    "Scipy",
    "Solver",
    "StraightABM",
    "Tableau",
    "Torchdiffeq",
    "Torchsde",
    "Tsit5",
    "UniPC",
    "by_name",
    "estimate_split",
    "for_tolerance",
]
