"""What a solve returns: `Solution`, `Stats`, `Status`, and the `State` that `iterate` yields."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Status(IntEnum):
    """How one sample ended.

    Attributes:
        FINISHED: at the end of its span.
        NON_FINITE: a state, a drift or a model's answer was not finite.
        STEP_UNDERFLOW: the tolerance asked for steps below the resolution of time.
        STEP_LIMIT: it took as many steps as it was allowed.
    """

    FINISHED = 0
    NON_FINITE = 1
    STEP_UNDERFLOW = 2
    STEP_LIMIT = 3

    @property
    def message(self) -> str:
        """What it means, for people."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.FINISHED: "reached the end",
    Status.NON_FINITE: "became infinite or NaN",
    Status.STEP_UNDERFLOW: "needed a step below the resolution of time: too stiff or singular for the tolerance",
    Status.STEP_LIMIT: "needed more than max_steps attempts",
}


@dataclass(frozen=True)
class Stats:
    """The cost of a solve.

    Attributes:
        nfe: model (or drift) calls that each sample took part in; an int when all samples step
            together, an int64 tensor (batch,) when steps are per sample.
        steps: attempted steps, likewise.
        accepted, rejected: of those.
        calls: calls of the model for the batch.
        network_calls: calls of networks for the batch, counted by the models (`Model.nfe`). Those are `calls`, unless
            an evaluation of the model asks several networks: two in classifier-free guidance, one outside of its
            interval. `calls` for a problem that has no model. -1 before the solve has ended. Another thread that
            calls the same model meanwhile is counted in.
    """

    nfe: int | Tensor
    steps: int | Tensor
    accepted: int | Tensor
    rejected: int | Tensor
    calls: int
    network_calls: int = -1


@dataclass(frozen=True)
class Solution:
    """The result of `solve`.

    Attributes:
        x: final states (batch, *event); of a sample that failed, the last value it had.
        ts: saved times, float64 (n,), or None.
        xs: states at those times (n, batch, *event), or None; NaN where a sample failed before.
        status: int64 (batch,), values of `Status`.
        stats: cost.
        seed: the seed of the noise (drawn when none was given); None for a deterministic solve.
    """

    x: Tensor
    ts: Tensor | None
    xs: Tensor | None
    status: Tensor
    stats: Stats
    seed: int | None = None

    @property
    def ok(self) -> Tensor:
        """Which samples finished, bool (batch,)."""
        return self.status == Status.FINISHED

    def failures(self) -> str:
        """One line a kind of failure, with the samples concerned; empty when all finished."""
        lines = []
        for status in Status:
            rows = torch.nonzero(self.status == status).flatten().tolist()
            if status is Status.FINISHED or not rows:
                continue
            shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            lines.append(f"{len(rows)} of {self.status.numel()} samples {status.message} (samples {shown})")
        return "; ".join(lines)


class SolveError(RuntimeError):
    """Some samples did not finish. `solution` holds everything that was computed."""

    def __init__(self, solution: Solution) -> None:
        super().__init__(f"{solution.failures()}; pass throw=False to get the solution with a status per sample")
        self.solution = solution


@dataclass
class State:
    """The solve after a step.

    Attributes:
        x: states (batch, *event).
        t: the time reached: a float, or float64 (batch,) when steps are per sample.
        step: steps taken (attempts, when steps are per sample).
        steps: steps of the whole grid; None when not known in advance.
    """

    x: Tensor
    t: float | Tensor
    step: int
    steps: int | None
