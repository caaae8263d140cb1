"""Many samples to a folder, in chunks: what was finished is kept, and the files do not show where a run was broken off.

A chunk is the samples of indices [first, first + chunk); each is written whole, and the same command goes on with those
that are missing. The end is one file of all samples, a JSON file of what they are, and a picture of the first ones.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from sdeflow.checkpoints import write_atomically
from sdeflow.model import Model
from sdeflow.plan import Plan
from sdeflow.sampling import sample
from sdeflow.solvers.base import Solver
from sdeflow.tuning.fit import fingerprint

Format = Literal["npz", "safetensors"]
FORMATS: tuple[str, ...] = ("npz", "safetensors")
_ABOUT = "samples.json"
_SHOWN = 100


def sample_to(
    out: str | Path,
    model: Model,
    num: int,
    *,
    shape: tuple[int, ...],
    solver: Solver | Literal["auto"] = "auto",
    labels: Tensor | None = None,
    chunk: int = 256,
    seed: int = 0,
    kind: Format = "npz",
    on_chunk: Callable[[int], None] | None = None,
    **how: Any,
) -> Path:
    """`num` samples in the folder `out`, as `sample` gives them for `chunk` at a time; the file that holds them.

    Files: samples.npz or samples.safetensors with "samples" (num, *shape) and "status" (num,); samples.json; for images
    samples.png. Samples that failed are there as they ended, with their status.

    Args:
        out: made if it is not there. A folder that holds another run is refused.
        labels: int64 (num,), bound as `label`; None for a model without.
        chunk: samples a batch; a part of what the bits depend on.
        kind: of the file.
        on_chunk: called with the number of samples that are finished.
        how: as in `sample`: steps, eta, grid, rtol, final, dtype, device, ...

    Raises:
        ValueError: arguments that do not fit, or a folder with samples of another run.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"expected chunk >= 1 samples, got {chunk!r}")
    if isinstance(num, bool) or not isinstance(num, int) or num < 1:
        raise ValueError(f"expected num >= 1 samples, got {num!r}")
    if kind not in FORMATS:
        raise ValueError(f"expected the format npz or safetensors, got {kind!r}")
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != (num,)):
        raise ValueError(f"expected int64 labels ({num},), got {labels.dtype} of shape {tuple(labels.shape)}")
    folder = Path(out)
    about = _about(model, num, shape, solver, chunk, seed, labels, how)
    parts, final = folder / "parts", folder / f"samples.{kind}"
    begun = folder.exists()
    _claim(folder, about)
    if not final.exists():
        try:
            _sample_parts(parts, model, num, shape, chunk, labels, on_chunk, solver=solver, seed=seed, **how)
        except (TypeError, ValueError):
            if not begun and not any(parts.glob("*")):  # refused before the first step: leave nothing behind
                shutil.rmtree(folder)
            raise
        _finish(folder, final, parts, kind)
    for path in parts.glob("*") if parts.exists() else ():
        path.unlink()
    if parts.exists():
        parts.rmdir()
    return final


def _sample_parts(
    parts: Path, model: Model, num: int, shape: tuple[int, ...], chunk: int, labels: Tensor | None,
    on_chunk: Callable[[int], None] | None, **how: Any,
) -> None:  # fmt: skip
    """Draw the chunks that are not there."""
    parts.mkdir(parents=True, exist_ok=True)
    for first in range(0, num, chunk):
        path, count = parts / f"{first:09d}.safetensors", min(chunk, num - first)
        if not _whole(path, count, shape):
            own = model if labels is None else model.bind(label=labels[first : first + count])
            solution = sample(own, count, shape=shape, index=first, throw=False, **how)
            held = {"samples": solution.x.detach().cpu().contiguous(), "status": solution.status.cpu()}
            write_atomically(path, safetensors.torch.save(held))
        if on_chunk is not None:
            on_chunk(first + count)


def _about(
    model: Model, num: int, shape: tuple[int, ...], solver: Solver | str, chunk: int, seed: int, labels: Tensor | None,
    how: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    numbers = [solver.grid, solver.ratio, solver.weights] if isinstance(solver, Plan) else []
    return {
        "model": fingerprint(model),
        "process": repr(model.sde),
        "prediction": model.prediction,
        "solver": repr(solver),
        "plan": _hash(*numbers) if numbers else None,
        "labels": None if labels is None else _hash(labels),
        "options": {name: _said(value) for name, value in sorted(how.items()) if value is not None},
        "num": num,
        "shape": list(shape),
        "chunk": chunk,
        "seed": seed,
        "versions": {name: version(name) for name in ("sdeflow", "torch")},
    }


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for value in tensors:
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _said(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else repr(value)


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Write what the run is, or refuse a folder that another run has begun."""
    file = folder / _ABOUT
    text = json.dumps(about, indent=1)
    if file.exists():
        try:
            known = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: not the description of a run ({error})") from error
        if known != json.loads(text):
            differs = sorted(k for k in about if not isinstance(known, dict) or known.get(k) != json.loads(text)[k])
            raise ValueError(f"{folder} holds another run, with another {', '.join(differs)}: give another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode())


def _whole(path: Path, count: int, shape: tuple[int, ...]) -> bool:
    """Whether a part is there, and whole."""
    if not path.exists():
        return False
    try:
        held = safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError:
        return False
    return "status" in held and tuple(held.get("samples", torch.empty(0)).shape) == (count, *shape)


def _finish(folder: Path, final: Path, parts: Path, kind: str) -> None:
    """All parts in one file, and a picture."""
    held = [safetensors.torch.load(path.read_bytes()) for path in sorted(parts.glob("*.safetensors"))]
    samples, status = (torch.cat([part[name] for part in held]) for name in ("samples", "status"))
    if samples.ndim == 4 and samples.shape[1] in (1, 3):
        write_atomically(folder / "samples.png", picture(samples[:_SHOWN]))
    if kind == "safetensors":
        write_atomically(final, safetensors.torch.save({"samples": samples, "status": status}))
        return
    memory = io.BytesIO()
    np.savez(memory, samples=samples.to(torch.float32).numpy(), status=status.numpy())
    write_atomically(final, memory.getvalue())


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
