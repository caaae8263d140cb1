"""`solve` to a tolerance: accuracy, dense output, what is saved, and a step size per sample."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import sdeflow as sf
from sdeflow.problems import Gaussian
from sdeflow.solvers import RK4, RK45, DPMSolverPP, Heun
from tests.exact import F64, NumpyMixture, rms, slope, vp_flow
from tests.solve_cases import LAW, MIXTURE, VP, Decay, Pendulum, Rates, flow_of


def pendulum_by_scipy(x, times, start=0.0):
    """States (n, batch, 2) at `times` from x at `start`."""

    def rhs(t, y):
        return [y[1], -np.sin(y[0]) * (1 + 0.5 * np.cos(2 * t))]

    out = []
    for row in x.numpy():
        run = solve_ivp(rhs, (start, times[-1]), row, method="DOP853", rtol=1e-13, atol=1e-14, t_eval=np.asarray(times))
        out.append(run.y.T)
    return torch.tensor(np.stack(out, axis=1), dtype=F64)


# ---- accuracy to a tolerance


def test_rk45_reproduces_scipy_on_the_flow_of_an_8d_mixture():
    x = torch.randn(12, 8, dtype=F64)
    with torch.no_grad():
        solution = sf.solve(flow_of(MIXTURE), x, RK45(), rtol=1e-8, atol=1e-8)
    want = vp_flow(NumpyMixture(*LAW), x, 1.0, 1e-3)
    assert float((solution.x - want).abs().max()) < 1e-6
    assert bool(solution.ok.all())


def test_a_tighter_tolerance_is_a_smaller_error():
    """Over six decades the error follows the tolerance: slope 1 within a fifth."""
    x = torch.tensor([[1.0, 0.0], [2.5, 0.3]], dtype=F64)
    want = pendulum_by_scipy(x, [3.0])[0]
    tolerances = 10.0 ** -np.arange(4, 11)
    errors = [rms(sf.solve(Pendulum(), x, RK45(), rtol=tol, atol=tol).x - want) for tol in tolerances]
    assert 0.8 < slope(tolerances, errors) < 1.2
    assert all(e < 20 * tol for e, tol in zip(errors, tolerances, strict=True))


def test_one_tolerance_sets_both():
    x = torch.tensor([[1.0, 0.0]], dtype=F64)
    both = sf.solve(Pendulum(), x, RK45(), rtol=1e-6, atol=1e-6).x
    assert torch.equal(sf.solve(Pendulum(), x, RK45(), rtol=1e-6).x, both)
    assert torch.equal(sf.solve(Pendulum(), x, RK45(), atol=1e-6).x, both)


def test_an_ode_solved_forth_and_back_returns():
    x = torch.tensor([[1.0, 0.0], [2.5, 0.3], [-0.4, -2.0]], dtype=F64)
    there = sf.solve(Pendulum(), x, RK45(), rtol=1e-10, atol=1e-10).x
    back = sf.solve(Pendulum(), there, RK45(), rtol=1e-10, atol=1e-10, t_span=(3.0, 0.0)).x
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    assert float((there - x).norm(dim=1).min()) > 0.1
    fixed = sf.solve(Pendulum(), sf.solve(Pendulum(), x, RK4(), steps=300).x, RK4(), steps=300, t_span=(3.0, 0.0))
    torch.testing.assert_close(fixed.x, x, rtol=0, atol=1e-7)


def test_the_flow_encodes_and_decodes():
    x = MIXTURE.sample(6, seed=1)
    flow = flow_of(MIXTURE)
    with torch.no_grad():
        noise = sf.solve(flow, x, RK45(), rtol=1e-9, atol=1e-9, t_span=(1e-3, 1.0)).x
        again = sf.solve(flow, noise, RK45(), rtol=1e-9, atol=1e-9).x
    torch.testing.assert_close(again, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(noise, vp_flow(NumpyMixture(*LAW), x, 1e-3, 1.0), rtol=0, atol=1e-6)


# ---- dense output and what is saved


def test_dense_output_follows_scipy():
    """At times of nobody's step, in both directions, including the two ends."""
    x = torch.tensor([[1.0, 0.0], [2.5, 0.3], [-0.4, -2.0]], dtype=F64)
    times = [0.0, 0.1, 0.77, 1.5, 2.999, 3.0]
    solution = sf.solve(Pendulum(), x, RK45(), rtol=1e-9, atol=1e-9, save=times)
    want = pendulum_by_scipy(x, times)
    assert solution.xs.shape == (6, 3, 2)
    torch.testing.assert_close(solution.ts, torch.tensor(times, dtype=F64))
    torch.testing.assert_close(solution.xs, want, rtol=0, atol=2e-7)
    assert torch.equal(solution.xs[0], x)
    torch.testing.assert_close(solution.xs[-1], solution.x, rtol=0, atol=1e-13)
    back = sf.solve(Pendulum(), want[-1], RK45(), rtol=1e-9, atol=1e-9, t_span=(3.0, 0.0), save=times[::-1])
    torch.testing.assert_close(back.xs, want.flip(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("theta", [0.2, 0.5, 0.9])
def test_the_interpolant_is_of_order_four(theta):
    """Its local error is h^5; taking only the state's line between steps would be h^2."""
    table, x = RK45().tableau, torch.tensor([[1.0, 0.4]], dtype=F64)
    sizes, errors = (0.2, 0.1, 0.05, 0.025), []
    for h in sizes:
        stages = []
        for c, row in zip(table.c, table.a, strict=True):
            y = x + h * sum((float(a) * k for a, k in zip(row, stages, strict=True)), torch.zeros_like(x))
            stages.append(Pendulum().drift(y, torch.tensor(float(c) * h, dtype=F64)))
        weights = [sum(float(c) * theta ** (p + 1) for p, c in enumerate(row)) for row in table.dense]
        y = x + h * sum(w * k for w, k in zip(weights, stages, strict=True))
        errors.append(rms(y - pendulum_by_scipy(x, [theta * h])[0]))
    assert 4.6 < slope(sizes, errors) < 5.6


def test_the_interpolant_meets_the_step_at_both_ends():
    table = RK45().tableau
    assert [float(sum(row)) for row in table.dense] == pytest.approx([float(b) for b in table.b], abs=1e-12)
    assert [float(row[0]) for row in table.dense] == [1, 0, 0, 0, 0, 0, 0]
    slopes = [float(sum((p + 1) * c for p, c in enumerate(row))) for row in table.dense]
    assert slopes == pytest.approx([0, 0, 0, 0, 0, 0, 1], abs=1e-12)


def test_a_fixed_grid_saves_its_points():
    x = torch.tensor([[1.0, 0.0]], dtype=F64)
    grid = torch.tensor([0.0, 0.5, 1.1, 2.0, 3.0], dtype=F64)
    full = sf.solve(Pendulum(), x, Heun(), grid=grid, save=True)
    assert torch.equal(full.ts, grid)
    assert full.xs.shape == (5, 1, 2)
    assert torch.equal(full.xs[0], x)
    assert torch.equal(full.xs[-1], full.x)
    for k in range(1, 5):
        assert torch.equal(full.xs[k], sf.solve(Pendulum(), x, Heun(), grid=grid[: k + 1]).x)
    part = sf.solve(Pendulum(), x, Heun(), grid=grid, save=[0.5, 2.0])
    assert torch.equal(part.ts, grid[[1, 3]])
    assert torch.equal(part.xs, full.xs[[1, 3]])
    none = sf.solve(Pendulum(), x, Heun(), grid=grid)
    assert none.ts is None
    assert none.xs is None


def test_a_list_of_times_is_float64():
    """0.1 is not a float32: rounded to one, the solve ends elsewhere."""
    solution = sf.solve(Pendulum(), torch.ones(1, 2, dtype=F64), Heun(), grid=[0.0, 0.1, 0.3], save=True)
    assert solution.ts.tolist() == [0.0, 0.1, 0.3]
    for grid in ((0.0, 0.1, 0.3), np.array([0.0, 0.1, 0.3])):
        again = sf.solve(Pendulum(), torch.ones(1, 2, dtype=F64), Heun(), grid=grid, save=[0.1, 0.3])
        assert again.ts.tolist() == [0.1, 0.3]


def test_saved_states_are_not_overwritten_by_later_steps():
    with torch.no_grad():
        solution = sf.solve(flow_of(), torch.randn(4, 2, dtype=F64), DPMSolverPP(3), steps=8, save=True)
    assert solution.xs.flatten(1).unique(dim=0).shape[0] == 9


def test_a_failed_sample_has_nan_after_its_failure():
    solution = sf.solve(
        BlowUp(), torch.tensor([[2.0], [-1.0]], dtype=F64), RK45(), rtol=1e-6, save=[0.1, 0.4, 0.9], throw=False
    )
    assert bool(torch.isfinite(solution.xs[:2]).all())
    assert bool(solution.xs[2, 0].isnan().all())
    torch.testing.assert_close(solution.xs[2, 1], torch.tensor([-1 / 1.9], dtype=F64), rtol=1e-5, atol=0)


# ---- per-sample steps


def test_a_stiff_sample_does_not_cost_the_others():
    k = torch.tensor([1.0, 2.0, 200.0, 1.5, 3.0], dtype=F64)
    x = torch.ones(5, 2, dtype=F64)
    with torch.no_grad():
        together = sf.solve(Rates(k), x, RK45(), rtol=1e-7)
        for i in range(5):
            alone = sf.solve(Rates(k[i : i + 1]), x[i : i + 1], RK45(), rtol=1e-7)
            for field in ("nfe", "steps", "accepted", "rejected"):
                assert int(getattr(together.stats, field)[i]) == int(getattr(alone.stats, field)[0])
            torch.testing.assert_close(together.x[i : i + 1], alone.x, rtol=0, atol=1e-14)
    assert int(together.stats.nfe[2]) > 3 * int(together.stats.nfe.median())
    assert torch.equal(together.stats.steps, together.stats.accepted + together.stats.rejected)
    assert together.stats.calls == int(together.stats.nfe.max())


def test_per_sample_attributes_and_conditions_follow_their_samples():
    """Rates from 1 to 400 finish at very different times: every one must get its own answer."""
    k = torch.tensor([300.0, 1, 50, 2, 400, 3, 4, 5, 100, 6, 7, 150, 8, 9, 10, 20, 30, 40], dtype=F64)
    x = torch.ones(18, 1, dtype=F64)
    exact = ((k * math.cos(1) + math.sin(1) + torch.exp(-k) * (1 + k**2 - k)) / (1 + k**2))[:, None]
    with torch.no_grad():
        got = sf.solve(Rates(k), x, RK45(), rtol=1e-9, atol=1e-10).x
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-7)

    labels = torch.linspace(-3, 3, 18, dtype=F64)

    def net(x, t, label, width):
        return Gaussian([0.0], [1.0]).model(VP).eps(x - VP.alpha(t)[:, None] * label[:, None] * width, t)

    model = sf.Model(net, VP, "eps").bind(label=labels, width=2.0)
    start = 6 * torch.rand(18, 1, dtype=F64)
    with torch.no_grad():
        got = sf.solve(VP.probability_flow(model), start, RK45(), rtol=1e-9, atol=1e-10)
    # data N(2 label, 1) under VP keeps its variance of 1: the flow is a shift by the mean
    shift = (2 * labels * (VP.alpha(1e-3) - VP.alpha(1.0)))[:, None]
    torch.testing.assert_close(got.x, start + shift, rtol=0, atol=1e-6)


class BlowUp(sf.ODE):
    """x' = x^2: from 2 it is infinite at t = 1/2."""

    def drift(self, x, t):
        return x**2


def test_a_finite_time_blow_up_is_a_step_underflow():
    x = torch.tensor([[0.5], [2.0], [-3.0]], dtype=F64)
    solution = sf.solve(BlowUp(), x, RK45(), rtol=1e-6, throw=False)
    assert solution.status.tolist()[0::2] == [sf.Status.FINISHED] * 2
    assert solution.status[1] in (sf.Status.STEP_UNDERFLOW, sf.Status.NON_FINITE)
    torch.testing.assert_close(solution.x[0::2], torch.tensor([[1.0], [-0.75]], dtype=F64), rtol=1e-5, atol=0)
    with pytest.raises(sf.SolveError, match=r"1 of 3 samples .* \(samples 1\)"):
        sf.solve(BlowUp(), x, RK45(), rtol=1e-6)


def test_the_step_limit_is_per_sample():
    k = torch.tensor([1.0, 500.0, 1.0], dtype=F64)
    solution = sf.solve(Rates(k), torch.ones(3, 1, dtype=F64), RK45(), rtol=1e-8, max_steps=60, throw=False)
    assert solution.status.tolist() == [sf.Status.FINISHED, sf.Status.STEP_LIMIT, sf.Status.FINISHED]
    assert int(solution.stats.steps[1]) == 60
    assert "more than max_steps" in solution.failures()


def test_a_zero_component_does_not_stop_a_relative_tolerance():
    """0/0 in the scaled error of a component that stays 0 is no error."""
    x = torch.tensor([[0.0, 1.0], [2.0, 1.0]], dtype=F64)
    got = sf.solve(Decay(), x, RK45(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(got.x, x * math.exp(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("x0", [0.0, 1e-30, 1e30])
def test_first_steps_of_any_size(x0):
    x = torch.full((2, 1), x0, dtype=F64)
    torch.testing.assert_close(sf.solve(Decay(), x, RK45(), rtol=1e-7).x, x * math.exp(-1), rtol=1e-5, atol=1e-6)


def test_a_drift_of_zero_is_one_step_or_few():
    still = sf.solve(Decay(0.0), torch.ones(2, 2, dtype=F64), RK45(), rtol=1e-8)
    assert torch.equal(still.x, torch.ones(2, 2, dtype=F64))
    assert int(still.stats.steps.max()) <= 10
