"""A valid call, and what is done with its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


def _itself(result: Any) -> Any:
    return result


@dataclass(frozen=True)
class Target:
    """One public function or class.

    Attributes:
        name: as users write it.
        call: the function.
        valid: makes its arguments, by name, new at every call.
        use: what to do with the result to see whether it is right.
        allows: {argument: labels of substitutes that look bad and are not}; "*" for all of them.
        finite: whether a right result holds no NaN and no infinity.
    """

    name: str
    call: Callable[..., Any]
    valid: Callable[[], dict[str, Any]]
    use: Callable[[Any], Any] = _itself
    allows: Mapping[str, frozenset[str]] = field(default_factory=dict)
    finite: bool = True


FREE_TEXT = "text; empty text; another word; in capitals; with a blank"
"""The substitutes of a name that is for tables alone: any text is a good one."""


def allow(**labels: str) -> dict[str, frozenset[str]]:
    """{argument: the labels}, several of one argument separated by "; "."""
    return {name: frozenset(text.split("; ")) for name, text in labels.items()}
