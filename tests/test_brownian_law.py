"""The joint law of (W, H), additivity, and what the checks of both must catch.

Laws are checked twice. Exactly: every normal is replaced by a unit vector, so that an increment is the row of its
coefficients and covariances are scalar products. And on numbers: statistical tests are at 5 standard errors (6e-7 a
comparison) or level 1e-6 (for all entries of a matrix together), on fixed seeds. References are written here: Ito's
isometry over kernels, and W and the integral of W summed up interval by interval.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import sdeflow as sf
from sdeflow import bridge, brownian
from sdeflow import grid_walk as grid_module
from sdeflow.bridge import Increment
from sdeflow.noise import Noise
from tests.brownian_cases import all_of, check_refines, chen, grid_of, grid_walk, tree_walk, uneven
from tests.exact import F64

LEVEL = 1e-6
COUNTS = (1, 2, 3, 7, 20, 64, 99, 100)
TICK = 2.0**-40


# ---- references

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
