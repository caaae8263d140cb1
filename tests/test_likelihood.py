"""Likelihoods against exact log-densities: mixtures under every named process, linear models, GBM and CIR."""

import math

import numpy as np
import pytest
import torch
from exact import F64, covariance_matrices, mixture_log_density
from scipy.integrate import solve_ivp

import sdeflow as sf
from sdeflow.divergence import DIVERGENCES, divergence_of, pull
from sdeflow.likelihood import bits_per_dim, elbo, log_prob
from sdeflow.noise import Noise

NAMED = {
    "VP": sf.VP,
    "SubVP": sf.SubVP,
    "VE": lambda: sf.VE(0.01, 50.0),
    "EDM": sf.EDM,
    "RectifiedFlow": sf.RectifiedFlow,
}
DIM = 8
_MEANS = torch.tensor(np.random.default_rng(3).normal(size=(3, DIM)), dtype=F64)
_COVARIANCES = covariance_matrices(3, DIM, 5)
_WEIGHTS = [0.2, 0.3, 0.5]


def mixture():
    return sf.problems.GaussianMixture(_MEANS, _COVARIANCES, _WEIGHTS)


def density_at(process, t):
    """The exact log p_t of the mixture, by torch.distributions."""
    return mixture_log_density(_MEANS, _COVARIANCES, _WEIGHTS, process.alpha(t), process.sigma(t))


def noised(process, n, t=None):
    z = torch.randn(n, DIM, dtype=F64, generator=torch.Generator().manual_seed(1))
    return process.perturb(mixture().sample(n, seed=2), process.t_min if t is None else t, z)


@pytest.fixture(scope="module")
def case():
    """VP, its exact model, 6 samples, their exact log density and the exact prior."""
    process = sf.VP()
    x = noised(process, 6)
    return (
        process,
        mixture().model(process),
        x,
        density_at(process, process.t_min)(x),
        density_at(process, process.t1),
    )


# ---- the exact divergence


@pytest.mark.parametrize("name", NAMED)
def test_log_prob_is_the_exact_log_density(name):
    process = NAMED[name]()
    x = noised(process, 6)
    exact, prior = density_at(process, process.t_min)(x), density_at(process, process.t1)
    model = mixture().model(process)
    model._counter.calls = 0
    got = log_prob(model, x, prior=prior, rtol=1e-9, atol=1e-9)
    assert got.log_prob.dtype == F64
    assert torch.allclose(got.log_prob, exact, rtol=0, atol=1e-6)
    assert torch.equal(got.stderr, torch.zeros_like(exact))
    assert int(got.nfe.max()) == model.nfe  # some sample takes part in every call
    assert torch.equal(got.products, DIM * got.nfe)
    # the default prior is N(0, s^2) and nothing else
    std = process.prior_std
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), std).log_prob
    default = log_prob(model, x, rtol=1e-9, atol=1e-9)
    want = exact - prior(got.latent) + normal(got.latent).sum(1)
    assert torch.allclose(default.log_prob, want, rtol=0, atol=1e-6)


def test_wrong_signs_and_priors_are_seen(case):
    """Negative controls: what the test above compares moves by far more than its tolerance."""
    _, model, x, exact, prior = case
    got = log_prob(model, x, prior=prior, rtol=1e-9, atol=1e-9)
    integral = got.log_prob - got.prior_log_prob
    assert ((got.prior_log_prob - integral - exact).abs() > 1.0).all()
    assert ((integral + prior(2 * got.latent) - exact).abs() > 1e-2).all()
    assert (log_prob(model, x, rtol=1e-9, atol=1e-9).log_prob - exact).abs().max() > 1e-4  # N(0, I) is not p_1
    assert (log_prob(model, x, prior=prior, t0=0.02).log_prob - exact).abs().max() > 1e-2


def test_between_two_times_and_on_grids(case):
    process, model, x, _, _ = case
    x = noised(process, 6, 0.2)
    exact, prior = density_at(process, 0.2)(x), density_at(process, 0.7)
    errors = []
    for steps in (10, 20, 40):
        got = log_prob(model, x, prior=prior, t0=0.2, t1=0.7, solver=sf.solvers.RK4(), steps=steps)
        assert got.nfe == 4 * steps
        assert got.products == 4 * steps * DIM
        errors.append(float((got.log_prob - exact).abs().max()))
    slope = np.polyfit(np.log([10, 20, 40]), np.log(errors), 1)[0]
    assert -4.8 < slope < -3.6, errors
    grid = torch.linspace(0.2, 0.7, 41, dtype=F64)
    got = log_prob(model, x, prior=prior, grid=grid)
    assert torch.allclose(got.log_prob, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", [sf.solvers.RK45(), sf.solvers.Tsit5(), sf.solvers.ROS34PW2()], ids=repr)
def test_other_adaptive_solvers(case, solver):
    process, model, _, _, _ = case
    x = noised(process, 2, 0.2)
    got = log_prob(model, x, prior=density_at(process, 0.7), t0=0.2, t1=0.7, solver=solver, rtol=1e-5, atol=1e-6)
    assert torch.allclose(got.log_prob, density_at(process, 0.2)(x), rtol=0, atol=1e-3)


def test_a_process_with_a_matrix():
    process = sf.LinearSDE([[-0.5, 1.0], [-1.0, -0.8]], [[0.6, 0.0], [0.3, 0.9]])
    data = sf.problems.GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], [0.2, 0.3])
    x = data.sample(4, seed=0)
    got = log_prob(
        data.model(process), x, prior=lambda z: data.log_prob(z, process, process.t1), t0=0.1, rtol=1e-9, atol=1e-9
    )
    assert torch.allclose(got.log_prob, data.log_prob(x, process, 0.1), rtol=0, atol=1e-6)


KNOWN = {
    "GBM": lambda: sf.GBM(0.3, 0.6, start=[[1.0], [1.6]], weights=[1.0, 2.0]),
    "CIR": lambda: sf.CIR(),
    "SigmoidOU": lambda: sf.SigmoidOU(),
}


@pytest.mark.parametrize("name", KNOWN)
def test_state_dependent_diffusion(name):
    """Needs the divergence of G G^T in the flow, and its own derivative in the divergence."""
    process = KNOWN[name]()
    x = process.marginal_sample(4, 0.3, seed=0)
    flow = process.probability_flow(process.score)
    got = log_prob(flow, x, prior=lambda z: process.log_density(z, 0.9), t0=0.3, t1=0.9, rtol=1e-8, atol=1e-8)
    exact = process.log_density(x, 0.3)
    assert torch.allclose(got.log_prob, exact, rtol=0, atol=1e-6)
    same = log_prob(
        process.model(), x, prior=lambda z: process.log_density(z, 0.9), t0=0.3, t1=0.9, rtol=1e-8, atol=1e-8
    )
    assert torch.equal(got.log_prob, same.log_prob)


# ---- estimates


def _field(dim, batch, seed=0):
    """Linear fields x -> M_i x, one a sample: (value, leaf, M)."""
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(dim, dim, dtype=F64, generator=g).expand(batch, dim, dim)
    leaf = torch.randn(batch, dim, dtype=F64, generator=g).requires_grad_()
    return torch.einsum("bij,bj->bi", m, leaf), leaf, m[0]


@pytest.mark.parametrize("name", ["hutchinson", "hutchinson-gaussian", "hutch++"])
def test_estimates_are_unbiased_with_the_stated_variance(name):
    """40 000 independent estimates: 5 standard errors fail a correct one with probability 6e-7."""
    count = 40_000 if name != "hutch++" else 10_000
    value, leaf, m = _field(6, count)
    estimator = divergence_of(name, 1)
    found = estimator.estimate(value, leaf, estimator.draw(Noise(0, count), 6))[:, 0]
    assert abs(float(found.mean() - m.trace())) < 5 * float(found.std()) / math.sqrt(count)
    symmetric = 0.5 * (m + m.T)
    if name != "hutch++":
        part = symmetric if name == "hutchinson-gaussian" else symmetric - torch.diag(torch.diagonal(symmetric))
        assert float(found.var()) == pytest.approx(2 * float((part**2).sum()), rel=0.1)


def test_hutchpp_is_exact_for_low_rank_and_for_multiples_of_the_identity():
    estimator = divergence_of("hutch++", 3)
    leaf = torch.randn(5, 12, dtype=F64).requires_grad_()
    u = torch.randn(12, 3, dtype=F64)
    low = leaf @ (u @ torch.randn(3, 12, dtype=F64))
    trace = sum(torch.autograd.grad(low[0, i], leaf, retain_graph=True)[0][0, i] for i in range(12))
    found = estimator.estimate(low, leaf, estimator.draw(Noise(0, 5), 12))
    assert torch.allclose(found, trace.expand_as(found), rtol=1e-9)
    scaled = -3.0 * leaf
    found = estimator.estimate(scaled, leaf, estimator.draw(Noise(0, 5), 12))
    assert torch.allclose(found, torch.full_like(found, -36.0), rtol=1e-12)
    many = divergence_of("hutch++", 15)
    assert many.products(12) == 42
    value, leaf, m = _field(12, 2)
    found = many.estimate(value, leaf, many.draw(Noise(0, 2), 12))
    assert torch.allclose(found, m.trace().expand_as(found), rtol=1e-10)


def test_fields_that_ignore_x_have_no_divergence():
    leaf = torch.randn(3, 4, dtype=F64).requires_grad_()
    for value in (torch.ones(3, 4, dtype=F64), torch.ones(3, 4, dtype=F64, requires_grad=True) * 2):
        for name in DIVERGENCES:
            estimator = divergence_of(name, 1)
            assert not estimator.estimate(value, leaf, estimator.draw(Noise(0, 3), 4)).any()


class _OneByOne(torch.autograd.Function):
    """2 x, with a backward that cannot be batched."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return torch.as_tensor(2 * grad.detach().numpy())


def test_fields_without_a_batched_backward():
    leaf = torch.randn(3, 4, dtype=F64).requires_grad_()
    directions = torch.randn(5, 3, 4, dtype=F64)
    assert torch.equal(pull(_OneByOne.apply(leaf), leaf, directions), 2 * directions)


@pytest.mark.parametrize("name", ["hutchinson", "hutchinson-gaussian", "hutch++"])
def test_estimates_along_the_flow(case, name):
    """32 probes: by chance one of 6 samples leaves 5 of its standard errors (t, 31 degrees) once in 8 000 seeds."""
    _, model, x, exact, prior = case
    got = log_prob(model, x, prior=prior, divergence=name, probes=32)
    assert (got.stderr > 0).all() or name == "hutch++"  # which is exact for 32 probes in 8 dimensions
    assert ((got.log_prob - exact).abs() < 5 * got.stderr + 1e-3).all()
    one = log_prob(model, x[:1], prior=prior, divergence=name)
    assert one.stderr.isnan().all()
    per_call = 3 if name == "hutch++" else 1
    assert torch.equal(one.products, per_call * one.nfe)


def test_estimates_are_unbiased_over_seeds(case):
    """One sample under 400 indices: the mean, and the spread against the reported standard error."""
    process, model, _, _, _ = case
    x = noised(process, 1, 0.1)
    exact = density_at(process, 0.1)(x)
    got = log_prob(
        model, x.expand(400, -1), prior=density_at(process, 0.8), t0=0.1, t1=0.8, divergence="hutchinson", probes=8
    )
    error = got.log_prob - exact
    assert abs(float(error.mean())) < 5 * float(error.std()) / 20
    assert float(got.stderr.square().mean().sqrt()) == pytest.approx(float(error.std()), rel=0.2)


# ---- the batch, dtypes, shapes


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_sample_does_not_see_its_batch(case, name):
    """20 samples: those that finish first leave the batch, with their probes."""
    process, model, _, _, prior = case
    x, probes = noised(process, 20, 0.05), 1 if name == "exact" else 2
    whole = log_prob(model, x, prior=prior, t0=0.05, divergence=name, probes=probes, seed=7)
    rows = torch.tensor([3, 18])
    part = log_prob(model, x[rows], prior=prior, t0=0.05, divergence=name, probes=probes, seed=7, index=rows)
    assert int(whole.nfe.min()) < int(whole.nfe.max())
    assert torch.allclose(whole.log_prob[rows], part.log_prob, rtol=0, atol=1e-9)
    assert torch.equal(whole.nfe[rows], part.nfe)
    if name != "exact":
        other = log_prob(model, x[rows], prior=prior, t0=0.05, divergence=name, probes=2, seed=8)
        assert (other.log_prob - part.log_prob).abs().min() > 1e-6


def test_float32_images_and_scalars(case):
    process = sf.VP()
    data = sf.problems.GaussianMixture(_MEANS.reshape(3, 2, 2, 2), 0.3, _WEIGHTS)
    model = data.model(process)
    x = data.sample(4, seed=0)
    exact = data.log_prob(x, process, 1e-3)
    for dtype, bound in ((F64, 1e-4), (torch.float32, 1e-3)):
        got = log_prob(model, x.to(dtype), prior=lambda z: data.log_prob(z, process, 1.0))
        assert got.latent.shape == x.shape
        assert got.latent.dtype == dtype
        assert torch.allclose(got.log_prob, exact, rtol=0, atol=bound)
    # events of no dimension, and a gradient-free caller
    scalar = sf.Model(lambda x, t: -x, process, "score")
    with torch.inference_mode():
        got = log_prob(scalar, torch.tensor([0.3, -2.0], dtype=F64), rtol=1e-9, atol=1e-9)
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), 1.0)
    assert torch.allclose(got.log_prob, normal.log_prob(torch.tensor([0.3, -2.0], dtype=F64)), atol=1e-7)


class _Net(torch.nn.Module):
    """Convolutions, normalisation and attention, as images are modelled with."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Conv2d(4, 2, 3, padding=1)
        self.norm = torch.nn.GroupNorm(2, 4)

    def forward(self, x, t):
        h = torch.nn.functional.silu(self.norm(self.first(x))) + t[:, None, None, None]
        flat = h.flatten(2).mT
        h = h + torch.nn.functional.scaled_dot_product_attention(flat, flat, flat).mT.reshape(h.shape)
        return self.last(h)


def test_networks_against_their_jacobians():
    net = _Net().double()
    model = sf.Model(net, sf.VP(), "v")
    x = torch.randn(2, 2, 3, 3, dtype=F64)
    leaf = x.flatten(1).requires_grad_()
    value = model(leaf.reshape(x.shape), 0.4).flatten(1)
    exact = divergence_of("exact", 1).estimate(value, leaf, torch.empty(0))[:, 0]
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v.reshape(x.shape), 0.4).flatten(1), leaf)
    want = torch.stack([jacobian[i, :, i].trace() for i in range(2)])
    assert torch.allclose(exact, want, rtol=1e-9)
    got = log_prob(model, x, divergence="hutchinson", probes=64, steps=10)
    full = log_prob(model, x, steps=10)
    assert ((got.log_prob - full.log_prob).abs() < 5 * got.stderr).all()
    assert all(p.grad is None for p in net.parameters())
    assert not full.log_prob.requires_grad


def test_conditions_follow_their_samples():
    process = sf.VP()

    def net(x, t, mean):
        a, s = process.alpha(t.double()), process.sigma(t.double())
        return -(x - a.reshape(-1, 1) * mean) / (a**2 * 0.25 + s**2).reshape(-1, 1)

    mean = torch.linspace(-3, 3, 24, dtype=F64)[:, None]  # enough for the first to finish to leave the batch
    x = mean + 0.4 * torch.randn(24, 1, dtype=F64)
    model = sf.Model(net, process, "score").bind(mean=mean)
    a, s = process.alpha(1e-3), process.sigma(1e-3)
    exact = torch.distributions.Normal(a * mean, torch.sqrt(0.25 * a**2 + s**2)).log_prob(x)[:, 0]
    at_end = torch.distributions.Normal(process.alpha(1.0) * mean, math.sqrt(1 - 0.75 * process.alpha(1.0) ** 2))
    got = log_prob(model, x, prior=lambda z: at_end.log_prob(z)[:, 0], rtol=1e-8, atol=1e-8)
    assert torch.allclose(got.log_prob, exact, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="one row a sample"):
        log_prob(model, x[:2])


def test_a_failed_sample_leaves_the_others():
    def net(x, t):
        return torch.where(x > 10, torch.nan, -x)

    model = sf.Model(net, sf.VP(), "score")
    x = torch.tensor([[0.5], [20.0]], dtype=F64)
    with pytest.raises(sf.SolveError):
        log_prob(model, x)
    got = log_prob(model, x, throw=False)
    assert got.status.tolist() == [0, 1]
    assert torch.isfinite(got.log_prob[0])
    assert torch.isnan(got.log_prob[1])


# ---- the bound


@pytest.mark.parametrize("name", NAMED)
def test_the_bound_is_tight_for_the_exact_model(name):
    """With the exact score and law at t1 the gap is 0: 6 samples within 5 standard errors."""
    process = NAMED[name]()
    x, end = noised(process, 6), 0.99 if name == "RectifiedFlow" else process.t1
    exact = density_at(process, process.t_min)(x)
    got = elbo(mixture().model(process), x, prior=density_at(process, end), t1=end, draws=256)
    assert got.nfe == 512
    assert ((got.elbo - exact).abs() < 5 * got.stderr).all()
    assert (got.stderr < 1.0).all()


def _wrong_score(process, factor):
    """`factor` times the score of N(0, 0.3) data: (bound, log density of the reverse SDE, gap) at x, in numpy.

    The reverse SDE is linear, its law N(0, v_t); the gap is int g^2/2 (slope + 1/v_t)^2 E x_t^2 dt.
    """
    t0, t1 = process.t_min, process.t1
    a, s, f, g = (
        (lambda t, h=h: float(h(t)))
        for h in (process.alpha, process.sigma, process.drift_coeff, process.diffusion_coeff)
    )

    def slope(t):
        return -factor / (a(t) ** 2 * 0.3 + s(t) ** 2)

    def down(t, v):  # dx = (f - g^2 slope) x dt + g dW from t1 down
        return 2 * (f(t) - g(t) ** 2 * slope(t)) * v - g(t) ** 2

    law = solve_ivp(down, (t1, t0), [1.0], rtol=1e-9, atol=1e-12, dense_output=True)

    def parts(x):
        def square(t):  # E x_t^2 from x at t0
            r = a(t) / a(t0)
            return r**2 * x**2 + s(t) ** 2 - (r * s(t0)) ** 2

        def rates(t, _):
            bound = 0.5 * g(t) ** 2 * (slope(t) ** 2 * square(t) + 2 * slope(t))
            return [bound, 0.5 * g(t) ** 2 * (slope(t) + 1 / law.sol(t)[0]) ** 2 * square(t)]

        loss, gap = solve_ivp(rates, (t0, t1), [0.0, 0.0], rtol=1e-8, atol=1e-10).y[:, -1]
        prior = -0.5 * math.log(2 * math.pi) - 0.5 * square(t1)
        v = law.y[0, -1]
        return prior + math.log(a(t1) / a(t0)) - loss, -0.5 * math.log(2 * math.pi * v) - 0.5 * x**2 / v, gap

    return parts


def test_the_bound_of_a_wrong_model_and_its_gap():
    process, factor = sf.VP(), 1.3
    parts = _wrong_score(process, factor)
    model = sf.Model(
        lambda x, t: -factor * x / (0.3 * process.alpha(t) ** 2 + process.sigma(t) ** 2), process, "score", expand=False
    )
    x = torch.tensor([[0.0], [0.7], [-1.5]], dtype=F64)
    bound, exact, gap = torch.tensor([parts(float(v)) for v in x], dtype=F64).T
    assert torch.allclose(exact - bound, gap, rtol=1e-4)
    got = elbo(model, x, draws=1024)
    assert ((got.elbo - bound).abs() < 5 * got.stderr).all()
    assert (got.elbo + 5 * got.stderr < exact).all()


def test_the_bound_is_per_sample(case):
    _, model, x, _, prior = case
    whole = elbo(model, x, prior=prior, draws=16, seed=3)
    part = elbo(model, x[4:], prior=prior, draws=16, seed=3, index=4)
    assert torch.allclose(whole.elbo[4:], part.elbo, rtol=0, atol=1e-9)
    single = elbo(model, x.float(), prior=prior, draws=16, seed=3)
    assert torch.allclose(single.elbo, whole.elbo, rtol=0, atol=1e-2)


def test_the_standard_error_of_the_bound(case):
    _, model, x, exact, prior = case
    got = elbo(model, x[:1].expand(300, -1), prior=prior, draws=64)
    error = got.elbo - exact[0]
    assert abs(float(error.mean())) < 5 * float(error.std()) / math.sqrt(300)
    assert float(got.stderr.square().mean().sqrt()) == pytest.approx(float(error.std()), rel=0.2)


# ---- bits per dimension


def _uniform_density(y, inside):
    """log density of the uniform law on a box, -inf outside."""
    return torch.where((y.abs() <= inside).flatten(1).all(1), -math.prod(y.shape[1:]) * math.log(2 * inside), -math.inf)


class _Still(sf.GaussianSDE):
    """A process that hardly moves: its flow is the identity to 1e-6 over the span used here."""

    t0, t1 = 0.0, 1.0

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return 1e-9 * (1 + t)


@pytest.mark.parametrize(("levels", "cells"), [(256, "inside"), (256, "around"), (17, "around"), (2, "inside")])
def test_a_uniform_law_has_log2_levels_bits(levels, cells):
    """The identity as flow and the uniform density as prior: the offset is all that is left."""
    model = sf.Model(lambda x, t: torch.zeros_like(x), _Still(), "eps")
    k = torch.randint(0, levels, (5, 3, 2), generator=torch.Generator().manual_seed(0))
    x = -1 + 2 * k.double() / (levels - 1)
    width = 2 / levels if cells == "inside" else 2 / (levels - 1)
    edge = 1.0 if cells == "inside" else 1 + width / 2
    got = bits_per_dim(
        model, x, levels=levels, cells=cells, prior=lambda z: _uniform_density(z, edge * (1 + 1e-6)), steps=1, draws=3
    )
    assert torch.allclose(got.bits, torch.full((5,), math.log2(levels), dtype=F64), rtol=0, atol=1e-5)
    assert got.offset == -math.log2(width)
    if (levels, cells) == (256, "inside"):
        assert got.offset == 7.0
    assert (got.stderr < 1e-5).all()
    # negative controls: without the offset, and with the other cells, it is not
    assert ((got.bits - got.offset) - math.log2(levels)).abs().min() > 0.5 or levels == 2
    if levels == 17:
        wrong = bits_per_dim(
            model, x, levels=levels, cells="inside", prior=lambda z: _uniform_density(z, edge * (1 + 1e-6)), steps=1
        )
        assert (wrong.bits - math.log2(levels)).abs().min() > 0.05


def test_bits_of_a_gaussian_bound_its_discretisation():
    """E over data of the bits is no less than the entropy of the cells under the exact law, and near it."""
    levels, std = 17, 0.4
    process, width = sf.VP(), 2 / 16
    data = sf.problems.Gaussian([0.0], std**2)
    edges = -1 + width * (np.arange(levels + 1) - 0.5)
    cdf = torch.special.ndtr(torch.tensor(edges / std, dtype=F64))
    mass = torch.diff(cdf)
    x = (-1 + width * torch.arange(levels, dtype=F64))[:, None]
    got = bits_per_dim(
        data.model(process), x, levels=levels, draws=20, prior=lambda z: data.log_prob(z, process, 1.0), steps=12
    )
    exact = -torch.log2(mass)
    entropy = float((mass * exact).sum() / mass.sum())
    mean = float((mass * got.bits).sum() / mass.sum())
    assert entropy - 0.02 < mean < entropy + 0.05
    assert ((got.bits - exact).abs() < 0.15).all()


def test_bits_without_dequantisation(case):
    _, model, x, _, prior = case
    got = bits_per_dim(model, x, levels=17, dequantise=False, prior=prior, divergence="hutchinson", probes=4, seed=5)
    density = log_prob(model, x, prior=prior, divergence="hutchinson", probes=4, seed=5)
    assert torch.allclose(got.bits, 3.0 - density.log_prob / (DIM * math.log(2)))
    assert torch.allclose(got.stderr, density.stderr / (DIM * math.log(2)))
    on_levels = torch.round(8 * x.clamp(-1, 1)) / 8
    a, b = (bits_per_dim(model, v, levels=17, seed=5, index=i) for v, i in ((on_levels, None), (on_levels[3:], 3)))
    assert torch.allclose(a.bits[3:], b.bits, rtol=0, atol=1e-9)
    assert a.stderr.isnan().all()


# ---- errors, before any call of the model


ERRORS = {
    "divergence": (
        lambda m, x: log_prob(m, x, divergence="trace"),
        ValueError,
        "divergence as one of 'exact', .*, got 'trace'",
    ),
    "probes": (lambda m, x: log_prob(m, x, divergence="hutchinson", probes=0), ValueError, "probes >= 1"),
    "probes of exact": (lambda m, x: log_prob(m, x, probes=4), ValueError, "no probes"),
    "probes type": (
        lambda m, x: log_prob(m, x, divergence="hutchinson", probes=2.0),
        TypeError,
        "probes as a whole number",
    ),
    "times": (lambda m, x: log_prob(m, x, t0=0.5, t1=0.4), ValueError, "expected t0 < t1"),
    "outside": (lambda m, x: log_prob(m, x, t1=2.0), ValueError, "expected t0 < t1"),
    "grid and times": (lambda m, x: log_prob(m, x, t0=0.1, grid=[0.1, 0.5]), ValueError, "not both"),
    "grid down": (lambda m, x: log_prob(m, x, grid=[0.5, 0.1]), ValueError, "expected t0 < t1"),
    "steps and rtol": (lambda m, x: log_prob(m, x, steps=3, rtol=1e-3), ValueError, "not both"),
    "solver": (lambda m, x: log_prob(m, x, solver=sf.solvers.DDIM(), steps=3), ValueError, "transition view"),
    "model": (lambda m, x: log_prob(m.net, x), TypeError, "model as a Model or a ReverseSDE"),
    "noisy": (lambda m, x: log_prob(m.sde.reverse(m), x), ValueError, "eta = 0"),
    "integers": (lambda m, x: log_prob(m, x.long()), TypeError, "floating-point"),
    "infinite": (lambda m, x: log_prob(m, x / 0), ValueError, "finite x"),
    "prior": (lambda m, x: log_prob(m, x, prior=0.0), TypeError, "prior as a function or None, got 0.0"),
    "seed": (lambda m, x: log_prob(m, x, seed=0.5), TypeError, "seed as a whole number"),
    "index": (lambda m, x: log_prob(m, x, index=torch.tensor([1])), ValueError, "one index a sample"),
    "draws": (lambda m, x: elbo(m, x, draws=3), ValueError, "even number"),
    "draws type": (lambda m, x: elbo(m, x, draws=4.0), TypeError, "draws as a whole number"),
    "lam": (lambda m, x: elbo(m, x, t0=0.0), ValueError, "finite lam|does not give the flow"),
    "levels": (lambda m, x: bits_per_dim(m, x, levels=17), ValueError, "17 values"),
    "few levels": (lambda m, x: bits_per_dim(m, x, levels=1), ValueError, "levels >= 2"),
    "cells": (lambda m, x: bits_per_dim(m, x, cells="both"), ValueError, "cells"),
    "no draws": (lambda m, x: bits_per_dim(m, x, dequantise=False, draws=2), ValueError, "dequantise=False"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_come_before_the_first_call(case, name):
    process, _, x, _, _ = case
    model = mixture().model(process)
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call(model, x)
    assert model.nfe == 0


def test_errors_of_processes_without_a_prior_or_an_end():
    process = KNOWN["GBM"]()
    with pytest.raises(ValueError, match="no default prior"):
        log_prob(process.model(), torch.ones(2, 1, dtype=F64))
    with pytest.raises(ValueError, match="expected x of shape"):
        log_prob(process.model(), torch.ones(2, 3, dtype=F64), prior=lambda z: z[:, 0])
    flow = sf.Model(lambda x, t: x, sf.RectifiedFlow(), "eps")  # says nothing at t1 = 1, where alpha = 0
    with pytest.raises(ValueError, match="does not give the flow at t = 1"):
        log_prob(flow, torch.ones(2, 1))
    with pytest.raises(ValueError, match="finite lam"):
        elbo(sf.Model(lambda x, t: x, sf.RectifiedFlow(), "velocity"), torch.ones(2, 1))
    with pytest.raises(ValueError, match="GaussianSDE"):
        elbo(process.model(), torch.ones(2, 1, dtype=F64))
    with pytest.raises(ValueError, match="one number a sample"):
        log_prob(sf.Model(lambda x, t: -x, sf.VP(), "score"), torch.ones(2, 1), prior=lambda z: z)
