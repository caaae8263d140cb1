"""Hypothesis strategies of SDEs, distributions, grids, times and solvers: random subjects for property tests.

    from hypothesis import given
    from sdeflow.testing import check_sde
    from sdeflow.testing.strategies import sdes

    @given(sdes())
    def test_my_derivation(sde): ...

Everything is drawn from small integers and halves, and shrinks to fewer dimensions and to zeros; what is drawn prints
as the Python that makes it again. Needs Hypothesis, which the library itself does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sdeflow.calculus import NOISE_KINDS
from sdeflow.discrete import DiscreteVP
from sdeflow.gaussian import GaussianSDE
from sdeflow.grids import GRIDS
from sdeflow.linear import LinearSDE
from sdeflow.problems import Distribution, Empirical, GaussianMixture
from sdeflow.processes import EDM, VE, VP, CosineVP, RectifiedFlow, SubVP
from sdeflow.pushforward import Pushforward
from sdeflow.sde import SDE, Problem
from sdeflow.solvers.base import Solver
from sdeflow.solvers.catalogue import CATALOGUE
from sdeflow.times import Time, as_time

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("sdeflow.testing.strategies needs Hypothesis: python -m pip install hypothesis") from error

__all__ = [
    "Mixture",
    "PointMasses",
    "PowerSDE",
    "TanhImage",
    "WaveSDE",
    "distributions",
    "gaussian_sdes",
    "grids",
    "sdes",
    "solvers",
    "times",
]

Numbers = tuple[float, ...]
Rows = tuple[Numbers, ...]

_EMPTY: Any = ()


# ---- what is drawn


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _plain(value: Any) -> Any:
    """Nested tuples as lists, whole numbers as integers."""
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str) else _number(value)


def _frozen(value: Any) -> Any:
    """Nested lists as tuples of floats."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    return value if isinstance(value, str) else float(value)


def _text(subject: Any) -> str:
    """The constructor call with what is not the default."""
    given = []
    for f in fields(subject):
        value = getattr(subject, f.name)
        if f.default is MISSING or value != f.default:
            given.append(f"{f.name}={_plain(value)!r}")
    return f"{type(subject).__name__}({', '.join(given)})"


def _tensor(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@dataclass(repr=False, unsafe_hash=True)
class WaveSDE(SDE):
    """An SDE with a polynomial and trigonometric drift and a diffusion that may be a full matrix of the state:

        f(x, t) = (1 + speed t) [A x + b + wave sin(x) - cubic x^3],
        G(x, t) = (1 + speed t) [L + bend sin(x W)],   sin taken a column: G_ik = L_ik + bend_ik sin(sum_j x_j W_jk).

    Args:
        A, b: (d, d) and (d,).
        L: (d, m), general noise; or (d,), diagonal noise G_i = L_i + bend_i sin((x W)_i).
        wave, cubic: numbers; cubic >= 0 keeps paths from exploding.
        bend: of the shape of L; empty for additive noise.
        W: (d, m) directions (m = d for diagonal noise); empty where `bend` is.
        speed: of the dependence on t.
        interpretation: of f, "ito" or "stratonovich".

    Raises:
        ValueError: shapes that do not fit.
    """

    A: Rows
    b: Numbers
    L: Rows | Numbers
    wave: float = 0.0
    cubic: float = 0.0
    bend: Rows | Numbers = _EMPTY
    W: Rows = _EMPTY
    speed: float = 0.0
    interpretation: Any = "ito"

    def __post_init__(self) -> None:
        for f in fields(self):
            setattr(self, f.name, _frozen(getattr(self, f.name)))
        d = len(self.b)
        self._A, self._b, self._L = _tensor(self.A), _tensor(self.b), _tensor(self.L)
        self.noise = "diagonal" if self._L.ndim == 1 else "general"
        self.event = (d,)
        m = self._L.shape[-1]
        self._bend = _tensor(self.bend) if self.bend else None
        self._W = _tensor(self.W) if self.W else None
        shapes_fit = self._A.shape == (d, d) and self._L.shape in ((d,), (d, m))
        if self._bend is not None:
            shapes_fit &= self._bend.shape == self._L.shape and self._W is not None and self._W.shape == (d, m)
        if not shapes_fit:
            raise ValueError(f"expected A (d, d), b (d,), L (d,) or (d, m), bend like L, W (d, m), got {self!r}")

    def __repr__(self) -> str:
        return _text(self)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t)."""
        a, b = self._A.to(x), self._b.to(x)
        value = x @ a.T + b + self.wave * torch.sin(x)
        if self.cubic:
            value = value - self.cubic * x**3
        return (1 + self.speed * t) * value if self.speed else value

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """G(x, t)."""
        g = self._L.to(x).expand(len(x), *self._L.shape)
        if self._bend is not None and self._W is not None:
            waves = torch.sin(x @ self._W.to(x))
            g = g + self._bend.to(x) * (waves if self.noise == "diagonal" else waves.unsqueeze(1))
        if not self.speed:
            return g
        factor = 1 + self.speed * torch.as_tensor(t)
        return (factor.unsqueeze(-1) if self.noise == "general" and factor.ndim else factor).to(x) * g


@dataclass(repr=False, unsafe_hash=True)
class TanhImage(Pushforward):
    """The image of dy = (A y + b) dt + L dW under phi(y) = y + B^T tanh(B y + c): full-matrix G(x), law known exactly.

    The Jacobian I + B^T diag(sech^2) B is positive definite whatever B: a diffeomorphism. Data at t = 0 are phi of a
    Gaussian mixture with the means `means` and the variance 1/2 in every direction, of equal weights.

    Args:
        A, b, L: of the base, (d, d), (d,), (d, m).
        B, c: of the map, (d, d) and (d,).
        means: (K, d).
    """

    A: Rows
    b: Numbers
    L: Rows
    B: Rows
    c: Numbers
    means: Rows

    def __post_init__(self) -> None:
        for f in fields(self):
            setattr(self, f.name, _frozen(getattr(self, f.name)))
        matrix, shift = _tensor(self.B), _tensor(self.c)

        def phi(y: Tensor) -> Tensor:
            return y + torch.tanh(y @ matrix.T.to(y) + shift.to(y)) @ matrix.to(y)

        base = LinearSDE(_tensor(self.A), _tensor(self.L), offset=_tensor(self.b))
        super().__init__(phi, base, law=GaussianMixture(self.means, 0.5))

    def __repr__(self) -> str:
        return _text(self)


@dataclass(frozen=True)
class PowerSDE(GaussianSDE):
    """The scalar Gaussian process dx = -pull t x dt + (spread + slope t) dW on [0, 1], given by its coefficients."""

    pull: float = 1.0
    spread: float = 1.0
    slope: float = 0.0

    def drift_coeff(self, t: Time) -> Tensor:
        """f(t)."""
        return -self.pull * as_time(t)

    def diffusion_coeff(self, t: Time) -> Tensor:
        """g(t)."""
        return self.spread + self.slope * as_time(t)


class Mixture(GaussianMixture):
    """A `GaussianMixture` that prints its parameters: means (K, d), one variance a component, weights (K,)."""

    def __init__(self, means: Any, variances: Any, weights: Any = None) -> None:
        self.given = tuple(_frozen(v) for v in (means, variances, [1.0] * len(means) if weights is None else weights))
        super().__init__(means, torch.tensor(variances, dtype=torch.float64), weights)

    def __repr__(self) -> str:
        means, variances, weights = (_plain(v) for v in self.given)
        return f"Mixture({means}, {variances}, {weights})"


class PointMasses(Empirical):
    """An `Empirical` that prints its points (N, d)."""

    def __init__(self, points: Any, bandwidth: float = 0.5) -> None:
        self.given = _frozen(points)
        super().__init__(points, bandwidth)

    def __repr__(self) -> str:
        return f"PointMasses({_plain(self.given)}, {_number(self.bandwidth)})"


# ---- numbers


@cache
def _halves(low: float, high: float) -> st.SearchStrategy[float]:
    """Multiples of 1/2 in [low, high], nearest to 0 first."""
    return st.integers(math.ceil(2 * low), math.floor(2 * high)).map(lambda k: k / 2)


@cache
def _vectors(d: int, low: float = -1, high: float = 1) -> st.SearchStrategy[Numbers]:
    return st.tuples(*[_halves(low, high)] * d)


@cache
def _matrices(rows: int, columns: int, low: float = -1, high: float = 1) -> st.SearchStrategy[Rows]:
    return st.tuples(*[_vectors(columns, low, high)] * rows)


def _cut(rows: Rows, d: int, columns: int) -> Rows:
    return tuple(row[:columns] for row in rows[:d])


def _raised(rows: Rows, own: Numbers) -> Rows:
    """Half of `rows` off the diagonal, `own` on it: a matrix of full rank in most draws."""
    return tuple(tuple(own[i] if i == k else 0.5 * value for k, value in enumerate(row)) for i, row in enumerate(rows))


# ---- strategies


@st.composite
def _sde(draw: st.DrawFn, least: int, most: int) -> SDE:
    """Numbers for `most` dimensions, cut to d: shrinking takes dimensions away and leaves the rest as it is."""
    d = draw(st.integers(least, most))
    image, diagonal, bent = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    interpretation = draw(st.sampled_from(["ito", "stratonovich"]))
    speed, wave, cubic = draw(_halves(0, 1)), draw(_halves(0, 1)), draw(_halves(0, 0.5))
    m = d if diagonal else min(draw(st.integers(1, most + 1)), d + 1)
    b, c = draw(_vectors(most))[:d], draw(_vectors(most))[:d]
    a = _cut(draw(_matrices(most, most)), d, d)
    own = draw(_matrices(3, most, 0, 1))
    gain, bend, directions, b_matrix = (
        _cut(draw(_matrices(most, most + 1)), d, most + 1) for _ in range(4)
    )  # for images the matrix B is (d, d)
    gain = _cut(_raised(gain, tuple(1 + v for v in own[0])), d, min(m, d) if image else m)
    if image:
        means = draw(st.lists(_vectors(most, -2, 2), min_size=1, max_size=3))
        return TanhImage(a, b, gain, _cut(b_matrix, d, d), c, tuple(mean[:d] for mean in means))

    def shaped(rows: Rows) -> Any:
        return tuple(rows[i][i] for i in range(d)) if diagonal else rows

    parts: dict[str, Any] = {}
    if bent:
        bend, directions = (
            _cut(_raised(rows, tuple(0.5 + v for v in row)), d, m)
            for rows, row in ((bend, own[1]), (directions, own[2]))
        )
        parts = {"bend": shaped(bend), "W": directions}
    return WaveSDE(
        a, b, shaped(gain), wave=wave, cubic=cubic, speed=speed, interpretation=interpretation, **parts
    )  # fmt: skip


def sdes(dims: tuple[int, int] = (1, 4)) -> st.SearchStrategy[SDE]:
    """SDEs of states (batch, d): `WaveSDE` or, one in two, `TanhImage`, whose law is known exactly.

    Linear, polynomial and trigonometric drifts; additive, diagonal and full-matrix state-dependent noise with fewer, as
    many or more components than the state; Ito and Stratonovich; time-dependent or not. Shrinks to few dimensions, then
    to a `WaveSDE` with zeros.

    Args:
        dims: (least, most) d.

    Raises:
        ValueError: no 1 <= least <= most.
    """
    least, most = dims
    if not 1 <= least <= most:
        raise ValueError(f"expected dims (least, most) with 1 <= least <= most, got {dims}")
    return _sde(least, most)


def gaussian_sdes() -> st.SearchStrategy[GaussianSDE]:
    """Scalar Gaussian processes: every named one with parameters of its own, a table of betas, and `PowerSDE`."""
    betas = st.lists(st.integers(1, 8).map(lambda k: k / 32), min_size=4, max_size=12).map(sorted)
    return st.one_of(
        st.builds(PowerSDE, _halves(0, 3), _halves(0.5, 2), _halves(0, 2)),
        st.builds(VP, st.sampled_from([0.5, 0.1, 1.0]), st.integers(2, 20).map(float)),
        st.builds(SubVP, st.sampled_from([0.5, 0.1, 1.0]), st.integers(2, 20).map(float)),
        st.builds(VE, st.sampled_from([0.5, 0.1, 0.01]), st.integers(1, 50).map(float)),
        st.builds(CosineVP, st.sampled_from([0.008, 0.02])),
        st.builds(EDM, st.sampled_from([0.5, 0.1, 0.002]), st.integers(1, 80).map(float)),
        st.just(RectifiedFlow()),
        betas.map(DiscreteVP),
    )


@st.composite
def _mixtures(draw: st.DrawFn, d: int) -> Mixture:
    count = draw(st.integers(1, 4))
    means = draw(_matrices(count, d, -2, 2))
    variances = draw(st.tuples(*[st.integers(1, 4).map(lambda k: k / 4)] * count))
    weights = draw(st.tuples(*[st.integers(1, 3)] * count))
    return Mixture(means, variances, weights)


def distributions(dim: int | None = None) -> st.SearchStrategy[Distribution]:
    """Data with exact laws under every Gaussian process: mixtures of up to 4 Gaussians, and up to 5 blurred points.

    Args:
        dim: of a sample, (dim,); None draws it from 1 to 4.
    """
    sizes = st.integers(1, 4) if dim is None else st.just(dim)

    def of(d: int) -> st.SearchStrategy[Distribution]:
        points = st.lists(_vectors(d, -2, 2), min_size=1, max_size=5)
        return st.one_of(_mixtures(d), st.builds(PointMasses, points, st.sampled_from([0.5, 0.25, 1.0])))

    return sizes.flatmap(of)


@st.composite
def _grids_of(draw: st.DrawFn, process: Problem) -> Tensor:
    name = draw(st.sampled_from([name for name, row in GRIDS.items() if row.fits(process)]))
    betas = getattr(process, "betas", None)
    most = 12 if GRIDS[name].needs != "table" or betas is None else max(1, min(12, len(betas) // 2))
    return GRIDS[name].make(process, draw(st.integers(1, most)))


def grids(process: Problem | None = None) -> st.SearchStrategy[Tensor]:
    """Time grids, float64 (steps + 1,), from noise to data, 1 to 12 steps.

    Args:
        process: draws one of the library's grids that fit it, over its sampling span; None draws any falling times from
            multiples of 1/16 in [1/16, 1].
    """
    if process is not None:
        return _grids_of(process)
    shares = st.sets(st.integers(1, 16), min_size=2, max_size=13)
    return shares.map(lambda ks: torch.tensor(sorted(ks, reverse=True), dtype=torch.float64) / 16)


def times(sde: Problem | None = None) -> st.SearchStrategy[float]:
    """Times inside the sampling span (t_min, t1) of a process, ends left out; of (0, 1) for None."""
    low, high = (0.0, 1.0) if sde is None else (max(sde.t_min, sde.t0), sde.t1)
    return st.integers(1, 31).map(lambda k: low + (high - low) * k / 32)


def solvers(view: str | None = None, noise: str | None = None) -> st.SearchStrategy[Solver]:
    """Methods of the catalogue, with their default arguments.

    Args:
        view: of the problem that they take, "drift", "transition", ...; None for any.
        noise: a kind of noise (`sdeflow.calculus.NOISE_KINDS`) that they integrate; None for any, none included.

    Raises:
        ValueError: no method of the catalogue is so.
    """
    rows = [row for row in CATALOGUE if (view is None or row.view == view) and (noise is None or noise in row.noise)]
    if not rows:
        views: Sequence[str] = sorted({str(row.view) for row in CATALOGUE})
        raise ValueError(
            f"no method of the catalogue has view {view!r} and noise {noise!r}: "
            f"expected a view of {', '.join(views)} and noise of {', '.join(NOISE_KINDS)}"
        )
    return st.sampled_from(rows).map(lambda row: row.make())
