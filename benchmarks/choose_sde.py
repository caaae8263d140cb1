"""The experiments of docs/choose.md on equations with noise: strong errors by kind of noise, and stiff drifts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

import sdeflow as sf
from sdeflow.solvers.catalogue import CATALOGUE

STEPS = {"additive": (16, 64, 256), "diagonal": (16, 64, 256), "commutative": (16, 64, 256), "general": (4, 16, 64)}
FINE = {"additive": 4096, "diagonal": 4096, "commutative": 4096, "general": 256}
"""Steps, and those of the fine solve; areas cost steps^2 normals."""


class Additive(sf.SDE):
    """dX = (sin 2X - X) dt + (1/2 + t/4) dW."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x) - x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return (0.5 + 0.25 * t) * torch.ones_like(x)


class Diagonal(sf.SDE):
    """dX = (sin 2X - X) dt + 1/2 sqrt(1 + X^2) dW."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(2 * x) - x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * torch.sqrt(1 + x**2)


class Commutative(sf.SDE):
    """Two correlated geometric motions: G = diag(X) B."""

    noise = "general"

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x * (1 - 0.2 * x)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return x.unsqueeze(-1) * torch.tensor([[0.4, 0.2], [-0.1, 0.5]], dtype=x.dtype)


class General(sf.SDE):
    """dX = -X dt + G dW with columns (1, X_1)/2 and (X_2, 1)/2, which do not commute."""

    noise = "general"

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return -x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        a, b, one = x[:, 0], x[:, 1], torch.ones_like(x[:, 0])
        return 0.5 * torch.stack([torch.stack([one, b], 1), torch.stack([a, one], 1)], 1)


Kind = Literal["additive", "diagonal", "commutative", "general"]
CASES: dict[str, tuple[sf.SDE, sf.solvers.Solver]] = {
    "additive": (Additive(), sf.solvers.SRA3()),
    "diagonal": (Diagonal(), sf.solvers.SRIW1()),
    "commutative": (Commutative(), sf.solvers.Milstein()),
    "general": (General(), sf.solvers.LevyMilstein()),
}
"""A problem for each kind, and the method of the fine solve that stands for its solution."""


def general_noise(kind: str) -> dict[str, Any]:
    """Root mean square error at t1 against the fine solve on the same path, of every method that takes the noise."""
    problem, fine = CASES[kind]
    x = torch.ones(256, 2, dtype=torch.float64)
    noise = sf.SamePath(0)
    exact = sf.solve(problem, x, fine, steps=FINE[kind], noise=noise).x
    rows = []
    for row in CATALOGUE:
        if row.view != "drift" or kind not in row.noise or "Langevin" in row.name or row.name == "AdaptiveSDE":
            continue
        errors = [sf.solve(problem, x, row.make(), steps=n, noise=noise).x - exact for n in STEPS[kind]]
        rows.append([row.name, *(float(e.square().mean().sqrt()) for e in errors)])
    return {"columns": [f"{n} steps" for n in STEPS[kind]], "rows": rows}


class VanDerPol(sf.ODE):
    """x'' = mu (1 - x^2) x' - x, mu = 200."""

    t0, t1 = 0.0, 100.0

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = x[:, 0], x[:, 1]
        return torch.stack([b, 200.0 * (1 - a * a) * b - a], 1)


class Pulled(sf.SDE):
    """dX = -300 (X - cos t) dt + 1/2 dW."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return -300.0 * (x - torch.cos(t))

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * torch.ones_like(x)


def stiff() -> dict[str, Any]:
    """An oscillator to a tolerance; a strongly pulled SDE in few steps.

    Errors: of the state at t1; of the deviation of 4000 samples, 1/2/sqrt(600) but for the lag, relative (2% of it is
    sampling).
    """
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    exact = sf.solve(VanDerPol(), x, sf.solvers.Scipy("Radau"), rtol=1e-9, atol=1e-9).x
    rows: list[list[Any]] = []
    for name in ("ROS34PW2", "BogackiShampine", "Tsit5"):
        y = sf.solve(VanDerPol(), x, sf.solvers.by_name(name).make(), rtol=1e-4, atol=1e-4, max_steps=10**6)
        rows.append(
            [name, "oscillator, rtol 1e-4", float((y.x - exact).abs().max()), float(torch.as_tensor(y.stats.nfe).max())]
        )
    start, want = torch.ones(4000, 1, dtype=torch.float64), 0.5 / 600**0.5
    for name in ("SKROCK(5)", "EulerMaruyama"):
        for steps in (32, 128, 512):
            y = sf.solve(Pulled(), start, sf.solvers.by_name(name).make(), steps=steps, seed=0, throw=False)
            deviation = float((y.x - y.x.mean()).square().mean().sqrt())
            calls = float(torch.as_tensor(y.stats.nfe).max())
            rows.append([name, f"SDE, {steps} steps", abs(deviation / want - 1), calls])
    return {"columns": ["problem", "error", "calls"], "rows": rows}
