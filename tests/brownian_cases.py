"""Walks along Brownian paths, problems to solve along them, recordings, and the check that two walks have one path."""

import math

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.bridge import Increment
from sdeflow.noise import Noise
from tests.exact import F64


class Pure(sf.SDE):
    """dX = dW: the solution is the path."""

    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, x, t):
        return torch.ones_like(x)


def grid_of(kind, count):
    """Lengths (count,) of intervals that share [0, 1], or less."""
    k = torch.arange(count + 1, dtype=F64) / count
    if kind == "uniform":
        return torch.diff(k)
    if kind == "cubic":
        return torch.diff(k**3)
    if kind == "falling":
        return torch.diff(k**3).flip(0)
    if kind == "geometric down":
        return 10.0 ** -(12 * k[1:])
    wild = torch.tensor(10.0 ** np.random.default_rng(count).uniform(-12, 0, count))
    if count > 1:
        wild[count // 2 :: 3] = 0.0
    return wild


def chen(lengths, increments):
    """(W, H) of adjacent intervals together, by the partial sums of W and of its integral."""
    w, integral = torch.zeros_like(increments[0].w), torch.zeros_like(increments[0].w)
    for h, step in zip(lengths, increments, strict=True):
        if step.h is not None:
            integral = integral + h * (w + step.w / 2 + step.h)
        w = w + step.w
    total = float(sum(lengths))
    return Increment(w, None if increments[0].h is None else integral / total - w / 2)


def grid_walk(lengths, areas, event, *, seed=0, batch=1, dtype=F64, index=None, **options):
    clock = torch.cat([torch.zeros(1, dtype=F64), lengths.cumsum(0)])
    return Noise(seed, batch, index=index, **options).walk(clock, event, dtype, areas=areas, lengths=lengths)


def tree_walk(times, areas, event, *, seed=0, batch=1, dtype=F64, index=None, **options):
    times = torch.as_tensor(times, dtype=F64)
    return Noise(seed, batch, index=index, one_path=True, **options).walk(times, event, dtype, areas=areas)


def uneven(count, seed=0, start=0.0, end=1.0):
    """Increasing times (count + 1,), none of them a dyadic fraction of the span."""
    inner = np.sort(np.random.default_rng(seed).uniform(0.01, 0.99, count - 1))
    return torch.tensor(np.concatenate([[start], start + (end - start) * inner, [end]]))


def all_of(walk):
    """Every increment of a walk, (steps, 1 or 2, batch, *event)."""
    steps = [walk(k) for k in range(len(walk.lengths))]
    return torch.stack([torch.stack([v for v in step if v is not None]) for step in steps])


def check_refines(coarse, fine, per, tolerance=1e-12):
    """The increments of a grid are those of one with every interval divided `per` times, joined."""
    lengths = fine.lengths.tolist()
    steps = [fine(k) for k in range(len(lengths))]
    for k, h in enumerate(coarse.lengths.tolist()):
        own = slice(per * k, per * (k + 1))
        assert sum(lengths[own]) == pytest.approx(h, rel=1e-9, abs=1e-15)
        got, want = coarse(k), chen(lengths[own], steps[own])
        torch.testing.assert_close(got.w, want.w, rtol=0, atol=tolerance)
        if got.h is not None:
            torch.testing.assert_close(got.h, want.h, rtol=0, atol=tolerance)


MAPS = {
    "uniform": lambda k: k,
    "quadratic": lambda k: k**2,
    "root": torch.sqrt,
    "cosine": lambda k: (1 - torch.cos(math.pi * k)) / 2,
    "from 1000": lambda k: 1000 + k,
    "down": lambda k: 3.0 - 2 * k**3,
}

VP, VE = sf.VP(), sf.VE()
ZERO = {
    process: {kind: sf.Model(lambda x, t: torch.zeros_like(x), process, kind) for kind in ("x0", "eps")}
    for process in (VP, VE)
}

GAUSSIAN = sf.problems.GaussianMixture([[1.0, -0.5]], [[[0.3, 0.1], [0.1, 0.6]]], [1.0])


def recorded(grid, batch, event, seed=3, areas=True):
    """The path of a seed on a grid, as a recording."""
    steps = all_of(Noise(seed, batch).walk(grid, event, F64, areas=areas))
    w = torch.cat([torch.zeros(1, batch, *event, dtype=F64), steps[:, 0].cumsum(0)])
    return sf.RecordedPath(grid, w, steps[:, 1] if areas else None)
