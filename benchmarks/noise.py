"""The cost of noise: `python -m benchmarks.noise [--threads N] [--compiled]`, as ratios to torch.randn in one run."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.timing import by_turns, show
from sdeflow.brownian import BrownianPath
from sdeflow.noise import CORRECTOR, Noise, normal_pairs

ROUNDS = 9


def fresh(batch: int, size: int, steps: int, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """`steps` draws in order."""

    def run() -> None:
        draw = Noise(0, batch).sequence(CORRECTOR, steps, (size,), dtype)
        for k in range(steps):
            draw(k)

    return run


def walk(batch: int, size: int, steps: int, *, areas: bool = False, one_path: bool = False) -> Callable[[], object]:
    """A Brownian path along a grid, in order."""

    def run() -> None:
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        increments = Noise(0, batch, one_path=one_path).walk(times, (size,), torch.float32, areas=areas)
        for k in range(steps):
            increments(k)

    return run


def randn(batch: int, size: int, steps: int) -> Callable[[], object]:
    """As many numbers of torch's own generator."""

    def run() -> None:
        for _ in range(steps):
            torch.randn(batch, size)

    return run


def block(numbers: int, pairs: int) -> Callable[[], object]:
    """Two normals for each of `pairs` words and `numbers` seeds, by a compiled kernel."""
    draw = torch.compile(normal_pairs, dynamic=False)
    seeds, words = torch.arange(numbers) * 2654435761, torch.arange(pairs)[:, None] * 40503
    return lambda: draw(seeds, words, torch.float32)


def numbers(compiled: bool) -> None:
    """Reproducible normals against torch.randn, 10^5 to 10^7 numbers, drawn for a block of steps at once."""
    rows = []
    for batch, size, steps in ((100, 10, 100), (1000, 10, 100), (100, 64, 156), (10_000, 10, 100), (1000, 100, 100)):
        candidates: dict[str, Callable[[], object]] = {
            "randn": randn(batch, size, steps),
            "fresh": fresh(batch, size, steps),
        }
        if compiled:
            candidates["compiled"] = block(batch * size, steps // 2)
            candidates["randn, one call"] = partial(torch.randn, batch * steps * size)
        seconds = by_turns(candidates, ROUNDS)
        count = batch * size * steps
        row = [f"{batch} x {size} x {steps} steps", f"{count:.0e}", f"{seconds['randn'] / count * 1e9:.2f}"]
        row.append(f"{seconds['fresh'] / seconds['randn']:.2f}")
        row.append(f"{seconds['compiled'] / seconds['randn, one call']:.2f}" if compiled else "-")
        rows.append(row)
    show("Standard normals", ["batch x size", "numbers", "randn, ns each", "ours / randn", "compiled / randn"], rows)


def paths() -> None:
    """Brownian paths on a fixed grid in order, whatever the number of steps."""
    rows = []
    for batch, size, steps in (
        (1000, 10, 64), (1000, 10, 99), (1000, 10, 100), (1000, 10, 1000), (1000, 10, 10_000), (100, 64, 100),
    ):  # fmt: skip
        candidates = {
            "randn": randn(batch, size, steps),
            "W": walk(batch, size, steps),
            "W, H": walk(batch, size, steps, areas=True),
        }
        seconds = by_turns(candidates, ROUNDS if steps <= 1000 else 3)
        base = seconds["randn"]
        rows.append([
            f"{batch} x {size}, {steps} steps", f"{base / steps * 1e6:.1f}",
            f"{seconds['W'] / base:.2f}", f"{seconds['W, H'] / base:.2f}",
        ])  # fmt: skip
    show("A path on a fixed grid, in order", ["batch x size", "randn, us a step", "W / randn", "W and H / randn"], rows)


def queries() -> None:
    """Queries of any times in any order: W and H of an interval, and the path of all grids along a grid."""
    rows = []
    for batch, size in ((1000, 10), (100, 64)):
        path = BrownianPath(0, (batch, size), dtype=torch.float32)
        times = [sorted(random.Random(k).sample(range(1, 10**6), 2)) for k in range(20)]

        def ask(path: BrownianPath = path, times: list[list[int]] = times) -> None:
            for a, b in times:
                path.with_area(a / 10**6, b / 10**6)

        candidates = {
            "randn": randn(batch, size, 20),
            "random": ask,
            "dyadic grid": walk(batch, size, 64, one_path=True),
            "other grid": walk(batch, size, 100, one_path=True),
        }
        seconds = by_turns(candidates, 3)
        base = seconds["randn"] / 20
        rows.append([
            f"{batch} x {size}", f"{seconds['random'] / 20 / base:.0f}",
            f"{seconds['dyadic grid'] / 64 / base:.1f}", f"{seconds['other grid'] / 100 / base:.0f}",
        ])  # fmt: skip
    columns = ["batch x size", "random interval", "SamePath, 64 steps, a step", "SamePath, 100 steps, a step"]
    show("Queries with areas, in units of one torch.randn of that size", columns, rows)


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile (needs a C++ compiler)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)  # while gradients are recorded blocks of noise take fresh memory
    numbers(arguments.compiled)
    paths()
    queries()


if __name__ == "__main__":
    main()
