"""Models: one table of predictions, time inputs, conditions, counting, and what is refused."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.problems import GaussianMixture
from tests.exact import F64, last_time, make, random_mixture

PARTS = ("x0", "eps", "score", "v", "velocity")
SOME = ("VP", "SubVP", "VE", "EDM", "RectifiedFlow", "DiscreteVP(5)", "from_kernel", "from_coefficients")


def middle(process):
    return process.t_min + 0.437 * (last_time(process) - process.t_min)


def parts_by_hand(process, x0, eps, t):
    """Every prediction of x = alpha x0 + sigma eps from its definition; velocity by differences of the path."""
    alpha, sigma = process.alpha(t), process.sigma(t)

    def path(u):
        return process.alpha(u) * x0 + process.sigma(u) * eps

    h = 1e-4 * (process.t1 - process.t0)
    slope = (8 * (path(t + h) - path(t - h)) - (path(t + 2 * h) - path(t - 2 * h))) / (12 * h)
    return {"x0": x0, "eps": eps, "score": -eps / sigma, "v": alpha * eps - sigma * x0, "velocity": slope}


@pytest.mark.parametrize("given", PARTS)
@pytest.mark.parametrize("wanted", PARTS)
@pytest.mark.parametrize("name", SOME)
def test_all_conversions(name, given, wanted):
    process = make(name)
    t = middle(process)
    x0, eps = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    parts = parts_by_hand(process, x0, eps, t)
    x = process.alpha(t) * x0 + process.sigma(t) * eps
    got = sf.Model(lambda x, t: parts[given], process, given)(x, t, as_=wanted)
    scale = float(parts[wanted].abs().max())
    torch.testing.assert_close(got, parts[wanted], rtol=1e-8, atol=1e-8 * scale)


def test_the_shorthands():
    process = sf.VP()
    x = torch.randn(4, 3, dtype=F64)
    model = sf.Model(lambda x, t: torch.sin(x), process)
    assert torch.equal(model.eps(x, 0.3), torch.sin(x))
    assert torch.equal(model.score(x, 0.3), model(x, 0.3, as_="score"))
    assert torch.equal(model(x, 0.3), model.score(x, 0.3))
    assert torch.equal(model.x0(x, 0.3), model(x, 0.3, as_="x0"))


@pytest.mark.parametrize("given", PARTS)
def test_times_per_sample_convert_sample_by_sample(given):
    process = sf.VP()
    model = sf.Model(lambda x, t: torch.cos(x), process, given)
    x, t = torch.randn(5, 2, 2, dtype=F64), torch.linspace(0.1, 0.9, 5, dtype=F64)
    for wanted in PARTS:
        each = torch.cat([model(x[i : i + 1], t[i], wanted) for i in range(5)])
        assert torch.equal(model(x, t, wanted), each)
        assert torch.equal(model(x, t.reshape(5, 1, 1), wanted), each)


def test_predictions_that_are_finite_at_the_ends():
    """v at sigma = 0 and at alpha = 0; the velocity of rectified flow at t = 1."""
    x = torch.randn(3, 2, dtype=F64)
    model = sf.Model(lambda x, t: x, sf.RectifiedFlow(), "v")
    torch.testing.assert_close(model.x0(x, 1.0), -x)
    torch.testing.assert_close(model(x, 1.0, "velocity"), 2 * x)
    model = sf.Model(lambda x, t: x, sf.VP(), "v")
    torch.testing.assert_close(model.x0(x, 0.0), x)
    model = sf.Model(lambda x, t: 0.5 * x, sf.RectifiedFlow(), "velocity")
    torch.testing.assert_close(model.x0(x, 1.0), 0.5 * x)
    torch.testing.assert_close(model.x0(x, 0.0), x)


ENDS = (sf.RectifiedFlow(), sf.DiscreteVP(torch.linspace(0.02, 0.4, 8), zero_terminal_snr=True))


@pytest.mark.parametrize("process", ENDS, ids=repr)
def test_noise_and_score_determine_each_other_where_alpha_is_0(process):
    x, t = torch.ones(2, 3, dtype=F64), process.t1
    assert float(process.alpha(t)) == 0 < float(process.sigma(t))
    sigma = float(process.sigma(t))
    by_noise, by_score = (sf.Model(lambda x, t: 3 * x, process, name) for name in ("eps", "score"))
    assert torch.equal(by_noise.score(x, t), -3 * x / sigma)
    assert torch.equal(by_score.eps(x, t), -3 * x * sigma)
    times = torch.tensor([0.4, t], dtype=F64)  # the other sample keeps what it has alone
    assert torch.equal(by_noise.score(x, times)[:1], by_noise.score(x[:1], 0.4))
    assert torch.equal(by_noise.score(x, times)[1:], -3 * x[1:] / sigma)
    assert not by_noise.x0(x, t).isfinite().any()  # nothing of the data is left


# ---- what the network is told about the time


def told(process, t, **options):
    """The time tensor that a network receives."""
    seen = []

    def net(x, time):
        seen.append(time)
        return x

    model = sf.Model(net, process, **options)
    model(torch.zeros(4, 2, dtype=torch.float32), t)
    return seen[0]


def test_time_inputs():
    edm, ve = sf.EDM(), sf.VE()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    table = sf.DiscreteVP(betas)
    assert torch.equal(told(sf.VP(), 0.3), torch.full((4,), 0.3))
    assert torch.equal(told(edm, 3.0, time="sigma"), torch.full((4,), 3.0))
    torch.testing.assert_close(told(ve, 0.5, time="sigma"), torch.full((4,), math.sqrt(0.01 * 50.0)))
    torch.testing.assert_close(told(edm, 3.0, time="lam"), torch.full((4,), -math.log(3.0)))
    torch.testing.assert_close(told(sf.VP(), 0.3, time=lambda t: 999 * t), torch.full((4,), 299.7))
    for n in (0, 1, 499, 999):
        assert torch.equal(told(table, (n + 1) / 1000, time="discrete").round(), torch.full((4,), float(n)))
        torch.testing.assert_close(
            told(table, (n + 1) / 1000, time="discrete"), torch.full((4,), float(n)), rtol=0, atol=1e-4
        )


def test_times_per_sample_reach_the_network():
    t = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    assert torch.equal(told(sf.VP(), t), t.to(torch.float32))
    torch.testing.assert_close(told(sf.VP(), t, time=lambda t: 10 * t), (10 * t).to(torch.float32))


def test_the_exact_time_for_closed_forms():
    assert told(sf.VP(), 0.3, expand=False).dtype == F64
    assert told(sf.VP(), 0.3, expand=False).shape == ()
    assert told(sf.VP(), torch.rand(4, dtype=F64), expand=False).shape == (4, 1)


@pytest.mark.parametrize("time", [None, "lam", lambda t: 999 * t])
@pytest.mark.parametrize("expand", [True, False])
def test_a_plan_tells_the_network_the_same_time(time, expand):
    """Evaluations from a plan's table, against single calls."""
    process = sf.VP()

    def net(x, t):
        return x * (t[:, None] if expand else t) + 1

    model = sf.Model(net, process, "eps", time, expand=expand)
    times = torch.tensor([0.9, 0.5, 0.11], dtype=F64)
    x = torch.randn(4, 2, dtype=F64)
    for part in ("x0", "eps", "score", "drift"):
        evaluate = process.probability_flow(model).evaluator(part, times)
        for k, t in enumerate(times):
            want = model(x, t, "velocity" if part == "drift" else part)
            torch.testing.assert_close(evaluate(k, x), want, rtol=1e-12, atol=1e-12)


# ---- conditions


class Conditioned(torch.nn.Module):
    def forward(self, x, t, label=None, scale=1.0):
        return scale * x + (0 if label is None else label[:, None])


def test_bound_conditions_reach_the_network():
    model = sf.Model(Conditioned(), sf.VP())
    x = torch.zeros(3, 2)
    label = torch.tensor([1.0, 2.0, 3.0])
    bound = model.bind(label=label)
    assert torch.equal(bound.eps(x, 0.5), label[:, None].expand(3, 2))
    assert torch.equal(model.eps(x, 0.5), x)
    assert torch.equal(bound.bind(scale=2.0).eps(x + 1, 0.5), 2 + label[:, None].expand(3, 2))
    assert torch.equal(bound.bind(label=-label).eps(x, 0.5), -label[:, None].expand(3, 2))


def test_taken_rows_keep_their_conditions():
    bound = sf.Model(Conditioned(), sf.VP()).bind(label=torch.tensor([1.0, 2.0, 3.0]), scale=2.0)
    part = bound.take(torch.tensor([2, 0]))
    assert torch.equal(part.eps(torch.zeros(2, 1), 0.5), torch.tensor([[3.0], [1.0]]))
    assert torch.equal(bound.eps(torch.zeros(3, 1), 0.5), torch.tensor([[1.0], [2.0], [3.0]]))


def test_an_unknown_condition_is_refused():
    model = sf.Model(Conditioned(), sf.VP())
    with pytest.raises(TypeError, match="does not take lable"):
        model.bind(lable=torch.zeros(3))
    anything = sf.Model(lambda x, t, **conditions: x, sf.VP())
    assert anything.bind(whatever=1).conditions == {"whatever": 1}


def test_conditions_of_another_batch_are_refused_before_any_call():
    model = sf.Model(Conditioned(), sf.VP()).bind(label=torch.zeros(4))
    with pytest.raises(ValueError, match=r"one row a sample, \(3, ...\), got \(4,\)"):
        sf.solve(sf.VP().probability_flow(model), torch.zeros(3, 2), sf.solvers.Euler(), steps=3)
    assert model.nfe == 0


# ---- counting


def test_calls_are_counted_across_copies():
    model = sf.Model(Conditioned(), sf.VP())
    x = torch.zeros(3, 2)
    assert model.nfe == 0
    model.score(x, 0.5)
    bound = model.bind(label=torch.zeros(3))
    bound.x0(x, 0.5)
    bound.take(torch.tensor([0])).eps(x[:1], 0.5)
    assert model.nfe == bound.nfe == 3


@pytest.mark.parametrize("solver", [sf.solvers.Heun(), sf.solvers.DPMSolverPP(2)], ids=lambda s: s.name)
def test_a_solve_counts_what_the_network_saw(solver):
    calls = []

    def net(x, t):
        calls.append(1)
        return x

    model = sf.Model(net, sf.VP())
    solution = sf.solve(sf.VP().probability_flow(model), torch.zeros(3, 2), solver, steps=7)
    assert len(calls) == model.nfe == solution.stats.nfe == solution.stats.calls


# ---- custom processes


class Custom(sf.SDE):
    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        return torch.ones_like(x)


def test_a_score_callable_is_a_model_of_any_process():
    seen = []

    def score(x, t):
        seen.append(t)
        return -x

    x = torch.randn(3, 2, dtype=F64)
    for process in (Custom(), sf.VP()):
        reverse = process.reverse(score)
        assert reverse.model.prediction == "score"
        assert torch.equal(reverse.model.score(x, 0.4), -x)
        assert seen[-1].dtype == F64
        assert seen[-1].ndim == 0
        assert reverse.model.nfe == 1
    model = sf.Model(score, Custom(), "score")
    with pytest.raises(ValueError, match="made for"):
        Custom().reverse(model)


def test_a_custom_process_has_only_a_score():
    with pytest.raises(ValueError, match="needs alpha and sigma"):
        sf.Model(lambda x, t: x, Custom(), "eps")
    model = sf.Model(lambda x, t: x, Custom(), "score")
    with pytest.raises(ValueError, match="has only a score"):
        model.x0(torch.zeros(2, 1), 0.5)


def test_dtypes():
    """The network's output is given back in the dtype of x."""
    model = GaussianMixture(*random_mixture(3, 2, 0)).model(sf.VP())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert model.score(torch.zeros(3, 2, dtype=dtype), 0.5).dtype == dtype
    double = sf.Model(lambda x, t: x.to(F64), sf.VP())
    assert double.score(torch.zeros(3, 2), 0.5).dtype == torch.float32


# ---- errors


@pytest.mark.parametrize("got", [(3, 1), (3,), (1, 2), (4, 2), (3, 2, 1)])
def test_an_output_of_another_shape_is_refused(got):
    """Also the shapes that would broadcast in silence."""
    model = sf.Model(lambda x, t: torch.zeros(got), sf.VP())
    with pytest.raises(ValueError, match=r"the model returned \(.*\) for x of shape \(3, 2\)"):
        model.score(torch.zeros(3, 2), 0.5)
    with pytest.raises(ValueError, match="the model returned"):
        sf.solve(sf.VP().probability_flow(model), torch.zeros(3, 2), sf.solvers.DDIM(), steps=2)


def model_of_vp(prediction="eps", net=lambda x, t: x, **options):
    return sf.Model(net, sf.VP(), prediction, **options)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: model_of_vp("noise"), ValueError, "unknown prediction 'noise': expected one of x0"),
        (lambda: model_of_vp()(torch.zeros(2, 1), 0.5, "noise"), ValueError, "unknown prediction"),
        (lambda: model_of_vp(net=3), TypeError, "callable"),
        (lambda: sf.Model(lambda x, t: x, "VP"), TypeError, "expected sde to be an SDE, got str"),
        (lambda: model_of_vp(time="discrete"), ValueError, "needs a DiscreteVP"),
        (lambda: sf.Model(lambda x, t: x, Custom(), "score", time="sigma"), ValueError, "needs a GaussianSDE"),
        (lambda: model_of_vp(time="log"), ValueError, "expected time to be None"),
        (lambda: model_of_vp().score(torch.zeros(2, 1), torch.zeros(3)), ValueError, r"times of shape \(3,\)"),
        (lambda: model_of_vp(net=lambda x, t: None).score(torch.zeros(2, 1), 0.5), ValueError, "returned NoneType"),
    ],
)  # fmt: skip
def test_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()
