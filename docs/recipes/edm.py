"""EDM (Karras et al. 2022, Elucidating the design space of diffusion-based generative models) on the digits.

As in the paper: the preconditioned network, log-normal training levels with their mean and deviation, the weight that
goes with them; Heun's method on the grid of rho = 7 with a last Euler step to 0 (18 steps, 35 calls), and the
stochastic sampler of 256 steps with the constants of CIFAR-10. Shrunk: an MLP for the U-Net, no augmentation;
sigma_data is the digits' own, 0.75.
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

SIGMA_DATA = 0.75


def weighted(model: sf.Model, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The loss of the data prediction, over c_out^2, (batch,)."""
    return sf.losses.denoising(model, x0, t, eps, weight=sf.losses.weights.edm(SIGMA_DATA))


def train(steps: int = 6000, seed: int = 0) -> sf.Model:
    """A preconditioned network."""
    torch.manual_seed(seed)
    net = sf.nets.EDMPreconditioned(sf.nets.MLP((1, 8, 8)), SIGMA_DATA)
    model = sf.Model(net, sf.EDM(), prediction="x0", time="sigma")
    times = sf.losses.log_normal_times
    return training.train(model, digits()[0], steps=steps, seed=seed, loss=weighted, times=times)[0]


def samples(model: sf.Model, num: int, seed: int = 0) -> report.Samples:
    """Images by the deterministic and the stochastic sampler."""
    run = partial(sf.sample, model, num, shape=(1, 8, 8), grid=sf.grids.karras, final="zero", seed=seed)
    churn = sf.solvers.EDMHeun(s_churn=30, s_tmin=0.01, s_tmax=1, s_noise=1.007)
    return report.Samples(
        {
            "Heun, 18 steps": run(solver=sf.solvers.EDMHeun(), steps=18),
            "Heun with churn, 256 steps": run(solver=churn, steps=256),
        }
    )


if __name__ == "__main__":
    report.show(samples(train(), judge.SIZE))
