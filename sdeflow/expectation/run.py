"""`expect`: E f(X) to a tolerance, or of a number of samples, with a confidence interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from sdeflow.checked import checked, event_shape
from sdeflow.engine.base import Engine
from sdeflow.expectation.allocation import LEAST, Sampled, Term, sample_terms
from sdeflow.expectation.antithetic import Pairs
from sdeflow.expectation.arguments import METHODS, check
from sdeflow.expectation.estimate import Candidate, Expectation, Method, quantile
from sdeflow.expectation.multilevel import best_start, halved, shown, to_the_exact_law
from sdeflow.expectation.multilevel import work as work_of
from sdeflow.expectation.pilot import Control, NotApplicable, Pilot, Prepared, chosen, increasing, not_tried
from sdeflow.expectation.plain import Plain
from sdeflow.expectation.simulation import Functional, Simulation, StartMap, simulation
from sdeflow.expectation.sobol import REPLICATES, Replicates, grown, skewed_quantile
from sdeflow.expectation.sums import Gather, SamplesFailed, refuse_failed
from sdeflow.model import Model
from sdeflow.noise import checked_seed
from sdeflow.plan import Plan
from sdeflow.reverse import Eta
from sdeflow.sde import Problem
from sdeflow.solve_input import Grid, Save
from sdeflow.solvers.base import Solver

_WHOLE: tuple[Method, ...] = ("antithetic", "control", "multilevel")
"""Methods whose units are made of several solves. A unit left out where one of them fails leaves out others that did
not: what remains is not the mean over the samples that finished."""
_CONDITIONAL = "samples failed: the mean over the others is that of plain Monte Carlo or of Sobol points"
_PILOT_LEVELS = 5


@checked
def expect(
    functional: Functional,
    problem: Problem | Model,
    x: Tensor | StartMap | None = None,
    solver: Solver | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    steps: int | None = None,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    t_span: tuple[float, float] | None = None,
    eta: Eta = 0.0,
    save: Save = None,
    tol: float | None = None,
    num: int | None = None,
    confidence: float = 0.95,
    method: Literal["auto", "plain", "antithetic", "sobol", "control", "multilevel"] = "auto",
    seed: int = 0,
    pilot: int = 1024,
    batch: int = 1 << 14,
    max_num: int = 10**8,
    levels: Sequence[int | tuple[Solver, int]] | None = None,
    coarsest: int = 2,
    dimension: int = 64,
    control: Problem | None = None,
    control_mean: Tensor | float | None = None,
    control_cost: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    throw: bool = True,
    engine: Engine | None = None,
) -> Expectation:
    """E f(X) of a sampled or simulated X, with a confidence interval: mean -+ (Student quantile) stderr (+ bias).

    With `steps`, `grid` or `rtol` the interval is about the law of what the solver computes, X_h. With none of them it
    is about the exact law: multilevel Monte Carlo adds levels of twice the steps until its estimate of the bias is
    small, and adds that estimate to the interval.

    Args:
        functional: f(x) of end states (batch, *event), or with `save` f(xs, ts) of saved states (n, batch, *event) at
            times (n,): real values (batch,), or (batch, k) for k expectations at once.
        problem: a `Model`, whose samples are those of `sample`, or an ODE, SDE or ReverseSDE.
        x: start: one state (*event) for all; a function of standard normals (batch, *shape), sample by sample; None
            for the prior of a Model or ReverseSDE, of samples of `shape`.
        solver, steps, grid, rtol, atol, t_span, save: as in `solve`.
        shape: of one sample, or of the normals that x maps.
        eta: stochasticity of the reversal of a Model.
        tol: the half-width of the interval to reach, of the widest component; or
        num: samples to take. One of the two.
        confidence: of each component's interval.
        method: "plain" samples; "antithetic" pairs; "sobol" points for the leading numbers; "control" by a Gaussian map
            of the same noise; "multilevel". "auto" tries all in a pilot and takes plain Monte Carlo unless another is
            cheaper at equal error by a fifth, two standard errors of the pilot allowed for.
        seed: sample i of a seed is the same whatever the others are.
        pilot: samples of it, at least 64. None is run for a `num` of "plain" or "antithetic".
        batch: samples simulated at once.
        max_num: samples after which it ends, not converged.
        levels: of "multilevel": numbers of steps, or (solver, steps), rising; the last is the law that is meant. None
            halves `steps` down to `coarsest`.
        coarsest: fewest steps of a level.
        dimension: numbers that Sobol points lead, at most 21201: components of the start along the principal axes of
            the samples, then nodes of the Brownian tree, the widest first.
        control: a problem with the same noise, start and event whose functional is the control; None for the Gaussian
            map: the same reversal for Gaussian data of the pilot's moments, or the SDE linearised about its path
            without noise.
        control_mean: E f of `control`, if it is known; held against the pilot's runs.
        control_cost: of a call of the control, in calls of the problem. None: 0 beside a network, else 1.
        dtype, device: of the samples, as in `sample`; a start state has its own.
        throw: an ArithmeticError if a sample fails or its functional is not finite. False leaves those out: the mean is
            then conditional on success, and `failed` counts them. Only plain Monte Carlo and Sobol points have that
            mean: where a sample fails, plain takes the place of other methods, and the pilot's row says so.
        engine: where samples are computed after the pilot, `sdeflow.engine.Ray(...)` for instance, a batch an item (but
            for Sobol points, which stay here); in this process unless given. The result is the same.

    Raises:
        ValueError, TypeError: arguments that do not fit, or a method that this problem does not admit.
        ArithmeticError: samples failed.
    """
    check(tol, num, confidence, method, pilot, batch, max_num, coarsest, dimension)
    shape = None if shape is None else event_shape(shape, max(pilot, min(batch, num or batch)))
    made = simulation(
        functional, problem, x, solver, shape=shape, steps=steps, grid=grid, rtol=rtol, atol=atol, t_span=t_span,
        eta=eta, save=save, seed=checked_seed(seed), dtype=dtype, device=device,
    )  # fmt: skip
    if levels is not None and method not in ("auto", "multilevel"):
        raise ValueError(f'levels are those of "multilevel": expected none with method {method!r}')
    if control is not None and method not in ("auto", "control"):
        raise ValueError(f'control belongs to method "control": expected none with {method!r}')
    given = _levels(made, levels, coarsest)
    if given:
        made = made.at(*given[-1])
    run = _Run(made, tol, num, confidence, pilot, batch, max_num, Gather(throw, engine))
    if made.steps is None and made.grid is None and not made.to_tolerance and not isinstance(solver, Plan):
        if method not in ("auto", "multilevel") or tol is None:
            raise ValueError("expected steps, grid or rtol; only multilevel, with tol, chooses the steps itself")
        if control is not None or control_mean is not None:
            raise ValueError("to the exact law only multilevel goes: expected steps, grid or rtol with control")
        with nullcontext() if engine is None else engine:
            try:
                return run.to_the_exact_law(coarsest)
            except SamplesFailed as error:
                if throw:
                    raise
                raise ArithmeticError(f"to the exact law: {_CONDITIONAL}; give steps ({error})") from error
    if not _random(made):
        raise ValueError("nothing is random: the start is one state, and the solver draws no noise")
    if num is not None and method == "multilevel":
        raise ValueError("multilevel divides the samples by a tolerance: expected tol, got num")
    if control_mean is not None and control is None:
        raise ValueError("control_mean is that of a control: expected control with it")
    mean = None if control_mean is None else torch.as_tensor(control_mean, dtype=torch.float64).reshape(-1)
    cost = _control_cost(problem) if control_cost is None else float(control_cost)
    if not (math.isfinite(cost) and cost >= 0):
        raise ValueError(f"expected control_cost >= 0, got {control_cost!r}")
    with nullcontext() if engine is None else engine:
        return run.by(method, Control(control, mean, cost), given, dimension)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The arguments of one call."""

    simulation: Simulation
    tol: float | None
    num: int | None
    confidence: float
    pilot: int
    batch: int
    max_num: int
    gather: Gather

    def by(self, method: str, control: Control, levels: list[tuple[Solver, int]], dimension: int) -> Expectation:
        """By one method, or by the best."""
        if self.num is not None and method == "antithetic":
            return self._pairs()
        if self.num is not None and method == "plain":
            return self._number("plain")
        pilot = Pilot(self.simulation, self.pilot, self.batch, self.gather.throw)
        found, table = [pilot.plain], [pilot.plain.row]
        for name in METHODS[1:]:
            if method not in ("auto", name):
                continue
            if pilot.failed and name in _WHOLE:
                table.append(not_tried(name, _CONDITIONAL))
                continue
            try:
                if name == "multilevel" and self.num is not None:
                    raise NotApplicable("divides the samples by a tolerance, not by num")
                if name == "antithetic":
                    found.append(pilot.antithetic())
                elif name == "sobol":
                    found.append(pilot.sobol(dimension))
                elif name == "control":
                    found.append(pilot.control(control))
                else:
                    found.append(pilot.multilevel(levels))
                table.append(found[-1].row)
            except NotApplicable as error:
                if method != "auto":
                    raise ValueError(f"{name}: {error}") from error
                table.append(not_tried(name, str(error)))
            except SamplesFailed:
                if self.gather.throw:
                    raise
                table.append(not_tried(name, _CONDITIONAL))
        taken = chosen(found) if method == "auto" else found[-1]
        if taken.replicates is not None:
            return self._sobol(taken, taken.replicates, pilot.calls, tuple(table))
        try:
            return self._taken(taken, pilot.calls, table)
        except SamplesFailed as error:
            name = taken.row.method
            if name not in _WHOLE or (self.gather.throw and name != "control"):
                raise
            # of a control it may be the control that failed: plain Monte Carlo tells
            rows = [dataclasses.replace(row, note=_CONDITIONAL) if row.method == name else row for row in table]
            return self._taken(pilot.plain, pilot.calls + error.calls, rows)

    def _taken(self, taken: Prepared, pilot_calls: float, table: Sequence[Candidate]) -> Expectation:
        """By the terms of a method."""
        method = taken.row.method
        sampled = self._terms(taken.terms, self.whole if method in _WHOLE else self.gather)
        levels_shown = shown(taken.terms, sampled) if method == "multilevel" else ()
        return self._result(method, taken.terms, sampled, pilot_calls, tuple(table), levels_shown, taken.shift)

    @property
    def whole(self) -> Gather:
        """For means of which no sample may be left out."""
        return self.gather._replace(throw=True)

    def _number(self, method: Method, pilot_calls: float = 0.0, table: tuple[Candidate, ...] = ()) -> Expectation:
        """Of `num` samples, without a pilot."""
        assert self.num is not None
        units, samples = (Plain(self.simulation), 1) if method == "plain" else (Pairs(self.simulation), 2)
        block, count = max(1, self.batch // samples), max(2, self.num // samples)
        own = (self.whole if method in _WHOLE else self.gather)(units, 0, count, block)
        term = Term(method, units, samples, own.variance, own.calls / count, 0.0, block)
        return self._result(method, [term], Sampled((own,), True), pilot_calls, table)

    def _pairs(self) -> Expectation:
        try:
            return self._number("antithetic")
        except SamplesFailed as error:
            if self.gather.throw:
                raise
            return self._number("plain", error.calls, (not_tried("antithetic", _CONDITIONAL),))

    def _terms(self, terms: Sequence[Term], gather: Gather) -> Sampled:
        if self.tol is not None:
            return sample_terms(terms, self.tol, self.confidence, self.max_num, gather)
        assert self.num is not None
        first = max(2, self.num // terms[0].samples)
        sums = []
        for term in terms:  # the others in the best proportion to the first
            share = (term.variance / term.cost).sqrt() / (terms[0].variance / terms[0].cost).sqrt().clamp(min=1e-300)
            count = first if term is terms[0] else min(max(LEAST, math.ceil(first * float(share.max()))), 100 * first)
            sums.append(gather(term.units, 0, count, term.block))
        return Sampled(tuple(sums), True)

    def _result(
        self, method: Method, terms: Sequence[Term], sampled: Sampled, pilot_calls: float, table: tuple[Candidate, ...],
        levels: tuple = (), shift: Tensor | None = None, bias: Tensor | None = None,
        rates: tuple[float, float] | None = None,
    ) -> Expectation:  # fmt: skip
        mean = sampled.mean if shift is None else sampled.mean + shift
        bias = torch.zeros_like(mean) if bias is None else bias
        half = quantile(self.confidence, sampled.dof) * sampled.stderr + bias
        num = sum(term.samples * own.size for term, own in zip(terms, sampled.sums, strict=True))
        failed = sum(own.failed for own in sampled.sums)
        return self._made(
            mean, sampled.stderr, half, bias, sampled.dof, num=num, failed=failed, calls=sampled.calls,
            pilot_calls=pilot_calls, method=method, table=table, levels=levels, rates=rates,
        )  # fmt: skip

    def _made(
        self, mean: Tensor, stderr: Tensor, half: Tensor, bias: Tensor, dof: Tensor, *, num: int, failed: int,
        calls: float, pilot_calls: float, method: Method, table: tuple[Candidate, ...], levels: tuple = (),
        rates: tuple[float, float] | None = None,
    ) -> Expectation:  # fmt: skip
        one = mean.shape == (1,)
        mean, stderr, half, bias, dof = (v[0] if one else v for v in (mean, stderr, half, bias, dof))
        return Expectation(
            mean=mean, stderr=stderr, bias=bias, interval=(mean - half, mean + half), confidence=self.confidence,
            dof=dof, num=num, failed=failed, nfe=calls + pilot_calls, pilot_nfe=pilot_calls, method=method,
            converged=self.tol is None or float(half.max()) <= self.tol * (1 + 1e-12), tol=self.tol, pilot=table,
            levels=levels, rates=rates,
        )  # fmt: skip

    def _sobol(
        self, prepared: Prepared, units: Replicates, pilot_calls: float, table: tuple[Candidate, ...]
    ) -> Expectation:
        """Replicates of fresh scrambles, of more points each time that the interval is too long.

        The interval is that of the last ones alone: what was seen before does not condition it.
        """
        if self.tol is None:
            assert self.num is not None
            points = 1 << int(math.log2(max(1, self.num // REPLICATES)))
        else:
            assert prepared.seen is not None
            assert prepared.first is not None
            points = self._more(units.points, prepared.seen, prepared.first)
        most = max(1, 1 << int(math.log2(max(1, self.max_num // REPLICATES))))
        calls, num, failed, offset = 0.0, 0, 0, 0
        while True:
            points = min(points, most)
            units = units.of(points, offset)
            drawn, first, bad = units.halves(0, REPLICATES)
            calls, num, failed = calls + drawn.calls, num + points * REPLICATES, failed + bad
            refuse_failed(failed, num, self.gather.throw)
            values = drawn.values[drawn.ok]
            if len(values) < 2:
                raise ArithmeticError("all points of all scrambles but one failed")
            stderr = (values.var(0) / len(values)).sqrt()
            dof = torch.full_like(stderr, len(values) - 1.0)
            half = skewed_quantile(self.confidence, values) * stderr
            if self.tol is None or float(half.max()) <= self.tol or num + 2 * points * REPLICATES > self.max_num:
                return self._made(
                    values.mean(0), stderr, half, torch.zeros_like(half), dof, num=num, failed=failed, calls=calls,
                    pilot_calls=pilot_calls, method="sobol", table=table,
                )  # fmt: skip
            points = max(2 * points, self._more(points, values, first[drawn.ok]))
            offset += REPLICATES

    def _more(self, points: int, values: Tensor, first: Tensor) -> int:
        """Points a replicate that the tolerance wants, after replicates (R, k) and their first halves."""
        assert self.tol is not None
        half = skewed_quantile(self.confidence, values) * (values.var(0) / len(values)).sqrt()
        k = int(half.argmax())
        wanted = (self.tol / float(half[k])) ** 2 * float(values[:, k].var()) if float(half[k]) > 0 else 1.0
        return grown(points, float(values[:, k].var()), float(first[:, k].var()), wanted)

    def to_the_exact_law(self, coarsest: int) -> Expectation:
        """Multilevel, with as many levels as the bias needs."""
        assert self.tol is not None
        solver = self.simulation.solver
        assert solver is not None
        levels = [self.simulation.at(solver, coarsest << l) for l in range(_PILOT_LEVELS)]
        if not _random(levels[0]):
            raise ValueError("nothing is random: the start is one state, and the solver draws no noise")
        pilot = Pilot(levels[-1], self.pilot, self.batch, True)
        drawn = [*pilot.levels(levels[:-1]), pilot.drawn]
        first = best_start(levels, drawn, _PILOT_LEVELS - 3, self.batch)
        found = to_the_exact_law(
            levels, drawn, first, self.tol, self.confidence, self.max_num, self.batch, self.whole
        )  # fmt: skip
        terms, sums = found.terms, found.sampled.sums
        # plain Monte Carlo at the last level's steps: its cost, and the pilot's variance, which hardly depends on them
        plain = float((pilot.plain.terms[0].variance).max()) * sums[-1].calls / sums[-1].size * 2 / 3
        own = [
            dataclasses.replace(t, variance=s.variance, cost=s.calls / s.size) for t, s in zip(terms, sums, strict=True)
        ]
        ratio = plain / work_of(own) if work_of(own) > 0 else math.inf
        note = f"{len(terms)} levels; plain Monte Carlo would take the finest level's steps"
        row = Candidate("multilevel", math.nan, math.nan, ratio, ratio / (1 + 2 * pilot.spread), note)
        return self._result(
            "multilevel", terms, found.sampled, pilot.calls, (pilot.plain.row, row), shown(terms, found.sampled),
            bias=found.bias, rates=found.rates,
        )  # fmt: skip


def _levels(
    made: Simulation, levels: Sequence[int | tuple[Solver, int]] | None, coarsest: int
) -> list[tuple[Solver, int]]:
    """(solver, steps) of each level, the finest last; empty where there are none."""
    solver = made.solver
    fixed = solver is not None and not isinstance(solver, Plan) and not made.to_tolerance
    fixed = fixed and (made.grid is None or callable(made.grid))
    if levels is None:
        if not fixed or made.steps is None or solver is None:
            return []
        return [(solver, n) for n in halved(made.steps, coarsest)]
    if not fixed or solver is None:
        raise ValueError("levels are numbers of steps: expected a solver on a default grid or a grid function")
    found = [(solver, level) if isinstance(level, int) else (level[0], level[1]) for level in levels]
    if len(found) < 2 or not increasing(found):
        raise ValueError(f"expected at least two levels of rising steps, got {list(levels)}")
    if made.steps is not None and made.steps != found[-1][1]:
        raise ValueError(f"the last level is the law that is meant: expected steps={found[-1][1]}, got {made.steps}")
    return found


def _random(made: Simulation) -> bool:
    if made.start.state is None:
        return True
    return made.problem.stochastic or (made.solver is not None and made.solver.draws_noise(made.problem))


def _control_cost(problem: object) -> float:
    return 0.0 if isinstance(problem, Model) and isinstance(problem.net, torch.nn.Module) else 1.0
