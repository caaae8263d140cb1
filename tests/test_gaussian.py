"""Gaussian processes: two descriptions that must agree, kernels, conventions, precision, errors."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp

import sdeflow as sf
from tests.exact import F64, NAMES, coefficients, knots, last_time, make, times

FEW_PIECES = [name for name in NAMES if name != "DiscreteVP"]
"""A table of 1000 betas is 1000 pieces to integrate; the one of 5 stands for it."""


def derivative(function, t):
    """d function/dt by reverse mode, zero where it is constant."""
    leaf = t.detach().clone().requires_grad_()
    value = function(leaf)
    if not value.requires_grad:
        return torch.zeros_like(t)
    return torch.autograd.grad(value.sum(), leaf)[0]


def assert_close(got, want, rtol, atol=0.0):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), rtol=rtol, atol=atol)


# ---- coefficients against the kernel, and back


@pytest.mark.parametrize("name", NAMES)
def test_f_and_g_are_the_derivatives_of_the_kernel(name):
    process = make(name)
    t = times(process)
    f = derivative(lambda u: torch.log(process.alpha(u)), t)
    variance = process.sigma(t) ** 2
    g2 = derivative(lambda u: process.sigma(u) ** 2, t) - 2 * f * variance
    assert_close(process.drift_coeff(t), f, rtol=1e-10, atol=1e-10)
    assert_close(process.diffusion_coeff(t) ** 2, g2, rtol=1e-10, atol=1e-10)
    assert bool((process.diffusion_coeff(t) >= 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_the_kernel(name):
    process = make(name)
    t = times(process)
    d_alpha, d_sigma = process.derivatives(t)
    assert_close(d_alpha, derivative(process.alpha, t), rtol=1e-10, atol=1e-10)
    assert_close(d_sigma, derivative(process.sigma, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FEW_PIECES)
def test_the_kernel_solves_the_moment_equations(name):
    """(log alpha)' = f by scipy's quad; (sigma^2)' = 2 f sigma^2 + g^2 by scipy's DOP853."""
    process = make(name)
    log_alpha, variance = (
        math.log(float(process.alpha(process.t_min))),
        float(process.sigma(process.t_min)) ** 2,
    )
    ends = process.t_min + (last_time(process) - process.t_min) * np.array([0.0, 0.13, 0.61, 0.97])
    for start, end in itertools.pairwise(ends):
        log_alpha, variance = integrate_moments(process, start, end, log_alpha, variance)
        assert float(process.alpha(end)) == pytest.approx(math.exp(log_alpha), rel=1e-9)
        assert float(process.sigma(end)) == pytest.approx(math.sqrt(variance), rel=1e-9)


def integrate_moments(process, start, end, log_ratio, variance):
    """(log of the scale, variance) at `end` from those at `start`, piece by piece between jumps of f and g."""
    f, g2 = coefficients(process)
    edges = [start, *knots(process, start, end), end]
    for a, b in itertools.pairwise(edges):
        inside = knots(process, 0, 1) and 1e-8  # a piece is constant: look at it away from its ends

        def at(s, a=a, b=b, inside=inside):
            return min(max(s, a + inside), b - inside) if inside else s

        log_ratio += quad(lambda s, at=at: f(at(s)), a, b, epsabs=1e-13, epsrel=1e-12, limit=200)[0]
        run = solve_ivp(
            lambda s, v, at=at: 2 * f(at(s)) * v + g2(at(s)), (a, b), [variance],
            method="DOP853", rtol=1e-12, atol=1e-16,
        )  # fmt: skip
        variance = run.y[0, -1]
    return log_ratio, variance


@pytest.mark.parametrize(
    ("name", "sigma0"),
    [("VP", 0), ("SubVP", 0), ("CosineVP", 0), ("EDM", 0), ("RectifiedFlow", 0), ("DiscreteVP", 0),
     ("from_coefficients", 0), ("subclass by coefficients", 0), ("VE", 0.01), ("from_kernel", 0.05)],
)  # fmt: skip
def test_the_data_end(name, sigma0):
    process = make(name)
    assert float(process.alpha(process.t0)) == pytest.approx(1.0, abs=1e-15)
    assert float(process.sigma(process.t0)) == pytest.approx(sigma0, abs=1e-15)


@pytest.mark.parametrize("name", ["VP", "SubVP", "CosineVP", "EDM", "RectifiedFlow", "DiscreteVP(5)"])
def test_from_coefficients_gives_back_the_closed_kernel(name):
    process = make(name)
    t1 = last_time(process)
    derived = sf.GaussianSDE.from_coefficients(process.drift_coeff, process.diffusion_coeff, 0.0, t1)
    t = times(process)
    # a table's coefficients jump, which a fixed quadrature does not see
    rtol = 1e-10 if not isinstance(process, sf.DiscreteVP) else 2e-2
    assert_close(derived.alpha(t), process.alpha(t), rtol=rtol)
    assert_close(derived.sigma(t), process.sigma(t), rtol=rtol)
    assert_close(derived.lam(t), process.lam(t), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", NAMES)
def test_from_kernel_gives_back_the_coefficients(name):
    process = make(name)
    derived = sf.GaussianSDE.from_kernel(process.alpha, process.sigma, process.t0, last_time(process))
    t = times(process)
    assert_close(derived.drift_coeff(t), process.drift_coeff(t), rtol=1e-9, atol=1e-10)
    assert_close(derived.diffusion_coeff(t), process.diffusion_coeff(t), rtol=1e-8, atol=1e-9)


def test_from_coefficients_derives_ve_from_a_point_mass():
    """A declared sigma_min is not in the coefficients: the derived marginal lacks sigma_min^2."""
    ve = sf.VE()
    derived = sf.GaussianSDE.from_coefficients(ve.drift_coeff, ve.diffusion_coeff)
    t = times(ve)
    assert_close(derived.sigma(t) ** 2, ve.sigma(t) ** 2 - ve.sigma_min**2, rtol=1e-11)


def test_a_constant_alpha_has_no_drift():
    process = sf.GaussianSDE.from_kernel(lambda t: 1.0, lambda t: t)
    t = times(process)
    assert torch.equal(process.drift_coeff(t), torch.zeros_like(t))
    assert_close(process.diffusion_coeff(t), torch.sqrt(2 * t), rtol=1e-13)


def test_derived_coefficients_work_without_gradients():
    process = make("from_kernel")
    t = times(process)
    want = process.drift_coeff(t), process.diffusion_coeff(t)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(want, coefficients_of(process, t), strict=True))
    with torch.inference_mode():
        got = coefficients_of(process, t.clone())
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def coefficients_of(process, t):
    return process.drift_coeff(t), process.diffusion_coeff(t)


# ---- lam and its inverse


@pytest.mark.parametrize("name", NAMES)
def test_lam_is_the_log_ratio_decreasing_and_inverted(name):
    process = make(name)
    t = times(process, 200)
    lam = process.lam(t)
    assert_close(lam, torch.log(process.alpha(t) / process.sigma(t)), rtol=1e-11, atol=1e-11)
    assert bool((torch.diff(lam) < 0).all())
    assert_close(process.time_of_lam(lam), t, rtol=1e-10, atol=1e-13)
    assert process.time_of_lam(lam.reshape(2, -1)).shape == (2, 100)


@given(
    low=st.floats(0.01, 2.0),
    rise=st.floats(0.0, 30.0),
    share=st.floats(1e-6, 1.0),
    family=st.sampled_from([sf.VP, sf.SubVP]),
)
def test_linear_beta_for_all_parameters(low, rise, share, family):
    process = family(beta_min=low, beta_max=low + rise)
    integral = low * share + 0.5 * rise * share**2
    alpha2 = math.exp(-integral)
    variance = -math.expm1(-integral)
    std = math.sqrt(variance) if family is sf.VP else variance
    g2 = (low + rise * share) * (1 if family is sf.VP else -math.expm1(-2 * integral))
    assert float(process.alpha(share)) ** 2 == pytest.approx(alpha2, rel=1e-13)
    assert float(process.sigma(share)) == pytest.approx(std, rel=1e-13)
    assert float(process.diffusion_coeff(share)) ** 2 == pytest.approx(g2, rel=1e-12)
    assert float(process.time_of_lam(process.lam(share))) == pytest.approx(share, rel=1e-9)


@given(low=st.floats(1e-4, 1.0), factor=st.floats(1.5, 1e5), t=st.floats(0.0, 1.0))
def test_ve_for_all_parameters(low, factor, t):
    process = sf.VE(sigma_min=low, sigma_max=low * factor)
    sigma = low * factor**t
    assert float(process.sigma(t)) == pytest.approx(sigma, rel=1e-12)
    assert float(process.diffusion_coeff(t)) ** 2 == pytest.approx(2 * sigma**2 * math.log(factor), rel=1e-12)
    assert float(process.time_of_lam(process.lam(t))) == pytest.approx(t, abs=1e-12)


@given(s=st.floats(1e-3, 0.2), t=st.floats(1e-3, 0.99))
def test_cosine_for_all_offsets(s, t):
    process = sf.CosineVP(s=s, t1=0.995)
    angle = 0.5 * math.pi * (t + s) / (1 + s)
    alpha = math.cos(angle) / math.cos(0.5 * math.pi * s / (1 + s))
    assert float(process.alpha(t)) == pytest.approx(alpha, rel=1e-12)
    assert float(process.drift_coeff(t)) == pytest.approx(-0.5 * math.pi / (1 + s) * math.tan(angle), rel=1e-12)
    assert float(process.time_of_lam(process.lam(t))) == pytest.approx(t, rel=1e-10)


# ---- conventions


def test_sub_vp_has_std_one_minus_alpha_squared():
    process = sf.SubVP()
    t = times(process)
    alpha = sf.VP().alpha(t)
    assert_close(process.sigma(t), 1 - alpha**2, rtol=1e-12, atol=1e-15)
    assert float(process.sigma(0.3)) != pytest.approx(math.sqrt(1 - float(alpha[7]) ** 2), rel=1e-2)


def test_ve_declares_its_marginal_and_its_kernel_starts_from_a_point():
    process = sf.VE(sigma_min=0.1, sigma_max=10.0)
    x0 = torch.tensor([[2.0, -1.0]], dtype=F64)
    mean, std = process.marginal(x0, 0.0)
    assert torch.equal(mean, x0)
    assert float(std) == pytest.approx(0.1)
    for t in (0.2, 0.7, 1.0):
        grown = quad(coefficients(process)[1], 0.0, t, epsrel=1e-12)[0]
        _, std = process.transition_kernel(0.0, t)
        assert float(std) ** 2 == pytest.approx(grown, rel=1e-11)
        assert float(std) ** 2 == pytest.approx(float(process.sigma(t)) ** 2 - 0.1**2, rel=1e-11)


@pytest.mark.parametrize("count", [2, 5, 1000])
def test_discrete_marginals_are_the_tables_cumulative_products(count):
    betas = np.linspace(1e-4, 0.02, count) if count > 5 else np.linspace(0.05, 0.6, count)
    process = sf.DiscreteVP(betas)
    product = np.cumprod(1 - betas)
    t = torch.tensor((np.arange(count) + 1) / count, dtype=F64)
    np.testing.assert_allclose(process.alpha(t).numpy() ** 2, product, rtol=1e-12)
    np.testing.assert_allclose(process.sigma(t).numpy() ** 2, 1 - product, rtol=1e-11)
    np.testing.assert_allclose(process.index_of_time(t).numpy(), np.arange(count), atol=1e-9)
    assert process.t_min == pytest.approx(1 / count)


def test_discrete_steps_are_ddpm_transitions():
    """q(x_n | x_{n-1}) = N(sqrt(1 - beta_n) x_{n-1}, beta_n)."""
    betas = [0.05, 0.2, 0.1, 0.4, 0.6]
    process = sf.DiscreteVP(betas)
    for n, beta in enumerate(betas):
        ratio, std = process.transition_kernel(n / 5, (n + 1) / 5)
        assert float(ratio) == pytest.approx(math.sqrt(1 - beta), rel=1e-13)
        assert float(std) == pytest.approx(math.sqrt(beta), rel=1e-13)


def test_an_entry_of_a_table_closes_its_interval():
    """At t = (n + 1)/N the rate is that of entry n: what a step down from there must see."""
    betas = torch.tensor([0.05, 0.2, 0.1, 0.4, 0.6], dtype=F64)
    process = sf.DiscreteVP(betas)
    t = torch.arange(1, 6, dtype=F64) / 5
    assert_close(process.diffusion_coeff(t) ** 2, -5 * torch.log1p(-betas), rtol=1e-12)
    assert_close(process.drift_coeff(t), 2.5 * torch.log1p(-betas), rtol=1e-12)


def test_discrete_processes_compare_by_their_tables():
    assert sf.DiscreteVP([0.1, 0.2]) == sf.DiscreteVP([0.1, 0.2])
    assert hash(sf.DiscreteVP([0.1, 0.2])) == hash(sf.DiscreteVP([0.1, 0.2]))
    assert sf.DiscreteVP([0.1, 0.2]) != sf.DiscreteVP([0.1, 0.3])


@pytest.mark.parametrize(("name", "std"), [("VP", 1.0), ("SubVP", 1.0), ("VE", 50.0), ("EDM", 80.0)])
def test_the_prior(name, std):
    """Mean and variance of 20,000 normals within 5 standard errors: fails for 1 seed in 10^6."""
    process = make(name)
    assert process.prior_std == pytest.approx(std)
    x = process.prior_sample((20_000, 1), seed=3, dtype=F64)
    assert abs(float(x.mean())) < 5 * std / math.sqrt(20_000)
    assert abs(float(x.square().mean()) / std**2 - 1) < 5 * math.sqrt(2 / 20_000)
    part = process.prior_sample((10, 1), seed=3, index=40, dtype=F64)
    assert torch.equal(part, x[40:50])
    assert process.prior_sample((4, 2, 3), seed=0).dtype == torch.float32


# ---- the transition kernel


@given(name=st.sampled_from(NAMES), shares=st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3, unique=True))
def test_chapman_kolmogorov(name, shares):
    process = make(name)
    span = last_time(process) - process.t0
    s, t, u = (process.t0 + span * v for v in sorted(shares))
    if t - s < 1e-6 * span or u - t < 1e-6 * span:
        return
    r_st, d_st = process.transition_kernel(s, t)
    r_tu, d_tu = process.transition_kernel(t, u)
    r_su, d_su = process.transition_kernel(s, u)
    assert float(r_su) == pytest.approx(float(r_st * r_tu), rel=1e-12)
    assert float(d_su) ** 2 == pytest.approx(float((r_tu * d_st) ** 2 + d_tu**2), rel=1e-8)
    # and the marginal at t is the kernel applied to the marginal at s
    assert float(process.alpha(t)) == pytest.approx(float(r_st * process.alpha(s)), rel=1e-12)
    pushed = (r_st * process.sigma(s)) ** 2 + d_st**2
    assert float(process.sigma(t)) ** 2 == pytest.approx(float(pushed), rel=1e-8)


@pytest.mark.parametrize("name", FEW_PIECES)
def test_the_kernel_is_the_law_from_a_point(name):
    """Its variance solves v' = 2 f v + g^2 from v(s) = 0."""
    process = make(name)
    start, end = (process.t_min + v * (last_time(process) - process.t_min) for v in (0.3, 0.55))
    log_ratio, variance = integrate_moments(process, start, end, 0.0, 0.0)
    ratio, std = process.transition_kernel(start, end)
    assert float(ratio) == pytest.approx(math.exp(log_ratio), rel=1e-9)
    assert float(std) ** 2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ulps", [0, 1, 3])
def test_the_kernel_between_almost_equal_times(name, ulps):
    """Rounding of lam must neither refuse s <= t nor give a NaN."""
    process = make(name)
    s = times(process, 20_000)
    t = s
    for _ in range(ulps):
        t = torch.nextafter(t, torch.full_like(t, math.inf))
    ratio, std = process.transition_kernel(s, t)
    assert_close(ratio, torch.ones_like(ratio), rtol=1e-9)
    assert bool((std >= 0).all() and (std < 1e-3 * process.sigma(t)).all())
    assert ulps > 0 or torch.equal(std, torch.zeros_like(std))


def test_the_kernel_from_the_data_is_the_marginal():
    for name in ("VP", "SubVP", "CosineVP", "EDM", "RectifiedFlow", "DiscreteVP"):
        process = make(name)
        t = times(process)
        ratio, std = process.transition_kernel(torch.zeros_like(t), t)
        assert_close(ratio, process.alpha(t), rtol=1e-14)
        assert_close(std, process.sigma(t), rtol=1e-14)
    ratio, std = sf.VP().transition_kernel(0.0, 0.0)
    assert (float(ratio), float(std)) == (1.0, 0.0)


# ---- precision near the data, against 50 digits


@pytest.fixture
def fifty_digits():
    with mpmath.workdps(50):
        yield


def exact_vp(t):
    alpha = mpmath.exp(-(mpmath.mpf("0.1") * t + t**2 * mpmath.mpf("19.9") / 2) / 2)
    return alpha, mpmath.sqrt(1 - alpha**2)


def exact_sub_vp(t):
    alpha, _ = exact_vp(t)
    return alpha, 1 - alpha**2


def exact_cosine(t):
    s = mpmath.mpf(0.008)
    alpha = mpmath.cos(mpmath.pi / 2 * (t + s) / (1 + s)) / mpmath.cos(mpmath.pi / 2 * s / (1 + s))
    return alpha, mpmath.sqrt(1 - alpha**2)


def exact_discrete(t):
    alpha = mpmath.sqrt(1 - mpmath.mpf(0.05)) ** (5 * t)  # inside the first entry
    return alpha, mpmath.sqrt(1 - alpha**2)


@pytest.mark.parametrize(
    ("name", "exact"),
    [("VP", exact_vp), ("SubVP", exact_sub_vp), ("CosineVP", exact_cosine), ("DiscreteVP(5)", exact_discrete)],
)  # fmt: skip
@pytest.mark.parametrize("t", [1e-12, 1e-9, 1e-6, 1e-3, 0.1])
def test_precision_near_the_data(name, exact, t, fifty_digits):
    process = make(name)
    alpha, sigma = exact(mpmath.mpf(t))
    assert float(process.alpha(t)) == pytest.approx(float(alpha), rel=2e-15)
    assert float(process.sigma(t)) == pytest.approx(float(sigma), rel=1e-13)
    assert float(process.lam(t)) == pytest.approx(float(mpmath.log(alpha / sigma)), rel=1e-13)


@pytest.mark.parametrize(("name", "t"), [("VP", 1e-9), ("SubVP", 1e-9), ("CosineVP", 1e-6), ("EDM", 1e-9),
                                         ("RectifiedFlow", 1e-9), ("DiscreteVP(5)", 1e-9)])  # fmt: skip
def test_the_inverse_of_lam_near_the_data(name, t):
    process = make(name)
    assert float(process.time_of_lam(process.lam(t))) == pytest.approx(t, rel=1e-10)


def test_a_short_transition_keeps_its_digits(fifty_digits):
    """std^2 over a step of 1e-9 is g^2 h to first order; 1 - ratio^2 would have lost it."""
    process = sf.VP()
    s, h = 0.4, 1e-9
    t = s + h
    exact = mpmath.sqrt(1 - (exact_vp(mpmath.mpf(t))[0] / exact_vp(mpmath.mpf(s))[0]) ** 2)
    assert float(process.transition_kernel(s, t)[1]) == pytest.approx(float(exact), rel=1e-6)


# ---- shapes and dtypes


@pytest.mark.parametrize("name", NAMES)
def test_functions_of_time_keep_shape_and_are_float64(name):
    process = make(name)
    t = times(process, 6)
    for function in (process.alpha, process.sigma, process.lam, process.drift_coeff, process.diffusion_coeff):
        table = function(t.reshape(2, 3, 1))
        assert table.shape == (2, 3, 1)
        assert table.dtype == F64
        assert function(float(t[4])).ndim == 0
        assert float(function(float(t[4]))) == pytest.approx(float(table[1, 1, 0]), rel=1e-14)
        assert function(t.to(torch.float32)).dtype == F64


@pytest.mark.parametrize(
    ("alpha", "sigma", "want"),
    [
        (lambda t: torch.exp(-t), lambda t: torch.sqrt(-torch.expm1(-2 * t)), 2**0.5),
        (lambda t: 2 * torch.exp(-t), lambda t: torch.sqrt(-torch.expm1(-2 * t)), 2**0.5),
        (lambda t: 1 + t, lambda t: torch.sqrt(t) * (1 + t), 1.0),
        (lambda t: 1 - t / 2, lambda t: t, 0.0),
    ],
)
def test_the_noise_at_the_data_is_the_limit_of_the_kernels(alpha, sigma, want):
    """g^2 = (sigma^2)' - 2 f sigma^2 at sigma = 0, where sigma' is infinite and g is not; by hand."""
    process = sf.GaussianSDE.from_kernel(alpha, sigma, 0.0, 1.5)
    assert float(process.diffusion_coeff(0.0)) == pytest.approx(want, abs=1e-9)
    both = process.diffusion_coeff(torch.tensor([0.0, 0.7], dtype=F64))
    assert float(both[0]) == float(process.diffusion_coeff(0.0))
    assert float(both[1]) == float(process.diffusion_coeff(0.7))
    path = process.simulate(torch.zeros(4, 1), steps=10, seed=0)
    assert bool(torch.isfinite(path.x).all())


@pytest.mark.parametrize("name", ["VP", "VE", "from_kernel", "subclass by coefficients"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_marginals_take_one_time_or_one_a_sample(name, dtype):
    process = make(name)
    x0 = torch.randn(4, 2, 3, dtype=F64).to(dtype)
    t = times(process, 4)
    mean, std = process.marginal(x0, t)
    assert mean.dtype == std.dtype == dtype
    assert std.shape == (4, 1, 1)
    for i in range(4):
        one_mean, one_std = process.marginal(x0[i : i + 1], float(t[i]))
        assert torch.equal(one_mean[0], mean[i])
        assert torch.equal(one_std, std[i].squeeze())
    eps = torch.randn(4, 2, 3, dtype=F64).to(dtype)
    x = process.perturb(x0, t, eps)
    assert x.dtype == dtype
    assert torch.equal(x, mean + std * eps)
    assert torch.equal(process.perturb(x0, t, 0 * eps), mean)


def test_drift_and_diffusion_take_times_per_sample():
    process = sf.VP()
    x = torch.randn(4, 2, dtype=F64)
    t = times(process, 4)
    drift, diffusion = process.drift(x, t), process.diffusion(x, t)
    for i in range(4):
        assert torch.equal(process.drift(x[i : i + 1], t[i])[0], drift[i])
        assert torch.equal(process.diffusion(x[i : i + 1], t[i]), diffusion[i].squeeze())


# ---- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sf.VP(beta_min=0.0), "beta_min > 0"),
        (lambda: sf.VP(beta_max=-1.0), "beta_max > 0"),
        (lambda: sf.VP(beta_max=math.nan), "beta_max"),
        (lambda: sf.SubVP(beta_min=-0.1), "beta_min > 0"),
        (lambda: sf.VE(sigma_min=1.0, sigma_max=0.5), "sigma_min < sigma_max"),
        (lambda: sf.VE(sigma_min=0.0), "sigma_min > 0"),
        (lambda: sf.EDM(sigma_min=3.0, sigma_max=2.0), "sigma_min < sigma_max"),
        (lambda: sf.EDM(sigma_max=math.inf), "sigma_max"),
        (lambda: sf.CosineVP(s=0.0), "s > 0"),
        (lambda: sf.CosineVP(t1=1.0), "t1 in"),
        (lambda: sf.DiscreteVP([0.1]), "at least 2 betas"),
        (lambda: sf.DiscreteVP([[0.1, 0.2]]), "1-d table"),
        (lambda: sf.DiscreteVP([0.1, 1.0]), r"in \(0, 1\)"),
        (lambda: sf.DiscreteVP([0.1, math.nan]), r"in \(0, 1\)"),
        (lambda: sf.GaussianSDE.from_kernel(lambda t: t, lambda t: 1 - t), "clock reversed"),
        (lambda: sf.GaussianSDE.from_kernel(lambda t: -torch.ones_like(t), lambda t: t), "alpha > 0"),
        (lambda: sf.GaussianSDE.from_kernel(lambda t: 1 - t, lambda t: t / (t - t)), "finite"),
        (lambda: sf.GaussianSDE.from_kernel(lambda t: 1 - t, lambda t: t, 1.0, 0.0), "t0 < t_min < t1"),
        (lambda: sf.GaussianSDE.from_kernel(lambda t: 1 - t, lambda t: t, t_min=2.0), "t0 < t_min < t1"),
        (lambda: sf.GaussianSDE.from_coefficients(lambda t: -t, lambda t: 0 * t), "not 0 everywhere"),
        (lambda: sf.GaussianSDE.from_coefficients(lambda t: t / (t - t), lambda t: t), "finite"),
        (lambda: sf.GaussianSDE.from_coefficients(lambda t: -t, lambda t: t, 0.0, 0.0), "t0 < t_min < t1"),
        (lambda: sf.VP().marginal(torch.zeros(2, 1), 1.5), r"time in \[0, 1\], got 1.5"),
        (lambda: sf.VP().marginal(torch.zeros(2, 1), -0.1), r"time in \[0, 1\]"),
        (lambda: sf.VP().marginal(torch.zeros(2, 1), math.nan), "time in"),
        (lambda: sf.VP().marginal(torch.zeros(2, 1), torch.tensor([0.1, 2.0])), r"0.1 to 2"),
        (lambda: sf.VP().marginal(torch.zeros(2, 1), torch.rand(3)), r"got times of shape \(3,\)"),
        (lambda: sf.VP().perturb(torch.zeros(2, 1), 0.5, torch.zeros(2, 2)), r"got \(2, 2\)"),
        (lambda: sf.VP().transition_kernel(0.5, 0.4), "s <= t"),
        (lambda: sf.VP().transition_kernel(0.5, 1.4), "time in"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_subclass_must_give_one_description():
    class Half(sf.GaussianSDE):
        def drift_coeff(self, t):
            return -t

    with pytest.raises(TypeError, match="must define alpha and sigma, or drift_coeff and diffusion_coeff"):
        Half().alpha(0.5)


def test_t_min_is_inside_the_span():
    for name in NAMES:
        process = make(name)
        assert process.t0 < process.t_min < process.t1
    assert sf.GaussianSDE.from_kernel(lambda t: 1 - t, lambda t: t, t_min=0.02).t_min == 0.02
