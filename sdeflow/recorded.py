"""Brownian paths that were recorded elsewhere, as the noise of a solve."""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.bridge import Increment, Walk, join
from sdeflow.checked import checked_class
from sdeflow.noise import Noise, NoiseSource, checked_seed


@checked_class
class RecordedPath(NoiseSource):
    """A path of your own as the noise of a solve: W at times, and the areas of the intervals for methods that use them.

    The grid of the solve must be made of these times: between them a path is not interpolated.

    Args:
        times: (n + 1,), monotone, float64.
        values: W at those times (n + 1, batch, *event), or (n + 1, batch, m) for general noise.
        areas: H of the n intervals (n, batch, *event), or None.
        seed: of what is not the path (correctors, restarts, churn).
    """

    def __init__(self, times: Tensor, values: Tensor, areas: Tensor | None = None, *, seed: int = 0) -> None:
        for name, given in (("values", values), ("areas", areas)):
            if not isinstance(given, Tensor) and not (name == "areas" and given is None):
                raise TypeError(f"expected {name} as a tensor, got {type(given).__name__}")
        self.times = torch.as_tensor(times, dtype=torch.float64).cpu()
        h = torch.diff(self.times)
        monotone = bool((h > 0).all() or (h < 0).all()) and bool(torch.isfinite(self.times).all())
        if not values.is_floating_point():
            raise TypeError(f"expected values as floating-point numbers, got {values.dtype}")
        if self.times.ndim != 1 or self.times.numel() < 2 or not monotone:
            raise ValueError(f"expected finite, monotone times (n + 1,), got shape {tuple(self.times.shape)}")
        if values.ndim < 2 or len(values) != self.times.numel():
            raise ValueError(f"expected values ({self.times.numel()}, batch, ...), got {tuple(values.shape)}")
        if areas is not None and areas.shape != (len(values) - 1, *values.shape[1:]):
            raise ValueError(
                f"expected areas ({len(values) - 1}, {', '.join(map(str, values.shape[1:]))}), got {tuple(areas.shape)}"
            )
        self.values, self.areas, self.seed = values, areas, checked_seed(seed)

    def __repr__(self) -> str:
        return f"RecordedPath({self.times.numel() - 1} intervals, batch {self.values.shape[1]})"

    def bind(self, batch: int, index: int | Tensor | None, device: torch.device | str) -> Noise:
        if batch != self.values.shape[1]:
            raise ValueError(f"expected a batch of {self.values.shape[1]}, that of the recorded path, got {batch}")
        return _RecordedNoise(self, batch, index, device)


class _RecordedNoise(Noise):
    def __init__(self, path: RecordedPath, batch: int, index: int | Tensor | None, device: torch.device | str) -> None:
        super().__init__(path.seed, batch, index=index, device=device)
        self._path = path

    def walk(
        self,
        times: Tensor,
        event: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        *,
        areas: bool = False,
        lengths: Tensor | None = None,
    ) -> Walk:
        return _RecordedWalk(self._path, times, tuple(event), dtype, areas, self.index.device)


class _RecordedWalk:
    def __init__(
        self, path: RecordedPath, times: Tensor, event: tuple[int, ...], dtype: torch.dtype, areas: bool,
        device: torch.device,
    ) -> None:  # fmt: skip
        if tuple(path.values.shape[2:]) != event:
            raise ValueError(
                f"expected a path with increments of shape {event} a sample, recorded {tuple(path.values.shape[2:])}"
            )
        if areas and path.areas is None:
            raise ValueError("this method uses space-time areas: expected a RecordedPath with areas")
        nearest = _nearest(path.times, times)
        gaps = (path.times[nearest] - times).abs()
        if bool((gaps > 1e-12 * (path.times[-1] - path.times[0]).abs()).any()):
            missing = times[gaps.argmax()]
            raise ValueError(f"expected a grid of the recorded times, got {float(missing):g}, which was not recorded")
        self.lengths = torch.diff(times).abs()
        self._at = nearest.tolist()
        self._path, self._dtype, self._areas, self._device = path, dtype, areas, device

    def __call__(self, k: int) -> Increment:
        path, (a, b) = self._path, self._at[k : k + 2]
        w = (path.values[b] - path.values[a]).to(self._device, self._dtype)
        if not self._areas or path.areas is None:
            return Increment(w, None)
        a, b = sorted((a, b))  # of a path run backwards W changes its sign, H does not
        if b - a != 1:
            parts = [Increment(path.values[i + 1] - path.values[i], path.areas[i]) for i in range(a, b)]
            lengths = torch.diff(path.times).abs().tolist()[a:b]
            whole, length = parts[0], lengths[0]
            for part, own in zip(parts[1:], lengths[1:], strict=True):
                whole, length = join(whole, length, part, own), length + own
            assert whole.h is not None
            return Increment(w, whole.h.to(self._device, self._dtype))
        return Increment(w, path.areas[a].to(self._device, self._dtype))


def _nearest(recorded: Tensor, times: Tensor) -> Tensor:
    """The place of the recorded time nearest to each of `times`."""
    rises = bool(recorded[-1] > recorded[0])
    rising = recorded if rises else recorded.flip(0)
    above = torch.searchsorted(rising, times.contiguous()).clamp(1, len(rising) - 1)
    place = torch.where(times - rising[above - 1] <= rising[above] - times, above - 1, above)
    return place if rises else len(rising) - 1 - place
