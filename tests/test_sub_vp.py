"""Sub-VP with every sampler, corrector and restart of the library: the law of Gaussian data, mean and deviation."""

from __future__ import annotations

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.solvers import catalogue
from sdeflow.solvers.ancestral import DDPM, AncestralPredictor, ReverseDiffusion
from sdeflow.solvers.edm import EDMEuler, EDMHeun
from sdeflow.solvers.euler_maruyama import EulerMaruyama
from sdeflow.solvers.langevin import AnnealedLangevin, Langevin, PredictorCorrector
from sdeflow.solvers.restart import Restart, RestartInterval

F64 = torch.float64
PROCESS = sf.SubVP()
MEAN, VARIANCE = 0.5, 0.3
COUNT = 2000
BIAS = 0.03
"""What the error of the steps may add, relative to the deviation."""

EXACT = sf.problems.Gaussian([MEAN], [VARIANCE]).model(PROCESS)
LEVEL = float(PROCESS.sigma(PROCESS.t_min) / PROCESS.alpha(PROCESS.t_min))


def moments(t):
    """(mean, deviation) of x_t."""
    alpha, sigma = float(PROCESS.alpha(t)), float(PROCESS.sigma(t))
    return MEAN * alpha, math.sqrt(VARIANCE * alpha**2 + sigma**2)


def start(count=COUNT, event=1):
    """Draws at t1, with exactly the moments of the law there."""
    z = torch.randn(count, event, dtype=F64, generator=torch.Generator().manual_seed(1))
    mean, std = moments(PROCESS.t1)
    return mean + std * (z - z.mean()) / z.std()


def check(solution, end=PROCESS.t_min):
    """Mean and deviation at the end within 4 standard errors and the bias."""
    mean, std = moments(end)
    x = solution.x
    assert bool(torch.isfinite(x).all())
    assert abs(float(x.mean()) - mean) < (4 / math.sqrt(x.numel()) + BIAS) * std
    assert abs(float(x.std()) / std - 1) < 4 / math.sqrt(2 * x.numel()) + BIAS


def run(solver, eta, count=COUNT, **options):
    with torch.no_grad():
        return sf.solve(PROCESS.reverse(EXACT, eta), start(count), solver, seed=2, **options)


def etas(row):
    """The stochasticities that a method of the catalogue takes: the flow, the reverse SDE, or both."""
    if "own" in row.noise:
        return [0.0]
    return [0.0] * (row.order is not None) + [1.0] * bool(row.noise)


@pytest.mark.parametrize(
    ("row", "eta"),
    [
        pytest.param(row, eta, id=f"{row.name}, eta {eta:g}")
        for row in catalogue.CATALOGUE
        for eta in etas(row)
        if row.name != "AnnealedLangevin"
    ],
)
def test_every_method_of_the_catalogue_ends_in_the_law_of_the_data(row, eta):
    check(run(row.make(), eta, steps=100))


@pytest.mark.parametrize(
    ("row", "eta"),
    [
        pytest.param(row, eta, id=f"{row.name}, eta {eta:g}")
        for row in catalogue.CATALOGUE
        for eta in etas(row)
        if row.adaptive and not (eta > 0 and row.name.startswith("GaussianSplit"))  # to a tolerance, the flow only
    ],
)
def test_every_adaptive_method_ends_in_the_law_of_the_data(row, eta):
    # with noise the last part of the way, down to sigma = 1e-4, takes most of the steps
    tolerance, end = (1e-2, PROCESS.t_min) if eta == 0 else (0.3, 0.05)
    check(run(row.make(), eta, count=500, rtol=tolerance, atol=tolerance, t_span=(PROCESS.t1, end)), end)


@pytest.mark.parametrize("size", ["level", "sample", "batch"])
@pytest.mark.parametrize(
    ("predictor", "eta"),
    [(EulerMaruyama(), 1.0), (ReverseDiffusion(), 1.0), (ReverseDiffusion(), 0.0), (AncestralPredictor(), 0.0),
     (DDPM(), 0.0), (sf.solvers.DDIM(), 0.0), (sf.solvers.Heun(), 0.0)],
    ids=lambda v: getattr(v, "name", str(v)),
)  # fmt: skip
def test_every_corrector_keeps_the_law_of_the_data(predictor, eta, size):
    """The sizes by norms are right in high dimension only: 64 components, of which each is a draw."""
    model = sf.problems.Gaussian([MEAN] * 64, [VARIANCE] * 64).model(PROCESS)
    x = start(100, 64)
    solver = PredictorCorrector(predictor, Langevin(snr=0.1, size=size))
    with torch.no_grad():
        solution = sf.solve(PROCESS.reverse(model, eta), x, solver, steps=200, seed=2)
    assert solution.stats.nfe == (3 if predictor.name == "Heun" else 2) * 200
    check(solution)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (DDPM(lambda x, t: torch.full_like(x, 0.5)), {"steps": 100}),
        (EDMHeun(s_churn=20), {"steps": 100}),
        (EDMEuler(s_churn=20), {"steps": 100}),
        (Restart((RestartInterval(0.1, 2.0, 2, 20),)), {"steps": 100}),
        (AnnealedLangevin(steps=30, step_size=0.2 * LEVEL**2), {"grid": sf.grids.logsnr(PROCESS, 60)}),
    ],
    ids=["learned variance", "EDMHeun with churn", "EDMEuler with churn", "Restart", "AnnealedLangevin"],
)
def test_samplers_with_noise_of_their_own_end_in_the_law_of_the_data(solver, options):
    check(run(solver, 0.0, **options))


def test_the_check_sees_a_wrong_law():
    """The control: the score of data with another variance."""
    wrong = sf.problems.Gaussian([MEAN], [1.5 * VARIANCE]).model(PROCESS)
    with torch.no_grad():
        solution = sf.solve(PROCESS.reverse(wrong, 1.0), start(), EulerMaruyama(), steps=100, seed=2)
    with pytest.raises(AssertionError):
        check(solution)
