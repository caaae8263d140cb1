"""What a statistic is, and statistics of a function of the samples."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sdeflow.checked import described, tensor
from sdeflow.solution import Solution


class Statistic(ABC):
    """An accumulator of values (n, *event). Give an empty one, with its settings; copies of it are filled.

    Its settings are the arguments that it is made of, each an attribute of the same name.
    """

    count: int
    """Samples taken so far."""

    @abstractmethod
    def empty(self) -> Self:
        """A new one with the same settings that has taken nothing."""

    @abstractmethod
    def add(self, x: Tensor) -> None:
        """Take a block of values (n, *event)."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take what another one of the same settings has taken."""

    @abstractmethod
    def arrays(self) -> dict[str, Tensor]:
        """What it holds, to be kept in a file: the same for the same samples."""

    @abstractmethod
    def load(self, arrays: Mapping[str, Tensor]) -> None:
        """Hold what `arrays` gave."""

    def described(self) -> dict[str, Any]:
        """Its class and its settings as JSON: equal for statistics that merge, and the same in every process.

        A function is its name, so that two lambdas of one place are the same.
        """
        kind = type(self)
        names = [name for name in inspect.signature(kind).parameters if hasattr(self, name)]
        made_of = {name: _said(getattr(self, name)) for name in names}
        return {"class": f"{kind.__module__}.{kind.__qualname__}", **made_of}

    def _refuse_other(self, other: Statistic) -> None:
        """Refuse to merge with a statistic of another class, or of other settings."""
        if not isinstance(other, Statistic):
            raise TypeError(f"expected a {type(self).__name__} to merge, got {described(other)}")
        own, its = self.described(), other.described()
        if own != its:
            raise ValueError(f"expected a statistic of the same settings to merge, {own}, got {its}")

    def take(self, solution: Solution, ok: Tensor) -> None:
        """Take the samples `ok` (n,) of a solution: their ends, unless it is a statistic of something else."""
        self.add(solution.x[ok])


class Functional(Statistic):
    """A statistic of a function of each path: of its end, or with `save` of `solution.xs` at `solution.ts`.

    Args:
        function: of a `Solution`, to (n,) or (n, k) values, one row a sample.
        statistic: of these values.
    """

    def __init__(self, function: Callable[[Solution], Tensor], statistic: Statistic) -> None:
        if not callable(function) or not isinstance(statistic, Statistic):
            raise TypeError(f"expected a function of a Solution and a Statistic, got {function!r} and {statistic!r}")
        self.function, self.statistic = function, statistic

    @property
    def count(self) -> int:  # type: ignore[override]  # read only here
        """Samples taken so far."""
        return self.statistic.count

    def empty(self) -> Self:
        return type(self)(self.function, self.statistic.empty())

    def add(self, x: Tensor) -> None:
        """Take values of the function."""
        self.statistic.add(x)

    def take(self, solution: Solution, ok: Tensor) -> None:
        """The function's values of the samples `ok`.

        Raises:
            ValueError: the function does not give one row a sample.
        """
        value = self.function(solution)
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(ok):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"expected one value a sample, ({len(ok)}, ...), from the functional, got {got}")
        self.statistic.add(value[ok])

    def merge(self, other: Self) -> None:
        self._refuse_other(other)
        self.statistic.merge(other.statistic)

    def arrays(self) -> dict[str, Tensor]:
        return self.statistic.arrays()

    def load(self, arrays: Mapping[str, Tensor]) -> None:
        self.statistic.load(arrays)


def _said(value: object) -> Any:
    """A setting as JSON."""
    from sdeflow.identity import said  # itself knows statistics

    if isinstance(value, Statistic):
        return value.described()
    if isinstance(value, nn.Module):  # merging must not read its weights
        return repr(value)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return said(value)


def checked_block(x: Tensor, event: tuple[int, ...] | None) -> Tensor:
    """A block in float64 on the CPU, of the event shape that came before.

    Raises:
        TypeError, ValueError: no block of numbers, or one of another event shape.
    """
    if not tensor(x) or x.ndim < 1:
        raise TypeError(f"expected a real tensor (n, *event), got {described(x)}")
    if event is not None and tuple(x.shape[1:]) != event:
        raise ValueError(f"expected values of shape (n, {', '.join(map(str, event))}), got {tuple(x.shape)}")
    return x.detach().to("cpu", torch.float64)
