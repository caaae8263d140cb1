"""torchsde: its methods at their best, as `benchmarks.sde` runs them."""

from __future__ import annotations

from torch import Tensor

from benchmarks.peers.problem import Run
from benchmarks.sde import torchsde_best


def sdes(x: Tensor, steps: int) -> dict[str, Run]:
    """Geometric Brownian motion."""
    import torchsde as _  # noqa: F401

    names = {"Euler-Maruyama": "euler", "Milstein": "milstein", "SRK, order 1.5": "srk"}
    return {name: Run(torchsde_best(x, method, steps), steps) for name, method in names.items()}
