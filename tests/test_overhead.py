"""What the library adds to a model call, as a ratio to the tight loop in this process: reported, with a far bound."""

from __future__ import annotations

import statistics

import pytest
import torch

from benchmarks.overhead import STEPS, limit, mixture, ours
from benchmarks.timing import every_turn
from sdeflow import solvers

METHODS = {
    "DDIM": (solvers.DDIM(), 0.0),
    "DPM-Solver++ 2M": (solvers.DPMSolverPP(2), 0.0),
    "Euler-Maruyama": (solvers.EulerMaruyama(), 1.0),
}
OVERHEAD = 4.0
"""(time - loop)/loop with the mixture: 0.2 to 1.2 is usual."""
EXTRA = 20.0
"""Microseconds a call above the loop, in calls of a loop whose model costs nothing: 1 to 4 is usual."""
ROUNDS = 15


def ratios() -> dict[str, tuple[float, float]]:
    """{method: (overhead with the mixture, extra time a call in calls of a free loop)}, medians over the rounds."""
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    fixed = torch.zeros_like(x)
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for net in (mixture(), lambda x, sigma: fixed):
        candidates = {f"loop {noisy}": limit(net, x, STEPS, noisy) for noisy in (False, True)}
        candidates |= {name: ours(net, x, solver, eta) for name, (solver, eta) in METHODS.items()}
        seconds = every_turn(candidates, ROUNDS)
        for name, (_, eta) in METHODS.items():
            loop = seconds[f"loop {eta > 0}"]
            found[name].append(statistics.median(a / b - 1 for a, b in zip(seconds[name], loop, strict=True)))
    return {name: (cheap, free) for name, (cheap, free) in found.items()}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the clock is then the process's own
    yield
    torch.set_num_threads(threads)


def test_a_call_costs_little_more_than_in_the_tight_loop(one_thread, record_property):
    for _ in range(2):  # a bad moment is tried again
        found = ratios()
        if all(overhead < OVERHEAD and extra < EXTRA for overhead, extra in found.values()):
            break
    for name, (overhead, extra) in found.items():
        print(f"{name}: overhead {overhead:.2f}, free model {extra:.1f}")
        record_property(f"overhead of {name}", round(overhead, 3))
        record_property(f"extra of {name}, calls of a free loop", round(extra, 3))
    for name, (overhead, extra) in found.items():
        assert overhead < OVERHEAD, f"{name} adds {overhead:.2f} times the tight loop"
        assert extra < EXTRA, f"{name} adds {extra:.1f} calls of a free loop to a call"
