"""`sample` and predictor-corrector: the law, the start, the ways to end."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.problems import Gaussian
from sdeflow.solvers import DDIM, DDPM, RK45, DPMSolverPP, EulerMaruyama, Heun, Langevin, PredictorCorrector
from tests.exact import F64, rms
from tests.solve_cases import PLANAR, VP, Poisoned

# ---- predictor-corrector


class Unmoved(sf.solvers.Solver):
    """A predictor that stays where it is: the corrector alone is under test."""

    name = "Unmoved"

    def check(self, problem):
        pass

    def stepper(self, problem, x, grid, noise):
        class Run:
            calls = 0

            def step(self, i, x):
                return x

        return Run()


@pytest.mark.parametrize("dim", [1, 2, 32])
def test_langevin_keeps_the_law(dim):
    """N(0, 1) data stays N(0, 1) under 60 small corrections: mean square within 5 standard errors and 1% of bias.

    A step size that depends on the sample's own score (norms per sample) has the stationary law p |s|^2:
    mean square 1 + 2/dim. One that depends on the batch's makes a sample depend on its neighbours.
    """
    law = Gaussian(torch.zeros(dim), torch.ones(dim))
    solver = PredictorCorrector(Unmoved(), Langevin(snr=0.05, steps=60))
    x = torch.randn(64_000 // dim, dim, dtype=F64)
    with torch.no_grad():
        y = sf.solve(VP.reverse(law.model(VP)), x, solver, grid=[0.5, 0.4], seed=0).x
    assert abs(float(y.square().mean()) - 1) < 5 * math.sqrt(2 / x.numel()) + 0.01
    assert float((x * y).mean()) < 0.95  # it moves


@pytest.mark.parametrize("predictor", [EulerMaruyama(), DDPM(), DPMSolverPP(2)], ids=lambda s: s.name)
def test_predictor_corrector_samples_the_law(predictor):
    """Gaussian data in 16-D, 4000 samples: mean and variance within 5 standard errors and 4% of bias."""
    mean, variance = torch.linspace(-1, 1, 16, dtype=F64), torch.linspace(0.3, 2.0, 16, dtype=F64)
    model = Gaussian(mean, variance).model(VP)
    x = sf.sample(
        model, 4000, shape=(16,), solver=PredictorCorrector(predictor, Langevin(snr=0.1)), steps=100,
        eta=0.0 if predictor.name == "DDPM" else 1.0, seed=1, dtype=F64,
    ).x  # fmt: skip
    assert bool(((x.mean(0) - mean).abs() < 5 * (variance / 4000).sqrt() + 0.01).all())
    assert bool(((x.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / 4000) + 0.04).all())


# ---- sample


def test_sample_runs_the_reversal_from_the_prior():
    model = PLANAR.model(VP)
    got = sf.sample(model, 5, shape=(2,), solver=DPMSolverPP(2), steps=8, eta=0.5, seed=3)
    prior = VP.prior_sample((5, 2), 3)
    with torch.no_grad():
        want = sf.solve(VP.reverse(model, 0.5), prior, DPMSolverPP(2), steps=8, seed=3)
    assert got.x.dtype == torch.float32
    assert torch.equal(got.x, want.x)
    assert not got.x.requires_grad


def test_sample_takes_the_dtype_of_the_network():
    net = Poisoned(torch.nn.Identity()).to(F64)
    net.weight = torch.nn.Parameter(torch.zeros(1, dtype=F64))
    model = sf.Model(net, VP).bind(marked=torch.zeros(2, dtype=torch.bool))
    net.net.forward = lambda x, t: x
    assert sf.sample(model, 2, shape=(3,), solver=DDIM(), steps=2).x.dtype == F64
    assert sf.sample(model, 2, shape=(3,), solver=DDIM(), steps=2, dtype=torch.float32).x.dtype == torch.float32


def test_ways_to_end():
    model = PLANAR.model(VP)

    def run(**options):
        return sf.sample(model, 5, shape=(2,), solver=DPMSolverPP(2), steps=10, dtype=F64, **options)

    stay, denoised, zero = run(), run(final="denoise"), run(final="zero")
    torch.testing.assert_close(denoised.x, model.x0(stay.x, VP.t_min), rtol=1e-13, atol=1e-13)
    assert denoised.stats.nfe == stay.stats.nfe + 1 == 11
    assert zero.stats.nfe == 10
    grid = sf.grids.power(VP, 10, 1.0, 0.0)
    assert torch.equal(run(final="zero").x, run(grid=grid).x)
    assert bool(torch.isfinite(zero.x).all())
    cut = run(t_span=(1.0, 0.1), final="denoise")
    torch.testing.assert_close(cut.x, model.x0(run(t_span=(1.0, 0.1)).x, 0.1), rtol=1e-13, atol=1e-13)
    own = torch.linspace(1.0, 0.2, 11, dtype=F64)
    cut = run(grid=own, final="denoise")
    torch.testing.assert_close(cut.x, model.x0(run(grid=own).x, 0.2), rtol=1e-13, atol=1e-13)


def test_denoising_after_a_plan_is_at_the_plans_end():
    model = PLANAR.model(VP)
    plan = DPMSolverPP(2).plan(VP.probability_flow(model), torch.linspace(1.0, 0.2, 9, dtype=F64))
    stay = sf.sample(model, 5, shape=(2,), solver=plan, dtype=F64)
    denoised = sf.sample(model, 5, shape=(2,), solver=plan, dtype=F64, final="denoise")
    torch.testing.assert_close(denoised.x, model.x0(stay.x, 0.2), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("process", [sf.VP(), sf.EDM(), sf.RectifiedFlow()], ids=repr)
def test_the_last_step_to_zero_is_finite_and_is_the_prediction(process, eta, order):
    """At sigma = 0 the state is the last x_0, whatever the order."""
    start = process.t1 if not (eta and isinstance(process, sf.RectifiedFlow)) else 0.99
    model = PLANAR.model(process)
    grid = torch.tensor([start, 0.6 * start, 0.3 * start, 0.1 * start, 0.0], dtype=F64)
    x = process.prior_sample((5, 2), 0, dtype=F64)
    with torch.no_grad():
        solution = sf.solve(process.reverse(model, eta), x, DPMSolverPP(order), grid=grid, seed=0, save=True)
        want = model.x0(solution.xs[-2], grid[-2])
    torch.testing.assert_close(solution.x, want, rtol=1e-12, atol=1e-12)


def test_rectified_flow_starts_at_one():
    """From alpha = 0 the flow of Gaussian data ends at its quantile: every view agrees."""
    process, law = sf.RectifiedFlow(), Gaussian([1.0, -0.5], [0.2, 0.4])
    flow = process.probability_flow(law.model(process))
    x = torch.randn(6, 2, dtype=F64)
    t = process.t_min
    std = torch.sqrt((1 - t) ** 2 * torch.tensor([0.2, 0.4], dtype=F64) + t**2)
    want = (1 - t) * torch.tensor([1.0, -0.5], dtype=F64) + std * x
    with torch.no_grad():
        assert float((sf.solve(flow, x, RK45(), rtol=1e-9).x - want).abs().max()) < 1e-6
        for solver in (Heun(), DPMSolverPP(2), DPMSolverPP(3), DDIM()):
            coarse, fine = (rms(sf.solve(flow, x, solver, steps=n, grid=sf.grids.uniform).x - want) for n in (50, 200))
            assert fine < 0.02
            assert fine < 0.5 * coarse


def test_simulate_runs_forward_to_the_marginal():
    """Forward VP from a point by Euler-Maruyama: mean and variance within 5 standard errors and O(h)."""
    x = VP.simulate(torch.full((20_000, 1), 1.5, dtype=F64), steps=200, t_span=(0.0, 0.5), seed=0).x
    mean, std = float(1.5 * VP.alpha(0.5)), float(VP.sigma(0.5))
    assert abs(float(x.mean()) - mean) < 5 * std / math.sqrt(20_000) + 0.01
    assert abs(float(x.std()) / std - 1) < 5 / math.sqrt(40_000) + 0.01
