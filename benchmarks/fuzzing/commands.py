"""Words of the command line that do not belong there: an exit status, one line, and no file."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from typer.testing import CliRunner

import sdeflow as sf
from benchmarks.fuzzing.cases import Case
from benchmarks.fuzzing.outcome import Hang, Outcome, time_limit
from sdeflow import bench
from sdeflow.cli import app

_USER_CODE = {
    "own.py": """
import torch, sdeflow as sf
class Own(sf.SDE):
    event = (1,)
    def drift(self, x, t): return -x
    def diffusion(self, x, t): return torch.ones_like(x)
class NoDrift(sf.SDE):
    pass
class Raises(sf.SDE):
    event = (1,)
    def drift(self, x, t): raise RuntimeError("not today")
    def diffusion(self, x, t): return torch.ones_like(x)
class Text(sf.SDE):
    event = (1,)
    def drift(self, x, t): return "text"
    def diffusion(self, x, t): return None
class Needs(Own):
    def __init__(self, needed): pass
problem = sf.bench.Problem(sf.problems.Gaussian(torch.zeros(2), torch.eye(2)).model(sf.VP()), (2,))
def fails(): raise KeyError("inside")
number = 3
""",
    "syntax.py": "def f(:\n",
    "raises.py": "raise ValueError('on purpose')\n",
    "leaves.py": "import sys\nsys.exit(0)\n",
    "imports.py": "import a_module_that_is_not_there\n",
    "binary.py": "\x00\x01",
    "empty.py": "",
    "recurses.py": "def f(): f()\nf()\n",
}  # fmt: skip
_OBJECTS = (
    "own.py:NoDrift", "own.py:Raises", "own.py:Text", "own.py:Needs", "own.py:number", "own.py:fails", "own.py:None",
    "own.py:", ":Own", "own.py", "own.py:Own:Own", "own.py:__dict__", "missing.py:Own", "folder.py:Own", "folder:Own",
    "syntax.py:A", "raises.py:A", "leaves.py:A", "imports.py:A", "binary.py:A", "empty.py:A", "recurses.py:A",
    "sdeflow:no_such", "no_such_module:A", "..:A", "sdeflow.:VP", ".sdeflow:VP", "/dev/null:A", "sdeflow:Model",
)  # fmt: skip
_WORDS = (
    "", " ", "text", "nan", "inf", "-inf", "-1", "0", "-0", "1.5", "1e400", "1e-400", "1" + "0" * 18, "9" * 400,
    "-" + "9" * 30, "0x10", "True", "None", ",", "1,,2", "3,nan", "2,2", "a,b", "\u00fc\u2603",
    "\U0001f600" * 50, "x" * 5000,
    ".", "..", "/", "/dev/null", "/dev/null/below", "folder", "missing", "missing/deeper", "binary.bin", "own.py",
    "model.safetensors", "results.jsonl", "results.jsonl/below", "plan.json", "-", "--", "'", "*", "~", "$HOME", "a\nb",
)  # fmt: skip
_ENDLESS = {("sample", "--num"), ("train", "--steps")}
"""What may be as large as one likes, and is then as long at work: a run that Ctrl-C ends."""

COMMANDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "solvers": ((), {}),
    "check": (
        ("own.py:Own",),
        {"--event": "1", "--points": "2", "--seed": "0", "--emit-tests": "out/test_own.py"},
    ),
    "sample": (
        ("model.safetensors",),
        {"--out": "out", "--num": "2", "--solver": "Heun", "--steps": "2", "--eta": "0", "--grid": "uniform",
         "--label": "1", "--final": "stay", "--chunk": "2", "--seed": "0", "--format": "npz", "--dtype": "float32",
         "--device": "cpu", "--threads": "1", "--engine": "local", "--address": "auto", "--workers": "1",
         "--shard": "2", "--rtol": "1e-2"},
    ),
    "train": (
        ("moons",),
        {"--out": "out", "--steps": "1", "--batch": "2", "--lr": "1e-3", "--seed": "0", "--width": "8", "--net": "mlp",
         "--threads": "1", "--device": "cpu", "--precision": "float32", "--save-every": "1"},
    ),
    "tune": (
        ("model.safetensors",),
        {"--out": "out.json", "--steps": "2", "--solver": "DDIM", "--calibration": "2", "--iterations": "0",
         "--seed": "0", "--dtype": "float32", "--device": "cpu", "--threads": "1", "--engine": "local",
         "--address": "auto", "--workers": "1"},
    ),
    "report": (("results.jsonl",), {"--out": "out.html"}),
    "bench": (
        (),
        {"--out": "out", "--problem": "own.py:problem", "--solvers": "Euler", "--grids": "uniform", "--nfe": "2",
         "--samples": "2", "--draws": "16", "--tolerance": "1e-2", "--seed": "0", "--dtype": "float32",
         "--device": "cpu", "--engine": "local", "--address": "auto", "--workers": "1", "--suite": "quick"},
    ),
}  # fmt: skip
"""The positional words of a command, and a value of each of its options."""
_ALONE = {
    "sample": ("--label", "--address", "--rtol"), "tune": ("--address",),
    "bench": ("--suite", "--address"), "check": ("--emit-tests",),
}  # fmt: skip
"""Options that the valid call does not have: they exclude others, or need what is not here."""


@functools.cache
def _folder() -> Path:
    """A folder with what the words name."""
    place = Path(tempfile.mkdtemp(prefix="sdeflow-fuzz-"))
    for name, text in _USER_CODE.items():
        (place / name).write_text(text)
    (place / "folder").mkdir()
    (place / "folder.py").mkdir()
    (place / "binary.bin").write_bytes(bytes(range(256)) * 4)
    net = sf.nets.MLP((2,), width=4, depth=1, embedding=4, harmonics=1)
    sf.save_model(place / "model.safetensors", sf.Model(net, sf.VP()))
    flow = sf.VP().probability_flow(lambda x, t: -x)
    sf.solvers.DPMSolverPP(2).plan(flow, torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)).save(place / "plan.json")
    bench.write([bench.Result("p", "Heun", "uniform", "trajectory", budget=4, nfe=4.0, median=0.1)],
                place / "results.jsonl")  # fmt: skip
    return place


def _files(place: Path) -> dict[str, int]:
    return {
        str(path.relative_to(place)): path.stat().st_size
        for path in place.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def attempt(words: tuple[str, ...], seconds: float = 20.0) -> Outcome:
    """What a command says to these words."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "work"
        shutil.copytree(_folder(), place)
        before = _files(place)
        os.chdir(place)
        try:
            with time_limit(seconds):
                result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "HOME": folder})
        except Hang:
            return Outcome("FORBIDDEN", f"no answer in {seconds:g} seconds")
        finally:
            os.chdir(here)
        fresh = sorted(name for name, size in _files(place).items() if before.get(name) != size)
        gone = sorted(set(before) - set(_files(place)))
    said = result.output.strip()
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        if isinstance(result.exception, Hang):
            return Outcome("FORBIDDEN", f"no answer in {seconds:g} seconds")
        return Outcome("FORBIDDEN", f"a traceback: {type(result.exception).__name__}: {result.exception}"[:200])
    if "Traceback" in said:
        return Outcome("FORBIDDEN", "a traceback among what it says")
    if gone or any(".part" in name for name in fresh):
        return Outcome("FORBIDDEN", f"files gone: {gone}, parts of files: {fresh}")
    if result.exit_code == 0:
        return Outcome("accepted") if said else Outcome("FORBIDDEN", "accepted without a word")
    failed_checks = words[:1] == ("check",) and result.exit_code == 1 and not said.startswith("sdeflow check:")
    if failed_checks and "FAIL" in said.upper():
        return Outcome("accepted", "an SDE that fails its checks")
    if fresh:
        return Outcome("FORBIDDEN", f"refused, and left {fresh}")
    lines = [line for line in said.splitlines() if line.startswith(("sdeflow ", "sdeflow: "))]
    if len(lines) == 1 or (not words and "Usage:" in said):
        return Outcome("documented error", lines[0][:200] if lines else "the help")
    return Outcome("FORBIDDEN", f"exit status {result.exit_code}, and not in one line: {said[:200]!r}")


def _given(command: str, **changed: str) -> tuple[str, ...]:
    """The valid call of a command with some options replaced or added."""
    positional, options = COMMANDS[command]
    kept = {name: value for name, value in options.items() if name not in _ALONE.get(command, ()) or name in changed}
    return (command, *positional, *(word for name, value in {**kept, **changed}.items() for word in (name, value)))


def _words() -> Iterator[tuple[str, ...]]:
    yield ()
    yield from (("no-such-command",), ("",), ("--no-such-option",), ("sample", "sample"), ("\u00fc",))
    for command, (positional, options) in COMMANDS.items():
        yield (command,)
        yield (*_given(command), "--no-such-option")
        yield (*_given(command), "one", "more")
        yield _given(command)
        for name in options:
            yield (*_given(command), name)  # without its value
            for word in _WORDS:
                if (command, name) in _ENDLESS and word in ("1" + "0" * 18, "9" * 400):
                    continue
                yield _given(command, **{name: word})
        for word in (*_WORDS, *_OBJECTS):
            for k in range(len(positional)):
                changed = (*positional[:k], word, *positional[k + 1 :])
                yield (command, *changed, *_given(command)[1 + len(positional) :])
    for name in _OBJECTS:
        yield _given("bench", **{"--problem": name})
    for more in (
        {"--rtol": "1e-2"}, {"--rtol": "-1"}, {"--rtol": "0"}, {"--address": "auto"}, {"--label": "3"},
        {"--solver": "plan.json", "--steps": "7"}, {"--solver": "results.jsonl"}, {"--solver": "auto", "--eta": "0.3"},
        {"--solver": "DDPM", "--eta": "0"}, {"--solver": "Heun", "--eta": "1"}, {"--final": "zero", "--solver": "RK45"},
        {"--format": "parquet", "--dtype": "bfloat16"}, {"--grid": "karras", "--rtol": "1e-3"},
    ):  # fmt: skip
        yield _given("sample", **more)
    yield _given("bench", **{"--suite": "quick", "--problem": "own.py:problem"})


def cases() -> list[Case]:
    """Every command with every word in the place of every option and argument."""
    found = {words: None for words in _words()}
    return [Case("sdeflow", " ".join(repr(w)[:40] for w in words), partial(attempt, words)) for words in found]
