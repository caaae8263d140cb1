"""The attempted step as one compiled function: for drifts so cheap that the launch of each operation is the cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from sdeflow.attempt import Attempt, Progress, Step
from sdeflow.kept import Kept
from sdeflow.sde import Problem, checked_shape
from sdeflow.solvers.base import Pair
from sdeflow.solvers.embedded import RungeKuttaPair

Whole = Callable[[Attempt, Problem, Progress, torch.dtype, bool], tuple[Progress, Step | None]]


def whole_step(
    attempt: Attempt, problem: Problem, now: Progress, dtype: torch.dtype, keep: bool
) -> tuple[Progress, Step | None]:
    """One attempted step, the drift of `problem` inside: tensors in, tensors out, and no question of the host's.

    Args:
        dtype: of the states that the drift sees.
        keep: return the step itself too, for dense output.
    """
    reached, step = attempt(partial(evaluated, attempt.pair, problem, dtype), problem, now)
    return reached, step if keep else None


def evaluated(pair: Pair, problem: Problem, dtype: torch.dtype, x: Tensor, s: Tensor) -> Tensor:
    """One evaluation at states x, which are of `dtype` to the problem."""
    state = x if x.dtype == dtype else x.to(dtype)
    value = checked_shape(pair.evaluate(problem, state, s), state, "the drift")
    return value if value.dtype == x.dtype else value.to(x.dtype)


def compiled_step(pair: Pair, problem: Problem, keep: bool, backend: str = "inductor") -> Whole:
    """`whole_step` by torch.compile, in one graph, kept for the next problem of this class with this pair.

    It is compiled at its first call, and once more when a number in it (a tolerance, the batch, an attribute of the
    problem) first changes; from then on that number may be any.

    Raises:
        ValueError: not an explicit Runge-Kutta pair that ends in its next first stage.
        RuntimeError: at the call, if the drift cannot be compiled or the machine has no C++ compiler.
    """
    if not isinstance(pair, RungeKuttaPair) or not pair.tableau.first_same_as_last:
        raise ValueError("compiled=True takes an explicit Runge-Kutta pair: BogackiShampine, RK45, Tsit5 or DOP853")
    _ = pair.tableau.sparse  # made before: the compiler does not enter the lock of a cached property
    return _STEPS.get((type(problem), pair, keep, backend), lambda: _compiled(backend))


def _compiled(backend: str) -> Whole:
    # a code object of its own: torch counts the variants of each, and stops at eight
    copy = FunctionType(whole_step.__code__.replace(), globals(), "whole_step")
    step = torch.compile(copy, fullgraph=True, backend=backend, options=_options() if backend == "inductor" else None)

    def run(
        attempt: Attempt, problem: Problem, now: Progress, dtype: torch.dtype, keep: bool
    ) -> tuple[Progress, Step | None]:
        try:
            with torch.no_grad():
                return step(attempt, problem, now, dtype, keep)
        except Exception as error:
            raise RuntimeError(
                f"the step of {type(problem).__name__} could not be compiled or run ({type(error).__name__}): solve "
                "with compiled=False. A drift that compiles is made of torch operations, without branches on values "
                "of tensors; the compiler needs a C++ compiler on this machine"
            ) from error

    return run


def _options() -> dict[str, Any]:
    # calls go from C++ to C++: a third less time a call
    options: dict[str, Any] = {"cpp_wrapper": True}
    if _TORCH >= (2, 8):  # the first that is sure to know it
        options["guard_filter_fn"] = _changeable
    return options


def _changeable(guards: Sequence[Any]) -> list[bool]:
    """Which guards to check at each call: not those of the pair, frozen and in the key, with its 200 coefficients."""
    return [not guard.name.startswith("attempt.pair") for guard in guards]


_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
_STEPS: Kept[Whole] = Kept(64)
