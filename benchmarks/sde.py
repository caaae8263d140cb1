"""SDE stepping against a tight loop and torchsde: `python -m benchmarks.sde [--threads N]`, ratios in one run.

Geometric Brownian motion dX = 1.01 X dt + 0.87 X dW, 1000 samples of 10 components, float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

import sdeflow as sf
from benchmarks.timing import by_turns, show
from sdeflow.solvers import SRIW1, EulerMaruyama, Milstein, Solver

MU, NU = 1.01, 0.87
BATCH, SIZE = 1000, 10


class GBM(sf.SDE):
    """Geometric Brownian motion."""

    def drift(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return MU * x

    def diffusion(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return NU * x


def minimal(x: torch.Tensor, steps: int, milstein: bool = False) -> Callable[[], torch.Tensor]:
    """The tight loop with torch.randn that somebody would write by hand."""
    sde = GBM()
    h = 1 / steps
    times = [torch.tensor(k * h) for k in range(steps)]

    def run() -> torch.Tensor:
        y = x
        with torch.no_grad():
            for t in times:
                w = torch.randn(y.shape) * math.sqrt(h)
                g = sde.diffusion(y, t)
                y = y + h * sde.drift(y, t) + g * w
                if milstein:
                    y = y + 0.5 * NU * g * (w * w - h)
        return y

    return run


def ours(x: torch.Tensor, solver: Solver, steps: int) -> Callable[[], torch.Tensor]:
    """`sf.solve` as a user calls it."""
    sde = GBM()

    def run() -> torch.Tensor:
        with torch.no_grad():
            return sf.solve(sde, x, solver, steps=steps, seed=0).x

    return run


def torchsde_best(x: torch.Tensor, method: str, steps: int) -> Callable[[], torch.Tensor]:
    """torchsde at its best: 64 steps, its Brownian motion made for the step."""
    import torchsde

    class Module(torch.nn.Module):
        sde_type, noise_type = "ito", "diagonal"

        def f(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return MU * y

        def g(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return NU * y

    sde, ts = Module(), torch.tensor([0.0, 1.0])
    areas = "space-time" if method == "srk" else "none"

    def run() -> torch.Tensor:
        with torch.no_grad():
            bm = torchsde.BrownianInterval(0.0, 1.0, size=(BATCH, SIZE), dt=1 / steps, levy_area_approximation=areas)
            return torchsde.sdeint(sde, x, ts, bm=bm, method=method, dt=1 / steps)[-1]

    return run


class Free(sf.SDE):
    """The driving path itself."""

    def drift(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    def diffusion(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


def strong_error(x: torch.Tensor, solver: Solver, steps: int) -> float:
    """RMS error against the exact solution on the same path, float64."""
    y, noise = x.to(torch.float64), sf.SamePath(0)
    w = sf.solve(Free(), torch.zeros_like(y), EulerMaruyama(), steps=64, noise=noise).x
    return _rms(sf.solve(GBM(), y, solver, steps=steps, noise=noise).x, y, w)


def torchsde_error(x: torch.Tensor, method: str, steps: int) -> float:
    """The same for a method of torchsde, on its own path."""
    import torchsde

    y = x.to(torch.float64)
    areas = "space-time" if method == "srk" else "none"
    bm = torchsde.BrownianInterval(
        0.0, 1.0, size=(BATCH, SIZE), dtype=y.dtype, entropy=0, dt=1 / steps, levy_area_approximation=areas
    )
    ts = torch.tensor([0.0, 1.0], dtype=torch.float64)
    end = torchsde.sdeint(GBM(), y, ts, bm=bm, method=method, dt=1 / steps)[-1]
    w = bm(0.0, 1.0)
    return _rms(end, y, w[0] if isinstance(w, tuple) else w)


def _rms(end: torch.Tensor, start: torch.Tensor, w: torch.Tensor) -> float:
    exact = start * torch.exp((MU - 0.5 * NU**2) + NU * w)
    return float((end - exact).detach().square().mean().sqrt())


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x = torch.full((BATCH, SIZE), 0.5)

    candidates = {
        "loop, Euler-Maruyama, 100 steps": minimal(x, 100),
        "loop, Milstein with g', 100 steps": minimal(x, 100, milstein=True),
        "EulerMaruyama, 100 steps": ours(x, EulerMaruyama(), 100),
        "Milstein, 100 steps": ours(x, Milstein(), 100),
        "EulerMaruyama, 64 steps": ours(x, EulerMaruyama(), 64),
        "Milstein, 64 steps": ours(x, Milstein(), 64),
        "SRIW1, 64 steps": ours(x, SRIW1(), 64),
        "torchsde euler, 64 steps": torchsde_best(x, "euler", 64),
        "torchsde milstein, 64 steps": torchsde_best(x, "milstein", 64),
        "torchsde srk, 64 steps": torchsde_best(x, "srk", 64),
    }
    seconds = by_turns(candidates, arguments.rounds)
    per_step = {name: value / int(name.split()[-2]) * 1e6 for name, value in seconds.items()}
    base = per_step["loop, Euler-Maruyama, 100 steps"]
    rows = [[name, f"{value:.1f}", f"{value / base:.2f}"] for name, value in per_step.items()]
    show("Geometric Brownian motion, 1000 x 10, float32", ["method", "us a step", "x the loop"], rows)
    pairs = {"euler": "EulerMaruyama", "milstein": "Milstein", "srk": "SRIW1"}
    solvers: dict[str, tuple[Solver, float]] = {
        "EulerMaruyama": (EulerMaruyama(), 0.5), "Milstein": (Milstein(), 1.0), "SRIW1": (SRIW1(), 1.5),
    }  # fmt: skip
    rows = []
    for theirs, own in pairs.items():
        solver, order = solvers[own]
        errors = strong_error(x, solver, 64), torchsde_error(x, theirs, 64)
        ratio = per_step[f"torchsde {theirs}, 64 steps"] / per_step[f"{own}, 64 steps"]
        # steps go with error^(-1/order)
        at_equal = ratio * (errors[1] / errors[0]) ** (1 / order)
        row = [f"{own} against torchsde {theirs}", *(f"{e:.1e}" for e in errors), f"{ratio:.1f}", f"{at_equal:.1f}"]
        rows.append(row)
    columns = ["64 steps", "strong error", "torchsde's", "times faster", "at equal error"]
    show("Against torchsde", columns, rows)


if __name__ == "__main__":
    main()
