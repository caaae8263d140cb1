"""The run of many samples on an engine: shards to a dataset, statistics to accumulators, each index once.

A shard is some whole blocks. A block is what is computed in one batch: its bits depend on the block (a matrix product
rounds by the shape of its batch) and on nothing else, so that shards, workers, retries and engines leave no trace.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sdeflow.checkpoints import write_atomically
from sdeflow.columns import content_of, packed
from sdeflow.dataset import MANIFEST, SHARDS, Dataset, Shard, described, gaps, joined, place
from sdeflow.engine.base import Engine
from sdeflow.engine.local import Local
from sdeflow.files import alone_in
from sdeflow.identity import said
from sdeflow.solution import Solution
from sdeflow.statistics.base import Statistic

Compute = Callable[[int, int], Solution]
"""`compute(first, count)`: the samples of indices [first, first + count), failed ones with their status."""

MOST_SAMPLES = 1 << 40
"""Of one run: years of work."""
_SHARD_BYTES = 32 << 20
_SHARDS = 1000
"""Shards of a run, where memory allows fewer: an interruption costs what workers were at."""
_RUNTIME_BYTES = 512 << 20
"""What a process with torch takes before it does anything."""
_SAVE_SECONDS = 5.0
_STATISTICS = "statistics.safetensors"
_CONTENT = "content"


@dataclass
class Delivery:
    """What a worker gives back of one shard.

    Attributes:
        shard, data: of the file; data is None where the worker could write it itself.
        statistics: filled with this shard's samples.
        nfe: model calls times samples, summed.
        failed: samples that did not finish.
    """

    shard: Shard | None
    data: bytes | None
    statistics: dict[str, Statistic]
    nfe: float
    failed: int


@dataclass
class ShardWork:
    """What is sent to each worker once.

    Attributes:
        compute: of one block.
        block: samples a block.
        statistics: empty ones.
        folder: of the dataset; None to store nothing.
        head: its manifest's first line, by which a worker sees whether its disk is ours.
        kind: of the files.
        threads: of torch while a block is computed; bits may depend on it.
    """

    compute: Compute
    block: int
    statistics: Mapping[str, Statistic]
    folder: Path | None = None
    head: str = ""
    kind: str = "safetensors"
    threads: int = 1
    _shared_disk: bool | None = field(default=None, init=False)

    def __call__(self, item: tuple[int, int]) -> Delivery:
        first, count = item
        filled = {name: statistic.empty() for name, statistic in self.statistics.items()}
        blocks: list[tuple[int, dict[str, Tensor]]] = []
        nfe, failed = 0.0, 0
        with _threads(self.threads):
            for at in range(first, first + count, self.block):
                size = min(self.block, first + count - at)
                solution = self.compute(at, size)
                nfe += float(torch.as_tensor(solution.stats.nfe, dtype=torch.float64).expand(size).sum())
                ok = solution.ok
                failed += int((~ok).sum())
                for statistic in filled.values():
                    statistic.take(solution, ok)
                if self.folder is not None:
                    blocks.append((at, _columns(solution)))
        if self.folder is None:
            return Delivery(None, None, filled, nfe, failed)
        columns = {name: torch.cat([block[name] for _, block in blocks]) for name in blocks[0][1]}
        data = packed(columns, self.kind)
        shard = described(first, count, data, content_of(blocks), failed, self.kind)
        if self._writes_here():
            place(self.folder, shard, data)
            return Delivery(shard, None, filled, nfe, failed)
        return Delivery(shard, data, filled, nfe, failed)

    def _writes_here(self) -> bool:
        """Whether the dataset's folder is on this machine too."""
        assert self.folder is not None
        if self._shared_disk is None:
            try:
                with open(self.folder / MANIFEST, encoding="utf-8") as file:
                    self._shared_disk = file.readline() == self.head
            except OSError:
                self._shared_disk = False
        return self._shared_disk


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        dataset: None if nothing was stored.
        statistics: of the samples that finished.
        num: samples in all.
        computed: of those in this call; the others were there before.
        failed: samples that did not finish.
        nfe: model calls a sample, the mean over those computed in this call; NaN for none.
    """

    dataset: Dataset | None
    statistics: dict[str, Statistic]
    num: int
    computed: int
    failed: int
    nfe: float


def run_shards(
    compute: Compute,
    num: int,
    *,
    block: int,
    about: Mapping[str, Any],
    out: str | Path | None = None,
    kind: str = "safetensors",
    store: bool = True,
    statistics: Mapping[str, Statistic] | None = None,
    engine: Engine | None = None,
    shard: int | None = None,
    sample_bytes: int = 8,
    model_bytes: int = 0,
    threads: int = 1,
    on_done: Callable[[int], None] | None = None,
) -> Outcome:
    """Compute `num` samples in shards on an engine.

    Args:
        compute: a block; with several processes it must pickle.
        block: samples a batch.
        about: what the run is; the same for two runs exactly if their samples are to have the same bits.
        out: the folder, resumed if it holds this run; None keeps nothing between calls.
        kind: of the shards' files; a part of what the run is.
        store: keep the samples in `out`.
        statistics: filled with the samples that finish.
        engine: in this process unless given.
        shard: samples a shard, rounded to whole blocks; by memory and the number of workers unless given.
        sample_bytes, model_bytes: of one sample in a file, and of the model, for the memory estimate.
        threads: of torch in a block.
        on_done: called with the number of samples that are finished.
    """
    engine = Local() if engine is None else engine
    empty = dict(statistics or {})
    filled = {name: statistic.empty() for name, statistic in empty.items()}
    folder = None if out is None else Path(out).resolve()
    dataset: Dataset | None = None
    done: list[tuple[int, int]] = []
    failed = 0
    if folder is not None:
        made = {"kind": kind if store else None, "statistics": {name: said(empty[name]) for name in sorted(empty)}}
        dataset = Dataset(folder, {"num": num, "block": block, **about, **made})
        dataset.drop_damaged()
        if empty:
            done, failed = _resume(folder / _STATISTICS, filled)
            dataset.keep(done)
        if store:
            failed = dataset.failed
    have = list(dataset.ranges) if dataset is not None and store else done
    taken = list(done) if empty else have
    size = shard_size(num, block, engine.workers, sample_bytes) if shard is None else max(block, shard)
    head = ""
    if dataset is not None:
        with open(dataset.folder / MANIFEST, encoding="utf-8") as file:
            head = file.readline()
    work = ShardWork(compute, block, empty, folder if store else None, head, kind, threads)
    finished = sum(end - first for first, end in have)
    before, nfe = finished, 0.0
    if on_done is not None and finished:
        on_done(finished)
    memory = _RUNTIME_BYTES + 2 * model_bytes + 3 * min(size, num) * sample_bytes
    saved = time.monotonic()
    # samples that the statistics hold and whose file is gone are computed for the file alone
    outside = [(first, first + count) for first, count in gaps(taken, num, 1, num)]
    lost = list(gaps([*have, *outside], num, block, size))
    try:
        for (first, count), delivery in engine.map(work, chain(lost, gaps(taken, num, block, size)), memory=memory):
            if dataset is not None and delivery.shard is not None:
                if delivery.data is not None:
                    place(dataset.folder, delivery.shard, delivery.data)
                dataset.add(delivery.shard)
            if (first, count) not in lost:
                for name, statistic in filled.items():
                    statistic.merge(delivery.statistics[name])
                done = joined(done, first, first + count)
            finished, nfe, failed = finished + count, nfe + delivery.nfe, failed + delivery.failed
            if folder is not None and empty and time.monotonic() - saved > _SAVE_SECONDS:
                _save(folder / _STATISTICS, filled, done, failed)
                saved = time.monotonic()
            if on_done is not None:
                on_done(finished)
    finally:
        if folder is not None and empty and done:
            _save(folder / _STATISTICS, filled, done, failed)
    if dataset is not None and store:
        dataset.finish()
    computed = finished - before
    mean = nfe / computed if computed else math.nan
    return Outcome(dataset, filled, num, computed, failed, mean)


@contextmanager
def own_folder(out: str | Path) -> Iterator[Path]:
    """A folder for one run at a time. A run that begins there and fails before its first shard leaves no trace.

    Raises:
        ValueError: another run is at work there.
    """
    folder = Path(out)
    existed = folder.exists()
    with alone_in(folder):
        begun = (folder / MANIFEST).exists()
        try:
            yield folder
        except Exception:
            if not (begun or (folder / _STATISTICS).exists() or any((folder / SHARDS).glob("*"))):
                shutil.rmtree(folder / SHARDS, ignore_errors=True)
                (folder / MANIFEST).unlink(missing_ok=True)
                if not existed:
                    shutil.rmtree(folder, ignore_errors=True)
            raise


def shard_size(num: int, block: int, workers: int, sample_bytes: int) -> int:
    """Samples a shard: up to 32 MiB of them, but a thousand shards, four a worker, and whole blocks."""
    by_memory = _SHARD_BYTES // max(1, sample_bytes)
    by_number = math.ceil(num / max(_SHARDS, 4 * workers))
    return max(1, min(by_memory, by_number) // block) * block


def _columns(solution: Solution) -> dict[str, Tensor]:
    held = {"samples": solution.x.detach().cpu().contiguous(), "status": solution.status.cpu()}
    if solution.xs is not None:
        held["paths"] = solution.xs.detach().cpu().transpose(0, 1).contiguous()  # one row a sample
    return held


def _save(path: Path, filled: Mapping[str, Statistic], done: list[tuple[int, int]], failed: int) -> None:
    held = {"ranges": torch.tensor(done, dtype=torch.int64).reshape(-1, 2), "failed": torch.tensor(failed)}
    for name, statistic in filled.items():
        held |= {f"{name}/{key}": value.contiguous() for key, value in statistic.arrays().items()}
    held[_CONTENT] = _checksum(held)
    write_atomically(path, safetensors.torch.save(held))


def _checksum(held: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 of all but itself, uint8 (32,)."""
    content = content_of([(0, {name: value for name, value in held.items() if name != _CONTENT})])
    return torch.frombuffer(bytearray.fromhex(content), dtype=torch.uint8)


def _resume(path: Path, filled: Mapping[str, Statistic]) -> tuple[list[tuple[int, int]], int]:
    """The ranges that the statistics hold already, after they have taken them; none if the file is damaged."""
    try:
        held = safetensors.torch.load(path.read_bytes())
        if not torch.equal(held[_CONTENT], _checksum(held)):
            raise ValueError("damaged")
        for name, statistic in filled.items():
            own = {k.removeprefix(f"{name}/"): v for k, v in held.items() if k.startswith(f"{name}/")}
            statistic.load(own)
        return [(int(a), int(b)) for a, b in held["ranges"]], int(held["failed"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        for statistic in filled.values():
            statistic.load(statistic.empty().arrays())
        return [], 0


@contextmanager
def _threads(count: int) -> Iterator[None]:
    own = torch.get_num_threads()
    if own == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(own)
