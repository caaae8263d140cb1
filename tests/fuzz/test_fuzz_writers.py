"""A write that fails half-way leaves the old file as it was, and no part of the new one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow import bench
from sdeflow.data import load


def checkpoint(path):
    sf.save_model(path, sf.Model(sf.nets.MLP((2,), width=4, depth=1, embedding=4, harmonics=1), sf.VP()))


def plan(path):
    flow = sf.VP().probability_flow(lambda x, t: -x)
    sf.solvers.DPMSolverPP(2).plan(flow, torch.linspace(1, 0.1, 4, dtype=torch.float64)).save(path)


def results(path):
    bench.write([bench.Result("p", "Heun", "uniform", "trajectory", budget=4, nfe=4.0, median=0.1)], path)


def report(path):
    bench.report([bench.Result("p", "Heun", "uniform", "trajectory", budget=4, nfe=4.0, median=0.1)], path)


WRITERS = {"checkpoint": checkpoint, "plan": plan, "results": results, "report": report}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, kind, step):
    path = tmp_path / "file"
    path.write_bytes(b"the old file")

    def fails(*given):
        raise OSError("no space left")

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match="no space left"):
        WRITERS[kind](path)
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["file"]


FULL = """
import resource, signal, sys
from tests.fuzz.test_fuzz_writers import WRITERS
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for kind in ("checkpoint", "plan", "results"):
    try:
        WRITERS[kind](sys.argv[1])
    except OSError:
        continue
    sys.exit(f"{kind} was written")
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"the old file")
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(20), b"<svg>" * 9])
def test_folders_of_files_that_are_no_images(tmp_path, suffix, content):
    (tmp_path / f"a{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match="expected an image, got"):
        load(str(tmp_path))


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    from PIL import Image

    Image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / "a.png")
    assert load(str(tmp_path))[0].shape == (1, 1, 30, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match="expected an image, got"):
        load(str(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="expected an image, got"):
        load(str(tmp_path))
