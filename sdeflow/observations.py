"""Linear observations y = A x + s n of samples: masks, averages, blurs, matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.checked import LARGEST, checked_class, described, event_shape, numbers, tensor
from sdeflow.times import as_time

Map = Callable[[Tensor], Tensor]


class _Answering:
    """A function of a batch, whose answer must be a batch of as many rows."""

    def __init__(self, function: Map, name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, batch: Tensor) -> Tensor:
        value = self.function(batch)
        if not tensor(value) or value.ndim < 2 or len(value) != len(batch) or not value.is_floating_point():
            raise ValueError(
                f"expected {self.name} to return a floating-point tensor of {len(batch)} rows ({len(batch)}, ...) for "
                f"a batch of shape {tuple(batch.shape)}, got {described(value)}"
            )
        return value


@checked_class
@dataclass(frozen=True, eq=False)
class LinearObservation:
    """y = A x + noise_std n, A linear and given by functions of batches.

    Args:
        forward: A, from (batch, *event) to (batch, *observed).
        adjoint: A^T, back: <A x, y> = <x, A^T y> for each sample.
        noise_std: s >= 0.
        gram_solve: `gram_solve(v, a, b)` = (a A A^T + b I)^-1 v for v (batch, *observed) and a, b >= 0, each 0-d or
            (batch, 1, ..., 1); None solves by conjugate gradients, which takes as many products with A and A^T as
            A A^T has distinct eigenvalues.

    Raises:
        TypeError, ValueError: not functions, or noise_std negative or not finite.
    """

    forward: Map
    adjoint: Map
    noise_std: float
    gram_solve: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not callable(self.forward) or not callable(self.adjoint):
            raise TypeError("expected forward and adjoint as functions of a batch")
        if not (isinstance(self.noise_std, (int, float)) and 0 <= self.noise_std <= LARGEST):
            raise ValueError(f"expected noise_std >= 0, got {self.noise_std!r} (at most {LARGEST:g})")
        for name in ("forward", "adjoint"):
            function = getattr(self, name)
            if not isinstance(function, _Answering):
                object.__setattr__(self, name, _Answering(function, name))

    def solve(self, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """(a A A^T + b I)^-1 v, for a and b of one element or one a sample."""
        a, b = (rows_like(w, v) for w in (a, b))
        if self.gram_solve is not None:
            return self.gram_solve(v, a, b)
        return _conjugate_gradients(lambda u: a * self.forward(self.adjoint(u)) + b * u, v)

    # ---- operators

    @staticmethod
    def from_matrix(matrix: Any, noise_std: float, event: tuple[int, ...] | None = None) -> LinearObservation:
        """A as a matrix (m, D) on samples of shape `event` with D components, (D,) unless given.

        Raises:
            ValueError: not a finite matrix, or another number of components.
        """
        matrix = numbers(matrix, "matrix")
        if matrix.ndim != 2 or not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"expected a finite matrix (m, D), got shape {tuple(matrix.shape)}")
        shape = (matrix.shape[1],) if event is None else event_shape(event)
        if math.prod(shape) != matrix.shape[1]:
            raise ValueError(f"expected an event of {matrix.shape[1]} components, got {shape}")
        values, axes = torch.linalg.eigh(matrix @ matrix.T)
        values = values.clamp(min=0)

        def like(v: Tensor, x: Tensor) -> Tensor:
            return v.to(device=x.device, dtype=x.dtype)

        def solve(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
            q = like(axes, v)
            return (v @ q / (a * like(values, v) + b)) @ q.T

        return LinearObservation(
            lambda x: of_event(x, shape).flatten(1) @ like(matrix, x).T,
            lambda y: (y @ like(matrix, y)).reshape(-1, *shape),
            noise_std,
            solve,
        )

    @staticmethod
    def inpainting(mask: Tensor, noise_std: float) -> LinearObservation:
        """The components where `mask` (*event), bool, is True: y = x[:, mask], (batch, number of them).

        Raises:
            ValueError: not a mask of bools, or nothing observed.
        """
        if not tensor(mask) or mask.dtype != torch.bool or not bool(mask.any()):
            raise ValueError("expected mask as a tensor of bools of the shape of a sample, with at least one True")
        shape = tuple(mask.shape)
        places = torch.nonzero(mask.flatten()).flatten()

        def adjoint(y: Tensor) -> Tensor:
            full = y.new_zeros(y.shape[0], mask.numel())
            return full.index_copy(1, places.to(y.device), y).reshape(-1, *shape)

        return LinearObservation(
            lambda x: of_event(x, shape).flatten(1)[:, places.to(x.device)],
            adjoint,
            noise_std,
            lambda v, a, b: v / (a + b),
        )

    @staticmethod
    def super_resolution(factor: int, noise_std: float) -> LinearObservation:
        """Means over blocks of factor x factor pixels: (batch, ..., H, W) to (batch, ..., H/factor, W/factor).

        Raises:
            ValueError: not factor >= 1; at a call, sides that it does not divide.
        """
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"expected factor >= 1, got {factor!r}")

        def forward(x: Tensor) -> Tensor:
            if x.ndim < 3 or x.shape[-1] % factor or x.shape[-2] % factor:
                raise ValueError(
                    f"expected x (batch, ..., H, W) with sides in blocks of {factor}, got {tuple(x.shape)}"
                )
            rows, columns = x.shape[-2] // factor, x.shape[-1] // factor
            return x.reshape(*x.shape[:-2], rows, factor, columns, factor).mean(dim=(-3, -1))

        def adjoint(y: Tensor) -> Tensor:
            return y.repeat_interleave(factor, -2).repeat_interleave(factor, -1) / factor**2

        return LinearObservation(forward, adjoint, noise_std, lambda v, a, b: v / (a / factor**2 + b))

    @staticmethod
    def blur(kernel: Any, noise_std: float) -> LinearObservation:
        """Periodic convolution over the last two dimensions with `kernel` (odd, odd), centred; by FFT.

        Raises:
            ValueError: not a finite kernel of odd sides; at a call, images smaller than it.
        """
        kernel = numbers(kernel, "kernel")
        if kernel.ndim != 2 or not all(n % 2 for n in kernel.shape) or not bool(torch.isfinite(kernel).all()):
            raise ValueError(f"expected a finite kernel with two odd sides, got shape {tuple(kernel.shape)}")

        def spectrum(x: Tensor) -> Tensor:
            h, w = x.shape[-2:]
            if x.ndim < 3 or h < kernel.shape[0] or w < kernel.shape[1]:
                raise ValueError(
                    f"expected x (batch, ..., H, W) no smaller than the kernel {tuple(kernel.shape)}, "
                    f"got {tuple(x.shape)}"
                )
            padded = nn.functional.pad(kernel, (0, w - kernel.shape[1], 0, h - kernel.shape[0]))
            centred = padded.roll((-(kernel.shape[0] // 2), -(kernel.shape[1] // 2)), (0, 1))
            return torch.fft.rfft2(centred).to(
                x.device, torch.complex128 if x.dtype == torch.float64 else torch.complex64
            )

        def filtered(x: Tensor, response: Tensor) -> Tensor:
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()  # all that the FFT takes
            return torch.fft.irfft2(torch.fft.rfft2(wide) * response, s=tuple(x.shape[-2:])).to(x.dtype)

        return LinearObservation(
            lambda x: filtered(x, spectrum(x)),
            lambda y: filtered(y, spectrum(y).conj()),
            noise_std,
            lambda v, a, b: filtered(v, 1 / (a * spectrum(v).abs().square() + b)),
        )


def rows_like(w: Tensor, v: Tensor) -> Tensor:
    """One value, or one a sample, shaped to broadcast against v (batch, *observed)."""
    w = as_time(w).to(device=v.device, dtype=v.dtype)
    return w.reshape(()) if w.numel() == 1 else w.reshape(-1, *[1] * (v.ndim - 1))


def of_event(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"expected x of shape (batch, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    return x


def matrix_of(observation: LinearObservation, event: tuple[int, ...]) -> Tensor:
    """A as a matrix (m, D), float64."""
    size = math.prod(event)
    return observation.forward(torch.eye(size, dtype=torch.float64).reshape(size, *event)).flatten(1).T


def _conjugate_gradients(product: Map, v: Tensor) -> Tensor:
    """M^-1 v for a symmetric positive definite M, each sample on its own, to the rounding of v's dtype."""
    inner = range(1, v.ndim)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=tuple(inner), keepdim=True)

    u, r, p = torch.zeros_like(v), v, v
    square = start = dot(v, v)
    limit = (4 * torch.finfo(v.dtype).eps) ** 2
    for _ in range(2 * v[0].numel()):
        if bool((square <= limit * start).all()):
            break
        m = product(p)
        step = torch.where(square > 0, square / dot(p, m), 0.0)
        u, r = u + step * p, r - step * m
        fresh = dot(r, r)
        p = r + torch.where(square > 0, fresh / square, 0.0) * p
        square = fresh
    return u


def check_fit(observation: LinearObservation, y: Tensor, x: Tensor) -> None:
    """Refuse observations that are not A x of such x."""
    seen = tuple(observation.forward(torch.zeros_like(x[:1])).shape[1:])
    if tuple(y.shape[1:]) != seen or y.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"expected y of shape ({x.shape[0]}, {', '.join(map(str, seen))}), or one row for all; "
                         f"got {tuple(y.shape)}")  # fmt: skip


def check_observation(observation: object, y: object) -> None:
    if not isinstance(observation, LinearObservation):
        raise TypeError(f"expected a LinearObservation, got {type(observation).__name__}")
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim < 2:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"expected y as a floating-point tensor (batch, *observed), got {got}")
    if not bool(torch.isfinite(y).all()):
        raise ValueError("expected finite y, got NaN or infinity")
