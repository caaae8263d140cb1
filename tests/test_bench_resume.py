"""A benchmark that was broken off goes on where it was, on any engine, to the same figures."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch

import sdeflow as sf
from sdeflow.bench import run
from sdeflow.bench.results import read, write
from sdeflow.bench.work import MARK
from sdeflow.engine import Engine, Local, Ray

HOW = {"solvers": ["DDIM", "Heun", "DDPM"], "grids": ["uniform", "karras"], "nfe": [4, 5, 8], "command": "a test"}
RESULTS = "results.jsonl"
TIMES = {"wall_seconds": None, "model_seconds": None, "environment": {}}


def problem(tolerance=1e-5):
    data = sf.problems.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [0.1, 0.2])
    return sf.bench.Problem(
        data.model(sf.VP()), shape=(2,), name="two", samples=8, draws=32, sample=data.sample, tolerance=tolerance
    )


class Counted(Engine):
    """In this process and in reverse order, with the items that were asked for; breaks off after `most`."""

    workers = 1

    def __init__(self, most=1000):
        self.most, self.items = most, []

    def map(self, work, items, *, memory=0):
        for item in reversed(list(items)):
            if len(self.items) == self.most:
                raise KeyboardInterrupt
            self.items.append(item)
            yield item, work(item)


def figures(results):
    return [dataclasses.replace(r, **TIMES) for r in results]


def test_a_run_goes_on_to_the_same_results(tmp_path):
    whole = run(problem(), out=tmp_path / "whole", **HOW)
    first = Counted(7)
    with pytest.raises(KeyboardInterrupt):
        run(problem(), out=tmp_path / "a", engine=first, **HOW)
    assert json.loads((tmp_path / "a" / MARK).read_text())["about"]["seed"] == 0
    kept = read(tmp_path / "a" / "results.jsonl")
    assert kept
    second = Counted()
    results = run(problem(), out=tmp_path / "a", engine=second, **HOW)
    assert figures(results) == figures(whole) == figures(read(tmp_path / "a" / "results.jsonl"))
    # Heun runs two steps for budgets of 4 and 5: one item for both
    assert len(first.items) + len(second.items) == len({i for i in first.items + second.items}) == 3 * 2 * 3 - 2
    assert {r.environment["started"] for r in results} == {kept[0].environment["started"]}
    assert not (tmp_path / "a" / MARK).exists()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_another_run_or_a_finished_one_begins_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(problem(), out=tmp_path, engine=Counted(5), **HOW)
    again = Counted()
    run(problem(1e-4), out=tmp_path, engine=again, **HOW)  # another tolerance of the reference
    assert len(again.items) == 16
    more = Counted()
    run(problem(1e-4), out=tmp_path, engine=more, **HOW)  # that one was finished: whoever asks again wants new figures
    assert len(more.items) == 16
    (tmp_path / MARK).write_text("{")
    run(problem(), out=tmp_path, engine=Counted(), **HOW)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"solvers": ["DDIM"]}, "12 of its 18 results would be lost (solver Heun, DDPM)"),
        ({"nfe": [4]}, "12 of its 18 results would be lost (budget 5, 8)"),
        ({"grids": ["karras", "power"]}, "9 of its 18 results would be lost (grid uniform)"),
        ({"seed": 1}, "18 of its 18 results would be lost (seed 0)"),
    ],
)
def test_results_that_would_be_lost_are_refused(tmp_path, finished, change, lost):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    engine = Counted()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds another benchmark, and {lost}: give another")):
        run(problem(), out=tmp_path, engine=engine, **HOW | change)
    assert not engine.items
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("finished")
    run(problem(), out=folder, **HOW)
    return folder


def test_the_same_question_is_asked_again_whatever_the_version(tmp_path, finished):
    """With more solvers too: nothing is lost then."""
    old = [dataclasses.replace(r, environment=r.environment | {"commit": "another"}) for r in read(finished / RESULTS)]
    write(old, tmp_path / RESULTS)
    results = run(problem(), out=tmp_path, **HOW | {"solvers": [*HOW["solvers"], "Euler"]})
    assert len(results) == len(old) + 6
    assert "another" not in {r.environment["commit"] for r in read(tmp_path / RESULTS)}


def test_what_is_not_finished_is_not_lost_either(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(problem(), out=tmp_path, engine=Counted(5), **HOW)
    kept = (tmp_path / RESULTS).read_bytes(), (tmp_path / MARK).read_bytes()
    with pytest.raises(ValueError, match="would be lost"):
        run(problem(), out=tmp_path, **HOW | {"nfe": [20]})
    assert kept == ((tmp_path / RESULTS).read_bytes(), (tmp_path / MARK).read_bytes())
    (tmp_path / RESULTS).write_text("mine\n")
    with pytest.raises(ValueError, match="line 1: not a result of sdeflow bench"):
        run(problem(), out=tmp_path, **HOW)
    assert (tmp_path / RESULTS).read_text() == "mine\n"


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path):
    """A pool refuses work that cannot be sent when it is asked for the first result."""
    mine = dataclasses.replace(problem(), reference=lambda x: x)
    with pytest.raises(TypeError, match="can be pickled"):
        run(mine, out=tmp_path / "out", engine=Local(2), **HOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: Ray(workers=2), lambda: Local()])
def test_engines_give_the_same_figures(tmp_path, make):
    one = run(problem(), engine=make(), **HOW)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert figures(one) == figures(run(problem(), engine=Counted(), **HOW))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_plan_tuned_on_ray_is_the_one_tuned_here():
    model = sf.problems.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [0.1, 0.2]).model(sf.VP())
    how = {"shape": (2,), "calibration": 16, "iterations": 5}
    one = sf.tune(model, sf.solvers.DPMSolverPP(2), 5, **how)
    two = sf.tune(model, sf.solvers.DPMSolverPP(2), 5, engine=Ray(workers=2), **how)
    assert torch.allclose(one.grid, two.grid, rtol=1e-9)
    assert one.note["held_out"] == pytest.approx(two.note["held_out"], rel=1e-6)
