"""Combinations in float64 around a float32 network."""

from __future__ import annotations

import pytest
import torch

import sdeflow as sf
from sdeflow.solvers import DDIM, DDPM, RK45, ROS2, Compensated, DPMSolverPP, EulerMaruyama, GaussianSplit, Heun, UniPC

MODEL = sf.problems.EightGaussians().model(sf.VP())
PROCESS = MODEL.gaussian
START = PROCESS.prior_sample((256, 2), 0, dtype=torch.float32)


def lost(solver, steps, eta=0.0):
    """Median difference of a float32 solve from the float64 one on the same noise."""
    problem = PROCESS.reverse(MODEL, eta)
    exact = sf.solve(problem, START.double(), solver, steps=steps, seed=0).x
    with torch.no_grad():
        found = sf.solve(problem, START, solver, steps=steps, seed=0).x
    assert found.dtype == torch.float32
    return float((found.double() - exact).square().mean(1).sqrt().median())


@pytest.mark.parametrize("solver", [DDIM(), Heun(), DPMSolverPP(2), UniPC(3), GaussianSplit(3)], ids=lambda s: s.name)
def test_the_loss_of_float32_does_not_grow_with_the_steps(solver):
    for steps in (50, 400):
        assert lost(Compensated(solver), steps) < 6e-8
    assert lost(solver, 400) > 2e-7  # the control: plain float32 grows


@pytest.mark.parametrize("solver", [DDPM(), EulerMaruyama(), DPMSolverPP(2)], ids=lambda s: s.name)
def test_it_takes_noise_as_its_solver_does(solver):
    eta = 0.0 if solver.name == "DDPM" else 1.0
    assert lost(Compensated(solver), 100, eta) < 5e-7


def test_it_is_its_solver_in_float64():
    problem, x = PROCESS.reverse(MODEL, 0.0), START.double()
    for solver in (DDIM(), UniPC(2), Heun()):
        one, other = (sf.solve(problem, x, s, steps=12).x for s in (solver, Compensated(solver)))
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


def test_gradients_flow():
    x = START[:4].clone().requires_grad_()
    sf.solve(PROCESS.reverse(MODEL, 0.0), x, Compensated(DPMSolverPP(2)), steps=8).x.square().sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert bool((x.grad != 0).any())


def test_what_is_refused():
    with pytest.raises(TypeError, match="a solver with a plan"):
        Compensated(ROS2())
    with pytest.raises(ValueError, match="is deterministic"):
        sf.solve(PROCESS.reverse(MODEL, 1.0), START, Compensated(RK45()), steps=4)
