"""Brownian paths: the law of (W, H), one path whatever asks for it, and what a solve makes of it.

Laws are checked twice. Exactly: every normal is replaced by a unit vector, so that an increment is the row of its
coefficients and covariances are scalar products. And on numbers: statistical tests are at 5 standard errors (6e-7 a
comparison) or level 1e-6 (for all entries of a matrix together), on fixed seeds. References are written here: Ito's
isometry over kernels, and W and the integral of W summed up interval by interval.
"""

import itertools
import math
import os
import sys
import threading

import numpy as np
import pytest
import torch
from scipy import stats

import sdeflow as sf
from sdeflow import bridge, brownian
from sdeflow import grid_walk as grid_module
from sdeflow.bridge import Increment, NodeNormals
from sdeflow.brownian import TreeWalk
from sdeflow.grid_walk import GridWalk
from sdeflow.noise import Noise
from sdeflow.solvers import (
    DDPM,
    SEEDS,
    SRA1,
    SRIW1,
    DPMSolverPP,
    EulerAncestral,
    EulerMaruyama,
    ExponentialMultistep,
    ReverseDiffusion,
)
from sdeflow.solvers.stochastic import AdaptiveStochasticSolver
from tests.exact import F64, rms, slope

LEVEL = 1e-6
COUNTS = (1, 2, 3, 7, 20, 64, 99, 100)
TICK = 2.0**-40


class Pure(sf.SDE):
    """dX = dW: the solution is the path."""

    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, x, t):
        return torch.ones_like(x)


class Integrated(sf.SDE):
    """dX_1 = dW, dX_2 = X_1 dt: the solution is W and the integral of W."""

    additive = True

    def drift(self, x, t):
        return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0]], dim=1)

    def diffusion(self, x, t):
        return torch.tensor([1.0, 0.0], dtype=x.dtype)


class Linear(sf.SDE):
    """dX = (1 + t) A X dt + b dW: X is linear in the path and the start."""

    def drift(self, x, t):
        return -(1 + t.to(x.dtype)) * x @ torch.tensor([[1.0, 0.4], [-0.3, 0.7]], dtype=x.dtype)

    def diffusion(self, x, t):
        return torch.tensor([0.7, 1.3], dtype=x.dtype)


# ---- references


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


KINDS = ("uniform", "cubic", "falling", "geometric down", "wild")


def isometry(pieces):
    """The covariances of pieces ("W" or "H", s, t), by Ito's isometry.

    W is the integral of 1 dW, and H, by parts, that of ((t - v)/(t - s) - 1/2) dW_v; products are quadratic between
    the ends, where Gauss's rule of 2 points is exact.
    """
    edges = sorted({v for _, s, t in pieces for v in (s, t)})
    low, high = np.array(edges[:-1])[:, None], np.array(edges[1:])[:, None]
    v = (low + high) / 2 + (high - low) / 2 * np.array([-1, 1]) / math.sqrt(3)
    weight = (high - low) / 2 * np.ones(2)
    rows = []
    for kind, s, t in pieces:
        kernel = np.ones_like(v) if kind == "W" else (t - v) / (t - s) - 0.5
        rows.append((kernel * ((v > s) & (v < t))).ravel())
    rows = np.array(rows)
    return (rows * weight.ravel()) @ rows.T


def test_the_reference_agrees_with_the_covariance_function():
    """`isometry` against sums of min(u, v) over the midpoints of 600 cells of each piece; error 1/600^2."""
    pieces = [("W", 0.0, 1.0), ("H", 0.0, 1.0), ("W", 0.2, 0.5), ("H", 0.2, 0.5), ("H", 0.4, 0.9), ("W", 0.4, 0.9)]
    places, rows = [], []
    for kind, s, t in pieces:
        u = s + (t - s) * (np.arange(600) + 0.5) / 600
        ends = np.array([s, t])
        own = np.array([-1.0, 1.0]) if kind == "W" else np.array([-0.5, -0.5])  # H = mean of W - (W_s + W_t)/2
        places.append(np.concatenate([ends, u]))
        rows.append(np.concatenate([own, np.full(600, 0.0 if kind == "W" else 1 / 600)]))
    got = [[a @ np.minimum.outer(u, v) @ b for v, b in zip(places, rows, strict=True)]
           for u, a in zip(places, rows, strict=True)]  # fmt: skip
    np.testing.assert_allclose(got, isometry(pieces), atol=2e-6)


def chen(lengths, increments):
    """(W, H) of adjacent intervals together, by the partial sums of W and of its integral."""
    w, integral = torch.zeros_like(increments[0].w), torch.zeros_like(increments[0].w)
    for h, step in zip(lengths, increments, strict=True):
        if step.h is not None:
            integral = integral + h * (w + step.w / 2 + step.h)
        w = w + step.w
    total = float(sum(lengths))
    return Increment(w, None if increments[0].h is None else integral / total - w / 2)


def basis(monkeypatch, size):
    """Replaces the generator: each normal asked for is a unit vector of its own in R^size, the event of one sample."""
    known = {}

    def pairs(noise, stream, words, event, dtype, **memory):
        rows = [known.setdefault((stream, word), 2 * len(known)) for word in words.flatten().tolist()]
        assert tuple(event) == (size,)
        assert noise.index.numel() == 1
        assert max(rows) + 1 < size
        out = torch.zeros(len(rows), 2, 1, size, dtype=dtype)
        for place, row in enumerate(rows):
            out[place, 0, 0, row] = out[place, 1, 0, row + 1] = 1.0
        return out

    monkeypatch.setattr(Noise, "pairs", pairs)


def units(walk, areas):
    """All W (and H) of a walk in units of their standard deviations, (numbers, -1); empty intervals must give 0."""
    rows = []
    for k, h in enumerate(walk.lengths.tolist()):
        w, area = walk(k)
        assert (area is None) != areas
        for v, variance in ((w, h), (area, h / 12)) if areas else ((w, h),):
            if h == 0:
                assert not bool(v.any())
            else:
                rows.append(v.flatten() / math.sqrt(variance))
    return torch.stack(rows)


def check_exact(walk, areas, tolerance=1e-9):
    """Rows of coefficients: every W_i of variance h_i, every H_i of h_i/12, none correlated."""
    rows = units(walk, areas)
    error = (rows @ rows.T - torch.eye(len(rows), dtype=F64)).abs().max()
    assert float(error) < tolerance


def check_sampled(walk, areas):
    """The covariance matrix, means, and KS of 6 random combinations, of all samples and components."""
    rows = units(walk, areas)
    count, n = rows.shape
    eye = torch.eye(count, dtype=F64)
    z = stats.norm.isf(LEVEL / (count * (count + 1)))
    deviation = (rows @ rows.T / n - eye).abs() / (1 + (math.sqrt(2) - 1) * eye) * math.sqrt(n)
    assert float(deviation.max()) < z
    assert float(rows.mean(1).abs().max()) * math.sqrt(n) < z
    combine = np.random.default_rng(count).normal(size=(6, count))
    combine /= np.linalg.norm(combine, axis=1, keepdims=True)
    for row in combine @ rows.numpy():
        assert stats.kstest(row, "norm").pvalue > LEVEL


def check_conditional(rows, covariance, part):
    """The first `part` rows given the others: regression coefficients, residual covariances, no heteroscedasticity.

    Against covariance[:part, part:] covariance[part:, part:]^-1 and the Schur complement, at 5 standard errors.
    """
    n = rows.shape[1]
    cross, own = covariance[:part, part:], covariance[part:, part:]
    want = np.linalg.solve(own, cross.T).T
    left = covariance[:part, :part] - want @ cross.T
    x, y = rows[part:].numpy(), rows[:part].numpy()
    got = np.linalg.solve(x @ x.T, x @ y.T).T
    error = np.sqrt(np.outer(np.diag(left), np.diag(np.linalg.inv(own))) / n)
    assert (np.abs(got - want) < 5 * error + 1e-9).all()
    residual = y - want @ x
    spread = np.sqrt(np.outer(np.diag(left), np.diag(left)) + left**2) / math.sqrt(n)
    assert (np.abs(residual @ residual.T / n - left) < 5 * spread + 1e-12).all()
    squares = residual**2 / np.diag(left)[:, None] - 1
    others = x**2 / np.diag(own)[:, None] - 1
    assert (np.abs(squares @ others.T / n) < 5 * 2 / math.sqrt(n)).all()


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


# ---- the joint law


@pytest.mark.parametrize("areas", [False, True], ids=["W", "WH"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_joint_law_on_a_grid_exactly(kind, areas, monkeypatch):
    for count in COUNTS:
        with monkeypatch.context() as patch:
            size = 4 * count + 4
            basis(patch, size)
            check_exact(grid_walk(grid_of(kind, count), areas, (size,)), areas)


@pytest.mark.parametrize("areas", [False, True], ids=["W", "WH"])
@pytest.mark.parametrize("kind", ["uniform", "cubic", "wild"])
def test_the_joint_law_on_a_grid_in_numbers(kind, areas):
    """8192 samples: 64 of the batch, 128 components."""
    for count in COUNTS:
        check_sampled(grid_walk(grid_of(kind, count), areas, (128,), seed=count, batch=64), areas)


@pytest.mark.parametrize("areas", [False, True], ids=["W", "WH"])
def test_the_joint_law_in_numbers_in_small_blocks_and_other_dtypes(areas, monkeypatch):
    """8192 samples; 16 bits round an increment by 1/256 of itself and of the few it was split from."""
    for dtype in (torch.float32, torch.bfloat16):
        walk = grid_walk(grid_of("cubic", 20), areas, (128,), seed=3, batch=64, dtype=dtype)
        own = [[v if v is None else v.to(F64) for v in walk(k)] for k in range(20)]

        def read(k, own=own):
            return Increment(*own[k])

        read.lengths = walk.lengths
        check_sampled(read, areas)
    monkeypatch.setattr(grid_module, "BLOCK", 1)
    check_sampled(grid_walk(grid_of("cubic", 100), areas, (128,), seed=4, batch=64), areas)


@pytest.mark.parametrize("areas", [False, True], ids=["W", "WH"])
@pytest.mark.parametrize("count", [1, 2, 7, 12])
def test_the_joint_law_on_the_tree_exactly(count, areas, monkeypatch):
    """Lengths are those of times rounded to 2^-40 of the span: relative errors of that over the shortest."""
    for start, end in ((-2.0, 5.0), (1000.0, 1000.5)):
        times = uneven(count, count, start, end)
        with monkeypatch.context() as patch:
            size = 4 + 160 * count
            basis(patch, size)
            walk = tree_walk(times, areas, (size,))
            shortest = float(walk.lengths.min()) / (end - start)
            check_exact(walk, areas, 1e-9 + 10 * TICK / shortest)


def test_the_joint_law_on_the_tree_in_numbers():
    check_sampled(tree_walk(uneven(24, 5, 2.0, 3.5), True, (128,), seed=8, batch=64), True)
    check_sampled(tree_walk([1.0, 0.9, 0.899, 0.5, 0.1, 1e-3], True, (128,), seed=9, batch=64), True)


PIECES = [(0.0, 1.0), (0.1, 0.7), (0.3, 0.31), (0.31, 0.77), (0.0, 0.1), (0.5, 0.5 + 1e-5), (0.299, 0.95)]


def both(pieces):
    return [(kind, s, t) for s, t in pieces for kind in ("W", "H")]


def rows_of_path(path, pieces):
    return torch.stack([v.flatten() for s, t in pieces for v in path.with_area(s, t)])


def test_the_joint_law_of_a_path_exactly(monkeypatch):
    """Overlapping, nested, adjacent and short intervals, against Ito's isometry."""
    size = 3000
    with monkeypatch.context() as patch:
        basis(patch, size)
        rows = rows_of_path(sf.BrownianPath(0, (1, size)), PIECES)
    want = isometry(both(PIECES))
    scale = np.sqrt(np.diag(want))
    got = (rows @ rows.T).numpy() / np.outer(scale, scale)
    # times are rounded to 2^-40: of the shortest interval, 1e-5, that is 1e-7
    np.testing.assert_allclose(got, want / np.outer(scale, scale), atol=4e-7)


def test_the_joint_law_of_a_path_in_numbers():
    rows = rows_of_path(sf.BrownianPath(4, (64, 512)), PIECES)
    want, n = isometry(both(PIECES)), rows.shape[1]
    error = np.sqrt(np.outer(np.diag(want), np.diag(want)) + want**2) / math.sqrt(n)
    assert (np.abs((rows @ rows.T).numpy() / n - want) < 5.5 * error).all()  # 105 entries: 4e-6 in all


@pytest.mark.parametrize("m", [0.5, 0.2, 0.999])
def test_the_law_of_a_part_given_the_whole_and_a_neighbour_on_the_tree(m):
    """(W, H) of [s, r] given those of [s, t] and of [t, u], r = s + m (t - s), on 32,768 samples."""
    s, t, u = 0.11, 0.47, 0.83
    pieces = [(s, s + m * (t - s)), (s, t), (t, u)]
    rows = rows_of_path(sf.BrownianPath(int(1000 * m), (128, 256)), pieces)
    check_conditional(rows, isometry(both(pieces)), 2)


@pytest.mark.parametrize("lengths", [(0.5, 0.5, 0.5), (0.1, 0.9, 0.3), (1e-6, 2.0, 1e-3), (0.7, 0.2, 4.0)])
def test_the_law_of_a_part_given_the_whole_and_a_neighbour_on_a_grid(lengths):
    """The first interval of three given the first two together and the third, on 65,536 samples."""
    walk = grid_walk(torch.tensor(lengths, dtype=F64), True, (256,), seed=3, batch=256)
    steps = [walk(k) for k in range(3)]
    whole = chen(lengths[:2], steps[:2])
    rows = torch.stack([v.flatten() for v in (*steps[0], *whole, *steps[2])])
    a, b, c = np.cumsum(lengths)
    check_conditional(rows, isometry(both([(0.0, a), (0.0, b), (b, c)])), 2)


def test_the_integral_is_a_riemann_sum_of_the_same_path():
    """I_(1,0) = h (W/2 + H) against the trapezoid rule on 4096 points of [0, 1]: off by cell sqrt(length/12)."""
    cells, event = 4096, (64,)
    path = sf.BrownianPath(11, (2, *event))
    walk = grid_walk(grid_of("uniform", cells), True, event, seed=11, batch=2)
    steps = [walk(k) for k in range(cells)]
    w = torch.cat([torch.zeros(1, 2, *event, dtype=F64), torch.stack([v.w for v in steps]).cumsum(0)])
    h = torch.stack([v.h for v in steps])
    for a, b in ((0, 4096), (1000, 3001), (5, 7), (77, 2048)):
        got = path.integral(a / cells, b / cells)
        from_start = w[a : b + 1] - w[a]
        trapezoid = (from_start[1:] + from_start[:-1]).sum(0) / 2 / cells
        torch.testing.assert_close(path(a / cells, b / cells), from_start[-1], rtol=0, atol=1e-13)
        error = (got - trapezoid) * cells / math.sqrt((b - a) / cells / 12)
        assert float(error.abs().max()) < 5.5  # 128 numbers: 5e-6
        assert float(error.std()) > 0.7
        torch.testing.assert_close(got, trapezoid + h[a:b].sum(0) / cells, rtol=0, atol=1e-12)


# ---- additivity


def ticks(count, seed, start=0.0, length=1.0):
    """Random times that are told apart: multiples of 2^-40 of the span."""
    return [start + length * k * TICK for k in np.random.default_rng(seed).integers(0, 1 << 40, count).tolist()]


@pytest.mark.parametrize(("start", "length", "triples"), [(0.0, 1.0, 4), (-3.0, 8.0, 2), (1024.0, 0.5, 2)])
def test_increments_add_up(start, length, triples):
    """Chen's relation for triples in any order: W(s, u) = W(s, t) + W(t, u) and, I the integral of W from its start,
    I(s, u) = I(s, t) + I(t, u) + (u - t) W(s, t)."""
    path = sf.BrownianPath(5, (3, 2), (start, start + length))
    times = ticks(3 * triples, 1, start, length)
    for s, t, u in zip(times[::3], times[1::3], times[2::3], strict=True):
        ends = ((s, t), (t, u), (s, u))
        w = [path(*e) for e in ends]
        i = [path.integral(*e) for e in ends]
        torch.testing.assert_close(w[2], w[0] + w[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(i[2], i[0] + i[1] + (u - t) * w[0], rtol=0, atol=1e-12 * length**1.5)
        low, middle, high = sorted((s, t, u))
        parts = [path.with_area(low, middle), path.with_area(middle, high)]
        whole, got = chen([middle - low, high - middle], parts), path.with_area(low, high)
        torch.testing.assert_close(got.w, whole.w, rtol=0, atol=1e-12)
        torch.testing.assert_close(got.h, whole.h, rtol=0, atol=1e-12)


def test_times_that_are_not_told_apart():
    """Below 2^-41 of the span nothing passes; the rest of the path is as it was."""
    path = sf.BrownianPath(5, (3, 2))
    assert not bool(path(0.5, 0.5 + 1e-13).any())
    assert bool(path(0.5, 0.5 + 2e-12).all())
    walk = tree_walk([0.0, 0.3, 0.3 + 1e-14, 1.0], True, (2,), seed=5, batch=3)
    steps = [walk(k) for k in range(3)]
    assert not bool(steps[1].w.any())
    assert not bool(steps[1].h.any())
    torch.testing.assert_close(steps[0].w + steps[2].w, path(0.0, 1.0), rtol=0, atol=1e-13)


def test_reversed_arguments():
    path = sf.BrownianPath(5, (3, 2), (1.0, 4.0))
    forwards, backwards = path.with_area(1.3, 3.9), path.with_area(3.9, 1.3)
    assert torch.equal(forwards.w, -backwards.w)
    assert torch.equal(forwards.h, backwards.h)
    assert torch.equal(path(3.9, 1.3), backwards.w)
    # int_t^s (W_u - W_t) du = -(int_s^t (W_u - W_s) du) + (t - s) W(s, t)
    torch.testing.assert_close(
        path.integral(3.9, 1.3), 2.6 * path(1.3, 3.9) - path.integral(1.3, 3.9), rtol=0, atol=1e-12
    )
    w, h = path.with_area(2.0, 2.0)
    assert not bool(w.any())
    assert not bool(h.any())
    assert w.shape == (3, 2)


# ---- bits: who asks, with whom, in which order


def all_of(walk):
    """Every increment of a walk, (steps, 1 or 2, batch, *event)."""
    steps = [walk(k) for k in range(len(walk.lengths))]
    return torch.stack([torch.stack([v for v in step if v is not None]) for step in steps])


WALKS = {
    "grid of 37": lambda **how: grid_walk(grid_of("cubic", 37), False, **how),
    "grid of 37, areas": lambda **how: grid_walk(grid_of("cubic", 37), True, **how),
    "grid of 100": lambda **how: grid_walk(grid_of("uniform", 100), False, **how),
    "grid of 96, areas": lambda **how: grid_walk(grid_of("wild", 96), True, **how),
    "tree": lambda **how: tree_walk(uneven(4, 2), False, **how),
    "tree, areas": lambda **how: tree_walk(uneven(4, 2), True, **how),
}


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@pytest.mark.parametrize("name", WALKS)
def test_bits_do_not_depend_on_the_batch_or_the_place_in_it(name, dtype):
    make, event = WALKS[name], (3, 5)
    whole = all_of(make(event=event, seed=6, batch=23, dtype=dtype))
    assert whole.dtype == dtype
    assert whole.shape[2:] == (23, 3, 5)
    for first, size in ((0, 1), (22, 1), (8, 15)):
        assert torch.equal(all_of(make(event=event, seed=6, batch=size, dtype=dtype, index=first)),
                           whole[:, :, first : first + size])  # fmt: skip
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    for rows in (order, torch.tensor([4, 4, 20])):
        got = all_of(make(event=event, seed=6, batch=len(rows), dtype=dtype, index=rows))
        assert torch.equal(got, whole[:, :, rows])
    assert torch.equal(all_of(make(event=event, seed=6, batch=23, dtype=dtype, device=torch.device("cpu"))), whole)
    assert not torch.equal(all_of(make(event=event, seed=7, batch=23, dtype=dtype)), whole)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 5, 20, 37, 99, 100])
@pytest.mark.parametrize("areas", [False, True], ids=["W", "WH"])
def test_bits_do_not_depend_on_the_block(areas, count, dtype, monkeypatch):
    """Blocks of 1, 2, 3, ... intervals, as large batches and events make them."""
    make = lambda: all_of(grid_walk(grid_of("cubic", count), areas, (4,), seed=1, batch=3, dtype=dtype))  # noqa: E731
    want = make()
    for block in (1, 3, 4, 7, 16):
        monkeypatch.setattr(grid_module, "BLOCK", block * 12 * (2 if areas else 1))
        monkeypatch.setattr(sf.noise, "BLOCK", block * 24)
        assert torch.equal(make(), want), block


def test_steps_may_be_left_out_and_gone_back_to():
    for make in (lambda: grid_walk(grid_of("cubic", 50), True, (2,)), lambda: tree_walk(uneven(12), True, (2,))):
        whole, walk = make(), make()
        want = [whole(k) for k in range(12)]
        for k in (0, 0, 3, 4, 11, 11, 4, 5, 0):
            assert all(torch.equal(a, b) for a, b in zip(walk(k), want[k], strict=True))


def test_walks_do_not_disturb_each_other():
    """Interleaved, in threads, under inference mode, and increments kept while the walk goes on."""
    make = {k: (lambda k=k: WALKS[k](event=(40,), seed=2, batch=30)) for k in WALKS}
    want = {k: all_of(v()) for k, v in make.items()}
    walks = {k: v() for k, v in make.items()}
    kept = {k: [] for k in walks}
    for i in range(100):
        for k, walk in walks.items():
            if i < len(walk.lengths):
                kept[k].append(walk(i))
    for k, steps in kept.items():
        got = torch.stack([torch.stack([v for v in step if v is not None]) for step in steps])
        assert torch.equal(got, want[k]), k
    found = {}
    threads = [
        threading.Thread(target=lambda k=k, j=j: found.__setitem__((k, j), all_of(make[k]())))
        for k in make for j in range(2)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k, j], want[k]) for k in make for j in range(2))
    with torch.inference_mode():
        inside = {k: all_of(v()) for k, v in make.items()}
    assert all(torch.equal(inside[k], want[k]) for k in make)
    assert all(torch.equal(all_of(make[k]()), want[k]) for k in make)


def test_a_path_does_not_depend_on_the_order_of_queries():
    pieces = [(0.0, 1.0), (0.0, 0.3), (0.3, 0.31), (0.7, 0.1), (1 / 3, 0.9), (0.5, 0.75)]
    want = {p: sf.BrownianPath(3, (5, 2)).with_area(*p) for p in pieces}
    path, rng = sf.BrownianPath(3, (5, 2)), np.random.default_rng(0)
    for k in rng.integers(0, len(pieces), 25):
        got = path.with_area(*pieces[k])
        assert torch.equal(got.w, want[pieces[k]].w)
        assert torch.equal(got.h, want[pieces[k]].h)


def test_a_path_belongs_to_the_sample():
    whole = sf.BrownianPath(3, (9, 2)).with_area(0.2, 0.77)
    for index, rows in ((4, [4, 5, 6]), (torch.tensor([8, 0, 0]), [8, 0, 0])):
        part = sf.BrownianPath(3, (3, 2), index=index).with_area(0.2, 0.77)
        assert torch.equal(part.w, whole.w[rows])
        assert torch.equal(part.h, whole.h[rows])
    assert not torch.isin(sf.BrownianPath(4, (9, 2))(0.2, 0.77), whole.w).any()


@pytest.mark.parametrize("areas", [False, True], ids=["W", "WH"])
def test_float32_is_float64_rounded(areas):
    """A normal is off by at most 2e-6 but for 1 in 10^4 (test_noise), a split rounds by 6e-8: 2e-5 in 100,000."""
    for make in (
        lambda dtype: grid_walk(grid_of("cubic", 100), areas, (64,), seed=1, batch=8, dtype=dtype),
        lambda dtype: tree_walk(uneven(6, 3), areas, (64,), seed=1, batch=8, dtype=dtype),
    ):
        double, single = all_of(make(F64)), all_of(make(torch.float32)).to(F64)
        assert float((double - single).abs().max()) < 2e-5
        assert not torch.equal(double, single)
    one, two = (sf.BrownianPath(1, (64, 8), dtype=dtype).with_area(0.1, 0.6) for dtype in (F64, torch.float32))
    assert all(float((a - b).abs().max()) < 2e-5 for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("count", [3, 8, 20, 37])
def test_every_tensor_is_on_the_device(count):
    """The meta device stands in for an accelerator: tensors left on the host do not mix with it."""
    for areas in (False, True):
        walk = grid_walk(grid_of("cubic", count), areas, (2,), batch=3, device="meta")
        assert all(walk(k).w.device.type == "meta" for k in range(count))
    if count == 3:
        assert tree_walk([0.0, 0.3125, 1.0], True, (2,), batch=3, device="meta")(1).h.device.type == "meta"
        assert sf.BrownianPath(0, (3, 2), device="meta")(0.25, 0.6875).device.type == "meta"


# ---- one path for many grids


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


@pytest.mark.parametrize("areas", [False, True], ids=["W", "WH"])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("count", [1, 3, 20, 25])
def test_a_halved_grid_has_the_same_path(count, name, areas):
    """count, 2 count and 4 count steps, to rounding: 1e-12, times the 1e-13 that times near 1000 are rounded by."""
    tolerance = 1e-10 if name == "from 1000" else 1e-12

    def walk(n):
        times = MAPS[name](torch.linspace(0, 1, n + 1, dtype=F64))
        return Noise(5, 4).walk(times, (3,), F64, areas=areas)

    check_refines(walk(count), walk(2 * count), 2, tolerance)
    check_refines(walk(count), walk(4 * count), 4, tolerance)


@pytest.mark.parametrize("areas", [False, True], ids=["W", "WH"])
def test_intervals_may_be_divided_anywhere(areas):
    """A grid of 35 uneven intervals, each cut at a random place."""
    coarse = grid_of("cubic", 35)
    share = torch.tensor(np.random.default_rng(0).uniform(0.001, 0.999, 35))
    fine = torch.stack([coarse * share, coarse * (1 - share)], dim=1).flatten()
    check_refines(*(grid_walk(v, areas, (3,), seed=5, batch=4) for v in (coarse, fine)), 2)


@pytest.mark.parametrize("areas", [False, True], ids=["W", "WH"])
def test_grids_that_do_not_refine_each_other_agree_in_the_whole(areas):
    """20 and 30 steps of a seed: one W (and H) of the span, and given it independent paths in between.

    The correlation of their bridges at 1/2 over 4096 samples, within 5 standard errors.
    """
    walks = {n: grid_walk(grid_of("uniform", n), areas, (4096,)) for n in (20, 30)}
    steps = {n: [walk(k) for k in range(n)] for n, walk in walks.items()}
    wholes = [chen([1 / n] * n, steps[n]) for n in steps]
    bridges = [chen([1 / n] * (n // 2), steps[n][: n // 2]).w - wholes[0].w / 2 for n in steps]
    torch.testing.assert_close(wholes[0].w, wholes[1].w, rtol=0, atol=1e-13)
    if areas:
        torch.testing.assert_close(wholes[0].h, wholes[1].h, rtol=0, atol=1e-13)
        bridges = [v - 1.5 * wholes[0].h for v in bridges]
    correlation = float(torch.corrcoef(torch.stack([v.flatten() for v in bridges]))[0, 1])
    assert abs(correlation) < 5 / math.sqrt(4096)


@pytest.mark.parametrize("areas", [False, True], ids=["W", "WH"])
def test_the_walk_on_the_tree_is_the_path(areas):
    for start, end in ((-1.0, 6.0), (1000.0, 1000.25)):
        path = sf.BrownianPath(5, (4, 3), (start, end))
        times = uneven(5, 1, start, end)
        walk = tree_walk(times, areas, (3,), seed=5, batch=4)
        for k, (s, t) in enumerate(itertools.pairwise(times.tolist())):
            want = path.with_area(s, t)
            torch.testing.assert_close(walk(k).w, want.w, rtol=0, atol=1e-13)
            if areas:
                torch.testing.assert_close(walk(k).h, want.h, rtol=0, atol=1e-12)


def test_a_run_downwards_has_the_path_in_the_time_elapsed():
    times = torch.tensor([2.0, 1.7, 1.1, 0.5], dtype=F64)
    path, walk = sf.BrownianPath(5, (4, 3), (0.0, 1.5)), tree_walk(times, True, (3,), seed=5, batch=4)
    for k, (s, t) in enumerate(itertools.pairwise((2.0 - times).tolist())):
        for got, want in zip(walk(k), path.with_area(s, t), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_tree_is_the_grid_of_a_power_of_two():
    walk, path = grid_walk(grid_of("uniform", 32), True, (3,), seed=5, batch=4), sf.BrownianPath(5, (4, 3))
    for k in range(32):
        for got, want in zip(walk(k), path.with_area(k / 32, (k + 1) / 32), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


# ---- through solve


def mapped(name):
    return lambda problem, n, a, b: a + (b - a) * MAPS[name](torch.linspace(0, 1, n + 1, dtype=F64))


@pytest.mark.parametrize("solver", [EulerMaruyama(), SRA1(), SRIW1()], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["uniform", "quadratic", "cosine"])
def test_twenty_and_forty_steps_of_a_seed_solve_along_one_path(name, solver):
    def run(n):
        return sf.solve(Pure(), torch.zeros(3, 2, dtype=F64), solver, steps=n, grid=mapped(name), seed=1, save=True).xs

    for n in (20, 25):
        few, more, most = run(n), run(2 * n), run(4 * n)
        torch.testing.assert_close(few, more[::2], rtol=0, atol=1e-12)
        torch.testing.assert_close(few, most[::4], rtol=0, atol=1e-12)
    assert float(few.abs().max()) > 0.5


VP, VE = sf.VP(), sf.VE()
ZERO = {
    process: {kind: sf.Model(lambda x, t: torch.zeros_like(x), process, kind) for kind in ("x0", "eps")}
    for process in (VP, VE)
}
EXPONENTIAL = [
    (DDPM(), "x0", 0.0),
    (DPMSolverPP(2), "x0", 1.0),
    (DPMSolverPP(3), "x0", 0.6),
    (ExponentialMultistep(2, "eps"), "eps", 1.0),
    (SEEDS(1), "eps", 1.0),
    (SEEDS(2), "eps", 1.0),
    (EulerAncestral(1.0), "x0", 0.0),
]


@pytest.mark.parametrize("process", [VP, VE], ids=["VP", "VE"])
@pytest.mark.parametrize(("solver", "kind", "eta"), EXPONENTIAL, ids=lambda v: getattr(v, "name", None))
def test_exponential_samplers_of_a_seed_see_one_path_on_halved_grids(solver, kind, eta, process):
    """With a prediction of 0 the state is linear noise, exact on any grid: 20 and 40 steps agree to 1e-11 of it."""
    problem = process.reverse(ZERO[process][kind], eta)

    def run(n, seed=1, grid=None):
        return sf.solve(
            problem, torch.zeros(3, 2, dtype=F64), solver, steps=n, seed=seed, save=True, t_span=(0.9, 0.05), grid=grid
        ).xs

    for grid in (None, mapped("quadratic"), sf.grids.logsnr):
        for n in (5, 20):
            few, more = run(n, grid=grid), run(2 * n, grid=grid)
            scale = float(few.abs().max())
            assert scale > 1e-3
            torch.testing.assert_close(few / scale, more[::2] / scale, rtol=0, atol=1e-11)
    other = run(2 * n, seed=2, grid=grid)
    assert float((few - other[::2]).abs().max()) > 0.1 * scale


IRREGULAR = sorted({0.0, 1.0, 1 / 3, 0.7071, *np.random.default_rng(2).uniform(0, 1, 7).tolist()})
HOWS = ({"steps": 20}, {"steps": 30}, {"steps": 97}, {"grid": IRREGULAR})


@pytest.mark.parametrize(
    ("solver", "hows"),
    [(EulerMaruyama(), HOWS[::2]), (SRA1(), HOWS[1:2]), (SRIW1(), HOWS[3:])],
    ids=["EM", "SRA1", "SRIW1"],
)
def test_same_path_is_one_path_for_every_grid_and_solver(solver, hows):
    """20, 30, 97 and uneven steps: the solution of dX = dW is `BrownianPath` at every time."""
    x = torch.zeros(3, 2, dtype=F64)
    path = sf.BrownianPath(4, (3, 2))
    at = {t: path(0.0, t) for t in (0.5, 1 / 3, 0.7071, 1.0)}
    for how in hows:
        run = sf.solve(Pure(), x, solver, noise=sf.SamePath(4), save=True, **how)
        seen = 0
        for t, want in at.items():
            near = int((run.ts - t).abs().argmin())
            if abs(float(run.ts[near]) - t) < 1e-14:
                seen += 1
                torch.testing.assert_close(run.xs[near], want, rtol=0, atol=1e-12)
        assert seen == {"steps": 2, "grid": 3}[next(iter(how))] - (how == {"steps": 97}) + (how == {"steps": 30})
    other = sf.solve(Pure(), x, solver, noise=sf.SamePath(5), steps=20).x
    assert float((other - at[1.0]).abs().min()) > 1e-6


def test_solvers_on_one_path_converge_to_each_other():
    """Euler-Maruyama and samplers with the exact score on `SamePath`, against SRA1 on a finer grid: order 1.

    The control is the same against another seed.
    """
    problem = VP.reverse(GAUSSIAN.model(VP), 1.0)
    x, span, sizes = Noise(1, 200).normal(1, 0, (2,), F64), (0.9, 0.1), (16, 32, 64)

    def run(solver, n, seed=7):
        return sf.solve(problem, x, solver, grid=torch.linspace(*span, n + 1, dtype=F64), noise=sf.SamePath(seed)).x

    reference = run(SRA1(), 256)
    for solver in (EulerMaruyama(), DPMSolverPP(2), SEEDS(1)):
        errors = [rms(run(solver, n) - reference) for n in sizes]
        assert slope([1 / n for n in sizes], errors) > 0.85
        assert errors[-1] < 0.1 * rms(run(solver, 64, seed=8) - reference)


def test_iterate_takes_the_noise():
    x = torch.zeros(3, 2, dtype=F64)
    for noise in (sf.SamePath(4), sf.Antithetic(4), recorded(torch.linspace(0, 1, 9, dtype=F64), 3, (2,))):
        states = list(sf.iterate(Pure(), x, SRA1(), steps=8, noise=noise))
        assert torch.equal(states[-1].x, sf.solve(Pure(), x, SRA1(), steps=8, noise=noise).x)


@pytest.mark.parametrize("span", [(0.0, 1.0), (1000.0, 1001.0)])
def test_areas_of_one_path_through_solve(span):
    """SRA1 integrates X' = W exactly with W and I_(1,0) of each step: every grid ends in the path's own integral."""

    class There(Integrated):
        t0, t1 = span

    x = torch.zeros(5, 2, dtype=F64)
    path = sf.BrownianPath(4, (5, 2), span)
    w, integral = path(*span)[:, 0], path.integral(*span)[:, 0]  # the whole of the span: no split
    inner = [span[0] + t for t in IRREGULAR]
    for how in ({"steps": 20}, {"steps": 30}) if span[0] == 0 else ({"grid": inner},):
        got = sf.solve(There(), x, SRA1(), noise=sf.SamePath(4), **how).x
        torch.testing.assert_close(got[:, 0], w, rtol=0, atol=1e-12)
        torch.testing.assert_close(got[:, 1], integral, rtol=0, atol=1e-11)
    coarse, fine = (sf.solve(There(), x, SRA1(), seed=4, steps=n).x for n in (20, 40))
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-10)
    assert float((coarse[:, 1] - coarse[:, 0] / 2).abs().max()) > 0.01  # H is not 0


class Recorder(AdaptiveStochasticSolver):
    """Keeps the intervals that the march to a tolerance gives it; steps dX = dW exactly and rejects by a rule."""

    name = "Recorder"
    areas = True

    def __init__(self):
        object.__setattr__(self, "seen", [])

    def step(self, terms, x, t, h, w, area):
        return x + w

    def estimate(self, terms, x, t, h, w, area):
        self.seen.append((t.flatten().clone(), h.flatten().clone(), w.clone(), area.clone()))
        return x + w, 0.01 * (1 + 20 * (w.abs() > 1.5 * h.abs() ** 0.5)) * h.abs() ** 1.5


def test_the_march_to_a_tolerance_is_on_the_path():
    """Every interval that is tried, accepted or not, is the path's; what is accepted adds up to it."""
    solver, seed = Recorder(), 3
    run = sf.solve(Pure(), torch.zeros(1, 2, dtype=F64), solver, rtol=1e-2, atol=1e-2, seed=seed)
    path = sf.BrownianPath(seed, (1, 2))
    assert int(run.stats.rejected.sum()) > 3
    assert int(run.stats.accepted.sum()) > 10
    torch.testing.assert_close(run.x, path(0.0, 1.0), rtol=0, atol=1e-12)
    assert len({float(h) for _, h, _, _ in solver.seen}) > 2
    for t, h, w, area in solver.seen[:: max(1, len(solver.seen) // 20)]:
        want = path.with_area(float(t), float(t) + float(h))
        torch.testing.assert_close(w, want.w, rtol=0, atol=1e-13)
        torch.testing.assert_close(area, want.h, rtol=0, atol=1e-13)


# ---- the clock of a plan

GAUSSIAN = sf.problems.GaussianMixture([[1.0, -0.5]], [[[0.3, 0.1], [0.1, 0.6]]], [1.0])


@pytest.mark.parametrize("process", [VP, sf.EDM()], ids=["VP", "EDM"])
@pytest.mark.parametrize(
    ("solver", "eta"),
    [
        (DDPM(), 0.0),
        (DPMSolverPP(2), 1.0),
        (SEEDS(1), 1.0),
        (SEEDS(2), 1.0),
        (SEEDS(3), 1.0),
        (ReverseDiffusion(), 1.0),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_solutions_of_a_seed_converge_to_each_other(solver, eta, process):
    """n and 2n steps of one seed, additive noise: strong order 1. The control is another seed: no convergence."""
    problem = process.reverse(GAUSSIAN.model(process), eta)
    x = process.sigma(torch.tensor(process.t1, dtype=F64)) * Noise(1, 500).normal(1, 0, (2,), F64)
    span, sizes = (process.t1 * 0.9, process.t1 * 0.05), (32, 64, 128, 256)

    def run(n, seed=7):
        return sf.solve(problem, x, solver, steps=n, seed=seed, t_span=span).x

    ends = {n: run(n) for n in sizes}
    between = [rms(ends[n] - ends[2 * n]) for n in sizes[:-1]]
    assert 0.85 < slope([1 / n for n in sizes[:-1]], between) < 1.4
    others = [rms(ends[n] - run(n, seed=8)) for n in (32, 128)]
    assert abs(slope([1 / 32, 1 / 128], others)) < 0.2
    assert min(others) > 10 * between[-1]


def test_thirds_of_steps_refine_where_they_meet():
    """SEEDS(3) draws at thirds of its steps in lam: one path on grids even in lam; else at the end and in the limit."""
    problem = VP.reverse(ZERO[VP]["eps"], 1.0)

    def runs(n, grid):
        x = torch.zeros(300, 2, dtype=F64)
        how = {"seed": 1, "save": True, "t_span": (0.9, 0.05), "grid": grid}
        few, more = (sf.solve(problem, x, SEEDS(3), steps=m, **how).xs for m in (n, 2 * n))
        return few / few.abs().max(), more[::2] / few.abs().max()

    torch.testing.assert_close(*runs(20, sf.grids.logsnr), rtol=0, atol=1e-11)
    gaps = []
    for n in (5, 20, 80):
        few, more = runs(n, None)
        torch.testing.assert_close(few[-1], more[-1], rtol=0, atol=1e-11)
        gaps.append(float((few - more).abs().max()))
    assert slope([1 / 5, 1 / 20, 1 / 80], gaps) > 1.0
    assert gaps[0] < 5e-3


@pytest.mark.parametrize(
    ("process", "solver", "eta", "grid", "dtype"),
    [
        (VP, DPMSolverPP(1), 1.0, 100, torch.float32),
        (sf.EDM(), DPMSolverPP(1), 2.0, 100, torch.float32),
        (sf.RectifiedFlow(), DPMSolverPP(1), 1.0, 20, torch.float32),
        (sf.EDM(), DPMSolverPP(1), 3.0, 100, torch.float32),
        (VP, DPMSolverPP(1), 10.0, 100, F64),
        (sf.VE(1e-4, 1e5), ReverseDiffusion(), 1.0, 100, F64),
        (VP, EulerAncestral(1.0), 0.0, [0.9, 0.88, 0.86, 0.84, 0.3, 0.28, 0.26], F64),
        (VP, EulerAncestral(1.5), 0.0, [0.9, 0.88, 0.86, 0.84, 0.3, 0.28, 0.26], F64),
    ],
)  # fmt: skip
def test_no_step_loses_its_noise(process, solver, eta, grid, dtype):
    """With a prediction of 0, the variances that a plan's ratios and noise make, on 2000 numbers: 5 sqrt(2/n) = 16%.

    Wherever the clock puts the steps, also where one forgets the state (ratio 0).
    """
    kind = "eps" if isinstance(solver, ReverseDiffusion) else "x0"
    problem = process.reverse(sf.Model(lambda x, t: torch.zeros_like(x), process, kind), eta)
    how = {"steps": grid} if isinstance(grid, int) else {"grid": grid}
    run = sf.solve(problem, torch.zeros(1000, 2, dtype=dtype), solver, seed=0, save=True, **how)
    plan = solver.plan(problem, run.ts)
    variance, steps = 0.0, []
    for k, (ratio, noise) in enumerate(zip(plan.ratio.tolist(), plan.noise.tolist(), strict=True)):
        variance = ratio**2 * variance + noise**2
        if noise > 0 and variance > 0:
            steps.append(float((run.xs[k + 1] - ratio * run.xs[k]).to(F64).square().mean()) / noise**2)
            assert float(run.xs[k + 1].to(F64).square().mean()) == pytest.approx(variance, rel=0.16)
    assert len(steps) > 4
    assert min(steps) > 0.84
    assert max(steps) < 1.16


def test_the_clock_is_needed(monkeypatch):
    """The control: with a clock of equal steps, states of 20 and 40 steps do not lie on one path."""
    problem = VP.reverse(ZERO[VP]["x0"], 1.0)

    def ends():
        a, b = (
            sf.solve(problem, torch.zeros(3, 2, dtype=F64), DDPM(), steps=n, seed=1, save=True, t_span=(0.9, 0.05)).xs
            for n in (20, 40)
        )
        return float((a - b[::2]).abs().max() / a.abs().max())

    assert ends() < 1e-11
    real = Noise.walk

    def equal(noise, times, event, dtype, *, areas=False, lengths=None):
        return real(noise, times, event, dtype, areas=areas, lengths=torch.ones_like(lengths))

    monkeypatch.setattr(Noise, "walk", equal)
    assert ends() > 1e-3


# ---- a path of one's own


class Counting(Linear):
    calls = 0

    def drift(self, x, t):
        self.calls += 1
        return super().drift(x, t)


def recorded(grid, batch, event, seed=3, areas=True):
    """The path of a seed on a grid, as a recording."""
    steps = all_of(Noise(seed, batch).walk(grid, event, F64, areas=areas))
    w = torch.cat([torch.zeros(1, batch, *event, dtype=F64), steps[:, 0].cumsum(0)])
    return sf.RecordedPath(grid, w, steps[:, 1] if areas else None)


@pytest.mark.parametrize("solver", [EulerMaruyama(), SRA1(), SRIW1()], ids=lambda s: s.name)
@pytest.mark.parametrize("name", ["uniform", "quadratic"])
def test_a_recorded_path_replays_its_run(name, solver):
    """On its own grid, and on every second time of it: the run of the seed with half the steps."""
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.5, 0.5]], dtype=F64)
    areas = solver.areas if hasattr(solver, "areas") else False
    grid = MAPS[name](torch.linspace(0, 1, 41, dtype=F64))
    path = recorded(grid, 3, (2,), areas=areas)
    for own in (grid, grid[::2], grid[::4]):
        want = sf.solve(Linear(), x, solver, grid=own, seed=3, save=True).xs
        got = sf.solve(Linear(), x, solver, grid=own, noise=path, save=True).xs
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    other = sf.solve(Linear(), x, solver, grid=grid, seed=4).x
    assert not torch.allclose(other, sf.solve(Linear(), x, solver, grid=grid, noise=path).x)


def test_a_recording_of_brownian_path_is_same_path():
    """Any sub-grid of 12 uneven times, with areas, against the solve along `SamePath` itself."""
    x, times = torch.ones(3, 2, dtype=F64), uneven(11, 4)
    path = sf.BrownianPath(8, (3, 2))
    w = torch.stack([path(0.0, t) for t in times.tolist()])
    areas = torch.stack([path.with_area(s, t).h for s, t in itertools.pairwise(times.tolist())])
    for rows in (list(range(12)), [0, 3, 4, 9, 11], [0, 11]):
        for solver in (SRA1(), EulerMaruyama()):
            want = sf.solve(Linear(), x, solver, grid=times[rows], noise=sf.SamePath(8)).x
            got = sf.solve(Linear(), x, solver, grid=times[rows], noise=sf.RecordedPath(times, w, areas)).x
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_a_recorded_path_is_replayed_by_an_exponential_sampler():
    """Its unit normals are W/sqrt(dt): those of the seed's run, put on a path in t, give the run."""
    problem = VP.reverse(GAUSSIAN.model(VP), 1.0)
    grid, x = torch.linspace(0.9, 0.1, 13, dtype=F64), torch.ones(4, 2, dtype=F64)
    plan = DPMSolverPP(2).plan(problem, grid)
    walk = Noise(5, 4).walk(grid, (2,), F64, lengths=torch.diff(plan.clock))
    unit = torch.stack([walk(k).w / walk.lengths[k].sqrt() for k in range(12)])
    w = torch.cat([torch.zeros(1, 4, 2, dtype=F64), (unit * torch.diff(grid).abs().sqrt()[:, None, None]).cumsum(0)])
    got = sf.solve(problem, x, DPMSolverPP(2), grid=grid, noise=sf.RecordedPath(grid, w)).x
    want = sf.solve(problem, x, DPMSolverPP(2), grid=grid, seed=5).x
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_a_recorded_path_of_general_noise():
    class Mixed(Linear):
        noise = "general"

        def diffusion(self, x, t):
            return torch.tensor([[1.0, 0.5, 0.2], [0.0, 2.0, -1.0]], dtype=x.dtype).expand(len(x), 2, 3)

    grid, x = torch.linspace(0, 1, 17, dtype=F64), torch.ones(4, 2, dtype=F64)
    got = sf.solve(Mixed(), x, EulerMaruyama(), grid=grid, noise=recorded(grid, 4, (3,), areas=False)).x
    torch.testing.assert_close(got, sf.solve(Mixed(), x, EulerMaruyama(), grid=grid, seed=3).x, rtol=0, atol=1e-12)


def test_a_recorded_path_can_be_run_backwards():
    """Time reversed: W changes its sign, H does not."""
    grid = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=F64)
    path = recorded(grid, 3, (2,))
    forwards = path.bind(3, None, "cpu").walk(grid, (2,), F64, areas=True)
    backwards = path.bind(3, None, "cpu").walk(grid.flip(0), (2,), F64, areas=True)
    whole = path.bind(3, None, "cpu").walk(grid[[3, 0]], (2,), F64, areas=True)(0)
    forwards_whole = path.bind(3, None, "cpu").walk(grid[[0, 3]], (2,), F64, areas=True)(0)
    for k in range(3):
        torch.testing.assert_close(backwards(2 - k).w, -forwards(k).w, rtol=0, atol=1e-14)
        torch.testing.assert_close(backwards(2 - k).h, forwards(k).h, rtol=0, atol=1e-14)
    torch.testing.assert_close(whole.w, -forwards_whole.w, rtol=0, atol=1e-14)
    torch.testing.assert_close(whole.h, forwards_whole.h, rtol=0, atol=1e-14)


def test_a_long_recording_needs_no_table_of_all_pairs_of_times():
    """10,001 times: a table of pairs would take 0.8 GB, and was made twice."""
    grid = torch.linspace(0, 1, 10_001, dtype=F64)
    path = sf.RecordedPath(grid, torch.arange(10_001.0)[:, None, None])
    before = peak()
    walk = path.bind(1, None, "cpu").walk(grid, (1,), F64)
    assert all(float(walk(k).w) == 1.0 for k in range(10_000))
    assert peak() - before < 200e6


def peak():
    """The largest memory of this process so far, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


GRID5 = torch.linspace(0, 1, 5, dtype=F64)
VALUES = torch.zeros(5, 3, 2, dtype=F64)


@pytest.mark.parametrize(
    ("solver", "path", "how", "error", "message"),
    [
        (SRA1(), (GRID5, VALUES), {"grid": GRID5}, ValueError, "expected a RecordedPath with areas"),
        (EulerMaruyama(), (GRID5, VALUES), {"steps": 8}, ValueError, "got 0.125, which was not recorded"),
        (EulerMaruyama(), (GRID5, VALUES), {"steps": 3}, ValueError, "which was not recorded"),
        (EulerMaruyama(), (GRID5, VALUES[:, :2]), {"steps": 4}, ValueError, "expected a batch of 2, .* got 3"),
        (EulerMaruyama(), (GRID5, VALUES[..., :1]), {"steps": 4}, ValueError, r"increments of shape \(2,\) a sample"),
        (EulerMaruyama(), (GRID5 / 2, VALUES), {"steps": 4}, ValueError, "which was not recorded"),
        (sf.solvers.AdaptiveSDE(), (GRID5, VALUES), {"rtol": 1e-2}, ValueError, "expected seed, got RecordedPath"),
    ],
)
def test_a_path_that_does_not_fit_is_refused_before_the_first_step(solver, path, how, error, message):
    problem = Counting()
    with pytest.raises(error, match=message):
        sf.solve(problem, torch.zeros(3, 2, dtype=F64), solver, noise=sf.RecordedPath(*path), **how)
    assert problem.calls == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((GRID5[:4], VALUES), ValueError, r"expected values \(4, batch, ...\), got \(5, 3, 2\)"),
        ((GRID5[:1], VALUES[:1]), ValueError, "monotone times"),
        ((GRID5[[0, 2, 1, 3, 4]], VALUES), ValueError, "monotone times"),
        ((GRID5 * math.nan, VALUES), ValueError, "monotone times"),
        ((torch.tensor([0, 0.1, 0.2, 0.3, math.inf]), VALUES), ValueError, "expected finite, monotone times"),
        ((GRID5, VALUES, VALUES), ValueError, r"expected areas \(4, 3, 2\), got \(5, 3, 2\)"),
        ((GRID5, VALUES.tolist()), TypeError, "expected values as a tensor"),
        ((GRID5, VALUES.numpy()), TypeError, "expected values as a tensor"),
        ((GRID5, VALUES, VALUES[1:].tolist()), TypeError, "expected areas as a tensor"),
        ((GRID5, VALUES[:, 0, 0]), ValueError, "expected values"),
    ],
)
def test_a_recording_that_is_none_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sf.RecordedPath(*arguments)


# ---- pairs of opposite paths


@pytest.mark.parametrize("same_path", [False, True])
@pytest.mark.parametrize("solver", [EulerMaruyama(), SRA1(), SRIW1(), sf.solvers.Milstein()], ids=lambda s: s.name)
def test_antithetic_halves_cancel(solver, same_path):
    """A linear SDE from 0: the two of a pair are opposite to the bit; from x: their mean is the run without noise."""
    noise = sf.Antithetic(3, same_path=same_path)
    end = sf.solve(Linear(), torch.zeros(8, 2, dtype=F64), solver, steps=8, noise=noise).x
    # SRIW1 weighs W^2 - h with sums of coefficients that are 0 but for rounding
    torch.testing.assert_close(end[0::2], -end[1::2], rtol=0, atol=1e-14 if solver.name == "SRIW1" else 0.0)
    assert float(end.abs().min()) > 0
    assert not torch.isin(end[0::2][1:].abs(), end[0].abs()).any()
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=F64).repeat_interleave(2, 0)
    path = sf.RecordedPath(GRID5, torch.zeros(5, 4, 2), torch.zeros(4, 4, 2))
    two = sf.solve(Linear(), x, solver, grid=GRID5, noise=noise).x
    still = sf.solve(Linear(), x, solver, grid=GRID5, noise=path).x
    torch.testing.assert_close((two[0::2] + two[1::2]) / 2, still[0::2], rtol=0, atol=1e-14)
    for offset in (2, 3):
        part = sf.solve(Linear(), torch.zeros(4, 2, dtype=F64), solver, steps=8, noise=noise, index=offset).x
        assert torch.equal(part, end[offset : offset + 4])


@pytest.mark.parametrize("solver", [DDPM(), SEEDS(2), sf.solvers.AdaptiveSDE()], ids=lambda s: s.name)
def test_antithetic_halves_cancel_in_samplers_and_to_a_tolerance(solver):
    if solver.name == "AdaptiveSDE":
        end = sf.solve(Pure(), torch.zeros(6, 2, dtype=F64), solver, rtol=1e-2, noise=sf.Antithetic(3)).x
    else:
        problem = VP.reverse(ZERO[VP]["eps"], 0.0 if solver.name == "DDPM" else 1.0)
        end = sf.solve(problem, torch.zeros(6, 2, dtype=F64), solver, steps=6, noise=sf.Antithetic(3)).x
    assert torch.equal(end[0::2], -end[1::2])
    assert float(end.abs().min()) > 0


def test_antithetic_paths():
    path = sf.BrownianPath(3, (6, 2), antithetic=True)
    for v in path.with_area(0.2, 0.61):
        assert torch.equal(v[0::2], -v[1::2])
        assert float(v.abs().min()) > 0
    plain = sf.BrownianPath(3, (3, 2)).with_area(0.2, 0.61)
    torch.testing.assert_close(path(0.2, 0.61)[0::2], plain.w, rtol=0, atol=0)


# ---- what solve refuses


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"noise": sf.SamePath(1), "seed": 1}, ValueError, "expected seed or noise, not both"),
        ({"noise": sf.Antithetic(1), "seed": 0}, ValueError, "expected seed or noise, not both"),
        ({"noise": 3}, TypeError, r"SamePath\(seed\).* got 3"),
        ({"noise": sf.Noise(0, 3)}, TypeError, r"expected noise as"),
        ({"noise": sf.BrownianPath(0, (3, 2))}, TypeError, r"expected noise as"),
        ({"noise": sf.SamePath}, TypeError, "expected noise as .* got the class SamePath; call it to make one"),
        ({"noise": sf.SamePath(1), "index": torch.arange(4)}, ValueError, r"shape \(3,\), got shape \(4,\)"),
    ],
)
def test_errors_of_noise(how, error, message):
    problem = Counting()
    with pytest.raises(error, match=message):
        sf.solve(problem, torch.zeros(3, 2, dtype=F64), EulerMaruyama(), steps=4, **how)
    assert problem.calls == 0


def test_noise_of_no_seed_is_refused_where_it_is_made():
    with pytest.raises(TypeError, match=r"seed as a whole number, got 1\.5"):
        sf.SamePath(1.5)
    with pytest.raises(TypeError, match="seed as a whole number, got '1'"):
        sf.Antithetic("1")


@pytest.mark.parametrize("noise", [None, sf.SamePath(1)])
@pytest.mark.parametrize("solver", [EulerMaruyama(), SRA1()], ids=lambda s: s.name)
def test_saving_between_steps_is_refused(solver, noise):
    problem = Counting()
    with pytest.raises(ValueError, match=r"got 0.3 \(nearest 0.25\).*not interpolated; put the time on the grid"):
        sf.solve(problem, torch.zeros(3, 2, dtype=F64), solver, steps=4, noise=noise, save=[0.0, 0.3, 1.0])
    assert problem.calls == 0
    run = sf.solve(problem, torch.zeros(3, 2, dtype=F64), solver, steps=4, noise=noise, save=[0.25, 1.0])
    assert run.xs.shape == (2, 3, 2)
    with pytest.raises(ValueError, match=r"AdaptiveSDE to a tolerance .*solve on a grid through them"):
        sf.solve(problem, torch.zeros(3, 2), sf.solvers.AdaptiveSDE(), rtol=0.1, noise=noise, save=[0.3])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sf.BrownianPath(0, (3,))(0.0, 1.1), ValueError, r"times in \[0, 1\], got 0 and 1.1"),
        (lambda: sf.BrownianPath(0, (3,))(-1e-9, 0.5), ValueError, r"times in \[0, 1\]"),
        (lambda: sf.BrownianPath(0, (3,))(math.nan, 0.5), ValueError, "got nan"),
        (lambda: sf.BrownianPath(0, (3,), (1.0, 1.0)), ValueError, "start < end"),
        (lambda: sf.BrownianPath(0, (3,), (0.0, math.inf)), ValueError, "start < end"),
        (lambda: sf.BrownianPath(0, ()), ValueError, r"shape as \(batch, \*event\)"),
        (lambda: sf.BrownianPath(0, (3, 0)), ValueError, r"shape as \(batch, \*event\)"),
        (lambda: sf.BrownianPath(0, (3,), dtype=torch.float16), ValueError, "float32 or float64"),
        (lambda: sf.BrownianPath(0.0, (3,)), TypeError, "seed as a whole number"),
    ],
)
def test_errors_of_a_path(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- long runs


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


# ---- controls: what these tests must catch


def without_areas(whole, c, z1, z2, *rest, real=bridge.split):
    return real(Increment(whole.w, torch.zeros_like(whole.h)), c, z1, z2, *rest)


def changed(**places):
    """`split_coefficients` with some of them changed by functions of the named coefficients and the lengths."""
    names = bridge.Split._fields

    def coefficients(p, q, unit, areas, real=bridge.split_coefficients):
        c = dict(zip(names, real(p, q, unit, areas), strict=True))
        return tuple(places[k](c, p) if k in places else c[k] for k in names)

    return coefficients


def no_tables():
    """Forget what was kept of grids: a fault planted below must be seen, and must not outlive its test."""
    grid_module._kept_tables.cache_clear()
    brownian._halving.cache_clear()


@pytest.fixture(autouse=True)
def _no_planted_tables():
    yield
    no_tables()


def left_share(c):
    """q/L, from u/p and u/q."""
    return c["rise_left"] / np.maximum(c["rise_left"] + c["rise_right"], 1e-300)


MUTANTS = {
    "the whole's H is dropped": ("split", without_areas),
    "a bridge of W alone": (
        "split_coefficients",
        changed(
            lift=lambda c, p: 0 * c["lift"],
            std=lambda c, p: np.sqrt(p * left_share(c)),
        ),
    ),
    "a bridge 1% too wide": ("split_coefficients", changed(std=lambda c, p: 1.01 * c["std"])),
    "the areas' shares swapped": (
        "split_coefficients",
        changed(keep_left=lambda c, p: c["keep_right"], keep_right=lambda c, p: c["keep_left"]),
    ),
    "the areas' normals of one sign": ("split_coefficients", changed(tilt_right=lambda c, p: -c["tilt_right"])),
    "the shares of W swapped": (
        "split_coefficients",
        changed(rise_left=lambda c, p: c["rise_right"], rise_right=lambda c, p: c["rise_left"]),
    ),
    "two nodes share a number": ("hashed_words", lambda nodes, real=bridge.hashed_words: real(nodes & ~(3 << 7))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_checks_of_the_law_can_fail(mutant, monkeypatch):
    """Each fault is caught on a grid by the exact check, and (but the 1%) in numbers; and on the tree."""
    lengths = grid_of("cubic", 20)
    checks = [lambda: check_sampled(grid_walk(lengths, True, (128,), seed=20, batch=64), True)]
    size = 4 * 20 + 4

    def exactly():
        with monkeypatch.context() as patch:
            basis(patch, size)
            check_exact(grid_walk(lengths, True, (size,)), True)

    def on_the_tree():
        with monkeypatch.context() as patch:
            basis(patch, 2000)
            check_exact(tree_walk(uneven(7, 7), True, (2000,)), True, 1e-6)

    checks += [exactly, on_the_tree]
    for check in checks:
        check()
    monkeypatch.setattr(bridge, *MUTANTS[mutant])
    no_tables()
    for check in checks[mutant == "a bridge 1% too wide" :]:
        if check is on_the_tree and mutant in ("the areas' shares swapped", "the shares of W swapped"):
            check()  # halves are equal: no fault there
            continue
        with pytest.raises(AssertionError):
            check()


def test_the_checks_of_conditional_laws_can_fail(monkeypatch):
    pieces = [(0.11, 0.2), (0.11, 0.47), (0.47, 0.83)]
    want = isometry(both(pieces))
    for mutant in ("the whole's H is dropped", "a bridge of W alone", "the areas' normals of one sign"):
        with monkeypatch.context() as patch:
            patch.setattr(bridge, *MUTANTS[mutant])
            no_tables()
            rows = rows_of_path(sf.BrownianPath(7, (128, 256)), pieces)
        with pytest.raises(AssertionError):
            check_conditional(rows, want, 2)


@pytest.mark.parametrize("areas", [False, True], ids=["W", "WH"])
def test_the_check_of_one_path_can_fail(areas, monkeypatch):
    """Node numbers swapped within a level on one of the grids: each has the right law, but they are two paths."""
    coarse, fine = (grid_of("cubic", n) for n in (20, 40))
    words = grid_module.node_words

    def swapped(levels, places, *rest):
        levels, places = torch.as_tensor(levels), torch.as_tensor(places)
        return words(levels, torch.where((levels > 0) & (levels < 63), places ^ 4, places), *rest)

    def pair():
        first = grid_walk(coarse, areas, (128,), seed=5, batch=64)
        all_of(first)
        with monkeypatch.context() as patch:
            patch.setattr(grid_module, "node_words", swapped)
            no_tables()
            second = grid_walk(fine, areas, (128,), seed=5, batch=64)
        no_tables()
        return grid_walk(coarse, areas, (128,), seed=5, batch=64), second

    _, second = pair()
    check_sampled(second, areas)
    with pytest.raises(AssertionError):
        check_refines(*pair(), 2)
    check_refines(*(grid_walk(v, areas, (128,), seed=5, batch=64) for v in (coarse, fine)), 2)
