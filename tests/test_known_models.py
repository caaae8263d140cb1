"""Data that are not on the line, modelled end to end: from a process's stationary or terminal law back to the data."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

import sdeflow as sf

F64 = torch.float64
DATA = torch.tensor([[0.3], [0.5], [1.4], [2.2]], dtype=F64)
PROCESSES = {
    "CIR from its stationary law": (sf.CIR(2.0, 1.0, 0.8, start=DATA, t1=3.0), True),
    "GBM from its terminal law": (sf.GBM(0.1, 0.6, start=DATA, t1=2.0), False),
    "sigmoid(OU) on (0, 1)": (sf.SigmoidOU(1.5, 1.0, start=DATA / 3, t1=3.0), True),
}
END, COUNT = 0.05, 800


def agrees(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Mean within 5 standard errors, and a two-sample Kolmogorov-Smirnov test that fails once in 10^5 (fixed seeds)."""
    error = math.sqrt(float(got.var()) / len(got) + float(want.var()) / len(want))
    near = abs(float(got.mean() - want.mean())) < 5 * error
    return near and stats.ks_2samp(got.flatten().numpy(), want.flatten().numpy()).pvalue > 1e-5


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["flow", "reverse SDE"])
def test_data_are_recovered(name, eta):
    """The reversal with the exact score, 200 steps, ends in the law of the noised data at t = 0.05."""
    process, stationary = PROCESSES[name]
    x = process.prior_sample((COUNT, 1), 0)
    reverse = process.reverse(process.model(), eta)
    solver = sf.solvers.Heun() if eta == 0 else sf.solvers.EulerMaruyama()
    grid = sf.grids.power(process, 60 if eta == 0 else 200, process.t1, END)
    with torch.no_grad():
        got = sf.solve(reverse, x, solver, grid=grid, seed=1).x
    low, high = process.domain
    assert bool(((got > low) & (got < high)).all())
    assert agrees(got, process.marginal_sample(40_000, END, 3))
    if stationary:  # the start knows nothing of the data
        assert not agrees(x, process.marginal_sample(40_000, END, 3))


@pytest.mark.parametrize("name", ["CIR from its stationary law", "GBM from its terminal law"])
def test_the_forward_process_is_the_kernel(name):
    """Simulated from the data by Euler-Maruyama, 400 steps: the law at t1 that the kernels give."""
    process, _ = PROCESSES[name]
    x = DATA.repeat(1000, 1)
    with torch.no_grad():
        end = process.simulate(x, steps=400, seed=2).x
    assert agrees(end, process.marginal_sample(40_000, process.t1, 4))


def test_a_dropped_divergence_is_seen_in_the_samples(monkeypatch):
    """The control: without div D the reversal of CIR ends elsewhere."""
    process, _ = PROCESSES["CIR from its stationary law"]
    monkeypatch.setattr(sf.reverse, "divergence", lambda sde, x, t: torch.zeros_like(x))
    grid = sf.grids.power(process, 200, process.t1, END)
    with torch.no_grad():
        reverse = process.reverse(process.model(), 1.0)
        got = sf.solve(reverse, process.prior_sample((COUNT, 1), 0), sf.solvers.EulerMaruyama(), grid=grid, seed=1).x
    assert not agrees(got, process.marginal_sample(40_000, END, 3))
