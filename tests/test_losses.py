"""Training objectives: minimisers by quadrature, relations between losses, bounds in closed form, laws of times."""

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
from sdeflow.losses import weights
from sdeflow.model import PREDICTIONS
from tests.exact import F64

MIXTURE = sf.problems.GaussianMixture([[-0.7], [0.9]], [[0.2], [0.35]], [0.4, 0.6])
TABLE = [0.05, 0.2, 0.1, 0.4, 0.6]
SMOOTH = [sf.VP(), sf.SubVP(), sf.VE(0.1, 5.0), sf.EDM(), sf.RectifiedFlow(), sf.CosineVP(), sf.DiscreteVP(TABLE)]
KS_LEVEL = 1e-6
"""A right sampler fails a test of its law on one seed in a million."""


def middle_times(process, count=7):
    share = torch.linspace(0.11, 0.83, count, dtype=F64)
    return process.t_min + share * (process.t1 - process.t_min)


def hermite(points):
    """Nodes and weights of an expectation over N(0, 1)."""
    nodes, w = np.polynomial.hermite_e.hermegauss(points)
    return torch.from_numpy(nodes), torch.from_numpy(w / w.sum())


def normals(points, dims):
    """Nodes (m, dims) and weights (m,) of an expectation over N(0, I)."""
    z, w = hermite(points)
    nodes = torch.cartesian_prod(*[z] * dims).reshape(-1, dims)
    return nodes, torch.cartesian_prod(*[w] * dims).reshape(-1, dims).prod(1)


def mixture_pairs(points=60):
    """(x0 (m, 1), eps (m, 1), probability (m,)) of data of MIXTURE and noise."""
    z, w = normals(points, 2)
    parts = [
        (m + torch.sqrt(v) * z[:, :1], z[:, 1:], share * w)
        for m, v, share in zip(MIXTURE.means, MIXTURE.variances, MIXTURE.weights, strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def mixture_states(process, t, points=120):
    """(x (m, 1), probability (m,)) of x_t."""
    z, w = hermite(points)
    alpha, sigma = process.alpha(t), process.sigma(t)
    parts = [
        (alpha * m + torch.sqrt(alpha**2 * v + sigma**2) * z[:, None], share * w)
        for m, v, share in zip(MIXTURE.means, MIXTURE.variances, MIXTURE.weights, strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def bent(x):
    """Directions in which a model of states (m, d) can be wrong, (m, d, 4): no score is left out by symmetry."""
    return torch.stack([torch.ones_like(x), x, torch.tanh(x - 0.3), torch.sin(x) * x.sum(1, keepdim=True)], dim=-1)


def around(exact, process, prediction):
    """(theta, a model that is exact at theta = 0)."""
    theta = torch.zeros(4, dtype=F64, requires_grad=True)
    net = lambda x, t: exact(x, t) + bent(x) @ theta  # noqa: E731
    return theta, sf.Model(net, process, prediction, expand=False)


def curvature(loss, probability, theta):
    """(largest slope, least curvature) of the expected loss at theta = 0, in units of the loss's own size."""
    (slope,) = torch.autograd.grad((probability * loss).sum(), theta, create_graph=True)
    rows = [torch.autograd.grad(part, theta, retain_graph=True)[0] for part in slope]
    hessian = torch.stack(rows)
    return float(slope.detach().abs().max() / hessian.abs().max()), float(
        torch.linalg.eigvalsh(hessian)[0] / hessian.abs().max()
    )


def assert_minimal(loss, probability, theta, tolerance=1e-9):
    slope, least = curvature(loss, probability, theta)
    assert slope < tolerance
    assert least > 1e-5


# ---- denoising


@pytest.mark.parametrize("process", [sf.VP(), sf.VE(0.1, 5.0), sf.RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_exact_model_minimises_denoising_of_a_mixture(process, prediction):
    x0, eps, probability = mixture_pairs()
    exact = MIXTURE.model(process)
    t = 0.6
    theta, model = around(lambda x, t: exact(x, t, prediction), process, prediction)
    assert_minimal(losses.denoising(model, x0, t, eps), probability, theta)
    other = losses.denoising(model, x0, t, eps, "v", weight=weights.min_snr())
    assert_minimal(other, probability, theta)
    # control: noise of another size than the process's
    wrong = losses.denoising(model, x0, t, 1.05 * eps)
    assert curvature(wrong, probability, theta)[0] > 1e-4


def test_denoising_is_what_it_was():
    """Values and draws that trained weights depend on, by the formulas they had."""
    process, x0, eps = sf.VP(), torch.randn(6, 3), torch.randn(6, 3)
    model = sf.Model(lambda x, t: torch.tanh(x + t[:, None]), process, "v")
    t = torch.linspace(0.1, 0.9, 6, dtype=F64)
    alpha, sigma = (v(t)[:, None].float() for v in (process.alpha, process.sigma))
    want = (torch.tanh(alpha * x0 + sigma * eps + t[:, None].float()) - (-sigma * x0 + alpha * eps)).square().mean(1)
    got = losses.denoising(model, x0, t, eps)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    torch.manual_seed(3)
    times = losses.stratified_times(process, 5)
    after = torch.rand(())
    torch.manual_seed(3)
    u = torch.rand((), dtype=F64)
    assert torch.equal(after, torch.rand(()))  # one number was drawn
    low, high = (math.atan(math.exp(-float(process.lam(v)))) for v in (1e-5, 1.0))
    angle = low + (torch.arange(5, dtype=F64) + u) / 5 * (high - low)
    torch.testing.assert_close(torch.atan(torch.exp(-process.lam(times))), angle, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        losses.stratified_times(process, 5, generator=torch.Generator().manual_seed(3)), times, rtol=0, atol=0
    )


@pytest.mark.parametrize("process", SMOOTH, ids=repr)
def test_losses_of_two_predictions(process):
    """loss_ratio relates every pair of losses, sample by sample; flow matching is the one of the velocity."""
    t = middle_times(process)
    x0, eps = torch.randn(7, 2, dtype=F64), torch.randn(7, 2, dtype=F64)
    for own in PREDICTIONS:
        model = sf.Model(lambda x, t: torch.tanh(x), process, own, expand=False)
        loss = {name: losses.denoising(model, x0, t, eps, name) for name in PREDICTIONS}
        for given, wanted in itertools.product(PREDICTIONS, repeat=2):
            ratio = losses.loss_ratio(process, t, given, wanted)
            torch.testing.assert_close(ratio * loss[given], loss[wanted], rtol=1e-10, atol=0)
        torch.testing.assert_close(losses.flow_matching(model, x0, t, eps), loss["velocity"], rtol=0, atol=0)


def test_flow_matching_is_weighted_noise_prediction():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    ratio = losses.loss_ratio(sf.RectifiedFlow(), t, "eps", "velocity")
    torch.testing.assert_close(ratio, (1 - t) ** -2, rtol=1e-12, atol=0)
    for process in SMOOTH[:4]:
        t = middle_times(process)
        slope = 0.5 * process.diffusion_coeff(t) ** 2 / process.sigma(t) ** 2  # -lam'
        ratio = losses.loss_ratio(process, t, "eps", "velocity")
        torch.testing.assert_close(ratio, (process.sigma(t) * slope) ** 2, rtol=1e-10, atol=0)


# ---- weights


def by_hand(process, t):
    """name -> (weight, prediction, values), from alpha, sigma, g."""
    alpha, sigma, g = process.alpha(t), process.sigma(t), process.diffusion_coeff(t)
    snr = alpha**2 / sigma**2
    speed = g**2 / (2 * sigma**2)
    u = sigma / alpha
    return {
        "uniform": (weights.uniform("v"), "v", torch.ones_like(t)),
        "snr": (weights.snr(), "x0", snr),
        "snr of eps": (weights.snr(), "eps", torch.ones_like(t)),
        "truncated": (weights.truncated_snr(), "x0", torch.maximum(snr, torch.ones_like(t))),
        "min": (weights.min_snr(3.0), "x0", torch.minimum(snr, torch.full_like(t, 3))),
        "min of eps": (weights.min_snr(3.0), "eps", torch.minimum(snr, torch.full_like(t, 3)) / snr),
        "min of v": (
            weights.min_snr(3.0),
            "v",
            torch.minimum(snr, torch.full_like(t, 3)) / (snr + 1) / (alpha**2 + sigma**2),
        ),
        "sigma^2": (weights.noise_variance(), "score", sigma**2),
        "sigma^2 of eps": (weights.noise_variance(), "eps", torch.ones_like(t)),
        "likelihood": (weights.likelihood(), "score", g**2),
        "elbo of score": (weights.elbo(), "score", g**2 / 2),
        "elbo of x0": (weights.elbo(), "x0", speed * snr),
        "edm": (weights.edm(0.7), "x0", (u**2 + 0.49) / (u * 0.7) ** 2),
        "sigmoid": (weights.sigmoid(-1.0), "eps", speed / (1 + snr * math.exp(1.0))),
        "cosine": (weights.cosine(), "eps", speed * 2 / (alpha / sigma + sigma / alpha)),
        "by lam": (weights.by_lam(lambda lam: lam**2), "eps", speed * torch.log(alpha / sigma) ** 2),
    }


@pytest.mark.parametrize("process", SMOOTH, ids=repr)
def test_weights_by_hand(process):
    t = middle_times(process)
    for name, (weight, prediction, want) in by_hand(process, t).items():
        got = weight.of(process, t, prediction)
        assert got.dtype == F64
        torch.testing.assert_close(got, want, rtol=1e-10, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("process", SMOOTH, ids=repr)
def test_one_objective_whatever_the_prediction(process):
    t = middle_times(process)
    x0, eps = torch.randn(7, 2, dtype=F64), torch.randn(7, 2, dtype=F64)
    model = sf.Model(lambda x, t: torch.tanh(x), process, "v", expand=False)
    for weight, prediction, want in by_hand(process, t).values():
        base = want * losses.denoising(model, x0, t, eps, prediction)
        for name in PREDICTIONS:
            loss = losses.denoising(model, x0, t, eps, name, weight=weight)
            torch.testing.assert_close(loss, base, rtol=1e-9, atol=0)
        assert repr(weight)
    plain = losses.denoising(model, x0, t, eps, weight=lambda process, t: process.sigma(t))
    torch.testing.assert_close(plain, process.sigma(t) * losses.denoising(model, x0, t, eps), rtol=1e-12, atol=0)


def test_weights_where_no_data_is_left():
    """At alpha = 0, where noise prediction says nothing about the data, those for x0 and v have their limits."""
    process = sf.DiscreteVP(TABLE, zero_terminal_snr=True)
    limits = {weights.snr(): 0.0, weights.min_snr(): 0.0, weights.truncated_snr(): 1.0, weights.edm(0.5): 4.0}
    for weight, want in limits.items():
        for prediction in ("x0", "v"):
            assert float(weight.of(process, 1.0, prediction)) == pytest.approx(want, abs=1e-15)
    assert float(weights.snr().of(process, 1.0, "eps")) == 1.0
    with pytest.raises(ValueError, match=r"edm\(0.5\) of the eps loss: .*got inf at t = 1"):
        weights.edm(0.5).of(process, 1.0, "eps")


def test_cosine_weight_is_noise_prediction_on_the_cosine_schedule():
    cosine = sf.GaussianSDE.from_kernel(lambda t: torch.cos(math.pi * t / 2), lambda t: torch.sin(math.pi * t / 2))
    t = torch.linspace(0.05, 0.95, 9, dtype=F64)
    torch.testing.assert_close(weights.cosine().of(cosine, t, "eps"), torch.full_like(t, math.pi), rtol=1e-10, atol=0)


def test_a_weight_in_lam_is_one_objective_on_every_schedule():
    """int w(lam) D(lam) dlam over the same levels, by quadrature in t, on three schedules."""
    nodes, w = np.polynomial.legendre.leggauss(80)
    found = []
    for process in (sf.VP(), sf.CosineVP(), sf.GaussianSDE.from_kernel(lambda t: 1 - t, lambda t: t)):
        start, end = (float(process.time_of_lam(torch.tensor(v, dtype=F64))) for v in (2.0, -2.0))
        t = start + (end - start) * torch.from_numpy(nodes + 1) / 2
        value = weights.sigmoid(0.5).of(process, t, "eps") * process.lam(t) ** 2
        found.append(float((value * torch.from_numpy(w)).sum() * (end - start) / 2))
    assert found == pytest.approx([found[0]] * 3, rel=1e-9)


# ---- score matching without a kernel


def mutant(sign, factor):
    """Implicit score matching with another sign or factor of the divergence, one dimension."""

    def loss(model, x, t):
        leaf = x.clone().requires_grad_()
        s = model.score(leaf, t)
        (slope,) = torch.autograd.grad(s.sum(), leaf, create_graph=True)
        return (s**2 + sign * factor * 2 * slope).squeeze(1)

    return loss


@pytest.mark.parametrize("process", [sf.VP(), sf.EDM(0.002, 3.0)], ids=repr)
def test_exact_score_minimises_implicit_and_sliced(process):
    t = 0.5
    x, probability = mixture_states(process, t)
    exact = MIXTURE.model(process)
    theta, model = around(exact.score, process, "score")
    v = torch.ones_like(x)  # E v^2 = 1: exact in one dimension
    for loss in (
        losses.implicit(model, x, t),
        losses.sliced(model, x, t, v),
        losses.sliced(model, x, t, v, reduce_variance=False),
        losses.implicit(model, x, t, weight=weights.likelihood()),
    ):
        assert_minimal(loss, probability, theta)
    fisher = float((probability * exact.score(x, t).squeeze(1) ** 2).sum())
    assert float((probability * losses.implicit(exact, x, t).detach()).sum()) == pytest.approx(-fisher, rel=1e-9)
    right = curvature(mutant(1, 1)(model, x, t), probability, theta)[0]
    assert right < 1e-9
    for sign, factor in ((-1, 1), (1, 0.5), (1, 2)):
        assert curvature(mutant(sign, factor)(model, x, t), probability, theta)[0] > 1e-2


def test_implicit_is_denoising_but_for_a_constant():
    process, t = sf.VP(), 0.4
    x0, eps, p = mixture_pairs()
    x, q = mixture_states(process, t)
    gaps = []
    for slope in (0.0, 0.5, -1.3):
        model = sf.Model(lambda x, t, a=slope: torch.sin(x) + a * x, process, "score", expand=False)
        explicit = (p * losses.denoising(model, x0, t, eps, "score")).sum()
        gaps.append(float(explicit - (q * losses.implicit(model, x, t)).sum().detach()))
    assert gaps == pytest.approx([gaps[0]] * 3, rel=1e-10)


def test_sliced_has_the_mean_of_implicit():
    """Over all sign vectors E v v^T = I exactly; a field whose Jacobian is neither diagonal nor symmetric."""
    mix = torch.randn(3, 3, dtype=F64)
    model = sf.Model(lambda x, t: torch.tanh(x @ mix) + x.square() @ mix.T, sf.VP(), "score", expand=False)
    x, t = torch.randn(5, 3, dtype=F64), torch.linspace(0.2, 0.8, 5, dtype=F64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * 3)
    v = signs[:, None].expand(8, 5, 3)
    want = losses.implicit(model, x, t)
    for reduce in (True, False):
        torch.testing.assert_close(losses.sliced(model, x, t, v, reduce_variance=reduce), want, rtol=1e-12, atol=1e-12)
    one = [losses.sliced(model, x, t, w.contiguous()) for w in v]
    torch.testing.assert_close(torch.stack(one).mean(0), want, rtol=1e-12, atol=1e-12)
    # a normal direction: each form by hand from the Jacobian
    v = torch.randn(5, 3, dtype=F64)
    s = model.score(x, t)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: torch.tanh(y @ mix) + y.square() @ mix.T))(x)
    bend = 2 * torch.einsum("bi,bij,bj->b", v, jacobian, v)
    plain, reduced = (bend + (v * s).sum(1) ** 2) / 3, (bend + s.square().sum(1)) / 3
    torch.testing.assert_close(losses.sliced(model, x, t, v, reduce_variance=False), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses.sliced(model, x, t, v), reduced, rtol=1e-12, atol=1e-12)


def test_implicit_for_any_sde():
    """A double well, which has no kernel: its stationary density exp(-2 U/s^2) by quadrature."""

    class DoubleWell(sf.SDE):
        noise = "diagonal"

        def drift(self, x, t):
            return x - x**3

        def diffusion(self, x, t):
            return 0.8 * torch.ones_like(x)

    process = DoubleWell()
    x = torch.linspace(-4, 4, 4001, dtype=F64)[:, None]  # a sum over a whole smooth bump converges spectrally
    density = torch.exp(2 / 0.64 * (x**2 / 2 - x**4 / 4)).squeeze(1)
    theta, model = around(lambda x, t: 2 * (x - x**3) / 0.64, process, "score")
    assert_minimal(losses.implicit(model, x, 0.5), density / density.sum(), theta)
    weighted = losses.implicit(model, x, 0.5, weight=lambda sde, t: 3.0)
    torch.testing.assert_close(weighted, 3 * losses.implicit(model, x, 0.5))
    with pytest.raises(ValueError, match="a Weight needs a GaussianSDE"):
        losses.implicit(model, x, 0.5, weight=weights.likelihood())


def test_score_matching_reaches_parameters_and_no_more():
    net = torch.nn.Linear(2, 2).double()
    model = sf.Model(lambda x, t: net(x), sf.VP(), "score")
    x = torch.randn(4, 2, dtype=F64, requires_grad=True)
    losses.implicit(model, x, 0.5).sum().backward()
    assert x.grad is None
    # |W x + b|^2 + 2 tr W over 2
    want = (net.weight.detach() @ x.detach().T + net.bias.detach()[:, None]) @ x.detach() + 4 * torch.eye(2)
    torch.testing.assert_close(net.weight.grad, want)
    with torch.no_grad():
        assert not losses.implicit(model, x, 0.5).requires_grad
    with torch.inference_mode():
        assert losses.sliced(model, x, 0.5, torch.randn(4, 2)).shape == (4,)
    target = torch.randn(4, 2, dtype=F64, requires_grad=True)
    losses.kernel_matching(model, x.detach(), 0.5, target).sum().backward()
    assert target.grad is None
    constant = sf.Model(lambda x, t: torch.ones_like(x), sf.VP(), "score")
    assert torch.equal(losses.implicit(constant, x, 0.5), torch.ones(4, dtype=F64))
    assert torch.equal(losses.sliced(constant, x, 0.5, torch.ones(4, 2)), torch.ones(4, dtype=F64))


# ---- kernels


def test_kernel_matching_of_a_gaussian_process_is_denoising():
    process, n = sf.VP(), 5
    model = MIXTURE.model(process)
    x0, eps, t = torch.randn(n, 1, dtype=F64), torch.randn(n, 1, dtype=F64), torch.linspace(0.1, 0.9, n, dtype=F64)
    x = process.perturb(x0, t, eps)
    target = losses.kernel_score(process, x, t, x0)
    torch.testing.assert_close(target, -eps / process.sigma(t)[:, None], rtol=1e-10, atol=0)
    for weight in (None, weights.noise_variance()):
        loss = losses.kernel_matching(model, x, t, target, weight=weight)
        want = losses.denoising(model, x0, t, eps, "score", weight=weight)
        torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)


def test_kernel_matching_of_a_linear_sde():
    process = sf.LinearSDE(torch.tensor([[-0.5, 1.0], [-1.0, -0.8]], dtype=F64), torch.eye(2, dtype=F64) * 0.9)
    data = sf.problems.Gaussian([0.4, -0.2], torch.tensor([[0.5, 0.2], [0.2, 0.8]], dtype=F64))
    z, p = normals(6, 4)  # exact: the loss is a polynomial of degree 2 in every normal
    x0 = torch.tensor([0.4, -0.2], dtype=F64) + z[:, :2] @ torch.linalg.cholesky(data.covariance).T
    t = 0.7
    x, eps = process.perturb(x0, t, z[:, 2:]), z[:, 2:]
    target = losses.kernel_score(process, x, t, x0)
    factor = process.transition_kernel(0.0, t)[1]
    torch.testing.assert_close(target, -eps @ torch.linalg.inv(factor), rtol=1e-9, atol=1e-9)  # rows of -L^-T eps
    each = losses.kernel_score(process, x, torch.full((len(x),), t, dtype=F64), x0)
    torch.testing.assert_close(each, target, rtol=1e-9, atol=1e-9)
    exact = data.model(process)
    theta = torch.zeros(3, dtype=F64, requires_grad=True)

    def net(x, t):
        return exact.score(x, t) + theta[0] + theta[1] * x + theta[2] * x.flip(1)

    model = sf.Model(net, process, "score", expand=False)
    assert_minimal(losses.kernel_matching(model, x, t, target), p, theta)
    assert curvature(losses.kernel_matching(model, x, t, 1.05 * target), p, theta)[0] > 1e-3
    with pytest.raises(ValueError, match="no density at t = 0"):
        losses.kernel_score(process, x, 0.0, x0)


def test_kernel_matching_of_a_process_with_a_known_kernel():
    process = sf.GBM(0.3, 0.5, start=[[0.8], [1.9]], weights=[0.3, 0.7])
    y = torch.linspace(-4.5, 5.0, 1500, dtype=F64)
    x = torch.exp(y)[:, None]
    step = torch.exp(y) * (y[1] - y[0])
    t = 0.6
    states, starts, p = [], [], []
    for atom, share in zip(process.start, process.weights, strict=True):
        start = atom.expand_as(x)
        states.append(x)
        starts.append(start)
        p.append(share * torch.exp(process.log_kernel(x, t, start)) * step)
    x, x0, p = torch.cat(states), torch.cat(starts), torch.cat(p)
    target = losses.kernel_score(process, x, t, x0)
    theta, model = around(process.score, process, "score")
    assert float(p.sum()) == pytest.approx(1, abs=1e-10)
    assert_minimal(losses.kernel_matching(model, x, t, target), p, theta)
    assert curvature(losses.kernel_matching(model, x, t, target - 0.1), p, theta)[0] > 1e-3


def test_kernel_matching_of_a_pushforward():
    data = sf.problems.Gaussian([0.2], 0.3)
    process = sf.Pushforward(torch.sinh, sf.VP(), inverse=torch.asinh, law=data)
    z, p = normals(80, 2)
    x0, t = torch.sinh(0.2 + math.sqrt(0.3) * z[:, :1]), 0.3
    x = process.perturb(x0, t, z[:, 1:])
    target = losses.kernel_score(process, x, t, x0)
    theta = torch.zeros(2, dtype=F64, requires_grad=True)
    net = lambda x, t: process.score(x, t) + theta[0] / (1 + x**2) + theta[1] * x / (1 + x**2)  # noqa: E731
    model = sf.Model(net, process, "score", expand=False)
    assert_minimal(losses.kernel_matching(model, x, t, target), p, theta, tolerance=1e-7)


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


# ---- times


def ks(sample, cdf):
    return stats.kstest(np.asarray(sample), cdf).pvalue


@pytest.mark.parametrize("process", [sf.VP(), sf.EDM(), sf.RectifiedFlow()], ids=repr)
def test_laws_of_times(process):
    n, low, high = 4000, process.t_min, process.t1
    uniform = stats.uniform(low, high - low)
    times = losses.uniform_times(process, n, low)
    assert times.dtype == F64
    assert ks(times, uniform.cdf) > KS_LEVEL
    alone = torch.stack([losses.offset_times(process, 7, low) for _ in range(2000)])
    for place in (0, 4):
        assert ks(alone[:, place], uniform.cdf) > KS_LEVEL
    gaps = torch.diff(alone.sort(1).values, dim=1) / (high - low) * 7
    torch.testing.assert_close(gaps, torch.ones_like(gaps), rtol=0, atol=1e-9)

    def truncated(mean, std, start, end):
        law = stats.norm(mean, std)
        return lambda y: (law.cdf(y) - law.cdf(start)) / (law.cdf(end) - law.cdf(start))

    for mean, std in ((-1.2, 1.2), (0.5, 0.7)):
        times = losses.log_normal_times(process, n, low, mean=mean, std=std)
        assert bool(((times >= low) & (times <= high)).all())
        ends = [-float(process.lam(v)) for v in (low, high)]
        assert ks(-process.lam(times), truncated(mean, std, *ends)) > KS_LEVEL
        assert ks(-process.lam(times), truncated(mean + 0.3, std, *ends)) < KS_LEVEL  # control
        times = losses.logit_normal_times(process, n, low, mean=mean, std=std)
        logit = torch.logit(times / high)
        start = math.log(low / high / (1 - low / high))
        assert ks(logit, truncated(mean, std, start, math.inf)) > KS_LEVEL
        assert ks(logit, truncated(mean, 1.2 * std, start, math.inf)) < KS_LEVEL  # control


def test_default_span_and_generators():
    process = sf.VP()
    history = losses.LossHistory(4)
    for law in (
        losses.uniform_times,
        losses.offset_times,
        losses.stratified_times,
        losses.log_normal_times,
        losses.logit_normal_times,
        lambda process, n, generator=None: losses.importance_times(process, n, history, generator=generator)[0],
    ):
        torch.manual_seed(9)
        state = torch.get_rng_state()
        first = law(process, 300, generator=torch.Generator().manual_seed(9))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(law(process, 300), first)
        assert not torch.equal(law(process, 300), first)
        assert first.shape == (300,)
        assert bool(((first >= 1e-5) & (first <= 1)).all())
    upper = losses.log_normal_times(sf.EDM(), 100, 70.0, mean=-1.2, std=1.2)  # deep in a tail
    assert bool(((upper >= 70) & (upper <= 80)).all())
    assert float(upper.std()) > 1


def test_importance_weights_are_unbiased():
    history = losses.LossHistory(6, history=3, uniform=0.01)
    assert not history.ready
    assert torch.equal(history.probabilities, torch.full((6,), 1 / 6, dtype=F64))
    kept = torch.tensor([[1.0, 2.0, 2.0], [0.1, 0.1, 0.1], [3, 0, 4], [1, 1, 1], [9, 1, 1], [2, 2, 5]], dtype=F64)
    old = torch.full((6,), 77.0, dtype=F64)
    history.update(torch.arange(6), old)  # to be forgotten
    for column in kept.T[:2]:
        history.update(torch.arange(6), column)
    assert history.ready
    history.update(torch.arange(6).flip(0), kept[:, 2].flip(0))
    root = kept.square().mean(1).sqrt()
    want = 0.99 * root / root.sum() + 0.01 / 6
    p = history.probabilities
    torch.testing.assert_close(p, want, rtol=1e-12, atol=0)
    loss = torch.randn(6, dtype=F64)
    n = 60_000
    index, w = history.draw(n)
    torch.testing.assert_close(w, 1 / (6 * p[index]), rtol=1e-12, atol=0)
    weight = 1 / (6 * p)
    assert float((p * weight * loss).sum()) == pytest.approx(float(loss.mean()), rel=1e-12)
    counts = torch.bincount(index, minlength=6)
    assert stats.chisquare(counts.numpy(), n * p.numpy() / float(p.sum())).pvalue > KS_LEVEL
    # losses that are their own history have the least variance there: none
    flat = losses.LossHistory(6, history=1, uniform=0.0)
    flat.update(torch.arange(6), root)
    index, w = flat.draw(50)
    torch.testing.assert_close(w * root[index], root.mean().expand(50), rtol=1e-12, atol=0)
    times, w, index = losses.importance_times(sf.VP(), 6000, history, 0.1)
    place = (times - 0.1) / 0.9 * 6
    assert torch.equal(place.floor().long(), index)
    torch.testing.assert_close(w, weight[index], rtol=1e-12, atol=0)
    assert ks(place - index, stats.uniform.cdf) > KS_LEVEL
    zeros = losses.LossHistory(2, history=1)
    zeros.update(torch.arange(2), torch.zeros(2))
    assert torch.equal(zeros.probabilities, torch.full((2,), 0.5, dtype=F64))
    assert "in use" in repr(zeros)


def test_history_waits_for_ten():
    history = losses.LossHistory(3)
    for _ in range(9):
        history.update(torch.arange(3), torch.tensor([1.0, 2.0, 3.0]))
    history.update(torch.tensor([0, 1, 1, 1]), torch.tensor([1.0, 2.0, 2.0, 2.0]))
    assert torch.equal(history.probabilities, torch.full((3,), 1 / 3, dtype=F64))
    history.update(torch.tensor([2]), torch.tensor([3.0]))
    torch.testing.assert_close(
        history.probabilities, 0.999 * torch.tensor([1.0, 2, 3], dtype=F64) / 6 + 1e-3 / 3, rtol=1e-12, atol=0
    )


# ---- dtypes and errors


def test_float32_keeps_its_dtype_and_most_digits():
    vp, table = sf.VP(), sf.DiscreteVP(TABLE)
    wide = torch.randint(0, 256, (6, 2)).double() / 127.5 - 1
    t, noise = torch.linspace(0.1, 0.9, 6, dtype=F64), torch.randn(6, 2, dtype=F64)
    n = torch.tensor([0, 1, 2, 3, 4, 0])

    def model(process, prediction):
        return sf.Model(lambda x, t: torch.tanh(x), process, prediction, expand=False)

    def all_of(x0, eps):
        yield losses.denoising(model(vp, "eps"), x0, t, eps, weight=weights.min_snr())
        yield losses.flow_matching(model(vp, "v"), x0, t, eps)
        yield losses.kernel_matching(model(vp, "score"), x0, t, losses.kernel_score(vp, x0, t, eps))
        yield losses.implicit(model(vp, "v"), x0, t, weight=weights.likelihood())
        yield losses.sliced(model(vp, "v"), x0, t, eps)
        yield losses.prior_bits(table, x0)
        yield losses.step_bits(model(table, "x0"), x0, n, eps)
        yield losses.hybrid(model(table, "eps"), x0, n, eps, lambda x, t: torch.sigmoid(x))
        yield losses.diffusion_rate(model(vp, "eps"), x0, t, eps)
        yield losses.reconstruction_bits(vp, x0, t, eps)

    for narrow, exact in zip(all_of(wide.float(), noise.float()), all_of(wide, noise), strict=True):
        assert narrow.shape == (6,)
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), exact, rtol=3e-5, atol=1e-6)


VP_MODEL = sf.Model(lambda x, t: x, sf.VP(), "eps", expand=False)
TABLE_MODEL = sf.Model(lambda x, t: x, sf.DiscreteVP(TABLE), "eps", expand=False)
ZERO = torch.zeros(3, 2, dtype=F64)
PIXEL = ZERO + 1.0
INFINITE = lambda process, t: 1 / (t - t)  # noqa: E731


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: losses.denoising(VP_MODEL, ZERO, 0.5, ZERO, weight=3.0),
            TypeError,
            "weight as a Weight, a function or None",
        ),
        (
            lambda: losses.denoising(VP_MODEL, ZERO, 0.5, ZERO, weight=INFINITE),
            ValueError,
            "finite values >= 0, got inf",
        ),
        (
            lambda: losses.denoising(VP_MODEL, ZERO, 0.5, ZERO, weight=lambda p, t: -t),
            ValueError,
            "got -0.5 at t = 0.5",
        ),
        (
            lambda: losses.denoising(VP_MODEL, ZERO, 0.5, ZERO, weight=lambda p, t: torch.ones(4)),
            ValueError,
            r"one value a time, shape \(\), got \(4,\)",
        ),
        (lambda: losses.Weight(INFINITE, "noise"), ValueError, "unknown prediction 'noise'"),
        (lambda: losses.loss_ratio(sf.VP(), 0.5, "eps", "noise"), ValueError, "unknown prediction 'noise'"),
        (lambda: weights.snr().of(sf.VP(), 0.5, "noise"), ValueError, "unknown prediction 'noise'"),
        (lambda: weights.snr().of(sf.VP(), 0.0, "x0"), ValueError, "snr of the x0 loss: expected finite"),
        (lambda: weights.min_snr(0.0), ValueError, "gamma > 0, got 0.0"),
        (lambda: weights.edm(-1.0), ValueError, "sigma_data > 0"),
        (lambda: weights.sigmoid(math.nan), ValueError, "bias as a number"),
        (lambda: losses.kernel_matching(VP_MODEL, ZERO, 0.5, ZERO[:2]), ValueError, "target of the shape of x"),
        (lambda: losses.kernel_score(sf.VP(), ZERO, 0.5, ZERO[:2]), ValueError, "x0 of the shape of x"),
        (lambda: losses.kernel_score(sf.VP(), ZERO, 0.0, ZERO), ValueError, "no density at t = 0"),
        (lambda: losses.kernel_score(sf.Student(dim=2), ZERO, 0.5, ZERO), TypeError, "no known kernel"),
        (lambda: losses.sliced(VP_MODEL, ZERO, 0.5, ZERO[:, :1]), ValueError, "directions of shape"),
        (lambda: losses.sliced(VP_MODEL, ZERO, 0.5, ZERO[None][:0]), ValueError, "directions of shape"),
        (lambda: losses.implicit(VP_MODEL, ZERO, torch.rand(2)), ValueError, "one time for all"),
        (lambda: losses.step_bits(VP_MODEL, PIXEL, 1, ZERO), TypeError, "Model of a DiscreteVP"),
        (lambda: losses.step_bits(TABLE_MODEL, PIXEL, 5, ZERO), ValueError, r"n in 0..4, got 5"),
        (lambda: losses.step_bits(TABLE_MODEL, PIXEL, 0.5, ZERO), TypeError, "n as a whole number"),
        (lambda: losses.step_bits(TABLE_MODEL, ZERO, 1, ZERO), ValueError, "256 values, evenly spaced"),
        (lambda: losses.step_bits(TABLE_MODEL, PIXEL, 1, ZERO, "beta"), ValueError, "'posterior', 'forward'"),
        (
            lambda: losses.step_bits(TABLE_MODEL, PIXEL, 1, ZERO, lambda x, t: torch.ones(7)),
            ValueError,
            r"v\(x, t\) to broadcast to x",
        ),
        (lambda: losses.step_bits(TABLE_MODEL, PIXEL, 1, ZERO, levels=1), ValueError, "levels to be an integer >= 2"),
        (lambda: losses.step_bits(TABLE_MODEL, PIXEL, 1, ZERO[:2]), ValueError, "eps of the shape of x0"),
        (lambda: losses.hybrid(TABLE_MODEL, PIXEL, 1, ZERO, "posterior"), TypeError, "to be learned"),
        (lambda: losses.hybrid(TABLE_MODEL, PIXEL, 1, ZERO, lambda x, t: x, vlb_weight=-1), ValueError, "vlb_weight"),
        (lambda: losses.reconstruction_bits(sf.VP(), PIXEL, 0.0, ZERO), ValueError, "alpha > 0 and sigma > 0"),
        (lambda: losses.reconstruction_bits(sf.VP(), PIXEL, 0.1, ZERO[:2]), ValueError, "eps of the shape of x0"),
        (lambda: losses.diffusion_rate(VP_MODEL, ZERO, 0.0, ZERO), ValueError, "elbo of the eps loss"),
        (lambda: losses.uniform_times(sf.VP(), 0), ValueError, "n to be an integer"),
        (lambda: losses.offset_times(sf.VP(), 3, 1.5), ValueError, r"t_min in \[0, 1\), got 1.5"),
        (lambda: losses.log_normal_times(sf.VP(), 3, std=0.0), ValueError, "std > 0"),
        (lambda: losses.log_normal_times(sf.VP(), 3, mean=40.0), ValueError, "no mass on the span"),
        (lambda: losses.LossHistory(0), ValueError, "bins to be an integer >= 1"),
        (lambda: losses.LossHistory(3, uniform=2.0), ValueError, r"uniform in \[0, 1\]"),
        (lambda: losses.LossHistory(3).draw(0), ValueError, "n to be an integer"),
        (lambda: losses.LossHistory(3).update(torch.tensor([3]), torch.ones(1)), ValueError, r"bins in 0..2"),
        (lambda: losses.LossHistory(3).update(torch.tensor([1]), torch.ones(2)), ValueError, "losses"),
        (
            lambda: losses.LossHistory(3).update(torch.tensor([1]), torch.tensor([math.nan])),
            ValueError,
            "finite losses",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
