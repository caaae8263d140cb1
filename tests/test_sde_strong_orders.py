"""Strong orders of methods for SDEs on one path, up and down in time.

Errors are against closed forms in W, or against Taylor's scheme of strong order 1.5 written here, on the same path.
"""

import functools
import math

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.bridge import Increment
from sdeflow.calculus import noise_kind
from sdeflow.noise import Noise, NoiseSource
from sdeflow.solvers import SRA1, SRA3, SRIW1, AdaptiveSDE, EulerMaruyama, LevyMilstein, Milstein, ShARK, StochasticHeun
from sdeflow.solvers.stochastic import StochasticSolver
from sdeflow.solvers.stochastic_rk import SRA
from tests.exact import F64, random_mixture, slope
from tests.sde_solver_cases import (
    Areas,
    Commuting,
    Cooling,
    CorrelatedWell,
    CrossedDiagonal,
    Geometric,
    ItoDrift,
    ScalarBent,
    Sinh,
    StratonovichMilstein,
    Tanh,
    WithoutArea,
    changed,
    named,
    quick,
    rows,
)

SEED, PATHS = 7, 400
LEVELS = (8, 16, 32, 64, 128)


# ---- strong orders: the references


class Wave(sf.SDE):
    """X = arctan(p W + tan x)."""

    start = (1.0, 0.4)
    p = 0.4

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        ito = -(self.p**2) * torch.sin(x) * torch.cos(x) ** 3
        return ito if self.interpretation == "ito" else torch.zeros_like(x)

    def diffusion(self, x, t):
        return self.p * torch.cos(x) ** 2

    def exact(self, x, w):
        return torch.arctan(self.p * w + torch.tan(x))


def whole_path(m, paths=PATHS):
    """W on [0, 1] of the path that SamePath(SEED) is."""
    return sf.BrownianPath(SEED, (paths, m))(0.0, 1.0)


@functools.cache
def fine_path(m, steps, paths=PATHS):
    """(W, H) of all steps, (steps, paths, m) each."""
    walk = sf.Noise(SEED, paths).walk(torch.linspace(0, 1, steps + 1, dtype=F64), (m,), F64, areas=True)
    parts = [walk(k) for k in range(steps)]
    w, h = torch.stack([p.w for p in parts]), torch.stack([p.h for p in parts])
    torch.testing.assert_close(w.sum(0), whole_path(m, paths), rtol=0, atol=1e-11)
    return w, h


@functools.cache
def exact_areas(m, steps=2**14):
    """The end of `Areas`: int W_1 dW_2 by its conditional mean on a fine grid, whose variance is 1/(20 steps)."""
    walk = sf.Noise(SEED, PATHS).walk(torch.linspace(0, 1, steps + 1, dtype=F64), (m,), F64, areas=True)
    path, integral = torch.zeros(PATHS, m, dtype=F64), torch.zeros(PATHS, dtype=F64)
    for k in range(steps):
        w, h = walk(k)
        integral = integral + (path[:, 0] + 0.5 * w[:, 0] + h[:, 0]) * w[:, 1] - w[:, 0] * h[:, 1]
        path = path + w
    torch.testing.assert_close(path, whole_path(m), rtol=0, atol=1e-11)
    w, c = path, Areas.size
    return torch.stack([torch.sinh(c * w[:, 0]), torch.sinh(c * (integral + (0.5 * w[:, 2] if m == 3 else 0)))], -1)


class Remembered(NoiseSource):
    """SamePath(SEED), which makes the increments of each equal grid once."""

    def bind(self, batch, index, device):
        return RememberedNoise(SEED, batch, index=index, device=device, one_path=True)


class RememberedNoise(sf.Noise):
    def walk(self, times, event, dtype, *, areas=False, lengths=None):
        steps = times.numel() - 1
        walk = super().walk(times, event, dtype, areas=True)
        if steps > 1024:
            return walk
        key = (self.index.numel(), tuple(times.tolist()), tuple(event), dtype)
        if key not in INCREMENTS:
            INCREMENTS[key] = [walk(k) for k in range(steps)]
        parts = INCREMENTS[key]

        def remembered(k):
            return parts[k] if areas else Increment(parts[k].w, None)

        remembered.lengths = walk.lengths
        return remembered


INCREMENTS = {}


def test_what_is_remembered_is_the_path():
    x = torch.tensor([[0.5, -0.2]] * 3, dtype=F64)
    for solver in (SRIW1(), StochasticHeun(), EulerMaruyama()):
        for _ in range(2):
            remembered = sf.solve(Tanh(), x, solver, steps=8, noise=Remembered()).x
            assert torch.equal(remembered, sf.solve(Tanh(), x, solver, steps=8, noise=sf.SamePath(SEED)).x)


def errors(solver, sde, x, exact, levels=LEVELS, **options):
    """Mean absolute errors at the end."""
    with torch.no_grad():
        ends = [sf.solve(sde, x, solver, steps=n, noise=Remembered(), **options).x for n in levels]
    return [float((end - exact).abs().mean()) for end in ends]


def strong_order(solver, sde, x=None, exact=None, levels=LEVELS):
    if x is None:
        x = torch.tensor(sde.start, dtype=F64).expand(PATHS, -1).contiguous()
        exact = sde.exact(x, whole_path(2 if sde.noise == "general" else x.shape[1]))
    return slope(1 / np.array(levels), errors(solver, sde, x, exact, levels))


# ---- strong orders: diagonal noise in closed form

CLOSED = [Tanh(), Tanh("stratonovich"), Geometric(), Geometric("stratonovich"), Sinh(), Wave("stratonovich")]


@pytest.mark.parametrize("sde", CLOSED, ids=lambda s: f"{type(s).__name__}-{s.interpretation}")
@pytest.mark.parametrize("row", rows("diagonal"), ids=named)
def test_strong_orders_for_diagonal_noise(row, sde):
    """Drift and noise of these commute: they tell 1/2 from 1, and 1.5 by the iterated integral of the noise."""
    assert abs(strong_order(quick(row), sde) - row.strong_diagonal) < 0.15


@pytest.mark.parametrize("sde", CLOSED, ids=lambda s: f"{type(s).__name__}-{s.interpretation}")
def test_central_milstein_is_of_strong_order_one(sde):
    assert abs(strong_order(Milstein("central"), sde) - 1) < 0.15


def test_controls_of_diagonal_noise():
    """A one-sided difference in Stratonovich's Milstein, and Ito's drift in a Stratonovich method."""
    assert strong_order(StratonovichMilstein(True), Tanh()) > 0.85
    assert strong_order(StratonovichMilstein(False), Tanh()) < 0.75
    for sde in (Tanh(), Geometric()):
        assert abs(strong_order(ItoDrift(), sde)) < 0.2
        assert strong_order(ItoDrift(), type(sde)("stratonovich")) < 0.2


# ---- strong orders: noise that does not commute with the drift


class Additive(sf.SDE):
    """dX = f(X, t) dt + g(t) dW with the derivatives that Taylor's scheme needs."""

    def __init__(self, name, start, f, derivatives, g, slope):
        self.name, self.start, self.f, self.derivatives = name, start, f, derivatives
        self.g, self.slope = g, slope

    def drift(self, x, t):
        return self.f(x, t)

    def diffusion(self, x, t):
        return self.g(t) * torch.ones_like(x)

    def reference(self, steps=4096):
        """Taylor's scheme of strong order 1.5 (Kloeden and Platen 1992, section 10.4)."""
        w, h = (v.numpy() for v in fine_path(1, steps))
        size, x = 1 / steps, np.full((PATHS, 1), self.start)
        for k in range(steps):
            t = k * size
            f, g, i10 = self.f(x, t), self.g(t), size * (0.5 * w[k] + h[k])
            f_t, f_x, f_xx = self.derivatives(x, t)
            x = x + f * size + g * w[k] + f_x * g * i10 + self.slope(t) * (size * w[k] - i10)
            x = x + 0.5 * size**2 * (f_t + f * f_x + 0.5 * g * g * f_xx)
        return torch.tensor(x)


def cos(v):
    return torch.cos(v) if isinstance(v, torch.Tensor) else np.cos(v)


def sin(v):
    return torch.sin(v) if isinstance(v, torch.Tensor) else np.sin(v)


def beta(t):
    return 0.1 + 3 * t


ADDITIVE = [
    Additive("double well", 0.5, lambda x, t: x - x**3, lambda x, t: (0, 1 - 3 * x**2, -6 * x),
        lambda t: 0.7, lambda t: 0),
    Additive("VP", 1.0, lambda x, t: -0.5 * beta(t) * x, lambda x, t: (-1.5 * x, -0.5 * beta(t), 0),
        lambda t: beta(t) ** 0.5, lambda t: 1.5 * beta(t) ** -0.5),
    Additive("both", 0.5, lambda x, t: x - x**3 + cos(3 * t),
        lambda x, t: (-3 * sin(3 * t), 1 - 3 * x**2, -6 * x),
        lambda t: 0.7 * (1 + 0.5 * sin(3 * t)), lambda t: 1.05 * cos(3 * t)),
]  # fmt: skip


@functools.cache
def additive_case(name):
    sde = next(sde for sde in ADDITIVE if sde.name == name)
    return sde, torch.full((PATHS, 1), sde.start, dtype=F64), sde.reference()


@pytest.mark.parametrize("problem", ADDITIVE, ids=named)
@pytest.mark.parametrize("row", rows("additive"), ids=named)
def test_strong_orders_for_additive_noise(row, problem):
    order = row.strong_order
    got = strong_order(quick(row), *additive_case(problem.name))
    # a linear drift has no f'': methods of order 1.5 are of order 2 there
    assert order - 0.1 < got < (2.1 if problem.name == "VP" and order == 1.5 else order + 0.3)


WRONG = {
    "dropped H": (WithoutArea(), ("double well", "VP", "both")),
    "nodes of G swapped": (changed(c1=(0, 1)), ("VP", "both")),
    "no I_(1,0) for g(t)": (changed(beta2=(0, 0), c1=(0, 1)), ("VP", "both")),
    "node of f moved": (changed(c0=(0, 1 / 4)), ("VP", "both")),
    "stage without its noise": (changed(b0=((), (1.0,))), ("double well", "VP", "both")),
}


@pytest.mark.parametrize("name", WRONG)
def test_controls_of_additive_noise(name):
    solver, problems = WRONG[name]
    for problem in problems:
        assert strong_order(solver, *additive_case(problem)) < 1.25, problem


def test_strong_orders_for_additive_matrix_noise():
    """Against each other: SRA3 for the methods of order 1, and SRA3 against ShARK."""
    sde, x = CorrelatedWell(), torch.tensor([0.5, -0.2], dtype=F64).expand(PATHS, 2).contiguous()
    with torch.no_grad():
        ends = [sf.solve(sde, x, s, steps=1024, noise=sf.SamePath(SEED)).x for s in (SRA3(), ShARK())]
    for row in rows("additive"):
        other = ends[1] if row.name == "SRA3" else ends[0]
        got = strong_order(quick(row), sde, x, other)
        assert row.strong_order - 0.1 < got < row.strong_order + 0.3, row.name


class Bent(sf.SDE):
    """X = sinh(Y), dY = (cos 2t - 1.2 sin Y) dt + dW: multiplicative noise that does not commute with the drift."""

    def drift(self, x, t):
        y = torch.asinh(x)
        return torch.cosh(y) * (torch.cos(2 * t) - 1.2 * torch.sin(y)) + 0.5 * x

    def diffusion(self, x, t):
        return torch.sqrt(1 + x**2)


@functools.cache
def bent_case():
    straight = Additive("Y", 0.4, lambda y, t: cos(2 * t) - 1.2 * sin(y),
        lambda y, t: (-2 * sin(2 * t), -1.2 * cos(y), 1.2 * sin(y)), lambda t: 1.0, lambda t: 0)  # fmt: skip
    return torch.full((PATHS, 1), math.sinh(0.4), dtype=F64), torch.sinh(straight.reference())


@pytest.mark.parametrize("row", rows("diagonal"), ids=named)
def test_strong_orders_for_diagonal_noise_that_does_not_commute_with_the_drift(row):
    got = strong_order(quick(row), Bent(), *bent_case(), levels=(16, 32, 64, 128, 256))
    assert abs(got - row.strong_diagonal) < 0.15


@functools.cache
def scalar_case(steps=4096):
    w, h = fine_path(1, steps)
    size, y = 1 / steps, torch.tensor([0.3, -0.2], dtype=F64).expand(PATHS, 2)
    start, g = y, torch.tensor([1.0, 0.5], dtype=F64)
    for k in range(steps):
        t, (a, b) = k * size, y.unbind(-1)
        f = torch.stack([math.cos(2 * t) - b, torch.sin(a) - b], -1)
        along = torch.stack([-g[1] * torch.ones_like(a), torch.cos(a) * g[0] - g[1]], -1)
        second = torch.stack([-2 * math.sin(2 * t) - f[:, 1],
            torch.cos(a) * f[:, 0] - f[:, 1] - 0.5 * torch.sin(a) * g[0] ** 2], -1)  # fmt: skip
        y = y + f * size + g * w[k] + along * size * (0.5 * w[k] + h[k]) + 0.5 * size**2 * second
    return ScalarBent.bend(start), ScalarBent.bend(y)


@pytest.mark.parametrize("interpretation", ["ito", "stratonovich"])
@pytest.mark.parametrize("row", rows("scalar"), ids=named)
def test_strong_orders_for_scalar_noise(row, interpretation):
    sde = ScalarBent(interpretation)
    x, exact = scalar_case()
    assert noise_kind(sde, x, torch.zeros((), dtype=F64)) == "scalar"
    order = row.make().order_for("scalar") if row.name != "EulerMaruyama" else 0.5
    assert abs(strong_order(quick(row), sde, x, exact) - order) < 0.15


# ---- strong orders: matrix noise


@pytest.mark.parametrize("interpretation", ["ito", "stratonovich"])
@pytest.mark.parametrize("row", rows("commutative"), ids=named)
def test_strong_orders_for_commutative_noise(row, interpretation):
    sde = Commuting(interpretation)
    assert noise_kind(sde, torch.randn(5, 3, dtype=F64), torch.zeros((), dtype=F64)) == "commutative"
    order = row.make().order_for("commutative") if row.name != "EulerMaruyama" else 0.5
    assert abs(strong_order(quick(row), sde) - order) < 0.15


def test_central_milstein_is_of_strong_order_one_for_commutative_noise():
    assert abs(strong_order(Milstein("central"), Commuting()) - 1) < 0.15


GENERAL = [Areas(), CrossedDiagonal("stratonovich")]


def general_case(sde):
    return sde, torch.zeros(PATHS, 2, dtype=F64), exact_areas(sde.m)


@pytest.mark.parametrize("sde", GENERAL, ids=lambda s: f"{type(s).__name__}-{s.interpretation}")
@pytest.mark.parametrize("row", rows("general"), ids=named)
def test_strong_orders_for_noise_that_does_not_commute(row, sde):
    assert noise_kind(sde, torch.zeros(5, 2, dtype=F64), torch.zeros((), dtype=F64)) == "general"
    got = strong_order(row.make(), *general_case(sde))
    assert abs(got - row.strong_general) < 0.15


def test_a_step_of_levy_milstein_is_its_run_of_one_substep():
    problem, x, grid = Areas(), torch.linspace(-1, 1, 14, dtype=F64).reshape(7, 2), torch.linspace(0, 1, 6, dtype=F64)
    run = StochasticSolver.stepper(LevyMilstein(substeps=1), problem, x, grid, Noise(3, 7))  # by `step`
    y = x
    for i in range(5):
        y = run.step(i, y)
    want = sf.solve(problem, x, LevyMilstein(substeps=1), grid=grid, seed=3).x
    torch.testing.assert_close(y, want, rtol=0, atol=1e-14)
    assert float((want - sf.solve(problem, x, LevyMilstein(substeps=4), grid=grid, seed=3).x).abs().max()) > 1e-3


def test_controls_of_noise_that_does_not_commute():
    """A Levy area that is not refined with the step, and Milstein told that the noise commutes."""
    told, x, exact = general_case(Areas())
    assert strong_order(LevyMilstein(substeps=1), told, x, exact) < 0.8
    told.commutative = True
    assert strong_order(Milstein(), told, x, exact) < 0.7


# ---- down in time: reversals

START, END = 0.8, 0.05


@functools.cache
def reversal(paths=64):
    """(reverse of VP for a mixture, start, end by ShARK and by SRA3 on 1024 steps)."""
    process = sf.VP()
    law = sf.problems.GaussianMixture(*random_mixture(3, 2, seed=6, spread=0.5))
    problem = process.reverse(law.model(process), 1.0)
    x = torch.randn(paths, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    return problem, x, [run_down(problem, x, solver, 1024) for solver in (ShARK(), SRA3())]


def run_down(problem, x, solver, steps):
    grid = torch.linspace(START, END, steps + 1, dtype=F64)
    with torch.no_grad():
        return sf.solve(problem, x, solver, grid=grid, noise=Remembered()).x


def reversal_order(solver, levels=LEVELS):
    """Median over the paths, so that those that change sides do not count."""
    problem, x, (by_shark, by_sra3) = reversal()
    exact = by_sra3 if solver.name == "ShARK" else by_shark
    errors = [float((run_down(problem, x, solver, n) - exact).norm(dim=1).median()) for n in levels]
    return slope(1 / np.array(levels), errors)


@pytest.mark.parametrize("row", rows("additive"), ids=named)
def test_strong_orders_of_a_reversal(row):
    assert row.strong_order - 0.15 < reversal_order(quick(row)) < row.strong_order + 0.6


class WrongSign(SRA):
    """The area of a path that runs upwards."""

    def step(self, terms, x, t, h, w, area):
        return super().step(terms, x, t, h, w, -area)


def test_the_area_of_a_reversal_has_a_direction():
    assert reversal_order(WrongSign()) < 1.25


@pytest.mark.parametrize("process", [sf.SubVP(), sf.VE(), sf.EDM(), sf.RectifiedFlow(), sf.CosineVP()], ids=repr)
@pytest.mark.parametrize("solver", [SRA1(), ShARK(), SRIW1(), StochasticHeun(), AdaptiveSDE()], ids=named)
def test_reversals_of_other_processes_end_in_the_law_of_the_data(solver, process):
    """Mean and deviation of Gaussian data within 4 standard errors; a bias of 1% is allowed."""
    model = sf.problems.Gaussian([0.5], [0.3]).model(process)
    start, end = (process.t1, process.t_min) if not isinstance(process, sf.RectifiedFlow) else (0.97, 0.01)
    (a0, a1), (s0, s1) = (f(torch.tensor([start, end], dtype=F64)).tolist() for f in (process.alpha, process.sigma))
    x = torch.randn(4000, 1, dtype=F64, generator=torch.Generator().manual_seed(1))
    x = 0.5 * a0 + math.sqrt(0.3 * a0**2 + s0**2) * (x - x.mean()) / x.std()
    with torch.no_grad():
        grid = sf.grids.logsnr(process, 64, start, end)
        x = sf.solve(process.reverse(model, 1.0), x, solver, grid=grid, seed=2).x
    spread = math.sqrt(0.3 * a1**2 + s1**2)
    assert abs(float(x.mean()) - 0.5 * a1) < (4 / math.sqrt(4000) + 0.01) * spread
    assert abs(float(x.std()) / spread - 1) < 4 / math.sqrt(8000) + 0.01


def made_up_score(x, t):
    return -x / (1 + t) + 0.1 * torch.sin(x)


@functools.cache
def cooled():
    """(a reversal, start, end by SRIW1 on a fine grid)."""
    problem, x = Cooling().reverse(made_up_score), torch.linspace(-1.5, 1.5, 200, dtype=F64)[:, None]
    with torch.no_grad():
        return problem, x, sf.solve(problem, x, SRIW1(), steps=1024, noise=Remembered()).x


@pytest.mark.parametrize("row", rows("diagonal"), ids=named)
def test_strong_orders_of_a_reversal_of_noise_that_depends_on_the_state(row):
    problem, x, fine = cooled()
    got = strong_order(quick(row), problem, x, fine)
    assert abs(got - row.strong_diagonal) < 0.2


@pytest.mark.parametrize("row", rows("general"), ids=named)
def test_a_reversal_of_general_noise_converges_to_one_end(row):
    problem = Cooling(crossed=True).reverse(made_up_score)
    x = torch.linspace(-1.5, 1.5, 60, dtype=F64)[:, None].expand(-1, 2).contiguous()
    with torch.no_grad():
        ends = [sf.solve(problem, x, quick(row), steps=n, noise=Remembered()).x for n in (4, 32)]
        other = sf.solve(problem, x, LevyMilstein(16), steps=32, noise=Remembered()).x
    errors = [float((end - other).abs().mean()) for end in ends]
    assert errors[1] < 0.025 < 0.03 < errors[0]
