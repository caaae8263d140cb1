"""What a network takes besides the state: its time, and the conditions of the samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from sdeflow.discrete import DiscreteVP
from sdeflow.gaussian import GaussianSDE
from sdeflow.nets.embedding import Conditioned
from sdeflow.nets.precondition import EDMPreconditioned
from sdeflow.sde import SDE

TimeInput = Literal["sigma", "lam", "discrete"] | Callable[[Tensor], Tensor] | None


def time_input(time: TimeInput, sde: SDE) -> Callable[[Tensor], Tensor]:
    """The function of t that gives a network its time; ValueError where the process does not define it."""
    if time is None:
        return _itself
    if callable(time) and not isinstance(time, type):
        return time
    if time == "discrete" and isinstance(sde, DiscreteVP):
        return sde.index_of_time
    if time in ("sigma", "lam") and isinstance(sde, GaussianSDE):
        return sde.sigma if time == "sigma" else sde.lam
    if time in ("discrete", "sigma", "lam"):
        needed = "a DiscreteVP" if time == "discrete" else "a GaussianSDE"
        raise ValueError(f"time={time!r} needs {needed}, got {sde!r}; pass a function of t instead")
    raise ValueError(f'expected time to be None, "sigma", "lam", "discrete" or a function, got {time!r}')


def _itself(t: Tensor) -> Tensor:  # by name, so that models can be pickled
    return t


def classes_of(net: Callable[..., Any]) -> int | None:
    """The number of labels of a network of this package, whose `label` is known to be int64 (batch,); else None."""
    while isinstance(net, EDMPreconditioned):
        net = net.net
    return net.classes if isinstance(net, Conditioned) else None


def checked_label(label: Any, classes: int) -> int | Tensor:
    """The label of all samples, or of each, if the network has it."""
    if not classes:
        raise ValueError(f"expected no label, as the network was made without classes; got {label!r}")
    if isinstance(label, Tensor) and label.ndim > 0:
        if label.dtype != torch.int64 or label.ndim != 1:
            raise ValueError(
                f"expected a number or one int64 label a sample, (batch,), got {label.dtype} of {tuple(label.shape)}"
            )
        read = label.device.type == "cpu" and label.numel() > 0  # labels on an accelerator are not read back for this
        least, most = (int(label.min()), int(label.max())) if read else (0, 0)
        given: int | Tensor = label
    else:
        value = label.item() if isinstance(label, Tensor) else label
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"expected a label as a whole number or an int64 tensor (batch,), got {label!r}")
        given = least = most = int(value)
    if not 0 <= least <= most <= classes:
        got = f"{least}" if least == most else f"labels from {least} to {most}"
        raise ValueError(f"expected labels 0 to {classes - 1}, or {classes} for none, got {got}")
    return given


def parameters_of(net: Callable[..., Any]) -> tuple[str, ...] | None:
    """Names that a call of `net` accepts, or None when it accepts any or does not say."""
    target = net.forward if isinstance(net, torch.nn.Module) else net
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
