"""A write that fails half-way leaves the old file as it was, and no part of the new one."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sdeflow as sf
from sdeflow import bench
from sdeflow.cli import app
from sdeflow.data import load
from sdeflow.files import write_atomically
from sdeflow.sample_run import sample_to
from sdeflow.testing import emit


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


def samples(folder, merge=True):
    """Two shards and the file of both."""
    gaussian = sf.problems.Gaussian(torch.zeros(2), torch.eye(2)).model(sf.VP())
    return sample_to(folder, gaussian, 4, shape=(2,), solver=sf.solvers.Heun(), steps=2, chunk=2, shard=2, merge=merge)


def trained(folder):
    done = CliRunner().invoke(app, ["train", "moons", "--out", str(folder), "--steps", "2", "--batch", "4"])
    if done.exit_code:
        raise OSError(done.output)


def emitted(folder):
    """As `sdeflow check --emit-tests` writes them, without the check."""
    file = folder / "test_it.py"
    write_atomically(file, emit.emitted("sdeflow:VP", sf.VP(), file).encode())


FOLDERS = {"samples": samples, "train": trained, "emitted tests": emitted}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What each writer leaves when nothing fails."""
    threads = torch.get_num_threads()
    made = {}
    for kind, write in FOLDERS.items():
        folder = tmp_path_factory.mktemp("whole")
        write(folder)
        made[kind] = contents(folder)
    torch.set_num_threads(threads)
    return made


def without_clock(files):
    return {name: data for name, data in files.items() if not name.endswith((".safetensors", ".py"))}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("turn", [0, 1, 3])
def test_a_run_whose_writes_fail_can_be_given_again(tmp_path, monkeypatch, kind, step, turn, whole):
    """The write number `turn` fails, and all after it: no part of a file is left, and the same call then succeeds."""
    threads, real, calls = torch.get_num_threads(), getattr(os, step), []

    def fails(*given):
        calls.append(given)
        if len(calls) > turn:
            raise OSError("no space left")
        return real(*given)

    with monkeypatch.context() as broken:
        broken.setattr(os, step, fails)
        with contextlib.suppress(OSError):
            FOLDERS[kind](tmp_path)
            assert len(calls) <= turn
    left = contents(tmp_path)
    assert not [name for name in left if ".part" in name]
    assert all(whole[kind][name] == left[name] for name in left if name in whole[kind] and name != "manifest.jsonl")
    FOLDERS[kind](tmp_path)
    torch.set_num_threads(threads)
    assert set(contents(tmp_path)) == set(whole[kind])
    assert without_clock(contents(tmp_path)) == without_clock(whole[kind])


def test_a_merge_that_fails_keeps_the_shards(tmp_path, monkeypatch):
    file = samples(tmp_path / "whole")
    folder = tmp_path / "broken"
    samples(folder, merge=False)
    before = contents(folder)
    assert sum(name.startswith("shards/") for name in before) == 2
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", lambda *given: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            samples(folder)
    assert contents(folder) == before
    assert samples(folder).read_bytes() == file.read_bytes()
    assert set(contents(folder)) == {"samples.npz", "manifest.jsonl"}


FULL = """
import resource, signal, sys
from tests.fuzz.test_fuzz_writers import FOLDERS, WRITERS
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import os, pathlib
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for kind in ("checkpoint", "plan", "results"):
    try:
        WRITERS[kind](sys.argv[1])
    except OSError:
        continue
    sys.exit(f"{kind} was written")
for kind, write in FOLDERS.items():
    folder = pathlib.Path(sys.argv[1]).parent.parent / kind
    folder.mkdir()
    try:
        write(folder)
    except OSError:
        if any(".part" in path.name for path in folder.rglob("*")):
            sys.exit(f"{kind} left a part")
        continue
    sys.exit(f"{kind} was written")
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / "file"
    path.write_bytes(b"the old file")
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == b"the old file"
    assert os.listdir(path.parent) == ["file"]


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


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    """As root, a file put in the place of /dev/null would break the machine."""
    (tmp_path / "there").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(tmp_path / "pipe", b"through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    before = os.stat(os.devnull).st_rdev
    write_atomically(os.devnull, b"gone")
    assert os.stat(os.devnull).st_rdev == before != 0
