"""The runner of any plan: one model call, one fused combination and one noise draw a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdeflow.noise import CHURN, Noise
from sdeflow.sde import SDE, Problem, multiply_noise, noise_shape
from sdeflow.times import Each

if TYPE_CHECKING:
    from sdeflow.plan import Plan


class PlanRun:
    """The runner of any plan: one model call, one fused combination and one noise draw a row."""

    def __init__(self, plan: Plan, problem: Problem, x: Tensor, noise: Noise | None) -> None:
        self.calls = 0
        self._plan = plan
        self._evaluate = problem.evaluator(plan.target, plan.times)
        self._ratio = plan.ratio.tolist()
        self._noisy = (plan.noise.reshape(plan.nfe, -1) != 0).any(1).tolist()
        self._rows = plan._rows
        # 16-bit states are combined in float32: their 8 to 11 bits would swallow the increments
        self._work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        self._plain = self._work == x.dtype
        self._shift: Tensor | None = None
        if plan.shift is not None and plan.shift_weight is not None and bool((plan.shift != 0).any()):
            self._shift = plan.shift.to(dtype=self._work, device=x.device)
            self._shift_weight = plan.shift_weight.tolist()
        self._kick: list[tuple[float, float]] | None = None
        if plan.kick_ratio is not None and plan.kick_noise is not None and noise is not None:
            self._kick = list(zip(plan.kick_ratio.tolist(), plan.kick_noise.tolist(), strict=True))
            self._unit = noise.sequence(CHURN, plan.steps, x.shape[1:], self._work)
        self._reached = self._returned = torch.empty(0)
        self._combine = _combiner(plan, x, self._work)
        self._add_noise = _noise_adder(plan, problem, x, noise, self._work)

    def step(self, i: int, x: Tensor) -> Tensor:
        # a 16-bit state goes on from what was computed, not from its rounding, unless somebody changed it
        base = self._reached if x is self._returned else self._widen(x)
        if self._kick is not None and self._kick[i][1] != 0.0:
            ratio, std = self._kick[i]
            base = torch.add(ratio * base, self._unit(i), alpha=std)
        y = base
        for k in self._rows[i]:
            e = self._evaluate(k, y if self._plain else y.to(x.dtype))
            self.calls += 1
            y = self._combine(k, base, e)
            if self._shift is not None:
                y = torch.add(y, self._shift, alpha=self._shift_weight[k])
            if self._noisy[k]:
                y = self._add_noise(k, i, y, x)
        self._reached, self._returned = y, y if self._plain else y.to(x.dtype)
        return self._returned

    def _widen(self, x: Tensor) -> Tensor:
        return x if self._plain else x.to(self._work)


def _combiner(plan: Plan, x: Tensor, work: torch.dtype) -> Callable[[int, Tensor, Tensor], Tensor]:
    """`combine(k, base, e)`: enter evaluation k in the history and form row k's combination."""
    ratio = plan.ratio.tolist()
    slots, by_slot = plan._storage
    if by_slot.shape[1] == 1:
        weight = by_slot[:, 0].tolist()

        def single(k: int, base: Tensor, e: Tensor) -> Tensor:
            e = e if e.dtype == work else e.to(work)
            return torch.add(base if ratio[k] == 1.0 else ratio[k] * base, e, alpha=weight[k])

        return single

    if torch.is_grad_enabled():  # no writes into shared buffers: autograd keeps what it needs
        weights = by_slot.tolist()
        kept: dict[int, Tensor] = {}

        def chain(k: int, base: Tensor, e: Tensor) -> Tensor:
            kept[slots[k]] = e.to(work)
            y = ratio[k] * base
            for slot, w in enumerate(weights[k]):
                if w != 0.0:
                    y = torch.add(y, kept[slot], alpha=w)
            return y

        return chain

    store = torch.zeros(by_slot.shape[1], x.numel(), dtype=work, device=x.device)
    columns, rows = store.T, by_slot.to(dtype=work, device=x.device).unbind()

    def fused(k: int, base: Tensor, e: Tensor) -> Tensor:
        store[slots[k]].copy_(e.reshape(-1))
        return torch.addmv(base.reshape(-1), columns, rows[k], beta=ratio[k]).view(base.shape)

    return fused


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
    scale = _normalised(plan.noise, walk.lengths)

    def add(k: int, i: int, y: Tensor, x: Tensor) -> Tensor:
        g = sde.diffusion(x, ts[i])
        if sde.noise == "diagonal" and g.dtype == y.dtype:
            return torch.addcmul(y, g, walk(i).w, value=scale[k])
        return torch.add(y, multiply_noise(sde, g, walk(i).w), alpha=scale[k])

    return add


def _unit_noise(plan: Plan, noise: Noise, x: Tensor, work: torch.dtype) -> Callable[[int, int, Tensor, Tensor], Tensor]:
    draws = plan.draws
    walk = noise.walk(_times(plan), x.shape[1:], work, lengths=plan.lengths)
    per_row = walk.lengths.reshape(plan.steps, draws)[plan.step_of_row]
    scale = _normalised(plan.noise.reshape(plan.nfe, draws), per_row)
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


def _times(plan: Plan) -> Tensor:
    """The times between which each normal stands, each step shared equally: (steps * draws + 1,)."""
    share = torch.arange(plan.draws, dtype=torch.float64) / plan.draws
    inner = plan.grid[:-1, None] + torch.diff(plan.grid)[:, None] * share
    return torch.cat([inner.flatten(), plan.grid[-1:]])


def _normalised(coefficients: Tensor, lengths: Tensor) -> list:
    """The coefficients of increments of these lengths that are those of unit normals."""
    return torch.where(lengths > 0, coefficients / torch.sqrt(lengths), 0.0).tolist()
