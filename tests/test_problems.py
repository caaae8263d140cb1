"""Exact problems: densities, scores and posteriors of noised data, against other people's formulas."""

import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

import sdeflow as sf
from sdeflow.bench.suites import SUITES
from sdeflow.problems import Empirical, Gaussian, GaussianMixture
from tests.exact import F64, NAMES, make, mixture_log_density, random_mixture, score_of, times


def mixture(count=3, dim=2, seed=0):
    return GaussianMixture(*random_mixture(count, dim, seed))


def reference(problem, alpha=1.0, sigma=0.0):
    """torch.distributions' log density of a mixture made by `random_mixture`-like constants."""
    axes = problem._full_axes()
    covariances = axes @ torch.diag_embed(problem.variances) @ axes.mT
    return mixture_log_density(problem.means, covariances, problem.weights, alpha, sigma)


def noised(problem, process, t, count, seed):
    """Draws of p_t with torch's own generator, float64."""
    generator = torch.Generator().manual_seed(seed)
    x0 = problem.sample(count, seed)
    return process.alpha(t) * x0 + process.sigma(t) * torch.randn(x0.shape, generator=generator, dtype=F64)


# ---- densities


@pytest.mark.parametrize(("count", "dim"), [(1, 1), (3, 2), (4, 5)])
def test_log_prob_is_torch_distributions(count, dim):
    means, covariances, weights = random_mixture(count, dim, seed=7)
    problem = GaussianMixture(means, covariances, weights)
    x = 2 * torch.randn(50, dim, dtype=F64)
    want = mixture_log_density(means, covariances, weights)(x)
    torch.testing.assert_close(problem.log_prob(x), want, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_noised_log_prob_is_torch_distributions(name):
    process = make(name)
    means, covariances, weights = random_mixture(3, 3, seed=8)
    problem = GaussianMixture(means, covariances, weights)
    ts = times(process, 7)
    for t in ts:
        x = noised(problem, process, t, 20, seed=1)
        want = mixture_log_density(means, covariances, weights, process.alpha(t), process.sigma(t))(x)
        torch.testing.assert_close(problem.log_prob(x, process, t), want, rtol=1e-11, atol=1e-11)
    each = torch.cat([problem.log_prob(x[:1], process, t) for t in ts])
    assert torch.equal(problem.log_prob(x[:1].expand(7, 3), process, ts), each)


@pytest.mark.parametrize("short", [0.3, [0.1, 0.2, 0.3], [[0.1, 0.4], [0.2, 0.5], [0.3, 0.6]]])
def test_short_forms_of_covariances(short):
    """A number, one variance a component, one a coordinate: all equal the matrices they stand for."""
    means, _, weights = random_mixture(3, 2, seed=5)
    rows = torch.as_tensor(short, dtype=F64)
    full = torch.diag_embed((rows[:, None] if rows.ndim == 1 else rows).expand(3, 2))
    problem, long = GaussianMixture(means, short, weights), GaussianMixture(means, full, weights)
    x = torch.randn(9, 2, dtype=F64)
    torch.testing.assert_close(
        problem.log_prob(x), mixture_log_density(means, full, weights)(x), rtol=1e-12, atol=1e-12
    )
    got, want = problem.model(sf.VP())(x, 0.3), long.model(sf.VP())(x, 0.3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_mean_and_covariance():
    means, covariances, weights = random_mixture(3, 2, seed=9)
    problem = GaussianMixture(means, covariances, weights)
    mean = sum(w * m for w, m in zip(weights, means, strict=True))
    second = sum(w * (c + torch.outer(m, m)) for w, m, c in zip(weights, means, covariances, strict=True))
    torch.testing.assert_close(problem.mean, mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(problem.covariance, second - torch.outer(mean, mean), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bandwidth", [0.0, 0.2])
def test_empirical_is_a_mixture_of_its_points(bandwidth):
    data = torch.randn(6, 2, dtype=F64)
    process = sf.EDM()
    t = torch.tensor(0.7, dtype=F64)
    x = torch.randn(5, 2, dtype=F64)
    covariances = bandwidth**2 * torch.eye(2, dtype=F64).expand(6, 2, 2)
    log_density = mixture_log_density(data, covariances, torch.ones(6, dtype=F64) / 6, 1.0, t)
    problem = Empirical(data, bandwidth)
    torch.testing.assert_close(problem.log_prob(x, process, t), log_density(x), rtol=1e-11, atol=1e-11)
    same = GaussianMixture(data, bandwidth**2)
    torch.testing.assert_close(problem.log_prob(x, process, t), same.log_prob(x, process, t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(problem.model(process)(x, t), score_of(log_density, x), rtol=1e-11, atol=1e-11)


# ---- scores


@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_the_gradient_of_the_log_density(name):
    """Against autograd through torch.distributions, to 1e-9 in units of the score's scale."""
    process, problem = make(name), mixture(3, 3, seed=2)
    model = problem.model(process)
    for t in times(process, 9):
        x = noised(problem, process, t, 30, seed=4)
        want = score_of(reference(problem, process.alpha(t), process.sigma(t)), x)
        torch.testing.assert_close(model.score(x, t), want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))
        own = score_of(lambda y, t=t: problem.log_prob(y, process, t), x)
        torch.testing.assert_close(own, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


def test_a_score_off_by_a_thousandth_is_caught():
    """The control of the comparison above."""
    process, problem = sf.VP(), mixture(3, 3, seed=2)
    t = torch.tensor(0.4, dtype=F64)
    x = noised(problem, process, t, 30, seed=4)
    want = score_of(reference(problem, process.alpha(t), 1.001 * process.sigma(t)), x)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            problem.model(process).score(x, t), want, rtol=1e-9, atol=1e-9 * float(want.abs().max())
        )


@pytest.mark.parametrize("name", ["VE", "EDM", "VP", "RectifiedFlow"])
@pytest.mark.parametrize("kind", ["mixture", "narrow", "empirical"])
def test_float32_is_stable_from_sigma_max_to_1e_3(name, kind):
    """eps and x_0 in float32 against float64 at the same states, noise level by noise level."""
    process = sf.VE(sigma_min=1e-3) if name == "VE" else make(name)
    problem = {
        "mixture": mixture(3, 4, seed=3),
        "narrow": GaussianMixture(random_mixture(3, 4, seed=3)[0], 1e-4),
        "empirical": Empirical(mixture(3, 4, seed=3).sample(100, 0)),
    }[kind]
    model = problem.model(process)
    low = float(process.time_of_lam(math.log(1e3)))
    high = process.t1 if name != "RectifiedFlow" else 0.999
    for level in np.linspace(float(process.lam(low)), float(process.lam(high)), 12):
        t = process.time_of_lam(float(level)).clamp(process.t0, process.t1)
        x = noised(problem, process, t, 40, seed=int(100 + level)).to(torch.float32)
        for part in ("x0", "eps"):
            single, double = model(x, t, part), model(x.to(F64), t, part)
            assert single.dtype == torch.float32
            scale = 1 + float(double.abs().max())
            # an error of one unit in the last place of x costs eps 6e-8 |x|/sigma at the least noise
            loss = 6e-8 * float(x.abs().max()) / float(process.sigma(t)) if part == "eps" else 0.0
            assert float((single.to(F64) - double).abs().max()) < 2e-5 * scale + 20 * loss


@pytest.mark.parametrize("name", ["VP", "EDM", "SubVP", "from_coefficients"])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.8])
def test_the_posterior_mean_is_bayes_rule(name, share):
    """In one dimension, by scipy's quadrature of x_0 p(x_0) N(x; alpha x_0, sigma^2)."""
    process = make(name)
    problem = GaussianMixture([[-1.5], [0.5], [2.0]], [0.1, 0.3, 0.05], [1.0, 2.0, 1.5])
    t = process.t_min + share * (process.t1 - process.t_min)
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))

    def weight(y, x):
        parts = stats.norm.pdf(y, [-1.5, 0.5, 2.0], np.sqrt([0.1, 0.3, 0.05]))
        return float(parts @ [1.0, 2.0, 1.5]) / 4.5 * stats.norm.pdf(x, alpha * y, sigma)

    for x in (-alpha, 0.3 * alpha, 1.7 * alpha + sigma):
        where = {"points": sorted({-1.5, 0.5, 2.0, min(max(x / alpha, -4.0), 4.0)}), "epsabs": 1e-14, "limit": 400}
        total = quad(lambda y, x=x: weight(y, x), -5, 5, **where)[0]
        mean = quad(lambda y, x=x: y * weight(y, x), -5, 5, **where)[0] / total
        got = problem.model(process).x0(torch.tensor([[x]], dtype=F64), t)
        assert float(got) == pytest.approx(mean, abs=1e-7)


# ---- the Fokker-Planck equation of the noised laws


def fokker_planck_residual(problem, process, x, t, g2_error=0.0):
    """d_t log p + div f + f.s - g^2/2 (lap log p + |s|^2), by autograd, over its largest term."""
    x, t = x.clone().requires_grad_(), torch.full((x.shape[0],), t, dtype=F64, requires_grad=True)
    log_p = problem.log_prob(x, process, t)
    s, d_t = torch.autograd.grad(log_p.sum(), (x, t), create_graph=True)
    lap = sum(torch.autograd.grad(s[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1]))
    f, g2 = process.drift_coeff(t), process.diffusion_coeff(t) ** 2 * (1 + g2_error)
    terms = [d_t, f * x.shape[1], f * (x * s).sum(1), -0.5 * g2 * (lap + s.square().sum(1))]
    size = 1 + torch.stack([v.abs() for v in terms]).amax(0)
    return float((sum(terms).abs() / size).detach().max())


@pytest.mark.parametrize("name", NAMES)
def test_the_noised_laws_solve_the_fokker_planck_equation(name):
    process, problem = make(name), mixture(3, 2, seed=6)
    for t in times(process, 9).tolist():
        x = noised(problem, process, torch.tensor(t, dtype=F64), 20, seed=2)
        assert fokker_planck_residual(problem, process, x, t) < 1e-9
        assert fokker_planck_residual(problem, process, x, t, g2_error=1e-5) > 1e-9


# ---- sampling


@pytest.mark.parametrize(
    "problem",
    [mixture(3, 2, seed=1), Gaussian([1.0, -2.0], [[1.0, 0.6], [0.6, 0.5]]), GaussianMixture([[0.0], [3.0]], 0.2)],
    ids=repr,
)  # fmt: skip
def test_samples_have_the_mean_and_covariance(problem):
    """40,000 draws, every entry within 5 standard errors: fails for 1 seed in 10^5."""
    n = 40_000
    x = problem.sample(n, seed=11)
    assert x.dtype == F64
    error = x.mean(0) - problem.mean
    assert bool((error.abs() < 5 * (problem.covariance.diag() / n).sqrt()).all())
    centred = x - problem.mean
    products = centred[:, :, None] * centred[:, None, :]
    spread = products.flatten(1).std(0).reshape(products.shape[1:]) / math.sqrt(n)
    assert bool(((products.mean(0) - problem.covariance).abs() < 5 * spread).all())


def test_samples_have_the_law():
    """Kolmogorov-Smirnov against the exact CDF at level 1e-6: one seed in 10^6 fails."""
    x = GaussianMixture([[-1.0], [2.0]], [0.25, 1.0], [1.0, 3.0]).sample(50_000, seed=5)[:, 0]

    def cdf(v):
        return 0.25 * stats.norm.cdf(v, -1.0, 0.5) + 0.75 * stats.norm.cdf(v, 2.0, 1.0)

    assert stats.kstest(x.numpy(), cdf).pvalue > 1e-6
    assert stats.kstest(x.numpy() + 0.05, cdf).pvalue < 1e-6  # the control: a twentieth of a unit off


def test_empirical_draws_every_point_equally_often():
    """Chi-square over 10 points at level 1e-6."""
    data = torch.arange(10, dtype=F64)[:, None]
    x = Empirical(data).sample(20_000, seed=1)
    counts = torch.bincount(x[:, 0].long(), minlength=10)
    assert torch.equal(x[:, 0], x[:, 0].round())
    assert stats.chisquare(counts.numpy()).pvalue > 1e-6
    blurred = Empirical(data, 0.1).sample(20_000, seed=1)
    assert float((blurred - x).std()) == pytest.approx(0.1, rel=5 / math.sqrt(2 * 20_000))


@pytest.mark.parametrize("problem", [mixture(), Empirical(torch.randn(7, 3)), Gaussian(0.0, 1.0)], ids=repr)
def test_a_draw_depends_on_seed_and_position_only(problem):
    x = problem.sample(100, seed=4)
    assert torch.equal(problem.sample(37, seed=4), x[:37])
    assert not torch.equal(problem.sample(100, seed=5), x)
    assert problem.sample(1, seed=4).shape == (1, *problem.event)


# ---- a sample's score does not depend on the batch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["full", "diagonal", "empirical", "wide"])
def test_scores_are_bitwise_the_same_in_any_batch(kind, dtype):
    problem = {
        "full": mixture(3, 2, seed=1),
        "diagonal": GaussianMixture(random_mixture(5, 3, seed=1)[0], 0.2),
        "empirical": Empirical(torch.randn(97, 8, dtype=F64), 0.1),
        "wide": mixture(5, 24, seed=2),
    }[kind]
    process = sf.VP()
    model = problem.model(process)
    x = (2 * torch.randn(61, *problem.event, dtype=F64)).to(dtype)
    t = torch.tensor(0.35, dtype=F64)
    whole = model(x, t)
    for size in (1, 2, 3, 5, 8, 16, 33):
        parts = torch.cat([model(part, t) for part in x.split(size)])
        assert torch.equal(parts, whole), f"batches of {size}"
    order = torch.randperm(61, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(x[order], t), whole[order])
    assert torch.equal(model(x, t.expand(61)), whole)


def test_times_per_sample_are_times_of_the_samples():
    process, problem = sf.VP(), mixture(4, 3, seed=3)
    model = problem.model(process)
    x, t = torch.randn(11, 3, dtype=F64), times(process, 11)
    whole = model(x, t)
    for i in range(11):
        assert torch.equal(model(x[i : i + 1], float(t[i])), whole[i : i + 1])


def test_one_nan_stays_in_its_row():
    problem = mixture(3, 2)
    model = problem.model(sf.VP())
    x = torch.randn(9, 2, dtype=F64)
    whole = model(x, 0.5)
    bad = x.clone()
    bad[4, 0] = math.nan
    keep = torch.arange(9) != 4
    got = model(bad, 0.5)
    assert torch.equal(got[keep], whole[keep])
    assert bool(got[4].isnan().all())


# ---- shapes, names, errors


def test_images_are_flat_vectors_with_a_shape():
    means = torch.randn(3, 1, 2, 2, dtype=F64)
    covariances = random_mixture(3, 4, seed=0)[1]
    image, flat = GaussianMixture(means, covariances), GaussianMixture(means.flatten(1), covariances)
    process = sf.EDM()
    x = torch.randn(5, 1, 2, 2, dtype=F64)
    assert image.sample(6, 0).shape == (6, 1, 2, 2)
    assert torch.equal(image.sample(6, 0).flatten(1), flat.sample(6, 0))
    t = torch.linspace(0.1, 3, 5, dtype=F64)
    assert torch.equal(image.model(process)(x, t.reshape(5, 1, 1, 1)).flatten(1), flat.model(process)(x.flatten(1), t))
    assert torch.equal(image.log_prob(x, process, t), flat.log_prob(x.flatten(1), process, t))


def test_the_named_sets():
    eight = sf.problems.EightGaussians(radius=2.0, std=0.15)
    assert eight.event == (2,)
    torch.testing.assert_close(eight.means.norm(dim=1), torch.full((8,), 2.0, dtype=F64))
    torch.testing.assert_close(eight.covariance, (2.0 + 0.15**2) * torch.eye(2, dtype=F64), rtol=1e-12, atol=1e-12)
    moons = sf.problems.TwoMoons()
    centred = moons.means + torch.tensor([0.5, 0.25], dtype=F64)
    upper, lower = centred[:16], centred[16:]
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(16, dtype=F64))
    torch.testing.assert_close((lower - torch.tensor([1.0, 0.5], dtype=F64)).norm(dim=1), torch.ones(16, dtype=F64))
    assert bool((upper[:, 1] > 0).all() and (lower[:, 1] < 0.5).all())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianMixture([0.0, 1.0], 1.0), r"shape \(K, \*event\)"),
        (lambda: GaussianMixture([[0.0], [1.0]], [1.0, 2.0, 3.0]), "expected covariances of shape"),
        (lambda: GaussianMixture([[0.0], [1.0]], [1.0, -2.0]), "negative eigenvalues"),
        (lambda: GaussianMixture([[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]]), "negative eigenvalues"),
        (lambda: GaussianMixture([[0.0, 0.0]], [[[1.0, 0.2], [0.3, 1.0]]]), "symmetric"),
        (lambda: GaussianMixture([[0.0], [1.0]], 1.0, [1.0]), "expected 2 positive weights"),
        (lambda: GaussianMixture([[0.0], [1.0]], 1.0, [1.0, 0.0]), "positive weights"),
        (lambda: GaussianMixture([[0.0], [1.0]], 1.0, [1.0, math.nan]), "positive weights"),
        (lambda: Empirical(torch.zeros(3)), r"shape \(N, \*event\)"),
        (lambda: Empirical(torch.zeros(0, 3)), "expected data"),
        (lambda: Empirical([[math.nan]]), "finite data"),
        (lambda: Empirical([[1.0]], -0.1), "bandwidth >= 0"),
        (lambda: mixture().log_prob(torch.zeros(3, 4)), r"\(batch, 2\), got \(3, 4\)"),
        (lambda: mixture().log_prob(torch.zeros(3, 2), sf.VP()), "process and t together"),
        (lambda: mixture().log_prob(torch.zeros(3, 2), t=0.5), "process and t together"),
        (lambda: mixture().model(sf.VP())(torch.zeros(3, 4), 0.5), r"\(batch, 2\), got \(3, 4\)"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_model_needs_a_gaussian_process():
    with pytest.raises(TypeError, match="expected a GaussianSDE, got float"):
        mixture().model(1.0)


@pytest.mark.parametrize("problem", [mixture(), Empirical(torch.eye(2)), sf.problems.TwoMoons()], ids=repr)
def test_an_exact_model_goes_to_another_process(problem):
    """By pickle, which takes no local function."""
    x = problem.sample(5, seed=0)
    processes = (
        [sf.VP()] if isinstance(problem, Empirical) else [sf.VP(), sf.LinearSDE([[-1.0, 0.2], [0.0, -1.0]], [0.5, 0.5])]
    )
    for process in processes:
        model = problem.model(process)
        assert torch.equal(pickle.loads(pickle.dumps(model)).score(x, 0.4), model.score(x, 0.4))


def test_the_quick_suite_goes_to_another_process():
    for make_problem in SUITES["quick"].problems:
        problem = pickle.loads(pickle.dumps(make_problem()))
        assert torch.isfinite(problem.model.score(problem.start(2, 0, torch.float32), problem.model.sde.t1)).all()
