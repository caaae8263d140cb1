"""Samples of a model: the prior, the reversal and the solver in one call."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE
from sdeflow.model import Model
from sdeflow.plan import Plan
from sdeflow.recommendation import recommend
from sdeflow.reverse import Eta
from sdeflow.solution import Solution
from sdeflow.solve import solve
from sdeflow.solve_input import Grid, Save
from sdeflow.solvers.base import Solver
from sdeflow.solvers.gaussian_split import GaussianSplit


@checked
def sample(
    model: Model,
    num: int,
    *,
    shape: tuple[int, ...],
    solver: Solver | Literal["auto"] = "auto",
    steps: int | None = None,
    eta: Eta = 0.0,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    t_span: tuple[float, float] | None = None,
    seed: int = 0,
    index: int | Tensor | None = None,
    final: Literal["stay", "denoise", "zero"] = "stay",
    save: Save = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    throw: bool = True,
    compiled: bool = False,
) -> Solution:
    """`num` samples (num, *shape) of `model`: `solve` on `sde.reverse(model, eta)` from the prior.

    Sample i depends on (seed, index of i) alone, not on `num` or on the others. Records no gradients.

    Args:
        model: a `Model` of a GaussianSDE.
        num: number of samples.
        shape: of one sample.
        solver: as in `solve`; "auto" is what `recommend` gives for `steps` model calls (eta 0 or 1), with its grid
            unless one is given, or for a tolerance `GaussianSplit`.
        steps, grid, rtol, atol, t_span, save, progress, throw, compiled: as in `solve`.
        eta: stochasticity of the reversal: 0 the flow, 1 the reverse SDE.
        seed: of the prior and the noise.
        index: the samples' indices: an offset, or one a sample, int64 (num,).
        final: what happens at the end. "stay" returns x at the process's t_min; "denoise" replaces it
            by the posterior mean E[x_0 | x], one more model call; "zero" runs the grid down to t0 (for
            exponential solvers, whose last step to sigma = 0 is exact in data prediction).
        dtype, device: of the samples; those of the network's parameters unless given, else float32 on the CPU.

    Raises:
        ValueError, TypeError, SolveError: as `solve`.
    """
    if not isinstance(model, Model):
        raise TypeError(f"expected a Model, got {type(model).__name__}; wrap the network: sf.Model(net, sde, ...)")
    num = int(num)
    if num < 1:
        raise ValueError(f"expected num >= 1 samples, got {num}")
    if final not in ("stay", "denoise", "zero"):
        raise ValueError(f'expected final "stay", "denoise" or "zero", got {final!r}')
    process = model.gaussian
    if isinstance(solver, str):
        solver, grid = _automatic(solver, process, steps, eta, grid, rtol is not None or atol is not None)
    if final == "zero":
        if t_span is not None or (grid is not None and not callable(grid)):
            raise ValueError('final="zero" ends the grid at t0 itself: give no t_span or grid of times')
        t_span = (process.t1, process.t0)
    like = parameter_of(model)
    dtype = dtype or (like.dtype if like is not None else torch.float32)
    device = device or (like.device if like is not None else "cpu")
    with torch.no_grad():
        x = process.prior_sample((num, *shape), seed, index=index, dtype=dtype, device=device)
        solution = solve(
            process.reverse(model, eta), x, solver, steps=steps, grid=grid, rtol=rtol, atol=atol,
            t_span=t_span, seed=seed, index=index, save=save, progress=progress, throw=throw,
            compiled=compiled,
        )  # fmt: skip
        if final == "denoise":
            end = _end_time(process.t_min, solver.grid if isinstance(solver, Plan) else grid, t_span)
            before = model.nfe
            x = model.x0(solution.x, end)
            solution = _with_call(solution, x, model.nfe - before)
    return solution


def _automatic(
    name: str, process: GaussianSDE, steps: int | None, eta: Eta, grid: Grid | None, to_tolerance: bool
) -> tuple[Solver, Grid | None]:
    if name != "auto":
        raise TypeError(f'expected a solver such as sf.solvers.DPMSolverPP(2), or "auto", got {name!r}')
    if to_tolerance:
        return GaussianSplit(3), grid
    if callable(eta) or eta not in (0, 1):
        raise ValueError(f'solver="auto" knows the flow and the reverse SDE: expected eta 0 or 1, got {eta!r}')
    if steps is None:
        raise ValueError('solver="auto" expects steps, the model calls to spend, or rtol')
    choice = recommend(process, nfe=steps, stochastic=eta == 1)
    return choice.solver, choice.grid if grid is None else grid


def parameter_of(model: Model) -> Tensor | None:
    """A parameter of the model's network, whose dtype and device samples take; None where there is none."""
    net = model.net
    return next(net.parameters(), None) if isinstance(net, torch.nn.Module) else None


def _end_time(t_min: float, grid: Grid | None, t_span: tuple[float, float] | None) -> float:
    if grid is not None and not callable(grid):
        return float(grid[-1])
    return t_min if t_span is None else float(t_span[1])


def _with_call(solution: Solution, x: Tensor, network_calls: int) -> Solution:
    stats = solution.stats
    stats = dataclasses.replace(
        stats, nfe=stats.nfe + 1, calls=stats.calls + 1, network_calls=stats.network_calls + network_calls
    )
    return dataclasses.replace(solution, x=x, stats=stats)
