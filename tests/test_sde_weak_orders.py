"""Weak orders of methods for SDEs, without sampling.

Errors are exact: the expectation over a step is a quadrature over its (W, H), and functions of the state are propagated
as Fourier series on a torus or as moments of a linear equation.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm

import sdeflow as sf
from sdeflow.solvers import SRIW1, PlatenWeak2
from sdeflow.solvers.stochastic import root, size
from tests.exact import F64, slope
from tests.sde_solver_cases import (
    Geometric,
    Heisenberg,
    ItoDrift,
    Plane,
    StratonovichMilstein,
    Swinging,
    SwingingAdditive,
    WithoutArea,
    changed,
    named,
    outcomes,
    quick,
    rows,
)

# ---- weak orders: the expectation over a step by quadrature, functions of the state as Fourier series


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
