"""The inputs: every target with every substitute for each of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.fuzzing.outcome import TIME_OUT, Outcome, judge
from benchmarks.fuzzing.pools import Skip, Substitute, pool
from benchmarks.fuzzing.target import Target


@dataclass(frozen=True)
class Case:
    """One input: where it belongs, what it is, and how it is tried."""

    group: str
    label: str
    attempt: Callable[[], Outcome]

    def __str__(self) -> str:
        return f"{self.group}: {self.label}"


def made(target: Target, /, **substitutes: Substitute) -> Case:
    """The case of a target with some arguments replaced."""
    label = ", ".join(f"{name} = {substitute.label}" for name, substitute in substitutes.items())
    return Case(target.name, label, lambda: attempt(target, substitutes))


def attempt(target: Target, substitutes: dict[str, Substitute], seconds: float = TIME_OUT) -> Outcome:
    """Try a target with some arguments replaced.

    Raises:
        Skip: a substitute does not apply.
    """
    given = target.valid()
    for name, substitute in substitutes.items():
        try:
            given[name] = substitute.make(given[name])
        except Skip:
            raise
        except Exception as error:  # no such guise of this value
            raise Skip from error
    meanings = {
        "other" if {substitute.label, "*"} & set(target.allows.get(name, ())) else substitute.meaning
        for name, substitute in substitutes.items()
    }
    finite = target.finite and "other" not in meanings

    def act() -> Any:
        torch.manual_seed(0)
        return target.use(target.call(**given))

    if "bad" in meanings:
        return judge(act, refuse=True, seconds=seconds)
    if "NaN" in meanings:
        return judge(act, shows=True, seconds=seconds)
    return judge(act, baseline=None if "other" in meanings else _right(target), finite=finite, seconds=seconds)


_RIGHT: dict[str, Any] = {}


def _right(target: Target) -> Any:
    """What the target returns for its valid arguments."""
    if target.name not in _RIGHT:
        torch.manual_seed(0)
        _RIGHT[target.name] = target.use(target.call(**target.valid()))
    return _RIGHT[target.name]


def all_of(target: Target) -> Iterator[Case]:
    """Every argument of a target replaced by every substitute, one at a time."""
    for name, value in target.valid().items():
        for substitute in pool(name, value):
            yield made(target, **{name: substitute})
