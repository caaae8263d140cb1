"""Consistency models (Song et al. 2023, Consistency models) on the digits, distilled and trained; 1, 2 and 4 steps.

Distillation as in the paper, with a second-order step of the teacher's flow. Training as in its successor (Song and
Dhariwal 2024, Improved techniques for training consistency models): no average on the side of the target, the
pseudo-Huber distance over the step's length, and grids that get finer. Both start from the network that ships with the
package, a v-prediction under VP, so that f(x, t) = x at t = 0 by itself; as a start of training that is the shortcut of
Geng et al. 2025, Consistency models made easy, and not the paper's. Shrunk: a few minutes on one core for both.
"""

from __future__ import annotations

import judge
import report
from torch import Tensor

import sdeflow as sf
from sdeflow import losses, training
from sdeflow.data import digits

HUBER = 0.03
"""c of the pseudo-Huber distance, a root mean square of pixels."""


def grid(steps: int) -> Tensor:
    """Equal steps of the angle atan(sigma/alpha), down to sigma = 0."""
    vp = sf.VP()
    return sf.grids.cosine(vp, steps, vp.t1, vp.t0)


def fit(model: sf.Model, nodes: Tensor, teacher: sf.Model | None, steps: int, seed: int) -> sf.Model:
    """`model` after `steps` updates on one grid."""
    loss = losses.consistency(nodes, teacher=teacher, order=1 if teacher is None else 2, huber=HUBER, gap="angle")
    times = losses.grid_times(nodes)
    return training.train(model, digits()[0], steps=steps, seed=seed, lr=5e-4, loss=loss, times=times)[0]


def train(steps: int = 2500, seed: int = 0) -> dict[str, sf.Model]:
    """The models "distilled" and "trained", after `steps` updates each."""
    diffusion = sf.load_model("digits")
    distilled = fit(diffusion, grid(16), diffusion, steps, seed)
    trained = diffusion
    for count in (8, 16):
        trained = fit(trained, grid(count), None, (steps + 1) // 2, seed + count)
    return {"distilled": distilled, "trained": trained}


def samples(model: dict[str, sf.Model], num: int, seed: int = 0) -> report.Samples:
    """Images of both in 1, 2 and 4 steps, and of the diffusion model by the same sampler, which is not made for it."""

    def run(model: sf.Model, steps: int) -> sf.Solution:
        solver = sf.solvers.ConsistencySampler()
        return sf.sample(model, num, shape=(1, 8, 8), solver=solver, grid=grid(steps), seed=seed)

    models = {f"consistency {name}": own for name, own in model.items()} | {"diffusion": sf.load_model("digits")}
    return report.Samples(
        {
            f"{name}, {steps} step{'s' * (steps > 1)}": run(own, steps)
            for name, own in models.items()
            for steps in (1, 2, 4)
        }
    )


if __name__ == "__main__":
    report.show(samples(train(), judge.SIZE))
