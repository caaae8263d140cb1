"""What a solve makes of a path: the same on halved grids, for every solver, on the clock of a plan."""

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.noise import Noise
from sdeflow.solvers import (
    DDPM,
    SEEDS,
    SRA1,
    SRIW1,
    DPMSolverPP,
    EulerAncestral,
    EulerMaruyama,
    ExponentialMultistep,
    ReverseDiffusion,
)
from sdeflow.solvers.stochastic import AdaptiveStochasticSolver
from tests.brownian_cases import GAUSSIAN, MAPS, VE, VP, ZERO, Pure, recorded
from tests.exact import F64, rms, slope


class Integrated(sf.SDE):
    """dX_1 = dW, dX_2 = X_1 dt: the solution is W and the integral of W."""

    additive = True

    def drift(self, x, t):
        return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0]], dim=1)

    def diffusion(self, x, t):
        return torch.tensor([1.0, 0.0], dtype=x.dtype)


# ---- through solve


def mapped(name):
    return lambda problem, n, a, b: a + (b - a) * MAPS[name](torch.linspace(0, 1, n + 1, dtype=F64))


@pytest.mark.parametrize("solver", [EulerMaruyama(), SRA1(), SRIW1()], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["uniform", "quadratic", "cosine"])
def test_twenty_and_forty_steps_of_a_seed_solve_along_one_path(name, solver):
    def run(n):
        return sf.solve(Pure(), torch.zeros(3, 2, dtype=F64), solver, steps=n, grid=mapped(name), seed=1, save=True).xs

    for n in (20, 25):
        few, more, most = run(n), run(2 * n), run(4 * n)
        torch.testing.assert_close(few, more[::2], rtol=0, atol=1e-12)
        torch.testing.assert_close(few, most[::4], rtol=0, atol=1e-12)
    assert float(few.abs().max()) > 0.5


EXPONENTIAL = [
    (DDPM(), "x0", 0.0),
    (DPMSolverPP(2), "x0", 1.0),
    (DPMSolverPP(3), "x0", 0.6),
    (ExponentialMultistep(2, "eps"), "eps", 1.0),
    (SEEDS(1), "eps", 1.0),
    (SEEDS(2), "eps", 1.0),
    (EulerAncestral(1.0), "x0", 0.0),
]


@pytest.mark.parametrize("process", [VP, VE], ids=["VP", "VE"])
@pytest.mark.parametrize(("solver", "kind", "eta"), EXPONENTIAL, ids=lambda v: getattr(v, "name", None))
def test_exponential_samplers_of_a_seed_see_one_path_on_halved_grids(solver, kind, eta, process):
    """With a prediction of 0 the state is linear noise, exact on any grid: 20 and 40 steps agree to 1e-11 of it."""
    problem = process.reverse(ZERO[process][kind], eta)

    def run(n, seed=1, grid=None):
        return sf.solve(
            problem, torch.zeros(3, 2, dtype=F64), solver, steps=n, seed=seed, save=True, t_span=(0.9, 0.05), grid=grid
        ).xs

    for grid in (None, mapped("quadratic"), sf.grids.logsnr):
        for n in (5, 20):
            few, more = run(n, grid=grid), run(2 * n, grid=grid)
            scale = float(few.abs().max())
            assert scale > 1e-3
            torch.testing.assert_close(few / scale, more[::2] / scale, rtol=0, atol=1e-11)
    other = run(2 * n, seed=2, grid=grid)
    assert float((few - other[::2]).abs().max()) > 0.1 * scale


IRREGULAR = sorted({0.0, 1.0, 1 / 3, 0.7071, *np.random.default_rng(2).uniform(0, 1, 7).tolist()})
HOWS = ({"steps": 20}, {"steps": 30}, {"steps": 97}, {"grid": IRREGULAR})


@pytest.mark.parametrize(
    ("solver", "hows"),
    [(EulerMaruyama(), HOWS[::2]), (SRA1(), HOWS[1:2]), (SRIW1(), HOWS[3:])],
    ids=["EM", "SRA1", "SRIW1"],
)
def test_same_path_is_one_path_for_every_grid_and_solver(solver, hows):
    """20, 30, 97 and uneven steps: the solution of dX = dW is `BrownianPath` at every time."""
    x = torch.zeros(3, 2, dtype=F64)
    path = sf.BrownianPath(4, (3, 2))
    at = {t: path(0.0, t) for t in (0.5, 1 / 3, 0.7071, 1.0)}
    for how in hows:
        run = sf.solve(Pure(), x, solver, noise=sf.SamePath(4), save=True, **how)
        seen = 0
        for t, want in at.items():
            near = int((run.ts - t).abs().argmin())
            if abs(float(run.ts[near]) - t) < 1e-14:
                seen += 1
                torch.testing.assert_close(run.xs[near], want, rtol=0, atol=1e-12)
        assert seen == {"steps": 2, "grid": 3}[next(iter(how))] - (how == {"steps": 97}) + (how == {"steps": 30})
    other = sf.solve(Pure(), x, solver, noise=sf.SamePath(5), steps=20).x
    assert float((other - at[1.0]).abs().min()) > 1e-6


def test_solvers_on_one_path_converge_to_each_other():
    """Euler-Maruyama and samplers with the exact score on `SamePath`, against SRA1 on a finer grid: order 1.

    The control is the same against another seed.
    """
    problem = VP.reverse(GAUSSIAN.model(VP), 1.0)
    x, span, sizes = Noise(1, 200).normal(1, 0, (2,), F64), (0.9, 0.1), (16, 32, 64)

    def run(solver, n, seed=7):
        return sf.solve(problem, x, solver, grid=torch.linspace(*span, n + 1, dtype=F64), noise=sf.SamePath(seed)).x

    reference = run(SRA1(), 256)
    for solver in (EulerMaruyama(), DPMSolverPP(2), SEEDS(1)):
        errors = [rms(run(solver, n) - reference) for n in sizes]
        assert slope([1 / n for n in sizes], errors) > 0.85
        assert errors[-1] < 0.1 * rms(run(solver, 64, seed=8) - reference)


def test_iterate_takes_the_noise():
    x = torch.zeros(3, 2, dtype=F64)
    for noise in (sf.SamePath(4), sf.Antithetic(4), recorded(torch.linspace(0, 1, 9, dtype=F64), 3, (2,))):
        states = list(sf.iterate(Pure(), x, SRA1(), steps=8, noise=noise))
        assert torch.equal(states[-1].x, sf.solve(Pure(), x, SRA1(), steps=8, noise=noise).x)


@pytest.mark.parametrize("span", [(0.0, 1.0), (1000.0, 1001.0)])
def test_areas_of_one_path_through_solve(span):
    """SRA1 integrates X' = W exactly with W and I_(1,0) of each step: every grid ends in the path's own integral."""

    class There(Integrated):
        t0, t1 = span

    x = torch.zeros(5, 2, dtype=F64)
    path = sf.BrownianPath(4, (5, 2), span)
    w, integral = path(*span)[:, 0], path.integral(*span)[:, 0]  # the whole of the span: no split
    inner = [span[0] + t for t in IRREGULAR]
    for how in ({"steps": 20}, {"steps": 30}) if span[0] == 0 else ({"grid": inner},):
        got = sf.solve(There(), x, SRA1(), noise=sf.SamePath(4), **how).x
        torch.testing.assert_close(got[:, 0], w, rtol=0, atol=1e-12)
        torch.testing.assert_close(got[:, 1], integral, rtol=0, atol=1e-11)
    coarse, fine = (sf.solve(There(), x, SRA1(), seed=4, steps=n).x for n in (20, 40))
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-10)
    assert float((coarse[:, 1] - coarse[:, 0] / 2).abs().max()) > 0.01  # H is not 0


class Recorder(AdaptiveStochasticSolver):
    """Keeps the intervals that the march to a tolerance gives it; steps dX = dW exactly and rejects by a rule."""

    name = "Recorder"
    areas = True

    def __init__(self):
        object.__setattr__(self, "seen", [])

    def step(self, terms, x, t, h, w, area):
        return x + w

    def estimate(self, terms, x, t, h, w, area):
        self.seen.append((t.flatten().clone(), h.flatten().clone(), w.clone(), area.clone()))
        return x + w, 0.01 * (1 + 20 * (w.abs() > 1.5 * h.abs() ** 0.5)) * h.abs() ** 1.5


def test_the_march_to_a_tolerance_is_on_the_path():
    """Every interval that is tried, accepted or not, is the path's; what is accepted adds up to it."""
    solver, seed = Recorder(), 3
    run = sf.solve(Pure(), torch.zeros(1, 2, dtype=F64), solver, rtol=1e-2, atol=1e-2, seed=seed)
    path = sf.BrownianPath(seed, (1, 2))
    assert int(run.stats.rejected.sum()) > 3
    assert int(run.stats.accepted.sum()) > 10
    torch.testing.assert_close(run.x, path(0.0, 1.0), rtol=0, atol=1e-12)
    assert len({float(h) for _, h, _, _ in solver.seen}) > 2
    for t, h, w, area in solver.seen[:: max(1, len(solver.seen) // 20)]:
        want = path.with_area(float(t), float(t) + float(h))
        torch.testing.assert_close(w, want.w, rtol=0, atol=1e-13)
        torch.testing.assert_close(area, want.h, rtol=0, atol=1e-13)


# ---- the clock of a plan


@pytest.mark.parametrize("process", [VP, sf.EDM()], ids=["VP", "EDM"])
@pytest.mark.parametrize(
    ("solver", "eta"),
    [
        (DDPM(), 0.0),
        (DPMSolverPP(2), 1.0),
        (SEEDS(1), 1.0),
        (SEEDS(2), 1.0),
        (SEEDS(3), 1.0),
        (ReverseDiffusion(), 1.0),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_solutions_of_a_seed_converge_to_each_other(solver, eta, process):
    """n and 2n steps of one seed, additive noise: strong order 1. The control is another seed: no convergence."""
    problem = process.reverse(GAUSSIAN.model(process), eta)
    x = process.sigma(torch.tensor(process.t1, dtype=F64)) * Noise(1, 500).normal(1, 0, (2,), F64)
    span, sizes = (process.t1 * 0.9, process.t1 * 0.05), (32, 64, 128, 256)

    def run(n, seed=7):
        return sf.solve(problem, x, solver, steps=n, seed=seed, t_span=span).x

    ends = {n: run(n) for n in sizes}
    between = [rms(ends[n] - ends[2 * n]) for n in sizes[:-1]]
    assert 0.85 < slope([1 / n for n in sizes[:-1]], between) < 1.4
    others = [rms(ends[n] - run(n, seed=8)) for n in (32, 128)]
    assert abs(slope([1 / 32, 1 / 128], others)) < 0.2
    assert min(others) > 10 * between[-1]


def test_thirds_of_steps_refine_where_they_meet():
    """SEEDS(3) draws at thirds of its steps in lam: one path on grids even in lam; else at the end and in the limit."""
    problem = VP.reverse(ZERO[VP]["eps"], 1.0)

    def runs(n, grid):
        x = torch.zeros(300, 2, dtype=F64)
        how = {"seed": 1, "save": True, "t_span": (0.9, 0.05), "grid": grid}
        few, more = (sf.solve(problem, x, SEEDS(3), steps=m, **how).xs for m in (n, 2 * n))
        return few / few.abs().max(), more[::2] / few.abs().max()

    torch.testing.assert_close(*runs(20, sf.grids.logsnr), rtol=0, atol=1e-11)
    gaps = []
    for n in (5, 20, 80):
        few, more = runs(n, None)
        torch.testing.assert_close(few[-1], more[-1], rtol=0, atol=1e-11)
        gaps.append(float((few - more).abs().max()))
    assert slope([1 / 5, 1 / 20, 1 / 80], gaps) > 1.0
    assert gaps[0] < 5e-3


@pytest.mark.parametrize(
    ("process", "solver", "eta", "grid", "dtype"),
    [
        (VP, DPMSolverPP(1), 1.0, 100, torch.float32),
        (sf.EDM(), DPMSolverPP(1), 2.0, 100, torch.float32),
        (sf.RectifiedFlow(), DPMSolverPP(1), 1.0, 20, torch.float32),
        (sf.EDM(), DPMSolverPP(1), 3.0, 100, torch.float32),
        (VP, DPMSolverPP(1), 10.0, 100, F64),
        (sf.VE(1e-4, 1e5), ReverseDiffusion(), 1.0, 100, F64),
        (VP, EulerAncestral(1.0), 0.0, [0.9, 0.88, 0.86, 0.84, 0.3, 0.28, 0.26], F64),
        (VP, EulerAncestral(1.5), 0.0, [0.9, 0.88, 0.86, 0.84, 0.3, 0.28, 0.26], F64),
    ],
)  # fmt: skip
def test_no_step_loses_its_noise(process, solver, eta, grid, dtype):
    """With a prediction of 0, the variances that a plan's ratios and noise make, on 2000 numbers: 5 sqrt(2/n) = 16%.

    Wherever the clock puts the steps, also where one forgets the state (ratio 0).
    """
    kind = "eps" if isinstance(solver, ReverseDiffusion) else "x0"
    problem = process.reverse(sf.Model(lambda x, t: torch.zeros_like(x), process, kind), eta)
    how = {"steps": grid} if isinstance(grid, int) else {"grid": grid}
    run = sf.solve(problem, torch.zeros(1000, 2, dtype=dtype), solver, seed=0, save=True, **how)
    plan = solver.plan(problem, run.ts)
    variance, steps = 0.0, []
    for k, (ratio, noise) in enumerate(zip(plan.ratio.tolist(), plan.noise.tolist(), strict=True)):
        variance = ratio**2 * variance + noise**2
        if noise > 0 and variance > 0:
            steps.append(float((run.xs[k + 1] - ratio * run.xs[k]).to(F64).square().mean()) / noise**2)
            assert float(run.xs[k + 1].to(F64).square().mean()) == pytest.approx(variance, rel=0.16)
    assert len(steps) > 4
    assert min(steps) > 0.84
    assert max(steps) < 1.16


def test_the_clock_is_needed(monkeypatch):
    """The control: with a clock of equal steps, states of 20 and 40 steps do not lie on one path."""
    problem = VP.reverse(ZERO[VP]["x0"], 1.0)

    def ends():
        a, b = (
            sf.solve(problem, torch.zeros(3, 2, dtype=F64), DDPM(), steps=n, seed=1, save=True, t_span=(0.9, 0.05)).xs
            for n in (20, 40)
        )
        return float((a - b[::2]).abs().max() / a.abs().max())

    assert ends() < 1e-11
    real = Noise.walk

    def equal(noise, times, event, dtype, *, areas=False, lengths=None):
        return real(noise, times, event, dtype, areas=areas, lengths=torch.ones_like(lengths))

    monkeypatch.setattr(Noise, "walk", equal)
    assert ends() > 1e-3
