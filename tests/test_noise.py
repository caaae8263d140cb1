"""The noise generator: its law, its independence, and that a sample's numbers belong to the sample.

Statistical tests are at level 1e-6 or 5 standard errors (6e-7) a comparison, on fixed seeds.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import sdeflow as sf
from sdeflow.noise import CORRECTOR, DATA, PATH, PRIOR, _mix
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


# ---- errors


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: sf.Noise("0", 3), TypeError, "integer seed, got '0'"),
        (lambda: sf.Noise(0.5, 3), TypeError, "integer seed, got 0.5"),
        (lambda: sf.Noise(True, 3), TypeError, "integer seed"),
        (lambda: sf.Noise(0, 3, index=torch.arange(4)), ValueError, r"shape \(3,\), got shape \(4,\)"),
        (lambda: sf.Noise(0, 3, index=torch.arange(6).reshape(3, 2)), ValueError, r"got shape \(3, 2\)"),
        (lambda: sf.Noise(0, 3, index=torch.rand(3)), TypeError, "1-d integer tensor"),
        (lambda: sf.Noise(0, 3, index=torch.ones(3, dtype=torch.bool)), TypeError, "1-d integer tensor"),
        (lambda: sf.Noise(0, 3, index=[0, 1, 2]), TypeError, "1-d integer tensor"),
        (lambda: sf.Noise(0, 3, index=1.5), TypeError, "1-d integer tensor"),
    ],
)
def test_errors(build, error, message):
    with pytest.raises(error, match=message):
        build()
