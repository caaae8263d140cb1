"""Reversal: the family keeps the marginals, with the divergence where it belongs."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm

import sdeflow as sf
from sdeflow.problems import Gaussian
from tests.exact import F64, NAMES, last_time, make, mixture_log_density, random_mixture, score_of

ETAS = (0.0, 0.5, 1.0, 2.0)


def time(t):
    return torch.tensor(t, dtype=F64)


class WithoutDivergence(sf.ReverseSDE):
    """The mutant that every reversal test must reject."""

    def divergence(self, x, t):
        return torch.zeros_like(x)


# ---- Gaussian processes: the moments of the reverse equation are those of the forward one


def reverse_moments(reverse, mean, variance, start, end):
    """(mean, variance) of dx = (A x + b) dt + g dW from `start` down, A and b read off the drift, by scipy."""
    probes = torch.stack([torch.zeros_like(mean), torch.ones_like(mean)])
    dim = mean.numel()

    def rhs(t, state):
        with torch.no_grad():
            offset, plus = reverse.drift(probes, time(t)).numpy()
            g = float(reverse.diffusion(probes, time(t)).flatten()[0])
        slope = plus - offset
        m, v = state[:dim], state[dim:]
        return np.concatenate([slope * m + offset, 2 * slope * v - g**2])

    state = np.concatenate([mean.numpy(), variance.numpy()])
    run = solve_ivp(rhs, (start, end), state, method="DOP853", rtol=1e-11, atol=1e-12)
    return run.y[:dim, -1], run.y[dim:, -1]


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "DiscreteVP"])
def test_every_eta_keeps_the_marginals_of_a_gaussian(name, eta):
    process = make(name)
    mean, variance = torch.tensor([0.7, -1.5], dtype=F64), torch.tensor([0.3, 2.0], dtype=F64)
    reverse = process.reverse(Gaussian(mean, variance).model(process), eta)
    start, end = last_time(process), process.t_min + 0.05 * (last_time(process) - process.t_min)
    if isinstance(process, sf.DiscreteVP):
        start, end = 0.79, 0.61  # within one entry of the table: scipy's steps do not cross a jump
    a, s = (lambda t: float(process.alpha(t))), (lambda t: float(process.sigma(t)))
    m, v = reverse_moments(reverse, a(start) * mean, a(start) ** 2 * variance + s(start) ** 2, start, end)
    np.testing.assert_allclose(m, a(end) * mean.numpy(), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(v, a(end) ** 2 * variance.numpy() + s(end) ** 2, rtol=1e-8)


def test_a_wrong_factor_is_caught_by_the_moments():
    """The control: eta for eta^2 in the drift's weight."""
    process = sf.VP()
    mean, variance = torch.tensor([0.7], dtype=F64), torch.tensor([0.3], dtype=F64)
    model = Gaussian(mean, variance).model(process)
    wrong = process.reverse(model, 0.5)
    wrong.drift = process.reverse(model, math.sqrt(0.5)).drift
    start, end = 1.0, 0.05
    a2, s2 = float(process.alpha(start)) ** 2, float(process.sigma(start)) ** 2
    _, v = reverse_moments(wrong, process.alpha(start) * mean, a2 * variance + s2, start, end)
    assert abs(v[0] - float(process.alpha(end) ** 2 * 0.3 + process.sigma(end) ** 2)) > 1e-2


@pytest.mark.parametrize("name", ["DiscreteVP(5)", "DiscreteVP"])
@pytest.mark.parametrize("eta", ETAS)
def test_the_drift_is_the_textbook_formula(name, eta):
    """f x - (1 + eta^2)/2 g^2 s, also where a table's rate jumps."""
    process = make(name)
    law = random_mixture(3, 2, seed=1)
    model = sf.problems.GaussianMixture(*law).model(process)
    reverse = process.reverse(model, eta)
    x = torch.randn(20, 2, dtype=F64)
    for t in (0.21, 0.5, 0.777, 1.0):
        s = score_of(mixture_log_density(*law, process.alpha(t), process.sigma(t)), x)
        f, g2 = process.drift_coeff(t), process.diffusion_coeff(t) ** 2
        torch.testing.assert_close(
            reverse.drift(x, time(t)), f * x - 0.5 * (1 + eta**2) * g2 * s, rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(reverse.diffusion(x, time(t)), eta * g2.sqrt(), rtol=1e-13, atol=0)


def test_the_flow_of_rectified_flow_starts_at_time_one():
    process = sf.RectifiedFlow()
    problem = Gaussian([1.0, -0.5], [0.2, 0.4])
    flow = process.probability_flow(problem.model(process))
    x = torch.randn(5, 2, dtype=F64)
    # at t = 1, x is eps: the velocity is x - E[x_0]
    torch.testing.assert_close(flow.drift(x, time(1.0)), x - problem.mean, rtol=1e-13, atol=1e-13)
    assert bool(torch.isfinite(flow.drift(x.to(torch.float32), time(1.0))).all())


# ---- reversal of general equations: the residual of the reverse Fokker-Planck equation


class GeometricBrownianMotion(sf.SDE):
    """dX = mu X dt + b X dW from a lognormal X_0: log X_t = N(m + (mu - b^2/2) t, v + b^2 t)."""

    mu, b, m, v = 0.4, 0.6, 0.2, 0.1

    def drift(self, x, t):
        return self.mu * x

    def diffusion(self, x, t):
        return self.b * x

    def log_density(self, x, t):
        y = torch.log(x)
        mean, variance = self.m + (self.mu - 0.5 * self.b**2) * t, self.v + self.b**2 * t
        normal = -0.5 * (y - mean) ** 2 / variance - 0.5 * torch.log(2 * math.pi * variance)
        return (normal - y).sum(-1)

    def score(self, x, t):
        """By hand: -(1 + (log x - mean)/variance)/x."""
        mean, variance = self.m + (self.mu - 0.5 * self.b**2) * t, self.v + self.b**2 * t
        return -(1 + (torch.log(x) - mean) / variance) / x


def reverse_residual(reverse, log_density, x, t):
    """d_t log p + div b + b.s + (sum_ij d_ij D_ij + 2 div D . s + D : (hess log p + s s^T))/2 over its largest term.

    b and D = G G^T are the drift and covariance of `reverse`; the sign of D is that of a clock that
    runs down. Everything by autograd, one point (1, d) at a time.
    """
    d = x.shape[1]

    def grad(value, leaf):
        return torch.autograd.grad(value, leaf, create_graph=True, allow_unused=True)[0]

    def in_x(value):
        slope = grad(value, x) if value.requires_grad else None
        return torch.zeros(d, dtype=F64) if slope is None else slope[0]

    x, t = x.clone().requires_grad_(), time(t).requires_grad_()
    log_p = log_density(x, t).sum()
    s, d_t = in_x(log_p), grad(log_p, t)
    hessian = torch.stack([in_x(s[i]) for i in range(d)])
    t = t.detach()
    b, g = reverse.drift(x, t)[0], reverse.diffusion(x, t)
    g = torch.diag(g.expand(1, d)[0]) if reverse.noise == "diagonal" else g[0]
    covariance = g @ g.T
    slopes = [[in_x(covariance[i, j]) for j in range(d)] for i in range(d)]
    div = torch.stack([sum(slopes[i][j][j] for j in range(d)) for i in range(d)])
    second = sum(in_x(slopes[i][j][j])[i] for i in range(d) for j in range(d))
    terms = torch.stack([
        d_t, sum(in_x(b[i])[i] for i in range(d)), b @ s,
        0.5 * second, div @ s, 0.5 * (covariance * (hessian + torch.outer(s, s))).sum(),
    ])  # fmt: skip
    return float((terms.sum().abs() / (1 + terms.abs().max())).detach())


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_the_reversal_of_geometric_brownian_motion(eta, t):
    sde = GeometricBrownianMotion()
    for x in (0.3, 1.0, 2.5):
        point = torch.tensor([[x]], dtype=F64)
        assert reverse_residual(sde.reverse(sde.score, eta), sde.log_density, point, t) < 1e-9
        assert reverse_residual(WithoutDivergence(sde, sde.score, eta), sde.log_density, point, t) > 1e-3


def test_the_drift_of_reversed_geometric_brownian_motion_by_hand():
    """mu x - (1 + eta^2)/2 (2 b^2 x + b^2 x^2 s)."""
    sde = GeometricBrownianMotion()
    x = torch.rand(6, 1, dtype=F64) + 0.5
    for eta in ETAS:
        want = sde.mu * x - 0.5 * (1 + eta**2) * sde.b**2 * (2 * x + x**2 * sde.score(x, time(0.3)))
        reverse = sde.reverse(sde.score, eta)
        torch.testing.assert_close(reverse.drift(x, time(0.3)), want, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(reverse.diffusion(x, time(0.3)), eta * sde.b * x)


class CrossDiagonal(sf.SDE):
    """Diagonal noise whose every entry depends on all coordinates."""

    def drift(self, x, t):
        return torch.sin(x.roll(1, -1)) - x

    def diffusion(self, x, t):
        return 1 + 0.5 * torch.tanh(x + 0.7 * x.roll(1, -1)) * torch.cos(0.3 * t)


class OwnDiagonal(CrossDiagonal):
    """Diagonal noise of each coordinate alone."""

    def diffusion(self, x, t):
        return torch.sqrt(1 + x**2) * (1 + t)


class Matrix(CrossDiagonal):
    """General noise, 3 columns."""

    noise = "general"

    def diffusion(self, x, t):
        first = torch.stack([x, torch.sin(x.roll(1, -1)), 1 + 0 * x], dim=-1)
        return first * (1 + t) + 0.2 * torch.tanh(x.sum(-1))[:, None, None]


def brute_divergence(sde, x, t):
    """(div D)_i = sum_j d_j D_ij by central differences of order 4, one sample at a time."""
    out = torch.zeros_like(x)

    def covariance(y):
        g = sde.diffusion(y[None], t)
        g = torch.diag(g.expand(1, y.numel())[0]) if sde.noise == "diagonal" else g[0]
        return g @ g.T

    h = 1e-3
    for b, row in enumerate(x):
        for j in range(row.numel()):
            e = torch.zeros_like(row)
            e[j] = h
            slope = 8 * (covariance(row + e) - covariance(row - e)) - (
                covariance(row + 2 * e) - covariance(row - 2 * e)
            )
            out[b] += slope[:, j] / (12 * h)
    return out


@pytest.mark.parametrize("sde", [OwnDiagonal(), CrossDiagonal(), Matrix()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_divergence_against_differences(sde, dim):
    x = torch.randn(4, dim, dtype=F64)
    reverse = sde.reverse(lambda x, t: -x)
    want = brute_divergence(sde, x, time(0.4))
    torch.testing.assert_close(reverse.divergence(x, time(0.4)), want, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(reverse.divergence(x, time(0.4)), want, rtol=1e-8, atol=1e-8)
    with torch.inference_mode():
        again = sde.reverse(lambda x, t: -x).divergence(x.clone(), time(0.4))
        torch.testing.assert_close(again, want, rtol=1e-8, atol=1e-8)
    single = reverse.divergence(x.to(torch.float32), time(0.4))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.to(F64), want, rtol=1e-4, atol=1e-4)


def test_the_divergence_with_a_time_per_sample():
    for sde in (OwnDiagonal(), CrossDiagonal()):
        x, t = torch.randn(4, 3, dtype=F64), torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=F64)[:, None]
        got = sde.reverse(lambda x, t: -x).divergence(x, t)
        want = torch.cat([brute_divergence(sde, x[i : i + 1], t[i, 0]) for i in range(4)])
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


class CrossLater(sf.SDE):
    """Noise that depends on its own coordinate alone at t = 1, and on the next one before."""

    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        return 2 + torch.sin(x) + (1 - t) * torch.cos(x.roll(1, -1))


class CrossOffCentre(CrossLater):
    """Noise whose coordinates do not mix at x = 0, and do elsewhere."""

    def diffusion(self, x, t):
        return 2 + torch.tanh(x * x.roll(1, -1))


@pytest.mark.parametrize("sde", [CrossLater(), CrossOffCentre()], ids=lambda s: type(s).__name__)
def test_no_verdict_about_the_noise_outlives_the_point_it_was_seen_at(sde):
    """A first call where coordinates happen not to mix must not decide for the others."""
    reverse = sde.reverse(lambda x, t: -x)
    reverse.divergence(torch.zeros(2, 3, dtype=F64), time(1.0))
    x = torch.randn(2, 3, dtype=F64)
    want = brute_divergence(sde, x, time(0.5))
    torch.testing.assert_close(reverse.divergence(x, time(0.5)), want, rtol=1e-8, atol=1e-8)


def test_noise_without_x_costs_no_divergence():
    """Additive noise is evaluated, never differentiated; its divergence is exactly zero."""

    class Additive(CrossDiagonal):
        def diffusion(self, x, t):
            return (1 + t) * torch.ones_like(x)

    x = torch.randn(3, 2, dtype=F64)
    reverse = Additive().reverse(lambda x, t: -x)
    assert torch.equal(reverse.divergence(x, time(0.5)), torch.zeros_like(x))
    assert not reverse.divergence(x, time(0.5)).requires_grad

    class Constant(Additive):
        noise = "general"
        matrix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0]], dtype=F64)

        def diffusion(self, x, t):
            return self.matrix.expand(x.shape[0], 2, 3)

    reverse = Constant().reverse(lambda x, t: -x)
    assert torch.equal(reverse.divergence(x, time(0.5)), torch.zeros_like(x))
    covariance = Constant.matrix @ Constant.matrix.T
    want = torch.sin(x.roll(1, -1)) - x + x @ covariance
    torch.testing.assert_close(reverse.drift(x, time(0.5)), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sde", [OwnDiagonal(), CrossDiagonal()], ids=lambda s: type(s).__name__)
def test_images_have_the_divergence_of_their_flat_vectors(sde):
    class Flat(type(sde)):
        def diffusion(self, x, t):
            return super().diffusion(x.reshape(-1, 2, 2, 2), t).reshape(x.shape)

    x = torch.randn(3, 2, 2, 2, dtype=F64)
    got = sde.reverse(lambda x, t: -x).divergence(x, time(0.2))
    want = brute_divergence(Flat(), x.flatten(1), time(0.2))
    torch.testing.assert_close(got.flatten(1), want, rtol=1e-8, atol=1e-8)


# ---- full matrices G(x): push-forwards of a linear equation through a diffeomorphism


class PushedForward(sf.SDE):
    """x = phi(y) = y + B^T tanh(B y + c) of dY = A Y dt + L dW, Y_0 normal: everything about it is exact.

    The drift of x is J A y + 1/2 H : L L^T (Ito), its noise J L, its score J^-T (s_Y - grad log det J).
    """

    noise = "general"

    def __init__(self, dim, seed):
        rng = np.random.default_rng(seed)

        def tensor(v):
            return torch.tensor(v, dtype=F64)

        self.a = tensor(0.5 * rng.normal(size=(dim, dim)) - 0.7 * np.eye(dim))
        self.l = tensor(np.eye(dim) + 0.4 * rng.normal(size=(dim, dim)))
        self.b, self.c = tensor(0.6 * rng.normal(size=(dim, dim))), tensor(rng.normal(size=dim))
        self.mean0, self.cov0 = tensor(rng.normal(size=dim)), 0.5 * torch.eye(dim, dtype=F64)

    def phi(self, y):
        return y + torch.tanh(y @ self.b.T + self.c) @ self.b

    def jacobian(self, y):
        """(batch, d, d)."""
        slope = 1 - torch.tanh(y @ self.b.T + self.c) ** 2
        return torch.eye(y.shape[1], dtype=F64) + self.b.T @ (slope.unsqueeze(-1) * self.b)

    def curvature(self, y):
        """H : L L^T, the vector sum_ab d_ab phi_i (L L^T)_ab."""
        z = torch.tanh(y @ self.b.T + self.c)
        size = ((self.b @ self.l) ** 2).sum(1)  # |L^T b_r|^2 for every row of B
        return (-2 * z * (1 - z**2) * size) @ self.b

    def inverse(self, x):
        """y with phi(y) = x: Newton without gradients, then one step that carries the first derivative."""
        y = x.detach().clone()
        for _ in range(60):
            step = torch.linalg.solve(self.jacobian(y), (x.detach() - self.phi(y)).unsqueeze(-1)).squeeze(-1)
            y = y + step.clamp(-1, 1)
        return y + torch.linalg.solve(self.jacobian(y), (x - self.phi(y)).unsqueeze(-1)).squeeze(-1)

    def law(self, t):
        """Mean and covariance of Y_t (Van Loan)."""
        d, t = self.a.shape[0], float(t)
        a, noise = self.a.numpy(), (self.l @ self.l.T).numpy()
        block = expm(t * np.block([[a, noise], [np.zeros((d, d)), -a.T]]))
        flow, spread = block[:d, :d], block[:d, d:] @ block[:d, :d].T
        mean = torch.tensor(flow @ self.mean0.numpy(), dtype=F64)
        return mean, torch.tensor(flow @ self.cov0.numpy() @ flow.T + spread, dtype=F64)

    def base_score(self, y, t):
        mean, covariance = self.law(t)
        return -torch.linalg.solve(covariance, (y - mean).T).T

    def drift(self, x, t):
        y = self.inverse(x)
        return (self.jacobian(y) @ (y @ self.a.T).unsqueeze(-1)).squeeze(-1) + 0.5 * self.curvature(y)

    def diffusion(self, x, t):
        return self.jacobian(self.inverse(x)) @ self.l

    def score(self, x, t):
        y = self.inverse(x).detach().requires_grad_()
        with torch.enable_grad():
            volume = torch.linalg.slogdet(self.jacobian(y))[1].sum()
            (expansion,) = torch.autograd.grad(volume, y)
        y = y.detach()
        return torch.linalg.solve(self.jacobian(y).mT, (self.base_score(y, t) - expansion).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_reversal_commutes_with_a_change_of_variables(dim, eta):
    """Reversing the push-forward is pushing the reversal of the linear equation forward (Ito, clock down)."""
    sde = PushedForward(dim, seed=dim)
    y = torch.randn(5, dim, dtype=F64)
    x, t = sde.phi(y), time(0.6)
    noise = sde.l @ sde.l.T
    base = y @ sde.a.T - 0.5 * (1 + eta**2) * sde.base_score(y, t) @ noise
    want = (sde.jacobian(y) @ base.unsqueeze(-1)).squeeze(-1) - 0.5 * eta**2 * sde.curvature(y)
    reverse = sde.reverse(sde.score, eta)
    torch.testing.assert_close(reverse.drift(x, t), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(reverse.diffusion(x, t), eta * sde.jacobian(y) @ sde.l, rtol=1e-10, atol=1e-10)
    wrong = WithoutDivergence(sde, sde.score, eta).drift(x, t)
    assert float((wrong - want).abs().max()) > 1e-3


# ---- the family as a whole


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "sde", [sf.VP(), sf.EDM(), OwnDiagonal(), CrossDiagonal(), Matrix()], ids=lambda s: type(s).__name__
)
def test_reversing_twice_gives_the_process_back(sde, eta):
    """Noise eta G reversed with 1/eta is G again; the divergence and the score cancel."""

    def score(x, t):
        return torch.cos(x) - x.roll(1, -1)

    x, t = torch.randn(4, 2, dtype=F64), time(0.3)
    twice = sde.reverse(score, eta).reverse(score, 1 / eta)
    torch.testing.assert_close(twice.drift(x, t), sde.drift(x, t), rtol=1e-11, atol=1e-11)
    noise = torch.as_tensor(sde.diffusion(x, t))
    torch.testing.assert_close(twice.diffusion(x, t), noise, rtol=1e-13, atol=0)
    assert twice.direction == sde.direction
    assert twice.span == (sde.t_min, sde.t1)


def test_reversing_twice_takes_the_same_model():
    process = sf.VP()
    model = Gaussian([0.5], [0.2]).model(process)
    x, t = torch.randn(4, 1, dtype=F64), time(0.3)
    twice = process.reverse(model).reverse(model)
    torch.testing.assert_close(twice.drift(x, t), process.drift(x, t), rtol=1e-11, atol=1e-11)


def test_eta_as_a_function_of_time():
    process = sf.VP()
    model = Gaussian([0.5, 1.0], [0.2, 3.0]).model(process)
    x = torch.randn(3, 2, dtype=F64)
    reverse = process.reverse(model, lambda t: 2 * t)
    assert reverse.stochastic
    for t in (0.1, 0.5, 0.8):
        fixed = process.reverse(model, 2 * t)
        torch.testing.assert_close(reverse.drift(x, time(t)), fixed.drift(x, time(t)), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(reverse.diffusion(x, time(t)), fixed.diffusion(x, time(t)))
    each = torch.tensor([0.1, 0.5, 0.8], dtype=F64)[:, None]
    rows = torch.cat([reverse.drift(x[i : i + 1], each[i, 0]) for i in range(3)])
    torch.testing.assert_close(reverse.drift(x, each), rows, rtol=1e-13, atol=1e-13)
    assert reverse.diffusion(x, each).shape == (3, 1)


def test_eta_as_a_function_with_matrix_noise_and_a_time_per_sample():
    sde = Matrix()
    reverse = sde.reverse(lambda x, t: -x, lambda t: 2 * t)
    x, each = torch.randn(3, 2, dtype=F64), torch.tensor([[0.1], [0.5], [0.8]], dtype=F64)

    class Still(Matrix):  # the same noise at one time, so that only eta varies
        def diffusion(self, x, t):
            return super().diffusion(x, time(0.5))

    reverse = Still().reverse(lambda x, t: -x, lambda t: 2 * t)
    got_drift, got_noise = reverse.drift(x, each), reverse.diffusion(x, each)
    for i in range(3):
        fixed = Still().reverse(lambda x, t: -x, 2 * float(each[i]))
        row = x[i : i + 1]
        torch.testing.assert_close(got_drift[i : i + 1], fixed.drift(row, each[i, 0]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got_noise[i : i + 1], fixed.diffusion(row, each[i, 0]))


def test_the_flow_has_no_noise():
    process = sf.VP()
    flow = process.probability_flow(Gaussian([0.5], [0.2]).model(process))
    assert not flow.stochastic
    assert flow.direction == -1
    assert flow.span == (1.0, 1e-3)
    assert float(flow.diffusion(torch.ones(1, 1), time(0.5))) == 0.0


# ---- exact transitions


def frozen_moments(process, eta, prediction, value, x, start, end):
    """(mean, variance) at `end` of the reverse equation with its prediction frozen at `value`, by scipy."""
    f, g, a, s = process.drift_coeff, process.diffusion_coeff, process.alpha, process.sigma

    def rhs(t, state):
        score = -value / s(t) if prediction == "eps" else (a(t) * value - state[0]) / s(t) ** 2
        pull = 0.0 if prediction == "eps" else -1 / float(s(t)) ** 2
        square, rate = float(g(t)) ** 2, eta(t) ** 2
        slope = float(f(t)) - 0.5 * (1 + rate) * square * pull
        drift = float(f(t)) * state[0] - 0.5 * (1 + rate) * square * float(score)
        return [drift, 2 * slope * state[1] - rate * square]

    run = solve_ivp(rhs, (start, end), [x, 0.0], method="DOP853", rtol=1e-12, atol=1e-13)
    return run.y[:, -1]


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "CosineVP", "EDM", "RectifiedFlow", "from_kernel"])
def test_one_transition_is_exact_when_the_prediction_is_constant(name, eta, prediction):
    process = make(name)
    reverse = process.reverse(lambda x, t: -x, eta)
    start = process.t_min + 0.6 * (last_time(process) - process.t_min)
    end = process.t_min + 0.4 * (last_time(process) - process.t_min)
    ratio, amp, c, std = (float(v) for v in reverse.transition(start, end, prediction))
    h = float(process.lam(end) - process.lam(start))
    mean = ratio * 1.3 + amp * -math.expm1(-c * h) * 0.8
    want = frozen_moments(process, lambda t: eta, prediction, 0.8, 1.3, start, end)
    assert mean == pytest.approx(want[0], rel=1e-8, abs=1e-9)
    assert std**2 == pytest.approx(want[1], rel=1e-8, abs=1e-12)


def test_a_transition_with_eta_of_time_keeps_the_variance():
    process = sf.VP()
    reverse = process.reverse(lambda x, t: -x, lambda t: 0.5 + t)
    ratio, amp, c, std = (float(v) for v in reverse.transition(0.5, 0.4))
    h = float(process.lam(0.4) - process.lam(0.5))
    want = frozen_moments(process, lambda t: 0.5 + t, "x0", 0.8, 1.3, 0.5, 0.4)
    assert ratio * 1.3 + amp * -math.expm1(-c * h) * 0.8 == pytest.approx(want[0], rel=1e-9)
    assert std**2 == pytest.approx(want[1], rel=1e-9)


@pytest.mark.parametrize("eta", ETAS)
def test_the_marginal_is_kept_by_one_transition(eta):
    """From a point: alpha_1 x_0 + sigma_1 eps again, whatever the step."""
    process = sf.SubVP()
    reverse = process.reverse(lambda x, t: -x, eta)
    for t0, t1 in ((1.0, 0.001), (0.5, 0.3), (0.3, 0.29999)):
        ratio, amp, c, std = reverse.transition(t0, t1)
        h = process.lam(t1) - process.lam(t0)
        mean = ratio * process.alpha(t0) - amp * torch.expm1(-c * h)
        variance = (ratio * process.sigma(t0)) ** 2 + std**2
        torch.testing.assert_close(mean, process.alpha(t1), rtol=1e-12, atol=0)
        torch.testing.assert_close(variance, process.sigma(t1) ** 2, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["VP", "EDM", "RectifiedFlow"])
@pytest.mark.parametrize("eta", ETAS)
def test_the_last_transition_reaches_the_data(name, eta):
    """To sigma = 0 the state is the prediction: ratio 0, no noise, nothing infinite."""
    process = make(name)
    ratio, amp, _, std = process.reverse(lambda x, t: -x, eta).transition(0.3, 0.0)
    assert (float(ratio), float(amp), float(std)) == (0.0, 1.0, 0.0)


# ---- errors


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: sf.VP().reverse(lambda x, t: x, -0.5), ValueError, "eta >= 0"),
        (lambda: sf.VP().reverse(lambda x, t: x, math.nan), ValueError, "eta as a number or a function, got nan"),
        (lambda: sf.VP().reverse(lambda x, t: x, "1"), ValueError, "eta as a number or a function, got '1'"),
        (lambda: sf.VP().reverse(3.0), TypeError, "model as a Model or a function"),
        (lambda: sf.ReverseSDE(3.0, lambda x, t: x), TypeError, "process as an SDE"),
        (lambda: sf.VP().reverse(Gaussian([0.0], [1.0]).model(sf.EDM())), ValueError, "made for EDM"),
        (lambda: Matrix().reverse(lambda x, t: x).transition(0.5, 0.4), ValueError, "transition view"),
        (lambda: sf.VP().reverse(lambda x, t: x).transition(0.5, 0.4, "v"), ValueError, 'prediction "x0" or "eps"'),
        (lambda: sf.RectifiedFlow().reverse(lambda x, t: x).transition(1.0, 0.4, "eps"), ValueError, "alpha = 0"),
    ],
)  # fmt: skip
def test_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()
