"""Many samples to a folder, in shards: what was finished is kept, and the files do not show how they were computed.

The folder is a dataset (`sdeflow.dataset`): its manifest says what the run is, and which samples are complete. The same
command goes on with those that are missing, on whatever engine. The end is one file of all samples, or the shards as
they are, and for images a picture of the first ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdeflow.checked import checked
from sdeflow.checkpoints import write_atomically
from sdeflow.columns import FORMATS, Format
from sdeflow.dataset import MANIFEST, Dataset
from sdeflow.engine.base import Engine
from sdeflow.identity import POINTS, of_model, said
from sdeflow.model import Model
from sdeflow.reverse import Eta
from sdeflow.sampling import parameter_of, sample
from sdeflow.shard_run import MOST_SAMPLES, own_folder, run_shards
from sdeflow.solution import Solution
from sdeflow.solve_input import Grid, Save
from sdeflow.solvers.base import Solver

_SHOWN = 100


@dataclass
class SampleWork:
    """A block of samples: what `sample` gives for its indices."""

    model: Model
    shape: tuple[int, ...]
    solver: Solver | Literal["auto"]
    seed: int
    labels: Tensor | None
    how: Mapping[str, Any]
    _ready: bool = field(default=False, init=False)

    def __call__(self, first: int, count: int) -> Solution:
        if not self._ready:  # once in each worker, where the device is
            device, net = self.how["device"], self.model.net
            if device is not None and isinstance(net, nn.Module):
                net.to(device)
            self._ready = True
        model = self.model if self.labels is None else self.model.bind(label=self._labels(first, count))
        return sample(
            model, count, shape=self.shape, solver=self.solver, seed=self.seed, index=first, throw=False, **self.how
        )

    def _labels(self, first: int, count: int) -> Tensor:
        assert self.labels is not None
        return self.labels[first : first + count].to(self.how["device"] or "cpu")


@checked
def sample_to(
    out: str | Path,
    model: Model,
    num: int,
    *,
    shape: tuple[int, ...],
    solver: Solver | Literal["auto"] = "auto",
    steps: int | None = None,
    eta: Eta = 0.0,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    t_span: tuple[float, float] | None = None,
    final: Literal["stay", "denoise", "zero"] = "stay",
    save: Save = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compiled: bool = False,
    labels: Tensor | None = None,
    chunk: int = 256,
    seed: int = 0,
    kind: Format = "npz",
    engine: Engine | None = None,
    shard: int | None = None,
    merge: bool = True,
    threads: int = 1,
    on_chunk: Callable[[int], None] | None = None,
) -> Path:
    """`num` samples in the folder `out`, as `sample` gives them for `chunk` at a time; the file that holds them.

    Files: samples.npz or samples.safetensors with "samples" (num, *shape) and "status" (num,), or with `merge=False`
    the shards; manifest.jsonl; for images samples.png. Samples that failed are there as they ended, with their status.
    Bytes are the same whatever the engine, its workers, their deaths and the size of shards.

    Args:
        out: made if it is not there. A folder that holds another run is refused.
        solver, steps, eta, grid, rtol, atol, t_span, final, save, dtype, device, compiled: as in `sample`.
        labels: int64 (num,), bound as `label`; None for a model without.
        chunk: samples a batch; a part of what the bits depend on.
        kind: of the files: npz, safetensors, or parquet, a table with a column a number.
        engine: `sdeflow.engine.Local(workers)` or `Ray(...)`; in this process unless given.
        shard: samples a file while it runs, rounded to whole chunks; by memory and workers unless given.
        merge: one file at the end; False leaves the shards (the path returned is then the manifest's).
        threads: of torch while a chunk is computed; a part of what the bits depend on.
        on_chunk: called with the number of samples that are finished.

    Raises:
        ValueError: arguments that do not fit, or a folder with samples of another run.
    """
    for name, value in (("chunk", chunk), ("num", num), ("threads", threads), *([("shard", shard)] if shard else [])):
        if not 1 <= value < MOST_SAMPLES:
            raise ValueError(f"expected {name} >= 1 and below {MOST_SAMPLES}, got {value!r}")
    if kind not in FORMATS:
        raise ValueError(f"expected the format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {kind!r}")
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != (num,)):
        raise ValueError(f"expected int64 labels ({num},), got {labels.dtype} of shape {tuple(labels.shape)}")
    how = {
        "steps": steps, "eta": eta, "grid": grid, "rtol": rtol, "atol": atol, "t_span": t_span, "final": final,
        "save": save, "dtype": dtype, "device": device, "compiled": compiled,
    }  # fmt: skip
    about = _about(model, shape, solver, seed, labels, threads, how)
    width = {torch.float64: 8, torch.float16: 2, torch.bfloat16: 2}.get(dtype or torch.float32, 4)
    with own_folder(out) as folder:
        outcome = run_shards(
            SampleWork(model, tuple(shape), solver, seed, labels, how), num, block=chunk, about=about, out=folder,
            kind=kind, engine=engine, shard=shard, sample_bytes=width * max(1, torch.Size(shape).numel()),
            model_bytes=_size(model), threads=threads, on_done=on_chunk,
        )  # fmt: skip
        dataset = outcome.dataset
        assert dataset is not None
        file = dataset.merge_into(f"samples.{kind}", kind) if merge else folder / MANIFEST
        if len(shape) == 3 and shape[0] in (1, 3) and kind != "parquet" and not (folder / "samples.png").exists():
            write_atomically(folder / "samples.png", picture(_first(dataset)))
    return file


def _first(dataset: Dataset) -> Tensor:
    """The first samples, those that a picture shows."""
    rows: list[Tensor] = []
    for shard in dataset.each():
        if sum(map(len, rows)) >= _SHOWN:
            break
        rows.append(dataset.columns(shard)["samples"][:_SHOWN])
    return torch.cat(rows)[:_SHOWN]


def _size(model: Model) -> int:
    """Bytes of the network's weights."""
    return sum(p.numel() * p.element_size() for p in model.net.parameters()) if isinstance(model.net, nn.Module) else 0


def _about(
    model: Model, shape: tuple[int, ...], solver: Solver | str, seed: int, labels: Tensor | None, threads: int,
    how: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """All that the bits of the samples depend on, but for their number and the chunk."""
    asked = model if labels is None else model.bind(label=labels[torch.arange(POINTS) % len(labels)])
    like = parameter_of(model)
    dtype = how["dtype"] or (torch.float32 if like is None else like.dtype)
    device = (how["device"] or "cpu") if like is None else like.device  # the workers bring the network to theirs
    try:
        x = model.gaussian.prior_sample((POINTS, *shape), 0, dtype=dtype, device=device)
    except RuntimeError:  # no such device here
        x = None
    return {
        **of_model(asked, x),
        "solver": said(solver),
        "labels": said(labels),
        "options": {name: said(value) for name, value in sorted(how.items()) if value is not None},
        "shape": list(shape),
        "seed": seed,
        "threads": threads,
        "versions": {name: version(name) for name in ("sdeflow", "torch")},
    }


def picture(images: Tensor, *, columns: int = 10) -> bytes:
    """A PNG of images (n, 1 or 3, height, width) in [-1, 1], `columns` a row, one dark pixel between.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pictures need Pillow: pip install "sdeflow[bench]"') from error
    n, channels, height, width = images.shape
    rows, columns = -(-n // columns), min(n, columns)
    scale = max(1, 32 // max(height, width))
    board = torch.full((rows, columns, channels, height + 1, width + 1), -1.0)
    board.flatten(0, 1)[:n, :, :height, :width] = torch.nan_to_num(images.float()).clamp(-1, 1)
    flat = board.permute(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), channels)
    pixels = (127.5 * (flat + 1)).round().to(torch.uint8).numpy()
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    memory = io.BytesIO()
    size = (image.width * scale, image.height * scale)
    image.resize(size, Image.Resampling.NEAREST).save(memory, format="PNG", optimize=True)
    return memory.getvalue()
