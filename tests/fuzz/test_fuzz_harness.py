"""The judge itself: what is forbidden is called forbidden, or the table of `benchmarks.fuzz` means nothing."""

import pickle
import time
from pathlib import Path

import pytest
import torch

import sdeflow as sf
from benchmarks.fuzzing.files import _pickled, _read
from benchmarks.fuzzing.outcome import judge


def raises(error):
    def act():
        raise error

    return act


def hangs():
    while True:
        time.sleep(0.01)


def spins():
    while True:
        pass


def nans():
    return torch.full((3,), torch.nan)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (raises(KeyError("a")), "KeyError"),
        (raises(IndexError("a")), "IndexError"),
        (raises(AttributeError("a")), "AttributeError"),
        (raises(AssertionError()), "AssertionError"),
        (raises(ZeroDivisionError("a")), "ZeroDivisionError"),
        (raises(RuntimeError("a")), "RuntimeError"),
        (raises(RecursionError("a")), "RecursionError"),
        (raises(ValueError("")), "without explanation"),
        (raises(NotImplementedError("a")), "NotImplementedError"),
        (raises(FileNotFoundError("raised outside of the library")), "not raised on purpose"),
        (nans, "NaN"),
        (lambda: [{"a": nans()}], "NaN"),
        (lambda: float("inf"), "the number inf"),
        (lambda: torch.ones(2, device="meta"), "without values"),
    ],
)
def test_what_is_forbidden(act, reason):
    outcome = judge(act)
    assert outcome.verdict == "FORBIDDEN"
    assert reason in outcome.reason


@pytest.mark.parametrize("act", [hangs, spins])
def test_a_hang_is_forbidden(act):
    outcome = judge(act, seconds=0.05)
    assert outcome.verdict == "FORBIDDEN"
    assert "no answer" in outcome.reason


def test_nonsense_taken_for_sense_is_forbidden():
    assert judge(lambda: torch.ones(2), refuse=True).verdict == "FORBIDDEN"
    assert judge(lambda: torch.ones(2), baseline=torch.zeros(2)).verdict == "FORBIDDEN"
    assert judge(lambda: torch.ones(2), baseline=torch.ones(3)).verdict == "FORBIDDEN"
    assert judge(lambda: torch.ones(2), shows=True).verdict == "FORBIDDEN"


def test_what_is_allowed():
    assert judge(raises(ValueError("raised outside of the library"))).verdict == "plain error"
    assert judge(lambda: sf.VP(-1.0)).verdict == "documented error"
    assert judge(lambda: torch.ones(2), baseline=torch.ones(2)).verdict == "accepted"
    assert judge(nans, shows=True).verdict == "accepted"


def test_a_reader_that_leaves_a_part_or_runs_code_is_forbidden(tmp_path):
    def leaves(path):
        Path(path + ".part").touch()
        return torch.ones(1)

    def runs(path):
        pickle.loads(Path(path).read_bytes())
        raise ValueError

    assert "did something" in _read(leaves, ".x", b"", False, True).reason
    assert "code of a pickle ran" in _read(runs, ".x", _pickled(), True, True).reason
