"""The likelihood of discrete data under a Gaussian: its mass on the interval around each value.

Data of `levels` values lie on the grid -1, -1 + 2 h, ..., 1 with half a spacing h = 1/(levels - 1); 8-bit pixels k are
k/127.5 - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdeflow.checked import checked


@checked
def discretised_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor, levels: int = 256) -> Tensor:
    """log of the mass of N(mean, exp(log_variance)) on [x - h, x + h], elementwise, in nats and the dtype of x.

    The first interval starts at -inf and the last ends at inf, so that the masses of all values sum to 1 (Ho et al.
    2020, DDPM, equation 13). Formed in float64 from log cdfs on the side where they are small: right to rounding
    however far x is from the mean.

    Args:
        x: values of the grid, of any shape.
        mean, log_variance: of shapes that broadcast to that of x.

    Raises:
        ValueError: levels < 2, or values off the grid.
    """
    check_levels(x, levels)
    for name, value in (("mean", mean), ("log_variance", log_variance)):
        fits = value.ndim <= x.ndim and all(n in (1, m) for n, m in zip(value.shape[::-1], x.shape[::-1], strict=False))
        if not fits:
            raise ValueError(
                f"expected {name} of a shape that broadcasts to {tuple(x.shape)}, that of x; got {tuple(value.shape)}"
            )
    half = 1 / (levels - 1)
    inverse = torch.exp(-0.5 * log_variance.to(torch.float64))
    offset = x.to(torch.float64) - mean.to(torch.float64)
    first, last = x < -1 + half, x > 1 - half
    # the mass on [a, b] is that on [-b, -a]: take the side left of the mean, where log Phi has digits to subtract
    centre = -offset.abs()
    log_upper = torch.special.log_ndtr((centre + half) * inverse)
    log_lower = torch.special.log_ndtr((centre - half) * inverse)
    inside = log_upper + torch.log(-torch.expm1(log_lower - log_upper))
    left = torch.special.log_ndtr((offset + half) * inverse)
    right = torch.special.log_ndtr((half - offset) * inverse)
    return torch.where(first, left, torch.where(last, right, inside)).to(x.dtype)


def check_levels(x: Tensor, levels: int) -> None:
    """Refuse data off the grid of `levels` values on [-1, 1]; data on an accelerator are not read back for this."""
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"expected levels to be an integer >= 2, got {levels!r}")
    if x.device.type != "cpu" or x.numel() == 0:
        return
    place = 0.5 * (x.to(torch.float64) + 1) * (levels - 1)
    # a hundredth of a spacing: float32 scaling is far below it, other data are not
    bad = ~(((place - place.round()).abs() < 1e-2) & (place > -0.5) & (place < levels - 0.5))
    if bool(bad.any()):
        raise ValueError(
            f"expected data of {levels} values, evenly spaced from -1 to 1, got {float(x[bad][0]):g}: "
            "scale them, or pass levels=None for continuous data"
        )
