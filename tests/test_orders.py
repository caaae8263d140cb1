"""Declared orders, fitted over four or more levels on nonlinear non-autonomous problems, with mutants that must fail.

Everything is deterministic or paired: noise comes from a table, so a slope has no sampling error but
that of its average over paths.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

import sdeflow as sf
from sdeflow.bridge import Increment
from sdeflow.solvers import (
    DDIM,
    DDPM,
    RK4,
    RK45,
    SRA1,
    Adams,
    DPMSolverPP,
    EulerMaruyama,
    ExponentialMultistep,
    ExponentialRK,
    GaussianSplit,
    Heun,
    InVariable,
    LevyMilstein,
    RungeKutta,
    StochasticHeun,
)  # fmt: skip
from sdeflow.solvers.catalogue import FAMILY
from tests.exact import (
    F64,
    NumpyMixture,
    NumpyVP,
    TableNoise,
    paired_increments,
    random_mixture,
    rms,
    slope,
    unit_increments,
    vp_flow,
)  # fmt: skip

START, END = 0.8, 0.05
"""The span of VP's time in these tests: lam from -2.9 to 1.9, where nothing is at its limit yet."""
LEVELS = {
    1: (64, 128, 256, 512),
    2: (32, 64, 128, 256),
    3: (64, 128, 256, 512),
    4: (16, 32, 64, 128),
    5: (12, 24, 48, 96),
    8: (4, 6, 8, 12),
}
ORDERED = [row for row in FAMILY if row.order is not None]
STOCHASTIC = [row for row in FAMILY if row.strong_order is not None]
LAW = random_mixture(3, 2, seed=6, spread=1.0)


def names(rows):
    return [row.name for row in rows]


def check_order(got, declared):
    """Within 0.2; a fifth-order pair, whose leading error terms are made small, may look better."""
    assert declared - 0.2 <= got <= declared + (0.2 if declared < 5 else 1.5)


def levels_of(row):
    """Multistep methods are in their limit later than single steps of the same order: their stencil is longer."""
    if "Split" in row.name:
        return (128, 256, 512, 1024)
    if row.name == "ROS34PW2":
        return (256, 512, 1024)
    if row.name == "RK38":
        return (32, 64, 128, 256)
    return LEVELS[row.order] if row.order < 3 or row.nfe_per_step > 1 else (64, 128, 256, 512)


def full_start(solver):
    """Multistep methods with a start-up of their own order: orders 1, 2, ... cap every order at 2."""
    if isinstance(solver, InVariable):
        return dataclasses.replace(solver, solver=full_start(solver.solver))
    if isinstance(solver, ExponentialMultistep):
        return dataclasses.replace(solver, start="singlestep") if solver.order > 1 else solver
    if isinstance(solver, Adams | GaussianSplit):
        return dataclasses.replace(solver, start="runge-kutta")
    return solver


@functools.cache
def flow_case():
    """(flow of the mixture under VP, start states, end states by scipy)."""
    x = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    model = sf.problems.GaussianMixture(*LAW).model(sf.VP())
    end = vp_flow(NumpyMixture(*LAW), x, START, END, rtol=1e-13, atol=1e-14)
    return sf.VP().probability_flow(model), x, end


def flow_errors(solver, levels, grid):
    flow, x, end = flow_case()
    with torch.no_grad():
        runs = [sf.solve(flow, x, solver, steps=n, grid=grid, t_span=(START, END)) for n in levels]
    return [rms(run.x - end) for run in runs]


# ---- the probability flow


@pytest.mark.parametrize("row", ORDERED, ids=names(ORDERED))
def test_orders_on_the_flow_of_a_mixture(row):
    grid = sf.grids.logsnr if row.view == "transition" else sf.grids.uniform
    levels = levels_of(row)
    check_order(slope(1 / np.array(levels), flow_errors(full_start(row.make()), levels, grid)), row.order)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("multistep", [True, False])
@pytest.mark.parametrize("grid", [sf.grids.uniform, sf.grids.quadratic], ids=lambda g: g.__name__)
def test_orders_of_the_exponential_family(order, prediction, multistep, grid):
    """Every member, on grids that are not equal steps of its own variable."""
    whole = ExponentialMultistep(order, prediction, start="singlestep")
    solver = whole if multistep else ExponentialRK(order, prediction)
    levels = (32, 64, 128, 256)
    check_order(slope(1 / np.array(levels), flow_errors(solver, levels, grid)), order)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_orders_of_encoding(order, prediction):
    """The family run upwards, from data to noise."""
    flow, x, _ = flow_case()
    end = vp_flow(NumpyMixture(*LAW), x, END, START, rtol=1e-13, atol=1e-14)
    solver, levels = ExponentialMultistep(order, prediction, start="singlestep"), (32, 64, 128, 256)
    with torch.no_grad():
        runs = [sf.solve(flow, x, solver, steps=n, grid=sf.grids.logsnr, t_span=(END, START)) for n in levels]
    check_order(slope(1 / np.array(levels), [rms(run.x - end) for run in runs]), order)


def test_a_ramp_caps_the_order_at_two():
    """The control of the start-up: orders 1, 2, 3, 3, ... are of order 2 in the limit."""
    levels = (128, 256, 512, 1024)
    assert slope(1 / np.array(levels), flow_errors(DPMSolverPP(3), levels, sf.grids.logsnr)) < 2.4


def half_second_difference(plan, process):
    """`plan` with half the second difference of every three-point row: the published third-order multistep.

    The interpolant loses (v - lam0)^2 e[0, 1, 2]/2 times 1, with e[0, 1, 2] the divided difference.
    """
    lam = process.lam(plan.times).tolist()
    ends = process.lam(plan.grid[1:])[plan.step_of_row].tolist()
    a1 = process.alpha(plan.grid[1:])[plan.step_of_row].tolist()
    weights = plan.weights.clone()
    for k in range(plan.nfe):
        if torch.nonzero(weights[k]).flatten().tolist() != [0, 1, 2] or plan.step_of_row[k] < 2:
            continue  # a row of the start-up
        n0, n1, n2, end = lam[k], lam[k - 1], lam[k - 2], ends[k]
        moment = a1[k] * quad(lambda v, n0=n0, end=end: (v - n0) ** 2 * math.exp(v - end), n0, end, epsabs=1e-16)[0]
        difference = torch.tensor(
            [1 / ((n0 - n1) * (n0 - n2)), 1 / ((n1 - n0) * (n1 - n2)), 1 / ((n2 - n0) * (n2 - n1))], dtype=F64
        )
        weights[k, :3] -= 0.5 * moment * difference
    return dataclasses.replace(plan, weights=weights)


def test_the_published_third_order_is_second_order_and_ours_is_third():
    flow, x, end = flow_case()
    levels, ours, published = LEVELS[3], [], []
    for n in levels:
        grid = sf.grids.logsnr(flow, n, START, END)
        plan = DPMSolverPP(3, start="singlestep").plan(flow, grid)
        with torch.no_grad():
            ours.append(rms(sf.solve(flow, x, plan).x - end))
            published.append(rms(sf.solve(flow, x, half_second_difference(plan, flow.gaussian)).x - end))
    check_order(slope(1 / np.array(levels), ours), 3)
    assert 1.7 < slope(1 / np.array(levels), published) < 2.3


# ---- a user's equation


class Forced(sf.ODE):
    """x' = 2 cos(x) cos(5 t) - x, nonlinear and non-autonomous."""

    t1 = 2.0

    def drift(self, x, t):
        return 2 * torch.cos(x) * torch.cos(5 * t) - x


@functools.cache
def forced_end():
    run = solve_ivp(
        lambda t, x: 2 * np.cos(x) * np.cos(5 * t) - x, (0, 2), [1.0, 0.5, -0.7],
        method="DOP853", rtol=1e-13, atol=1e-15,
    )  # fmt: skip
    return torch.tensor(run.y[:, -1:], dtype=F64)


def forced_errors(solver, levels):
    x = torch.tensor([[1.0], [0.5], [-0.7]], dtype=F64)
    return [rms(sf.solve(Forced(), x, solver, steps=n).x - forced_end()) for n in levels]


DRIFT_VIEW = [row for row in ORDERED if row.view == "drift"]


@pytest.mark.parametrize("row", DRIFT_VIEW, ids=names(DRIFT_VIEW))
def test_orders_on_a_users_equation(row):
    levels = levels_of(row)
    check_order(slope(1 / np.array(levels), forced_errors(full_start(row.make()), levels)), row.order)


@pytest.mark.parametrize("solver", [Heun(), RK4(), RK45()], ids=lambda s: s.name)
def test_a_stage_at_the_wrong_time_costs_the_order(solver):
    """The control: the last stage's time moved by a tenth of a step (what autonomous tests do not see)."""

    class Late(RungeKutta):
        def plan(self, problem, grid):
            plan = super().plan(problem, grid)
            rows = plan.nfe // plan.steps
            times = plan.times.clone()
            times[rows - 1 :: rows] -= 0.1 * torch.diff(grid)
            return dataclasses.replace(plan, times=times)

    levels = LEVELS[solver.order]
    assert slope(1 / np.array(levels), forced_errors(Late(solver.tableau), levels)) < 1.3


def test_the_embedded_estimate_is_of_order_five():
    """The difference of the pair is the local error of the fourth-order method: h^5."""
    x = torch.tensor([[1.0]], dtype=F64)
    table = RK45().tableau
    errors, sizes = [], (0.1, 0.05, 0.025, 0.0125)
    for h in sizes:
        stages = []
        for c, row in zip(table.c, table.a, strict=True):
            y = x + h * sum((float(w) * k for w, k in zip(row, stages, strict=True)), torch.zeros_like(x))
            stages.append(Forced().drift(y, torch.tensor(0.3 + float(c) * h, dtype=F64)))
        errors.append(abs(float(h * sum(float(w) * k for w, k in zip(table.b_error, stages, strict=True)))))
    assert 4.7 < slope(sizes, errors) < 5.4


# ---- local errors with exact history


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_local_orders_with_exact_history(order, prediction):
    """One step from exact states with exact evaluations behind it: error of order + 1."""
    flow, x, _ = flow_case()
    mixture, process = NumpyMixture(*LAW), sf.VP()
    x, now, sizes, errors = x[:2], 0.4, (0.1, 0.05, 0.025, 0.0125), []
    lam = float(process.lam(now))
    for h in sizes:
        grid = process.time_of_lam(torch.tensor([lam + j * h for j in range(1 - order, 2)], dtype=F64))
        plan = ExponentialMultistep(order, prediction).plan(flow, grid)
        states = [x if float(t) == now else vp_flow(mixture, x, now, float(t)) for t in grid]
        states[order - 1] = x
        past = [flow.model(states[order - 1 - j], grid[order - 1 - j], prediction) for j in range(order)]
        y = plan.ratio[-1] * x + sum(plan.weights[-1, j] * past[j] for j in range(order))
        errors.append(rms(y - states[-1]))
    assert order + 0.8 < slope(sizes, errors) < order + 1.4


# ---- polynomials


def last_weights(solver, reverse, grid):
    plan = solver.plan(reverse, grid)
    return plan.weights[-1].numpy(), float(plan.ratio[-1]), float(plan.noise[-1])


@pytest.mark.parametrize("steps", [1e-4, 0.3, 3.0], ids=lambda h: f"h={h:g}")
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_polynomials_below_the_order_are_integrated_exactly(order, prediction, eta, steps):
    """N = (lam - lam0)^k for k < order, on uneven steps, against scipy's quad of the exact integral."""
    process = sf.VP()
    reverse = process.reverse(lambda x, t: -x, eta)
    lam = -0.4 + steps * np.cumsum([0.0, 0.7, 1.3, 1.0])[4 - order - 1 :]
    grid = process.time_of_lam(torch.tensor(lam, dtype=F64))
    lam = process.lam(grid).numpy()
    weights, _, _ = last_weights(ExponentialMultistep(order, prediction), reverse, grid)
    alpha, sigma = float(process.alpha(grid[-1])), float(process.sigma(grid[-1]))
    c, amp = (1 + eta**2, alpha) if prediction == "x0" else (-1.0, (1 + eta**2) * sigma)
    zero, end = lam[-2], lam[-1]
    for k in range(order):
        exact = amp * quad(lambda v, k=k: c * math.exp(-c * (end - v)) * (v - zero) ** k, zero, end, epsabs=1e-18)[0]
        nodes = (lam[-2::-1] - zero) ** k
        scale = abs(amp) * (end - zero) ** (k + 1)
        assert float(weights @ nodes) == pytest.approx(exact, rel=1e-12, abs=1e-12 * scale)
    if steps > 0.1:  # and the next power is not: the test can tell
        exact = amp * quad(lambda v: c * math.exp(-c * (end - v)) * (v - zero) ** order, zero, end)[0]
        assert abs(float(weights @ (lam[-2::-1] - zero) ** order) - exact) > 1e-4 * abs(exact)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "solver", [DPMSolverPP(3), ExponentialMultistep(2, prediction="eps"), DDIM()], ids=lambda s: s.name
)
def test_on_one_grid_of_lam_every_process_gives_the_same_samples(solver, eta):
    """x/alpha depends on the levels alone: the schedule is a change of clock and scale."""
    if isinstance(solver, DDIM):
        solver, eta = DDIM(eta), 0.0
    law = sf.problems.GaussianMixture(*LAW)
    lam = torch.linspace(-2.0, 3.0, 9, dtype=F64)
    z = torch.randn(4, 2, dtype=F64)
    out = []
    table = sf.DiscreteVP(torch.linspace(1e-4, 0.02, 1000, dtype=F64))
    for process in (sf.VP(), sf.CosineVP(), sf.RectifiedFlow(), sf.EDM(), sf.VE(sigma_max=10.0), sf.SubVP(), table):
        grid = process.time_of_lam(lam)
        x = z * process.alpha(grid[0]) * torch.exp(-lam[0])
        with torch.no_grad():
            y = sf.solve(process.reverse(law.model(process), eta), x, solver, grid=grid, seed=0).x
        out.append(y / process.alpha(grid[-1]))
    for y in out[1:]:
        torch.testing.assert_close(y, out[0], rtol=0, atol=1e-11)


# ---- stochastic: exact mean and variance by superposition


def linear_moments(eta, mean, variance, law_mean, law_variance):
    """(mean, variance) at END from those at START of the reverse equation for a Gaussian law, by scipy."""
    vp = NumpyVP()

    def rhs(t, state):
        beta, a, spread = vp.beta(t), vp.alpha(t), vp.alpha(t) ** 2 * law_variance + vp.sigma(t) ** 2
        pull = 0.5 * (1 + eta**2) * beta / spread
        drift = -0.5 * beta * state[0] + pull * (state[0] - a * law_mean)
        return [drift, 2 * (pull - 0.5 * beta) * state[1] - eta**2 * beta]

    return solve_ivp(rhs, (START, END), [mean, variance], method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]


class OneStep:
    """Replaces the library's paths by one step: W and H of one deviation times z (batch, 2)."""

    def __init__(self, monkeypatch, z):
        def walk(noise, times, event, dtype, *, areas=False, lengths=None):
            lengths = torch.diff(times).abs()
            assert len(lengths) == 1
            size = float(lengths) ** 0.5

            def increment(k):
                w, h = (z.T * size).to(dtype).unsqueeze(-1)
                return Increment(w, h / math.sqrt(12) if areas else None)

            increment.lengths = lengths
            return increment

        monkeypatch.setattr(sf.Noise, "walk", walk)


def moments_by_quadrature(monkeypatch, solver, problem, grid, mean, variance):
    """Mean and variance of the state of a linear equation with additive noise, step by step: for one-step methods that
    use areas, and powers of W."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    z = torch.tensor([(a, b) for a in nodes for b in nodes])
    weights = torch.tensor(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    OneStep(monkeypatch, torch.cat([z, z[:1]]))
    x = torch.zeros(len(z) + 1, 1, dtype=F64)
    x[-1] = 1.0  # with the noise of the first
    for ends in itertools.pairwise(grid):
        with torch.no_grad():
            y = sf.solve(problem, x, solver, grid=torch.stack(ends), seed=0).x[:, 0]
        gain, y = float(y[-1] - y[0]), y[:-1]
        shift = float(weights @ y)
        mean, variance = gain * mean + shift, gain**2 * variance + float(weights @ (y - shift) ** 2)
    return mean, variance


def without_substeps(row):
    """The method; LevyMilstein without its areas, which additive noise does not need."""
    return LevyMilstein(substeps=1) if row.name == "LevyMilstein" else row.make()


def output_moments(monkeypatch, solver, eta, steps, mean, variance, law, grid):
    """Exact mean and variance of what `solver` returns: the run of one unit of noise a sample."""
    process = sf.VP()
    if getattr(solver, "areas", False):
        times = grid(process, steps, START, END)
        return moments_by_quadrature(
            monkeypatch, solver, process.reverse(law.model(process), eta), times, mean, variance
        )
    # samples 0 to steps-1 get one unit of noise each, the next none, the last a unit of start
    TableNoise(monkeypatch, lambda nodes: torch.eye(nodes, nodes + 2, dtype=F64).unsqueeze(-1))
    x = torch.zeros(steps + 2, 1, dtype=F64)
    x[-1] = 1.0
    with torch.no_grad():
        y = sf.solve(
            process.reverse(law.model(process), eta), x, solver, steps=steps, grid=grid, t_span=(START, END), seed=0
        ).x[:, 0]
    offset = y[steps]
    gain, columns = y[steps + 1] - offset, y[:steps] - offset
    return float(gain * mean + offset), float(gain**2 * variance + columns.square().sum())


def weak_slopes(monkeypatch, solver, eta, grid, levels=(16, 32, 64, 128, 256), problem_eta=None):
    law = sf.problems.Gaussian([0.7], [0.3])
    exact = linear_moments(eta, 0.5, 0.8, 0.7, 0.3)
    errors = np.array([
        np.abs(np.array(output_moments(
            monkeypatch, solver, eta if problem_eta is None else problem_eta, n, 0.5, 0.8, law, grid
        )) - exact)
        for n in levels
    ])  # fmt: skip
    # the mean is exact where E[x_0 | x] is a martingale (eta = 1)
    exact = errors.max(0) < 1e-12
    return [math.inf if exact[k] else slope(1 / np.array(levels), errors[:, k]) for k in range(2)]


@pytest.mark.parametrize(
    ("row", "eta"),
    [(row, eta) for row in STOCHASTIC for eta in (0.5, 1.0) if row.name != "DDPM" or eta == 1.0],
    ids=lambda v: getattr(v, "name", v),
)
def test_weak_orders(monkeypatch, row, eta):
    """Of mean and variance on Gaussian data, without sampling: at least the order declared, less 0.2."""
    grid = sf.grids.logsnr if row.view == "transition" else sf.grids.uniform
    mean, variance = weak_slopes(monkeypatch, without_substeps(row), eta, grid)
    assert min(mean, variance) > row.weak_order - 0.2
    # GaussianSplit is exact for Gaussian data but for its C, the midpoint method of order 2 where f'' = 0
    assert variance < row.weak_order + 0.9 or "Split" in row.name or row.name == "StochasticMidpoint"


def test_quadrature_is_superposition(monkeypatch):
    """Both ways to the moments agree, for a method without areas; and the noise at the wrong time costs the order."""
    process, law = sf.VP(), sf.problems.Gaussian([0.7], [0.3])
    problem, solver = process.reverse(law.model(process), 1.0), StochasticHeun()
    grid = sf.grids.uniform(process, 16, START, END)
    want = output_moments(monkeypatch, solver, 1.0, 16, 0.5, 0.8, law, sf.grids.uniform)
    assert moments_by_quadrature(monkeypatch, solver, problem, grid, 0.5, 0.8) == pytest.approx(want, rel=1e-12)
    late = dataclasses.replace(SRA1(), tableau=dataclasses.replace(SRA1().tableau, c1=(0, 1), beta2=(0, 0)))
    assert weak_slopes(monkeypatch, late, 1.0, sf.grids.uniform)[1] < 1.3


def test_ddims_own_eta_is_weakly_of_order_one(monkeypatch):
    """At eta = 1 DDIM is DDPM: the moments of the reverse equation."""
    mean, variance = weak_slopes(monkeypatch, DDIM(eta=1.0), 1.0, sf.grids.logsnr, problem_eta=0.0)
    assert 0.8 < min(mean, variance) < 1.3
    mean, variance = weak_slopes(monkeypatch, DDIM(eta=0.5), 1.0, sf.grids.logsnr, problem_eta=0.0)
    assert min(mean, variance) < 0.3  # the control: between 0 and 1 it is another process


@pytest.mark.parametrize("solver", [EulerMaruyama(), DDPM(), DPMSolverPP(2)], ids=lambda s: s.name)
@pytest.mark.parametrize("scale", [1.02, 0.0])
def test_noise_of_the_wrong_size_is_not_consistent(monkeypatch, solver, scale):
    """The control of the variance: noise 2% too large, or missing."""

    class Scaled(type(solver)):
        def plan(self, problem, grid):
            plan = super().plan(problem, grid)
            return dataclasses.replace(plan, noise=scale * plan.noise + 1e-300)

    wrong = Scaled(**{f.name: getattr(solver, f.name) for f in dataclasses.fields(solver)})
    grid = sf.grids.logsnr if solver.view == "transition" else sf.grids.uniform
    assert weak_slopes(monkeypatch, wrong, 1.0, grid, levels=(64, 128, 256, 512))[1] < 0.7


# ---- stochastic: strong orders on paired paths


PATHS, FINE = 1000, 2048


@functools.cache
def fine_normals(paths=PATHS, dim=1):
    generator = torch.Generator().manual_seed(8)
    return torch.randn(FINE, paths, dim, dtype=F64, generator=generator)


class GeometricBrownianMotion(sf.SDE):
    def drift(self, x, t):
        return x

    def diffusion(self, x, t):
        return 0.87 * x

    def exact(self, x0, w):
        return x0 * torch.exp((1 - 0.5 * 0.87**2) + 0.87 * w)


class Tanh(sf.SDE):
    """X = tanh(W/2 + artanh X_0)."""

    def drift(self, x, t):
        return -0.25 * x * (1 - x**2)

    def diffusion(self, x, t):
        return 0.5 * (1 - x**2)

    def exact(self, x0, w):
        return torch.tanh(0.5 * w + math.atanh(x0))


class DoubleWell(sf.SDE):
    def drift(self, x, t):
        return x - x**3

    def diffusion(self, x, t):
        return 0.7 * (1 + 0.5 * torch.sin(3 * t)) * torch.ones_like(x)


class Turning(sf.SDE):
    """General noise that commutes: a rotating pair of multiplicative columns, exact in closed form.

    dX = (A + (B^2 + C^2)/2) X dt + B X dW_1 + C X dW_2, B = b I, C = c R (R the quarter turn), A = 0.
    """

    noise = "general"
    b, c = 0.4, 0.6
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)

    def drift(self, x, t):
        return 0.5 * (self.b**2 - self.c**2) * x

    def diffusion(self, x, t):
        return torch.stack([self.b * x, self.c * x @ self.turn.T], dim=-1)

    def exact(self, x0, w):
        grow, angle = torch.exp(self.b * w[:, :1]), self.c * w[:, 1:]
        return grow * (torch.cos(angle) * x0 + torch.sin(angle) * x0 @ self.turn.T)


def simulate(monkeypatch, sde, x0, steps, normals, pair=paired_increments, solver=None):
    TableNoise(monkeypatch, lambda nodes: pair(normals, nodes))
    with torch.no_grad():
        return sde.simulate(x0, steps=steps, seed=0, solver=solver).x


def strong_errors(monkeypatch, sde, x0, levels, **options):
    dim = x0.shape[1]
    normals = fine_normals(dim=dim)
    x0 = x0.expand(PATHS, dim).contiguous()
    if hasattr(sde, "exact"):
        exact = sde.exact(x0 if dim > 1 else float(x0[0]), normals.sum(0) / math.sqrt(FINE))
    else:
        exact = simulate(monkeypatch, sde, x0, FINE, normals)
    return [float((simulate(monkeypatch, sde, x0, n, normals, **options) - exact).abs().mean()) for n in levels]


@pytest.mark.parametrize(
    ("sde", "x0"),
    [(GeometricBrownianMotion(), [[1.0]]), (Tanh(), [[0.5]]), (Turning(), [[1.0, 0.5]])],
    ids=["GBM", "tanh", "general"],
)
def test_euler_maruyama_is_strongly_of_order_one_half(monkeypatch, sde, x0):
    """1000 paired paths: the slope's standard error is about 0.02."""
    levels = (8, 16, 32, 64, 128)
    errors = strong_errors(monkeypatch, sde, torch.tensor(x0, dtype=F64), levels)
    assert 0.35 < slope(1 / np.array(levels), errors) < 0.65


def test_euler_maruyama_is_strongly_of_order_one_for_additive_noise(monkeypatch):
    levels = (8, 16, 32, 64, 128)
    errors = strong_errors(monkeypatch, DoubleWell(), torch.tensor([[0.5]], dtype=F64), levels)
    assert 0.85 < slope(1 / np.array(levels), errors) < 1.2


class SizedByH(EulerMaruyama):
    """The mutant whose noise is h G xi."""

    def plan(self, problem, grid):
        plan = super().plan(problem, grid)
        return dataclasses.replace(plan, noise=plan.noise * torch.diff(grid).abs().sqrt())


@pytest.mark.parametrize("sde", [Tanh(), DoubleWell()], ids=lambda s: type(s).__name__)
def test_strong_orders_need_the_path(monkeypatch, sde):
    """The controls: increments of another path, and noise scaled with h."""
    levels, x0 = (8, 16, 32, 64, 128), torch.tensor([[0.5]], dtype=F64)

    def unpaired(normals, nodes):
        return normals[:nodes]

    def shifted(normals, nodes):
        return paired_increments(normals, nodes).roll(1, 0)

    assert abs(slope(1 / np.array(levels), strong_errors(monkeypatch, sde, x0, levels, pair=unpaired))) < 0.2
    errors = strong_errors(monkeypatch, sde, x0, levels, solver=SizedByH())
    assert slope(1 / np.array(levels), errors) < 0.2
    if isinstance(sde, DoubleWell):  # every increment one step late: an error of order 1/2
        assert slope(1 / np.array(levels), strong_errors(monkeypatch, sde, x0, levels, pair=shifted)) < 0.75


def merged(normals, grid, nodes, eta):
    """Unit normals of `nodes` coarse steps whose exact linear noise is that of the fine steps of `grid`."""
    vp, per = NumpyVP(), normals.shape[0] // nodes
    alpha, sigma = vp.alpha(grid), vp.sigma(grid)
    h = np.diff(np.log(alpha / sigma))
    ratio = sigma[1:] / sigma[:-1] * np.exp(-(eta**2) * h)
    std = sigma[1:] * np.sqrt(-np.expm1(-2 * eta**2 * h))
    out = []
    for i in range(0, normals.shape[0], per):
        total = torch.zeros_like(normals[0])
        for k in range(i, i + per):
            total = ratio[k] * total + std[k] * normals[k]
        out.append(total / (sigma[i + per] * math.sqrt(-math.expm1(-2 * eta**2 * h[i : i + per].sum()))))
    return torch.stack(out)


@pytest.mark.parametrize("row", STOCHASTIC, ids=names(STOCHASTIC))
def test_strong_orders_on_the_reverse_of_a_mixture(monkeypatch, row):
    """Paired with a fine run by the same method; median over 200 paths, so that flips do not count."""
    process, levels, fine = sf.VP(), (16, 32, 64, 128), 1024
    law = sf.problems.GaussianMixture(*random_mixture(3, 2, seed=6, spread=0.5))
    reverse = process.reverse(law.model(process), 1.0)
    by_lam = row.view == "transition"
    grid = (sf.grids.logsnr if by_lam else sf.grids.uniform)(process, fine, START, END)
    normals = fine_normals(200, 2)[:fine]
    x = torch.randn(200, 2, dtype=F64)

    def table(nodes):
        return merged(normals, grid.numpy(), nodes, 1.0) if by_lam else paired_increments(normals, nodes)

    # W and H of one path from the library; the others see a table
    areas = getattr(row.make(), "areas", False)
    if not areas:
        TableNoise(monkeypatch, table)
    noise = {"noise": sf.SamePath(0)} if areas else {"seed": 0}

    def run(n):
        with torch.no_grad():
            return sf.solve(reverse, x, without_substeps(row), grid=grid[:: fine // n].clone(), **noise).x

    exact = run(fine)
    errors = [float((run(n) - exact).norm(dim=1).median()) for n in levels]
    # a method of order 1.5 is of order 2 where f'' is small
    assert row.strong_order - 0.2 < slope(1 / np.array(levels), errors) < max(row.strong_order + 0.35, 2.05 * areas)


# ---- the catalogue says what the methods do


@pytest.mark.parametrize("row", FAMILY, ids=names(FAMILY))
def test_the_calls_are_those_declared(row):
    """Counted by the network itself, on the problems that the row admits."""
    process = sf.VP()
    for eta in ((0.0,) if row.order is not None else ()) + ((1.0,) if row.noise else ()):
        model = sf.problems.Gaussian([0.5, 0.1], [0.2, 0.4]).model(process)
        with torch.no_grad():
            solution = sf.solve(process.reverse(model, eta), torch.randn(3, 2), row.make(), steps=6, seed=0)
        assert model.nfe == solution.stats.nfe == solution.stats.calls == 6 * row.nfe_per_step + row.start_calls
        assert (solution.stats.steps, solution.stats.accepted, solution.stats.rejected) == (6, 6, 0)


@pytest.mark.parametrize("row", FAMILY, ids=names(FAMILY))
def test_the_rows_say_what_the_solvers_say(row):
    solver = row.make()
    assert solver.view == row.view
    assert (solver.pair is not None or getattr(solver, "adaptive", False)) == row.adaptive
    if hasattr(solver, "order") and not row.name.startswith("DDPM"):
        assert solver.order + bool(getattr(solver, "corrector", False)) == row.order
    model = sf.problems.Gaussian([0.5], [0.2]).model(sf.VP())
    noisy = sf.VP().reverse(model, 1.0)
    if row.noise:
        solver.check(noisy)
    else:
        with pytest.raises(ValueError, match="noise"):
            solver.check(noisy)
    if row.view == "transition":
        with pytest.raises(ValueError, match="transition view"):
            solver.check(Forced())
    assert sf.solvers.by_name(row.name) is row


def test_names_are_unique_and_unknown_ones_refused():
    assert len({row.name for row in FAMILY}) == len(FAMILY)
    with pytest.raises(ValueError, match="unknown solver 'Hoyn': expected one of Euler"):
        sf.solvers.by_name("Hoyn")


# ---- single steps by the papers' formulas


class Shifting(sf.SDE):
    """Noise that depends on x and t."""

    t1 = 2.0

    def drift(self, x, t):
        return torch.sin(x) * t

    def diffusion(self, x, t):
        return 0.3 + t**2 * x


def test_one_step_of_euler_maruyama():
    """x + h f(x, t) + sqrt(|h|) G(x, t) xi with everything at the step's start, in both views of the noise."""
    x, h = torch.randn(4, 2, dtype=F64), 0.25
    xi = unit_increments(5, 4, (2,), [1.0])[0]
    for t in (0.5, 1.5):
        got = sf.solve(Shifting(), x, EulerMaruyama(), grid=[t, t + h], seed=5).x
        want = x + h * torch.sin(x) * t + math.sqrt(h) * (0.3 + t**2 * x) * xi
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    vp, model = NumpyVP(), sf.problems.Gaussian([0.5, 0.1], [0.2, 0.4]).model(sf.VP())
    got = sf.solve(sf.VP().reverse(model, 0.5), x, EulerMaruyama(), grid=[0.6, 0.6 - h], seed=5).x
    drift = -0.5 * vp.beta(0.6) * (x + 1.25 * model.score(x, 0.6))
    want = x - h * drift + 0.5 * math.sqrt(h * vp.beta(0.6)) * xi
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
def test_one_step_of_ddim(eta):
    """Song et al. 2021, equations 12 and 16, in their notation: abar = alpha^2."""
    vp, model = NumpyVP(), sf.problems.Gaussian([0.5, 0.1], [0.2, 0.4]).model(sf.VP())
    x, xi = torch.randn(4, 2, dtype=F64), unit_increments(5, 4, (2,), [1.0])[0]
    got = sf.solve(sf.VP().probability_flow(model), x, DDIM(eta), grid=[0.6, 0.4], seed=5).x
    now, then = vp.alpha(0.6) ** 2, vp.alpha(0.4) ** 2
    size = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
    eps = model.eps(x, 0.6)
    x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    want = math.sqrt(then) * x0 + math.sqrt(1 - then - size**2) * eps + size * xi
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [DDPM(), DDIM(1.0), DPMSolverPP(1)], ids=lambda s: s.name)
def test_one_step_of_ddpm(solver):
    """Ho et al. 2020, equations 6 and 7, from entry n to n - 1 of a table of betas."""
    betas = np.linspace(0.01, 0.3, 8)
    process = sf.DiscreteVP(betas)
    model = sf.problems.Gaussian([0.5, 0.1], [0.2, 0.4]).model(process)
    abar, n = np.cumprod(1 - betas), 5
    x, xi = torch.randn(4, 2, dtype=F64), unit_increments(5, 4, (2,), [1.0])[0]
    problem = process.reverse(model, 1.0 if isinstance(solver, ExponentialMultistep) else 0.0)
    got = sf.solve(problem, x, solver, grid=[(n + 1) / 8, n / 8], seed=5).x
    x0 = model.x0(x, (n + 1) / 8)
    mean = (math.sqrt(abar[n - 1]) * betas[n] * x0 + math.sqrt(1 - betas[n]) * (1 - abar[n - 1]) * x) / (1 - abar[n])
    want = mean + math.sqrt((1 - abar[n - 1]) / (1 - abar[n]) * betas[n]) * xi
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


# ---- plans are the tables that are run

PLANNED = (sf.solvers.LinearSolver, GaussianSplit)


@pytest.mark.parametrize("row", [r for r in FAMILY if isinstance(r.make(), PLANNED)], ids=lambda r: r.name)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_a_run_is_its_table(row, grad):
    """Against a naive loop over the printed table, history by history."""
    process = sf.VP()
    model = sf.problems.GaussianMixture(*LAW).model(process)
    problem = process.reverse(model, 0.0 if row.order is not None and not row.noise else 1.0)
    grid = sf.grids.logsnr(process, 9)
    plan = row.make().plan(problem, grid)
    x = torch.randn(5, 2, dtype=F64)
    xi = unit_increments(3, 5, (2,), plan.lengths) if bool(plan.noise.any()) else torch.zeros(9, 5, 2)
    with torch.set_grad_enabled(grad):
        got = sf.solve(problem, x, plan, seed=3).x
        direct = sf.solve(problem, x, row.make(), grid=grid, seed=3).x
    assert torch.equal(got, direct)

    evaluate = problem.evaluator(plan.target, plan.times)
    y, base, past, step = x, x, [], 0
    for k in range(plan.nfe):
        if int(plan.step_of_row[k]) != step:
            base, step = y, int(plan.step_of_row[k])
        past.insert(0, evaluate(k, y))
        y = plan.ratio[k] * base + sum(w * e for w, e in zip(plan.weights[k], past, strict=False))
        y = y + plan.noise[k] * xi[step]
    torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)
    assert plan.nfe == 9 * row.nfe_per_step + row.start_calls == plan.times.numel()
    assert str(plan).count("\n") == plan.nfe + 1
