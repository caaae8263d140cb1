"""Methods for SDEs, right and wrong, equations to try them on, and one step with all its outcomes."""

import dataclasses
import math

import numpy as np
import torch

import sdeflow as sf
from sdeflow.bridge import Increment
from sdeflow.solvers import CATALOGUE, LevyMilstein, PlatenWeak2, StochasticHeun
from sdeflow.solvers.stochastic import StochasticSolver, root
from sdeflow.solvers.stochastic_rk import SRA, SRA1_TABLEAU
from tests.exact import F64

# ---- methods

ROWS = [row for row in CATALOGUE if row.name == "EulerMaruyama" or isinstance(row.make(), StochasticSolver)]


def rows(kind):
    return [row for row in ROWS if kind in row.noise]


def named(case):
    return getattr(case, "name", None)


def quick(row):
    """The method; LevyMilstein without areas it does not need."""
    return LevyMilstein(substeps=1) if row.name == "LevyMilstein" else row.make()


class StratonovichMilstein(StochasticSolver):
    """x + h f + G W + 1/2 L G W^2 with a difference over sqrt(h), central or one-sided."""

    name, form, strong = "StratonovichMilstein", "stratonovich", 1.0

    def __init__(self, central):
        object.__setattr__(self, "central", central)

    def step(self, terms, x, t, h, w, area):
        g, r = terms.diffusion(x, t), root(h)
        behind = terms.diffusion(x - r * g, t) if self.central else g
        change = (terms.diffusion(x + r * g, t) - behind) / (2 * r if self.central else r)
        return x + h * terms.drift(x, t) + g * w + 0.5 * change * w * w


class ItoDrift(StochasticHeun):
    form = "ito"


@dataclasses.dataclass(frozen=True)
class WithoutArea(SRA):
    def step(self, terms, x, t, h, w, area):
        return super().step(terms, x, t, h, w, 0 * area)


def changed(**fields):
    return SRA(dataclasses.replace(SRA1_TABLEAU, **fields), "wrong")


# ---- equations


class Tanh(sf.SDE):
    """X = tanh(W/2 + artanh x)."""

    start = (0.5, -0.2)

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return -0.25 * x * (1 - x**2) if self.interpretation == "ito" else torch.zeros_like(x)

    def diffusion(self, x, t):
        return 0.5 * (1 - x**2)

    def exact(self, x, w):
        return torch.tanh(0.5 * w + torch.atanh(x))


class Geometric(sf.SDE):
    """X = x exp((a - b^2/2) t + b W), or x exp(a t + b W)."""

    start = (1.0, 0.7)

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return 0.6 * x

    def diffusion(self, x, t):
        return 0.87 * x

    def exact(self, x, w):
        return x * torch.exp(0.6 - (0.5 * 0.87**2 if self.interpretation == "ito" else 0) + 0.87 * w)


class Sinh(sf.SDE):
    """X = sinh(t + W) from 0, where G' vanishes."""

    start = (0.0, 0.0)

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return (x / 2 if self.interpretation == "ito" else 0) + torch.sqrt(x**2 + 1)

    def diffusion(self, x, t):
        return torch.sqrt(x**2 + 1)

    def exact(self, x, w):
        return torch.sinh(torch.asinh(x) + 1 + w)


class Commuting(sf.SDE):
    """X = exp((A - 1/2 sum B_k^2) t + sum B_k W_k) x, the matrices polynomials in one."""

    noise = "general"
    start = (1.0, 0.5, -0.3)

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation
        one, m = torch.eye(3, dtype=F64), torch.tensor([[0, 1, 0], [-0.5, 0, 0.3], [0.2, 0, -0.4]], dtype=F64)
        self.columns = [0.4 * one + 0.3 * m, 0.5 * m - 0.2 * m @ m]
        self.shift = 0.5 * sum(b @ b for b in self.columns)
        self.stratonovich = -0.3 * one + 0.5 * m

    def drift(self, x, t):
        a = self.stratonovich + (self.shift if self.interpretation == "ito" else 0)
        return x @ a.T

    def diffusion(self, x, t):
        return torch.stack([x @ b.T for b in self.columns], -1)

    def exact(self, x, w):
        grown = torch.linalg.matrix_exp(
            self.stratonovich + sum(w[:, k, None, None] * b for k, b in enumerate(self.columns))
        )
        return (grown @ x.unsqueeze(-1)).squeeze(-1)


class Areas(sf.SDE):
    """X_1 = sinh(c W_1), X_2 = sinh(c int W_1 dW_2 + c W_3/2): noise that does not commute, in three components."""

    noise, size, m = "general", 0.6, 3

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        if self.interpretation == "stratonovich":
            return torch.zeros_like(x)
        a, b = x.unbind(-1)
        third = 0.25 * self.size**2 if self.m == 3 else 0
        return 0.5 * torch.stack([self.size**2 * a, b * (torch.asinh(a) ** 2 + third)], -1)

    def entries(self, x):
        a, b = x.unbind(-1)
        first, second = torch.sqrt(1 + a**2), torch.sqrt(1 + b**2)
        return self.size * first, second * torch.asinh(a), 0.5 * self.size * second

    def diffusion(self, x, t):
        first, second, third = self.entries(x)
        zero = torch.zeros_like(first)
        return torch.stack([torch.stack([first, zero, zero], -1), torch.stack([zero, second, third], -1)], -2)


class CrossedDiagonal(Areas):
    """The same without W_3, as diagonal noise whose second component depends on the first coordinate."""

    noise, m = "diagonal", 2

    def diffusion(self, x, t):
        return torch.stack(self.entries(x)[:2], -1)


class CorrelatedWell(sf.SDE):
    """Three noises for two coordinates of a nonlinear drift, g(t) a matrix."""

    noise = "general"
    columns = torch.tensor([[0.5, 0.2, 0.0], [-0.3, 0.4, 0.6]], dtype=F64)

    def drift(self, x, t):
        a, b = x.unbind(-1)
        return torch.stack([a - a**3 + b, torch.sin(a) - b], -1)

    def diffusion(self, x, t):
        return ((1 + 0.5 * torch.sin(3 * t)) * self.columns).to(x.dtype).expand(*x.shape, 3)


class ScalarBent(sf.SDE):
    """(X_1, X_2) = (sinh Y_1, Y_2 + sin Y_1) of one noise: dY = (cos 2t - Y_2, sin Y_1 - Y_2) dt + (1, 1/2) dW."""

    noise = "general"

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    @staticmethod
    def bend(y):
        return torch.stack([torch.sinh(y[:, 0]), y[:, 1] + torch.sin(y[:, 0])], -1)

    def straight(self, x):
        a = torch.asinh(x[..., 0])
        return a, x[..., 1] - torch.sin(a)

    def drift(self, x, t):
        a, b = self.straight(x)
        f, g = torch.cos(2 * t) - b, torch.sin(a) - b
        out = torch.stack([torch.cosh(a) * f, g + torch.cos(a) * f], -1)
        if self.interpretation == "ito":
            out = out + 0.5 * torch.stack([torch.sinh(a), -torch.sin(a)], -1)
        return out

    def diffusion(self, x, t):
        a, _ = self.straight(x)
        return torch.stack([torch.cosh(a), 0.5 + torch.cos(a)], -1).unsqueeze(-1)


class Swinging(sf.SDE):
    """Periodic in x; drift and noise depend on the time."""

    size = 0.3

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        return torch.sin(x) + 0.4 * torch.cos(2 * x + t)

    def diffusion(self, x, t):
        return 0.6 + self.size * torch.sin(x + 2 * t)


class SwingingAdditive(Swinging):
    def diffusion(self, x, t):
        return 0.7 * (1 + 0.5 * torch.sin(3 * t)).to(x.dtype)


class Plane(sf.SDE):
    """Two noises that do not commute, periodic in both coordinates."""

    noise = "general"

    def __init__(self, interpretation="ito"):
        self.interpretation = interpretation

    def drift(self, x, t):
        a, b = x.unbind(-1)
        return torch.stack([torch.sin(b), 0.5 * torch.cos(a)], -1)

    def entries(self, x):
        a, b = x.unbind(-1)
        return 0.5 + 0.2 * torch.sin(b), 0.4 * torch.cos(a), 0.3 * torch.sin(a), 0.6 + 0 * a

    def diffusion(self, x, t):
        e = self.entries(x)
        return torch.stack([torch.stack(e[:2], -1), torch.stack(e[2:], -1)], -2)

    def stratonovich_shift(self, x):
        """1/2 sum_jk G_jk d_j G_ik."""
        (p, q, r, _), (a, b) = self.entries(x), x.unbind(-1)
        first = 0.2 * torch.cos(b) * r - 0.4 * torch.sin(a) * q
        second = 0.3 * torch.cos(a) * p
        return 0.5 * torch.stack([first, second], -1)


class Heisenberg(sf.SDE):
    """X_1 = W_1, X_2 = W_2, X_3 = int W_1 dW_2, X_4 = int W_2 dW_1: from 0 to 1, E X_3^2 = 1/2 and E X_3 X_4 = 0."""

    noise = "general"

    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, x, t):
        a, b, _, _ = x.unbind(-1)
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        return torch.stack([torch.stack([one, zero, zero, b], -1), torch.stack([zero, one, a, zero], -1)], -1)


class Cooling(sf.SDE):
    """dX = -X/2 dt + sqrt(1 + X^2/4) dW: noise that depends on x, whose density is not Gaussian."""

    t1 = 0.5

    def __init__(self, crossed=False):
        self.noise = "general" if crossed else "diagonal"

    def drift(self, x, t):
        return -0.5 * x

    def diffusion(self, x, t):
        g = torch.sqrt(1 + 0.25 * x**2)
        if self.noise == "diagonal":
            return g
        mixed = 0.3 * x.roll(1, -1)
        return torch.stack([torch.diag_embed(g)[..., 0], torch.diag_embed(g)[..., 1], mixed], -1)


class Quiet(sf.SDE):
    """An equation with noise of size 0."""

    t1, noise = 2.0, "diagonal"

    def __init__(self, f, kind="diagonal"):
        self.f, self.noise = f, kind

    def drift(self, x, t):
        return self.f(x, t)

    def diffusion(self, x, t):
        return torch.zeros_like(x) if self.noise == "diagonal" else torch.zeros(*x.shape, 3, dtype=x.dtype)


def forced(x, t):
    return 2 * torch.cos(x) * torch.cos(5 * t) - x


# ---- one step, by quadrature over its noise


class Given:
    """The noise of one step: W and H (batch, m), and V (m, m) for weak methods."""

    def __init__(self, w, area, v=None):
        self.w, self.area, self.v = w, area, v

    def walk(self, times, event, dtype, *, areas=False, lengths=None):
        lengths = torch.diff(times).abs() if lengths is None else lengths
        assert lengths.numel() == 1
        assert self.w.shape[1:] == tuple(event)

        def walk(k):
            return Increment(self.w, self.area if areas else None)

        walk.lengths = lengths
        return walk

    def sequence(self, stream, nodes, event, dtype):
        return lambda k: self.v


def gauss(counts):
    """Nodes (n, len(counts)) and weights of a product of Gauss-Hermite rules for standard normals."""
    rules = [np.polynomial.hermite_e.hermegauss(n) for n in counts]
    nodes = np.stack(np.meshgrid(*(z for z, _ in rules), indexing="ij"), -1).reshape(-1, len(counts))
    weights = np.stack(np.meshgrid(*(w / w.sum() for _, w in rules), indexing="ij"), -1).reshape(-1, len(counts))
    return torch.tensor(nodes), torch.tensor(weights.prod(1))


def outcomes(solver, sde, x, t, h, m, nodes=9):
    """One step of length h from each x (n, d): states (n, outcomes, d) and the weights of the outcomes."""
    areas = getattr(solver, "areas", False)
    z, weights = gauss([nodes] * m + ([min(nodes, 5)] * m if areas else []))
    start = x.unsqueeze(1).expand(-1, len(z), -1).reshape(-1, x.shape[1])
    z = z.unsqueeze(0).expand(len(x), -1, -1).reshape(len(start), -1)
    w, area = math.sqrt(h) * z[:, :m], math.sqrt(h / 12) * z[:, m:] if areas else None
    grid = torch.tensor([t, t + h], dtype=F64)
    signs = [None]
    if isinstance(solver, PlatenWeak2) and m > 1:
        assert m == 2
        signs = [torch.tensor([[9.0, s], [9.0, 9.0]], dtype=F64) for s in (1.0, -1.0)]  # V takes the upper signs
    ends = []
    with torch.no_grad():
        for v in signs:
            v = None if v is None else v.expand(len(start), 2, 2)
            end = solver.stepper(sde, start, grid, Given(w, area, v)).step(0, start)
            ends.append(end.reshape(len(x), -1, x.shape[1]))
    return torch.cat(ends, 1), weights.repeat(len(signs)) / len(signs)
