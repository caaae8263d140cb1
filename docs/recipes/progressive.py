"""Progressive distillation (Salimans and Ho 2022, Progressive distillation for fast sampling) on the digits.

As in the paper: the teacher predicts v; each student starts from its teacher's weights, learns to do in one step of
DDIM what the teacher does in two, with the weight max(SNR, 1), and is the next one's teacher, on every second node of
its grid, which is equal steps of a cosine schedule. Shrunk: the first teacher is the network that ships with the
package, trained under VP, and has 32 steps, not 1024 or more; 1,000 updates a stage, not 50,000.
"""

from __future__ import annotations

import judge
import report
from torch import Tensor

import sdeflow as sf
from sdeflow import losses, training
from sdeflow.data import digits

STEPS = 32
"""Of the first teacher."""


def grid(steps: int) -> Tensor:
    """Equal steps of the angle atan(sigma/alpha) down to sigma = 0: every second node of the grid of twice as many."""
    vp = sf.VP()
    return sf.grids.cosine(vp, steps, vp.t1, vp.t0)


def train(steps: int = 1000, seed: int = 0) -> dict[str, sf.Model]:
    """The student for each number of sampling steps, "16" to "1", after `steps` updates a stage."""
    images, teacher = digits()[0], sf.load_model("digits")
    students, count = {}, STEPS
    while count > 1:
        loss, times = losses.progressive(teacher, grid(count)), losses.grid_times(grid(count)[::2])
        teacher, _ = training.train(teacher, images, steps=steps, seed=seed, lr=1e-3, loss=loss, times=times)
        count //= 2
        students[str(count)] = teacher
    return students


def samples(model: dict[str, sf.Model], num: int, seed: int = 0) -> report.Samples:
    """Images of every student, and of the first teacher in as few steps of the same sampler."""

    def run(model: sf.Model, steps: int) -> sf.Solution:
        return sf.sample(model, num, shape=(1, 8, 8), solver=sf.solvers.DDIM(), grid=grid(steps), seed=seed)

    counts, teacher = sorted(map(int, model)), sf.load_model("digits")
    return report.Samples(
        {f"progressive, {n} step{'s' * (n > 1)}": run(model[str(n)], n) for n in counts}
        | {f"teacher, {n} step{'s' * (n > 1)}": run(teacher, n) for n in [*counts, STEPS]}
    )


if __name__ == "__main__":
    report.show(samples(train(), judge.SIZE))
