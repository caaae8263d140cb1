"""Score matching with and without a kernel: minimisers by quadrature, relations between losses."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow import losses
from sdeflow.losses import weights
from tests.exact import F64
from tests.loss_cases import MIXTURE, around, assert_minimal, curvature, hermite, mixture_pairs, normals


def mixture_states(process, t, points=120):
    """(x (m, 1), probability (m,)) of x_t."""
    z, w = hermite(points)
    alpha, sigma = process.alpha(t), process.sigma(t)
    parts = [
        (alpha * m + torch.sqrt(alpha**2 * v + sigma**2) * z[:, None], share * w)
        for m, v, share in zip(MIXTURE.means, MIXTURE.variances, MIXTURE.weights, strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


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
