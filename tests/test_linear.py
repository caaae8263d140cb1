"""Linear SDEs: kernels, laws, exact scores and the exponential solver, against scipy's ODEs and closed forms.

References share no code with the library: mean and covariance equations are integrated by scipy's DOP853 on
coefficients written here in numpy, densities are torch.distributions'. Tests with random draws have fixed seeds and
bounds of 5 standard errors: with a new seed one in 1.7 million of their comparisons would fail.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, kl_divergence

import sdeflow as sf
from sdeflow.bridge import Increment
from sdeflow.cld import CLD
from sdeflow.linear import LinearSDE
from sdeflow.matrix_kernel import factor_of, magnus, multiply
from sdeflow.problems import Gaussian, GaussianMixture
from sdeflow.solvers.linear_exponential import LinearExponential, _Tables
from tests.exact import F64


def stack(rows):
    return torch.stack([torch.stack([v + torch.zeros_like(rows[0][0]) for v in row], -1) for row in rows], -2)


def rotating(t):
    w = 3 * torch.cos(2 * t)
    return stack([[-1 - t, w], [-w - 1, -2 + torch.sin(3 * t)]])


def mixing(t):
    return stack([[1 + 0 * t, 0.3 * t], [0 * t, 1 + t]])


def pushed(t):
    return torch.stack([torch.sin(t), t**2], -1)


A = torch.tensor([[-1.0, 2.0], [-0.5, -0.3]], dtype=F64)
CHAIN = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-1.0, -2.0, -2.0]], dtype=F64)


def onto_last(t):
    """A gain that reaches one coordinate alone, written for one time."""
    return [0.0, 0.0, 1.0 + float(t)]


PROCESSES = {
    "constant": (lambda: LinearSDE(A, [0.7, 0.4]), "constant"),
    "constant, offset": (lambda: LinearSDE(A, [[0.7, 0.1], [0.0, 0.4]], offset=[1.0, -2.0]), "constant"),
    "long": (lambda: LinearSDE(8 * A, [0.7, 0.4], 0.0, 5.0, offset=[1.0, 0.0]), "constant"),
    "commuting": (
        lambda: LinearSDE(lambda t: (1 + 3 * t)[..., None, None] * A, lambda t: torch.sqrt(1 + 3 * t)[..., None]
                          * torch.tensor([0.7, 0.4], dtype=F64)), "commuting"),
    "rotating": (lambda: LinearSDE(rotating, mixing), "magnus"),
    "rotating, offset": (lambda: LinearSDE(rotating, mixing, offset=pushed), "magnus"),
    "CLD": (CLD, "constant"),
    "CLD, schedule": (lambda: CLD(beta=lambda t: 1 + 6 * t), "commuting"),
    "chain": (lambda: LinearSDE(CHAIN, onto_last, offset=[0.0, 1.0, 0.0]), "magnus"),
}  # fmt: skip


def moments_by_scipy(process, s, t):
    """(Phi, c, Q) by DOP853 of their differential equations."""
    k = process.k

    def rhs(u, y):
        u = torch.tensor(u, dtype=F64)
        a, b, g = (v.numpy() for v in (process.drift_matrix(u), process.offset(u), process.diffusion_coeff(u)))
        d = np.diag(g**2) if g.ndim == 1 else g @ g.T
        phi, c, q = np.split(y, [k * k, k * k + k])
        phi, q = phi.reshape(k, k), q.reshape(k, k)
        return np.concatenate([(a @ phi).ravel(), a @ c + b, (a @ q + q @ a.T + d).ravel()])

    start = np.concatenate([np.eye(k).ravel(), np.zeros(k + k * k)])
    y = solve_ivp(rhs, (s, t), start, method="DOP853", rtol=1e-12, atol=1e-15).y[:, -1]
    return y[: k * k].reshape(k, k), y[k * k : k * k + k], y[k * k + k :].reshape(k, k)


# ---- kernels


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.15, 0.6), (0.5, 0.51)])
def test_kernel_solves_its_differential_equations(name, start, end):
    process = PROCESSES[name][0]()
    assert process.method == PROCESSES[name][1]
    s, t = start * process.t1, end * process.t1
    for mine, reference in zip(process.transition(s, t), moments_by_scipy(process, s, t), strict=True):
        assert np.abs(mine.numpy() - reference).max() <= 1e-11 * max(1.0, np.abs(reference).max())


def test_reference_tells_a_wrong_kernel():
    """Negative control: a transposed F and a dropped offset are far outside the bound above."""
    right = moments_by_scipy(LinearSDE(A, [0.7, 0.4], offset=[1.0, -2.0]), 0.0, 1.0)
    wrong = LinearSDE(A.T, [0.7, 0.4]).transition(0.0, 1.0)
    assert all(np.abs(m.numpy() - r).max() > 1e-2 for m, r in zip(wrong, right, strict=True))


@pytest.mark.parametrize("name", PROCESSES)
def test_chapman_kolmogorov(name):
    process = PROCESSES[name][0]()
    s, u, t = (0.05 * process.t1, 0.4 * process.t1, 0.9 * process.t1)
    (f1, c1, q1), (f2, c2, q2), (f, c, q) = (process.transition(*p) for p in [(s, u), (u, t), (s, t)])
    for got, want in [(f2 @ f1, f), (f2 @ c1 + c2, c), (f2 @ q1 @ f2.T + q2, q)]:
        assert float((got - want).abs().max()) <= 1e-12 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("name", PROCESSES)
def test_many_kernels_are_each_of_them(name):
    process = PROCESSES[name][0]()
    for s in (0.0, 0.2):
        ts = torch.tensor([0.9, 0.2, 0.35, 0.9, 0.2001], dtype=F64)
        many = process.kernels(s, ts)
        for i, t in enumerate(ts.tolist()):
            reference = moments_by_scipy(process, s, t) if t > s else process.transition(s, t)
            for mine, other in zip(many, reference, strict=True):
                assert float((mine[i] - torch.as_tensor(other)).abs().max()) <= 1e-11


def test_magnus_steps_are_of_order_4():
    process = LinearSDE(rotating, mixing, offset=pushed)
    exact = process.transition(0.0, 1.0)
    start, end = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    steps = [8, 16, 32, 64]
    for part in range(3):
        errors = [
            float((magnus(process.coefficients, start, end, n)[part][0] - exact[part]).abs().max()) for n in steps
        ]
        order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert 3.9 <= order <= 4.1


def test_kernel_crosses_a_jump_of_its_coefficients():
    process = LinearSDE(lambda t: torch.where(t < 0.3, -1.0, 2.0).to(F64)[..., None, None], [1.0])
    matrix, _, covariance = process.transition(0.0, 1.0)
    variance = 0.5 * (1 - math.exp(-0.6)) * math.exp(2.8) + 0.25 * (math.exp(2.8) - 1)
    assert float(matrix) == pytest.approx(math.exp(-0.3 + 1.4), rel=1e-8)
    assert float(covariance) == pytest.approx(variance, rel=1e-8)


def test_coefficients_that_cannot_be_integrated_are_one_error():
    process = LinearSDE(lambda t: (1 / (1 - t))[..., None, None], [1.0])
    with pytest.raises(ValueError, match="did not converge near t = 1:"):
        process.transition(0.5, 1.0)


@pytest.mark.parametrize("t", [1e-6, 0.1, 0.5, 1.0, 2.0])
def test_one_dimension_is_the_scalar_process(t):
    scalar = sf.GaussianSDE.from_coefficients(lambda t: -0.5 - t, lambda t: torch.sqrt(1 + t**2), 0.0, 2.0)
    matrix = LinearSDE(lambda t: (-0.5 - t)[..., None, None], lambda t: torch.sqrt(1 + t**2)[..., None], 0.0, 2.0)
    kernel = matrix.transition(0.0, t)
    assert float(kernel.matrix) == pytest.approx(float(scalar.alpha(t)), rel=1e-12)
    assert math.sqrt(float(kernel.covariance)) == pytest.approx(float(scalar.sigma(t)), rel=1e-12)


@pytest.mark.parametrize("h", [1e-12, 1e-9, 1e-6, 1e-3])
def test_covariance_of_a_short_step_keeps_its_precision(h):
    """CLD: Q = [[F12^2 D h^3/3, F12 D h^2/2], [., D h]] (1 + O(h)) has a relative determinant of 1/4."""
    process = CLD()
    t = 0.3
    h = (t + h) - t
    q = process.transition(t, t + h).covariance
    f, d = 16.0, 8.0
    leading = torch.tensor([[f**2 * d * h**3 / 3, f * d * h**2 / 2], [f * d * h**2 / 2, d * h]], dtype=F64)
    assert float((q / leading - 1).abs().max()) <= 40 * h + 1e-12
    factor = process.transition_kernel(t, t + h)[1]
    assert float(((factor @ factor.T) / q - 1).abs().max()) <= 1e-14
    correlation = 1 - float(q[0, 1]) ** 2 / float(q[0, 0] * q[1, 1])
    assert correlation == pytest.approx(0.25, abs=60 * h + 1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_factors_are_lower_triangular_of_covariances(name):
    process = PROCESSES[name][0]()
    h = torch.logspace(-9, math.log10(process.t1), 40, dtype=F64)
    covariance = process.kernels(0.0, h).covariance
    factor = factor_of(covariance)
    assert torch.equal(factor, factor.tril())
    scale = torch.sqrt(torch.diagonal(covariance, dim1=-2, dim2=-1))
    gap = (factor @ factor.mT - covariance).abs() / (scale[:, :, None] * scale[:, None, :])
    assert float(gap.max()) <= 1e-14
    assert bool((torch.diagonal(factor, dim1=-2, dim2=-1) > 0).all())


def test_long_span_is_the_stationary_law():
    process = CLD(t1=1000.0)
    kernel = process.transition(0.0, 1000.0)
    assert float(kernel.matrix.abs().max()) < 1e-300
    assert torch.allclose(kernel.covariance, torch.diag(torch.tensor([1.0, 0.25], dtype=F64)), rtol=0, atol=1e-14)


def test_factor_of_a_singular_covariance_has_zero_columns():
    v = torch.tensor([[1.0, 2.0, 0.0], [0.5, 1.0, 0.0]], dtype=F64)
    covariance = v.T @ v
    factor = factor_of(covariance)
    assert torch.allclose(factor @ factor.T, covariance, rtol=0, atol=1e-14)
    assert not bool(factor[:, 2].any() or factor[2].any())
    assert torch.equal(factor_of(torch.zeros(2, 2, dtype=F64)), torch.zeros(2, 2, dtype=F64))


# ---- the process


@pytest.mark.parametrize("name", ["constant, offset", "rotating, offset", "CLD"])
def test_marginal_draws_have_the_moments_of_the_kernel(name):
    process, count, t = PROCESSES[name][0](), 40_000, 0.6
    x0 = torch.tensor([0.4, -1.1], dtype=F64).expand(count, 2)
    x = process.perturb(x0, t, torch.randn(count, 2, generator=torch.Generator().manual_seed(1), dtype=F64))
    phi, c, q = (torch.from_numpy(v) for v in moments_by_scipy(process, 0.0, t))
    assert bool(((x.mean(0) - phi @ x0[0] - c).abs() <= 5 * torch.sqrt(q.diagonal() / count)).all())
    error = torch.sqrt((q.diagonal()[:, None] * q.diagonal() + q**2) / count)
    assert bool(((torch.cov(x.T) - q).abs() <= 5 * error).all())


@pytest.mark.parametrize("name", [pytest.param("rotating, offset", marks=pytest.mark.slow), "commuting"])
def test_euler_maruyama_goes_to_the_kernel(name):
    """drift and diffusion are the equation of the kernel: EM's exact recursion of moments at 1000 steps, O(h)."""
    process, steps = PROCESSES[name][0](), 1000
    mean, cov = torch.tensor([[1.0, -1.0]], dtype=F64), torch.zeros(2, 2, dtype=F64)
    for i in range(steps):
        t = torch.tensor(i / steps, dtype=F64)
        zero = process.drift(torch.zeros(1, 2, dtype=F64), t)
        m = torch.eye(2, dtype=F64) + (process.drift(torch.eye(2, dtype=F64), t) - zero).T / steps
        g = process.diffusion(mean, t)
        d = torch.diag(g.expand(1, 2)[0] ** 2) if process.noise == "diagonal" else g[0] @ g[0].T
        mean, cov = mean + process.drift(mean, t) / steps, m @ cov @ m.T + d / steps
    phi, c, q = (torch.from_numpy(v) for v in moments_by_scipy(process, 0.0, 1.0))
    assert float((mean[0] - phi @ torch.tensor([1.0, -1.0], dtype=F64) - c).abs().max()) < 5e-3
    assert float((cov - q).abs().max()) < 5e-3


def test_per_sample_times_are_each_time():
    for name in ("rotating, offset", "CLD"):
        process = PROCESSES[name][0]()
        x, ts = torch.randn(4, 2, dtype=F64), torch.tensor([0.1, 0.9, 0.5, 0.1], dtype=F64)
        mean, factor = process.marginal(x, ts)
        for i, t in enumerate(ts.tolist()):
            one = slice(i, i + 1)
            assert torch.allclose(process.drift(x, ts.reshape(4, 1))[one], process.drift(x[one], t), rtol=1e-15)
            g = process.diffusion(x, ts.reshape(4, 1))
            g = g if len(g) == 4 else g.expand(4, 2)
            assert torch.allclose(g[one], process.diffusion(x[one], t), rtol=1e-15)
            m, f = process.marginal(x[one], t)
            assert torch.allclose(mean[one], m, atol=1e-14)
            assert torch.allclose(factor[i], f, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_states_keep_their_dtype_and_rest_dimensions(dtype):
    process = CLD()
    x = torch.ones(3, 2, 4, 5, dtype=dtype)
    mean, factor = process.marginal(x, 0.5)
    values = [process.drift(x, 0.5), mean, factor, process.perturb(x, 0.5, x)]
    values += [process.diffusion(x, 0.5), process.prior_sample((3, 2, 4, 5), 0, dtype=dtype)]
    assert all(v.dtype == dtype for v in values)
    assert process.drift(x, 0.5).shape == x.shape
    one = CLD().marginal(torch.ones(3, 2, 1, dtype=dtype), 0.5)[0]
    assert torch.equal(mean[:, :, 2, 3], one[:, :, 0])


def test_functions_of_one_time_are_those_of_many():
    one = LinearSDE(lambda t: [[-1.0, float(t)], [0.0, -1.0]], lambda t: torch.tensor([1.0, 1.0 + float(t)], dtype=F64))
    many = LinearSDE(
        lambda t: stack([[-1 + 0 * t, t], [0 * t, -1 + 0 * t]]), lambda t: torch.stack([1 + 0 * t, 1 + t], -1)
    )
    for p, q in zip(one.transition(0.1, 0.8), many.transition(0.1, 0.8), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-14)
    assert one.drift_matrix(torch.rand(2, 3, dtype=F64)).shape == (2, 3, 2, 2)


def test_equality_and_representation():
    assert LinearSDE(A, [1.0, 1.0]) == LinearSDE(A.numpy(), torch.ones(2))
    assert hash(LinearSDE(A, [1.0, 1.0])) == hash(LinearSDE(A, [1.0, 1.0]))
    assert LinearSDE(A, [1.0, 1.0]) != LinearSDE(A, [1.0, 1.0], offset=[0.0, 1.0])
    assert LinearSDE(A, [1.0, 1.0]) != LinearSDE(A, [1.0, 2.0])
    assert LinearSDE(A, [1.0, 1.0]) != LinearSDE(A, [1.0, 1.0], 0, 2)
    assert LinearSDE(rotating, mixing) == LinearSDE(rotating, mixing) != LinearSDE(rotating, [1.0, 1.0])
    assert CLD() == CLD() != CLD(mass=1.0)
    assert CLD() != LinearSDE(CLD().drift_matrix(0.0), [0.0, math.sqrt(8)])
    assert "rotating" in repr(LinearSDE(rotating, mixing))
    assert repr(CLD()).startswith("CLD(beta=4.0, gamma=1")
    CLD().reverse(sf.Model(lambda x, t: -x, CLD(), "score"))
    with pytest.raises(ValueError, match="made for"):
        CLD().reverse(sf.Model(lambda x, t: -x, CLD(mass=1.0), "score"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearSDE(torch.zeros(2, 3), [1.0, 1.0]), r"F of shape \(k, k\), got \(2, 3\)"),
        (lambda: LinearSDE(A, [1.0, 1.0, 1.0]), r"G of shape \(2,\) or \(2, m\).*got \(3,\)"),
        (lambda: LinearSDE(A, [0.0, 0.0]), "not 0 everywhere"),
        (lambda: LinearSDE(A, [1.0, 1.0], offset=[1.0]), r"offset of shape \(2,\)"),
        (lambda: LinearSDE(A, [1.0, math.nan]), "finite G"),
        (lambda: LinearSDE(A, lambda t: torch.tensor([1.0, float(t)])), "G returned torch.float32: expected"),
        (lambda: LinearSDE(A, [1.0, 1.0], 1.0, 0.0), "t0 < t_min < t1"),
        (lambda: LinearSDE(A, [1.0, 1.0]).transition(0.5, 0.4), "s <= t"),
        (lambda: LinearSDE(A, [1.0, 1.0]).transition(0.5, 1.4), r"time in \[0, 1\], got 1.4"),
        (lambda: LinearSDE(A, [1.0, 1.0]).transition(0.0, torch.rand(3)), "one time"),
        (lambda: LinearSDE(A, [1.0, 1.0]).drift(torch.zeros(4, 3), 0.5), r"\(batch, 2, \*rest\), got \(4, 3\)"),
        (lambda: LinearSDE(A, torch.eye(2)).drift(torch.zeros(4, 2, 3), 0.5), r"\(batch, 2\), got \(4, 2, 3\)"),
        (lambda: LinearSDE(-A, [1.0, 1.0]).stationary_covariance(), "no stationary law"),
        (lambda: CLD(mass=0.0), "mass > 0, got 0.0"),
        (lambda: CLD(gamma0=-1.0), "gamma0 > 0"),
        (lambda: CLD().join(torch.zeros(2, 3), torch.zeros(2, 4)), "of the shape of data"),
        (lambda: CLD().prior_mismatch([0.0], torch.eye(2)), r"covariance \(2, 2\), got \(1,\)"),
        (lambda: GaussianMixture(torch.zeros(1, 3), 1.0).model(CLD()), r"event shape \(2, \*rest\)"),
        (lambda: GaussianMixture(torch.zeros(1, 2), 0.0).model(CLD()).score(torch.zeros(1, 2), 0.0), "is singular"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- laws


def test_stationary_law_and_prior():
    process = LinearSDE(A, [[0.7, 0.1], [0.0, 0.4]], 0.0, 100.0, offset=[1.0, -2.0])
    late = process.transition(0.0, 100.0)
    assert torch.allclose(process.stationary_covariance(), late.covariance, rtol=0, atol=1e-13)
    assert torch.allclose(process.prior_mean, late.shift, rtol=0, atol=1e-12)
    assert torch.allclose(CLD(beta=lambda t: 1 + t).stationary_covariance(), CLD().stationary_covariance())
    growing = LinearSDE(-A, [1.0, 1.0])
    assert torch.equal(growing.prior_covariance, growing.transition(0.0, 1.0).covariance)
    assert LinearSDE(rotating, mixing)._stationary is None


def test_prior_draws():
    process, count = LinearSDE(A, [[0.7, 0.1], [0.0, 0.4]], offset=[1.0, -2.0]), 40_000
    x = process.prior_sample((count, 2), 3, dtype=F64)
    q = process.prior_covariance
    assert bool(((x.mean(0) - process.prior_mean).abs() <= 5 * torch.sqrt(q.diagonal() / count)).all())
    error = torch.sqrt((q.diagonal()[:, None] * q.diagonal() + q**2) / count)
    assert bool(((torch.cov(x.T) - q).abs() <= 5 * error).all())
    assert torch.equal(process.prior_sample((3, 2), 3, index=7, dtype=F64), x[7:10])


def test_prior_mismatch_is_the_divergence():
    process = LinearSDE(A, [0.7, 0.4], offset=[1.0, -2.0])
    mean, cov = torch.tensor([[0.3, 1.0], [-1.0, 2.0]], dtype=F64), torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64)
    phi, c, q = (torch.from_numpy(v) for v in moments_by_scipy(process, 0.0, 1.0))
    prior = MultivariateNormal(process.prior_mean, process.prior_covariance)
    want = sum(kl_divergence(MultivariateNormal(phi @ m + c, phi @ cov @ phi.T + q), prior) for m in mean.T)
    assert process.prior_mismatch(mean, cov) == pytest.approx(float(want), rel=1e-10)
    assert CLD(t1=20.0).prior_mismatch([1.0, 0.0], torch.zeros(2, 2)) == pytest.approx(0.0, abs=1e-12)


def test_cld_is_critically_damped_and_stationary():
    """Dockhorn et al. 2022, equation 5: F has one double eigenvalue -2 beta/Gamma, the law N(0, 1) x N(0, M) stays."""
    process = CLD(beta=3.0, mass=0.6)
    f = process.drift_matrix(0.5)
    trace, determinant = float(f.trace()), float(torch.linalg.det(f))
    assert trace**2 == pytest.approx(4 * determinant, rel=1e-12)
    assert trace / 2 == pytest.approx(-2 * 3.0 / process.gamma, rel=1e-12)
    assert process.gamma**2 == pytest.approx(4 * 0.6)
    assert torch.allclose(process.stationary_covariance(), torch.diag(torch.tensor([1.0, 0.6], dtype=F64)))
    assert torch.linalg.matrix_rank(f - trace / 2 * torch.eye(2, dtype=F64)) == 1  # not diagonalisable
    data, velocity = torch.randn(3, 4), torch.randn(3, 4)
    assert all(
        torch.equal(p, q) for p, q in zip(process.split(process.join(data, velocity)), (data, velocity), strict=True)
    )
    started = process.start(torch.zeros(40_000, 1, dtype=F64), 5)
    assert float(started[:, 1].var()) == pytest.approx(0.04 * 0.6, rel=5 * math.sqrt(2 / 40_000))
    assert not bool(started[:, 0].any())


# ---- exact scores


def on_cld(velocity=0.01):
    """Two clusters of data and a velocity, under CLD."""
    return CLD(), GaussianMixture([[[1.0], [0.0]], [[-1.0], [0.0]]], [[0.01, velocity], [0.04, velocity]], [1.0, 2.0])


def on_rotating():
    covariances = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.05]]], dtype=F64)
    return LinearSDE(rotating, mixing, offset=pushed), GaussianMixture(
        [[1.5, 0.0], [-1.0, 1.0]], covariances, [1.0, 2.0]
    )


def on_rest():
    """Events (2, 3): one covariance of all six components."""
    generator = torch.Generator().manual_seed(0)
    root = 0.3 * torch.randn(2, 6, 6, generator=generator, dtype=F64)
    return CLD(), GaussianMixture(torch.randn(2, 2, 3, generator=generator, dtype=F64), root @ root.mT)


LAWS = {"CLD": on_cld, "rotating": on_rotating, "rest": on_rest}


def reference_law(process, mixture, t):
    phi, c, q = (torch.from_numpy(v) for v in moments_by_scipy(process, 0.0, t))
    rest = mixture.means.shape[1] // process.k
    phi, q = (torch.kron(v, torch.eye(rest, dtype=F64)) for v in (phi, q))
    axes = mixture._full_axes()
    covariances = phi @ axes @ torch.diag_embed(mixture.variances) @ axes.mT @ phi.T + q
    means = mixture.means @ phi.T + c.repeat_interleave(rest)
    return MixtureSameFamily(
        Categorical(probs=mixture.weights), MultivariateNormal(means, 0.5 * (covariances + covariances.mT))
    )


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("t", [0.01, 0.4, 1.0])
def test_mixture_density_and_score(name, t):
    process, mixture = LAWS[name]()
    law = reference_law(process, mixture, t)
    x = law.sample((7,)).requires_grad_()
    reference = law.log_prob(x)
    (score,) = torch.autograd.grad(reference.sum(), x)
    state = x.detach().reshape(7, *mixture.event)
    assert torch.allclose(mixture.log_prob(state, process, t), reference.detach(), rtol=1e-8, atol=1e-8)
    mine = mixture.model(process).score(state, t)
    assert mine.shape == state.shape
    assert float((mine.flatten(1) - score).abs().max()) <= 1e-8 * float(score.abs().max())
    leaf = state.clone().requires_grad_()
    (own,) = torch.autograd.grad(mixture.log_prob(leaf, process, t).sum(), leaf)
    assert torch.allclose(own, mine, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAWS)
def test_score_of_a_sample_does_not_depend_on_the_batch(name):
    process, mixture = LAWS[name]()
    model = mixture.model(process)
    for dtype in (torch.float32, F64):
        x = torch.randn(70, *mixture.event, dtype=dtype)
        whole = model.score(x, 0.3)
        assert whole.dtype == dtype
        assert torch.equal(whole[5:6], model.score(x[5:6], 0.3))
        assert torch.equal(whole[40:], model.score(x[40:], 0.3))
    ts = torch.rand(70, dtype=F64) * 0.9 + 0.05
    each = torch.cat([model.score(x[i : i + 1], float(ts[i])) for i in range(4)])
    assert torch.allclose(model.score(x, ts)[:4], each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["CLD", "rotating"])
def test_probability_flow_carries_the_density(name):
    """log p along the flow changes by minus the integral of its divergence; both by scipy, the score by autograd."""
    process, mixture = LAWS[name]()
    flow = process.probability_flow(mixture.model(process))
    x = torch.tensor([0.3, -0.2], dtype=F64)

    def rhs(t, y):
        state, t = torch.from_numpy(y[:2]).clone().reshape(1, *mixture.event), torch.tensor(t, dtype=F64)
        jacobian = torch.autograd.functional.jacobian(lambda v: flow.drift(v, t).flatten(), state).reshape(2, 2)
        return np.append(flow.drift(state, t).detach().numpy().ravel(), -float(jacobian.trace()))

    y = solve_ivp(rhs, (1.0, 0.1), np.append(x.numpy(), 0.0), method="DOP853", rtol=1e-9, atol=1e-11).y[:, -1]
    end = torch.from_numpy(y[:2]).reshape(1, *mixture.event)
    change = mixture.log_prob(end, process, 0.1) - mixture.log_prob(x.reshape(end.shape), process, 1.0)
    assert float(change) == pytest.approx(y[2], abs=1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0, lambda t: 1 - 0.5 * t])
@pytest.mark.parametrize("name", ["rotating, offset", "CLD"])
def test_reversal_keeps_mean_and_covariance_at_any_eta(name, eta):
    process = PROCESSES[name][0]()
    data = Gaussian([0.5, -1.0], torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64))
    reverse = process.reverse(data.model(process), eta)

    def law(t):
        phi, c, q = (torch.from_numpy(v) for v in moments_by_scipy(process, 0.0, t))
        return (phi @ data.mean + c).numpy(), (phi @ data.covariance @ phi.T + q).numpy()

    def rhs(t, y):
        t = torch.tensor(t, dtype=F64)
        a = torch.autograd.functional.jacobian(
            lambda v: reverse.drift(v[None], t)[0], torch.zeros(2, dtype=F64)
        ).numpy()
        b = reverse.drift(torch.zeros(1, 2, dtype=F64), t)[0].numpy()
        g = reverse.diffusion(torch.zeros(1, 2, dtype=F64), t)
        d = (torch.diag(g.expand(1, 2)[0] ** 2) if reverse.noise == "diagonal" else g[0] @ g[0].T).numpy()
        p = y[2:].reshape(2, 2)
        return np.concatenate([a @ y[:2] + b, (a @ p + p @ a.T - d).ravel()])  # time runs down: -D

    mean, cov = law(1.0)
    y = solve_ivp(rhs, (1.0, 0.2), np.concatenate([mean, cov.ravel()]), method="DOP853", rtol=1e-10, atol=1e-12).y[
        :, -1
    ]
    mean, cov = law(0.2)
    assert np.abs(y[:2] - mean).max() < 1e-8
    assert np.abs(y[2:].reshape(2, 2) - cov).max() < 1e-8


# ---- LinearExponential


class Impulses:
    """Noise whose samples after the first 1 + k are unit impulses, one a step and coordinate."""

    def __init__(self, batch, k, steps):
        self.lengths = torch.ones(steps, dtype=F64)
        self.w = torch.zeros(steps, batch, k, dtype=F64)
        for i in range(steps):
            for j in range(k):
                self.w[i, 1 + k + i * k + j, j] = 1.0

    def walk(self, times, event, dtype):
        return self

    def __call__(self, i):
        return Increment(self.w[i], None)


def pushed_moments(process, data, eta, solver, steps, tamper=None):
    """Errors of mean and covariance at t_min of `solver`, exactly: its map is affine for Gaussian data."""
    k, problem = process.k, process.reverse(data.model(process), eta)
    grid = problem.default_grid(steps, *problem.span)

    def law(t):
        kernel = process.transition(0.0, t)
        return (
            kernel.matrix @ data.mean + kernel.shift,
            kernel.matrix @ data.covariance @ kernel.matrix.T + kernel.covariance,
        )

    mean, cov = law(1.0)
    x = mean.repeat(1 + k + k * steps, 1)
    x[1 : 1 + k] += torch.linalg.cholesky(cov).T
    run = solver.stepper(problem, x, grid, Impulses(len(x), k, steps))
    if tamper is not None:
        tamper(run)
    for i in range(steps):
        x = run.step(i, x)
    columns = x[1:] - x[0]
    mean, cov = law(float(grid[-1]))
    return float((x[0] - mean).abs().max()), float((columns.T @ columns - cov).abs().max())


ETAS = [0.0, 0.6, 1.0, lambda t: 0.2 + t]


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["rotating, offset", "CLD", "CLD, schedule"])
def test_exponential_is_exact_for_a_point_at_any_eta(name, steps, eta):
    process = PROCESSES[name][0]()
    data = Gaussian([0.5, 0.0], process.start_covariance)  # of a CLD: a point with its velocities
    for order in (1, 3):
        mean, cov = pushed_moments(process, data, eta, LinearExponential(order), steps)
        assert mean < 1e-9
        assert cov < 1e-9


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("name", ["rotating, offset", "constant, offset", "CLD"])
def test_exponential_is_exact_for_a_gaussian_it_is_told(name, eta):
    process, cov = PROCESSES[name][0](), [[0.3, 0.1], [0.1, 0.2]]
    solver = LinearExponential(1, covariance=cov)
    assert max(pushed_moments(process, Gaussian([0.5, -1.0], torch.tensor(cov, dtype=F64)), eta, solver, 1)) < 1e-10


def test_exponential_moment_test_tells_mutants():
    """Negative control: a transposed matrix, or a dropped shift, is seen in one step."""
    process, cov = LinearSDE(rotating, mixing, offset=pushed), torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64)
    data, solver = Gaussian([0.5, -1.0], cov), LinearExponential(1, covariance=cov)

    def transposed(run):
        matrix, shift = run._rows[0]
        run._rows[0] = (torch.cat([matrix[:, :2].T, matrix[:, 2:]], dim=1), shift)

    def no_shift(run):
        run._rows[0] = (run._rows[0][0], None)

    def no_noise(run):
        run._noise = 0 * run._noise

    assert all(max(pushed_moments(process, data, 1.0, solver, 1, t)) > 1e-2 for t in (transposed, no_shift, no_noise))


@pytest.mark.parametrize(("order", "expected"), [(1, 1.0), (2, 2.0)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_exponential_weak_order_by_exact_moments(order, expected, eta):
    data = Gaussian([0.5, -1.0], torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64))
    process, steps = LinearSDE(rotating, mixing, offset=pushed), [40, 80, 160]
    errors = [pushed_moments(process, data, eta, LinearExponential(order), n)[1] for n in steps]
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("name", ["CLD", "rotating"])
def test_exponential_orders_on_a_mixture(name):
    """Against a reference in scipy; medians over samples. The ramp of order 3 is capped at 2 as steps shrink."""
    process, mixture = LAWS[name]()
    flow = process.probability_flow(mixture.model(process))
    x, steps = process.prior_sample((12, *mixture.event), 0, dtype=F64), [24, 48, 96]

    def rhs(t, y):
        state = torch.from_numpy(y).reshape(x.shape)
        return flow.drift(state, torch.tensor(t, dtype=F64)).numpy().ravel()

    t_end = 0.01
    y = solve_ivp(rhs, (1.0, t_end), x.numpy().ravel(), method="DOP853", rtol=1e-9, atol=1e-11).y[:, -1]
    reference = torch.from_numpy(y).reshape(x.shape)
    for order, start in [(1, "ramp"), (2, "ramp"), (2, "sweep"), (3, "sweep")]:
        errors = []
        for n in steps:
            solution = sf.solve(flow, x, LinearExponential(order, start), steps=n, t_span=(1.0, t_end))
            errors.append(float((solution.x - reference).abs().flatten(1).amax(1).median()))
            assert int(solution.stats.nfe) == n + (start == "sweep") * {1: 0, 2: 1, 3: 3}[order]
        fitted = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert fitted == pytest.approx(order, abs=0.3), (order, start, errors)


def test_exponential_of_a_scalar_process_is_data_prediction():
    """beta(t) I in two dimensions is VP: order 1 is DDIM (eta = 0) and DDPM's posterior (eta = 1), number by number."""
    vp = sf.VP()
    process = LinearSDE(
        lambda t: -0.5 * (0.1 + 19.9 * t)[..., None, None] * torch.eye(2, dtype=F64),
        lambda t: torch.sqrt(0.1 + 19.9 * t)[..., None] * torch.ones(2, dtype=F64),
        t_min=vp.t_min,
    )
    mixture = GaussianMixture([[1.5, 0.0], [-1.0, 1.0]], [[0.05, 0.1], [0.1, 0.03]])
    x = torch.randn(5, 2, dtype=F64)
    grid = vp.default_grid(12, vp.t1, vp.t_min)
    for eta in (0.0, 1.0):
        one = sf.solve(process.reverse(mixture.model(process), eta), x, LinearExponential(1), grid=grid, seed=0)
        other = sf.solve(vp.reverse(mixture.model(vp), eta), x, sf.solvers.DPMSolverPP(1), grid=grid, seed=0)
        if eta == 0.0:
            assert torch.allclose(one.x, other.x, rtol=0, atol=1e-10)
        else:  # the increments of the two paths stand on clocks of their own
            assert torch.isfinite(one.x).all()
    tables = _Tables(process.reverse(mixture.model(process), 1.0), process, grid, 1, torch.zeros(2, 2, dtype=F64))
    ratio, _, _, std = vp.reverse(mixture.model(vp), 1.0).transition(grid[:-1], grid[1:])
    eye = torch.eye(2, dtype=F64)
    assert torch.allclose(tables.psi, ratio[:, None, None] * eye, rtol=1e-10, atol=1e-13)
    assert torch.allclose(tables.noise, std[:, None, None] * eye, rtol=1e-10, atol=1e-13)


def test_exponential_paths_converge_with_refinement():
    """One seed is one path: differences between grids of n and 2n steps fall, at strong order 1."""
    process, mixture = on_cld()
    problem = process.reverse(mixture.model(process), 1.0)
    x, steps = process.prior_sample((200, 2, 1), 0, dtype=F64), [32, 64, 128, 256]
    ends = [
        sf.solve(problem, x, LinearExponential(2), grid=sf.grids.uniform(problem, n, 1.0, 0.1), seed=4).x for n in steps
    ]
    gaps = [float((p - q).abs().median()) for p, q in itertools.pairwise(ends)]
    order = -np.polyfit(np.log(steps[1:]), np.log(gaps), 1)[0]
    assert order > 0.8, gaps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_exponential_keeps_dtype_and_bits_of_a_sample(dtype, eta):
    process, mixture = on_rest()
    problem = process.reverse(mixture.model(process), eta)
    x = process.prior_sample((9, 2, 3), 0, dtype=dtype)
    whole = sf.solve(problem, x, LinearExponential(3), steps=6, seed=1)
    assert whole.x.dtype == dtype
    assert bool(torch.isfinite(whole.x).all())
    part = sf.solve(problem, x[4:6], LinearExponential(3), steps=6, seed=1, index=4)
    assert torch.equal(whole.x[4:6], part.x)


def test_products_of_many_components_keep_the_bits_of_a_sample():
    generator = torch.Generator().manual_seed(0)
    for k in (2, 8, 9, 33, 64):
        a, x = (torch.randn(*s, generator=generator, dtype=F64) for s in [(k, k), (11, k, 3)])
        whole = multiply(a, x)
        assert torch.allclose(whole, torch.einsum("ij,bjr->bir", a, x), rtol=1e-12, atol=1e-12)
        assert all(torch.equal(whole[i : i + 1], multiply(a, x[i : i + 1])) for i in range(11))


def normal(x, t):
    return -x


def run(problem, solver=None, grid=(1.0, 0.5, 0.1), k=2):
    return sf.solve(problem, torch.zeros(1, k), solver or LinearExponential(), grid=list(grid))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearExponential(4), "order 1, 2 or 3, got 4"),
        (lambda: LinearExponential(2, "warm"), "start as one of 'ramp', 'sweep', got 'warm'"),
        (lambda: LinearExponential(2, covariance=[[1.0, 2.0], [0.0, 1.0]]), "symmetric"),
        (lambda: LinearExponential(2, covariance=[1.0, 2.0]), r"\(k, k\), got \(2,\)"),
        (lambda: run(CLD()), "LinearSDE, got CLD"),
        (lambda: run(sf.VP().reverse(normal)), "that of VP"),
        (lambda: run(CLD().reverse(normal), k=3), r"got \(1, 3\)"),
        (lambda: run(CLD().reverse(normal), LinearExponential(2, "sweep")), "eta = 0"),
        (lambda: run(CLD().probability_flow(normal), LinearExponential(covariance=torch.eye(3))), "got .3, 3."),
        (lambda: run(CLD().probability_flow(normal), grid=[1.0, 0.0]), "singular"),
    ],
)  # fmt: skip
def test_exponential_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
