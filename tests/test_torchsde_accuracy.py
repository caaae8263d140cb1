"""torchsde behind `solve`: its steps, their orders and laws, and errors to a tolerance.

Exactly: bit for bit what `torchsde.sdeint` returns where it can make the same steps, and recursions written by hand on
the same increments elsewhere. In law: moments in closed form, tolerances of 5 standard errors.
"""

import math

import numpy as np
import pytest
import torch
import torchsde

import sdeflow as sf
from sdeflow.solvers import Torchsde
from tests.exact import F64, slope
from tests.torchsde_cases import (
    CALLS,
    GENERAL,
    METHODS,
    RATE,
    STRATONOVICH,
    VOLATILITY,
    Geometric,
    Mixed,
    Plain,
    Recording,
    Wavering,
    assert_law,
    by_hand,
    close,
    euler_step,
    kind,
    reversal,
    start,
    tolerant,
)


class Tanh(sf.SDE):
    """X = tanh(W/2 + artanh x)."""

    def drift(self, x, t):
        return -0.25 * x * (1 - x**2)

    def diffusion(self, x, t):
        return 0.5 * (1 - x**2)

    def exact(self, x, w, t):
        return torch.tanh(0.5 * w + torch.atanh(x))


class Correlated(sf.SDE):
    """Additive noise of two components on three, declared."""

    noise, additive = "general", True

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return -x * t

    def diffusion(self, x, t):
        rows = torch.tensor([[1.0, 0.0], [0.5, -0.3], [0.0, 2.0]], dtype=F64)
        return ((1 + t) * rows).expand(*x.shape, 2)


class Paths:
    """The Brownian motions that solves make."""

    def __init__(self, original):
        self.original, self.made = original, []

    def __call__(self):
        """One equal to the last, not asked yet: its numbers depend on what is asked in which order."""
        args, options, _ = self.made[-1]
        return self.original(*args, **options)

    def make(self, *args, **options):
        self.made.append((args, options, self.original(*args, **options)))
        return self.made[-1][2]

    @property
    def used(self):
        """The last one itself."""
        return self.made[-1][2]


@pytest.fixture
def path(monkeypatch):
    paths = Paths(torchsde.BrownianInterval)
    monkeypatch.setattr(torchsde, "BrownianInterval", paths.make)
    return paths


# ---- the steps are torchsde's


@pytest.mark.parametrize("method", METHODS)
def test_a_uniform_grid_is_what_sdeint_returns(method, path):
    """Steps of 3/32, which add up to the span exactly."""
    problem, x = Wavering(kind(method)), start()
    got = sf.solve(problem, x, Torchsde(method), steps=16, seed=3, save=True)
    theirs = Plain(lambda t, y: problem.drift(y, t), lambda t, y: problem.diffusion(y, t), sde_type=kind(method))
    want = torchsde.sdeint(theirs, x, got.ts, bm=path(), method=method, dt=3 / 32)
    assert torch.equal(got.xs, want)
    assert not torch.equal(got.x, sf.solve(problem, x, Torchsde(method), steps=16, seed=4).x)


@pytest.mark.parametrize("method", GENERAL)
def test_general_noise_is_what_sdeint_returns(method, path):
    problem, x = Mixed(kind(method)), start()
    got = sf.solve(problem, x, Torchsde(method), steps=8, seed=3, save=True)
    theirs = Plain(lambda t, y: problem.drift(y, t), lambda t, y: problem.diffusion(y, t), "general", kind(method))
    want = torchsde.sdeint(theirs, x, got.ts, bm=path(), method=method, dt=1 / 8)
    assert torch.equal(got.xs, want)


@pytest.mark.parametrize("method", METHODS)
def test_additive_noise_is_what_sdeint_returns(method, path):
    """srk and milstein on torchsde's formulas for additive noise, without its matrices (batch, d, d)."""
    problem, x = sf.VP(), start(dim=3)
    got = sf.solve(problem, x, Torchsde(method), steps=8, grid=sf.grids.uniform, seed=3, save=True)
    theirs = Plain(
        lambda t, y: problem.drift(y, t),
        lambda t, y: problem.diffusion(y, t) * torch.eye(3, dtype=F64).expand(6, 3, 3),
        "additive",
        kind(method),
    )
    want = torchsde.sdeint(theirs, x, got.ts, bm=path(), method=method, dt=1 / 8)
    close(got.xs, want)


@pytest.mark.parametrize("method", METHODS)
def test_declared_additive_noise_is_what_sdeint_returns(method, path):
    x = start(dim=3)
    for interpretation in ("ito", "stratonovich"):
        problem = Correlated(interpretation)
        got = sf.solve(problem, x, Torchsde(method), steps=8, seed=3, save=True)
        theirs = Plain(
            lambda t, y: -y * t, lambda t, y, problem=problem: problem.diffusion(y, t), "additive", kind(method)
        )
        assert torch.equal(got.xs, torchsde.sdeint(theirs, x, got.ts, bm=path(), method=method, dt=1 / 8))
    assert got.stats.nfe == (24 if method == "srk" else CALLS.get(method, 1) * 8 + (method == "reversible_heun"))


UNEVEN = [0.5, 0.51, 0.7, 1.3, 1.31, 2.0]


def heun_step(problem):
    def step(x, t, h, dw):
        f, g = problem.drift(x, t), problem.diffusion(x, t)
        y = x + h * f + g * dw
        return x + h / 2 * (f + problem.drift(y, t + h)) + (g + problem.diffusion(y, t + h)) / 2 * dw

    return step


def milstein_step(problem):
    def step(x, t, h, dw):
        slope = -(1 + t) * torch.sin(x) * 0.3
        g = problem.diffusion(x, t)
        return x + h * problem.drift(x, t) + g * dw + g * slope * (dw**2 - h) / 2

    return step


@pytest.mark.parametrize(
    ("method", "problem", "step"),
    [
        ("euler", Wavering(), euler_step),
        ("milstein", Wavering(), milstein_step),
        ("heun", Wavering("stratonovich"), heun_step),
    ],
)
def test_an_uneven_grid_is_stepped_point_by_point(method, problem, step, path):
    x = start()
    got = sf.solve(problem, x, Torchsde(method), grid=UNEVEN, seed=1, save=True)
    close(got.xs, by_hand(step(problem), x, UNEVEN, path()))


def test_general_noise_on_an_uneven_grid(path):
    problem, x, times = Mixed(), start(), [0.0, 0.1, 0.5, 0.52, 1.0]
    got = sf.solve(problem, x, Torchsde("euler"), grid=times, seed=1, save=True)
    close(got.xs, by_hand(euler_step(problem), x, times, path()))


def test_general_noise_of_images(path):
    class Kicked(sf.SDE):
        noise = "general"

        def drift(self, x, t):
            return -x

        def diffusion(self, x, t):
            return torch.stack([x, torch.ones_like(x)], -1)

    x = start(4, 12).reshape(4, 3, 2, 2)
    got = sf.solve(Kicked(), x, Torchsde("euler"), steps=1, seed=0).x
    w = path()(0.0, 1.0).reshape(4, 2, 1, 1, 1)
    close(got, x - x + x * w[:, 0] + w[:, 1])


@pytest.mark.parametrize(("method", "step"), [("euler", euler_step), ("heun", heun_step)])
def test_a_reversal_runs_down_on_its_own_clock(method, step, path):
    problem, x = reversal(), start()
    grid = sf.grids.power(problem, 12)
    got = sf.solve(problem, x, Torchsde(method), grid=grid, seed=1, save=True)
    close(got.xs, by_hand(step(problem), x, grid.tolist(), path(), sign=-1.0))
    # the control: noise without drift reversal is something else
    wrong = by_hand(lambda x, t, h, dw: step(problem)(x, t, -h, dw), x, grid.tolist(), path(), sign=-1.0)
    assert float((got.x - wrong[-1]).abs().max()) > 0.1


def test_a_changed_state_restarts_the_memory(path):
    """Without its memory a step of reversible_heun is one of heun."""
    problem, x = Wavering("stratonovich"), start()
    grid, noise = torch.tensor(UNEVEN, dtype=F64), sf.Noise(2, 6)
    restarted, memory = (Torchsde("reversible_heun").stepper(problem, x, grid, noise) for _ in range(2))
    y = z = x
    for i in range(5):
        y, z = restarted.step(i, y.clone()), memory.step(i, z)
    close(y, sf.solve(problem, x, Torchsde("heun"), grid=grid, seed=2).x)
    assert torch.equal(z, sf.solve(problem, x, Torchsde("reversible_heun"), grid=grid, seed=2).x)
    assert float((y - z).abs().max()) > 1e-4
    assert (restarted.calls, memory.calls) == (10, 6)


# ---- orders


@pytest.mark.parametrize(
    ("method", "problem", "order"),
    [
        ("euler", Geometric(), 0.5),
        ("milstein", Tanh(), 1.0),
        ("srk", Tanh(), 1.5),
        *[(m, Geometric("stratonovich"), 1.0) for m in STRATONOVICH],
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_strong_orders_on_the_path(method, problem, order, path):
    """2000 paths, fresh ones on every grid: a mean error is known to 3%, the slope to 0.02."""
    x, errors, levels = torch.full((2000, 1), 0.5, dtype=F64), [], np.array([8, 16, 32, 64])
    for steps in levels.tolist():
        got = sf.solve(problem, x, Torchsde(method), steps=steps, seed=steps).x
        errors.append(float((got - problem.exact(x, path()(0.0, 1.0), 1.0)).abs().mean()))
    assert abs(slope(1 / levels, errors) - order) < 0.13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_states_keep_their_dtype_and_times_are_float64(method, dtype, path):
    problem = Recording(Geometric(kind(method)))
    x = torch.ones(5, 3, dtype=dtype)
    got = sf.solve(problem, x, Torchsde(method), steps=300, seed=0, save=True)
    assert got.x.dtype == got.xs.dtype == dtype
    assert problem.kinds == {(dtype, (5, 3), F64, 0)}
    assert set(got.ts[:-1].tolist()) <= set(problem.times)
    exact = problem.inner.exact(x.to(F64), path()(0.0, 1.0).to(F64), 1.0)
    # of 16 bits, the state goes on unrounded: 300 roundings of increments of 0.03 would leave 0.1
    torch.testing.assert_close(got.x.to(F64), exact, rtol=0.05 if method == "euler" else 0.02, atol=0)


# ---- laws


def test_euler_has_the_moments_of_its_recursion():
    """E X_n = (1 + a h)^n and E X_n^2 = ((1 + a h)^2 + b^2 h)^n exactly, from X_0 = 1; 5 standard errors."""
    n, h = 20, 0.05
    x = sf.solve(Geometric(), torch.ones(40_000, 1, dtype=F64), Torchsde("euler"), steps=n, seed=5).x
    mean = (1 + RATE * h) ** n
    variance = ((1 + RATE * h) ** 2 + VOLATILITY**2 * h) ** n - mean**2
    assert_law(x, mean, variance)
    with pytest.raises(AssertionError):  # the control: the same noise 5% louder
        assert_law(x, mean, 1.05**2 * variance)


@pytest.mark.parametrize("method", METHODS)
def test_geometric_brownian_motion_has_its_law(method):
    """Mean e^c and variance e^2c (e^(b^2) - 1), c = a + b^2/2 for Stratonovich's; the steps' bias is below one
    standard error; 5 standard errors."""
    problem = Geometric(kind(method))
    steps = 400 if method == "euler" else 100
    x = sf.solve(problem, torch.ones(40_000, 1, dtype=F64), Torchsde(method), steps=steps, seed=6).x
    growth = RATE + 0.5 * VOLATILITY**2 * (problem.interpretation == "stratonovich")
    mean, variance = math.exp(growth), math.exp(2 * growth) * math.expm1(VOLATILITY**2)
    assert_law(x, mean, variance)
    other = growth + 0.5 * VOLATILITY**2 * (1 if problem.interpretation == "ito" else -1)
    with pytest.raises(AssertionError):  # the control: the equation's other reading
        assert_law(x, math.exp(other), variance)


@pytest.mark.parametrize("method", METHODS)
def test_additive_noise_has_the_law_of_the_process(method):
    """VP from a point: N(alpha x, sigma^2), on a grid so fine that the bias is below half a standard error; 5 of them.

    Ito and Stratonovich are one here, so that every method takes the process.
    """
    process, x = sf.VP(beta_max=5.0), torch.tensor([[1.0, -2.0]], dtype=F64).expand(20_000, 2).contiguous()
    steps = 400 if method in ("euler", "milstein", "euler_heun") else 60
    got = process.simulate(x, solver=Torchsde(method), steps=steps, grid=sf.grids.uniform, seed=7).x
    end = torch.tensor(1.0, dtype=F64)
    assert_law(got, process.alpha(end) * x[0], process.sigma(end) ** 2)


@pytest.mark.parametrize("method", ["euler", "srk", "heun"])
def test_a_reversal_of_gaussian_data_ends_in_its_law(method):
    """Data N(0.5, 0.2^2), the score exact, from the true law at t1: at t the law is N(0.5 alpha, v), v = 0.04 alpha^2 +
    sigma^2. Steps in proportion to the variance; the bias is below a standard error; 5 of them."""
    process = sf.VP(beta_max=5.0)

    def law(t):
        return 0.5 * process.alpha(t), 0.04 * process.alpha(t) ** 2 + process.sigma(t) ** 2

    def score(x, t):
        mean, variance = law(t)
        return -(x - mean) / variance

    mean, variance = law(torch.tensor(1.0, dtype=F64))
    x = mean + variance.sqrt() * torch.randn(10_000, 1, dtype=F64, generator=torch.Generator().manual_seed(1))
    steps = 1000 if method == "euler" else 150
    got = sf.solve(process.reverse(score), x, Torchsde(method), steps=steps, seed=8, t_span=(1.0, 0.02)).x
    assert_law(got, *law(torch.tensor(0.02, dtype=F64)))


# ---- to a tolerance


def error_of(problem, x, got, bm, t=1.0):
    return float((got - problem.exact(x, bm(0.0, t), t)).abs().mean())


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_error_follows_the_tolerance(method, path):
    problem, x = Geometric(kind(method)), torch.ones(20, 1, dtype=F64)
    loose, tight = (tolerant(problem, x, Torchsde(method), tolerance, seed=2) for tolerance in (1e-2, 1e-4))
    assert bool(loose.ok.all())
    assert bool(tight.ok.all())
    errors = [error_of(problem, x, got.x, path.used) for got in (loose, tight)]
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.01
    assert tight.stats.accepted > loose.stats.accepted


@pytest.mark.parametrize("method", ["milstein", "srk", "heun", "reversible_heun"])
def test_saved_times_are_on_the_path(method, path):
    problem, x, solver = Geometric(kind(method)), torch.ones(20, 1, dtype=F64), Torchsde(method, first_step=1e-5)
    saved = [0.9, 0.0, 0.3, 0.9, 1.0, 0.3 + 1e-8]  # two of them closer than any step may be
    got = tolerant(problem, x, solver, 1e-4, seed=2, save=saved)
    assert bool(got.ok.all())
    assert got.ts.tolist() == saved
    assert torch.equal(got.xs[1], x)
    assert torch.equal(got.xs[4], got.x)
    for t, state in zip(saved, got.xs, strict=True):
        if t > 0:
            assert error_of(problem, x, state, path.used, t) < 0.01
    assert error_of(problem, x, got.xs[2], path.used, 0.31) > 0.02  # the control: the path a little later
    # beyond a saved time the step goes on with its size: to grow from 1e-5 by 1.4 takes 20 steps, each time
    free = tolerant(problem, x, solver, 1e-4, seed=2).stats.steps
    assert got.stats.steps < free + 20


def test_a_reversal_to_a_tolerance_runs_down(path):
    """The law at the end, N(0, 1) throughout: 5 standard errors of 4000 samples; tolerance 1e-2, bias below them."""
    process = sf.VP(beta_max=5.0)
    problem = Recording(process.reverse(lambda x, t: -x))
    x = torch.randn(4000, 1, dtype=F64, generator=torch.Generator().manual_seed(3))
    got = tolerant(problem, x, Torchsde("srk"), 1e-2, seed=4, save=[0.7, 0.2], span=(1.0, 0.01))
    assert bool(got.ok.all())
    assert max(problem.times) == 1.0
    assert 0.01 <= min(problem.times) < 0.3
    for state in (*got.xs, got.x):
        assert_law(state, 0.0, 1.0)
    assert float((got.xs[0] - got.xs[1]).abs().mean()) > 0.1


def test_the_law_to_a_tolerance():
    """4000 paths to 1e-3, whose bias is far below the 5 standard errors."""
    problem = Geometric()
    got = tolerant(problem, torch.ones(4000, 1, dtype=F64), Torchsde("srk"), 1e-3, seed=3).x
    assert_law(got, math.exp(RATE), math.exp(2 * RATE) * math.expm1(VOLATILITY**2))
    with pytest.raises(AssertionError):
        assert_law(got, math.exp(RATE + 0.5 * VOLATILITY**2), math.exp(2 * RATE) * math.expm1(VOLATILITY**2))


@pytest.mark.parametrize("method", METHODS)
def test_the_stats_add_up(method):
    problem = Recording(sf.VP() if method == "euler" else Wavering(kind(method)))
    stats = tolerant(problem, start(), Torchsde(method, first_step=0.5), 1e-2).stats
    assert stats.nfe == stats.calls == len(problem.times)
    assert stats.steps == stats.accepted + stats.rejected
    assert stats.nfe == 3 * CALLS.get(method, 1) * stats.steps + (method == "reversible_heun")
    assert stats.accepted > 3
    assert stats.rejected > 0
    easy = tolerant(problem, start(), Torchsde(method, first_step=0.01), 1e3).stats
    assert easy.rejected == 0


def test_options_reach_torchsde():
    problem, x = Wavering(), start()
    small = tolerant(problem, x, Torchsde(first_step=1e-4), 1e-1).stats
    assert small.accepted > tolerant(problem, x, Torchsde(first_step=1e-2), 1e-1).stats.accepted > 3


def test_solve_to_a_tolerance_tells_its_seed():
    problem, x = Wavering(), start()
    got = sf.solve(problem, x, Torchsde(), rtol=1e-2, save=[1.0])
    same, other = (tolerant(problem, x, Torchsde(), 1e-2, seed=got.seed + i, save=[1.0]) for i in range(2))
    assert torch.equal(got.x, same.x)
    assert torch.equal(got.xs, same.xs)
    assert float((other.x - same.x).abs().min()) > 1e-6
    states = list(sf.iterate(problem, x, Torchsde(), rtol=1e-2))
    assert [s.t for s in states] == [0.5, 2.0]
    assert states[1].step > 3
