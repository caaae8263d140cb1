"""Laws of the times that losses draw, and importance weights without bias."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import sdeflow as sf
from sdeflow import losses
from tests.exact import F64

KS_LEVEL = 1e-6
"""A right sampler fails a test of its law on one seed in a million."""


def ks(sample, cdf):
    return stats.kstest(np.asarray(sample), cdf).pvalue


@pytest.mark.parametrize("process", [sf.VP(), sf.EDM(), sf.RectifiedFlow()], ids=repr)
def test_laws_of_times(process):
    n, low, high = 4000, process.t_min, process.t1
    uniform = stats.uniform(low, high - low)
    times = losses.uniform_times(process, n, low)
    assert times.dtype == F64
    assert ks(times, uniform.cdf) > KS_LEVEL
    alone = torch.stack([losses.offset_times(process, 7, low) for _ in range(2000)])
    for place in (0, 4):
        assert ks(alone[:, place], uniform.cdf) > KS_LEVEL
    gaps = torch.diff(alone.sort(1).values, dim=1) / (high - low) * 7
    torch.testing.assert_close(gaps, torch.ones_like(gaps), rtol=0, atol=1e-9)

    def truncated(mean, std, start, end):
        law = stats.norm(mean, std)
        return lambda y: (law.cdf(y) - law.cdf(start)) / (law.cdf(end) - law.cdf(start))

    for mean, std in ((-1.2, 1.2), (0.5, 0.7)):
        times = losses.log_normal_times(process, n, low, mean=mean, std=std)
        assert bool(((times >= low) & (times <= high)).all())
        ends = [-float(process.lam(v)) for v in (low, high)]
        assert ks(-process.lam(times), truncated(mean, std, *ends)) > KS_LEVEL
        assert ks(-process.lam(times), truncated(mean + 0.3, std, *ends)) < KS_LEVEL  # control
        times = losses.logit_normal_times(process, n, low, mean=mean, std=std)
        logit = torch.logit(times / high)
        start = math.log(low / high / (1 - low / high))
        assert ks(logit, truncated(mean, std, start, math.inf)) > KS_LEVEL
        assert ks(logit, truncated(mean, 1.2 * std, start, math.inf)) < KS_LEVEL  # control


def test_default_span_and_generators():
    process = sf.VP()
    history = losses.LossHistory(4)
    for law in (
        losses.uniform_times,
        losses.offset_times,
        losses.stratified_times,
        losses.log_normal_times,
        losses.logit_normal_times,
        lambda process, n, generator=None: losses.importance_times(process, n, history, generator=generator)[0],
    ):
        torch.manual_seed(9)
        state = torch.get_rng_state()
        first = law(process, 300, generator=torch.Generator().manual_seed(9))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(law(process, 300), first)
        assert not torch.equal(law(process, 300), first)
        assert first.shape == (300,)
        assert bool(((first >= 1e-5) & (first <= 1)).all())
    upper = losses.log_normal_times(sf.EDM(), 100, 70.0, mean=-1.2, std=1.2)  # deep in a tail
    assert bool(((upper >= 70) & (upper <= 80)).all())
    assert float(upper.std()) > 1


def test_importance_weights_are_unbiased():
    history = losses.LossHistory(6, history=3, uniform=0.01)
    assert not history.ready
    assert torch.equal(history.probabilities, torch.full((6,), 1 / 6, dtype=F64))
    kept = torch.tensor([[1.0, 2.0, 2.0], [0.1, 0.1, 0.1], [3, 0, 4], [1, 1, 1], [9, 1, 1], [2, 2, 5]], dtype=F64)
    old = torch.full((6,), 77.0, dtype=F64)
    history.update(torch.arange(6), old)  # to be forgotten
    for column in kept.T[:2]:
        history.update(torch.arange(6), column)
    assert history.ready
    history.update(torch.arange(6).flip(0), kept[:, 2].flip(0))
    root = kept.square().mean(1).sqrt()
    want = 0.99 * root / root.sum() + 0.01 / 6
    p = history.probabilities
    torch.testing.assert_close(p, want, rtol=1e-12, atol=0)
    loss = torch.randn(6, dtype=F64)
    n = 60_000
    index, w = history.draw(n)
    torch.testing.assert_close(w, 1 / (6 * p[index]), rtol=1e-12, atol=0)
    weight = 1 / (6 * p)
    assert float((p * weight * loss).sum()) == pytest.approx(float(loss.mean()), rel=1e-12)
    counts = torch.bincount(index, minlength=6)
    assert stats.chisquare(counts.numpy(), n * p.numpy() / float(p.sum())).pvalue > KS_LEVEL
    # losses that are their own history have the least variance there: none
    flat = losses.LossHistory(6, history=1, uniform=0.0)
    flat.update(torch.arange(6), root)
    index, w = flat.draw(50)
    torch.testing.assert_close(w * root[index], root.mean().expand(50), rtol=1e-12, atol=0)
    times, w, index = losses.importance_times(sf.VP(), 6000, history, 0.1)
    place = (times - 0.1) / 0.9 * 6
    assert torch.equal(place.floor().long(), index)
    torch.testing.assert_close(w, weight[index], rtol=1e-12, atol=0)
    assert ks(place - index, stats.uniform.cdf) > KS_LEVEL
    zeros = losses.LossHistory(2, history=1)
    zeros.update(torch.arange(2), torch.zeros(2))
    assert torch.equal(zeros.probabilities, torch.full((2,), 0.5, dtype=F64))
    assert "in use" in repr(zeros)


def test_history_waits_for_ten():
    history = losses.LossHistory(3)
    for _ in range(9):
        history.update(torch.arange(3), torch.tensor([1.0, 2.0, 3.0]))
    history.update(torch.tensor([0, 1, 1, 1]), torch.tensor([1.0, 2.0, 2.0, 2.0]))
    assert torch.equal(history.probabilities, torch.full((3,), 1 / 3, dtype=F64))
    history.update(torch.tensor([2]), torch.tensor([3.0]))
    torch.testing.assert_close(
        history.probabilities, 0.999 * torch.tensor([1.0, 2, 3], dtype=F64) / 6 + 1e-3 / 3, rtol=1e-12, atol=0
    )
