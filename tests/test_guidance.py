"""Guidance: what is exactly true of each combination, what is sampled, calls, conditions, and what is refused."""

import copy
import math

import pytest
import torch

import sdeflow as sf
from sdeflow.guidance import add_score, add_term, classifier_free, classifier_guidance, clip_x0, dynamic_threshold
from sdeflow.problems import Gaussian, GaussianMixture
from sdeflow.testing.models import check_model

F64 = torch.float64
PARTS = ("x0", "eps", "score", "v", "velocity")
PROCESSES = {
    "VP": sf.VP(),
    "SubVP": sf.SubVP(),
    "VE": sf.VE(),
    "EDM": sf.EDM(),
    "RectifiedFlow": sf.RectifiedFlow(),
}
MEANS = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=F64)
SPREADS = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.2, 0.0], [0.0, 0.6]], [[0.3, -0.1], [-0.1, 0.3]]], dtype=F64)
WEIGHTS = (0.5, 0.3, 0.2)
DATA = GaussianMixture(MEANS, SPREADS, WEIGHTS)
CLASSES = [Gaussian(m, c) for m, c in zip(MEANS, SPREADS, strict=True)]
LIMIT = 5.0
"""Standard errors: two-sided 6e-7 a number; the tests of sampled moments look at fewer than 60 in all, with seeds that
are fixed: a failure by chance had odds of 4e-5 when they were written and none since."""


def classifier(process, sign=1.0):
    """The exact log p_t(y | x), label among the conditions."""

    def log_prob(x, t, label):
        alpha, sigma = process.alpha(t.to(F64)), process.sigma(t.to(F64))
        covariance = alpha[:, None, None, None] ** 2 * SPREADS + sigma[:, None, None, None] ** 2 * torch.eye(
            2, dtype=F64
        )
        y = x[:, None].to(F64) - alpha[:, None, None] * MEANS
        white = torch.linalg.solve(covariance, y.unsqueeze(-1)).squeeze(-1)
        logits = torch.tensor(WEIGHTS).log() - 0.5 * (torch.logdet(covariance) + (y * white).sum(-1))
        return sign * torch.log_softmax(logits, 1).gather(1, label[:, None]).squeeze(1)

    return log_prob


class Labelled(torch.nn.Module):
    """A small network of x, time and label; label 3 is the null condition."""

    def __init__(self, event=(3,)):
        super().__init__()
        self.linear, self.table = torch.nn.Linear(math.prod(event), math.prod(event)), torch.nn.Embedding(4, 8)
        self.shift = torch.nn.Linear(8, math.prod(event))

    def forward(self, x, time, label):
        flat = torch.tanh(self.linear(x.flatten(1)) + self.shift(self.table(label))) + time[:, None]
        return flat.reshape(x.shape)


def labelled(prediction="eps", dtype=F64, event=(3,), batch=5, process=None):
    torch.manual_seed(1)
    model = sf.Model(Labelled(event).to(dtype), process or sf.VP(), prediction)
    label, null = torch.arange(batch) % 3, torch.full((batch,), 3)
    return model.bind(label=label), model.bind(label=null)


def within(sample, mean, covariance):
    """The largest deviation of mean and covariance from what is expected, in standard errors."""
    n = len(sample)
    off = (sample.mean(0) - mean).abs() / torch.sqrt(covariance.diagonal() / n)
    error = torch.sqrt((covariance**2 + covariance.diagonal()[:, None] * covariance.diagonal()) / n)
    return max(float(off.max()), float(((sample.T.cov() - covariance).abs() / error).max()))


# ---- classifier-free guidance


@pytest.mark.parametrize("prediction", PARTS)
@pytest.mark.parametrize("wanted", PARTS)
def test_scale_one_and_zero_are_the_two_models_bit_for_bit(prediction, wanted):
    c, u = labelled(prediction)
    x = torch.randn(5, 3, dtype=F64)
    for t in (0.3, torch.linspace(0.1, 0.9, 5, dtype=F64)):
        with torch.no_grad():
            assert torch.equal(classifier_free(c, u, 1.0)(x, t, wanted), c(x, t, wanted))
            assert torch.equal(classifier_free(c, u, 0.0)(x, t, wanted), u(x, t, wanted))


@pytest.mark.parametrize("prediction", PARTS)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_combination_is_the_same_in_every_prediction(name, prediction):
    process = PROCESSES[name]
    c, u = (sf.Model(lambda x, t, k=k: torch.sin(k * x + k), process, prediction) for k in (1.0, 2.0))
    x, t = torch.randn(5, 3, dtype=F64), process.t_min + 0.4 * (process.t1 - process.t0)
    guided = classifier_free(c, u, 2.5)
    for part in PARTS:
        want = u(x, t, part) + 2.5 * (c(x, t, part) - u(x, t, part))
        torch.testing.assert_close(guided(x, t, part), want, rtol=1e-10, atol=1e-10 * float(want.abs().max()))


def test_two_models_with_different_predictions():
    process = sf.VP()
    exact = CLASSES[0].model(process)
    as_eps = sf.Model(lambda x, t: exact(x, t, "eps"), process, "eps", expand=False)
    x, other = torch.randn(5, 2, dtype=F64), DATA.model(process)
    got = classifier_free(as_eps, other, 3.0).score(x, 0.4)
    torch.testing.assert_close(got, 3 * exact.score(x, 0.4) - 2 * other.score(x, 0.4))


@pytest.mark.parametrize("name", PROCESSES)
def test_classes_of_one_covariance_are_guided_to_the_gaussian_beyond(name):
    """With one covariance the guided score is that of the class of mean u + w (c - u), at every time: also sampled."""
    process, c, u = PROCESSES[name], Gaussian(MEANS[0], SPREADS[0]), Gaussian(MEANS[1], SPREADS[0])
    beyond = Gaussian(MEANS[1] + 3 * (MEANS[0] - MEANS[1]), SPREADS[0])
    guided = classifier_free(c.model(process), u.model(process), 3.0)
    x = torch.randn(6, 2, dtype=F64) * (1 + process.prior_std)
    for t in (process.t_min, 0.5 * process.t1):
        torch.testing.assert_close(guided.score(x, t), beyond.model(process).score(x, t), rtol=1e-9, atol=1e-9)
    run = {"shape": (2,), "solver": sf.solvers.DPMSolverPP(2), "steps": 12, "dtype": F64}
    got, want = (sf.sample(m, 40, **run).x for m in (guided, beyond.model(process)))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_scale_two_does_not_sample_the_tilted_law():
    """c = N(0, 1/4), u = N(0, 1), w = 2: the tilted law has variance 1/(2 * 4 - 1) = 1/7, the flow ends at 1/16.

    u is stationary under VP, so the guided flow moves x at twice the rate of the conditional one, and its end is the
    square of that one's, (1/2)^2 per unit of the prior.
    """
    process = sf.VP()
    guided = classifier_free(Gaussian(0.0, 0.25).model(process), Gaussian(0.0, 1.0).model(process), 2.0)
    with torch.no_grad():
        end = sf.solve(process.probability_flow(guided), torch.ones(1, 1, dtype=F64), sf.solvers.RK45(), rtol=1e-8)
    variance = float(end.x) ** 2
    assert variance == pytest.approx(1 / 16, rel=0.01)
    assert variance < 0.5 / 7


def test_calls_are_counted_by_the_network():
    c, u = labelled()
    x = torch.randn(5, 3, dtype=F64)
    for scale, calls in ((1.0, 1), (0.0, 1), (4.0, 2)):
        guided = classifier_free(c, u, scale)
        before = c.nfe
        guided.score(x, 0.5)
        assert guided.nfe == calls
        assert c.nfe - before == calls
    outer = clip_x0(classifier_free(classifier_free(c, u, 2.0), u, 3.0))
    outer.x0(x, 0.5)
    assert outer.nfe == 3
    guided = classifier_free(c, u, 4.0)
    with torch.no_grad():
        solution = sf.sample(guided, 5, shape=(3,), solver=sf.solvers.EDMHeun(), steps=6, dtype=F64)
    assert guided.nfe == 2 * solution.stats.nfe
    twin = copy.deepcopy(guided.net)
    twin(x, torch.tensor(0.5, dtype=F64), **guided.conditions)
    assert guided.nfe == 2 * solution.stats.nfe + 2


def test_a_solution_says_what_its_networks_were_called():
    c, u = labelled()
    run = {"shape": (3,), "solver": sf.solvers.DPMSolverPP(2), "steps": 10, "dtype": F64}
    halfway = classifier_free(c, u, 3.0, (0.25, 0.75), interval_in="t")
    for model, calls in ((c, 10), (classifier_free(c, u, 3.0), 20), (classifier_free(c, u, 1.0), 10),
                         (classifier_free(classifier_free(c, u, 2.0), u, 3.0), 30), (clip_x0(c), 10)):  # fmt: skip
        for _ in range(2):  # the difference, whatever was called before
            stats = sf.sample(model, 5, **run).stats
            assert (stats.nfe, stats.calls, stats.network_calls) == (10, 10, calls)
        assert sf.sample(model, 5, **run, final="denoise").stats.network_calls == calls + calls // 10
    stats = sf.sample(halfway, 5, **{**run, "solver": sf.solvers.Euler(), "steps": 100}, grid=sf.grids.uniform).stats
    assert (stats.nfe, stats.network_calls) == (100, 150)


def test_network_calls_to_a_tolerance_and_of_other_problems():
    """Samples that leave the batch take part in no calls; calls are those of the batch, from the first evaluation."""
    c, u = labelled()
    guided, process = classifier_free(c, u, 3.0), sf.VP()
    for solver, eta in ((sf.solvers.RK45(), 0.0), (sf.solvers.AdaptiveSDE(), 1.0), (sf.solvers.Scipy("RK45"), 0.0)):
        before = guided.nfe
        stats = sf.sample(guided, 5, shape=(3,), solver=solver, eta=eta, rtol=0.01, dtype=F64).stats
        assert stats.network_calls == guided.nfe - before == 2 * stats.calls
    x = torch.randn(5, 3, dtype=F64)
    encoded = sf.coding.encode(guided, x, steps=3)
    assert encoded.stats.network_calls == 2 * encoded.stats.calls

    class Decay(sf.ODE):
        def drift(self, x, t):
            return -x

    assert sf.solve(Decay(), x, sf.solvers.Heun(), steps=4).stats.network_calls == 8
    flow = process.probability_flow(lambda x, t: -x)
    assert sf.solve(flow, x, sf.solvers.Heun(), steps=4).stats.network_calls == 8


@pytest.mark.parametrize("unit", ["sigma", "t"])
def test_guidance_in_an_interval(unit):
    process = sf.VP()
    c, u = labelled(process=process)
    times = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=F64)
    level = process.sigma(times) / process.alpha(times) if unit == "sigma" else times
    guided = classifier_free(c, u, 3.0, (float(level[0]), float(level[2])), interval_in=unit)
    x = torch.randn(5, 3, dtype=F64)
    with torch.no_grad():
        whole, plain, strong = (m.score(x, times) for m in (guided, c, classifier_free(c, u, 3.0)))
        assert torch.equal(whole[[0, 3, 4]], plain[[0, 3, 4]])  # the interval is open below and closed above
        torch.testing.assert_close(whole[[1, 2]], strong[[1, 2]], rtol=1e-12, atol=1e-12)
        assert float((whole - plain)[[1, 2]].abs().amax(1).min()) > 1e-2
        for t, calls in zip(times.tolist(), (1, 2, 2, 1, 1), strict=True):
            before = guided.nfe
            guided.score(x, t)
            assert guided.nfe - before == calls


def test_an_interval_saves_calls_in_a_solve():
    c, u = labelled()
    guided = classifier_free(c, u, 3.0, (0.25, 0.75), interval_in="t")
    with torch.no_grad():
        sf.sample(guided, 5, shape=(3,), solver=sf.solvers.Euler(), grid=sf.grids.uniform, steps=100, dtype=F64)
    assert guided.nfe == 150


def test_rescale_restores_the_standard_deviation():
    c, u = labelled("v", event=(3, 4, 4))
    x = torch.randn(5, 3, 4, 4, dtype=F64)
    with torch.no_grad():
        std, plain = (classifier_free(c, u, w).x0(x, 0.6).flatten(1).std(1) for w in (1.0, 6.0))
        for phi in (0.0, 0.7, 1.0):
            got = classifier_free(c, u, 6.0, rescale=phi).x0(x, 0.6).flatten(1).std(1)
            torch.testing.assert_close(got, phi * std + (1 - phi) * plain, rtol=1e-10, atol=0)
        assert float((plain / std - 1).abs().max()) > 0.01
        once = classifier_free(c, u, 1.0, rescale=0.7)
        torch.testing.assert_close(once.score(x, 0.6), c.score(x, 0.6), rtol=1e-10, atol=1e-10)
        zero = classifier_free(c, u, 0.0, rescale=1.0).x0(x, 0.6).flatten(1).std(1)
        torch.testing.assert_close(zero, std, rtol=1e-10, atol=0)


def test_the_scale_may_depend_on_time():
    c, u = labelled()
    x, times = torch.randn(5, 3, dtype=F64), torch.linspace(0.1, 0.9, 5, dtype=F64)
    guided = classifier_free(c, u, lambda t: 1 + 4 * t)
    with torch.no_grad():
        whole = guided.eps(x, times)
        for i, t in enumerate(times.tolist()):
            one = classifier_free(c, u, 1 + 4 * t).eps(x, t)[i]
            torch.testing.assert_close(whole[i], one, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="of the shape of t"):
        classifier_free(c, u, lambda t: torch.ones(7)).eps(x, 0.5)


# ---- classifier guidance


@pytest.mark.parametrize("prediction", PARTS)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_exact_classifier_gives_the_class(name, prediction):
    process = PROCESSES[name]
    exact = DATA.model(process)
    model = sf.Model(lambda x, t: exact(x, t, prediction), process, prediction, expand=False)
    label = torch.tensor([0, 1, 2, 0])
    guided = classifier_guidance(model, classifier(process)).bind(label=label)
    for t in (2 * process.t_min, 0.3 * process.t1):
        x = torch.randn(4, 2, dtype=F64) * float(process.sigma(t) + process.alpha(t))
        for part in PARTS:
            got = guided(x, t, part)
            want = torch.stack([CLASSES[int(k)].model(process)(x[i : i + 1], t, part)[0] for i, k in enumerate(label)])
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7 * (1 + float(want.abs().max())))
    assert guided.nfe == 2 * len(PARTS)


def sampled(model, label, process, eta, n=3000):
    guided = classifier_guidance(model, classifier(process)).bind(label=torch.full((n,), label))
    return sf.sample(guided, n, shape=(2,), solver=sf.solvers.DPMSolverPP(2), steps=40, eta=eta, dtype=F64, seed=3,
                     final="denoise").x  # fmt: skip


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("label", [0, 1])
def test_samples_of_the_exact_classifier_have_the_law_of_the_class(label, eta):
    process = sf.VP()
    x = sampled(DATA.model(process), label, process, eta)
    assert within(x, MEANS[label], SPREADS[label]) < LIMIT


def test_another_scale_is_the_score_of_the_tilted_density_at_each_time():
    process, t, w = sf.VP(), 0.35, 2.5
    x, label = torch.randn(6, 2, dtype=F64), torch.arange(6) % 3
    leaf, times = x.clone().requires_grad_(), torch.full((6,), t, dtype=F64)
    density = DATA.log_prob(leaf, process, t) + w * classifier(process)(leaf, times, label)
    (want,) = torch.autograd.grad(density.sum(), leaf)
    got = classifier_guidance(DATA.model(process), classifier(process), w).bind(label=label).score(x, t)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_negative_controls_of_the_sampled_law():
    """The judge fails a wrong sign, and a term put into eps without its factor sigma."""
    process = sf.VP()
    exact, label = DATA.model(process), torch.ones(3000, dtype=torch.long)
    signed = classifier_guidance(exact, classifier(process, sign=-1.0))

    def unscaled(x, t):
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            value = classifier(process)(leaf, t.to(F64).flatten().expand(len(x)), label)
            (term,) = torch.autograd.grad(value.sum(), leaf)
        return exact(x, t, "eps") - term

    run = {"shape": (2,), "solver": sf.solvers.DPMSolverPP(2), "steps": 40, "dtype": F64, "seed": 3, "final": "denoise"}
    for wrong in (signed.bind(label=label), sf.Model(unscaled, process, "eps", expand=False)):
        assert within(sf.sample(wrong, 3000, **run).x, MEANS[1], SPREADS[1]) > 1.5 * LIMIT


def test_a_term_and_a_given_score_agree():
    process = sf.VE()
    model = DATA.model(process)
    x = torch.randn(4, 2, dtype=F64)
    by_grad = add_term(model, lambda x, t: -0.5 * (x**2).sum(1) * t, 0.7)
    given = add_score(model, lambda x, t: -x * t[:, None], 0.7)
    for part in PARTS:
        torch.testing.assert_close(by_grad(x, 0.4, part), given(x, 0.4, part))
    torch.testing.assert_close(given.score(x, 0.4), model.score(x, 0.4) - 0.7 * 0.4 * x)
    torch.testing.assert_close(given.x0(x, 0.4), model.x0(x, 0.4) - process.sigma(0.4) ** 2 * 0.7 * 0.4 * x)


def test_a_process_with_a_score_only():
    class Well(sf.SDE):
        def drift(self, x, t):
            return x - x**3

        def diffusion(self, x, t):
            return 0.5 * torch.ones_like(x)

    well = Well()
    model = sf.Model(lambda x, t: -x, well, "score")
    x = torch.randn(4, 2, dtype=F64)
    torch.testing.assert_close(add_term(model, lambda x, t: -(x**2).sum(1)).score(x, 0.5), -3 * x)
    strong = classifier_free(model, sf.Model(lambda x, t: -2 * x, well, "score"), 3.0, (0.2, 0.8), interval_in="t")
    torch.testing.assert_close(strong.score(x, 0.5), x)
    assert sf.solve(well.reverse(strong), x, sf.solvers.EulerMaruyama(), steps=5, seed=0).x.shape == x.shape


def test_gradients_are_recorded_where_the_caller_differentiates():
    process = sf.VP()
    weight = torch.tensor(0.3, dtype=F64, requires_grad=True)
    model = DATA.model(process)
    x = torch.randn(4, 2, dtype=F64)
    guided = add_term(model, lambda x, t: -weight * (x**4).sum(1))
    (slope,) = torch.autograd.grad(guided.score(x, 0.5).sum(), weight)
    torch.testing.assert_close(slope, -4 * (x**3).sum())
    plain = add_term(model, lambda x, t: -(x**4).sum(1))
    assert not plain.score(x, 0.5).requires_grad
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: plain.score(v, 0.5), (leaf,))
    with torch.inference_mode():
        inside = plain.score(x.clone(), 0.5)
    torch.testing.assert_close(inside.clone(), plain.score(x, 0.5))


def test_guidance_inside_inference_mode():
    process, n = sf.VP(), 4
    run = {"shape": (2,), "solver": sf.solvers.DPMSolverPP(2), "steps": 6, "dtype": F64}
    model, label = DATA.model(process), torch.ones(n, dtype=torch.long)
    want = sf.sample(classifier_guidance(model, classifier(process)).bind(label=label), n, **run).x
    with torch.inference_mode():
        made = classifier_guidance(model, classifier(process)).bind(label=label.clone())
        got = sf.sample(made, n, **run).x
        per_sample = made.score(got, torch.linspace(0.2, 0.8, n))
    torch.testing.assert_close(got.clone(), want)
    assert per_sample.shape == (n, 2)


# ---- thresholding


def far_model():
    process = sf.VP()
    return sf.Model(lambda x, t: 3 * torch.sin(2 * x), process, "x0")


@pytest.mark.parametrize("wrap", [clip_x0, dynamic_threshold])
def test_predictions_of_a_threshold_are_of_one_state(wrap):
    model = wrap(far_model())
    process, x = model.gaussian, torch.randn(4, 3, 4, 4, dtype=F64)
    for t in (0.1, torch.linspace(0.1, 0.9, 4, dtype=F64)):
        a, s = (f(torch.as_tensor(t)).reshape(-1, 1, 1, 1) for f in (process.alpha, process.sigma))
        x0, eps = model.x0(x, t), model.eps(x, t)
        torch.testing.assert_close(a * x0 + s * eps, x)
        torch.testing.assert_close(model(x, t, "v"), a * eps - s * x0)
        torch.testing.assert_close(model.score(x, t), -eps / s)
        assert float(x0.abs().max()) <= 1


def test_static_threshold():
    model, x = far_model(), torch.randn(4, 6, dtype=F64)
    assert torch.equal(clip_x0(model, -0.5, 2.0).x0(x, 0.4), model.x0(x, 0.4).clamp(-0.5, 2.0))
    assert torch.equal(clip_x0(model, -9.0, 9.0).x0(x, 0.4), model.x0(x, 0.4))
    twice = clip_x0(clip_x0(model))
    assert torch.equal(twice.x0(x, 0.4), clip_x0(model).x0(x, 0.4))


def test_dynamic_threshold():
    values = torch.tensor([[0.1, -0.2, 0.3, 0.4, -0.5], [1.0, -2.0, 3.0, 4.0, -10.0]], dtype=F64)
    model = sf.Model(lambda x, t: values[: len(x)], sf.VP(), "x0")
    x = torch.randn(2, 5, dtype=F64)
    got = dynamic_threshold(model, 0.75).x0(x, 0.4)
    assert torch.equal(got[0], values[0])  # below the floor: as it is
    torch.testing.assert_close(got[1], torch.tensor([0.25, -0.5, 0.75, 1.0, -1.0], dtype=F64))  # s = 4
    torch.testing.assert_close(dynamic_threshold(model, 0.75, 2.0).x0(x, 0.4)[1], 2 * got[1])
    assert torch.equal(dynamic_threshold(model, 0.5, 20.0).x0(x, 0.4), clip_x0(model, -20, 20).x0(x, 0.4))
    alone = dynamic_threshold(sf.Model(lambda x, t: values[1:], sf.VP(), "x0"), 0.75).x0(x[1:], 0.4)
    assert torch.equal(alone[0], got[1])


def test_dynamic_threshold_of_scalars():
    model = sf.Model(lambda x, t: 3 * x, sf.VP(), "x0")
    x = torch.tensor([0.1, -2.0, 5.0], dtype=F64)
    torch.testing.assert_close(dynamic_threshold(model).x0(x, 0.4), torch.tensor([0.3, -1.0, 1.0], dtype=F64))


def test_a_threshold_bounds_the_samples():
    x = sf.sample(clip_x0(far_model()), 50, shape=(3,), solver=sf.solvers.DPMSolverPP(2), steps=10, final="denoise").x
    assert float(x.abs().max()) <= 1
    free = sf.sample(far_model(), 50, shape=(3,), solver=sf.solvers.DPMSolverPP(2), steps=10, final="denoise").x
    assert float(free.abs().max()) > 2


# ---- every solver, conditions, dtypes


SOLVERS = [
    (sf.solvers.DDIM(), 0.0),
    (sf.solvers.DDPM(), 0.0),
    (sf.solvers.UniPC(3), 0.0),
    (sf.solvers.Heun(), 0.0),
    (sf.solvers.EDMHeun(), 0.0),
    (sf.solvers.DPMSolverPP(2), 1.0),
    (sf.solvers.EulerMaruyama(), 1.0),
    (sf.solvers.PredictorCorrector(sf.solvers.EulerMaruyama()), 1.0),
]


@pytest.mark.parametrize(("solver", "eta"), SOLVERS, ids=lambda v: getattr(v, "name", v))
def test_every_solver_sees_the_guided_model(solver, eta):
    """By classifier guidance to class 1, with the same noise, each gives what it gives for class 1 itself."""
    process, n = sf.VP(), 8
    guided = classifier_guidance(DATA.model(process), classifier(process)).bind(label=torch.ones(n, dtype=torch.long))
    run = {"shape": (2,), "solver": solver, "steps": 12, "eta": eta, "dtype": F64, "seed": 5}
    got, want = (sf.sample(m, n, **run).x for m in (guided, CLASSES[1].model(process)))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", [sf.solvers.RK45(), sf.solvers.AdaptiveSDE()], ids=lambda s: s.name)
def test_labels_follow_samples_that_leave_the_batch(solver):
    """A sample of a mixed batch, under error control, is what it is among samples of its own label."""
    eta = 0.0 if isinstance(solver, type(sf.solvers.RK45())) else 1.0
    process, n = sf.VP(), 24
    label = torch.arange(n) % 3
    start = 3 * torch.randn(n, 2, dtype=F64)
    start[::5] *= 10  # far starts take more steps

    def run(rows):
        c = classifier_guidance(DATA.model(process), classifier(process)).bind(label=label[rows])
        guided = clip_x0(classifier_free(c, DATA.model(process), 1.7), -4, 4)
        with torch.no_grad():
            noise = {} if eta == 0 else {"seed": 1, "index": rows}
            return sf.solve(process.reverse(guided, eta), start[rows], solver, rtol=0.05, t_span=(0.8, 0.05), **noise)

    whole = run(torch.arange(n))
    assert len(set(whole.stats.steps.tolist())) > 2
    for k in range(3):
        rows = torch.nonzero(label == k).flatten()
        torch.testing.assert_close(run(rows).x, whole.x[rows], rtol=1e-9, atol=1e-9)
    moved = run(torch.arange(n).flip(0)).x.flip(0)
    torch.testing.assert_close(moved, whole.x, rtol=1e-9, atol=1e-9)


def test_conditions_stay_with_their_part():
    model = sf.Model(Labelled().to(F64), sf.VP())
    null, label = torch.full((5,), 3), torch.arange(5) % 3
    later = classifier_free(model, model.bind(label=null), 2.0).bind(label=label)
    x = torch.randn(5, 3, dtype=F64)
    with torch.no_grad():
        now = classifier_free(model.bind(label=label), model.bind(label=null), 2.0)
        assert torch.equal(later.score(x, 0.4), now.score(x, 0.4))
        both = clip_x0(classifier_free(model, model, 2.0), -1e9, 1e9).bind(label=label)
        torch.testing.assert_close(both.score(x, 0.4), model.bind(label=label).score(x, 0.4))
        rows = torch.tensor([3, 1])
        torch.testing.assert_close(now.take(rows).score(x[rows], 0.4), now.score(x, 0.4)[rows])
    with pytest.raises(TypeError, match="takes colour"):
        now.bind(colour=label)
    with pytest.raises(ValueError, match=r"unconditional.label.*one row a sample"):
        sf.sample(classifier_free(model.bind(label=label), model.bind(label=null[:4]), 2.0), 5, shape=(3,),
                  solver=sf.solvers.DDIM(), steps=3)  # fmt: skip
    assert now.nfe == later.nfe + 4  # taken rows share the count of the model they come from


def test_a_condition_is_replaced_by_its_full_name():
    c, u = labelled()
    guided, x = classifier_free(c, u, 2.0), torch.randn(5, 3, dtype=F64)
    other = torch.ones(5, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(guided.bind(**guided.conditions).score(x, 0.4), guided.score(x, 0.4))
        moved = guided.bind(**{"unconditional.label": other})
        want = classifier_free(c, u.bind(label=other), 2.0)
        assert torch.equal(moved.score(x, 0.4), want.score(x, 0.4))
    with pytest.raises(TypeError, match=r"takes unconditional\.colour"):
        guided.bind(**{"unconditional.colour": other})


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_check_model_takes_guided_models(dtype):
    """With the calls that they make; the untrained network fails at the noise end alone, as it does by itself."""
    c, u = labelled(batch=8, dtype=dtype)
    guided = classifier_free(c, u, 2.0)
    limited = classifier_free(c, u, 2.0, (0.2, 1.0))
    for model, calls in ((guided, 2), (limited, None), (clip_x0(guided), 2), (dynamic_threshold(limited), None)):
        report = check_model(model, event=(3,), calls=calls)
        assert {f.identity for f in report.findings if f.verdict == "fail"} <= {"noise end"}
        assert report["conditions"].verdict == "pass"
        assert check_model(model, event=(3,))["calls counted"].verdict == "fail"
    exact = classifier_free(CLASSES[0].model(sf.VP()), DATA.model(sf.VP()), 2.0)
    check_model(exact, event=(2,), calls=2, exact=True).verify()
    for calls in (0, True, 1.5):
        with pytest.raises(ValueError, match="calls"):
            check_model(guided, event=(3,), calls=calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_keep_their_dtype(dtype):
    c, u = labelled(dtype=dtype, event=(1, 4, 4))
    x = torch.randn(5, 1, 4, 4, dtype=dtype)
    terms = classifier_guidance(c, lambda x, t, label: -(x**2).flatten(1).sum(1) * label, 0.5).bind(
        label=torch.arange(5) % 3
    )
    models = (classifier_free(c, u, 3.0), classifier_free(c, u, 3.0, (0.1, 9.0), 0.7), clip_x0(c), terms,
              dynamic_threshold(c), add_score(c, lambda x, t: -x))  # fmt: skip
    for model in models:
        with torch.no_grad():
            for t in (0.5, torch.linspace(0.1, 0.9, 5, dtype=F64)):
                assert model(x, t).dtype == dtype
            y = sf.sample(model, 5, shape=(1, 4, 4), solver=sf.solvers.DPMSolverPP(2), steps=4).x
        assert y.dtype == dtype  # that of the network's parameters
        assert y.shape == x.shape


# ---- errors, before any call


def test_bad_input_is_refused():
    c, u = labelled()
    bad = [
        (lambda: classifier_free(c, lambda x, t: x, 2.0), TypeError, "unconditional as a Model"),
        (lambda: classifier_free(lambda x, t: x, u, 2.0), TypeError, "as a Model"),
        (lambda: classifier_free(c, DATA.model(sf.VE()), 2.0), ValueError, "one process"),
        (lambda: classifier_free(c, u, math.nan), ValueError, "scale"),
        (lambda: classifier_free(c, u, True), ValueError, "scale"),
        (lambda: classifier_free(c, u, 2.0, (0.5, 0.5)), ValueError, "low < high"),
        (lambda: classifier_free(c, u, 2.0, (0.1, 0.5), interval_in="lam"), ValueError, "interval_in"),
        (lambda: classifier_free(c, u, 2.0, 0.5), ValueError, "interval as a tuple of 2 numbers"),
        (lambda: classifier_free(c, u, 2.0, (None, 0.5)), ValueError, "interval as a tuple of 2 numbers"),
        (lambda: clip_x0(c, "0", 1.0), ValueError, "low as a number, got '0'"),
        (lambda: classifier_free(c, u, 2.0, rescale=1.5), ValueError, "rescale"),
        (lambda: clip_x0(c, 1.0, -1.0), ValueError, "low < high"),
        (lambda: dynamic_threshold(c, 0.0), ValueError, "quantile"),
        (lambda: dynamic_threshold(c, 0.9, 0.0), ValueError, "floor"),
        (lambda: add_score(c, 3.0), TypeError, "term as a function"),
        (lambda: classifier_guidance(c, u), TypeError, "log_prob as a function"),
        (lambda: add_term(c, lambda x, t: x, "1"), ValueError, "scale"),
    ]
    for call, error, words in bad:
        with pytest.raises(error, match=words):
            call()
    x = torch.randn(5, 3, dtype=F64)
    calls = [
        (add_term(c, lambda x, t: x), "one number a sample"),
        (add_term(c, lambda x, t: t), "does not depend on x"),
        (add_term(c, lambda x, t: x.detach().sum(1)), "does not depend on x"),
        (add_score(c, lambda x, t: x[:, :1]), "expected the shape of x"),
    ]
    for model, words in calls:
        with pytest.raises(ValueError, match=words):
            model.score(x, 0.5)
    with pytest.raises(ValueError, match="two or more components"):
        classifier_free(*labelled(event=(1,)), 2.0, rescale=0.5).score(x[:, :1], 0.5)
    with pytest.raises(ValueError, match="GaussianSDE"):
        clip_x0(sf.Model(lambda x, t: x, sf.CLD(), "score"))
    assert c.nfe == 0


def test_a_term_at_alpha_zero_is_refused_before_any_call():
    flow = sf.RectifiedFlow()
    model = sf.Model(lambda x, t: x, flow, "velocity")
    guided = add_term(model, lambda x, t: -(x**2).sum(1))
    with pytest.raises(ValueError, match=r"alpha = 0.*t_span"):
        sf.sample(guided, 3, shape=(2,), solver=sf.solvers.Euler(), steps=4)
    assert model.nfe == 0
    assert sf.sample(guided, 3, shape=(2,), solver=sf.solvers.Euler(), steps=4, t_span=(0.99, 0.01)).x.shape == (3, 2)
