"""Files damaged on purpose: checkpoints, plans, results, data."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

import sdeflow as sf
from benchmarks.fuzzing.cases import Case
from benchmarks.fuzzing.outcome import Outcome, judge
from sdeflow import bench
from sdeflow.data import load

TRAP = "sdeflow-fuzz-trap"
"""The file that a hostile pickle would make."""


class _Trap:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (Path(tempfile.gettempdir()) / TRAP,)


def _pickled() -> bytes:
    return pickle.dumps(_Trap())


def _archive(*names: str, content: bytes = b"x") -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return memory.getvalue()


def _whole(kind: str) -> bytes:
    """A good file of a kind."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole"
        if kind == "checkpoint":
            sf.save_model(path, sf.Model(sf.nets.MLP((2,), width=4, depth=1, embedding=4, harmonics=1), sf.VP()))
        elif kind == "plan":
            flow = sf.VP().probability_flow(lambda x, t: -x)
            sf.solvers.DPMSolverPP(2).plan(flow, torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)).save(path)
        elif kind == "results":
            bench.write([bench.Result("p", "Heun", "uniform", "trajectory", budget=4, nfe=4.0, median=0.1)], path)
        elif kind == "npy":
            np.save(path.with_suffix(".npy"), np.zeros((3, 2), np.float32))
            path = path.with_suffix(".npy")
        elif kind == "npz":
            np.savez(path.with_suffix(".npz"), data=np.zeros((3, 2), np.float32), labels=np.zeros(3, np.int64))
            path = path.with_suffix(".npz")
        else:
            safetensors.torch.save_file({"data": torch.zeros(3, 2)}, path)
        return path.read_bytes()


def _damaged(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """What befalls any file: cut, lengthened, overwritten; and files of other kinds under its name."""
    for share in (0.0, 0.01, 0.1, 0.5, 0.9, 0.99):
        yield f"cut at {share:.0%}", whole[: int(share * len(whole))]
    yield "a byte less", whole[:-1]
    yield "zeros", bytes(1000)
    yield "not UTF-8", b"\xff\xfe\x80" * 50
    yield "a byte order mark first", b"\xef\xbb\xbf" + whole
    yield "a pickle", _pickled()
    yield (
        "a torch archive that leaves its folder",
        _archive("../../evil/data.pkl", "archive/data.pkl", content=_pickled()),
    )
    yield "an archive of zeros", _archive("data.npy", content=bytes(10**6))
    yield "deep nesting", b"[" * 200_000
    yield "deep objects", b'{"a":' * 100_000
    yield "a number of many digits", b"1" * 10_000
    for json_value in (b"null", b"[]", b"{}", b"NaN", b"3", b'"text"', b"[{}]", b"true"):
        yield f"the JSON {json_value.decode()}", json_value


def _overwritten(whole: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """One byte changed, at places spread over the file: some of these change nothing that matters."""
    generator = np.random.Generator(np.random.Philox(len(whole)))
    for k in range(count):
        changed = bytearray(whole)
        at = int(generator.integers(len(whole) if k % 2 else min(len(whole), 400)))
        changed[at] ^= int(generator.integers(1, 256))
        yield f"byte {at} changed to {changed[at]}", bytes(changed)


def _tensors(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def _checkpoints(whole: bytes) -> Iterator[tuple[str, bytes]]:
    size = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    yield "a header of 2^60 bytes", struct.pack("<Q", 2**60) + whole[8:]
    yield "a header of 2^63 bytes", struct.pack("<Q", 2**63) + whole[8:]
    yield "a header of 10^8 bytes", struct.pack("<Q", 10**8) + whole[8:]
    yield "a nested header", _tensors(b"[" * 100_000)
    yield "a header that is not UTF-8", _tensors(b'{"\xff\xfe": 1}')
    yield "bytes after the end", whole + b"more"
    names = [name for name in header if name != "__metadata__"]
    first = names[0]

    def entry(**changes: Any) -> bytes:
        return _tensors({**header, first: {**header[first], **changes}}, data)

    yield "overlapping tensors", entry(data_offsets=header[names[1]]["data_offsets"])
    yield "an offset beyond the end", entry(data_offsets=[0, 10**15])
    yield "a negative offset", entry(data_offsets=[-4, 0])
    yield "a huge shape", entry(shape=[10**9, 10**9])
    yield "another shape", entry(shape=[*reversed(header[first]["shape"]), 1])
    yield "another dtype", entry(dtype="I32")
    yield "an unknown dtype", entry(dtype="X9")
    text = json.dumps(header)
    entry_text = f"{json.dumps(first)}: {json.dumps(header[first])}"
    yield "a name twice", _tensors(text.replace(entry_text, f"{entry_text}, {entry_text}").encode(), data)
    yield "no metadata", _tensors({k: v for k, v in header.items() if k != "__metadata__"}, data)
    for value in (math.nan, math.inf):
        filled = np.full(len(data) // 4, value, np.float32).tobytes()
        yield f"weights of {value}", _tensors(header, filled)
    description = json.loads(header["__metadata__"]["sdeflow"])

    def described(text: str) -> bytes:
        return _tensors({**header, "__metadata__": {"sdeflow": text}}, data)

    yield "a description that is not JSON", described("{")
    yield "a nested description", described("[" * 100_000)
    yield "a description of many digits", described("1" * 10_000)
    changes: tuple[tuple[tuple[str, ...], Any], ...] = (
        (("format",), 2), (("format",), 10**400), (("format",), None), (("format",), True), (("format",), "1"),
        (("format",), [1]), (("net",), None), (("net",), []), (("net",), {}), (("net", "name"), "object"),
        (("net", "name"), ["MLP"]), (("net", "width"), 10**9), (("net", "width"), 10**30), (("net", "width"), -1),
        (("net", "width"), 1.5), (("net", "width"), "8"), (("net", "width"), None), (("net", "depth"), 10**9),
        (("net", "depth"), 10**6), (("net", "shape"), [10**9, 10**9]), (("net", "shape"), "2"),
        (("net", "shape"), [2.5]),
        (("net", "shape"), []), (("net", "harmonics"), 10**9), (("net", "classes"), 10**12), (("net", "unknown"), 1),
        (("net", "net"), {"name": "MLP"}), (("process",), None), (("process", "name"), "eval"),
        (("process", "beta_min"), math.nan), (("process", "beta_min"), "0.1"), (("process", "beta_min"), -1),
        (("process", "beta_min"), 10**400), (("process", "beta_min"), None), (("process", "unknown"), 1),
        (("prediction",), "nonsense"), (("prediction",), None), (("prediction",), ["eps"]), (("time",), "nonsense"),
        (("time",), 3), (("time",), ["lam"]),
    )  # fmt: skip
    for path, value in changes:
        changed = json.loads(json.dumps(description))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        yield f"{'.'.join(path)} = {str(value)[:30]}", described(json.dumps(changed))
    for key in description:
        if key not in ("info", "versions", "shape"):
            yield f"no {key}", described(json.dumps({k: v for k, v in description.items() if k != key}))
    deep: Any = {"name": "MLP", "shape": [2]}
    for _ in range(400):
        deep = {"name": "EDMPreconditioned", "net": deep}
    yield "networks in networks", described(json.dumps({**description, "net": deep}))


VALUES: tuple[Any, ...] = (
    None, True, -1, 10**30, 10**400, math.nan, math.inf, "text", "1.0", [], [[]], [None], ["a"], [math.nan], {},
    [[1.0]],
    [1.0] * 7, [[[[1.0]]]],
)  # fmt: skip


def _records(whole: bytes, optional: Callable[[str, Any], bool]) -> Iterator[tuple[str, bytes, bool]]:
    """Every field of a JSON object replaced by every value: (label, bytes, whether it must be refused)."""
    record = json.loads(whole)
    for name in record:
        yield f"no {name}", json.dumps({k: v for k, v in record.items() if k != name}).encode(), False
        for value in VALUES:
            label = f"{name} = {str(value)[:30]}"
            yield label, json.dumps({**record, name: value}).encode() + b"\n", not optional(name, value)
    yield "an unknown field", json.dumps({**record, "unknown": 1}).encode(), False


def _arrays(kind: str) -> Iterator[tuple[str, bytes]]:
    def saved(**arrays: Any) -> bytes:
        memory = io.BytesIO()
        if kind == "npy":
            np.save(memory, arrays["data"], allow_pickle=True)
        else:
            np.savez(memory, **arrays)
        return memory.getvalue()

    good = np.zeros((3, 2), np.float32)
    yield "objects", saved(data=np.array([_Trap(), {}], dtype=object))
    yield "complex numbers", saved(data=good.astype(complex))
    yield "bools", saved(data=good.astype(bool))
    yield "text", saved(data=np.array([["a", "b"]]))
    yield "dates", saved(data=np.zeros((3, 2), "M8[s]"))
    yield "records", saved(data=np.zeros((3, 2), [("a", "f4"), ("b", "i4")]))
    yield "NaN", saved(data=good * math.nan)
    yield "beyond float32", saved(data=good.astype(np.float64) + 1e300)
    yield "one dimension", saved(data=good[0])
    yield "no samples", saved(data=good[:0])
    yield "no components", saved(data=good[:, :0])
    yield "a number", saved(data=np.float32(1))
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1000000), }"
    yield "a header of a huge array", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head + b"\n"
    code = b"__import__('pathlib').Path('/tmp/" + TRAP.encode() + b"').touch()"
    yield "code in the header", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(code) + 1) + code + b"\n"
    if kind == "npz":
        yield "no data", saved(a=good, b=good)
        yield "labels of text", saved(data=good, labels=np.array(["a", "b", "c"]))
        yield "too few labels", saved(data=good, labels=np.zeros(2, int))
        yield "negative labels", saved(data=good, labels=-np.ones(3, int))
        yield "labels of floats", saved(data=good, labels=np.zeros(3))
        yield "objects as labels", saved(data=good, labels=np.array([_Trap()] * 3, dtype=object))
        yield "names that leave the folder", _archive("../../data.npy", "../labels.npy", content=_whole("npy")[:40])


def _read(reader: Callable[[str], Any], suffix: str, content: bytes, refuse: bool, finite: bool) -> Outcome:
    trap = Path(tempfile.gettempdir()) / TRAP
    trap.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        path.write_bytes(content)
        outcome = judge(lambda: reader(str(path)), refuse=refuse, finite=finite)
        strays = [p.name for p in Path(folder).iterdir() if p != path]
    if trap.exists() or strays:
        trap.unlink(missing_ok=True)
        return Outcome("FORBIDDEN", f"the file did something: {strays or 'code of a pickle ran'}")
    return outcome


def _model(path: str) -> Any:
    return sf.load_model(path).score(torch.zeros(2, 2), 0.5)


def _plan(path: str) -> Any:
    plan = sf.Plan.load(path)
    return sf.solve(sf.VP().probability_flow(lambda x, t: -x), torch.ones(2, 2), plan, throw=False)


def _results(path: str) -> Any:
    results = bench.read(path)
    with tempfile.TemporaryDirectory() as folder:
        bench.write(results, Path(folder) / "again.jsonl")
    return [result.error for result in results]


READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "checkpoint": (_model, ".safetensors"),
    "plan": (_plan, ".json"),
    "results": (_results, ".jsonl"),
    "npy": (load, ".npy"),
    "npz": (load, ".npz"),
    "safetensors": (load, ".safetensors"),
}


def cases() -> list[Case]:
    """The damaged files of every kind."""
    found = []
    for kind, (reader, suffix) in READERS.items():
        whole = _whole(kind)
        given: list[tuple[str, bytes, bool]] = []
        for label, content in _damaged(whole):
            free = kind == "results" and (not content.strip() or label in ("cut at 0%", "a byte less"))
            given.append((label, content, not free and label not in ("a byte order mark first",)))
        given += [(label, content, False) for label, content in _overwritten(whole, 60)]
        if kind == "checkpoint":
            given += [(label, content, True) for label, content in _checkpoints(whole)]
        elif kind in ("npy", "npz"):
            given += [(label, content, True) for label, content in _arrays(kind)]
        elif kind in ("plan", "results"):
            given += _records(whole, lambda name, value: True)
        for label, content, refuse in given:
            finite = "changed" not in label
            found.append(Case(f"{kind} file", label, partial(_read, reader, suffix, content, refuse, finite)))
    return found
