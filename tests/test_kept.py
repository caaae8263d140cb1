"""What is kept between solves, and what never is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import sdeflow as sf
from sdeflow import kept
from sdeflow.kept import Kept, constant
from sdeflow.solvers import DDIM, DPMSolverPP, EulerMaruyama, Heun

DATA = sf.problems.EightGaussians()


def test_the_oldest_is_forgotten_and_what_has_no_key_is_made_anew():
    made = []
    store = Kept(2)
    for key in ("a", "b", "a", "c", "b", None, None):
        store.get(key, lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "b", None, None]
    kept.forget()
    store.get("b", lambda: made.append("again"))
    assert made[-1] == "again"


@pytest.mark.parametrize(
    "value", [sf.VP(), sf.EDM(), sf.DiscreteVP(torch.linspace(1e-4, 0.02, 10)), DDIM(), Heun(), 0.5, None, (1, "x")]
)
def test_what_cannot_change(value):
    assert constant(value)


@dataclasses.dataclass
class Loose(sf.GaussianSDE):
    """A process whose parameter may be set."""

    rate: float = 1.0
    t0: float = 0.0
    t1: float = 1.0

    def alpha(self, t):
        return torch.exp(-self.rate * t)

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-2 * self.rate * t))


@pytest.mark.parametrize("value", [Loose(), lambda t: t, torch.ones(2), [1], (1, [2]), DPMSolverPP])
def test_what_may_change(value):
    assert not constant(value)


def test_a_process_that_was_changed_is_solved_as_it_is_now():
    """The tables of the first solve would give the first answer."""
    process = Loose(rate=1.0)
    x = torch.randn(4, 2, dtype=torch.float64)
    for rate in (1.0, 3.0):
        process.rate = rate
        fresh = Loose(rate=rate)
        got, want = (
            sf.solve(p.reverse(DATA.model(p), 0.0), x, DDIM(), grid=[1.0, 0.5, 0.1]).x for p in (process, fresh)
        )
        assert torch.equal(got, want)


def test_an_eta_that_reads_what_changes_is_read_each_time():
    scale = [0.0]
    process = sf.VP()
    problem = process.reverse(DATA.model(process), lambda t: scale[0] * torch.ones_like(t))
    x = process.prior_sample((4, 2), 0, dtype=torch.float64)
    first = sf.solve(problem, x, EulerMaruyama(), steps=5, seed=0).x
    scale[0] = 1.0
    assert not torch.equal(first, sf.solve(problem, x, EulerMaruyama(), steps=5, seed=0).x)


@pytest.mark.parametrize("solver", [DDIM(), Heun(), DPMSolverPP(2)], ids=lambda s: s.name)
def test_the_kept_solve_is_the_first_one_and_its_plan_is_made_once(solver, monkeypatch):
    process = sf.DiscreteVP(torch.linspace(1e-4, 0.02, 40))
    problem = process.reverse(DATA.model(process), 0.0)
    x = process.prior_sample((4, 2), 0, dtype=torch.float64)
    kept.forget()
    calls = []
    plan = type(solver).plan
    monkeypatch.setattr(type(solver), "plan", lambda self, *a: calls.append(1) or plan(self, *a))
    first, second = (sf.solve(problem, x, solver, steps=7).x for _ in range(2))
    assert torch.equal(first, second)
    assert len(calls) == 1
    sf.solve(problem, x, solver, steps=8)
    assert len(calls) == 2
