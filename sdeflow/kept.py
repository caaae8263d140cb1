"""Tables kept for the next solve, of what depends on immutable things alone."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable
from fractions import Fraction
from threading import Lock
from typing import Any, Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


_ALL: list[Kept[Any]] = []


class Kept(Generic[Value]):
    """The last `size` values made, by their keys."""

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, Lock()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        _ALL.append(self)

    def get(self, key: Hashable | None, make: Callable[[], Value]) -> Value:
        """The value of `key`; without a key, or the first time, what `make` returns."""
        if key is None:
            return make()
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._values.clear()


def forget() -> None:
    """Empty all: for those who change the code of a solver or process while it runs, as tests of tests do."""
    for kept in _ALL:
        kept.clear()


def constant(value: object) -> bool:
    """Whether `value` cannot change, and its equality says all: a number, a string, a frozen dataclass of such.

    A function is not: what it reads may change. A class that is none of these says so by `immutable = True`.
    """
    if value is None or isinstance(value, (int, float, str, Fraction)) or getattr(type(value), "immutable", False):
        return True
    if isinstance(value, tuple):
        return all(map(constant, value))
    parameters = getattr(type(value), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        return False
    own = vars(value)
    if _VERDICT not in own:  # frozen: asked at every solve, it is found out once
        verdict = all(constant(getattr(value, field.name)) for field in dataclasses.fields(value))  # type: ignore[arg-type]
        object.__setattr__(value, _VERDICT, verdict)
    return bool(own[_VERDICT])


_VERDICT = "_is_constant"


def bits(times: Tensor) -> bytes:
    """Times (host, float64) as a key."""
    return times.numpy().tobytes()
