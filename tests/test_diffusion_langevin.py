"""Annealed Langevin dynamics, and Langevin correctors over the batch: laws, limits, the papers' formulas."""

import pytest
import torch

import sdeflow as sf
from sdeflow.noise import CORRECTOR
from sdeflow.solvers import (
    DDPM,
    AncestralPredictor,
    AnnealedLangevin,
    EulerMaruyama,
    Langevin,
    PredictorCorrector,
    ReverseDiffusion,
)
from tests.diffusion_cases import (
    DATA,
    MIXTURE,
    MODEL,
    VP,
    X,
    agree,
    distance,
    label,
    law_after,
    law_errors,
    marginal,
    run,
)
from tests.exact import F64, slope

# ---- annealed Langevin: no path, no order in the grid


def test_annealed_langevin_mixes_to_the_last_level_with_first_order_in_its_step_size(monkeypatch):
    """e/(4w) of the variance w, once `steps` have mixed."""
    process, grid = sf.VE(sigma_max=10.0), torch.tensor([0.6, 0.55, 0.5], dtype=F64)
    start, end = marginal(process, 0.6), marginal(process, 0.5)
    sizes, errors = (0.08, 0.04, 0.02, 0.01), []
    for size in sizes:
        solver = AnnealedLangevin(steps=int(20 / size), step_size=size)
        mean, variance = law_after(monkeypatch, solver, process.reverse(DATA.model(process), 0.0), grid, start)
        assert float((mean - end[0]).abs().max()) < 1e-3
        errors.append(float((variance / end[1] - 1)[2]))
        assert errors[-1] == pytest.approx(size / (4 * float(end[1][2])), rel=0.2)
    assert slope(sizes, errors) == pytest.approx(1, abs=0.2)
    few = AnnealedLangevin(steps=4, step_size=0.01)  # the control: unmixed
    assert distance(law_after(monkeypatch, few, process.reverse(DATA.model(process), 0.0), grid, start), end) > 0.2


def test_annealed_langevin_is_one_chain_in_x_over_alpha():
    """On the same levels every process gives the same samples."""
    lam, out = torch.tensor([-2.0, -1.0, 0.0, 1.0], dtype=F64), []
    for process in (VP, sf.VE(sigma_max=10.0), sf.RectifiedFlow()):
        grid = process.time_of_lam(lam)
        alpha = process.alpha(grid)
        model = MIXTURE.model(process)
        got = run(AnnealedLangevin(steps=4, step_size=0.1), 0.0, model, grid, 7 * float(alpha[0]) * X)
        out.append(got / alpha[-1])
    for y in out[1:]:
        torch.testing.assert_close(y, out[0], rtol=1e-9, atol=1e-9)


# ---- Langevin over the batch


def test_langevin_over_the_batch():
    """Song et al. 2021, algorithms 4 and 5, as published: the ratio of the norms' means."""
    solver = PredictorCorrector(ReverseDiffusion(), Langevin(snr=0.2, size="batch"))
    alone = run(ReverseDiffusion(), 1.0, grid=[0.6, 0.5])
    z = sf.Noise(7, 6).normal(CORRECTOR, 0, (8,), F64)
    score = MODEL.score(alone, 0.5)
    size = 2 * (0.2 * z.norm(dim=1).mean() / score.norm(dim=1).mean()) ** 2
    agree(run(solver, 1.0, grid=[0.6, 0.5]), alone + size * score + torch.sqrt(2 * size) * z)


def test_langevin_over_the_batch_couples_the_samples_and_the_others_do_not():
    def first(size, rows):
        solver = PredictorCorrector(EulerMaruyama(), Langevin(size=size))
        return sf.sample(MODEL, rows, shape=(8,), solver=solver, steps=4, eta=1.0, seed=0, dtype=F64).x[:4]

    assert float((first("batch", 4) - first("batch", 16)).abs().max()) > 1e-3
    for size in ("level", "sample"):
        torch.testing.assert_close(first(size, 4), first(size, 16), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="size as one of 'level', 'sample', 'batch', got 'mean'"):
        Langevin(size="mean")


def test_langevin_over_the_batch_is_near_the_level_in_few_dimensions_too():
    """At the level of noise |z| = sigma |s| up to 1/sqrt(dim), and up to 1/sqrt(dim batch) on average over a batch."""
    for dim in (10, 200):
        model = sf.problems.Gaussian(torch.zeros(dim), torch.full((dim,), 1e-6)).model(VP)
        x = VP.prior_sample((64, dim), seed=0, dtype=F64)
        level, batch, sample = (  # DDPM's steps are exact for data at a point
            run(PredictorCorrector(DDPM(), Langevin(size=size)), 1.0, model, [1.0, 0.9], x)
            for size in ("level", "batch", "sample")
        )
        assert float((batch - level).norm()) < 0.5 * float((sample - level).norm()) < 0.1 * float(level.norm())


@pytest.mark.parametrize("predictor", [ReverseDiffusion(), AncestralPredictor()], ids=label)
def test_predictors_with_a_corrector(monkeypatch, predictor):
    """Both serve in predictor-corrector sampling, and a corrector at the level mends a coarse predictor's law."""
    eta = 1.0 if isinstance(predictor, ReverseDiffusion) else 0.0
    alone = law_errors(monkeypatch, predictor, eta, (10,))[0]
    mended = law_errors(monkeypatch, PredictorCorrector(predictor, Langevin(snr=0.2, steps=4)), eta, (10,))[0]
    assert mended < 0.65 * alone
