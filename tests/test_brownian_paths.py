"""One path, bit for bit, whoever asks, with whom and in which order, and on whatever grid."""

import itertools
import math
import threading

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow import grid_walk as grid_module
from sdeflow.noise import Noise
from tests.brownian_cases import MAPS, all_of, check_refines, chen, grid_of, grid_walk, tree_walk, uneven
from tests.exact import F64

# ---- bits: who asks, with whom, in which order

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
