"""Kernels of linear equations with matrix coefficients: dx = (A(t) x + b(t)) dt + noise of covariance B(t) dt.

A triple (A, b, B) is an element of a Lie algebra, the kernel x_t = matrix x_s + shift + N(0, covariance) one of its
group. Everything is a batched operation of float64 tensors on triples (..., k, k), (..., k), (..., k, k):

    exp(A, b, B) = (e^A, int_0^1 e^{Au} b du, int_0^1 e^{Au} B e^{A^T u} du)
    (F2, c2, Q2) after (F1, c1, Q1) = (F2 F1, F2 c1 + c2, F2 Q1 F2^T + Q2)
    [2, 1] = (A2 A1 - A1 A2, A2 b1 - A1 b2, A2 B1 + B1 A2^T - A1 B2 - B2 A1^T)

The exponential is a Taylor series of (A, b, B)/2^n, doubled n times by the composition: the covariance is a sum of
positive terms over long spans, and keeps its relative precision in short ones, where entries of a hypoelliptic process
are of different powers of the span (Van Loan's block exponential, 1978, IEEE TAC 23, overflows in the first and
cancels in the second).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sdeflow.quadrature import gauss_legendre

Method = Literal["constant", "commuting", "magnus"]


class LinearKernel(NamedTuple):
    """x_t = matrix x_s + shift + N(0, covariance); float64, with leading dimensions where there are many.

    Attributes:
        matrix: (..., k, k).
        shift: (..., k).
        covariance: (..., k, k), symmetric.
    """

    matrix: Tensor
    shift: Tensor
    covariance: Tensor


class Triple(NamedTuple):
    """(A, b, B): the coefficients of a linear equation at a time, or their integral over a step."""

    a: Tensor
    b: Tensor
    noise: Tensor

    def times(self, factor: Tensor) -> Triple:
        """Each part by `factor` (...,)."""
        return Triple(
            self.a * factor[..., None, None], self.b * factor[..., None], self.noise * factor[..., None, None]
        )

    def plus(self, other: Triple) -> Triple:
        """The sum."""
        return Triple(self.a + other.a, self.b + other.b, self.noise + other.noise)

    def rows(self, which: Tensor | slice | int) -> Triple:
        """Some of the leading rows."""
        return Triple(self.a[which], self.b[which], self.noise[which])


Field = Callable[[Tensor], Triple]
"""`field(t)`: the coefficients at times (n,), with leading dimension n."""

_TERMS = 18
"""Of the series below a norm of 1/2: the next term is below 1e-17."""
_SQRT3 = math.sqrt(3.0)
_TOLERANCE = 1e-13
_DEPTH = 44
"""Halvings of an interval at most; a jump of the coefficients is resolved to about 1e-9 of the interval."""
_PANELS = 8192
_LEVELS = 4


def compose(later: LinearKernel, earlier: LinearKernel) -> LinearKernel:
    """The kernel of `earlier`, then `later` (Chapman-Kolmogorov)."""
    f = later.matrix
    covariance = f @ earlier.covariance @ f.mT + later.covariance
    return LinearKernel(f @ earlier.matrix, _product(f, earlier.shift) + later.shift, symmetric(covariance))


def commutator(x: Triple, y: Triple) -> Triple:
    """[x, y]."""
    noise = x.a @ y.noise - y.a @ x.noise
    return Triple(x.a @ y.a - y.a @ x.a, _product(x.a, y.b) - _product(y.a, x.b), noise + noise.mT)


def exponential(triple: Triple) -> LinearKernel:
    """exp(A, b, B), batched over leading dimensions."""
    a, b, noise = triple
    norm = float(a.abs().sum(-1).amax()) if a.numel() else 0.0
    if not math.isfinite(norm):
        raise ValueError("expected finite coefficients of a linear SDE")
    doublings = max(0, math.ceil(math.log2(2 * norm))) if norm > 0 else 0
    scale = 0.5**doublings
    a, b, noise = a * scale, b * scale, noise * scale
    power = torch.eye(a.shape[-1], dtype=a.dtype).expand_as(a)
    matrix, shift, covariance = power.clone(), b.clone(), noise.clone()
    for n in range(1, _TERMS + 1):
        power = a @ power / n
        b = _product(a, b) / (n + 1)
        noise = a @ noise
        noise = (noise + noise.mT) / (n + 1)
        matrix, shift, covariance = matrix + power, shift + b, covariance + noise
    kernel = LinearKernel(matrix, shift, covariance)
    for _ in range(doublings):
        kernel = compose(kernel, kernel)
    return kernel


def magnus(field: Field, start: Tensor, end: Tensor, steps: int) -> LinearKernel:
    """The kernels (n, ...) from start (n,) to end (n,) by `steps` Magnus steps of order 4 each.

    Omega = h/2 (Z1 + Z2) + sqrt(3)/12 h^2 [Z2, Z1] with Z at the two Gauss nodes (Iserles and Norsett 1999; Blanes,
    Casas, Oteo and Ros 2009, The Magnus expansion and some of its applications, section 5).

    Args:
        steps: a power of 2.
    """
    return _in_turn(exponential(_magnus_exponents(field, start, end, steps)), len(start), steps)


def _magnus_exponents(field: Field, start: Tensor, end: Tensor, steps: int) -> Triple:
    share = torch.arange(steps, dtype=torch.float64) / steps
    h = ((end - start) / steps).repeat_interleave(steps)
    left = (start[:, None] + (end - start)[:, None] * share).flatten()
    z1 = field(left + h * (0.5 - _SQRT3 / 6))
    z2 = field(left + h * (0.5 + _SQRT3 / 6))
    return z1.plus(z2).times(0.5 * h).plus(commutator(z2, z1).times(_SQRT3 / 12 * h**2))


def _in_turn(kernel: LinearKernel, count: int, steps: int) -> LinearKernel:
    """Kernels (count * steps, ...) composed `steps` at a time, `steps` a power of 2."""
    while steps > 1:
        kernel = compose(LinearKernel(*(v[1::2] for v in kernel)), LinearKernel(*(v[0::2] for v in kernel)))
        steps //= 2
    assert len(kernel.matrix) == count
    return kernel


def _magnus_rule(field: Field, start: Tensor, end: Tensor) -> tuple[LinearKernel, Tensor]:
    """Kernels over panels by Magnus steps of 1, 1/2, 1/4, 1/8 of a panel, extrapolated, and their relative errors.

    The Magnus step is symmetric in time, so that its error has even powers of the step alone, from the fourth.
    """
    n = len(start)
    parts = [_magnus_exponents(field, start, end, 2**level) for level in range(_LEVELS)]
    # the exponents of all levels in one batch: the series costs its launches, not its arithmetic
    everything = exponential(Triple(*(torch.cat(v) for v in zip(*parts, strict=True))))
    sizes = [len(p.a) for p in parts]
    levels = [LinearKernel(*v) for v in zip(*(torch.split(v, sizes) for v in everything), strict=True)]
    row = [_in_turn(kernel, n, 2**level) for level, kernel in enumerate(levels)]
    before = row
    for order in range(4, 4 + 2 * (_LEVELS - 1), 2):
        before, weight = row, 1 / (2.0**order - 1)
        row = [LinearKernel(*(y + weight * (y - x) for x, y in zip(a, b, strict=True))) for a, b in pairwise(row)]
    best, total = row[-1], parts[0]
    return best, _difference(before[-1], best, total)


def _commuting_rule(field: Field, start: Tensor, end: Tensor) -> tuple[LinearKernel, Tensor]:
    """Kernels over panels as the exponential of the coefficients' integral, by 16 Gauss nodes; errors against 8."""
    total, coarse = (_integral(field, start, end, points) for points in (16, 8))
    size = _Size.of(total)
    gap = Triple(total.a - coarse.a, total.b - coarse.b, total.noise - coarse.noise)
    return exponential(total), size.of_gap(gap.a, gap.b, gap.noise)


def _integral(field: Field, start: Tensor, end: Tensor, points: int) -> Triple:
    nodes, weights = gauss_legendre(points)
    h = end - start
    value = field((start[:, None] + h[:, None] * nodes).flatten())
    grouped = (v.reshape(len(start), points, *v.shape[1:]) for v in value)
    return Triple(*(torch.einsum("p,np...->n...", weights, v) for v in grouped)).times(h)


class _Size(NamedTuple):
    """What errors over a panel are relative to: 1, the size of the shift, and a deviation of each coordinate."""

    shift: Tensor
    deviation: Tensor

    @staticmethod
    def of(total: Triple, covariance: Tensor | None = None) -> _Size:
        variance = torch.diagonal(total.noise if covariance is None else covariance, dim1=-2, dim2=-1).abs()
        # below this share of the largest, a coordinate's variance is what rounding leaves of 0
        norm = total.a.abs().sum(-1).amax(-1).clamp(max=1.0)
        floor = _TOLERANCE * norm * variance.amax(-1)
        return _Size(total.b.abs().amax(-1), torch.sqrt(torch.maximum(variance, floor[..., None])))

    def of_gap(self, matrix: Tensor, shift: Tensor, covariance: Tensor, largest: Tensor | float = 1.0) -> Tensor:
        tiny = torch.finfo(torch.float64).tiny
        scale = self.deviation[..., :, None] * self.deviation[..., None, :]
        return torch.stack(
            [
                matrix.abs().flatten(1).amax(1) / largest,
                (shift.abs() / self.shift.clamp(min=tiny)[..., None]).flatten(1).amax(1),
                (covariance.abs() / scale.clamp(min=tiny)).flatten(1).amax(1),
            ]
        ).amax(0)


def _difference(x: LinearKernel, y: LinearKernel, total: Triple) -> Tensor:
    size = _Size.of(total, y.covariance)
    size = size._replace(shift=torch.maximum(size.shift, y.shift.abs().amax(-1)))
    largest = y.matrix.abs().flatten(1).amax(1).clamp(min=1.0)
    gap = size.of_gap(x.matrix - y.matrix, x.shift - y.shift, x.covariance - y.covariance, largest)
    # a step this long is not the Magnus series' to judge; its terms need |A| h < pi
    long = total.a.abs().sum(-1).amax(-1) > 2.0
    return torch.where(long, torch.inf, gap)


def propagate(field: Field, start: Tensor, end: Tensor, *, method: Method) -> LinearKernel:
    """The kernels (n, ...) from start (n,) to end (n,), either way in time, to 1e-13 of their size a panel.

    Intervals are halved where two estimates of their kernel differ by more.

    Raises:
        ValueError: a panel of 2^-44 of its interval still does, or more panels than any smooth function needs.
    """
    rule = _commuting_rule if method == "commuting" else _magnus_rule
    owner = torch.arange(len(start))
    a, b, depth = start, end, torch.zeros(len(start), dtype=torch.int64)
    done: list[tuple[Tensor, Tensor, LinearKernel]] = []
    most = _PANELS + 32 * len(start)
    while len(a):
        kernel, error = rule(field, a, b)
        # a panel next to a jump counts by its share of the interval
        good = error * torch.where(depth > _DEPTH - 4, 0.5 ** depth.to(error), 1.0) <= _TOLERANCE
        good |= a == b
        stuck = ~good & (depth >= _DEPTH)
        if bool(stuck.any()) or int((~good).sum()) > most:
            at = float((a[stuck] if bool(stuck.any()) else a[~good])[-1])
            raise ValueError(
                f"the kernel of the linear SDE did not converge near t = {at:g}: expected coefficients that are "
                "integrable there and smooth but for a few jumps, computed in float64"
            )
        done.append((owner[good], a[good], LinearKernel(*(v[good] for v in kernel))))
        a, b, owner, depth = (v[~good] for v in (a, b, owner, depth))
        middle = 0.5 * (a + b)
        a, b = torch.cat([a, middle]), torch.cat([middle, b])
        owner, depth = owner.repeat(2), depth.repeat(2) + 1
    owners, starts = torch.cat([part[0] for part in done]), torch.cat([part[1] for part in done])
    panels = LinearKernel(*(torch.cat(v) for v in zip(*(part[2] for part in done), strict=True)))
    return _by_owner(panels, owners, torch.where(end < start, -1.0, 1.0)[owners] * starts, len(start))


def _by_owner(panels: LinearKernel, owners: Tensor, clock: Tensor, count: int) -> LinearKernel:
    """Panels of each owner composed in the order of their clock."""
    order = torch.argsort(clock, stable=True)
    order = order[torch.argsort(owners[order], stable=True)]
    counts = torch.bincount(owners, minlength=count)
    first = counts.cumsum(0) - counts
    total = LinearKernel(*(v[order[first]] for v in panels))
    for place in range(1, int(counts.max()) if count else 0):
        longer = torch.nonzero(counts > place).flatten()
        here = order[first[longer] + place]
        part = compose(LinearKernel(*(v[here] for v in panels)), LinearKernel(*(v[longer] for v in total)))
        for whole, new in zip(total, part, strict=True):
            whole[longer] = new
    return total


def running(kernels: LinearKernel) -> LinearKernel:
    """Kernels (n, ...) of consecutive intervals, each composed with all before it, in log2 n rounds."""
    total, reach = kernels, 1
    while reach < len(total.matrix):
        joined = compose(LinearKernel(*(v[reach:] for v in total)), LinearKernel(*(v[:-reach] for v in total)))
        total = LinearKernel(*(torch.cat([v[:reach], w]) for v, w in zip(total, joined, strict=True)))
        reach *= 2
    return total


# ---- factors and products


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part."""
    return 0.5 * (matrix + matrix.mT)


def factor_of(covariance: Tensor) -> Tensor:
    """The lower-triangular L (..., k, k) with L L^T = covariance, positive semi-definite to rounding.

    A Cholesky factor of the correlations, so that coordinates of any scale keep their relative precision; where a
    pivot is 0 to rounding, so is its column.
    """
    k = covariance.shape[-1]
    scale = torch.sqrt(torch.diagonal(covariance, dim1=-2, dim2=-1).clamp(min=0.0))
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    rest = covariance * inverse[..., :, None] * inverse[..., None, :]
    least = 4 * k * torch.finfo(covariance.dtype).eps
    columns = []
    below = torch.arange(k)
    for j in range(k):
        pivot = rest[..., j, j]
        column = rest[..., :, j] * torch.where(pivot > least, 1 / torch.sqrt(pivot.clamp(min=least)), 0.0)[..., None]
        column = torch.where(below >= j, column, 0.0)
        rest = rest - column[..., :, None] * column[..., None, :]
        columns.append(column)
    return torch.stack(columns, dim=-1) * scale[..., :, None]


def inverse_factor(factor: Tensor, what: str) -> Tensor:
    """L^-1, lower-triangular.

    Raises:
        ValueError: L has a zero pivot.
    """
    pivots = torch.diagonal(factor, dim1=-2, dim2=-1)
    if not bool((pivots > 0).all()):
        raise ValueError(f"{what} is singular, so that there is no density and no score: expected noise in every "
                         "coordinate (a time above t0, or data with a covariance)")  # fmt: skip
    return torch.linalg.solve_triangular(factor, torch.eye(factor.shape[-1], dtype=factor.dtype), upper=False)


def multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """A x along the first event dimension: x (batch, j, *rest), A (i, j) or (batch, i, j); (batch, i, *rest).

    Up to 64 columns they are added one by one, so that the bits of a sample do not depend on the batch; more are a
    product of matrices a sample.
    """
    matrix = matrix.to(device=x.device, dtype=x.dtype)
    if matrix.ndim == 2:
        matrix = matrix[None]
    if matrix.shape[-1] <= 64:
        columns = matrix.reshape(*matrix.shape, *[1] * (x.ndim - 2))
        total = columns[:, :, 0] * x[:, :1]
        for j in range(1, matrix.shape[-1]):
            total = total + columns[:, :, j] * x[:, j : j + 1]
        return total
    return (matrix @ x.reshape(*x.shape[:2], -1)).reshape(x.shape[0], matrix.shape[1], *x.shape[2:])


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def commute(values: Triple) -> bool:
    """Whether coefficients at n times commute pairwise, as elements of the kernel's Lie algebra."""
    first, second = torch.triu_indices(len(values.a), len(values.a), 1)
    x, y = values.rows(first), values.rows(second)
    bracket = commutator(x, y)
    norms = [v.abs().flatten(1).amax(1) for v in (x.a, x.b, x.noise, y.a, y.b, y.noise)]
    sizes = (norms[0] * norms[3], norms[0] * norms[4] + norms[3] * norms[1], norms[0] * norms[5] + norms[3] * norms[2])
    gaps = (v.abs().flatten(1).amax(1) for v in bracket)
    return all(bool((gap <= 1e-12 * size).all()) for gap, size in zip(gaps, sizes, strict=True))
