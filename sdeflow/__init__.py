"""sdeflow: SDE and ODE solving with a diffusion front end."""

from importlib.metadata import version as _version

from sdeflow import (
    bench,
    engine,
    grids,
    guidance,
    inverse,
    losses,
    metrics,
    nets,
    problems,
    solvers,
    statistics,
    testing,
    tuning,
)
from sdeflow.brownian import BrownianPath
from sdeflow.checkpoints import load_model, save_model
from sdeflow.cld import CLD
from sdeflow.coding import decode, encode, interpolate, interpolate_data
from sdeflow.dataset import Dataset
from sdeflow.discrete import DiscreteVP
from sdeflow.ensemble import Ensemble, PriorStart, ensemble
from sdeflow.expectation import Expectation, expect
from sdeflow.gaussian import GaussianSDE
from sdeflow.known import GBM, RotationGBM, SigmoidOU, SinhOU, Student
from sdeflow.likelihood import bits_per_dim, elbo, log_prob
from sdeflow.linear import LinearSDE
from sdeflow.model import Model
from sdeflow.moments import moments
from sdeflow.noise import Antithetic, Noise, SamePath
from sdeflow.plan import Plan
from sdeflow.processes import EDM, VE, VP, CosineVP, RectifiedFlow, SubVP
from sdeflow.pushforward import Pushforward
from sdeflow.recommendation import Recommendation, recommend
from sdeflow.recorded import RecordedPath
from sdeflow.reverse import ReverseSDE
from sdeflow.sample_run import sample_to
from sdeflow.sampling import sample
from sdeflow.sde import ODE, SDE
from sdeflow.solution import Solution, SolveError, State, Stats, Status
from sdeflow.solve import iterate, solve
from sdeflow.special import CIR, Jacobi, Sphere, SquaredBessel
from sdeflow.structure import Structure
from sdeflow.tuning import tune

__version__ = _version("sdeflow")

__all__ = [
    "CIR",
    "CLD",
    "EDM",
    "GBM",
    "ODE",
    "SDE",
    "VE",
    "VP",
    "Antithetic",
    "BrownianPath",
    "SamePath",
    "RecordedPath",
    "CosineVP",
    "Dataset",
    "Ensemble",
    "PriorStart",
    "Expectation",
    "DiscreteVP",
    "GaussianSDE",
    "LinearSDE",
    "Jacobi",
    "Model",
    "Noise",
    "Plan",
    "Pushforward",
    "Recommendation",
    "RectifiedFlow",
    "ReverseSDE",
    "SinhOU",
    "SigmoidOU",
    "RotationGBM",
    "Solution",
    "SolveError",
    "SquaredBessel",
    "Sphere",
    "State",
    "Stats",
    "Student",
    "Structure",
    "Status",
    "SubVP",
    "bench",
    "bits_per_dim",
    "decode",
    "elbo",
    "encode",
    "engine",
    "ensemble",
    "expect",
    "grids",
    "guidance",
    "interpolate",
    "interpolate_data",
    "inverse",
    "iterate",
    "load_model",
    "log_prob",
    "losses",
    "metrics",
    "moments",
    "nets",
    "problems",
    "recommend",
    "sample",
    "sample_to",
    "save_model",
    "solve",
    "solvers",
    "statistics",
    "testing",
    "tune",
    "tuning",
]
