"""What a run is, as JSON: settings by value, functions by their code, models and problems by what they say.

A folder is gone on with by the run that began it, perhaps in another process, and by no other. Settings are written
down in full. What a closure or a class of the user computes is not seen by its name: its values at a few points are.
"""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import inspect
import re
import types
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdeflow.checked import described
from sdeflow.columns import as_bytes
from sdeflow.model import Model
from sdeflow.sde import Problem
from sdeflow.statistics.base import Statistic

_DEEP = 40
POINTS = 4
"""Of each state that a model or a problem is asked at."""
_SHARES = (0.02, 0.25, 0.5, 0.75, 0.98)
"""Of the span: the times of the same."""
_DIGITS = {torch.float64: 1e-11, torch.float32: 1e-5}
"""How far apart the same values may be, computed on two machines; 1e-2 in 16 bits."""
PROBES = "behaviour"
"""The key of values that are compared as numbers."""


def said(value: Any, path: tuple[int, ...] = ()) -> Any:
    """A setting as JSON, the same in every process.

    Tensors are hashed, functions and classes of the user are their names and a hash of their code, with what they
    enclose and the numbers and functions of their module that they name; objects are their classes and what was given
    to them; what else there is, is its text without addresses. What a run writes is no setting: attributes with an
    underscore or that methods set, cached properties, dictionaries of an object.

    Raises:
        ValueError: a tensor without values.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (Tensor, np.ndarray)):
        return _tensor(torch.as_tensor(value))
    if id(value) in path or len(path) > _DEEP:
        return type(value).__qualname__
    inner = partial(said, path=(*path, id(value)))
    if isinstance(value, Mapping):
        return {str(name): inner(value[name]) for name in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [inner(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((inner(v) for v in value), key=repr)
    if isinstance(value, partial):
        return ["partial", inner(value.func), inner(value.args), inner(value.keywords)]
    if inspect.ismethod(value):
        return [inner(value.__func__), inner(value.__self__)]
    if inspect.isfunction(value):
        return _function(value, inner)
    if isinstance(value, type):
        return _class(value, inner)
    if isinstance(value, nn.Module):
        parts = {type(part).__qualname__: _class(type(part), inner) for part in value.modules()}
        order = [type(part).__qualname__ for part in value.modules()]
        return [order, [parts[name] for name in sorted(parts)], weights(value), inner(getattr(value, "config", None))]
    if isinstance(value, Model):
        return _model(value, inner)
    if isinstance(value, Problem):
        return {**_given(value, inner), "span": inner([value.t0, value.t1, *value.span])}
    if isinstance(value, Statistic):
        return _given(value.empty(), inner)
    if dataclasses.is_dataclass(value):
        fields = {f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"class": inner(type(value)), **fields}
    if inspect.getattr_static(value, "__repr__") is object.__repr__ and hasattr(value, "__dict__"):
        return _given(value, inner)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def weights(net: nn.Module) -> str:
    """A hash of the parameters and buffers of a network."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(as_bytes(value))
    return digest.hexdigest()[:16]


def of_model(model: Model, x: Tensor | None) -> dict[str, Any]:
    """What the values of a model depend on; x are some states (n, *event), None where they are not to be had."""
    return {"model": said(model), PROBES: None if x is None else _probes(model.sde, model, x)}


def of_problem(problem: Problem, x: Tensor) -> dict[str, Any]:
    """What the paths of a problem depend on; x are some of their starts (n, *event)."""
    x = x[:POINTS]
    return {"problem": said(problem), PROBES: _probes(problem, problem, torch.cat([x, 1.3 * x + 0.11, 0.7 * x - 0.05]))}


def same(known: Any, wanted: Any) -> bool:
    """Whether two runs are one: equal, `PROBES` but for rounding."""
    if isinstance(known, Mapping) and isinstance(wanted, Mapping):
        return known.keys() == wanted.keys() and all(
            _near(known[name], wanted[name]) if name == PROBES else same(known[name], wanted[name]) for name in known
        )
    if isinstance(known, list) and isinstance(wanted, list):
        return len(known) == len(wanted) and all(map(same, known, wanted))
    return bool(known == wanted)


def _model(model: Model, inner: Callable[[Any], Any]) -> dict[str, Any]:
    parts = {"process": model.sde, "prediction": model.prediction, "time": model.time, "conditions": model.conditions}
    net = model.net if isinstance(model.net, nn.Module) or inspect.isroutine(model.net) else type(model.net)
    return {"network": inner(net), **{name: inner(value) for name, value in parts.items()}}


def _given(value: Any, inner: Callable[[Any], Any]) -> dict[str, Any]:
    """The class of an object, and what was given to it."""
    cls = type(value)
    written = {name for base in _of_user(cls) for name in _written(base)}
    given = {
        name: inner(value)
        for name, value in sorted(vars(value).items())
        if not name.startswith("_") and name not in written and not isinstance(value, dict)
        and not isinstance(inspect.getattr_static(cls, name, None), cached_property)
    }  # fmt: skip
    return {"class": inner(cls), **given}


def _of_user(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("sdeflow", "torch", "builtins")]


def _functions(cls: type) -> dict[str, types.FunctionType]:
    """Its methods, properties and static functions, not those of its bases."""
    found: dict[str, Any] = {}
    for name, value in vars(cls).items():
        for part in (value, *(getattr(value, slot, None) for slot in ("__func__", "fget", "func"))):
            if inspect.isfunction(part):
                found[name] = part
    return found


def _written(cls: type) -> set[str]:
    """Attributes that its methods set, but for the constructor."""
    methods = [f for name, f in _functions(cls).items() if name not in ("__init__", "__post_init__")]
    return {i.argval for f in methods for i in dis.get_instructions(f) if i.opname == "STORE_ATTR"}


def _class(cls: type, inner: Callable[[Any], Any]) -> Any:
    """Its name; of a class of the user also what its methods do and the constants that it declares."""
    own = _of_user(cls)
    if not own:
        return cls.__qualname__
    code = [(name, _code(f.__code__)) for base in own for name, f in sorted(_functions(base).items())]
    plain = (bool, int, float, str, tuple, Tensor)
    declared = {
        name: value for base in reversed(own) for name, value in vars(base).items()
        if isinstance(value, plain) and not name.startswith("__")
    }  # fmt: skip
    return {"name": cls.__qualname__, "code": _digest(code), "declared": inner(declared)}


def _function(function: types.FunctionType, inner: Callable[[Any], Any]) -> Any:
    if (function.__module__ or "").partition(".")[0] in ("sdeflow", "torch"):
        return function.__qualname__
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    code = function.__code__
    stored = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}
    named = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    plain = (bool, int, float, str, tuple, Tensor, np.ndarray, types.FunctionType)
    used = {name: value for name, value in named.items() if isinstance(value, plain) and name not in stored}
    return {
        "function": function.__qualname__,
        "code": _digest(_code(code)),
        "with": inner([*(function.__defaults__ or ()), function.__kwdefaults__, *cells, used]),
    }


def _digest(code: Any) -> str:
    return hashlib.sha256(repr(code).encode()).hexdigest()[:16]


def _code(code: types.CodeType) -> list[Any]:
    """What a function does: the same in every process of one version of Python."""
    constants = [
        _code(c) if isinstance(c, types.CodeType) else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]
    return [code.co_code, code.co_names, constants]


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises for a name that is not yet bound
    except ValueError:
        return False
    return True


def _tensor(value: Tensor) -> list[Any]:
    if value.is_meta:
        raise ValueError(f"expected numbers, got {described(value)}")
    return [str(value.dtype), list(value.shape), hashlib.sha256(as_bytes(value)).hexdigest()[:16]]


def _probes(problem: Any, asked: Any, x: Tensor) -> dict[str, Any] | None:
    """Values at x and a few times, of the process and of what is asked; None where it cannot be asked, or is random."""
    root = problem
    while hasattr(root, "process"):
        root = root.process
    functions = [getattr(root, name) for name in ("drift", "diffusion") if hasattr(root, name)]
    if asked is not root:
        functions.append(asked.score if isinstance(asked, Model) else asked.drift)
    start, end = problem.span
    times = [_time(start + share * (end - start)) for share in _SHARES]
    try:
        with torch.no_grad():
            once, again = ([f(x, t) for t in times for f in functions] for _ in range(2))
    except Exception:  # of the user's making, at points that are not of the run
        return None
    probes = [{"within": _DIGITS.get(x.dtype, 1e-2), "values": [number for v in values for number in _summary(v)]}
              for values in (once, again)]  # fmt: skip
    return probes[0] if _near(*probes) else None


def _time(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def _summary(value: Tensor) -> list[float]:
    """Three numbers a row: its mean, its root mean square, and a sum with other weights."""
    rows = torch.as_tensor(value).detach().to("cpu", torch.float64)
    rows = rows.reshape(len(rows), -1) if rows.ndim else rows.reshape(1, 1)
    wave = torch.cos(torch.arange(rows.shape[1], dtype=torch.float64))
    three = torch.stack([rows.mean(1), rows.square().mean(1).sqrt(), (rows * wave).mean(1)])
    return [float(number) for number in three.flatten()]


def _near(known: Any, wanted: Any) -> bool:
    """Whether two probes are equal but for rounding; infinities and NaN are equal to themselves."""
    if known is None or wanted is None:
        return True  # could not be asked: not known to differ
    a, b = (np.asarray(probe["values"], dtype=np.float64) for probe in (known, wanted))
    if a.shape != b.shape or known["within"] != wanted["within"]:
        return False
    finite = np.abs(b[np.isfinite(b)])
    scale = float(finite.max()) if finite.size else 0.0
    return bool(np.allclose(a, b, rtol=known["within"], atol=known["within"] * scale, equal_nan=True))
