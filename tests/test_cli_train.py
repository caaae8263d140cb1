import json
import re
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import sdeflow as sf
import sdeflow.training
from sdeflow.checkpoints import read_info
from sdeflow.cli import app
from sdeflow.data import DATASETS, load
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
    assert result.exit_code == 1
    assert f"no data 'faces': expected {', '.join(DATASETS)}, an array file or a folder" in result.output
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

    for words, message in (
        (("--lr", "-1"), "expected lr > 0"),
        (("--lr", "nan"), "expected lr > 0"),
        (("--save-every", 7), "expected --save-every as a multiple of 50"),
    ):
        result = _run("train", "digits", "--out", tmp_path / "new" / "run", *TINY, *words)
        assert result.exit_code == 1
        assert message in result.output
        assert not (tmp_path / "new").exists()

    result = _run("train", "digits", "--out", tmp_path / "run", "--steps", 20, "--batch", 8, "--lr", 1e30)
    assert result.exit_code == 1
    assert "try a lower lr" in result.output
    assert not (tmp_path / "run").exists()


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


# ---- other data, labels, going on


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label, grey in (("dark", 30), ("light", 220)):
        (tmp_path / "faces" / label).mkdir(parents=True)
        for k in range(8):
            image.new("L", (4, 4), grey + k).save(tmp_path / "faces" / label / f"{k}.png")
    return tmp_path / "faces"


def test_a_folder_of_images_with_labels(pictures, tmp_path):
    data, labels = load(str(pictures))
    assert data.shape == (16, 1, 4, 4)
    assert labels.tolist() == [0] * 8 + [1] * 8
    torch.testing.assert_close(data[9], torch.full((1, 4, 4), 221 / 127.5 - 1))
    words = ("--steps", 20, "--batch", 8, "--labels", "--net", "unet", "--width", 8, "--precision", "bfloat16")
    result = _run("train", pictures, "--out", tmp_path / "run", *words)
    assert result.exit_code == 0, result.output
    model = sf.load_model(tmp_path / "run" / "model.safetensors")
    assert model.net.config["classes"] == 2
    assert model.bind(label=torch.tensor([0])).x0(torch.zeros(1, 1, 4, 4), 0.5).shape == (1, 1, 4, 4)
    assert (
        "--labels --net unet --width 8 --precision bfloat16"
        in sf.checkpoints.read_info(tmp_path / "run" / "model.safetensors")["info"]["command"]
    )
    assert not (tmp_path / "run" / "run.safetensors").exists()


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_array_files(kind, tmp_path):
    values, labels = np.arange(12.0).reshape(6, 2), np.arange(6)
    file = tmp_path / f"data.{kind}"
    if kind == "npy":
        np.save(file, values)
    elif kind == "npz":
        np.savez(file, data=values, labels=labels)
    else:
        safetensors.torch.save_file({"data": torch.from_numpy(values), "labels": torch.from_numpy(labels)}, file)
    data, found = load(str(file))
    assert data.dtype == torch.float32
    assert torch.equal(data, torch.from_numpy(values).float())
    assert found is None if kind == "npy" else torch.equal(found, torch.from_numpy(labels))


@pytest.mark.parametrize("name", list(DATASETS))
def test_built_in_data(name):
    data, labels = load(name)
    assert data.dtype == torch.float32
    assert len(data) > 1000
    assert (labels is not None) == (name == "digits")
    assert torch.equal(load(name)[0], data)


def test_data_that_cannot_be_read(tmp_path):
    pickled = tmp_path / "a.npy"
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "b.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "c.npz", a=np.zeros((2, 2)), b=np.zeros(2))
    np.save(tmp_path / "d.npy", np.array([[1.0, np.nan]]))
    np.savez(tmp_path / "e.npz", data=np.zeros((2, 2)), labels=np.array([0, -1]))
    (tmp_path / "f.txt").write_text("1 2 3")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("a.npy", "allow_pickle"),
        ("b.npz", "b.npz: "),
        ("c.npz", 'expected an array "data", got a, b'),
        ("d.npy", "finite data"),
        ("e.npz", "one label >= 0 a sample"),
        ("f.txt", "ends in .npy, .npz, .safetensors"),
        ("empty", "no images"),
    ):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path / name))
    result = _run("train", "moons", "--labels", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "moons has no labels" in result.output


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    words = ("moons", "--steps", 150, "--batch", 16, "--save-every", 50)
    assert _run("train", *words, "--out", tmp_path / "whole").exit_code == 0
    real, seen = sdeflow.training._step_loss, []

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 120:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sdeflow.training, "_step_loss", interrupted)
    broken = _run("train", *words, "--out", tmp_path / "broken")
    assert broken.exit_code == 130
    assert "the state after step 100 is in" in broken.output
    assert "; to go on: sdeflow train moons --steps 150 " in broken.output
    again = _run("train", *words, "--out", tmp_path / "broken")
    assert again.exit_code == 0, again.output
    assert len(seen) == 120 + 50  # from step 100, which was kept
    for name in ("model.safetensors", "train.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
