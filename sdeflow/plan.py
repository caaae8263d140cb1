"""Plans: every coefficient of a linear method on a grid, as one table; `sdeflow.plan_run` runs any of them.

Row k of a plan is one model call at time `times[k]` and one linear combination of the state x at
the start of the row's step and the last evaluations e_k, e_{k-1}, ...:

    y = ratio[k] x + sum_j weights[k, j] e_{k-j} + sum_j noise[k, j] xi_j

y is where the next row evaluates; after the last row of a step it is the new state.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow.files import write_atomically
from sdeflow.noise import Noise
from sdeflow.plan_run import PlanRun
from sdeflow.quadrature import gauss_legendre
from sdeflow.sde import Problem
from sdeflow.solvers.base import LinearSolver, View, refuse_noise, semilinear

_FORMAT = "sdeflow-plan-1"
_TABLES = {
    "grid": torch.float64,
    "times": torch.float64,
    "step_of_row": torch.int64,
    "ratio": torch.float64,
    "weights": torch.float64,
    "noise": torch.float64,
    "shift": torch.float64,
    "shift_weight": torch.float64,
    "kick_ratio": torch.float64,
    "kick_noise": torch.float64,
}


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, Tensor) else value


def eta_key(eta: object) -> float | str | None:
    """What a plan remembers of a problem's eta: the number, or the repr of a function."""
    return float(eta) if isinstance(eta, (int, float)) else None if eta is None else repr(eta)


@dataclass(frozen=True, eq=False)
class Plan(LinearSolver):
    """A linear method on a grid, usable wherever a solver is.

    It prints as its table, is saved as JSON (numbers exact), and knows its model calls before running.

    Attributes:
        name: of the method.
        view: the view of the problem it was made from.
        target: what a model call returns: "drift", or a prediction ("x0", "eps").
        grid: float64 (steps + 1,).
        times: float64 (rows,), where each row evaluates.
        step_of_row: int64 (rows,), non-decreasing.
        ratio, weights: float64 (rows,), (rows, history).
        noise: float64 (rows,), or (rows, draws): of the standard normals of the row's step, the coefficients of each;
            those of a step's last row say what share of the step each stands for.
        noise_kind: "unit" multiplies `noise` with standard normals, "diffusion" with G(x, t) times them.
        process, eta: what the coefficients belong to (its repr, and `eta_key`); None when they do not depend on it.
        kick_ratio, kick_noise: (steps,) or None: step i begins from kick_ratio[i] x + kick_noise[i] xi instead of x.
        note: where its numbers come from, as JSON: the figures of `sf.tune`; or None.
        shift, shift_weight: a constant of the event's shape (or 0-d) that row k adds times shift_weight[k]; or None.
    """

    name: str
    target: str
    grid: Tensor
    times: Tensor
    step_of_row: Tensor
    ratio: Tensor
    weights: Tensor
    noise: Tensor
    noise_kind: Literal["unit", "diffusion"] = "unit"
    process: str | None = None
    eta: float | str | None = None
    view: View = "drift"
    shift: Tensor | None = None
    shift_weight: Tensor | None = None
    kick_ratio: Tensor | None = None
    kick_noise: Tensor | None = None
    note: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        rows, steps = self.times.numel(), self.grid.numel() - 1
        sizes = {
            "step_of_row": (rows,),
            "ratio": (rows,),
            "weights": (rows, *self.weights.shape[1:]),
            "noise": (rows, *self.noise.shape[1:2]),
        }
        for name, size in sizes.items():
            if tuple(getattr(self, name).shape) != size or self.weights.ndim != 2:
                raise ValueError(
                    f"{self.name}: expected {name} of shape {size}, got {tuple(getattr(self, name).shape)}"
                )
        if steps < 1 or not torch.equal(torch.unique_consecutive(self.step_of_row), torch.arange(steps)):
            raise ValueError(f"{self.name}: expected rows for each of the {steps} steps, in order")
        finite = torch.isfinite(self.ratio) & torch.isfinite(self.weights).all(1)
        bad = ~(finite & torch.isfinite(self.noise.reshape(rows, -1)).all(1))
        if bool(bad.any()):
            k = int(torch.nonzero(bad)[0])
            raise ValueError(
                f"{self.name}: the coefficients of row {k} (t = {float(self.times[k]):g}) are not finite: "
                "the process is singular there; start or end the grid short of it"
            )

    @property
    def steps(self) -> int:
        """Steps of the grid."""
        return self.grid.numel() - 1

    @property
    def nfe(self) -> int:
        """Model calls of a run: one a row."""
        return self.times.numel()

    def __repr__(self) -> str:
        return f"Plan({self.name}, {self.steps} steps, {self.nfe} model calls, {self.target})"

    def __str__(self) -> str:
        lines = [
            repr(self),
            f"{'row':>4} {'step':>4} {'t':>12} {'ratio':>12} {'noise':>12}  weights (newest first)",
        ]
        for k in range(self.nfe):
            weights = " ".join(f"{w:12.5g}" for w in self.weights[k].tolist())
            lines.append(
                f"{k:4d} {int(self.step_of_row[k]):4d} {float(self.times[k]):12.6g} "
                f"{float(self.ratio[k]):12.6g} {float(torch.linalg.vector_norm(self.noise[k])):12.6g}  {weights}"
            )
        return "\n".join(lines)

    def exact_degrees(self, problem: Problem, coordinate: Literal["t", "lam", "rho"] | None = None) -> list[int]:
        """Per step, the highest degree up to which polynomial evaluations are integrated exactly; -1 for none.

        An order check without a model: evaluations are set to w^k, whatever the state, and each step is compared with
        the exact integral (to 1e-9). A multistep method of order p has degree p - 1 after its start; for methods
        with stages it is the order of their quadrature, which bounds their order.

        Args:
            problem: the one that the plan is for.
            coordinate: w; t for drifts, lam for x0 and eps unless given; "rho" is sigma/alpha.

        Raises:
            ValueError: the plan's evaluations are neither a drift nor x0 nor eps.
        """
        kind = {"x/alpha": "eps", "x/sigma": "x0"}.get(self.target, self.target)
        if kind not in ("drift", "x0", "eps"):
            raise ValueError(f"expected a plan of drift, x0 or eps evaluations, got {self.target!r}")
        coordinate = coordinate or ("t" if kind == "drift" else "lam")
        start, end = self.grid[:-1], self.grid[1:]
        nodes, rule = gauss_legendre(40)
        if kind == "drift":
            inside = start[:, None] + (end - start)[:, None] * nodes
            kernel = (end - start)[:, None] * rule
        else:
            reverse = semilinear(self.name, problem)
            lam0, lam1 = (reverse.gaussian.lam(t)[:, None] for t in (start, end))
            _, amp, c, _ = (v[:, None] for v in reverse.transition(start, end, kind))
            v = lam0 + (lam1 - lam0) * nodes
            inside = reverse.gaussian.time_of_lam(v)
            kernel = (lam1 - lam0) * rule * amp * c * torch.exp(-c * (lam1 - v))
        last = torch.tensor([rows[-1] for rows in self._rows])
        ages = (last[:, None] - torch.arange(self.weights.shape[1])).clamp(min=0)
        degrees, whole = [-1] * self.steps, [True] * self.steps
        low, high = (_place(problem, t, coordinate)[:, None] for t in (start, end))
        for k in range(self.weights.shape[1] + 1):
            at, past = (
                ((_place(problem, t, coordinate) - low) / (high - low)) ** k for t in (inside, self.times[ages])
            )
            want, got = (kernel * at).sum(1), (self.weights[last] * past).sum(1)
            scale = (kernel.abs() * at.abs()).sum(1).clamp(min=1e-30)
            for n, fits in enumerate(((got - want).abs() < 1e-9 * scale).tolist()):
                whole[n] = whole[n] and fits
                degrees[n] = k if whole[n] else degrees[n]
        return degrees

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        record = {"format": _FORMAT, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}
        write_atomically(path, json.dumps(record, indent=1).encode())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            ValueError: the file is not such a plan, or its tables do not fit each other.
        """
        try:
            record = json.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected a plan saved as JSON, got {error}") from error
        if not isinstance(record, dict) or record.pop("format", None) != _FORMAT:
            raise ValueError(f"{path}: expected a file of format {_FORMAT!r}")
        names = {f.name for f in fields(Plan)}
        record.setdefault("note", None)  # plans of the first releases have none
        if set(record) != names:
            raise ValueError(f"{path}: expected the fields {sorted(names)}, got {sorted(record)}")
        for name in ("name", "target", "noise_kind", "view"):
            if not isinstance(record[name], str):
                raise ValueError(f"{path}: expected {name} as text, got {type(record[name]).__name__}")
        for name in ("grid", "times", "step_of_row", "ratio", "weights", "noise"):
            if not isinstance(record[name], list):
                raise ValueError(f"{path}: expected {name} as a list of numbers, got {type(record[name]).__name__}")
        try:
            tables = {
                name: None if record[name] is None else torch.tensor(record[name], dtype=dtype)
                for name, dtype in _TABLES.items()
            }
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected tables of numbers: {error}") from error
        return Plan(**{**record, **tables})

    def check(self, problem: Problem) -> None:
        if self.view == "transition":
            semilinear(self.name, problem)
        if self.process is not None:
            process, eta = getattr(problem, "process", problem), getattr(problem, "eta", None)
            if repr(process) != self.process:
                raise ValueError(f"this plan was made for {self.process}, not for {process!r}")
            if eta_key(eta) != self.eta:
                raise ValueError(f"this plan was made for eta = {self.eta}, not for eta = {eta!r}")
        if not bool((self.noise != 0).any()):
            refuse_noise(self.name, problem)

    def draws_noise(self, problem: Problem) -> bool:
        kicked = self.kick_noise is not None and bool((self.kick_noise != 0).any())
        return kicked or bool((self.noise != 0).any())

    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        if not torch.equal(grid, self.grid):
            raise ValueError(
                f"this plan has its own grid of {self.steps} steps from {float(self.grid[0]):g} to "
                f"{float(self.grid[-1]):g}; give no other"
            )
        return self

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> PlanRun:
        return PlanRun(self.plan(problem, grid), problem, x, noise)

    @property
    def draws(self) -> int:
        """Standard normals (of the state's shape) a step."""
        return 1 if self.noise.ndim == 1 else self.noise.shape[1]

    @cached_property
    def lengths(self) -> Tensor:
        """The lengths (steps * draws,) of the normals' intervals on the clock of which the noise is a Brownian motion.

        Where the state is a time x (a drift) they are those of t; else the variance that each normal leaves in x, in
        units of the linear flow: x_n/R_n, R_n = ratio_0 ... ratio_(n-1), is a martingale in the noise. Only ratios of
        neighbours matter; the largest is 1, and none is so short that float32 loses it.
        """
        if self.target == "drift":
            return torch.diff(self.grid).abs()
        last = torch.tensor([rows[-1] for rows in self._rows])
        ratio = self.ratio[last].abs()
        scale = torch.cumsum(torch.log(torch.where(ratio > 0, ratio, 1.0)), 0)  # a step that forgets x begins anew
        share = self.noise.reshape(self.nfe, -1)[last]
        logs = 2 * (torch.log(share.abs()) - scale[:, None])
        return torch.where(share == 0, 0.0, torch.exp((logs - logs.max()).clamp(min=-69.0))).flatten()

    @cached_property
    def clock(self) -> Tensor:
        """The clock (steps * draws + 1,) of those lengths: finer grids refine its path."""
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(self.lengths, 0)])

    @cached_property
    def normal_times(self) -> Tensor:
        """The times between which each normal stands, each step shared equally: (steps * draws + 1,)."""
        share = torch.arange(self.draws, dtype=torch.float64) / self.draws
        inner = self.grid[:-1, None] + torch.diff(self.grid)[:, None] * share
        return torch.cat([inner.flatten(), self.grid[-1:]])

    def scale_of(self, lengths: Tensor) -> list[list[float]]:
        """Of each row, what multiplies increments of these lengths (steps * draws,) that stand for the normals."""
        per_row = lengths.reshape(self.steps, self.draws)[self.step_of_row]
        return torch.where(per_row > 0, self.noise.reshape(self.nfe, -1) / torch.sqrt(per_row), 0.0).tolist()

    @cached_property
    def own_scale(self) -> list[list[float]]:
        """`scale_of` its own lengths."""
        return self.scale_of(self.lengths)

    @cached_property
    def largest(self) -> float:
        """The largest coefficient by magnitude: a state whose dtype does not hold it cannot be stepped."""
        tables = (self.ratio, self.weights, self.noise, torch.tensor(self.own_scale, dtype=torch.float64))
        return max(float(table.abs().max()) for table in tables if table.numel())

    @cached_property
    def _rows(self) -> list[range]:
        """The rows of each step."""
        edges = torch.searchsorted(self.step_of_row, torch.arange(self.steps + 1)).tolist()
        return [range(a, b) for a, b in pairwise(edges)]

    @cached_property
    def _storage(self) -> tuple[list[int], Tensor]:
        """(the slot each evaluation is stored in, the weights by slot): no more slots than are ever needed at once."""
        rows, history = self.weights.shape
        if history == 1:
            return [0] * rows, self.weights
        needed = torch.nonzero(self.weights).tolist()
        last = list(range(rows))
        for row, age in needed:
            last[row - age] = max(last[row - age], row)
        slots: list[int] = []
        free: list[int] = []
        until: list[int] = []  # the row up to which each slot is taken
        for row in range(rows):
            free = [slot for slot, end in enumerate(until) if end < row]
            if not free:
                free = [len(until)]
                until.append(row)
            slots.append(free[0])
            until[free[0]] = last[row]
        by_slot = torch.zeros(rows, len(until), dtype=torch.float64)
        for row, age in needed:
            by_slot[row, slots[row - age]] = self.weights[row, age]
        return slots, by_slot


def corrected_weights(ratio: Tensor, predict: Tensor, correct: Tensor) -> Tensor:
    """The weights of a predictor whose every step is corrected when the next one evaluates, in one row a step.

    The correction of step n, x_c = x_p + sum_j (C_j - P_j) e_j, is known when its end is evaluated; the prediction of
    step n + 1 starts from x_c = x_p + ..., so it is still one combination of x_p and the evaluations.

    Args:
        ratio: (steps, ...) of the state.
        predict: P, (steps, p, ...), newest evaluation first.
        correct: C, (steps - 1, c, ...), the evaluation at the step's end first.
    """
    steps, history = predict.shape[0], max(predict.shape[1] + 1, correct.shape[1])
    rest = predict.shape[2:]
    weights = torch.zeros(steps, history, *rest, dtype=torch.float64)
    change = torch.zeros(steps - 1, history, *rest, dtype=torch.float64)
    weights[:, : predict.shape[1]] = predict
    change[:, : correct.shape[1]] = correct
    change[:, 1 : predict.shape[1] + 1] -= predict[:-1]
    weights[1:] += ratio[1:, None] * change
    return weights


def _place(problem: Problem, t: Tensor, coordinate: str) -> Tensor:
    """t, lam(t) or sigma(t)/alpha(t)."""
    if coordinate == "t":
        return t
    lam = semilinear("exact_degrees", problem).gaussian.lam(t)
    return lam if coordinate == "lam" else torch.exp(-lam)


def spliced(head: Plan, tail: Plan, steps: int) -> Plan:
    """The first `steps` steps of `head`, then `tail`, one call a step, with its history moved past head's stages.

    Both are of the same grid and target; every step of `head` begins with an evaluation at its start.
    """
    if steps == 0:
        return tail
    if steps == tail.steps:
        return dataclasses.replace(head, name=tail.name)
    own = head.step_of_row < steps
    rest = tail.step_of_row >= steps
    first = torch.cat([torch.ones(1, dtype=torch.bool), torch.diff(head.step_of_row[own]) > 0])
    # the row that evaluates at the start of each step
    row_of = torch.cat([torch.nonzero(first).flatten(), int(own.sum()) + torch.arange(int(rest.sum()))])
    weights = torch.zeros(row_of.numel() - steps + int(own.sum()), int(row_of[-1]) + 1, dtype=torch.float64)
    weights[: int(own.sum()), : head.weights.shape[1]] = head.weights[own]
    for n in range(steps, tail.steps):
        for age in torch.nonzero(tail.weights[n]).flatten().tolist():
            weights[row_of[n], row_of[n] - row_of[n - age]] = tail.weights[n, age]
    history = int(torch.nonzero((weights != 0).any(0)).max()) + 1

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(head, name)[own], getattr(tail, name)[rest]])

    return dataclasses.replace(
        tail,
        times=joined("times"),
        step_of_row=joined("step_of_row"),
        ratio=joined("ratio"),
        weights=weights[:, :history].clone(),
        noise=joined("noise"),
        shift_weight=None if tail.shift_weight is None else joined("shift_weight"),
    )
