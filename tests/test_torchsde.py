"""torchsde behind `solve`, and our problems handed to torchsde as they are.

Exactly: bit for bit what `torchsde.sdeint` returns where it can make the same steps, and recursions written here on the
same increments elsewhere. In law: moments in closed form, tolerances of 5 standard errors.
"""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torchsde

import sdeflow as sf
from sdeflow.noise import Antithetic, SamePath
from sdeflow.pid import PID
from sdeflow.recorded import RecordedPath
from sdeflow.solvers import Torchsde
from tests.exact import F64, slope

ITO = ["euler", "milstein", "srk"]
STRATONOVICH = ["euler_heun", "heun", "midpoint", "milstein", "reversible_heun", "log_ode"]
METHODS = [*ITO, *[m for m in STRATONOVICH if m not in ITO]]
GENERAL = ["euler", "euler_heun", "heun", "midpoint", "reversible_heun", "log_ode"]
CALLS = {"heun": 2, "midpoint": 2, "log_ode": 2, "srk": 10}
AREAS = {"srk": "space-time", "log_ode": "foster"}
RATE, VOLATILITY = 0.3, 0.5


class Geometric(sf.SDE):
    """dX = a X dt + b X dW: X = x exp((a - b^2/2) t + b W), or x exp(a t + b W) where it is Stratonovich's."""

    def __init__(self, interpretation="ito", t1=1.0):
        self.interpretation, self.t1 = interpretation, t1

    def drift(self, x, t):
        return RATE * x

    def diffusion(self, x, t):
        return VOLATILITY * x

    def exact(self, x, w, t):
        return x * torch.exp((RATE - 0.5 * VOLATILITY**2 * (self.interpretation == "ito")) * t + VOLATILITY * w)


class Tanh(sf.SDE):
    """X = tanh(W/2 + artanh x)."""

    def drift(self, x, t):
        return -0.25 * x * (1 - x**2)

    def diffusion(self, x, t):
        return 0.5 * (1 - x**2)

    def exact(self, x, w, t):
        return torch.tanh(0.5 * w + torch.atanh(x))


class Wavering(sf.SDE):
    """Multiplicative noise that depends on time, on a span that does not begin at 0."""

    t0, t1 = 0.5, 2.0

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return torch.sin(3 * t) - x * t

    def diffusion(self, x, t):
        return (1 + t) * torch.cos(x) * 0.3


class Mixed(sf.SDE):
    """Three noises for two components, which do not commute."""

    noise = "general"

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return -x * t

    def diffusion(self, x, t):
        a, b = x.unbind(-1)
        one = torch.ones_like(a)
        return torch.stack([torch.stack([one, b, 0.1 * one], -1), torch.stack([0.3 * a, one, t * a], -1)], -2)


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


class Recording(sf.SDE):
    """Another SDE, recording how it is called."""

    def __init__(self, inner):
        self.inner, self.noise, self.direction = inner, inner.noise, inner.direction
        self.t0, self.t1 = inner.t0, inner.t1
        self.interpretation = inner.interpretation
        self.times, self.kinds, self.noise_times = [], set(), []

    @property
    def t_min(self):
        return self.inner.t_min

    def drift(self, x, t):
        self.times.append(float(t))
        self.kinds.add((x.dtype, tuple(x.shape), t.dtype, t.ndim))
        return self.inner.drift(x, t)

    def diffusion(self, x, t):
        self.noise_times.append(float(t))
        return self.inner.diffusion(x, t)

    def scalar_diffusion(self, times):
        return self.inner.scalar_diffusion(times)


class Plain:
    """An SDE written for torchsde."""

    def __init__(self, f, g, noise_type="diagonal", sde_type="ito"):
        self.f, self.g, self.noise_type, self.sde_type = f, g, noise_type, sde_type


def kind(method):
    return "ito" if method in ITO else "stratonovich"


def reversal(eta=1.0):
    process = sf.VP()
    return process.reverse(sf.problems.EightGaussians().model(process), eta)


def start(batch=6, dim=2, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=(batch, dim)), dtype=F64)


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


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def assert_law(x, mean, variance):
    """The sample mean and variance of x (n, ...) within 5 standard errors of the law's, component by component."""
    x, n = x.reshape(x.shape[0], -1), x.shape[0]
    fourth = ((x - x.mean(0)) ** 4).mean(0)
    spread = x.var(0)
    assert float(((x.mean(0) - mean).abs() / (spread / n).sqrt()).max()) < 5
    assert float(((spread - variance).abs() / ((fourth - spread**2) / n).sqrt()).max()) < 5


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


def by_hand(step, x, times, bm, sign=1.0):
    """The states of the one-step method `step(x, t, h, dw)` along times, on the increments of bm (clock sign * t)."""
    xs = [x]
    for a, b in itertools.pairwise(times):
        dw = bm(sign * a, sign * b)
        xs.append(step(xs[-1], torch.tensor(a, dtype=F64), b - a, dw.reshape(x.shape[0], *dw.shape[1:])))
    return torch.stack(xs)


def euler_step(problem):
    def step(x, t, h, dw):
        g = problem.diffusion(x, t)
        return x + h * problem.drift(x, t) + ((g @ dw.unsqueeze(-1))[..., 0] if problem.noise == "general" else g * dw)

    return step


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


# ---- what is called, and how


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_steps_asked_for(method):
    for steps in (1, 3, 7, 10, 49, 100):
        problem = Recording(Geometric(kind(method)))
        stats = sf.solve(problem, start(), Torchsde(method), steps=steps, seed=0).stats
        expected = CALLS.get(method, 1) * steps + (method == "reversible_heun")
        assert stats.nfe == stats.calls == len(problem.times) == expected
        assert stats.steps == steps
    assert 0 <= min(problem.times) <= max(problem.times) <= 1


def test_sdeint_alone_makes_another_step_and_another_call():
    """The faults that ours has not: ten steps of 0.1 end before 1.0, and each call looks at shapes first."""
    for dtype, dt, calls in ((F64, 0.1, 12), (torch.float32, 0.01, 102), (F64, 0.125, 9)):
        problem = Recording(Geometric())
        theirs = Plain(lambda t, y, problem=problem: problem.drift(y, t), lambda t, y: y)
        torchsde.sdeint(theirs, start(), torch.tensor([0.0, 1.0], dtype=dtype), method="euler", dt=dt)
        assert len(problem.times) == calls


def test_additive_noise_costs_srk_three_calls():
    for problem in (sf.VP(), reversal()):
        assert sf.solve(problem, start(), Torchsde("srk"), steps=10, seed=0).stats.nfe == 30


@pytest.mark.parametrize("method", METHODS)
def test_no_call_leaves_the_span(method):
    """t + (t' - t) passes t' by a rounding, for a quarter of these spans."""
    for low, high in np.random.default_rng(0).uniform([1e-3, 0.4], [0.3, 1.0], (30, 2)).tolist():
        for problem, grid in (
            (Recording(Geometric(kind(method))), [low, high]),
            (Recording(sf.VP()), [low, high]),
            (Recording(reversal()), [high, low]),
        ):
            sf.solve(problem, start(1), Torchsde(method), grid=grid, seed=0)
            times = problem.times + problem.noise_times
            assert low <= min(times) <= max(times) <= high


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


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_events_of_any_shape(method, shape):
    flat = start(4, max(1, math.prod(shape[1:])))
    problem = Recording(Wavering(kind(method)))
    got = sf.solve(problem, flat.reshape(shape), Torchsde(method), steps=5, seed=0).x
    assert {k[1] for k in problem.kinds} == {shape}
    assert torch.equal(got, sf.solve(problem, flat, Torchsde(method), steps=5, seed=0).x.reshape(shape))


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


def test_a_diffusion_that_broadcasts():
    class Row(sf.SDE):
        def __init__(self, value):
            self.value = value

        def drift(self, x, t):
            return -x

        def diffusion(self, x, t):
            return self.value

    x = start(4, 6).reshape(4, 3, 2)
    values = [0.3, torch.tensor(0.3), torch.full((2,), 0.3, dtype=F64), torch.full((4, 1, 1), 0.3, dtype=F64)]
    for method in METHODS[:3]:
        runs = [sf.solve(Row(v), x, Torchsde(method), steps=4, seed=0).x for v in values]
        for got in runs[1:]:
            torch.testing.assert_close(got, runs[0], rtol=1e-6, atol=1e-6)  # 0.3 in float32 among them


# ---- seeds


def test_a_run_is_a_function_of_the_seed_the_indices_and_the_batch():
    problem, x = Wavering(), start()

    def run(seed, x=x, **options):
        return sf.solve(problem, x, Torchsde("srk"), steps=5, seed=seed, **options).x

    first = run(1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(run(1), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(run(1, index=0), first)
    assert torch.equal(run(-1), run(2**64 - 1))
    others = [run(2), run(1, index=6), run(1, index=torch.tensor([1, 0, 2, 3, 4, 5]))]
    for i, a in enumerate([first, *others]):
        for b in others[i:]:
            assert float((a - b).abs().min()) > 1e-6
    # what torchsde cannot do: sample 0 is another in another batch
    assert float((run(1, x[:4]) - first[:4]).abs().min()) > 1e-6


def test_a_seed_that_was_drawn_is_in_the_solution():
    problem, x = Wavering(), start()
    drawn = sf.solve(problem, x, Torchsde(), steps=5)
    assert torch.equal(sf.solve(problem, x, Torchsde(), steps=5, seed=drawn.seed).x, drawn.x)
    assert sf.solve(problem, x, Torchsde(), steps=5).seed != drawn.seed


def test_without_noise_it_solves_the_flow():
    """eta = 0: srk is then a Runge-Kutta method (of order 2 for additive noise), in either direction."""
    flow, x = reversal(0.0), start()
    want = sf.solve(flow, x, sf.solvers.DOP853(), rtol=1e-10, atol=1e-10, t_span=(1.0, 0.1))
    got = sf.solve(flow, x, Torchsde("srk"), steps=200, t_span=(1.0, 0.1))
    assert got.seed is None
    torch.testing.assert_close(got.x, want.x, rtol=0, atol=1e-3)
    back = sf.solve(flow, got.x, Torchsde("srk"), steps=200, t_span=(0.1, 1.0)).x
    torch.testing.assert_close(back, x, rtol=0, atol=1e-3)


# ---- gradients


@pytest.mark.parametrize("method", METHODS)
def test_gradients_flow(method):
    problem, x = Wavering(kind(method)), start(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sf.solve(problem, x, Torchsde(method), steps=3, seed=0).x, x)
    # on fixed steps: a step's size is no function of x
    loose = Torchsde(method, first_step=0.5)
    if method != "euler":
        assert torch.autograd.gradcheck(lambda x: tolerant(problem, x, loose, tolerance=1e3, save=[1.0]).xs, x)


class Scaled(sf.SDE):
    """A drift and a diffusion with a parameter each."""

    interpretation = "stratonovich"

    def __init__(self, a, b):
        self.a, self.b = a, b

    def drift(self, x, t):
        return self.a * x

    def diffusion(self, x, t):
        return self.b * x


class ScaledGeneral(Scaled):
    noise = "general"

    def diffusion(self, x, t):
        return torch.stack([self.b * x, torch.sin(x)], -1)


@pytest.mark.parametrize(("method", "make"), [("milstein", Scaled), ("log_ode", ScaledGeneral), ("heun", Scaled)])
def test_a_graph_is_left_only_for_who_differentiates(method, make):
    """torchsde differentiates the diffusion for itself in milstein and log_ode."""
    x, number = start(2), torch.tensor(0.3, dtype=F64)
    for how in ({"steps": 3}, {"rtol": 1e-1}):
        assert not sf.solve(make(number, number), x, Torchsde(method), **how).x.requires_grad
    for i in range(2):
        leaf = number.clone().requires_grad_()
        args = [leaf if j == i else number for j in range(2)]
        solution = sf.solve(make(*args), x, Torchsde(method), steps=3, seed=0).x
        (got,) = torch.autograd.grad(solution.sum(), leaf)

        def shifted(by, i=i):
            args = [number + by if j == i else number for j in range(2)]
            return float(sf.solve(make(*args), x, Torchsde(method), steps=3, seed=0).x.sum())

        want = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
        assert abs(float(got) - want) < 1e-6 * abs(want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_modes_without_gradients(method, mode):
    for problem in (Wavering(kind(method)), Mixed(kind(method))):
        if problem.noise == "general" and method not in GENERAL:
            continue
        want = sf.solve(problem, start(), Torchsde(method), steps=5, seed=0).x
        with mode():
            x = start() + 0.0
            got = sf.solve(problem, x, Torchsde(method), steps=5, seed=0, save=True)
            if not (method == "euler" or problem.noise == "general"):
                assert bool(tolerant(problem, x, Torchsde(method), 1e-1, save=[1.0]).ok.all())
        assert not got.x.requires_grad
        assert torch.equal(got.x.clone(), want)


# ---- to a tolerance


def tolerant(problem, x, solver, tolerance, seed=0, save=None, max_steps=100_000, span=None):
    """`solve` to a tolerance with the noise of a seed."""
    march = solver.march(
        problem, x, span or problem.span, PID(tolerance, tolerance, max_steps),
        None if save is None else torch.tensor(save, dtype=F64), sf.Noise(seed, x.shape[0]),
    )  # fmt: skip
    while not march.done:
        march.advance()
    return march.solution()


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


# ---- failures


class Breaks(sf.SDE):
    """Sample 1 of 3 has no drift, or no diffusion, from `when` on."""

    t1 = 2.0

    def __init__(self, when, what):
        self.when, self.what = when, what

    def broken(self, what, x, t):
        bad = (torch.arange(3)[:, None] == 1) & (t >= self.when) & (what == self.what)
        return torch.where(bad, torch.nan, 0.5 * x)

    def drift(self, x, t):
        return self.broken("drift", x, t)

    def diffusion(self, x, t):
        return self.broken("diffusion", x, t)


@pytest.mark.parametrize("when", [0.0, 1.0])
@pytest.mark.parametrize("what", ["drift", "diffusion"])
def test_a_sample_that_breaks_has_a_status_of_its_own(what, when):
    x = torch.ones(3, 1)
    problem, non_finite, underflow = Breaks(when, what), int(sf.Status.NON_FINITE), int(sf.Status.STEP_UNDERFLOW)
    for method in ("milstein", "srk"):
        got = tolerant(problem, x, Torchsde(method), 1e-2, save=[0.0, 1.9])
        assert got.status.tolist() == [underflow, non_finite, underflow]
        assert bool(torch.isfinite(got.x).all())
        assert torch.equal(got.x, x) == (when == 0.0)
        assert torch.equal(got.xs[0], x)
        assert bool(got.xs[1].isnan().all())
        on_a_grid = sf.solve(problem, x, Torchsde(method), steps=10, throw=False)
        assert on_a_grid.status.tolist() == [0, non_finite, 0]
    with pytest.raises(sf.SolveError, match="1 of 3 samples became infinite or NaN"):
        sf.solve(problem, x, Torchsde(), rtol=1e-2)


def test_a_blow_up_is_a_step_underflow():
    """1/(1 - t) with a little noise: at tolerance 1e-3 the step is below 1e-5 long before x = 1e6."""

    class Blow(sf.SDE):
        t1 = 2.0

        def drift(self, x, t):
            return x**2

        def diffusion(self, x, t):
            return 0.01 * x

    problem, x = Blow(), torch.ones(2, 1, dtype=F64)
    got = tolerant(problem, x, Torchsde(), 1e-3, max_steps=2000)
    assert set(got.status.tolist()) == {int(sf.Status.STEP_UNDERFLOW)}
    assert float(got.x.min()) > 1e2
    assert list(sf.iterate(problem, x, Torchsde(), rtol=1e-3))[-1].t < 1.2
    further = tolerant(problem, x, Torchsde(min_step=1e-7), 1e-3, max_steps=2000)
    assert float(further.x.min()) > 2 * float(got.x.max())


def test_the_step_limit_is_a_status():
    got = tolerant(Wavering(), start(), Torchsde(), 1e-6, max_steps=5)
    assert set(got.status.tolist()) == {int(sf.Status.STEP_LIMIT)}
    assert got.stats.steps == 5
    assert bool(torch.isfinite(got.x).all())
    assert not torch.equal(got.x, start())


@pytest.mark.parametrize("how", [{"steps": 3}, {"rtol": 1e-2}], ids=["grid", "tolerance"])
def test_errors_of_the_problem_are_the_users(how):
    class Asserting(Wavering):
        def drift(self, x, t):
            raise AssertionError("mine")

    class Wide(Wavering):
        def drift(self, x, t):
            return torch.cat([x, x], 1)

    class Odd(Wavering):
        def diffusion(self, x, t):
            return torch.ones(5)

    for problem, error, message in (
        (Asserting(), AssertionError, "mine"),
        (Wide(), ValueError, r"returned \(6, 4\) for x of shape \(6, 2\)"),
        (Odd(), ValueError, r"broadcasts against x, \(6, 2\), got \(5,\)"),
    ):
        with pytest.raises(error, match=message):
            sf.solve(problem, start(), Torchsde(), **how)


# ---- refusals, before the first call


@pytest.mark.parametrize(
    ("method", "problem", "message"),
    [
        ("heun", Geometric(), "does not fit Geometric, an Ito equation .*: expected one of euler, milstein, srk$"),
        (
            "euler", Geometric("stratonovich"),
            "Geometric, a Stratonovich equation with diagonal noise: expected one of milstein, euler_heun, heun, "
            "midpoint, reversible_heun, log_ode$",
        ),
        ("srk", Mixed(), "Mixed, an Ito equation with general noise: expected one of euler$"),
        ("milstein", Mixed("stratonovich"), "general noise: expected one of euler_heun, heun, midpoint, rev"),
        ("milstein", Mixed(), "expected one of euler$"),
    ],
)  # fmt: skip
def test_a_problem_that_does_not_fit_is_refused(method, problem, message):
    problem = Recording(problem)
    Recording.__name__, before = type(problem.inner).__name__, Recording.__name__
    try:
        for how in ({"steps": 3}, {"rtol": 1e-2}):
            with pytest.raises(ValueError, match=message):
                sf.solve(problem, start(), Torchsde(method), **how)
    finally:
        Recording.__name__ = before
    assert not problem.times


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_what_fits(method):
    """As refused above: nothing that fits is."""
    for problem in (Geometric(), Geometric("stratonovich"), Mixed(), Mixed("stratonovich"), sf.VP(), reversal()):
        additive = isinstance(problem, (sf.VP, sf.ReverseSDE))
        reading = problem.interpretation
        fits = additive or reading in [k for k, ms in (("ito", ITO), ("stratonovich", STRATONOVICH)) if method in ms]
        if fits and (problem.noise == "diagonal" or method in GENERAL):
            sf.solve(problem, start(), Torchsde(method), steps=2)
        else:
            with pytest.raises(ValueError, match="does not fit"):
                sf.solve(problem, start(), Torchsde(method), steps=2)


def test_an_ode_is_refused():
    class Falling(sf.ODE):
        def drift(self, x, t):
            return -x

    with pytest.raises(ValueError, match="needs an SDE, got Falling, which has no diffusion: use Torchdiffeq"):
        sf.solve(Falling(), start(), Torchsde(), steps=3)


def test_adaptive_euler_needs_additive_noise():
    assert bool(sf.solve(sf.VP(), start(), Torchsde("euler"), rtol=1e-1).ok.all())
    for problem in (Wavering(), Mixed()):
        with pytest.raises(ValueError, match=r"euler to a tolerance needs additive noise .* milstein or srk"):
            sf.solve(problem, start(), Torchsde("euler"), rtol=1e-1)


@pytest.mark.parametrize(
    "noise",
    [SamePath(1), Antithetic(1), RecordedPath(torch.tensor([0.5, 2.0]), torch.zeros(2, 6, 2))],
    ids=lambda v: type(v).__name__,
)
def test_a_path_of_ours_is_refused(noise):
    with pytest.raises(ValueError, match="torchsde srk makes its own Brownian path"):
        sf.solve(Wavering(), start(), Torchsde(), grid=[0.5, 2.0], noise=noise)
    with pytest.raises(ValueError, match="makes its own Brownian path"):
        Torchsde().march(Wavering(), start(), (0.5, 2.0), PID(1e-2, 1e-2), None, noise.bind(6, None, "cpu"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Torchsde("rk4"), "expected one of euler, .*, log_ode, got 'rk4'"),
        (lambda: Torchsde("adjoint_reversible_heun"), "expected one of"),
        (lambda: Torchsde(min_step=0.0), "expected 0 < min_step <= first_step"),
        (lambda: Torchsde(first_step=1e-6), "expected 0 < min_step <= first_step"),
        (lambda: Torchsde(first_step=math.nan), "first_step as a number, got nan"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_torchsde_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    problem = Recording(Geometric())
    for how in ({"steps": 3}, {"rtol": 1e-3}):
        with pytest.raises(ImportError, match=r"pip install 'sdeflow\[peers\]'"):
            sf.solve(problem, start(), Torchsde(), **how)
    assert not problem.times


# ---- our problems handed to torchsde


def test_a_problem_called_directly_checks_its_shape():
    class Wide(Wavering):
        def drift(self, x, t):
            return x.sum(1, keepdim=True)

    class Odd(Wavering):
        def diffusion(self, x, t):
            return torch.ones(5)

    class Flat(Mixed):
        def diffusion(self, x, t):
            return x

    x = start()
    for call in (Wide().__call__, Wide().f):
        with pytest.raises(ValueError, match=r"the drift returned \(6, 1\) for x of shape \(6, 2\)"):
            call(0.5, x)
    with pytest.raises(ValueError, match=r"Odd.diffusion with diagonal noise returned \(5,\) for x of shape \(6, 2\)"):
        Odd().g(0.5, x)
    with pytest.raises(ValueError, match=r"Flat.diffusion with general noise returned \(6, 2\) for x"):
        Flat().g(0.5, x)


def test_the_protocols_attributes():
    assert (Geometric().sde_type, Geometric().noise_type) == ("ito", "diagonal")
    assert (Mixed("stratonovich").sde_type, Mixed().noise_type) == ("stratonovich", "general")
    process, reverse, x, t = sf.VP(), reversal(), start(), torch.tensor(0.3, dtype=F64)
    assert (process.sde_type, reverse.sde_type, reverse.noise_type) == ("ito", "ito", "diagonal")
    assert torch.equal(process.f(t, x), process.drift(x, t))
    assert torch.equal(reverse(t, x), reverse.drift(x, t))
    assert torch.equal(reverse.f(-t, x), -reverse.drift(x, t))
    assert process.g(t, x).shape == reverse.g(-t, x).shape == (6, 2)
    close(reverse.g(-t, x), reverse.diffusion(x, t).expand(6, 2))
    assert Mixed().g(t, x).shape == (6, 2, 3)

    class Constant(Wavering):
        def diffusion(self, x, t):
            return torch.tensor(0.5, dtype=F64)

    assert Constant().g(0.3, x.to(torch.float32)).dtype == torch.float32


@pytest.mark.parametrize(
    ("problem", "times"),
    [
        (Wavering(), [0.5, 2.0]),
        (Mixed(), [0.0, 1.0]),
        (sf.VP(), [0.0, 1.0]),
        (sf.VE(), [0.0, 1.0]),
        (reversal(), [1.0, 0.25]),
        (sf.EDM().reverse(lambda x, t: -x / (1 + t**2)), [80.0, 0.5]),
    ],
    ids=["diagonal", "general", "VP", "VE", "reversal", "EDM's reversal"],
)
def test_torchsde_takes_an_sde(problem, times):
    """sdeint on the ascending clock is Euler's recursion with signed steps on the problem's own, on the same path."""
    x, n = start(), 64
    down = times[1] < times[0]
    h, sign = (times[1] - times[0]) / n, -1.0 if down else 1.0
    ts = sign * torch.tensor(times, dtype=F64)
    motions = [
        torchsde.BrownianInterval(
            float(ts[0]), float(ts[1]), (6, 3 if problem.noise == "general" else 2), F64, entropy=5
        )
        for _ in range(2)
    ]
    got = torchsde.sdeint(problem, x, ts, bm=motions[0], method="euler", dt=abs(h))
    points = [times[0] + k * h for k in range(n + 1)]
    want = by_hand(euler_step(problem), x, points, motions[1], sign)
    torch.testing.assert_close(got[-1], want[-1], rtol=1e-9, atol=1e-9)


def test_torchsde_integrates_geometric_brownian_motion():
    """40000 paths of srk in 50 steps: mean e^a and variance e^2a (e^(b^2) - 1) in 5 standard errors."""
    x, ts = torch.ones(40_000, 1, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    for problem, growth in ((Geometric(), RATE), (Geometric("stratonovich"), RATE + 0.5 * VOLATILITY**2)):
        areas = "space-time" if problem.sde_type == "ito" else "none"
        bm = torchsde.BrownianInterval(0.0, 1.0, x.shape, F64, entropy=6, levy_area_approximation=areas)
        got = torchsde.sdeint(problem, x, ts, bm=bm, dt=1 / 50)[-1]
        assert_law(got, math.exp(growth), math.exp(2 * growth) * math.expm1(VOLATILITY**2))
        assert float((got - problem.exact(x, bm(0.0, 1.0), 1.0)).abs().mean()) < 5e-3


def test_torchsde_reverses_a_gaussian():
    """VP's reversal of N(0, 1), which stays N(0, 1), from t1 to 0.02: 5 standard errors of 20000 samples."""
    reverse = sf.VP(beta_max=5.0).reverse(lambda x, t: -x)
    x = torch.randn(20_000, 1, dtype=F64, generator=torch.Generator().manual_seed(3))
    ts = torch.tensor([-1.0, -0.02], dtype=F64)
    bm = torchsde.BrownianInterval(-1.0, -0.02, x.shape, F64, entropy=7, levy_area_approximation="space-time")
    assert_law(torchsde.sdeint(reverse, x, ts, bm=bm, dt=0.02)[-1], 0.0, 1.0)
    wrong = Plain(lambda s, y: -reverse.f(s, y), reverse.g)
    bm = torchsde.BrownianInterval(-1.0, -0.02, x.shape, F64, entropy=7, levy_area_approximation="space-time")
    with pytest.raises(AssertionError):  # the control: the drift of the other direction
        assert_law(torchsde.sdeint(wrong, x, ts, bm=bm, dt=0.02)[-1], 0.0, 1.0)


def test_a_seed_reaches_a_solve_to_a_tolerance():
    problem, x = Wavering(), start()
    runs = [sf.solve(problem, x, Torchsde(), rtol=1e-2, seed=s, index=i).x for s, i in ((1, 0), (1, 0), (2, 0), (1, 6))]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], tolerant(problem, x, Torchsde(), 1e-2, seed=1).x)
    assert min(float((r - runs[0]).abs().min()) for r in runs[2:]) > 1e-6


def test_a_process_of_coefficients_is_handed_over():
    process = sf.GaussianSDE.from_coefficients(lambda t: -0.5 - t, lambda t: 1 + t, 0.0, 1.0)
    x = start()
    motions = [torchsde.BrownianInterval(0.0, 1.0, (6, 2), F64, entropy=1) for _ in range(2)]
    got = torchsde.sdeint(process, x, torch.tensor([0.0, 1.0], dtype=F64), bm=motions[0], method="euler", dt=1 / 8)[-1]
    close(got, by_hand(euler_step(process), x, [k / 8 for k in range(9)], motions[1])[-1])
