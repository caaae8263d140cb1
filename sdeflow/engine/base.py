"""What an engine is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class EngineError(RuntimeError):
    """Workers died more often than the engine tries again, or raised what cannot be sent.

    What was delivered before stays delivered.
    """


class Engine(ABC):
    """Computes independent items, each as often as it takes, and delivers each once."""

    @property
    @abstractmethod
    def workers(self) -> int:
        """How many items are computed at the same time, as far as known."""

    def __enter__(self) -> Self:
        """Keep what the engine starts until the end of the `with`: several maps then pay for it once."""
        return self

    def __exit__(self, *error: object) -> None:
        return None

    @abstractmethod
    def map(
        self, work: Callable[[Item], Outcome], items: Iterable[Item], *, memory: int = 0
    ) -> Iterator[tuple[Item, Outcome]]:
        """(item, work(item)) in the order in which they are finished.

        Few items are taken at a time, so that there may be any number of them. What `work` raises is raised here; a
        worker that dies is replaced and its items are computed again.

        Args:
            work: sent once to each worker; must not depend on the order of items.
            items: any iterable; an item should be small.
            memory: bytes that one item needs, for engines that place work by it; 0 when not known.

        Raises:
            EngineError: workers die again and again, or `work` raised an error that does not survive its pickle.
        """


def checked_workers(workers: Any) -> int:
    """A number of workers, if it is one."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"expected workers >= 1, got {workers!r}")
    return workers
