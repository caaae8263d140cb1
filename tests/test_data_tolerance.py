"""`GaussianSplit` to a tolerance: what rtol promises of x at t = 0, what it costs, and how its march behaves."""

import math

import pytest
import torch
from exact import F64, slope

import sdeflow as sf
from benchmarks import data_tolerance as bench
from sdeflow.metrics import trajectory_error
from sdeflow.problems import EightGaussians, Gaussian, TwoMoons
from sdeflow.solution import Status
from sdeflow.solvers import RK45, GaussianSplit, split_march

VP = sf.VP()
DATA = {"two moons": TwoMoons, "mixture 8-D": bench.mixture_8d, "power law 48-D": bench.power_law}


@pytest.fixture(scope="module")
def cases():
    return {name: bench.case(make(), VP, 64) for name, make in DATA.items()}


def run(at, tolerance, **options):
    with torch.no_grad():
        return sf.solve(at.flow, at.x, GaussianSplit(3, mean=at.mean, variance=at.variance), rtol=tolerance, **options)


def ratios(at, tolerance, **options):
    return at.errors(run(at, tolerance, **options).x) / (tolerance * (1 + math.sqrt(at.variance)))


# ---- the tolerance is the error at t = 0


@pytest.mark.parametrize("tolerance", bench.TOLERANCES)
@pytest.mark.parametrize("name", list(DATA))
def test_the_median_error_is_a_tenth_to_all_of_the_tolerance(cases, name, tolerance):
    ratio = ratios(cases[name], tolerance)
    assert 0.1 <= float(ratio.median()) <= 1
    assert float((ratio > 3).to(F64).mean()) <= 0.1


def test_an_estimate_that_is_not_whitened_is_not_the_error_of_the_data(cases, monkeypatch):
    """Errors of x/alpha as they are when they are made: those at high noise, which shrink, are taken for errors."""
    at = cases["two moons"]
    whitened = split_march.SplitMarch._size

    def as_made(march, coefficient, weight):
        noise = march._unit / torch.expm1(march._c)
        return whitened(march, coefficient, weight) * torch.sqrt(1 + noise**2 / march._unit**2)

    sound = [float(ratios(at, tol).median()) for tol in bench.TOLERANCES]
    monkeypatch.setattr(split_march.SplitMarch, "_size", as_made)
    raw = [float(ratios(at, tol).median()) for tol in bench.TOLERANCES]
    assert min(sound) >= 0.1
    assert min(raw) < 0.1


def test_work_follows_the_order(cases):
    """Calls grow like tolerance^(-1/(order + 1)): the estimate is the error of the predictor."""
    at, tolerances = cases["mixture 8-D"], [1e-4, 1e-5, 1e-6, 1e-7, 1e-8]
    for order, low, high in ((1, 0.4, 0.55), (3, 0.2, 0.3)):
        solver = GaussianSplit(order, mean=at.mean, variance=at.variance)
        tried = tolerances[:3] if order == 1 else tolerances
        with torch.no_grad():
            calls = [float(sf.solve(at.flow, at.x, solver, rtol=tol).stats.nfe.to(F64).mean()) for tol in tried]
        assert low < -slope(tried, calls) < high


def test_rtol_is_relative_to_the_data_and_atol_is_not(cases):
    at = cases["mixture 8-D"]
    scale = math.sqrt(at.variance)
    one, other = (run(at, r, atol=a) for r, a in ((1e-3, 0.0), (0.0, 1e-3 * scale)))
    assert torch.equal(one.x, other.x)
    both = run(at, 1e-3)
    assert torch.equal(both.x, run(at, 1e-3, atol=1e-3).x)
    assert float(both.stats.nfe.to(F64).mean()) < float(one.stats.nfe.to(F64).mean())


def test_it_takes_fewer_calls_than_runge_kutta_for_the_same_error(cases):
    at = cases["power law 48-D"]
    found = run(at, 1e-3)
    with torch.no_grad():
        other = sf.solve(at.flow, at.x, RK45(), rtol=1e-3)
    assert float(at.errors(found.x).median()) < 1.5e-3
    assert 1.8 * float(found.stats.nfe.to(F64).mean()) < float(other.stats.nfe.to(F64).mean())


@pytest.mark.parametrize("process", [sf.EDM(), sf.VE(), sf.RectifiedFlow(), sf.CosineVP()], ids=repr)
def test_other_processes(process):
    at = bench.case(TwoMoons(), process, 32)
    assert 0.05 <= float(ratios(at, 1e-3).median()) <= 1


def test_diagonal_and_full_covariances():
    data = bench.power_law()
    at = bench.case(data, VP, 32)
    diagonal = torch.diagonal(data.covariance)
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    turned = sf.problems.GaussianMixture(
        data.means @ turn.T, (turn @ torch.diag(data.variances[0]) @ turn.T).expand(20, 48, 48)
    )
    with torch.no_grad():
        one = sf.solve(at.flow, at.x, GaussianSplit(3, mean=data.mean, variance=diagonal), rtol=1e-3)
        flow = VP.probability_flow(turned.model(VP))
        solver = GaussianSplit(3, mean=turned.mean, variance=turn @ torch.diag(diagonal) @ turn.T)
        other = sf.solve(flow, at.x @ turn.T, solver, rtol=1e-3)
    scalar = run(at, 1e-3)
    ratio = at.errors(one.x) / (1e-3 * (1 + math.sqrt(float(diagonal.mean()))))
    assert float(ratio.median()) <= 1
    assert float(one.stats.nfe.to(F64).mean()) < float(scalar.stats.nfe.to(F64).mean())
    torch.testing.assert_close(other.x, one.x @ turn.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("end", [1e-3, 0.0], ids=["t_min", "sigma 0"])
def test_a_covariance_that_misses_directions_of_the_data(cases, end):
    at = cases["mixture 8-D"]
    values, axes = torch.linalg.eigh(bench.mixture_8d().covariance)
    covariance = axes[:, -3:] @ torch.diag(values[-3:]) @ axes[:, -3:].T
    with torch.no_grad():
        found = sf.solve(at.flow, at.x, GaussianSplit(mean=at.mean, variance=covariance), rtol=1e-3, t_span=(1.0, end))
        exact = sf.solve(at.flow, at.x, RK45(), rtol=1e-9, t_span=(1.0, end or 1e-8))
    assert float((found.x - exact.x).square().mean(1).sqrt().median()) < 2.5e-3


# ---- Gaussian data, ends, saved times


@pytest.mark.parametrize("end", [None, 0.0], ids=["t_min", "sigma 0"])
@pytest.mark.parametrize("process", [VP, sf.EDM(), sf.RectifiedFlow()], ids=repr)
def test_gaussian_data_are_exact_at_any_tolerance(process, end):
    mean, std = torch.tensor([1.0, -2.0], dtype=F64), 0.7
    flow = process.probability_flow(Gaussian(mean, std**2).model(process))
    x = process.prior_sample((16, 2), seed=0, dtype=F64)
    last = process.t_min if end is None else end
    found = sf.solve(flow, x, GaussianSplit(mean=mean, variance=std**2), rtol=0.5, t_span=(process.t1, last))
    (a0, a1), (s0, s1) = ([float(f(t)) for t in (process.t1, last)] for f in (process.alpha, process.sigma))
    exact = a1 * mean + (x - a0 * mean) * math.sqrt((a1**2 * std**2 + s1**2) / (a0**2 * std**2 + s0**2))
    torch.testing.assert_close(found.x, exact, rtol=0, atol=1e-10)
    assert int(found.stats.nfe.max()) <= 6
    assert int(found.stats.rejected.max()) == 0


def test_the_step_to_no_noise_at_all(cases):
    at = cases["two moons"]
    close = sf.solve(at.flow, at.x, GaussianSplit(4, mean=at.mean, variance=at.variance), rtol=1e-9, t_span=(1.0, 1e-9))
    for tolerance in (1e-2, 1e-4):
        ratio = trajectory_error(run(at, tolerance, t_span=(1.0, 0.0)).x, close.x).per_sample / tolerance
        assert float(ratio.median()) < 1.5


def test_saved_times_are_as_good_as_the_end(cases):
    at, times = cases["mixture 8-D"], [1.0, 0.7, 0.4, 0.1, 0.02, 0.001]
    fine = sf.solve(at.flow, at.x, RK45(), rtol=1e-9, save=times)
    found = run(at, 1e-4, save=times)
    assert found.xs.shape == fine.xs.shape
    assert float((found.xs - fine.xs).square().mean(2).sqrt().median(1).values.max()) < 5e-4
    torch.testing.assert_close(found.xs[0], at.x, rtol=0, atol=0)
    torch.testing.assert_close(found.xs[-1], found.x, rtol=0, atol=1e-12)


def test_there_and_back(cases):
    at = cases["two moons"]
    solver = GaussianSplit(3, mean=at.mean, variance=at.variance)
    with torch.no_grad():
        up = sf.solve(at.flow, at.end, solver, rtol=1e-6, t_span=(VP.t_min, VP.t1)).x
    assert float((up - at.x).square().mean(1).sqrt().median()) < 1e-4


# ---- the march


def test_a_sample_does_not_depend_on_its_batch(cases):
    at = cases["power law 48-D"]
    whole = run(at, 1e-3)
    solver = GaussianSplit(3, mean=at.mean, variance=at.variance)
    for rows in ([5], [3, 9, 40], list(range(17, 40))):
        part = sf.solve(at.flow, at.x[rows], solver, rtol=1e-3)
        torch.testing.assert_close(part.x, whole.x[rows], rtol=0, atol=1e-12)
        assert torch.equal(part.stats.nfe, whole.stats.nfe[rows])


def test_calls_are_counted_per_sample():
    data = EightGaussians()
    model = data.model(VP)
    x = VP.prior_sample((64, 2), seed=0, dtype=F64)
    with torch.no_grad():
        found = sf.solve(VP.probability_flow(model), x, GaussianSplit(variance=2.0), rtol=1e-3)
    stats = found.stats
    assert model.nfe == stats.calls == int(stats.nfe.max())
    assert int(stats.nfe.min()) < int(stats.nfe.max())
    assert torch.equal(stats.steps, stats.accepted + stats.rejected)
    # the start is evaluated, and the last step may be predicted only
    assert bool(((stats.nfe == stats.steps) | (stats.nfe == stats.steps + 1)).all())


def test_sampling_in_single_precision():
    data = EightGaussians()
    found = sf.sample(data.model(VP), 32, shape=(2,), solver=GaussianSplit(variance=2.0), rtol=1e-3, seed=0)
    assert found.x.dtype == torch.float32
    exact = sf.sample(data.model(VP), 32, shape=(2,), solver=RK45(), rtol=1e-9, seed=0, dtype=F64)
    assert float((found.x - exact.x).square().mean(1).sqrt().median()) < 2.5e-3
    for state in sf.iterate(VP.probability_flow(data.model(VP)), found.x, GaussianSplit(variance=2.0), rtol=1e-1):
        assert state.x.shape == found.x.shape
        assert state.t.shape == (32,)


def test_one_that_fails_ends_with_a_status_of_its_own():
    exact = EightGaussians().model(VP)

    def broken(x, t):
        v = exact(x, t, as_="v")
        bad = (x[:, :1] > 0) & (torch.as_tensor(t).reshape(-1, 1) < 0.3)
        return torch.where(bad, torch.nan, v)

    flow = VP.probability_flow(sf.Model(broken, VP, "v", expand=False))
    sound = VP.probability_flow(exact)
    x = VP.prior_sample((32, 2), seed=0, dtype=F64)
    with torch.no_grad():
        found = sf.solve(flow, x, GaussianSplit(variance=2.0), rtol=1e-3, throw=False)
        alone = sf.solve(sound, x, GaussianSplit(variance=2.0), rtol=1e-3)
    assert set(found.status.tolist()) == {int(Status.FINISHED), int(Status.NON_FINITE)}
    assert bool(torch.isfinite(found.x).all())
    torch.testing.assert_close(found.x[found.ok], alone.x[found.ok], rtol=0, atol=1e-12)
    limited = sf.solve(sound, x, GaussianSplit(variance=2.0), rtol=1e-3, max_steps=3, throw=False)
    assert set(limited.status.tolist()) == {int(Status.STEP_LIMIT)}
    assert int(limited.stats.steps.max()) == 3


def test_a_model_that_is_never_finite():
    flow = VP.probability_flow(sf.Model(lambda x, t: x * torch.nan, VP, "v", expand=False))
    found = sf.solve(flow, torch.randn(3, 2, dtype=F64), GaussianSplit(), rtol=1e-3, throw=False)
    assert found.status.tolist() == [int(Status.NON_FINITE)] * 3


def test_gradients_flow_through(cases):
    at = cases["two moons"]
    x = at.x[:4].clone().requires_grad_()
    solver = GaussianSplit(3, mean=at.mean, variance=at.variance)
    sf.solve(at.flow, x, solver, rtol=1e-6).x.sum().backward()
    e = 1e-5 * torch.ones_like(at.x[:4])
    with torch.no_grad():
        up, down = (sf.solve(at.flow, at.x[:4] + s * e, solver, rtol=1e-9).x for s in (1, -1))
    torch.testing.assert_close(x.grad.sum(1), (up - down).sum(1) / 2e-5, rtol=1e-2, atol=1e-3)


def test_what_is_refused(cases):
    at = cases["two moons"]
    noisy = VP.reverse(at.flow.model, 1.0)
    with pytest.raises(ValueError, match="probability flow"):
        sf.solve(noisy, at.x, GaussianSplit(), rtol=1e-3)
    with pytest.raises(ValueError, match="variance > 0"):
        sf.solve(at.flow, at.x, GaussianSplit(variance=0.0), rtol=1e-3)
    for solver in (GaussianSplit(corrector=False), GaussianSplit(start="runge-kutta")):
        with pytest.raises(ValueError, match="corrector"):
            sf.solve(at.flow, at.x, solver, rtol=1e-3)
    with pytest.raises(ValueError, match="sigma = 0"):
        sf.solve(at.flow, at.x, GaussianSplit(), rtol=1e-3, t_span=(0.0, 1.0))
    with pytest.raises(ValueError, match="event's shape"):
        sf.solve(at.flow, at.x, GaussianSplit(variance=[1.0, 2.0, 3.0]), rtol=1e-3)
