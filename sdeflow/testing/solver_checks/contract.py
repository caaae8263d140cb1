"""The contract with `solve`: replay, batch, dtype, input, cost, gradient. No known solution is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sdeflow.solution import Status
from sdeflow.solvers.base import Solver
from sdeflow.testing.report import Finding
from sdeflow.testing.solver_checks.claims import Claims
from sdeflow.testing.solver_checks.residuals import different, relative_gap
from sdeflow.testing.solver_checks.setups import Setup
from sdeflow.testing.worst import Worst

F64 = torch.float64


def contract_findings(solver: Solver, setups: Sequence[Setup], claims: Claims, seed: int) -> list[Finding]:
    """Identities that need no known solution; each on every problem that the solver takes."""
    reported, each, kept, single, half = (Worst() for _ in range(5))
    replay, other, split, bad, untouched, slope = (Worst() for _ in range(6))
    for setup in setups:
        x, rows = setup.x, torch.arange(len(setup.x))
        place = {"problem": setup.label}
        before, given = setup.calls(), x.clone()
        first = setup.run(solver, seed=seed)
        seen, steps = setup.calls(), setup.grid.numel() - 1
        nfe = int(torch.as_tensor(first.stats.nfe).max())
        if seen is not None and before is not None:
            reported.add(abs(nfe - (seen - before)), reported=nfe, seen=seen - before, **place)
            nfe = seen - before
        if claims.calls is not None:
            want = steps * claims.calls + claims.start_calls
            each.add(abs(nfe - want), calls=nfe, declared=want, steps=steps, **place)
        untouched.add(different(x, given), **place)

        replay.add(different(setup.run(solver, seed=seed).x, first.x), **place)
        if solver.draws_noise(setup.problem):
            gap = (setup.run(solver, seed=seed + 1).x - first.x).flatten(1).abs().amax(1)
            other.add(float((gap == 0).to(F64).mean()), **place)

        parts = {"alone": rows[4:5], "shard": rows[2:5], "permuted": torch.tensor([3, 6, 0, 5, 1, 4, 2])}
        for name, part in parts.items():
            index = int(part[0]) if name == "shard" else part
            result = setup.run(solver, x[part].clone(), seed=seed, index=index)
            split.add(different(result.x, first.x[part]), samples=name, **place)

        _one_bad_sample(bad, solver, setup, first.x, seed)

        for dtype, worst, tolerance in ((torch.float32, single, 1.0), (torch.bfloat16, half, 1.0)):
            low = x.to(dtype)
            result = setup.run(solver, low, seed=seed)
            same = result.x.dtype == dtype and result.x.shape == x.shape
            kept.add(0.0 if same else 1.0, dtype=str(result.x.dtype), expected=str(dtype), **place)
            worst.add(relative_gap(result.x, setup.run(solver, low.to(F64), seed=seed).x) / tolerance, **place)
        kept.add(float(first.x.dtype != F64 or first.x.shape != x.shape), dtype=str(first.x.dtype), **place)
        slope.add(_slope_gap(solver, setup, seed), **place)
    none = "the solver takes no problem of the battery"
    stochastic = "no problem that the solver takes needs noise"
    return [
        reported.finding(
            "calls reported", "stats.nfe = calls the problem saw", 0,
            "the stepper's `calls` misses evaluations, or counts some that it does not make", none),
        each.finding(
            "calls a step", "calls = declared * steps + those of the start", 0,
            "the cost declared is not the cost: an evaluation too many, or one that is reused", "no cost is declared"),
        untouched.finding("input untouched", "x after = x before", 0, "it writes into its caller's tensor", none),
        replay.finding(
            "replay", "solve(seed) = solve(seed), bits", 0,
            "noise that is not that of `solve` (torch.randn), or state kept between two solves", none),
        other.finding("another seed", "solve(seed + 1) differs in every sample", 0, "the seed is ignored", stochastic),
        split.finding(
            "batch split", "sample i alone, in a shard, permuted: the same bits", 0,
            "a reduction over the batch, noise by position instead of `index`, or a product that rounds by its size",
            none),
        bad.finding(
            "one bad sample", "a sample that overflows leaves the others' bits and statuses", 0,
            "a decision taken over the whole batch, or a reduction over it", none),
        kept.finding("dtype and shape", "those of x out = those of x in", 0, "a float64 coefficient promotes x", none),
        single.finding(
            "float32", "|x(float32) - x(float64)| / |x|", 2e-4,
            "times or coefficients are computed in the dtype of the state, or differences cancel", none),
        half.finding("bfloat16", "|x(bfloat16) - x(float64)| / |x|", 0.2, "increments are lost to rounding", none),
        slope.finding(
            "gradient", "autograd = (L(x + e d) - L(x - e d))/2e", 1e-6,
            "a step is cut from the graph (detach, no_grad, a write in place)", none),
    ]  # fmt: skip


_WILD = 1e200
"""A start whose square overflows."""


def _one_bad_sample(bad: Worst, solver: Solver, setup: Setup, first: Tensor, seed: int) -> None:
    place, wild, others = {"problem": setup.label}, setup.x.clone(), torch.arange(len(setup.x)) != 2
    wild[2] = _WILD
    try:
        result = setup.run(solver, wild, seed=seed)
    except (ValueError, RuntimeError) as error:
        bad.add(math.inf, error=str(error), **place)
        return
    bad.add(different(result.x[others], first[others]), **place)
    finite = torch.isfinite(result.x).flatten(1).all(1)
    if not torch.equal(finite, result.status == Status.FINISHED):
        bad.add(1.0, status=[Status(v).name for v in result.status.tolist()], **place)


def _slope_gap(solver: Solver, setup: Setup, seed: int) -> float:
    """Autograd against a central difference along one direction, relative to the sum of sizes."""
    x = setup.x[:3]
    weight = 1 + torch.frac(torch.arange(x.numel(), dtype=F64) * 0.618).reshape(x.shape)
    direction = torch.cos(torch.arange(x.numel(), dtype=F64)).reshape(x.shape)
    leaf = x.clone().requires_grad_()
    end = setup.run_grad(solver, leaf, seed=seed).x
    if not end.requires_grad:
        return math.inf
    (grad,) = torch.autograd.grad((weight * end).sum(), leaf)
    step = 1e-5
    ends = [setup.run(solver, x + s * step * direction, seed=seed).x for s in (1.0, -1.0)]
    want = float((weight * (ends[0] - ends[1])).sum() / (2 * step))
    return abs(float((grad * direction).sum()) - want) / max(1e-3, float((grad * direction).abs().sum()))
