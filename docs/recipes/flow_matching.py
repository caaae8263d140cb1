"""Flow matching (Lipman et al. 2023, Flow matching for generative modeling; Liu et al. 2023, Rectified flow) on digits.

As in the papers: straight paths from noise to data, regression on their velocity, and an ordinary differential equation
to sample, by Euler, Heun and RK45 to 1e-5. Times are logit-normal (Esser et al. 2024, Scaling rectified flow
transformers, section 3.1), which came later. Shrunk: an MLP for the U-Net. The clock here runs from data to noise.
"""

from __future__ import annotations

from functools import partial

import judge
import report

import sdeflow as sf
from sdeflow import training
from sdeflow.data import digits


def train(steps: int = 5000, seed: int = 0) -> sf.Model:
    """A network of the velocity."""
    net = training.untrained((1, 8, 8), seed=seed).net
    model = sf.Model(net, sf.RectifiedFlow(), prediction="velocity", time="lam")
    loss, times = sf.losses.flow_matching, sf.losses.logit_normal_times
    return training.train(model, digits()[0], steps=steps, seed=seed, loss=loss, times=times)[0]


def samples(model: sf.Model, num: int, seed: int = 0) -> report.Samples:
    """Images of one flow by three methods."""
    run = partial(sf.sample, model, num, shape=(1, 8, 8), seed=seed)
    return report.Samples(
        {
            "Euler, 20 steps": run(solver=sf.solvers.Euler(), grid=sf.grids.uniform, steps=20),
            "Euler, 100 steps": run(solver=sf.solvers.Euler(), grid=sf.grids.uniform, steps=100),
            "Heun, 25 steps": run(solver=sf.solvers.Heun(), grid=sf.grids.uniform, steps=25),
            "RK45 to 1e-5": run(solver=sf.solvers.RK45(), rtol=1e-5, atol=1e-5),
        }
    )


if __name__ == "__main__":
    report.show(samples(train(), judge.SIZE))
