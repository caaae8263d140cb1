"""What `sdeflow.checked` wraps stays what it was: its signature, its pickles, its copies, its subclasses, its speed."""

import dataclasses
import inspect
import multiprocessing
import pickle
import timeit

import numpy as np
import pytest
import torch
from torch import Tensor

import sdeflow as sf
from sdeflow.checked import ArgumentError, checked, checked_class

WRAPPED = (sf.log_prob, sf.guidance.clip_x0, sf.losses.denoising, sf.problems.TwoMoons, sf.metrics.frechet)


@pytest.mark.parametrize("function", WRAPPED, ids=lambda f: f.__name__)
def test_functions_keep_what_tools_read(function):
    inner = inspect.unwrap(function)
    assert inner is not function
    assert inspect.signature(function) == inspect.signature(inner)
    assert function.__annotations__ == inner.__annotations__
    assert function.__doc__
    assert function.__doc__ == inner.__doc__
    assert (function.__module__, function.__qualname__) == (inner.__module__, inner.__qualname__)
    assert pickle.loads(pickle.dumps(function)) is function


def test_classes_keep_what_tools_read():
    assert list(inspect.signature(sf.VP).parameters) == ["beta_min", "beta_max"]
    assert sf.VP.__init__.__name__ == "__init__"
    process = sf.VP(0.2, 10.0)
    assert pickle.loads(pickle.dumps(process)) == process
    assert dataclasses.replace(process, beta_max=5.0) == sf.VP(0.2, 5.0)
    with pytest.raises(ArgumentError, match="beta_max as a number, got 'a'"):
        dataclasses.replace(process, beta_max="a")


def called(function, *values):
    return function(*values)


def test_under_spawn():
    """A fresh interpreter knows the same functions and refuses the same values."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(called, (sf.problems.TwoMoons, 0.2, 2)).means.shape == (4, 2)
        assert pool.apply(called, (sf.VP, 0.2)) == sf.VP(0.2)
        with pytest.raises(ArgumentError, match="std as a number"):
            pool.apply(called, (sf.problems.TwoMoons, "a"))


def test_cloudpickle():
    cloudpickle = pytest.importorskip("cloudpickle")

    @checked
    def local(x: float) -> float:
        return 2 * x

    again = pickle.loads(cloudpickle.dumps(local))
    assert again(2.0) == 4.0
    with pytest.raises(ArgumentError, match="x as a number"):
        again("a")
    assert pickle.loads(cloudpickle.dumps(sf.problems.TwoMoons)) is sf.problems.TwoMoons


def test_subclasses_may_have_constructors_of_their_own():
    class Own(sf.VP):
        def __init__(self, name):
            super().__init__(0.3, 4.0)
            object.__setattr__(self, "label", name)

    assert Own("text").beta_max == 4.0

    @checked_class
    class Wider(sf.GBM):
        def __init__(self, mu: float, note: str):
            super().__init__(mu)
            self.note = note

    assert Wider(0.2, "a").note == "a"
    with pytest.raises(ArgumentError, match="note as a string"):
        Wider(0.2, 3)


def test_the_function_does_not_run_before_the_check():
    ran = []

    @checked
    def act(x: float, y: Tensor | None = None, *more: int, **named: str) -> None:
        ran.append(x)

    for given in (("a",), (1.0, 3)):
        with pytest.raises(ArgumentError):
            act(*given)
    assert ran == []
    act(1, torch.ones(2), "passed on", named="too")
    assert ran == [1]


def test_numbers_of_numpy_are_numbers():
    """They come out of every loop over an array of settings, and are then printed, saved and compared."""
    two = np.int64(2)
    assert sf.solvers.DPMSolverPP(two) == sf.solvers.DPMSolverPP(2)
    assert repr(sf.solvers.DPMSolverPP(two)) == repr(sf.solvers.DPMSolverPP(2))
    assert sf.solvers.Langevin(snr=np.float32(0.25), steps=two) == sf.solvers.Langevin(snr=0.25, steps=2)
    assert type(sf.VP(np.float64(0.2)).beta_min) is float
    process = sf.VP()
    model = sf.problems.TwoMoons().model(process)
    for steps in np.array([2, 3]):
        run = sf.sample(model, np.int64(3), shape=(two,), solver=sf.solvers.DDIM(), steps=steps, seed=np.uint8(1))
        want = sf.sample(model, 3, shape=(2,), solver=sf.solvers.DDIM(), steps=int(steps), seed=1)
        assert torch.equal(run.x, want.x)
    assert repr(sf.recommend(process, nfe=np.int64(10)).solver) == repr(sf.recommend(process, nfe=10).solver)
    assert sf.bench.methods.budgets(np.array([10, 5])) == [5, 10]
    with pytest.raises(ArgumentError, match="steps as a whole number or None, got"):
        sf.sample(model, 3, shape=(2,), solver=sf.solvers.DDIM(), steps=np.float64(2.5))
    with pytest.raises(ArgumentError, match="beta_min as a number, got"):
        sf.VP(np.float64("nan"))


def test_a_check_costs_less_than_two_microseconds_an_argument(record_property):
    def act(a: float, b: int, c: Tensor, d: tuple[float, float], e: str = "e") -> None:
        pass

    given = (1.0, 2, torch.ones(3), (1.0, 2.0))
    guarded = checked(act)
    guarded(*given)  # the annotations are read once

    def seconds(function):
        return min(timeit.repeat(lambda: function(*given), number=2000, repeat=7)) / 2000

    each = min((seconds(guarded) - seconds(act)) / len(given) for _ in range(5))
    print(f"{1e6 * each:.2f} microseconds an argument")
    record_property("microseconds an argument", round(1e6 * each, 3))
    assert each < 2e-6
