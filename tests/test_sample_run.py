"""Samples to a folder: the same files however a run was broken off."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import sdeflow as sf
from sdeflow.cli import app
from sdeflow.sample_run import picture, sample_to
from sdeflow.solvers import DDPM, DPMSolverPP
from sdeflow.training import untrained

MODEL = sf.load_model("digits")
HOW = {"shape": (1, 8, 8), "solver": DPMSolverPP(2), "steps": 4, "chunk": 4, "seed": 3}


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_the_samples_are_those_of_sample(tmp_path, kind):
    final = sample_to(tmp_path / "a", MODEL, 10, kind=kind, **HOW)
    if kind == "npz":
        with np.load(final) as held:
            samples, status = torch.from_numpy(held["samples"]), held["status"].tolist()
    else:
        loaded = safetensors.torch.load_file(final)
        samples, status = loaded["samples"], loaded["status"].tolist()
    want = [
        sf.sample(MODEL, n, shape=(1, 8, 8), solver=DPMSolverPP(2), steps=4, seed=3, index=first).x
        for first, n in ((0, 4), (4, 4), (8, 2))
    ]
    assert torch.equal(samples, torch.cat(want))
    assert status == [int(sf.Status.FINISHED)] * 10
    assert set(files(tmp_path / "a")) == {"manifest.jsonl", f"samples.{kind}", "samples.png"}


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_was_broken_off_ends_in_the_same_files(tmp_path, after):
    sample_to(tmp_path / "whole", MODEL, 10, **HOW)
    seen = []

    def stop(done):
        seen.append(done)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_to(tmp_path / "broken", MODEL, 10, on_chunk=stop, **HOW)
    part = next(iter(sorted((tmp_path / "broken" / "shards").iterdir())))
    part.write_bytes(part.read_bytes()[:40])  # and one of its parts was damaged since
    sample_to(tmp_path / "broken", MODEL, 10, **HOW)
    assert files(tmp_path / "whole") == files(tmp_path / "broken")
    again = []
    sample_to(tmp_path / "broken", MODEL, 10, on_chunk=again.append, **HOW)
    assert again == [10]  # all was there


def test_another_run_does_not_go_into_the_folder(tmp_path):
    sample_to(tmp_path, MODEL, 2, **HOW)
    for change, named in (({"seed": 4}, "seed"), ({"steps": 5}, "options"), ({"solver": DDPM()}, "solver")):
        with pytest.raises(ValueError, match=f"holds another run, with another.* {named}"):
            sample_to(tmp_path, MODEL, 2, **{**HOW, **change})
    (tmp_path / "manifest.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="not the manifest of a run"):
        sample_to(tmp_path, MODEL, 2, **HOW)


def test_labels_follow_their_samples(tmp_path):
    model = untrained((2,), classes=3)
    labels = torch.arange(7) % 3
    how = {"shape": (2,), "steps": 3, "seed": 0}
    one = safetensors.torch.load_file(
        sample_to(tmp_path / "a", model, 7, labels=labels, chunk=3, kind="safetensors", **how)
    )["samples"]
    want = sf.sample(model.bind(label=labels[3:6]), 3, index=3, **how).x
    assert torch.equal(one[3:6], want)
    assert not (tmp_path / "a" / "samples.png").exists()
    with pytest.raises(ValueError, match="int64 labels"):
        sample_to(tmp_path / "b", model, 7, labels=labels[:3], **how)


@pytest.mark.parametrize(
    ("change", "text"),
    [({"num": 0}, "num >= 1"), ({"chunk": 0}, "chunk >= 1"), ({"kind": "pickle"}, "safetensors")],
)
def test_what_is_refused(tmp_path, change, text):
    num = change.pop("num", 2)
    with pytest.raises(ValueError, match=text):
        sample_to(tmp_path / "a", MODEL, num, **{**HOW, **change})
    assert not (tmp_path / "a").exists()


def test_a_picture_of_colours_and_of_few():
    for images in (torch.zeros(3, 3, 5, 7), torch.full((12, 1, 4, 4), float("nan"))):
        assert picture(images)[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_command(tmp_path):
    out = tmp_path / "samples"
    command = ["sample", "digits", "--num", "6", "--steps", "3", "--out", str(out), "--chunk", "4"]
    for _ in range(2):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    with np.load(out / "samples.npz") as held:
        assert held["samples"].shape == (6, 1, 8, 8)
    assert json.loads((out / "manifest.jsonl").read_text().splitlines()[0])["about"]["num"] == 6
    for extra, text in (
        (["--solver", "Nothing"], "unknown solver"), (["--grid", "nothing"], "unknown grid"),
        (["--label", "3"], "takes no labels"), (["--dtype", "int8"], "float32 or float64"),
        (["--steps", "4"], "holds another run"), (["--final", "soon"], "final"),
    ):  # fmt: skip
        folder = out if extra[0] == "--steps" else tmp_path / "other"
        result = CliRunner().invoke(app, [*command[:6], "--out", str(folder), "--chunk", "4", *extra])
        assert result.exit_code != 0
        assert text in result.output + str(result.exception)
    assert not (tmp_path / "other").exists()  # nothing is left of a run that could not begin


def test_without_ray_its_engine_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (
        ["sample", "digits", "--out", str(tmp_path / "a")], ["bench", "--out", str(tmp_path / "a")],
        ["tune", "digits", "--steps", "4", "--out", str(tmp_path / "a.json")],
    ):  # fmt: skip
        result = CliRunner().invoke(app, [*command, "--engine", "ray"])
        assert result.exit_code == 1
        assert result.output.count("\n") == 1
        assert 'needs Ray: pip install "sdeflow[ray]"' in result.output
    result = CliRunner().invoke(app, ["sample", "digits", "--out", str(tmp_path / "a"), "--engine", "spark"])
    assert "unknown engine 'spark'" in result.output
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_is_does_not_depend_on_the_process(tmp_path):
    """A grid is a function, which prints with its address: another process must know the run again."""
    sample_to(tmp_path, MODEL, 2, grid=sf.grids.karras, **HOW)
    about = (tmp_path / "manifest.jsonl").read_text().splitlines()[0]
    assert "karras" in about
    assert "0x" not in about
    with pytest.raises(ValueError, match="with another options"):
        sample_to(tmp_path, MODEL, 2, grid=sf.grids.logsnr, **HOW)
