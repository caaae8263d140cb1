"""`sdeflow bench` and `sdeflow report`, with a user's file, bad options and Ctrl-C."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

import sdeflow as sf
from sdeflow.cli import app

USER_FILE = """
import torch
import sdeflow as sf

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
    def forward(self, x, t):
        return self.body(torch.cat([x, t[:, None]], dim=1))

torch.manual_seed(0)
model = sf.Model(Net(), sf.VP(), prediction="eps")
problem = sf.bench.Problem(model, shape=(2,), samples=8, draws=32)

def made():
    return problem

def wrong():
    return 3
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    return path


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_users_file_is_benchmarked_twice(user_file, tmp_path):
    out = tmp_path / "out"
    arguments = ("--solvers", "Heun,DPMSolverPP(2) eta=1", "--grids", "power", "--nfe", "6,10")
    for name in ("problem", "made"):
        done = call("bench", "--problem", f"{user_file}:{name}", *arguments, "--out", out)
        assert done.exit_code == 0, done.output
        assert "4 runs, 0 failed" in done.output
        assert len(sf.bench.read(out / "results.jsonl")) == 4
    assert {p.name for p in out.iterdir()} >= {
        "results.jsonl",
        "report.html",
        "work-precision.png",
        "work-precision.svg",
    }
    assert call("report", out / "results.jsonl", "--out", tmp_path / "again.html").exit_code == 0
    assert (tmp_path / "again.html").exists()
    assert "floor" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("mine.py:absent", "defines no absent; it has problem"),
        ("mine.py:model", r"model is an sf.Model, which does not know the shape of a sample"),
        ("mine.py:wrong", r"expected wrong\(\) to return an sf.bench.Problem, got int"),
        ("mine.py:torch", "expected torch to be an sf.bench.Problem"),
        ("other.py:problem", "no such file"),
        ("mine.py", r"expected FILE.py:NAME"),
        ("broken.py:problem", r"broken.py, line 2: ZeroDivisionError"),
        ("bad.py:problem", r"bad.py, line 1: SyntaxError"),
    ],
)
def test_a_users_file_that_does_not_fit_is_one_error(user_file, where, message):
    (user_file.parent / "broken.py").write_text("x = 1\nx / 0\n")
    (user_file.parent / "bad.py").write_text("x = = 1\n")
    out = user_file.parent / "out"
    done = call("bench", "--problem", user_file.parent / where, "--out", out)
    assert done.exit_code != 0
    assert re.search(message, f"{done.output} {done.exception}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "quik"), "unknown suite 'quik'"),
        (("--solvers", "Heun,Nope"), "unknown solver 'Nope'"),
        (("--grids", "nope"), "unknown grid 'nope'"),
        (("--nfe", "5,many"), "expected whole numbers"),
        (("--samples", "0"), "expected samples >= 2"),
        (("--suite", "quick", "--problem", "x.py:y"), "not both"),
    ],
)
def test_bad_options_are_one_error(tmp_path, arguments, message):
    done = call("bench", *arguments, "--out", tmp_path / "out")
    assert done.exit_code != 0
    assert message in re.sub(r"\s+", " ", f"{done.output} {done.exception}")
    assert not (tmp_path / "out").exists()


ENDING = """
import sdeflow as sf

def made():
    raise SystemExit(0)

def net(x, t):
    raise SystemExit(0)

problem = sf.bench.Problem(sf.Model(net, sf.VP()), shape=(2,), samples=8, draws=32)
"""


@pytest.mark.parametrize(("name", "line"), [("made", 5), ("problem", 8)])
def test_user_code_that_ends_the_process_is_an_error(user_file, tmp_path, name, line):
    user_file.write_text(ENDING)
    done = call("bench", "--problem", f"{user_file}:{name}", "--solvers", "Heun", "--nfe", "6", "--out", tmp_path / "o")
    assert done.exit_code == 1
    assert f"mine.py, line {line}: SystemExit: 0" in done.output


def test_nothing_but_failures_is_not_success(user_file, tmp_path):
    text = USER_FILE.replace("sf.Model(", "sf.Model(lambda x, t: x * (torch.nan if x.shape[0] == 8 else 1), ")
    text = text.replace("Net(), sf.VP(), prediction", "sf.VP(), prediction")
    text = text.replace("shape=(2,),", "shape=(2,), reference=lambda x: x,")
    user_file.write_text(text)
    done = call(
        "bench", "--problem", f"{user_file}:problem", "--solvers", "Heun", "--nfe", "6", "--out", tmp_path / "o"
    )
    assert done.exit_code == 1
    assert "6 runs, 6 failed" in done.output
    assert (tmp_path / "o" / "report.html").exists()


def test_ctrl_c_says_what_was_kept(user_file, tmp_path):
    text = USER_FILE.replace(
        "return self.body",
        "self.n = getattr(self, 'n', 0) + 1\n        if self.n > 30: raise KeyboardInterrupt\n        return self.body",
    )
    text = text.replace("shape=(2,),", "shape=(2,), reference=lambda x: x,")
    user_file.write_text(text)
    done = call(
        "bench", "--problem", f"{user_file}:problem", "--solvers", "Euler", "--nfe", "5,50", "--out", tmp_path / "o"
    )
    assert done.exit_code == 130
    assert "sdeflow report" in done.output
    assert sf.bench.read(tmp_path / "o" / "results.jsonl")


def test_help_shows_an_example():
    for command in ("bench", "report"):
        done = call(command, "--help")
        assert done.exit_code == 0
        assert f"Example: sdeflow {command}" in done.output
