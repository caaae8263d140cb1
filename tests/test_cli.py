"""What all commands share: help, JSON, seeds, devices, dtypes, names, paths, completion, errors and bugs."""

from __future__ import annotations

import importlib.metadata
import json
import re

import pytest
import torch
from typer.testing import CliRunner

import sdeflow as sf
import sdeflow.sample_cli
import sdeflow.train_cli
import sdeflow.tuning.cli
from sdeflow.cli import app
from sdeflow.cli_options import check_file, check_folder, nearest

COMMANDS = ("bench", "check", "report", "sample", "solvers", "train", "tune")
NEEDED = {
    "bench": [], "check": ["sdeflow:GBM"], "report": ["r.jsonl"], "sample": ["digits"], "train": ["moons"],
    "tune": ["digits", "--steps", "2"],
}  # fmt: skip
TAKES = {
    "--json": COMMANDS,
    "--seed": ("bench", "check", "sample", "train", "tune"),
    "--device": ("bench", "sample", "train", "tune"),
    "--dtype": ("bench", "sample", "train", "tune"),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


def call(*words, **environment):
    return CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "200", **environment}, prog_name="sdeflow")


def plain(result):
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def given(command, *more):
    out = {"report": ["--out", "o.html"], "tune": ["--out", "o.json"], "check": []}.get(command, ["--out", "o"])
    return call(command, *NEEDED[command], *out, *more)


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    text = plain(call(command, "--help"))
    assert f"Example: sdeflow {command} " in text
    assert {option for option, commands in TAKES.items() if command in commands} == {o for o in TAKES if o in text}
    assert len(text.splitlines()) < 60
    assert "DPMSolverPP(2)" not in text  # all names are in `sdeflow solvers`


def test_the_examples_parse():
    """Each with one wrong word more, which is what is complained of."""
    for command in COMMANDS:
        example = re.search(rf"Example: sdeflow ({command} .*)", plain(call(command, "--help")))[1].split()
        result = call(*example, "--nothing-like-it")
        assert result.exit_code == 2
        assert "No such option: --nothing-like-it" in plain(result)


def test_version():
    assert call("--version").output == f"sdeflow {importlib.metadata.version('sdeflow')}\n"


# ---- what all take, refused in one line before any work


@pytest.mark.parametrize("command", TAKES["--device"])
@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta", ""])
def test_devices_that_are_not_there(command, device, tmp_path):
    result = given(command, "--device", device)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert plain(result).count("\n") == 1
    assert plain(result).startswith(f"sdeflow {command}: device {device!r} cannot be used here: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", TAKES["--dtype"])
@pytest.mark.parametrize("dtype", ["int8", "float", "nn"])
def test_dtypes_that_are_not_taken(command, dtype, tmp_path):
    result = given(command, "--dtype", dtype)
    assert result.exit_code == 1
    known = 'precision "float32" or "bfloat16"' if command == "train" else "the dtype .*float32 or float64"
    assert re.fullmatch(rf"sdeflow {command}: expected {known}, got '{dtype}'\n", plain(result)), plain(result)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", TAKES["--seed"])
@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_seeds_out_of_range(command, seed, tmp_path):
    result = given(command, "--seed", seed)
    assert result.exit_code == 2
    assert f"expected a seed from 0 to 2^63 - 1, got {seed}" in plain(result)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["bench", "report", "sample", "train", "tune"])
def test_an_output_that_cannot_be_is_refused_first(command, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    wrong = ["file/below", "folder" if command in ("report", "tune") else "file"]
    for out in wrong:
        result = call(command, *NEEDED[command], "--out", out)
        assert result.exit_code == 1
        assert plain(result).startswith(f"sdeflow {command}: ")
        assert plain(result).count("\n") == 1
        assert out in plain(result)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
    assert not list((tmp_path / "folder").iterdir())


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, to whom all is allowed
    for check in (check_folder, check_file):
        with pytest.raises(ValueError, match="no permission to write to"):
            check(tmp_path / "new" / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "digits"], "sdeflow train: Missing option '--out'; see sdeflow train --help"),
        (["train"], "sdeflow train: Missing argument 'DATA'; see sdeflow train --help"),
        (["nosuch"], "sdeflow: No such command 'nosuch'; see sdeflow --help"),
        (["--nosuch"], "sdeflow: No such option: --nosuch; see sdeflow --help"),
        (
            ["sample", "digits", "--out"],
            "sdeflow sample: Option '--out' requires an argument; see sdeflow sample --help",
        ),
        (["sample", "digits", "--out", "o", "--num", "0"], "sdeflow sample: Invalid value for '--num': "),
        (["sample", "digits", "--out", "o", "--num", "a\nb"], "sdeflow sample: Invalid value for '--num': "),
        *(
            ([*words, "--out", "o", "--workers", "9" * 39], f"sdeflow {words[0]}: Invalid value for '--workers': ")
            for words in (["bench"], ["sample", "digits"], ["tune", "digits", "--steps", "2"])
        ),
    ],
)
def test_words_that_do_not_fit_are_one_line_on_standard_error(words, message, tmp_path):
    result = call(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_words_at_all_ask_for_help():
    result = call()
    assert result.exit_code == 2
    assert "Commands" in plain(result)


def test_an_unknown_format_is_told_by_its_option(tmp_path):
    result = call("sample", "digits", "--out", "o", "--format", "png")
    assert result.exit_code == 1
    assert plain(result) == "sdeflow sample: expected --format npz, safetensors or parquet, got 'png'\n"
    assert not list(tmp_path.iterdir())


def test_a_plan_is_not_written_over_its_model(tmp_path):
    sf.save_model("m.safetensors", sf.load_model("digits"))
    before = (tmp_path / "m.safetensors").read_bytes()
    result = call("tune", "m.safetensors", "--steps", "2", "--out", tmp_path / "m.safetensors")
    assert result.exit_code == 1
    assert "is read, and would be written over" in plain(result)
    assert (tmp_path / "m.safetensors").read_bytes() == before


# ---- names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "digits", "--solver", "dpmsolver++(2)"], "unknown solver 'dpmsolver++(2)' (did you mean DPMSolver"),
        (["sample", "digits", "--solver", "DDIM eta=1"], "unknown solver 'DDIM eta=1' (did you mean DDIM"),
        (["sample", "digits", "--grid", "kerras"], "unknown grid 'kerras' (did you mean karras"),
        (["sample", "digit"], "no file 'digit', and no shipped model of that name"),
        (["sample", "digit"], "did you mean digits?"),
        (["tune", "digits", "--steps", "3", "--solver", "unipc"], "(did you mean UniPC"),
        (["train", "Moon"], "no data 'Moon' (did you mean moons?): expected digits, moons"),
        (["bench", "--suite", "quik"], "unknown suite 'quik' (did you mean quick?): expected one of quick, "),
        (["bench", "--solvers", "heun,ddm"], "unknown solver 'heun' (did you mean Heun"),
        (["bench", "--grids", "karras,x"], "unknown grid 'x': expected one of "),
    ],
)
def test_unknown_names_say_what_is_near(words, message, tmp_path):
    result = call(*words, "--out", "o")
    assert result.exit_code == 1
    assert message in plain(result)
    assert plain(result).count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_nearest_names():
    assert nearest("HEUN", ["Euler", "Heun", "DDIM"])[0] == "Heun"
    assert nearest("zzz", ["Euler", "Heun"]) == []


# ---- JSON, and nothing else on standard output


def test_sample_as_json(tmp_path):
    result = call("sample", "digits", "--num", 5, "--steps", 2, "--chunk", 2, "--out", "o", "--json")
    said = json.loads(result.stdout)
    assert said["status"] == {"finished": 5}
    assert said["num"] == 5
    assert said["seconds"] > 0
    assert "o/samples.npz" in said["files"]
    assert said["file"] == "o/samples.npz"


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_sample_in_other_dtypes(dtype, tmp_path):
    words = ("--num", 3, "--steps", 2, "--out", "o", "--format", "safetensors", "--dtype", dtype)
    assert call("sample", "digits", *words).exit_code == 0
    from safetensors.torch import load_file

    assert load_file("o/samples.safetensors")["samples"].dtype == getattr(torch, dtype)


def test_train_as_json(tmp_path):
    result = call("train", "moons", "--steps", 2, "--batch", 4, "--out", "o", "--json")
    said = json.loads(result.stdout)
    assert said.keys() == {"loss", "steps", "file", "log", "seconds"}
    assert said["steps"] == 2
    assert json.loads((tmp_path / said["log"]).read_text())["loss"] == said["loss"]
    assert isinstance(sf.load_model(said["file"]), sf.Model)


def test_tune_as_json(monkeypatch):
    seen, real = [], sdeflow.tuning.cli.tune

    def watched(model, *arguments, **options):
        seen.append((next(model.net.parameters()).dtype, options["dtype"]))
        return real(model, *arguments, **options)

    monkeypatch.setattr(sdeflow.tuning.cli, "tune", watched)
    words = ("--calibration", 2, "--iterations", 0, "--solver", "DDIM", "--no-coefficients", "--dtype", "float64")
    said = json.loads(call("tune", "digits", "--steps", 2, "--out", "a/b.json", "--json", *words).stdout)
    assert said["file"] == "a/b.json"
    assert said["note"].keys() >= {"what", "train", "held_out", "seed"}
    assert sf.Plan.load("a/b.json").note["held_out"] == said["note"]["held_out"]
    assert seen == [(torch.float64, torch.float64)]


PROBLEM = """
import torch
import sdeflow as sf

print("said by the file")
problem = sf.bench.Problem(sf.problems.TwoMoons().model(sf.VP()), shape=(2,), samples=8, reference=lambda x: x)

class Sde(sf.SDE):
    def drift(self, x, t): return -x
    def diffusion(self, x, t): return x * 0 + 1
    def log_density(self, x, t): return [][0]

class Late(sf.SDE):
    def drift(self, x, t): return -x
    def diffusion(self, x, t): return 1 / 0
"""


def test_bench_and_report_as_json(tmp_path):
    (tmp_path / "mine.py").write_text(PROBLEM)
    words = ("bench", "--problem", "mine.py:problem", "--solvers", "DDIM", "--grids", "karras", "--nfe", "2,3")
    result = call(*words, "--out", "o", "--json", "--dtype", "float32")
    said = json.loads(result.stdout)
    assert "said by the file" in result.stderr
    assert (said["runs"], said["failed"]) == (2, 0)
    assert [(r["solver"], r["grid"], r["budget"], r["dtype"]) for r in said["results"]] == [
        ("DDIM", "karras", 2, "float32"), ("DDIM", "karras", 3, "float32"),
    ]  # fmt: skip
    assert not {"preview", "about"} & said["results"][0].keys()
    result = call("report", said["file"], "--out", "r.html", "--json")
    assert json.loads(result.stdout) == {
        "file": "r.html", "bytes": (tmp_path / "r.html").stat().st_size, "results": [said["file"]],
    }  # fmt: skip


# ---- completion


def completed(words, count=None):
    """What bash is offered for the last of the words."""
    line = " ".join(words)
    result = call(
        _SDEFLOW_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1 if count is None else count)
    )
    return result.output.split("\n")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["sdeflow", "sa"], {"sample"}),
        (["sdeflow", "sample", "di"], {"digits"}),
        (["sdeflow", "train", "mo"], {"moons"}),
        (["sdeflow", "sample", "digits", "--solver", "DDI"], {"DDIM"}),
        (["sdeflow", "sample", "digits", "--solver", "aut"], {"auto"}),
        (["sdeflow", "sample", "digits", "--grid", "karr"], {"karras"}),
        (["sdeflow", "bench", "--grids", "karras,unif"], {"karras,uniform"}),
        (["sdeflow", "bench", "--suite", "qu"], {"quick"}),
        (["sdeflow", "bench", "--solvers", "Heun,RK4"], {"Heun,RK4"}),
        (["sdeflow", "solvers", "--js"], {"--json"}),
    ],
)
def test_completion(words, offered):
    assert set(completed(words)) >= offered
    assert not [name for name in completed([*words[:-1], "zzz"]) if name]


def test_completion_can_be_installed():
    assert "_SDEFLOW_COMPLETE=complete_bash" in call("--show-completion", "bash", SHELL="/bin/bash").output


# ---- whose error it is


def test_a_bug_keeps_its_traceback(monkeypatch):
    def bug(*arguments, **options):
        return [][0]

    def deeper(*arguments, **options):
        return torch.zeros(2) @ torch.zeros(3)  # a RuntimeError that torch raises

    for broken, kind in ((bug, IndexError), (deeper, RuntimeError)):
        monkeypatch.setattr(sdeflow.sample_cli, "sample_to", broken)
        result = call("sample", "digits", "--out", "o")
        assert isinstance(result.exception, kind)
        assert not isinstance(result.exception, SystemExit)


def test_an_error_raised_on_purpose_has_none():
    result = call("sample", "digits", "--out", "o", "--steps", "3", "--rtol", "0.1")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert plain(result).startswith("sdeflow sample: ")


def test_an_error_in_the_users_file_says_where(tmp_path):
    (tmp_path / "mine.py").write_text(PROBLEM)
    result = call("check", "mine.py:Late", "--points", "2", "--event", "1", "--json")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "ZeroDivisionError" in plain(result)
    assert result.stdout == ""


def test_out_of_memory_and_a_full_disk_are_no_bugs(monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "o/samples.npz")

    def large(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    for broken, text in ((full, "No space left on device"), (large, "try a smaller batch, or a smaller chunk")):
        monkeypatch.setattr(sdeflow.train_cli, "train", broken)
        result = call("train", "moons", "--out", "o")
        assert result.exit_code == 1
        assert text in plain(result)
        assert plain(result).count("\n") == 1
