"""`check_solver`: what a solver declares, its contract with `solve`, and its orders, one verdict an identity.

Orders are fitted against closed forms: a curved rotation for ordinary equations, tanh(W/2 + artanh x) and geometric
Brownian motion for multiplicative noise, Taylor's scheme of strong order 1.5 on a fine grid for additive noise, the
flow and the law of a Gaussian for reversals; the flow of a mixture by a method of order 8 on a fine grid. Weak errors
have no sampling error: a step of a linear equation is affine in its normals, and each sample carries one unit of one.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdeflow import grids
from sdeflow.calculus import noise_kind
from sdeflow.metrics import fitted_order
from sdeflow.noise import Noise, NoiseSource, SamePath, Seeded
from sdeflow.plan import Plan
from sdeflow.problems import Gaussian, GaussianMixture
from sdeflow.processes import VP
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import ODE, SDE, Problem
from sdeflow.solution import Solution, Status
from sdeflow.solve import solve
from sdeflow.solvers.base import LinearSolver, Solver
from sdeflow.solvers.catalogue import CATALOGUE, Row
from sdeflow.solvers.gaussian_split import GaussianSplit
from sdeflow.solvers.runge_kutta import DOP853
from sdeflow.solvers.stochastic import StochasticSolver
from sdeflow.solvers.stochastic_rk import SRA3
from sdeflow.testing.noise import Given
from sdeflow.testing.report import Finding, Report

F64 = torch.float64
SLACK = 0.25
"""A fitted order may be this much below the one declared."""
PATHS = 256
"""Paths of strong orders: a slope over a factor of 8 in the steps is then good to about 0.05."""
START, END = 0.8, 0.05
"""The span of VP's time: log(alpha/sigma) from -2.9 to 1.9, where nothing is at its limit yet."""
_FLOOR = 3e-14
"""Errors below are rounding and say nothing about an order."""

_ODE_LEVELS = {
    1: (64, 128, 256, 512), 2: (32, 64, 128, 256), 3: (64, 128, 256, 512), 4: (32, 64, 128, 256),
    5: (16, 32, 64, 128), 6: (8, 12, 16, 24), 7: (6, 8, 12, 16), 8: (12, 16, 20, 24, 28),
}  # fmt: skip


# ---- problems with known solutions


class _Counted:
    """Counts the calls of its drift."""

    calls = 0


class _Curved(_Counted, ODE):
    """x = phi(e^(-t/2) R(2 t + sin t) w_0 + c(t)), phi(y) = (y_1, y_2 + y_1^2/2): nonlinear and non-autonomous."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        t = t.to(x.dtype)
        first, second = x[..., 0], x[..., 1] - 0.5 * x[..., 0] ** 2
        turn = 2 + torch.cos(t)
        u, v = first - 0.3 * torch.sin(3 * t), second - 0.2 * torch.cos(2 * t)
        du = -0.5 * u - turn * v + 0.9 * torch.cos(3 * t)
        dv = -0.5 * v + turn * u - 0.4 * torch.sin(2 * t)
        return torch.stack([du, dv + first * du], -1)

    @staticmethod
    def exact(x: Tensor, t: float) -> Tensor:
        """The solution at t from x at 0."""
        u, v = x[..., 0], x[..., 1] - 0.5 * x[..., 0] ** 2 - 0.2
        angle, decay = 2 * t + math.sin(t), math.exp(-0.5 * t)
        a = decay * (math.cos(angle) * u - math.sin(angle) * v) + 0.3 * math.sin(3 * t)
        b = decay * (math.sin(angle) * u + math.cos(angle) * v) + 0.2 * math.cos(2 * t)
        return torch.stack([a, b + 0.5 * a**2], -1)


class _Constant(_Counted, ODE):
    """x' = c."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, self.rate)


class _Drifting(_Counted, SDE):
    """dX = c dt + g dW."""

    def __init__(self, rate: float, size: float) -> None:
        self.rate, self.size = rate, size

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, self.rate)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, self.size)


class _Well(_Counted, SDE):
    """dX = (X - X^3 + cos 3t) dt + 0.7 (1 + sin(3t)/2) dW."""

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return x - x * x * x + torch.cos(3 * t).to(x.dtype)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * (1 + 0.5 * torch.sin(3 * t)).to(x.dtype) * torch.ones_like(x)


class _Tanh(_Counted, SDE):
    """X = tanh(W/2 + artanh x)."""

    def __init__(self, interpretation: Any = "ito") -> None:
        self.interpretation = interpretation

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return -0.25 * x * (1 - x * x) if self.interpretation == "ito" else torch.zeros_like(x)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (1 - x * x)

    def exact(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(0.5 * w + torch.atanh(x))


class _Geometric(_Counted, SDE):
    """X = x exp((a - b^2/2) t + b W), or x exp(a t + b W) in Stratonovich's sense; a = 0.6, b = 0.8."""

    def __init__(self, interpretation: Any = "ito") -> None:
        self.interpretation = interpretation

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return 0.6 * x

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.8 * x

    def rate(self) -> float:
        """The drift of log X."""
        return 0.6 - (0.32 if self.interpretation == "ito" else 0.0)

    def exact(self, x: Tensor, w: Tensor) -> Tensor:
        return x * torch.exp(self.rate() + 0.8 * w)


_MIXTURE = GaussianMixture(
    [[0.9, -0.4], [-0.7, 0.8], [0.2, 0.5]],
    [[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.05], [-0.05, 0.6]], [[0.35, 0.1], [0.1, 0.25]]],
    [0.5, 0.3, 0.2],
)
_LAW_MEAN, _LAW_VARIANCE = torch.tensor([0.7, -0.4, 1.0], dtype=F64), torch.tensor([0.3, 1.5, 0.05], dtype=F64)


def _states(rows: int, width: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(rows, width, dtype=F64, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=4)
def _flow_case(start: float, end: float) -> tuple[ReverseSDE, Tensor, Tensor]:
    """(the flow of the mixture, states at `start`, at `end`)."""
    process = VP()
    flow = process.probability_flow(_MIXTURE.model(process))
    x = _states(6, 2, 2)
    with torch.no_grad():
        return flow, x, solve(flow, x, DOP853(), steps=192, grid=grids.uniform, t_span=(start, end)).x


@lru_cache(maxsize=4)
def _well_case(seed: int, steps: int = 1024) -> tuple[Tensor, Tensor]:
    """(start, end) of `_Well` by Taylor's scheme of strong order 1.5 (Kloeden and Platen 1992, section 10.4)."""
    walk = Noise(seed, PATHS, one_path=True).walk(
        torch.linspace(0, 1, steps + 1, dtype=F64), (1,), F64, areas=True
    )  # fmt: skip
    x, size = torch.full((PATHS, 1), 0.5, dtype=F64), 1 / steps
    for k in range(steps):
        t, (w, h) = k * size, walk(k)
        assert h is not None
        g, slope, integral = 0.7 * (1 + 0.5 * math.sin(3 * t)), 1.05 * math.cos(3 * t), size * (0.5 * w + h)
        f, f_x = x - x**3 + math.cos(3 * t), 1 - 3 * x**2
        second = -3 * math.sin(3 * t) + f * f_x - 3 * g * g * x
        x = x + f * size + g * w + f_x * g * integral + slope * (size * w - integral) + 0.5 * size**2 * second
    return torch.full((PATHS, 1), 0.5, dtype=F64), x


@lru_cache(maxsize=4)
def _reversal_case(seed: int) -> tuple[ReverseSDE, Tensor, Tensor]:
    """(the reverse SDE of the mixture, start, end on the path of `seed` by SRA3)."""
    process = VP()
    problem = process.reverse(_MIXTURE.model(process), 1.0)
    x = _states(64, 2, 1)
    with torch.no_grad():
        return problem, x, solve(problem, x, SRA3(), grid=_falling(512), noise=SamePath(seed)).x


def _falling(steps: int) -> Tensor:
    return torch.linspace(START, END, steps + 1, dtype=F64)


# ---- what is declared


@dataclass(frozen=True)
class _Declared:
    """The claims to hold the solver to; None where there is none."""

    order: float | None
    strong: Mapping[str, float]
    weak: float | None
    calls: int | None
    start_calls: int
    row: Row | None

    def words(self) -> str:
        parts = [f"order {self.order:g}"] if self.order is not None else []
        parts += [f"strong order {v:g} ({kind} noise)" for kind, v in self.strong.items()]
        parts += [f"weak order {self.weak:g}"] if self.weak is not None else []
        parts += [f"{self.calls} calls a step"] if self.calls is not None else []
        source = f"the catalogue's row {self.row.name}" if self.row else "arguments and attributes"
        return (", ".join(parts) or "nothing") + f" (by {source})"


def _row_of(solver: Solver) -> Row | None:
    """The row that made the solver: an equal one, else one of its type and name."""
    same = [(row, made) for row in CATALOGUE if type(made := row.make()) is type(solver)]
    equal = [row for row, made in same if made == solver]
    named = [row for row, made in same if made.name == solver.name]
    return equal[0] if equal else named[0] if named else None


def _declared(
    solver: Solver,
    order: float | None,
    weak: float | None,
    strong: float | Mapping[str, float] | None,
    calls: int | None,
) -> _Declared:
    row = _row_of(solver)
    found: dict[str, float] = {}
    if row is not None:
        pairs = (("additive", row.strong_order), ("diagonal", row.strong_diagonal))
        found = {kind: v for kind, v in pairs if v is not None}
    elif isinstance(solver, StochasticSolver):
        found = {kind: solver.order_for(kind) for kind in ("additive", "diagonal") if kind in solver.fits}
    if isinstance(strong, Mapping):
        unknown = set(strong) - {"additive", "diagonal"}
        if unknown:
            raise ValueError(f'expected strong_order for "additive" and "diagonal" noise, got {sorted(unknown)}')
        found = dict(strong)
    elif strong is not None:
        found = {"additive": strong, "diagonal": strong} if solver.view == "drift" else {"additive": strong}
    given_calls = calls is not None
    if row is not None:
        order, weak = row.order if order is None else order, row.weak_order if weak is None else weak
        calls = row.nfe_per_step if calls is None else calls
    return _Declared(order, found, weak, calls, row.start_calls if row and not given_calls else 0, row)


# ---- runs


@dataclass(frozen=True)
class _Setup:
    """A problem for the checks that need no known solution."""

    label: str
    problem: Problem
    x: Tensor
    grid: Tensor

    def run(self, solver: Solver, x: Tensor | None = None, grid: Tensor | None = None, **options: Any) -> Solution:
        with torch.no_grad():
            return self.run_grad(solver, self.x if x is None else x, grid, **options)

    def run_grad(self, solver: Solver, x: Tensor, grid: Tensor | None = None, **options: Any) -> Solution:
        grid = None if isinstance(solver, Plan) else self.grid if grid is None else grid
        return solve(self.problem, x, solver, grid=grid, throw=False, **options)

    def calls(self) -> int | None:
        """Evaluations the problem has seen."""
        if isinstance(self.problem, ReverseSDE):
            return self.problem.model.nfe
        return self.problem.calls if isinstance(self.problem, _Counted) else None


def _setups(solver: Solver, problem: Problem | None, seed: int) -> tuple[list[_Setup], list[str]]:
    """(those the solver takes, why it refuses the others)."""
    process = VP()
    model = _MIXTURE.model(process)
    up, down = torch.tensor([0.0, 0.1, 0.3, 0.55, 0.7], dtype=F64), torch.tensor([0.8, 0.6, 0.45, 0.3, 0.2], dtype=F64)
    plane, small = _states(7, 2, 5), torch.tanh(_states(7, 2, 6))
    own = [
        _Setup("an ordinary equation", _Curved(), plane, up), _Setup("additive noise", _Well(), plane, up),
        _Setup("diagonal noise", _Tanh(), small, up),
    ]  # fmt: skip
    reversals = [
        _Setup("the probability flow", process.probability_flow(model), plane, down),
        _Setup("the reverse SDE", process.reverse(model, 1.0), plane, down),
    ]
    groups = [reversals] if solver.view == "transition" else [own, reversals]
    taken: list[_Setup] = []
    refused: list[str] = []
    for group in groups:
        for setup in group if not taken else []:
            why = _refusal(solver, setup, seed)
            if why is None:
                taken.append(setup)
            else:
                refused.append(f"{setup.label}: {why}")
    if problem is not None:
        event = getattr(getattr(problem, "process", problem), "event", None) or (2,)
        start, end = problem.span
        grid = torch.linspace(start, end, 5, dtype=F64)
        mine = _Setup("the given problem", problem, _states(7, math.prod(event), 7).reshape(7, *event), grid)
        why = _refusal(solver, mine, seed)
        if why is not None:
            raise ValueError(f"{solver.name} does not take the given problem: {why}")
        taken.append(mine)
    return taken, refused


def _refusal(solver: Solver, setup: _Setup, seed: int) -> str | None:
    try:
        setup.run(solver, seed=seed)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _gap(a: Tensor, b: Tensor) -> float:
    """max |a - b| over max |b|; infinite where one is not finite."""
    a, b = a.detach().to(F64), b.detach().to(F64)
    if a.shape != b.shape or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    return float((a - b).abs().max()) / max(float(b.abs().max()), 1e-300)


def _different(a: Tensor, b: Tensor) -> float:
    """0 for equal bits, else the relative gap (at least the smallest number)."""
    return 0.0 if a.shape == b.shape and torch.equal(a, b) else max(_gap(a, b), 5e-324)


class _Worst:
    """The largest of several residuals, with its place."""

    def __init__(self) -> None:
        self.residual, self.where = -math.inf, {}  # type: float, dict[str, Any]

    def add(self, residual: float, **where: Any) -> None:
        residual = math.inf if math.isnan(residual) else residual
        if residual > self.residual:
            self.residual, self.where = residual, where

    def finding(self, identity: str, formula: str, tolerance: float, note: str, none: str = "") -> Finding:
        if self.residual == -math.inf:
            return Finding.skipped(identity, formula, none)
        return Finding.of(identity, formula, self.residual, tolerance, self.where, note)


# ---- the contract with `solve`


def _contract(solver: Solver, setups: Sequence[_Setup], claims: _Declared, seed: int) -> list[Finding]:
    """Identities that need no known solution; each on every problem that the solver takes."""
    reported, each, kept, single, half = (_Worst() for _ in range(5))
    replay, other, split, bad, untouched, slope = (_Worst() for _ in range(6))
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
        untouched.add(_different(x, given), **place)

        replay.add(_different(setup.run(solver, seed=seed).x, first.x), **place)
        if solver.draws_noise(setup.problem):
            gap = (setup.run(solver, seed=seed + 1).x - first.x).flatten(1).abs().amax(1)
            other.add(float((gap == 0).to(F64).mean()), **place)

        parts = {"alone": rows[4:5], "shard": rows[2:5], "permuted": torch.tensor([3, 6, 0, 5, 1, 4, 2])}
        for name, part in parts.items():
            index = int(part[0]) if name == "shard" else part
            result = setup.run(solver, x[part].clone(), seed=seed, index=index)
            split.add(_different(result.x, first.x[part]), samples=name, **place)

        _one_bad_sample(bad, solver, setup, first.x, seed)

        for dtype, worst, tolerance in ((torch.float32, single, 1.0), (torch.bfloat16, half, 1.0)):
            low = x.to(dtype)
            result = setup.run(solver, low, seed=seed)
            same = result.x.dtype == dtype and result.x.shape == x.shape
            kept.add(0.0 if same else 1.0, dtype=str(result.x.dtype), expected=str(dtype), **place)
            worst.add(_gap(result.x, setup.run(solver, low.to(F64), seed=seed).x) / tolerance, **place)
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


_WILD = 1e70
"""A start whose cube overflows after a step or two, and whose square does not."""


def _one_bad_sample(bad: _Worst, solver: Solver, setup: _Setup, first: Tensor, seed: int) -> None:
    place, wild, others = {"problem": setup.label}, setup.x.clone(), torch.arange(len(setup.x)) != 2
    wild[2] = _WILD
    try:
        result = setup.run(solver, wild, seed=seed)
    except (ValueError, RuntimeError) as error:
        bad.add(math.inf, error=str(error), **place)
        return
    bad.add(_different(result.x[others], first[others]), **place)
    finite = torch.isfinite(result.x).flatten(1).all(1)
    if not torch.equal(finite, result.status == Status.FINISHED):
        bad.add(1.0, status=[Status(v).name for v in result.status.tolist()], **place)


def _slope_gap(solver: Solver, setup: _Setup, seed: int) -> float:
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


# ---- orders


def _levels(solver: Solver, order: float, view: str, calls: int | None) -> tuple[int, ...]:
    """Where the leading term of the error rules: multistep methods are there later, their stencil is longer."""
    if order >= 2.5 and (calls or 1) == 1:
        return (64, 128, 256, 512) if order <= 3 or view == "drift" else (128, 256, 512, 1024)
    return _ODE_LEVELS[min(8, max(1, round(order)))]


def _order_finding(
    identity: str, formula: str, declared: float, levels: Sequence[int], errors: Sequence[float], note: str,
    **where: Any,
) -> Finding:  # fmt: skip
    """declared - fitted, over the levels whose errors are not rounding."""
    place = {**where, "steps": list(levels), "errors": list(errors)}
    if not all(math.isfinite(e) for e in errors):
        return Finding.of(identity, formula, math.inf, SLACK, place, "the error is not finite")
    above = [(n, e) for n, e in zip(levels, errors, strict=True) if e > _FLOOR]
    if len(above) < 3:
        stuck = max(errors) > 1e-9  # reached rounding within two levels, or was there from the start
        return Finding.of(identity, formula, declared if stuck and len(above) == 2 else 0.0, SLACK, place, note)
    fitted = fitted_order([1 / n for n, _ in above], [e for _, e in above])
    return Finding.of(
        identity, formula, max(0.0, declared - fitted), SLACK, {"declared": declared, "fitted": fitted, **place}, note
    )


def _lowest(findings: Sequence[Finding]) -> Finding:
    """The one of the largest residual."""
    return max(findings, key=lambda f: f.residual if not math.isnan(f.residual) else -1.0)


def _full_start(solver: Any) -> Any:
    """A multistep method that begins at its full order, where it has a `start` to choose: a ramp is of order 2."""
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        return solver
    names = {f.name for f in dataclasses.fields(solver)}
    inner = getattr(solver, "solver", None)
    if "solver" in names and isinstance(inner, Solver):
        return dataclasses.replace(solver, solver=_full_start(inner))
    if "start" not in names or (getattr(solver, "order", 2) == 1 and not getattr(solver, "corrector", False)):
        return solver
    for start in ("runge-kutta", "singlestep"):
        try:
            return dataclasses.replace(solver, start=start)
        except ValueError:
            continue
    return solver


def _without_noise(solver: Any) -> Any | None:
    """The solver with its own stochasticity at 0, by its argument `eta`; None if it has none."""
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        return None
    return dataclasses.replace(solver, eta=0.0) if "eta" in {f.name for f in dataclasses.fields(solver)} else None


_ORDER = "max(0, declared - slope of log error against log h)"
_ORDER_NOTE = (
    "a wrong coefficient (a weight costs all orders but one, a node those above 1), a stage at the wrong time, or a "
    "start of lower order"
)


def _ode_findings(solver: Solver, claims: _Declared) -> list[Finding]:
    """Order, constants or the exact linear part, and the way back."""
    names = ("order", "both ways", "constant" if solver.view == "drift" else "linear part")
    quiet = solver
    if claims.row is not None and "own" in claims.row.noise:
        found = _without_noise(solver)
        if found is None:
            return [Finding.skipped(name, _ORDER, "its own noise cannot be switched off") for name in names]
        quiet = found
    full = _full_start(quiet)
    drift_view = solver.view == "drift"
    if drift_view:
        problem: Problem = _Curved()
        x = _states(6, 2, 3)
        exact, span = _Curved.exact(x, 1.0), (0.0, 1.0)
    else:
        problem, x, exact = _flow_case(START, END)
        span = (START, END)

    def grid(_: Problem, steps: int, start: float, end: float) -> Tensor:
        """Steps that grow by half: the constants of equal steps cost a method its orders above 2."""
        if drift_view:
            return _uneven(start, end, steps)
        process = VP()
        ends = process.lam(torch.tensor([start, end], dtype=F64)).tolist()
        times = process.time_of_lam(_uneven(ends[0], ends[1], steps))
        times[0], times[-1] = start, end
        return times

    if isinstance(full, StochasticSolver) or full.draws_noise(problem):
        return [Finding.skipped(name, _ORDER, "it draws noise for every problem") for name in names]
    try:
        full.check(problem)
        with torch.no_grad():
            solve(problem, x, full, steps=8, grid=grid, t_span=span, seed=0)
    except ValueError as error:
        return [Finding.skipped(name, _ORDER, f"refuses a problem without noise: {error}") for name in names]

    def run(start: Tensor, steps: int, ends: tuple[float, float]) -> Tensor:
        with torch.no_grad():
            return solve(problem, start, full, steps=steps, grid=grid, t_span=ends, seed=0, throw=False).x

    out = []
    levels = _levels(full, claims.order or 1, solver.view, claims.calls)
    if claims.order is None:
        out.append(Finding.skipped("order", _ORDER, "no order without noise is declared"))
    else:
        errors = [_rms(run(x, n, span) - exact) for n in levels]
        where = {"problem": "a curved rotation" if drift_view else "the flow of a mixture under VP"}
        out.append(_order_finding("order", _ORDER, claims.order, levels, errors, _ORDER_NOTE, **where))
    out.append(_both_ways(run, x, exact, span, levels[1]))
    if drift_view:
        out.append(_constant_ode(full))
    elif claims.order is not None:
        out.append(_linear_part(full))
    else:
        out.append(Finding.skipped("linear part", _ORDER, "no order without noise is declared"))
    return out


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _both_ways(
    run: Callable[[Tensor, int, tuple[float, float]], Tensor], x: Tensor, exact: Tensor,
    span: tuple[float, float], steps: int,
) -> Finding:  # fmt: skip
    formula = "|back(there(x)) - x| / |there(x) - exact|"
    note = "a clock that is negated instead of signed steps, or |h| where h belongs"
    there = run(x, steps, span)
    try:
        back = run(there, steps, (span[1], span[0]))
    except ValueError as error:
        return Finding.skipped("both ways", formula, f"refuses the other direction: {error}")
    size, gap = _rms(there - exact), _rms(back - x)
    residual = gap / max(size, 1e-11)
    return Finding.of("both ways", formula, residual, 100.0, {"steps": steps, "error": size, "gap": gap}, note)


def _constant_ode(solver: Solver) -> Finding:
    formula, note = "x' = 0 leaves x alone, x' = c gives x + c t", "weights that do not add up to the step"
    x, grid = _states(5, 2, 8), torch.tensor([0.0, 0.07, 0.2, 0.3, 0.55, 0.6, 0.9, 1.0], dtype=F64)
    worst = _Worst()
    for rate in (0.0, 0.7):
        end = solve(_Constant(rate), x, solver, grid=grid, seed=0, throw=False).x
        worst.add(_gap(end, x + rate), drift=rate)
    return worst.finding("constant", formula, 1e-13, note)


def _linear_part(solver: Solver) -> Finding:
    """Data at a point, or the Gaussian that the solver is made for: x1 = a1 m + (P1/P0)^(1/2) (x0 - a0 m)."""
    formula = "data at a point: x1 = a1 m + s1/s0 (x0 - a0 m) at any step"
    note = "the linear part is not integrated exactly: alpha or sigma of the wrong end of the step"
    mean, variance = torch.tensor([0.6, -0.3], dtype=F64), torch.zeros(2, dtype=F64)
    if isinstance(solver, GaussianSplit):
        mean = torch.as_tensor(solver.mean, dtype=F64).expand(2)
        variance = torch.full((2,), float(solver.variance), dtype=F64)
        formula = "data of its mean and variance: x1 = a1 m + (P1/P0)^(1/2) (x0 - a0 m) at any step"
    process = VP()
    flow = process.probability_flow(Gaussian(mean, variance).model(process))
    x, grid = _states(5, 2, 8), _uneven(START, END, 7)
    a, s = process.alpha(grid[[0, -1]]), process.sigma(grid[[0, -1]])
    p = a[:, None] ** 2 * variance + s[:, None] ** 2
    with torch.no_grad():
        end = solve(flow, x, solver, grid=grid, seed=0, throw=False).x
    want = a[1] * mean + torch.sqrt(p[1] / p[0]) * (x - a[0] * mean)
    return Finding.of("linear part", formula, _gap(end, want), 1e-10, {"steps": 7}, note)


def _uneven(start: float, end: float, steps: int) -> Tensor:
    share = torch.linspace(0, 1, steps + 1, dtype=F64)
    return start + (end - start) * (0.8 * share + 0.2 * share**2)


# ---- strong orders


def _strong_findings(solver: Solver, setups: Sequence[_Setup], claims: _Declared, seed: int) -> list[Finding]:
    formula = "max(0, declared - slope of log E|x - exact| on one path)"
    out = []
    own = solver.view == "transition" and all(s.label != "the reverse SDE" for s in setups)
    for kind in ("additive", "diagonal"):
        identity = f"strong order, {kind} noise"
        declared = claims.strong.get(kind)
        if declared is None:
            out.append(Finding.skipped(identity, formula, "none is declared"))
        elif kind == "diagonal":
            out.append(_strong_diagonal(solver, declared, formula, seed))
        elif solver.view == "drift":
            start, end = _well_case(seed)
            well = _paths(_Well(), solver, start, end, _rising, (8, 16, 32, 64), SamePath(seed))
            note = "increments of the wrong size or path, or (orders above 1) the area H left out or of the wrong sign"
            cases = [_order_finding(identity, formula, declared, *well, note, problem="a double well")]
            cases.append(_strong_reversal(identity, formula, solver, declared, seed, False))
            out.append(_lowest(cases))
        else:
            out.append(_strong_reversal(identity, formula, solver, declared, seed, own))
    return out


def _rising(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps + 1, dtype=F64)


def _paths(
    problem: Problem, solver: Solver, x: Tensor, exact: Tensor, grid: Callable[[int], Tensor],
    levels: Sequence[int], noise: NoiseSource, *, median: bool = False,
) -> tuple[Sequence[int], list[float]]:  # fmt: skip
    """(levels, errors): mean over paths, or their median, so that those that change sides do not count."""
    errors = []
    for n in levels:
        with torch.no_grad():
            end = solve(problem, x, solver, grid=grid(n), noise=noise, throw=False).x
        gap = (end - exact).flatten(1).norm(dim=1)
        errors.append(float(gap.median() if median else gap.mean()))
    return levels, errors


def _strong_reversal(
    identity: str, formula: str, solver: Solver, declared: float, seed: int, own: bool
) -> Finding:  # fmt: skip
    problem, x, exact = _reversal_case(seed)
    note = "noise that is not the path's, or not that of its step"
    noise: NoiseSource = SamePath(seed)
    if own:
        problem = problem.process.probability_flow(problem.model)
    thirds = _in_thirds(solver, problem)
    if own or thirds:
        # a stochasticity of its own has no other reference than its own fine run; on the clock of its own noise, which
        # `SamePath` does not know: a jump of that noise inside a step would cost half an order. So have stages at
        # thirds of a step, no fractions of the span by powers of 2, for which that path takes up to 40 splits
        noise = Seeded(seed)
        with torch.no_grad():
            exact = solve(problem, x, solver, grid=_falling(512 if thirds else 1024), noise=noise).x
    levels = (8, 16, 32, 64) if solver.view == "drift" else (16, 32, 64, 128)
    found = _paths(problem, solver, x, exact, _falling, levels, noise, median=True)
    label = "the reverse of a mixture" + (", against its own fine run" if own or thirds else "")
    return _order_finding(identity, formula, declared, *found, note, problem=label)


def _in_thirds(solver: Solver, problem: Problem) -> bool:
    """Whether it divides its steps into a number of parts that is no power of 2."""
    if not isinstance(solver, LinearSolver):
        return False
    draws = solver.plan(problem, _falling(4)).draws
    return draws & (draws - 1) != 0


def _strong_diagonal(solver: Solver, declared: float, formula: str, seed: int) -> Finding:
    note = "a correction term that is missing, one-sided or of the wrong sign, or the drift of the other interpretation"
    levels = (16, 32, 64, 128) if declared > 1 else (8, 16, 32, 64)  # high orders are later in their limit
    cases = []
    for sde in (_Tanh(), _Geometric("stratonovich")):
        x = torch.tensor([[0.5, -0.2]], dtype=F64).expand(PATHS, -1).contiguous()
        w = _whole(seed, 2)
        found = _paths(sde, solver, x, sde.exact(x, w), _rising, levels, SamePath(seed))
        label = f"{type(sde).__name__.strip('_').lower()}, {sde.interpretation}"
        cases.append(_order_finding("strong order, diagonal noise", formula, declared, *found, note, problem=label))
    return _lowest(cases)


@lru_cache(maxsize=4)
def _whole(seed: int, width: int) -> Tensor:
    """W on [0, 1] of the path of `SamePath(seed)`."""
    return Noise(seed, PATHS, one_path=True).walk(_rising(1), (width,), F64)(0).w.clone()


# ---- weak orders, without sampling


_NORMALS = 1100
"""The most normals a level of a weak order may have: one sample each."""
_NOT_AFFINE = "a step of a linear equation is not affine in its normals: no exact moments without sampling"


def _unit_rows(total: int, probe: Tensor) -> Callable[[int, int, tuple[int, ...]], Tensor]:
    """Sample k has one unit of normal k, the last sample has probe[k]; the two before it have none."""

    def unit(k: int, rows: int, event: tuple[int, ...]) -> Tensor:
        z = torch.zeros(rows, *event, dtype=F64)
        if k < total:
            z[k], z[-1] = 1.0, float(probe[k])
        return z

    return unit


def _law_after(
    solver: Solver, problem: Problem, grid: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor] | str | None:
    """The exact law of the result, a component each; a string if there is none, None if it needs too many normals."""
    with torch.no_grad():
        counter = Given(lambda k, rows, event: torch.zeros(rows, *event, dtype=F64))
        solve(problem, torch.zeros(1, 3, dtype=F64), solver, grid=grid, noise=counter, throw=False)
        total = counter.asked
        if total > _NORMALS:
            return None
        probe = torch.cos(torch.arange(total, dtype=F64))
        x = torch.zeros(total + 3, 3, dtype=F64)
        x[total + 1] = 1.0  # a unit of start; row `total` has neither
        y = solve(problem, x, solver, grid=grid, noise=Given(_unit_rows(total, probe)), throw=False).x
    offset = y[total]
    gain, columns = y[total + 1] - offset, y[:total] - offset
    if _gap(offset + (probe[:, None] * columns).sum(0), y[-1]) > 1e-8:
        if isinstance(solver, StochasticSolver):
            return _law_by_steps(solver, problem, grid, mean, variance)
        return _NOT_AFFINE
    return gain * mean + offset, gain**2 * variance + columns.square().sum(0)


@lru_cache(maxsize=1)
def _quadrature() -> tuple[Tensor, Tensor]:
    """Nodes (n, 2) of the normals of W and H, and their weights: exact to degrees 17 and 9."""
    rules = [np.polynomial.hermite_e.hermegauss(n) for n in (9, 5)]
    pairs = torch.tensor([(a, b) for a in rules[0][0] for b in rules[1][0]])
    chance = torch.tensor([u * v for u in rules[0][1] for v in rules[1][1]])
    return pairs, chance / chance.sum()


def _law_by_steps(
    solver: Solver, problem: Problem, grid: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor] | str:
    """`_law_after` for one-step methods whose steps have powers of W: x' = gain x + noise, by quadrature over noise."""
    pairs, chance = _quadrature()
    pairs = torch.cat([pairs, pairs[:1]])
    x = torch.zeros(len(pairs), 3, dtype=F64)
    x[-1] = 1.0  # with the noise of the first
    source = Given(lambda k, rows, event: pairs[:, min(k, 1), None].expand(rows, *event))
    for ends in pairwise(grid.unbind()):
        with torch.no_grad():
            y = solve(problem, x, solver, grid=torch.stack(ends), noise=source, throw=False).x
        if source.asked > 2:
            return _NOT_AFFINE
        gain, noise = y[-1] - y[0], y[:-1]
        shift = (chance[:, None] * noise).sum(0)
        mean, variance = gain * mean + shift, gain**2 * variance + (chance[:, None] * (noise - shift) ** 2).sum(0)
    return mean, variance


def _exact_law(eta: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(mean, variance) at START and at END of the reverse equation of Gaussian data.

    A deviation from the marginal N(a m, P), P = a^2 v + s^2, decays by (P1/P0)^(1/2) ((a0/a1) (P1/P0)^(1/2))^(eta^2).
    """
    process = VP()
    a, s = (v(torch.tensor([START, END], dtype=F64)) for v in (process.alpha, process.sigma))
    p = a[:, None] ** 2 * _LAW_VARIANCE + s[:, None] ** 2
    root = torch.sqrt(p[1] / p[0])
    decay = root * (a[0] / a[1] * root) ** (eta**2)
    shift, wider = torch.tensor([0.4, -0.3, 0.2], dtype=F64), torch.tensor([-0.2, 0.3, 0.4], dtype=F64)
    start = (a[0] * _LAW_MEAN + shift, p[0] + wider)
    return start, (a[1] * _LAW_MEAN + decay * shift, p[1] + decay**2 * wider)


def _weak_finding(solver: Solver, claims: _Declared) -> Finding:
    identity, formula = "weak order", "max(0, declared - slope of the error of mean and deviation of a Gaussian)"
    note = (
        "noise of the wrong size (sqrt(h) against h, a missing factor), or drift and noise that do not belong together"
    )
    if claims.weak is None:
        return Finding.skipped(identity, formula, "none is declared")
    process = VP()
    model = Gaussian(_LAW_MEAN, _LAW_VARIANCE).model(process)
    start, end = _exact_law(1.0)
    problem = process.reverse(model, 1.0)
    grid = grids.logsnr if solver.view == "transition" else grids.uniform
    try:
        solver.check(problem)
        solve(problem, torch.zeros(1, 3, dtype=F64), solver, grid=grid(process, 4, START, END), seed=0)
    except ValueError:  # a stochasticity of its own, on the flow: from the marginal, which every eta keeps
        problem = process.probability_flow(model)
        start, end = ((v, p) for v, p in zip(*_marginals(process), strict=True))
    levels: list[int] = []
    errors: list[float] = []
    for n in (512, 256, 128, 64, 32, 16, 8) if solver.view == "transition" else (128, 64, 32, 16, 8):
        try:
            law = _law_after(solver, problem, grid(process, n, START, END), *start)
        except ValueError as error:
            return Finding.skipped(identity, formula, f"refuses the problem: {error}")
        if isinstance(law, str):
            return Finding.skipped(identity, formula, law)
        if law is not None:
            levels.append(n)
            errors.append(float(torch.hypot(law[0] - end[0], law[1].sqrt() - end[1].sqrt()).norm()))
        if len(levels) == 4:
            break
    return _order_finding(identity, formula, claims.weak, levels, errors, note)


def _marginals(process: VP) -> tuple[list[Tensor], list[Tensor]]:
    """(means, variances) of the data noised to START and END."""
    times = torch.tensor([START, END], dtype=F64)
    levels = list(zip(process.alpha(times).tolist(), process.sigma(times).tolist(), strict=True))
    return [a * _LAW_MEAN for a, _ in levels], [a**2 * _LAW_VARIANCE + s**2 for a, s in levels]


def _moments_finding(solver: Solver, claims: _Declared) -> Finding:
    """E X and E X^2 of geometric Brownian motion: powers of those of one step, by Gauss-Hermite in (W, H)."""
    identity, formula = "moments, diagonal noise", "max(0, 1 - slope of the error of E X, E X^2 of geometric motion)"
    note = "the drift of the other interpretation, or a second-order term whose mean is not 0"
    if "diagonal" not in claims.strong:
        return Finding.skipped(identity, formula, "no strong order for diagonal noise is declared")
    pairs, chance = _quadrature()
    cases = []
    for interpretation in ("ito", "stratonovich"):
        sde, levels = _Geometric(interpretation), (32, 64, 128, 256)
        rate = torch.tensor([sde.rate() + 0.32, 2 * sde.rate() + 1.28], dtype=F64)
        errors = []
        for n in levels:
            source = Given(lambda k, rows, event: pairs[:, min(k, 1), None].expand(rows, *event))
            x = torch.ones(len(pairs), 1, dtype=F64)
            with torch.no_grad():
                y = solve(sde, x, solver, grid=torch.tensor([0.0, 1 / n], dtype=F64), noise=source, throw=False).x[:, 0]
            if source.asked > 2:
                return Finding.skipped(identity, formula, "a step takes more normals than W and H")
            step = torch.stack([(chance * y).sum(), (chance * y**2).sum()])
            errors.append(float((step**n - torch.exp(rate)).abs().max()))
        cases.append(_order_finding(identity, formula, 1.0, levels, errors, note, problem=interpretation))
    return _lowest(cases)


def _constant_sde(solver: Solver, setups: Sequence[_Setup], seed: int) -> Finding:
    identity, formula = "constant noise", "dX = c dt + g dW gives x + c t + g W"
    if all(s.label != "additive noise" for s in setups):
        return Finding.skipped(identity, formula, "the solver takes no equation with additive noise")
    x = _states(PATHS, 2, 9)
    grid = torch.tensor([0.0, 0.125, 0.25, 0.5, 0.6875, 1.0], dtype=F64)
    worst = _Worst()
    for rate, size in ((0.0, 0.0), (0.7, 0.0), (0.0, 1.3), (-0.4, 0.6)):
        with torch.no_grad():
            end = solve(_Drifting(rate, size), x, solver, grid=grid, noise=SamePath(seed), throw=False).x
        worst.add(_gap(end, x + rate + size * _whole(seed, 2)), drift=rate, noise=size)
    return worst.finding(identity, formula, 1e-12, "increments of the wrong size, or not those of the path of the seed")


# ---- plans


def _plan_findings(solver: Solver, setups: Sequence[_Setup], claims: _Declared, seed: int) -> list[Finding]:
    formulas = {
        "plan": "plan(problem, grid) run = solver run, bits",
        "plan saved": "load(save(plan)) run = plan run, bits",
        "plan's degree": "max(0, order - 1 - degree that the last step integrates exactly)",
    }
    if not isinstance(solver, LinearSolver):
        return [Finding.skipped(name, formula, "the solver makes no plan") for name, formula in formulas.items()]
    run, saved, degree = _Worst(), _Worst(), _Worst()
    why = "no order is declared"
    for setup in setups:
        plan = solver.plan(setup.problem, setup.grid)
        want = setup.run(solver, seed=seed).x
        run.add(_different(setup.run(plan, seed=seed).x, want), problem=setup.label)
        with tempfile.TemporaryDirectory() as folder:
            plan.save(Path(folder) / "plan.json")
            again = Plan.load(Path(folder) / "plan.json")
        saved.add(_different(setup.run(again, seed=seed).x, want), problem=setup.label)
        if claims.order is not None and not setup.problem.stochastic:
            if plan.nfe - plan.steps > claims.start_calls:
                why = "a method with stages is bound by its quadrature alone, to leading order"
                continue
            if plan.kick_noise is not None or bool((plan.noise != 0).any()):
                why = "it brings noise of its own"
                continue
            if "bh" in str(getattr(solver, "second", "")):
                why = "its weights are those of the polynomials to leading order only"
                continue
            # a corrector's last step is not corrected; the last step has all its history
            wanted = claims.order - 1 - bool(getattr(getattr(solver, "solver", solver), "corrector", False))
            try:
                full = _full_start(solver).plan(setup.problem, _uneven(float(setup.grid[0]), float(setup.grid[-1]), 12))
                found = full.exact_degrees(setup.problem, _clock(solver))[-1]
            except ValueError as error:
                why = str(error)
                continue
            degree.add(max(0.0, wanted - found), degree=found, order=claims.order, problem=setup.label)
    note = "a coefficient that does not depend on the grid alone, or one rounded on its way"
    return [
        run.finding("plan", formulas["plan"], 0, note),
        saved.finding("plan saved", formulas["plan saved"], 0, note),
        degree.finding("plan's degree", formulas["plan's degree"], 0, "weights of a lower order", why),
    ]  # fmt: skip


def _clock(solver: Solver) -> Any:
    """The clock its polynomials are in, by its `coordinate`; rho = sigma/alpha in x/alpha; else the default."""
    return "rho" if getattr(solver, "name_of_variable", "") == "x/alpha" else getattr(solver, "coordinate", None)


# ---- the whole


def _given_finding(solver: Solver, setup: _Setup, claims: _Declared, seed: int) -> Finding:
    """The order on the caller's problem, against the solver's own run on a fine grid."""
    identity, formula = "order, given problem", "max(0, declared - slope of the error against its own fine run)"
    problem, x = setup.problem, setup.x
    declared = claims.order
    if isinstance(problem, SDE) and problem.stochastic:
        declared = claims.strong.get(noise_kind(problem, x, setup.grid[0]))
    if declared is None:
        return Finding.skipped(identity, formula, "no order is declared for such a problem")
    start, end = float(setup.grid[0]), float(setup.grid[-1])
    full = _full_start(solver) if not problem.stochastic else solver
    levels = (16, 32, 64, 128)

    def run(steps: int) -> Tensor:
        grid = torch.linspace(start, end, steps + 1, dtype=F64)
        with torch.no_grad():
            return solve(problem, x, full, grid=grid, noise=SamePath(seed), throw=False).x

    exact = run(2048)
    gaps = [(run(n) - exact).flatten(1).norm(dim=1) for n in levels]
    errors = [float(gap.median() if problem.stochastic else gap.max()) for gap in gaps]
    note = "coefficients that are not smooth, levels before the limit, or an order that the solver has not"
    return _order_finding(identity, formula, declared, levels, errors, note)


def check_solver(
    solver: Solver,
    *,
    order: float | None = None,
    weak_order: float | None = None,
    strong_order: float | Mapping[str, float] | None = None,
    nfe_per_step: int | None = None,
    problem: Problem | None = None,
    seed: int = 0,
) -> Report:
    """Hold a solver to what it declares and to the contract of `solve`, on built-in problems that fit it.

    What it declares is the catalogue's row that made it (by equality, else by type and name), for methods that derive
    from `StochasticSolver` their `order_for`, or the arguments, which win. Orders are one-sided: a fitted order may
    be 0.25 below the one declared, and anything above. Orders of multistep methods are those with a start-up of full
    order, where they have a `start` to choose.

    Args:
        solver: a solver that steps along a grid, of the library or your own.
        order: of convergence without noise.
        weak_order: with additive noise.
        strong_order: with noise; a number for additive and diagonal noise alike, or {"additive": 1.5, "diagonal": 1}.
        nfe_per_step: evaluations of the drift or model a step.
        problem: one of your own, added to the built-in ones (states standard normal, of its `event` or (2,)). Its
            drift must be elementwise over the batch to the bit, as the identities of bits need.
        seed: of the noise and of the paths: strong orders are fits over 64 to 256 paths, good to about 0.05.

    Raises:
        TypeError: `solver` is none, or a `Plan`, which has its own grid.
        ValueError: the solver does not take `problem`.
    """
    if not isinstance(solver, Solver) or isinstance(solver, Plan):
        raise TypeError(f"expected a solver such as sf.solvers.Heun(), not a plan, got {solver!r}")
    claims = _declared(solver, order, weak_order, strong_order, nfe_per_step)
    setups, refused = _setups(solver, problem, seed)
    findings = _contract(solver, setups, claims, seed)
    findings += _ode_findings(solver, claims)
    findings.append(_constant_sde(solver, setups, seed))
    findings += _strong_findings(solver, setups, claims, seed)
    findings += [_weak_finding(solver, claims), _moments_finding(solver, claims)]
    findings += _plan_findings(solver, setups, claims, seed)
    findings += [_given_finding(solver, s, claims, seed) for s in setups if s.label == "the given problem"]
    facts = {"declares": claims.words(), "problems": ", ".join(s.label for s in setups) or "none"}
    warnings = () if setups else tuple(f"no problem: {why}" for why in refused)
    return Report(f"{solver.name} ({solver.view} view)", tuple(findings), facts, warnings)
