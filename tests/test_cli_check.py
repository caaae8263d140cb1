"""`sdeflow check`: its verdicts, exit statuses, JSON, the tests that it writes; objects named on the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import sdeflow as sf
from sdeflow.cli import app
from sdeflow.testing.cli import as_sde
from sdeflow.user_code import find

SOURCE = """
import torch
import sdeflow as sf


class Population(sf.SDE):
    domain = (0.0, float("inf"))

    def drift(self, x, t):
        return x * (1.5 - x)

    def diffusion(self, x, t):
        return 0.4 * x


class Wrong(Population):
    def reverse_drift(self, x, t, score):
        return self.drift(x, t) - self.diffusion(x, t) ** 2 * score


class Needs(Population):
    def __init__(self, size):
        self.size = size


def made():
    return Population()


instance = Population()
number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words):
    return CliRunner().invoke(app, ["check", *map(str, words)])


@pytest.mark.parametrize("target", ["mine.py:Population", "mine.py:instance", "mine.py:made"])
def test_a_right_sde_passes(folder, target):
    done = call(target, "--points", "4")
    assert done.exit_code == 0, done.output
    assert "reversal keeps the marginals" in done.output
    assert "0 failed" in done.output
    assert "div D is there because" in " ".join(done.output.split())


def test_a_wrong_one_fails_and_says_where(folder):
    done = call("mine.py:Wrong", "--points", "4")
    assert done.exit_code == 1
    assert "fail hand-written reverse drift" in done.output
    assert "look for div D" in " ".join(done.output.split())


def test_json(folder):
    done = call("mine.py:Wrong", "--points", "4", "--json")
    report = json.loads(done.output)
    assert done.exit_code == 1
    assert report["ok"] is False
    assert [f["identity"] for f in report["findings"] if f["verdict"] == "fail"] == ["hand-written reverse drift"]
    assert report["facts"]["coefficients"] == "nonlinear drift, time-homogeneous"


def test_a_module_of_the_package():
    done = call("sdeflow:GBM", "--event", "1", "--points", "4")
    assert done.exit_code == 0, done.output
    assert "moments of the law" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mine.py"], "expected FILE.py:NAME or module:NAME, got 'mine.py'"),
        (["other.py:X"], "no such file: other.py"),
        (["mine.py:Nothing"], "mine.py defines no Nothing; it has Population, Wrong, Needs, instance"),
        (["nowhere_at_all:X"], "module nowhere_at_all: ModuleNotFoundError"),
        (["mine.py:number"], "expected mine.py:number to be an SDE or a class of one, got int"),
        (["mine.py:Needs"], "mine.py:Needs cannot be made without arguments"),
        (["mine.py:Population", "--event", "two"], "expected --event as positive numbers such as 3 or 2,8, got 'two'"),
        (["mine.py:Population", "--event", "0"], "expected --event as positive numbers"),
        (["broken.py:X"], "broken.py, line 1: ZeroDivisionError"),
    ],
)
def test_what_does_not_fit_is_one_error(folder, words, message):
    (folder / "broken.py").write_text("1 / 0\n")
    done = call(*words)
    assert done.exit_code not in (0, None)
    assert message in f"{done.output} {done.exception}"


QUITS = """
import sys
import sdeflow as sf

class Quits(sf.SDE):
    def drift(self, x, t):
        sys.exit()
    def diffusion(self, x, t):
        return x

class Later(Quits):
    def drift(self, x, t):
        return -x if not x.requires_grad else sys.exit(0)
"""


@pytest.mark.parametrize(("name", "line"), [("Quits", 7), ("Later", 13)])
@pytest.mark.parametrize("words", [(), ("--json",)])
def test_user_code_that_ends_the_process_is_an_error(folder, name, line, words):
    (folder / "quits.py").write_text(QUITS)
    done = call(f"quits.py:{name}", *words)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert f"quits.py, line {line}: SystemExit" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_emitted_tests_pass_and_fail_as_the_sde_does(folder):
    """Run in a process of their own, as a user would; the random points at a fixed seed."""
    (folder / "tests").mkdir()
    for name, failed in (("Population", 0), ("Wrong", 2)):
        file = folder / "tests" / f"test_{name.lower()}.py"
        done = call(f"mine.py:{name}", "--points", "4", "--emit-tests", file)
        assert f"wrote {file}" in " ".join(done.output.split()).replace(" /", "/") or str(file.name) in done.output
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(file)],
            cwd=folder, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert (f"{failed} failed" in ran.stdout) == bool(failed), ran.stdout[-2000:]
        assert " passed" in ran.stdout, ran.stdout[-2000:]


def test_the_emitted_tests_are_not_written_over_the_source(folder):
    source = (folder / "mine.py").read_text()
    done = call("mine.py:Population", "--emit-tests", folder / "mine.py")
    assert done.exit_code == 1
    assert "is read, and would be written over" in done.output
    assert (folder / "mine.py").read_text() == source


def test_the_emitted_tests_of_a_module(folder):
    sys.path.insert(0, str(folder))
    try:
        call("mine:Population", "--points", "4", "--emit-tests", folder / "test_module.py")
    finally:
        sys.path.remove(str(folder))
    text = (folder / "test_module.py").read_text()
    assert "import mine" in text
    assert 'as_sde(mine.Population, "Population")' in text
    compile(text, "test_module.py", "exec")


def test_objects_by_name(folder):
    assert isinstance(as_sde(find("mine.py:Population", sf.SDE), "Population"), sf.SDE)
    assert find("mine.py:number", sf.SDE) == 3
