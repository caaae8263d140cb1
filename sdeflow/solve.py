"""`iterate`, the only loop, and `solve`, which drains it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from sdeflow.captured import Captured
from sdeflow.checked import checked
from sdeflow.control import Adaptive, FixedGrid
from sdeflow.control_sde import AdaptivePath
from sdeflow.gradients import Gradient, Record, check_gradient, new_record
from sdeflow.noise import Noise, NoiseSource, Seeded, fresh_seed
from sdeflow.pid import PID
from sdeflow.sde import SDE, Problem
from sdeflow.solution import Solution, SolveError, State
from sdeflow.solve_input import (
    Grid,
    Save,
    check_noise,
    check_types,
    checked_span,
    grid_of,
    save_points,
    save_times,
)
from sdeflow.solvers.backends import Backend, March
from sdeflow.solvers.base import Solver
from sdeflow.solvers.gaussian_split import GaussianSplit
from sdeflow.solvers.runge_kutta import for_tolerance
from sdeflow.solvers.stochastic import AdaptiveStochasticSolver


@checked
def solve(
    problem: Problem,
    x: Tensor,
    solver: Solver | None = None,
    *,
    steps: int | None = None,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    t_span: tuple[float, float] | None = None,
    seed: int | None = None,
    index: int | Tensor | None = None,
    noise: NoiseSource | None = None,
    save: Save = None,
    progress: bool = False,
    throw: bool = True,
    max_steps: int = 100_000,
    gradient: Gradient = "direct",
    compiled: bool = False,
) -> Solution:
    """Integrate `problem` from `x` with `solver`, on a grid or to a tolerance.

    Gradients flow through the solve if torch records them; wrap it in `torch.no_grad()` otherwise.

    Args:
        problem: an `ODE`, `SDE` or `ReverseSDE`.
        x: start states (batch, *event), floating point; dtype and device are kept.
        solver: a solver, such as `sf.solvers.Heun()`, or a `Plan`; with a tolerance, None is
            `sf.solvers.for_tolerance`: Tsit5 or DOP853.
        steps: number of steps; alone, on the problem's default grid.
        grid: times (steps + 1,) from start to end, or a grid function with `steps`.
        rtol, atol: per-sample error control (solvers with an error estimate); one given sets both.
        t_span: (start, end) instead of the problem's own span.
        seed: of the noise; None draws one from torch's generator (it is in the solution).
        index: the samples' indices in the noise: an offset, or one a sample.
        noise: instead of a seed: `SamePath(seed)`, one Brownian path for every grid and every solver;
            `Antithetic(seed)`, pairs of opposite paths; `RecordedPath(times, values)`, a path of your own.
        save: True for every grid point, or times: grid points on a grid; any times with a tolerance
            (dense output).
        progress: show a progress bar (needs tqdm).
        throw: raise `SolveError` when a sample fails; False returns a status per sample.
        max_steps: attempts a sample may make under error control.
        gradient: how gradients get through: "direct" by torch's record of all steps; "checkpointed" in memory of
            O(sqrt(steps)), on a grid; "adjoint" in memory that does not grow with the steps, by undoing the steps of
            a reversible method or by the adjoint equation of an ODE (`sdeflow.gradients`). The last two are of first
            order only.
        compiled: run by `torch.compile`, the drift or network inside: blocks of up to ten steps of a deterministic
            plan on a grid; each attempted step of an explicit Runge-Kutta pair to a tolerance. Takes 10 to 60 seconds
            the first time and pays for models so cheap that launching operations is what costs.

    Raises:
        ValueError, TypeError: input that cannot be solved; before the first model call.
        SolveError: a sample failed and `throw` is set; it carries the solution.
        RuntimeError: `compiled`, and the drift does not compile or there is no C++ compiler.
    """
    before = _network_calls(problem)  # before the march is made: one to a tolerance makes its first call then
    to_tolerance = rtol is not None or atol is not None
    if solver is None:
        if not to_tolerance:
            raise TypeError("expected a solver such as sf.solvers.Heun(), got None: only a tolerance chooses one")
        solver = for_tolerance(_either(rtol, atol) or _either(atol, rtol) or 1.0)
    lean = gradient != "direct" and torch.is_grad_enabled()
    if gradient != "direct":
        if compiled and not to_tolerance:
            raise ValueError(
                f'compiled=True on a grid records no gradients: expected gradient="direct", got {gradient!r}'
            )
        check_types(problem, x, solver)
        check_gradient(gradient, problem, solver, to_tolerance)
    with torch.set_grad_enabled(torch.is_grad_enabled() and gradient != "adjoint"):
        start = x.detach() if lean else x
        march = _march(
            problem, start, solver, steps, grid, rtol, atol, t_span, seed, index, noise, save, max_steps, compiled
        )
    record: Record | None = None
    run = _run(march)
    if lean:
        control = {"rtol": rtol, "atol": atol, "max_steps": max_steps} if to_tolerance else {}
        calls = _network_calls(problem)
        record = new_record(gradient, problem, x, solver, march, checked_span(problem, t_span), control)
        before += _network_calls(problem) - calls
        run = record.watch(run)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not lean):
        for _ in _with_progress(run, march) if progress else run:
            pass
    solution = march.solution()
    if record is not None:
        solution = record.attach(solution)
    made = _network_calls(problem) - before if problem.models() else solution.stats.calls
    solution = dataclasses.replace(solution, stats=dataclasses.replace(solution.stats, network_calls=made))
    if throw and not bool(solution.ok.all()):
        raise SolveError(solution)
    return solution


@checked
def iterate(
    problem: Problem,
    x: Tensor,
    solver: Solver,
    *,
    steps: int | None = None,
    grid: Grid | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    t_span: tuple[float, float] | None = None,
    seed: int | None = None,
    index: int | Tensor | None = None,
    noise: NoiseSource | None = None,
    max_steps: int = 100_000,
) -> Iterator[State]:
    """The states of `solve`, one after each step (the start first); arguments as there.

    A preview, an early stop or a checkpoint is a loop over it. Input is checked at the call.
    """
    march = _march(problem, x, solver, steps, grid, rtol, atol, t_span, seed, index, noise, None, max_steps)
    return (reached.state for reached in _run(march))


def _run(march: March) -> Iterator[March]:
    yield march
    while not march.done:
        march.advance()
        yield march


def _network_calls(problem: Problem) -> int:
    """Calls of networks so far by the models of a problem; models bound from one share its count."""
    models = problem.models() if isinstance(problem, Problem) else ()  # `_march` refuses what is none
    return sum({id(model._counter): model.nfe for model in models}.values())


def _with_progress(run: Iterator[March], march: March) -> Iterator[March]:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    total = march.state.steps
    with tqdm(total=total, unit="step") as bar:
        for _ in run:
            bar.update(march.state.step - bar.n)
            yield march


# ---- checks, all before the first model call


def _march(
    problem: Problem,
    x: Tensor,
    solver: Solver,
    steps: int | None,
    grid: Grid | None,
    rtol: float | None,
    atol: float | None,
    t_span: tuple[float, float] | None,
    seed: int | None,
    index: int | Tensor | None,
    noise: NoiseSource | None,
    save: Save,
    max_steps: int,
    compiled: bool = False,
) -> March:
    check_types(problem, x, solver)
    check_noise(noise, seed)
    to_tolerance = rtol is not None or atol is not None
    if compiled and to_tolerance and solver.pair is None:
        raise ValueError("compiled=True to a tolerance takes a solver with an embedded pair, such as Tsit5")
    problem.check_batch(x.shape[0])
    solver.check(problem)
    if to_tolerance:
        if steps is not None or grid is not None:
            raise ValueError("expected steps or grid, or rtol and atol, not both")
        control = PID(_either(rtol, atol), _either(atol, rtol), max_steps)
        span = checked_span(problem, t_span)
        if isinstance(solver, Backend):
            bound = _bind(noise, seed, x, index) if solver.draws_noise(problem) else None
            return solver.march(problem, x, span, control, save_times(save, span, x.device), bound)
        if isinstance(solver, GaussianSplit):
            return solver.march(problem, x, span, control, save_times(save, span, x.device))
        if isinstance(solver, AdaptiveStochasticSolver):
            return _path_march(
                problem,
                x,
                solver,
                span,
                solver.control(control.rtol, control.atol, max_steps),
                seed,
                index,
                noise,
                save,
            )
        pair = solver.pair
        if pair is None:
            raise ValueError(f"{solver.name} has no error estimate: expected steps or grid, got rtol/atol")
        if save is not None and save is not False and pair.dense is None:
            raise ValueError(
                f"{solver.name} has no dense output: expected save=None, or a grid through the times to save"
            )
        return Adaptive(pair, problem, x, span, control, save_times(save, span, x.device), compiled)
    ts = grid_of(problem, solver, steps, grid, t_span)
    if compiled:
        return FixedGrid(Captured(solver), problem, x, ts, None, save_points(save, ts))
    bound = _bind(noise, seed, x, index) if solver.draws_noise(problem) else None
    return FixedGrid(solver, problem, x, ts, bound, save_points(save, ts))


def _path_march(
    problem: Problem,
    x: Tensor,
    solver: AdaptiveStochasticSolver,
    span: tuple[float, float],
    control: PID,
    seed: int | None,
    index: int | Tensor | None,
    noise: NoiseSource | None,
    save: Save,
) -> March:
    assert isinstance(problem, SDE)
    if save is not None and save is not False:
        raise ValueError(
            f"{solver.name} to a tolerance keeps only the end: between its steps a path is not interpolated; "
            "for times in between solve on a grid through them"
        )
    bound = _bind(noise, seed, x, index)
    if type(bound) is not Noise:
        raise ValueError(f"a solve to a tolerance asks for any interval of its path: expected seed, got {noise!r}")
    return AdaptivePath(solver, problem, x, span, control, bound)


def _bind(noise: NoiseSource | None, seed: int | None, x: Tensor, index: int | Tensor | None) -> Noise:
    if noise is None:
        noise = Seeded(fresh_seed() if seed is None else seed)
    return noise.bind(x.shape[0], index, x.device)


def _either(given: float | None, other: float | None) -> float:
    """One tolerance given sets both."""
    value = other if given is None else given
    assert value is not None
    return value
