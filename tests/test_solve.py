"""`solve`, `iterate` and `sample`: accuracy, independence of samples, what is saved, gradients, and what is refused."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import sdeflow as sf
from sdeflow.problems import Gaussian, GaussianMixture
from sdeflow.solvers import (
    DDIM,
    DDPM,
    RK4,
    RK45,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    Langevin,
    PredictorCorrector,
)  # fmt: skip
from tests.exact import F64, NumpyMixture, random_mixture, rms, slope, vp_flow

VP = sf.VP()
LAW = random_mixture(5, 8, seed=3)
MIXTURE = GaussianMixture(*LAW)
PLANAR = GaussianMixture(*random_mixture(3, 2, seed=4))


def flow_of(problem=PLANAR):
    return VP.probability_flow(problem.model(VP))


class Pendulum(sf.ODE):
    """x'' = -sin(x) (1 + cos(2t)/2), on [0, 3]."""

    t1 = 3.0

    def drift(self, x, t):
        angle, speed = x.unbind(-1)
        return torch.stack([speed, -torch.sin(angle) * (1 + 0.5 * torch.cos(2 * t)).squeeze(-1)], dim=-1)


def pendulum_by_scipy(x, times, start=0.0):
    """States (n, batch, 2) at `times` from x at `start`."""

    def rhs(t, y):
        return [y[1], -np.sin(y[0]) * (1 + 0.5 * np.cos(2 * t))]

    out = []
    for row in x.numpy():
        run = solve_ivp(rhs, (start, times[-1]), row, method="DOP853", rtol=1e-13, atol=1e-14, t_eval=np.asarray(times))
        out.append(run.y.T)
    return torch.tensor(np.stack(out, axis=1), dtype=F64)


class Decay(sf.ODE):
    """x' = -k x, one rate for all."""

    def __init__(self, k=1.0):
        self.k = k

    def drift(self, x, t):
        return -self.k * x


class Rates(sf.ODE):
    """x' = -k x + cos(t), one rate a sample."""

    per_sample = ("k",)

    def __init__(self, k):
        self.k = torch.as_tensor(k, dtype=F64)

    def drift(self, x, t):
        return -self.k.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) * x + torch.cos(t)


class Walk(sf.SDE):
    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        return 0.5 + 0 * x


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


# ---- samples do not disturb each other


class Poisoned(torch.nn.Module):
    """An exact or trained network whose output turns NaN for marked samples below t = `below`."""

    def __init__(self, net, below=0.5):
        super().__init__()
        self.net, self.below = net, below

    def forward(self, x, t, marked):
        value = self.net(x, t)
        bad = marked & (t.reshape(-1) < self.below)
        return torch.where(bad.reshape(-1, *[1] * (x.ndim - 1)), torch.nan, value)


def exact_net(problem):
    return lambda x, t: problem.model(VP).eps(x, t.to(F64))


def small_network(dim):
    torch.manual_seed(5)
    inner = torch.nn.Sequential(torch.nn.Linear(dim + 1, 48), torch.nn.SiLU(), torch.nn.Linear(48, dim))
    return lambda x, t: inner.to(x.dtype)(torch.cat([x, t[:, None].to(x.dtype)], 1))


SOLVES = {
    "DPM++(3)": (DPMSolverPP(3), {"steps": 12}, 0.0),
    "DPM++(2) with noise": (DPMSolverPP(2), {"steps": 12}, 1.0),
    "Euler-Maruyama": (EulerMaruyama(), {"steps": 12}, 1.0),
    "RK4": (RK4(), {"steps": 6}, 0.0),
    "RK45 adaptive": (RK45(), {"rtol": 1e-4}, 0.0),
}


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("batch", [5, 16, 29])
@pytest.mark.parametrize(
    ("net", "dtype"), [("exact", torch.float64), ("network", torch.float64), ("network", torch.float32)]
)
def test_one_samples_nan_leaves_the_others_bitwise_unchanged(name, batch, net, dtype):
    solver, how, eta = SOLVES[name]
    network = exact_net(MIXTURE) if net == "exact" else small_network(8)
    model = sf.Model(Poisoned(network), VP, "eps")
    x = torch.randn(batch, 8, dtype=F64).to(dtype)
    marked = torch.zeros(batch, dtype=torch.bool)
    marked[2] = True

    def run(who):
        with torch.no_grad():
            return sf.solve(VP.reverse(model.bind(marked=who), eta), x, solver, seed=0, throw=False, **how)

    clean, dirty = run(torch.zeros_like(marked)), run(marked)
    assert bool(clean.ok.all())
    assert torch.equal(dirty.x[~marked], clean.x[~marked])
    assert dirty.status.tolist() == [int(sf.Status.NON_FINITE) * int(m) for m in marked] or (
        "rtol" in how and dirty.status[~marked].sum() == 0 and dirty.status[2] != 0
    )


def test_a_failure_raises_with_the_solution_or_returns_it():
    model = sf.Model(Poisoned(exact_net(PLANAR)), VP, "eps").bind(marked=torch.tensor([False, True, False]))
    flow, x = VP.probability_flow(model), torch.randn(3, 2, dtype=F64)
    for how in ({"steps": 10}, {"rtol": 1e-4}):
        solver = RK45()
        with torch.no_grad():
            kept = sf.solve(flow, x, solver, throw=False, **how)
            with pytest.raises(sf.SolveError, match=r"1 of 3 samples .* \(samples 1\); pass throw=False") as info:
                sf.solve(flow, x, solver, **how)
        assert torch.equal(info.value.solution.x[kept.ok], kept.x[kept.ok])
        assert kept.ok.tolist() == [True, False, True]
        assert kept.status[1] != sf.Status.FINISHED
        assert "samples 1" in kept.failures()


def test_an_adaptive_failure_returns_the_last_finite_state():
    model = sf.Model(Poisoned(exact_net(PLANAR)), VP, "eps").bind(marked=torch.tensor([False, True, False]))
    with torch.no_grad():
        solution = sf.solve(VP.probability_flow(model), torch.randn(3, 2, dtype=F64), RK45(), rtol=1e-4, throw=False)
    assert bool(torch.isfinite(solution.x).all())


@pytest.mark.parametrize("name", SOLVES)
def test_results_do_not_change_with_the_batch(name):
    """64 samples alone, within 256, and as four runs of 16 with index offsets: to 1e-6, noise bitwise."""
    solver, how, eta = SOLVES[name]
    model = MIXTURE.model(VP)

    def run(num, index=None):
        return sf.sample(model, num, shape=(8,), solver=solver, eta=eta, seed=0, index=index, dtype=F64, **how).x

    x = run(64)
    torch.testing.assert_close(run(256)[:64], x, rtol=0, atol=1e-6)
    parts = torch.cat([run(16, index=16 * i) for i in range(4)])
    torch.testing.assert_close(parts, x, rtol=0, atol=1e-6)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(run(64, index=order), x[order], rtol=0, atol=1e-6)


def test_predictor_corrector_does_not_change_with_the_batch():
    """Its norms are per sample, not averaged over the batch."""
    solver = PredictorCorrector(EulerMaruyama(), Langevin(steps=2))
    model = MIXTURE.model(VP)

    def run(num, **options):
        return sf.sample(model, num, shape=(8,), solver=solver, steps=10, eta=1.0, dtype=F64, **options).x

    x = run(48)
    torch.testing.assert_close(run(64)[:48], x, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([run(16, index=16 * i) for i in range(3)]), x, rtol=0, atol=1e-6)


def test_the_noise_of_a_solve_is_bitwise_that_of_the_sample():
    """Pure noise through the whole of `solve`: nothing but the draws and their sums."""

    class Brownian(sf.SDE):
        def drift(self, x, t):
            return torch.zeros_like(x)

        def diffusion(self, x, t):
            return torch.ones_like(x)

    def run(batch, index=None, seed=0):
        return Brownian().simulate(torch.zeros(batch, 3), steps=20, seed=seed, index=index).x

    x = run(64)
    assert torch.equal(run(256)[:64], x)
    assert torch.equal(torch.cat([run(16, 16 * i) for i in range(4)]), x)
    order = torch.tensor([9, 3, 40])
    assert torch.equal(run(3, order), x[order])
    assert not torch.equal(run(64, seed=1), x)


def test_an_unseeded_solve_can_be_replayed():
    x = torch.zeros(3, 2)
    first, second = Walk().simulate(x, steps=5), Walk().simulate(x, steps=5)
    assert not torch.equal(first.x, second.x)
    assert torch.equal(Walk().simulate(x, steps=5, seed=first.seed).x, first.x)
    assert sf.solve(Decay(), x, Euler(), steps=2).seed is None
    torch.manual_seed(7)
    a = Walk().simulate(x, steps=5)
    torch.manual_seed(7)
    assert torch.equal(Walk().simulate(x, steps=5).x, a.x)


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


# ---- dtypes, shapes, layouts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{"steps": 20}, {"rtol": 1e-2}], ids=["grid", "adaptive"])
def test_the_state_keeps_its_dtype_and_time_is_float64(dtype, how):
    seen = set()

    class Watching(Decay):
        def drift(self, x, t):
            seen.add((x.dtype, t.dtype))
            return -x

    x = torch.ones(3, 2, dtype=dtype)
    solution = sf.solve(Watching(), x, RK45(), save=[0.0, 1.0] if "rtol" in how else True, **how)
    assert seen == {(dtype, F64)}
    assert solution.x.dtype == solution.xs.dtype == dtype
    assert solution.ts.dtype == F64
    torch.testing.assert_close(solution.x.to(F64), torch.full((3, 2), math.exp(-1), dtype=F64), rtol=0.03, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", [DDIM(), DDPM(), DPMSolverPP(3), EulerMaruyama(), Heun()], ids=lambda s: s.name)
def test_samples_keep_their_dtype(dtype, solver):
    seen = set()

    def net(x, t):
        seen.add((x.dtype, t.dtype))
        return 0.5 * x

    eta = 1.0 if solver.name == "EulerMaruyama" else 0.0
    got = sf.sample(sf.Model(net, VP, "x0"), 3, shape=(2,), solver=solver, steps=8, eta=eta, dtype=dtype)
    assert got.x.dtype == dtype
    assert seen == {(dtype, dtype)}


def test_many_small_steps_move_a_16_bit_state():
    """1000 steps of 1/1000 from 1: an increment below half a unit in the last place must not vanish."""
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    got = sf.solve(Decay(), x, Euler(), steps=1000).x
    torch.testing.assert_close(got.to(F64), torch.full((2, 2), math.exp(-1), dtype=F64), rtol=0.02, atol=0)


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
def test_a_16_bit_state_is_solved_to_its_own_precision(tol):
    """A tolerance below the resolution of bfloat16 makes the steps shorter, not the result worse."""
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    got = sf.solve(Decay(), x, RK45(), rtol=tol, max_steps=2000).x
    torch.testing.assert_close(got.to(F64), torch.full((2, 2), math.exp(-1), dtype=F64), rtol=0.01, atol=0)


class Pointwise(sf.ODE):
    """x' = cos(t) - x^3, component by component."""

    def drift(self, x, t):
        return torch.cos(t) - x**3


class NoisyPointwise(sf.SDE):
    def drift(self, x, t):
        return torch.cos(t) - x**3

    def diffusion(self, x, t):
        return 0.3 + 0.1 * x


@pytest.mark.parametrize("shape", [(8,), (8, 1), (4, 2), (2, 1, 2, 2), (1, 8)])
def test_any_event_shape(shape):
    x = torch.linspace(-1, 1, 8, dtype=F64)
    flat = sf.solve(Pointwise(), x[:, None], RK4(), steps=10).x.flatten()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = sf.solve(Pointwise(), x.reshape(shape), RK4(), steps=10).x
            assert got.shape == shape
            torch.testing.assert_close(got.flatten(), flat, rtol=1e-14, atol=1e-15)
    adaptive = sf.solve(Pointwise(), x.reshape(shape), RK45(), rtol=1e-9, save=[0.0, 0.5, 1.0])
    assert adaptive.xs.shape == (3, *shape)
    torch.testing.assert_close(adaptive.x.flatten(), flat, rtol=0, atol=1e-4)
    noisy = NoisyPointwise().simulate(x.reshape(shape), steps=5, seed=0)
    assert noisy.x.shape == shape
    assert noisy.status.shape == (shape[0],)


def test_images_of_one_channel():
    problem = GaussianMixture(torch.randn(3, 1, 8, 8, dtype=F64), 0.1)
    model = problem.model(VP)
    for solver, eta in ((DPMSolverPP(2), 1.0), (Heun(), 0.0), (PredictorCorrector(EulerMaruyama()), 1.0)):
        got = sf.sample(model, 4, shape=(1, 8, 8), solver=solver, steps=10, eta=eta)
        assert got.x.shape == (4, 1, 8, 8)


def test_the_layout_in_memory_does_not_matter():
    x = torch.randn(2, 6, dtype=F64).T
    flow = flow_of()
    for solver in (DPMSolverPP(3), RK4()):
        with torch.no_grad():
            got = sf.solve(flow, x, solver, steps=8).x
            want = sf.solve(flow, x.contiguous(), solver, steps=8).x
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_the_callers_tensors_are_left_alone():
    x, grid = torch.randn(3, 2, dtype=F64), torch.linspace(1, 1e-3, 9, dtype=F64)
    before = x.clone(), grid.clone()
    with torch.no_grad():
        for solver in (DPMSolverPP(3), RK4(), EulerMaruyama()):
            sf.solve(flow_of(), x, solver, grid=grid, seed=0)
        sf.solve(flow_of(), x, RK45(), rtol=1e-4, save=[1.0, 0.5])
    assert torch.equal(x, before[0])
    assert torch.equal(grid, before[1])


def test_general_noise_takes_as_many_columns_as_the_diffusion_has():
    """Moments of dX = G dW with G (2, 3) over 20,000 paths, within 5 standard errors."""

    class Columns(sf.SDE):
        noise = "general"
        matrix = torch.tensor([[1.0, 0.5, 0.0], [0.0, -0.3, 0.8]], dtype=F64)

        def drift(self, x, t):
            return torch.zeros_like(x)

        def diffusion(self, x, t):
            return self.matrix.expand(x.shape[0], 2, 3)

    x = Columns().simulate(torch.zeros(20_000, 2, dtype=F64), steps=3, seed=1).x
    want = Columns.matrix @ Columns.matrix.T
    assert bool(((x.T @ x / 20_000 - want).abs() < 5 * 1.5 * math.sqrt(2 / 20_000)).all())


def test_inference_mode_and_no_grad_give_the_same_numbers():
    x = torch.randn(4, 2, dtype=F64)
    for solver in (DPMSolverPP(3), RK4(), EulerMaruyama()):
        with torch.no_grad():
            want = sf.solve(flow_of(), x, solver, steps=6).x
        with torch.inference_mode():
            assert torch.equal(sf.solve(flow_of(), x, solver, steps=6).x, want)
    with torch.inference_mode():
        assert bool(sf.solve(flow_of(), x, RK45(), rtol=1e-5, save=[0.5]).ok.all())


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


# ---- what is refused, before any model call


def refuse(call, message, error=ValueError):
    model = PLANAR.model(VP)
    with pytest.raises(error, match=message):
        call(model)
    assert model.nfe == 0


X = torch.zeros(3, 2, dtype=F64)


def nan_at(row):
    x = X.clone()
    x[row, 1] = math.nan
    return x


GRIDS = [
    ([1.0, 0.5, 0.6, 0.1], "strictly monotone times in grid"),
    ([1.0, 0.5, 0.5, 0.1], "strictly monotone times in grid"),
    ([1.0, math.nan, 0.1], "finite times in grid"),
    ([1.2, 0.5, 0.1], r"times of grid in \[0, 1\], got 1.2 to 0.1"),
    ([1.0, 0.5, -0.1], r"times of grid in \[0, 1\], got 1 to -0.1"),
    ([1.0], r"shape \(steps \+ 1,\), got shape \(1,\)"),
    ([[1.0, 0.5]], r"got shape \(1, 2\)"),
]


@pytest.mark.parametrize("solver", [Heun(), DPMSolverPP(2), EulerMaruyama()], ids=lambda s: s.name)
@pytest.mark.parametrize(("grid", "message"), GRIDS)
def test_bad_grids(solver, grid, message):
    refuse(lambda m: sf.solve(VP.probability_flow(m), X, solver, grid=grid), message)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps >= 1, got 0"),
        ({"steps": -3}, ValueError, "steps >= 1, got -3"),
        ({"steps": 2.5}, TypeError, "steps as a whole number or None, got 2.5"),
        ({"steps": True}, TypeError, "steps as a whole number or None, got True"),
        ({}, ValueError, "expected steps=, grid="),
        ({"grid": sf.grids.uniform}, ValueError, "expected steps="),
        ({"steps": 3, "grid": [1.0, 0.5, 0.1]}, ValueError, "4 times for 3 steps, got 3"),
        ({"steps": 3, "t_span": (1.5, 0.1)}, ValueError, r"times of t_span in \[0, 1\], got 1.5"),
        ({"steps": 3, "t_span": (1.0, -0.1)}, ValueError, r"in \[0, 1\], got 1 to -0.1"),
        ({"steps": 3, "t_span": (0.5, 0.5)}, ValueError, "t_span"),
        ({"steps": 3, "t_span": (1.0, math.nan)}, ValueError, r"t_span as a tuple of 2 numbers or None, got \(1"),
        ({"steps": 3, "t_span": (1.0, 0.5, 0.1)}, ValueError, "t_span as a tuple of 2 numbers or None"),
        ({"grid": [1.0, 0.1], "t_span": (1.0, 0.1)}, ValueError, "not both"),
        ({"steps": 3, "rtol": 1e-3}, ValueError, "not both"),
        ({"rtol": -1e-3}, ValueError, "rtol >= 0"),
        ({"rtol": 0.0, "atol": 0.0}, ValueError, "above 0"),
        ({"rtol": math.nan}, ValueError, "rtol"),
        ({"rtol": 1e-3, "save": True}, ValueError, "times in save"),
        ({"rtol": 1e-3, "save": [0.5, 1.5]}, ValueError, "save times in"),
        ({"rtol": 1e-3, "save": [math.nan]}, ValueError, "save times in"),
        ({"rtol": 1e-3, "max_steps": 0}, ValueError, "max_steps >= 1"),
        ({"rtol": 1e-3, "t_span": (0.5, 0.5)}, ValueError, "t_span"),
        ({"steps": 3, "save": [0.123]}, ValueError, "times of the grid in save, got 0.123"),
        ({"grid": [1.0, 0.5, 0.1], "save": [0.1, 0.5]}, ValueError, "in the order of the solve"),
        ({"grid": [1.0, 0.5, 0.1], "save": [0.5, 0.5]}, ValueError, "without repeats"),
    ],
)  # fmt: skip
def test_bad_arguments(options, error, message):
    refuse(lambda m: sf.solve(VP.probability_flow(m), X, RK45(), **options), message, error)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (nan_at(1), ValueError, r"NaN or infinity in 1 samples \(first: 1\)"),
        (X + math.inf, ValueError, "NaN or infinity in 3 samples"),
        (torch.zeros(0, 2), ValueError, "at least one sample"),
        (torch.tensor(1.0), ValueError, "at least one sample"),
        (torch.zeros(3, 2, dtype=torch.int64), TypeError, "floating-point tensor, got torch.int64"),
        (torch.zeros(3, 2, dtype=torch.complex64), TypeError, "x as a tensor of real numbers, got a tensor of torch.c"),
        ([[0.0, 1.0]], TypeError, "x as a tensor of real numbers, got .*; torch.as_tensor"),
        (np.zeros((3, 2)), TypeError, "x as a tensor of real numbers, got a numpy array of float64"),
    ],
)
@pytest.mark.parametrize("how", [{"steps": 3}, {"rtol": 1e-3}])
def test_bad_states(x, error, message, how):
    refuse(lambda m: sf.solve(VP.probability_flow(m), x, RK45(), **how), message, error)


def flow(model):
    return VP.probability_flow(model)


def solve3(problem, solver, **options):
    return sf.solve(problem, X, solver, steps=3, **options)


def sample2(model, num=2, **options):
    options = {"solver": DDIM(), "steps": 3, **options}
    return sf.sample(model, num, shape=(2,), **options)


def plan4(model):
    return DPMSolverPP(2).plan(flow(model), sf.grids.uniform(VP, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: solve3(VP.reverse(m), Heun()), ValueError, "Heun is deterministic and the problem has noise"),
        (lambda m: sf.solve(VP.reverse(m), X, RK45(), rtol=1e-3), ValueError, "RK45 is deterministic"),
        (lambda m: solve3(VP.reverse(m), DDIM()), ValueError, "probability flow"),
        (lambda m: solve3(VP.reverse(m, 0.5), DDPM()), ValueError, "brings its own eta"),
        (lambda m: solve3(VP.reverse(m), DPMSolverPP(2, multistep=False)), ValueError, "probability flow"),
        (lambda m: sf.solve(flow(m), X, Heun(), rtol=1e-3), ValueError, "no error estimate"),
        (lambda m: sf.solve(flow(m), X, DPMSolverPP(2), rtol=1e-3), ValueError, "no error estimate"),
        (lambda m: solve3(Pendulum(), DPMSolverPP(2)), ValueError, "transition view"),
        (lambda m: solve3(Walk(), DDIM()), ValueError, "transition view"),
        (lambda m: solve3(Walk().reverse(m.score), DPMSolverPP(2)), ValueError, "transition view"),
        (lambda m: solve3(Walk(), PredictorCorrector(EulerMaruyama())), ValueError, "needs a score"),
        (lambda m: sf.solve(VP.reverse(m), X, EulerMaruyama(), grid=[0.1, 1.0]), ValueError, "runs down to"),
        (lambda m: sf.solve(Walk(), X, EulerMaruyama(), grid=[1.0, 0.1]), ValueError, "runs up from"),
        (lambda m: solve3(m, Heun()), TypeError, "problem as an ODE, SDE or ReverseSDE, got Model"),
        (lambda m: solve3(flow(m), Heun), TypeError, "got the function Heun; call it to make one"),
        (lambda m: solve3(flow(m), "heun"), TypeError, r"solver as a solver such as sf.solvers.Heun\(\)"),
        (lambda m: solve3(VP.reverse(m), EulerMaruyama(), seed="a"), TypeError, "seed as a whole number"),
        (lambda m: solve3(VP.reverse(m), DDPM(), index=torch.arange(4)), ValueError, r"\(3,\), got shape \(4,\)"),
        (lambda m: solve3(Rates([1.0, 2.0]), Heun()), ValueError, r"'k': expected 3 rows, got \(2,\)"),
        (lambda m: sf.solve(flow(m), X, plan4(m), steps=5), ValueError, "a plan has its own grid"),
        (lambda m: sf.solve(flow(m), X, plan4(m), t_span=(1.0, 0.1)), ValueError, "a plan has its own grid"),
        (lambda m: sample2(m, 0), ValueError, "num >= 1 samples, got 0"),
        (lambda m: sample2(m, 2.0), ValueError, "num as a whole number"),
        (lambda m: sample2(m.net), TypeError, "model as a Model, got the function exact_v; wrap the network: sf.Model"),
        (lambda m: sample2(m, final="round"), ValueError, "final as one of 'stay', 'denoise', 'zero'"),
        (lambda m: sample2(m, final="zero", steps=None, grid=[1.0, 0.5]), ValueError, "ends the grid at t0"),
        (lambda m: sample2(m, eta=-1.0), ValueError, "eta >= 0"),
        (lambda m: sample2(m, final="zero", solver=PredictorCorrector(DDPM())), ValueError, "finite|sigma"),
        (lambda m: solve3(flow(m), PredictorCorrector(DDPM()), t_span=(1.0, 0.0)), ValueError, "finite|sigma"),
        (lambda m: sample2(m, steps=0), ValueError, "steps >= 1"),
        (lambda m: DPMSolverPP(4), ValueError, "order 1, 2 or 3, got 4"),
        (lambda m: DPMSolverPP(2, start="heun"), ValueError, "start as one of 'ramp', 'singlestep'"),
        (lambda m: DDIM(eta=1.5), ValueError, r"eta in \[0, 1\]"),
        (lambda m: Langevin(snr=0.0), ValueError, "snr > 0"),
        (lambda m: Langevin(steps=0), ValueError, "steps >= 1"),
        (lambda m: PredictorCorrector(Langevin()), TypeError, "predictor as a solver .*, got Langevin"),
        (lambda m: PredictorCorrector(EulerMaruyama(), 0.16), TypeError, "corrector as a Langevin, got 0.16"),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, message):
    refuse(call, message, error)


class Column(sf.SDE):
    """A drift or diffusion of another shape than it should have."""

    def __init__(self, drift=(3, 2), diffusion=(3, 2), noise="diagonal"):
        self.shapes, self.noise = (drift, diffusion), noise

    def drift(self, x, t):
        return torch.zeros(self.shapes[0], dtype=x.dtype)

    def diffusion(self, x, t):
        return torch.zeros(self.shapes[1], dtype=x.dtype)


@pytest.mark.parametrize("shape", [(3, 1), (1, 2), (2,), (), (3, 2, 1), (4, 2)])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("how", ["Euler", "Heun", "EulerMaruyama", "adaptive"])
def test_a_drift_of_another_shape_is_refused(shape, grad, how):
    """Also shapes that would broadcast in silence, by every method."""

    class Wrong(sf.ODE):
        def drift(self, x, t):
            return torch.zeros(shape, dtype=x.dtype)

    solver = {"Euler": Euler(), "Heun": Heun(), "EulerMaruyama": EulerMaruyama(), "adaptive": RK45()}[how]
    problem = Column(drift=shape) if how == "EulerMaruyama" else Wrong()
    options = {"rtol": 1e-3} if how == "adaptive" else {"steps": 2}
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"drift returned .* for x of shape \(3, 2\)"):
        sf.solve(problem, X, solver, seed=0, **options)


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (Column(diffusion=(4, 2)), r"broadcasts against x, \(3, 2\), got \(4, 2\)"),
        (Column(diffusion=(3, 2, 2)), r"broadcasts against x, \(3, 2\), got \(3, 2, 2\)"),
        (Column(diffusion=(3, 2), noise="general"), r"\(\*x.shape, m\) = \(3, 2, m\), got \(3, 2\)"),
        (Column(diffusion=(2, 2, 4), noise="general"), r"got \(2, 2, 4\)"),
        (Column(noise="scalar"), '"diagonal" or "general", got \'scalar\''),
    ],
)
def test_a_diffusion_of_another_shape_is_refused(sde, message):
    with pytest.raises(ValueError, match=message):
        sde.simulate(X, steps=2, seed=0)


def test_tableaus_check_themselves():
    table = RK45().tableau
    for changes, message in (
        ({"b": table.b[:-1]}, "7 weights b"),
        ({"b": (1, *table.b[1:])}, r"sum\(b\) = 1"),
        ({"c": (0, 0.3, *table.c[2:])}, "sum_j a_ij = c_i"),
        ({"a": table.a[::-1]}, "row i of a"),
        ({"b_error": (1, *table.b_error[1:])}, r"sum\(b_error\) = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(table, **changes)
