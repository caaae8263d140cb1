"""A dataset of many samples in files: shards, each a range of indices, and a manifest of those that are complete.

    DIR/manifest.jsonl             line 1: what the run is; then one line a shard: its range, file and checksums
    DIR/shards/NAME.safetensors    columns, each with one row a sample (or .npz; or .parquet for tables)

A shard is written whole and then entered; a line that was not finished is not read. The content of a range is a
number that does not depend on how it is cut into shards: the sum modulo 2^256 of the SHA-256 of its blocks, each with
its first index (Bellare and Micciancio 1997, A new paradigm for collision-free hashing, section 5: AdHash). It finds
errors; it is not meant to withstand an attack.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sdeflow.checkpoints import write_atomically

Format = Literal["npz", "safetensors", "parquet"]
FORMATS: tuple[str, ...] = ("npz", "safetensors", "parquet")
Columns = Mapping[str, Tensor]

MANIFEST = "manifest.jsonl"
SHARDS = "shards"
_MODULUS = 1 << 256


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


def content_of(blocks: Iterable[tuple[int, Columns]]) -> str:
    """The content of blocks (first index, columns)."""
    total = 0
    for first, columns in blocks:
        digest = hashlib.sha256(first.to_bytes(8, "little", signed=True))
        for name in sorted(columns):
            value = columns[name]
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(as_bytes(value))
        total += int.from_bytes(digest.digest(), "little")
    return f"{total % _MODULUS:064x}"


def added(contents: Iterable[str]) -> str:
    """The content of ranges together."""
    return f"{sum(int(content, 16) for content in contents) % _MODULUS:064x}"


def as_bytes(value: Tensor) -> bytes:
    """The bytes of a tensor's numbers, in order."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# ---- files


def packed(columns: Columns, kind: str) -> bytes:
    """The bytes of a file of columns, the same for the same columns.

    Raises:
        ValueError: another format, or for a table columns of more than two dimensions.
        ImportError: a table, and pyarrow is not installed.
    """
    held = {name: value.detach().cpu().contiguous() for name, value in columns.items()}
    if kind == "safetensors":
        return safetensors.torch.save(held)
    if kind == "npz":
        memory = io.BytesIO()
        np.savez(memory, allow_pickle=False, **{name: _array(value) for name, value in held.items()})
        return memory.getvalue()
    if kind == "parquet":
        return _table(held)
    raise ValueError(f"unknown format {kind!r}: expected one of {', '.join(FORMATS)}")


def _array(value: Tensor) -> np.ndarray:
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()


def _table(columns: Columns) -> bytes:
    """Parquet: a column a number of each row; "x" of (n, 3) is x_0, x_1, x_2."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('tables need pyarrow: pip install "sdeflow[ray]"') from error
    plain: dict[str, Any] = {}
    for name, value in columns.items():
        flat = _array(value).reshape(len(value), -1)
        wide = value.ndim > 1
        plain |= {f"{name}_{k}" if wide else name: pa.array(flat[:, k]) for k in range(flat.shape[1])}
    memory = io.BytesIO()
    pq.write_table(pa.table(plain), memory)
    return memory.getvalue()


def unpacked(path: Path) -> dict[str, Tensor]:
    """The columns of a file that `packed` made; of a table its columns of numbers. Nothing is unpickled.

    Raises:
        ValueError: not such a file.
    """
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(data)
        if path.suffix == ".npz":
            with np.load(io.BytesIO(data), allow_pickle=False) as held:
                return {name: torch.from_numpy(held[name]) for name in held.files}
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(pa.BufferReader(data))
        return {name: torch.from_numpy(table[name].to_numpy().copy()) for name in table.column_names}
    except (SafetensorError, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:  # Arrow's are ValueErrors
        raise ValueError(f"{path}: not a shard of a dataset ({error})") from error


# ---- the folder


class Dataset:
    """The folder of a run: what it is, which ranges are complete, and what is missing.

    Args:
        folder: made if it is not there.
        about: what the run is, as JSON; a folder that holds another run is refused. None opens what is there.

    Raises:
        ValueError: the folder holds another run, or no dataset.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self._manifest = self.folder / MANIFEST
        if self._manifest.exists():
            self.about, self._shards, torn = _read(self._manifest)
            if torn:
                self._rewrite({})
            if about is not None:
                _same_run(self.folder, self.about, json.loads(json.dumps(about)))
        elif about is None:
            raise ValueError(f"{self.folder} holds no dataset: there is no {MANIFEST}")
        else:
            self.about, self._shards = json.loads(json.dumps(about)), []
            (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
            self._rewrite({})

    @property
    def num(self) -> int:
        """Samples of the whole run."""
        return int(self.about["num"])

    @property
    def shards(self) -> list[Shard]:
        """Those that are complete, in order."""
        return sorted(self._shards, key=lambda shard: shard.first)

    @property
    def complete(self) -> bool:
        """Whether every index is there."""
        return sum(shard.count for shard in self._shards) == self.num

    @property
    def content(self) -> str:
        """The content of what is there."""
        return added(shard.content for shard in self._shards)

    def drop_damaged(self) -> list[Shard]:
        """Forget the shards whose file is gone or is not what was written; those that were."""
        bad = [shard for shard in self._shards if not _intact(self.folder, shard)]
        if bad:
            self._shards = [shard for shard in self._shards if shard not in bad]
            self._rewrite({})
        return bad

    def missing(self, block: int, size: int) -> Iterator[tuple[int, int]]:
        """(first, count) of ranges still to compute: see `gaps`."""
        return gaps([(shard.first, shard.end) for shard in self._shards], self.num, block, size)

    def keep(self, done: Sequence[tuple[int, int]]) -> None:
        """Forget the shards that do not lie in one of the ranges [first, end)."""
        kept = [s for s in self._shards if any(a <= s.first and s.end <= b for a, b in done)]
        if len(kept) < len(self._shards):
            self._shards = kept
            self._rewrite({})

    def add(self, shard: Shard) -> None:
        """Enter a shard whose file is written."""
        with open(self._manifest, "a", encoding="utf-8") as file:
            file.write(_line(shard))
        self._shards.append(shard)

    def finish(self) -> None:
        """Bring the manifest in order, and drop files that it does not name.

        Raises:
            ValueError: ranges are missing.
        """
        if not self.complete:
            raise ValueError(f"{self.folder}: {self.num - sum(s.count for s in self._shards)} samples are missing")
        self._rewrite({"content": self.content})
        named = {shard.file for shard in self._shards}
        for path in (self.folder / SHARDS).glob("*"):
            if f"{SHARDS}/{path.name}" not in named:
                path.unlink()
        if (self.folder / SHARDS).exists() and not any((self.folder / SHARDS).iterdir()):
            (self.folder / SHARDS).rmdir()

    def merge_into(self, file: str, kind: str) -> Path:
        """All shards as one file, which takes their place."""
        path = self.folder / file
        shards = self.shards
        if [shard.file for shard in shards] == [file]:
            return path
        parts = [unpacked(self.folder / shard.file) for shard in shards]
        data = packed({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, kind)
        write_atomically(path, data)
        self._shards = [Shard(0, self.num, file, len(data), _sha256(data), self.content, sum(s.failed for s in shards))]
        self.finish()
        return path

    def columns(self, shard: Shard) -> dict[str, Tensor]:
        """The columns of one shard."""
        return unpacked(self.folder / shard.file)

    def _rewrite(self, more: Mapping[str, Any]) -> None:
        head = json.dumps({"about": self.about, **more})
        write_atomically(self._manifest, (head + "\n" + "".join(map(_line, self.shards))).encode())


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
    name = f"{SHARDS}/{first:012d}-{first + count:012d}.{kind}"
    return Shard(first, count, name, len(data), _sha256(data), content, failed)


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


def _read(path: Path) -> tuple[dict[str, Any], list[Shard], bool]:
    """What the run is, its shards, and whether there is a last line that was not finished, which is left out."""
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")[:-1]
    try:
        about = json.loads(lines[0])["about"]
        num = about["num"]
        shards = [Shard(**json.loads(line)) for line in lines[1:]]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the manifest of a run ({error})") from error
    at = 0
    for shard in sorted(shards, key=lambda s: s.first):
        inside = Path(shard.file).name == shard.file or shard.file == f"{SHARDS}/{Path(shard.file).name}"
        if not inside or shard.first < at or shard.count < 1 or shard.end > num:
            raise ValueError(f"{path}: not the manifest of a run (a shard {shard.file!r} of {shard.first} on)")
        at = shard.end
    return about, shards, not text.endswith("\n")


def _same_run(folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if known != wanted:
        differs = sorted(name for name in {*wanted, *known} if known.get(name) != wanted.get(name))
        raise ValueError(f"{folder} holds another run, with another {', '.join(differs)}: give another folder")
