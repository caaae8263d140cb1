"""`tune`: the grid, and the coefficients, of a linear solver fitted to a model for a number of steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdeflow import grids
from sdeflow.checked import checked
from sdeflow.engine.base import Engine
from sdeflow.grids import GridFunction
from sdeflow.identity import weights
from sdeflow.metrics import trajectory_error
from sdeflow.model import Model
from sdeflow.plan import Plan
from sdeflow.reverse import ReverseSDE
from sdeflow.solvers.base import Solver
from sdeflow.tuning.coefficients import fit_steps, scaled, single_rows
from sdeflow.tuning.schedules import equal_local_error
from sdeflow.tuning.tables import Tables, Warp, run, slopes, tables
from sdeflow.tuning.teacher import Teacher, teacher

_MOST = 1_000_000
"""Steps, noises and iterations that a fit can finish."""
_FLOOR = 1e-4
"""Errors below this share of the data's spread are as good as none: the loss is the mean of log(error + floor)."""
_FINE = 512
_PILOTS = 16
_APART = 1 << 40
"""The indices of the noises begin here, so that no sample of the same seed was fitted to."""


class _Candidate(NamedTuple):
    """A table, what made it, and its loss on the noises it was fitted to."""

    what: str
    table: Tables
    loss: float


@checked
def tune(
    model: Model,
    solver: Solver,
    steps: int,
    *,
    shape: tuple[int, ...] | None = None,
    calibration: int = 64,
    seed: int = 0,
    coefficients: bool = True,
    starts: Mapping[str, GridFunction] | None = None,
    iterations: int = 60,
    t_span: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    engine: Engine | None = None,
    progress: bool = False,
) -> Plan:
    """A plan of `solver` with `steps` steps whose grid, and coefficients, are fitted to the flow of `model`.

    From each of the two best `starts` the shares of the grid's increments are moved by gradient (Adam) to make
    mean log(e_i + 1e-4) small, e_i the error of a sample at the end against a fine solve from the same noise, in units
    of the data's spread. Then the coefficients of each step are fitted by least squares to the fine solve's states and
    moved by gradient too. What is returned is the best on `calibration` other noises, be it a start as it was.

    `plan.note` has the figures: "train", "held_out" (median errors, the second on 2 calibration noises that nothing was
    fitted to or chosen by), "held_out_start" (the best start's), "reference_error", and what they belong to.

    Per-sample conditions of the model, such as labels, are repeated over the noises.

    Args:
        model: of a GaussianSDE; gradients must flow through its network for the first and last stage.
        solver: a deterministic solver with a plan, such as `GaussianSplit()` or `DPMSolverPP(2)`.
        steps: of the plan.
        shape: of one sample; the network's own unless given.
        calibration: number of noises to fit to.
        seed: of the noises.
        coefficients: fit these too (for solvers of one call a step).
        starts: grids by name; all of `sf.grids.GRIDS` that fit the process unless given.
        iterations: of each stage by gradient.
        t_span: (start, end) instead of the process's own.
        dtype, device: of the samples; those of the network unless given, else float32 on the CPU.
        engine: where the two grids are fitted, `sdeflow.engine.Ray(...)` for instance; in this process unless given.
        progress: show a progress bar (needs tqdm).

    Raises:
        ValueError, TypeError: arguments that do not fit; a solver without a plan, or with noise.
    """
    problem, shape, like = _checked(model, solver, steps, shape, calibration, iterations)
    process = problem.gaussian
    span = (process.t1, process.t_min) if t_span is None else (float(t_span[0]), float(t_span[1]))
    with torch.no_grad():
        x = process.prior_sample(
            (4 * calibration, *shape), seed, index=_APART, dtype=dtype or like.dtype, device=device or like.device
        )
        goal = teacher(problem, x, span, calibration)
    fit, choice, rest = slice(0, calibration), slice(calibration, 2 * calibration), slice(2 * calibration, None)
    bar = _bar(iterations * (3 if coefficients else 2), progress)

    begun = _starts(problem, solver, steps, span, starts, goal, fit)
    candidates = [candidate for candidate, _ in begun[:1]]
    work = _WarpWork(problem, solver, begun[:2], steps, goal, fit, iterations)
    if engine is None:
        candidates += [work(k, bar) for k in range(len(work.begun))]
    else:
        fitted = dict(engine.map(work, range(len(work.begun))))
        candidates += [fitted[k] for k in sorted(fitted)]
        for _ in range(iterations * len(fitted)):
            next(bar)
    if coefficients and single_rows(candidates[0].table):
        candidates += _with_coefficients(problem, candidates, goal, fit, iterations, bar)
    losses = [_loss(_end(problem, c.table, goal, choice), goal, choice) for c in candidates]
    best = candidates[min(range(len(losses)), key=losses.__getitem__)]

    def median(table: Tables, part: slice) -> float:
        return trajectory_error(_end(problem, table, goal, part), goal.end[part]).median / goal.scale

    note = {
        "what": best.what,
        "solver": repr(solver),
        "train": median(best.table, fit),
        "held_out": median(best.table, rest),
        "held_out_start": median(candidates[0].table, rest),
        "start": candidates[0].what,
        "reference_error": goal.error,
        "calibration": calibration,
        "seed": seed,
        "model": fingerprint(model),
    }
    return _plan(best.table, solver, note)


def fingerprint(model: Model) -> str | None:
    """A hash of the weights of the model's network; None if it is not a module."""
    if not isinstance(model.net, nn.Module):
        return None
    return weights(model.net)


def _checked(
    model: Model, solver: Solver, steps: int, shape: tuple[int, ...] | None, calibration: int, iterations: int
) -> tuple[ReverseSDE, tuple[int, ...], Tensor]:
    if not isinstance(model, Model):
        raise TypeError(f"expected a Model, got {type(model).__name__}; wrap the network: sf.Model(net, sde, ...)")
    for name, value, least in (("steps", steps, 1), ("calibration", calibration, 2), ("iterations", iterations, 0)):
        if not least <= value <= _MOST:
            raise ValueError(f"expected {name} >= {least}, got {value!r} (at most {_MOST})")
    problem = model.gaussian.reverse(_repeated(model, 4 * calibration), 0.0)
    if not isinstance(solver, Solver) or isinstance(solver, Plan) or not hasattr(solver, "plan"):
        raise TypeError(f"expected a solver that has a plan, such as sf.solvers.GaussianSplit(), got {solver!r}")
    solver.check(problem)
    if solver.draws_noise(problem):
        raise ValueError(f"{solver.name} draws noise: a grid is fitted to the flow, by a deterministic solver")
    net: Any = model.net
    shape = getattr(net, "shape", None) if shape is None else shape
    if shape is None:
        raise ValueError("expected the shape of one sample: tune(..., shape=(3, 32, 32))")
    like = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    return problem, tuple(shape), torch.empty(0) if like is None else like


def _repeated(model: Model, count: int) -> Model:
    """The model with its per-sample conditions repeated for `count` noises: ten labels are asked for in turn."""
    sizes = {value.shape[0] for value in model.conditions.values() if isinstance(value, Tensor)}
    if not sizes:
        return model
    if len(sizes) > 1:
        raise ValueError(f"expected conditions of one number of rows, got {', '.join(map(str, sorted(sizes)))}")
    return model.take(torch.arange(count) % sizes.pop())


def _of(problem: ReverseSDE, part: slice) -> ReverseSDE:
    """The problem of the noises of a part."""
    sizes = [v.shape[0] for v in problem.model.conditions.values() if isinstance(v, Tensor)]
    return problem.take(torch.arange(sizes[0])[part]) if sizes else problem


def _starts(
    problem: ReverseSDE, solver: Solver, steps: int, span: tuple[float, float],
    starts: Mapping[str, GridFunction] | None, goal: Teacher, part: slice,
) -> list[tuple[_Candidate, Warp]]:  # fmt: skip
    """The grids to start from, best first."""
    if starts is None:
        rows = {name: row for name, row in grids.GRIDS.items() if row.needs != "table" and row.fits(problem)}
        starts = {name: row.make for name, row in rows.items() if name != "exponential"}  # logsnr by another name
        if math.isfinite(float(problem.gaussian.lam(max(span)))) and max(span) == problem.t1:
            few = slice(0, min(_PILOTS, len(goal.x)))
            pilot, event = _of(problem, few).model, tuple(goal.x.shape[1:])
            for p in (2, 3):
                name = f"equal_local_error({p})"
                starts[name] = equal_local_error(pilot, shape=event, order=p, pilots=few.stop)
    found = []
    for name, make in starts.items():
        try:
            warp = Warp(name, make(problem, _FINE, *span))
            table = tables(problem, solver, warp.grid(torch.zeros(steps, dtype=torch.float64)))
        except ValueError:
            continue  # a start that does not fit the span or the solver
        found.append((_Candidate(name, table, _loss(_end(problem, table, goal, part), goal, part)), warp))
    if not found:
        raise ValueError(f"none of the grids {', '.join(starts)} fits {solver.name} from {span[0]:g} to {span[1]:g}")
    return sorted(found, key=lambda pair: pair[0].loss)


@dataclass
class _WarpWork:
    """The fits of the grid from the best starts, each an item of its own."""

    problem: ReverseSDE
    solver: Solver
    begun: list[tuple[_Candidate, Warp]]
    steps: int
    goal: Teacher
    part: slice
    iterations: int

    def __call__(self, k: int, bar: Iterator[int] | None = None) -> _Candidate:
        start, warp = self.begun[k]
        return _warped(
            self.problem, self.solver, warp, start, self.steps, self.goal, self.part, self.iterations, bar or repeat(0)
        )


def _warped(
    problem: ReverseSDE, solver: Solver, warp: Warp, start: _Candidate, steps: int, goal: Teacher, part: slice,
    iterations: int, bar: Iterator[int],
) -> _Candidate:  # fmt: skip
    """The best grid met on the way down from a start."""
    logs = torch.zeros(steps, dtype=torch.float64)
    best = start
    descent = _Descent([logs], iterations)
    for _ in range(iterations if steps > 1 else 0):
        next(bar)
        table = tables(problem, solver, warp.grid(logs))
        numbers = [v.detach().clone().requires_grad_() for v in table.numbers]
        value = _differentiable_loss(problem, table.with_numbers(*numbers), goal, part)
        reached = float(value.detach())
        if reached < best.loss:
            best = _Candidate(f"{warp.name}, grid fitted", table, reached)
        if not value.requires_grad or not math.isfinite(reached):
            break
        back = torch.autograd.grad(value, numbers, allow_unused=True)
        change = slopes(problem, solver, warp, logs, table)
        gradient = [sum(((b * d).sum() for b, d in zip(back, part_of, strict=True) if b is not None), torch.zeros(()))
                    for part_of in change]  # fmt: skip
        descent.step([torch.stack(gradient).to(logs)])
    return best


def _with_coefficients(
    problem: ReverseSDE, found: list[_Candidate], goal: Teacher, part: slice, iterations: int, bar: Iterator[int]
) -> list[_Candidate]:
    """Each candidate with its steps fitted, and the best of all moved on by gradient."""
    made = []
    for candidate in found:
        states = goal.state(candidate.table.plan.grid)
        states[-1] = goal.end[part]
        table = fit_steps(_of(problem, part), candidate.table, goal.x[part], states)
        loss = _loss(_end(problem, table, goal, part), goal, part)
        made.append(_Candidate(f"{candidate.what}, coefficients fitted", table, loss))
    origin = min([*found, *made], key=lambda c: c.loss)
    best = _Candidate(origin.what.removesuffix(", coefficients fitted") + ", coefficients fitted", *origin[1:])
    change = [torch.zeros_like(origin.table.ratio), torch.zeros_like(origin.table.weights)]
    descent = _Descent(change, iterations, rate=0.01)
    for _ in range(iterations):
        next(bar)
        leaves = [v.clone().requires_grad_() for v in change]
        table = scaled(origin.table, 0.1 * leaves[0], leaves[1])  # the ratio carries the signal: it moves less
        value = _differentiable_loss(problem, table, goal, part)
        reached = float(value.detach())
        if reached < best.loss:
            best = _Candidate(best.what, table.with_numbers(*(v.detach() for v in table.numbers)), reached)
        if not value.requires_grad or not math.isfinite(reached):
            break
        descent.step(list(torch.autograd.grad(value, leaves)))
    return [*made, best]


class _Descent:
    """Adam with a cosine of its rate, on leaves whose gradients are computed elsewhere."""

    def __init__(self, leaves: list[Tensor], iterations: int, rate: float = 0.05) -> None:
        self._leaves = leaves
        self._optimiser = torch.optim.Adam(leaves, lr=rate, betas=(0.9, 0.99))
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimiser, max(iterations, 1))

    def step(self, gradients: list[Tensor]) -> None:
        """One step down."""
        for leaf, gradient in zip(self._leaves, gradients, strict=True):
            leaf.grad = gradient
        self._optimiser.step()
        self._schedule.step()


def _end(problem: ReverseSDE, table: Tables, goal: Teacher, part: slice) -> Tensor:
    with torch.no_grad():
        return run(_of(problem, part), table, goal.x[part])


def _loss(y: Tensor, goal: Teacher, part: slice) -> float:
    value = float(_log_error(y, goal, part))
    return value if math.isfinite(value) else math.inf


def _differentiable_loss(problem: ReverseSDE, table: Tables, goal: Teacher, part: slice) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        return _log_error(run(_of(problem, part), table, goal.x[part].clone()), goal, part)


def _log_error(y: Tensor, goal: Teacher, part: slice) -> Tensor:
    square = (y - goal.end[part]).flatten(1).to(torch.float64).square().mean(1)
    # far below the floor, so that the root has a slope at 0
    return torch.log(torch.sqrt(square + 1e-20) / goal.scale + _FLOOR).mean()


def _plan(table: Tables, solver: Solver, note: dict[str, Any]) -> Plan:
    shift = None if table.plan.shift_weight is None else table.shift
    return dataclasses.replace(
        table.plan,
        name=f"{solver.name}, tuned",
        ratio=table.ratio,
        weights=table.weights,
        shift_weight=shift,
        note=note,
    )


def _bar(total: int, progress: bool) -> Iterator[int]:
    if not progress:
        return iter(range(total + 1))
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return iter(tqdm(range(total + 1), unit="iteration"))
