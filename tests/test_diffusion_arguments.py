"""Stochastic samplers of diffusion models in float32, at singular ends, what they refuse, and their catalogue rows."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.solvers import (
    CATALOGUE,
    DDIM,
    DDPM,
    ERSDE,
    SEEDS,
    AncestralPredictor,
    AnnealedLangevin,
    EulerAncestral,
    EulerMaruyama,
    PredictorCorrector,
    ReverseDiffusion,
    SASolver,
    Window,
    by_name,
)
from sdeflow.solvers.catalogue import SAMPLERS
from tests.diffusion_cases import (
    GRID,
    MEAN,
    MODEL,
    OWN_ETA,
    PATHS,
    READS_ETA,
    VARIANCE,
    VP,
    X,
    agree,
    blend,
    label,
    rising,
    run,
)
from tests.exact import F64

# ---- float32, singular ends, refusals


@pytest.mark.parametrize(
    ("solver", "eta"),
    [(SASolver(), 0.0), (SASolver(3, 4, 1.0), 0.0), (SASolver(4, 5, 1.0), 0.0), (ERSDE(3), 0.0), (SEEDS(3), 1.0),
     (DDPM("forward"), 0.0), (EulerAncestral(), 0.0), (ReverseDiffusion(), 1.0)],
    ids=label,
)  # fmt: skip
def test_float32_at_800_steps(solver, eta):
    """Weights of absolute lam lose two digits at order 3 and all at order 4 here; by quadrature none."""
    grid = sf.grids.logsnr(VP, 800, 0.9, 0.01)
    exact, single = (run(solver, eta, grid=grid, x=x) for x in (X, X.float()))
    assert single.dtype == torch.float32
    assert float((single.to(F64) - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_seeds_to_sigma_zero_returns_the_prediction_of_the_data(order):
    problem = VP.reverse(MODEL, 1.0)
    plan = SEEDS(order).plan(problem, torch.tensor([0.6, 0.2, 0.0], dtype=F64))
    assert plan.nfe == order + 1
    assert float(plan.noise[-1].abs().max()) == 0.0
    y = run(SEEDS(order), 1.0, grid=[0.2, 0.0])
    agree(y, MODEL.x0(X, 0.2))


@pytest.mark.parametrize("solver", [SASolver(), ERSDE(3), EulerAncestral(), SASolver(3, 4, 1.0)], ids=label)
def test_infinite_levels_at_both_ends(solver):
    """From alpha = 0 to sigma = 0: the rectified flow's whole span."""
    process = sf.RectifiedFlow()
    model = sf.problems.Gaussian(MEAN, VARIANCE).model(process)
    flow = process.probability_flow(model)
    with torch.no_grad():
        x = torch.randn(4000, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
        y = sf.solve(flow, x, solver, grid=torch.linspace(1, 0, 101, dtype=F64), seed=0).x
    # four standard errors of 4000 samples, and what order 1 leaves of the narrowest variance
    assert float((y.mean(0) - MEAN).abs().max()) < 0.08 + 0.02
    assert float((y.var(0) / VARIANCE - 1).abs().max()) < 0.09 + 0.15


REFUSED = [
    (lambda: run(EulerAncestral(), 0.5), "EulerAncestral takes its stochasticity as"),
    (lambda: run(SASolver(), 1.0), "brings its own eta = Window"),
    (lambda: run(SASolver(tau=0.5), 1.0), r"brings its own eta = 0.5: .* or of that eta, got eta = 1.0"),
    (lambda: run(SASolver(tau=rising), lambda t: 0 * t), "brings its own eta = <function"),
    (lambda: run(ERSDE(), 1.0), "brings its own eta = NoiseScale"),
    (lambda: run(DDPM("forward"), 0.5), "brings its own eta = 1"),
    (lambda: run(DDPM(blend), 0.5), "brings its own eta = 1"),
    (lambda: run(AncestralPredictor(), 0.5), "brings its own eta = 1"),
    (lambda: run(ERSDE(2, lambda x: x**0.5)), "not decreasing"),
    (lambda: run(ERSDE(2, lambda x: -x)), "not decreasing"),
    (lambda: SEEDS(4), "order 1, 2 or 3"),
    (lambda: SEEDS(True), "order as a whole number, got True"),
    (lambda: ERSDE(4), "order 1, 2 or 3"),
    (lambda: SASolver(5), "order one of"),
    (lambda: SASolver(3, 1), "2 to 5 evaluations, or 0"),
    (lambda: SASolver(3, 6), "2 to 5 evaluations, or 0"),
    (lambda: SASolver(tau=-1.0), "tau >= 0"),
    (lambda: EulerAncestral(-0.1), "finite eta >= 0"),
    (lambda: EulerAncestral(math.inf), "finite eta >= 0"),
    (lambda: Window(0.8, 0.2), "low < high"),
    (lambda: Window(value=-1.0), "value >= 0"),
    (lambda: AnnealedLangevin(steps=0), "steps >= 1"),
    (lambda: AnnealedLangevin(step_size=0.0), "step_size > 0"),
    (lambda: run(AnnealedLangevin(step_size=0.5)), "the steps would grow"),
    (lambda: run(AnnealedLangevin(), grid=[0.5, 0.0]), "not finite at sigma = 0"),
    (lambda: run(AnnealedLangevin(step_size=0.01), 1.0), r"brings its own noise: solve the probability flow"),
    *(
        (lambda s=s: run(s, grid=[0.1, 0.3]), f"{s.name.split('(')[0]}.* runs from noise to data: .* 0.1 to 0.3")
        for s in (SASolver(), ERSDE(), EulerAncestral(), DDIM(0.5), DDPM(), DDPM("forward"), DDPM(blend))
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_langevin_predictor_would_repeat_the_correctors_numbers():
    for predictor in (AnnealedLangevin(), PredictorCorrector(EulerMaruyama())):
        with pytest.raises(TypeError, match="takes the corrector's own numbers"):
            PredictorCorrector(predictor)


@pytest.mark.parametrize(
    "solver",
    [SEEDS(2), ReverseDiffusion(), AncestralPredictor(), EulerAncestral(), SASolver(), ERSDE(), DDPM(blend),
     AnnealedLangevin(), DDPM("forward")],
    ids=label,
)  # fmt: skip
def test_they_need_a_gaussian_process(solver):
    class Line(sf.ODE):
        def drift(self, x, t):
            return x

    with pytest.raises(ValueError, match="transition view"):
        sf.solve(Line(), X, solver, steps=2)


@pytest.mark.parametrize(
    ("solver", "eta"), [(SEEDS(3), 1.0), (SASolver(), 0.0), (ERSDE(), 0.0), (EulerAncestral(), 0.0)], ids=label
)
def test_plans_of_them_are_saved_and_loaded(tmp_path, solver, eta):
    problem = VP.reverse(MODEL, eta)
    plan = solver.plan(problem, GRID)
    plan.save(tmp_path / "plan.json")
    with torch.no_grad():
        ends = [sf.solve(problem, X, p, seed=7).x for p in (plan, sf.Plan.load(tmp_path / "plan.json"))]
    assert torch.equal(*ends)
    assert torch.equal(ends[0], run(solver, eta))


# ---- the rows of the catalogue

WEAK = {solver.name: weak for solver, weak in [*READS_ETA, *OWN_ETA]}


@pytest.mark.parametrize("row", SAMPLERS, ids=lambda row: row.name)
def test_the_rows_of_samplers(row):
    """The weak orders declared are those measured above; calls are counted by the network."""
    solver = row.make()
    assert (solver.name, solver.view, solver.pair) == (row.name, row.view, None)
    assert row.weak_order == WEAK.get(row.name)
    assert row.strong_order == (1 if row.name in WEAK else None)
    assert any(solver == path for path, _ in PATHS) == (row.strong_order is not None)
    model = sf.problems.Gaussian([0.5, 0.1], [0.2, 0.4]).model(VP)
    with torch.no_grad():
        end = sf.solve(VP.probability_flow(model), torch.randn(3, 2), solver, steps=6, seed=0)
    assert model.nfe == end.stats.nfe == 6 * row.nfe_per_step
    assert solver.draws_noise(VP.probability_flow(model)) == (row.noise == ("own",))
    assert by_name(row.name) is row
    if row.order is not None and not isinstance(solver, EulerAncestral):
        assert solver.order + bool(getattr(solver, "corrector", 0)) == row.order


def test_names_of_all_rows_are_unique():
    names = [row.name for row in CATALOGUE]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match=r"expected one of Euler, .*SEEDS\(2\)"):
        by_name("SEED")


def test_repetitions_of_a_restart_draw_noise_of_their_own():
    """Churned steps down, 8 times: with one noise for all the variance was 1.24. 5 standard errors, fixed seed."""
    process = sf.EDM()
    model = sf.problems.Gaussian([0.0], 1.0).model(process)
    once = sf.solvers.EDMHeun(s_churn=40)
    often = sf.solvers.Restart((sf.solvers.RestartInterval(0.3, 2.0, 8, 8),), once)
    n = 4000
    variances = [
        float(sf.sample(model, n, shape=(1,), solver=s, steps=40, seed=0, dtype=torch.float64).x.var())
        for s in (once, often)
    ]
    assert abs(variances[1] - variances[0]) < 5 * math.sqrt(2 * 2 / n)
