"""The pilot: every method on a few samples, its cost at equal error beside plain Monte Carlo's.

A method that averages independent terms with variances V_l and costs C_l a unit costs (sum sqrt(V_l C_l))^2 for a
variance of 1 (`sdeflow.expectation.allocation`); the ratio of these is what the same error would cost, whatever the
error. Sobol points gain more the more there are: the pilot's ratio is that of its own few points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sdeflow.expectation.allocation import Term, spread_of
from sdeflow.expectation.antithetic import Pairs
from sdeflow.expectation.control_variate import Controlled, Scaled, slope_of
from sdeflow.expectation.estimate import Candidate, Method
from sdeflow.expectation.gaussian_law import gaussian_law, gaussian_map
from sdeflow.expectation.multilevel import best_start, terms_of
from sdeflow.expectation.plain import Plain
from sdeflow.expectation.regions import CONTROL, PILOT, PILOT_SCRAMBLES
from sdeflow.expectation.simulation import Simulation
from sdeflow.expectation.sobol import REPLICATES, Replicates, skewed_quantile
from sdeflow.expectation.sums import Drawn, Units, concatenated, refuse_failed
from sdeflow.sde import SDE, Problem, noise_shape
from sdeflow.solve_input import grid_of
from sdeflow.solvers.base import Solver

MARGIN = 1.2
"""Another method is taken only if even the low end of its ratio is above this."""
_FREE = 0.01
"""Cost of a unit that makes no model calls, in units of a sample: not 0, so that it is not drawn without end."""


class NotApplicable(ValueError):
    """A method that this problem does not admit; the message says why."""


@dataclass(frozen=True)
class Control:
    """What a control variate is made of.

    Attributes:
        problem: Y's; None for the Gaussian map.
        mean: E f(Y) (k,), or None.
        call_cost: of a call of it, in calls of the problem.
    """

    problem: Problem | None
    mean: Tensor | None
    call_cost: float


@dataclass(frozen=True)
class Prepared:
    """A method that is ready to run, and its row of the pilot's table."""

    row: Candidate
    terms: tuple[Term, ...] = ()
    replicates: Replicates | None = None
    shift: Tensor | None = None
    """A known number (k,) that belongs to the mean."""
    seen: Tensor | None = None
    """The pilot's replicates (R, k), and their means over the first half of their points."""
    first: Tensor | None = None


@dataclass(eq=False)
class Pilot:
    """A few samples of plain Monte Carlo, and what other methods make of as many.

    Attributes:
        simulation: what is simulated.
        size: samples.
        batch: samples at once.
        throw: whether a failed sample is an error.
        calls: model calls made so far.
        failed: of the samples of plain Monte Carlo, how many did.
    """

    simulation: Simulation
    size: int
    batch: int
    throw: bool
    calls: float = 0.0

    def __post_init__(self) -> None:
        values, states = [], []
        oks, calls = [], 0.0
        for a in range(0, self.size, self.batch):
            index = torch.arange(a, min(a + self.batch, self.size)) + PILOT
            solution = self.simulation.solution(index)
            value, nfe = self.simulation.values(solution), solution.stats.nfe
            values.append(value)
            states.append(solution.x)
            oks.append(solution.ok.cpu() & torch.isfinite(value).all(1))
            calls += float(nfe.sum()) if isinstance(nfe, Tensor) else float(nfe) * len(index)
        self.drawn = self._counted(Drawn(torch.cat(values), torch.cat(oks), calls))
        self.failed = int((~self.drawn.ok).sum())
        refuse_failed(self.failed, self.size, self.throw)
        self.states = torch.cat(states)[self.drawn.ok]
        good = self.drawn.values[self.drawn.ok]
        if len(good) < 2:
            raise ArithmeticError("fewer than two samples of the pilot finished")
        self.spread, self.cost = spread_of(self.drawn), max(calls / self.size, 1e-9)
        term = Term("plain", Plain(self.simulation), 1, good.var(0), self.cost, self.spread, self.batch)
        self.plain = Prepared(Candidate("plain", 1.0, 1.0, 1.0, 1.0), (term,))

    def _counted(self, drawn: Drawn) -> Drawn:
        self.calls += drawn.calls
        return drawn

    def _draw(self, units: Units, count: int) -> Drawn:
        ranges = ((a, min(a + self.batch, count)) for a in range(0, count, self.batch))
        return self._counted(concatenated([units(a, b) for a, b in ranges]))

    def _prepared(self, method: Method, terms: Sequence[Term], note: str = "", shift: Tensor | None = None) -> Prepared:
        """The row of a sum of terms: plain Monte Carlo's work over its own."""
        plain = self.plain.terms[0]
        roots = torch.stack([(term.variance * term.cost).sqrt() for term in terms])
        total = roots.sum(0)
        k = int(total.argmax())
        work, base = float(total[k].square()), float((plain.variance * plain.cost).max())
        shares = (roots[:, k] / total[k]).tolist() if work > 0 else [1.0, *[0.0] * (len(terms) - 1)]
        spread = sum(share * term.spread for share, term in zip(shares, terms, strict=True))
        units = torch.stack([(term.variance[k] / term.cost).sqrt() for term in terms]).tolist()
        samples = sum(term.samples * n for term, n in zip(terms, units, strict=True))
        spent = sum(term.cost * n for term, n in zip(terms, units, strict=True))
        cost = spent / samples / self.cost if samples > 0 else 1.0
        return Prepared(
            _row(method, base, work, cost, math.hypot(self.spread, spread), note), tuple(terms), shift=shift
        )

    # ---- the methods

    def antithetic(self) -> Prepared:
        """Opposite pairs."""
        count = max(2, self.size // 2)
        drawn = self._draw(Pairs(self.simulation, PILOT), count)
        refuse_failed(int((~drawn.ok).sum()), count, True)
        units = Pairs(self.simulation)
        variance = drawn.values[drawn.ok].var(0)
        return self._prepared("antithetic", [
            Term("pairs", units, 2, variance, drawn.calls / count, spread_of(drawn), max(1, self.batch // 2))
        ])  # fmt: skip

    def sobol(self, dimension: int) -> Prepared:
        """Scrambled Sobol points for `dimension` leading numbers."""
        simulation = self.simulation
        path = self._is_driven()
        if path and simulation.to_tolerance:
            raise NotApplicable("a path to a tolerance is its own: its leading numbers cannot be given")
        start = min(simulation.start.size, dimension // 2 if path else dimension)
        led = min(dimension - start, self._path_numbers()) if path else 0
        points = max(16, 1 << int(math.log2(max(self.size // REPLICATES, 1))))
        units = Replicates(simulation, points, start, led, self._axes(start), PILOT_SCRAMBLES, self.batch)
        whole, first, failed = units.halves(0, REPLICATES)
        refuse_failed(failed, points * REPLICATES, self.throw)
        self.calls += whole.calls
        variances = whole.values.var(0)
        k = int(variances.argmax())
        plain, each = self.plain.terms[0], whole.calls / (points * REPLICATES)
        # at equal half-width: few replicates have a longer quantile
        longer = float(skewed_quantile(0.95, whole.values)[k]) / 1.96
        work, base = longer**2 * float(variances[k]) * points * each, float((plain.variance * plain.cost).max())
        spread = math.hypot(self.spread, spread_of(whole))
        note = f"{start} numbers of the start, up to {units.path} of the path, {points} points a scramble"
        row = _row("sobol", base, work, each / self.cost, spread, note)
        return Prepared(row, replicates=units, seen=whole.values, first=first)

    def _axes(self, start: int) -> Tensor | None:
        """The leading principal directions of the samples, where a reversal's start has the same components."""
        flat = self.states.flatten(1).to("cpu", torch.float64)
        if start == 0 or self.simulation.start.state is not None or flat.shape[1] != self.simulation.start.size:
            return None
        if len(flat) <= start:
            return None
        axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:start].T
        return axes if axes.shape[1] == start else None

    def _path_numbers(self) -> int:
        """Numbers of the path of one draw of W and H a step: most methods use no more."""
        simulation = self.simulation
        problem, solver = simulation.problem, simulation.solver
        assert isinstance(problem, SDE)
        assert solver is not None
        grid = grid_of(problem, solver, simulation.steps, simulation.grid, simulation.t_span)
        return 2 * (len(grid) - 1) * math.prod(noise_shape(problem, self.states[:1], grid[0])[1:])

    def _is_driven(self) -> bool:
        solver, problem = self.simulation.solver, self.simulation.problem
        return isinstance(problem, SDE) and solver is not None and solver.draws_noise(problem)

    def control(self, control: Control) -> Prepared:
        """The Gaussian map of the same noise, or the problem that was given."""
        simulation = self.simulation
        if control.problem is None:
            try:
                problem = gaussian_map(simulation, self.states)
            except ValueError as error:
                raise NotApplicable(str(error)) from error
        else:
            problem = control.problem
        other = simulation.of(problem)
        x, y = self.drawn, self._draw(_Costing(Plain(other, PILOT), control.call_cost), self.size)
        if x.values.shape != y.values.shape:
            raise ValueError(f"expected a control of {x.values.shape[1]} values a sample, got {y.values.shape[1]}")
        bad = int((~y.ok).sum())
        if bad:
            raise NotApplicable(f"{bad} of {self.size} runs of the control failed, or its functional is not finite")
        slope = slope_of(x, y)
        joint = Drawn(x.values - slope * y.values, x.ok & y.ok, x.calls + y.calls)
        term = Term(
            "difference", Controlled(simulation, other, slope, control.call_cost), 1, joint.values[joint.ok].var(0),
            joint.calls / self.size, spread_of(joint), self.batch,
        )  # fmt: skip
        if control.mean is not None:
            _refuse_mean(control.mean, y)
            return self._prepared("control", [term], "mean of the control given", slope * control.mean)
        law = gaussian_law(other) if control.problem is None else None
        units, cost = (law, 0.0) if law is not None else (Plain(other, CONTROL), control.call_cost)
        note = "its mean from its exact law" if law is not None else "its mean from more runs of it"
        own = Scaled(units, slope, cost)
        each = max(y.calls / self.size if law is None else 0.0, _FREE * self.cost)
        scaled = Drawn(slope * y.values, y.ok, 0.0)
        mean = Term("mean of the control", own, 0, scaled.values[y.ok].var(0), each, spread_of(scaled), self.batch)
        return self._prepared("control", [term, mean], note)

    def multilevel(self, levels: Sequence[tuple[Solver, int]]) -> Prepared:
        """A sum over `levels`, the last of which is the simulation's own."""
        if len(levels) < 2:
            raise NotApplicable("one level only: give steps that can be halved, or levels")
        simulations = [self.simulation.at(solver, steps) for solver, steps in levels]
        drawn = [*self.levels(simulations[:-1]), self.drawn]
        terms = terms_of(simulations, drawn, best_start(simulations, drawn, len(levels) - 2, self.batch), self.batch)
        if not all(bool(torch.isfinite(term.variance).all()) for term in terms):
            raise NotApplicable("samples fail at every coarser level")
        return self._prepared("multilevel", terms, "; ".join(term.name for term in terms))

    def levels(self, simulations: Sequence[Simulation]) -> list[Drawn]:
        """The pilot's samples at other levels; one that fails there only rules the level out."""
        found = []
        for simulation in simulations:
            parts = [
                simulation(torch.arange(a, min(a + self.batch, self.size)) + PILOT)
                for a in range(0, self.size, self.batch)
            ]
            drawn = concatenated(parts)
            self.calls += drawn.calls
            bad = not bool(drawn.ok.all())
            values = torch.full_like(drawn.values, torch.inf) if bad else drawn.values
            found.append(Drawn(values, drawn.ok, drawn.calls))
        return found


@dataclass(frozen=True)
class _Costing:
    """Units whose calls are worth `call_cost` each."""

    units: Units
    call_cost: float

    def __call__(self, a: int, b: int) -> Drawn:
        drawn = self.units(a, b)
        return drawn._replace(calls=self.call_cost * drawn.calls)


def _row(method: Method, base: float, work: float, cost: float, spread: float, note: str) -> Candidate:
    ratio = base / work if work > 0 else (math.inf if base > 0 else 1.0)
    return Candidate(method, 1 / (ratio * cost) if ratio > 0 else math.inf, cost, ratio, ratio / (1 + 2 * spread), note)


def _refuse_mean(mean: Tensor, y: Drawn) -> None:
    """Refuse a mean that the pilot's runs of the control contradict by six standard errors."""
    good = y.values[y.ok]
    if mean.shape != good.shape[1:]:
        raise ValueError(f"expected control_mean of {good.shape[1]} numbers, got shape {tuple(mean.shape)}")
    error, gap = good.std(0) / math.sqrt(len(good)), (good.mean(0) - mean).abs()
    if bool((gap > 6 * error + 1e-6 * (1 + mean.abs())).any()):
        raise ValueError(
            f"control_mean {mean.tolist()} is not that of the control: {len(good)} runs of it have the mean "
            f"{good.mean(0).tolist()}, standard error {error.tolist()}"
        )


def not_tried(method: Method, why: str) -> Candidate:
    """The row of a method that was not run."""
    return Candidate(method, math.nan, math.nan, math.nan, math.nan, why)


def chosen(prepared: Sequence[Prepared]) -> Prepared:
    """Plain Monte Carlo, the first, unless the low end of another's ratio is above `MARGIN`; then the highest."""
    best = max(prepared, key=lambda p: p.row.low)
    return best if best.row.low > MARGIN else prepared[0]


def increasing(levels: Sequence[tuple[Solver, int]]) -> bool:
    """Whether steps do not fall from one level to the next."""
    return all(a[1] <= b[1] for a, b in pairwise(levels))
