"""`sdeflow sample` and `sdeflow train` stopped by signals: nothing finished is lost, and the end is the same."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import signal
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.interrupts import broken, files, many, start
from sdeflow.cli import app
from sdeflow.cli_outcome import Stop
from sdeflow.run_state import steps_kept

SAMPLE = ["sample", "digits", "--num", "1500", "--chunk", "50", "--steps", "20"]
TRAIN = ["train", "moons", "--steps", "450", "--batch", "16", "--save-every", "100"]


def command(words, log):
    """In a process of its own, as the console script does it; what it prints goes to a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["sdeflow", *words]
    app(prog_name="sdeflow")


def stopped(words, out, number, when, log):
    """Run a command, send it a signal as soon as `when` is true: its exit status, what it said."""
    context = multiprocessing.get_context("forkserver")  # torch is imported once for all of them
    context.set_forkserver_preload(["sdeflow.cli", "benchmarks.interrupts"])
    process = context.Process(target=command, args=([*words, "--out", str(out)], log))
    process.start()
    until = time.monotonic() + 60
    while not when() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.002)
    assert process.is_alive(), log.read_text()
    os.kill(process.pid, number)
    process.join(60)
    return process.exitcode, log.read_text()


def whole(words, out):
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(app, [*words, "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return files(out)


def shards(out):
    """The lines of the manifest's finished shards."""
    manifest = out / "manifest.jsonl"
    return set(manifest.read_bytes().splitlines(keepends=True)[1:]) if manifest.exists() else set()


def test_samples(tmp_path):
    want = whole(SAMPLE, tmp_path / "whole")
    out, log, known = tmp_path / "broken", tmp_path / "log", set()
    for number, status, least in (
        (signal.SIGINT, 130, 3), (signal.SIGTERM, 143, 8), (signal.SIGKILL, -signal.SIGKILL, 13),
    ):  # fmt: skip
        got, said = stopped(SAMPLE, out, number, lambda least=least: len(shards(out)) >= least, log)
        assert got == status, said
        now = shards(out)
        assert len(now) >= least
        assert now >= known  # what was there still is, as it was
        known = now
        if number != signal.SIGKILL:
            again = shlex.join(["sdeflow", *SAMPLE, "--out", str(out)])
            line = said.strip().splitlines()[-1]
            count = int(re.fullmatch(
                rf"sdeflow sample: interrupted; (\d+) of 1500 samples are finished and kept in {re.escape(str(out))}; "
                rf"to go on: {re.escape(again)}", line,
            )[1])  # fmt: skip
            assert 50 * len(now) - 50 <= count <= 50 * len(now)  # the last may have been entered, and not yet counted
            assert "Traceback" not in said
    assert whole(SAMPLE, out) == want


@pytest.mark.slow  # tests/test_training_runs.py kills a run in the fast suite
def test_training(tmp_path):
    want = whole(TRAIN, tmp_path / "whole")
    out, log = tmp_path / "broken", tmp_path / "log"
    state, rows = out / "run.safetensors", out / "train.jsonl"
    known = 0

    def lines():
        return len(rows.read_text().splitlines()) if rows.exists() else 0

    # rows come every 50 steps and states every 100: a signal keeps the steps since then, a kill does not
    for number, status, least in (
        (signal.SIGINT, 130, 50), (signal.SIGTERM, 143, 150), (signal.SIGKILL, -signal.SIGKILL, 300),
    ):  # fmt: skip
        got, said = stopped(TRAIN, out, number, lambda least=least: 50 * lines() > least, log)
        assert got == status, said
        assert steps_kept(state) >= max(known, least)
        known = steps_kept(state)
        if number != signal.SIGKILL:
            again = shlex.join(["sdeflow", *TRAIN, "--out", str(out)])
            assert said.strip().splitlines()[-2:] == [
                "sdeflow train: stopping after this step",
                f"sdeflow train: interrupted; the state after step {known} is in {state}; to go on: {again}",
            ]
            assert "Traceback" not in said
    assert whole(TRAIN, out) == want


def test_what_a_killed_writer_leaves_is_removed(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("run.safetensors.123.part", "model.safetensors.7.part", "train.jsonl.9.part", "mine.part"):
        (out / name).write_text("half")
    whole(["train", "moons", "--steps", "2", "--batch", "8"], out)
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "train.jsonl", "mine.part"}


def test_the_console_script_answers_ctrl_c(tmp_path):
    """Two of them: the second, while the first is answered, changes nothing."""
    process = start(SAMPLE, tmp_path / "out")
    until = time.monotonic() + 60
    while len(shards(tmp_path / "out")) < 2 and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == ""
    assert complaint.count("\n") == 1
    assert complaint.startswith("sdeflow sample: interrupted; ")


def test_a_second_signal_does_not_break_off_the_saving(monkeypatch):
    stop, seen = Stop(), []

    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            seen.append("saved")

    with stop.listening(), pytest.raises(KeyboardInterrupt):
        work()
    assert seen == ["saved"]
    assert stop.number == signal.SIGINT
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 11)  # but later it does: the saving may hang
    with stop.listening(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_signals_that_the_process_was_told_to_ignore_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        stop = Stop()
        with stop.listening():
            signal.raise_signal(signal.SIGHUP)
        assert not stop.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert (
        CliRunner().invoke(app, ["tune", "nothing", "--steps", "2", "--out", str(tmp_path / "p.json")]).exit_code == 1
    )
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("words", [SAMPLE, TRAIN], ids=["sample", "train"])
def test_ten_random_moments(words, tmp_path):
    made = many(words, tmp_path, 10, seed=1)
    assert all(b.good for b in made), [b for b in made if not b.good]


@pytest.mark.slow
def test_a_difference_would_be_seen(tmp_path):
    """The negative control: against the files of another seed nothing is the same."""
    other = whole([*SAMPLE, "--seed", "1"], tmp_path / "other")
    assert not broken(SAMPLE, tmp_path / "out", signal.SIGTERM, 3.0, other).good
