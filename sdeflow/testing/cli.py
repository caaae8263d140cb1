"""`sdeflow check`: verdicts on a user's SDE, and tests of them for their project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdeflow.checkpoints import write_atomically
from sdeflow.cli_options import AsJson, Seed, check_file
from sdeflow.cli_outcome import running, say_json
from sdeflow.files import check_not_read
from sdeflow.sde import SDE
from sdeflow.testing.emit import emitted
from sdeflow.testing.sde import check_sde
from sdeflow.user_code import find


def check_command(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="FILE.py:NAME", help="An SDE, its class, or module:NAME. Runs it.")],
    event: Annotated[
        str | None, typer.Option(help="Shape of one sample, as 3 or 2,8; default: the class's own, or probed.")
    ] = None,
    points: Annotated[int, typer.Option(help="Points at which identities are evaluated.", min=1)] = 24,
    seed: Seed = 0,
    emit_tests: Annotated[
        Path | None, typer.Option(help="Also write a pytest file that checks the SDE at random points.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check everything derived from an SDE, identity by identity. Runs the file (or imports the module) it is in.

    The SDE may also define log_density(x, t), score(x, t), marginal(x0, t), reverse_drift(x, t, score) and
    flow_drift(x, t, score): what it claims is checked. Exit status 0 if no identity fails, else 1.
    """
    with running(context, lambda: "nothing was written; to start anew: {again}", as_json=as_json):
        if emit_tests is not None:
            check_file(emit_tests)
            check_not_read(emit_tests, [target.rpartition(":")[0]])
        sde = as_sde(find(target, SDE), target)
        report = check_sde(sde, event=_shape(event), points=points, seed=seed)
        if emit_tests is not None:
            emit_tests.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(emit_tests, emitted(target, sde, emit_tests).encode())
    if as_json:
        emitted_to = {} if emit_tests is None else {"file": str(emit_tests)}
        say_json(report.to_dict() | emitted_to)
    else:
        report.print()
        failed = sum(f.verdict == "fail" for f in report.findings)
        skipped = sum(f.verdict == "not tested" for f in report.findings)
        passed = len(report.findings) - failed - skipped
        print(f"{passed} passed, {failed} failed, {skipped} not tested")
        if emit_tests is not None:
            print(f"wrote {emit_tests}")
    raise typer.Exit(0 if report.ok else 1)


def as_sde(value: object, name: str) -> SDE:
    """An SDE from one, from its class, or from a function that makes one.

    Raises:
        TypeError: it is none of these, or cannot be made without arguments.
    """
    if not isinstance(value, SDE) and callable(value):
        try:
            value = value()
        except TypeError as error:
            raise TypeError(f"{name} cannot be made without arguments ({error}): name an instance") from error
    if not isinstance(value, SDE):
        raise TypeError(f"expected {name} to be an SDE or a class of one, got {type(value).__name__}")
    return value


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or any(n < 1 for n in shape):
        raise ValueError(f"expected --event as positive numbers such as 3 or 2,8, got {text!r}")
    return shape
