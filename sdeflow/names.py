"""Names that a user types: an unknown one is refused with those that are most like it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_CLOSE = 0.5
"""How alike a name must be to be offered instead of an unknown one, as difflib counts."""


def check_names(names: Iterable[str], known: Iterable[str], what: str, listed: str | None = None) -> None:
    """Refuse names that do not exist, with those that are nearest.

    Args:
        what: they are: "solver".
        listed: where all names are to be seen; the message itself lists them unless given.

    Raises:
        ValueError: an unknown name.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise ValueError(f"unknown {what} {name!r}{hint}: expected {listed or 'one of ' + ', '.join(known)}")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three names that are like `name`, whatever its capitals, the most alike first."""
    lower: dict[str, list[str]] = {}
    for k in known:
        lower.setdefault(k.lower(), []).append(k)
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=_CLOSE)
    return [k for c in close for k in lower[c]][:3]
