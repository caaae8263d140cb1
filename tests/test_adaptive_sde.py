"""SDEs to a tolerance against a plain-Python transcription of the march, sample by sample on `BrownianPath`.

`test_adaptive_path.py` has the tolerance's scaling on more problems; here are the bookkeeping of the path, the accept
rules, every kind of noise, both directions of time, and how samples end.
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

import sdeflow as sf
from sdeflow.pid import PID
from sdeflow.solvers import (
    SRA1,
    SRA3,
    SRIW1,
    AdaptiveSDE,
    EulerMaruyama,
    LevyMilstein,
    Milstein,
    PlatenWeak2,
    ShARK,
    Splitting,
    StochasticHeun,
    StochasticMidpoint,
)
from tests.exact import F64, rms, slope

SEED = 5
ADAPTIVE = [SRA1(), SRA3(), ShARK(), SRIW1(), StochasticHeun(), AdaptiveSDE()]


def named(case):
    return getattr(case, "name", None)


class Well(sf.SDE):
    """x' = x - x^3 + cos 3t with g(t) = .7 (1 + sin(3 t)/2), on [0, 1]."""

    def drift(self, x, t):
        return x - x**3 + torch.cos(3 * t)

    def diffusion(self, x, t):
        return 0.7 * (1 + 0.5 * torch.sin(3 * t)) * torch.ones_like(x)


class Bent(sf.SDE):
    """X = sinh(Y), dY = (cos 2t - 1.2 sin Y) dt + dW: noise that depends on x and does not commute with the drift."""

    def drift(self, x, t):
        g = torch.sqrt(1 + x**2)  # cosh Y, which torch does not compute to the same bits in batches
        return g * (torch.cos(2 * t) - 1.2 * torch.sin(torch.asinh(x))) + 0.5 * x

    def diffusion(self, x, t):
        return torch.sqrt(1 + x**2)


class Pulling(Well):
    """A linear drift."""

    def drift(self, x, t):
        return -2 * x


class Burst(Well):
    """A drift that is hard to follow for a while: steps that had grown are refused."""

    def drift(self, x, t):
        return x - x**3 + 30 * torch.exp(-((40 * (t - 0.6)) ** 2)) * torch.cos(4 * x)


class Scalar(sf.SDE):
    """One noise for two coordinates."""

    noise = "general"

    def drift(self, x, t):
        return torch.stack([torch.cos(x[..., 1]), -x[..., 0]], -1)

    def diffusion(self, x, t):
        return 0.5 * torch.stack([torch.sin(x[..., 0]) + 1.5, torch.cos(x[..., 1])], -1).unsqueeze(-1)


class Matrix(sf.SDE):
    """Three noises for two coordinates, of the time alone."""

    noise = "general"

    def drift(self, x, t):
        return torch.sin(x.flip(-1)) - x**3

    def diffusion(self, x, t):
        columns = torch.tensor([[0.5, 0.2, 0.0], [-0.3, 0.4, 0.6]], dtype=x.dtype)
        shape = (*t.shape, 1) if t.ndim else ()
        return ((1 + 0.5 * torch.sin(3 * t)).reshape(shape).to(x.dtype) * columns).expand(*x.shape, 3)


class Free(sf.SDE):
    """W itself beside a component that is hard to follow: dX = (20 sin(9 X) , 0) dt + dW."""

    def drift(self, x, t):
        return torch.stack([20 * torch.sin(9 * x[..., 0]), 0 * x[..., 1]], -1)

    def diffusion(self, x, t):
        return torch.ones_like(x)


class Rates(sf.SDE):
    """x' = -r (x - cos t) with a rate a sample."""

    per_sample = ("rate",)

    def __init__(self, rate):
        self.rate = rate

    def drift(self, x, t):
        return -self.rate * (x - torch.cos(t))

    def diffusion(self, x, t):
        return 0.2 * torch.ones_like(x)


def to_tolerance(problem, x, solver, tol=1e-2, **options):
    with torch.no_grad():
        return sf.solve(problem, x, solver, **{"rtol": 0.0, "atol": tol, "seed": SEED, **options})


# ---- the transcription


class Plain:
    """The march of one sample in plain Python: floats, a node (level, position), the path asked for by time.

    A step ends at the next multiple of its length; the longest step from a time is bounded by where it stands.
    """

    def __init__(self, problem, x, span, order, weight, row=0, batch=1):
        self.problem, self.x, self.order, self.weight = problem, float(x), order, weight
        self.start, self.length = span[0], abs(span[1] - span[0])
        self.sign = 1 if span[1] > span[0] else -1
        self.path = sf.BrownianPath(SEED, (batch, 1), (0.0, self.length))
        self.row = row
        self.accepted = self.rejected = 0
        self.times = [span[0]]

    def f(self, x, t):
        return float(self.problem.drift(torch.tensor([[x]], dtype=F64), torch.tensor(t, dtype=F64)))

    def g(self, t):
        return float(self.problem.diffusion(torch.tensor([[0.0]], dtype=F64), torch.tensor(t, dtype=F64)))

    def run(self, attempt, tolerance, first, factor):
        """attempt(x, t, h, W, H) -> (new, estimate); tolerance(new - estimate, the last such)."""
        level = position = 0
        wanted, previous, last, before = first * self.length, 0.0, first * self.length, self.x
        while not (level == 0 and position == 1):
            while self.length * 2.0**-level > wanted * (1 + 1e-9):
                level, position = level + 1, 2 * position
            h = self.length * 2.0**-level
            s = position * h
            w, area = (float(v[self.row]) for v in self.path.with_area(s, s + h))
            new, estimate = attempt(self.x, self.start + self.sign * s, self.sign * h, w, area)
            low = new - estimate
            error = abs(estimate) / tolerance(low, before) * (self.length / h) ** self.weight
            seen = max(error, 0.8 * previous * (h / last) ** (1.5 - self.weight))
            scale = factor(seen, max(previous, 1e-4))
            if error <= 1:
                self.x, before, previous, last = new, low, seen, h
                self.accepted += 1
                position += 1
                while level > 0 and position % 2 == 0:
                    level, position = level - 1, position // 2
                self.times.append(self.start + self.sign * position * self.length * 2.0**-level)
            else:
                self.rejected += 1
                scale = min(scale, 0.5)
            wanted = h * scale


def pi_factor(order, grow):
    def factor(error, previous):
        return min(max(0.9 * max(error, 1e-10) ** (-0.7 / order) * previous ** (0.4 / order), 0.2), grow)

    return factor


def paper_factor(error, previous):
    return min(max(0.9 * max(error, 1e-10) ** -0.9, 1e-3), 10.0)


def heun_attempt(plain):
    def attempt(x, t, h, w, area):
        f, noise = plain.f(x, t), plain.g(t) * w
        y = x + h * f + noise
        half = 0.5 * h * (plain.f(y, t + h) - f)
        return x + h * f + half + 0.5 * (noise + plain.g(t + h) * w), half

    return attempt


def paper_attempt(plain):
    """Jolicoeur-Martineau et al. 2021, algorithm 1: x' by Euler-Maruyama, x'' by stochastic improved Euler."""

    def attempt(x, t, h, w, area):
        first = x + h * plain.f(x, t) + plain.g(t) * w
        tilde = x + h * plain.f(first, t + h) + plain.g(t + h) * w
        second = 0.5 * (first + tilde)
        return second, second - first

    return attempt


def sra1_attempt(plain):
    def attempt(x, t, h, w, area):
        i10 = 0.5 * w + area
        f, g, end = plain.f(x, t), plain.g(t), plain.g(t + h)
        other = plain.f(x + 0.75 * h * f + 1.5 * end * i10, t + 0.75 * h)
        new = x + h * (f / 3 + 2 * other / 3) + end * w + (g - end) * i10
        return new, new - (x + h * f + g * w)

    return attempt


RULES = {
    "sum": lambda rtol, atol: lambda low, before: atol + rtol * max(abs(low), abs(before)),
    "max": lambda rtol, atol: lambda low, before: max(atol, rtol * max(abs(low), abs(before))),
}
TRANSCRIBED = {
    "SRA1": (SRA1(), sra1_attempt, 1.5, 0.0, 2.0**-10, pi_factor(1.5, 2.0), "sum"),
    "StochasticHeun": (StochasticHeun(), heun_attempt, 1.0, 0.5, 2.0**-10, pi_factor(1.0, 2.0), "sum"),
    "AdaptiveSDE": (AdaptiveSDE(), paper_attempt, 1.0, 0.0, 0.01, paper_factor, "max"),
}


@pytest.mark.parametrize("tolerances", [(0.0, 0.1), (0.3, 0.02)], ids=str)
@pytest.mark.parametrize("name", TRANSCRIBED)
@pytest.mark.parametrize("downwards", [False, True])
def test_the_march_is_its_transcription(name, tolerances, downwards):
    """Every accept and reject of three samples, up in time, and down the reversal of Gaussian data."""
    solver, attempt, order, weight, first, factor, rule = TRANSCRIBED[name]
    if downwards:
        process = sf.VP(beta_min=0.5, beta_max=7.0)
        problem = process.reverse(sf.problems.Gaussian([0.7], [0.3]).model(process), 1.0)
        span = (1.0, 0.2)
    else:
        problem, span = Burst(), (0.0, 1.0)
    x = torch.linspace(-1.2, 1.5, 3, dtype=F64)[:, None]
    rtol, atol = tolerances
    got = to_tolerance(problem, x, solver, rtol=rtol, atol=atol, t_span=span)
    for row in range(3):
        plain = Plain(problem, x[row], span, order, weight, row, 3)
        plain.run(attempt(plain), RULES[rule](rtol, atol), first, factor)
        assert (plain.accepted, plain.rejected) == (int(got.stats.accepted[row]), int(got.stats.rejected[row]))
        assert plain.x == pytest.approx(float(got.x[row]), rel=1e-9, abs=1e-9)
    assert int(got.stats.rejected.sum()) > 0 or downwards  # the test sees both


def test_the_times_are_those_of_the_transcription():
    """`iterate` tells them, a time a sample."""
    x = torch.linspace(-1.2, 1.5, 3, dtype=F64)[:, None]
    seen = [[] for _ in range(3)]
    for state in sf.iterate(Burst(), x, SRA1(), rtol=0.0, atol=0.05, seed=SEED):
        for row, t in enumerate(state.t.tolist()):
            if not seen[row] or seen[row][-1] != t:
                seen[row].append(t)
    for row in range(3):
        plain = Plain(Burst(), x[row], (0.0, 1.0), 1.5, 0.0, row, 3)
        plain.run(sra1_attempt(plain), RULES["sum"](0.0, 0.05), 2.0**-10, pi_factor(1.5, 2.0))
        assert seen[row] == plain.times


# ---- the path


@pytest.mark.parametrize("solver", ADAPTIVE, ids=named)
@pytest.mark.parametrize("direction", [1, -1])
def test_with_the_factor_held_at_one_it_is_the_grid(monkeypatch, solver, direction):
    """On [0.5, 2] and down from 1; to rounding, as steps on a grid are fused."""
    monkeypatch.setattr(PID, "factor", lambda control, error, previous, order: torch.ones_like(error))
    monkeypatch.setattr(type(solver), "first_step", 1 / 32)
    if direction > 0:
        problem, span = Well(), (0.25, 0.75)
    else:
        process = sf.VP()
        problem, span = process.reverse(sf.problems.EightGaussians().model(process), 1.0), (1.0, 0.1)
    x = torch.randn(9, 2, dtype=F64)
    got = to_tolerance(problem, x, solver, tol=1e9, t_span=span)
    with torch.no_grad():
        grid = torch.linspace(*span, 33, dtype=F64)
        want = sf.solve(problem, x, solver, grid=grid, noise=sf.SamePath(SEED)).x
    assert got.stats.accepted.tolist() == [32] * 9
    assert int(got.stats.rejected.sum()) == 0
    torch.testing.assert_close(got.x, want, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        other = sf.solve(problem, x, solver, grid=grid, noise=sf.SamePath(SEED + 1)).x
    assert float((got.x - other).abs().max()) > 1e-2


@pytest.mark.parametrize("solver", [SRA1(), ShARK(), SRIW1(), StochasticHeun(), AdaptiveSDE()], ids=named)
def test_rejections_keep_the_path(monkeypatch, solver):
    """A pure-noise component at forced high rejection rates: W of the path to rounding, and standard normal."""
    factor = PID.factor
    monkeypatch.setattr(  # steps 4 times as long as wanted
        PID, "factor", lambda control, *rest: torch.clamp(4 * factor(control, *rest), 1e-3, 10.0)
    )
    x = torch.zeros(400, 2, dtype=F64)
    got = to_tolerance(Free(), x, solver, tol=0.2)
    assert float(got.stats.rejected.double().mean()) > 0.3 * float(got.stats.accepted.double().mean())
    w = sf.BrownianPath(SEED, (400, 2))(0.0, 1.0)
    torch.testing.assert_close(got.x[:, 1], w[:, 1], rtol=0, atol=1e-11)
    assert kstest(got.x[:, 1].numpy(), "norm").pvalue > 1e-4
    assert float((got.x[:, 0] - w[:, 0]).abs().max()) > 0.1  # the other component is not the path


def test_noise_drawn_anew_at_a_rejection_would_be_seen():
    """The control: refusing by the size of the increment and drawing again narrows the law."""
    rng = np.random.default_rng(0)
    x = np.zeros(4000)
    for _ in range(32):
        w = rng.normal(size=4000) / math.sqrt(32)
        again = np.abs(w) > 0.2
        w[again] = rng.normal(size=int(again.sum())) / math.sqrt(32)
        x += w
    assert kstest(x, "norm").pvalue < 1e-4


def test_antithetic_samples_see_opposite_paths():
    x = torch.zeros(6, 2, dtype=F64)
    with torch.no_grad():
        end = sf.solve(Free(), x, SRA1(), rtol=0.0, atol=0.2, noise=sf.Antithetic(SEED)).x[:, 1]
    torch.testing.assert_close(end[::2], -end[1::2], rtol=0, atol=1e-11)
    assert float(end.abs().min()) > 0


# ---- the tolerance


PATHS = 200
DECADES = (0.3, 0.03, 0.003, 3e-4)


@pytest.mark.parametrize(
    ("problem", "solver", "dim", "tolerances"),
    [
        pytest.param(Well(), SRA1(), 1, DECADES, marks=pytest.mark.slow),
        pytest.param(Well(), ShARK(), 1, DECADES, marks=pytest.mark.slow),
        pytest.param(Well(), SRA3(), 1, DECADES, marks=pytest.mark.slow),
        pytest.param(Bent(), SRIW1(), 1, DECADES, marks=pytest.mark.slow),
        pytest.param(Scalar(), SRIW1(), 2, DECADES, marks=pytest.mark.slow),
        pytest.param(Matrix(), SRA1(), 2, DECADES, marks=pytest.mark.slow),
        (Matrix(), ShARK(), 2, DECADES[:3]),
        # it takes 5/tolerance steps; where f' vanishes its estimate is blind, so that on Well the slope is 0.75
        (Pulling(), StochasticHeun(), 1, (0.4, 0.2, 0.1, 0.05)),
        (Bent(), StochasticHeun(), 1, (0.4, 0.2, 0.1, 0.05)),
    ],
    ids=["SRA1", "ShARK", "SRA3", "SRIW1", "SRIW1-scalar", "SRA1-matrix", "ShARK-matrix", "Heun", "Heun-diagonal"],
)
def test_the_error_is_proportional_to_the_tolerance(problem, solver, dim, tolerances):
    """Root mean square over 200 paths, against a fine grid of the same path by another method where there is one."""
    x = torch.full((PATHS, dim), 0.4, dtype=F64)
    fine = SRIW1() if isinstance(problem, Bent | Scalar) else SRA1() if solver == SRA3() else SRA3()
    with torch.no_grad():
        exact = sf.solve(problem, x, fine, steps=1024, noise=sf.SamePath(SEED)).x
    runs = [to_tolerance(problem, x, solver, tol) for tol in tolerances]
    errors = [rms(run.x - exact) for run in runs]
    assert abs(slope(tolerances, errors) - 1) < 0.25
    assert all(error < 0.15 * tol for error, tol in zip(errors, tolerances, strict=True))


# ---- samples that differ


@pytest.mark.parametrize("solver", [SRA1(), StochasticHeun(), AdaptiveSDE()], ids=named)
def test_one_stiff_sample_costs_the_others_nothing(solver):
    rate = torch.ones(64, 1, dtype=F64)
    x = torch.linspace(-1, 1, 64, dtype=F64)[:, None]
    calm = to_tolerance(Rates(rate), x, solver, tol=0.05)
    rate = rate.clone()
    rate[17] = 300.0
    mixed = to_tolerance(Rates(rate), x, solver, tol=0.05)
    others = torch.arange(64) != 17
    assert torch.equal(mixed.stats.nfe[others], calm.stats.nfe[others])
    assert torch.equal(mixed.x[others], calm.x[others])
    assert mixed.stats.nfe[17] > 2 * calm.stats.nfe[17]
    assert mixed.stats.calls < 1.01 * int(mixed.stats.nfe.max()) + 1


@pytest.mark.parametrize(
    ("problem", "solver", "dim"),
    [
        (Well(), SRA1(), 3),
        (Bent(), SRIW1(), 3),
        (Scalar(), SRIW1(), 2),
        (Matrix(), ShARK(), 2),
        (Bent(), StochasticHeun(), 3),
    ],
    ids=["SRA1", "SRIW1", "scalar", "matrix", "Heun"],
)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_samples_bits_do_not_depend_on_the_batch(problem, solver, dim, dtype):
    x = torch.rand(37, dim, dtype=dtype)
    whole = to_tolerance(problem, x, solver, 0.2)
    for a, b in ((0, 1), (5, 6), (1, 3), (7, 30)):
        part = to_tolerance(problem, x[a:b], solver, 0.2, index=a)
        assert torch.equal(part.x, whole.x[a:b])
        assert torch.equal(part.stats.nfe, whole.stats.nfe[a:b])


def test_the_evaluations_are_counted_by_the_model():
    process = sf.VP()
    model = sf.problems.Gaussian([0.5, 0.1], [0.2, 0.4]).model(process)
    problem = process.reverse(model, 1.0)
    for solver, calls in (
        (SRA1(), 2),
        (SRA3(), 3),
        (ShARK(), 2),
        (SRIW1(), 2),
        (StochasticHeun(), 2),
        (AdaptiveSDE(), 2),
    ):
        before = model.nfe
        run = to_tolerance(problem, torch.randn(5, 2, dtype=F64), solver, 0.3)
        assert model.nfe - before == run.stats.calls
        assert torch.equal(run.stats.nfe, calls * run.stats.steps)
        assert torch.equal(run.stats.steps, run.stats.accepted + run.stats.rejected)
        assert run.stats.calls == int(run.stats.nfe.max())


# ---- how samples end


class Breaking(sf.SDE):
    """Sample 2 meets a drift that is not finite, or blows up, after the middle of the span, or is too stiff."""

    per_sample = ("row",)

    def __init__(self, how, batch):
        self.how, self.row = how, torch.arange(batch, dtype=F64)[:, None]

    def drift(self, x, t):
        late = t > 0.5
        bad = {
            "nan": torch.where(late, math.nan, -x), "inf": torch.where(late, math.inf, -x),
            "blow-up": torch.where(late, 20 + x**4, -x), "stiff": -1e5 * (x - torch.cos(t)),
        }[self.how]  # fmt: skip
        return torch.where(self.row == 2, bad, -x)

    def diffusion(self, x, t):
        return 0.3 * torch.ones_like(x)


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("nan", sf.Status.NON_FINITE), ("inf", sf.Status.NON_FINITE), ("blow-up", sf.Status.STEP_UNDERFLOW),
        ("stiff", sf.Status.STEP_LIMIT),
    ],
)  # fmt: skip
@pytest.mark.parametrize("solver", ADAPTIVE, ids=named)
def test_a_sample_that_fails_has_a_status_of_its_own(solver, how, status):
    """And the bits and the cost of the others are those of a batch where nothing fails."""
    x = torch.linspace(0.5, 1.0, 12, dtype=F64)[:, None]
    options = {"tol": 0.5, "max_steps": 800 if how == "blow-up" else 300}
    got = to_tolerance(Breaking(how, 12), x, solver, throw=False, **options)
    if solver == StochasticHeun() and how == "blow-up":
        status = sf.Status.STEP_LIMIT  # it follows the solution longer than that
    assert got.status.tolist() == [0, 0, status, *[0] * 9]
    assert bool(torch.isfinite(got.x).all())  # of the one that failed, the last value it had
    with pytest.raises(sf.SolveError, match="1 of 12 samples"):
        to_tolerance(Breaking(how, 12), x, solver, **options)
    healthy = Breaking(how, 12)
    healthy.row = healthy.row + 100
    healthy = to_tolerance(healthy, x, solver, **options)
    others = [i for i in range(12) if i != 2]
    assert torch.equal(got.x[others], healthy.x[others])
    assert torch.equal(got.stats.nfe[others], healthy.stats.nfe[others])


def test_the_state_of_a_failed_sample_is_where_it_stopped():
    x = torch.linspace(0.5, 1.0, 12, dtype=F64)[:, None]
    *_, state = sf.iterate(Breaking("nan", 12), x, SRA1(), rtol=0.0, atol=0.05, seed=SEED)
    assert float(state.t[2]) == pytest.approx(0.5, abs=1e-9)
    assert torch.equal(state.t[[0, 11]], torch.ones(2, dtype=F64))


@pytest.mark.parametrize("solver", ADAPTIVE, ids=named)
def test_max_steps_counts_attempts(solver):
    x = torch.linspace(0.5, 1.0, 3, dtype=F64)[:, None]
    free = to_tolerance(Well(), x, solver, 0.05)
    most = int(free.stats.steps.max())
    assert torch.equal(to_tolerance(Well(), x, solver, 0.05, max_steps=most).x, free.x)
    short = to_tolerance(Well(), x, solver, 0.05, max_steps=most - 1, throw=False)
    assert (short.status == sf.Status.STEP_LIMIT).tolist() == (free.stats.steps == most).tolist()
    assert int(short.stats.steps.max()) == most - 1


# ---- refusals


@pytest.mark.parametrize(
    "solver",
    [EulerMaruyama(), Milstein(), LevyMilstein(), StochasticMidpoint(), PlatenWeak2(), Splitting(-1.0)],
    ids=named,
)
def test_methods_without_an_estimate_are_refused(solver):
    with pytest.raises(ValueError, match="has no error estimate: expected steps or grid, got rtol/atol"):
        to_tolerance(Well(), torch.ones(2, 1, dtype=F64), solver)


@pytest.mark.parametrize("save", [True, [0.5], torch.tensor([0.25, 1.0])], ids=["True", "list", "tensor"])
@pytest.mark.parametrize("solver", ADAPTIVE, ids=named)
def test_saving_is_refused(solver, save):
    with pytest.raises(ValueError, match="keeps only the end: between its steps a path is not interpolated"):
        to_tolerance(Well(), torch.ones(2, 1, dtype=F64), solver, save=save)


@pytest.mark.parametrize(
    "options", [{"rtol": -1.0, "atol": 0.1}, {"rtol": 0.0, "atol": 0.0}, {"rtol": math.nan, "atol": 0.1}]
)
def test_bad_tolerances_are_refused(options):
    with pytest.raises(ValueError, match=r"expected (rtol|atol|rtol or atol)"):
        to_tolerance(Well(), torch.ones(2, 1, dtype=F64), SRA1(), **options)


def test_noise_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="AdaptiveSDE integrates additive noise; that of Bent is diagonal"):
        to_tolerance(Bent(), torch.ones(2, 1, dtype=F64), AdaptiveSDE())


# ---- laws, dtypes, gradients


def test_the_adaptive_sampler_on_the_reversal_of_gaussian_data():
    """Mean and variance within 4 standard errors of the exact law, for two tolerances."""
    process = sf.VP()
    problem = process.reverse(sf.problems.Gaussian([0.5, -0.2], [0.3, 0.05]).model(process), 1.0)
    count = 4000
    for tol in (0.0078, 0.002):
        x = process.prior_sample((count, 2), seed=1, dtype=F64)
        got = to_tolerance(problem, x, AdaptiveSDE(), rtol=0.02, atol=tol)
        alpha, sigma = (float(f(process.t_min)) for f in (process.alpha, process.sigma))
        for i, (mean, variance) in enumerate(((0.5, 0.3), (-0.2, 0.05))):
            variance = alpha**2 * variance + sigma**2
            assert abs(float(got.x[:, i].mean()) - alpha * mean) < 4 * math.sqrt(variance / count)
            assert abs(float(got.x[:, i].var()) / variance - 1) < 4 * math.sqrt(2 / count)


@pytest.mark.parametrize("solver", ADAPTIVE, ids=named)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_dtypes(solver, dtype, tolerance):
    """Of the path, and of the answer to a tolerance that is above their spacing."""
    x = torch.tensor([[0.5, -0.25], [1.0, 0.125]], dtype=F64)
    want = to_tolerance(Well(), x, solver, 0.05)
    got = to_tolerance(Well(), x.to(dtype), solver, 0.05)
    assert got.x.dtype == dtype
    torch.testing.assert_close(got.x.double(), want.x, rtol=0, atol=0.05 + tolerance)


@pytest.mark.parametrize("event", [(), (3,), (2, 4)], ids=str)
@pytest.mark.parametrize("solver", ADAPTIVE, ids=named)
def test_shapes(solver, event):
    x = torch.rand(5, *event, dtype=F64)
    got = to_tolerance(Well(), x, solver, 0.1)
    assert got.x.shape == x.shape
    assert bool(got.ok.all())


@pytest.mark.parametrize(
    ("solver", "problem"),
    [(SRA1(), Well()), (SRIW1(), Bent()), (StochasticHeun(), Bent())],
    ids=["SRA1", "SRIW1", "Heun"],
)
def test_gradients_flow_through_the_steps_that_were_made(monkeypatch, solver, problem):
    """With the controller held: finite differences of the same steps."""
    monkeypatch.setattr(PID, "factor", lambda control, error, previous, order: torch.ones_like(error))
    monkeypatch.setattr(type(solver), "first_step", 1 / 8)
    x = torch.tensor([[0.4], [0.8]], dtype=F64, requires_grad=True)

    def end(x):
        return sf.solve(problem, x, solver, rtol=0.0, atol=1e9, seed=SEED).x.square().sum()

    (got,) = torch.autograd.grad(end(x), x)
    with torch.no_grad():
        want = (end(x + 1e-6) - end(x - 1e-6)) / 2e-6
    assert float(got.sum()) == pytest.approx(float(want), rel=1e-6)
