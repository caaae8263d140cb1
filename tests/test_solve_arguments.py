"""What `solve`, `iterate`, `sample` and `plan` refuse, before any model call."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.solvers import DDIM, DDPM, RK45, DPMSolverPP, Euler, EulerMaruyama, Heun, Langevin, PredictorCorrector
from tests.exact import F64
from tests.solve_cases import PLANAR, VP, Pendulum, Rates, Walk


def refuse(call, message, error=ValueError):
    model = PLANAR.model(VP)
    with pytest.raises(error, match=message):
        call(model)
    assert model.nfe == 0


X = torch.zeros(3, 2, dtype=F64)


def nan_at(row):
    x = X.clone()
    x[row, 1] = math.nan
    return x


GRIDS = [
    ([1.0, 0.5, 0.6, 0.1], "strictly monotone times in grid"),
    ([1.0, 0.5, 0.5, 0.1], "strictly monotone times in grid"),
    ([1.0, math.nan, 0.1], "finite times in grid"),
    ([1.2, 0.5, 0.1], r"times of grid in \[0, 1\], got 1.2 to 0.1"),
    ([1.0, 0.5, -0.1], r"times of grid in \[0, 1\], got 1 to -0.1"),
    ([1.0], r"shape \(steps \+ 1,\), got shape \(1,\)"),
    ([[1.0, 0.5]], r"got shape \(1, 2\)"),
]


@pytest.mark.parametrize("solver", [Heun(), DPMSolverPP(2), EulerMaruyama()], ids=lambda s: s.name)
@pytest.mark.parametrize(("grid", "message"), GRIDS)
def test_bad_grids(solver, grid, message):
    refuse(lambda m: sf.solve(VP.probability_flow(m), X, solver, grid=grid), message)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps >= 1, got 0"),
        ({"steps": -3}, ValueError, "steps >= 1, got -3"),
        ({"steps": 2.5}, TypeError, "steps as a whole number or None, got 2.5"),
        ({"steps": True}, TypeError, "steps as a whole number or None, got True"),
        ({}, ValueError, "expected steps=, grid="),
        ({"grid": sf.grids.uniform}, ValueError, "expected steps="),
        ({"steps": 3, "grid": [1.0, 0.5, 0.1]}, ValueError, "4 times for 3 steps, got 3"),
        ({"steps": 3, "t_span": (1.5, 0.1)}, ValueError, r"times of t_span in \[0, 1\], got 1.5"),
        ({"steps": 3, "t_span": (1.0, -0.1)}, ValueError, r"in \[0, 1\], got 1 to -0.1"),
        ({"steps": 3, "t_span": (0.5, 0.5)}, ValueError, "t_span"),
        ({"steps": 3, "t_span": (1.0, math.nan)}, ValueError, r"t_span as a tuple of 2 numbers or None, got \(1"),
        ({"steps": 3, "t_span": (1.0, 0.5, 0.1)}, ValueError, "t_span as a tuple of 2 numbers or None"),
        ({"grid": [1.0, 0.1], "t_span": (1.0, 0.1)}, ValueError, "not both"),
        ({"steps": 3, "rtol": 1e-3}, ValueError, "not both"),
        ({"rtol": -1e-3}, ValueError, "rtol >= 0"),
        ({"rtol": 0.0, "atol": 0.0}, ValueError, "above 0"),
        ({"rtol": math.nan}, ValueError, "rtol"),
        ({"rtol": 1e-3, "save": True}, ValueError, "times in save"),
        ({"rtol": 1e-3, "save": [0.5, 1.5]}, ValueError, "save times in"),
        ({"rtol": 1e-3, "save": [math.nan]}, ValueError, "save times in"),
        ({"rtol": 1e-3, "max_steps": 0}, ValueError, "max_steps >= 1"),
        ({"rtol": 1e-3, "t_span": (0.5, 0.5)}, ValueError, "t_span"),
        ({"steps": 3, "save": [0.123]}, ValueError, "times of the grid in save, got 0.123"),
        ({"grid": [1.0, 0.5, 0.1], "save": [0.1, 0.5]}, ValueError, "in the order of the solve"),
        ({"grid": [1.0, 0.5, 0.1], "save": [0.5, 0.5]}, ValueError, "without repeats"),
    ],
)  # fmt: skip
def test_bad_arguments(options, error, message):
    refuse(lambda m: sf.solve(VP.probability_flow(m), X, RK45(), **options), message, error)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (nan_at(1), ValueError, r"NaN or infinity in 1 samples \(first: 1\)"),
        (X + math.inf, ValueError, "NaN or infinity in 3 samples"),
        (torch.zeros(0, 2), ValueError, "at least one sample"),
        (torch.tensor(1.0), ValueError, "at least one sample"),
        (torch.zeros(3, 2, dtype=torch.int64), TypeError, "floating-point tensor, got torch.int64"),
        (torch.zeros(3, 2, dtype=torch.complex64), TypeError, "x as a tensor of real numbers, got a tensor of torch.c"),
        ([[0.0, 1.0]], TypeError, "x as a tensor of real numbers, got .*; torch.as_tensor"),
        (np.zeros((3, 2)), TypeError, "x as a tensor of real numbers, got a numpy array of float64"),
    ],
)
@pytest.mark.parametrize("how", [{"steps": 3}, {"rtol": 1e-3}])
def test_bad_states(x, error, message, how):
    refuse(lambda m: sf.solve(VP.probability_flow(m), x, RK45(), **how), message, error)


def flow(model):
    return VP.probability_flow(model)


def solve3(problem, solver, **options):
    return sf.solve(problem, X, solver, steps=3, **options)


def sample2(model, num=2, **options):
    options = {"solver": DDIM(), "steps": 3, **options}
    return sf.sample(model, num, shape=(2,), **options)


def plan4(model):
    return DPMSolverPP(2).plan(flow(model), sf.grids.uniform(VP, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: solve3(VP.reverse(m), Heun()), ValueError, "Heun is deterministic and the problem has noise"),
        (lambda m: sf.solve(VP.reverse(m), X, RK45(), rtol=1e-3), ValueError, "RK45 is deterministic"),
        (lambda m: solve3(VP.reverse(m), DDIM()), ValueError, "probability flow"),
        (lambda m: solve3(VP.reverse(m, 0.5), DDPM()), ValueError, "brings its own eta"),
        (lambda m: solve3(VP.reverse(m), DPMSolverPP(2, multistep=False)), ValueError, "probability flow"),
        (lambda m: sf.solve(flow(m), X, Heun(), rtol=1e-3), ValueError, "no error estimate"),
        (lambda m: sf.solve(flow(m), X, DPMSolverPP(2), rtol=1e-3), ValueError, "no error estimate"),
        (lambda m: solve3(Pendulum(), DPMSolverPP(2)), ValueError, "transition view"),
        (lambda m: solve3(Walk(), DDIM()), ValueError, "transition view"),
        (lambda m: solve3(Walk().reverse(m.score), DPMSolverPP(2)), ValueError, "transition view"),
        (lambda m: solve3(Walk(), PredictorCorrector(EulerMaruyama())), ValueError, "needs a score"),
        (lambda m: sf.solve(VP.reverse(m), X, EulerMaruyama(), grid=[0.1, 1.0]), ValueError, "runs down to"),
        (lambda m: sf.solve(Walk(), X, EulerMaruyama(), grid=[1.0, 0.1]), ValueError, "runs up from"),
        (lambda m: solve3(m, Heun()), TypeError, "problem as an ODE, SDE or ReverseSDE, got Model"),
        (lambda m: solve3(flow(m), Heun), TypeError, "got the function Heun; call it to make one"),
        (lambda m: solve3(flow(m), "heun"), TypeError, r"solver as a solver such as sf.solvers.Heun\(\)"),
        (lambda m: solve3(VP.reverse(m), EulerMaruyama(), seed="a"), TypeError, "seed as a whole number"),
        (lambda m: solve3(VP.reverse(m), DDPM(), index=torch.arange(4)), ValueError, r"\(3,\), got shape \(4,\)"),
        (lambda m: solve3(Rates([1.0, 2.0]), Heun()), ValueError, r"'k': expected 3 rows, got \(2,\)"),
        (lambda m: sf.solve(flow(m), X, plan4(m), steps=5), ValueError, "a plan has its own grid"),
        (lambda m: sf.solve(flow(m), X, plan4(m), t_span=(1.0, 0.1)), ValueError, "a plan has its own grid"),
        (lambda m: sample2(m, 0), ValueError, "num >= 1 samples, got 0"),
        (lambda m: sample2(m, 2.0), ValueError, "num as a whole number"),
        (lambda m: sample2(m.net), TypeError, "got the function _exact_v; wrap the network: sf.Model"),
        (lambda m: sample2(m, final="round"), ValueError, "final as one of 'stay', 'denoise', 'zero'"),
        (lambda m: sample2(m, final="zero", steps=None, grid=[1.0, 0.5]), ValueError, "ends the grid at t0"),
        (lambda m: sample2(m, eta=-1.0), ValueError, "eta >= 0"),
        (lambda m: sample2(m, final="zero", solver=PredictorCorrector(DDPM())), ValueError, "finite|sigma"),
        (lambda m: solve3(flow(m), PredictorCorrector(DDPM()), t_span=(1.0, 0.0)), ValueError, "finite|sigma"),
        (lambda m: sample2(m, steps=0), ValueError, "steps >= 1"),
        (lambda m: DPMSolverPP(4), ValueError, "order 1, 2 or 3, got 4"),
        (lambda m: DPMSolverPP(2, start="heun"), ValueError, "start as one of 'ramp', 'singlestep'"),
        (lambda m: DDIM(eta=1.5), ValueError, r"eta in \[0, 1\]"),
        (lambda m: Langevin(snr=0.0), ValueError, "snr > 0"),
        (lambda m: Langevin(steps=0), ValueError, "steps >= 1"),
        (lambda m: PredictorCorrector(Langevin()), TypeError, "predictor as a solver .*, got Langevin"),
        (lambda m: PredictorCorrector(EulerMaruyama(), 0.16), TypeError, "corrector as a Langevin, got 0.16"),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, message):
    refuse(call, message, error)


class Column(sf.SDE):
    """A drift or diffusion of another shape than it should have."""

    def __init__(self, drift=(3, 2), diffusion=(3, 2), noise="diagonal"):
        self.shapes, self.noise = (drift, diffusion), noise

    def drift(self, x, t):
        return torch.zeros(self.shapes[0], dtype=x.dtype)

    def diffusion(self, x, t):
        return torch.zeros(self.shapes[1], dtype=x.dtype)


@pytest.mark.parametrize("shape", [(3, 1), (1, 2), (2,), (), (3, 2, 1), (4, 2)])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("how", ["Euler", "Heun", "EulerMaruyama", "adaptive"])
def test_a_drift_of_another_shape_is_refused(shape, grad, how):
    """Also shapes that would broadcast in silence, by every method."""

    class Wrong(sf.ODE):
        def drift(self, x, t):
            return torch.zeros(shape, dtype=x.dtype)

    solver = {"Euler": Euler(), "Heun": Heun(), "EulerMaruyama": EulerMaruyama(), "adaptive": RK45()}[how]
    problem = Column(drift=shape) if how == "EulerMaruyama" else Wrong()
    options = {"rtol": 1e-3} if how == "adaptive" else {"steps": 2}
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"drift returned .* for x of shape \(3, 2\)"):
        sf.solve(problem, X, solver, seed=0, **options)


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (Column(diffusion=(4, 2)), r"broadcasts against x, \(3, 2\), got \(4, 2\)"),
        (Column(diffusion=(3, 2, 2)), r"broadcasts against x, \(3, 2\), got \(3, 2, 2\)"),
        (Column(diffusion=(3, 2), noise="general"), r"\(\*x.shape, m\) = \(3, 2, m\), got \(3, 2\)"),
        (Column(diffusion=(2, 2, 4), noise="general"), r"got \(2, 2, 4\)"),
        (Column(noise="scalar"), '"diagonal" or "general", got \'scalar\''),
    ],
)
def test_a_diffusion_of_another_shape_is_refused(sde, message):
    with pytest.raises(ValueError, match=message):
        sde.simulate(X, steps=2, seed=0)


def test_tableaus_check_themselves():
    table = RK45().tableau
    for changes, message in (
        ({"b": table.b[:-1]}, "7 weights b"),
        ({"b": (1, *table.b[1:])}, r"sum\(b\) = 1"),
        ({"c": (0, 0.3, *table.c[2:])}, "sum_j a_ij = c_i"),
        ({"a": table.a[::-1]}, "row i of a"),
        ({"b_error": (1, *table.b_error[1:])}, r"sum\(b_error\) = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(table, **changes)
