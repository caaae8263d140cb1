"""What came of one input, and whether that is allowed.

Allowed are a documented error, a status per sample, the error of the caller's own function, and a right result.
An error is documented when the library raised it on purpose (a `raise` of its own) as one of `DOCUMENTED`, with a
message. A ValueError or TypeError that Python or torch raised with a message is counted apart, as a plain error: it
says what is wrong and not of which argument. Any other, such as an IndexError from the middle, is forbidden.
"""

from __future__ import annotations

import dataclasses
import dis
import math
import signal
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import sdeflow as sf
from sdeflow.expectation.sums import SamplesFailed

Verdict = Literal["documented error", "plain error", "status", "the caller's error", "accepted", "FORBIDDEN"]
VERDICTS: tuple[Verdict, ...] = (
    "documented error", "plain error", "status", "the caller's error", "accepted", "FORBIDDEN",
)  # fmt: skip
DOCUMENTED = (ValueError, TypeError, ImportError, FileNotFoundError)
TIME_OUT = 10.0
"""Seconds for one input."""

_LIBRARY = str(Path(sf.__file__).parent)
_RAISES = {dis.opmap[name] for name in ("RAISE_VARARGS", "RERAISE")}


class Hang(BaseException):
    """An input took longer than `TIME_OUT`; no handler of the library catches it."""


class CallersError(Exception):
    """What the bad functions of the pools raise."""


@dataclass(frozen=True)
class Outcome:
    """The verdict on one input and the reason: an error's first line, or what is wrong with the result."""

    verdict: Verdict
    reason: str = ""
    result: Any = None


@contextmanager
def time_limit(seconds: float = TIME_OUT) -> Iterator[None]:
    """Raise `Hang` in the block after that many seconds of this process's own time, or six times as many on the clock.

    Its own time, as a busy machine must not make a slow answer a hang; the clock, as waiting takes no time of its own.
    """

    def ring(number: int, frame: types.FrameType | None) -> None:
        raise Hang

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 6 * seconds))
    before = [signal.signal(number, ring) for number, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def judge(
    act: Callable[[], Any],
    *,
    baseline: Any = None,
    refuse: bool = False,
    finite: bool = True,
    shows: bool = False,
    seconds: float = TIME_OUT,
) -> Outcome:
    """The outcome of `act`.

    Args:
        act: makes the call.
        baseline: what it must return if it accepts; None when that is not known.
        refuse: whether to accept is wrong.
        finite: whether a right result holds no NaN and no infinity.
        shows: whether a right result holds one: the input does.
        seconds: after which it counts as hanging.
    """
    try:
        with time_limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = act()
            fault = unsound(result, finite)
            if fault is None and baseline is not None:
                fault = difference(result, baseline)
    except Hang:
        return Outcome("FORBIDDEN", f"no answer in {seconds:g} seconds")
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        return _of_error(error)
    if failed(result):
        return Outcome("status")
    if shows and not isinstance(result, str):
        return (
            Outcome("FORBIDDEN", "accepted: NaN went in and did not come out") if fault is None else Outcome("accepted")
        )
    if fault is not None:
        return Outcome("FORBIDDEN", f"accepted: {fault}")
    if refuse:
        return Outcome("FORBIDDEN", "accepted what means nothing")
    return Outcome("accepted", result=result)


def _of_error(error: BaseException) -> Outcome:
    text = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    if isinstance(error, sf.SolveError):
        return Outcome("status", text)
    if isinstance(error, CallersError):
        return Outcome("the caller's error", text)
    where, on_purpose = _origin(error)
    if on_purpose and type(error) is RuntimeError and str(error).startswith(("the network of", "the reference of")):
        return Outcome("the caller's error", text)  # `bench` tells of the caller's problem that it failed, and why
    if on_purpose and type(error) in (ArithmeticError, SamplesFailed):
        return Outcome("documented error", text)  # of `expect`: samples failed
    if isinstance(error, sf.testing.CheckError):
        return Outcome("documented error", text)
    if not isinstance(error, DOCUMENTED):
        return Outcome("FORBIDDEN", f"{text} [{where}]")
    if isinstance(error, UnicodeError) or not str(error).strip():
        return Outcome("FORBIDDEN", f"{text} without explanation [{where}]")
    if not on_purpose:
        if "positional argument" in str(error):  # the caller's function has another signature
            return Outcome("the caller's error", text)
        if isinstance(error, (ValueError, TypeError)):
            return Outcome("plain error", f"{text} [{where}]")
        return Outcome("FORBIDDEN", f"{text} (not raised on purpose) [{where}]")
    return Outcome("documented error", text)


def _origin(error: BaseException) -> tuple[str, bool]:
    """(file and line of the library's innermost frame, whether that frame raised the error itself)."""
    place, on_purpose = "outside of the library", False
    step = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        inside = code.co_filename.startswith(_LIBRARY)
        if inside:
            place = f"{code.co_filename.removeprefix(_LIBRARY)[1:]}:{step.tb_lineno} {code.co_name}"
        if step.tb_next is None:
            on_purpose = inside and code.co_code[step.tb_lasti] in _RAISES
        step = step.tb_next
    return place, on_purpose


def failed(result: Any) -> bool:
    """Whether a result says of some samples that they failed."""
    return isinstance(result, sf.Solution) and not bool(result.ok.all())


def unsound(value: Any, finite: bool = True, depth: int = 4) -> str | None:
    """What no result may be: NaN or infinity where numbers belong, a tensor without values."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return "a tensor without values (meta)"
        if finite and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return f"NaN or infinity in a tensor of shape {tuple(value.shape)}"
        return None
    if isinstance(value, float):
        return f"the number {value}" if finite and not math.isfinite(value) else None
    if depth == 0:
        return None
    parts: Any = ()
    if isinstance(value, (tuple, list)):
        parts = value[:100]
    elif isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, sf.Solution):
        if failed(value):
            return None
        parts = (value.x, value.xs)
    return next((fault for part in parts if (fault := unsound(part, finite, depth - 1))), None)


def difference(value: Any, baseline: Any) -> str | None:
    """How a result differs from the one of the same input in another guise."""
    if isinstance(value, sf.Solution) and isinstance(baseline, sf.Solution):
        return difference(value.x, baseline.x)
    if isinstance(value, Tensor) and isinstance(baseline, Tensor):
        if value.shape != baseline.shape:
            return f"shape {tuple(value.shape)} instead of {tuple(baseline.shape)}"
        same = torch.allclose(value.detach().double(), baseline.detach().double(), rtol=1e-4, atol=1e-6, equal_nan=True)
        return None if same else "another result than for the same input in its plain form"
    if isinstance(value, (tuple, list)) and isinstance(baseline, (tuple, list)):
        if len(value) != len(baseline):
            return f"{len(value)} parts instead of {len(baseline)}"
        pairs = zip(value, baseline, strict=True)
        return next((fault for a, b in pairs if (fault := difference(a, b))), None)
    if isinstance(value, float) and isinstance(baseline, float):
        close = math.isclose(value, baseline, rel_tol=1e-4, abs_tol=1e-9)
        return None if close else f"{value} instead of {baseline}"
    if dataclasses.is_dataclass(value) and type(value) is not type(baseline):
        return f"a {type(value).__name__} instead of a {type(baseline).__name__}"
    return None
