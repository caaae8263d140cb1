"""A dataset of many samples in files: shards, each a range of indices, and a manifest of those that are complete.

    DIR/manifest.jsonl             line 1: what the run is; then one line a shard: its range, file and checksums
    DIR/shards/NAME.safetensors    columns, each with one row a sample (or .npz; or .parquet for tables)

A shard is written whole and then entered; a line that was not finished is not read. Columns, files and
the content of a range, which does not depend on how it is cut into shards, are those of `sdeflow.columns`.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdeflow.checkpoints import write_atomically
from sdeflow.columns import MODULUS, packed, unpacked
from sdeflow.identity import same

MANIFEST = "manifest.jsonl"
SHARDS = "shards"


@dataclass(frozen=True)
class Shard:
    """A range of samples in a file.

    Attributes:
        first, count: the indices [first, first + count).
        file: relative to the dataset's folder.
        size: of the file, bytes.
        sha256: of the file.
        content: of the range, see the top of this module; 64 hexadecimal digits.
        failed: samples that did not finish.
    """

    first: int
    count: int
    file: str
    size: int
    sha256: str
    content: str
    failed: int = 0

    @property
    def end(self) -> int:
        """The index after the last."""
        return self.first + self.count


class Dataset:
    """The folder of a run: what it is, which ranges are complete, and what is missing.

    The shards stay in the manifest: what is held of them are the ranges, joined. Memory does not grow with them.

    Args:
        folder: made if it is not there.
        about: what the run is, as JSON; a folder that holds another run is refused. None opens what is there.

    Attributes:
        about: what the run is.
        ranges: of indices [first, end) that are complete, in order.
        failed: samples that did not finish.

    Raises:
        ValueError: the folder holds another run, or no dataset.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self._manifest = self.folder / MANIFEST
        self._forget()
        if self._manifest.exists():
            self.about = _head(self._manifest)
            if about is not None:
                _same_run(self.folder, self.about, json.loads(json.dumps(about)))
            torn = self._scan()
            if torn:
                self._rewrite({})
        elif about is None:
            raise ValueError(f"{self.folder} holds no dataset: there is no {MANIFEST}")
        else:
            self.about = json.loads(json.dumps(about))
            (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
            write_atomically(self._manifest, self._first_line({}))

    @property
    def num(self) -> int:
        """Samples of the whole run."""
        return int(self.about["num"])

    @property
    def complete(self) -> bool:
        """Whether every index is there."""
        return self.ranges == [(0, self.num)]

    @property
    def content(self) -> str:
        """The content of what is there."""
        return f"{self._content % MODULUS:064x}"

    @property
    def shards(self) -> list[Shard]:
        """Those that are complete, in order. `each` gives one at a time."""
        return list(self.each())

    def each(self) -> Iterator[Shard]:
        """The shards that are complete, in order, as they are read from the manifest."""
        return map(_shard, self._lines())

    def _lines(self) -> Iterator[bytes]:
        """The manifest's lines of shards, in order of their first index."""
        firsts, places = array("q"), array("q")
        with open(self._manifest, "rb") as file:
            place = len(file.readline())
            for line in file:
                if line.endswith(b"\n"):
                    firsts.append(_first(line))
                    places.append(place)
                place += len(line)
            for k in np.argsort(np.asarray(firsts), kind="stable"):
                file.seek(places[k])
                yield file.readline()

    def drop_damaged(self) -> list[Shard]:
        """Forget the shards whose file is gone or is not what was written; those that were."""
        bad = [shard for shard in self.each() if not _intact(self.folder, shard)]
        if bad:
            gone = {shard.first for shard in bad}
            self._rewrite({}, lambda shard: shard.first not in gone)
        return bad

    def missing(self, block: int, size: int) -> Iterator[tuple[int, int]]:
        """(first, count) of ranges still to compute: see `gaps`."""
        return gaps(self.ranges, self.num, block, size)

    def keep(self, done: Sequence[tuple[int, int]]) -> None:
        """Forget the shards that do not lie in one of the ranges [first, end)."""

        def inside(shard: Shard) -> bool:
            return any(a <= shard.first and shard.end <= b for a, b in done)

        if not all(map(inside, self.each())):
            self._rewrite({}, inside)

    def add(self, shard: Shard) -> None:
        """Enter a shard whose file is written."""
        with open(self._manifest, "a", encoding="utf-8") as file:
            file.write(_line(shard))
        self._note(shard)

    def finish(self) -> None:
        """Bring the manifest in order, and drop files that it does not name.

        Raises:
            ValueError: ranges are missing.
        """
        if not self.complete:
            raise ValueError(f"{self.folder}: {self.num - sum(b - a for a, b in self.ranges)} samples are missing")
        self._rewrite({"content": self.content})
        shards = self.folder / SHARDS
        if not shards.exists():
            return
        with os.scandir(shards) as entries:
            there = sum(1 for _ in entries)
        if there != self._count or there == 1:  # one may be what a merged file has replaced
            named = {shard.file for shard in self.each()}
            for path in shards.glob("*"):
                if f"{SHARDS}/{path.name}" not in named:
                    path.unlink()
        if not any(shards.iterdir()):
            shards.rmdir()

    def merge_into(self, file: str, kind: str) -> Path:
        """All shards as one file, which takes their place."""
        path = self.folder / file
        self._scan()
        shards = self.shards
        if [shard.file for shard in shards] == [file]:
            return path
        parts = [self.columns(shard) for shard in shards]
        data = packed({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, kind)
        write_atomically(path, data)
        whole = Shard(0, self.num, file, len(data), _sha256(data), self.content, self.failed)
        write_atomically(self._manifest, self._first_line({}) + _line(whole).encode())
        self._forget()
        self._note(whole)
        self.finish()
        return path

    def columns(self, shard: Shard) -> dict[str, Tensor]:
        """The columns of one shard."""
        columns = unpacked(self.folder / shard.file)
        if any(len(rows) != shard.count for rows in columns.values()):
            raise ValueError(f"{self.folder / shard.file}: expected {shard.count} rows")
        return columns

    # ---- what is held

    def _forget(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.failed, self._content, self._count = 0, 0, 0

    def _note(self, shard: Shard) -> None:
        self.ranges = joined(self.ranges, shard.first, shard.end)
        self.failed += shard.failed
        self._content += int(shard.content, 16)
        self._count += 1

    def _scan(self) -> bool:
        """Read the manifest; whether its last line was not finished."""
        self._forget()
        spans, torn = [], False
        with open(self._manifest, "rb") as file:
            file.readline()
            for line in file:
                torn = not line.endswith(b"\n")
                if torn:
                    break
                try:
                    shard = _shard(line)
                    self._check(shard)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{self._manifest}: not the manifest of a run ({error})") from error
                spans.append((shard.first, shard.end))
                self.failed += shard.failed
                self._content += int(shard.content, 16)
                self._count += 1
        for first, end in sorted(spans):
            if first < 0 or end > self.num or (self.ranges and first < self.ranges[-1][1]):
                raise ValueError(f"{self._manifest}: not the manifest of a run (a range [{first}, {end}))")
            if self.ranges and self.ranges[-1][1] == first:
                self.ranges[-1] = (self.ranges[-1][0], end)
            else:
                self.ranges.append((first, end))
        return torn

    def _check(self, shard: Shard) -> None:
        """Refuse a line that no run wrote: a file is named after its range, unless it holds all samples."""
        numbers = (shard.first, shard.count, shard.size, shard.failed)
        if not all(type(n) is int and n >= 0 for n in numbers) or shard.count < 1 or len(shard.content) != 64:
            raise ValueError(f"a line {shard}")
        int(shard.content, 16)
        whole = (shard.first, shard.end) == (0, self.num) and "/" not in shard.file and not shard.file.startswith(".")
        if not whole and shard.file != _file(shard.first, shard.count, shard.file.rpartition(".")[2]):
            raise ValueError(f"a shard {shard.file!r} of [{shard.first}, {shard.end})")

    def _first_line(self, more: Mapping[str, Any]) -> bytes:
        return (json.dumps({"about": self.about, **more}) + "\n").encode()

    def _rewrite(self, more: Mapping[str, Any], keep: Callable[[Shard], bool] | None = None) -> None:
        """The manifest in order, without the shards that are not kept."""
        part = self._manifest.with_suffix(".part")
        try:
            with open(part, "wb") as file:
                file.write(self._first_line(more))
                for line in self._lines():
                    if keep is None or keep(_shard(line)):
                        file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._manifest)
        finally:
            part.unlink(missing_ok=True)
        if keep is not None:
            self._scan()


def joined(ranges: Sequence[tuple[int, int]], first: int, end: int) -> list[tuple[int, int]]:
    """Ranges [first, end) in order with one more, neighbours joined."""
    result: list[tuple[int, int]] = []
    for a, b in sorted([*ranges, (first, end)]):
        if result and result[-1][1] == a:
            result[-1] = (result[-1][0], b)
        else:
            result.append((a, b))
    return result


def gaps(done: Iterable[tuple[int, int]], num: int, block: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, count) of what the ranges [first, end) leave of [0, num), in pieces of whole blocks, up to `size`."""
    size, at = max(1, size // block) * block, 0
    for start, end in [*sorted(done), (num, num)]:
        while at < start:
            count = min(size, start - at)
            yield at, count
            at += count
        at = max(at, end)


def described(first: int, count: int, data: bytes, content: str, failed: int, kind: str) -> Shard:
    """The shard of a range whose file is `data`."""
    return Shard(first, count, _file(first, count, kind), len(data), _sha256(data), content, failed)


def _file(first: int, count: int, kind: str) -> str:
    return f"{SHARDS}/{first:012d}-{first + count:012d}.{kind}"


def place(folder: Path, shard: Shard, data: bytes) -> None:
    """Write the file of a shard; it is not yet in the manifest."""
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / shard.file, data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _line(shard: Shard) -> str:
    return json.dumps(asdict(shard), separators=(",", ":")) + "\n"


def _intact(folder: Path, shard: Shard) -> bool:
    path = folder / shard.file
    try:
        if path.stat().st_size != shard.size:
            return False
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError:
        return False


def _first(line: bytes) -> int:
    """The first index in a line that `_line` wrote; without reading the rest if it can be."""
    start = line[9 : line.find(b",")]
    return int(start) if line.startswith(b'{"first":') and start.isdigit() else _shard(line).first


def _shard(line: bytes) -> Shard:
    return Shard(**json.loads(line))


def _head(path: Path) -> dict[str, Any]:
    """What the run is, from the first line of its manifest."""
    try:
        with open(path, "rb") as file:
            about = json.loads(file.readline())["about"]
        if not isinstance(about["num"], int):
            raise TypeError(f"a run of {about['num']!r} samples")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the manifest of a run ({error})") from error
    return dict(about)


def _same_run(folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differs = sorted(name for name in {*wanted, *known} if not same({name: known.get(name)}, {name: wanted.get(name)}))
    if differs:
        raise ValueError(f"{folder} holds another run, with another {', '.join(differs)}: give another folder")
