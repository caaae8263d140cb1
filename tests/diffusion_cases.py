"""Stochastic samplers of diffusion models with their orders, and the exact law of what they make of Gaussian data."""

import torch

import sdeflow as sf
from sdeflow.solvers import (
    DDPM,
    ERSDE,
    SEEDS,
    AncestralPredictor,
    DPMSolver,
    DPMSolverPP,
    EulerAncestral,
    OwnEta,
    ReverseDiffusion,
    SASolver,
    UniPC,
)
from tests.exact import F64, TableNoise, random_mixture

VP = sf.VP()
START, END = 0.8, 0.05
# three laws at once: a component each
MEAN, VARIANCE = torch.tensor([0.7, -0.4, 1.0], dtype=F64), torch.tensor([0.3, 1.5, 0.05], dtype=F64)
DATA = sf.problems.Gaussian(MEAN, VARIANCE)
MIXTURE = sf.problems.GaussianMixture(*random_mixture(5, 8, seed=4, spread=1.2))
MODEL = MIXTURE.model(VP)
X = torch.randn(6, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
# the grid of the formulas: four uneven steps
GRID = torch.tensor([0.8, 0.6, 0.35, 0.2, 0.1], dtype=F64)


def rising(t):
    """An eta that depends on t."""
    return 0.5 + t


def blend(x, t):
    """A learned variance that does not depend on the state, so that laws superpose."""
    return torch.tensor(0.4, dtype=x.dtype)


def power(exponent):
    """The noise scale x^exponent, that is eta^2 = exponent - 1."""
    return lambda x: x**exponent


def marginal(process, t):
    """(mean, variance) of the data noised to t."""
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    return alpha * MEAN, alpha**2 * VARIANCE + sigma**2


def law_after(monkeypatch, solver, problem, grid, start):
    """Exact (mean, variance) of what `solver` makes of the law `start`: one unit of noise, or of start, a sample."""
    count = at = 0

    def counting(nodes):
        nonlocal count
        count += nodes
        return torch.zeros(nodes, 1, 3, dtype=F64)

    def units(nodes):
        nonlocal at
        table = torch.zeros(nodes, count + 2, 3, dtype=F64)
        table[torch.arange(nodes), at + torch.arange(nodes)] = 1.0
        at += nodes
        return table

    with monkeypatch.context() as patch, torch.no_grad():
        TableNoise(patch, counting)
        sf.solve(problem, torch.zeros(1, 3, dtype=F64), solver, grid=grid, seed=0)
        TableNoise(patch, units)
        x = torch.zeros(count + 2, 3, dtype=F64)
        x[-1] = 1.0
        y = sf.solve(problem, x, solver, grid=grid, seed=0).x
    offset = y[count]
    gain, columns = y[-1] - offset, y[:count] - offset
    return gain * start[0] + offset, gain**2 * start[1] + columns.square().sum(0)


def distance(got, want):
    """2-Wasserstein distance of the three normal laws, in quadrature."""
    return float(torch.hypot(got[0] - want[0], got[1].sqrt() - want[1].sqrt()).norm())


def law_errors(monkeypatch, solver, eta, steps, process=VP, span=(START, END), grid=sf.grids.logsnr):
    """Distances of the end's law from the exact marginal, started from the exact marginal."""
    problem = process.reverse(DATA.model(process), eta)
    start, end = (marginal(process, t) for t in span)
    return [
        distance(law_after(monkeypatch, solver, problem, grid(process, n, *span), start), end) for n in steps
    ]  # fmt: skip


READS_ETA = [
    (SEEDS(1), 1), (SEEDS(2), 2), (SEEDS(3), 2), (ReverseDiffusion(), 1),
    (DPMSolverPP(1), 1), (DPMSolverPP(2), 2), (DPMSolverPP(3), 2), (DPMSolver(2, True), 2), (UniPC(2), 2),
]  # fmt: skip
OWN_ETA = [
    (DDPM(), 1), (DDPM("forward"), 1), (DDPM(blend), 1), (AncestralPredictor(), 1),
    (EulerAncestral(), 1), (EulerAncestral(0.5), 1), (EulerAncestral(1.5), 1),
    (SASolver(), 2), (SASolver(1, 0, 1.0), 1), (SASolver(1, 2, 1.0), 2), (SASolver(2, 0, 0.5), 2),
    (SASolver(2, 2, 0.5), 2), (SASolver(3, 0, rising), 2), (SASolver(3, 4, 1.0), 2), (SASolver(4, 5, rising), 2),
    (ERSDE(1), 1), (ERSDE(2), 2), (ERSDE(2, power(2.0)), 2), (ERSDE(3, power(1.25)), 2), (ERSDE(3, power(2.0)), 2),
]  # fmt: skip


def label(value):
    if isinstance(value, sf.solvers.Solver):
        own = getattr(value, "eta", None)
        return value.name if own is None else f"{value.name}-{label(own)}"
    if isinstance(value, OwnEta):
        return type(value).__name__
    return getattr(value, "__name__", str(value))


def run(solver, eta=0.0, model=MODEL, grid=GRID, x=X, seed=7):
    process = model.sde
    with torch.no_grad():
        return sf.solve(process.reverse(model, eta), x, solver, grid=grid, seed=seed).x


def agree(got, want, tolerance=1e-10):
    assert float((got - want).abs().max()) < tolerance * float(want.abs().max())


PATHS = [
    *[(SEEDS(k), eta) for k in (1, 2, 3) for eta in (1.0, rising)],
    (ReverseDiffusion(), 1.0), (ReverseDiffusion(), rising),
    (DDPM(), 0.0), (DDPM("forward"), 0.0), (DDPM(lambda x, t: torch.sigmoid(x)), 0.0), (AncestralPredictor(), 0.0),
    (EulerAncestral(), 0.0), (EulerAncestral(0.5), 0.0),
    (SASolver(), 0.0), (SASolver(2, 2, rising), 0.0), (SASolver(3, 4, 1.0), 0.0),
    (ERSDE(1), 0.0), (ERSDE(2), 0.0), (ERSDE(3), 0.0),
]  # fmt: skip
