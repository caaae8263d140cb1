"""Arguments held to their annotations: a wrong kind is one clear error at the call, not a puzzle further in."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

import sdeflow

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

Test = Callable[[Any], bool]


class Rule(NamedTuple):
    """What an argument is held to: whether a value fits, the kinds in words, and the classes among them."""

    fits: Test
    kinds: tuple[str, ...]
    classes: tuple[type, ...] = ()

    @property
    def words(self) -> str:
        """All kinds in words, None last."""
        kinds = sorted(dict.fromkeys(self.kinds), key="None".__eq__)
        if len(kinds) > 1 and all(kind[0] in "'0123456789" for kind in kinds):
            return f"one of {', '.join(kinds)}"
        last = ", or " if any(" or " in kind or " such as " in kind for kind in kinds[:-1]) else " or "
        return last.join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))


class ArgumentError(TypeError, ValueError):
    """An argument of the wrong kind. It is a ValueError too: 3.5 steps are both, and no caller should have to guess."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which refuses arguments that are not what its annotations say.

    A number is real, no NaN, and no bool; 0-d tensors and arrays are numbers too. A whole number fits into 64 bits. A
    tensor is real, dense, and has values (is not on "meta"). A tuple may be a list. `Any` is anything, and so is an
    annotation that is not understood. Numbers of numpy are passed on as Python's, all else as it is; ranges are for
    the function itself.

    Raises:
        ArgumentError: at a call, an argument of another kind, before anything of the function runs.
    """
    names = tuple(inspect.signature(function).parameters)
    rules: dict[str, Rule] = {}
    target: Callable[..., R] = function
    known = False

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal known
        if torch.compiler.is_compiling():  # what is traced is no value yet
            return function(*args, **kwargs)
        if not known:  # at the first call after the import: annotations may name what is defined later
            known = hasattr(sdeflow, "__version__")
            if known:
                rules.update(_rules(function))
        for name, value in chain(zip(names, args, strict=False), kwargs.items()):
            if name in rules and not rules[name].fits(value):
                rule = rules[name]
                raise ArgumentError(f"expected {name} as {rule.words}, got {described(value)}{_hint(value, rule)}")
        return target(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})

    return call


def _plain(value: Any) -> Any:
    """A number of numpy as Python's: what is printed, saved or compared is the same whoever computed it."""
    return value.item() if isinstance(value, np.generic) else value


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
        return f"a numpy array of {value.dtype} and shape {value.shape}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    try:
        text = repr(value)
    except Exception:  # of the caller's making, or a number with more digits than Python prints
        return f"a {type(value).__name__}"
    address = " at 0x" in text and not isinstance(value, str)
    if address or isinstance(value, torch.nn.Module):  # says nothing, or has many lines
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:50]}... ({type(value).__name__})"


def _hint(value: Any, rule: Rule) -> str:
    """What the caller may have meant."""
    if isinstance(value, type) and issubclass(value, rule.classes):
        return "; call it to make one"
    maker = inspect.isfunction(value) and getattr(sdeflow.solvers, value.__name__, None) is value
    if maker and sdeflow.solvers.Solver in rule.classes:
        return "; call it to make one"
    if sdeflow.Model in rule.classes and callable(value):
        return "; wrap the network: sf.Model(net, sde, prediction)"
    if Tensor in rule.classes and isinstance(value, (list, tuple, np.ndarray)):
        return "; torch.as_tensor makes one"
    return ""


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


LARGEST = 1e100
"""Of a parameter that is squared, or multiplied with others, in float64."""


def event_shape(value: Sequence[int], samples: int = 1) -> tuple[int, ...]:
    """The shape of one sample, if `samples` of it fit into any memory.

    Raises:
        ValueError: sizes that are none, or 2^33 numbers and more.
    """
    if not all(whole(size) and size >= 1 for size in value):
        raise ValueError(f"expected the shape of one sample as integers >= 1, got {described(value)}")
    shape = tuple(int(size) for size in value)
    if math.prod(shape) * samples >= 1 << 33:
        raise ValueError(f"expected samples that fit into memory, got {samples} of shape {described(shape)}")
    return shape


def _device(value: object) -> bool:
    """Whether `value` names a device that torch knows."""
    if not isinstance(value, (str, torch.device)):
        return False
    try:
        torch.device(value)
    except RuntimeError:
        return False
    return True


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
        return _rule_of_union(parts)
    if origin is Literal:
        return Rule(lambda value: isinstance(value, (str, int)) and value in parts, tuple(map(repr, parts)))
    if origin is tuple:
        return _rule_of_tuple(parts)
    if origin is collections.abc.Callable:
        return Rule(callable, ("a function",))
    cls = origin or kind
    if isinstance(cls, type) and cls not in (Any, object, collections.abc.Sequence, collections.abc.Iterable):
        words = _CLASSES.get(f"{cls.__module__}.{cls.__qualname__}", f"a {cls.__name__}")
        return Rule(lambda value: isinstance(value, cls), (words,), (cls,))
    return None


def _rule_of_union(parts: tuple[Any, ...]) -> Rule | None:
    if torch.device in parts:
        parts = tuple(part for part in parts if part is not str)  # a name of a device is no other text
    rules = [_rule(part) for part in parts]
    if any(rule is None for rule in rules):
        return None
    known = [rule for rule in rules if rule is not None]
    kinds = chain.from_iterable(rule.kinds for rule in known)
    classes = chain.from_iterable(rule.classes for rule in known)
    return Rule(lambda value: any(rule.fits(value) for rule in known), tuple(kinds), tuple(classes))


def _rule_of_tuple(parts: tuple[Any, ...]) -> Rule | None:
    endless = len(parts) == 2 and parts[1] is Ellipsis
    rules = [_rule(part) for part in (parts[:1] if endless else parts)]

    def fits(values: Iterable[Any]) -> bool:
        if not isinstance(values, (tuple, list)) or (not endless and len(values) != len(rules)):
            return False
        pairs = zip(values, rules * len(values) if endless else rules, strict=False)
        return all(rule is None or rule.fits(value) for value, rule in pairs)

    inner = ["anything" if rule is None else rule.words for rule in rules]
    if len(set(inner)) > 1 or not inner[0].startswith("a "):
        return Rule(fits, (f"a tuple ({', '.join(inner)}{', ...' if endless else ''})",))
    count = "" if endless else f"{len(rules)} "
    return Rule(fits, (f"a tuple of {count}{inner[0].removeprefix('a ')}s",))


_SIMPLE: dict[Any, Rule] = {
    float: Rule(number, ("a number",)),
    int: Rule(whole, ("a whole number",)),
    str: Rule(lambda value: isinstance(value, str), ("a string",)),
    bool: Rule(lambda value: isinstance(value, (bool, np.bool_)), ("True or False",)),
    Tensor: Rule(tensor, ("a tensor of real numbers",), (Tensor,)),
    None: Rule(lambda value: value is None, ("None",)),
    type(None): Rule(lambda value: value is None, ("None",)),
    torch.device: Rule(_device, ("a device such as 'cpu'",)),
    torch.dtype: Rule(lambda value: isinstance(value, torch.dtype), ("a dtype such as torch.float64",)),
}

_CLASSES = {
    "builtins.dict": "a dict",
    "collections.abc.Mapping": "a dict",
    "pathlib.Path": "a path",
    "sdeflow.bench.problem.Problem": "a bench.Problem",
    "sdeflow.engine.base.Engine": "an engine such as sf.engine.Local()",
    "sdeflow.noise.NoiseSource": "a NoiseSource such as sf.SamePath(seed)",
    "sdeflow.problems.Gaussian": "a problems.Gaussian",
    "sdeflow.problems.GaussianMixture": "a problems.GaussianMixture",
    "sdeflow.sde.Problem": "an ODE, SDE or ReverseSDE",
    "sdeflow.sde.SDE": "an SDE",
    "sdeflow.solvers.base.LinearSolver": "a linear solver such as sf.solvers.DDIM()",
    "sdeflow.solvers.base.Solver": "a solver such as sf.solvers.Heun()",
    "sdeflow.solvers.own_eta.OwnEta": "an OwnEta",
    "sdeflow.solvers.runge_kutta.RungeKutta": "a RungeKutta such as sf.solvers.RK4()",
    "sdeflow.solvers.stochastic.StochasticSolver": "a StochasticSolver such as sf.solvers.StochasticHeun()",
    "torch._C.Generator": "a torch.Generator",
    "torch.nn.modules.module.Module": "a network (torch.nn.Module)",
}
"""Classes whose name alone says too little, by where they are defined."""
