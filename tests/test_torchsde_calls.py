"""torchsde behind `solve`: what is called and how, seeds, gradients."""

import math

import numpy as np
import pytest
import torch
import torchsde

import sdeflow as sf
from sdeflow.solvers import Torchsde
from tests.exact import F64
from tests.torchsde_cases import (
    CALLS,
    GENERAL,
    METHODS,
    Geometric,
    Mixed,
    Plain,
    Recording,
    Wavering,
    kind,
    reversal,
    start,
    tolerant,
)

# ---- what is called, and how


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_steps_asked_for(method):
    for steps in (1, 3, 7, 10, 49, 100):
        problem = Recording(Geometric(kind(method)))
        stats = sf.solve(problem, start(), Torchsde(method), steps=steps, seed=0).stats
        expected = CALLS.get(method, 1) * steps + (method == "reversible_heun")
        assert stats.nfe == stats.calls == len(problem.times) == expected
        assert stats.steps == steps
    assert 0 <= min(problem.times) <= max(problem.times) <= 1


def test_sdeint_alone_makes_another_step_and_another_call():
    """The faults that ours has not: ten steps of 0.1 end before 1.0, and each call looks at shapes first."""
    for dtype, dt, calls in ((F64, 0.1, 12), (torch.float32, 0.01, 102), (F64, 0.125, 9)):
        problem = Recording(Geometric())
        theirs = Plain(lambda t, y, problem=problem: problem.drift(y, t), lambda t, y: y)
        torchsde.sdeint(theirs, start(), torch.tensor([0.0, 1.0], dtype=dtype), method="euler", dt=dt)
        assert len(problem.times) == calls


def test_additive_noise_costs_srk_three_calls():
    for problem in (sf.VP(), reversal()):
        assert sf.solve(problem, start(), Torchsde("srk"), steps=10, seed=0).stats.nfe == 30


@pytest.mark.parametrize("method", METHODS)
def test_no_call_leaves_the_span(method):
    """t + (t' - t) passes t' by a rounding, for a quarter of these spans."""
    for low, high in np.random.default_rng(0).uniform([1e-3, 0.4], [0.3, 1.0], (30, 2)).tolist():
        for problem, grid in (
            (Recording(Geometric(kind(method))), [low, high]),
            (Recording(sf.VP()), [low, high]),
            (Recording(reversal()), [high, low]),
        ):
            sf.solve(problem, start(1), Torchsde(method), grid=grid, seed=0)
            times = problem.times + problem.noise_times
            assert low <= min(times) <= max(times) <= high


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_events_of_any_shape(method, shape):
    flat = start(4, max(1, math.prod(shape[1:])))
    problem = Recording(Wavering(kind(method)))
    got = sf.solve(problem, flat.reshape(shape), Torchsde(method), steps=5, seed=0).x
    assert {k[1] for k in problem.kinds} == {shape}
    assert torch.equal(got, sf.solve(problem, flat, Torchsde(method), steps=5, seed=0).x.reshape(shape))


def test_a_diffusion_that_broadcasts():
    class Row(sf.SDE):
        def __init__(self, value):
            self.value = value

        def drift(self, x, t):
            return -x

        def diffusion(self, x, t):
            return self.value

    x = start(4, 6).reshape(4, 3, 2)
    values = [0.3, torch.tensor(0.3), torch.full((2,), 0.3, dtype=F64), torch.full((4, 1, 1), 0.3, dtype=F64)]
    for method in METHODS[:3]:
        runs = [sf.solve(Row(v), x, Torchsde(method), steps=4, seed=0).x for v in values]
        for got in runs[1:]:
            torch.testing.assert_close(got, runs[0], rtol=1e-6, atol=1e-6)  # 0.3 in float32 among them


# ---- seeds


def test_a_run_is_a_function_of_the_seed_the_indices_and_the_batch():
    problem, x = Wavering(), start()

    def run(seed, x=x, **options):
        return sf.solve(problem, x, Torchsde("srk"), steps=5, seed=seed, **options).x

    first = run(1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(run(1), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(run(1, index=0), first)
    assert torch.equal(run(-1), run(2**64 - 1))
    others = [run(2), run(1, index=6), run(1, index=torch.tensor([1, 0, 2, 3, 4, 5]))]
    for i, a in enumerate([first, *others]):
        for b in others[i:]:
            assert float((a - b).abs().min()) > 1e-6
    # what torchsde cannot do: sample 0 is another in another batch
    assert float((run(1, x[:4]) - first[:4]).abs().min()) > 1e-6


def test_a_seed_that_was_drawn_is_in_the_solution():
    problem, x = Wavering(), start()
    drawn = sf.solve(problem, x, Torchsde(), steps=5)
    assert torch.equal(sf.solve(problem, x, Torchsde(), steps=5, seed=drawn.seed).x, drawn.x)
    assert sf.solve(problem, x, Torchsde(), steps=5).seed != drawn.seed


def test_a_seed_reaches_a_solve_to_a_tolerance():
    problem, x = Wavering(), start()
    runs = [sf.solve(problem, x, Torchsde(), rtol=1e-2, seed=s, index=i).x for s, i in ((1, 0), (1, 0), (2, 0), (1, 6))]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], tolerant(problem, x, Torchsde(), 1e-2, seed=1).x)
    assert min(float((r - runs[0]).abs().min()) for r in runs[2:]) > 1e-6


def test_without_noise_it_solves_the_flow():
    """eta = 0: srk is then a Runge-Kutta method (of order 2 for additive noise), in either direction."""
    flow, x = reversal(0.0), start()
    want = sf.solve(flow, x, sf.solvers.DOP853(), rtol=1e-10, atol=1e-10, t_span=(1.0, 0.1))
    got = sf.solve(flow, x, Torchsde("srk"), steps=200, t_span=(1.0, 0.1))
    assert got.seed is None
    torch.testing.assert_close(got.x, want.x, rtol=0, atol=1e-3)
    back = sf.solve(flow, got.x, Torchsde("srk"), steps=200, t_span=(0.1, 1.0)).x
    torch.testing.assert_close(back, x, rtol=0, atol=1e-3)


# ---- gradients


@pytest.mark.parametrize("method", METHODS)
def test_gradients_flow(method):
    problem, x = Wavering(kind(method)), start(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sf.solve(problem, x, Torchsde(method), steps=3, seed=0).x, x)
    # on fixed steps: a step's size is no function of x
    loose = Torchsde(method, first_step=0.5)
    if method != "euler":
        assert torch.autograd.gradcheck(lambda x: tolerant(problem, x, loose, tolerance=1e3, save=[1.0]).xs, x)


class Scaled(sf.SDE):
    """A drift and a diffusion with a parameter each."""

    interpretation = "stratonovich"

    def __init__(self, a, b):
        self.a, self.b = a, b

    def drift(self, x, t):
        return self.a * x

    def diffusion(self, x, t):
        return self.b * x


class ScaledGeneral(Scaled):
    noise = "general"

    def diffusion(self, x, t):
        return torch.stack([self.b * x, torch.sin(x)], -1)


@pytest.mark.parametrize(("method", "make"), [("milstein", Scaled), ("log_ode", ScaledGeneral), ("heun", Scaled)])
def test_a_graph_is_left_only_for_who_differentiates(method, make):
    """torchsde differentiates the diffusion for itself in milstein and log_ode."""
    x, number = start(2), torch.tensor(0.3, dtype=F64)
    for how in ({"steps": 3}, {"rtol": 1e-1}):
        assert not sf.solve(make(number, number), x, Torchsde(method), **how).x.requires_grad
    for i in range(2):
        leaf = number.clone().requires_grad_()
        args = [leaf if j == i else number for j in range(2)]
        solution = sf.solve(make(*args), x, Torchsde(method), steps=3, seed=0).x
        (got,) = torch.autograd.grad(solution.sum(), leaf)

        def shifted(by, i=i):
            args = [number + by if j == i else number for j in range(2)]
            return float(sf.solve(make(*args), x, Torchsde(method), steps=3, seed=0).x.sum())

        want = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
        assert abs(float(got) - want) < 1e-6 * abs(want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_modes_without_gradients(method, mode):
    for problem in (Wavering(kind(method)), Mixed(kind(method))):
        if problem.noise == "general" and method not in GENERAL:
            continue
        want = sf.solve(problem, start(), Torchsde(method), steps=5, seed=0).x
        with mode():
            x = start() + 0.0
            got = sf.solve(problem, x, Torchsde(method), steps=5, seed=0, save=True)
            if not (method == "euler" or problem.noise == "general"):
                assert bool(tolerant(problem, x, Torchsde(method), 1e-1, save=[1.0]).ok.all())
        assert not got.x.requires_grad
        assert torch.equal(got.x.clone(), want)
