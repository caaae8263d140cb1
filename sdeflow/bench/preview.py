"""Small pictures of samples: rows of images, or points in the plane, as PNG data URIs."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor

_SHOWN = 4
_LARGEST = 4096
"""Numbers of a sample above which none are kept: every result of a run carries its own picture."""
_CANVAS = 72


def data_uri(x: Tensor, truth: Tensor) -> str | None:
    """The first samples of x (n, *event) as a PNG data URI, on the scale of `truth`.

    Events (H, W) or (C, H, W) with 1 or 3 channels are images; (2,) are points. None for others,
    for large ones, or without pillow.
    """
    event = tuple(x.shape[1:])
    image = len(event) == 2 or (len(event) == 3 and event[0] in (1, 3))
    if not image and event != (2,):
        return None
    if x[0].numel() > _LARGEST:
        return None
    try:
        from PIL import Image
    except ImportError:
        return None
    pixels = _tiles(x, truth) if image else _points(x, truth)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tiles(x: Tensor, truth: Tensor) -> Tensor:
    """The first samples side by side, uint8 (H, n W) or (H, n W, 3)."""
    count = min(_SHOWN, x.shape[0], max(1, _LARGEST // x[0].numel()))
    x = x[:count].detach().to("cpu", torch.float64)
    # a few outliers would make everything else grey
    ends = torch.tensor([0.001, 0.999], dtype=torch.float64)
    low, high = torch.quantile(truth[:256].detach().to("cpu", torch.float64), ends).tolist()
    grey = torch.nan_to_num((x - low) / max(high - low, 1e-12), nan=0.0).clamp(0, 1)
    if grey.ndim == 3:
        grey = grey.unsqueeze(1)
    grey = torch.nn.functional.pad(grey, (0, 1), value=1.0)  # a line between them
    rows = grey.permute(2, 0, 3, 1).flatten(1, 2)[:, :-1]  # (H, n W, C)
    return (255 * rows).round().to(torch.uint8).squeeze(-1).contiguous()


def _points(x: Tensor, truth: Tensor) -> Tensor:
    """Points in the plane, dark on white, uint8 (canvas, canvas)."""
    truth = truth.detach().to("cpu", torch.float64)
    middle = 0.5 * (truth.amax(0) + truth.amin(0))
    reach = 1.15 * 0.5 * float((truth.amax(0) - truth.amin(0)).max().clamp_min(1e-12))
    unit = (x.detach().to("cpu", torch.float64) - middle) / reach
    inside = unit[(unit.abs() < 1).all(1)]
    cell = ((inside + 1) / 2 * _CANVAS).long().clamp(0, _CANVAS - 1)
    count = torch.zeros(_CANVAS, _CANVAS)
    count.index_put_((_CANVAS - 1 - cell[:, 1], cell[:, 0]), torch.ones(cell.shape[0]), accumulate=True)
    return (255 * torch.exp(-1.2 * count)).round().to(torch.uint8)
