"""Long walks and solves: flat in memory, without recursion, and far from time zero."""

import math
import os
import sys

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow import grid_walk as grid_module
from sdeflow.bridge import NodeNormals
from sdeflow.brownian import TreeWalk
from sdeflow.grid_walk import GridWalk
from sdeflow.noise import Noise
from sdeflow.solvers import SRA1, EulerMaruyama
from tests.brownian_cases import Pure, grid_walk, tree_walk
from tests.exact import F64


def held(thing, seen=None):
    """Bytes of the distinct memory of all tensors and arrays that an object holds."""
    seen = {} if seen is None else seen
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, np.ndarray):
        base = thing if thing.base is None or not isinstance(thing.base, np.ndarray) else thing.base
        seen[base.__array_interface__["data"][0]] = base.nbytes
    elif isinstance(thing, dict):
        for v in thing.values():
            held(v, seen)
    elif isinstance(thing, (list, tuple)):
        for v in thing:
            held(v, seen)
    elif isinstance(thing, (GridWalk, TreeWalk, NodeNormals, Noise)):
        held(vars(thing), seen)
    return sum(seen.values())


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def depth():
    frame, n = sys._getframe(), 0
    while frame is not None:
        frame, n = frame.f_back, n + 1
    return n


@pytest.mark.parametrize(("areas", "count", "start"), [(True, 100_000, 0.0), (False, 20_001, 1000.0)], ids=["WH", "W"])
def test_a_long_walk_is_flat_in_memory_and_does_not_recurse(areas, count, start, monkeypatch):
    """100,000 intervals in blocks of 256: the memory it holds stays below its tables and 4 blocks; no deep stack."""
    block = 1 << 12
    monkeypatch.setattr(grid_module, "BLOCK", block)
    times = torch.linspace(start, start + 1, count + 1, dtype=F64)
    walk = Noise(0, 4).walk(times, (2 if areas else 4,), torch.float32, areas=areas)
    tables, most, total, square = held(walk), 0, 0.0, 0.0
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(depth() + 40)
    try:
        for k in range(count):
            step = walk(k)
            total, square = total + step.w, square + step.w**2
            if k % 97 == 0:
                most = max(most, held(walk))
    finally:
        sys.setrecursionlimit(limit)
    # log_256(100,000) = 2.1: 3 runs of nodes wait, each W (and H) of a block in float32
    assert most - tables < 4 * 4 * block * 2
    # the sum of squares over [0, 1] is 1 +- sqrt(2/count)
    assert float((square - 1).abs().max()) < 6 * math.sqrt(2 / count)
    assert float(total.abs().max()) < 6


def test_a_long_walk_on_the_tree_is_flat_in_memory_and_does_not_recurse():
    times = torch.linspace(1000, 1001, 82, dtype=F64)
    walk = tree_walk(times, True, (8,), batch=4)
    one, most, limit = 8 * 4 * 8, 0, sys.getrecursionlimit()
    sys.setrecursionlimit(depth() + 40)
    try:
        for k in range(81):
            walk(k)
            most = max(most, held([[part for _, _, part in walk._ahead], walk._last]))
    finally:
        sys.setrecursionlimit(limit)
    assert most <= 41 * 2 * 2 * one  # W and H of 40 levels, each in the memory of both halves


def test_a_long_solve_in_float32_is_flat_in_memory():
    """100,000 steps of Euler-Maruyama: the state is W to the rounding of as many sums, 100,000^(1/2) 2^-24."""
    x = torch.zeros(2, 3)
    memory, state = [], None
    for state in sf.iterate(Pure(), x, EulerMaruyama(), steps=100_000, seed=2, t_span=(0.0, 1.0)):
        if state.step in (20_000, 60_000, 100_000):
            memory.append(resident())
    clock = torch.full((100_000,), 1e-5, dtype=F64)
    walk = grid_walk(clock, False, (3,), seed=2, batch=2)
    want = sum(walk(k).w for k in range(100_000))
    assert float((state.x - want).abs().max()) < 5e-4
    assert memory[2] - memory[0] < 16e6
    assert float(want.abs().max()) > 0.1


def test_a_span_far_from_zero():
    """At t = 1000 times are told apart by 1e-13: the path is that of the span, whatever its start."""
    here, there = sf.BrownianPath(1, (3, 2)), sf.BrownianPath(1, (3, 2), (1000.0, 1001.0))
    for s, t in ((0.25, 0.75), (0.125, 1.0)):
        for a, b in zip(here.with_area(s, t), there.with_area(1000 + s, 1000 + t), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)

    class Far(Pure):
        t0, t1 = 1000.0, 1001.0

    x = torch.zeros(3, 2, dtype=F64)
    for solver in (EulerMaruyama(), SRA1()):
        few, more = (sf.solve(Far(), x, solver, steps=n, seed=1, save=True).xs for n in (20, 40))
        torch.testing.assert_close(few, more[::2], rtol=0, atol=1e-11)
        same = sf.solve(Far(), x, solver, steps=30, noise=sf.SamePath(1)).x
        torch.testing.assert_close(same, there(1000.0, 1001.0), rtol=0, atol=1e-12)
