"""Expectations: intervals that cover, methods that agree, figures that are those of the samples.

Statistical tests have fixed seeds; bands of coverage are those that a binomial of the stated rate leaves with
probability 1e-4, other tolerances are 4 standard errors or more (6e-5).
"""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

import sdeflow as sf
from benchmarks.expectation import band, black_scholes, call_payoff, coverage, coverage_runs, euler_mean, euler_square
from sdeflow.expectation import bias, multilevel, pilot, run
from sdeflow.expectation.allocation import numbers
from sdeflow.expectation.control_variate import Controlled
from sdeflow.expectation.estimate import quantile
from sdeflow.expectation.gaussian_law import _Given, gaussian_law
from sdeflow.expectation.led_noise import Led, leading_nodes
from sdeflow.expectation.plain import Plain
from sdeflow.expectation.simulation import simulation
from sdeflow.expectation.sobol import Replicates, grown, scrambled_normals, skewed_quantile
from sdeflow.expectation.sums import Drawn, Gather, Sums, merge, sums_of
from sdeflow.noise import Noise
from sdeflow.solvers import DPMSolverPP, Euler, EulerMaruyama, Heun, Milstein, ShARK

F64 = torch.float64
ONE = torch.ones(1, dtype=F64)
GBM = sf.GBM(mu=0.5, sigma=0.5)
MIXTURE = sf.problems.GaussianMixture([[-1.0, 0.5], [1.5, 0.0]], [0.1, 0.2], [1, 2])


class Well(sf.SDE):
    def drift(self, x, t):
        return x - x**3

    def diffusion(self, x, t):
        return 0.5 * torch.ones_like(x)


def linear(x):
    return x[:, 0]


def square(x):
    return x[:, 0].square()


def moments(x):
    return torch.stack([x[:, 0], x[:, 0].square()], dim=1)


def euler(functional=square, steps=8, **how):
    return sf.expect(functional, GBM, ONE, EulerMaruyama(), steps=steps, **how)


def simulated(functional=square, problem=GBM, x=ONE, solver=None, **how):
    default = {"shape": None, "steps": 8, "grid": None, "rtol": None, "atol": None, "t_span": None, "eta": 0.0}
    default |= {"save": None, "seed": 0, "dtype": None, "device": None}
    return simulation(functional, problem, x, solver or EulerMaruyama(), **{**default, **how})


# ---- intervals


@pytest.mark.parametrize("method", ["antithetic", "control", "sobol", "multilevel"])
def test_intervals_cover_at_the_stated_rate(method):
    made, exact = coverage_runs()[f"GBM, x^2, 8 Euler steps: {method}"]
    runs = 25 if method in ("antithetic", "multilevel") else 12
    got = coverage(made, exact, runs)
    low, _ = band(runs, failure=2e-4)
    assert got.hits >= low, got


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(coverage_runs()))
def test_intervals_cover_at_the_stated_rate_in_500_runs(name):
    made, exact = coverage_runs()[name]
    got = coverage(made, exact, 500)
    low, high = band(500, failure=2e-4)
    assert low <= got.hits, got
    if "exact law" not in name:  # those hold a bound of the bias besides
        assert got.hits <= high, got


def test_an_interval_half_as_wide_is_found_out():
    made, exact = coverage_runs()["GBM, x, 512 samples: plain"]
    runs = 250
    low, high = band(runs, failure=2e-4)
    assert low <= coverage(made, exact, runs).hits <= high
    assert coverage(made, exact, runs, shrink=0.5).hits < low


@pytest.mark.parametrize("method", ["plain", "antithetic", "control", "sobol", "multilevel"])
def test_every_method_finds_the_exact_moments_of_the_steps(method):
    found = euler(moments, tol=0.03, method=method, seed=5)
    exact = torch.tensor([euler_mean(8), euler_square(8)], dtype=F64)
    assert ((found.mean - exact).abs() <= 4.5 * found.stderr).all()
    assert found.converged
    assert found.half_width <= 0.03
    assert found.method == method
    assert found.mean.shape == found.interval[0].shape == (2,)
    # the bar is not idle: another step size's moments are far off
    wrong = torch.tensor([euler_mean(8), euler_square(2)], dtype=F64)
    assert not ((found.mean - wrong).abs() <= 4.5 * found.stderr).all()


def test_multilevel_controls_the_bias_of_the_steps():
    found = sf.expect(call_payoff, GBM, ONE, Milstein(), tol=0.01)
    exact = black_scholes()
    assert abs(float(found.mean) - exact) <= found.half_width <= 0.01
    alpha, beta = found.rates
    assert 0.7 < alpha < 1.4
    assert 1.6 < beta < 2.4
    assert 0 < float(found.bias) <= 0.0025
    # at the coarsest level's steps alone the answer is elsewhere
    coarse = sf.expect(call_payoff, GBM, ONE, Milstein(), steps=2, tol=0.01, method="plain")
    assert not coarse.interval[0] <= exact <= coarse.interval[1]


def test_the_bound_of_a_bias_is_that_of_the_slowest_order_left_possible():
    level = torch.arange(1, 7, dtype=F64)[:, None]

    def bound(alpha, error, beta=1.0, levels=level):
        means = 0.3 * 2 ** (-alpha * levels)
        missing = float(means[-1]) / (2**alpha - 1)
        return float(bias.bias_bound(means, error * torch.ones_like(means), beta)) / missing

    for alpha in (0.5, 0.7, 1.0):  # seen clearly: hardly more than what is missing
        assert 1.0 <= bound(alpha, 1e-9) < 1.35
    assert bound(2.0, 1e-9) == pytest.approx(6.0, rel=0.01)  # held at order 1, from the difference before the last
    # not seen: order 1/2, unless variances that fall fast rule it out
    assert bound(1.0, 0.1, levels=level[-2:]) > 2 * bound(1.0, 0.1, beta=2.5, levels=level[-2:])
    # a last difference that does not fall as the others did
    means = torch.tensor([[0.1], [0.05], [0.025], [0.05]], dtype=F64)
    assert float(bias.bias_bound(means, 1e-6 * torch.ones_like(means), 1.0)) > 0.0499
    order = [bias.weak_order(0.3 * 2 ** (-a * level), 1e-4 * torch.ones_like(level)) for a in (0.5, 1.0, 2.0)]
    assert order == pytest.approx([0.5, 1.0, 2.0], abs=0.03)


def test_a_few_samples_that_do_not_differ_are_not_exact():
    def sums(variance):
        return Sums(128, 0, 128.0, torch.zeros(1, dtype=F64), torch.full((1,), 127 * variance, dtype=F64))

    errors = bias.differences([sums(0.08), sums(0.04), sums(0.0)], 1.0)[1]
    assert errors[:, 0].square().mul(128).tolist() == pytest.approx([0.08, 0.04, 0.02])
    assert bias.fall([0.08, 0.04, 0.0], 8.0) == pytest.approx(1.0)


def test_plain_samples_are_those_of_sample_and_of_simulate():
    model = MIXTURE.model(sf.VP())
    solver = DPMSolverPP(2)
    for eta in (0.0, 1.0):
        found = sf.expect(linear, model, solver=solver, shape=(2,), steps=6, eta=eta, num=300, method="plain", seed=3)
        drawn = linear(sf.sample(model, 300, shape=(2,), solver=solver, steps=6, eta=eta, seed=3).x).to(F64)
        assert float(found.mean) == pytest.approx(float(drawn.mean()), rel=1e-12)
        assert float(found.stderr) == pytest.approx(float(drawn.std() / math.sqrt(300)), rel=1e-12)
        assert found.num == 300
        assert found.nfe == 300 * 6
        assert found.pilot == ()
    path = GBM.simulate(ONE.expand(200, 1), steps=8, seed=3, save=True)
    found = sf.expect(lambda xs, ts: xs.mean(0)[:, 0], GBM, ONE, EulerMaruyama(), steps=8, save=True, num=200,
                      method="plain", seed=3)  # fmt: skip
    assert float(found.mean) == pytest.approx(float(path.xs.mean()), rel=1e-12)


@pytest.mark.parametrize("method", ["plain", "antithetic", "control", "sobol", "multilevel"])
def test_batches_change_nothing_but_rounding(method):
    runs = [euler(moments, tol=0.1, method=method, batch=batch, pilot=256) for batch in (1000, 1 << 14)]
    assert runs[0].num == runs[1].num
    assert torch.allclose(runs[0].mean, runs[1].mean, rtol=1e-11)
    assert torch.allclose(runs[0].stderr, runs[1].stderr, rtol=1e-9)


def test_ranges_are_joined_as_if_they_were_one():
    units = Plain(simulated(moments))
    whole = sums_of(units(0, 100))
    parts = merge(sums_of(units(0, 37)), sums_of(units(37, 100)))
    assert parts.size == whole.size == 100
    assert torch.allclose(parts.mean, whole.mean, rtol=1e-13)
    assert torch.allclose(parts.squares, whole.squares, rtol=1e-12)
    assert torch.allclose(Gather()(units, 0, 100, 7).squares, whole.squares, rtol=1e-12)


# ---- what is chosen


def test_the_pilot_takes_plain_monte_carlo_where_it_wins():
    """An even functional of the flow's normals is the worst case of a pair: both halves say the same."""
    model = sf.problems.Gaussian([0.0], 1.0).model(sf.VP())
    found = sf.expect(lambda x: x[:, 0].square(), model, solver=DPMSolverPP(1), shape=(1,), steps=4, tol=0.5,
                      method="antithetic")  # fmt: skip
    row = found.pilot[1]
    assert row.method == "antithetic"
    assert row.ratio == pytest.approx(0.5, abs=0.1)
    pairs = pilot.Prepared(row)
    plain = pilot.Prepared(found.pilot[0])
    assert pilot.chosen([plain, pairs]) is plain
    good = pilot.Prepared(dataclasses.replace(row, ratio=1.6, low=1.1))
    assert pilot.chosen([plain, good]) is plain  # within the pilot's noise
    good = pilot.Prepared(dataclasses.replace(row, ratio=2.0, low=1.5))
    assert pilot.chosen([plain, good]) is good


def test_what_nothing_helps_is_done_plainly():
    """A fast oscillation of a path's end: no numbers lead it, nothing linear predicts it, coarser steps miss it."""
    found = sf.expect(lambda x: torch.cos(300 * x[:, 0]), Well(), ONE, EulerMaruyama(), steps=16, tol=0.05)
    assert found.method == "plain", str(found)
    assert {row.method for row in found.pilot} == set(run.METHODS)


def test_the_ratio_is_that_of_the_calls_for_the_same_tolerance():
    plain = euler(tol=0.05, method="plain", steps=16)
    for method in ("antithetic", "multilevel"):
        other = euler(tol=0.05, method=method, steps=16, pilot=8192)
        ratio = (plain.nfe - plain.pilot_nfe) / (other.nfe - other.pilot_nfe)
        assert other.pilot[1].ratio == pytest.approx(ratio, rel=0.35)


def test_numbers_of_samples_are_the_cheapest_for_a_variance():
    variances, costs = [torch.tensor([4.0, 1.0]), torch.tensor([0.25, 1.0])], [1.0, 4.0]
    got = numbers(variances, costs, 1e-4)
    # by hand: component 0 has sqrt(V C) = 2, 1; N = sqrt(V/C) 3/1e-4 = 60000, 7500; component 1 has 1, 2
    assert got == [60000, 15000]


# ---- antithetic, Sobol, control


def test_pairs_cancel_an_odd_functional_of_a_linear_problem():
    model = sf.problems.Gaussian([0.3], 0.5).model(sf.VP())
    found = sf.expect(linear, model, solver=DPMSolverPP(2), shape=(1,), steps=8, num=64, method="antithetic", dtype=F64)
    assert float(found.stderr) < 1e-12
    alone = sf.expect(linear, model, solver=DPMSolverPP(2), shape=(1,), steps=8, num=64, method="plain", dtype=F64)
    assert float(alone.stderr) > 0.01


@pytest.mark.parametrize("count", [1, 2, 3, 6, 8, 12])
@pytest.mark.parametrize("areas", [False, True])
def test_the_leading_numbers_are_those_of_the_tree(count, areas):
    nodes = leading_nodes(count, 1000, areas)
    assert len(set(nodes)) == len(nodes) == count + areas
    times = torch.linspace(0, 2, count + 1, dtype=F64)
    led = torch.full((5, len(nodes)), 0.7, dtype=F64)
    source = Led(0, torch.zeros(5, 0, dtype=F64), None, led)

    def path(source):
        walk = source.bind(5, None, "cpu").walk(times, (1,), F64, areas=areas)
        return torch.stack([walk(k).w.clone() for k in range(count)])

    assert torch.allclose(path(source).sum(0), torch.full((5, 1), 0.7 * math.sqrt(2), dtype=F64))
    if not areas:  # all numbers are led: no noise is left, and 0 everywhere is no path at all
        assert torch.equal(path(dataclasses.replace(source, path=0 * led)), torch.zeros(count, 5, 1, dtype=F64))
    for k in range(len(nodes) if count > 1 else 1):  # each is used; H of the span only where it is split
        other = led.clone()
        other[:, k] += 1
        assert not torch.allclose(path(dataclasses.replace(source, path=other)), path(source))


@pytest.mark.parametrize("areas", [False, True])
def test_a_path_whose_leading_numbers_are_normal_is_brownian(areas):
    n, times = 40_000, torch.linspace(0, 1, 7, dtype=F64)
    z = Noise(7, n).normal(3, 0, (4,), F64)
    walk = Led(0, z[:, :0], None, z).bind(n, None, "cpu").walk(times, (1,), F64, areas=areas)
    w = torch.stack([walk(k).w[:, 0].clone() for k in range(6)], dim=1)
    error = 6 * (w.T @ w) / n - torch.eye(6, dtype=F64)
    assert error.abs().max() < 5 * math.sqrt(2 / n)
    assert not torch.allclose(w, torch.stack([Noise(0, n).walk(times, (1,), F64)(k).w[:, 0] for k in range(6)], dim=1))


def test_directions_of_the_start_are_led_and_the_rest_is_kept():
    axes = torch.linalg.qr(Noise(0, 5).normal(3, 0, (2,), F64))[0]
    led = Noise(1, 9).normal(3, 0, (2,), F64)
    own = Noise(4, 9).normal(1, 0, (5,), F64)
    got = Led(4, led, axes, led[:, :0]).bind(9, None, "cpu").normal(1, 0, (5,), F64)
    assert torch.allclose(got @ axes, led)
    rest = torch.eye(5, dtype=F64) - axes @ axes.T
    assert torch.allclose(got @ rest, own @ rest)


def test_points_are_the_same_wherever_they_are_computed():
    whole = scrambled_normals(3, 5, 7, 0, 64)
    assert torch.equal(whole[24:40], scrambled_normals(3, 5, 7, 24, 16))
    assert not torch.equal(whole, scrambled_normals(3, 6, 7, 0, 64))
    assert not torch.equal(whole, scrambled_normals(4, 5, 7, 0, 64))
    # of 64 points each 64th of each axis holds one
    cells = (torch.special.ndtr(whole) * 64).floor().sort(dim=0).values
    assert torch.equal(cells, torch.arange(64, dtype=F64)[:, None].expand(64, 7))
    units = Replicates(simulated(moments), 32, 0, 8)
    both = units(0, 4)
    assert torch.allclose(units(2, 4).values, both.values[2:], rtol=1e-12)
    assert torch.allclose(dataclasses.replace(units, batch=50)(0, 4).values, both.values, rtol=1e-12)


def test_points_grow_as_the_variance_wants():
    assert grown(64, 1.0, 2.0, 2.0) == 64
    assert grown(64, 1.0, 2.0, 1.2 / 4) == 256  # at the rate of Monte Carlo
    assert grown(64, 1.0, 8.0, 1.2 / 4) == 128  # n^-3, held at n^-2


def test_quantiles_of_few_skewed_replicates_are_longer():
    """Means of 32 lognormals: Student's interval misses more often than it should, the widened one does not."""
    values = torch.exp(Noise(0, 32).normal(3, 0, (4000,), F64))  # lognormal, 4000 times
    t = float(quantile(0.95, torch.tensor([31.0], dtype=F64)))
    gap = (values.mean(0) - math.exp(0.5)).abs() / (values.std(0) / math.sqrt(32))
    hits, students = (int((gap <= q).sum()) for q in (skewed_quantile(0.95, values), t))
    assert students < 0.89 * 4000
    assert hits > students + 0.03 * 4000
    flat = torch.linspace(-1, 1, 32, dtype=F64)[:, None]
    assert float(skewed_quantile(0.95, flat)) == pytest.approx(t, rel=1e-4)


def test_sobol_points_gain_more_the_more_there_are():
    errors = [float(euler(call_payoff, num=32 * n, method="sobol", pilot=256).stderr) for n in (32, 512)]
    assert errors[1] < errors[0] / 8  # Monte Carlo: by 4


def test_the_law_of_a_gaussian_map_is_that_of_its_steps():
    data = sf.problems.Gaussian([0.5, -0.2], [[0.5, 0.2], [0.2, 0.3]])
    reverse = data.model(sf.VP()).gaussian.reverse(data.model(sf.VP()), 1.0)
    made = simulated(moments, reverse, None, EulerMaruyama(), shape=(2,), dtype=F64)
    law = gaussian_law(made)
    runs = made.solution(torch.arange(40_000)).x
    error = law.factor @ law.factor.T - torch.cov(runs.T)
    assert error.abs().max() < 5 * 2 * 0.5 / math.sqrt(40_000)
    assert torch.allclose(law.mean, runs.mean(0), atol=5 / math.sqrt(40_000))
    exact = data.covariance
    assert (law.factor @ law.factor.T - exact).abs().max() > 0.02  # eight Euler steps are not exact: the law knows
    drawn = law(0, 40_000)
    assert drawn.calls == 0
    assert torch.allclose(drawn.values.mean(0), moments(runs).mean(0), atol=0.03)


def test_the_normals_of_an_area_have_its_variance():
    walk = _Given(torch.ones(1, 6, dtype=F64)).bind(1, None, "cpu")
    walk = walk.walk(torch.tensor([0.0, 0.5, 2.0], dtype=F64), (1,), F64, areas=True)
    assert float(walk(1).w) == pytest.approx(math.sqrt(1.5))
    assert float(walk(1).h) == pytest.approx(math.sqrt(1.5 / 12))


def test_a_solve_that_is_not_affine_has_no_law():
    assert gaussian_law(simulated(problem=Well())) is None
    assert gaussian_law(simulated(problem=GBM, solver=Milstein())) is None
    assert gaussian_law(simulated(problem=GBM)) is None


def test_the_control_explains_a_gaussian_problem_wholly():
    data = sf.problems.Gaussian([0.5, -0.2], [[0.5, 0.2], [0.2, 0.3]])
    model = data.model(sf.VP())
    how = {"solver": DPMSolverPP(2), "shape": (2,), "steps": 8, "tol": 0.01, "dtype": F64}
    found = sf.expect(square, model, method="control", **how)
    assert found.pilot[1].ratio > 10
    assert found.pilot[1].note == "its mean from its exact law"
    plain = sf.expect(square, model, method="plain", seed=1, **how)
    error = math.hypot(float(found.stderr), float(plain.stderr))
    assert abs(float(found.mean) - float(plain.mean)) < 4.5 * error
    assert found.nfe < plain.nfe / 3


def test_a_mean_of_the_control_that_is_wrong_is_refused_or_found_out():
    exact = euler_mean(8) ** 2 + euler_square(8) - euler_mean(8) ** 2
    how = {"control": GBM, "tol": 0.05, "method": "control"}
    found = euler(lambda x: square(x), control_mean=euler_square(8), **how)
    assert float(found.stderr) < 1e-10
    assert float(found.mean) == pytest.approx(exact)
    with pytest.raises(ValueError, match="not that of the control"):
        euler(control_mean=1.3 * exact, **how)
    # where the pilot cannot tell, the mean is off by slope times the error, and intervals do not cover
    other = sf.GBM(mu=0.4, sigma=0.5)
    own = (1 + 0.8 / 8 + 0.16 / 64 + 0.25 / 8) ** 8

    def runs(shift):
        def made(seed):
            return euler(control=other, control_mean=own + shift, tol=0.05, method="control", seed=seed, pilot=256)

        return coverage(made, euler_square(8), 30).hits

    low, _ = band(30, failure=2e-4)
    assert runs(0.0) >= low
    assert runs(0.2) < low


def test_a_control_with_noise_of_its_own_explains_nothing():
    """The negative control of coupling: another seed in the control's noise."""
    made = simulated(call_payoff)
    same = Controlled(made, made.of(sf.GBM(mu=0.4, sigma=0.5)), torch.ones(1, dtype=F64), 1.0)
    other = dataclasses.replace(same, control=dataclasses.replace(same.control, seed=1))
    spread = float(Plain(made)(0, 2000).values.var())
    assert float(same(0, 2000).values.var()) < 0.05 * spread
    assert float(other(0, 2000).values.var()) > spread


# ---- multilevel


def test_the_solves_of_a_level_see_one_path():
    made = simulated(call_payoff)
    fine, coarse = made.at(EulerMaruyama(), 32), made.at(EulerMaruyama(), 16)
    coupled = multilevel.Difference(fine, coarse)(0, 2000).values.var()
    apart = multilevel.Difference(fine, dataclasses.replace(coarse, seed=1))(0, 2000).values.var()
    alone = Plain(fine)(0, 2000).values.var()
    assert coupled < 0.03 * alone
    assert apart > 1.5 * alone


def test_levels_with_noise_of_their_own_are_not_taken(monkeypatch):
    """With independent noise a sum of levels costs more than plain Monte Carlo, and the pilot says so."""
    good = euler(call_payoff, steps=32, tol=0.05, method="multilevel").pilot[1]
    assert good.low > 1.2
    at = run.Simulation.at
    monkeypatch.setattr(run.Simulation, "at", lambda self, solver, n: dataclasses.replace(at(self, solver, n), seed=n))
    bad = euler(call_payoff, steps=32, tol=0.05, method="multilevel").pilot[1]
    assert bad.ratio < 1


def test_levels_of_solvers():
    model = MIXTURE.model(sf.VP())
    levels = [(DPMSolverPP(1), 4), (DPMSolverPP(2), 8), (DPMSolverPP(2), 16)]
    how = {"solver": DPMSolverPP(2), "shape": (2,), "dtype": F64}
    found = sf.expect(square, model, levels=levels, tol=0.02, method="multilevel", **how)
    plain = sf.expect(square, model, steps=16, tol=0.02, method="plain", seed=1, **how)
    error = math.hypot(float(found.stderr), float(plain.stderr))
    assert abs(float(found.mean) - float(plain.mean)) < 4.5 * error
    assert found.levels[-1].name == "16 - 8 steps"


def test_halved_steps():
    assert multilevel.halved(24, 2) == [3, 6, 12, 24]
    assert multilevel.halved(24, 6) == [6, 12, 24]
    assert multilevel.halved(7, 2) == [7]


# ---- failures


class Fragile(sf.ODE):
    def drift(self, x, t):
        return torch.where(x > 1.5, torch.inf, -x)


@pytest.mark.parametrize("method", ["plain", "antithetic", "sobol"])
def test_failed_samples_are_an_error_or_a_number(method):
    how = {"shape": (1,), "steps": 4, "num": 512, "method": method, "pilot": 256}
    with pytest.raises(ArithmeticError, match=r"\d+ of \d+ samples .* failed"):
        sf.expect(linear, Fragile(), lambda z: z, Euler(), **how)
    found = sf.expect(linear, Fragile(), lambda z: z, Euler(), throw=False, **how)
    assert found.failed / 512 == pytest.approx(0.0668, abs=5 * math.sqrt(0.0668 / 512))  # P(z > 1.5)
    # what is left: z below 1.5, shrunk by (1 - 1/4)^4
    density = math.exp(-1.125) / math.sqrt(2 * math.pi)
    assert float(found.mean) == pytest.approx(0.75**4 * -density / 0.9332, abs=4 * float(found.stderr))
    assert "failed and are left out" in str(found)


@pytest.mark.parametrize("method", ["sobol", "antithetic", "control", "multilevel", "auto"])
def test_the_mean_over_what_did_not_fail_is_the_same_by_every_method(method):
    """Pairs, differences and levels would leave out samples that finished beside one that failed."""

    def low(x):
        return torch.where(x[:, 0] > 3, torch.nan, x[:, 0])

    how = {"tol": 0.02} if method == "multilevel" else {"num": 4096}
    found = euler(low, throw=False, method=method, pilot=512, **how)
    assert abs(float(found.mean) - 1.48916) < 4 * float(found.stderr) < 0.06  # pairs of them: 1.555, control: 1.520
    assert 0.03 < found.failed / found.num < 0.11
    if method not in ("sobol", "auto"):
        assert found.method == "plain"
        assert "samples failed" in found.pilot[-1].note


def test_samples_that_fail_after_the_pilot_are_left_out_as_well():
    """The pilot's 64 see none of one in a thousand: what was begun by pairs is done plainly, and its calls count."""

    def low(x):
        return torch.where(x[:, 0] > 6.5, torch.nan, x[:, 0])

    for method in ("antithetic", "control", "multilevel"):
        found = euler(low, throw=False, method=method, pilot=64, tol=0.006)
        assert found.failed > 0
        assert found.method == "plain"
        assert "samples failed" in found.pilot[1].note
        assert found.pilot_nfe > 3 * 64 * 8
        with pytest.raises(ArithmeticError, match="failed"):
            euler(low, method=method, pilot=64, tol=0.006)


def test_to_the_exact_law_no_sample_may_fail():
    with pytest.raises(ArithmeticError, match=r"to the exact law: samples failed: .* give steps"):
        euler(lambda x: torch.log(x[:, 0] - 1.0), steps=None, tol=0.1, throw=False, pilot=64)


def test_a_control_that_fails_is_only_not_taken():
    """A Gaussian map of a positive problem is negative at times: its logarithm says nothing of the problem's."""
    found = euler(lambda x: torch.log(x[:, 0]), tol=0.05)
    assert re.match(r"\d+ of 1024 runs of the control failed", found.pilot[3].note)
    with pytest.raises(ValueError, match="runs of the control failed"):
        euler(lambda x: torch.log(x[:, 0]), tol=0.05, method="control")


def test_samples_that_fail_do_not_count_towards_the_number():
    found = euler(lambda x: torch.where(x[:, 0] > 1.3, torch.nan, x[:, 0]), tol=0.02, throw=False, method="plain")
    assert found.failed > found.num / 2
    assert found.converged


def test_a_functional_that_is_not_finite_counts_as_failed():
    with pytest.raises(ArithmeticError, match="not finite"):
        euler(lambda x: torch.log(x[:, 0] - 1.0), num=100, method="plain")
    found = euler(lambda x: torch.log(x[:, 0] - 1.0), num=100, method="plain", throw=False)
    assert 0 < found.failed < 100
    with pytest.raises(ArithmeticError, match="100 of 100"):
        euler(lambda x: x[:, 0] * torch.nan, num=100, method="plain", throw=False)


def test_a_budget_ends_it_with_an_honest_interval():
    for method in ("plain", "antithetic", "control", "sobol", "multilevel"):
        found = euler(tol=1e-4, max_num=4096, method=method, pilot=256)
        assert not found.converged
        assert found.half_width > 1e-4
        assert found.num <= 8192
        assert abs(float(found.mean) - euler_square(8)) < 6 * float(found.stderr)
        assert "not converged" in str(found)


# ---- arguments


def test_noise_to_a_tolerance_and_flows_to_a_tolerance():
    found = sf.expect(linear, Well(), 0 * ONE, ShARK(), rtol=1e-2, num=200, method="antithetic")
    assert abs(float(found.mean)) < 5 * float(found.stderr) + 1e-9
    with pytest.raises(ValueError, match="sobol: a path to a tolerance"):
        sf.expect(linear, Well(), ONE, ShARK(), rtol=1e-2, num=128, method="sobol", pilot=64)
    model = MIXTURE.model(sf.VP())
    found = sf.expect(square, model, shape=(2,), rtol=1e-3, tol=0.1, dtype=F64, pilot=256)
    exact = 1 / 3 * 1.1 + 2 / 3 * (2.25 + 0.2)
    assert abs(float(found.mean) - exact) < 5 * float(found.stderr) + 0.01


def test_a_plan_and_a_general_noise():
    model = MIXTURE.model(sf.VP())
    reverse = model.gaussian.reverse(model, 0.0)
    plan = Heun().plan(reverse, reverse.default_grid(8, *reverse.span))
    found = sf.expect(square, reverse, solver=plan, shape=(2,), tol=0.1, dtype=F64, pilot=256)
    assert found.pilot[-1].note.startswith("one level only")
    turn = sf.RotationGBM()
    for method in ("sobol", "control", "multilevel"):
        found = sf.expect(lambda x: x.square().sum(1), turn, torch.ones(turn.dim, dtype=F64), EulerMaruyama(), steps=8,
                          tol=0.05, method=method, pilot=256)  # fmt: skip
        plain = sf.expect(lambda x: x.square().sum(1), turn, torch.ones(turn.dim, dtype=F64), EulerMaruyama(), steps=8,
                          tol=0.05, method="plain", pilot=256, seed=9)  # fmt: skip
        assert abs(float(found.mean) - float(plain.mean)) < 0.15


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "tol or num"),
        ({"tol": 0.1, "num": 5}, "tol or num"),
        ({"tol": 0.0}, "tol > 0"),
        ({"tol": 0.1, "confidence": 1.0}, "confidence"),
        ({"tol": 0.1, "method": "quasi"}, "method"),
        ({"tol": 0.1, "pilot": 8}, "pilot"),
        ({"num": 8, "method": "multilevel"}, "expected tol, got num"),
        ({"tol": 0.1, "control_mean": 1.0}, "expected control"),
        ({"tol": 0.1, "levels": [8]}, "two levels"),
        ({"tol": 0.1, "levels": [4, 16]}, "steps=16, got 8"),
        ({"tol": 0.1, "eta": 1.0}, "eta belongs"),
        ({"tol": 0.1, "shape": (1,)}, "its own shape"),
        ({"tol": 0.1, "control_cost": -1.0}, "control_cost"),
        ({"tol": 0.1, "dimension": 25000}, r"dimension .* got 25000 \(at most 21201\)"),
        ({"tol": 0.1, "control": GBM, "method": "sobol"}, "control belongs"),
        ({"tol": 0.1, "control": GBM, "steps": None}, "exact law only multilevel"),
        ({"tol": 0.1, "levels": [4, 8], "method": "plain"}, "levels are those"),
    ],
)
def test_arguments_are_refused_before_the_first_step(how, message):
    with pytest.raises(ValueError, match=message):
        euler(**how)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="nothing is random"):
        sf.expect(linear, Fragile(), ONE, Euler(), steps=4, num=10)
    with pytest.raises(ValueError, match="has no prior"):
        sf.expect(linear, Well(), None, EulerMaruyama(), shape=(1,), steps=4, num=10)
    with pytest.raises(ValueError, match="expected shape"):
        sf.expect(linear, MIXTURE.model(sf.VP()), solver=Heun(), steps=4, num=10)
    with pytest.raises(ValueError, match="only multilevel"):
        sf.expect(linear, Well(), ONE, EulerMaruyama(), num=10)
    with pytest.raises(TypeError, match="expected a solver"):
        sf.expect(linear, Well(), ONE, steps=4, num=10)
    with pytest.raises(ValueError, match=r"functional returned \(1,\)"):
        euler(lambda x: x.sum(0), num=10, method="plain")
    with pytest.raises(ValueError, match=r"functional returned \(10, 0\): expected .* k >= 1"):
        euler(lambda x: x[:, :0], num=10, method="plain")
    with pytest.raises(ValueError, match="control: no Gaussian map"):
        sf.expect(linear, Fragile(), lambda z: 0.1 * z, Euler(), shape=(1,), steps=4, tol=0.1, method="control")


def test_of_one_unit_there_is_no_variance():
    one = sums_of(Drawn(torch.ones(1, 2, dtype=F64), torch.ones(1, dtype=torch.bool), 3.0))
    assert one.good == 1
    assert torch.isnan(one.variance).all()
