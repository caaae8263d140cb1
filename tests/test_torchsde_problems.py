"""torchsde behind `solve`: problems that fail, problems that are refused, and ours handed to torchsde as they are."""

import math
import sys

import pytest
import torch
import torchsde

import sdeflow as sf
from sdeflow.noise import Antithetic, SamePath
from sdeflow.pid import PID
from sdeflow.recorded import RecordedPath
from sdeflow.solvers import Torchsde
from tests.exact import F64
from tests.torchsde_cases import (
    GENERAL,
    ITO,
    METHODS,
    RATE,
    STRATONOVICH,
    VOLATILITY,
    Geometric,
    Mixed,
    Plain,
    Recording,
    Wavering,
    assert_law,
    by_hand,
    close,
    euler_step,
    reversal,
    start,
    tolerant,
)

# ---- failures


class Breaks(sf.SDE):
    """Sample 1 of 3 has no drift, or no diffusion, from `when` on."""

    t1 = 2.0

    def __init__(self, when, what):
        self.when, self.what = when, what

    def broken(self, what, x, t):
        bad = (torch.arange(3)[:, None] == 1) & (t >= self.when) & (what == self.what)
        return torch.where(bad, torch.nan, 0.5 * x)

    def drift(self, x, t):
        return self.broken("drift", x, t)

    def diffusion(self, x, t):
        return self.broken("diffusion", x, t)


@pytest.mark.parametrize("when", [0.0, 1.0])
@pytest.mark.parametrize("what", ["drift", "diffusion"])
def test_a_sample_that_breaks_has_a_status_of_its_own(what, when):
    x = torch.ones(3, 1)
    problem, non_finite, underflow = Breaks(when, what), int(sf.Status.NON_FINITE), int(sf.Status.STEP_UNDERFLOW)
    for method in ("milstein", "srk"):
        got = tolerant(problem, x, Torchsde(method), 1e-2, save=[0.0, 1.9])
        assert got.status.tolist() == [underflow, non_finite, underflow]
        assert bool(torch.isfinite(got.x).all())
        assert torch.equal(got.x, x) == (when == 0.0)
        assert torch.equal(got.xs[0], x)
        assert bool(got.xs[1].isnan().all())
        on_a_grid = sf.solve(problem, x, Torchsde(method), steps=10, throw=False)
        assert on_a_grid.status.tolist() == [0, non_finite, 0]
    with pytest.raises(sf.SolveError, match="1 of 3 samples became infinite or NaN"):
        sf.solve(problem, x, Torchsde(), rtol=1e-2)


def test_a_blow_up_is_a_step_underflow():
    """1/(1 - t) with a little noise: at tolerance 1e-3 the step is below 1e-5 long before x = 1e6."""

    class Blow(sf.SDE):
        t1 = 2.0

        def drift(self, x, t):
            return x**2

        def diffusion(self, x, t):
            return 0.01 * x

    problem, x = Blow(), torch.ones(2, 1, dtype=F64)
    got = tolerant(problem, x, Torchsde(), 1e-3, max_steps=2000)
    assert set(got.status.tolist()) == {int(sf.Status.STEP_UNDERFLOW)}
    assert float(got.x.min()) > 1e2
    assert list(sf.iterate(problem, x, Torchsde(), rtol=1e-3))[-1].t < 1.2
    further = tolerant(problem, x, Torchsde(min_step=1e-7), 1e-3, max_steps=2000)
    assert float(further.x.min()) > 2 * float(got.x.max())


def test_the_step_limit_is_a_status():
    got = tolerant(Wavering(), start(), Torchsde(), 1e-6, max_steps=5)
    assert set(got.status.tolist()) == {int(sf.Status.STEP_LIMIT)}
    assert got.stats.steps == 5
    assert bool(torch.isfinite(got.x).all())
    assert not torch.equal(got.x, start())


@pytest.mark.parametrize("how", [{"steps": 3}, {"rtol": 1e-2}], ids=["grid", "tolerance"])
def test_errors_of_the_problem_are_the_users(how):
    class Asserting(Wavering):
        def drift(self, x, t):
            raise AssertionError("mine")

    class Wide(Wavering):
        def drift(self, x, t):
            return torch.cat([x, x], 1)

    class Odd(Wavering):
        def diffusion(self, x, t):
            return torch.ones(5)

    for problem, error, message in (
        (Asserting(), AssertionError, "mine"),
        (Wide(), ValueError, r"returned \(6, 4\) for x of shape \(6, 2\)"),
        (Odd(), ValueError, r"broadcasts against x, \(6, 2\), got \(5,\)"),
    ):
        with pytest.raises(error, match=message):
            sf.solve(problem, start(), Torchsde(), **how)


# ---- refusals, before the first call


@pytest.mark.parametrize(
    ("method", "problem", "message"),
    [
        ("heun", Geometric(), "does not fit Geometric, an Ito equation .*: expected one of euler, milstein, srk$"),
        (
            "euler", Geometric("stratonovich"),
            "Geometric, a Stratonovich equation with diagonal noise: expected one of milstein, euler_heun, heun, "
            "midpoint, reversible_heun, log_ode$",
        ),
        ("srk", Mixed(), "Mixed, an Ito equation with general noise: expected one of euler$"),
        ("milstein", Mixed("stratonovich"), "general noise: expected one of euler_heun, heun, midpoint, rev"),
        ("milstein", Mixed(), "expected one of euler$"),
    ],
)  # fmt: skip
def test_a_problem_that_does_not_fit_is_refused(method, problem, message):
    problem = Recording(problem)
    Recording.__name__, before = type(problem.inner).__name__, Recording.__name__
    try:
        for how in ({"steps": 3}, {"rtol": 1e-2}):
            with pytest.raises(ValueError, match=message):
                sf.solve(problem, start(), Torchsde(method), **how)
    finally:
        Recording.__name__ = before
    assert not problem.times


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_what_fits(method):
    """As refused above: nothing that fits is."""
    for problem in (Geometric(), Geometric("stratonovich"), Mixed(), Mixed("stratonovich"), sf.VP(), reversal()):
        additive = isinstance(problem, (sf.VP, sf.ReverseSDE))
        reading = problem.interpretation
        fits = additive or reading in [k for k, ms in (("ito", ITO), ("stratonovich", STRATONOVICH)) if method in ms]
        if fits and (problem.noise == "diagonal" or method in GENERAL):
            sf.solve(problem, start(), Torchsde(method), steps=2)
        else:
            with pytest.raises(ValueError, match="does not fit"):
                sf.solve(problem, start(), Torchsde(method), steps=2)


def test_an_ode_is_refused():
    class Falling(sf.ODE):
        def drift(self, x, t):
            return -x

    with pytest.raises(ValueError, match="needs an SDE, got Falling, which has no diffusion: use Torchdiffeq"):
        sf.solve(Falling(), start(), Torchsde(), steps=3)


def test_adaptive_euler_needs_additive_noise():
    assert bool(sf.solve(sf.VP(), start(), Torchsde("euler"), rtol=1e-1).ok.all())
    for problem in (Wavering(), Mixed()):
        with pytest.raises(ValueError, match=r"euler to a tolerance needs additive noise .* milstein or srk"):
            sf.solve(problem, start(), Torchsde("euler"), rtol=1e-1)


@pytest.mark.parametrize(
    "noise",
    [SamePath(1), Antithetic(1), RecordedPath(torch.tensor([0.5, 2.0]), torch.zeros(2, 6, 2))],
    ids=lambda v: type(v).__name__,
)
def test_a_path_of_ours_is_refused(noise):
    with pytest.raises(ValueError, match="torchsde srk makes its own Brownian path"):
        sf.solve(Wavering(), start(), Torchsde(), grid=[0.5, 2.0], noise=noise)
    with pytest.raises(ValueError, match="makes its own Brownian path"):
        Torchsde().march(Wavering(), start(), (0.5, 2.0), PID(1e-2, 1e-2), None, noise.bind(6, None, "cpu"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Torchsde("rk4"), "expected one of euler, .*, log_ode, got 'rk4'"),
        (lambda: Torchsde("adjoint_reversible_heun"), "expected one of"),
        (lambda: Torchsde(min_step=0.0), "expected 0 < min_step <= first_step"),
        (lambda: Torchsde(first_step=1e-6), "expected 0 < min_step <= first_step"),
        (lambda: Torchsde(first_step=math.nan), "first_step as a number, got nan"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_missing_torchsde_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    problem = Recording(Geometric())
    for how in ({"steps": 3}, {"rtol": 1e-3}):
        with pytest.raises(ImportError, match=r"pip install 'sdeflow\[peers\]'"):
            sf.solve(problem, start(), Torchsde(), **how)
    assert not problem.times


# ---- our problems handed to torchsde


def test_a_problem_called_directly_checks_its_shape():
    class Wide(Wavering):
        def drift(self, x, t):
            return x.sum(1, keepdim=True)

    class Odd(Wavering):
        def diffusion(self, x, t):
            return torch.ones(5)

    class Flat(Mixed):
        def diffusion(self, x, t):
            return x

    x = start()
    for call in (Wide().__call__, Wide().f):
        with pytest.raises(ValueError, match=r"the drift returned \(6, 1\) for x of shape \(6, 2\)"):
            call(0.5, x)
    with pytest.raises(ValueError, match=r"Odd.diffusion with diagonal noise returned \(5,\) for x of shape \(6, 2\)"):
        Odd().g(0.5, x)
    with pytest.raises(ValueError, match=r"Flat.diffusion with general noise returned \(6, 2\) for x"):
        Flat().g(0.5, x)


def test_the_protocols_attributes():
    assert (Geometric().sde_type, Geometric().noise_type) == ("ito", "diagonal")
    assert (Mixed("stratonovich").sde_type, Mixed().noise_type) == ("stratonovich", "general")
    process, reverse, x, t = sf.VP(), reversal(), start(), torch.tensor(0.3, dtype=F64)
    assert (process.sde_type, reverse.sde_type, reverse.noise_type) == ("ito", "ito", "diagonal")
    assert torch.equal(process.f(t, x), process.drift(x, t))
    assert torch.equal(reverse(t, x), reverse.drift(x, t))
    assert torch.equal(reverse.f(-t, x), -reverse.drift(x, t))
    assert process.g(t, x).shape == reverse.g(-t, x).shape == (6, 2)
    close(reverse.g(-t, x), reverse.diffusion(x, t).expand(6, 2))
    assert Mixed().g(t, x).shape == (6, 2, 3)

    class Constant(Wavering):
        def diffusion(self, x, t):
            return torch.tensor(0.5, dtype=F64)

    assert Constant().g(0.3, x.to(torch.float32)).dtype == torch.float32


@pytest.mark.parametrize(
    ("problem", "times"),
    [
        (Wavering(), [0.5, 2.0]),
        (Mixed(), [0.0, 1.0]),
        (sf.VP(), [0.0, 1.0]),
        (sf.VE(), [0.0, 1.0]),
        (reversal(), [1.0, 0.25]),
        (sf.EDM().reverse(lambda x, t: -x / (1 + t**2)), [80.0, 0.5]),
    ],
    ids=["diagonal", "general", "VP", "VE", "reversal", "EDM's reversal"],
)
def test_torchsde_takes_an_sde(problem, times):
    """sdeint on the ascending clock is Euler's recursion with signed steps on the problem's own, on the same path."""
    x, n = start(), 64
    down = times[1] < times[0]
    h, sign = (times[1] - times[0]) / n, -1.0 if down else 1.0
    ts = sign * torch.tensor(times, dtype=F64)
    motions = [
        torchsde.BrownianInterval(
            float(ts[0]), float(ts[1]), (6, 3 if problem.noise == "general" else 2), F64, entropy=5
        )
        for _ in range(2)
    ]
    got = torchsde.sdeint(problem, x, ts, bm=motions[0], method="euler", dt=abs(h))
    points = [times[0] + k * h for k in range(n + 1)]
    want = by_hand(euler_step(problem), x, points, motions[1], sign)
    torch.testing.assert_close(got[-1], want[-1], rtol=1e-9, atol=1e-9)


def test_torchsde_integrates_geometric_brownian_motion():
    """40000 paths of srk in 50 steps: mean e^a and variance e^2a (e^(b^2) - 1) in 5 standard errors."""
    x, ts = torch.ones(40_000, 1, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    for problem, growth in ((Geometric(), RATE), (Geometric("stratonovich"), RATE + 0.5 * VOLATILITY**2)):
        areas = "space-time" if problem.sde_type == "ito" else "none"
        bm = torchsde.BrownianInterval(0.0, 1.0, x.shape, F64, entropy=6, levy_area_approximation=areas)
        got = torchsde.sdeint(problem, x, ts, bm=bm, dt=1 / 50)[-1]
        assert_law(got, math.exp(growth), math.exp(2 * growth) * math.expm1(VOLATILITY**2))
        assert float((got - problem.exact(x, bm(0.0, 1.0), 1.0)).abs().mean()) < 5e-3


def test_torchsde_reverses_a_gaussian():
    """VP's reversal of N(0, 1), which stays N(0, 1), from t1 to 0.02: 5 standard errors of 20000 samples."""
    reverse = sf.VP(beta_max=5.0).reverse(lambda x, t: -x)
    x = torch.randn(20_000, 1, dtype=F64, generator=torch.Generator().manual_seed(3))
    ts = torch.tensor([-1.0, -0.02], dtype=F64)
    bm = torchsde.BrownianInterval(-1.0, -0.02, x.shape, F64, entropy=7, levy_area_approximation="space-time")
    assert_law(torchsde.sdeint(reverse, x, ts, bm=bm, dt=0.02)[-1], 0.0, 1.0)
    wrong = Plain(lambda s, y: -reverse.f(s, y), reverse.g)
    bm = torchsde.BrownianInterval(-1.0, -0.02, x.shape, F64, entropy=7, levy_area_approximation="space-time")
    with pytest.raises(AssertionError):  # the control: the drift of the other direction
        assert_law(torchsde.sdeint(wrong, x, ts, bm=bm, dt=0.02)[-1], 0.0, 1.0)


def test_a_process_of_coefficients_is_handed_over():
    process = sf.GaussianSDE.from_coefficients(lambda t: -0.5 - t, lambda t: 1 + t, 0.0, 1.0)
    x = start()
    motions = [torchsde.BrownianInterval(0.0, 1.0, (6, 2), F64, entropy=1) for _ in range(2)]
    got = torchsde.sdeint(process, x, torch.tensor([0.0, 1.0], dtype=F64), bm=motions[0], method="euler", dt=1 / 8)[-1]
    close(got, by_hand(euler_step(process), x, [k / 8 for k in range(9)], motions[1])[-1])
