"""DDPM (Ho, Jain and Abbeel 2020, Denoising diffusion probabilistic models) on the digits.

As in the paper: 1000 betas, linear from 1e-4 to 0.02; the network predicts the noise; uniform entries of the table and
the simple loss; ancestral sampling through all entries with either variance. Shrunk: an MLP on 8 x 8 pixels for the
U-Net, told log(alpha/sigma) of the entry and not its number; AdamW on a cosine.
"""

from __future__ import annotations

from functools import partial

import judge
import report
import torch
from torch import Tensor

import sdeflow as sf
from sdeflow import training
from sdeflow.data import digits

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


def entries(process: sf.GaussianSDE, n: int) -> Tensor:
    """`n` times of the table, each uniform over its entries."""
    assert isinstance(process, sf.DiscreteVP)
    count = process.betas.numel()
    return (torch.randint(count, (n,)).to(torch.float64) + 1) / count


def train(steps: int = 8000, seed: int = 0) -> sf.Model:
    """A network of the noise."""
    net = training.untrained((1, 8, 8), seed=seed).net
    model = sf.Model(net, sf.DiscreteVP(BETAS), prediction="eps", time="lam")
    return training.train(model, digits()[0], steps=steps, seed=seed, times=entries)[0]


def samples(model: sf.Model, num: int, seed: int = 0) -> report.Samples:
    """Images by both variances, one call for each entry."""
    clipped = sf.guidance.clip_x0(model)  # as their code does
    run = partial(sf.sample, clipped, num, shape=(1, 8, 8), grid=sf.grids.linspace, steps=1000, final="zero", seed=seed)
    return report.Samples(
        {
            "DDPM, posterior variance": run(solver=sf.solvers.DDPM("posterior")),
            "DDPM, forward variance": run(solver=sf.solvers.DDPM("forward")),
        }
    )


if __name__ == "__main__":
    report.show(samples(train(), judge.SIZE))
