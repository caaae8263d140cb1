"""`check_solver`: every method of the catalogue passes, and every planted fault is caught by the identity named for it.

The strong orders are fits over 64 to 256 paths of one seed: over seeds their standard deviation is 0.03 to 0.06 of an
order, against a slack of 0.25 (measured with half the paths). The seed is fixed; all else has no sampling error.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.noise import CORRECTOR
from sdeflow.plan import Plan
from sdeflow.solvers import (
    CATALOGUE,
    DDIM,
    DDPM,
    RK4,
    SRIW1,
    Adams,
    AdamsBashforth,
    DPMSolverPP,
    EulerMaruyama,
    Heun,
    Milstein,
    RungeKutta,
    Solver,
    UniPC,
)  # fmt: skip
from sdeflow.solvers.stochastic import root, size
from sdeflow.solvers.stochastic_rk import SRA, SRA1_TABLEAU
from sdeflow.testing.report import CheckError
from sdeflow.testing.solvers import check_solver
from tests.sde_solver_cases import ItoDrift, WithoutArea

F64 = torch.float64


# ---- the library's methods


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.name)
def test_every_method_of_the_catalogue_passes(row):
    report = check_solver(row.make()).verify()
    assert f"row {row.name})" in report.facts["declares"]
    verdicts = {f.identity: f.verdict for f in report.findings}
    for name in ("calls reported", "calls a step", "replay", "batch split", "one bad sample", "gradient", "bfloat16"):
        assert verdicts[name] == "pass"
    for name, declared in (
        ("order", row.order), ("weak order", row.weak_order), ("strong order, additive noise", row.strong_order),
        ("strong order, diagonal noise", row.strong_diagonal), ("moments, diagonal noise", row.strong_diagonal),
    ):  # fmt: skip
        assert (verdicts[name] == "pass") == (declared is not None), name
    if row.order is not None:
        assert verdicts["constant" if row.view == "drift" else "linear part"] == "pass"


# ---- a method of one's own


class ByHand(Solver):
    """Heun's method without a plan, as a user writes it; the mutants below change one thing of it."""

    name = "by hand"

    def check(self, problem):
        if problem.stochastic:
            raise ValueError("by hand: deterministic")

    def stepper(self, problem, x, grid, noise):
        return self.run(problem, grid)

    class run:
        def __init__(self, problem, grid):
            self.problem, self.grid, self.calls = problem, grid, 0

        def drift(self, x, t):
            self.calls += 1
            return self.problem.drift(x, t)

        def size(self, i):
            return float(self.grid[i + 1] - self.grid[i])

        def step(self, i, x):
            h = self.size(i)
            first = self.drift(x, self.grid[i])
            return x + 0.5 * h * (first + self.drift(x + h * first, self.grid[i + 1]))


HEUN = {"order": 2, "nfe_per_step": 2}


class WithNoise(ByHand):
    """Euler-Maruyama by hand."""

    name = "by hand, with noise"

    def check(self, problem):
        if not problem.stochastic:
            raise ValueError("by hand: for noise")

    def stepper(self, problem, x, grid, noise):
        return self.run(problem, grid, noise.walk(grid, x.shape[1:], x.dtype), noise)

    class run(ByHand.run):
        def __init__(self, problem, grid, walk, noise):
            super().__init__(problem, grid)
            self.walk, self.noise = walk, noise

        def kick(self, i, x):
            return self.walk(i).w

        def step(self, i, x):
            w = self.kick(i, x)
            g = self.problem.diffusion(x, self.grid[i])
            self.calls += 1
            return x + self.size(i) * self.problem.ito_drift(x, self.grid[i]) + g * w


EULER = {"strong_order": {"additive": 1, "diagonal": 0.5}, "weak_order": 1, "nfe_per_step": 1}


def test_a_method_of_ones_own_passes():
    report = check_solver(ByHand(), **HEUN).verify()
    assert report.facts["problems"] == "an ordinary equation"
    assert report["plan"].verdict == report["weak order"].verdict == "not tested"
    report = check_solver(WithNoise(), **EULER).verify()
    assert report.facts["problems"] == "additive noise, diagonal noise"
    assert report["weak order"].verdict == report["moments, diagonal noise"].verdict == "pass"


def test_without_a_claim_nothing_is_claimed():
    report = check_solver(ByHand())
    assert report.ok
    for name in ("order", "calls a step", "weak order", "strong order, additive noise"):
        assert report[name].verdict == "not tested"


# ---- planted faults


def tableau(**fields):
    return RungeKutta(dataclasses.replace(RK4().tableau, **fields))


def changed(solver, change):
    """The solver whose plans go through `change(plan, problem, grid)`."""

    def plan(self, problem, grid):
        return change(super(type(self), self).plan(problem, grid), problem, grid)

    kind = type(type(solver).__name__, (type(solver),), {"plan": plan})
    made = object.__new__(kind)
    made.__dict__.update(solver.__dict__)
    return made


def scaled(plan, **factors):
    return dataclasses.replace(plan, **{name: getattr(plan, name) * factor for name, factor in factors.items()})


def late(plan, problem, grid):
    times = plan.times.clone()
    times[3::4] -= 0.1 * torch.diff(grid)
    return dataclasses.replace(plan, times=times)


def last_weight(plan, problem, grid):
    """b_4 = 0.1667 for 1/6."""
    weights = plan.weights.clone()
    weights[3::4, 0] *= 6 * 0.1667
    return dataclasses.replace(plan, weights=weights)


def second_weight(plan, problem, grid):
    weights = plan.weights.clone()
    weights[:, 1] *= 1.01
    return dataclasses.replace(plan, weights=weights)


def this_alpha(plan, problem, grid):
    process = problem.gaussian
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    return dataclasses.replace(plan, weights=(alpha[:-1] * (1 - sigma[1:] / sigma[:-1]))[:, None])


def equal_steps(plan, problem, grid):
    """Adams-Bashforth's constants of equal steps on any grid."""
    weights = plan.weights.clone()
    for k, step in enumerate(plan.step_of_row.tolist()):
        used = torch.nonzero(weights[k]).flatten()
        if step > 1 and len(used) == 3:
            weights[k, used] = (grid[step + 1] - grid[step]) * torch.tensor([23, -16, 5], dtype=F64) / 12
    return dataclasses.replace(plan, weights=weights)


class OneSided(Milstein):
    """A one-sided difference over the length of the two-sided one."""

    def step(self, terms, x, t, h, w, area):
        g = terms.diffusion(x, t)
        slope = (terms.diffusion(x + root(h) * g, t) - g) / (2 * root(h))
        return x + h * terms.drift(x, t) + g * w + 0.5 * slope * (w * w - size(h))


class WrongSign(Milstein):
    def step(self, terms, x, t, h, w, area):
        g, slope = terms.slope(x, t)
        return x + h * terms.drift(x, t) + g * w - 0.5 * slope * (w * w - size(h))


class Wide(SRIW1):
    """Its increments a little too wide, where a step has powers of them."""

    def step(self, terms, x, t, h, w, area):
        return super().step(terms, x, t, h, 1.01 * w, area)


@dataclasses.dataclass(frozen=True)
class AreaDownwards(SRA):
    def step(self, terms, x, t, h, w, area):
        return super().step(terms, x, t, h, w, area if h > 0 else -area)


def by_hand(base, **methods):
    """`base` whose run has other methods."""
    return type(base.__name__, (base,), {"run": type("run", (base.run,), methods)})()


def own_random(run, i, x):
    return torch.randn_like(x) * math.sqrt(abs(run.size(i)))


def by_position(run, i, x):
    """The path of the place in the batch."""
    return sf.Noise(run.noise.seed, len(x)).normal(CORRECTOR, i, x.shape[1:], x.dtype) * math.sqrt(abs(run.size(i)))


def one_seed(run, i, x):
    return sf.Noise(7, len(x), index=run.noise.index).normal(CORRECTOR, i, x.shape[1:], x.dtype) * math.sqrt(
        abs(run.size(i))
    )


def batch_mean(run, i, x):
    return ByHand.run.step(run, i, x) + 1e-9 * x.mean(0)


def in_float32(run, i, x):
    return ByHand.run.step(run, i, x.float()).to(x.dtype)


def in_float64(run, i, x):
    return ByHand.run.step(run, i, x.double())


def in_place(run, i, x):
    return x.copy_(ByHand.run.step(run, i, x)) if not x.requires_grad and not x.grad_fn else ByHand.run.step(run, i, x)


def detached(run, i, x):
    return x + (ByHand.run.step(run, i, x) - x).detach()


def all_or_none(run, i, x):
    y = ByHand.run.step(run, i, x)
    return y if bool(torch.isfinite(y).all()) else x


def length(run, i):
    return abs(float(run.grid[i + 1] - run.grid[i]))


def half_the_calls(run, x, t):
    run.calls += 0.5
    return run.problem.drift(x, t)


class TwoPlans(EulerMaruyama):
    """Its stepper is not its plan's."""

    def stepper(self, problem, x, grid, noise):
        return scaled(self.plan(problem, grid), weights=1 + 1e-15).stepper(problem, x, grid, noise)


SRA1_CLAIMS = {"strong_order": {"additive": 1.5}, "weak_order": 2}
MUTANTS = {
    "a Runge-Kutta weight moved": (tableau(b=(0.19, 0.31, 1 / 3, 1 / 6)), {}, "order"),
    "a final coefficient": (changed(RK4(), last_weight), {"order": 4}, "constant"),
    "the last stage at another time": (changed(RK4(), late), {"order": 4}, "order"),
    "constants of equal steps": (changed(AdamsBashforth(3), equal_steps), {"order": 3, "nfe_per_step": 1}, "order"),
    "constants of equal steps, by the plan": (
        changed(AdamsBashforth(3), equal_steps), {"order": 3, "nfe_per_step": 1}, "plan's degree"),
    "alpha of the step's start": (changed(DDIM(), this_alpha), {"order": 1}, "linear part"),
    "a weight off by 1%": (changed(UniPC(2), second_weight), {"order": 3}, "order"),
    "|h| for h": (by_hand(ByHand, size=length), HEUN, "both ways"),
    "a derivative from one side": (OneSided(), {}, "strong order, diagonal noise"),
    "the correction's sign": (WrongSign(), {}, "strong order, diagonal noise"),
    "Ito's drift for Stratonovich's": (ItoDrift(), {}, "moments, diagonal noise"),
    "the area left out": (WithoutArea(SRA1_TABLEAU, "SRA1"), SRA1_CLAIMS, "strong order, additive noise"),
    "the area's sign downwards": (AreaDownwards(SRA1_TABLEAU, "SRA1"), SRA1_CLAIMS, "strong order, additive noise"),
    "noise by h for sqrt(h)": (
        changed(EulerMaruyama(), lambda plan, problem, grid: scaled(plan, noise=torch.diff(grid).abs().sqrt())),
        EULER, "weak order"),
    "noise 2% too large": (changed(DDPM(), lambda plan, *_: scaled(plan, noise=1.02)), {"weak_order": 1}, "weak order"),
    "noise 1% too large, with powers": (Wide(), {"weak_order": 2}, "weak order"),
    "increments 0.1% too large": (
        changed(EulerMaruyama(), lambda plan, *_: scaled(plan, noise=1.001)), EULER, "constant noise"),
    "torch.randn": (by_hand(WithNoise, kick=own_random), EULER, "replay"),
    "noise by position": (by_hand(WithNoise, kick=by_position), EULER, "batch split"),
    "one seed for all": (by_hand(WithNoise, kick=one_seed), EULER, "another seed"),
    "noise of another path": (by_hand(WithNoise, kick=by_position), EULER, "strong order, additive noise"),
    "the batch's mean": (by_hand(ByHand, step=batch_mean), HEUN, "batch split"),
    "a cast to float32": (by_hand(ByHand, step=in_float32), HEUN, "constant"),
    "a cast to float64": (by_hand(ByHand, step=in_float64), HEUN, "dtype and shape"),
    "a write into the input": (by_hand(ByHand, step=in_place), HEUN, "input untouched"),
    "half of the calls": (by_hand(ByHand, drift=half_the_calls), HEUN, "calls reported"),
    "twice the calls declared": (ByHand(), {**HEUN, "nfe_per_step": 1}, "calls a step"),
    "an order declared too high": (Heun(), {"order": 3}, "order"),
    "a step cut from the graph": (by_hand(ByHand, step=detached), HEUN, "gradient"),
    "one bad sample stops all": (by_hand(ByHand, step=all_or_none), HEUN, "one bad sample"),
    "a plan that is another method": (TwoPlans(), EULER, "plan"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_fault_is_caught(name):
    solver, claims, identity = MUTANTS[name]
    report = check_solver(solver, **claims)
    finding = report[identity]
    margin = finding.residual / finding.tolerance if finding.tolerance else math.inf
    failed = [f.identity for f in report.findings if f.verdict == "fail"]
    print(f"{name:32s} {identity:30s} {finding.residual:9.2e} / {finding.tolerance:7.1e} = {margin:9.3g}  {failed}")
    assert finding.verdict == "fail"
    assert margin > 1.5
    assert not report.ok
    with pytest.raises(CheckError, match=identity.replace("'", ".")):
        report.verify()


# ---- problems of one's own, and errors


class Pendulum(sf.ODE):
    def drift(self, x, t):
        return torch.stack([x[..., 1], -x[..., 0] * (1 - x[..., 0] ** 2 / 6)], -1)


class Kinked(sf.ODE):
    """A drift with a jump in its slope, which the states cross."""

    def drift(self, x, t):
        return 1.0 + 2 * torch.clamp(x, min=0.0)


def test_a_given_problem_is_added():
    report = check_solver(RK4(), problem=Pendulum()).verify()
    assert report["order, given problem"].verdict == "pass"
    assert report.facts["problems"].endswith("the given problem")
    rough = check_solver(RK4(), problem=Kinked())
    assert [f.identity for f in rough.findings if f.verdict == "fail"] == ["order, given problem"]
    law = sf.problems.Gaussian([0.5, 0.1], [0.2, 0.4])
    reverse = sf.VP().reverse(law.model(sf.VP()), 1.0)
    assert check_solver(DPMSolverPP(2), problem=reverse)["replay"].verdict == "pass"


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize(("order", "steps"), [(p, n) for p in (2, 3, 4, 5) for n in range(1, p)])
def test_grids_shorter_than_the_start_are_all_start(order, steps, corrector):
    x = torch.tensor([[0.5, 0.2], [1.0, -1.0]], dtype=F64)
    grid = torch.linspace(0, 1, steps + 1, dtype=F64) ** 1.3
    method = Adams(order, corrector=corrector, start="runge-kutta")
    runs = [sf.solve(Pendulum(), x, solver, grid=grid) for solver in (method, RK4())]
    assert torch.equal(runs[0].x, runs[1].x)
    assert runs[0].stats.nfe == runs[1].stats.nfe == 4 * steps


def test_another_seed_is_another_path():
    first, second = (check_solver(Milstein(), seed=s).verify()["strong order, diagonal noise"] for s in (0, 1))
    assert first.where["errors"] != second.where["errors"]
    again = check_solver(Milstein(), seed=1)["strong order, diagonal noise"]
    assert again.where == second.where


def test_fitted_orders_are_those_of_the_errors():
    where = check_solver(Heun())["order"].where
    slope = np.polyfit(np.log(1 / np.array(where["steps"])), np.log(where["errors"]), 1)[0]
    assert where["fitted"] == pytest.approx(slope, rel=1e-9)


def test_errors():
    flow = sf.VP().probability_flow(sf.problems.Gaussian([0.5], [0.2]).model(sf.VP()))
    with pytest.raises(TypeError, match="not a plan"):
        check_solver(DDIM().plan(flow, torch.tensor([0.8, 0.4], dtype=F64)))
    with pytest.raises(TypeError, match=r"solver as a solver .*, got the function Heun; call it to make one"):
        check_solver(Heun)
    with pytest.raises(ValueError, match="does not take the given problem"):
        check_solver(DDIM(), problem=Pendulum())
    with pytest.raises(ValueError, match="additive"):
        check_solver(Milstein(), strong_order={"general": 1.0})
    assert isinstance(DDIM().plan(flow, torch.tensor([0.8, 0.4], dtype=F64)), Plan)


def test_a_solver_that_takes_nothing_is_not_ok():
    report = check_solver(by_hand(ByHand, step=lambda run, i, x: (_ for _ in ()).throw(ValueError("never"))))
    assert not report.ok
    assert "never" in report.warnings[0]
