"""The conversion table of docs/stochasticity.md, row by row: the published step or equation against the library's eta.

A step with the prediction x_0 frozen is x_1 = ratio x + (a_1 - ratio a_0) x_0 + std z: two steps of the same ratio and
std are the same. Published formulas are written out in numbers.
"""

import itertools
import math

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.solvers import ERSDE, EulerAncestral, NoiseScale, SASolver
from tests.exact import F64

VP = sf.VP()
DATA = sf.problems.GaussianMixture([[1.0, 0.5], [-1.0, 0.2]], [[[0.2, 0.0], [0.0, 0.4]]] * 2, [0.4, 0.6])
MODEL = DATA.model(VP)
STEPS = ((0.9, 0.5), (0.5, 0.45), (0.3, 0.05), (0.05, 0.04))


def levels(t):
    """(alpha, sigma, u = sigma/alpha, lam) of VP at t, as numbers, by the closed form."""
    log_alpha = -0.25 * t**2 * 19.9 - 0.05 * t
    alpha, sigma = math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))
    return alpha, sigma, sigma / alpha, math.log(alpha / sigma)


def ours(eta, s, t):
    """(ratio, std) of the library's step of order 1 with this eta."""
    ratio, amp, _, std = VP.reverse(MODEL, eta).transition(s, t)
    plan = sf.solvers.DPMSolverPP(1).plan(VP.reverse(MODEL, eta), torch.tensor([s, t], dtype=F64))
    assert float(plan.ratio) == float(ratio)
    assert float(plan.weights) == pytest.approx(float(amp) - float(ratio) * levels(s)[0], rel=1e-9)
    return float(ratio), float(std)


def same(eta, s, t, ratio, std):
    got = ours(eta, s, t)
    assert got[0] == pytest.approx(ratio, rel=1e-9, abs=1e-12)
    assert got[1] == pytest.approx(std, rel=1e-9, abs=1e-12)


def fresh(s, t):
    """1 - exp(-2h)."""
    return -math.expm1(-2 * (levels(t)[3] - levels(s)[3]))


@pytest.mark.parametrize(("s", "t"), STEPS)
@pytest.mark.parametrize("eta", [0.2, 0.7, 1.0])
def test_ddim_by_deviation(s, t, eta):
    """sigma_t = eta sqrt((1 - abar')/(1 - abar)) sqrt(1 - abar/abar') (Song et al. 2021, DDIM, equations 12, 16)."""
    (a0, s0, _, l0), (a1, s1, _, l1) = levels(s), levels(t)
    size = eta * math.sqrt(s1**2 / s0**2) * math.sqrt(1 - a0**2 / a1**2)
    ratio = math.sqrt(s1**2 - size**2) / s0
    converted = math.sqrt(-math.log(1 - eta**2 * fresh(s, t)) / (2 * (l1 - l0)))
    same(converted, s, t, ratio, size)
    assert converted <= eta + 1e-12
    plan = sf.solvers.DDIM(eta).plan(VP.probability_flow(MODEL), torch.tensor([s, t], dtype=F64))
    assert float(plan.ratio) == pytest.approx(ratio, rel=1e-10)
    assert float(plan.noise) == pytest.approx(size, rel=1e-10)


def test_ddims_eta_is_ours_in_short_steps_and_more_than_ours_in_long_ones():
    got = [math.sqrt(-math.log(1 - 0.25 * -math.expm1(-2 * h)) / (2 * h)) for h in (1e-6, 0.1, 1.0, 4.0)]
    assert got[0] == pytest.approx(0.5, rel=1e-5)
    assert got == sorted(got, reverse=True)
    assert got[-1] < 0.2


@pytest.mark.parametrize(("s", "t"), STEPS)
@pytest.mark.parametrize("eta", [0.2, 0.7, 1.0])
def test_ddim_by_variance(s, t, eta):
    """azula's: a share eta tau of the noise's variance is fresh, tau = 1 - (a0 s1/(a1 s0))^2."""
    (a0, s0, _, l0), (a1, s1, _, l1) = levels(s), levels(t)
    tau = 1 - (a0 * s1 / (a1 * s0)) ** 2
    same(math.sqrt(-math.log1p(-eta * tau) / (2 * (l1 - l0))), s, t, s1 / s0 * math.sqrt(1 - eta * tau),
         s1 * math.sqrt(eta * tau))  # fmt: skip
    assert tau == pytest.approx(fresh(s, t))


@pytest.mark.parametrize(("s", "t"), STEPS)
@pytest.mark.parametrize("eta", [0.3, 1.0, 1.3])
def test_k_diffusion_ancestral(s, t, eta):
    """sigma_up and sigma_down in x/alpha; above 1, in long steps, none of the old noise is left (no eta is that)."""
    (a0, _, u0, l0), (a1, _, u1, l1) = levels(s), levels(t)
    up = min(u1, eta * math.sqrt(u1**2 * (u0**2 - u1**2) / u0**2))
    down = math.sqrt(u1**2 - up**2)
    plan = EulerAncestral(eta).plan(VP.probability_flow(MODEL), torch.tensor([s, t], dtype=F64))
    assert float(plan.ratio) == pytest.approx(a1 / a0 * down / u0, abs=1e-12)
    assert float(plan.noise) == pytest.approx(a1 * up, rel=1e-10)
    if eta**2 * fresh(s, t) < 1:
        eta = math.sqrt(-math.log(1 - eta**2 * fresh(s, t)) / (2 * (l1 - l0)))
        same(eta, s, t, a1 / a0 * down / u0, a1 * up)


@pytest.mark.parametrize(("s", "t"), STEPS)
@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0])
def test_k_diffusion_dpmpp_2m_sde(s, t, eta):
    """u'/u exp(-eta h), -expm1(-h - eta h), u' sqrt(-expm1(-2 eta h)), in x/alpha: its eta is the square of ours."""
    (a0, _, u0, l0), (a1, _, u1, l1) = levels(s), levels(t)
    h = l1 - l0
    same(math.sqrt(eta), s, t, a1 / a0 * u1 / u0 * math.exp(-eta * h), a1 * u1 * math.sqrt(-math.expm1(-2 * eta * h)))
    amp = -math.expm1(-h - eta * h)
    assert a1 * amp == pytest.approx(a1 - ours(math.sqrt(eta), s, t)[0] * a0, rel=1e-9)


@pytest.mark.parametrize(("s", "t"), STEPS)
@pytest.mark.parametrize("gamma", [0.05, math.sqrt(2) - 1])
def test_edm_churn(s, t, gamma):
    """Up to (1 + gamma) u by noise, Euler down (Karras et al. 2022, algorithm 2): eta^2 h = log(1 + gamma)."""
    (a0, _, u0, l0), (a1, _, u1, l1) = levels(s), levels(t)
    high = (1 + gamma) * u0
    ratio, std = a1 / a0 * u1 / high, a1 * u1 / high * math.sqrt(high**2 - u0**2)
    same(math.sqrt(math.log1p(gamma) / (l1 - l0)), s, t, ratio, std)
    solver = sf.solvers.EDMEuler(s_churn=gamma)
    model = sf.Model(lambda x, t: torch.full_like(x, 0.3), VP, "x0")  # frozen: the same wherever it is called
    with torch.no_grad():
        x = torch.tensor([[1.0], [2.0]], dtype=F64)
        low, high = sf.solve(VP.probability_flow(model), x, solver, grid=[s, t], seed=0).x.flatten().tolist()
        other = sf.solve(VP.probability_flow(model), x, solver, grid=[s, t], seed=1).x.flatten().tolist()
    z = [float(sf.Noise(seed, 2).normal(sf.noise.CHURN, 0, (1,), F64)[0]) for seed in (0, 1)]
    assert (other[0] - low) / (z[1] - z[0]) == pytest.approx(std, rel=1e-9)
    assert low == pytest.approx(ratio + (a1 - ratio * a0) * 0.3 + std * z[0], rel=1e-9)
    assert math.isfinite(high)


def test_edms_s_churn_on_a_geometric_grid():
    """eta^2 = log(1 + S_churn/N) N/log(sigma_max/sigma_min), the same in every step; in the limit S_churn/log(...)."""
    for n, churn in ((18, 4.0), (1000, 4.0)):
        u = np.geomspace(80, 0.002, n + 1)
        h = -np.diff(np.log(u))
        eta2 = np.log1p(churn / n) / h
        np.testing.assert_allclose(eta2, math.log1p(churn / n) * n / math.log(40000), rtol=1e-9)
    assert eta2[0] == pytest.approx(churn / math.log(40000), rel=0.003)


@pytest.mark.parametrize("process", [sf.EDM(), VP, sf.RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_edms_beta_of_t(process):
    """dx = -u' u s dt - beta u^2 s dt + sqrt(2 beta) u dw in x/alpha (Karras et al. 2022, equation 6), run down."""
    model, x = DATA.model(process), torch.randn(5, 2, dtype=F64)
    for t, eta in ((0.3, 0.6), (0.6, 1.0), (0.8, 1.7)):
        t, up, down = (torch.tensor(v, dtype=F64) for v in (t, t + 1e-5, t - 1e-5))
        alpha, d_alpha = process.alpha(t), (process.alpha(up) - process.alpha(down)) / 2e-5
        levels = [process.sigma(v) / process.alpha(v) for v in (down, t, up)]
        u, speed = levels[1], (levels[2] - levels[0]) / 2e-5
        beta = eta**2 * speed / u
        score = alpha * model.score(x, t)  # of y = x/alpha
        drift = -speed * u * score - beta * u**2 * score
        reverse = process.reverse(model, eta)
        torch.testing.assert_close(
            reverse.drift(x, t), d_alpha / alpha * x + alpha * drift, rtol=1e-6, atol=1e-6
        )  # fmt: skip
        assert float(reverse.diffusion(x, t).reshape(-1)[0]) == pytest.approx(
            float(alpha * torch.sqrt(2 * beta) * u), rel=1e-6
        )
    assert float(sf.EDM().sigma(0.3)) == 0.3  # where beta(t) = eta^2/t


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, lambda t: 0.5 + t])
def test_zhang_and_chens_lambda_sa_solvers_tau_and_score_sde(eta):
    """dx = [f - (1 + l^2)/2 g^2 s] dt + l g dw (Zhang and Chen 2023, DEIS, equation 5; Xue et al. 2023, section 4).

    l = 1 is Anderson's reverse SDE, l = 0 the flow (Song et al. 2021, equations 6 and 13).
    """
    x, reverse = torch.randn(5, 2, dtype=F64), VP.reverse(MODEL, eta)
    for t in (0.1, 0.5, 0.9):
        beta, value = 0.1 + 19.9 * t, eta(t) if callable(eta) else eta
        want = -0.5 * beta * x - (1 + value**2) / 2 * beta * MODEL.score(x, t)
        torch.testing.assert_close(reverse.drift(x, torch.tensor(t, dtype=F64)), want, rtol=1e-10, atol=1e-10)
        g = reverse.diffusion(x, torch.tensor(t, dtype=F64))
        assert float(torch.as_tensor(g).reshape(-1)[0]) == pytest.approx(value * math.sqrt(beta), abs=1e-12)


@pytest.mark.parametrize(("s", "t"), STEPS)
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0, 1.5])
def test_sa_solvers_tau(s, t, tau):
    """sigma'/sigma exp(-tau^2 h), sigma' sqrt(1 - exp(-2 tau^2 h)) (Xue et al. 2023, proposition 4.2)."""
    (_, s0, _, l0), (_, s1, _, l1) = levels(s), levels(t)
    h = l1 - l0
    ratio, std = s1 / s0 * math.exp(-(tau**2) * h), s1 * math.sqrt(-math.expm1(-2 * tau**2 * h))
    same(tau, s, t, ratio, std)
    plan = SASolver(1, 0, tau).plan(VP.probability_flow(MODEL), torch.tensor([s, t], dtype=F64))
    assert float(plan.ratio) == pytest.approx(ratio, rel=1e-10)
    assert float(plan.noise) == pytest.approx(std, abs=1e-12)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("scale", ["x", "x^1.5", "x^2", "paper"])
def test_er_sdes_phi(step, scale):
    """phi'/phi and sqrt(u'^2 - u^2 (phi'/phi)^2) in x/alpha, whose eta^2 is log((phi/u)/(phi'/u'))/h."""
    (a0, _, u0, l0), (a1, _, u1, l1) = (levels(t) for t in step)
    power = {"x": 1.0, "x^1.5": 1.5, "x^2": 2.0}.get(scale)

    def phi(u):
        return u * (math.exp(u**0.3) + 10) if power is None else u**power

    gain = phi(u1) / phi(u0)
    ratio, std = a1 / a0 * gain, a1 * math.sqrt(max(u1**2 - u0**2 * gain**2, 0.0))
    eta2 = max(math.log(phi(u0) / u0 / (phi(u1) / u1)) / (l1 - l0), 0.0)
    got = ours(math.sqrt(eta2), *step)
    assert got[0] == pytest.approx(ratio, rel=1e-9)
    assert got[1] == pytest.approx(std, rel=1e-9, abs=1e-7)
    solver = ERSDE(1, None if power is None else lambda x: x**power)
    plan = solver.plan(VP.probability_flow(MODEL), torch.tensor(step, dtype=F64))
    assert float(plan.ratio) == pytest.approx(ratio, rel=1e-10)
    assert float(plan.noise) == pytest.approx(std, rel=1e-8, abs=1e-7)
    if power is None:
        return
    assert eta2 == pytest.approx(power - 1, abs=1e-9)
    assert (float(plan.noise) == 0.0) == (power == 1.0)


def test_er_sdes_phi_in_the_limit():
    """eta^2 = d log phi/d log u - 1: the step's mean, in short steps, and the fields that the library derives."""
    for t in (0.1, 0.5, 0.9):
        (_, _, u, lam), d = levels(t), 1e-4
        slope = math.log(math.exp((u * math.exp(d)) ** 0.3) + 10) - math.log(math.exp((u / math.exp(d)) ** 0.3) + 10)
        mean = NoiseScale().mean_square(VP, *(VP.time_of_lam(torch.tensor(lam + e, dtype=F64)) for e in (-d, d)))
        assert float(mean) == pytest.approx(slope / (2 * d), rel=1e-6)
        assert float(NoiseScale().at(VP, torch.tensor(t, dtype=F64))) ** 2 == pytest.approx(slope / (2 * d), rel=1e-6)


@pytest.mark.parametrize("process", [sf.RectifiedFlow(), VP], ids=lambda p: type(p).__name__)
def test_the_diffusion_of_interpolants(process):
    """dx = v dt - w/2 s dt + sqrt(w) dw run down, v the velocity (Ma et al. 2024, SiT, section 2): w = eta^2 g^2."""
    model, x = DATA.model(process), torch.randn(5, 2, dtype=F64)
    for t, eta in itertools.product((0.2, 0.7), (0.5, 1.0)):
        t = torch.tensor(t, dtype=F64)
        w = eta**2 * process.diffusion_coeff(t) ** 2
        want = model(x, t, "velocity") - 0.5 * w * model.score(x, t)
        reverse = process.reverse(model, eta)
        torch.testing.assert_close(reverse.drift(x, t), want, rtol=1e-10, atol=1e-10)
        assert float(torch.as_tensor(reverse.diffusion(x, t)).reshape(-1)[0]) == pytest.approx(float(w.sqrt()))
    if isinstance(process, sf.RectifiedFlow):  # w = 2 t eta^2/(1 - t)
        assert float(process.diffusion_coeff(0.2)) ** 2 == pytest.approx(2 * 0.2 / 0.8)


@pytest.mark.parametrize(("s", "t"), STEPS)
def test_ddpms_variances(s, t):
    """beta-tilde is eta = 1; beta keeps its mean with sigma_0/sigma_1 times the deviation: eta = 1 in the limit."""
    (a0, s0, _, _), (a1, s1, _, _) = levels(s), levels(t)
    beta = 1 - (a0 / a1) ** 2
    same(1.0, s, t, s1**2 * a0 / (s0**2 * a1), math.sqrt(beta) * s1 / s0)
    flow, grid = VP.probability_flow(MODEL), torch.tensor([s, t], dtype=F64)
    low, high = (sf.solvers.DDPM(v).plan(flow, grid) for v in ("posterior", "forward"))
    assert float(high.ratio) == float(low.ratio)
    assert float(high.noise) == pytest.approx(math.sqrt(beta), rel=1e-9)
    assert float(high.noise / low.noise) == pytest.approx(s0 / s1, rel=1e-9)
