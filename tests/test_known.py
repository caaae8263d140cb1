"""Processes with closed-form laws, held against formulas, quadratures and laws of scipy written here."""

import math
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy import special, stats

from sdeflow.known import GBM, KernelSDE, KnownSDE, RotationGBM, SigmoidOU, SinhOU, Student
from sdeflow.model import Model
from sdeflow.solve import solve
from sdeflow.solvers import RK4, EulerMaruyama
from sdeflow.special import CIR, Jacobi, Sphere, SquaredBessel
from sdeflow.special_functions import ancestral_weights, hyp0f1_ratio, log_hyp0f1

RISK = 1e-5
"""The probability that a test of random draws would fail for a fresh seed; the seeds are fixed."""


def tensor(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


# ---- the cases: a process, its Ito drift and covariance G G^T as the literature writes them, and points to test at


@dataclass
class Case:
    sde: Any
    drift: Any
    covariance: Any
    low: float
    high: float

    def points(self, n, seed=0):
        """(x, t) inside the domain, t one a sample in [0.1, 1]."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(n, self.sde.dim, generator=generator, dtype=torch.float64) * (self.high - self.low) + self.low
        if isinstance(self.sde, Sphere):
            x = x / x.norm(dim=-1, keepdim=True)
        return x, 0.1 + 0.9 * torch.rand(n, 1, generator=generator, dtype=torch.float64)


def diagonal(of):
    return lambda x: torch.diag_embed(of(x))


def projection(x):
    return torch.eye(x.shape[-1], dtype=x.dtype) - x[:, :, None] * x[:, None, :] / (x**2).sum(-1)[:, None, None]


def turned(x):
    return torch.stack([-x[:, 1], x[:, 0]], -1)


def outer(v):
    return v[:, :, None] * v[:, None, :]


def sphere_case(dim, start):
    sde = Sphere(dim, start=start, weights=[0.3, 0.7])
    return Case(sde, lambda x: -0.5 * (dim - 1) * x / (x**2).sum(-1, keepdim=True), projection, -1.0, 1.0)


CASES = {
    "GBM": Case(
        GBM(0.3, 0.8, start=[[0.7], [1.5]], weights=[1, 2]),
        lambda x: 0.3 * x, diagonal(lambda x: 0.64 * x**2), 0.2, 3.0,
    ),
    "GBM-2d": Case(
        GBM(-0.2, 0.6, start=[[0.7, 1.1], [1.5, 0.4]]),
        lambda x: -0.2 * x, diagonal(lambda x: 0.36 * x**2), 0.2, 3.0,
    ),
    "SinhOU": Case(
        SinhOU(0.8, 0.9, start=[[-1.0], [0.5]]),
        lambda x: -0.8 * torch.log(x + torch.sqrt(1 + x**2)) * torch.sqrt(1 + x**2) + 0.405 * x,
        diagonal(lambda x: 0.81 * (1 + x**2)), -3.0, 3.0,
    ),
    "SigmoidOU": Case(
        SigmoidOU(0.8, 1.2, start=[[0.2], [0.7]]),
        lambda x: x * (1 - x) * (-0.8 * torch.log(x / (1 - x)) + 0.72 * (1 - 2 * x)),
        diagonal(lambda x: 1.44 * x**2 * (1 - x) ** 2), 0.05, 0.95,
    ),
    "CIR": Case(
        CIR(1.5, 0.8, 0.9, start=[[0.3], [2.0]]),
        lambda x: 1.5 * (0.8 - x), diagonal(lambda x: 0.81 * x), 0.1, 3.0,
    ),
    "CIR-2d": Case(
        CIR(1.5, 0.8, 0.9, start=[[0.3, 1.0], [2.0, 0.0]]),
        lambda x: 1.5 * (0.8 - x), diagonal(lambda x: 0.81 * x), 0.1, 3.0,
    ),
    "SquaredBessel": Case(
        SquaredBessel(3.5, start=[[0.0], [1.5]]),
        lambda x: 3.5 + 0 * x, diagonal(lambda x: 4 * x), 0.1, 5.0,
    ),
    "Jacobi": Case(
        Jacobi(1.7, 2.4, start=[[0.1], [0.6]]),
        lambda x: 0.5 * (1.7 * (1 - x) - 2.4 * x), diagonal(lambda x: x * (1 - x)), 0.03, 0.97,
    ),
    "Jacobi-2d": Case(
        Jacobi(1.7, 2.4, start=[[0.1, 0.0], [0.6, 0.9]]),
        lambda x: 0.5 * (1.7 * (1 - x) - 2.4 * x), diagonal(lambda x: x * (1 - x)), 0.03, 0.97,
    ),
    "Student": Case(
        Student(0.7, 0.3, dim=2), lambda x: -0.7 * x, diagonal(lambda x: 0.42 * (1 + x**2)), -3.0, 3.0
    ),
    "circle": sphere_case(2, [[1.0, 0.0], [-0.6, 0.8]]),
    "sphere": sphere_case(3, [[0.0, 0.0, 1.0], [0.6, 0.0, -0.8]]),
    "RotationGBM": Case(
        RotationGBM(0.2, 1.3, 0.5, 0.7, start=[[1.0, 0.0], [-0.5, 0.8]]),
        lambda x: 0.2 * x + 1.3 * turned(x), lambda x: 0.25 * outer(x) + 0.49 * outer(turned(x)), -2.0, 2.0,
    ),
}  # fmt: skip
LINES = ["GBM", "SinhOU", "SigmoidOU", "CIR", "SquaredBessel", "Jacobi"]  # one coordinate, with a kernel
cases = pytest.mark.parametrize("name", CASES)
lines = pytest.mark.parametrize("name", LINES)


# ---- derivatives, by reverse mode in this file


def gradient(value, x):
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True, allow_unused=True)
    return torch.zeros_like(x) if slope is None else slope


def slope_of(value, x):
    return gradient(value, x) if value.requires_grad else torch.zeros_like(x)


def equation_terms(log_density, drift, covariance, x, t, sign):
    """Terms of d_t log p + div f + f.s + sign/2 [sum d_ij D_ij + 2 div D . s + D : (hess log p + s s^T)], (n, k)."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    log_p, f, cov = log_density(x, t), drift(x, t), covariance(x, t)
    s, d = gradient(log_p, x), x.shape[1]
    hessian = torch.stack([slope_of(s[:, i], x) for i in range(d)], 1)
    terms = [slope_of(log_p, t)[:, 0], *(slope_of(f[:, i], x)[:, i] for i in range(d)), *(f * s).T]
    for i in range(d):
        for j in range(d):
            slope = slope_of(cov[:, i, j], x)[:, j]
            terms.append(0.5 * sign * slope_of(slope, x)[:, i])
            terms.append(sign * slope * s[:, i])
            terms.append(0.5 * sign * cov[:, i, j] * (hessian[:, i, j] + s[:, i] * s[:, j]))
    return torch.stack(terms, 1).detach()


def relative_residual(terms):
    # the size of the terms, or 1 where all vanish (the flow of a reversible stationary law does not move)
    return float((terms.sum(1).abs() / terms.abs().sum(1).clamp(min=1.0)).max())


def forward_terms(case, x, t):
    return equation_terms(case.sde.log_density, lambda x, _: case.drift(x), lambda x, _: case.covariance(x), x, t, -1.0)


def matrix_covariance(sde, x, t):
    g = sde.diffusion(x, t)
    g = g if sde.noise == "general" else torch.diag_embed(g.expand(x.shape))
    return g @ g.mT


# ---- 1. the Fokker-Planck equation


@cases
def test_density_solves_the_fokker_planck_equation(name):
    # measured: 2e-16 to 6e-16, CIR 1e-14, squared Bessel 4e-15, Jacobi 3e-14
    x, t = CASES[name].points(64)
    assert relative_residual(forward_terms(CASES[name], x, t)) < 1e-12


@cases
def test_fokker_planck_residual_sees_a_score_off_by_a_thousandth(name):
    case = CASES[name]
    x, t = case.points(64)
    terms = equation_terms(
        lambda x, t: 1.001 * case.sde.log_density(x, t), lambda x, _: case.drift(x), lambda x, _: case.covariance(x),
        x, t, -1.0,
    )  # fmt: skip
    assert relative_residual(terms) > 1e-6


@cases
def test_coefficients_are_those_of_the_literature(name):
    case, (x, t) = CASES[name], CASES[name].points(32)
    assert torch.allclose(case.sde.ito_drift(x, t), case.drift(x), rtol=1e-12, atol=1e-13)
    assert torch.allclose(matrix_covariance(case.sde, x, t), case.covariance(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["GBM", "CIR", "SquaredBessel", "SigmoidOU", "circle", "sphere"])
@pytest.mark.parametrize("time", [1e-3, 5.0])
def test_fokker_planck_at_short_and_long_times(name, time):
    # measured at 1e-3: 3e-12 for CIR, 2e-13 for the squared Bessel process, 5e-16 for the others
    case = CASES[name]
    x = case.points(32)[0]
    assert relative_residual(forward_terms(case, x, torch.full((32, 1), time, dtype=torch.float64))) < 1e-9


# ---- 8. reversal with the exact score


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
@cases
def test_reversal_with_the_exact_score_keeps_the_marginals(name, eta):
    case = CASES[name]
    reverse = case.sde.reverse(case.sde.score, eta)
    x, t = case.points(24, seed=1)
    terms = equation_terms(
        case.sde.log_density, reverse.drift, lambda x, t: matrix_covariance(reverse, x, t), x, t, 1.0
    )
    # measured: up to 4e-14 (CIR)
    assert relative_residual(terms) < 1e-11


# dropping div D = -x/|x|^2 adds a drift that neither diverges nor moves along the circle: it shows in 3 dimensions only
@pytest.mark.parametrize("name", [name for name in CASES if name != "circle"])
def test_reversal_without_the_divergence_of_the_covariance_fails(name):
    case = CASES[name]
    reverse = case.sde.reverse(case.sde.model(), 1.0)
    x, t = case.points(24, seed=1)
    terms = equation_terms(
        case.sde.log_density,
        lambda x, t: reverse.drift(x, t) + reverse.divergence(x, t),
        lambda x, t: matrix_covariance(reverse, x, t),
        x, t, 1.0,
    )  # fmt: skip
    assert relative_residual(terms) > 1e-2


def test_probability_flow_keeps_the_quantiles():
    # in one dimension the flow maps quantiles to quantiles
    sde = CIR(1.5, 0.8, 0.9, start=[[0.5]])
    x = tensor([[0.2], [0.6], [1.0], [1.7]])
    end = solve(sde.probability_flow(sde.score), x, RK4(), steps=100, t_span=(1.0, 0.25)).x
    assert np.allclose(cir_law(sde, 1.0, 0.5).cdf(x), cir_law(sde, 0.25, 0.5).cdf(end), atol=1e-8)


def test_reverse_equation_generates_positive_data():
    data = tensor([[0.4], [1.6]])
    sde = CIR(1.0, 1.0, 0.7, t1=4.0).with_start(data)
    x = sde.prior_sample((2000, 1), seed=3)
    end = solve(sde.reverse(sde.score), x, EulerMaruyama(), steps=200, seed=5, t_span=(4.0, 0.05)).x
    want = sde.marginal_sample(2000, 0.05, seed=7)
    assert bool((end > 0).all())
    assert stats.ks_2samp(end[:, 0], want[:, 0]).pvalue > RISK


def test_reverse_equation_on_the_sphere_stays_there():
    sde = Sphere(3, t1=2.0)
    x = sde.prior_sample((500, 3), seed=3)
    end = solve(sde.reverse(sde.score), x, EulerMaruyama(), steps=400, seed=5, t_span=(2.0, 0.1)).x
    # the steps leave the sphere by a random walk: 380 of standard deviation h = 0.005
    assert float(((end.norm(dim=-1) - 1) ** 2).mean().sqrt()) < 0.15
    cosine = end[:, 2] / end.norm(dim=-1)
    assert abs(float(cosine.mean()) - math.exp(-0.1)) < 0.03


# ---- 2. and 3. quadrature: the trapezoidal rule in a variable where the density decays at both ends

CHARTS = {  # (x of y, dx/dy, range of y)
    "line": (np.sinh, np.cosh, 12.0),
    "half": (np.exp, np.exp, 40.0),
    "interval": (special.expit, lambda y: special.expit(y) * special.expit(-y), 36.0),
}
CHART_OF = {
    "GBM": "half", "SinhOU": "line", "SigmoidOU": "interval", "CIR": "half", "SquaredBessel": "half",
    "Jacobi": "interval",
}  # fmt: skip


def nodes_of(chart, n=1500):
    state, slope, end = CHARTS[chart]
    y = np.linspace(-end, end, n)
    if chart == "half":
        y = np.linspace(-end, 10.0, n)
    x, weight = state(y), slope(y) * (y[1] - y[0])
    inside = (x > 0) & (x < 1) if chart == "interval" else np.isfinite(x)
    return tensor(x[inside]).unsqueeze(-1), tensor(weight[inside])


@lines
@pytest.mark.parametrize("time", [0.05, 0.4, 2.0])
def test_density_integrates_to_one_on_lines(name, time):
    x, weight = nodes_of(CHART_OF[name])
    assert abs(float((CASES[name].sde.log_density(x, time).exp() * weight).sum()) - 1) < 1e-9


@pytest.mark.parametrize("sde", [CIR(1.0, 0.3, 1.0), SquaredBessel(1.2), Jacobi(0.6, 0.7)])
def test_density_outside_fellers_condition_is_that_of_the_reflected_process(sde):
    assert not sde.feller
    x, weight = nodes_of("interval" if isinstance(sde, Jacobi) else "half")
    mass = sde.log_density(x, 0.4).exp() * weight
    assert abs(float(mass.sum()) - 1) < 1e-5  # what lies between 0 and the first node, e^{-40 b}, is left out
    t, x0 = 0.4, float(sde.start)
    mean = {
        CIR: lambda: 0.3 + (x0 - 0.3) * math.exp(-t),
        SquaredBessel: lambda: x0 + 1.2 * t,
        Jacobi: lambda: jacobi_mean(x0, t, 0.6, 0.7),
    }[type(sde)]()
    assert float((mass * x[:, 0]).sum()) == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("name", ["SinhOU", "SigmoidOU", "CIR", "Jacobi"])
def test_stationary_density_integrates_to_one_and_is_the_limit(name):
    x, weight = nodes_of(CHART_OF[name])
    sde = CASES[name].sde
    stationary = sde.stationary_log_density(x).exp()
    assert abs(float((stationary * weight).sum()) - 1) < 1e-9
    assert float(((sde.log_density(x, 60.0).exp() - stationary).abs() * weight).sum()) < 1e-9


def test_student_density_integrates_to_one():
    x, weight = nodes_of("line")
    assert abs(float((Student(0.7, 0.3).log_density(x, 0.5).exp() * weight).sum()) - 1) < 1e-9


@pytest.mark.parametrize("time", [0.05, 0.4, 2.0])
def test_density_integrates_to_one_on_the_circle_and_the_sphere(time):
    angle = tensor(np.arange(400) * (2 * math.pi / 400))
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    mass = CASES["circle"].sde.log_density(circle, time).exp().mean() * 2 * math.pi
    assert abs(float(mass) - 1) < 1e-9
    z, weight = (tensor(v) for v in np.polynomial.legendre.leggauss(80))
    ring = (1 - z**2).sqrt().reshape(-1, 1, 1) * circle[::4]
    points = torch.cat([ring, z.reshape(-1, 1, 1).expand(-1, 100, 1)], -1)
    density = CASES["sphere"].sde.log_density(points.reshape(-1, 3), time).exp().reshape(80, 100)
    assert abs(float((density.mean(1) * 2 * math.pi * weight).sum()) - 1) < 1e-9


@pytest.mark.parametrize("time", [0.05, 0.4, 2.0])
def test_density_of_the_rotation_integrates_to_one(time):
    growth, angle = torch.meshgrid(
        tensor(np.linspace(-8, 8, 300)), tensor(np.arange(120) * math.pi / 60), indexing="ij"
    )
    points = (growth.exp().unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)).reshape(-1, 2)
    density = CASES["RotationGBM"].sde.log_density(points, time).exp() * (points**2).sum(-1)
    assert abs(float(density.sum()) * (16 / 299) * (math.pi / 60) - 1) < 1e-9


@lines
def test_kernels_compose(name):
    # Chapman-Kolmogorov: measured below 1e-13 in the logarithm
    sde, (y, weight) = CASES[name].sde, nodes_of(CHART_OF[name])
    x, first, second = CASES[name].points(9)[0], 0.3, 0.45
    start = sde.start[-1:]
    rows = torch.logsumexp(
        torch.stack([
            sde.log_kernel(xi.expand_as(y), second, y) + sde.log_kernel(y, first, start) for xi in x
        ]) + weight.log(), -1
    )  # fmt: skip
    assert torch.allclose(rows, sde.log_kernel(x, first + second, start), rtol=0, atol=1e-10)


# ---- 4. laws of scipy


def cir_law(sde, t, x0):
    c = 2 * sde.kappa / (sde.sigma**2 * (1 - math.exp(-sde.kappa * t)))
    df, nc = 4 * sde.kappa * sde.theta / sde.sigma**2, 2 * c * x0 * math.exp(-sde.kappa * t)
    return stats.ncx2(df, nc, scale=0.5 / c)


def law(name, t, x0):
    """The transition law of CASES[name] in scipy."""
    sde = CASES[name].sde
    if name == "GBM":
        return stats.lognorm(0.8 * math.sqrt(t), scale=x0 * math.exp((0.3 - 0.32) * t))
    if name == "CIR":
        return cir_law(sde, t, x0)
    if name == "SquaredBessel":
        return stats.ncx2(3.5, x0 / t, scale=t)
    rate, scale = sde.rate, sde.scale
    std = scale * math.sqrt((1 - math.exp(-2 * rate * t)) / (2 * rate))
    y0 = math.asinh(x0) if name == "SinhOU" else math.log(x0 / (1 - x0))
    kind = stats.johnsonsu if name == "SinhOU" else stats.johnsonsb
    return kind(-y0 * math.exp(-rate * t) / std, 1 / std)


@pytest.mark.parametrize("name", ["GBM", "SinhOU", "SigmoidOU", "CIR", "SquaredBessel"])
@pytest.mark.parametrize("time", [0.1, 1.0])
def test_kernel_is_that_of_scipy(name, time):
    case = CASES[name]
    x, start = case.points(40)[0], tensor([[0.6]])
    want = law(name, time, 0.6).logpdf(x[:, 0].numpy())
    assert np.allclose(case.sde.log_kernel(x, time, start), want, rtol=1e-9, atol=1e-9)


def test_jacobi_kernel_is_its_expansion_in_jacobi_polynomials():
    a, b, t, x0 = 1.7, 2.4, 0.4, 0.35
    x = np.linspace(0.05, 0.95, 41)
    total = 0.0
    for n in range(40):
        norm = math.exp(
            math.lgamma(n + a) + math.lgamma(n + b) - math.lgamma(n + a + b - 1) - math.lgamma(n + 1)
        ) / (2 * n + a + b - 1) * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))  # fmt: skip
        p, p0 = (special.eval_jacobi(n, b - 1, a - 1, 2 * y - 1) for y in (x, x0))
        total = total + math.exp(-0.5 * n * (n - 1 + a + b) * t) * p * p0 / norm
    want = stats.beta(a, b).logpdf(x) + np.log(total)
    got = Jacobi(a, b).log_kernel(tensor(x).unsqueeze(-1), t, tensor([[x0]]))
    assert np.allclose(got, want, rtol=1e-11, atol=1e-11)


def test_wrapped_normal_and_heat_kernel():
    angle = np.linspace(-3.1, 3.1, 40)
    x = tensor(np.stack([np.cos(angle), np.sin(angle)], -1))
    want = sum(stats.norm(0, math.sqrt(0.7)).pdf(angle + 2 * math.pi * k) for k in range(-6, 7))
    assert np.allclose(Sphere(2).log_kernel(x, 0.7, tensor([[1.0, 0.0]])), np.log(want), atol=1e-12)
    for t in (0.6, 1.0, 3.0):
        degree = np.arange(40)[:, None]
        terms = (2 * degree + 1) / (4 * math.pi) * np.exp(-0.5 * degree * (degree + 1) * t)
        want = (terms * special.eval_legendre(degree, np.cos(angle))).sum(0)
        points = tensor(np.stack([np.sin(angle), 0 * angle, np.cos(angle)], -1))
        assert np.allclose(Sphere(3).log_kernel(points, t, tensor([[0.0, 0.0, 1.0]])), np.log(want), atol=1e-11)


def test_per_sample_times_on_both_sides_of_the_two_forms():
    x, t = CASES["sphere"].points(20)[0], tensor(np.linspace(0.2, 3.0, 20)).unsqueeze(-1)
    apart = torch.cat([CASES["sphere"].sde.log_density(x[i : i + 1], float(t[i])) for i in range(20)])
    assert torch.allclose(CASES["sphere"].sde.log_density(x, t), apart, rtol=1e-12, atol=1e-12)


def test_stationary_laws_are_those_of_scipy():
    x = np.linspace(0.05, 0.95, 19)
    column = tensor(x).unsqueeze(-1)
    assert np.allclose(Jacobi(1.7, 2.4).stationary_log_density(column), stats.beta(1.7, 2.4).logpdf(x))
    want = stats.gamma(2 * 1.5 * 0.8 / 0.81, scale=0.81 / 3).logpdf(x)
    assert np.allclose(CIR(1.5, 0.8, 0.9).stationary_log_density(column), want)
    nu = 1 + 1 / 0.3
    want = stats.t(nu, scale=1 / math.sqrt(nu)).logpdf(x)
    assert np.allclose(Student(0.7, 0.3).stationary_log_density(column), want)
    want = stats.johnsonsu(0, math.sqrt(1.6) / 0.9).logpdf(x)
    assert np.allclose(SinhOU(0.8, 0.9).stationary_log_density(column), want)
    assert np.allclose(Sphere(3).stationary_log_density(tensor([[0.0, 0.6, 0.8]])), -math.log(4 * math.pi))


def test_score_of_gbm_in_closed_form():
    sde = GBM(0.3, 0.8)
    x, t = CASES["GBM"].points(20)
    want = -(1 / x) * (1 + (torch.log(x) - (0.3 - 0.32) * t) / (0.64 * t))
    assert torch.allclose(sde.score(x, t), want, rtol=1e-12)
    assert torch.allclose(sde.model().score(x, t[:, 0]), want, rtol=1e-12)


@pytest.mark.parametrize("b", [0.3, 1.0, 2.5, 40.0, 400.0, 5e3])
def test_hypergeometric_function_and_its_derivatives(b):
    for w in (0.0, 1e-9, 0.2, 0.26, 7.0, 900.0, 4e5, 1e7, 1e8):
        with mpmath.workdps(60):
            parts = [mpmath.hyp0f1(b + k, w, maxterms=10**6) / mpmath.rf(b, k) for k in range(3)]
            want = mpmath.log(parts[0]), parts[1] / parts[0], parts[2] / parts[0] - (parts[1] / parts[0]) ** 2
        x = tensor([w]).requires_grad_()
        value = log_hyp0f1(b, x)
        first = gradient(value, x)
        second = gradient(first, x)
        value, first, second = float(value.detach()), float(first.detach()), float(second.detach())
        # rounding of log Gamma(b) and of z = 2 sqrt(w), which cancel in the value
        assert abs(value - float(want[0])) < 1e-15 * (b * math.log(b + 3) + 2 * math.sqrt(w)) + 1e-13
        assert first == pytest.approx(float(want[1]), rel=1e-12)
        assert abs(second - float(want[2])) < 2e-12 * first**2
        assert float(hyp0f1_ratio(b, x.detach())) == first


def test_kernel_of_a_nearly_deterministic_process():
    # b = 1e5, where Bessel functions underflow: Gamma laws of such a shape are normal to 1/sqrt(b)
    sde = CIR(50.0, 10.0, 0.1)
    t, x0 = 0.01, 9.0
    mean = 10 - math.exp(-0.5)
    std = math.sqrt(9 * 2e-4 * (math.exp(-0.5) - math.exp(-1)) + 1e-3 * (1 - math.exp(-0.5)) ** 2)
    x = mean + std * tensor(np.linspace(-3, 3, 13)).unsqueeze(-1)
    want = stats.norm(mean, std).logpdf(x[:, 0].numpy())
    assert np.allclose(sde.log_kernel(x, t, tensor([[x0]])), want, atol=0.05)
    y = mean + std * tensor(np.linspace(-9, 9, 400)).unsqueeze(-1)
    assert abs(float(sde.log_kernel(y, t, tensor([[x0]])).exp().sum()) * std * 18 / 399 - 1) < 1e-7


def test_weights_of_the_ancestral_process():
    # a = b = 1/2 from the boundary: sum_m q_m E over Beta(1/2, 1/2 + m) is the folded heat kernel of an angle
    for theta in (0.4, 1.0, 6.0):
        for t in (0.02, 0.3, 4.0):
            q = ancestral_weights(theta, t)
            assert (q >= 0).all()
            assert abs(q.sum() - 1) < 1e-14
            assert q[-1] < 1e-18
    angle = np.linspace(0.1, 3.0, 20)
    x = tensor(np.sin(angle / 2) ** 2).unsqueeze(-1)
    for t in (0.01, 0.1, 1.0):
        density = Jacobi(0.5, 0.5).log_kernel(x, t, tensor([[0.0]])).numpy() + np.log(np.sin(angle) / 2)
        turns = 2 * math.pi * np.arange(-6, 7)
        want = special.logsumexp(stats.norm(0, math.sqrt(t)).logpdf(angle[:, None] + turns), axis=1) + math.log(2)
        assert np.allclose(density, want, rtol=1e-12, atol=1e-12)


# ---- 5. and 6. draws and moments


@lines
def test_draws_have_the_law_of_the_kernel(name):
    sde, n, t, x0 = CASES[name].sde, 4000, 0.35, 0.6
    draws = sde.kernel_sample(torch.full((n, 1), x0, dtype=torch.float64), t, seed=11)[:, 0].numpy()
    if name == "Jacobi":
        y, weight = nodes_of("interval")
        cumulative = np.cumsum((sde.log_kernel(y, t, tensor([[x0]])).exp() * weight).numpy())
        cdf = lambda x: np.interp(x, y[:, 0].numpy(), cumulative)  # noqa: E731  (to 1e-3, a tenth of the statistic)
    else:
        cdf = law(name, t, x0).cdf
    assert stats.kstest(draws, cdf).pvalue > RISK


def test_draws_on_the_circle_the_sphere_and_the_plane():
    n, t = 4000, 0.5
    x0 = tensor([0.6, 0.8]).expand(n, 2)
    x = Sphere(2).kernel_sample(x0, t, seed=1)
    cosine, sine = (x * x0).sum(-1), (turned(x0) * x).sum(-1)
    moments = {  # of an angle N(0, t): E cos = e^{-t/2}, E cos^2 = (1 + e^{-2t})/2
        "cosine": (cosine, math.exp(-t / 2), 0.5 * (1 + math.exp(-2 * t))),
        "sine": (sine, 0.0, 0.5 * (1 - math.exp(-2 * t))),
    }
    for value, mean, square in moments.values():
        assert abs(float(value.mean()) - mean) < 5 * float(value.std()) / math.sqrt(n)
        assert abs(float((value**2).mean()) - square) < 5 * float((value**2).std()) / math.sqrt(n)
    x0 = tensor([0.6, 0.0, -0.8]).expand(n, 3)
    x = Sphere(3).kernel_sample(x0, t, seed=2)
    assert torch.allclose(x.norm(dim=-1), torch.ones(n, dtype=torch.float64))
    degree = np.arange(1, 30)[:, None]

    def cdf(c):  # of the cosine: the integral of the heat kernel over the cap below c
        steps = special.eval_legendre(degree + 1, c) - special.eval_legendre(degree - 1, c)
        return 0.5 * (1 + c + (np.exp(-0.5 * degree * (degree + 1) * t) * steps).sum(0))

    assert stats.kstest((x * x0).sum(-1).numpy(), cdf).pvalue > RISK
    around = torch.atan2(x[:, 1], (x * tensor([0.8, 0.0, 0.6])).sum(-1))
    assert stats.kstest(around.numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > RISK
    sde = RotationGBM(0.2, 1.3, 0.5, 0.3)
    x = sde.kernel_sample(tensor([1.0, 0.0]).expand(n, 2), t, seed=4)
    radius, angle = x.norm(dim=-1).log().numpy(), torch.atan2(x[:, 1], x[:, 0]).numpy()
    assert stats.kstest(radius, stats.norm((0.2 - 0.08) * t, 0.5 * math.sqrt(t)).cdf).pvalue > RISK
    assert stats.kstest(angle, stats.norm(1.3 * t, 0.3 * math.sqrt(t)).cdf).pvalue > RISK


@pytest.mark.parametrize("name", ["SinhOU", "SigmoidOU", "CIR", "Jacobi", "Student"])
def test_prior_draws_have_the_stationary_law(name):
    sde = {
        "SinhOU": SinhOU(0.8, 0.9), "SigmoidOU": SigmoidOU(0.8, 1.2), "CIR": CIR(1.5, 0.8, 0.9),
        "Jacobi": Jacobi(1.7, 2.4), "Student": Student(0.7, 0.3),
    }[name]  # fmt: skip
    std, nu = 1.2 / math.sqrt(1.6), 1 + 1 / 0.3
    cdf = {
        "SinhOU": stats.johnsonsu(0, math.sqrt(1.6) / 0.9).cdf,
        "SigmoidOU": stats.johnsonsb(0, 1 / std).cdf,
        "CIR": stats.gamma(2 * 1.5 * 0.8 / 0.81, scale=0.81 / 3).cdf,
        "Jacobi": stats.beta(1.7, 2.4).cdf,
        "Student": stats.t(nu, scale=1 / math.sqrt(nu)).cdf,
    }[name]
    assert stats.kstest(sde.prior_sample((4000, 1), seed=6)[:, 0].numpy(), cdf).pvalue > RISK


def test_prior_draws_without_a_stationary_law_are_those_of_the_end():
    sde = GBM(0.3, 0.8, start=[[0.5], [2.0]], weights=[3, 1], t1=0.7)
    laws = [law("GBM", 0.7, 0.5), law("GBM", 0.7, 2.0)]
    draws = sde.prior_sample((4000, 1), seed=6)[:, 0].numpy()
    assert stats.kstest(draws, lambda x: 0.75 * laws[0].cdf(x) + 0.25 * laws[1].cdf(x)).pvalue > RISK


def test_draws_belong_to_the_sample():
    x0 = torch.full((10, 1), 0.6, dtype=torch.float64)
    times = tensor(np.linspace(0.1, 1, 10)).unsqueeze(-1)
    for name in LINES:
        sde = CASES[name].sde
        whole = sde.kernel_sample(x0, times, seed=9)
        part = sde.kernel_sample(x0[4:], times[4:], seed=9, index=torch.arange(4, 10))
        assert torch.equal(whole[4:], part)
        assert not torch.equal(whole, sde.kernel_sample(x0, times, seed=10))
        prior = sde.prior_sample((10, 1), seed=9)
        assert torch.equal(prior[4:], sde.prior_sample((6, 1), seed=9, index=4))
        assert not torch.equal(prior, whole)


MOMENTS = {  # (mean, variance) of x_t from x0
    "GBM": lambda x0, t: (x0 * math.exp(0.3 * t), x0**2 * math.exp(0.6 * t) * math.expm1(0.64 * t)),
    "CIR": lambda x0, t: (
        0.8 + (x0 - 0.8) * math.exp(-1.5 * t),
        x0 * 0.81 / 1.5 * (math.exp(-1.5 * t) - math.exp(-3 * t)) + 0.8 * 0.81 / 3 * (1 - math.exp(-1.5 * t)) ** 2,
    ),
    "SquaredBessel": lambda x0, t: (x0 + 3.5 * t, 4 * x0 * t + 2 * 3.5 * t**2),
}


def jacobi_mean(x0, t, a=1.7, b=2.4):
    return a / (a + b) + (x0 - a / (a + b)) * math.exp(-0.5 * (a + b) * t)


@pytest.mark.parametrize("time", [0.1, 0.8])
@pytest.mark.parametrize("name", [*MOMENTS, "Jacobi"])
def test_moments_by_quadrature_and_by_draws(name, time):
    sde, (x, weight), n = CASES[name].sde, nodes_of(CHART_OF[name]), 20000
    mass = sde.log_kernel(x, time, tensor([[0.6]])).exp() * weight
    mean = float((mass * x[:, 0]).sum())
    want = jacobi_mean(0.6, time) if name == "Jacobi" else MOMENTS[name](0.6, time)[0]
    assert mean == pytest.approx(want, rel=1e-9)
    if name in MOMENTS:
        variance = float((mass * (x[:, 0] - mean) ** 2).sum())
        assert variance == pytest.approx(MOMENTS[name](0.6, time)[1], rel=1e-9)
    draws = sde.kernel_sample(torch.full((n, 1), 0.6, dtype=torch.float64), time, seed=21)
    assert abs(float(draws.mean()) - want) < 5 * float(draws.std()) / math.sqrt(n)


# ---- 7. simulation


@pytest.mark.parametrize("name", ["GBM", "CIR", "SigmoidOU", "SquaredBessel", "Jacobi"])
def test_simulation_agrees_with_the_kernel(name):
    # a bias of the steps of 1/200, below 2e-3, is added to the 5 standard errors of the two means
    sde, n = CASES[name].sde, 4000
    x0 = torch.full((n, 1), 0.6, dtype=torch.float64)
    path = sde.simulate(x0, steps=200, seed=31).x
    exact = sde.kernel_sample(x0, sde.t1, seed=32)
    error = math.hypot(float(path.std()), float(exact.std())) / math.sqrt(n)
    assert abs(float(path.mean() - exact.mean())) < 5 * error + 2e-3


def test_simulation_on_the_sphere_and_in_the_plane():
    # the Stratonovich equation is converted: E x_t = e^{-t} x_0; and E x_t = e^{mu t} R(omega t) x_0
    n = 2000
    x = Sphere(3).simulate(tensor([0.0, 0.0, 1.0]).expand(n, 3), steps=200, seed=33).x
    assert float((x.mean(0) - tensor([0.0, 0.0, math.exp(-1)])).abs().max()) < 5 / math.sqrt(3 * n) + 2e-3
    x = RotationGBM(0.2, 1.3, 0.5, 0.3).simulate(tensor([1.0, 0.0]).expand(n, 2), steps=200, seed=34).x
    want = math.exp(0.2) * tensor([math.cos(1.3), math.sin(1.3)])
    assert bool(((x.mean(0) - want).abs() < 5 * x.std(0) / math.sqrt(n) + 1e-2).all())


def test_prior_draws_on_the_sphere_are_uniform():
    x = Sphere(3).prior_sample((4000, 3), seed=8)
    assert torch.allclose(x.norm(dim=-1), torch.ones(4000, dtype=torch.float64))
    for i in range(3):
        assert stats.kstest(x[:, i].numpy(), stats.uniform(-1, 2).cdf).pvalue > RISK
    x = Sphere(2).prior_sample((4000, 2), seed=8)
    assert stats.kstest(torch.atan2(x[:, 1], x[:, 0]).numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > RISK


# ---- starts, states, errors


def test_mixture_over_atoms():
    sde = CIR(1.0, 1.0, 0.7)
    data = tensor([[0.4], [0.9], [1.6]])
    mixed = sde.with_start(data, [1, 2, 5])
    x, t = CASES["CIR"].points(10)
    want = sum(
        w * sde.with_start(z[None]).log_density(x, t).exp() for w, z in zip((0.125, 0.25, 0.625), data, strict=True)
    )
    assert torch.allclose(mixed.log_density(x, t).exp(), want, rtol=1e-12)
    assert torch.equal(sde.start, tensor([[1.0]]))
    assert type(mixed) is CIR
    assert mixed.kappa == sde.kappa
    assert GBM().with_start([[1.0, 2.0]]).event == (2,)
    assert torch.allclose(mixed.score(x, 0.5), mixed.score(x, torch.full((10,), 0.5)), rtol=1e-14)


@cases
def test_score_follows_the_graph_and_the_dtype(name):
    sde, (x, t) = CASES[name].sde, CASES[name].points(6)
    score = sde.score(x, t)
    assert not score.requires_grad
    assert bool(torch.isfinite(score).all())
    assert torch.allclose(sde.score(x.float(), t).double(), score, rtol=1e-3, atol=1e-3)
    assert sde.score(x.float(), t).dtype == torch.float32
    leaf = x.clone().requires_grad_()
    assert bool(torch.isfinite(gradient(sde.score(leaf, t), leaf)).all())
    with torch.inference_mode():
        assert torch.equal(sde.score(x, t), score)
    with torch.no_grad():
        assert torch.equal(sde.score(leaf, t), score)
    assert isinstance(sde.model(), Model)
    assert torch.equal(sde.model().score(x, t), score)
    assert isinstance(sde, KnownSDE)
    assert isinstance(sde, KernelSDE) == (name != "Student")


@cases
def test_coefficients_keep_the_dtype(name):
    sde, (x, t) = CASES[name].sde, CASES[name].points(6)
    for dtype in (torch.float32, torch.float64):
        y = x.to(dtype)
        for time in (torch.tensor(0.5, dtype=torch.float64), t):
            assert sde.drift(y, time).dtype == dtype
            assert sde.drift(y, time).shape == x.shape
            g = sde.diffusion(y, time)
            assert g.dtype == dtype
            assert g.shape[:2] == x.shape
            reverse = sde.reverse(sde.score)
            assert reverse.drift(y, time).dtype == dtype
            assert reverse.diffusion(y, time).dtype == dtype


def test_outside_the_domain():
    for sde, bad in ((GBM(), -1.0), (CIR(), 0.0), (Jacobi(), 1.0), (SigmoidOU(), 1.5), (SquaredBessel(), math.nan)):
        x = tensor([[0.5], [bad]])
        assert sde.log_density(x, 0.5)[1] == -math.inf
        assert bool(torch.isfinite(sde.log_density(x, 0.5)[0]))
        score = sde.score(x, 0.5)
        assert bool(torch.isfinite(score[0]))
        assert bool(torch.isnan(score[1]))
    assert bool(torch.isnan(Sphere(3).score(torch.zeros(1, 3, dtype=torch.float64), 0.5)).all())
    # past the boundary a step is brought back by the drift
    x = tensor([[-0.1]])
    assert float(CIR().diffusion(x, tensor(0.0))) == 0
    assert float(CIR().drift(x, tensor(0.0))) > 0
    assert float(Jacobi().diffusion(1 - x, tensor(0.0))) == 0
    assert float(Jacobi().drift(1 - x, tensor(0.0))) < 0


def test_score_on_the_sphere_is_tangential_and_the_same_along_rays():
    x, t = CASES["sphere"].points(10)
    sde = CASES["sphere"].sde
    assert float((sde.score(x, t) * x).sum(-1).abs().max()) < 1e-12
    assert torch.allclose(sde.log_density(3 * x, t), sde.log_density(x, t), rtol=1e-13)
    ends = torch.cat([sde.start, -sde.start])  # where an angle has no derivative
    assert bool(torch.isfinite(sde.score(ends, 0.3)).all())


def test_fellers_condition():
    assert CIR(1.0, 0.5, 1.0).feller
    assert not CIR(1.0, 0.49, 1.0).feller
    assert SquaredBessel(2.0).feller
    assert not SquaredBessel(1.9).feller
    assert Jacobi(1.0, 1.0).feller
    assert not Jacobi(0.9, 2.0).feller
    assert not Jacobi(2.0, 0.9).feller
    assert GBM().feller
    assert SinhOU().feller
    assert Sphere().feller
    assert GBM().domain == CIR().domain == SquaredBessel().domain == (0.0, math.inf)
    assert Jacobi().domain == SigmoidOU().domain == (0.0, 1.0)


BAD = [
    (lambda: GBM(0.1, 0.0), "sigma"),
    (lambda: GBM(math.nan, 1.0), "mu"),
    (lambda: CIR(-1.0, 1.0, 1.0), "kappa"),
    (lambda: CIR(1.0, 1.0, math.inf), "sigma"),
    (lambda: SquaredBessel(0.0), "delta"),
    (lambda: Jacobi(1.0, 0.0), "expected b"),
    (lambda: SinhOU(0.0, 1.0), "rate"),
    (lambda: SigmoidOU(1.0, -1.0), "scale"),
    (lambda: Student(1.0, 0.0), "expected a"),
    (lambda: Student(dim=0), "dim"),
    (lambda: Sphere(4), "dim 2"),
    (lambda: RotationGBM(rho=-0.1), "rho"),
    (lambda: GBM(t1=0.0), "t1"),
    (lambda: GBM(start=[[0.0]]), r"\(0, inf\), got values from 0"),
    (lambda: GBM(start=[1.0]), r"\(K, d\)"),
    (lambda: GBM(start=[[1.0]], weights=[1, 1]), "1 finite weights"),
    (lambda: GBM().with_start([[1.0], [2.0]], [1, -1]), "2 finite weights"),
    (lambda: Jacobi(start=[[1.2]]), r"\[0, 1\]"),
    (lambda: CIR(start=[[-0.1]]), r"\[0, inf\]"),
    (lambda: Sphere(3, start=[[1.0, 1.0, 0.0]]), "unit vectors"),
    (lambda: Sphere(3, start=[[1.0, 0.0]]), "unit vectors"),
    (lambda: RotationGBM(start=[[0.0, 0.0]]), "away from 0"),
    (lambda: GBM().log_density(torch.ones(3), 0.5), r"\(batch, 1\)"),
    (lambda: GBM().log_density(torch.ones(3, 2), 0.5), r"\(batch, 1\)"),
    (lambda: GBM().log_density(torch.ones(3, 1, dtype=torch.int64), 0.5), "floating-point"),
    (lambda: GBM().log_density(torch.ones(3, 1), 0.0), "times > 0"),
    (lambda: GBM().log_density(torch.ones(3, 1), torch.ones(3, 2)), "one a sample"),
    (lambda: GBM().score(torch.ones(3, 1), torch.ones(2)), "one a sample"),
    (lambda: GBM().log_kernel(torch.ones(3, 1), 0.5, torch.ones(2, 1)), "broadcast"),
    (lambda: GBM().log_kernel(torch.ones(3, 1), 0.5, -torch.ones(3, 1)), "x0"),
    (lambda: GBM().kernel_sample(torch.zeros(3, 1), 0.5, 0), "x0"),
    (lambda: GBM().prior_sample((3, 2), 0), r"\(batch, 1\)"),
    (lambda: GBM().stationary_log_density(torch.ones(3, 1)), "no stationary law"),
    (lambda: SquaredBessel().stationary_log_density(torch.ones(3, 1)), "no stationary law"),
    (lambda: RotationGBM(rho=0.0).log_density(torch.ones(3, 2), 0.5), "rho > 0"),
    (lambda: Jacobi().log_density(torch.full((3, 1), 0.5), 0.005), "0.01"),
    (lambda: Jacobi().kernel_sample(torch.full((3, 1), 0.5), 0.005, 0), "0.01"),
]


@pytest.mark.parametrize(("make", "match"), BAD)
def test_errors_say_what_was_expected(make, match):
    with pytest.raises(ValueError, match=match):
        make()
