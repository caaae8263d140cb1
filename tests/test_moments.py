"""Moments of polynomial processes against closed forms written here."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.known import GBM, RotationGBM, SinhOU
from sdeflow.linear import LinearSDE
from sdeflow.moments import mean_and_covariance, moments
from sdeflow.special import CIR, Jacobi

F64 = torch.float64


def column(values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)[:, None]


def near(got, want, tolerance=1e-10):
    got, want = torch.as_tensor(got, dtype=F64), torch.as_tensor(want, dtype=F64)
    gap = (got - want).abs() / (1 + want.abs())
    assert float(gap.max()) < tolerance, f"got {got}, expected {want}"


class OU(sf.SDE):
    """dx = -2 (x - 1) dt + 0.7 dW."""

    t1 = 3.0

    def drift(self, x, t):
        return -2 * (x - 1)

    def diffusion(self, x, t):
        return 0.7 * torch.ones_like(x)


def test_gbm_up_to_degree_four():
    mu, sigma, t = 0.3, 0.5, 0.8
    x0 = column([0.5, 1.0, 2.5])
    basis, values = moments(GBM(mu, sigma), x0, t, degree=4)
    assert basis == [(), (0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]
    for k in range(5):
        near(values[:, k], x0[:, 0] ** k * math.exp((k * mu + 0.5 * k * (k - 1) * sigma**2) * t))


def test_cir_mean_and_variance():
    kappa, theta, sigma, t = 1.5, 0.8, 0.6, 0.7
    x0 = column([0.2, 1.0, 3.0])
    mean, covariance = mean_and_covariance(*moments(CIR(kappa, theta, sigma), x0, t))
    e = math.exp(-kappa * t)
    near(mean, theta + (x0 - theta) * e)
    want = x0 * sigma**2 / kappa * (e - e**2) + theta * sigma**2 / (2 * kappa) * (1 - e) ** 2
    near(covariance[:, 0], want)


def test_ou_up_to_degree_four():
    t = 1.3
    x0 = column([-1.0, 0.5, 4.0])
    m = 1 + (x0[:, 0] - 1) * math.exp(-2 * t)
    v = 0.7**2 * (1 - math.exp(-4 * t)) / 4
    basis, values = moments(OU(), x0, t, degree=4)
    wants = [torch.ones(3, dtype=F64), m, m**2 + v, m**3 + 3 * m * v, m**4 + 6 * m**2 * v + 3 * v**2]
    for k, want in enumerate(wants):
        near(values[:, k], want)
    assert len(basis) == 5


def test_jacobi_mean_and_second_moment():
    a, b, t = 1.4, 2.1, 0.9
    x0 = column([0.1, 0.5, 0.85])
    _, values = moments(Jacobi(a, b), x0, t)
    rate, mean = 0.5 * (a + b), a / (a + b)
    gap = x0[:, 0] - mean
    near(values[:, 1], mean + gap * math.exp(-rate * t))
    # d m2/dt = (a + 1) m1 - (a + b + 1) m2
    fast, one = a + b + 1, (a + 1)
    still = one * mean / fast
    part = one * gap / (fast - rate)
    want = still + part * math.exp(-rate * t) + (x0[:, 0] ** 2 - still - part) * math.exp(-fast * t)
    near(values[:, 2], want)


def test_coordinates_that_do_not_interact():
    x0 = torch.tensor([[0.5, 2.0], [1.0, 0.3]], dtype=F64)
    mean, covariance = mean_and_covariance(*moments(GBM(0.2, 0.4, start=[[1.0, 1.0]]), x0, 0.6))
    near(mean, x0 * math.exp(0.12))
    near(covariance[:, 0, 1], torch.zeros(2, dtype=F64))
    near(covariance[:, 1, 1], x0[:, 1] ** 2 * math.exp(0.24) * math.expm1(0.16 * 0.6))


@pytest.mark.parametrize("process", [sf.VP(0.1, 4.0), sf.SubVP(0.5, 3.0)], ids=["VP", "SubVP"])
def test_time_dependent_against_the_kernel(process):
    x0 = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=F64)
    for t in (0.3, 1.0):
        mean, covariance = mean_and_covariance(*moments(process, x0, t))
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        near(mean, alpha * x0)
        near(covariance, (sigma**2 * torch.eye(2, dtype=F64)).expand(2, 2, 2))


def test_a_later_start():
    process = sf.VP(0.1, 4.0)
    ratio, std = process.transition_kernel(0.4, 0.9)
    mean, covariance = mean_and_covariance(*moments(process, column([1.5]), 0.9, s=0.4))
    near(mean, 1.5 * ratio)
    near(covariance, std**2)


def test_fourth_moments_of_a_correlated_gaussian_are_isserlis():
    sde = LinearSDE([[-1.0, 0.6], [-0.3, -0.8]], [[0.7, 0.0], [0.4, 0.5]], offset=[0.5, -0.2])
    x0, t = torch.tensor([[0.4, -0.7]], dtype=F64), 0.75
    kernel = sde.transition(0.0, t)
    m, q = (x0 @ kernel.matrix.T + kernel.shift)[0], kernel.covariance
    basis, values = moments(sde, x0, t, degree=4)
    found = {c: float(values[0, k]) for k, c in enumerate(basis)}
    assert len(basis) == 15
    (a, b), (u, w, v) = m.tolist(), (float(q[0, 0]), float(q[0, 1]), float(q[1, 1]))
    near(found[0, 0, 0], a**3 + 3 * a * u)
    near(found[0, 0, 1], a**2 * b + 2 * a * w + b * u)
    near(found[0, 0, 1, 1], a**2 * b**2 + a**2 * v + b**2 * u + 4 * a * b * w + u * v + 2 * w**2)
    near(found[0, 0, 0, 1], a**3 * b + 3 * a**2 * w + 3 * a * b * u + 3 * u * w)
    near(found[1, 1, 1, 1], b**4 + 6 * b**2 * v + 3 * v**2)


def test_cross_noise_of_a_quadratic_diffusion():
    """RotationGBM: E|x|^2 grows at 2 mu + sigma^2 + rho^2, and the mean turns."""
    sde = RotationGBM(0.1, 1.2, 0.5, 0.4)
    x0, t = torch.tensor([[1.0, 0.5]], dtype=F64), 0.6
    basis, values = moments(sde, x0, t)
    found = {c: float(values[0, k]) for k, c in enumerate(basis)}
    near(found[0, 0] + found[1, 1], 1.25 * math.exp((0.2 + 0.25 + 0.16) * t))
    turn = math.exp(0.1 * t)
    near(found[0,], turn * (math.cos(1.2 * t) - 0.5 * math.sin(1.2 * t)))
    near(found[1,], turn * (math.sin(1.2 * t) + 0.5 * math.cos(1.2 * t)))


def test_no_time_has_passed():
    x0 = column([0.5, 2.0])
    _, values = moments(OU(), x0, 0.0, degree=3)
    near(values, torch.cat([x0**k for k in range(4)], dim=1), 1e-15)


def test_what_is_not_polynomial_is_refused():
    with pytest.raises(ValueError, match="no polynomial process"):
        moments(SinhOU(), column([0.3]), 0.5)


def test_time_runs_forwards():
    with pytest.raises(ValueError, match="expected s <= t"):
        moments(OU(), column([0.3]), 0.2, s=0.5)
