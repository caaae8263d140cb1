"""NCSN (Song and Ermon 2019, Generative modeling by estimating gradients of the data distribution) on the digits.

As in the paper: ten levels in geometric progression, and one network told the level; score matching weighted by
sigma^2; annealed Langevin dynamics of 100 steps a level, with the paper's ratio of step to level. Levels run from 2.4
to 0.02: the paper's, 1 to 0.01 for pixels in [0, 1], are 2 to 0.02 for pixels in [-1, 1]. Sampling begins at noise one
level above the ten, not from uniform pixels. Shrunk: an MLP for the RefineNet, inside the scaling of EDM, through which
it sees all levels alike; the loss is that of the score that follows.
"""

from __future__ import annotations

import judge
import report
import torch
from torch import Tensor

import sdeflow as sf
from sdeflow import training
from sdeflow.data import digits

LEVELS = 10
PROCESS = sf.VE(0.02, 4.0)


def level_times(process: sf.GaussianSDE, n: int) -> Tensor:
    """`n` times, each uniform over the levels."""
    grid = sf.grids.exponential(process, LEVELS, process.t1, process.t0)
    return grid[1:][torch.randint(LEVELS, (n,))]


def score_matching(model: sf.Model, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """sigma^2 |s(x, sigma) + eps/sigma|^2, (batch,)."""
    return sf.losses.denoising(model, x0, t, eps, "score", weight=sf.losses.weights.noise_variance())


def train(steps: int = 4000, seed: int = 0) -> sf.Model:
    """A network whose score is matched at the levels."""
    torch.manual_seed(seed)
    net = sf.nets.EDMPreconditioned(sf.nets.MLP((1, 8, 8)), sigma_data=0.75)
    model = sf.Model(net, PROCESS, prediction="x0", time="sigma")
    return training.train(model, digits()[0], steps=steps, seed=seed, loss=score_matching, times=level_times)[0]


def samples(model: sf.Model, num: int, seed: int = 0) -> report.Samples:
    """Images by annealed Langevin dynamics, 100 steps at each of the levels."""
    process = model.gaussian
    grid = sf.grids.exponential(process, LEVELS, process.t1, process.t0)
    solver = sf.solvers.AnnealedLangevin(steps=100, step_size=2e-5 * 2**2)
    run = sf.sample(model, num, shape=(1, 8, 8), solver=solver, grid=grid, seed=seed)
    return report.Samples({"annealed Langevin": run})


if __name__ == "__main__":
    report.show(samples(train(), judge.SIZE))
