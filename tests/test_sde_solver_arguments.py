"""What methods for SDEs refuse, and what they take: kinds of noise, dtypes, shapes, batches, gradients."""

import math

import pytest
import torch

import sdeflow as sf
from sdeflow.calculus import NOISE_KINDS, noise_kind
from sdeflow.solvers import SKROCK, SRA1, AdaptiveSDE, EulerMaruyama, LevyMilstein, Milstein, PlatenWeak2, Splitting
from tests.exact import F64
from tests.sde_solver_cases import (
    ROWS,
    Areas,
    Commuting,
    Cooling,
    CorrelatedWell,
    CrossedDiagonal,
    Geometric,
    Heisenberg,
    Plane,
    Quiet,
    ScalarBent,
    Sinh,
    SwingingAdditive,
    Tanh,
    forced,
    named,
    quick,
)

# ---- refusals


class Untouched:
    """A drift that must not be called."""

    t1 = 1.0

    def drift(self, x, t):
        raise AssertionError("the drift was called")


def refusing(name):
    base = {
        "diagonal": Geometric, "scalar": ScalarBent, "commutative": Commuting, "general": Areas,
    }[name]  # fmt: skip
    return type(f"{name.title()}Noise", (Untouched, base), {})()


STARTS = {
    "diagonal": torch.ones(3, 2, dtype=F64), "scalar": torch.ones(3, 2, dtype=F64),
    "commutative": torch.ones(3, 3, dtype=F64), "general": torch.ones(3, 2, dtype=F64),
}  # fmt: skip
MISFITS = [(row, kind) for row in ROWS for kind in NOISE_KINDS if kind not in row.noise]


@pytest.mark.parametrize(("row", "kind"), MISFITS, ids=lambda v: getattr(v, "name", v))
def test_noise_that_does_not_fit_is_one_error_before_the_drift(row, kind):
    """It names methods that fit, and they do."""
    with pytest.raises(ValueError, match=f"{kind.title()}Noise is {kind}: use one of ") as error:
        sf.solve(refusing(kind), STARTS[kind], row.make(), steps=2, seed=0)
    message = str(error.value)
    assert message.startswith(f"{row.name} integrates {' and '.join(row.noise)} noise")
    offered = message.split("use one of ")[1].split(", ")
    assert len(offered) >= 4
    assert row.name not in offered
    for name in offered:
        with pytest.raises(AssertionError, match="the drift was called"):
            sf.solve(refusing(kind), STARTS[kind], sf.solvers.by_name(name).make(), steps=2, seed=0)


def test_there_are_misfits():
    assert len(MISFITS) == 19
    assert {row.name for row, _ in MISFITS} == {"Milstein", "SRA1", "SRA3", "ShARK", "SRIW1", "AdaptiveSDE"}


class Plain(Untouched, sf.ODE):
    pass


@pytest.mark.parametrize("solver", [*(row.make() for row in ROWS[1:]), Splitting(-1.0)], ids=named)
@pytest.mark.parametrize("problem", [Plain(), sf.VP().probability_flow(lambda x, t: 1 / 0)], ids=["ODE", "flow"])
def test_problems_without_noise_are_refused(solver, problem):
    with pytest.raises(ValueError, match=r"is for problems with noise, and .* has none: use a solver of ordinary"):
        sf.solve(problem, torch.ones(2, 3, dtype=F64), solver, steps=2, seed=0)


def test_what_is_declared_is_believed():
    """additive=True on noise that is not, commutative=True likewise, and False on noise that is."""
    x = torch.ones(3, 2, dtype=F64)
    told = Geometric()
    told.additive = True
    assert torch.isfinite(sf.solve(told, x, SRA1(), steps=2, seed=0).x).all()
    euler = sf.solve(told, x, EulerMaruyama(), steps=4, noise=sf.SamePath(0)).x
    torch.testing.assert_close(sf.solve(told, x, Milstein(), steps=4, noise=sf.SamePath(0)).x, euler)
    told.additive = False
    with pytest.raises(ValueError, match="is diagonal"):
        sf.solve(told, x, SRA1(), steps=2, seed=0)
    told = Areas()
    told.commutative = True
    assert torch.isfinite(sf.solve(told, x, Milstein(), steps=2, seed=0).x).all()
    told = Commuting()
    told.commutative = False
    with pytest.raises(ValueError, match="is general"):
        sf.solve(told, torch.ones(3, 3, dtype=F64), Milstein(), steps=2, seed=0)
    quiet = Quiet(forced)
    quiet.additive = False  # noise that does not depend on x: the probe would say so
    with pytest.raises(ValueError, match="is diagonal"):
        sf.solve(quiet, x, SRA1(), steps=2, seed=0)


class Turned(sf.SDE):
    """Diagonal noise whose G_i depends on the other coordinates."""

    def drift(self, x, t):
        return -x

    def diffusion(self, x, t):
        return 1 + 0.1 * x.roll(1, -1)


@pytest.mark.parametrize("start", ["zeros", "random", "negative"])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kind_of_noise_does_not_depend_on_where_or_in_what_it_is_probed(start, dtype):
    t = torch.tensor(0.3, dtype=F64)
    for sde, d, kind in (
        (Tanh(), 2, "diagonal"), (Sinh(), 2, "diagonal"), (Geometric(), 1, "diagonal"), (Turned(), 3, "general"),
        (Areas(), 2, "general"), (CrossedDiagonal(), 2, "general"), (Commuting(), 3, "commutative"),
        (ScalarBent(), 2, "scalar"), (CorrelatedWell(), 2, "additive"), (SwingingAdditive(), 2, "additive"),
        (Heisenberg(), 4, "general"), (Plane(), 2, "general"), (Cooling(True), 2, "general"),
    ):  # fmt: skip
        if isinstance(sde, Commuting) and dtype != F64:
            continue  # its matrices are float64
        for batch in (1, 2, 9):
            x = {
                "zeros": torch.zeros(batch, d), "random": 0.7 * torch.rand(batch, d), "negative": -torch.rand(batch, d),
            }[start].to(dtype)  # fmt: skip
            assert noise_kind(sde, x, t) == kind, (type(sde).__name__, batch)


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (type("Wide", (Tanh,), {"diffusion": lambda self, x, t: torch.ones(3, 5)})(), "broadcasts against x"),
        (type("Flat", (Areas,), {"diffusion": lambda self, x, t: torch.ones_like(x)})(), r"\(\*x.shape, m\)"),
        (type("Odd", (Tanh,), {"noise": "white"})(), 'noise "diagonal" or "general"'),
    ],
    ids=["diagonal", "general", "unknown"],
)
@pytest.mark.parametrize("row", ROWS, ids=named)
def test_wrong_shapes_of_a_diffusion_are_refused(row, sde, message):
    with pytest.raises(ValueError, match=message):
        sf.solve(sde, torch.ones(3, 2, dtype=F64), row.make(), steps=2, seed=0)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_wrong_shapes_of_a_drift_are_refused(row):
    class Column(SwingingAdditive):
        def drift(self, x, t):
            return x[:, :1]

    with pytest.raises(ValueError, match=r"the drift returned \(3, 1\) for x of shape \(3, 2\)"):
        sf.solve(Column(), torch.ones(3, 2, dtype=F64), quick(row), steps=2, seed=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Milstein("forward"), ValueError, "derivative as one of 'autodiff', 'central'"),
        (lambda: LevyMilstein(3), ValueError, "substeps as a power of 2, got 3"),
        (lambda: LevyMilstein(0), ValueError, "substeps as a power of 2"),
        (lambda: LevyMilstein(True), ValueError, "substeps as a whole number or None"),
        (lambda: SKROCK(0), ValueError, "stages >= 1"),
        (lambda: SKROCK(2.0), ValueError, "stages as a whole number"),
        (lambda: SKROCK(3, 0.0), ValueError, "damping > 0"),
        (lambda: Splitting(math.nan), ValueError, "finite linear part"),
        (lambda: Splitting(-1.0, EulerMaruyama()), TypeError, "inner as a StochasticSolver such as"),
        (lambda: Splitting(-1.0, LevyMilstein()), ValueError, "inner method of .W, H. alone"),
        (lambda: Splitting(-1.0, PlatenWeak2()), ValueError, "inner method of .W, H. alone"),
        (lambda: Splitting(-1.0, Splitting(-1.0)), ValueError, "inner method of .W, H. alone"),
        (lambda: AdaptiveSDE(first=0.0), ValueError, r"first in \(0, 1\]"),
        (lambda: AdaptiveSDE(exponent=1.5), ValueError, r"exponent in \(0, 1\]"),
    ],
)
def test_bad_options_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_linear_part_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"matrix \(2, 2\), got shape \(3,\)"):
        sf.solve(Tanh(), torch.ones(3, 2, dtype=F64), Splitting(torch.ones(3)), steps=2, seed=0)


def test_orders_of_a_splitting_are_those_of_its_parts():
    assert [Splitting(-1.0).order_for(kind) for kind in ("additive", "general")] == [1.0, 0.5]
    assert Splitting(-1.0, SRA1()).order_for("additive") == 1.0


# ---- dtypes, shapes, batches, gradients


class Turning(sf.SDE):
    """Any event shape and dtype; f and G depend on everything."""

    def __init__(self, kind="diagonal", rate=0.7, volatility=0.3):
        self.kind, self.rate, self.volatility = kind, rate, volatility
        self.noise = "diagonal" if kind in ("diagonal", "own") else "general"

    def drift(self, x, t):
        return torch.sin(self.rate * x) - x * torch.cos(t).to(x.dtype)

    def diffusion(self, x, t):
        own = self.volatility * torch.cos(x) * (1 + t).to(x.dtype)
        if self.kind == "diagonal":
            return own
        if self.kind == "scalar":
            return own.unsqueeze(-1)
        if self.kind == "additive":
            return (self.volatility * (1 + t).to(x.dtype) * torch.tensor([1.0, 0.5, -0.2]).to(x)).expand(*x.shape, 3)
        return torch.stack([own, 0.2 * torch.sin(x), 0.1 * torch.ones_like(x)], -1)


FITTING = [
    (row, kind) for row in ROWS for kind in ("diagonal", "scalar", "additive", "general")
    if kind in row.noise
]  # fmt: skip


CASES = [
    *((row.make(), kind) for row, kind in FITTING),
    *((Splitting(-0.5), kind) for kind in ("diagonal", "scalar", "additive", "general")),
    (Milstein("central"), "diagonal"), (LevyMilstein(16), "general"),
]  # fmt: skip


def fitting_id(v):
    return getattr(v, "name", v)


@pytest.mark.parametrize("event", [(), (3,), (2, 4)], ids=str)
@pytest.mark.parametrize(("solver", "kind"), CASES, ids=fitting_id)
def test_shapes_and_dtypes(solver, kind, event):
    x = torch.rand(5, *event, dtype=F64) + 0.2
    with torch.no_grad():
        exact = sf.solve(Turning(kind), x, solver, steps=8, seed=1).x
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
            y = sf.solve(Turning(kind), x.to(dtype), solver, steps=8, seed=1).x
            assert (y.dtype, y.shape) == (dtype, x.shape)
            torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("solver", "kind"), CASES, ids=fitting_id)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_samples_bits_do_not_depend_on_the_batch(solver, kind, dtype):
    x = torch.rand(67, 3, dtype=dtype) + 0.2
    with torch.no_grad():
        whole = sf.solve(Turning(kind), x, solver, steps=6, seed=1).x
        for a, b in ((0, 1), (5, 6), (1, 3), (7, 23), (0, 64)):
            part = sf.solve(Turning(kind), x[a:b], solver, steps=6, seed=1, index=a).x
            assert torch.equal(part, whole[a:b]), (a, b)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_samples_bits_do_not_depend_on_the_batch_with_a_matrix(dtype):
    matrix = torch.randn(37, 37, dtype=F64, generator=torch.Generator().manual_seed(0)) / 37
    x = torch.rand(67, 37, dtype=dtype)
    with torch.no_grad():
        whole = sf.solve(Turning(), x, Splitting(matrix), steps=3, seed=1).x
        for a, b in ((0, 1), (1, 3), (7, 23), (0, 64)):
            assert torch.equal(sf.solve(Turning(), x[a:b], Splitting(matrix), steps=3, seed=1, index=a).x, whole[a:b])


@pytest.mark.parametrize(("solver", "kind"), CASES, ids=fitting_id)
def test_sixteen_bits_do_not_swallow_the_increments(solver, kind):
    """Steps of bfloat16 far below its spacing end where those of float32 do, to one rounding."""

    class Creeping(Turning):
        def drift(self, x, t):
            return torch.ones_like(x)

    sde = Creeping(kind, volatility=0.05)
    x = torch.full((4, 3), 8.0)  # the spacing there is 1/16, a step 1/48
    with torch.no_grad():
        exact = sf.solve(sde, x, solver, steps=48, seed=1).x
        got = sf.solve(sde, x.bfloat16(), solver, steps=48, seed=1).x
    torch.testing.assert_close(got.float(), exact, rtol=2**-8, atol=0)


def loss(solver, kind, x, rate, volatility):
    return sf.solve(Turning(kind, rate, volatility), x, solver, steps=2, seed=1).x.square().sum()


@pytest.mark.parametrize("interpretation", ["ito", "stratonovich"])
@pytest.mark.parametrize(("solver", "kind"), CASES, ids=fitting_id)
def test_gradients_are_finite_differences(solver, kind, interpretation, monkeypatch):
    """For x, for a parameter of the drift and for one of the diffusion, alone and together."""
    monkeypatch.setattr(Turning, "interpretation", interpretation)
    x = torch.rand(3, 2, dtype=F64) + 0.2
    leaves = [x.clone(), torch.tensor(0.7, dtype=F64), torch.tensor(0.3, dtype=F64)]
    for alone in ((0, 1, 2), (0,), (1,), (2,)) if interpretation == "ito" else ((0, 1, 2),):
        inputs = [v.clone().requires_grad_(i in alone) for i, v in enumerate(leaves)]
        got = torch.autograd.grad(loss(solver, kind, *inputs), [inputs[i] for i in alone])
        for i, gradient in zip(alone, got, strict=True):
            direction, eps = torch.ones_like(leaves[i]), 1e-6
            ends = []
            for sign in (1, -1):
                moved = [v + sign * eps * direction if j == i else v for j, v in enumerate(leaves)]
                with torch.no_grad():
                    ends.append(float(loss(solver, kind, *moved)))
            want = (ends[0] - ends[1]) / (2 * eps)
            assert float(gradient.sum()) == pytest.approx(want, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("solver", "kind"), CASES, ids=fitting_id)
def test_modes_without_gradients(solver, kind, mode):
    x = torch.rand(3, 2, dtype=F64) + 0.2
    graph = sf.solve(Turning(kind), x.clone().requires_grad_(), solver, steps=3, seed=1).x
    with mode():
        plain = sf.solve(Turning(kind), x, solver, steps=3, seed=1).x
    assert graph.requires_grad
    assert not plain.requires_grad
    torch.testing.assert_close(plain.clone(), graph.detach(), rtol=1e-12, atol=1e-12)
