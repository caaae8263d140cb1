"""The engine of one machine: this process, or a pool of processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

from sdeflow.engine.base import Engine, EngineError, Item, Outcome, checked_workers

_TRIES = 20
"""Pools that may break before one gives up,"""
_IN_VAIN = 3
"""and how many in a row that finished nothing: what kills a process each time is not chance."""


class Local(Engine):
    """Work in this process, or in a pool of `workers` processes with one thread each.

    A pool sends `work` by pickle to fresh interpreters (spawn): a script that uses one needs the usual
    `if __name__ == "__main__":`, and functions must be importable, not lambdas. The pool starts with the first work and
    ends with it, or with `with engine:` around several pieces of it; its processes end when this one dies.

    Args:
        workers: 1 computes in this process, where work may be anything.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers = checked_workers(workers)
        self._users, self._sent = 0, 0
        self._folder: Path | None = None
        self._pool: ProcessPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"Local({self._workers})"

    @property
    def workers(self) -> int:
        return self._workers

    def __enter__(self) -> Self:
        if self._users == 0 and self._workers > 1:
            self._folder = Path(tempfile.mkdtemp(prefix="sdeflow-"))
        self._users += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._users -= 1
        if self._users == 0 and self._folder is not None:
            self._drop_pool()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

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
        _refuse_main()
        with self:
            assert self._folder is not None
            self._sent += 1
            file = self._folder / f"{self._sent}.pickle"
            file.write_bytes(sent)
            try:
                yield from self._in_pools(str(file), iter(items))
            finally:
                file.unlink(missing_ok=True)

    def _in_pools(self, file: str, items: Iterator[Item]) -> Iterator[tuple[Item, Any]]:
        """One pool after another until all is done: a pool breaks when one of its processes dies."""
        lost: list[Item] = []
        broken = in_vain = 0
        while True:
            running: dict[Future[_Outcome], Item] = {}
            try:
                while True:
                    while len(running) < 2 * self._workers and (lost or (more := list(islice(items, 1)))):
                        item = lost.pop() if lost else more[0]
                        try:
                            running[self._started().submit(_compute, file, item)] = item
                        except BrokenProcessPool:
                            lost.append(item)
                            raise
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        outcome, in_vain = future.result(), 0
                        yield running.pop(future), _value(outcome)
            except BrokenProcessPool:
                lost += running.values()
                self._drop_pool()
                broken, in_vain = broken + 1, in_vain + 1
                if in_vain == _IN_VAIN or broken == _TRIES:
                    times = f"{in_vain} times in a row" if in_vain == _IN_VAIN else f"{broken} times"
                    raise EngineError(
                        f"a process of the pool died {times} (out of memory, killed, or a script without "
                        f'`if __name__ == "__main__":`); still to do: {lost[:3]} and what follows'
                    ) from None
            finally:
                for future in running:
                    future.cancel()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(str(self._folder),)
            )
        return self._pool

    def _drop_pool(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _refuse_main() -> None:
    """Refuse a main module that the processes would import and cannot: a program from standard input."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is None or getattr(main, "__spec__", None) is not None:
        return
    if not (Path(multiprocessing.process.ORIGINAL_DIR or "") / file).exists():  # type: ignore[attr-defined]
        raise EngineError(
            f"a pool of processes imports the main module again: expected a program in a file, got {file}"
        )


class _Outcome(NamedTuple):
    """What a process made of an item, as bytes, as it may not survive its pickle.

    Attributes:
        value: pickled: the result, or the error; None for an error that cannot be pickled.
        failed: whether it is an error.
        said: the error in words, with its traceback.
    """

    value: bytes | None
    failed: bool = False
    said: str = ""


def _value(outcome: _Outcome) -> Any:
    """The result. Raises what the work raised, or what it said where that error does not survive its pickle."""
    if not outcome.failed:
        assert outcome.value is not None
        return pickle.loads(outcome.value)
    try:
        error = None if outcome.value is None else pickle.loads(outcome.value)
    except Exception:  # whatever a class of the user's does when it is made again
        error = None
    if not isinstance(error, Exception):
        raise EngineError(f"an item failed in a process of the pool: {outcome.said}")
    error.add_note(f"in a process of the pool: {outcome.said}")
    raise error


_work: tuple[str, Callable[[Any], Any]] | None = None
"""In a process of the pool: the file of the last work, and the work."""


def _begin(folder: str) -> None:
    """In a new process."""
    import signal
    import threading

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()


def _end_with_parent(folder: str) -> None:
    """End this process when its parent is gone: a parent that is killed tells nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _compute(file: str, item: Any) -> _Outcome:
    try:
        return _Outcome(pickle.dumps(_loaded(file)(item)))
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> _Outcome:
    import traceback

    said = "".join(traceback.format_exception(error)).rstrip()
    said = f"{type(error).__name__}: {error}\n{said}"
    try:
        return _Outcome(pickle.dumps(error), True, said)
    except Exception:  # it holds something that has no pickle
        return _Outcome(None, True, said)


def _loaded(file: str) -> Callable[[Any], Any]:
    global _work
    if _work is None or _work[0] != file:
        try:
            _work = file, pickle.loads(Path(file).read_bytes())
        except (AttributeError, ImportError) as error:
            raise EngineError(
                f"a process of the pool cannot import what the work needs: {error}; functions and classes must be in a "
                "module or a script, not in a notebook or in what was typed"
            ) from error
    return _work[1]
