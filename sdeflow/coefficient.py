"""Coefficients of a linear SDE as users give them: arrays, or functions of time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import numbers

_PROBES = 17


class Coefficient:
    """An array, or a function of times called for many at once where it allows."""

    def __init__(self, name: str, given: Any, probes: Tensor) -> None:
        self.name, self.given = name, given
        self.constant: Tensor | None = None
        self._batched = False
        if not callable(given):
            self.constant = numbers(given, name).detach().cpu().clone()
            values = self.constant
        else:
            values = torch.stack([self._call(t) for t in probes[:3]])
            try:
                together = self._call(probes[:3])
            except Exception:  # a function written for one time may fail in any way of its own on three
                together = torch.zeros(())
            # broadcasting may give the right shape and other values
            near = 1e-12 * float(values.abs().max()) if values.numel() else 0.0
            self._batched = together.shape == values.shape and torch.allclose(together, values, rtol=0.0, atol=near)
        self.shape = tuple(values.shape if self.constant is not None else values.shape[1:])
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"expected a finite {name}, got {values.tolist()}")

    def _call(self, t: Tensor) -> Tensor:
        value = self.given(t)
        if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16):
            # its rounding is roughness that no refinement resolves
            raise ValueError(f"{self.name} returned {value.dtype}: expected torch.float64, as the times it is given")
        return torch.as_tensor(value, dtype=torch.float64).detach()

    def __call__(self, t: Tensor) -> Tensor:
        if self.constant is not None:
            return self.constant.expand(*t.shape, *self.shape)
        t = t.detach().cpu()
        if self._batched or t.ndim == 0:
            value = self._call(t)
        else:
            each = [self._call(u) for u in t.flatten()]
            value = torch.stack(each).reshape(*t.shape, *self.shape) if each else torch.zeros(*t.shape, *self.shape)
        if value.shape != (*t.shape, *self.shape):
            raise ValueError(f"{self.name} returned {tuple(value.shape)}: expected {(*t.shape, *self.shape)}")
        return value

    def __repr__(self) -> str:
        if self.constant is None:
            return str(getattr(self.given, "__name__", type(self.given).__name__))
        return repr(self.constant.tolist()) if self.constant.numel() <= 16 else f"<{self.shape}>"

    @property
    def is_zero(self) -> bool:
        return self.constant is not None and not bool((self.constant != 0).any())

    def same(self, other: Coefficient) -> bool:
        if self.constant is None or other.constant is None:
            return self.given is other.given
        return self.constant.shape == other.constant.shape and torch.equal(self.constant, other.constant)


def probe_times(t0: float, t1: float) -> Tensor:
    """17 times inside (t0, t1) without a pattern that a coefficient may have."""
    return t0 + (t1 - t0) * torch.frac(0.5 + torch.arange(_PROBES, dtype=torch.float64) * 0.6180339887498949)
