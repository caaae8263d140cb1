"""Improved DDPM (Nichol and Dhariwal 2021, Improved denoising diffusion probabilistic models) on the digits.

As in the paper: 1000 betas of the cosine schedule, none above 0.999; a second output that interpolates the two
variances in the logarithm; L_simple + 0.001 L_vlb with no gradient of the bound into the mean; strided sampling with
that variance. The decoder counts 17 grey levels, which is what digits have. Shrunk: an MLP for the U-Net.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import judge
import report
import torch
from ddpm import entries
from torch import Tensor

import sdeflow as sf
from sdeflow import training
from sdeflow.data import digits


def cosine_betas(count: int = 1000, s: float = 0.008) -> Tensor:
    """Equation 17 of the paper, float64 (count,)."""
    angle = 0.5 * math.pi * (torch.arange(count + 1, dtype=torch.float64) / count + s) / (1 + s)
    squares = torch.cos(angle).square()
    return (1 - squares[1:] / squares[:-1]).clamp(max=0.999)


def two_heads(model: sf.Model) -> tuple[sf.Model, Callable[[Tensor, Tensor], Tensor]]:
    """The model, and its variance's v(x, t), which is that of the model's last call: one pass gives both."""
    kept: list[Tensor] = []

    def net(x: Tensor, lam: Tensor) -> Tensor:
        value, v = model.net.both(x, lam)  # type: ignore[attr-defined]
        kept[:] = [v]
        return value

    return sf.Model(net, model.sde, model.prediction, model.time), lambda x, t: kept[0]


def hybrid(model: sf.Model, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """L_simple + 0.001 L_vlb, (batch,)."""
    process = model.gaussian
    assert isinstance(process, sf.DiscreteVP)
    both, v = two_heads(model)
    return sf.losses.hybrid(both, x0, process.index_of_time(t).round().long(), eps, v, levels=17)


def train(steps: int = 4000, seed: int = 0) -> sf.Model:
    """A network of the noise and of its variance."""
    torch.manual_seed(seed)
    net = sf.nets.MLP((1, 8, 8), learned_variance=True)
    model = sf.Model(net, sf.DiscreteVP(cosine_betas()), prediction="eps", time="lam")
    return training.train(model, digits()[0], steps=steps, seed=seed, loss=hybrid, times=entries)[0]


def samples(model: sf.Model, num: int, seed: int = 0) -> report.Samples:
    """Images through all entries and through strides of them."""
    both, v = two_heads(model)
    clipped = sf.guidance.clip_x0(both)  # as their code does
    run = partial(sf.sample, clipped, num, shape=(1, 8, 8), grid=sf.grids.linspace, final="zero", seed=seed)
    return report.Samples(
        {
            "learned variance, 1000 steps": run(solver=sf.solvers.DDPM(v), steps=1000),
            "learned variance, 100 steps": run(solver=sf.solvers.DDPM(v), steps=100),
            "learned variance, 25 steps": run(solver=sf.solvers.DDPM(v), steps=25),
            "posterior variance, 25 steps": run(solver=sf.solvers.DDPM("posterior"), steps=25),
        }
    )


if __name__ == "__main__":
    report.show(samples(train(), judge.SIZE))
