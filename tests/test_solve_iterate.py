"""`iterate`, gradients through a solve, and plans in the place of solvers."""

import itertools

import pytest
import torch

import sdeflow as sf
from sdeflow.solvers import DDIM, RK4, RK45, DPMSolverPP, Euler, EulerMaruyama
from tests.exact import F64
from tests.solve_cases import PLANAR, VP, Decay, Pointwise, Rates, flow_of

# ---- iterate


def test_iterate_is_lazy_and_can_be_left():
    model = PLANAR.model(VP)
    x = torch.randn(3, 2, dtype=F64)
    run = sf.iterate(VP.probability_flow(model), x, Euler(), steps=10)
    assert model.nfe == 0
    first = next(run)
    assert (first.t, first.step, first.steps) == (1.0, 0, 10)
    assert torch.equal(first.x, x)
    states = list(itertools.islice(run, 3))
    assert model.nfe == 3
    assert [s.step for s in states] == [1, 2, 3]
    full = sf.solve(VP.probability_flow(model), x, Euler(), steps=10, save=True)
    for state in states:
        assert state.t == float(full.ts[state.step])
        assert torch.equal(state.x, full.xs[state.step])


def test_iterate_to_a_tolerance_has_a_time_per_sample():
    k = torch.tensor([1.0, 50.0], dtype=F64)
    x = torch.ones(2, 1, dtype=F64)
    states = list(sf.iterate(Rates(k), x, RK45(), rtol=1e-6))
    times = torch.stack([s.t for s in states])
    assert torch.equal(times[0], torch.zeros(2, dtype=F64))
    assert torch.equal(times[-1], torch.ones(2, dtype=F64))
    assert bool((torch.diff(times, dim=0) >= 0).all())
    assert bool((times[len(times) // 2, 0] > times[len(times) // 2, 1]).all())
    assert torch.equal(states[-1].x, sf.solve(Rates(k), x, RK45(), rtol=1e-6).x)
    assert states[-1].steps is None


def test_iterate_checks_when_it_is_called():
    with pytest.raises(ValueError, match="steps >= 1"):
        sf.iterate(Decay(), torch.ones(1, 1), Euler(), steps=0)


def test_two_solves_at_once_do_not_share_memory():
    """A solver holds no state: interleaved runs of one solver and one plan are the runs alone."""
    flow = flow_of()
    solver = DPMSolverPP(3)
    plan = solver.plan(flow, sf.grids.logsnr(flow, 8))
    a, b = torch.randn(3, 2, dtype=F64), torch.randn(5, 2, dtype=F64)
    with torch.no_grad():
        want = [sf.solve(flow, x, plan).x for x in (a, b)]
        runs = [sf.iterate(flow, x, plan) for x in (a, b)]
        last = [None, None]
        for states in zip(*runs, strict=True):
            last = [s.x for s in states]
    assert all(torch.equal(x, y) for x, y in zip(last, want, strict=True))


def test_progress_shows_a_bar(capsys):
    sf.solve(Decay(), torch.ones(1, 1), Euler(), steps=7, progress=True)
    assert "7/7" in capsys.readouterr().err
    sf.solve(Decay(), torch.ones(1, 1), RK45(), rtol=1e-4, progress=True)
    assert "step" in capsys.readouterr().err


# ---- gradients


def finite_difference(function, x, h=1e-5):
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        e = torch.zeros_like(x).flatten()
        e[i] = h
        e = e.reshape(x.shape)
        out.view(-1)[i] = (function(x + e) - function(x - e)) / (2 * h)
    return out


@pytest.mark.parametrize(
    ("solver", "eta"),
    [(DPMSolverPP(3), 0.0), (DPMSolverPP(2), 1.0), (DDIM(), 0.0), (RK4(), 0.0), (EulerMaruyama(), 1.0)],
    ids=lambda v: getattr(v, "name", v),
)
def test_gradients_through_a_fixed_grid(solver, eta):
    reverse = VP.reverse(PLANAR.model(VP), eta)

    def loss(x):
        return sf.solve(reverse, x, solver, steps=6, seed=0, t_span=(0.9, 0.1)).x.square().sum()

    x = torch.randn(3, 2, dtype=F64, requires_grad=True)
    (got,) = torch.autograd.grad(loss(x), x)
    with torch.no_grad():
        want = finite_difference(loss, x.detach())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_gradients_reach_the_network():
    net = torch.nn.Linear(2, 2).to(F64)
    model = sf.Model(lambda x, t: net(x), VP, "eps")
    x = torch.randn(3, 2, dtype=F64)
    sf.solve(VP.probability_flow(model), x, DPMSolverPP(2), steps=5).x.sum().backward()
    assert float(net.weight.grad.abs().min()) > 0


@pytest.mark.parametrize("case", ["different lengths", "from zero", "flow", "saved"])
def test_gradients_through_error_control(case):
    """Samples that end at different times, or start with nothing to scale by, have gradients too."""
    save = [0.3, 0.8] if case == "saved" else None
    if case == "flow":
        problem, x = flow_of(), torch.randn(4, 2, dtype=F64)
    elif case == "from zero":
        problem, x = Pointwise(), torch.zeros(3, 2, dtype=F64)
    else:
        problem, x = Rates([1.0, 60.0, 3.0, 20.0]), torch.rand(4, 2, dtype=F64)

    def loss(x):
        solution = sf.solve(problem, x, RK45(), rtol=1e-8, save=save)
        return (solution.x if save is None else solution.xs).square().sum()

    x.requires_grad_()
    (got,) = torch.autograd.grad(loss(x), x)
    assert bool(torch.isfinite(got).all())
    with torch.no_grad():
        want = finite_difference(loss, x.detach(), h=1e-4)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# ---- plans in the place of solvers


def test_a_plan_prints_its_table():
    plan = DPMSolverPP(2).plan(flow_of(), sf.grids.logsnr(VP, 4))
    lines = str(plan).splitlines()
    assert lines[0] == "Plan(DPMSolverPP(2M), 4 steps, 4 model calls, x0)"
    assert len(lines) == 6
    assert lines[1].split()[:5] == ["row", "step", "t", "ratio", "noise"]
    row = lines[4].split()
    assert row[:2] == ["2", "2"]
    assert float(row[3]) == pytest.approx(float(plan.ratio[2]), rel=1e-5)
    assert float(row[-1]) == pytest.approx(float(plan.weights[2, 1]), rel=1e-4)


def test_a_plan_is_computed_before_the_first_call():
    model = PLANAR.model(VP)
    for solver in (DPMSolverPP(3, multistep=False), RK45(), EulerMaruyama(), DDIM(0.5)):
        plan = solver.plan(VP.probability_flow(model), sf.grids.logsnr(VP, 5))
        assert plan.ratio.dtype == plan.weights.dtype == plan.noise.dtype == plan.times.dtype == F64
    assert model.nfe == 0


@pytest.mark.parametrize("solver", [EulerMaruyama(), DPMSolverPP(2), DPMSolverPP(1)], ids=lambda s: s.name)
@pytest.mark.parametrize("other", ["process", "eta"])
def test_a_plan_refuses_a_problem_it_was_not_made_for(solver, other):
    """Its coefficients hold the process and its noise: another problem would be solved wrongly in silence."""
    plan = solver.plan(VP.reverse(PLANAR.model(VP), 1.0), sf.grids.logsnr(VP, 6))
    if other == "process":
        process = sf.VP(beta_max=5.0)
        problem = process.reverse(PLANAR.model(process), 1.0)
    else:
        problem = VP.reverse(PLANAR.model(VP), 0.5)
    with pytest.raises(ValueError, match="made for"):
        sf.solve(problem, torch.zeros(2, 2, dtype=F64), plan, seed=0)
    assert problem.model.nfe == 0


def test_a_plan_takes_equal_problems():
    """1 is 1.0: what compares equal is the same problem."""
    x = torch.zeros(2, 2, dtype=F64)
    for solver in (EulerMaruyama(), DPMSolverPP(2)):
        plan = solver.plan(VP.reverse(PLANAR.model(VP), 1), sf.grids.uniform(VP, 4))
        assert bool(sf.solve(VP.reverse(PLANAR.model(VP), 1.0), x, plan, seed=0).ok.all())
    whole = sf.VP(beta_min=1, beta_max=20)
    plan = DDIM().plan(whole.probability_flow(PLANAR.model(whole)), sf.grids.uniform(VP, 4))
    same = sf.VP(beta_min=1.0, beta_max=20.0)
    assert same == whole
    assert bool(sf.solve(same.probability_flow(PLANAR.model(same)), x, plan).ok.all())


def test_a_plan_tells_two_tables_with_equal_ends_apart():
    linear = sf.DiscreteVP(torch.linspace(0.00085, 0.012, 100, dtype=F64))
    scaled = sf.DiscreteVP(torch.linspace(0.00085**0.5, 0.012**0.5, 100, dtype=F64) ** 2)
    plan = DDIM().plan(linear.probability_flow(PLANAR.model(linear)), sf.grids.uniform(linear, 4))
    with pytest.raises(ValueError, match="made for"):
        sf.solve(scaled.probability_flow(PLANAR.model(scaled)), torch.zeros(2, 2, dtype=F64), plan)
