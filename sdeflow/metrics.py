"""Errors of samplers: per sample against a reference, and between distributions, with their spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdeflow.checked import checked, described, numbers


@dataclass(frozen=True)
class TrajectoryError:
    """Per-sample errors e_i = RMS over components of x_i - x_ref_i, summarised.

    Attributes:
        median, q90, rms: of the e_i. RMS is dominated by samples that changed basin: quote the median.
        flip_rate: share of samples that landed elsewhere.
        per_sample: the e_i, float64 (batch,).
    """

    median: float
    q90: float
    rms: float
    flip_rate: float
    per_sample: Tensor


@checked
def trajectory_error(
    x: Tensor, x_ref: Tensor, *, tau: float | None = None, centres: Tensor | None = None
) -> TrajectoryError:
    """Errors of samples `x` against references `x_ref` from the same noise, both (batch, *event).

    A sample is flipped when its nearest of `centres` (K, *event) is not its reference's, or, without
    centres, when its error is above `tau` (default: half the RMS spread of the references). A sample
    that is not finite counts as flipped with an infinite error.

    Raises:
        ValueError: shapes differ.
    """
    if x.shape != x_ref.shape:
        raise ValueError(f"expected x of the shape of x_ref, {tuple(x_ref.shape)}, got {tuple(x.shape)}")
    a, b = x.detach().flatten(1).to(torch.float64), x_ref.detach().flatten(1).to(torch.float64)
    finite = torch.isfinite(a).all(1)
    error = torch.where(finite, (a - b).square().mean(1).sqrt(), torch.inf)
    if centres is not None:
        if centres.ndim != x.ndim or centres.shape[1:] != x.shape[1:] or len(centres) < 1:
            raise ValueError(f"expected centres (K, {', '.join(map(str, x.shape[1:]))}), got {tuple(centres.shape)}")
        points = centres.flatten(1).to(a)
        if not bool(torch.isfinite(points).all()):
            raise ValueError("expected finite centres, got NaN or infinity")
        flipped = torch.cdist(a, points).argmin(1) != torch.cdist(b, points).argmin(1)
    else:
        spread = float((b - b.mean(0)).square().mean().sqrt())
        flipped = error > (0.5 * spread if tau is None else tau)
    return TrajectoryError(
        median=float(error.median()) if error.numel() % 2 else _middle(error),
        q90=float(torch.sort(error).values[max(0, math.ceil(0.9 * error.numel()) - 1)]),
        rms=float(error.square().mean().sqrt()),
        flip_rate=float((flipped | ~finite).to(torch.float64).mean()),
        per_sample=error,
    )


def _middle(error: Tensor) -> float:
    """The mean of the two middle values."""
    ranked = torch.sort(error).values
    half = error.numel() // 2
    return float(0.5 * (ranked[half - 1] + ranked[half]))


@checked
def fitted_order(sizes: Sequence[float] | Tensor, errors: Sequence[float] | Tensor) -> float:
    """The slope of log(error) against log(step size), by least squares.

    Args:
        sizes: step sizes, or 1/(number of steps); at least two, different.
        errors: positive, finite.
    """
    h = numbers(sizes, "sizes")
    e = numbers(errors, "errors")
    if h.shape != e.shape or h.ndim != 1 or h.numel() < 2:
        raise ValueError(f"expected two lists of at least 2 numbers, got shapes {tuple(h.shape)} and {tuple(e.shape)}")
    if not bool((h > 0).all() and (e > 0).all() and torch.isfinite(e).all()):
        raise ValueError(f"expected positive step sizes and finite positive errors, got {e.tolist()}")
    u, v = torch.log(h), torch.log(e)
    u = u - u.mean()
    return float((u * (v - v.mean())).sum() / (u * u).sum())


@dataclass(frozen=True)
class Estimate:
    """A statistic with its spread.

    Attributes:
        value: the statistic.
        low, high: 95% interval.
        floor: the same statistic between two exact samples: nothing below about 2 floors is resolved.
    """

    value: float
    low: float
    high: float
    floor: float | None = None


@checked
def w2_gaussian(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """The 2-Wasserstein distance between N(mean1, cov1) and N(mean2, cov2) (Dowson and Landau 1982).

    W2^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2); means (D,), covariances (D, D).
    """
    m1, c1, m2, c2 = (v.to(torch.float64) for v in (mean1, cov1, mean2, cov2))
    d = m1.numel()
    if m1.shape != (d,) or m2.shape != (d,) or c1.shape != (d, d) or c2.shape != (d, d) or d < 1:
        got = ", ".join(str(tuple(v.shape)) for v in (m1, c1, m2, c2))
        raise ValueError(f"expected mean1, cov1, mean2, cov2 of shapes (D,), (D, D), (D,), (D, D), got {got}")
    if not all(bool(torch.isfinite(v).all()) for v in (m1, c1, m2, c2)):
        raise ValueError("expected finite means and covariances, got NaN or infinity")
    root = _square_root(c1)
    cross = _square_root(root @ c2 @ root)
    square = (m1 - m2).square().sum() + torch.trace(c1 + c2 - 2 * cross)
    return math.sqrt(max(0.0, float(square)))


@checked
def frechet(x: Tensor, y: Tensor) -> float:
    """The Frechet distance of features x (n, k) and y (m, k): W2^2 of the Gaussians with their moments.

    (Heusel et al. 2017, GANs trained by a two time-scale update rule, equation 6.) Float64. It is biased upwards by
    about k/n + k/m times the variance of a feature: compare equal numbers of samples, and with the distance of two
    sets of data.

    Raises:
        ValueError: not two tables of the same features, with more than one row each.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"expected features (n, k) and (m, k), n, m >= 2, got {tuple(x.shape)} and {tuple(y.shape)}")
    (m1, c1), (m2, c2) = ((v.to(torch.float64).mean(0), torch.cov(v.to(torch.float64).T)) for v in (x, y))
    return w2_gaussian(m1, c1.reshape(x.shape[1], -1), m2, c2.reshape(x.shape[1], -1)) ** 2


def _square_root(c: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(0.5 * (c + c.mT))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


@checked
def sliced_w2(x: Tensor, y: Tensor, *, projections: int = 128, seed: int = 0, floor: Tensor | None = None) -> Estimate:
    """The sliced 2-Wasserstein distance between samples x and y (n, *event) of equal size.

    The root mean square over random unit directions of the one-dimensional W2, which pairs sorted
    projections (Bonneel et al. 2015); a shift of all samples by v counts |v|/sqrt(dim), as a root mean
    square per component. The interval is that of the squared distance by its influence function: each
    sample's is the mean over directions of the Kantorovich potential, psi' = 2 (x - T(x)) with T the
    pairing (Manole, Balakrishnan and Wasserman 2022), to which the spread of directions is added. The
    value itself is biased upwards by about the floor squared over twice the value.

    Args:
        floor: a third exact sample of the size of y: `Estimate.floor` is its distance to y.
    """
    if x.shape != y.shape:
        raise ValueError(f"expected samples of equal shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not 1 <= projections * x.numel() <= 1 << 33:
        raise ValueError(f"expected projections >= 1 that fit into memory, got {projections}")
    generator = torch.Generator().manual_seed(seed)
    a, b = (v.detach().flatten(1).to("cpu", torch.float64) for v in (x, y))
    directions = torch.randn(b.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    ranked_a, order_a = torch.sort(a @ directions, dim=0)
    ranked_b, order_b = torch.sort(b @ directions, dim=0)
    gap = ranked_a - ranked_b
    squares = gap.square().mean(0)
    square = float(squares.mean())
    variance = (
        _influence(ranked_a, order_a, gap).var() / a.shape[0]
        + _influence(ranked_b, order_b, -gap).var() / b.shape[0]
        + squares.var() / projections
    )
    half = 1.96 * math.sqrt(float(variance))
    base = None
    if floor is not None:
        third = torch.sort(floor.detach().flatten(1).to("cpu", torch.float64) @ directions, dim=0).values
        base = float((third - ranked_b).square().mean().sqrt())
    return Estimate(math.sqrt(square), math.sqrt(max(0.0, square - half)), math.sqrt(square + half), base)


def _influence(ranked: Tensor, order: Tensor, gap: Tensor) -> Tensor:
    """Each sample's Kantorovich potential, the integral of 2 gap along `ranked`, mean over directions: (n,)."""
    steps = (gap[1:] + gap[:-1]) * torch.diff(ranked, dim=0)
    potential = torch.cat([torch.zeros_like(steps[:1]), torch.cumsum(steps, dim=0)])
    return torch.zeros_like(potential).scatter_(0, order, potential).mean(1)


_MOST_DRAWN = 1_000_000_000
"""Rows of a bootstrap that memory holds."""


@checked
def mmd(
    x: Tensor, y: Tensor, *, bandwidths: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0), bootstrap: int = 100,
    seed: int = 0, floor: Tensor | None = None,
) -> Estimate:  # fmt: skip
    """The unbiased squared maximum mean discrepancy between samples x and y (n, *event).

    The kernel is a mean of Gaussian kernels of `bandwidths` times the median distance of y (Gretton
    et al. 2012, equation 3); the value can be negative. The interval is a bootstrap over blocks of samples.

    Args:
        floor: a third exact sample: `Estimate.floor` is its |MMD^2| to y.
    """
    if x.ndim < 2 or x.shape != y.shape or x.shape[0] < 4:
        raise ValueError(f"expected samples of one shape, at least 4, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not 1 <= bootstrap * len(x) <= _MOST_DRAWN:
        raise ValueError(f"expected bootstrap >= 1, at most {_MOST_DRAWN} samples drawn, got {bootstrap} of {len(x)}")
    widths = numbers(bandwidths, "bandwidths") if isinstance(bandwidths, (list, tuple, Tensor, np.ndarray)) else None
    if widths is None or widths.ndim != 1 or widths.numel() == 0 or not bool((widths > 0).all()):
        raise ValueError(f"expected bandwidths as numbers > 0, got {described(bandwidths)}")
    a, b = (v.detach().flatten(1).to("cpu", torch.float64) for v in (x, y))
    scale = float(torch.cdist(b[:512], b[:512]).flatten().median())

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        square = torch.cdist(u, v).square()
        return torch.stack([torch.exp(-square / (2 * (w * scale) ** 2)) for w in widths.tolist()]).mean(0)

    def matrix(u: Tensor) -> Tensor:
        """The U-statistic's summand h(i, j), zero on the diagonal."""
        cross = kernel(u, b)
        h = kernel(u, u) + kernel(b, b) - cross - cross.T
        return h.fill_diagonal_(0)

    n = a.shape[0]
    h = matrix(a)
    value = float(h.sum() / (n * (n - 1)))
    # first-order (Hoeffding) resampling: the statistic's spread is that of twice the row means
    rows = h.sum(1) / (n - 1)
    generator = torch.Generator().manual_seed(seed)
    draws = value + 2 * (rows[torch.randint(n, (bootstrap, n), generator=generator)].mean(1) - value)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    base = None if floor is None else abs(float(matrix(floor.detach().flatten(1).to(b)).sum() / (n * (n - 1))))
    return Estimate(value, low, high, base)
