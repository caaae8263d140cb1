"""torchode: its steppers at a fixed step, a clock a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.problem import Run, Sampling


def steppers(p: Sampling) -> dict[str, Run]:
    """Equal steps of the autonomous ODE."""
    import torchode as to

    sigma = torch.tensor(0.5, dtype=torch.float64)
    batch = len(p.x)
    ts = torch.tensor([[0.0, 1.0]]).expand(batch, 2)
    dt = torch.full((batch,), 1 / p.steps)
    found = {}
    for name, method, calls in (("Euler", to.Euler, 1), ("Heun", to.Heun, 2)):
        term = to.ODETerm(lambda t, y: p.net(y, sigma))
        made = to.AutoDiffAdjoint(method(term=term), to.FixedStepController())

        def run(solver: to.AutoDiffAdjoint = made) -> Tensor:
            with torch.inference_mode():
                end: Tensor = solver.solve(to.InitialValueProblem(y0=p.x, t_eval=ts), dt0=dt).ys[:, -1]
            return end

        found[name] = Run(run, calls * p.steps, "a clock a sample")
    return found
