"""The exact sum of floating point numbers, in integers: associative, so that any order gives the same bits."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

_LIMB = 32
_LOWEST = -1074
"""Every float64 is a multiple of 2^-1074, and below 2^1024."""
_LIMBS = (1024 - _LOWEST) // _LIMB + 3
_HEADROOM = 1 << 29
"""Numbers after which carries are passed on: a limb takes less than 2^33 from each."""
_MASK = np.int64((1 << _LIMB) - 1)


class ExactSum:
    """The sum of float64 tensors of one shape, without any rounding until it is read.

    An element is an integer multiple of 2^-1074, held in limbs of 32 bits in int64 (Kulisch 2013, Computer arithmetic
    and validity, chapter 8: the long accumulator). Infinite and NaN elements are counted apart.

    Args:
        shape: of the tensors; `count` is how many were added.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.shape = tuple(shape)
        self.count = 0
        size = int(np.prod(self.shape, dtype=np.int64))
        self._limbs = np.zeros((size, _LIMBS), dtype=np.int64)
        self._special = np.zeros((size, 3), dtype=np.int64)  # NaN, +inf, -inf
        self._since = 0

    def add(self, value: Tensor) -> None:
        """Add a tensor of the shape.

        Raises:
            ValueError: another shape.
        """
        if tuple(value.shape) != self.shape:
            raise ValueError(f"expected a value of shape {self.shape}, got {tuple(value.shape)}")
        x = value.detach().to("cpu", torch.float64).numpy().reshape(-1)
        finite = np.isfinite(x)
        if not finite.all():
            self._special += np.stack([np.isnan(x), x == np.inf, x == -np.inf], axis=1)
            x = np.where(finite, x, 0.0)
        fraction, exponent = np.frexp(x)  # |fraction| in [1/2, 1)
        whole = np.ldexp(fraction, 53).astype(np.int64)
        place = exponent.astype(np.int64) - 53 - _LOWEST
        # below the normal numbers the last bits of `whole` are zeros that would lie under 2^-1074
        whole, place = np.where(place < 0, whole >> np.minimum(-np.minimum(place, 0), 62), whole), np.maximum(place, 0)
        limb, shift = place // _LIMB, place % _LIMB
        low = (whole & _MASK) << shift  # below 2^63: 32 bits moved by up to 31
        high = (whole >> _LIMB) << shift  # signed, 21 bits moved by up to 31
        rows = np.arange(len(x))
        self._limbs[rows, limb] += low & _MASK
        self._limbs[rows, limb + 1] += (low >> _LIMB) + (high & _MASK)
        self._limbs[rows, limb + 2] += high >> _LIMB
        self._note(1)

    def merge(self, other: ExactSum) -> None:
        """Add what another sum of the same shape holds."""
        if other.shape != self.shape:
            raise ValueError(f"expected a sum of shape {self.shape}, got {other.shape}")
        if self._since + other._since > _HEADROOM:
            self._carry()
        self._limbs += other._limbs
        self._special += other._special
        self._note(other.count, max(1, other._since))

    def value(self) -> Tensor:
        """The sum, rounded once: float64, infinite or NaN where its terms are."""
        self._carry()
        scale = Fraction(2) ** _LOWEST
        total = np.array([_rounded(_integer(row), scale) for row in self._limbs])
        nan, plus, minus = (self._special > 0).T
        total = np.where(plus, np.inf, np.where(minus, -np.inf, total))
        total = np.where(nan | (plus & minus), np.nan, total)
        return torch.from_numpy(total).reshape(self.shape)

    def arrays(self) -> dict[str, Tensor]:
        """What it holds, the same for equal sums: int64 tensors."""
        self._carry()
        # copies: what is handed out does not change when more is added
        return {
            "limbs": torch.from_numpy(self._limbs.copy()),
            "special": torch.from_numpy(self._special.copy()),
            "count": torch.tensor(self.count),
        }

    def load(self, arrays: dict[str, Tensor]) -> None:
        """Hold what `arrays` gave."""
        if arrays["limbs"].shape != self._limbs.shape:
            raise ValueError(f"expected the sum of a tensor of shape {self.shape}, got another")
        self._limbs, self._special = arrays["limbs"].numpy().copy(), arrays["special"].numpy().copy()
        self.count, self._since = int(arrays["count"]), 1

    def _note(self, count: int, since: int = 1) -> None:
        self.count += count
        self._since += since
        if self._since > _HEADROOM:
            self._carry()

    def _carry(self) -> None:
        """Bring each limb but the highest into [0, 2^32): one form for one sum."""
        if self._since == 0:
            return
        carry = np.zeros(len(self._limbs), dtype=np.int64)
        for k in range(_LIMBS - 1):
            total = self._limbs[:, k] + carry
            carry = total >> _LIMB
            self._limbs[:, k] = total & _MASK
        self._limbs[:, -1] += carry
        self._since = 0


def _integer(limbs: np.ndarray) -> int:
    """The integer of carried limbs."""
    low = int.from_bytes(limbs[:-1].astype("<u4").tobytes(), "little")
    return low + (int(limbs[-1]) << (_LIMB * (_LIMBS - 1)))


def _rounded(number: int, scale: Fraction) -> float:
    try:
        return float(number * scale)  # a quotient of integers is rounded correctly
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")
