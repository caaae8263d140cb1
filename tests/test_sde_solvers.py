"""Methods for SDEs: tableaus by exact conditions, strong orders on one path, weak orders without sampling, limits.

Strong errors are against closed forms in W, or against Taylor's scheme of strong order 1.5 written here, on the same
path. Weak errors are exact: the expectation over a step is a quadrature over its (W, H), and functions of the state
are propagated as Fourier series on a torus or as moments of a linear equation.
"""

import dataclasses
import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm, solve_continuous_lyapunov

import sdeflow as sf
from sdeflow.bridge import Increment
from sdeflow.calculus import NOISE_KINDS, noise_kind
from sdeflow.noise import NoiseSource
from sdeflow.solvers import (
    CATALOGUE,
    SKROCK,
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
)
from sdeflow.solvers.stochastic import StochasticSolver, root, size
from sdeflow.solvers.stochastic_rk import SRA, SRA1_TABLEAU, SRA3_TABLEAU
from tests.exact import F64, random_mixture, slope

SEED, PATHS = 7, 400
LEVELS = (8, 16, 32, 64, 128)
ROWS = [row for row in CATALOGUE if row.name == "EulerMaruyama" or isinstance(row.make(), StochasticSolver)]


def rows(kind):
    return [row for row in ROWS if kind in row.noise]


def named(case):
    return getattr(case, "name", None)


def quick(row):
    """The method; LevyMilstein without areas it does not need."""
    return LevyMilstein(substeps=1) if row.name == "LevyMilstein" else row.make()


# ---- tableaus


@dataclasses.dataclass(frozen=True)
class DiagonalTableau:
    """A method SRI of Rossler 2010, section 5, as printed there."""

    alpha: tuple
    a0: tuple
    b0: tuple
    c0: tuple
    a1: tuple
    b1: tuple
    c1: tuple
    beta1: tuple
    beta2: tuple
    beta3: tuple
    beta4: tuple


# table 5.2, which `SRIW1` has written out; X_3 = X_4 = x have no weight in x' and stand for X_1 in Y_4
SRI1W1_TABLEAU = DiagonalTableau(
    alpha=(1 / 3, 2 / 3), a0=((), (3 / 4,)), b0=((), (3 / 2,)), c0=(0, 3 / 4),
    a1=((), (1 / 4,), (1,), (1 / 4,)), b1=((), (1 / 2,), (-1,), (-5, 3, 1 / 2)), c1=(0, 1 / 4, 1, 1 / 4),
    beta1=(-1, 4 / 3, 2 / 3, 0), beta2=(-1, 4 / 3, -1 / 3, 0),
    beta3=(2, -4 / 3, -2 / 3, 0), beta4=(-2, 5 / 3, -2 / 3, 1),
)  # fmt: skip


def exactly(rows, width):
    """Rows of floats as an array of fractions."""
    return np.array(
        [[Fraction(v).limit_denominator(1000) for v in (*row, *[0] * (width - len(row)))] for row in rows], dtype=object
    )


def vector(values):
    return exactly([values], len(values))[0]


def additive_conditions(table):
    """Rossler 2010, theorem of section 6: the residuals of strong order 1.5."""
    alpha, beta1, beta2 = map(vector, (table.alpha, table.beta1, table.beta2))
    c0, c1 = vector(table.c0), vector(table.c1)
    n = len(alpha)
    a0, b0 = exactly(table.a0, n).sum(1), exactly(table.b0, n).sum(1)
    half, three_halves = Fraction(1, 2), Fraction(3, 2)
    return [
        alpha.sum() - 1, beta1.sum() - 1, beta2.sum(), alpha @ b0 - 1, alpha @ a0 - half,
        alpha @ b0**2 - three_halves, beta1 @ c1 - 1, beta2 @ c1 + 1, *(c0 - a0),
    ]  # fmt: skip


def diagonal_conditions(table):
    """Rossler 2010, theorem of section 5: the residuals of strong order 1.5 for diagonal and scalar noise."""
    alpha = vector(table.alpha)
    c0, c1 = vector(table.c0), vector(table.c1)
    n, m = len(alpha), len(c1)
    a0, b0 = exactly(table.a0, n).sum(1), exactly(table.b0, n).sum(1)
    a1, b1 = exactly(table.a1, n), exactly(table.b1, m)
    once, twice, drift = b1.sum(1), b1 @ b1.sum(1), a1.sum(1)
    wanted = {  # beta . 1, beta . B1 1, beta . A1 1, beta . (B1 1)^2, beta . B1 B1 1
        "beta1": (1, 0, 1, 1, 0), "beta2": (0, 1, 0, 0, 0), "beta3": (0, 0, -1, -1, 0), "beta4": (0, 0, 0, 2, 1),
    }  # fmt: skip
    out = [alpha.sum() - 1, alpha @ a0 - Fraction(1, 2), alpha @ b0 - 1, alpha @ b0**2 - Fraction(3, 2)]
    ones = vector([1] * m)
    for name, values in wanted.items():
        beta = vector(getattr(table, name))
        trees = (ones, once, drift, once**2, twice)
        out += [beta @ tree - value for tree, value in zip(trees, values, strict=True)]
    beta1, beta3 = vector(table.beta1), vector(table.beta3)
    out.append(Fraction(1, 2) * (beta1 @ (a1 @ b0)) + Fraction(1, 3) * (beta3 @ (a1 @ b0)))
    return [*out, *(c0 - a0), *(c1 - drift)]


@pytest.mark.parametrize("table", [SRA1_TABLEAU, SRA3_TABLEAU], ids=["SRA1", "SRA3"])
def test_the_tableaus_for_additive_noise_meet_the_conditions_of_order_one_and_a_half(table):
    assert additive_conditions(table) == [0] * len(additive_conditions(table))
    alpha, c0 = vector(table.alpha), vector(table.c0)
    order = 3 if len(alpha) == 3 else 2
    assert [alpha @ c0**k - Fraction(1, k + 1) for k in range(order)] == [0] * order
    if order == 3:  # alpha A0 c0 = 1/6
        assert alpha @ (exactly(table.a0, 3) @ c0) == Fraction(1, 6)


def test_the_tableau_for_diagonal_noise_meets_the_conditions_of_order_one_and_a_half():
    got = diagonal_conditions(SRI1W1_TABLEAU)
    assert got == [0] * len(got)


def perturbed(table):
    """The tableau with one entry moved by 1/16, entry after entry."""
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if isinstance(value[0], tuple):
            for i, row in enumerate(value):
                for j in range(len(row)):
                    new = (*row[:j], row[j] + 1 / 16, *row[j + 1 :])
                    yield (
                        f"{field.name}[{i}][{j}]",
                        dataclasses.replace(table, **{field.name: (*value[:i], new, *value[i + 1 :])}),
                    )
        else:
            for j in range(len(value)):
                yield (
                    f"{field.name}[{j}]",
                    dataclasses.replace(table, **{field.name: (*value[:j], value[j] + 1 / 16, *value[j + 1 :])}),
                )


@pytest.mark.parametrize(
    ("table", "conditions"),
    [(SRA1_TABLEAU, additive_conditions), (SRA3_TABLEAU, additive_conditions), (SRI1W1_TABLEAU, diagonal_conditions)],
    ids=["SRA1", "SRA3", "SRI1W1"],
)
def test_every_entry_of_a_tableau_is_in_a_condition(table, conditions):
    """The control: no entry can be mistyped unseen, but for the node of a diffusion that SRA3 does not use."""
    for name, wrong in perturbed(table):
        if (table, name) == (SRA3_TABLEAU, "c1[2]"):
            continue
        assert any(residual != 0 for residual in conditions(wrong)), name


# ---- strong orders: the references


class Tanh(sf.SDE):
    """X = tanh(W/2 + artanh x)."""

    start = (0.5, -0.2)

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return -0.25 * x * (1 - x**2) if self.interpretation == "ito" else torch.zeros_like(x)

    def diffusion(self, x, t):
        return 0.5 * (1 - x**2)

    def exact(self, x, w):
        return torch.tanh(0.5 * w + torch.atanh(x))


class Geometric(sf.SDE):
    """X = x exp((a - b^2/2) t + b W), or x exp(a t + b W)."""

    start = (1.0, 0.7)

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return 0.6 * x

    def diffusion(self, x, t):
        return 0.87 * x

    def exact(self, x, w):
        return x * torch.exp(0.6 - (0.5 * 0.87**2 if self.interpretation == "ito" else 0) + 0.87 * w)


class Sinh(sf.SDE):
    """X = sinh(t + W) from 0, where G' vanishes."""

    start = (0.0, 0.0)

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return (x / 2 if self.interpretation == "ito" else 0) + torch.sqrt(x**2 + 1)

    def diffusion(self, x, t):
        return torch.sqrt(x**2 + 1)

    def exact(self, x, w):
        return torch.sinh(torch.asinh(x) + 1 + w)


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


class Commuting(sf.SDE):
    """X = exp((A - 1/2 sum B_k^2) t + sum B_k W_k) x, the matrices polynomials in one."""

    noise = "general"
    start = (1.0, 0.5, -0.3)

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation
        one, m = torch.eye(3, dtype=F64), torch.tensor([[0, 1, 0], [-0.5, 0, 0.3], [0.2, 0, -0.4]], dtype=F64)
        self.columns = [0.4 * one + 0.3 * m, 0.5 * m - 0.2 * m @ m]
        self.shift = 0.5 * sum(b @ b for b in self.columns)
        self.stratonovich = -0.3 * one + 0.5 * m

    def drift(self, x, t):
        a = self.stratonovich + (self.shift if self.interpretation == "ito" else 0)
        return x @ a.T

    def diffusion(self, x, t):
        return torch.stack([x @ b.T for b in self.columns], -1)

    def exact(self, x, w):
        grown = torch.linalg.matrix_exp(
            self.stratonovich + sum(w[:, k, None, None] * b for k, b in enumerate(self.columns))
        )
        return (grown @ x.unsqueeze(-1)).squeeze(-1)


class Areas(sf.SDE):
    """X_1 = sinh(c W_1), X_2 = sinh(c int W_1 dW_2 + c W_3/2): noise that does not commute, in three components."""

    noise, size, m = "general", 0.6, 3

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        if self.interpretation == "stratonovich":
            return torch.zeros_like(x)
        a, b = x.unbind(-1)
        third = 0.25 * self.size**2 if self.m == 3 else 0
        return 0.5 * torch.stack([self.size**2 * a, b * (torch.asinh(a) ** 2 + third)], -1)

    def entries(self, x):
        a, b = x.unbind(-1)
        first, second = torch.sqrt(1 + a**2), torch.sqrt(1 + b**2)
        return self.size * first, second * torch.asinh(a), 0.5 * self.size * second

    def diffusion(self, x, t):
        first, second, third = self.entries(x)
        zero = torch.zeros_like(first)
        return torch.stack([torch.stack([first, zero, zero], -1), torch.stack([zero, second, third], -1)], -2)


class CrossedDiagonal(Areas):
    """The same without W_3, as diagonal noise whose second component depends on the first coordinate."""

    noise, m = "diagonal", 2

    def diffusion(self, x, t):
        return torch.stack(self.entries(x)[:2], -1)


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


class StratonovichMilstein(StochasticSolver):
    """x + h f + G W + 1/2 L G W^2 with a difference over sqrt(h), central or one-sided."""

    name, form, strong = "StratonovichMilstein", "stratonovich", 1.0

    def __init__(self, central):
        object.__setattr__(self, "central", central)

    def step(self, terms, x, t, h, w, area):
        g, r = terms.diffusion(x, t), root(h)
        behind = terms.diffusion(x - r * g, t) if self.central else g
        change = (terms.diffusion(x + r * g, t) - behind) / (2 * r if self.central else r)
        return x + h * terms.drift(x, t) + g * w + 0.5 * change * w * w


class ItoDrift(StochasticHeun):
    form = "ito"


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


@dataclasses.dataclass(frozen=True)
class WithoutArea(SRA):
    def step(self, terms, x, t, h, w, area):
        return super().step(terms, x, t, h, w, 0 * area)


def changed(**fields):
    return SRA(dataclasses.replace(SRA1_TABLEAU, **fields), "wrong")


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


class CorrelatedWell(sf.SDE):
    """Three noises for two coordinates of a nonlinear drift, g(t) a matrix."""

    noise = "general"
    columns = torch.tensor([[0.5, 0.2, 0.0], [-0.3, 0.4, 0.6]], dtype=F64)

    def drift(self, x, t):
        a, b = x.unbind(-1)
        return torch.stack([a - a**3 + b, torch.sin(a) - b], -1)

    def diffusion(self, x, t):
        return ((1 + 0.5 * torch.sin(3 * t)) * self.columns).to(x.dtype).expand(*x.shape, 3)


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


class ScalarBent(sf.SDE):
    """(X_1, X_2) = (sinh Y_1, Y_2 + sin Y_1) of one noise: dY = (cos 2t - Y_2, sin Y_1 - Y_2) dt + (1, 1/2) dW."""

    noise = "general"

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    @staticmethod
    def bend(y):
        return torch.stack([torch.sinh(y[:, 0]), y[:, 1] + torch.sin(y[:, 0])], -1)

    def straight(self, x):
        a = torch.asinh(x[..., 0])
        return a, x[..., 1] - torch.sin(a)

    def drift(self, x, t):
        a, b = self.straight(x)
        f, g = torch.cos(2 * t) - b, torch.sin(a) - b
        out = torch.stack([torch.cosh(a) * f, g + torch.cos(a) * f], -1)
        if self.interpretation == "ito":
            out = out + 0.5 * torch.stack([torch.sinh(a), -torch.sin(a)], -1)
        return out

    def diffusion(self, x, t):
        a, _ = self.straight(x)
        return torch.stack([torch.cosh(a), 0.5 + torch.cos(a)], -1).unsqueeze(-1)


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


def test_controls_of_noise_that_does_not_commute():
    """A Levy area that is not refined with the step, and Milstein told that the noise commutes."""
    told, x, exact = general_case(Areas())
    assert strong_order(LevyMilstein(substeps=1), told, x, exact) < 0.8
    told.commutative = True
    assert strong_order(Milstein(), told, x, exact) < 0.7


# ---- weak orders: the expectation over a step by quadrature, functions of the state as Fourier series


class Given:
    """The noise of one step: W and H (batch, m), and V (m, m) for weak methods."""

    def __init__(self, w, area, v=None):
        self.w, self.area, self.v = w, area, v

    def walk(self, times, event, dtype, *, areas=False, lengths=None):
        lengths = torch.diff(times).abs() if lengths is None else lengths
        assert lengths.numel() == 1
        assert self.w.shape[1:] == tuple(event)

        def walk(k):
            return Increment(self.w, self.area if areas else None)

        walk.lengths = lengths
        return walk

    def sequence(self, stream, nodes, event, dtype):
        return lambda k: self.v


def gauss(counts):
    """Nodes (n, len(counts)) and weights of a product of Gauss-Hermite rules for standard normals."""
    rules = [np.polynomial.hermite_e.hermegauss(n) for n in counts]
    nodes = np.stack(np.meshgrid(*(z for z, _ in rules), indexing="ij"), -1).reshape(-1, len(counts))
    weights = np.stack(np.meshgrid(*(w / w.sum() for _, w in rules), indexing="ij"), -1).reshape(-1, len(counts))
    return torch.tensor(nodes), torch.tensor(weights.prod(1))


def outcomes(solver, sde, x, t, h, m, nodes=9):
    """One step of length h from each x (n, d): states (n, outcomes, d) and the weights of the outcomes."""
    areas = getattr(solver, "areas", False)
    z, weights = gauss([nodes] * m + ([min(nodes, 5)] * m if areas else []))
    start = x.unsqueeze(1).expand(-1, len(z), -1).reshape(-1, x.shape[1])
    z = z.unsqueeze(0).expand(len(x), -1, -1).reshape(len(start), -1)
    w, area = math.sqrt(h) * z[:, :m], math.sqrt(h / 12) * z[:, m:] if areas else None
    grid = torch.tensor([t, t + h], dtype=F64)
    signs = [None]
    if isinstance(solver, PlatenWeak2) and m > 1:
        assert m == 2
        signs = [torch.tensor([[9.0, s], [9.0, 9.0]], dtype=F64) for s in (1.0, -1.0)]  # V takes the upper signs
    ends = []
    with torch.no_grad():
        for v in signs:
            v = None if v is None else v.expand(len(start), 2, 2)
            end = solver.stepper(sde, start, grid, Given(w, area, v)).step(0, start)
            ends.append(end.reshape(len(x), -1, x.shape[1]))
    return torch.cat(ends, 1), weights.repeat(len(signs)) / len(signs)


def torus(k, d):
    """The points of a grid of 2k + 1 a coordinate on the torus, (n, d)."""
    line = torch.arange(2 * k + 1, dtype=F64) * 2 * math.pi / (2 * k + 1)
    return torch.stack(torch.meshgrid(*[line] * d, indexing="ij"), -1).reshape(-1, d)


def expectation(ends, weights, k):
    """The matrix that takes u on the grid to E u(end) there, u as its Fourier series."""
    modes = torch.arange(-k, k + 1, dtype=F64)
    line = torus(k, 1)[:, 0]
    back = torch.exp(-1j * modes[:, None] * line) / len(line)
    waves = [torch.exp(1j * ends[..., i, None] * modes) for i in range(ends.shape[-1])]
    if len(waves) == 1:
        return (torch.einsum("nqk,q->nk", waves[0], weights.to(torch.complex128)) @ back).real
    both = torch.einsum("nqk,nql->nkl", waves[0] * weights[:, None], waves[1])
    return torch.einsum("nkl,ki,lj->nij", both, back, back).reshape(len(ends), -1).real


def derivative(k):
    line, modes = torus(k, 1)[:, 0].numpy(), np.arange(-k, k + 1)
    waves = np.exp(1j * np.outer(line, modes))
    return (waves @ np.diag(1j * modes) @ waves.conj().T / len(line)).real


class Swinging(sf.SDE):
    """Periodic in x; drift and noise depend on the time."""

    size = 0.3

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return torch.sin(x) + 0.4 * torch.cos(2 * x + t)

    def diffusion(self, x, t):
        return 0.6 + self.size * torch.sin(x + 2 * t)


class SwingingAdditive(Swinging):
    def diffusion(self, x, t):
        return 0.7 * (1 + 0.5 * torch.sin(3 * t)).to(x.dtype)


class SwingingScalar(Swinging):
    noise = "general"

    def diffusion(self, x, t):
        return super().diffusion(x, t).unsqueeze(-1)


def observable(x):
    return torch.cos(x[:, 0]) + 0.5 * torch.sin(2 * x[:, 0] + 0.3)


@functools.cache
def swung(make, interpretation, k):
    """E u(X_1) from each point of the grid at time 0, by Kolmogorov's backward equation."""
    sde, d, x = make(interpretation), derivative(k), torus(k, 1)

    def rhs(s, u):
        t = torch.tensor(1 - s, dtype=F64)
        g = torch.as_tensor(sde.diffusion(x, t)).reshape(-1).expand(len(x)).numpy()
        f = sde.drift(x, t)[:, 0].numpy() + (0.5 * g * (d @ g) if interpretation == "stratonovich" else 0)
        return f * (d @ u) + 0.5 * g**2 * (d @ (d @ u))

    return solve_ivp(rhs, (0, 1), observable(x).numpy(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]


WEAK_LEVELS = (4, 8, 16, 32, 64)


def weak_errors(solver, sde, levels=WEAK_LEVELS, k=16):
    """The largest error of E u(X_1) over the points of the grid."""
    x, exact = torus(k, 1), swung(type(sde), sde.interpretation, k)
    errors = []
    for n in levels:
        u = observable(x)
        for i in reversed(range(n)):
            u = expectation(*outcomes(solver, sde, x, i / n, 1 / n, 1), k) @ u
        errors.append(float(np.abs(u.numpy() - exact).max()))
    return errors


def weak_order(solver, sde, levels=WEAK_LEVELS, **options):
    return slope(1 / np.array(levels), weak_errors(solver, sde, levels, **options))


MULTIPLICATIVE = {"SRIW1": 1.5, "PlatenWeak2": 2}
"""Weak orders for noise that depends on x, where they are not 1."""


@pytest.mark.parametrize("row", rows("additive"), ids=named)
def test_weak_orders_for_additive_noise(row):
    assert abs(weak_order(quick(row), SwingingAdditive()) - row.weak_order) < 0.15


SWINGS = [Swinging(), Swinging("stratonovich"), SwingingScalar()]


@pytest.mark.parametrize("sde", SWINGS, ids=["ito", "stratonovich", "scalar"])
@pytest.mark.parametrize("row", rows("diagonal"), ids=named)
def test_weak_orders_for_diagonal_and_scalar_noise(row, sde):
    if sde is SWINGS[2] and row.name not in ("Milstein", "SRIW1", "PlatenWeak2", "StochasticHeun"):
        pytest.skip("scalar noise of one coordinate: a few")
    assert abs(weak_order(quick(row), sde) - MULTIPLICATIVE.get(row.name, 1)) < 0.2


class Driftless(Swinging):
    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, x, t):
        return 0.5 + 0.45 * torch.sin(x)


@dataclasses.dataclass(frozen=True)
class PlatenWithout(PlatenWeak2):
    """The method without its terms in V, or without all terms of one component along another."""

    mixed: bool = True

    def step(self, terms, x, t, h, w, area, v=None):
        return super().step(terms, x, t, h, w, area, None if v is None else 0 * v)

    def _general(self, terms, x, moved, t, h, g, w, v):
        if self.mixed:
            return super()._general(terms, x, moved, t, h, g, w, v)
        total, r = torch.zeros_like(x), root(h)
        for k, column in enumerate(g.unbind(-1)):
            ahead = terms.diffusion(moved + r * column, t + h)[..., k]
            behind = terms.diffusion(moved - r * column, t + h)[..., k]
            own = w[:, k, None]
            total = total + (ahead + behind + 2 * column) * own + (ahead - behind) * (own**2 - size(h)) / r
        return 0.25 * total


def test_weak_controls():
    """A weak bias of order 1/2, a weak order that nonlinear noise alone shows, and an order that linear drift hides."""
    levels = (32, 64, 128, 256, 512)
    sde, x = Driftless("stratonovich"), torus(16, 1)
    orders = []
    for solver in (StratonovichMilstein(True), StratonovichMilstein(False)):
        errors = []
        for n in levels:
            step = expectation(*outcomes(solver, sde, x, 0.0, 1 / n, 1), 16)
            end = torch.linalg.matrix_power(step, n) @ observable(x)
            errors.append(float(np.abs(end.numpy() - swung(Driftless, "stratonovich", 16)).max()))
        orders.append(slope(1 / np.array(levels), errors))
    assert orders[0] > 0.9
    assert orders[1] < 0.7
    assert weak_order(WithoutArea(), SwingingAdditive()) < 1.3
    assert weak_order(changed(b0=((), (1.0,))), SwingingAdditive()) < 1.3
    assert weak_order(changed(c0=(0, 1 / 4)), SwingingAdditive()) < 1.3
    assert abs(weak_order(ItoDrift(), Swinging())) < 0.5


class Plane(sf.SDE):
    """Two noises that do not commute, periodic in both coordinates."""

    noise = "general"

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        a, b = x.unbind(-1)
        return torch.stack([torch.sin(b), 0.5 * torch.cos(a)], -1)

    def entries(self, x):
        a, b = x.unbind(-1)
        return 0.5 + 0.2 * torch.sin(b), 0.4 * torch.cos(a), 0.3 * torch.sin(a), 0.6 + 0 * a

    def diffusion(self, x, t):
        e = self.entries(x)
        return torch.stack([torch.stack(e[:2], -1), torch.stack(e[2:], -1)], -2)

    def stratonovich_shift(self, x):
        """1/2 sum_jk G_jk d_j G_ik."""
        (p, q, r, _), (a, b) = self.entries(x), x.unbind(-1)
        first = 0.2 * torch.cos(b) * r - 0.4 * torch.sin(a) * q
        second = 0.3 * torch.cos(a) * p
        return 0.5 * torch.stack([first, second], -1)


class PlaneDiagonal(Plane):
    """Diagonal noise whose first component depends on the second coordinate."""

    noise = "diagonal"

    def entries(self, x):
        a, b = x.unbind(-1)
        return 0.5 + 0.3 * torch.sin(b), 0 * a, 0 * a, 0.6 + 0.2 * torch.cos(a + b)

    def diffusion(self, x, t):
        e = self.entries(x)
        return torch.stack([e[0], e[3]], -1)

    def stratonovich_shift(self, x):
        (_, _, _, s), (a, b) = self.entries(x), x.unbind(-1)
        return 0.5 * torch.stack([0 * a, -0.2 * torch.sin(a + b) * s], -1)


def plane_observable(x):
    return torch.cos(x[:, 0] + x[:, 1]) + torch.sin(x[:, 0] - 0.3)


def plane_order(solver, sde, k=9):
    x, d, one = torus(k, 2), derivative(k), np.eye(2 * k + 1)
    slopes = (np.kron(d, one), np.kron(one, d))
    t = torch.zeros((), dtype=F64)
    f = sde.drift(x, t) + (sde.stratonovich_shift(x) if sde.interpretation == "stratonovich" else 0)
    p, q, r, s = sde.entries(x)
    g = torch.stack([torch.stack([p, q], -1), torch.stack([r, s], -1)], -2)
    g = g @ g.mT
    generator = sum(f.numpy()[:, i, None] * slopes[i] for i in range(2))
    for i, j in itertools.product(range(2), repeat=2):
        generator = generator + 0.5 * g.numpy()[:, i, j, None] * (slopes[i] @ slopes[j])
    exact, errors = expm(generator) @ plane_observable(x).numpy(), []
    for n in WEAK_LEVELS:
        step = expectation(*outcomes(solver, sde, x, 0.0, 1 / n, 2, nodes=6 if getattr(solver, "areas", 0) else 7), k)
        end = torch.linalg.matrix_power(step, n) @ plane_observable(x)
        errors.append(float(np.abs(end.numpy() - exact).max()))
    return slope(1 / np.array(WEAK_LEVELS), errors)


PLANES = [Plane(), Plane("stratonovich"), PlaneDiagonal()]


@pytest.mark.parametrize("sde", PLANES, ids=lambda s: f"{type(s).__name__}-{s.interpretation}")
@pytest.mark.parametrize("row", rows("general"), ids=named)
def test_weak_orders_for_noise_that_does_not_commute(row, sde):
    if row.name == "LevyMilstein" and sde is not PLANES[0]:
        pytest.skip("four normals a step: once")
    k = 7 if row.name == "LevyMilstein" else 9
    assert abs(plane_order(quick(row), sde, k) - MULTIPLICATIVE.get(row.name, 1)) < 0.2


@pytest.mark.parametrize("mixed", [True, False])
def test_the_weak_second_order_needs_its_mixed_terms(mixed):
    assert plane_order(PlatenWithout(mixed=mixed), Plane()) < 1.4


class Hourly(sf.SDE):
    """General noise that depends on the time; with `clock`, the time as a third coordinate."""

    noise = "general"

    def __init__(self, clock=False, interpretation="ito"):
        self.clock, self.interpretation = clock, interpretation

    def drift(self, x, t):
        t = x[:, 2] if self.clock else t
        f = [torch.sin(x[:, 1] + t), torch.cos(2 * x[:, 0] - 3 * t)]
        return torch.stack([*f, *[torch.ones_like(f[0])] * self.clock], -1)

    def diffusion(self, x, t):
        (a, b), t = (x[:, 0], x[:, 1]), x[:, 2] if self.clock else t
        rows = [[0.5 + 0.2 * torch.sin(b - t), 0.4 * torch.cos(a + t)], [0.3 * torch.sin(a * t), 0.6 + 0.1 * t * b]]
        return torch.stack([torch.stack(row, -1) for row in [*rows, *[[0 * a, 0 * a]] * self.clock]], -2)


@pytest.mark.parametrize("interpretation", ["ito", "stratonovich"])
@pytest.mark.parametrize("row", rows("general"), ids=named)
def test_time_is_a_coordinate(row, interpretation):
    """Every stage is at the time where its own method would put a clock x' = 1."""
    x = torch.randn(7, 2, dtype=F64)
    ends = []
    with torch.no_grad():
        for clock in (False, True):
            start = torch.cat([x, torch.zeros(7, 1, dtype=F64)], 1) if clock else x
            ends.append(sf.solve(Hourly(clock, interpretation), start, row.make(), steps=8, seed=4).x)
    torch.testing.assert_close(ends[1][:, :2], ends[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ends[1][:, 2], torch.ones(7, dtype=F64))


# ---- weak orders: moments of linear equations


class Ito2(sf.SDE):
    """E X_1^2 = e^(-t) from (1, 1); the noises do not commute."""

    noise, start = "general", (1.0, 1.0)
    root2 = math.sqrt(2)

    def drift(self, x, t):
        a, b = x.unbind(-1)
        return torch.stack([-273 / 512 * a, -a / 160 - (-785 / 512 + self.root2 / 8) * b], -1)

    def diffusion(self, x, t):
        a, b = x.unbind(-1)
        second = [(1 - 2 * self.root2) / 4 * a, a / 10 + b / 16]
        return torch.stack([torch.stack([a / 4, a / 16], -1), torch.stack(second, -1)], -2)


class Stratonovich2(sf.SDE):
    """E X_i = e^(t/2)/10, E X_1^2 = e^(2t)/100 from (.1, .1); the noises do not commute."""

    noise, interpretation, start = "general", "stratonovich", (0.1, 0.1)

    def drift(self, x, t):
        a, b = x.unbind(-1)
        return torch.stack([1.25 * (b - a), 0.25 * (a - b)], -1)

    def diffusion(self, x, t):
        a, b = x.unbind(-1)
        first = [math.sqrt(3) / 2 * (a - b), 0.5 * (a + b)]
        return torch.stack([torch.stack(first, -1), torch.stack([0 * a, a], -1)], -2)


def moments(solver, sde, steps, m=2):
    """(E X, E X X^T) at 1, by the exact recursion: a step of a linear equation is a random matrix."""
    x = torch.eye(len(sde.start), dtype=F64)
    ends, weights = outcomes(solver, sde, x, 0.0, 1 / steps, m, nodes=5)  # (start, outcome, component)
    mean = torch.einsum("iqa,q->ai", ends, weights)
    square = torch.einsum("iqa,jqb,q->abij", ends, ends, weights)
    first = torch.tensor(sde.start, dtype=F64)
    second = first[:, None] * first
    for _ in range(steps):
        first, second = mean @ first, torch.einsum("abij,ij->ab", square, second)
    return first, second


def moment_orders(solver, sde):
    found = [moments(solver, sde, n) for n in WEAK_LEVELS]
    if isinstance(sde, Ito2):
        errors = [[abs(float(second[0, 0]) - math.exp(-1)) for _, second in found]]
    else:
        errors = [[abs(float(second[0, 0]) - 0.01 * math.exp(2)) for _, second in found]]
        errors += [[abs(float(first[i]) - 0.1 * math.exp(0.5)) for first, _ in found] for i in range(2)]
    return [slope(1 / np.array(WEAK_LEVELS), e) for e in errors]


@pytest.mark.parametrize("sde", [Ito2(), Stratonovich2()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("row", rows("general"), ids=named)
def test_weak_orders_of_moments(row, sde):
    for got in moment_orders(quick(row), sde):
        assert MULTIPLICATIVE.get(row.name, 1) - 0.2 < got


class GeometricWeak(Geometric):
    start = (1.0,)


def test_scalar_linear_noise_is_of_weak_order_two_for_sriw1():
    """G''' = 0 there: its 1.5 is that of nonlinear noise."""
    errors = []
    for n in WEAK_LEVELS:
        _, second = moments(SRIW1(), GeometricWeak(), n, m=1)
        errors.append(abs(float(second[0, 0]) - math.exp(2 * 0.6 + 0.87**2)))
    assert slope(1 / np.array(WEAK_LEVELS), errors) > 1.8
    levels, exact = (32, 64, 128, 256), swung(Driftless, "ito", 16)
    errors = []
    for n in levels:
        step = expectation(*outcomes(SRIW1(), Driftless(), torus(16, 1), 0.0, 1 / n, 1), 16)
        errors.append(abs(float((torch.linalg.matrix_power(step, n) @ observable(torus(16, 1)))[0]) - exact[0]))
    assert 1.3 < slope(1 / np.array(levels), errors) < 1.7


class Heisenberg(sf.SDE):
    """X_1 = W_1, X_2 = W_2, X_3 = int W_1 dW_2, X_4 = int W_2 dW_1: from 0 to 1, E X_3^2 = 1/2 and E X_3 X_4 = 0."""

    noise = "general"

    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, x, t):
        a, b, _, _ = x.unbind(-1)
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        return torch.stack([torch.stack([one, zero, zero, b], -1), torch.stack([zero, one, a, zero], -1)], -1)


def test_the_two_point_variables_as_they_are_drawn():
    """Exact at any step with V; without it E X_3^2 = 3/8, with a symmetric one E X_3 X_4 = 1/4."""
    x, squares = torch.zeros(40_000, 4, dtype=F64), {}
    for solver in (PlatenWeak2(), PlatenWithout()):
        with torch.no_grad():
            end = sf.solve(Heisenberg(), x, solver, steps=2, seed=3).x
        for i, j in ((2, 2), (3, 3), (2, 3)):
            v = end[:, i] * end[:, j]
            squares[type(solver), i, j] = float(v.mean()), float(v.std()) / 200
    for (kind, i, j), (mean, error) in squares.items():
        want = (0.5 if kind is PlatenWeak2 else 0.375) if i == j else (0.0 if kind is PlatenWeak2 else 0.125)
        assert abs(mean - want) < 4 * error
        assert error < 0.01


# ---- without noise


class Quiet(sf.SDE):
    """An equation with noise of size 0."""

    t1, noise = 2.0, "diagonal"

    def __init__(self, f, kind="diagonal"):
        self.f, self.noise = f, kind

    def drift(self, x, t):
        return self.f(x, t)

    def diffusion(self, x, t):
        return torch.zeros_like(x) if self.noise == "diagonal" else torch.zeros(*x.shape, 3, dtype=x.dtype)


def swinging_rate(x, t):
    return x * torch.cos(t)


def forced(x, t):
    return 2 * torch.cos(x) * torch.cos(5 * t) - x


@functools.cache
def forced_end():
    run = solve_ivp(
        lambda t, x: 2 * np.cos(x) * np.cos(5 * t) - x, (0, 2), [1.0, 0.5], method="DOP853", rtol=1e-13, atol=1e-15
    )
    return torch.tensor(run.y[:, -1])


QUIET = {
    "EulerMaruyama": 1, "Milstein": 1, "LevyMilstein": 1, "StochasticHeun": 2, "StochasticMidpoint": 2, "SRA1": 2,
    "SRA3": 3, "ShARK": 2, "SRIW1": 2, "PlatenWeak2": 2, "SKROCK(5)": 1, "AdaptiveSDE": 2,
}  # fmt: skip


def quiet_orders(solver, levels=(24, 48, 96, 192, 384)):
    x = torch.tensor([1.0, 0.5], dtype=F64)
    out = []
    for f, exact in ((swinging_rate, x * math.exp(math.sin(2))), (forced, forced_end())):
        for kind in ("diagonal", "general"):
            with torch.no_grad():
                ends = [sf.solve(Quiet(f, kind), x[:, None], solver, steps=n, seed=0).x[:, 0] for n in levels]
            out.append(slope(1 / np.array(levels), [float((end - exact).abs().max()) for end in ends]))
    return out


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_orders_without_noise(row):
    for got in quiet_orders(quick(row)):
        assert abs(got - QUIET[row.name]) < 0.15


@pytest.mark.parametrize(
    ("inner", "order"), [(StochasticHeun(), 2), (SRA3(), 2), (Milstein(), 1), (SKROCK(3), 1)], ids=named
)
def test_orders_of_splittings_without_noise(inner, order):
    for got in quiet_orders(Splitting(-0.7, inner))[2:]:  # a number commutes with the other equation
        assert abs(got - order) < 0.2


# ---- stiff drifts


class LinearTest(sf.SDE):
    """dX = a X dt + b X dW."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def drift(self, x, t):
        return self.a * x

    def diffusion(self, x, t):
        return self.b * x


def mean_square(solver, p, q):
    """E |x'|^2/x^2 of a step with a h = p, b sqrt(h) = q."""
    ends, weights = outcomes(solver, LinearTest(p, q), torch.ones(1, 1, dtype=F64), 0.0, 1.0, 1)
    return float((ends[0, :, 0].square() * weights).sum())


@pytest.mark.parametrize("damping", [0.05, 0.2])
@pytest.mark.parametrize("stages", [1, 2, 5, 10])
def test_skrock_is_stable_where_the_equation_is(stages, damping):
    """The mean-square domain 2 p + q^2 < 0 is covered down to p = -(2 - 4/3 damping) s^2; beyond 2 s^2 nothing is."""
    solver, end = SKROCK(stages, damping), (2 - 4 / 3 * damping) * stages**2
    for p in np.linspace(-end, -1e-3, 30):
        for share in (0.0, 0.5, 0.999):
            assert mean_square(solver, p, math.sqrt(-2 * share * p)) < 1
    assert mean_square(solver, -2.2 * stages**2, 0.0) > 1
    assert mean_square(EulerMaruyama(), -2.1, 0.0) > 1


@pytest.mark.parametrize("stages", [1, 3, 6])
def test_skrock_is_the_papers_polynomials(stages):
    """x' = T_s(w0 + w1 p)/T_s(w0) x + U_(s-1)(w0 + w1 p)/U_(s-1)(w0) (1 + w1 p/2) Q on the linear test equation."""
    chebyshev = np.polynomial.chebyshev.Chebyshev
    w0 = 1 + 0.05 / stages**2
    first = chebyshev.basis(stages)
    w1 = first(w0) / first.deriv()(w0)
    second = first.deriv()  # s U_(s-1)
    x = torch.tensor([[1.3]], dtype=F64)
    for p, q in ((-0.7, 0.4), (-3.0, 1.1)):
        w = torch.tensor([[0.8]], dtype=F64)
        got = SKROCK(stages).stepper(
            LinearTest(p, q), x, torch.tensor([0.0, 1.0], dtype=F64), Given(w, None)
        ).step(0, x)  # fmt: skip
        z = w0 + w1 * p
        want = x * (first(z) / first(w0) + second(z) / second(w0) * (1 + w1 * p / 2) * q * w)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


class Stiff(sf.SDE):
    """dX = -200 X dt + r (200 cos t + sin X) dt + X/2 dW."""

    t1 = 2.0

    def __init__(self, forcing):
        self.forcing = forcing

    def drift(self, x, t):
        return 200 * (self.forcing * torch.cos(t) - x) + torch.sin(3 * t)

    def diffusion(self, x, t):
        return 0.5 * x


@pytest.mark.parametrize(("solver", "forcing"), [(SKROCK(4), 1.0), (SKROCK(4), 0.0), (Splitting(-200.0), 0.0)])
def test_a_stiff_equation_is_solved_where_euler_maruyama_diverges(solver, forcing):
    """h = 1/20: p = -10."""
    x, sde = torch.ones(200, 1, dtype=F64), Stiff(forcing)
    with torch.no_grad():
        end = sf.solve(sde, x, solver, steps=40, seed=1).x
        fine = sf.solve(sde, x, EulerMaruyama(), steps=4000, seed=2).x
        wrong = sf.solve(sde, x, EulerMaruyama(), steps=40, seed=1).x
    assert float(wrong.abs().min()) > 1e6
    assert float((end - fine).abs().max()) < 0.05
    if isinstance(solver, SKROCK):  # a splitting does not see the balance of its two parts at such steps
        assert abs(float(end.mean() - fine.mean())) < 0.005
        assert 0.5 < float(end.std() / fine.std()) < 2


# ---- splitting


MATRIX = torch.tensor([[-1.0, 4.0, 0.0], [-4.0, -0.5, 0.3], [0.2, 0.0, -9.0]], dtype=F64)


@pytest.mark.parametrize("inner", [StochasticHeun(), SRA1(), Milstein(), SRIW1()], ids=named)
@pytest.mark.parametrize("linear", ["number", "diagonal", "matrix", "image"])
def test_splitting_is_exact_for_its_linear_part(inner, linear):
    """One long step without noise; and a wrong linear part is not exact."""
    shape = (3,) if linear != "image" else (2, 2)
    x = torch.randn(4, *shape, dtype=F64)
    a = {
        "number": -1.3, "diagonal": torch.tensor([-2.0, 0.5, -30.0], dtype=F64), "matrix": MATRIX,
        "image": torch.randn(4, 4, dtype=F64),
    }[linear]  # fmt: skip
    matrix = torch.as_tensor(a, dtype=F64)
    matrix = matrix if matrix.ndim == 2 else torch.diag(matrix.expand(3))
    sde = Quiet(lambda y, t: (y.flatten(1) @ matrix.T).reshape(y.shape))
    exact = (x.flatten(1) @ torch.linalg.matrix_exp(2 * matrix).T).reshape(x.shape)
    for steps in (1, 3):
        got = sf.solve(sde, x, Splitting(a, inner), steps=steps, seed=0).x
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
    wrong = sf.solve(sde, x, Splitting(0.5 * torch.as_tensor(a), inner), steps=1, seed=0).x
    assert float((wrong - exact).abs().max()) > 1e-3


class Oscillator(sf.SDE):
    """A damped oscillator of frequency 20 with a weak spring and noise, on the momentum: dp = ... + s dW."""

    noise, start = "general", (1.0, 0.0)
    linear = torch.tensor([[0.0, 1.0], [-400.0, -0.5]], dtype=F64)
    column = torch.tensor([0.0, 5.0], dtype=F64)

    def drift(self, x, t):
        return x @ self.linear.T

    def diffusion(self, x, t):
        return self.column.to(x.dtype).expand(x.shape).unsqueeze(-1)

    def second_moment(self):
        a = self.linear.numpy()
        noise = np.outer(self.column.numpy(), self.column.numpy())
        stationary = solve_continuous_lyapunov(a, -noise)
        start = np.outer(self.start, self.start)
        flow = expm(a)
        return flow @ (start - stationary) @ flow.T + stationary


def affine_moments(solver, sde, steps):
    """E X X^T at 1 of a linear equation with additive noise, by the exact recursion."""
    x = torch.cat([torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)])
    ends, weights = outcomes(solver, sde, x, 0.0, 1 / steps, 1, nodes=4)
    move = (ends[1:] - ends[:1])[:, 0].T  # the same for every outcome
    noise = torch.einsum("qa,qb,q->ab", ends[0], ends[0], weights)
    start = torch.tensor(sde.start, dtype=F64)
    second = start[:, None] * start
    for _ in range(steps):
        second = move @ second @ move.T + noise
    return second


@pytest.mark.parametrize("inner", [StochasticHeun(), SRA1(), Milstein()], ids=named)
def test_splitting_follows_an_oscillator_at_long_steps(inner):
    """Weak order 2 at steps of a sixth of a period and more, where Heun's is unstable."""
    sde, levels = Oscillator(), (32, 64, 128, 256, 512)
    exact = torch.tensor(sde.second_moment())
    found = [affine_moments(Splitting(sde.linear, inner), sde, n) for n in levels]
    assert 1.8 < slope(1 / np.array(levels), [float((v - exact).abs().max()) for v in found]) < 2.2
    assert float((found[0] / exact).max()) < 2
    assert float((affine_moments(StochasticHeun(), sde, 16) / exact).max()) > 100


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


class Cooling(sf.SDE):
    """dX = -X/2 dt + sqrt(1 + X^2/4) dW: noise that depends on x, whose density is not Gaussian."""

    t1 = 0.5

    def __init__(self, crossed=False):
        self.noise = "general" if crossed else "diagonal"

    def drift(self, x, t):
        return -0.5 * x

    def diffusion(self, x, t):
        g = torch.sqrt(1 + 0.25 * x**2)
        if self.noise == "diagonal":
            return g
        mixed = 0.3 * x.roll(1, -1)
        return torch.stack([torch.diag_embed(g)[..., 0], torch.diag_embed(g)[..., 1], mixed], -1)


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


# ---- refusals


class Untouched:
    """A drift that must not be called."""

    t1 = 1.0

    def drift(self, x, t):
        raise AssertionError("the drift was called")


def refusing(name):
    base = {
        "diagonal": Geometric, "scalar": ScalarBent, "commutative": Commuting, "general": Areas,
    }[name]  # fmt: skip
    return type(f"{name.title()}Noise", (Untouched, base), {})()


STARTS = {
    "diagonal": torch.ones(3, 2, dtype=F64), "scalar": torch.ones(3, 2, dtype=F64),
    "commutative": torch.ones(3, 3, dtype=F64), "general": torch.ones(3, 2, dtype=F64),
}  # fmt: skip
MISFITS = [(row, kind) for row in ROWS for kind in NOISE_KINDS if kind not in row.noise]


@pytest.mark.parametrize(("row", "kind"), MISFITS, ids=lambda v: getattr(v, "name", v))
def test_noise_that_does_not_fit_is_one_error_before_the_drift(row, kind):
    """It names methods that fit, and they do."""
    with pytest.raises(ValueError, match=f"{kind.title()}Noise is {kind}: use one of ") as error:
        sf.solve(refusing(kind), STARTS[kind], row.make(), steps=2, seed=0)
    message = str(error.value)
    assert message.startswith(f"{row.name} integrates {' and '.join(row.noise)} noise")
    offered = message.split("use one of ")[1].split(", ")
    assert len(offered) >= 4
    assert row.name not in offered
    for name in offered:
        with pytest.raises(AssertionError, match="the drift was called"):
            sf.solve(refusing(kind), STARTS[kind], sf.solvers.by_name(name).make(), steps=2, seed=0)


def test_there_are_misfits():
    assert len(MISFITS) == 19
    assert {row.name for row, _ in MISFITS} == {"Milstein", "SRA1", "SRA3", "ShARK", "SRIW1", "AdaptiveSDE"}


class Plain(Untouched, sf.ODE):
    pass


@pytest.mark.parametrize("solver", [*(row.make() for row in ROWS[1:]), Splitting(-1.0)], ids=named)
@pytest.mark.parametrize("problem", [Plain(), sf.VP().probability_flow(lambda x, t: 1 / 0)], ids=["ODE", "flow"])
def test_problems_without_noise_are_refused(solver, problem):
    with pytest.raises(ValueError, match=r"is for problems with noise, and .* has none: use a solver of ordinary"):
        sf.solve(problem, torch.ones(2, 3, dtype=F64), solver, steps=2, seed=0)


def test_what_is_declared_is_believed():
    """additive=True on noise that is not, commutative=True likewise, and False on noise that is."""
    x = torch.ones(3, 2, dtype=F64)
    told = Geometric()
    told.additive = True
    assert torch.isfinite(sf.solve(told, x, SRA1(), steps=2, seed=0).x).all()
    euler = sf.solve(told, x, EulerMaruyama(), steps=4, noise=sf.SamePath(0)).x
    torch.testing.assert_close(sf.solve(told, x, Milstein(), steps=4, noise=sf.SamePath(0)).x, euler)
    told.additive = False
    with pytest.raises(ValueError, match="is diagonal"):
        sf.solve(told, x, SRA1(), steps=2, seed=0)
    told = Areas()
    told.commutative = True
    assert torch.isfinite(sf.solve(told, x, Milstein(), steps=2, seed=0).x).all()
    told = Commuting()
    told.commutative = False
    with pytest.raises(ValueError, match="is general"):
        sf.solve(told, torch.ones(3, 3, dtype=F64), Milstein(), steps=2, seed=0)
    quiet = Quiet(forced)
    quiet.additive = False  # noise that does not depend on x: the probe would say so
    with pytest.raises(ValueError, match="is diagonal"):
        sf.solve(quiet, x, SRA1(), steps=2, seed=0)


class Turned(sf.SDE):
    """Diagonal noise whose G_i depends on the other coordinates."""

    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        return 1 + 0.1 * x.roll(1, -1)


class EvenAtZero(Sinh):
    """At x = 0 the derivative of G vanishes."""


@pytest.mark.parametrize("start", ["zeros", "random", "negative"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kind_of_noise_does_not_depend_on_where_or_in_what_it_is_probed(start, dtype):
    t = torch.tensor(0.3, dtype=F64)
    for sde, d, kind in (
        (Tanh(), 2, "diagonal"), (Sinh(), 2, "diagonal"), (Geometric(), 1, "diagonal"), (Turned(), 3, "general"),
        (Areas(), 2, "general"), (CrossedDiagonal(), 2, "general"), (Commuting(), 3, "commutative"),
        (ScalarBent(), 2, "scalar"), (CorrelatedWell(), 2, "additive"), (SwingingAdditive(), 2, "additive"),
        (Heisenberg(), 4, "general"), (Plane(), 2, "general"), (Cooling(True), 2, "general"),
    ):  # fmt: skip
        if isinstance(sde, Commuting) and dtype != F64:
            continue  # its matrices are float64
        for batch in (1, 2, 9):
            x = {
                "zeros": torch.zeros(batch, d), "random": 0.7 * torch.rand(batch, d), "negative": -torch.rand(batch, d),
            }[start].to(dtype)  # fmt: skip
            assert noise_kind(sde, x, t) == kind, (type(sde).__name__, batch)


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (type("Wide", (Tanh,), {"diffusion": lambda self, x, t: torch.ones(3, 5)})(), "broadcasts against x"),
        (type("Flat", (Areas,), {"diffusion": lambda self, x, t: torch.ones_like(x)})(), r"\(\*x.shape, m\)"),
        (type("Odd", (Tanh,), {"noise": "white"})(), 'noise "diagonal" or "general"'),
    ],
    ids=["diagonal", "general", "unknown"],
)
@pytest.mark.parametrize("row", ROWS, ids=named)
def test_wrong_shapes_of_a_diffusion_are_refused(row, sde, message):
    with pytest.raises(ValueError, match=message):
        sf.solve(sde, torch.ones(3, 2, dtype=F64), row.make(), steps=2, seed=0)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_wrong_shapes_of_a_drift_are_refused(row):
    class Column(SwingingAdditive):
        def drift(self, x, t):
            return x[:, :1]

    with pytest.raises(ValueError, match=r"the drift returned \(3, 1\) for x of shape \(3, 2\)"):
        sf.solve(Column(), torch.ones(3, 2, dtype=F64), quick(row), steps=2, seed=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Milstein("forward"), ValueError, "derivative as one of 'autodiff', 'central'"),
        (lambda: LevyMilstein(3), ValueError, "substeps as a power of 2, got 3"),
        (lambda: LevyMilstein(0), ValueError, "substeps as a power of 2"),
        (lambda: LevyMilstein(True), ValueError, "substeps as a whole number or None"),
        (lambda: SKROCK(0), ValueError, "stages >= 1"),
        (lambda: SKROCK(2.0), ValueError, "stages as a whole number"),
        (lambda: SKROCK(3, 0.0), ValueError, "damping > 0"),
        (lambda: Splitting(math.nan), ValueError, "finite linear part"),
        (lambda: Splitting(-1.0, EulerMaruyama()), TypeError, "inner as a StochasticSolver such as"),
        (lambda: Splitting(-1.0, LevyMilstein()), ValueError, "inner method of .W, H. alone"),
        (lambda: Splitting(-1.0, PlatenWeak2()), ValueError, "inner method of .W, H. alone"),
        (lambda: Splitting(-1.0, Splitting(-1.0)), ValueError, "inner method of .W, H. alone"),
        (lambda: AdaptiveSDE(first=0.0), ValueError, r"first in \(0, 1\]"),
        (lambda: AdaptiveSDE(exponent=1.5), ValueError, r"exponent in \(0, 1\]"),
    ],
)
def test_bad_options_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_linear_part_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"matrix \(2, 2\), got shape \(3,\)"):
        sf.solve(Tanh(), torch.ones(3, 2, dtype=F64), Splitting(torch.ones(3)), steps=2, seed=0)


def test_orders_of_a_splitting_are_those_of_its_parts():
    assert [Splitting(-1.0).order_for(kind) for kind in ("additive", "general")] == [1.0, 0.5]
    assert Splitting(-1.0, SRA1()).order_for("additive") == 1.0


# ---- dtypes, shapes, batches, gradients


class Turning(sf.SDE):
    """Any event shape and dtype; f and G depend on everything."""

    def __init__(self, kind="diagonal", rate=0.7, volatility=0.3):
        self.kind, self.rate, self.volatility = kind, rate, volatility
        self.noise = "diagonal" if kind in ("diagonal", "own") else "general"

    def drift(self, x, t):
        return torch.sin(self.rate * x) - x * torch.cos(t).to(x.dtype)

    def diffusion(self, x, t):
        own = self.volatility * torch.cos(x) * (1 + t).to(x.dtype)
        if self.kind == "diagonal":
            return own
        if self.kind == "scalar":
            return own.unsqueeze(-1)
        if self.kind == "additive":
            return (self.volatility * (1 + t).to(x.dtype) * torch.tensor([1.0, 0.5, -0.2]).to(x)).expand(*x.shape, 3)
        return torch.stack([own, 0.2 * torch.sin(x), 0.1 * torch.ones_like(x)], -1)


FITTING = [
    (row, kind) for row in ROWS for kind in ("diagonal", "scalar", "additive", "general")
    if kind in row.noise
]  # fmt: skip


CASES = [
    *((row.make(), kind) for row, kind in FITTING),
    *((Splitting(-0.5), kind) for kind in ("diagonal", "scalar", "additive", "general")),
    (Milstein("central"), "diagonal"), (LevyMilstein(16), "general"),
]  # fmt: skip


def fitting_id(v):
    return getattr(v, "name", v)


@pytest.mark.parametrize("event", [(), (3,), (2, 4)], ids=str)
@pytest.mark.parametrize(("solver", "kind"), CASES, ids=fitting_id)
def test_shapes_and_dtypes(solver, kind, event):
    x = torch.rand(5, *event, dtype=F64) + 0.2
    with torch.no_grad():
        exact = sf.solve(Turning(kind), x, solver, steps=8, seed=1).x
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
            y = sf.solve(Turning(kind), x.to(dtype), solver, steps=8, seed=1).x
            assert (y.dtype, y.shape) == (dtype, x.shape)
            torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("solver", "kind"), CASES, ids=fitting_id)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_samples_bits_do_not_depend_on_the_batch(solver, kind, dtype):
    x = torch.rand(67, 3, dtype=dtype) + 0.2
    with torch.no_grad():
        whole = sf.solve(Turning(kind), x, solver, steps=6, seed=1).x
        for a, b in ((0, 1), (5, 6), (1, 3), (7, 23), (0, 64)):
            part = sf.solve(Turning(kind), x[a:b], solver, steps=6, seed=1, index=a).x
            assert torch.equal(part, whole[a:b]), (a, b)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_samples_bits_do_not_depend_on_the_batch_with_a_matrix(dtype):
    matrix = torch.randn(37, 37, dtype=F64, generator=torch.Generator().manual_seed(0)) / 37
    x = torch.rand(67, 37, dtype=dtype)
    with torch.no_grad():
        whole = sf.solve(Turning(), x, Splitting(matrix), steps=3, seed=1).x
        for a, b in ((0, 1), (1, 3), (7, 23), (0, 64)):
            assert torch.equal(sf.solve(Turning(), x[a:b], Splitting(matrix), steps=3, seed=1, index=a).x, whole[a:b])


@pytest.mark.parametrize(("solver", "kind"), CASES, ids=fitting_id)
def test_sixteen_bits_do_not_swallow_the_increments(solver, kind):
    """Steps of bfloat16 far below its spacing end where those of float32 do, to one rounding."""

    class Creeping(Turning):
        def drift(self, x, t):
            return torch.ones_like(x)

    sde = Creeping(kind, volatility=0.05)
    x = torch.full((4, 3), 8.0)  # the spacing there is 1/16, a step 1/48
    with torch.no_grad():
        exact = sf.solve(sde, x, solver, steps=48, seed=1).x
        got = sf.solve(sde, x.bfloat16(), solver, steps=48, seed=1).x
    torch.testing.assert_close(got.float(), exact, rtol=2**-8, atol=0)


def loss(solver, kind, x, rate, volatility):
    return sf.solve(Turning(kind, rate, volatility), x, solver, steps=2, seed=1).x.square().sum()


@pytest.mark.parametrize("interpretation", ["ito", "stratonovich"])
@pytest.mark.parametrize(("solver", "kind"), CASES, ids=fitting_id)
def test_gradients_are_finite_differences(solver, kind, interpretation, monkeypatch):
    """For x, for a parameter of the drift and for one of the diffusion, alone and together."""
    monkeypatch.setattr(Turning, "interpretation", interpretation)
    x = torch.rand(3, 2, dtype=F64) + 0.2
    leaves = [x.clone(), torch.tensor(0.7, dtype=F64), torch.tensor(0.3, dtype=F64)]
    for alone in ((0, 1, 2), (0,), (1,), (2,)) if interpretation == "ito" else ((0, 1, 2),):
        inputs = [v.clone().requires_grad_(i in alone) for i, v in enumerate(leaves)]
        got = torch.autograd.grad(loss(solver, kind, *inputs), [inputs[i] for i in alone])
        for i, gradient in zip(alone, got, strict=True):
            direction, eps = torch.ones_like(leaves[i]), 1e-6
            ends = []
            for sign in (1, -1):
                moved = [v + sign * eps * direction if j == i else v for j, v in enumerate(leaves)]
                with torch.no_grad():
                    ends.append(float(loss(solver, kind, *moved)))
            want = (ends[0] - ends[1]) / (2 * eps)
            assert float(gradient.sum()) == pytest.approx(want, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("solver", "kind"), CASES, ids=fitting_id)
def test_modes_without_gradients(solver, kind, mode):
    x = torch.rand(3, 2, dtype=F64) + 0.2
    graph = sf.solve(Turning(kind), x.clone().requires_grad_(), solver, steps=3, seed=1).x
    with mode():
        plain = sf.solve(Turning(kind), x, solver, steps=3, seed=1).x
    assert graph.requires_grad
    assert not plain.requires_grad
    torch.testing.assert_close(plain.clone(), graph.detach(), rtol=1e-12, atol=1e-12)


def tableau_step(table, f, g, x, t, h, w, area):
    """A step of the method SRI of a tableau, term by term."""
    r, j = math.sqrt(h), 0.5 * w + area
    integrals = (w, (w * w - h) / (2 * r), j, (w**3 - 3 * h * w) / (6 * h))
    drift = f(x, t)
    values = []
    for a, b, c in zip(table.a1, table.b1, table.c1, strict=True):
        y = x + h * sum(a) * drift + r * sum((v * u for v, u in zip(b, values, strict=False)), torch.zeros_like(x))
        values.append(g(y, t + c * h))
    stage = x + h * table.a0[1][0] * drift + table.b0[1][0] * values[0] * j
    new = x + h * (table.alpha[0] * drift + table.alpha[1] * f(stage, t + table.c0[1] * h))
    for beta, integral in zip((table.beta1, table.beta2, table.beta3, table.beta4), integrals, strict=True):
        new = new + sum(v * u for v, u in zip(beta, values, strict=True)) * integral
    return new


def test_sriw1_written_out_is_its_tableau():
    """The step's combinations share terms; the tableau, term by term, does not. A changed entry is seen."""

    class Wave(sf.SDE):
        def drift(self, x, t):
            return torch.sin(x) * (1 + t)

        def diffusion(self, x, t):
            return 0.4 * torch.cos(x) + 0.2 * t

    sde, x, h = Wave(), torch.linspace(-1, 1, 5, dtype=F64)[:, None], 0.25
    walk = sf.Noise(1, 5).walk(torch.tensor([0.0, h], dtype=F64), (1,), F64, areas=True)
    w, area = walk(0)
    got = sf.solve(sde, x, SRIW1(), grid=[0.0, h], seed=1).x
    t = torch.tensor(0.0, dtype=F64)
    torch.testing.assert_close(
        got, tableau_step(SRI1W1_TABLEAU, sde.drift, sde.diffusion, x, t, h, w, area), rtol=0, atol=1e-14
    )
    wrong = dataclasses.replace(SRI1W1_TABLEAU, b1=((), (1 / 2,), (-1,), (-5, 3, 0.49)))
    assert float((got - tableau_step(wrong, sde.drift, sde.diffusion, x, t, h, w, area)).abs().max()) > 1e-5
