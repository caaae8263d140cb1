"""What the Ray engine costs, and whether it leaves a trace: `python -m benchmarks.cluster [--part NAME]`.

    bytes      200,000 samples of the digits network, in this process, on two workers, in five shard sizes, and with
               workers killed at random moments: the content of all samples
    overhead   against this process at shards of about five seconds of work; one and two workers
    manifest   the driver's cost of a shard, and a manifest of a million: its size, the time to open and to finish it,
               the memory it takes

Ray is started on this machine alone, on the loopback interface, without a dashboard.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sdeflow as sf
from sdeflow.dataset import Dataset, Shard
from sdeflow.engine import Engine, Local, Ray
from sdeflow.sample_run import sample_to

PARTS = ("bytes", "overhead", "manifest")
CHUNK = 500


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, justify="left" if column in ("run", "figure") else "right")
    return made


def workers_of_ray() -> list[int]:
    """Process ids of Ray's workers on this machine that compute now."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if b"ray::_compute" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


class Killer:
    """Kills a worker that computes, by its id, at random moments."""

    def __init__(self, times: int, every: float, seed: int) -> None:
        self.killed: list[int] = []
        self._times, self._every, self._random = times, every, random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while len(self.killed) < self._times and not self._stop.wait(self._random.uniform(0.2, 2 * self._every)):
            running = workers_of_ray()
            if running:
                victim = self._random.choice(running)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    self.killed.append(victim)


def samples(
    folder: Path, num: int, engine: Engine | None, shard: int, steps: int, on_chunk: Callable[[int], None] | None = None
) -> tuple[Dataset, float]:
    model = sf.load_model("digits")
    began = time.perf_counter()
    sample_to(
        folder, model, num, shape=(1, 8, 8), solver=sf.solvers.DPMSolverPP(2), steps=steps, chunk=CHUNK, engine=engine,
        shard=shard, merge=False, kind="safetensors", on_chunk=on_chunk,
    )  # fmt: skip
    return Dataset(folder), time.perf_counter() - began


def bytes_part(num: int, kills: int) -> Table:
    """The content of all samples, however they were computed."""
    made = table(f"{num:,} samples of the digits network, 10 steps", "run", "shards", "killed", "seconds", "content")
    contents = set()
    with tempfile.TemporaryDirectory() as folder, Ray(workers=2) as engine:
        runs: list[tuple[str, Engine | None, int, int]] = [
            ("this process", None, num // 20, 0),
            *((f"Ray, shards of {shard:,}", engine, shard, 0) for shard in (CHUNK, 2000, 5000, 20000, num // 2)),
            (f"Ray, {kills} workers killed", engine, 1000, kills),
        ]
        for k, (name, where, shard, times) in enumerate(runs):
            every = 10.0 * num / 200_000 / max(1, times)
            with Killer(times, every, seed=k) as killer:
                data, seconds = samples(Path(folder) / str(k), num, where, shard, 10)
            held = sorted((s.first, s.end) for s in data.each())
            once = all(a[1] == b[0] for a, b in pairwise(held)) and data.complete
            assert once, "an index is missing or twice in the dataset"
            contents.add(data.content)
            made.add_row(name, str(len(held)), str(len(killer.killed)), f"{seconds:.1f}", data.content[:16])
    made.caption = "identical" if len(contents) == 1 else f"{len(contents)} DIFFERENT contents"
    return made


def overhead_part(num: int) -> Table:
    """Ray after start-up against this process, and two workers against one."""
    made = table(f"{num:,} samples in shards of a quarter, 10 steps, median of 3", "figure", "seconds", "ratio")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def median(name: str, engine: Engine | None, count: int) -> float:
            taken = []
            for k in range(4):
                _, seconds = samples(root / f"{name}{k}", count, engine, num // 4, 10)
                taken.append(seconds)
            return sorted(taken[1:])[1]  # the first warms up: workers start and fetch the model

        here = median("here", Local(), num)
        with Ray(workers=1) as engine:
            one = median("one", engine, num)
        with Ray(workers=2) as engine:
            two = median("two", engine, num)
    made.add_row("this process", f"{here:.2f}", "")
    made.add_row("one Ray worker", f"{one:.2f}", f"{one / here - 1:+.1%} overhead")
    made.add_row("two Ray workers", f"{two:.2f}", f"{one / two:.2f} times as fast as one")
    return made


class Wide(Ray):
    """Ray that is told of 10,000 workers: as many tasks are under way as there would be."""

    workers = 10_000


class Nothing:
    """Work of no time."""

    def __call__(self, item: tuple[int, int]) -> tuple[int, int]:
        return item


def manifest_part(shards: int, tasks: int) -> Table:
    """What grows with the number of shards."""
    made = table("The driver", "figure", "value")
    with Ray(workers=2) as engine:
        list(engine.map(Nothing(), ((k, 1) for k in range(50))))
        for name, where, count in (("two workers", engine, tasks), ("10,000 workers", Wide(), 20 * tasks)):
            began, busy = time.perf_counter(), time.process_time()
            assert sum(1 for _ in where.map(Nothing(), ((k, 1) for k in range(count)))) == count
            wall, cpu = time.perf_counter() - began, time.process_time() - busy
            made.add_row(f"{count:,} empty tasks, in flight as for {name}: wall a task", f"{1e3 * wall / count:.2f} ms")
            made.add_row("    processor of the driver a task", f"{1e3 * cpu / count:.2f} ms")
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset(folder, {"num": shards})
        digest = "0123456789abcdef" * 4
        before, began = peak(), time.perf_counter()
        order = torch.randperm(64).tolist()  # shards arrive out of order, as from workers
        for start in range(0, shards, 64):
            for k in order:
                if start + k < shards:
                    first = start + k
                    name = f"shards/{first:012d}-{first + 1:012d}.safetensors"
                    data.add(Shard(first, 1, name, 1 << 20, digest, digest))
        added = time.perf_counter() - began
        size = (Path(folder) / "manifest.jsonl").stat().st_size
        grown = peak() - before
        began = time.perf_counter()
        again = Dataset(folder)
        opened = time.perf_counter() - began
        began = time.perf_counter()
        again.finish()
        finished = time.perf_counter() - began
        total = peak() - before
    made.add_row(f"entering a shard, of {shards:,}", f"{1e6 * added / shards:.0f} us")
    made.add_row("size of the manifest", f"{size / 2**20:.0f} MiB, {size / shards:.0f} bytes a shard")
    made.add_row("opening it", f"{opened:.1f} s")
    made.add_row("bringing it in order (finish)", f"{finished:.1f} s")
    made.add_row("memory while shards are entered", f"+{grown:.0f} MiB")
    made.add_row("memory at most", f"+{total:.0f} MiB")
    return made


def peak() -> float:
    """The most memory this process has taken, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=10)
    given: Any = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console(width=110)
    for part in given.part or PARTS:
        if part == "bytes":
            console.print(bytes_part(given.samples, given.kills))
        elif part == "overhead":
            console.print(overhead_part(given.samples))
        else:
            console.print(manifest_part(given.shards, 2000))


if __name__ == "__main__":
    main()
