"""sdeflow: SDE and ODE solving with a diffusion front end."""

from importlib.metadata import version as _version

from sdeflow import bench, grids, losses, metrics, nets, problems, solvers
from sdeflow.brownian import BrownianPath
from sdeflow.checkpoints import load_model, save_model
from sdeflow.gaussian import GaussianSDE
from sdeflow.model import Model
from sdeflow.noise import Antithetic, Noise, SamePath
from sdeflow.plan import Plan
from sdeflow.processes import EDM, VE, VP, CosineVP, DiscreteVP, RectifiedFlow, SubVP
from sdeflow.recorded import RecordedPath
from sdeflow.reverse import ReverseSDE
from sdeflow.sampling import sample
from sdeflow.sde import ODE, SDE
from sdeflow.solution import Solution, SolveError, State, Stats, Status
from sdeflow.solve import iterate, solve

__version__ = _version("sdeflow")

__all__ = [
    "EDM",
    "ODE",
    "SDE",
    "VE",
    "VP",
    "Antithetic",
    "BrownianPath",
    "SamePath",
    "RecordedPath",
    "CosineVP",
    "DiscreteVP",
    "GaussianSDE",
    "Model",
    "Noise",
    "Plan",
    "RectifiedFlow",
    "ReverseSDE",
    "Solution",
    "SolveError",
    "State",
    "Stats",
    "Status",
    "SubVP",
    "bench",
    "grids",
    "iterate",
    "load_model",
    "losses",
    "metrics",
    "nets",
    "problems",
    "sample",
    "save_model",
    "solve",
    "solvers",
]
