"""Breaking off: `python -m benchmarks.interrupts`, `sdeflow sample` and `sdeflow train` stopped at random moments.

Each job is run once without a break. Then, ten times, it is started anew, gets SIGINT, SIGTERM or SIGKILL at a moment
drawn uniformly over the time that it takes, and is given again until it ends. Printed for each: what there was just
before the signal and just after the process was gone, its exit status, and whether the files at the end are, byte by
byte, those of the run without a break, with none besides.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.timing import show
from sdeflow.run_state import steps_kept

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
_SAMPLE = ["sample", "digits", "--num", "4000", "--chunk", "50", "--steps", "20"]
_TRAIN = ["train", "moons", "--steps", "1500", "--batch", "32", "--save-every", "250"]


class Break(NamedTuple):
    """One run that was broken off, and taken up again."""

    signal: str
    moment: float
    before: int
    after: int
    status: int
    message: str
    same: bool

    @property
    def good(self) -> bool:
        """Whether nothing was lost, the end is the same, and what could speak said how to go on."""
        spoke = (
            self.status in (0, -9) or "to go on: sdeflow" in self.message or "to start anew: sdeflow" in self.message
        )
        # before the command has begun, and after it has ended, python itself answers
        outside = self.before == self.after in (0, sys.maxsize) and self.status in (-2, -15, 1, 130, 143)
        return self.same and self.after >= self.before and (spoke or outside)


def start(words: list[str], out: Path) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    run = "import sys; sys.argv[0] = 'sdeflow'; from sdeflow.cli import app; app(prog_name='sdeflow')"
    command = [sys.executable, "-c", run, *words, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files(out: Path) -> dict[str, bytes]:
    """Every file in a folder, by its name there."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def finished(out: Path) -> int:
    """How far a run has come: the step whose state was kept, or the number of shards in the manifest."""
    if (out / "model.safetensors").exists() or (out / "samples.npz").exists():
        return sys.maxsize
    if (out / "manifest.jsonl").exists():
        return (out / "manifest.jsonl").read_bytes().count(b"\n") - 1
    return steps_kept(out / "run.safetensors")


def broken(words: list[str], out: Path, number: signal.Signals, moment: float, whole: dict[str, bytes]) -> Break:
    """Start, signal after `moment` seconds, and give the command again until it ends."""
    process = start(words, out)
    time.sleep(moment)
    before = finished(out)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    after = finished(out)
    again = start(words, out)
    _, errors = again.communicate(timeout=600)
    if again.returncode != 0:
        raise SystemExit(f"the command given again failed: {errors}")
    return Break(number.name, moment, before, after, process.returncode, message, files(out) == whole)


def many(words: list[str], folder: Path, count: int, seed: int) -> list[Break]:
    """`count` breaks of one command, the signals in turn."""
    began = time.perf_counter()
    process = start(words, folder / "whole")
    _, errors = process.communicate(timeout=600)
    if process.returncode != 0:
        raise SystemExit(f"the run without a break failed: {errors}")
    seconds, whole = time.perf_counter() - began, files(folder / "whole")
    draw = random.Random(seed)
    made = []
    for k in range(count):
        moment = draw.uniform(0, seconds)
        made.append(broken(words, folder / str(k), _SIGNALS[k % len(_SIGNALS)], moment, whole))
        print(f"{words[0]}, {k + 1} of {count}: {made[-1]._replace(message='')}", file=sys.stderr, flush=True)
    print(f"{' '.join(words)}: {seconds:.1f} s without a break, files {', '.join(whole)}", file=sys.stderr)
    return made


def main() -> None:
    """Print the table; exit status 1 if anything was lost or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", help="sample, train; both unless given")
    parser.add_argument("--count", type=int, default=10, help="breaks of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    every: list[tuple[str, Break]] = []
    for words in (w for w in (_SAMPLE, _TRAIN) if w[0] in (given.commands or ("sample", "train"))):
        with tempfile.TemporaryDirectory() as folder:
            every += [(words[0], made) for made in many(words, Path(folder), given.count, given.seed)]
    show(
        "Stopped at random moments, and given again",
        ["command", "signal", "after", "finished before", "and kept", "exit status", "files at the end"],
        [
            [command, b.signal, f"{b.moment:.2f} s", _far(b.before), _far(b.after), str(b.status),
             "the same" if b.same else "DIFFERENT"]
            for command, b in every
        ],
    )  # fmt: skip
    bad = [(command, b) for command, b in every if not b.good]
    for command, b in bad:
        print(f"{command}, {b.signal} after {b.moment:.2f} s: {b.message}", file=sys.stderr)
    good = not bad
    raise SystemExit(0 if good else 1)


def _far(count: int) -> str:
    return "all" if count == sys.maxsize else str(count)


if __name__ == "__main__":
    main()
