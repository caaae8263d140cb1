"""Arguments held to their annotations: a wrong kind is one clear error at the call, not a puzzle further in."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import chain
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

import sdeflow

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

Test = Callable[[Any], bool]
Rule = tuple[Test, str]
"""(whether a value is of the kind, the kind in words)."""


class ArgumentError(TypeError, ValueError):
    """An argument of the wrong kind. It is a ValueError too: 3.5 steps are both, and no caller should have to guess."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which refuses arguments that are not what its annotations say.

    A number is real, no NaN, and no bool; 0-d tensors and arrays are numbers too. A whole number fits into 64 bits. A
    tensor is real, dense, and has values (is not on "meta"). A tuple may be a list. `Any` is anything, and so is an
    annotation that is not understood. Values are passed on as they are; ranges are for the function itself.

    Raises:
        ArgumentError: at a call, an argument of another kind, before anything of the function runs.
    """
    names = tuple(inspect.signature(function).parameters)
    rules: dict[str, Rule] = {}
    known = False

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal known
        if not known:  # at the first call after the import: annotations may name what is defined later
            known = hasattr(sdeflow, "__version__")
            if known:
                rules.update(_rules(function))
        for name, value in chain(zip(names, args, strict=False), kwargs.items()):
            if name in rules and not rules[name][0](value):
                raise ArgumentError(f"expected {name} as {rules[name][1]}, got {described(value)}")
        return function(*args, **kwargs)

    return call


def checked_class(cls: C) -> C:
    """The class, its constructor `checked`: above `@dataclass` too."""
    cls.__init__ = checked(cls.__init__)  # type: ignore[misc]
    return cls


def described(value: object) -> str:
    """A value in an error: short, and never its whole contents."""
    if isinstance(value, Tensor):
        kind = f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
        return f"{kind} on meta" if value.is_meta else kind
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    try:
        text = repr(value)
    except Exception:  # of the caller's making, or a number with more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:50]}... ({type(value).__name__})"


def number(value: object) -> bool:
    """Whether `value` is a real number, no NaN and no bool, within the range of float64 or infinite."""
    if type(value) is float:
        return value == value
    if isinstance(value, (bool, np.bool_)):
        return False
    if isinstance(value, Tensor):
        real = value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool and not value.is_meta
        return real and not (value.device.type == "cpu" and bool(torch.isnan(value)))
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "iuf" and not bool(np.isnan(value))
    if not isinstance(value, _NUMBERS):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


_NUMBERS = (int, float, np.integer, np.floating, Fraction)


def whole(value: object) -> bool:
    """Whether `value` is an integer of 64 bits, no bool."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return -(2**63) <= int(value) < 2**64
    return False


def tensor(value: object) -> bool:
    """Whether `value` is a tensor of real numbers (or bools) that has values."""
    return isinstance(value, Tensor) and not (value.is_complex() or value.is_meta or value.layout != torch.strided)


def numbers(value: object, what: str) -> Tensor:
    """`value`, a tensor or nested numbers, as a float64 tensor, its device and gradients kept.

    Raises:
        TypeError: it is neither; the message names `what`.
    """
    if isinstance(value, Tensor) and not tensor(value):
        raise TypeError(f"expected {what} as real numbers, got {described(value)}")
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
        raise TypeError(f"expected {what} as real numbers, got {described(value)}")
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"expected {what} as real numbers, got {described(value)}") from error


def _device(value: object) -> bool:
    """Whether `value` names a device that torch knows."""
    if not isinstance(value, (str, torch.device)):
        return False
    try:
        return torch.device(value).type != "meta"
    except RuntimeError:
        return False


def _rules(function: Callable[..., Any]) -> dict[str, Rule]:
    """The rule of each argument that has one."""
    from sdeflow.sde import Problem

    more = {**vars(sdeflow.solvers), **vars(sdeflow), "Problem": Problem}  # what modules import for annotations only
    own = getattr(inspect.unwrap(function), "__globals__", {})
    rules = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        if name == "return" or name in _variadic(function):
            continue
        try:
            kind = eval(annotation, {**more, **own}) if isinstance(annotation, str) else annotation
        except NameError:
            continue
        rule = _rule(kind)
        if rule is not None:
            rules[name] = rule
    return rules


def _variadic(function: Callable[..., Any]) -> set[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds}


def _rule(kind: Any) -> Rule | None:
    """The rule of an annotation; None for one that says nothing."""
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if torch.device in parts:
            parts = tuple(part for part in parts if part is not str)  # a name of a device is no other text
        rules = [_rule(part) for part in parts]
        if any(rule is None for rule in rules):
            return None
        tests = [rule[0] for rule in rules if rule is not None]
        words = " or ".join(dict.fromkeys(rule[1] for rule in rules if rule is not None))
        return (lambda value: any(test(value) for test in tests)), words
    if origin is Literal:
        return (lambda value: isinstance(value, (str, int)) and value in parts), f"one of {', '.join(map(repr, parts))}"
    if origin is tuple:
        return _rule_of_tuple(parts)
    if origin is collections.abc.Callable:
        return callable, "a function"
    cls = origin or kind
    if isinstance(cls, type) and cls not in (Any, object, collections.abc.Sequence, collections.abc.Iterable):
        return (lambda value: isinstance(value, cls)), f"a {cls.__name__}"
    return None


def _rule_of_tuple(parts: tuple[Any, ...]) -> Rule | None:
    endless = len(parts) == 2 and parts[1] is Ellipsis
    rules = [_rule(part) for part in (parts[:1] if endless else parts)]

    def fits(values: Iterable[Any]) -> bool:
        if not isinstance(values, (tuple, list)) or (not endless and len(values) != len(rules)):
            return False
        pairs = zip(values, rules * len(values) if endless else rules, strict=False)
        return all(rule is None or rule[0](value) for value, rule in pairs)

    inner = ", ".join("anything" if rule is None else rule[1] for rule in rules)
    return fits, f"a tuple ({inner}, ...)" if endless else f"a tuple ({inner})"


_SIMPLE: dict[Any, Rule] = {
    float: (number, "a number"),
    int: (whole, "a whole number"),
    str: (lambda value: isinstance(value, str), "a string"),
    bool: (lambda value: isinstance(value, (bool, np.bool_)), "True or False"),
    Tensor: (tensor, "a tensor of real numbers"),
    None: (lambda value: value is None, "None"),
    type(None): (lambda value: value is None, "None"),
    torch.device: (_device, "a device"),
    torch.dtype: (lambda value: isinstance(value, torch.dtype), "a torch.dtype"),
}
