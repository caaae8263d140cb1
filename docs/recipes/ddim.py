"""DDIM (Song, Meng and Ermon 2021, Denoising diffusion implicit models) on the digits.

As in the paper: no training of its own but the network of DDPM; equal strides through the table, the last to the data;
eta = 0, and eta = 1 with the noise of DDPM. Shrunk: as `ddpm.py`.
"""

from __future__ import annotations

from functools import partial

import judge
import report
from ddpm import train

import sdeflow as sf

__all__ = ["samples", "train"]


def samples(model: sf.Model, num: int, seed: int = 0) -> report.Samples:
    """Images of one network at three costs."""
    run = partial(sf.sample, model, num, shape=(1, 8, 8), grid=sf.grids.linspace, final="zero", seed=seed)
    return report.Samples(
        {
            "DDIM, 20 steps": run(solver=sf.solvers.DDIM(), steps=20),
            "DDIM, 100 steps": run(solver=sf.solvers.DDIM(), steps=100),
            "DDIM, eta = 1, 20 steps": run(solver=sf.solvers.DDIM(eta=1.0), steps=20),
        }
    )


if __name__ == "__main__":
    report.show(samples(train(), judge.SIZE))
