"""torchdiffeq and scipy behind `solve`: the same results as called directly, with our checks, counts and statuses."""

import math
import sys

import numpy as np
import pytest
import torch
import torchdiffeq
from scipy.integrate import solve_ivp

import sdeflow as sf
from sdeflow.solvers.backends import Scipy, Torchdiffeq
from tests.exact import F64, slope

ADAPTIVE = [Torchdiffeq(m) for m in ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")]
EXPLICIT = [Scipy(m) for m in ("RK23", "RK45", "DOP853")]
IMPLICIT = [Scipy(m) for m in ("Radau", "BDF", "LSODA")]
TO_TOLERANCE = [*ADAPTIVE, *EXPLICIT, *IMPLICIT]
ON_A_GRID = [("euler", 1, 1), ("midpoint", 2, 2), ("heun2", 2, 2), ("heun3", 3, 3), ("rk4", 4, 4)]


def name(solver):
    return solver.name


class Turning(sf.ODE):
    """y' = y cos t, so y = y0 exp(sin t - sin t0)."""

    t1 = 2.0

    def drift(self, x, t):
        return x * torch.cos(t)


class Recording(sf.ODE):
    """Another problem, recording how it is called."""

    def __init__(self, inner):
        self.inner, self.t0, self.t1 = inner, inner.t0, inner.t1
        self.times, self.dtypes = [], set()

    def drift(self, x, t):
        self.times.append(float(t))
        self.dtypes.add((x.dtype, t.dtype, t.ndim))
        return self.inner.drift(x, t)


class OnlyInside(sf.ODE):
    """A drift that exists on [0, 1] alone."""

    def drift(self, x, t):
        if not 0 <= float(t) <= 1:
            raise AssertionError(f"called at {float(t)}")
        return -x * torch.sqrt(t) + torch.sqrt(1 - t)


def flow():
    process = sf.VP()
    return process.probability_flow(sf.problems.EightGaussians().model(process))


def start(batch=6, dim=2, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=(batch, dim)), dtype=F64)


# ---- results


@pytest.mark.parametrize("solver", TO_TOLERANCE, ids=name)
def test_a_mixtures_flow_agrees_with_our_pair(solver):
    x, saved = start(), [1.0, 0.5, 0.1, 1e-3]
    want = sf.solve(flow(), x, sf.solvers.DOP853(), rtol=1e-10, atol=1e-10, save=saved)
    got = sf.solve(flow(), x, solver, rtol=1e-5, atol=1e-5, save=saved)
    assert bool(got.ok.all())
    assert got.ts.tolist() == saved
    torch.testing.assert_close(got.x, want.x, rtol=0, atol=2e-3)
    torch.testing.assert_close(got.xs, want.xs, rtol=0, atol=5e-3)
    assert torch.equal(got.xs[0], x)
    torch.testing.assert_close(got.xs[-1], got.x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("span", [(0.0, 2.0), (1.7, 0.2)], ids=["up", "down"])
@pytest.mark.parametrize("solver", TO_TOLERANCE, ids=name)
def test_a_nonautonomous_equation_both_ways(solver, span):
    x, saved = start(), [1.1, 0.3, 1.1]
    got = sf.solve(Turning(), x, solver, rtol=1e-5, atol=1e-5, t_span=span, save=saved)
    torch.testing.assert_close(got.x, x * np.exp(np.sin(span[1]) - np.sin(span[0])), rtol=2e-3, atol=1e-4)
    for state, t in zip(got.xs, saved, strict=True):
        torch.testing.assert_close(state, x * np.exp(np.sin(t) - np.sin(span[0])), rtol=3e-3, atol=3e-4)


@pytest.mark.parametrize("solver", [*EXPLICIT, *IMPLICIT], ids=name)
def test_scipy_takes_the_steps_of_solve_ivp(solver):
    x = start()
    run = solve_ivp(
        lambda t, y: y * np.cos(t), (0.0, 2.0), x.reshape(-1).numpy(), solver.method, t_eval=[0.7, 2.0], rtol=1e-5,
        atol=1e-5,
    )  # fmt: skip
    got = sf.solve(Turning(), x, solver, rtol=1e-5, atol=1e-5, save=[0.7, 2.0])
    np.testing.assert_allclose(got.xs.reshape(2, -1).numpy(), run.y.T, rtol=1e-12)
    assert got.stats.nfe == got.stats.calls >= run.nfev


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_torchdiffeq_takes_its_own_steps(method):
    x, ts = start(), torch.tensor([1.0, 0.4, 0.001], dtype=F64)
    problem = flow()
    options = {"step_t": ts[-1:], "first_step": 0.01}
    want = torchdiffeq.odeint(
        lambda t, y: problem.drift(y, t), x, ts, rtol=1e-5, atol=1e-5, method=method, options=options
    )
    got = sf.solve(problem, x, Torchdiffeq(method, first_step=0.01), rtol=1e-5, atol=1e-5, save=ts)
    torch.testing.assert_close(got.xs, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("method", "order", "calls"), ON_A_GRID)
def test_fixed_methods_step_on_the_grid(method, order, calls):
    x, errors, levels = start(), [], np.array([32, 64, 128, 256])
    for steps in levels.tolist():
        got = sf.solve(Turning(), x, Torchdiffeq(method), steps=steps, save=[0.0, 1.0])
        assert got.stats.nfe == calls * steps
        errors.append(float((got.x - x * np.exp(np.sin(2.0))).abs().max()))
    assert abs(slope(1 / levels, errors) - order) < 0.2
    torch.testing.assert_close(got.xs[1], x * np.exp(np.sin(1.0)), rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("method", "ours"),
    [
        ("euler", sf.solvers.Euler),
        ("midpoint", sf.solvers.Midpoint),
        ("heun2", sf.solvers.Heun),
        ("rk4", sf.solvers.RK38),
    ],
)
def test_fixed_methods_are_ours_on_an_uneven_grid_down(method, ours):
    problem, x = flow(), start()
    grid = sf.grids.power(problem, 12)
    got, want = (sf.solve(problem, x, s, grid=grid).x for s in (Torchdiffeq(method), ours()))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# ---- how the drift is called


def test_torchdiffeq_alone_leaves_the_span():
    """The faults that ours has not: a first probe far before t0, steps past the end and back by interpolation."""
    problem = Recording(flow())
    ts = torch.tensor([1.0, 0.01], dtype=F64)
    torchdiffeq.odeint(lambda t, y: problem.drift(y, t), start(), ts, rtol=1e-5, atol=1e-5)
    assert problem.times[1] < -20
    problem = Recording(Turning())
    ts = torch.tensor([0.0, 2.0], dtype=F64)
    torchdiffeq.odeint(lambda t, y: problem.drift(y, t), start(), ts, rtol=1e-5, atol=1e-5)
    assert problem.times[-1] > 2.01


@pytest.mark.parametrize("span", [(0.0, 1.0), (1.0, 0.0)], ids=["up", "down"])
@pytest.mark.parametrize("solver", TO_TOLERANCE, ids=name)
def test_no_call_leaves_the_span(solver, span):
    problem = Recording(OnlyInside())
    got = sf.solve(problem, start(), solver, rtol=1e-4, atol=1e-4, t_span=span)
    assert bool(got.ok.all())
    assert 0 <= min(problem.times) < 1e-15
    assert 1 - 1e-15 < max(problem.times) <= 1


@pytest.mark.parametrize("solver", TO_TOLERANCE, ids=name)
def test_a_first_probe_longer_than_the_span_is_clamped(solver):
    problem = Recording(OnlyInside())
    got = sf.solve(problem, 1e3 + start(), solver, rtol=1e-3, atol=1e3, t_span=(1.0, 0.9999))
    assert bool(got.ok.all())
    assert min(problem.times) >= 0.9999


@pytest.mark.parametrize("solver", [*TO_TOLERANCE, Torchdiffeq("rk4")], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_keep_their_dtype_and_times_are_float64(solver, dtype):
    problem, x = Recording(Turning()), start().to(dtype)
    how = {"steps": 10} if solver.name.endswith("rk4") else {"rtol": 1e-3, "atol": 1e-3}
    got = sf.solve(problem, x, solver, **how, save=[0.0, 2.0])
    assert got.x.dtype == got.xs.dtype == dtype
    assert got.ts.dtype == F64
    assert problem.dtypes == {(dtype, F64, 0)}
    assert got.stats.nfe == len(problem.times)
    tolerance = 0.1 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(got.x.to(F64), x.to(F64) * np.exp(np.sin(2.0)), rtol=tolerance, atol=tolerance)
    if how.get("steps"):
        assert set(torch.linspace(0, 2, 11, dtype=F64).tolist()) <= set(problem.times)


def test_images_and_per_sample_attributes():
    class Decay(sf.ODE):
        per_sample = ("rate",)

        def __init__(self, rate):
            self.rate = rate

        def drift(self, x, t):
            return -self.rate * x

    rate, x = torch.rand(4, 1, 1, 1, dtype=F64), start(4, 12).reshape(4, 3, 2, 2)
    for solver in (Scipy("RK45"), Torchdiffeq("dopri5")):
        got = sf.solve(Decay(rate), x, solver, rtol=1e-8, atol=1e-8).x
        torch.testing.assert_close(got, x * torch.exp(-rate), rtol=1e-6, atol=1e-6)


def test_the_stats_add_up():
    for solver in (Torchdiffeq(), Torchdiffeq("bosh3"), *EXPLICIT):
        problem = Recording(flow())
        stats = sf.solve(problem, start(), solver, rtol=1e-4, atol=1e-4, t_span=(1.0, 1e-3)).stats
        assert stats.nfe == stats.calls == len(problem.times)
        assert stats.steps == stats.accepted + stats.rejected
        assert stats.accepted > 5
        assert stats.rejected > 0


def test_options_reach_the_backend():
    x = start()
    few = sf.solve(Turning(), x, Scipy(), rtol=1e-3).stats
    assert sf.solve(Turning(), x, Scipy(max_step=0.01), rtol=1e-3).stats.accepted >= 200 > few.accepted
    assert sf.solve(Turning(), x, Torchdiffeq(max_step=0.01), rtol=1e-3).stats.accepted >= 200
    # a given first step saves the probe for it
    assert sf.solve(Turning(), x, Scipy(first_step=0.01), rtol=1e-3, max_steps=50).stats.nfe % 6 == 1
    assert sf.solve(Turning(), x, Torchdiffeq(first_step=0.01), rtol=1e-3, max_steps=50).stats.nfe % 6 == 1
    careful = sf.solve(Turning(), x, Torchdiffeq(safety=0.5, ifactor=2.0, dfactor=0.5), rtol=1e-3).stats
    assert careful.accepted > sf.solve(Turning(), x, Torchdiffeq(), rtol=1e-3).stats.accepted


def test_gradients_flow_through_torchdiffeq():
    x = start(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sf.solve(Turning(), x, Torchdiffeq("rk4"), steps=3).x, x)
    assert torch.autograd.gradcheck(
        lambda x: sf.solve(Turning(), x, Torchdiffeq(first_step=0.1), rtol=1e-3, save=[1.0]).xs, x
    )


@pytest.mark.parametrize("solver", [Torchdiffeq(), Scipy()], ids=name)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(solver, mode):
    with mode():
        got = sf.solve(Turning(), start(), solver, rtol=1e-5, save=[1.0])
    torch.testing.assert_close(got.x.clone(), sf.solve(Turning(), start(), solver, rtol=1e-5).x)


def test_iterate_sees_scipys_steps_and_torchdiffeqs_ends():
    states = list(sf.iterate(Turning(), start(), Scipy(), rtol=1e-5))
    assert [s.t for s in states] == sorted({s.t for s in states})
    assert states[0].t == 0.0
    assert states[-1].t == 2.0
    assert len(states) > 5
    states = list(sf.iterate(Turning(), start(), Torchdiffeq(), rtol=1e-5))
    assert [s.t for s in states] == [0.0, 2.0]
    assert states[1].step > 5


# ---- failures


class Breaks(sf.ODE):
    """Sample 1 of 3 has no drift from `when` on."""

    t1 = 2.0

    def __init__(self, when):
        self.when = when

    def drift(self, x, t):
        bad = (torch.arange(3)[:, None] == 1) & (t >= self.when)
        return torch.where(bad, torch.nan, x)


@pytest.mark.parametrize("when", [0.0, 1.0])
@pytest.mark.parametrize("solver", TO_TOLERANCE, ids=name)
def test_a_sample_that_breaks_ends_the_batch_with_a_status_of_its_own(solver, when):
    solution = sf.solve(Breaks(when), torch.ones(3, 1), solver, rtol=1e-5, atol=1e-5, save=[0.0, 1.9], throw=False)
    non_finite, underflow = int(sf.Status.NON_FINITE), int(sf.Status.STEP_UNDERFLOW)
    assert solution.status.tolist() == [underflow, non_finite, underflow]
    assert bool(torch.isfinite(solution.x).all())
    assert float(solution.x.max()) <= np.e * 1.01
    assert torch.equal(solution.xs[0], torch.ones(3, 1))
    assert bool(solution.xs[1].isnan().all())
    with pytest.raises(sf.SolveError, match="1 of 3 samples became infinite or NaN"):
        sf.solve(Breaks(when), torch.ones(3, 1), solver, rtol=1e-5)


@pytest.mark.parametrize("solver", [*ADAPTIVE, *EXPLICIT, Scipy("Radau"), Scipy("BDF")], ids=name)
def test_a_blow_up_is_a_step_underflow(solver):
    class Blow(sf.ODE):
        t1 = 2.0

        def drift(self, x, t):
            return x**2

    solution = sf.solve(Blow(), torch.ones(2, 1, dtype=F64), solver, rtol=1e-2, max_steps=1000, throw=False)
    assert set(solution.status.tolist()) <= {int(sf.Status.STEP_UNDERFLOW), int(sf.Status.NON_FINITE)}
    assert float(solution.x.min()) > 1e3


@pytest.mark.parametrize("solver", TO_TOLERANCE, ids=name)
def test_the_step_limit_is_a_status(solver):
    solution = sf.solve(flow(), start(), solver, rtol=1e-8, atol=1e-8, max_steps=5, throw=False)
    assert set(solution.status.tolist()) == {int(sf.Status.STEP_LIMIT)}
    assert int(solution.stats.steps) >= 5
    assert bool(torch.isfinite(solution.x).all())


@pytest.mark.parametrize("solver", [Torchdiffeq(), Torchdiffeq("rk4"), Scipy()], ids=name)
def test_errors_of_the_drift_are_the_users(solver):
    class Asserting(sf.ODE):
        def drift(self, x, t):
            raise AssertionError("mine")

    class Wide(sf.ODE):
        def drift(self, x, t):
            return torch.cat([x, x], 1)

    how = {"steps": 3} if solver.name.endswith("rk4") else {"rtol": 1e-3}
    with pytest.raises(AssertionError, match="mine"):
        sf.solve(Asserting(), start(), solver, **how)
    with pytest.raises(ValueError, match=r"returned \(6, 4\) for x of shape \(6, 2\)"):
        sf.solve(Wide(), start(), solver, **how)


# ---- refusals, before the first call


@pytest.mark.parametrize("solver", [Torchdiffeq(), Torchdiffeq("euler"), Scipy()], ids=name)
def test_a_problem_with_noise_is_refused(solver):
    process = sf.VP()
    with pytest.raises(ValueError, match="deterministic"):
        sf.solve(process.reverse(sf.problems.EightGaussians().model(process)), start(), solver, rtol=1e-3)


@pytest.mark.parametrize("solver", [Torchdiffeq(), Scipy("BDF")], ids=name)
def test_adaptive_methods_need_a_tolerance(solver):
    with pytest.raises(ValueError, match="chooses its own steps: expected rtol and atol"):
        sf.solve(flow(), start(), solver, steps=10)


def test_fixed_methods_need_a_grid():
    with pytest.raises(ValueError, match="no error estimate: expected steps or grid"):
        sf.solve(flow(), start(), Torchdiffeq("rk4"), rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Torchdiffeq("dopri6"), "expected one of dopri5, .*, got 'dopri6'"),
        (lambda: Torchdiffeq("explicit_adams"), "expected one of"),
        (lambda: Torchdiffeq("rk4", first_step=0.1), "first_step belong to the adaptive methods"),
        (lambda: Torchdiffeq(safety=0.0), "expected positive"),
        (lambda: Torchdiffeq(first_step=-1.0), "expected positive"),
        (lambda: Scipy("rk45"), "expected one of RK23, .*, got 'rk45'"),
        (lambda: Scipy(max_step=-1.0), "expected positive"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scipy_refuses_to_drop_gradients():
    with pytest.raises(ValueError, match="records no gradients"):
        sf.solve(Turning(), start().requires_grad_(), Scipy(), rtol=1e-3)
    with torch.no_grad():
        assert bool(sf.solve(Turning(), start().requires_grad_(), Scipy(), rtol=1e-3).ok.all())


def test_a_missing_torchdiffeq_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    problem = Recording(Turning())
    for solver, how in ((Torchdiffeq(), {"rtol": 1e-3}), (Torchdiffeq("rk4"), {"steps": 3})):
        with pytest.raises(ImportError, match=r"pip install 'sdeflow\[peers\]'"):
            sf.solve(problem, start(), solver, **how)
    assert not problem.times


# ---- our problems handed to torchdiffeq


@pytest.mark.parametrize("times", [[0.0, 0.7, 2.0], [1.7, 0.2]], ids=["up", "down"])
@pytest.mark.parametrize("shape", [(6, 2), (4, 3, 2, 2)])
def test_torchdiffeq_takes_a_problem(shape, times):
    problem, x = Recording(Turning()), start(1, math.prod(shape)).reshape(shape)
    got = torchdiffeq.odeint(problem, x, torch.tensor(times, dtype=F64), rtol=1e-9, atol=1e-9)
    assert problem.dtypes == {(F64, F64, 0)}
    for state, t in zip(got, times, strict=True):
        torch.testing.assert_close(state, x * math.exp(math.sin(t) - math.sin(times[0])), rtol=1e-6, atol=1e-7)


def test_torchdiffeq_takes_a_flow_in_float32():
    problem, x, ts = Recording(flow()), start().to(torch.float32), torch.tensor([1.0, 0.1])
    options = {"step_t": ts[-1:], "first_step": 0.01}
    got = torchdiffeq.odeint(problem, x, ts, rtol=1e-6, atol=1e-6, method="dopri5", options=options)[-1]
    assert problem.dtypes == {(torch.float32, F64, 0)}
    want = sf.solve(flow(), x.to(F64), sf.solvers.DOP853(), rtol=1e-10, atol=1e-10, t_span=(1.0, 0.1)).x
    torch.testing.assert_close(got.to(F64), want, rtol=0, atol=1e-4)


def test_a_problem_called_directly_checks_its_shape():
    class Narrow(sf.ODE):
        def drift(self, x, t):
            return x.sum(1, keepdim=True)

    with pytest.raises(ValueError, match=r"the drift returned \(6, 1\) for x of shape \(6, 2\)"):
        torchdiffeq.odeint(Narrow(), start(), torch.tensor([0.0, 1.0]))
