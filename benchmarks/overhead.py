"""What the library adds to a model call: `python -m benchmarks.overhead [--threads N]`, ratios to a tight loop.

The limit is the loop that somebody would write by hand with all coefficients known: the same model calls, one in-place
update a step (`x.mul_(a).add_(e, alpha=b)`), and for stochastic methods `z.normal_()` and one more `add_`. Overhead is
(time - limit)/limit; "extra" is microseconds a call above the limit with a model that costs nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

import sdeflow as sf
from benchmarks.timing import by_turns, show
from sdeflow import solvers
from sdeflow.solvers import Solver

STEPS = 50
Net = Callable[[Tensor, Tensor], Tensor]


def mixture(components: int = 8, dtype: torch.dtype = torch.float32) -> Net:
    """The noise of a mixture of equal Gaussians on a circle, in the plane: softmax over the first dimension."""
    angle = torch.arange(components, dtype=dtype) * 2 * math.pi / components
    centres = 4 * torch.stack([angle.cos(), angle.sin()])  # (2, components)
    half = 0.5 * centres.square().sum(0)[:, None]

    def eps(x: Tensor, sigma: Tensor) -> Tensor:
        alpha = torch.sqrt(1 - sigma * sigma)
        variance = 0.04 * alpha * alpha + sigma * sigma
        logits = torch.addmm(half * (-alpha * alpha), (centres * alpha).T, x.T) / variance
        mean = torch.softmax(logits, 0).T @ (centres * alpha).T
        return (x - mean) * (sigma / variance)

    return eps


def mlp() -> tuple[Net, int]:
    """A perceptron on 64 components: about a millisecond at a batch of 512."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(64, 512), torch.nn.SiLU(), torch.nn.Linear(512, 512), torch.nn.SiLU(),
            torch.nn.Linear(512, 64),
        ).requires_grad_(False)  # fmt: skip
    return lambda x, sigma: net(x), 64


def limit(net: Net, x: Tensor, calls: int, noisy: bool) -> Callable[[], Tensor]:
    """The tight loop of `calls` model calls."""
    sigmas = [torch.tensor(1.0 - 0.9 * k / calls, dtype=torch.float64) for k in range(calls)]  # as the model is told
    a, b, c = 0.999, -0.01, 0.01

    def run() -> Tensor:
        with torch.inference_mode():
            y, z = x.clone(), torch.empty_like(x)
            for sigma in sigmas:
                e = net(y, sigma)
                y.mul_(a).add_(e, alpha=b)
                if noisy:
                    y.add_(z.normal_(), alpha=c)
        return y

    return run


def ours(net: Net, x: Tensor, solver: Solver, eta: float) -> Callable[[], sf.Solution]:
    """`sf.solve` as a user calls it."""
    process = sf.VP()
    model = sf.Model(net, process, "eps", time="sigma", expand=False)
    problem = process.reverse(model, eta)

    def run() -> sf.Solution:
        with torch.inference_mode():
            return sf.solve(problem, x, solver, steps=STEPS, seed=0, t_span=(1.0, 1e-3))

    return run


METHODS: list[tuple[str, Solver, float, str]] = [
    ("DDIM", solvers.DDIM(), 0.0, "first order"),
    ("Euler", solvers.Euler(), 0.0, "first order"),
    ("Heun", solvers.Heun(), 0.0, "first order"),
    ("EDMHeun", solvers.EDMHeun(), 0.0, "first order"),
    ("DPM++2M", solvers.DPMSolverPP(2), 0.0, "multistep"),
    ("DPM++3M", solvers.DPMSolverPP(3), 0.0, "multistep"),
    ("DEIS3", solvers.DEIS(3), 0.0, "multistep"),
    ("IPNDM4", solvers.IPNDM(4), 0.0, "multistep"),
    ("UniPC2", solvers.UniPC(2), 0.0, "multistep"),
    ("UniPC3", solvers.UniPC(3), 0.0, "multistep"),
    ("GaussianSplit3", solvers.GaussianSplit(3), 0.0, "multistep"),
    ("DDPM", solvers.DDPM(), 1.0, "stochastic"),
    ("EulerMaruyama", solvers.EulerMaruyama(), 1.0, "stochastic"),
    ("DPM++2M SDE", solvers.DPMSolverPP(2), 1.0, "stochastic"),
    ("SASolver", solvers.SASolver(), 0.0, "stochastic"),
]
"""(name, solver, eta, the class whose limit it is held to)."""


def measure(net: Net, x: Tensor, rounds: int) -> dict[str, tuple[float, float]]:
    """{name: (seconds a call, the limit's)}."""
    candidates: dict[str, Callable[[], object]] = {}
    calls: dict[str, int] = {}
    for name, solver, eta, kind in METHODS:
        calls[name] = int(ours(net, x, solver, eta)().stats.nfe)
        candidates[name] = ours(net, x, solver, eta)
        key = f"limit {calls[name]} {kind == 'stochastic'}"
        calls[key] = calls[name]
        candidates.setdefault(key, limit(net, x, calls[name], kind == "stochastic"))
    seconds = by_turns(candidates, rounds)
    return {
        name: (
            seconds[name] / calls[name],
            seconds[f"limit {calls[name]} {kind == 'stochastic'}"] / calls[name],
        )
        for name, _, _, kind in METHODS
    }


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=41)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(256, 2, generator=generator)
    net, size = mlp()
    wide = torch.randn(512, size, generator=generator)
    fixed = torch.randn(256, 2, generator=generator)
    cheap = measure(mixture(), plane, arguments.rounds)
    free = measure(lambda x, sigma: fixed, plane, arguments.rounds)
    heavy = measure(net, wide, max(3, arguments.rounds // 5))
    rows = []
    for name, _, _, kind in METHODS:
        (t, base), (f, f0), (h, h0) = cheap[name], free[name], heavy[name]
        rows.append([
            name, kind, f"{base * 1e6:.1f}", f"{t / base - 1:.2f}", f"{(f - f0) * 1e6:.1f}",
            f"{100 * (h / h0 - 1):.1f}",
        ])  # fmt: skip
    columns = ["method", "class", "limit us", "overhead", "extra us", "MLP %"]
    show("Overhead over the tight loop: mixture in the plane, batch 256, 50 steps, float32", columns, rows)


if __name__ == "__main__":
    main()
