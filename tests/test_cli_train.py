import json
import re
import sys
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

import sdeflow as sf
from sdeflow.checkpoints import read_info
from sdeflow.cli import app
from sdeflow.data import DATASETS
from sdeflow.training import untrained

TINY = ["--steps", "3", "--batch", "8"]


@dataclass
class Run:
    exit_code: int
    output: str


def _run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    return Run(result.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", result.output))  # colours, if they are forced


def test_train_digits(tmp_path):
    result = _run("train", "digits", "--out", tmp_path / "run", *TINY, "--seed", 5)
    assert result.exit_code == 0, result.output
    assert "after 3 steps; wrote" in result.output
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["model.safetensors", "train.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "run/train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3]
    model = sf.load_model(tmp_path / "run/model.safetensors")
    assert (model.sde, model.prediction, model.time) == (sf.VP(), "v", "lam")
    assert any(
        not torch.equal(p, q)
        for p, q in zip(model.net.parameters(), untrained((1, 8, 8), seed=5).net.parameters(), strict=True)
    )
    assert read_info(tmp_path / "run/model.safetensors")["info"] == {
        "command": "sdeflow train digits --out DIR --steps 3 --batch 8 --lr 0.003 --seed 5 --threads 1",
        "data": "digits",
        "seed": 5,
        "loss": rows[-1]["loss"],
    }


def test_same_command_same_bytes(tmp_path):
    for name in ("a", "b"):
        assert _run("train", "digits", "--out", tmp_path / name, *TINY).exit_code == 0
    for file in ("model.safetensors", "train.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    # and over the files of an earlier run
    assert _run("train", "digits", "--out", tmp_path / "a", *TINY, "--seed", 1).exit_code == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() != (tmp_path / "b/model.safetensors").read_bytes()


def test_unknown_data_lists_what_exists(tmp_path):
    result = _run("train", "faces", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert f"unknown data 'faces': expected one of {', '.join(DATASETS)}" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits"], "Missing option '--out'"),
        (["digits", "--out", "x", "--steps", "0"], "--steps"),
        (["digits", "--out", "x", "--batch", "many"], "--batch"),
    ],
)
def test_bad_options(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = _run("train", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_failures_are_one_line_and_not_success(tmp_path):
    (tmp_path / "file").write_text("")
    result = _run("train", "digits", "--out", tmp_path / "file" / "run", *TINY)
    assert result.exit_code == 1
    assert result.output.strip().splitlines()[-1].startswith("sdeflow train: ")

    result = _run("train", "digits", "--out", tmp_path / "run", *TINY, "--lr", "-1")
    assert result.exit_code == 1
    assert "expected lr > 0" in result.output

    result = _run("train", "digits", "--out", tmp_path / "run", "--steps", 20, "--batch", 8, "--lr", 1e30)
    assert result.exit_code == 1
    assert "try a lower lr" in result.output
    assert not list((tmp_path / "run").iterdir())


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = _run("train", "digits", "--out", tmp_path / "run", *TINY)
    assert result.exit_code == 1
    assert 'pip install "sdeflow[train]"' in result.output
    assert not (tmp_path / "run").exists()


def test_solvers():
    rows = json.loads(_run("solvers", "--json").output)
    assert [row["name"] for row in rows] == [row.name for row in sf.solvers.CATALOGUE]
    assert {"order", "strong_order", "weak_order", "nfe_per_step", "view", "noise", "reference"} <= rows[0].keys()
    table = _run("solvers")
    assert table.exit_code == 0
    for row in sf.solvers.CATALOGUE:
        assert row.name in table.output
        assert row.reference in table.output


@pytest.mark.parametrize("command", ["train", "solvers"])
def test_help_shows_an_example(command):
    assert command in _run("--help").output
    result = _run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: sdeflow {command}" in result.output
