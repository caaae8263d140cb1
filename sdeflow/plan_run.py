"""The runner of any plan: one model call, one fused combination and one noise draw a row."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdeflow.model import RowEvaluator
from sdeflow.noise import CHURN, Noise
from sdeflow.sde import SDE, Evaluator, Problem, multiply_noise, noise_shape
from sdeflow.times import Each

if TYPE_CHECKING:
    from sdeflow.plan import Plan


Row = Callable[[int, Tensor, Tensor], Tensor]
"""`row(k, base, y)`: evaluate row k at y and form its combination with the state `base` at the start of its step."""


class PlanRun:
    """A solve by a plan.

    Args:
        work: dtype of the combinations, at least as wide as the state's; None for the usual one.
    """

    def __init__(
        self, plan: Plan, problem: Problem, x: Tensor, noise: Noise | None, work: torch.dtype | None = None
    ) -> None:
        self.calls = 0
        self._rows = plan._rows
        # 16-bit states are combined in float32: their 8 to 11 bits would swallow the increments
        usual = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        self._work = usual if work is None else work
        if plan.largest > torch.finfo(self._work).max:
            raise ValueError(
                f"{plan.name}: a coefficient of {plan.largest:.1e} is beyond {self._work}, in which the states are "
                "combined: expected a process of moderate numbers, or float64 states"
            )
        self._kept: dict[int, Tensor] = {}
        self._row = _rows(plan, problem, x, self._work, self._kept)
        self._noisy = (plan.noise.reshape(plan.nfe, -1) != 0).any(1).tolist() if noise is not None else None
        self._add_noise = _noise_adder(plan, problem, x, noise, self._work)
        self._shift: Tensor | None = None
        if plan.shift is not None and plan.shift_weight is not None and bool((plan.shift != 0).any()):
            fits = zip(plan.shift.shape[::-1], x.shape[:0:-1], strict=False)
            if plan.shift.ndim >= x.ndim or any(size not in (1, of_x) for size, of_x in fits):
                raise ValueError(
                    f"{plan.name}: expected a mean that fits samples of shape {tuple(x.shape[1:])}, got one of "
                    f"{tuple(plan.shift.shape)}"
                )
            self._shift = plan.shift.to(dtype=self._work, device=x.device)
            self._shift_weight = plan.shift_weight.tolist()
        self._kick: list[tuple[float, float]] | None = None
        if plan.kick_ratio is not None and plan.kick_noise is not None and noise is not None:
            self._kick = list(zip(plan.kick_ratio.tolist(), plan.kick_noise.tolist(), strict=True))
            self._unit = noise.sequence(CHURN, plan.steps, x.shape[1:], self._work)
        self._reached = self._returned = torch.empty(0)
        if self._work == x.dtype and self._shift is None and self._kick is None and self._noisy is None:
            self.step = self._plain_step  # type: ignore[method-assign]

    def remember(self) -> dict[Hashable, Tensor]:
        """See `Replayable`; for a run that was made while gradients were recorded."""
        memory: dict[Hashable, Tensor] = {slot: e for slot, e in self._kept.items()}
        if self._reached is not self._returned:  # the rounding of a 16-bit state
            memory["reached"] = self._reached
        return memory

    def restore(self, memory: dict[Hashable, Tensor], x: Tensor) -> None:
        self._reached, self._returned = memory.get("reached", x), x
        self._kept.clear()
        self._kept.update((slot, e) for slot, e in memory.items() if isinstance(slot, int))

    def _plain_step(self, i: int, x: Tensor) -> Tensor:
        """`step` of a plan that has nothing but rows."""
        y, row = x, self._row
        for k in self._rows[i]:
            self.calls += 1
            y = row(k, x, y)
        return y

    def step(self, i: int, x: Tensor) -> Tensor:
        # a 16-bit state goes on from what was computed, not from its rounding, unless somebody changed it
        base = self._reached if x is self._returned else x.to(self._work)
        if self._kick is not None and self._kick[i][1] != 0.0:
            ratio, std = self._kick[i]
            base = torch.add(ratio * base, self._unit(i), alpha=std)
        y = base
        for k in self._rows[i]:
            self.calls += 1
            y = self._row(k, base, y)
            if self._shift is not None:
                y = torch.add(y, self._shift, alpha=self._shift_weight[k])
            if self._noisy is not None and self._noisy[k]:
                y = self._add_noise(k, i, y, x)
        self._reached = y
        self._returned = y = y.to(x.dtype)
        return y


def _rows(plan: Plan, problem: Problem, x: Tensor, work: torch.dtype, kept: dict[int, Tensor]) -> Row:
    evaluate = problem.evaluator(plan.target, plan.times)
    history = plan._storage[1].shape[1]
    if x.dtype != work:
        return _kept_rows(plan, _widened(evaluate, x.dtype, work), kept)
    if history == 1:
        return _folded_rows(plan, evaluate) if isinstance(evaluate, RowEvaluator) else _single_rows(plan, evaluate)
    if torch.is_grad_enabled():
        return _kept_rows(plan, evaluate, kept)
    return _fused_rows(plan, evaluate, x, kept)


def _widened(evaluate: Evaluator, dtype: torch.dtype, work: torch.dtype) -> Evaluator:
    return lambda k, y: evaluate(k, y.to(dtype)).to(work)


def _single_rows(plan: Plan, evaluate: Evaluator) -> Row:
    """Rows that use their own evaluation alone."""
    ratio, weight = plan.ratio.tolist(), plan._storage[1][:, 0].tolist()

    def row(k: int, base: Tensor, y: Tensor) -> Tensor:
        r = ratio[k]
        return torch.add(base if r == 1.0 else r * base, evaluate(k, y), alpha=weight[k])

    return row


def _folded_rows(plan: Plan, evaluate: RowEvaluator) -> Row:
    """Such rows with r x + w (p y + q v), v what the network says, as two operations: (r + w p) x + w q v at y = x."""
    ask, first = evaluate.ask, [rows[0] for rows in plan._rows]
    starts = set(first)
    weight = plan._storage[1][:, 0].tolist()
    own = [w * p if k not in starts else 0.0 for k, (w, p) in enumerate(zip(weight, evaluate.p, strict=True))]
    ratio = [
        r + w * p if k in starts else r
        for k, (r, w, p) in enumerate(zip(plan.ratio.tolist(), weight, evaluate.p, strict=True))
    ]
    factor = [w * q for w, q in zip(weight, evaluate.q, strict=True)]

    def row(k: int, base: Tensor, y: Tensor) -> Tensor:
        value = ask(k, y)
        mine = torch.mul(base, ratio[k]).add_(value, alpha=factor[k])
        return mine if own[k] == 0.0 else mine.add_(y, alpha=own[k])

    return row


def _kept_rows(plan: Plan, evaluate: Evaluator, kept: dict[int, Tensor]) -> Row:
    """Rows over a history `kept`, with no writes into shared memory: autograd keeps what it needs."""
    ratio = plan.ratio.tolist()
    slots, by_slot = plan._storage
    terms = [[(slot, w) for slot, w in enumerate(weights) if w != 0.0] for weights in by_slot.tolist()]

    def row(k: int, base: Tensor, y: Tensor) -> Tensor:
        kept[slots[k]] = evaluate(k, y)
        y = base if ratio[k] == 1.0 else ratio[k] * base
        for slot, w in terms[k]:
            y = torch.add(y, kept[slot], alpha=w)
        return y

    return row


def _fused_rows(plan: Plan, evaluate: Evaluator, x: Tensor, kept: dict[int, Tensor]) -> Row:
    """Rows over a history in one block of memory: one product of a matrix and a vector forms the combination.

    `kept` gets the places of the history in that block.
    """
    slots, by_slot = plan._storage
    store = torch.zeros(by_slot.shape[1], x.numel(), dtype=x.dtype, device=x.device)
    columns, weights = store.T, by_slot.to(dtype=x.dtype, device=x.device).unbind()
    places, ratio, shape = [part.view(x.shape) for part in store.unbind()], plan.ratio.tolist(), x.shape
    kept.update(enumerate(places))
    enter = _into_places(evaluate, places)

    def row(k: int, base: Tensor, y: Tensor) -> Tensor:
        enter(k, y, slots[k])
        return torch.addmv(base.reshape(-1), columns, weights[k], beta=ratio[k]).view(shape)

    return row


def _into_places(evaluate: Evaluator, places: list[Tensor]) -> Callable[[int, Tensor, int], None]:
    """`enter(k, y, slot)`: evaluation k at y, written into a slot."""
    if not isinstance(evaluate, RowEvaluator):

        def copy(k: int, y: Tensor, slot: int) -> None:
            places[slot].copy_(evaluate(k, y))

        return copy
    ask, p, q = evaluate.ask, evaluate.p, evaluate.q

    def convert(k: int, y: Tensor, slot: int) -> None:
        value, place = ask(k, y), places[slot]
        torch.mul(value, q[k], out=place)
        if p[k] != 0.0:
            place.add_(y, alpha=p[k])

    return convert


def _noise_adder(
    plan: Plan, problem: Problem, x: Tensor, noise: Noise | None, work: torch.dtype
) -> Callable[[int, int, Tensor, Tensor], Tensor]:
    """`add(k, i, y, x)`: y plus the noise of row k, the last of step i, which began at x."""
    if noise is None:
        return lambda k, i, y, x: y
    if plan.noise_kind == "unit":
        return _unit_noise(plan, noise, x, work)
    assert isinstance(problem, SDE)
    sde, ts = problem, Each(plan.grid)
    walk = noise.walk(plan.grid, noise_shape(sde, x, ts[0])[1:], x.dtype)
    scale = torch.where(walk.lengths > 0, plan.noise / torch.sqrt(walk.lengths), 0.0).tolist()

    def add(k: int, i: int, y: Tensor, x: Tensor) -> Tensor:
        g = sde.diffusion(x, ts[i])
        if sde.noise == "diagonal" and g.dtype == y.dtype:
            return torch.addcmul(y, g, walk(i).w, value=scale[k])
        return torch.add(y, multiply_noise(sde, g, walk(i).w), alpha=scale[k])

    return add


def _unit_noise(plan: Plan, noise: Noise, x: Tensor, work: torch.dtype) -> Callable[[int, int, Tensor, Tensor], Tensor]:
    draws = plan.draws
    walk = noise.walk(plan.normal_times, x.shape[1:], work, lengths=plan.lengths)
    scale = plan.own_scale if walk.lengths is plan.lengths else plan.scale_of(walk.lengths)
    if draws == 1:
        single = [row[0] for row in scale]
        return lambda k, i, y, x: torch.add(y, walk(i).w, alpha=single[k])
    step, increments = -1, [torch.empty(0)]

    def add(k: int, i: int, y: Tensor, x: Tensor) -> Tensor:
        nonlocal step, increments
        if step != i:
            step, increments = i, [walk(i * draws + j).w for j in range(draws)]
        for w, c in zip(increments, scale[k], strict=True):
            if c != 0.0:
                y = torch.add(y, w, alpha=c)
        return y

    return add
