"""Time: float64, on the host when shared by the batch, one value a sample otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Time = float | Tensor
"""A time as users write it: a number, a 0-d tensor, or one value a sample, shape (batch,)."""


def as_time(t: Time | Sequence[float]) -> Tensor:
    """`t` as a float64 tensor (its device kept); a number becomes 0-d on the CPU.

    A 0-d tensor never promotes the dtype or moves the device of the state it multiplies.
    """
    if isinstance(t, Tensor):
        if t.is_meta or t.layout != torch.strided or t.is_complex():
            raise TypeError(f"expected real times in a dense tensor with values, got {t.dtype}, {t.device}, {t.layout}")
        if t.dtype == torch.float64:
            return t
        return t.to(torch.float64)
    try:
        times = torch.tensor(t, dtype=torch.float64)
        if times.numel() == 0:
            raise ValueError("no times")
        return times
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"expected a time: a number or numbers, got {t!r:.60}") from error


def align(t: Time, x: Tensor) -> Tensor:
    """`t` as float64 and shaped to broadcast against `x` of shape (batch, *event).

    A scalar stays 0-d; (batch,) becomes (batch, 1, ..., 1); a tensor with the dimensions of x is kept.

    Raises:
        ValueError: the shape of `t` fits neither one time for all nor one a sample.
    """
    t = as_time(t)
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a state as a tensor (batch, *event), got {type(x).__name__}")
    if t.ndim == 0 or (t.ndim == x.ndim > 1 and t.shape[0] == t.numel() and t.shape[0] in (1, x.shape[0])):
        return t
    if t.numel() == 1:
        return t.reshape(())
    if t.ndim == 1 and x.ndim >= 1 and t.shape[0] == x.shape[0]:
        return t.reshape(-1, *[1] * (x.ndim - 1))
    raise ValueError(
        f"expected one time for all samples or one a sample, shape ({x.shape[0] if x.ndim else ''},), "
        f"got times of shape {tuple(t.shape)} for a state of shape {tuple(x.shape)}"
    )


def check_within(t: Tensor, low: float, high: float, what: str = "time") -> None:
    """Refuse times outside [low, high]; times on an accelerator are not read back for this."""
    if t.device.type != "cpu" or t.numel() == 0:
        return
    slack = 1e-9 * max(abs(low), abs(high), high - low)
    least, most = float(t.min()), float(t.max())
    if not (least >= low - slack and most <= high + slack):
        got = f"{least:g}" if least == most else f"times from {least:g} to {most:g}"
        raise ValueError(f"expected {what} in [{low:g}, {high:g}], got {got}")


class Each:
    """`each[k]`: row k of a tensor, unbound a block at a time: a long grid is not a tensor object for every step."""

    _BLOCK = 1024

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._number, self._block = -1, values[:0].unbind()

    def __getitem__(self, k: int) -> Tensor:
        number, place = divmod(k, self._BLOCK)
        if number != self._number:
            first = number * self._BLOCK
            self._number, self._block = number, self._values[first : first + self._BLOCK].unbind()
        return self._block[place]
