"""Other libraries, side by side: `python -m benchmarks.peers [--json FILE] [--markdown FILE]`.

All in one process and on one thread, by turns, every candidate once a round; ratios are taken within a round, and their
median and quartiles over the rounds are what counts. Absolute times are context. Gradients are measured in processes of
their own, for their memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import adaptive, gradients, sde
from benchmarks.overhead import limit
from benchmarks.peers.problem import Run, Sample, Sampling, ends, plane
from benchmarks.timing import every_turn, show
from sdeflow import solvers

Cell = str | int | float
STEPS = 50
LIBRARIES = {
    "sdeflow": "ours", "diffusers": "diffusers_schedulers", "azula": "azula_samplers",
    "torchdiffeq": "torchdiffeq_solvers", "torchsde": "torchsde_solvers", "torchode": "torchode_solvers",
    "diffrax": "diffrax_solvers",
}  # fmt: skip
"""The module of each here."""
COINCIDE = {
    "diffusers": {"DDIM", "Euler", "DPM++2M", "UniPC2", "flow Euler"},
    "azula": {"DDIM", "Euler", "Heun"},
    "torchdiffeq": {"Euler", "midpoint", "Heun", "RK4"},
    "torchode": {"Euler", "Heun"},
    "diffrax": {"Euler", "midpoint", "Heun"},
}
"""Methods that are the same map as ours, so that their ends must be equal but for rounding."""
AGREE = 1e-4
"""Largest difference of float32 ends, of size 4, that counts as equal."""


@dataclass
class Table:
    """Rows of a measurement."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[Cell]]


def from_libraries(function: str, *arguments: Any) -> dict[str, dict[str, Any]]:
    """{library: what its `function` returns}, for those that have it; a missing library is one printed line."""
    found = {}
    for library, module in LIBRARIES.items():
        make = getattr(importlib.import_module(f"benchmarks.peers.{module}"), function, None)
        if make is None:
            continue
        try:
            found[library] = make(*arguments)
        except ImportError as error:
            print(f"{library} is left out of {function!r}: {error}")
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return middle, low, high


def ratios(a: list[float], b: list[float]) -> list[float]:
    """Round by round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def over_the_limit(title: str, about: str, function: str, p: Sampling, rounds: int) -> Table:
    """Overhead of every library's methods over the tight loop of as many calls."""
    made: dict[str, dict[str, Run]] = from_libraries(function, p)
    flat = {f"{library}|{name}": run for library, runs in made.items() for name, run in runs.items()}
    difference = {key: agreement(key, run, made["sdeflow"]) for key, run in flat.items()}
    noisy = {key: key.split("|")[1] in ("DDPM", "DPM++2M SDE") for key in flat}
    limits = {key: f"limit {run.nfe} {noisy[key]}" for key, run in flat.items()}
    candidates: dict[str, Callable[[], object]] = {key: run.call for key, run in flat.items()}
    for key, run in flat.items():
        candidates.setdefault(limits[key], limit(p.net, p.x, run.nfe, noisy[key]))
    seconds = every_turn(candidates, rounds)
    rows: list[list[Cell]] = []
    for name in made["sdeflow"]:
        for library, runs in made.items():
            if name not in runs:
                continue
            key, run = f"{library}|{name}", runs[name]
            base = seconds[limits[key]]
            ratio = [r - 1 for r in ratios(seconds[key], base)]
            extra = statistics.median(a - b for a, b in zip(seconds[key], base, strict=True)) / run.nfe * 1e6
            rows.append([name, library, run.nfe, *quartiles(ratio), extra, difference[key], run.note])
    columns = ["method", "library", "calls", "overhead", "25%", "75%", "extra us a call", "off ours", "note"]
    return Table(title, about, columns, rows)


def agreement(key: str, run: Run, ours: Mapping[str, Run]) -> Cell:
    """The largest difference of the ends from ours; an error where the method is the same and they differ."""
    library, name = key.split("|")
    if library == "sdeflow" or name not in COINCIDE.get(library, ()):
        return ""
    theirs, own = torch.from_numpy(np.array(run.call())), ours[name].call()
    difference = float((theirs - own).abs().max()) if isinstance(own, Tensor) else math.nan
    print(f"{library} {name}: ends are within {difference:.1e} of ours")
    if not difference < AGREE:
        raise AssertionError(f"{library}'s {name} ends {difference:.1e} from ours: expected less than {AGREE:g}")
    return difference


def overhead(rounds: int) -> Iterator[Table]:
    """(a): what a library adds to a model call."""
    about = (
        "Overhead is (time - loop)/loop, the loop being the tight one of `benchmarks/overhead.py` with as many calls. "
        "Mixture of 8 Gaussians in the plane, batch 256, {} steps, float32. "
    )
    yield over_the_limit(
        "Samplers: overhead a call",
        about.format(STEPS) + "The same start and the grid 999, 979, ..., 19, 0 of DDPM's linear table for all.",
        "samplers", plane(STEPS), rounds,
    )  # fmt: skip
    yield over_the_limit(
        "Runge-Kutta on equal steps: overhead a call",
        about.format(STEPS) + "An autonomous ODE whose drift is that network at one noise level.",
        "steppers", plane(STEPS), rounds,
    )  # fmt: skip


def precision(budgets: tuple[int, ...] = (5, 10, 20, 50)) -> Iterator[Table]:
    """(b): error against calls."""
    rows: list[list[Cell]] = []
    for budget in budgets:
        p = plane(budget, dtype=torch.float64)
        first, zero = ends(p)
        best: dict[str, tuple[float, float, str, int, int]] = {}
        for library, samples in from_libraries("precise", p).items():
            tried = [(*_errors(name, s, first, zero), name, s.nfe) for name, s in samples.items() if s.nfe <= budget]
            median, high, name, nfe = min((t for t in tried if math.isfinite(t[0])), default=(math.nan, 0.0, "", 0))
            best[library] = median, high, name, nfe, len(tried)
        for library, (median, high, name, nfe, count) in best.items():
            rows.append([budget, library, name, nfe, count, median, high, median / best["sdeflow"][0]])
    yield Table(
        "Error against calls",
        "Median and 90% quantile over 256 samples of the distance to the exact end, on the same exact score, from the "
        "same noise, float64. Ours is what `sf.recommend` names without looking; a peer's is the best, chosen after "
        "the fact, of the methods and grids tried ('tried'). torchdiffeq and diffrax solve dz/d rho = eps with "
        "z = x/alpha and rho = sigma/alpha.",
        ["budget", "library", "method", "calls", "tried", "median", "90%", "x ours"],
        rows,
    )


def _errors(name: str, sample: Sample, first: Tensor, zero: Tensor) -> tuple[float, float]:
    try:
        end = sample.call().double()
    except (ValueError, IndexError, RuntimeError) as error:  # a scheduler may not fit so few steps
        print(f"{name} is left out: {error}")
        return math.inf, math.inf
    each = (end - (zero if sample.zero else first)).square().mean(1).sqrt()
    return float(each.median()), float(each.quantile(0.9))


def stochastic(rounds: int, steps: int = 64) -> Iterator[Table]:
    """(c): the cost of an SDE's step."""
    x = torch.full((sde.BATCH, sde.SIZE), 0.5)
    own = {
        "Euler-Maruyama": (solvers.EulerMaruyama(), "euler"),
        "Milstein": (solvers.Milstein(), "milstein"),
        "SRK, order 1.5": (solvers.SRIW1(), "srk"),
    }
    made: dict[str, dict[str, Run]] = {
        "loop": {
            "Euler-Maruyama": Run(sde.minimal(x, steps), steps),
            "Milstein": Run(sde.minimal(x, steps, milstein=True), steps, "g' by hand"),
        },
        "sdeflow": {name: Run(sde.ours(x, solver, steps), steps) for name, (solver, _) in own.items()},
        **from_libraries("sdes", x, steps),
    }
    flat = {f"{library}|{name}": run for library, runs in made.items() for name, run in runs.items()}
    seconds = every_turn({key: run.call for key, run in flat.items()}, rounds)
    base, rows = seconds["loop|Euler-Maruyama"], []
    for name, (solver, theirs) in own.items():
        for library, runs in made.items():
            if name not in runs:
                continue
            key = f"{library}|{name}"
            error: Cell = ""
            if library == "sdeflow":
                error = sde.strong_error(x, solver, steps)
            elif library == "torchsde":
                error = sde.torchsde_error(x, theirs, steps)
            us = statistics.median(seconds[key]) / steps * 1e6
            times = statistics.median(ratios(seconds[key], seconds[f"sdeflow|{name}"]))
            rows.append([name, library, us, *quartiles(ratios(seconds[key], base)), times, error, runs[name].note])
    yield Table(
        "Stochastic differential equations: a step",
        f"Geometric Brownian motion, 1000 x 10, {steps} steps, float32; 'x loop' is against Euler-Maruyama by hand "
        "with `torch.randn`. The strong error is in float64, each library on its own paths.",
        ["method", "library", "us a step", "x loop", "25%", "75%", "x ours", "strong error", "note"],
        rows,
    )


def gradient(rounds: int) -> Iterator[Table]:
    """(d): time and memory of a forward and a backward pass, by `benchmarks.gradients`."""
    found: dict[str, list[dict[str, float]]] = {n: [] for n in gradients.CANDIDATES if gradients.installed(n)}
    for _ in range(rounds):
        for name, results in found.items():
            results.append(gradients.in_fresh_process(name, gradients.STEPS))
    seconds = {name: [r["seconds"] for r in results] for name, results in found.items()}
    memory = {name: statistics.median(r["MB"] for r in results) for name, results in found.items()}
    rows: list[list[Cell]] = []
    for name in found:
        loop = name[:3] + ", loop"
        middle = statistics.median(seconds[name])
        times = quartiles(ratios(seconds[name], seconds[loop]))
        share = memory[name] / memory[loop] if memory[loop] else math.nan
        rows.append([name, middle, *times, memory[name], share])
    yield Table(
        "Gradients: a forward and a backward pass",
        f"{gradients.STEPS} steps through a neural drift, RK4 (ODE) or reversible Heun (SDE), float32; every pass in a "
        f"fresh process, {rounds} rounds. 'direct', 'checkpointed' and 'adjoint' are ours. Memory is the growth of the "
        "peak resident set.",
        ["candidate", "seconds", "x loop", "25%", "75%", "MB", "MB x loop"],
        rows,
    )


def tolerance(rounds: int) -> Iterator[Table]:
    """(e): solves to a tolerance, by `benchmarks.adaptive`."""
    own = {"Tsit5": solvers.Tsit5(), "DOP853": solvers.DOP853()}
    rows: list[list[Cell]] = []
    try:
        others = adaptive.peers()
        importlib.import_module("torchdiffeq")
    except ImportError as error:
        print(f"no table of tolerances: {error}")
        return
    with torch.no_grad():
        for name, (problem, x) in adaptive.cases().items():
            want = adaptive.reference(problem, x)
            runs: dict[tuple[str, float], Callable[[], adaptive.Result]] = {}
            for label, solver in own.items():
                for tol in adaptive.OURS:
                    runs[label, tol] = partial(adaptive.ours, problem, x, solver, tol, False)
            for label, peer in others.items():
                for tol in adaptive.THEIRS:
                    runs[label, tol] = partial(peer, problem, x, tol)
            made = {key: run() for key, run in runs.items()}
            found = {key: adaptive.errors(result, want) for key, result in made.items()}
            seconds = every_turn({f"{label}|{tol}": run for (label, tol), run in runs.items()}, rounds)
            for label in others:
                for tol in adaptive.THEIRS:
                    key, times = (label, tol), []
                    for method in own:
                        each = []
                        for k in range(rounds):
                            both = [
                                seconds[f"{label}|{tol}"][k] / adaptive.at_error(
                                    [(found[method, t][i], seconds[f"{method}|{t}"][k]) for t in adaptive.OURS],
                                    found[key][i],
                                )
                                for i in (0, 1)
                            ]  # fmt: skip
                            each.append(min(both))
                        times += list(quartiles(each))
                    rows.append([name, label, f"{tol:.0e}", made[key].mean, *found[key], *times])
    yield Table(
        "To a tolerance",
        "256 samples, float64, `benchmarks/adaptive.py`. How many times faster our Tsit5 and DOP853 are at equal "
        "error, the smaller of the ratios at the median and at the largest error of a sample.",
        ["problem", "peer", "rtol", "calls", "median error", "largest", "Tsit5", "25%", "75%", "DOP853", "25%", "75%"],
        rows,
    )


def machine() -> dict[str, Cell]:
    """What it ran on."""
    model = platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else model
    return {
        "processor": model,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of everything that took part."""
    found = {}
    for name in (*LIBRARIES, "torch", "numpy", "jax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def written(cell: Cell) -> str:
    """For a table: three digits."""
    if isinstance(cell, float):
        return "" if math.isnan(cell) else f"{cell:.2f}" if 0.095 <= abs(cell) < 10 else f"{cell:.3g}"
    return str(cell)


def markdown(document: dict[str, Any]) -> str:
    """The generated part of the page."""
    where = document["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    parts = [
        f"{where['processor']}, {where['cores']} cores, {where['threads']} thread used; {where['system']}, "
        f"Python {where['python']}; {packages}."
    ]
    for table in document["tables"]:
        lines = ["| " + " | ".join(row) + " |" for row in (table["columns"], ["---"] * len(table["columns"]))]
        lines += ["| " + " | ".join(written(cell) for cell in row) + " |" for row in table["rows"]]
        parts += [f"### {table['title']}", table["about"], "\n".join(lines)]
    return "\n\n".join(parts)


MARKERS = re.compile(r"(<!-- measured: .*? -->\n).*?(<!-- end -->)", re.DOTALL)


def put_into(page: Path, text: str) -> None:
    """Replace what is between the markers of the page."""
    old = page.read_text()
    if not MARKERS.search(old):
        raise ValueError(f"{page} has no markers <!-- measured: ... --> and <!-- end -->")
    page.write_text(MARKERS.sub(lambda m: f"{m.group(1)}\n{text}\n\n{m.group(2)}", old))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of other libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="a page with markers, between which the tables go")
    parser.add_argument("--from-json", type=Path, help="measure nothing: write the page from this file")
    parser.add_argument(
        "--rounds", type=int, default=31, help="of the fast tables; the slow ones take a tenth, at least 3"
    )
    parser.add_argument("--tables", default="overhead,precision,stochastic,gradient,tolerance")
    arguments = parser.parse_args()
    if arguments.from_json:
        document = json.loads(arguments.from_json.read_text())
    else:
        torch.set_num_threads(1)
        few = max(3, arguments.rounds // 10)
        makers: dict[str, Callable[[], Iterator[Table]]] = {
            "overhead": lambda: overhead(arguments.rounds),
            "precision": precision,
            "stochastic": lambda: stochastic(max(3, arguments.rounds // 2)),
            "gradient": lambda: gradient(few),
            "tolerance": lambda: tolerance(few),
        }
        document = {"machine": machine(), "versions": versions(), "tables": []}
        for name in arguments.tables.split(","):
            start = time.perf_counter()
            with quiet():
                for table in makers[name]():
                    show(table.title, table.columns, [[written(cell) for cell in row] for row in table.rows])
                    document["tables"].append(asdict(table))
            print(f"{name}: {time.perf_counter() - start:.0f} s")
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.markdown:
        put_into(arguments.markdown, markdown(document))


if __name__ == "__main__":
    main()
