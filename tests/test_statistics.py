"""Statistics that merge: exact sums, moments, counts; the same bits in any order."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from sdeflow.statistics import Covariance, ExactSum, Frechet, Functional, Histogram, Moments, Quantiles

BIG = random.Random(0)


def wild(n, seed):
    """Numbers of all sizes, many of which cancel."""
    rng = random.Random(seed)
    spread = rng.choice([3, 60, 2000])
    middle = rng.randint(-1074, 960)
    return [
        math.ldexp(rng.uniform(-1, 1), min(1000, max(-1074, middle + rng.randint(-spread, spread)))) for _ in range(n)
    ]


def exact(values):
    total = ExactSum()
    for value in values:
        total.add(torch.tensor(value, dtype=torch.float64))
    return total


@pytest.mark.parametrize("seed", range(60))
def test_an_exact_sum_is_that_of_fsum(seed):
    values = [*wild(30, seed), 5e-324, -5e-324, -0.0, 2.2250738585072014e-308]
    assert exact(values).value().item() == math.fsum(values)


def test_sums_are_the_same_in_any_order_and_plain_addition_is_not():
    values = wild(200, 2) + wild(200, 3)
    shuffled = values[:]
    BIG.shuffle(shuffled)
    parts = [exact(shuffled[k::3]) for k in range(3)]
    merged = exact([])
    for part in parts:
        merged.merge(part)
    one, other = exact(values).arrays(), merged.arrays()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sum(values) != sum(sorted(values))  # the control


def test_a_sum_survives_many_carries_its_file_and_what_is_not_finite():
    total = ExactSum((2,))
    for _ in range(2000):
        total.add(torch.tensor([-1e-300, 0.1], dtype=torch.float64))
    again = ExactSum((2,))
    again.load(total.arrays())
    again.merge(total)
    assert again.value().tolist() == [-4e-297, math.fsum([0.1] * 4000)]
    assert again.count == 4000
    total.add(torch.tensor([math.inf, math.nan], dtype=torch.float64))
    assert total.value()[0] == math.inf
    assert total.value()[1].isnan()
    total.add(torch.tensor([-math.inf, 0.0], dtype=torch.float64))
    assert total.value().isnan().all()
    with pytest.raises(ValueError, match=r"expected a value of shape \(2,\), got \(3,\)"):
        total.add(torch.zeros(3))
    huge = exact([1.7e308, 1.7e308])
    assert huge.value() == math.inf
    huge.add(torch.tensor(-1.7e308, dtype=torch.float64))
    assert huge.value() == 1.7e308  # the overflow was only in what was read


def test_moments_are_those_of_all_samples():
    x = torch.randn(1000, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 2 + 5
    got = Moments(4, centre=5.0)
    for block in x.split(37):
        got.add(block)
    mean = x.mean(0)
    z = (x - mean) / x.std(0, correction=0)
    torch.testing.assert_close(got.mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(got.variance, x.var(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.skewness, (z**3).mean(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(got.kurtosis, (z**4).mean(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(got.stderr, x.std(0) / 1000**0.5, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"needs Moments\(2\)"):
        Moments(1).variance  # noqa: B018
    with pytest.raises(ValueError, match="at least 1 samples"):
        Moments().mean  # noqa: B018


def test_covariance_and_frechet_are_those_of_all_samples():
    g = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(500, 3, dtype=torch.float64, generator=g),
        1 + torch.randn(400, 3, dtype=torch.float64, generator=g),
    )
    a, b = Frechet(), Frechet(torch.nn.Flatten())
    for block in x.split(64):
        a.add(block)
    for block in y[:, None].split(50):
        b.add(block)
    torch.testing.assert_close(a.covariance, torch.cov(x.T), rtol=1e-12, atol=1e-14)
    from sdeflow.metrics import frechet

    assert a.distance(b) == pytest.approx(frechet(x, y), rel=1e-10)
    shifted = Covariance(centre=1.0)
    shifted.add(y)
    torch.testing.assert_close(shifted.mean, y.mean(0), rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match="events of 3 numbers, got 2"):
        shifted.add(y[:, :2])


def test_histograms_count_as_torch_does():
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[0, 0], x[1, 0] = 1.0, float("nan")
    edges = torch.linspace(-1, 1, 9, dtype=torch.float64)
    got = Histogram(edges)
    for block in x.split(300):
        got.add(block)
    for k in range(2):
        column = x[:, k]
        want = torch.histogram(column[~column.isnan()], edges)[0].long()
        assert torch.equal(got.counts[k], want)
        assert got.below[k] + got.above[k] + want.sum() == (~column.isnan()).sum()
    assert (got.count, got.nans) == (2000, 1)


@pytest.mark.parametrize("accuracy", [0.01, 0.001])
def test_quantiles_are_as_accurate_as_they_say(accuracy):
    x = torch.randn(5001, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).exp() - 1
    got = Quantiles(accuracy)
    for block in x.split(700):
        got.add(block)
    for q in (0.0, 0.01, 0.25, 0.5, 0.9, 1.0):
        want = x.sort(0).values[math.floor(q * 5000)]
        assert ((got.quantile(q) - want).abs() <= (accuracy + 1e-12) * want.abs()).all()
    zeros = Quantiles()
    zeros.add(torch.tensor([0.0, 0.0, 1e-12, 5.0, 1e300]))
    assert zeros.median == 0.0
    assert zeros.quantile(1.0) == 1e9


@pytest.mark.parametrize(
    "make", [lambda: Moments(4), Covariance, Frechet, lambda: Histogram([-1.0, 0.0, 1.0]), Quantiles]
)
def test_blocks_in_any_order_by_anyone_give_the_same_bits(make):
    x = torch.randn(640, 5, generator=torch.Generator().manual_seed(4)) * 1e3
    one, parts = make(), [make() for _ in range(3)]
    for block in x.split(64):
        one.add(block)
    for k, block in enumerate(reversed(x.split(64))):
        parts[k % 3].add(block)
    other = one.empty()
    assert other.count == 0
    other.merge(make())  # one that took nothing
    for part in reversed(parts):
        kept = one.empty()
        kept.load(part.arrays())
        other.merge(kept)
    a, b = one.arrays(), other.arrays()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert other.count == 640


def test_what_statistics_refuse():
    for call, text in (
        (lambda: Moments(5), "order from 1 to 4"), (lambda: Histogram([1.0, 0.0]), "increasing"),
        (lambda: Quantiles(0.0), r"accuracy in \(0, 1\)"), (lambda: Moments().merge(Moments(3)), "same settings"),
        (lambda: Quantiles().quantile(0.5), "at least one sample"), (lambda: Quantiles().quantile(2), r"q in \[0, 1\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="features"):
        Frechet(3)
    one = Histogram([0.0, 1.0])
    one.add(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"expected values of shape \(n, 2\), got \(3, 4\)"):
        one.add(torch.zeros(3, 4))


@pytest.mark.parametrize(
    "make", [lambda: Covariance(centre=5.0), lambda: Covariance(centre=torch.tensor([5.0])), Frechet]
)
def test_numbers_are_events_of_one_component(make):
    x = 5 + torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    one, other = make(), make()
    one.add(x[:, None])
    if getattr(one.centre, "ndim", 0) == 0:
        other.add(x)
        assert torch.equal(one.mean, other.mean)
    torch.testing.assert_close(one.mean, x.mean()[None], rtol=1e-13, atol=0)


def test_a_centre_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a centre of 1 or 6 numbers"):
        Covariance(centre=torch.ones(3)).add(torch.zeros(4, 2, 3))


def widest(solution):
    return solution.x


def test_statistics_of_other_settings_do_not_merge():
    net = torch.nn.Flatten()
    kinds = [
        lambda: Moments(4), lambda: Moments(4, centre=1.0), Covariance, Frechet, lambda: Frechet(net), Quantiles,
        lambda: Quantiles(most=2e9), lambda: Histogram([0.0, 1.0, 2.0]), lambda: Histogram([0.0, 5.0, 9.0]),
        lambda: Functional(widest, Moments()), lambda: Functional(widest, Moments(4)),
        lambda: Functional(abs, Moments()),
    ]  # fmt: skip
    for k, make in enumerate(kinds):
        one = make()
        assert one.described() == make().described() == json.loads(json.dumps(one.described()))
        one.merge(make())
        for other in kinds[:k]:
            assert other().described() != one.described()
            with pytest.raises(ValueError, match="same settings"):
                one.merge(other())
    with pytest.raises(TypeError, match="expected a Moments to merge"):
        Moments().merge(3)
    assert Functional(widest, Moments()).described()["function"] == f"{__name__}.widest"
