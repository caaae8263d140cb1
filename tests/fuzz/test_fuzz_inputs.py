"""Bad input: no outcome is forbidden. The whole of `benchmarks.fuzz` is slow; a share of it, and pairs, are not."""

import hypothesis
import hypothesis.strategies as st
import pytest
from typer.testing import CliRunner

from benchmarks.fuzz import KINDS, cases, chosen, tried
from benchmarks.fuzzing.cases import made
from benchmarks.fuzzing.commands import attempt
from benchmarks.fuzzing.pools import Skip, pool
from sdeflow.cli import app

CALLS = [target for targets in KINDS.values() for target in targets]
QUICK = [t for t in CALLS if t.name.startswith(("solve with", "solve, "))]


def forbidden(given):
    return [f"{case}: {outcome.reason}" for case, outcome in tried(given) if outcome.verdict == "FORBIDDEN"]


def test_a_share_of_what_every_solver_is_given():
    assert forbidden(chosen(1500, seed=1)["every solver of the catalogue"]) == []


def test_files():
    assert forbidden(cases("files")) == []


OUT = ("--out", "out")
WORDS = (
    (), ("no-such-command",), ("solvers", "more"), ("check", "leaves.py:A"), ("check", "syntax.py:A"),
    ("check", "own.py:Raises", "--points", "nan"), ("sample", "binary.bin", *OUT),
    ("sample", "model.safetensors", "--out", "own.py"), ("sample", "model.safetensors", *OUT, "--num", "9" * 400),
    ("sample", "model.safetensors", *OUT, "--eta", "nan"), ("tune", "missing", "--steps", "2", "--out", "out.json"),
    ("report", "binary.bin", "--out", "out.html"), ("train", "folder", *OUT), ("train", "moons", *OUT, "--lr", "-inf"),
    ("bench", "--problem", "own.py:number", *OUT), ("bench", *OUT, "--nfe", "1,x"),
)  # fmt: skip


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_words_that_do_not_belong(words):
    assert attempt(words).verdict == "documented error"


def test_a_check_says_that_it_runs_the_code():
    said = CliRunner().invoke(app, ["check", "--help"], env={"COLUMNS": "200"}).output
    assert "Runs the file (or imports the module) it is in." in said


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", list(KINDS))
def test_all_inputs(kind):
    """Of the command line a sixth: a command takes a tenth of a second, or some seconds if it runs."""
    assert forbidden(chosen(6000, seed=2)[kind] if kind == "the command line" else cases(kind)) == []


@st.composite
def pairs(draw):
    """Two arguments of one call replaced at once."""
    target = draw(st.sampled_from(QUICK))
    valid = target.valid()
    names = draw(st.lists(st.sampled_from(sorted(valid)), min_size=1, max_size=2, unique=True))
    return made(target, **{name: draw(st.sampled_from(pool(name, valid[name]))) for name in names})


@hypothesis.settings(max_examples=150, derandomize=True, deadline=None)
@hypothesis.given(case=pairs())
def test_two_bad_arguments_at_once(case):
    try:
        outcome = case.attempt()
    except Skip:
        hypothesis.reject()
    assert outcome.verdict != "FORBIDDEN", f"{case}: {outcome.reason}"
