"""The result of one run, and files of them: JSON lines, one result a line."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdeflow.checkpoints import write_atomically

SCHEMA = 1
"""Version of the file format; raised when a field changes its meaning."""


@dataclass(frozen=True)
class Result:
    """One run of one method on one problem. Errors are absolute, root mean square per component.

    Attributes:
        problem: name of the problem.
        solver: name of the method.
        grid: name of the grid; "adaptive" when solved to a tolerance.
        kind: "trajectory" (deterministic: error per sample) or "distribution" (stochastic).
        eta: stochasticity of the reversal that was solved.
        budget: model calls allowed; None when adaptive.
        tolerance: rtol = atol; None on a grid.
        status: "ok", or "failed": the run raised or samples did not finish. A failed run keeps
            what it has; its errors are None where they are not finite.
        message: why it failed.
        nfe: model calls a sample, counted (the mean over samples when adaptive).
        steps: likewise.
        samples: number of samples compared.
        dtype: of the states and the network.
        seed: of the start and the noise.
        median, q90, rms: of the errors per sample against the reference (kind "trajectory").
        flip_rate: share of samples that ended elsewhere than their reference.
        sliced_w2, low, high: sliced 2-Wasserstein distance to the target with its 95% interval, per
            component as the other errors (kind "distribution").
        floor: what the reference, or a second exact sample, differs by in the same measure
            (of the median, or of sliced_w2). None when not known.
        resolved: whether the error is at least 2 floors; below, it says nothing.
        scale: the spread of the reference or target, root mean square per component.
        wall_seconds: of the solve. One run: compare methods by NFE, and use this for their overhead.
        model_seconds: of that, inside the network.
        preview: the first samples as a PNG data URI, or None.
        about: of the problem: title, process, prediction, shape, default_grid, threads, and of the reference
            or target: truth (how it was made), floors by measure, preview.
        environment: versions, machine, command and start time, see `environment`.
    """

    problem: str
    solver: str
    grid: str
    kind: Literal["trajectory", "distribution"]
    eta: float = 0.0
    budget: int | None = None
    tolerance: float | None = None
    status: Literal["ok", "failed"] = "ok"
    message: str | None = None
    nfe: float | None = None
    steps: float | None = None
    samples: int = 0
    dtype: str = "float64"
    seed: int = 0
    median: float | None = None
    q90: float | None = None
    rms: float | None = None
    flip_rate: float | None = None
    sliced_w2: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    resolved: bool = True
    scale: float | None = None
    wall_seconds: float | None = None
    model_seconds: float | None = None
    preview: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """The error that ranks it: the median, or the sliced W2."""
        return self.median if self.kind == "trajectory" else self.sliced_w2

    @property
    def run(self) -> str:
        """Which run it is of: version or commit, and start time."""
        where = self.environment
        return f"{where.get('commit') or where.get('sdeflow', 'unknown')}, {where.get('started', 'unknown')}"

    def line(self) -> str:
        """It as a line of JSON, without the line's end."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return json.dumps({"schema": SCHEMA, **values}, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(results: Iterable[Result], path: str | Path) -> None:
    """Results as JSON lines. The file is replaced as a whole: a reader never sees half of it."""
    put(path, "".join(r.line() + "\n" for r in results).encode())


def put(path: str | Path, content: bytes) -> None:
    """`content` as the file `path`, whole or not at all, its folder made if missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def read(path: str | Path) -> list[Result]:
    """The results of a JSON lines file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no result; the message names it.
    """
    results = []
    # not splitlines: that also splits at separators that JSON allows inside a text
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8"), parse_constant=_no_number, parse_float=_finite)
            if not isinstance(values, dict):
                raise TypeError(f"expected an object, got a {type(values).__name__}")
            schema = values.pop("schema")
            newer = schema > SCHEMA
            # a later version may have fields of other types
            result = None if newer else _result(values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a result of sdeflow bench ({_why(error)})") from error
        if result is None:
            raise ValueError(f"{path}: written by a newer sdeflow (schema {schema}, this reads {SCHEMA})")
        results.append(result)
    return results


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    """A number of JSON, which may be too large for a float."""
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _why(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


_MEASURED = (
    "nfe", "steps", "median", "q90", "rms", "flip_rate", "sliced_w2", "low", "high", "floor", "scale", "wall_seconds",
    "model_seconds",
)  # fmt: skip
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*_MEASURED, "tolerance"), (int, float, type(None))),
    **dict.fromkeys(("problem", "solver", "grid", "dtype"), (str,)),
    **dict.fromkeys(("message", "preview"), (str, type(None))),
    **dict.fromkeys(("samples", "seed"), (int,)),
    **dict.fromkeys(("about", "environment"), (dict,)),
    "budget": (int, type(None)),
    "eta": (int, float),
    "resolved": (bool,),
}
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys((*_MEASURED, "eta", "samples"), (0, sys.float_info.max)),
    "budget": (1, sys.maxsize),
    "tolerance": (sys.float_info.min, sys.float_info.max),
    "flip_rate": (0, 1),
    "seed": (0, 2**63 - 1),
}
"""What a run can give: from the least to the largest, or None."""


def _result(values: dict[str, Any]) -> Result:
    """A result of what a line holds, if a run can give it. Fields that are not known are of a later version."""
    known = {f.name for f in dataclasses.fields(Result)}
    result = Result(**{k: v for k, v in values.items() if k in known})
    for name, types in _TYPES.items():
        value = getattr(result, name)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(f"{name} is {value!r}")
    for name, (least, largest) in _RANGES.items():
        value = getattr(result, name)
        if value is not None and not least <= value <= largest:
            raise ValueError(f"{name} is {value!r}, which no run gives")
    for name, allowed in (("kind", ("trajectory", "distribution")), ("status", ("ok", "failed"))):
        if getattr(result, name) not in allowed:
            raise ValueError(f"{name} is {getattr(result, name)!r}")
    return result


class Log:
    """The file of a run in progress: complete whenever it is read, at most two seconds behind."""

    def __init__(self, path: Path | None) -> None:
        self.results: list[Result] = []
        self._path, self._lines, self._saved = path, bytearray(), 0.0

    def add(self, result: Result) -> None:
        self.results.append(result)
        self._lines += result.line().encode() + b"\n"
        if time.monotonic() - self._saved > 2.0:
            self.save()

    def replace(self, results: list[Result]) -> None:
        """These results instead, in their order."""
        self.results, self._lines = results, bytearray(b"".join(r.line().encode() + b"\n" for r in results))
        self.save()

    def save(self) -> None:
        if self._path is not None and self.results:
            put(self._path, bytes(self._lines))
        self._saved = time.monotonic()
