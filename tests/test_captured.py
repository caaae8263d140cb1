"""Plans run in compiled blocks; the compiler's own backend is replaced by plain torch, except in the slow test."""

from __future__ import annotations

import pytest
import torch

import sdeflow as sf
from sdeflow.captured import CapturedRun
from sdeflow.solvers import DDIM, DDPM, RK4, DPMSolverPP, GaussianSplit, Heun, UniPC

PROCESS = sf.VP()
MODEL = sf.problems.EightGaussians().model(PROCESS)
START = PROCESS.prior_sample((16, 2), 0, dtype=torch.float64)


class Net(torch.nn.Module):
    """A small network of (x, t)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)

    def forward(self, x, t, shift=None):
        y = self.second(torch.tanh(self.first(torch.cat([x, t[:, None]], dim=1))))
        return y if shift is None else y + shift


def network(**conditions):
    torch.manual_seed(0)
    model = sf.Model(Net().double().requires_grad_(False), PROCESS, "v", time="lam")
    return model.bind(**conditions) if conditions else model


class Pendulum(sf.ODE):
    """x'' = -sin x."""

    t0, t1 = 0.0, 1.0

    def drift(self, x, t):
        return torch.stack([x[:, 1], -torch.sin(x[:, 0]) + 0.1 * t], dim=1)


def captured(problem, solver, grid, x):
    run = CapturedRun(solver.plan(problem, grid), problem, x, backend="eager")
    states = [x]
    for i in range(len(grid) - 1):
        states.append(run.step(i, states[-1]))
    return torch.stack(states), run


@pytest.mark.parametrize("steps", [1, 7, 11, 12, 23])
@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP(2), UniPC(3), GaussianSplit(3), Heun()], ids=lambda s: s.name)
def test_the_states_are_those_of_the_solve(solver, steps):
    model = network()
    problem = PROCESS.reverse(model, 0.0)
    grid = sf.grids.power(problem, steps)
    want = sf.solve(problem, START, solver, grid=grid, save=True)
    before = model.nfe
    got, run = captured(problem, solver, grid, START)
    torch.testing.assert_close(got, want.xs, rtol=1e-12, atol=1e-12)
    assert run.calls == want.stats.calls == model.nfe - before


def test_a_drift_and_conditions_are_run_too():
    x = torch.randn(4, 2, dtype=torch.float64)
    grid = torch.linspace(0, 1, 14, dtype=torch.float64)
    want = sf.solve(Pendulum(), x, RK4(), grid=grid).x
    torch.testing.assert_close(captured(Pendulum(), RK4(), grid, x)[0][-1], want, rtol=1e-12, atol=1e-13)
    problem = PROCESS.reverse(network(shift=torch.randn(16, 2, dtype=torch.float64)), 0.0)
    grid = sf.grids.power(problem, 6)
    want = sf.solve(problem, START, DPMSolverPP(2), grid=grid).x
    torch.testing.assert_close(captured(problem, DPMSolverPP(2), grid, START)[0][-1], want, rtol=1e-12, atol=1e-12)


def test_a_problem_is_compiled_once_however_often_it_is_solved(monkeypatch):
    made = []
    compiled = sf.captured._compiled
    monkeypatch.setattr(sf.captured, "_compiled", lambda ask, backend: made.append(ask) or compiled(ask, backend))
    grid, x = torch.linspace(0, 1, 5, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    problem = Pendulum()
    for _ in range(3):
        captured(problem, RK4(), grid, x)
    assert len(made) == 1
    captured(Pendulum(), RK4(), grid, x)  # another one may have other attributes
    assert len(made) == 2


def test_a_state_that_somebody_changed_is_gone_on_from():
    problem = PROCESS.reverse(network(), 0.0)
    grid = sf.grids.power(problem, 8)
    run = CapturedRun(DDIM().plan(problem, grid), problem, START, backend="eager")
    x = 0.5 * run.step(0, START)
    got = run.step(1, x)
    torch.testing.assert_close(got, sf.solve(problem, x, DDIM(), grid=grid[1:3]).x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: sf.sample(MODEL, 2, shape=(2,), steps=4, solver=DDPM(), compiled=True), "draws noise"),
        (lambda: sf.solve(PROCESS.reverse(MODEL, 0.0), START.half(), DDIM(), steps=4, compiled=True), "float32 or"),
        (
            lambda: sf.solve(
                PROCESS.reverse(MODEL, 0.0), START.clone().requires_grad_(), DDIM(), steps=4, compiled=True
            ),
            "no gradients",
        ),
        (
            lambda: sf.solve(
                PROCESS.reverse(MODEL, 0.0), START, DDIM(), steps=4, compiled=True, gradient="checkpointed"
            ),
            "records no gradients",
        ),
        (lambda: sf.solve(PROCESS.reverse(MODEL, 0.0), START, sf.solvers.ROS2(), steps=4, compiled=True), "a plan"),
        (
            lambda: sf.sample(
                sf.guidance.classifier_free(MODEL, MODEL, 2.0), 2, shape=(2,), solver=DDIM(), steps=4, compiled=True
            ),
            "one network",
        ),
    ],
)
def test_what_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.slow
def test_compiled_by_the_compiler_it_is_the_same_solve():
    problem = PROCESS.reverse(network(), 0.0)
    want = sf.solve(problem, START, UniPC(2), steps=20)
    with torch.no_grad():
        got = sf.solve(problem, START, UniPC(2), steps=20, compiled=True)
    torch.testing.assert_close(got.x, want.x, rtol=1e-9, atol=1e-9)
    assert got.stats.calls == want.stats.calls
