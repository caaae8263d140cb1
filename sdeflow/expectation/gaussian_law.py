"""The Gaussian map of a problem's noise, and its exact law after the solver's own steps.

With a drift affine in x and noise that ignores x, a linear method's result is y = m + A xi, xi all normals that the
solve draws: m is the run without noise, a column of A the run with one normal set to 1, minus m. So the law of y, at
the saved times jointly, is N(m, A A^T), without error of the steps: the mean of a functional of it costs no solves.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdeflow.bridge import Increment, Walk
from sdeflow.expectation.regions import CONTROL
from sdeflow.expectation.simulation import Simulation, Start, checked_values
from sdeflow.expectation.sums import Drawn
from sdeflow.gaussian import GaussianSDE
from sdeflow.noise import DATA, PRIOR, Noise, NoiseSource
from sdeflow.problems import Gaussian
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import ODE, SDE, Problem
from sdeflow.solution import Solution
from sdeflow.solve import solve
from sdeflow.solve_input import grid_of
from sdeflow.solvers.runge_kutta import RK4

_MOST = 512
"""Largest number of components of a state whose full covariance is worked with; above, variances alone."""
_NORMALS = 1 << 13
"""Largest number of normals whose responses are computed."""
_ROUNDING = 1e-6
"""How far from affine a result may be, which float32 inside a model is too."""


def fitted_gaussian(reverse: ReverseSDE, states: Tensor) -> ReverseSDE:
    """The reversal whose data is Gaussian with the moments of `states` (n, *event) under the same process and eta."""
    flat = states.flatten(1).to("cpu", torch.float64)
    mean = flat.mean(0).reshape(states.shape[1:])
    if flat.shape[1] <= _MOST and len(flat) > 2 * flat.shape[1]:
        spread = torch.cov(flat.T).reshape(flat.shape[1], -1)
        spread = 0.5 * (spread + spread.T) + 1e-12 * torch.eye(len(spread), dtype=torch.float64)
    else:
        spread = flat.var(0) + 1e-12
    process = reverse.process
    assert isinstance(process, GaussianSDE)
    return process.reverse(Gaussian(mean, spread).model(process), reverse.eta)


@dataclass(eq=False)
class Linearised(SDE):
    """dY = [f(m, t) + J(m, t)(Y - m)] dt + G(m, t) dW along the path dm = f(m, t) dt without noise.

    The linear noise approximation (Gardiner 2009, Stochastic methods, section 6.3): Gaussian, and driven by the noise
    of the problem. f is Ito's.

    Args:
        problem: an SDE.
        start: m at the start, (*event).
        times: of the solve; between them m is interpolated linearly.
    """

    problem: SDE
    start: Tensor
    times: Tensor
    _at: dict[float, tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.noise, self.event, self.t0, self.t1 = self.problem.noise, None, self.problem.t0, self.problem.t1
        self.direction = self.problem.direction
        with torch.no_grad():
            path = solve(_Drift(self.problem), self.start[None], RK4(), grid=self.times, save=True)
        if not bool(path.ok.all()):
            raise ValueError(f"{type(self.problem).__name__} without noise does not reach its end")
        assert path.xs is not None
        self._path = path.xs[:, 0]

    def _terms(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(m, f, J (d, d), G) at a time."""
        if t.ndim:
            raise ValueError("the linearised problem has one time for all samples")
        key = float(t)
        if key not in self._at:
            m = self._centre(key).unsqueeze(0)
            with torch.inference_mode(False):
                jacobian = torch.func.jacrev(lambda x: self.problem.ito_drift(x, t).to(m.dtype))(m)
            d = m.numel()
            f = self.problem.ito_drift(m, t).to(m.dtype)
            g = torch.as_tensor(self.problem.diffusion(m, t)).to(m.dtype)
            if self.noise == "diagonal":
                g = g.expand(m.shape)
            self._at[key] = m, f, jacobian.reshape(d, d).detach(), g
        return self._at[key]

    def _centre(self, t: float) -> Tensor:
        sign = 1.0 if self.times[-1] > self.times[0] else -1.0
        k = int(torch.searchsorted(sign * self.times, sign * torch.tensor(t, dtype=torch.float64)))
        k = min(max(k, 1), len(self.times) - 1)
        before, after = float(self.times[k - 1]), float(self.times[k])
        share = (t - before) / (after - before)
        return self._path[k - 1] + share * (self._path[k] - self._path[k - 1])

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        m, f, jacobian, _ = (v.to(x.dtype) for v in self._terms(t))
        return f + ((x - m).flatten(1) @ jacobian.T).reshape(x.shape)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        g = self._terms(t)[3].to(x.dtype)
        return g.expand(len(x), *g.shape[1:])


class _Drift(ODE):
    def __init__(self, problem: SDE) -> None:
        self.problem, self.t0, self.t1, self.direction = problem, problem.t0, problem.t1, problem.direction

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.problem.ito_drift(x, t)


def gaussian_map(simulation: Simulation, states: Tensor) -> Problem:
    """The Gaussian problem whose noise is the simulation's: of the moments of `states`, or linearised at the start.

    Raises:
        ValueError: there is none; the message says why.
    """
    problem = simulation.problem
    if isinstance(problem, ReverseSDE) and isinstance(problem.process, GaussianSDE) and simulation.start.state is None:
        return fitted_gaussian(problem, states)
    if not isinstance(problem, SDE) or not problem.stochastic:
        raise ValueError("no Gaussian map is known of an ODE that is not the flow of a Gaussian process")
    if simulation.start.state is None:
        raise ValueError("a random start is linearised only under the reversal of a Gaussian process: give control")
    if simulation.to_tolerance or simulation.solver is None:
        raise ValueError("steps to a tolerance are per sample: give control, or steps")
    if simulation.start.state.numel() > 64:
        raise ValueError("the state has more than 64 components: give control")
    times = grid_of(problem, simulation.solver, simulation.steps, simulation.grid, simulation.t_span)
    return Linearised(problem, simulation.start.state, times)


# ---- the law of what it ends in


class _Unanswered(Exception):
    """A solver asked for numbers other than the start's and those of one path."""


@dataclass
class _Given(NoiseSource):
    """Noise whose normals are given, (batch, count): the start's first, then the path's, in order; None for zeros."""

    normals: Tensor | None
    start: int = 0
    path: int = 0

    def bind(self, batch: int, index: int | Tensor | None, device: torch.device | str) -> Noise:
        return _GivenNoise(self, batch, device)


class _GivenNoise(Noise):
    def __init__(self, source: _Given, batch: int, device: torch.device | str) -> None:
        super().__init__(0, batch, device=device)
        self._source, self._batch, self._device, self._walked = source, batch, device, False

    def numbers(self, first: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """(batch, *event) from the first-th on."""
        size, normals = max(1, torch.Size(event).numel()), self._source.normals
        if normals is None:
            return torch.zeros(self._batch, *event, dtype=dtype, device=self._device)
        return normals[:, first : first + size].to(self._device, dtype).reshape(self._batch, *event)

    def normal(self, stream: int, node: int, event: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        if stream != PRIOR or node != 0:
            raise _Unanswered
        self._source.start = max(1, torch.Size(event).numel())
        return self.numbers(0, event, dtype)

    def pairs(
        self, stream: int, words: Tensor, event: tuple[int, ...] | torch.Size, dtype: torch.dtype, *, keep: bool = True
    ) -> Tensor:
        raise _Unanswered

    def write_pairs(self, stream: int, words: Tensor, room: Tensor) -> Tensor:
        raise _Unanswered

    def take(self, rows: Tensor) -> Noise:
        raise _Unanswered

    def other(self, number: int) -> Noise:
        raise _Unanswered

    def walk(
        self,
        times: Tensor,
        event: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        *,
        areas: bool = False,
        lengths: Tensor | None = None,
    ) -> Walk:
        if self._walked:
            raise _Unanswered
        self._walked = True
        own = torch.diff(times).abs() if lengths is None else lengths
        self._source.path = len(own) * (1 + areas) * max(1, torch.Size(event).numel())
        return _GivenWalk(self, own, event, dtype, areas, self._source.start)


class _GivenWalk:
    def __init__(
        self, noise: _GivenNoise, lengths: Tensor, event: tuple[int, ...] | torch.Size, dtype: torch.dtype,
        areas: bool, first: int,
    ) -> None:  # fmt: skip
        self.lengths = lengths
        self._noise, self._event, self._dtype, self._areas, self._first = noise, event, dtype, areas, first
        self._size = max(1, torch.Size(event).numel())
        self._std = lengths.sqrt().tolist()

    def __call__(self, k: int) -> Increment:
        at = self._first + k * (1 + self._areas) * self._size
        w = self._std[k] * self._noise.numbers(at, self._event, self._dtype)
        if not self._areas:
            return Increment(w, None)
        h = self._noise.numbers(at + self._size, self._event, self._dtype)
        return Increment(w, self._std[k] / math.sqrt(12) * h)


@dataclass(frozen=True)
class GaussianLaw:
    """Unit i is the functional of draw i of N(mean, factor factor^T), the exact law of a Gaussian map's result.

    Attributes:
        simulation: of the map.
        ts: saved times; None if the functional is of the end.
        shape: of what the functional sees of a sample.
        mean: flat, float64 (outputs,).
        factor: (outputs, r).
    """

    simulation: Simulation
    ts: Tensor | None
    shape: tuple[int, ...]
    mean: Tensor
    factor: Tensor

    def __call__(self, a: int, b: int) -> Drawn:
        z = Noise(self.simulation.seed, b - a, index=torch.arange(a, b) + CONTROL)
        normals = z.normal(DATA, 0, (self.factor.shape[1],), torch.float64)
        start = self.simulation.start
        out = (self.mean + normals @ self.factor.T).reshape(b - a, *self.shape).to(start.device, start.dtype)
        with torch.no_grad():
            value = (
                self.simulation.functional(out)
                if self.ts is None
                else self.simulation.functional(out.transpose(0, 1).contiguous(), self.ts)
            )
        values = checked_values(value, b - a)
        return Drawn(values, torch.isfinite(values).all(1), 0.0)


def gaussian_law(simulation: Simulation) -> GaussianLaw | None:
    """The exact law of a simulation of a Gaussian map; None where the solver's result is not affine in its normals.

    One solve of as many samples as there are normals, in float64. A solver that draws other numbers than the start's
    and the path's, or chooses its steps by the state, has none.
    """
    if simulation.to_tolerance:
        return None
    simulation = dataclasses.replace(simulation, start=_in_double(simulation.start))
    source = _Given(None)
    try:
        _outputs(simulation, source, 1)
        count = source.start + source.path
        if not 0 < count <= _NORMALS:
            return None
        mixed = Noise(simulation.seed, 4).normal(DATA, 2, (count,), torch.float64)
        asked = torch.cat([torch.zeros(1, count), torch.eye(count), mixed]).to(torch.float64)
        runs, solution = _outputs(simulation, _Given(asked), len(asked))
    except _Unanswered:
        return None
    mean, factor, checks = runs[0], (runs[1:-4] - runs[0]).T, runs[-4:]
    error = (mean + mixed @ factor.T - checks).abs().max()
    if not bool(error <= _ROUNDING * (1 + checks.abs().max())):
        return None
    if factor.shape[1] > factor.shape[0]:  # fewer outputs than normals: a square factor of the covariance
        values, vectors = torch.linalg.eigh(factor @ factor.T)
        factor = vectors * values.clamp(min=0).sqrt()
    shape = tuple(solution.x.shape[1:]) if solution.xs is None else (len(solution.xs), *solution.x.shape[1:])
    return GaussianLaw(simulation, solution.ts, shape, mean, factor)


def _in_double(start: Start) -> Start:
    state = None if start.state is None else start.state.to(torch.float64)
    return dataclasses.replace(start, state=state, dtype=torch.float64)


def _outputs(simulation: Simulation, source: _Given, batch: int) -> tuple[Tensor, Solution]:
    """(flat results (batch, outputs), the solution)."""
    solution = simulation.solution(torch.arange(batch), source)
    kept = solution.x[:, None] if solution.xs is None else solution.xs.transpose(0, 1)
    return kept.flatten(1).to("cpu", torch.float64), solution
