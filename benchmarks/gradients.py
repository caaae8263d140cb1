"""Gradients through a solve, against a hand-written loop: `python -m benchmarks.gradients [--rounds N]`.

800 steps through a neural drift (MLP 32-128-128-32, batch 256, float32, 1 thread): seconds and peak memory of one
forward and backward pass, each in a fresh process, the candidates by turns, medians over the rounds. Memory is the
largest resident set above that before the pass. The ODE is stepped by RK4, the SDE (diagonal noise, Stratonovich) by
the reversible Heun method.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sdeflow as sf
from benchmarks.timing import show
from sdeflow.gradients import Gradient

STEPS, BATCH, SIZE, WIDTH = 800, 256, 32, 128
Pass = Callable[[int], Tensor]
"""`run(steps)`: the end of a solve, recorded."""


class Neural(torch.nn.Module):
    """The drift and the diffusion, as torchdiffeq (`forward`) and torchsde (`f`, `g`) call them."""

    noise_type, sde_type = "diagonal", "stratonovich"

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(SIZE, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh(),
            torch.nn.Linear(WIDTH, SIZE),
        )  # fmt: skip

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        value: Tensor = self.net(x)
        return value

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        return self.forward(t, x)

    def g(self, t: Tensor, x: Tensor) -> Tensor:
        return 0.2 + 0.1 * torch.sin(x)


class Flow(sf.ODE):
    """dx = net(x) dt."""

    def __init__(self, neural: Neural) -> None:
        self.neural = neural

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.neural.f(t, x)


class Noisy(sf.SDE):
    """dX = net(X) dt + (0.2 + 0.1 sin X) o dW."""

    interpretation = "stratonovich"

    def __init__(self, neural: Neural) -> None:
        self.neural = neural

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.neural.f(t, x)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.neural.g(t, x)


def rk4_loop(neural: Neural, x: Tensor, steps: int) -> Tensor:
    """The loop that somebody would write by hand."""
    h = 1 / steps
    times = torch.linspace(0, 1, 2 * steps + 1)
    for i in range(steps):
        t, half, end = times[2 * i], times[2 * i + 1], times[2 * i + 2]
        k1 = neural(t, x)
        k2 = neural(half, x + 0.5 * h * k1)
        k3 = neural(half, x + 0.5 * h * k2)
        k4 = neural(end, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def heun_loop(neural: Neural, y: Tensor, steps: int) -> Tensor:
    """The reversible Heun method by hand, with torch.randn."""
    h = 1 / steps
    times, root = torch.linspace(0, 1, steps + 1), h**0.5
    z, f, g = y, neural.f(times[0], y), neural.g(times[0], y)
    for i in range(steps):
        w = root * torch.randn_like(y)
        before = h * f + g * w
        z = 2 * y - z + before
        f, g = neural.f(times[i + 1], z), neural.g(times[i + 1], z)
        y = y + 0.5 * (before + h * f + g * w)
    return y


def ours(problem: sf.ODE | sf.SDE, x: Tensor, gradient: Gradient) -> Pass:
    """`sf.solve` as a user calls it."""
    solver = sf.solvers.RK4() if isinstance(problem, sf.ODE) else sf.solvers.ReversibleHeun()
    return lambda steps: sf.solve(problem, x, solver, steps=steps, seed=0, gradient=gradient).x


def torchdiffeq_pass(neural: Neural, x: Tensor, adjoint: bool) -> Pass:
    """RK4 of torchdiffeq; its "rk4" is the 3/8 rule, of the same cost."""
    import torchdiffeq

    solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    ts = torch.tensor([0.0, 1.0])

    def run(steps: int) -> Tensor:
        end: Tensor = solve(neural, x, ts, method="rk4", options={"step_size": 1 / steps})[-1]
        return end

    return run


def torchsde_pass(neural: Neural, x: Tensor, adjoint: bool) -> Pass:
    """Reversible Heun of torchsde, its Brownian motion made for the step."""
    import torchsde

    ts = torch.tensor([0.0, 1.0])
    options = {"adjoint_method": "adjoint_reversible_heun"} if adjoint else {}
    solve = torchsde.sdeint_adjoint if adjoint else torchsde.sdeint

    def run(steps: int) -> Tensor:
        bm = torchsde.BrownianInterval(0.0, 1.0, size=(BATCH, SIZE), dt=1 / steps)
        end: Tensor = solve(neural, x, ts, bm=bm, dt=1 / steps, method="reversible_heun", **options)[-1]
        return end

    return run


CANDIDATES: dict[str, Callable[[Neural, Tensor], Pass]] = {
    "ODE, loop": lambda n, x: lambda steps: rk4_loop(n, x, steps),
    "ODE, direct": lambda n, x: ours(Flow(n), x, "direct"),
    "ODE, checkpointed": lambda n, x: ours(Flow(n), x, "checkpointed"),
    "ODE, adjoint": lambda n, x: ours(Flow(n), x, "adjoint"),
    "ODE, torchdiffeq": lambda n, x: torchdiffeq_pass(n, x, adjoint=False),
    "ODE, torchdiffeq adjoint": lambda n, x: torchdiffeq_pass(n, x, adjoint=True),
    "SDE, loop": lambda n, x: lambda steps: heun_loop(n, x, steps),
    "SDE, direct": lambda n, x: ours(Noisy(n), x, "direct"),
    "SDE, checkpointed": lambda n, x: ours(Noisy(n), x, "checkpointed"),
    "SDE, adjoint": lambda n, x: ours(Noisy(n), x, "adjoint"),
    "SDE, torchsde": lambda n, x: torchsde_pass(n, x, adjoint=False),
    "SDE, torchsde adjoint": lambda n, x: torchsde_pass(n, x, adjoint=True),
}
_NEEDS = {"torchdiffeq": "torchdiffeq", "torchsde": "torchsde"}


def measure(name: str, steps: int) -> dict[str, float]:
    """Seconds and the growth of the peak resident set, in MB, of one pass, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    neural = Neural()
    x = torch.randn(BATCH, SIZE).requires_grad_()
    run = CANDIDATES[name](neural, x)
    run(10).square().mean().backward()  # warms up
    neural.zero_grad()
    x.grad = None
    before = _peak()
    start = time.process_time()
    run(steps).square().mean().backward()
    seconds = time.process_time() - start
    return {"seconds": seconds, "MB": (_peak() - before) / 1024}


def _peak() -> int:
    """The largest resident set so far, in kB; getrusage's is at least that of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_fresh_process(name: str, steps: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gradients", "--one", name, "--steps", str(steps)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def installed(name: str) -> bool:
    """Whether the library of a candidate is there."""
    from importlib.util import find_spec

    return all(find_spec(module) is not None for word, module in _NEEDS.items() if word in name)


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--one", choices=CANDIDATES, help="measure one candidate in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.steps)))
        return
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CANDIDATES if installed(name)}
    for _ in range(arguments.rounds):
        for name, results in found.items():
            results.append(in_fresh_process(name, arguments.steps))
    medians = {
        name: [statistics.median(r[what] for r in results) for what in ("seconds", "MB")]
        for name, results in found.items()
    }
    rows = []
    for name, (seconds, memory) in medians.items():
        base = medians[name[:3] + ", loop"]
        rows.append([name, f"{seconds:.2f}", f"{seconds / base[0]:.2f}", f"{memory:.1f}", f"{memory / base[1]:.3f}"])
    title = f"{arguments.steps} steps of RK4 (ODE) and reversible Heun (SDE), forward and backward"
    show(title, ["candidate", "seconds", "x the loop", "peak MB", "x the loop's"], rows)


if __name__ == "__main__":
    main()
