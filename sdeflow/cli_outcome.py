"""How a command ends: errors of the user in one line, signals with what was kept, bugs with their traceback."""

from __future__ import annotations

import contextlib
import dis
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import typer

ARGUMENTS = "sdeflow.arguments"
"""Where the words of the command line are kept, in the context's `meta`."""

_UsageError: Any = typer.BadParameter.__base__
"""Of all errors in the words of a command line; Typer has no name for it, and click's only in older versions."""

_GRACE = 10.0
"""Seconds after a signal in which more of them do not break off the saving that it led to."""


class Stop:
    """Whether the user (Ctrl-C), or the system (SIGTERM, SIGHUP), has asked the command to end.

    A signal raises KeyboardInterrupt where the program is; within `at_step_ends` it is only noted, for the loop to ask
    for between two steps. A second one within ten seconds does nothing: it would break off the saving.
    """

    def __init__(self) -> None:
        self.number = 0
        self._at = -_GRACE
        self._noted: str | None = None

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.number != 0

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come: one that came in a callback of the interpreter gets lost."""
        if self.number:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_step_ends(self, message: str) -> Iterator[None]:
        """Within, a signal is noted and answered with `message`, and the loop goes on to the end of its step."""
        self._noted = message
        try:
            yield
        finally:
            self._noted = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals, except those that the process was started to ignore, and not outside the main thread."""
        before: dict[int, Any] = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(ValueError):
                    before[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.number and time.monotonic() - self._at < _GRACE
        if again:
            return
        first, self.number, self._at = not self.number, self.number or number, time.monotonic()
        if first and self._noted is not None:
            if self._noted:
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{self._noted}\n".encode())  # print may be where the signal came
            return
        raise KeyboardInterrupt


@contextlib.contextmanager
def running(
    context: typer.Context, kept: Callable[[], str], *, as_json: bool = False, quiet: bool = False
) -> Iterator[Stop]:
    """The work of a command, between its arguments and the printing of its result.

    - An error that this package raised on purpose, or of a file, is one line and exit status 1.
    - So is `sys.exit()` in user code, whatever status it asks for: the work was not done.
    - A signal is one line, what was kept and how to go on, and exit status 128 + its number (130 for Ctrl-C).
    - Anything else is a bug, here or in a package below, and keeps its traceback.

    Args:
        kept: says what was kept, and after a colon what to do; "{again}" in it stands for the command as it was given.
        as_json: what user code prints goes to standard error: standard output is for the result.
        quiet: say nothing of a signal: another process does.
    """
    name, stop = context.info_name, Stop()
    with stop.listening():
        try:
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                yield stop
        except KeyboardInterrupt:
            if not quiet:
                _say(f"sdeflow {name}: interrupted; {kept().replace('{again}', again(context))}")
            raise typer.Exit(128 + (stop.number or signal.SIGINT)) from None
        except (Exception, SystemExit) as error:
            line = _line(error)
            if line is None:
                raise
            _say(f"sdeflow {name}: {line}")
            raise typer.Exit(1) from error


@contextlib.contextmanager
def usage_in_one_line(context: Any = None) -> Iterator[None]:
    """An error in the words of the command line as one line, where the library prints usage and a box; exit status 2.

    Args:
        context: of the commands, if it is the words of one of them that are read.
    """
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # not an error: it prints the help
            raise
        name = None if context is None else context.invoked_subcommand
        command = "sdeflow" if name is None else f"sdeflow {name}"
        _say(f"{command}: {' '.join(error.format_message().split()).rstrip('.')}; see {command} --help")
        raise typer.Exit(error.exit_code) from error


def again(context: typer.Context) -> str:
    """The command as it was given, ready for a shell."""
    return shlex.join(["sdeflow", *context.meta.get(ARGUMENTS, sys.argv[1:])])


def say_json(value: Any) -> None:
    """A result on standard output, as JSON without NaN."""
    print(json.dumps(value, indent=1, allow_nan=False))


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(line, file=sys.stderr, flush=True)


def _line(error: Exception | SystemExit) -> str | None:
    """An error of the user's in one line; None for a bug, or for what is no error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory: try a smaller batch, or a smaller chunk"
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    if isinstance(error, OSError):
        return str(error)
    where = _raised_in(error)
    if isinstance(error, SystemExit):
        return ": ".join(filter(None, (where or "user code", "SystemExit", str(error))))
    if where is not None:
        return f"{where}: {type(error).__name__}: {error}"
    kinds = (ArithmeticError, AssertionError, ImportError, RuntimeError, TypeError, ValueError)
    return str(error) if isinstance(error, kinds) and _on_purpose(error) else None


def _on_purpose(error: Exception) -> bool:
    """Whether a `raise` of this package made it: the innermost frame is here and stands at that instruction."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    if tb is None or not _is_own(tb.tb_frame):
        return False
    return dis.opname[tb.tb_frame.f_code.co_code[tb.tb_lasti]] == "RAISE_VARARGS"


def _is_own(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return module == "sdeflow" or module.startswith("sdeflow.")


def _raised_in(error: BaseException) -> str | None:
    """The place in a file named on the command line, if that is where an error came from: "FILE, line N"."""
    place, tb = None, error.__traceback__
    while tb is not None:
        if tb.tb_frame.f_globals.get("__name__", "").startswith("sdeflow_user_"):
            place = f"{tb.tb_frame.f_code.co_filename}, line {tb.tb_lineno}"
        elif _is_own(tb.tb_frame):
            place = None  # user code called the package, which is what failed
        tb = tb.tb_next
    return place
