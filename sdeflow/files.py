"""Files written whole or not at all, and not over what they are made of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one.

    A link stays one: what it leads to is replaced. A device or a pipe is written to, as there is no file to replace.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is not there, while the block runs.

    By a lock of the operating system on the folder itself: it ends with the process, however that ends, and leaves no
    file. Where there are no such locks (Windows, some network file systems) nothing is kept out.

    Raises:
        ValueError: another run is at work there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another run is at work there; wait for its end, or give another folder"
            ) from None
        except OSError:  # no locks there
            pass
        yield
    finally:
        os.close(handle)


def check_not_read(out: str | os.PathLike[str], read: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse to write over a file that the result is made of.

    Raises:
        ValueError: `out` is one of the files that are read, under whatever name.
    """
    there = Path(out).resolve()
    for path in map(Path, read):
        if path.resolve() == there or (path.exists() and there.exists() and path.samefile(there)):
            raise ValueError(f"{out} is read, and would be written over: give another file for the result")
