"""A plan run one model call at a time, by a caller who makes the calls; and solvers written as text."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdeflow import solvers
from sdeflow.checked import described
from sdeflow.noise import Noise
from sdeflow.plan import Plan
from sdeflow.plan_run import PlanRun
from sdeflow.reverse import ReverseSDE
from sdeflow.solvers.base import LinearSolver
from sdeflow.solvers.gaussian_split import GaussianSplit

Planned = LinearSolver | GaussianSplit
"""A solver with plans."""


class Given:
    """A "network" that returns what its caller was given: `output` of the last model call."""

    def __init__(self) -> None:
        self.output: Any = None

    def __call__(self, x: Tensor, timestep: Tensor) -> Any:
        return self.output


class RowRun(PlanRun):
    """A solve by a plan, in which `row` makes one row of a model output that it is given.

    The states are those of a solve by the plan, to the bit, where the caller gives back what he got. Noise that a step
    begins with ("churn") is added to what the row before returns, so that the model is called where the step starts.
    A deep copy, or what a pickle makes, goes on from where this run is, on its own; ValueError where the states have
    gradients, which would end there.

    Args:
        given: the network of `problem`'s model, which `row` fills.
        x: the state at the first row.
    """

    def __init__(self, plan: Plan, problem: ReverseSDE, x: Tensor, noise: Noise | None, given: Given) -> None:
        super().__init__(plan, problem, x, noise)
        self._plan, self._problem, self._noise, self._given = plan, problem, noise, given
        self._like = x.new_zeros(()).expand(x.shape)  # shape, dtype and device, in no memory
        self._recorded = torch.is_grad_enabled()
        self._first, self._last = [rows[0] for rows in plan._rows], [rows[-1] for rows in plan._rows]
        self._steps = plan.step_of_row.tolist()
        self._base = self._start = x
        self._version: int | None = 0
        self.shape = x.shape
        self._x0 = _x0_evaluator(problem, plan)

    def row(self, k: int, output: Any, sample: Tensor) -> Tensor:
        """What follows row k from the model's output at `sample`: where row k + 1 calls it, or the end."""
        self._given.output, i = output, self._steps[k]
        y = self._reached if self._unchanged(sample) else sample.to(self._work)
        if k == self._first[i]:
            self._base, self._start = y, sample
        self.calls += 1
        y = self._row(k, self._base, y)
        self._given.output = None
        if self._shift is not None:
            y = torch.add(y, self._shift, alpha=self._shift_weight[k])
        if self._noisy is not None and self._noisy[k]:
            y = self._add_noise(k, i, y, self._start)
        if self._kick is not None and k == self._last[i] and i + 1 < len(self._kick) and self._kick[i + 1][1] != 0.0:
            ratio, std = self._kick[i + 1]
            y = torch.add(ratio * y, self._unit(i + 1), alpha=std)
        self._reached = y
        self._returned = y.to(sample.dtype)
        self._version = _version(self._returned)
        return self._returned

    def x0(self, k: int, output: Any, sample: Tensor) -> Tensor | None:
        """x_0 as that output predicts it; None where the prediction does not say (noise, at alpha = 0)."""
        self._given.output = output
        value = None if self._x0 is None else self._x0(k, sample)
        self._given.output = None
        return value

    def _unchanged(self, sample: Tensor) -> bool:
        """Whether `sample` is what the last row returned; else somebody changed it."""
        last = self._returned
        if self._version is None:  # a copy's caller may have the tensor that the original returned
            return (sample.dtype, sample.device) == (last.dtype, last.device) and torch.equal(sample, last)
        return sample is last and _version(sample) == self._version

    def __reduce__(self) -> tuple[Any, ...]:
        # rows and draws are functions of these parts, and are made again; the rest is where the run is
        if any(e.requires_grad for e in (self._base, self._reached, *self._kept.values())):
            raise ValueError(
                "a run whose gradients are recorded cannot be copied or pickled: run it in torch.no_grad()"
            )
        parts = (self._plan, self._problem, self._like, self._noise, self._given, self._recorded)
        kept = {slot: e.clone() for slot, e in self._kept.items()}  # not the whole block that they are views of
        return _made_again, parts, {"kept": kept, **{name: getattr(self, name) for name in _PLACE}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for slot, e in state["kept"].items():
            if slot in self._kept:  # a place in the memory of `_fused_rows`
                self._kept[slot].copy_(e)
            else:
                self._kept[slot] = e
        for name in _PLACE:
            setattr(self, name, state[name])
        self._version = None


_PLACE = ("calls", "_base", "_start", "_reached", "_returned")
"""What tells where a run is, besides its history."""


def _made_again(
    plan: Plan, problem: ReverseSDE, like: Tensor, noise: Noise | None, given: Given, recorded: bool
) -> RowRun:
    with torch.set_grad_enabled(recorded):  # which decides how rows are combined, to the last bit
        return RowRun(plan, problem, like, noise, given)


def _version(x: Tensor) -> int:
    """How often x was written to; tensors of inference mode do not count."""
    return 0 if x.is_inference() else x._version


def _x0_evaluator(problem: ReverseSDE, plan: Plan) -> Any:
    try:
        return problem.evaluator("x0", plan.times)
    except ValueError:
        return None


def check_starts(plan: Plan, noise_of: str = "the plan") -> None:
    """Refuse a plan whose first model call comes after noise is added: its caller has called the model before."""
    if plan.kick_noise is not None and float(plan.kick_noise[0]) != 0.0:
        raise ValueError(
            f"{noise_of} adds noise before its first model call, which a scheduler cannot: expected a grid from the "
            "process's end t1, where none is added, or s_tmax below the grid's start"
        )


# ---- solvers and plans as text


def solver_of(text: str) -> Planned:
    """The solver that a constructor call such as `UniPC(2, variant="bh1")` makes; nothing else is evaluated.

    Raises:
        ValueError: not a call of a constructor of `sf.solvers` with plain values, or not a solver that has plans.
    """
    try:
        solver = _made(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        wrong = "expected a solver such as 'DPMSolverPP(2)', with plain values as arguments, got"
        raise ValueError(f"{wrong} {_short(text)}: {error}") from error
    return _with_plans(solver, _short(text))


def _with_plans(solver: Any, name: str) -> Planned:
    """The solver, if it has plans; `name` is that in errors."""
    if not isinstance(solver, Planned):
        raise ValueError(
            f"{name} has no plan, as its coefficients are not known before it runs: expected a linear method on a "
            "fixed grid, such as 'DPMSolverPP(2)'"
        )
    if isinstance(solver, GaussianSplit) and torch.as_tensor(solver.variance).ndim > 0:
        raise ValueError(
            f"{name} has no plan, which has one coefficient for all components: expected a variance that is one number"
        )
    return solver


def _short(text: str) -> str:
    return repr(text) if len(text) <= 200 else f"{text[:100]!r}..."


def _made(node: ast.expr) -> Any:
    """The value of a literal, of `inf`, or of a call of a public name of `sf.solvers`."""
    if isinstance(node, ast.Name) and node.id == "inf":  # as Python writes the number, which is no literal
        return math.inf
    if isinstance(node, ast.Name):
        node = ast.Call(node, [], [])
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    if not isinstance(node.func, ast.Name) or node.func.id not in solvers.__all__:
        raise ValueError("no such name in sf.solvers")
    make = getattr(solvers, node.func.id)
    if not callable(make) or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("not a constructor with plain arguments")
    return make(*map(_made, node.args), **{str(keyword.arg): _made(keyword.value) for keyword in node.keywords})


def text_of(solver: Planned | str) -> str:
    """A text of which `solver_of` makes that solver.

    Raises:
        ValueError: it has no plans, or holds what no text can, such as a function or more than 10000 numbers.
        TypeError: neither a solver nor text.
    """
    if isinstance(solver, str):
        solver_of(solver)
        return solver
    if not isinstance(solver, solvers.Solver):
        raise TypeError(f"expected a solver, or its constructor as text, got {described(solver)}")
    plain = _in_lists(_with_plans(solver, described(solver)))
    text = repr(plain)
    try:
        made = solver_of(text)
    except ValueError:
        made = None
    by_value = type(plain).__eq__ is not object.__eq__
    if not (made == plain if by_value else type(made) is type(plain) and repr(made) == text):
        raise ValueError(
            f"{described(solver)} cannot be written down: pass its constructor as text, or its plan by from_plan"
        )
    return text


def _in_lists(solver: Planned) -> Planned:
    """The solver with lists in the place of tensors."""
    fields = dataclasses.fields(solver) if dataclasses.is_dataclass(solver) else ()
    tensors = {f.name: v for f in fields if f.init and isinstance(v := getattr(solver, f.name), Tensor)}
    for name, value in tensors.items():
        if value.numel() > _MOST_NUMBERS:
            raise ValueError(
                f"{solver.name}: expected a {name} of at most {_MOST_NUMBERS} numbers, which are written into the "
                f"configuration, got {value.numel()}: pass its plan by from_plan"
            )
    if not tensors:
        return solver
    return dataclasses.replace(solver, **{name: value.tolist() for name, value in tensors.items()})  # type: ignore[type-var]


_MOST_NUMBERS = 10_000


def plan_record(plan: Plan) -> dict[str, Any]:
    """The plan as `Plan.save` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan.json")
        record: dict[str, Any] = json.loads((Path(folder) / "plan.json").read_text())
    return record


def plan_of(record: dict[str, Any]) -> Plan:
    """The plan of such a record."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        path.write_text(json.dumps(record))
        return Plan.load(path)


def rest_of(solver: Planned, problem: ReverseSDE, grid: Tensor, begin: int, plan: Plan) -> Plan:
    """The plan of the rest of a grid, from the step that row `begin` of `plan` starts.

    Raises:
        ValueError: no step starts there, or the rest makes its model calls at other times.
    """
    step = int(plan.step_of_row[begin])
    if begin != plan._rows[step][0]:
        raise ValueError(f"model call {begin} is inside step {step}: expected to begin at the start of a step")
    rest = solver.plan(problem, grid[step:])
    if not torch.equal(rest.times, plan.times[begin:]):
        raise ValueError(
            f"{plan.name} calls the model at other times when it begins at step {step}: begin at the start"
        )
    return rest
