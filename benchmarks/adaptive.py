"""Steps of one size a sample against torchdiffeq and torchode: `python -m benchmarks.adaptive [--compiled]`.

Three problems, 256 samples, float64: Van der Pol with mu uniform on [0, 20], Lotka-Volterra, and the probability flow
of a mixture in the plane under VP. Errors are a sample's root mean square at the end, against scipy's DOP853 at 1e-12.
"Times faster" is at equal error: our time is interpolated, log against log, at the peer's median and at its maximum
error, and the smaller ratio counts. torchode is not a dependency: `pip install --no-deps torchode torchtyping
'typeguard<3'` brings it in, without it its rows are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import sdeflow as sf
from benchmarks.timing import by_turns, show
from sdeflow.sde import Problem
from sdeflow.solvers import DOP853, Solver, Tsit5

BATCH = 256
OURS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
THEIRS = (1e-3, 1e-5, 1e-7)


class VanDerPol(sf.ODE):
    """x'' = mu (1 - x^2) x' - x, one mu a sample."""

    t0, t1 = 0.0, 20.0
    per_sample = ("mu",)

    def __init__(self, mu: Tensor) -> None:
        self.mu = mu

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = x[:, 0], x[:, 1]
        return torch.stack([b, self.mu * (1 - a * a) * b - a], 1)


class LotkaVolterra(sf.ODE):
    """a' = 1.5 a - a b, b' = a b - 3 b."""

    t0, t1 = 0.0, 10.0

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = x[:, 0], x[:, 1]
        both = a * b
        return torch.stack([1.5 * a - both, both - 3 * b], 1)


@dataclass
class Result:
    """End states and evaluations of one sample, mean and maximum."""

    x: Tensor
    mean: float
    most: int


def cases() -> dict[str, tuple[Problem, Tensor]]:
    """The problems with their start states."""
    draw = torch.Generator().manual_seed(1)
    mu = 20 * torch.rand(BATCH, dtype=torch.float64, generator=draw)
    vp = sf.VP()
    noise = torch.randn(BATCH, 2, dtype=torch.float64, generator=draw)
    return {
        "Van der Pol": (VanDerPol(mu), torch.tensor([[2.0, 0.0]], dtype=torch.float64).repeat(BATCH, 1)),
        "Lotka-Volterra": (LotkaVolterra(), 0.5 + 2 * torch.rand(BATCH, 2, dtype=torch.float64, generator=draw)),
        "flow of a mixture": (vp.probability_flow(sf.problems.EightGaussians().model(vp)), noise),
    }


def reference(problem: Problem, x: Tensor) -> Tensor:
    """All samples as one system by scipy's DOP853 at 1e-12, which holds the root mean square over all of them."""

    def rhs(t: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y).reshape(x.shape)
        return problem.drift(state, torch.full((BATCH, 1), t, dtype=torch.float64)).numpy().ravel()

    run = solve_ivp(rhs, problem.span, x.numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-12)
    return torch.from_numpy(run.y[:, -1].copy()).reshape(x.shape)


def ours(problem: Problem, x: Tensor, solver: Solver, tol: float, compiled: bool) -> Result:
    """`sf.solve` as a user calls it."""
    solution = sf.solve(problem, x, solver, rtol=tol, compiled=compiled)
    nfe = torch.as_tensor(solution.stats.nfe)
    return Result(solution.x, float(nfe.double().mean()), int(nfe.max()))


def torchdiffeq(problem: Problem, x: Tensor, tol: float) -> Result:
    """torchdiffeq's dopri5: one step size for the batch; told to step to the end, past which the flow may not be."""
    from torchdiffeq import odeint

    calls = 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return problem.drift(y, t)

    ts = torch.tensor(problem.span, dtype=torch.float64)
    end = odeint(f, x, ts, rtol=tol, atol=tol, method="dopri5", options={"step_t": ts[1:]})[-1]
    return Result(end, calls, calls)


def torchode(problem: Problem, x: Tensor, tol: float, method: str) -> Result:
    """torchode, a step size a sample as well."""
    import torchode as to

    term = to.ODETerm(lambda t, y: problem.drift(y, t[:, None]))
    controller = to.IntegralController(atol=tol, rtol=tol, term=term)
    step = {"Dopri5": to.Dopri5, "Tsit5": to.Tsit5}[method](term=term)
    ends = torch.tensor(problem.span, dtype=torch.float64).expand(len(x), 2)
    run = to.AutoDiffAdjoint(step, controller).solve(to.InitialValueProblem(y0=x, t_eval=ends))
    nfe = run.stats["n_f_evals"]
    return Result(run.ys[:, -1], float(nfe.double().mean()), int(nfe.max()))


def peers() -> dict[str, Callable[[Problem, Tensor, float], Result]]:
    """Those that are installed."""
    found: dict[str, Callable[[Problem, Tensor, float], Result]] = {"torchdiffeq dopri5": torchdiffeq}
    try:
        import torchode as _  # noqa: F401
    except ImportError:
        print("torchode is not installed: its rows are left out")
        return found
    for method in ("Dopri5", "Tsit5"):
        found[f"torchode {method}"] = partial(torchode, method=method)
    return found


def errors(result: Result, want: Tensor) -> tuple[float, float]:
    """The median and the maximum over samples of the root mean square error."""
    each = (result.x - want).square().mean(1).sqrt()
    return float(each.median()), float(each.max())


def at_error(curve: list[tuple[float, float]], error: float) -> float:
    """Seconds at which a curve of (error, seconds) reaches `error`; its loosest run where none is as bad."""
    points = sorted(curve)
    if error < points[0][0]:
        return float("nan")
    logs = np.log(np.array(points))
    return float(np.exp(np.interp(np.log(error), logs[:, 0], logs[:, 1])))


def compare(name: str, problem: Problem, x: Tensor, compiled: bool, rounds: int) -> None:
    """The tables of one problem."""
    want = reference(problem, x)
    runs: dict[tuple[str, float], Callable[[], Result]] = {}
    solvers: dict[str, tuple[Solver, bool]] = {"Tsit5": (Tsit5(), False), "DOP853": (DOP853(), False)}
    if compiled:
        solvers["Tsit5, compiled"] = Tsit5(), True
        if not problem.models():  # the twelve stages of a flow take minutes to compile
            solvers["DOP853, compiled"] = DOP853(), True
    for label, (solver, fast) in solvers.items():
        for tol in OURS:
            runs[label, tol] = partial(ours, problem, x, solver, tol, fast)
    others = peers()
    for label, peer in others.items():
        for tol in THEIRS:
            runs[label, tol] = partial(peer, problem, x, tol)
    made = {key: run() for key, run in runs.items()}
    seconds = by_turns({f"{label}|{tol}": run for (label, tol), run in runs.items()}, rounds)
    time = {key: seconds[f"{key[0]}|{key[1]}"] for key in runs}
    found = {key: errors(result, want) for key, result in made.items()}
    rows = [
        [f"{key[0]}, {key[1]:.0e}", f"{made[key].mean:.0f}", str(made[key].most), f"{1e3 * time[key]:.1f}",
         *(f"{e:.1e}" for e in found[key])]
        for key in runs
    ]  # fmt: skip
    show(name, ["", "NFE, mean", "most", "ms", "median error", "maximum"], rows)
    rows = []
    for label in others:
        for tol in THEIRS:
            row: list[Any] = [f"{label}, {tol:.0e}"]
            for own in solvers:
                ratios = [
                    time[label, tol] / at_error([(found[own, t][i], time[own, t]) for t in OURS], found[label, tol][i])
                    for i in (0, 1)
                ]
                row.append(f"{min(ratios):.1f}")
            rows.append(row)
    show(f"{name}: times faster at equal error than", ["", *solvers], rows)


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="the compiled mode too (compiles for a minute)")
    parser.add_argument("--only", choices=list(cases()))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.no_grad():
        for name, (problem, x) in cases().items():
            if arguments.only in (None, name):
                compare(name, problem, x, arguments.compiled, arguments.rounds)


if __name__ == "__main__":
    main()
