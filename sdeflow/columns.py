"""Columns of numbers, one row a sample: their files, and the content of a range of samples.

The content is a number that does not depend on how a range is cut: the sum modulo 2^256 of the SHA-256 of its blocks,
each with its first index (Bellare and Micciancio 1997, A new paradigm for collision-free hashing, section 5: AdHash).
It finds errors; it is not meant to withstand an attack.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

Format = Literal["npz", "safetensors", "parquet"]
FORMATS: tuple[str, ...] = ("npz", "safetensors", "parquet")
Columns = Mapping[str, Tensor]

MODULUS = 1 << 256


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
    return f"{total % MODULUS:064x}"


def added(contents: Iterable[str]) -> str:
    """The content of ranges together."""
    return f"{sum(int(content, 16) for content in contents) % MODULUS:064x}"


def as_bytes(value: Tensor) -> bytes:
    """The bytes of a tensor's numbers, in order."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


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
