"""What a run is, as JSON: settings by value, functions by their code, models and problems by what they say.

A folder is gone on with by the run that began it, perhaps in another process, and by no other. Settings are written
down in full. What a closure or a class of the user computes is not seen by its name: its values at a few points are.
"""

from __future__ import annotations

import dataclasses
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

_DEEP = 8
POINTS = 4
"""Of each state that a model or a problem is asked at."""
_DIGITS = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far apart the same values may be, computed on two machines; 1e-2 in 16 bits."""
PROBES = "behaviour"
"""The key of values that are compared as numbers."""


def said(value: Any, deep: int = _DEEP) -> Any:
    """A setting as JSON, the same in every process.

    Tensors are hashed, functions of the user are their names and a hash of their code and of what they enclose, objects
    their classes and what was given to them; what else there is, is its text without addresses.

    Raises:
        ValueError: a tensor without values.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (Tensor, np.ndarray)):
        return _tensor(torch.as_tensor(value))
    if deep == 0:
        return type(value).__qualname__
    inner = partial(said, deep=deep - 1)
    if isinstance(value, Mapping):
        return {str(name): inner(value[name]) for name in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [inner(v) for v in value]
    if isinstance(value, partial):
        return ["partial", inner(value.func), inner(value.args), inner(value.keywords)]
    if inspect.ismethod(value):
        return [value.__qualname__, inner(value.__self__)]
    if inspect.isfunction(value):
        return _function(inspect.unwrap(value), inner)
    if isinstance(value, nn.Module):
        return [type(value).__qualname__, weights(value), inner(getattr(value, "config", None))]
    if isinstance(value, Model):
        return _model(value, inner)
    if isinstance(value, Problem):
        return _given(value, inner)
    if isinstance(value, Statistic):
        return _given(value.empty(), inner)
    if isinstance(value, type):
        return value.__qualname__
    if dataclasses.is_dataclass(value):
        fields = {f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"class": type(value).__qualname__, **fields}
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
    """Its class and what was given to it: what it keeps for itself has an underscore or is a cached property."""
    cls = type(value)
    given = {
        name: inner(value)
        for name, value in sorted(vars(value).items())
        if not name.startswith("_") and not isinstance(inspect.getattr_static(cls, name, None), cached_property)
    }
    return {"class": cls.__qualname__, **given}


def _function(function: types.FunctionType, inner: Callable[[Any], Any]) -> Any:
    if (function.__module__ or "").partition(".")[0] == "sdeflow":
        return function.__qualname__
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    return {
        "function": function.__qualname__,
        "code": hashlib.sha256(repr(_code(function.__code__)).encode()).hexdigest()[:16],
        "with": inner([*(function.__defaults__ or ()), *cells]),
    }


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
    """Values at x and three times: of the process, and of what is asked, if that has no network to be hashed."""
    root = problem
    while hasattr(root, "process"):
        root = root.process
    functions = [getattr(root, name) for name in ("drift", "diffusion") if hasattr(root, name)]
    models = (asked,) if isinstance(asked, Model) else asked.models()
    if models and not any(isinstance(model.net, nn.Module) for model in models):
        functions.append(asked.score if isinstance(asked, Model) else asked.drift)
    start, end = problem.span
    try:
        with torch.no_grad():
            values = [f(x, _time(start + share * (end - start))) for share in (0.1, 0.5, 0.9) for f in functions]
    except Exception:  # of the user's making, at points that are not of the run
        return None
    return {"within": _DIGITS.get(x.dtype, 1e-2), "values": [number for value in values for number in _summary(value)]}


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
