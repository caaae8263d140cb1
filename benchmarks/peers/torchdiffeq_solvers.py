"""torchdiffeq: fixed steps of its Runge-Kutta and Adams methods."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.peers.problem import Run, Sample, Sampling

CALLS = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}
NAMES = {"euler": "Euler", "midpoint": "midpoint", "heun2": "Heun", "rk4": "RK4"}


def steppers(p: Sampling) -> dict[str, Run]:
    """Equal steps of the autonomous ODE."""
    from torchdiffeq import odeint

    ts, sigma = torch.tensor([0.0, 1.0]), torch.tensor(0.5, dtype=torch.float64)

    def run(method: str) -> Tensor:
        with torch.inference_mode():
            options = {"step_size": 1 / p.steps}
            end: Tensor = odeint(lambda t, y: p.net(y, sigma), p.x, ts, method=method, options=options)[-1]
        return end

    return {
        NAMES[method]: Run(partial(run, method), calls * p.steps, "3/8 rule" if method == "rk4" else "")
        for method, calls in CALLS.items()
    }


def precise(p: Sampling) -> dict[str, Sample]:
    """The flow as dz/d rho = eps with z = x/alpha, its shortest form."""
    from torchdiffeq import odeint

    def f(rho: Tensor, z: Tensor) -> Tensor:
        alpha = torch.rsqrt(1 + rho * rho)
        return p.net(z * alpha, rho * alpha)

    found = {}
    for grid in ("trailing", "logsnr", "karras"):
        for method, calls in CALLS.items():
            if p.steps % calls:
                continue
            rho = Sampling(p.net, p.x, p.steps // calls).rhos(grid) if _fits(p.steps // calls, grid) else None
            if rho is None:
                continue

            def run(method: str = method, rho: Tensor = rho) -> Tensor:
                with torch.no_grad():
                    z = p.x * torch.sqrt(1 + rho[0] ** 2)
                    end: Tensor = odeint(f, z, rho, method=method)[-1] / torch.sqrt(1 + rho[-1] ** 2)
                return end

            found[f"{method} {grid}"] = Sample(run, p.steps)
    return found


def _fits(steps: int, grid: str) -> bool:
    return grid != "trailing" or 1000 % steps == 0
