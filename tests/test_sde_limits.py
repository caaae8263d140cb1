"""Methods for SDEs in their limits: without noise, with stiff drifts, with a linear part that is split off."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm, solve_continuous_lyapunov

import sdeflow as sf
from sdeflow.solvers import SKROCK, SRA1, SRA3, SRIW1, EulerMaruyama, Milstein, Splitting, StochasticHeun
from tests.exact import F64, slope
from tests.sde_solver_cases import ROWS, Given, Quiet, forced, named, outcomes, quick

# ---- without noise


def swinging_rate(x, t):
    return x * torch.cos(t)


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
