"""One attempted step of a batch as a pure function of tensors: eager torch runs it, a compiler can take it whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.pid import PID
from sdeflow.sde import Problem
from sdeflow.solvers.base import Evaluate, Pair, per_row


class Progress(NamedTuple):
    """Where the samples of a batch are; all (batch,), float64 where not said otherwise.

    Attributes:
        y: states (batch, *event).
        s: clocks.
        k: evaluations at (y, s), (batch, *event).
        h: sizes of the next steps, > 0.
        error: the last accepted error in tolerances, no less than 1e-4.
        running: who still marches, bool; the others keep y, s and k whatever they are asked to attempt.
        steps, accepted: attempts made and accepted, int64.
    """

    y: Tensor
    s: Tensor
    k: Tensor
    h: Tensor
    error: Tensor
    running: Tensor
    steps: Tensor
    accepted: Tensor


class Step(NamedTuple):
    """What an attempt did, for dense output: from clock `s` and state `y` by `step` (signed) to clock `to`."""

    y: Tensor
    s: Tensor
    step: Tensor
    to: Tensor
    accept: Tensor
    stages: list[Tensor]


class Attempt:
    """The rule of one attempted step of every sample: stages, error, acceptance, the next step size, who ends.

    Step sizes follow `PID.factor`. A rejected step never grows the next; one whose error is not finite says nothing
    of the error and is quartered. A sample ends at the end of the span, where its evaluation is not finite, and where
    its step falls under the resolution of its clock.

    Args:
        pair: the embedded pair.
        control: the step size control.
        start, end: the span on the pair's clock.
        device: of the states.
    """

    def __init__(self, pair: Pair, control: PID, start: float, end: float, device: torch.device) -> None:
        self.pair, self.control, self.sign = pair, control, 1.0 if end > start else -1.0
        self.end = torch.tensor(end, dtype=torch.float64, device=device)
        self.smallest = 1e-14 * max(abs(start), abs(end))
        """Steps below this are lost in the clock's rounding."""

    def __call__(self, evaluate: Evaluate, problem: Problem, now: Progress) -> tuple[Progress, Step]:
        pair, control, sign, end = self.pair, self.control, self.sign, self.end
        y, s, k, h, error, running, steps, accepted = now
        left = end - s
        last = h >= left * (sign * (1 - 1e-12))
        step = torch.where(last, left, h if sign > 0 else -h)
        to = torch.where(last, end, s + step)
        result, estimates, slope, stages = pair.attempt(evaluate, problem, y, s, step, k)

        with torch.no_grad():  # step sizes are choices, not part of the solution map
            allowed = control.allowed(y, result)
            size = pair.size([control.size(e, allowed) for e in estimates])
            within = size <= 1  # not where it is NaN
            accept = running & within
            factor = control.factor(size, error, pair.order)
            factor = torch.where(within, factor, torch.clamp(factor, max=1.0))
            factor = torch.where(size < torch.inf, factor, 0.25)
            h = step.abs() * factor
            error = torch.where(accept, torch.clamp(size, min=1e-4), error)

        mask = per_row(accept, y)
        y_next = torch.where(mask, result, y)
        s_next = torch.where(accept, to, s)
        if slope is None:  # the pair does not evaluate at its result
            slope = evaluate(y_next, s_next) if bool(accept.any()) else k
        k_next = torch.where(mask, slope, k)
        goes_on = (s_next != end) & (h >= self.smallest) & finite(k_next)
        reached = Progress(y_next, s_next, k_next, h, error, running & goes_on, steps + running, accepted + accept)
        return reached, Step(y, s, step, to, accept, stages)


def finite(k: Tensor) -> Tensor:
    """Which samples of k (batch, *event) have no infinite or undefined component: 0 k is 0 there, and NaN else."""
    return (k.detach() * 0).reshape(k.shape[0], -1).sum(1) == 0
