"""Variational bounds, of a table, with a learned variance, of discrete values, in continuous time: in closed form."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import sdeflow as sf
from sdeflow import losses
from tests.exact import F64
from tests.loss_cases import TABLE, hermite, normals

# ---- the bound of a table


def table_model(data, process):
    """The exact model of Gaussian data, its x0_hat = a x + b at entry n as (a, b)."""
    exact = data.model(process)
    mean, c = float(data.mean), float(data.covariance)

    def affine(n):
        t = (n + 1) / process.betas.numel()
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        gain = alpha * c / (alpha**2 * c + sigma**2)
        return gain, mean * (1 - gain * alpha)

    return exact, affine


def posterior(x_s_mean, x_s_var, beta, x_t):
    """q(x_s | x_t, x0) by Bayes' rule from x_s | x0 and x_t | x_s."""
    precision = 1 / x_s_var + (1 - beta) / beta
    return (x_s_mean / x_s_var + math.sqrt(1 - beta) * x_t / beta) / precision, 1 / precision


@pytest.mark.parametrize("variance", ["posterior", "forward", "learned"])
def test_terms_are_the_kl_divergences(variance):
    process = sf.DiscreteVP(TABLE)
    model = sf.Model(lambda x, t: torch.tanh(x), process, "v", expand=False)
    x0, eps = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    v = {"posterior": 0.0, "forward": 1.0, "learned": 0.3}[variance]
    given = (lambda x, t: torch.full_like(x, 0.3)) if variance == "learned" else variance
    abar = np.cumprod(1 - np.array(TABLE))
    for n in range(1, 5):
        beta, before = TABLE[n], abar[n - 1]
        x = math.sqrt(abar[n]) * x0 + math.sqrt(1 - abar[n]) * eps
        guess = model(x, (n + 1) / 5, "x0")
        q_mean, q_var = posterior(math.sqrt(before) * x0, 1 - before, beta, x)
        p_mean, _ = posterior(math.sqrt(before) * guess, 1 - before, beta, x)
        p_var = math.exp(v * math.log(beta) + (1 - v) * math.log(q_var))
        kl = kl_divergence(Normal(q_mean, math.sqrt(q_var)), Normal(p_mean, math.sqrt(p_var)))
        got = losses.step_bits(model, x0, n, eps, given, levels=None)
        torch.testing.assert_close(got, kl.mean(1) / math.log(2), rtol=1e-10, atol=1e-12)
        if variance == "posterior":  # half the fall of the SNR times the error (Kingma et al. 2021)
            fall = before / (1 - before) - abar[n] / (1 - abar[n])
            want = 0.5 * fall * (x0 - guess).square().mean(1) / math.log(2)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
        else:  # control: beta~ for beta is another number
            other = losses.step_bits(model, x0, n, eps, "posterior", levels=None)
            assert float((other - got).abs().min()) > 1e-4
    low = math.log(TABLE[1] * (1 - abar[0]) / (1 - abar[1]))  # beta~ of entry 1 stands for the 0 of entry 0
    std = math.exp(0.5 * (v * math.log(TABLE[0]) + (1 - v) * low))
    guess = model(math.sqrt(abar[0]) * x0 + math.sqrt(1 - abar[0]) * eps, 0.2, "x0")
    want = -Normal(guess, std).log_prob(x0).mean(1) / math.log(2)
    torch.testing.assert_close(losses.step_bits(model, x0, 0, eps, given, levels=None), want, rtol=1e-10, atol=0)
    mixed = losses.step_bits(model, x0, torch.tensor([0, 3, 1, 0]), eps, given, levels=None)
    rows = [losses.step_bits(model, x0, n, eps, given, levels=None)[i] for i, n in enumerate([0, 3, 1, 0])]
    torch.testing.assert_close(mixed, torch.stack(rows), rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", [sf.VP(), sf.VE(0.1, 5.0), sf.EDM(), sf.DiscreteVP(TABLE)], ids=repr)
def test_prior_term(process):
    x0 = torch.randn(4, 3, dtype=F64)
    mean, std = process.marginal(x0, process.t1)
    kl = kl_divergence(Normal(mean, std), Normal(torch.zeros_like(x0), process.prior_std))
    torch.testing.assert_close(losses.prior_bits(process, x0), kl.mean(1) / math.log(2), rtol=1e-9, atol=1e-15)


def expected_bound(model, x0, variance, levels):
    """The sum of all terms for one number x0, each expected over its noise by quadrature; bits."""
    z, w = hermite(100)
    rows, number = torch.full((100, 1), x0, dtype=F64), model.sde.betas.numel()
    steps = [(w * losses.step_bits(model, rows, n, z[:, None], variance, levels=levels)).sum() for n in range(number)]
    return float(sum(steps) + losses.prior_bits(model.sde, rows)[0])


def ancestors(process, affine, forward):
    """Mean and covariance of (x_1, ..., x_N) under the sampler, and (a, b, variance) of x_0 given x_1.

    As a chain written backwards: x_N ~ N(0, 1), x_s = gain x_t + shift + noise.
    """
    betas, number = np.array(TABLE), len(TABLE)
    abar = np.cumprod(1 - betas)
    mean, covariance = np.zeros(number), np.zeros((number, number))
    covariance[-1, -1] = 1.0
    for n in range(number - 1, 0, -1):
        a, b = affine(n)
        tilde = betas[n] * (1 - abar[n - 1]) / (1 - abar[n])
        c0 = math.sqrt(abar[n - 1]) * betas[n] / (1 - abar[n])
        c1 = math.sqrt(1 - betas[n]) * (1 - abar[n - 1]) / (1 - abar[n])
        gain = c0 * a + c1
        mean[n - 1] = gain * mean[n] + c0 * b
        covariance[n - 1, n:] = covariance[n:, n - 1] = gain * covariance[n, n:]
        covariance[n - 1, n - 1] = gain**2 * covariance[n, n] + (betas[n] if forward else tilde)
    last = betas[0] if forward else betas[1] * (1 - abar[0]) / (1 - abar[1])
    return torch.from_numpy(mean), torch.from_numpy(covariance), (*affine(0), last)


@pytest.mark.parametrize("variance", ["posterior", "forward"])
@pytest.mark.parametrize("value", [-0.6, 1.4])
def test_bound_exceeds_the_likelihood_by_the_gap_of_the_paths(variance, value):
    """bound + log p(x0) = KL(q(x_1..N | x0) | p(x_1..N | x0)), both Gaussian, in closed form."""
    process, data = sf.DiscreteVP(TABLE), sf.problems.Gaussian([0.3], 0.4)
    model, affine = table_model(data, process)
    mean, covariance, (a, b, last) = ancestors(process, affine, variance == "forward")
    total = float(a**2 * covariance[0, 0] + last)
    centre = float(a * mean[0] + b)
    log_p = float(stats.norm(centre, math.sqrt(total)).logpdf(value))
    pull = a * covariance[:, 0] / total  # p(x_1..N | x0) by conditioning on x0
    given = MultivariateNormal(mean + pull * (value - centre), covariance - total * torch.outer(pull, pull))
    abar = torch.cumprod(1 - torch.tensor(TABLE, dtype=F64), 0)
    root = torch.sqrt(abar)
    cross = torch.zeros(5, 5, dtype=F64)  # Cov(x_i, x_j | x0) = sqrt(abar_j/abar_i) (1 - abar_i), i <= j
    for i, j in itertools.product(range(5), repeat=2):
        first, later = min(i, j), max(i, j)
        cross[i, j] = root[later] / root[first] * (1 - abar[first])
    gap = float(kl_divergence(MultivariateNormal(root * value, cross), given))
    bound = expected_bound(model, value, variance, None) * math.log(2)
    assert bound + log_p == pytest.approx(gap, abs=1e-9)
    assert gap > 0


def test_bound_of_discrete_data_exceeds_their_surprise():
    levels, process, data = 16, sf.DiscreteVP(TABLE), sf.problems.Gaussian([0.1], 0.3)
    model, affine = table_model(data, process)
    mean, covariance, (a, b, last) = ancestors(process, affine, False)
    law = stats.norm(float(a * mean[0] + b), math.sqrt(float(a**2 * covariance[0, 0] + last)))
    grid = np.linspace(-1, 1, levels)
    edges = np.concatenate([[-np.inf], 0.5 * (grid[1:] + grid[:-1]), [np.inf]])
    mass = np.diff(law.cdf(edges))
    for k in range(levels):
        bound = expected_bound(model, float(grid[k]), "posterior", levels)
        assert -math.log2(mass[k]) <= bound < -math.log2(mass[k]) + 5


def test_all_terms_at_once():
    process = sf.DiscreteVP(TABLE)
    model = sf.Model(lambda x, t: torch.tanh(x), process, "v", expand=False)
    x0 = torch.randint(0, 256, (3, 2)).double() / 127.5 - 1
    got = losses.bound_bits(model, x0, "forward", generator=torch.Generator().manual_seed(5))
    assert got.shape == (3, 6)
    draw = torch.Generator().manual_seed(5)
    for n in range(5):
        eps = torch.randn(3, 2, dtype=F64, generator=draw)
        torch.testing.assert_close(got[:, n], losses.step_bits(model, x0, n, eps, "forward"), rtol=0, atol=0)
    torch.testing.assert_close(got[:, 5], losses.prior_bits(process, x0), rtol=0, atol=0)


def test_zero_terminal_snr():
    process = sf.DiscreteVP(TABLE, zero_terminal_snr=True)
    x0, eps = torch.zeros(2, 1, dtype=F64) + 0.5, torch.ones(2, 1, dtype=F64)
    model = sf.Model(lambda x, t: 0 * x, process, "x0", expand=False)
    assert torch.equal(losses.prior_bits(process, x0), torch.zeros(2, dtype=F64))
    snr = float(process.alpha(0.8) ** 2 / process.sigma(0.8) ** 2)
    want = 0.5 * snr * 0.25 / math.log(2)
    assert float(losses.step_bits(model, x0, 4, eps, levels=None)[0]) == pytest.approx(want, rel=1e-9)
    with pytest.raises(ValueError, match="says nothing about x_0 where alpha = 0"):
        losses.step_bits(sf.Model(lambda x, t: x, process, "eps"), x0, 4, eps, levels=None)


# ---- the hybrid loss


class TwoHeads(torch.nn.Module):
    """A noise head and a variance head of their own, the second kept for the call of v."""

    def __init__(self):
        super().__init__()
        self.noise, self.share = torch.nn.Linear(3, 3).double(), torch.nn.Linear(3, 3).double()
        self.kept = None

    def forward(self, x, t):
        self.kept = torch.sigmoid(self.share(x))
        return self.noise(x)

    def v(self, x, t):
        return self.kept


def test_hybrid_trains_the_mean_by_the_simple_loss_alone():
    process, net = sf.DiscreteVP(TABLE), TwoHeads()
    model = sf.Model(net, process, "eps")
    x0 = torch.randint(0, 256, (8, 3)).double() / 127.5 - 1
    n, eps = torch.tensor([0, 1, 2, 3, 4, 0, 2, 1]), torch.randn(8, 3, dtype=F64)
    t = (n + 1).double() / 5
    loss = losses.hybrid(model, x0, n, eps, net.v)
    assert model.nfe == 1
    simple = losses.denoising(model, x0, t, eps)
    bits = losses.step_bits(model, x0, n, eps, net.v)
    torch.testing.assert_close(loss, simple + 1e-3 * 5 * bits, rtol=1e-12, atol=0)
    mean, share = list(net.noise.parameters()), list(net.share.parameters())
    got = torch.autograd.grad(loss.sum(), mean + share, retain_graph=True)
    want = torch.autograd.grad(simple.sum(), mean)
    learned = torch.autograd.grad((5e-3 * bits).sum(), share, retain_graph=True)
    for a, b in zip(got, (*want, *learned), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)
    # control: without the stop the bound does reach the mean
    leak = torch.autograd.grad((5e-3 * bits).sum(), mean)
    assert float(leak[0].abs().max()) > 1e-3


def test_learned_variance_has_its_least_bound_at_the_true_second_moment():
    """The best variance is beta~ + c0^2 E (x0 - x0_hat)^2: slope 0 and curvature > 0 there."""
    process, data, n = sf.DiscreteVP(TABLE), sf.problems.Gaussian([0.0], 0.4), 2
    model, _ = table_model(data, process)
    abar = np.cumprod(1 - np.array(TABLE))
    tilde = TABLE[n] * (1 - abar[n - 1]) / (1 - abar[n])
    c0 = math.sqrt(abar[n - 1]) * TABLE[n] / (1 - abar[n])
    error = 0.4 * (1 - abar[n]) / (0.4 * abar[n] + 1 - abar[n])
    best = (math.log(tilde + c0**2 * error) - math.log(tilde)) / (math.log(TABLE[n]) - math.log(tilde))
    assert 0 < best < 1
    v = torch.tensor(best, dtype=F64, requires_grad=True)
    z, p = normals(8, 2)
    loss = losses.step_bits(model, math.sqrt(0.4) * z[:, :1], n, z[:, 1:], lambda x, t: v, levels=None)
    (slope,) = torch.autograd.grad((p * loss).sum(), v, create_graph=True)
    assert abs(float(slope.detach())) < 1e-10
    assert float(torch.autograd.grad(slope, v)[0]) > 1e-3


# ---- discrete values


def test_discretised_likelihood_sums_to_one():
    grid = torch.arange(256, dtype=F64) / 127.5 - 1
    for mean, std in itertools.product([-3.0, -1.0, -0.31, 0.0, 0.6, 40.0], [1e-4, 1e-2, 0.3, 5.0, 300.0]):
        log_variance = torch.tensor(2 * math.log(std), dtype=F64)
        log_p = losses.discretised_log_likelihood(grid, torch.tensor(mean, dtype=F64), log_variance)
        assert float(torch.logsumexp(log_p, 0)) == pytest.approx(0, abs=1e-11)
    coarse = torch.tensor([-1.0, 1.0], dtype=F64)
    log_p = losses.discretised_log_likelihood(coarse, torch.tensor(0.2), torch.tensor(0.0), levels=2)
    torch.testing.assert_close(log_p.exp(), torch.from_numpy(stats.norm.cdf([-0.2, 0.2])), rtol=1e-6, atol=0)


@pytest.fixture
def forty_digits():
    with mpmath.workdps(40):
        yield


@pytest.mark.parametrize(
    ("k", "mean", "std"), [(3, 0.9, 0.02), (250, -0.9, 0.02), (128, -1.0, 0.03), (255, -0.5, 0.05), (0, 1.0, 0.01)]
)
def test_discretised_likelihood_far_from_the_mean(k, mean, std, forty_digits):
    x, h = mpmath.mpf(k) / mpmath.mpf("127.5") - 1, mpmath.mpf(1) / 255

    def beyond(y):
        """The mass further from the mean than y, on the side of x: small, and so without 1 - cdf."""
        return mpmath.erfc(abs(y - mpmath.mpf(mean)) / mpmath.mpf(std) / mpmath.sqrt(2)) / 2

    near, far = (x - h, x + h) if x > mean else (x + h, x - h)
    mass = beyond(near) - (0 if k in (0, 255) else beyond(far))
    want = float(mpmath.log(mass))
    m = torch.tensor([mean], dtype=F64, requires_grad=True)
    got = losses.discretised_log_likelihood(
        torch.tensor([k / 127.5 - 1], dtype=F64), m, torch.tensor([2 * math.log(std)], dtype=F64)
    )
    assert float(got.detach()) == pytest.approx(want, rel=1e-10)
    assert bool(torch.isfinite(torch.autograd.grad(got.sum(), m)[0]).all())


# ---- continuous time


def legendre(start, end, points=120):
    nodes, w = np.polynomial.legendre.leggauss(points)
    return start + (end - start) * torch.from_numpy(nodes + 1) / 2, torch.from_numpy(w) * (end - start) / 2


@pytest.mark.parametrize("process", [sf.VP(), sf.CosineVP(), sf.EDM(0.002, 20.0), sf.SubVP()], ids=repr)
def test_continuous_bound_is_the_information_of_gaussian_data(process):
    """int -1/2 SNR' E|x0 - x0_hat|^2 dt = 1/2 log((1 + c SNR_s)/(1 + c SNR_1)) for N(0, c), in closed form."""
    c = 0.4
    model = sf.problems.Gaussian([0.0], c).model(process)
    start = float(process.time_of_lam(torch.tensor(2.5, dtype=F64)))
    t, w = legendre(start, process.t1)
    z, p = normals(6, 2)
    rate = [(p * losses.diffusion_rate(model, math.sqrt(c) * z[:, :1], float(u), z[:, 1:])).sum() for u in t]
    snr = [float(torch.exp(2 * process.lam(u))) for u in (start, process.t1)]
    want = 0.5 * math.log2((1 + c * snr[0]) / (1 + c * snr[1]))
    integral = float((torch.stack(rate) * w).sum())
    assert integral == pytest.approx(want, rel=1e-9)


def test_continuous_bound_exceeds_the_entropy():
    """prior + diffusion + reconstruction >= H(x0), and meets it as t_s and SNR(t1) go to 0."""
    process, c = sf.VP(), 0.4
    model, entropy = sf.problems.Gaussian([0.0], c).model(process), 0.5 * math.log2(2 * math.pi * math.e * c)
    z, p = normals(6, 2)
    x0, eps = math.sqrt(c) * z[:, :1], z[:, 1:]
    prior = float((p * losses.prior_bits(process, x0)).sum())
    gaps = []
    for lam in (1.0, 2.0, 3.0):
        start = float(process.time_of_lam(torch.tensor(lam, dtype=F64)))
        t, w = legendre(start, 1.0)
        rate = torch.stack([(p * losses.diffusion_rate(model, x0, float(u), eps)).sum() for u in t])
        end = float((p * losses.reconstruction_bits(process, x0, start, eps, levels=None)).sum())
        gaps.append(prior + float((rate * w).sum()) + end - entropy)
    assert gaps[0] > gaps[1] > gaps[2] > 0
    want = 0.5 * math.log2(1 + math.exp(-6) / c)  # of noise sigma^2/alpha^2 under data of variance c
    assert gaps[2] == pytest.approx(
        want + prior - 0.5 * math.log2(1 + c * math.exp(2 * float(process.lam(1.0)))), rel=1e-6
    )


def test_reconstruction_of_discrete_data():
    process, t = sf.VP(), 0.05
    grid = torch.linspace(-1, 1, 16, dtype=F64)
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    x0, eps = grid[[3, 11]].reshape(2, 1), torch.tensor([[0.4], [-1.2]], dtype=F64)
    z = alpha * x0 + sigma * eps
    logits = Normal(alpha * grid, sigma).log_prob(z)
    want = -(torch.log_softmax(logits, 1)[[0, 1], [3, 11]]) / math.log(2)
    torch.testing.assert_close(losses.reconstruction_bits(process, x0, t, eps, levels=16), want, rtol=1e-9, atol=0)
    near = losses.reconstruction_bits(process, x0, 1e-6, eps, levels=16)
    assert float(near.abs().max()) < 1e-12
