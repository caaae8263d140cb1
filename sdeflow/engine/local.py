"""The engine of one machine: this process, or a pool of processes."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from sdeflow.engine.base import Engine, EngineError, Item, Outcome, checked_workers

_TRIES = 20
"""Pools that may break before one gives up."""


class Local(Engine):
    """Work in this process, or in a pool of `workers` processes with one thread each.

    A pool sends `work` by pickle to fresh interpreters (spawn): a script that uses one needs the usual
    `if __name__ == "__main__":`, and functions must be importable, not lambdas.

    Args:
        workers: 1 computes in this process, where work may be anything.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers = checked_workers(workers)

    def __repr__(self) -> str:
        return f"Local({self._workers})"

    @property
    def workers(self) -> int:
        return self._workers

    def map(
        self, work: Callable[[Item], Outcome], items: Iterable[Item], *, memory: int = 0
    ) -> Iterator[tuple[Item, Outcome]]:
        if self._workers == 1:
            for item in items:
                yield item, work(item)
            return
        try:
            sent = pickle.dumps(work)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise TypeError(
                f"a pool of processes needs work that can be pickled, with functions that can be imported: {error}"
            ) from error
        yield from self._in_pools(sent, iter(items))

    def _in_pools(self, sent: bytes, items: Iterator[Item]) -> Iterator[tuple[Item, Any]]:
        """One pool after another until all is done: a pool breaks when one of its processes dies."""
        lost: list[Item] = []
        for _ in range(_TRIES):
            running: dict[Future[Any], Item] = {}
            pool = ProcessPoolExecutor(
                self._workers, multiprocessing.get_context("spawn"), initializer=_receive, initargs=(sent,)
            )
            try:
                while True:
                    while len(running) < 2 * self._workers and (lost or (more := list(islice(items, 1)))):
                        item = lost.pop() if lost else more[0]
                        try:
                            running[pool.submit(_compute, item)] = item
                        except BrokenProcessPool:
                            lost.append(item)
                            raise
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield running.pop(future), result
            except BrokenProcessPool:
                lost += running.values()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        raise EngineError(f"a process of the pool died {_TRIES} times; still to do: {lost[:3]} and what follows")


_work: Callable[[Any], Any] | None = None


def _receive(sent: bytes) -> None:
    """In a new process: keep the work."""
    import signal

    import torch

    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    torch.set_num_threads(1)
    _work = pickle.loads(sent)


def _compute(item: Any) -> Any:
    assert _work is not None
    return _work(item)
