"""SDEs to a tolerance: the fixed path under a step size per sample, the tolerance's meaning, and who ends how.

Deterministic but for one test of a law, which is at 5 standard errors (failure rate 6e-7) on a fixed seed.
"""

import math

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.pid import PID
from sdeflow.solvers import SRA1, SRIW1, AdaptiveSDE, EulerMaruyama, Milstein, ShARK, StochasticHeun
from tests.exact import F64, rms, slope


class Well(sf.SDE):
    """Drift and noise do not commute, and g depends on t."""

    def drift(self, x, t):
        return x - x**3

    def diffusion(self, x, t):
        return torch.sqrt(0.1 + 3 * t) * torch.ones_like(x)


class Growth(sf.SDE):
    def drift(self, x, t):
        return 1.01 * x

    def diffusion(self, x, t):
        return 0.87 * x


class Free(sf.SDE):
    """The path itself, under a drift that makes every estimate large now and then."""

    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, x, t):
        return torch.ones_like(x)


class Relaxing(sf.SDE):
    per_sample = ("rate",)

    def __init__(self, rate):
        self.rate = rate

    def drift(self, x, t):
        return -self.rate * (x - torch.cos(t))

    def diffusion(self, x, t):
        return 0.2 * torch.ones_like(x)


def start(batch=200, value=0.3, dim=1):
    return torch.full((batch, dim), value, dtype=F64)


@pytest.mark.parametrize("solver", [SRA1(), ShARK(), SRIW1(), StochasticHeun(), AdaptiveSDE()], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_steps_are_the_grid(monkeypatch, solver, dtype):
    """With the controller held, a run to a tolerance is the run on 2^k equal steps of the same path."""
    monkeypatch.setattr(PID, "factor", lambda control, error, previous, order: torch.ones_like(error))
    monkeypatch.setattr(type(solver), "first_step", 1 / 64)
    x = start(12, dim=3).to(dtype)
    got = sf.solve(Well(), x, solver, atol=1e9, rtol=0.0, seed=4)
    want = sf.solve(Well(), x, solver, steps=64, noise=sf.SamePath(4))
    assert got.stats.accepted.tolist() == [64] * 12
    torch.testing.assert_close(got.x, want.x, rtol=0, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("problem", "solver", "reference"),
    [
        pytest.param(Well(), SRA1(), SRA1(), marks=pytest.mark.slow),
        pytest.param(Well(), ShARK(), SRA1(), marks=pytest.mark.slow),
        (Growth(), SRIW1(), SRIW1()),
    ],
    ids=["SRA1", "ShARK", "SRIW1"],
)
def test_the_error_is_proportional_to_the_tolerance(problem, solver, reference):
    """Over three decades, against a fine grid of the same path; the mean over 200 paths is the only statistic."""
    x = start()
    fine = sf.solve(problem, x, reference, steps=2048, noise=sf.SamePath(3)).x
    tolerances = (0.5, 5e-2, 5e-3, 5e-4)
    errors = [rms(sf.solve(problem, x, solver, atol=tol, rtol=0.0, seed=3).x - fine) for tol in tolerances]
    assert abs(slope(tolerances, errors) - 1) < 0.2
    assert all(error < tol for error, tol in zip(errors, tolerances, strict=True))


def test_a_first_order_method_is_proportional_too():
    x = start(100)
    fine = sf.solve(Well(), x, SRA1(), steps=2048, noise=sf.SamePath(3)).x
    tolerances = (1.0, 0.4, 0.16, 0.064)
    errors = [rms(sf.solve(Well(), x, StochasticHeun(), atol=tol, rtol=0.0, seed=3).x - fine) for tol in tolerances]
    assert abs(slope(tolerances, errors) - 1) < 0.3


def test_rejections_do_not_bias_the_law(monkeypatch):
    """W(1) of a pure-noise equation is that of the path, to rounding, though every rise above 0.1 is refused."""
    norm = PID.norm

    def picky(control, error, *states):
        rise = (states[0] - states[1])[:, 0]
        return torch.where(rise > 0.1, 2.0, norm(control, error, *states))

    monkeypatch.setattr(PID, "norm", picky)
    monkeypatch.setattr(StochasticHeun, "first_step", 1.0)
    x = torch.zeros(400, 1, dtype=F64)
    got = sf.solve(Free(), x, StochasticHeun(), atol=1.0, rtol=0.0, seed=9)
    assert float(got.stats.rejected.double().mean()) > 5
    want = sf.solve(Free(), x, EulerMaruyama(), steps=1, noise=sf.SamePath(9)).x
    torch.testing.assert_close(got.x, want, rtol=0, atol=1e-11)


def test_fresh_noise_on_retry_would_be_biased(monkeypatch):
    """The control: refusing large rises and drawing again pushes the mean down by many standard errors."""
    x = torch.zeros(4000, dtype=F64)
    rng = np.random.default_rng(0)
    for _ in range(64):
        w = rng.normal(size=4000) / 8
        again = w > 0.2
        w[again] = rng.normal(size=int(again.sum())) / 8
        x += torch.tensor(w)
    assert float(x.mean()) < -5 / math.sqrt(4000)


def test_one_stiff_sample_does_not_slow_the_others():
    rate = torch.ones(64, 1, dtype=F64)
    calm = sf.solve(Relaxing(rate), start(64), SRA1(), rtol=1e-3, atol=1e-3, seed=0)
    rate = rate.clone()
    rate[7] = 300.0
    mixed = sf.solve(Relaxing(rate), start(64), SRA1(), rtol=1e-3, atol=1e-3, seed=0)
    others = torch.arange(64) != 7
    assert torch.equal(mixed.stats.nfe[others], calm.stats.nfe[others])
    assert torch.equal(mixed.x[others], calm.x[others])
    assert mixed.stats.nfe[7] > 5 * calm.stats.nfe[7]


def test_a_sample_does_not_change_with_its_batch():
    x = start(40, dim=2)
    whole = sf.solve(Growth(), x, SRIW1(), rtol=1e-2, atol=1e-2, seed=1)
    part = sf.solve(Growth(), x[24:32], SRIW1(), rtol=1e-2, atol=1e-2, seed=1, index=24)
    assert torch.equal(whole.x[24:32], part.x)
    assert torch.equal(whole.stats.nfe[24:32], part.stats.nfe)


def test_failures_are_a_status_a_sample():
    rate = torch.ones(6, 1, dtype=F64)
    rate[2] = 1e6
    limited = sf.solve(Relaxing(rate), start(6), SRA1(), rtol=1e-2, atol=1e-2, seed=0, max_steps=500, throw=False)
    assert limited.status.tolist() == [0, 0, sf.Status.STEP_LIMIT, 0, 0, 0]
    rate[2] = math.nan
    broken = sf.solve(Relaxing(rate), start(6), SRA1(), rtol=1e-2, atol=1e-2, seed=0, throw=False)
    assert broken.status.tolist() == [0, 0, sf.Status.NON_FINITE, 0, 0, 0]
    calm = sf.solve(Relaxing(torch.ones(6, 1, dtype=F64)), start(6), SRA1(), rtol=1e-2, atol=1e-2, seed=0)
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(broken.x[keep], calm.x[keep])
    assert torch.equal(limited.x[keep], calm.x[keep])
    with pytest.raises(sf.SolveError, match="1 of 6 samples became infinite or NaN"):
        sf.solve(Relaxing(rate), start(6), SRA1(), rtol=1e-2, atol=1e-2, seed=0)


def test_what_cannot_be_solved_is_refused():
    with pytest.raises(ValueError, match="no error estimate"):
        sf.solve(Growth(), start(), Milstein(), rtol=1e-2, seed=0)
    with pytest.raises(ValueError, match="keeps only the end"):
        sf.solve(Growth(), start(), SRIW1(), rtol=1e-2, seed=0, save=[0.5])
    with pytest.raises(ValueError, match="SRA1 integrates additive noise; that of Growth is diagonal"):
        sf.solve(Growth(), start(), SRA1(), rtol=1e-2, seed=0)
    times = torch.linspace(0, 1, 3, dtype=F64)
    path = sf.RecordedPath(times, torch.zeros(3, 4, 1, dtype=F64), torch.zeros(2, 4, 1, dtype=F64))
    with pytest.raises(ValueError, match="any interval of its path"):
        sf.solve(Growth(), start(4), SRIW1(), rtol=1e-2, noise=path)


def test_the_adaptive_sampler_gives_the_exact_law():
    """Mean and variance of Gaussian data at the end of the reverse SDE, at 5 standard errors plus the step's bias."""
    process, law = sf.VP(), sf.problems.Gaussian([0.7], [0.3])
    n = 4000
    got = sf.sample(
        law.model(process), n, shape=(1,), solver=AdaptiveSDE(), eta=1.0, rtol=0.01, atol=0.0078, seed=0, dtype=F64
    )
    alpha, sigma = float(process.alpha(process.t_min)), float(process.sigma(process.t_min))
    mean, variance = alpha * 0.7, alpha**2 * 0.3 + sigma**2
    assert abs(float(got.x.mean()) - mean) < 5 * math.sqrt(variance / n)
    assert abs(float(got.x.var()) - variance) < 5 * variance * math.sqrt(2 / n)
    assert bool((got.stats.nfe == 2 * got.stats.steps).all())


def test_the_tolerance_of_the_adaptive_sampler_is_the_papers():
    """max(atol, rtol max(|x'|, |x'_prev|)), root mean square; h <- 0.9 h e^(-0.9)."""
    control = AdaptiveSDE().control(0.1, 0.0078, 100)
    error = torch.tensor([[0.01, 0.2], [0.004, 0.0]], dtype=F64)
    new, old = torch.tensor([[1.0, -3.0], [0.01, 0.02]], dtype=F64), torch.tensor([[2.0, 1.0], [0.0, 0.03]], dtype=F64)
    want = [
        math.sqrt(((0.01 / 0.2) ** 2 + (0.2 / 0.3) ** 2) / 2),
        math.sqrt(((0.004 / 0.0078) ** 2 + 0.0) / 2),
    ]
    torch.testing.assert_close(control.norm(error, new, old), torch.tensor(want, dtype=F64))
    e = torch.tensor([0.5, 2.0], dtype=F64)
    torch.testing.assert_close(control.factor(e, torch.ones(2, dtype=F64), 1.0), 0.9 * e**-0.9)
