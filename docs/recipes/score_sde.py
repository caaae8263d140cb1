"""Score SDE (Song et al. 2021, Score-based generative modeling through stochastic differential equations) on digits.

As in the paper: one continuous objective for the VP, sub-VP and VE process, score matching weighted by the kernel's
variance with times uniform; sampling by predictor and corrector (reverse diffusion, then one Langevin step of ratio
0.16), denoised at the end, and by the probability flow with RK45 to 1e-5. Shrunk: an MLP for the U-Nets, 500 levels for
1000; VE's largest level is the largest distance of two digits, as for their data; in VE the MLP is scaled as in EDM.
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

PROCESSES: dict[str, sf.GaussianSDE] = {"VP": sf.VP(), "sub-VP": sf.SubVP(), "VE": sf.VE(0.01, 10.0)}


def score_matching(model: sf.Model, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """sigma^2 |s(x_t, t) + eps/sigma|^2, (batch,)."""
    return sf.losses.denoising(model, x0, t, eps, "score", weight=sf.losses.weights.noise_variance())


def train_one(process: sf.GaussianSDE, steps: int, seed: int) -> sf.Model:
    """A network of the score of one process."""
    torch.manual_seed(seed)
    net = sf.nets.MLP((1, 8, 8))
    if isinstance(process, sf.VE):
        model = sf.Model(sf.nets.EDMPreconditioned(net, sigma_data=0.75), process, prediction="x0", time="sigma")
    else:
        model = sf.Model(net, process, prediction="eps", time="lam")
    times = sf.losses.uniform_times
    return training.train(model, digits()[0], steps=steps, seed=seed, loss=score_matching, times=times)[0]


def train(steps: int = 3000, seed: int = 0) -> dict[str, sf.Model]:
    """A network for each process."""
    return {name: train_one(process, steps, seed) for name, process in PROCESSES.items()}


def samples(models: dict[str, sf.Model], num: int, seed: int = 0) -> report.Samples:
    """Images of each process by both samplers."""
    corrected = sf.solvers.PredictorCorrector(sf.solvers.ReverseDiffusion(), sf.solvers.Langevin(snr=0.16))
    runs = {}
    for name, model in models.items():
        run = partial(sf.sample, model, num, shape=(1, 8, 8), seed=seed)
        runs[f"{name}, predictor-corrector"] = run(
            solver=corrected, eta=1.0, grid=sf.grids.uniform, steps=500, final="denoise"
        )
        runs[f"{name}, probability flow"] = run(solver=sf.solvers.RK45(), rtol=1e-5, atol=1e-5)
    return report.Samples(runs)


if __name__ == "__main__":
    report.show(samples(train(), judge.SIZE))
