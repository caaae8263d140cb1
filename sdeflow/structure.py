"""What an SDE is, found by probing: affine, time-homogeneous, additive, commutative, polynomial.

Drift and D = G G^T are evaluated in float64 at states and times of the process's domain, its far tails included, and
fitted by polynomials of degree 1 (drift) and 2 (D); a fit that holds at points it has not seen, to 1e-9, is believed.
For analytic coefficients a wrong verdict has probability 0; branches (`where`, clamps) that no probe reaches are
not seen, so that a class may declare what it is (`affine`, `homogeneous`, `additive`, `commutative`), and
`sdeflow.testing.check_sde` holds declarations against probes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdeflow.calculus import NoiseKind, noise_kind
from sdeflow.checked import event_shape

if TYPE_CHECKING:
    from sdeflow.linear import LinearSDE
    from sdeflow.sde import SDE

_TOLERANCE = 1e-9
_EVENTS: tuple[tuple[int, ...], ...] = ((2,), (3,), (1,), (4,), (5,), (6,), (7,), (8,), (2, 2))
_WIDE = 12
"""Components of a sample up to which D is fitted by quadratics."""
_SEED = 20_11_26


@dataclass(frozen=True)
class Structure:
    """What an SDE is.

    Attributes:
        event: the shape of one sample that was probed.
        noise_dim: the components of the noise of one sample.
        noise: its kind (`sdeflow.calculus.NOISE_KINDS`).
        affine: the drift is A(t) x + b(t).
        homogeneous: neither drift nor diffusion depends on t.
        additive: the diffusion does not depend on x.
        own_coordinate: D is diagonal, and D_ii depends on x_i alone.
        commutative: L^j G_k = L^k G_j, so that no Levy area is needed.
        polynomial: affine drift and D quadratic in x: moments up to any degree obey a closed linear equation.
        commuting: the matrices A(t) of an affine drift commute with each other; None where the drift is not affine.
        declared: the facts that the class declares, which were believed.
        kernel: how the transition law is obtained: "Van Loan", "commuting exponential", "Magnus" (Gaussian laws),
            "polynomial moments" (moments only) or "simulation".
        solvers: names of the catalogue's methods of the drift view that integrate this noise, by strong order.
    """

    event: tuple[int, ...]
    noise_dim: int
    noise: NoiseKind
    affine: bool
    homogeneous: bool
    additive: bool
    own_coordinate: bool
    commutative: bool
    polynomial: bool
    commuting: bool | None
    declared: tuple[str, ...]
    kernel: str
    solvers: tuple[str, ...]

    def words(self) -> dict[str, str]:
        """The facts in words, for people."""
        drift = "affine" if self.affine else "nonlinear"
        time = "time-homogeneous" if self.homogeneous else "time-dependent"
        noise = f"{self.noise}, {self.noise_dim} component{'s' if self.noise_dim > 1 else ''}"
        if self.noise not in ("additive", "general") and not self.additive:
            noise += ", commutative"
        law = {
            "Van Loan": "Gaussian, exact by one matrix exponential",
            "commuting exponential": "Gaussian, exact by the exponential of the integrated coefficients",
            "Magnus": "Gaussian, by Magnus expansion (the coefficients do not commute)",
            "polynomial moments": "moments of any degree are exact (polynomial process); the law itself by simulation",
            "simulation": "by simulation",
        }[self.kernel]
        return {
            "event": f"{self.event}",
            "coefficients": f"{drift} drift, {time}",
            "noise": noise,
            "transition law": law,
            "solvers that fit": ", ".join(self.solvers),
            **({"declared, not probed": ", ".join(self.declared)} if self.declared else {}),
        }


def structure(sde: SDE, event: tuple[int, ...] | None = None) -> Structure:
    """Probe `sde`; see `Structure`.

    Args:
        event: the shape of one sample; None takes the class's own `event`, or the first of (2,), (3,), (1,), ... that
            drift and diffusion accept.

    Raises:
        ValueError: no event shape works, or none of the probed states gives finite coefficients.
    """
    event = probe_event(sde, event)
    d = math.prod(event)
    degree = 2 if d <= _WIDE else 1
    x, t = probe_points(sde, event, max(48, 3 * math.comb(d + degree, degree) + 8))
    flat = x.flatten(1)
    f, g = coefficients(sde, x, t)
    good = torch.isfinite(f).all(1) & torch.isfinite(g).flatten(1).all(1)
    if int(good.sum()) < 24:
        raise ValueError(
            f"{type(sde).__name__}: drift or diffusion is not finite at {int((~good).sum())} of {len(x)} probed "
            "states: declare the interval that states stay in as `domain`"
        )
    declared = tuple(
        name for name in ("affine", "homogeneous", "additive", "commutative") if getattr(sde, name, None) is not None
    )

    def believed(name: str, probed: bool) -> bool:
        own = getattr(sde, name, None)
        return probed if own is None else bool(own)

    times = probe_times(sde, 5)
    at = [coefficients(sde, x[good], time.reshape(())) for time in times]
    homogeneous = believed("homogeneous", all(_same(a, b) for pair in at[1:] for a, b in zip(pair, at[0], strict=True)))
    affine = believed("affine", all(_fits(flat[good], drift, 1) for drift, _ in at[:3]))
    additive = believed("additive", all(_same(noise, noise[:1].expand_as(noise)) for _, noise in at))
    square = [noise @ noise.mT for _, noise in at[:3]]
    polynomial = affine and (additive or (d <= _WIDE and all(_fits(flat[good], v.flatten(1), 2) for v in square)))
    middle = times[2].reshape(())
    kind = "additive" if additive else noise_kind(sde, x[good], middle)
    own = _own(sde, x[good], middle)
    commuting = _commute([_matrix(flat[good], drift) for drift, _ in at]) if affine else None
    if affine and additive:
        kernel = "Van Loan" if homogeneous else "commuting exponential" if commuting and _scaled(at) else "Magnus"
    else:
        kernel = "polynomial moments" if polynomial else "simulation"
    return Structure(
        event=event,
        noise_dim=d if sde.noise == "diagonal" else g.shape[-1],
        noise=kind,
        affine=affine,
        homogeneous=homogeneous,
        additive=additive,
        own_coordinate=own,
        commutative=believed("commutative", kind != "general"),
        polynomial=polynomial,
        commuting=commuting,
        declared=declared,
        kernel=kernel,
        solvers=_solvers(kind),
    )


# ---- probes


def probe_event(sde: SDE, event: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The shape of one sample that `sde` takes."""
    if event is None:
        event = sde.event
    if event is not None:
        return event_shape(event, 1000)
    reasons = []
    for shape in _EVENTS:
        x, t = probe_points(sde, shape, 4)
        try:
            coefficients(sde, x, t)
        except Exception as error:  # a user's function may fail on a wrong shape in any way
            reasons.append(f"{shape}: {error}")
            continue
        return shape
    raise ValueError(
        f"{type(sde).__name__}: drift and diffusion take none of the event shapes {', '.join(map(str, _EVENTS))}; "
        f"declare `event`. First reason: {reasons[0]}"
    )


def probe_times(sde: SDE, count: int) -> Tensor:
    """Times inside the span, away from its ends, float64 (count,)."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    irregular = share + 0.1 / count * torch.frac(share * 7.389)
    return sde.t0 + (sde.t1 - sde.t0) * (0.03 + 0.94 * irregular.clamp(0, 1))


def probe_points(
    sde: SDE, event: tuple[int, ...], count: int, *, tails: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(x, t): states (count, *event) inside the domain, a third of them in its tails, with times (count, 1, ..., 1)."""
    generator = torch.Generator().manual_seed(_SEED + seed)
    z = torch.randn((count, *event), generator=generator, dtype=torch.float64)
    if tails:
        z[::3] *= 3.0
    low, high = sde.domain
    if math.isinf(low) and math.isinf(high):
        x = torch.where(z.abs() > 3, z * z.abs(), z) if tails else z
    elif math.isinf(high):
        x = low + torch.exp(0.7 * z)
    elif math.isinf(low):
        x = high - torch.exp(0.7 * z)
    else:
        x = low + (high - low) * torch.sigmoid(z)
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    t = sde.t0 + (sde.t1 - sde.t0) * (0.05 + 0.9 * share)
    return x, t.reshape(-1, *[1] * len(event))


def coefficients(sde: SDE, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(drift (n, d), diffusion as a matrix (n, d, m)) as the class gives them; diagonal noise as a diagonal matrix."""
    with torch.no_grad():
        f, g = sde.drift(x, t), torch.as_tensor(sde.diffusion(x, t))
    if f.shape != x.shape:
        raise ValueError(f"the drift returned {tuple(f.shape)} for x of shape {tuple(x.shape)}")
    f = f.to(torch.float64).flatten(1)
    if sde.noise == "diagonal":
        return f, torch.diag_embed(torch.broadcast_to(g.to(torch.float64), x.shape).flatten(1))
    if g.shape[:-1] != x.shape:
        raise ValueError(f"the diffusion returned {tuple(g.shape)} for x of shape {tuple(x.shape)}")
    return f, g.to(torch.float64).reshape(len(x), -1, g.shape[-1])


def monomials(x: Tensor, degree: int) -> Tensor:
    """(n, count): 1, x_i, x_i x_j, ... up to the degree, in the order of `exponents`."""
    return torch.stack([torch.prod(x[:, list(c)], dim=1) for c in exponents(x.shape[1], degree)], dim=1)


def exponents(d: int, degree: int) -> list[tuple[int, ...]]:
    """The monomials of d variables up to a degree, as sorted tuples of their variables: (), (0,), (1,), (0, 0), ..."""
    return [c for k in range(degree + 1) for c in combinations_with_replacement(range(d), k)]


def fitted(x: Tensor, y: Tensor, degree: int) -> tuple[Tensor, float]:
    """(coefficients (monomials, k), the largest relative misfit at points that were not fitted)."""
    basis = monomials(x, degree)
    scale = basis.abs().amax(0).clamp(min=1e-300)
    half = max(2 * basis.shape[1], len(x) // 2)
    if len(x) < half + 4:
        raise ValueError(f"expected {half + 4} probes or more for degree {degree} in {x.shape[1]} variables: {len(x)}")
    if not bool(torch.isfinite(y).all()):
        raise ValueError("expected finite coefficients to fit; they are singular at this time or these states")
    row = 1 / basis[:half].abs().sum(1, keepdim=True)  # tails must not drown the middle
    matrix, values = basis[:half] / scale * row, y[:half] * row
    solution = torch.linalg.lstsq(matrix, values, driver="gelsd").solution
    # what is 0 but for rounding is 0: moments would add it up
    used = solution.abs() > _TOLERANCE * solution.abs().amax(0).clamp(min=1e-300)
    for k in range(solution.shape[1]):
        columns = torch.nonzero(used[:, k]).flatten()
        solution[:, k] = 0.0
        if len(columns):
            part = torch.linalg.lstsq(matrix[:, columns], values[:, k : k + 1], driver="gelsd").solution
            solution[columns, k] = part[:, 0]
    solution = solution / scale[:, None]
    gap = (basis[half:] @ solution - y[half:]).abs()
    size = basis[half:].abs() @ solution.abs() + y[half:].abs()
    return solution, float((gap / size.clamp(min=1e-12)).max())


def _fits(x: Tensor, y: Tensor, degree: int) -> bool:
    count = math.comb(x.shape[1] + degree, degree)
    if len(x) < 2 * count + 4:
        return False
    return fitted(x, y, degree)[1] <= _TOLERANCE


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= _TOLERANCE * (a.abs() + b.abs()).clamp(min=1e-12)).all())


def _matrix(x: Tensor, f: Tensor) -> Tensor:
    """A of an affine f = A x + b."""
    return fitted(x, f, 1)[0][1:].T


def _commute(matrices: list[Tensor]) -> bool:
    scale = max(float(m.abs().max()) for m in matrices) ** 2
    gaps = [float((a @ b - b @ a).abs().max()) for i, a in enumerate(matrices) for b in matrices[:i]]
    return max(gaps, default=0.0) <= _TOLERANCE * max(scale, 1e-12)


def _scaled(at: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether D(t) is one matrix times a number of t, so that the integrated coefficients commute too."""
    squares = [noise[0] @ noise[0].T for _, noise in at]
    base = max(squares, key=lambda v: float(v.abs().max()))
    size = float((base * base).sum())
    if size == 0:
        return True
    return all(_same(v, base * ((v * base).sum() / size)) for v in squares)


def _own(sde: SDE, x: Tensor, t: Tensor) -> bool:
    """Whether D is diagonal, and D_ii stays as it is when other components of x change."""
    square = coefficients(sde, x, t)[1]
    square = square @ square.mT
    variances = square.diagonal(dim1=1, dim2=2)
    if not _same(square, torch.diag_embed(variances)):
        return False
    flat = x.flatten(1)
    for j in range(flat.shape[1]):
        moved = flat.roll(1, 0)
        moved[:, j] = flat[:, j]
        noise = coefficients(sde, moved.reshape(x.shape), t)[1]
        if not _same((noise @ noise.mT)[:, j, j], variances[:, j]):
            return False
    return True


def _solvers(kind: NoiseKind) -> tuple[str, ...]:
    from sdeflow.solvers.catalogue import CATALOGUE

    fitting = [row for row in CATALOGUE if kind in row.noise and row.view == "drift"]
    column = {"additive": "strong_order", "general": "strong_general"}.get(kind, "strong_diagonal")
    order = {row.name: getattr(row, column) or 0.0 for row in fitting}
    return tuple(sorted(order, key=lambda name: -order[name]))


def linear_form(sde: SDE, known: Structure) -> LinearSDE:
    """The `LinearSDE` of a process with affine drift and additive noise: its exact Gaussian kernel.

    Raises:
        ValueError: the process is not so.
    """
    from sdeflow.linear import LinearSDE

    if not (known.affine and known.additive) or len(known.event) != 1:
        raise ValueError(
            f"{type(sde).__name__}: expected an affine drift, additive noise and states (batch, d), got {known}"
        )
    d = known.event[0]
    states = torch.cat([torch.zeros(1, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)])

    def values(t: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t, dtype=torch.float64)
        x = states.repeat(max(1, t.numel()), 1)
        f, g = coefficients(sde, x, t.reshape(-1, 1).repeat_interleave(d + 1, 0))
        return f.reshape(*t.shape, d + 1, d), g.reshape(*t.shape, d + 1, d, -1)[..., 0, :, :]

    def matrix(t: Tensor) -> Tensor:
        f = values(t)[0]
        return (f[..., 1:, :] - f[..., :1, :]).mT

    def offset(t: Tensor) -> Tensor:
        return values(t)[0][..., 0, :]

    def noise(t: Tensor) -> Tensor:
        return values(t)[1]

    if known.homogeneous:
        at = torch.tensor(0.5 * (sde.t0 + sde.t1), dtype=torch.float64)
        return LinearSDE(matrix(at), noise(at), sde.t0, sde.t1, offset=offset(at))
    return LinearSDE(matrix, noise, sde.t0, sde.t1, offset=offset)
