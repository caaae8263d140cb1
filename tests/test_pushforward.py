"""Images under diffeomorphisms against closed forms that are not made by pushing forward."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.known import GBM, SigmoidOU, SinhOU
from sdeflow.linear import LinearSDE
from sdeflow.problems import Gaussian, GaussianMixture
from sdeflow.pushforward import Pushforward, additive_logistic, additive_logratio
from sdeflow.quadrature import gauss_legendre
from sdeflow.structure import probe_points
from sdeflow.testing.strategies import TanhImage

F64 = torch.float64


def linear(F, G, **rest):
    """A `LinearSDE` of float64 tensors."""
    rest = {name: torch.tensor(value, dtype=F64) for name, value in rest.items()}
    return LinearSDE(torch.as_tensor(F, dtype=F64), torch.as_tensor(G, dtype=F64), **rest)


POSITIVE, UNIT = (0.0, math.inf), (0.0, 1.0)


def points(n, d, domain=(-math.inf, math.inf), seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=F64)
    if domain == POSITIVE:
        z = torch.exp(0.7 * z)
    elif domain == UNIT:
        z = torch.sigmoid(z)
    return z, 0.1 + 0.8 * torch.rand(n, 1, generator=generator, dtype=F64)


def same(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def image() -> TanhImage:
    return TanhImage(
        [[-0.5, 0.3], [-0.2, -0.4]], [0.1, 0.2], [[0.8, 0.2], [0.1, 0.7]], [[0.6, -0.5], [0.3, 0.8]], [0.1, -0.2],
        [[-1.0, 0.5], [0.6, -0.4]],
    )  # fmt: skip


CLOSED = {
    # y = log x of GBM is a Brownian motion with drift
    "exp": (
        Pushforward(torch.exp, linear([[0.0]], [0.5], offset=[0.3 - 0.125]), inverse=torch.log,
                    law=lambda y, t: _normal(y, (0.3 - 0.125) * t, 0.25 * t), domain=POSITIVE),
        GBM(0.3, 0.5),
    ),
    "sinh": (
        Pushforward(torch.sinh, linear([[-0.8]], [0.9]), inverse=torch.asinh,
                    law=lambda y, t: _normal(y, 0.0, _ou(0.8, 0.9, t))),
        SinhOU(0.8, 0.9),
    ),
    "sigmoid": (
        Pushforward(torch.sigmoid, linear([[-1.2]], [0.7]), inverse=torch.logit,
                    law=lambda y, t: _normal(y, 0.0, _ou(1.2, 0.7, t)), domain=UNIT),
        SigmoidOU(1.2, 0.7),
    ),
}  # fmt: skip


def _normal(y, mean, variance):
    z = (y - mean) ** 2 / variance + torch.log(2 * math.pi * torch.as_tensor(variance, dtype=F64))
    return -0.5 * z.sum(1)


def _ou(rate, scale, t):
    return -(scale**2) / (2 * rate) * torch.expm1(-2 * rate * torch.as_tensor(t, dtype=F64))


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name):
    pushed, known = CLOSED[name]
    x, t = points(12, 1, pushed.domain)
    same(pushed.drift(x, t), known.drift(x, t))
    same(pushed.diffusion(x, t).squeeze(-1), known.diffusion(x, t))
    same(pushed.log_density(x, t), known.log_density(x, t))
    same(pushed.score(x, t), known.score(x, t))


def test_exp_of_an_ou_process_is_schwartz():
    """log x an OU process: dx = x (kappa (mu - log x) + sigma^2/2) dt + sigma x dW (Schwartz 1997, model 1)."""
    kappa, mu, sigma = 1.3, 0.4, 0.6
    pushed = Pushforward(torch.exp, linear([[-kappa]], [sigma], offset=[kappa * mu]), domain=POSITIVE)
    x, t = points(10, 1, POSITIVE)
    same(pushed.drift(x, t), x * (kappa * (mu - torch.log(x)) + 0.5 * sigma**2))
    same(pushed.diffusion(x, t).squeeze(-1), sigma * x)


def test_additive_logistic_on_the_simplex():
    """dx_i = x_i [a_i - sum_j x_j a_j] dt + x_i [dM_i - sum_j x_j dM_j], a from Ito's formula written out here."""
    a, g = torch.tensor([[-0.6, 0.2], [0.1, -0.9]], dtype=F64), torch.tensor([[0.7, 0.1], [-0.2, 0.5]], dtype=F64)
    pushed = Pushforward(additive_logistic, linear(a, g), inverse=additive_logratio, domain=UNIT)
    y, t = points(8, 2)
    x = additive_logistic(y)
    assert bool((x > 0).all() and (x.sum(1) < 1).all())
    same(additive_logratio(x), y)
    noise = x[:, :, None] * (g - (x @ g)[:, None, :])
    same(pushed.diffusion(x, t), noise)
    f, c = y @ a.T, g @ g.T
    mean_c = x @ c  # sum_j x_j C_ij
    own, both = torch.diagonal(c), torch.einsum("ni,ij,nj->n", x, c, x)
    # d_a d_b x_i D_ab/2 = x_i [C_ii/2 - (C x)_i + x.C x - (x.diag C)/2]
    curve = x * (0.5 * own - mean_c + both[:, None] - 0.5 * (x @ own)[:, None])
    same(pushed.drift(x, t), x * (f - (x * f).sum(1, keepdim=True)) + curve)


def test_newton_inverse():
    sde = image()
    y, _ = points(40, 2)
    y[0] = torch.tensor([30.0, -80.0])
    same(sde.inverse(sde.phi(y)), y, 1e-11)
    x = sde.phi(y).float()
    assert sde.inverse(x).dtype == torch.float32
    torch.testing.assert_close(sde.phi(sde.inverse(x)), x, rtol=1e-5, atol=1e-5)


def test_newton_inverse_is_differentiable_twice():
    cubic = Pushforward(lambda y: y + y**3, linear([[-1.0]], [1.0]))
    y = torch.tensor([[0.5], [-1.2]], dtype=F64)
    x = cubic.phi(y).requires_grad_()
    back = cubic.inverse(x)
    (first,) = torch.autograd.grad(back.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    slope, bend = 1 + 3 * y**2, 6 * y
    same(first, 1 / slope)
    same(second, -bend / slope**3)
    same(third, (3 * bend**2 - 6 * slope) / slope**5)


def test_density_normalises_in_the_plane():
    sde = image()
    nodes, weights = gauss_legendre(20)
    edges = torch.linspace(-9, 9, 16, dtype=F64)
    line = (edges[:-1, None] + torch.diff(edges)[:, None] * nodes).flatten()
    w = (torch.diff(edges)[:, None] * weights).flatten()
    x, area = torch.cartesian_prod(line, line), torch.outer(w, w).flatten()
    with torch.no_grad():
        mass = float((torch.exp(sde.log_density(x, 0.6)) * area).sum())
    assert abs(mass - 1) < 1e-6


def test_score_is_the_gradient_of_the_density():
    sde = image()
    x, t = points(6, 2)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sde.log_density(leaf, t).sum(), leaf)
    same(sde.score(x, t), slope, 1e-10)
    assert not sde.score(x, t).requires_grad
    assert sde.score(leaf, t).requires_grad


def vp_image(d=2):
    return Pushforward(torch.exp, sf.VP(0.1, 4.0), inverse=torch.log, domain=POSITIVE, law=Gaussian([0.2] * d, 0.5))


def test_kernel_of_a_gaussian_base_is_lognormal():
    sde, process = vp_image(), sf.VP(0.1, 4.0)
    (x, t), (x0, _) = points(9, 2, POSITIVE), points(9, 2, POSITIVE, 1)
    alpha, sigma = process.alpha(t), process.sigma(t)
    want = torch.distributions.LogNormal(alpha * torch.log(x0), sigma).log_prob(x).sum(1)
    same(sde.log_kernel(x, t, x0), want)
    # grad of a lognormal's log density, by hand
    target = -(1 + (torch.log(x) - alpha * torch.log(x0)) / sigma**2) / x
    same(sde.target(x, t, x0), target)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(sde.log_kernel(leaf, t, x0).sum(), leaf)
    same(sde.target(x, t, x0), slope)


def test_the_law_of_a_gaussian_base_is_lognormal():
    sde, process = vp_image(), sf.VP(0.1, 4.0)
    x, t = points(9, 2, POSITIVE)
    mean, variance = 0.2 * process.alpha(t), 0.5 * process.alpha(t) ** 2 + process.sigma(t) ** 2
    want = torch.distributions.LogNormal(mean.expand(9, 2), torch.sqrt(variance).expand(9, 2)).log_prob(x).sum(1)
    same(sde.log_density(x, t), want)
    same(sde.score(x, t), -(1 + (torch.log(x) - mean) / variance) / x)


def test_perturb_and_sample_go_through_phi():
    sde, process = vp_image(), sf.VP(0.1, 4.0)
    x0, t = points(5, 2, POSITIVE)
    eps = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    want = torch.exp(process.alpha(t) * torch.log(x0) + process.sigma(t) * eps)
    same(sde.perturb(x0, t, eps), want)
    same(sde.sample(eps), torch.exp(eps))
    with pytest.raises(ValueError, match="eps of the shape"):
        sde.perturb(x0, t, eps[:, :1])


def test_reversal_of_the_image_is_the_image_of_the_reversal():
    """A3 at eta = 0 with exact laws: v_X(phi(y)) = J v_Y(y)."""
    sde = image()
    y, _ = points(5, 2)
    t = torch.tensor(0.5, dtype=F64)
    x = sde.phi(y)
    base_score = sde.law.model(sde.base).score
    v_y = sde.base.probability_flow(base_score).drift(y, t)
    v_x = sde.probability_flow(sde.score).drift(x, t)
    same(v_x, (sde._jacobian(y)[0] @ v_y.unsqueeze(-1)).squeeze(-1), 1e-10)


def test_a_stratonovich_base_is_converted():
    class Base(sf.SDE):
        interpretation = "stratonovich"

        def drift(self, x, t):
            return -x

        def diffusion(self, x, t):
            return 1 + 0.5 * torch.sin(x)

    x, t = points(6, 1)
    identity = Pushforward(lambda y: 1.0 * y, Base())
    same(identity.drift(x, t), -x + 0.5 * (1 + 0.5 * torch.sin(x)) * 0.5 * torch.cos(x))
    assert identity.interpretation == "ito"


def test_errors():
    base = linear([[-1.0]], [1.0])
    with pytest.raises(TypeError, match="phi"):
        Pushforward(3, base)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inverse"):
        Pushforward(torch.exp, base, inverse=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected base as an SDE, got 'VP'"):
        Pushforward(torch.exp, "VP")  # type: ignore[arg-type]
    x, t = points(4, 1)
    with pytest.raises(ValueError, match="phi returned"):
        Pushforward(lambda y: y[:, 0], base, inverse=lambda x: x).drift(x, t)
    with pytest.raises(ValueError, match="give the inverse"):
        Pushforward(lambda y: y**2 + 0.1 * y + 1, base).drift(-1 - x**2, t)  # no root
    with pytest.raises(ValueError, match="law"):
        Pushforward(torch.exp, base).log_density(x.exp(), t)
    with pytest.raises(ValueError, match=r"\(batch, d\)"):
        Pushforward(torch.exp, base).drift(x.reshape(4, 1, 1), t)
    with pytest.raises(ValueError, match="GaussianSDE as base"):
        Pushforward(torch.exp, base, inverse=torch.log).log_kernel(x.exp(), t, x.exp())


def test_a_mixture_of_more_dimensions_than_noise():
    base = linear([[-1.0, 0.5], [0.0, -1.0]], [[0.0], [0.8]])
    sde = Pushforward(torch.sinh, base, inverse=torch.asinh, law=GaussianMixture([[0.0, 1.0]], 0.3))
    x, t = probe_points(sde, (2,), 5, tails=False)
    assert sde.diffusion(x, t).shape == (5, 2, 1)
    assert bool(torch.isfinite(sde.log_density(x, t)).all())


def test_newton_that_runs_away_is_a_value_error():
    x = torch.tensor([[-5.75]], dtype=F64)
    with pytest.raises(ValueError, match="give the inverse"):
        Pushforward(torch.exp, linear([[-1.0]], [1.0])).drift(x, torch.tensor(0.5, dtype=F64))


def test_linear_coefficients_as_lists_are_float64():
    assert float(LinearSDE([[-0.8]], [0.9]).drift_matrix(0.0)) == -0.8
