"""What stands in for a valid argument, by the kind of the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.fuzzing.outcome import CallersError

Meaning = Literal["bad", "same", "other", "NaN"]
"""bad: to accept it is wrong; same: the valid value in another guise; other: to accept it may be right; NaN: to accept
it is right if the result shows it, by a NaN or a status."""


@dataclass(frozen=True)
class Substitute:
    """One replacement: its label, what it means, and how it is made from the valid value (None: does not apply)."""

    label: str
    meaning: Meaning
    make: Callable[[Any], Any]


class Skip(Exception):
    """The substitute does not apply to this value."""


class Plain:
    """An object of no use to anyone."""


class Subclass(torch.Tensor):
    """A tensor by another name."""


def _bad(label: str, value: Any) -> Substitute:
    return Substitute(label, "bad", lambda valid: value)


def _other(label: str, make: Callable[[Any], Any]) -> Substitute:
    return Substitute(label, "other", make)


def _same(label: str, make: Callable[[Any], Any]) -> Substitute:
    return Substitute(label, "same", make)


NONSENSE = (
    _bad("None", None),
    _bad("an object", Plain()),
    _bad("a class", Plain),
    _bad("text", "text"),
    _bad("empty text", ""),
    _bad("bytes", b"\x00\xff"),
    _bad("a dict", {"a": 1}),
    _bad("a set", {1, 2}),
    _bad("a complex number", 1j),
    _bad("NaN", math.nan),
    _bad("a list of text", ["a", "b"]),
    _bad("an empty list", []),
    _bad("an exception", ValueError("inside")),
    _bad("a range", range(0)),
)

NUMBERS = (
    _bad("a tensor of NaN", torch.tensor(math.nan)),
    _bad("a vector", torch.ones(3)),
    _bad("a meta tensor", torch.ones((), device="meta")),
    _other("infinity", lambda v: math.inf),
    _other("minus infinity", lambda v: -math.inf),
    _other("its negative", lambda v: -v),
    _other("zero", lambda v: 0),
    _other("minus zero", lambda v: -0.0),
    _other("one", lambda v: 1.0),
    _other("True", lambda v: True),
    _other("huge", lambda v: 1e300),
    _other("tiny", lambda v: 1e-310),
    _other("an integer beyond float", lambda v: 10**400),
    _other("nearly it", lambda v: v * (1 + 1e-15)),
    _same("numpy float64", lambda v: np.float64(v)),
    _same("numpy array", lambda v: np.array(v)),
    _same("Fraction", lambda v: Fraction(v)),
    _same("Decimal", lambda v: Decimal(v)),
    _same("a 0-d tensor", lambda v: torch.tensor(v, dtype=torch.float64)),
    _same("a number as text", lambda v: str(v)),
)

COUNTS = (
    _bad("one and a half", 1.5),
    _bad("a vector", torch.ones(3)),
    _bad("infinity", math.inf),
    _bad("a meta tensor", torch.ones((), device="meta", dtype=torch.int64)),
    _other("zero", lambda v: 0),
    _other("minus one", lambda v: -1),
    _other("one", lambda v: 1),
    _other("True", lambda v: True),
    _other("a billion billion", lambda v: 10**18),
    _other("beyond 64 bits", lambda v: 10**30),
    _other("minus beyond 64 bits", lambda v: -(10**30)),
    _same("its float", lambda v: float(v)),
    _same("numpy int64", lambda v: np.int64(v)),
    _same("numpy uint8", lambda v: np.uint8(v % 256) if v < 256 else np.uint16(v)),
    _same("Fraction", lambda v: Fraction(v)),
    _same("a 0-d tensor", lambda v: torch.tensor(v)),
    _same("a number as text", lambda v: str(v)),
)


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.full_like(x, value) if x.is_floating_point() else _skip()


def _skip() -> Any:
    raise Skip


def _one_bad(value: float) -> Callable[[Tensor], Tensor]:
    def make(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise Skip
        x = x.clone()
        x.reshape(-1)[-1] = value
        return x

    return make


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1], -1)[..., 0]


def _sized(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: make(x) if x.ndim >= 1 and x.shape[0] > 1 else _skip()


TENSORS = (
    Substitute("NaN everywhere", "NaN", _filled(math.nan)),
    Substitute("one NaN", "NaN", _one_bad(math.nan)),
    Substitute("one infinity", "other", _one_bad(math.inf)),
    Substitute("on meta", "bad", lambda x: x.to("meta")),
    Substitute("complex", "bad", lambda x: torch.complex(x.double(), x.double())),
    Substitute("sparse", "bad", lambda x: x.to_sparse() if x.ndim else _skip()),
    Substitute("no rows", "bad", _sized(lambda x: x[:0])),
    _other("bool", lambda x: x > 0),
    _other("int64", lambda x: x.long()),
    _other("uint8", lambda x: x.abs().to(torch.uint8)),
    _other("float16", lambda x: x.half()),
    _other("bfloat16", lambda x: x.bfloat16()),
    _other("float32", lambda x: x.float()),
    _other("float64", lambda x: x.double()),
    _other("a row less", _sized(lambda x: x[:-1])),
    _other("a row more", _sized(lambda x: torch.cat([x, x[-1:]]))),
    _other("a dimension more", lambda x: x[None]),
    _other("a last dimension more", lambda x: x[..., None]),
    _other("a dimension less", _sized(lambda x: x[0])),
    _other("a column more", lambda x: torch.cat([x, x[..., -1:]], -1) if x.ndim > 1 else _skip()),
    _other("no columns", lambda x: x[..., :0] if x.ndim > 1 else _skip()),
    _other("0-d", lambda x: x.reshape(-1)[0]),
    _other("huge", lambda x: x * 1e30),
    _other("tiny", lambda x: x * 1e-30),
    _other("zero", torch.zeros_like),
    _other("a list", lambda x: x.tolist()),
    _other("numpy", lambda x: x.detach().numpy()),
    _other("expanded", _sized(lambda x: x[:1].expand_as(x))),
    _same("strided", _strided),
    _same("with a gradient", lambda x: x.clone().requires_grad_() if x.is_floating_point() else _skip()),
    _same("a subclass", lambda x: x.as_subclass(Subclass)),
)

GRIDS = (
    _bad("a lonely time", torch.tensor([0.5], dtype=torch.float64)),
    _bad("equal times", torch.full((4,), 0.5, dtype=torch.float64)),
    _bad("outside", torch.tensor([5.0, 3.0, -2.0], dtype=torch.float64)),
    _bad("a matrix", torch.linspace(0.9, 0.1, 4, dtype=torch.float64).reshape(2, 2)),
    _bad("a repeat", torch.tensor([0.9, 0.5, 0.5, 0.1], dtype=torch.float64)),
    _bad("unsorted", torch.tensor([0.9, 0.2, 0.5, 0.1], dtype=torch.float64)),
    _bad("text in it", [0.9, "half", 0.1]),
    _bad("None in it", [0.9, None, 0.1]),
    _bad("ragged", [[0.9, 0.5], [0.1]]),
    _bad("a function of the wrong arguments", lambda: torch.linspace(0.9, 0.1, 4)),
    _bad("a function that gives None", lambda process, steps, start, end: None),
    _bad("a function that gives text", lambda process, steps, start, end: "grid"),
    _bad("a function of the wrong length", lambda process, steps, start, end: torch.tensor([start, end])),
    _other("reversed", lambda ts: ts.flip(0)),
    _other("float32", lambda ts: ts.float()),
    _other("close times", lambda ts: torch.tensor([0.5, 0.5 - 1e-16, 0.2], dtype=torch.float64)),
    _same("a list", lambda ts: ts.tolist()),
    _same("a tuple", lambda ts: tuple(ts.tolist())),
    _same("numpy", lambda ts: ts.numpy()),
    _same("strided", _strided),
    _same("with a gradient", lambda ts: ts.clone().requires_grad_()),
)

CHOICES = (
    _bad("another word", "no-such-choice"),
    _bad("a number", 3),
    _bad("a tensor", torch.ones(2)),
    _bad("True", True),
    Substitute("in capitals", "bad", lambda v: v.upper() if v.upper() != v else _skip()),
    Substitute("with a blank", "bad", lambda v: v + " "),
)

TUPLES = (
    _bad("a number", 3.5),
    _bad("nested", ((1.0, (2.0,)),)),
    _bad("a tensor", torch.ones(2, 2, 2)),
    Substitute("NaN in it", "bad", lambda v: (*v[:-1], math.nan)),
    Substitute("text in it", "bad", lambda v: (*v[:-1], "a")),
    Substitute("None in it", "bad", lambda v: (*v[:-1], None)),
    _other("infinity in it", lambda v: (*v[:-1], math.inf)),
    _other("a negative in it", lambda v: (*v[:-1], -1)),
    _other("zero in it", lambda v: (*v[:-1], 0)),
    _other("a billion billion in it", lambda v: (*v[:-1], 10**18)),
    _other("empty", lambda v: ()),
    _other("one part", lambda v: v[:1]),
    _other("a part more", lambda v: (*v, v[-1])),
    _other("reversed", lambda v: v[::-1]),
    _same("a list", list),
    _same("numpy", np.array),
)


def _raising(*values: Any, **named: Any) -> Any:
    raise CallersError("the function of the caller failed")


def _returning(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function that answers as the valid one, changed."""
    return lambda valid: lambda *values, **named: change(valid(*values, **named))


def _of_tensor(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    return lambda value: change(torch.as_tensor(value))


FUNCTIONS = (
    _bad("a number", 3),
    _bad("a tensor", torch.ones(2)),
    Substitute("raises", "other", lambda f: _raising),
    Substitute("takes nothing", "bad", lambda f: lambda: torch.ones(2)),
    Substitute("gives None", "bad", lambda f: lambda *values, **named: None),
    Substitute("gives text", "bad", lambda f: lambda *values, **named: "text"),
    Substitute("gives an object", "bad", lambda f: lambda *values, **named: Plain()),
    Substitute("gives NaN", "NaN", _returning(_of_tensor(lambda y: y.double() * math.nan))),
    Substitute("gives a complex tensor", "bad", _returning(_of_tensor(lambda y: y.double() * 1j))),
    Substitute("gives a meta tensor", "bad", _returning(_of_tensor(lambda y: y.to("meta")))),
    Substitute("gives too many", "bad", _returning(_of_tensor(lambda y: torch.stack([y, y, y, y, y, y, y])))),
    Substitute("gives too few", "other", _returning(_of_tensor(lambda y: y.reshape(-1)[:1]))),
    Substitute("gives infinity", "other", _returning(_of_tensor(lambda y: y.double() * 0 + math.inf))),
    Substitute("gives integers", "other", _returning(_of_tensor(lambda y: y.long()))),
    Substitute("gives float16", "other", _returning(_of_tensor(lambda y: y.half()))),
    Substitute("gives float64", "other", _returning(_of_tensor(lambda y: y.double()))),
    Substitute("gives a number", "other", lambda f: lambda *values, **named: 1.0),
    Substitute("gives a detached copy", "other", _returning(_of_tensor(lambda y: y.detach().clone()))),
)

OBJECTS = (
    _bad("a number", 3),
    _bad("a tensor", torch.ones(2)),
    _bad("a function", _raising),
    Substitute("its class", "bad", type),
    Substitute("in a list", "bad", lambda v: [v]),
)

FLAGS = (_other("None", lambda v: None), _other("a number", lambda v: 2), _other("the other", lambda v: not v))


def pool(name: str, value: Any) -> tuple[Substitute, ...]:
    """The substitutes for a valid value of an argument of that name."""
    if isinstance(value, bool):
        return FLAGS
    if isinstance(value, Tensor):
        return NONSENSE + (GRIDS if name in ("grid", "times") else TENSORS)
    if isinstance(value, int):
        return NONSENSE + COUNTS
    if isinstance(value, float):
        return NONSENSE + NUMBERS
    if isinstance(value, str):
        return NONSENSE + CHOICES
    if isinstance(value, tuple):
        return NONSENSE + TUPLES
    if callable(value) and not isinstance(value, torch.nn.Module) and type(value).__name__ in _FUNCTION_TYPES:
        return NONSENSE + FUNCTIONS
    return NONSENSE + OBJECTS


_FUNCTION_TYPES = ("function", "partial", "method", "builtin_function_or_method")
