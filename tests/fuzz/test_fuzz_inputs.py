"""Bad input: no outcome is forbidden. The whole of `benchmarks.fuzz` is slow; a share of it, and pairs, are not."""

import hypothesis
import hypothesis.strategies as st
import pytest

from benchmarks.fuzz import KINDS, cases, chosen, tried
from benchmarks.fuzzing.cases import made
from benchmarks.fuzzing.pools import Skip, pool

CALLS = [target for targets in KINDS.values() for target in targets]
QUICK = [t for t in CALLS if t.name.startswith(("solve with", "solve, "))]


def forbidden(given):
    return [f"{case}: {outcome.reason}" for case, outcome in tried(given) if outcome.verdict == "FORBIDDEN"]


def test_a_share_of_what_every_solver_is_given():
    assert forbidden(chosen(1500, seed=1)["every solver of the catalogue"]) == []


def test_files():
    assert forbidden(cases("files")) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", list(KINDS))
def test_all_inputs(kind):
    assert forbidden(cases(kind)) == []


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
