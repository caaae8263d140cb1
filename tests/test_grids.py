"""Grids: closed forms, exact ends, both directions, sigma = 0 and alpha = 0, tables without an off-by-one."""

import inspect
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sdeflow as sf
from sdeflow import grids
from sdeflow.discrete import rescale_zero_terminal_snr
from tests.exact import F64, NAMES, make

LINEAR = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
LEVEL_GRIDS = ("logsnr", "exponential", "polyexponential", "karras")


def table(size=1000):
    return sf.DiscreteVP(torch.linspace(1e-4, 0.02, size, dtype=F64))


def level(process, t):
    return (process.sigma(t) / process.alpha(t)).numpy()


def visited(process, ts):
    """The table's entries at the steps' starts, as integers."""
    index = process.index_of_time(ts[:-1]).numpy()
    np.testing.assert_allclose(index, np.round(index), atol=1e-9)
    return np.round(index).astype(int).tolist()


class Plain(sf.ODE):
    t0, t1 = -1.0, 3.0

    def drift(self, x, t):
        return -x


# ---- what every grid promises


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", grids.GRIDS)
def test_every_grid_on_every_process_it_fits(grid, name):
    process, row = make(name), grids.GRIDS[grid]
    if not row.fits(process):
        with pytest.raises(ValueError, match=f"grids.{grid} needs"):
            row.make(process, 4)
        return
    few = name == "DiscreteVP(5)" and row.needs == "table"
    for steps in (1, 2, 3) if few else (1, 2, 7, 50):
        ts = row.make(process, steps)
        assert ts.shape == (steps + 1,)
        assert ts.dtype == F64
        assert ts.device.type == "cpu"
        assert (float(ts[0]), float(ts[-1])) == (process.t1, process.t_min)
        assert bool((torch.diff(ts) < 0).all())
        up = row.make(process, steps, process.t_min, process.t1)
        assert torch.equal(up, ts.flip(0))


@pytest.mark.parametrize("grid", [g for g, row in grids.GRIDS.items() if row.needs != "table"])
@settings(max_examples=30)
@given(
    steps=st.integers(1, 200), a=st.floats(0, 1), b=st.floats(0, 1),
    name=st.sampled_from(["VP", "SubVP", "VE", "EDM", "CosineVP", "DiscreteVP", "from_kernel", "subclass by kernel"]),
)  # fmt: skip
def test_any_steps_between_any_ends(grid, steps, a, b, name):
    process = make(name)
    start, end = (process.t_min + share * (process.t1 - process.t_min) for share in (a, b))
    assume(abs(start - end) > 1e-3 * (process.t1 - process.t_min))
    ts = grids.GRIDS[grid].make(process, steps, start, end)
    assert ts.shape == (steps + 1,)
    assert (float(ts[0]), float(ts[-1])) == (start, end)
    assert bool((torch.diff(ts) * (end - start) > 0).all())


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_every_grid_is_one_for_solve(grid):
    process = table()
    model = sf.problems.EightGaussians().model(process)
    for steps in (4, 9):
        solution = sf.sample(
            model, 3, shape=(2,), solver=sf.solvers.DPMSolverPP(2), steps=steps, seed=0, grid=grids.GRIDS[grid].make
        )
        assert solution.stats.nfe == steps
        assert float(solution.x.norm(dim=1).max()) < 10


def test_the_list_is_complete_and_described():
    public = {n for n, f in vars(grids).items() if inspect.isfunction(f) and "sdeflow.grids" in f.__module__}
    assert set(grids.GRIDS) == public
    for name, row in grids.GRIDS.items():
        assert row.make is getattr(grids, name)
        assert row.description
        assert "\n" not in row.description
        parameters = list(inspect.signature(row.make).parameters.values())
        assert [p.name for p in parameters[:4]] == ["process", "steps", "t_start", "t_end"]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[4:])


def test_which_grids_fit():
    def fitting(process):
        return {name for name, row in grids.GRIDS.items() if row.fits(process)}

    by_time = {"uniform", "quadratic", "power", "beta"}
    assert fitting(Plain()) == by_time
    assert fitting(sf.RectifiedFlow()) == by_time | {"cosine", "flow_shift", "logistic"}
    assert fitting(sf.VP()) == by_time | {"cosine", "flow_shift", "logistic", *LEVEL_GRIDS}
    assert fitting(table()) == set(grids.GRIDS)
    flow = table().probability_flow(sf.problems.EightGaussians().model(table()))
    assert fitting(flow) == set(grids.GRIDS)
    assert torch.equal(grids.trailing(flow, 10), grids.trailing(table(), 10))


# ---- placed by time


@pytest.mark.parametrize("process", [sf.VP(), Plain()], ids=["VP", "ODE"])
def test_grids_by_time_against_numpy(process):
    t0, t1, low = process.t0, process.t1, process.t_min
    np.testing.assert_allclose(grids.uniform(process, 9), np.linspace(t1, low, 10), rtol=1e-14)
    for grid, exponent in ((grids.quadratic, 2), (grids.power, 3)):
        roots = np.linspace((t1 - t0) ** (1 / exponent), (low - t0) ** (1 / exponent), 10)
        np.testing.assert_allclose(grid(process, 9), t0 + roots**exponent, rtol=1e-14, atol=1e-15)
    roots = np.linspace((t1 - t0) ** (1 / 1.5), (low - t0) ** (1 / 1.5), 10)
    np.testing.assert_allclose(grids.power(process, 9, exponent=1.5), t0 + roots**1.5, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.5, 1.2), (1.0, 1.0)])
def test_beta_is_the_quantiles_of_scipys_beta(a, b):
    process = sf.VP()
    quantiles = scipy.stats.beta(a, b).ppf(np.linspace(1, 0, 21))
    np.testing.assert_allclose(grids.beta(process, 20, a=a, b=b), 1e-3 + (1 - 1e-3) * quantiles, rtol=1e-12)
    if (a, b) == (1.0, 1.0):
        torch.testing.assert_close(grids.beta(process, 20, a=a, b=b), grids.uniform(process, 20))


# ---- placed by level


@pytest.mark.parametrize("name", ["VP", "VE", "EDM", "CosineVP", "SubVP", "DiscreteVP", "from_kernel"])
def test_levels_against_the_formulas_of_k_diffusion(name):
    """sigma of k-diffusion is sigma/alpha here; its grids of n levels are ours of n - 1 steps."""
    process, steps = make(name), 12
    high, low = (float(level(process, torch.tensor(t, dtype=F64))) for t in (process.t1, process.t_min))
    ramp = np.linspace(1, 0, steps + 1)
    exponential = np.exp(np.linspace(np.log(high), np.log(low), steps + 1))
    for grid in (grids.logsnr, grids.exponential):
        np.testing.assert_allclose(level(process, grid(process, steps)), exponential, rtol=1e-9)
    for rho in (1.0, 0.7, 3.0):
        want = np.exp(ramp**rho * (np.log(high) - np.log(low)) + np.log(low))
        np.testing.assert_allclose(level(process, grids.polyexponential(process, steps, rho=rho)), want, rtol=1e-9)
    for rho in (7.0, 2.0):
        want = (high ** (1 / rho) + (1 - ramp) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        np.testing.assert_allclose(level(process, grids.karras(process, steps, rho=rho)), want, rtol=1e-9)


def test_karras_to_zero_is_the_grid_of_the_paper():
    """Karras et al. 2022, equation 5: N levels from sigma_max to sigma_min, then 0. N = 18 there."""
    got = grids.karras(sf.EDM(), 18, 80.0, 0.0)
    i = np.arange(18)
    want = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(got[:-1], want, rtol=1e-12)
    assert float(got[-2]) == 0.002
    assert float(got[-1]) == 0.0


@pytest.mark.parametrize("grid", LEVEL_GRIDS)
@pytest.mark.parametrize("name", ["VP", "EDM", "DiscreteVP", "subclass by kernel"])
def test_sigma_zero_is_reached_by_one_last_step_from_t_min(grid, name):
    process, function = make(name), grids.GRIDS[grid].make
    got = function(process, 8, process.t1, process.t0)
    assert torch.equal(got[:-1], function(process, 7))
    assert float(got[-1]) == process.t0
    assert torch.equal(function(process, 8, process.t0, process.t1), got.flip(0))
    assert function(process, 1, process.t1, process.t0).tolist() == [process.t1, process.t0]
    with pytest.raises(ValueError, match="last step from t_min"):
        function(process, 2, process.t_min, process.t0)


@pytest.mark.parametrize("grid", [g for g, row in grids.GRIDS.items() if row.needs != "table"])
def test_a_sample_down_to_sigma_zero(grid):
    process = sf.VP()
    model = sf.problems.EightGaussians().model(process)
    solution = sf.sample(
        model, 4, shape=(2,), solver=sf.solvers.DPMSolverPP(2), steps=12, grid=grids.GRIDS[grid].make, final="zero"
    )
    assert bool(solution.ok.all())


@pytest.mark.parametrize("name", ["VP", "EDM", "RectifiedFlow", "CosineVP", "from_kernel"])
def test_cosine_is_equal_steps_of_the_angle(name):
    process = make(name)
    for ends in ((process.t1, process.t_min), (process.t1, process.t0)):
        ts = grids.cosine(process, 10, *ends)
        angle = np.arctan2(process.sigma(ts).numpy(), process.alpha(ts).numpy())
        np.testing.assert_allclose(angle, np.linspace(angle[0], angle[-1], 11), rtol=1e-9, atol=1e-12)
    if name == "RectifiedFlow":
        tangent = np.tan(np.linspace(np.pi / 2, 0, 11)[1:-1])
        np.testing.assert_allclose(ts[1:-1], tangent / (1 + tangent), rtol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5, 6.93])
def test_flow_shift_is_the_published_map_of_the_flows_time(shift):
    u = np.linspace(1, 0, 11)
    got = grids.flow_shift(sf.RectifiedFlow(), 10, 1.0, 0.0, shift=shift)
    np.testing.assert_allclose(got, shift * u / (1 + (shift - 1) * u), rtol=1e-12, atol=1e-15)
    # on any process and span: the same map between other ends
    for process in (sf.VP(), sf.EDM(), sf.SubVP(), sf.RectifiedFlow(), table()):
        ts = grids.flow_shift(process, 10, shift=shift)
        flow = (process.sigma(ts) / (process.alpha(ts) + process.sigma(ts))).numpy()
        back = flow / (shift - (shift - 1) * flow)
        np.testing.assert_allclose(back, np.linspace(back[0], back[-1], 11), rtol=1e-9, atol=1e-12)


def test_equal_steps_of_a_flow_are_shift_one():
    flow = sf.RectifiedFlow()
    torch.testing.assert_close(grids.flow_shift(flow, 10, shift=1.0), grids.uniform(flow, 10))


# ---- table spacings


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 30, 50, 333, 1000])
def test_trailing_visits_the_published_entries(steps):
    process = table()
    ts = grids.trailing(process, steps, 1.0, 0.0)
    published = np.round(np.arange(1000, 0, -1000 / steps))[:steps].astype(int) - 1
    assert visited(process, ts) == published.tolist()
    assert float(ts[-1]) == 0.0
    if steps < 1000:  # to the first entry, the default end, the same entries are visited
        assert torch.equal(grids.trailing(process, steps)[:-1], ts[:-1])


@pytest.mark.parametrize("steps", [2, 7, 10, 30, 50, 333, 1000])
def test_linspace_visits_the_published_entries(steps):
    process = table()
    ts = grids.linspace(process, steps, 1.0, 0.0)
    assert visited(process, ts) == np.round(np.linspace(0, 999, steps))[::-1].astype(int).tolist()
    assert float(ts[-1]) == 0.0
    if steps < 1000:  # entry 0 is then the end, not a start
        want = np.round(np.linspace(0, 999, steps + 1))[::-1].astype(int).tolist()
        assert visited(process, grids.linspace(process, steps)) == want[:-1]


@pytest.mark.parametrize(("steps", "offset"), [(10, 0), (10, 1), (50, 1), (7, 0), (30, 5), (1000, 0)])
def test_leading_visits_the_published_entries_below_its_start(steps, offset):
    process, ratio = table(), 1000 // steps
    published = (np.arange(steps) * ratio)[::-1] + offset
    ts = grids.leading(process, steps, 1.0, 0.0, offset=offset)
    assert visited(process, ts) == [999, *published[1:].tolist()]
    assert float(ts[-1]) == 0.0
    first = float(published[0] + 1) / 1000
    assert visited(process, grids.leading(process, steps, first, 0.0, offset=offset)) == published.tolist()
    if offset:
        assert torch.equal(grids.leading(process, steps, offset=offset)[:-1], ts[:-1])


def test_the_docstrings_examples():
    process = table()
    assert visited(process, grids.trailing(process, 10)) == [999 - 100 * i for i in range(10)]
    assert visited(process, grids.leading(process, 10)) == [999, *range(801, 0, -100)]
    assert visited(process, grids.linspace(process, 10, 1.0, 0.0)) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert visited(process, grids.linspace(process, 10)) == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]


def test_a_part_of_the_table():
    process = table()
    assert visited(process, grids.trailing(process, 5, 0.5, 0.0)) == [499, 399, 299, 199, 99]
    assert visited(process, grids.linspace(process, 5, 0.5, 0.1)) == [499, 419, 339, 259, 179]
    with pytest.raises(ValueError, match="not distinct times"):
        grids.leading(process, 10, 0.5, 0.0)


@given(size=st.integers(2, 300), data=st.data())
def test_table_grids_are_monotone_for_any_table(size, data):
    process = sf.DiscreteVP(np.linspace(1e-3, 0.05, size))
    steps = data.draw(st.integers(1, size))
    for grid in (grids.trailing, grids.linspace):
        ts = grid(process, steps, 1.0, 0.0)
        assert bool((torch.diff(ts) < 0).all())
        assert len(set(visited(process, ts))) == steps
    assert bool((torch.diff(grids.leading(process, steps, 1.0, 0.0, offset=0)) < 0).all())
    with pytest.raises(ValueError, match="not distinct times"):
        grids.trailing(process, size + 1, 1.0, 0.0)


# ---- zero terminal SNR


def test_the_rescaled_table_is_that_of_the_paper():
    alphas_bar = np.cumprod(1 - LINEAR.numpy())
    root = np.sqrt(alphas_bar)
    first, last = root[0], root[-1]
    root = (root - last) * first / (first - last)
    alphas = root**2
    alphas[1:] = alphas[1:] / (root[:-1] ** 2)
    got = rescale_zero_terminal_snr(LINEAR)
    np.testing.assert_allclose(got, 1 - alphas, rtol=1e-9)
    assert float(got[-1]) == 1.0
    np.testing.assert_allclose(float(got[0]), 1e-4, rtol=1e-9)
    torch.testing.assert_close(rescale_zero_terminal_snr(got), got, rtol=0, atol=0)


def test_a_process_of_zero_terminal_snr():
    process, n = sf.DiscreteVP(LINEAR, zero_terminal_snr=True), torch.arange(1000, dtype=F64)
    assert process == sf.DiscreteVP(rescale_zero_terminal_snr(LINEAR), zero_terminal_snr=True)
    assert process != sf.DiscreteVP(LINEAR)
    alphas = torch.sqrt(torch.cumprod(1 - process.betas, 0))
    torch.testing.assert_close(process.alpha((n + 1) / 1000), alphas, rtol=1e-9, atol=1e-15)
    assert (float(process.alpha(1.0)), float(process.sigma(1.0)), float(process.lam(1.0))) == (0.0, 1.0, -math.inf)
    assert float(process.time_of_lam(-math.inf)) == 1.0
    ts = torch.linspace(0.9985, 0.99999, 40, dtype=F64)  # over the last entries
    torch.testing.assert_close(process.time_of_lam(process.lam(ts)), ts, rtol=1e-12, atol=0)
    assert bool((torch.diff(process.lam(ts)) < 0).all())
    inside = ts[((ts * 1000) % 1 - 0.5).abs() < 0.4]
    slope_a, slope_s = ((f(inside + 1e-8) - f(inside - 1e-8)) / 2e-8 for f in (process.alpha, process.sigma))
    torch.testing.assert_close(process.derivatives(inside)[0], slope_a, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(process.derivatives(inside)[1], slope_s, rtol=1e-3, atol=1e-7)
    f, g = process.drift_coeff(inside), process.diffusion_coeff(inside)
    torch.testing.assert_close(f, slope_a / process.alpha(inside), rtol=1e-5, atol=0)
    torch.testing.assert_close(g**2, -2 * f, rtol=1e-12, atol=0)
    assert bool(torch.isfinite(torch.stack(process.derivatives(torch.tensor(1.0, dtype=F64)))).all())


@pytest.mark.parametrize(
    "grid", ["trailing", "linspace", "leading", "uniform", "power", "cosine", "flow_shift", "beta"]
)
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_samples_from_alpha_zero_are_exact_for_a_gaussian(grid, prediction):
    """x at t = 1 is pure noise z, and the flow takes it to alpha m + sqrt(alpha^2 c + sigma^2) z."""
    process = sf.DiscreteVP(LINEAR, zero_terminal_snr=True)
    mean, variance = torch.tensor([0.7, -1.5], dtype=F64), torch.tensor([0.3, 2.0], dtype=F64)
    exact = sf.problems.Gaussian(mean, variance).model(process)
    model = sf.Model(lambda x, t: exact(x, t, as_=prediction), process, prediction, expand=False)
    z = torch.tensor(np.random.default_rng(0).normal(size=(6, 2)), dtype=F64)
    errors = []
    for steps in (25, 100):
        ts = grids.GRIDS[grid].make(process, steps)
        got = sf.solve(process.probability_flow(model), z, sf.solvers.DPMSolverPP(2), grid=ts).x
        alpha, sigma = process.alpha(ts[-1]), process.sigma(ts[-1])
        errors.append(float((got - alpha * mean - torch.sqrt(alpha**2 * variance + sigma**2) * z).abs().max()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.05


@pytest.mark.parametrize("solver", [sf.solvers.DDPM(), sf.solvers.DDIM(eta=1.0), sf.solvers.Heun()])
def test_other_samplers_start_at_alpha_zero(solver):
    process = sf.DiscreteVP(LINEAR, zero_terminal_snr=True)
    model = sf.problems.EightGaussians().model(process)
    eta = 1.0 if isinstance(solver, type(sf.solvers.DDPM())) and solver.name == "DDPM" else 0.0
    solution = sf.sample(model, 8, shape=(2,), solver=solver, steps=60, grid=grids.trailing, eta=eta)
    assert bool(solution.ok.all())
    assert float(solution.x.norm(dim=1).max()) < 10


@pytest.mark.parametrize("grid", LEVEL_GRIDS)
def test_grids_that_need_finite_levels_say_so_at_alpha_zero(grid):
    for process in (sf.DiscreteVP(LINEAR, zero_terminal_snr=True), sf.RectifiedFlow()):
        assert not grids.GRIDS[grid].fits(process)
        with pytest.raises(ValueError, match=f"grids.{grid} needs alpha > 0: start short of t = 1"):
            grids.GRIDS[grid].make(process, 5)
        assert grids.GRIDS[grid].make(process, 5, 0.99).shape == (6,)


# ---- errors


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_bad_steps_and_ends_are_one_clear_error(grid):
    make_grid, process = grids.GRIDS[grid].make, table()
    for steps in (2.0, "3", True, None):
        with pytest.raises(TypeError, match="steps as a whole number"):
            make_grid(process, steps)
    for steps in (0, -1):
        with pytest.raises(ValueError, match="steps >= 1"):
            make_grid(process, steps)
    with pytest.raises(ValueError, match=r"two different ends, got t_start = t_end = 0\.5"):
        make_grid(process, 3, 0.5, 0.5)
    with pytest.raises(ValueError, match="t_start as a number or None, got nan"):
        make_grid(process, 3, math.nan, 0.1)
    for ends in ((1.5, 0.1), (1.0, -0.1), (1.0, math.inf)):
        with pytest.raises(ValueError, match=r"both ends in \[0, 1\]"):
            make_grid(process, 3, *ends)
    with pytest.raises(ValueError, match="not distinct times"):
        make_grid(process, 2000, 0.5, 0.5 + 1e-15)


@pytest.mark.parametrize(
    ("make_grid", "message"),
    [
        (lambda p: grids.power(p, 3, exponent=0.0), "exponent > 0"),
        (lambda p: grids.karras(p, 3, rho=-1.0), "rho > 0"),
        (lambda p: grids.polyexponential(p, 3, rho=math.nan), "rho as a number, got nan"),
        (lambda p: grids.beta(p, 3, a=0.0), "a > 0"),
        (lambda p: grids.beta(p, 3, b=math.inf), "b > 0"),
        (lambda p: grids.flow_shift(p, 3, shift=0.0), "shift > 0"),
        (lambda p: grids.leading(p, 3, offset=-1), "offset >= 0"),
        (lambda p: grids.leading(p, 3, offset=0.5), "offset as a whole number, got 0.5"),
        (lambda p: grids.leading(p, 10, offset=0), "not distinct times"),
        (lambda p: grids.leading(p, 10, offset=300), "not distinct times"),
        (lambda p: grids.trailing(p, 1000), "not distinct times"),
        (lambda p: grids.trailing(sf.VP(), 10), "needs the table of a DiscreteVP, got VP"),
        (lambda p: grids.cosine(Plain(), 10), "needs the noise levels of a GaussianSDE, got Plain"),
        (lambda p: grids.karras(Plain(), 10), "needs the noise levels of a GaussianSDE, got Plain"),
        (lambda p: rescale_zero_terminal_snr([0.1, 1.0, 0.2]), r"in \(0, 1\)"),
        (lambda p: sf.DiscreteVP([0.1, 1.0]), "zero_terminal_snr=True"),
    ],
)
def test_bad_options_are_one_clear_error(make_grid, message):
    with pytest.raises(ValueError, match=message):
        make_grid(table())
