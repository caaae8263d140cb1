"""The noise generator: its law, its independence, and that a sample's numbers belong to the sample.

Statistical tests are at level 1e-6 or 5 standard errors (6e-7) a comparison, on fixed seeds.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

import sdeflow as sf
from sdeflow import noise as noise_module
from sdeflow.noise import CHURN, CORRECTOR, DATA, PATH, PRIOR, WEAK, _mix, hashed_words, normal_pairs
from tests.exact import F64

LEVEL = 1e-6


def draw(seed=0, batch=512, event=(512,), stream=PATH, node=0, dtype=F64, index=None):
    return sf.Noise(seed, batch, index=index).normal(stream, node, event, dtype)


def views():
    """Long vectors of normals that each run along another argument of the generator."""
    count = 1 << 15
    one = sf.Noise(3, 1)
    nodes = one.sequence(PATH, count, (2,), F64)
    return {
        "event": draw(1, 4, (count // 4,)).flatten(),
        "index": draw(2, count, (1,)).flatten(),
        "node": torch.cat([nodes(k).flatten() for k in range(count // 2)]),
        "seed": torch.cat([draw(s, 1, (8,)).flatten() for s in range(count // 8)]),
        "seed, from far": torch.cat([draw(s << 52, 1, (8,)).flatten() for s in range(1 << 12)]),
        "index, by powers of 2": draw(5, 62, (512,), index=2 ** torch.arange(62)).flatten(),
        "float32": draw(1, 4, (count // 4,), dtype=torch.float32).flatten().to(F64),
    }


VIEWS = views()


@pytest.mark.parametrize("along", VIEWS)
def test_the_law_is_normal(along):
    """KS, chi-square on 128 equal cells, and four moments."""
    z = VIEWS[along].numpy()
    n = z.size
    assert stats.kstest(z, "norm").pvalue > LEVEL
    cells = np.floor(stats.norm.cdf(z) * 128).astype(int)
    assert stats.chisquare(np.bincount(cells, minlength=128)).pvalue > LEVEL
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < 5 * math.sqrt(variance / n)


@pytest.mark.parametrize("along", VIEWS)
def test_neighbours_are_independent(along):
    """Correlations of values, squares and signs at lags 1 to 3, and chi-square of pairs on 16 x 16 cells."""
    z = VIEWS[along].numpy()
    n = z.size
    for lag in (1, 2, 3):
        a, b = z[:-lag], z[lag:]
        for f in (lambda v: v, lambda v: (v**2 - 1) / math.sqrt(2), np.sign):
            assert abs((f(a) * f(b)).mean()) < 5 / math.sqrt(n)
    a, b = (np.floor(stats.norm.cdf(z[i : n - 1 + i : 2]) * 16).astype(int) for i in (0, 1))
    assert stats.chisquare(np.bincount(16 * a + b, minlength=256)).pvalue > LEVEL


# ---- a million numbers

MILLION = 1_000_000


def million_nodes():
    read = sf.Noise(3, 1).sequence(CORRECTOR, MILLION // 10, (10,), F64)
    return torch.stack([read(k) for k in range(MILLION // 10)])


AXES = {
    "event": lambda: draw(11, 1, (MILLION,)),
    "index": lambda: draw(12, MILLION, ()),
    "node": million_nodes,
    "seed": lambda: torch.cat([draw(s, 1, (500,)) for s in range(MILLION // 500)]),
    "float32": lambda: draw(11, 1000, (1000,), dtype=torch.float32).to(F64),
}


@functools.cache
def million(along):
    return AXES[along]().flatten().numpy()


@pytest.mark.parametrize("along", AXES)
def test_the_law_of_a_million(along):
    """KS, chi-square on 1024 equal cells, six moments, and the tail beyond 4 (63.3 expected, Poisson)."""
    z = million(along)
    n = z.size
    assert n == MILLION
    assert stats.kstest(z, "norm").pvalue > LEVEL
    cells = np.floor(stats.norm.cdf(z) * 1024).astype(int).clip(0, 1023)
    assert stats.chisquare(np.bincount(cells, minlength=1024)).pvalue > LEVEL
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (5, 0, 945), (6, 15, 10170)):
        assert abs((z**power).mean() - mean) < 5 * math.sqrt(variance / n)
    beyond, expected = int((np.abs(z) > 4).sum()), n * 2 * stats.norm.sf(4)
    assert min(stats.poisson.cdf(beyond, expected), stats.poisson.sf(beyond - 1, expected)) > LEVEL


@pytest.mark.parametrize("along", AXES)
def test_neighbours_in_a_million_are_independent(along):
    """Values, squares and signs at lags 1, 2, 10 and 500, and chi-square of pairs on 32 x 32 cells, each in one pair.

    Lag 1 is from index to index where one number is drawn of each, else within an event; lag 10 is from node to node,
    and lag 500 from seed to seed, for the same component.
    """
    z = million(along)
    n = z.size
    cells = np.floor(stats.norm.cdf(z) * 32).astype(int).clip(0, 31)
    for lag in (1, 2, 10, 500):
        a, b = z[:-lag], z[lag:]
        for f in (lambda v: v, lambda v: (v**2 - 1) / math.sqrt(2), np.sign):
            assert abs((f(a) * f(b)).mean()) < 5 / math.sqrt(n)
        pairs = cells[: n - n % (2 * lag)].reshape(-1, 2, lag)
        assert stats.chisquare(np.bincount((32 * pairs[:, 0] + pairs[:, 1]).ravel(), minlength=1024)).pvalue > LEVEL


def test_the_two_of_a_pair_are_independent():
    """Nodes 2j and 2j + 1 are the cosine and the sine of one pair: its angle is uniform, half its radius^2 exponential,
    the two independent; 2^19 pairs."""
    read = sf.Noise(3, 512).sequence(CORRECTOR, 64, (32,), F64)
    z = torch.stack([read(k) for k in range(64)])
    x, y = z[0::2].flatten().numpy(), z[1::2].flatten().numpy()
    angle, half = np.arctan2(y, x) / (2 * math.pi) + 0.5, (x**2 + y**2) / 2
    assert stats.kstest(angle, "uniform").pvalue > LEVEL
    assert stats.kstest(half, "expon").pvalue > LEVEL
    a, b = (np.floor(u * 32).astype(int).clip(0, 31) for u in (angle, -np.expm1(-half)))
    assert stats.chisquare(np.bincount(32 * a + b, minlength=1024)).pvalue > LEVEL
    for f in (lambda v: v, lambda v: (v**2 - 1) / math.sqrt(2), np.sign, np.abs):
        assert abs(np.corrcoef(f(x), f(y))[0, 1]) < 5 / math.sqrt(x.size)


def rows_along(axis, rows, columns):
    """(rows, columns) numbers: each row another component, sample, node, stream or seed."""
    if axis == "component":
        return draw(1, columns, (rows,)).T
    if axis == "index":
        return draw(1, rows, (columns,))
    if axis == "index 2^k":
        return draw(1, 62, (columns,), index=2 ** torch.arange(62))
    if axis == "node":
        return torch.stack([draw(1, 1, (columns,), node=k)[0] for k in range(rows)])
    if axis == "node 2^k":
        return torch.stack([draw(1, 1, (columns,), node=2**k)[0] for k in range(48)])
    if axis == "stream":
        return torch.stack([draw(1, 1, (columns,), stream=k)[0] for k in range(8)])
    seeds = [*range(rows // 2), *(k << 57 for k in range(1, rows // 2))]
    return torch.stack([draw(seed, 1, (columns,))[0] for seed in seeds])


@pytest.mark.parametrize("axis", ["component", "index", "index 2^k", "node", "node 2^k", "stream", "seed"])
def test_all_pairs_of_many_are_independent(axis):
    """Correlations of values and of magnitudes of every two of up to 200, over 4096 numbers; level 1e-6 for all."""
    z = rows_along(axis, 200, 4096)
    count, n = z.shape
    assert count >= 8
    bound = stats.norm.isf(LEVEL / (count * (count - 1)))
    off = ~torch.eye(count, dtype=torch.bool)
    assert float((z @ z.T)[off].abs().max()) / math.sqrt(n) < bound
    # a product of magnitudes has skewness 1: its mean of 4096 has that over 64, which is worth 5% of a bound of 7
    size = (z.abs() - math.sqrt(2 / math.pi)) / math.sqrt(1 - 2 / math.pi)
    assert float((size @ size.T)[off].abs().max()) / math.sqrt(n) < 1.05 * bound


def test_a_million_numbers_do_not_repeat():
    """2^20 along each of index, node and event at once; a repeat of 64 bits would be chance 3 in 10^8."""
    read = sf.Noise(9, 64).sequence(CORRECTOR, 128, (128,), F64)
    z = torch.stack([read(k) for k in range(128)])
    assert z.unique().numel() == z.numel() == 1 << 20


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"seed": 0}, {"seed": 1}),
        ({"seed": 0}, {"seed": -1}),
        ({"seed": 7}, {"seed": 7 + (1 << 32)}),
        ({"node": 0}, {"node": 1}),
        ({"node": 0, "seed": 1}, {"node": 1, "seed": 0}),
        ({"stream": PATH}, {"stream": PRIOR}),
        ({"stream": PATH}, {"stream": CORRECTOR}),
        ({"stream": PRIOR}, {"stream": DATA}),
        ({"stream": PATH, "node": 1}, {"stream": PRIOR, "node": 0}),
        ({"index": 0}, {"index": 512}),
        ({"index": 0, "seed": 1}, {"index": 1, "seed": 0}),
        ({"index": 0, "node": 1}, {"index": 1, "node": 0}),
        ({"index": 0, "stream": 1}, {"index": 1, "stream": 0}),
    ],
)
def test_different_keys_are_independent(a, b):
    """Correlation of values and squares over 2^18 pairs; no value in common."""
    x, y = draw(**a).flatten(), draw(**b).flatten()
    n = x.numel()
    assert abs(float((x * y).mean())) < 5 / math.sqrt(n)
    assert abs(float(((x**2 - 1) * (y**2 - 1)).mean()) / 2) < 5 / math.sqrt(n)
    assert not bool(torch.isin(x, y).any())


def test_no_two_keys_give_the_same_numbers():
    """32,768 keys in all four arguments; two equal float64 draws would be chance 1 in 10^9."""
    first = [
        draw(seed, 32, (1,), stream, node)
        for seed in (-(2**63), -2, -1, 0, 1, 2, 3, 2**63 - 1)
        for stream in range(4)
        for node in range(32)
    ]
    values = torch.cat(first).flatten()
    assert values.unique().numel() == values.numel() == 8 * 4 * 32 * 32


def test_the_correlation_test_can_fail():
    """The control: two vectors with 3% in common."""
    x, y = draw(seed=0).flatten(), draw(seed=1).flatten()
    y = 0.03 * x + math.sqrt(1 - 0.03**2) * y
    assert abs(float((x * y).mean())) > 5 / math.sqrt(x.numel())


# ---- numbers belong to the sample


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("event", [(), (1,), (3,), (2, 5)])
def test_a_sample_does_not_change_with_its_batch(event, dtype):
    whole = draw(9, 64, event, dtype=dtype)
    assert whole.shape == (64, *event)
    assert whole.dtype == dtype
    for size in (1, 7, 16):
        assert torch.equal(draw(9, size, event, dtype=dtype), whole[:size])
        parts = [draw(9, min(size, 64 - i), event, dtype=dtype, index=i) for i in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(9, 64, event, dtype=dtype, index=order), whole[order])
    assert torch.equal(draw(9, 3, event, dtype=dtype, index=torch.tensor([5, 5, 2])), whole[[5, 5, 2]])
    assert torch.equal(draw(9, 2, event, dtype=dtype, index=torch.tensor([5, 2], dtype=torch.int32)), whole[[5, 2]])


@pytest.mark.parametrize("batch", [1, 5, 4096])
def test_blocks_of_steps_are_the_steps(batch):
    """`sequence` against `normal`, over several blocks, in order, backwards and with repeats."""
    noise = sf.Noise(4, batch)
    event, nodes = (33,), 9 if batch > 4000 else 40
    read = noise.sequence(CORRECTOR, nodes, event, torch.float32)
    order = [*range(nodes), *reversed(range(nodes)), 0, 0, nodes - 1, 3]
    for k in order:
        assert torch.equal(read(k), noise.normal(CORRECTOR, k, event, torch.float32))


def test_blocks_do_not_depend_on_the_number_of_steps():
    a, b = (sf.Noise(4, 4096).sequence(PATH, n, (33,), F64) for n in (3, 50))
    assert all(torch.equal(a(k), b(k)) for k in range(3))


def test_two_sequences_do_not_disturb_each_other():
    noise = sf.Noise(4, 3)
    a, b = noise.sequence(PATH, 20, (2,), F64), noise.sequence(CORRECTOR, 20, (5,), F64)
    for k in range(20):
        assert torch.equal(a(k), noise.normal(PATH, k, (2,), F64))
        assert torch.equal(b(k), noise.normal(CORRECTOR, k, (5,), F64))


def test_the_arrangement_of_an_event_does_not_matter():
    """The numbers of one key depend on how many are asked for, not on how they are arranged."""
    assert torch.equal(draw(0, 4, (6,)), draw(0, 4, (2, 3)).flatten(1))


def test_float32_is_float64_rounded():
    """The uniform of the radius is rounded to 2^-25: at most sqrt(2^-24) off near 0, and 1e-6 elsewhere."""
    double, single = draw(dtype=F64), draw(dtype=torch.float32).to(F64)
    difference = (double - single).abs().flatten()
    assert float(difference.max()) < 2.0**-12 + 1e-6
    assert float(difference.quantile(0.5)) < 2e-7
    assert float((difference > 2e-6).to(F64).mean()) < 1e-2
    half = draw(dtype=torch.bfloat16)
    assert torch.equal(half, draw(dtype=torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 123456789123456789])
def test_any_64_bit_seed(seed):
    z = draw(seed, 64, (256,))
    assert bool(torch.isfinite(z).all())
    assert abs(float(z.mean())) < 5 / math.sqrt(z.numel())
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / z.numel())


def test_seeds_that_differ_differ():
    """Any integer is a seed: also those beyond 64 bits, which must be refused or told apart."""
    small = draw(5, 4, (4,))
    try:
        large = draw(5 + 2**64, 4, (4,))
    except ValueError:
        return
    assert not torch.equal(small, large)


def test_huge_indices():
    z = draw(1, 4, (1000,), index=2**62)
    assert bool(torch.isfinite(z).all())
    assert z.flatten().unique().numel() == 4000


def test_the_bits_are_splitmix64():
    """Against the generator in Python's integers, and the outputs that its authors' C code gives for seed 1234567."""

    def splitmix(state):
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    states = [(1234567 + k * 0x9E3779B97F4A7C15) % 2**64 for k in range(1, 200)]
    assert [splitmix(s) for s in states[:3]] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    assert [int(z) % 2**64 for z in _mix(signed)] == [splitmix(s) for s in states]


def test_the_global_generator_is_neither_used_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = draw(0, 4, (4,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(0, 4, (4,)), a)


def test_odd_and_even_counts():
    for count in (1, 2, 3, 8, 9):
        z = draw(0, 5, (count,))
        assert z.shape == (5, count)
        assert z.unique().numel() == 5 * count


# ---- memory


def test_numbers_do_not_change_after_they_were_given():
    """The generator makes its numbers in memory that it uses again."""
    noise = sf.Noise(4, 50)
    kept = [noise.normal(CORRECTOR, k, (20,), dtype) for k in range(4) for dtype in (F64, torch.float32)]
    copies = [v.clone() for v in kept]
    read = noise.sequence(DATA, 500, (20,), F64)
    rows = [read(k) for k in range(500)]
    row_copies = [v.clone() for v in rows]
    walk = noise.walk(torch.linspace(0, 1, 38, dtype=F64), (20,), F64, areas=True)
    for k in range(37):
        walk(k)
    noise.normal(PATH, 0, (3000,), F64)
    assert all(torch.equal(a, b) for a, b in zip(kept + rows, copies + row_copies, strict=True))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_more_numbers_than_a_block_are_the_same_numbers(dtype, monkeypatch):
    whole = draw(2, 30, (100,), dtype=dtype)
    reader = lambda: sf.Noise(2, 30).sequence(PATH, 9, (100,), dtype)  # noqa: E731
    rows = [reader()(k) for k in range(9)]
    for block in (1, 100, 740, 751, 5000):
        monkeypatch.setattr(noise_module, "BLOCK", block)
        assert torch.equal(draw(2, 30, (100,), dtype=dtype), whole)
        read = reader()
        assert all(torch.equal(read(k), rows[k]) for k in (0, 1, 2, 3, 8, 5, 0))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_pure_function_makes_the_same_numbers(dtype):
    """`normal_pairs`, written for compilers, against the generator, which works in place."""
    noise = sf.Noise(8, 7)
    words = hashed_words(torch.arange(50))
    x, y = normal_pairs(noise._stream(PATH, 33), words[:, None, None], dtype)
    for k in range(100):
        assert torch.equal((x, y)[k & 1][k >> 1], noise.normal(PATH, k, (33,), dtype))


# ---- opposite pairs, and some of a batch


STREAMS = (PATH, PRIOR, CORRECTOR, DATA, CHURN, WEAK)


def antithetic(batch, index=None, seed=5):
    return sf.Noise(seed, batch, index=index, antithetic=True)


def reads(noise, dtype=F64):
    """Numbers of every kind that a noise gives, the batch first."""
    out = [noise.normal(stream, 3, (2, 3), dtype) for stream in STREAMS]
    sequence = noise.sequence(CORRECTOR, 5, (4,), dtype)
    out += [sequence(k) for k in range(5)]
    for areas in (False, True):
        walk = noise.walk(torch.linspace(0, 1, 7, dtype=F64) ** 2, (3,), dtype, areas=areas)
        out += [v for k in range(6) for v in walk(k) if v is not None]
    return out


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_antithetic_samples_are_opposite(dtype):
    """Samples 2j and 2j + 1 to the bit; the first of a pair is sample j of the seed alone."""
    for z, plain in zip(reads(antithetic(10), dtype), reads(sf.Noise(5, 5), dtype), strict=True):
        assert torch.equal(z[0::2], -z[1::2])
        assert torch.equal(z[0::2], plain)
        assert z.dtype == dtype
        assert bool((z != 0).any())


@pytest.mark.parametrize("first", [0, 1, 2, 7, -3, 2**40 + 1])
def test_antithetic_samples_do_not_depend_on_the_batch(first):
    low = first - first % 2 - 2
    whole = reads(antithetic(16, low))
    for size in (1, 4, 7):
        rows = slice(first - low, first - low + size)
        for z, want in zip(reads(antithetic(size, first)), whole, strict=True):
            assert torch.equal(z, want[rows])
    index = torch.tensor([first + 5, first, first + 1, first])
    for z, want in zip(reads(antithetic(4, index)), whole, strict=True):
        assert torch.equal(z, want[index - low])


def test_antithetic_numbers_are_normal_and_pairs_independent():
    z = antithetic(2000).normal(PATH, 0, (50,), F64)
    assert stats.kstest(z[0::2].flatten().numpy(), "norm").pvalue > LEVEL
    a, b = z[0:-2:2].flatten(), z[2::2].flatten()
    for x, y in ((a, b), (a**2 - 1, (b**2 - 1) / 2)):
        assert abs(float((x * y).mean())) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("make", [sf.Noise, lambda *how, **also: sf.Noise(*how, antithetic=True, **also)])
@pytest.mark.parametrize("used", [False, True])
def test_taking_some_of_a_batch(make, used):
    """`take` before and after the noise was used, of a part too; the whole is left as it was."""
    index = torch.tensor([3, 10, 11, 4, 4, 100, -7])
    noise, want = make(2, 7, index=index), reads(make(2, 7, index=index))
    if used:
        reads(noise)
    rows = torch.tensor([6, 2, 1, 1, 0])
    part = noise.take(rows)
    smaller = part.take(torch.tensor([4, 1]))
    assert torch.equal(part.index, index[rows])
    for got, few, all_ in zip(reads(part), reads(smaller), want, strict=True):
        assert torch.equal(got, all_[rows])
        assert torch.equal(few, all_[rows[[4, 1]]])
    assert all(torch.equal(a, b) for a, b in zip(reads(noise), want, strict=True))
    empty = noise.take(torch.zeros(0, dtype=torch.int64))
    assert empty.normal(PATH, 0, (2,), F64).shape == (0, 2)


def test_streams_of_one_noise_do_not_agree():
    """The path, the path with areas and every other stream, 8 in all, 2^14 numbers each: no value in common."""
    noise = sf.Noise(5, 64)
    grid = torch.linspace(0, 1, 2, dtype=F64)
    drawn = [noise.normal(stream, 0, (256,), F64).flatten() for stream in (*STREAMS, 4)]
    drawn += [noise.walk(grid, (256,), F64, areas=True)(0).w.flatten()]
    for a, b in itertools.combinations(drawn, 2):
        assert not bool(torch.isin(a, b).any())
        assert abs(float((a * b).mean())) < 5 / math.sqrt(a.numel())


# ---- errors


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: sf.Noise("0", 3), TypeError, "seed as a whole number, got '0'"),
        (lambda: sf.Noise(0.5, 3), TypeError, "seed as a whole number, got 0.5"),
        (lambda: sf.Noise(True, 3), TypeError, "seed as a whole number, got True"),
        (lambda: sf.Noise(0, 3, index=torch.arange(4)), ValueError, r"shape \(3,\), got shape \(4,\)"),
        (lambda: sf.Noise(0, 3, index=torch.arange(6).reshape(3, 2)), ValueError, r"got shape \(3, 2\)"),
        (lambda: sf.Noise(0, 3, index=torch.rand(3)), TypeError, "1-d integer tensor"),
        (lambda: sf.Noise(0, 3, index=torch.ones(3, dtype=torch.bool)), TypeError, "1-d integer tensor"),
        (lambda: sf.Noise(0, 3, index=[0, 1, 2]), TypeError, "index as a whole number, a tensor .*; torch.as_tensor"),
        (lambda: sf.Noise(0, 3, index=1.5), TypeError, "index as a whole number, a tensor"),
    ],
)
def test_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()
