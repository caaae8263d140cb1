"""A problem made ready to run: the network cast and timed, references and targets computed once."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sdeflow.bench import preview
from sdeflow.bench.methods import GRIDS, Job, Method
from sdeflow.bench.problem import Problem
from sdeflow.bench.results import Result
from sdeflow.bench.truth import Reference, Target, reference_of, spread, target_of
from sdeflow.model import Model
from sdeflow.reverse import ReverseSDE
from sdeflow.solution import Solution
from sdeflow.solve import solve

_CPU = torch.device("cpu")
_WIDEST = (torch.float64, torch.float32)


class Timed:
    """A network that adds up the time spent in it."""

    def __init__(self, net: Callable[..., Tensor], device: torch.device = _CPU) -> None:
        self.net, self.seconds, self._device = net, 0.0, device

    def __call__(self, *args: Any, **conditions: Any) -> Tensor:
        _wait(self._device)
        start = time.perf_counter()
        value = self.net(*args, **conditions)
        _wait(self._device)
        self.seconds += time.perf_counter() - start
        return value


class Case:
    """A problem, ready for any method.

    Args:
        dtype: of network and states; the widest that works unless given.
        device: of them. References, targets and comparisons are on the CPU.

    Raises:
        RuntimeError: the network fails when it is called once.
    """

    def __init__(
        self, problem: Problem, seed: int, dtype: torch.dtype | None = None, device: torch.device = _CPU
    ) -> None:
        self.problem, self.seed, self.device = problem, seed, device
        self._model, self.dtype = _in_dtype(problem, seed, (dtype,) if dtype else _WIDEST, device)
        self._timer = Timed(self._model.net, device)
        self._model.net = self._timer
        self._reversals: dict[float, ReverseSDE] = {}
        x = problem.start(problem.samples, seed, self.dtype).to(device)
        self.threads = _best_threads(lambda: _call(self._model, x))

    def reverse(self, eta: float) -> ReverseSDE:
        """The reversal with stochasticity eta."""
        if eta not in self._reversals:
            self._reversals[eta] = self._model.sde.reverse(self._model, eta)
        return self._reversals[eta]

    @cached_property
    def reference(self) -> Reference:
        start = self.problem.start(self.problem.samples, self.seed, self.dtype).to(self.device)
        return reference_of(self.problem, self.reverse(0.0), start)

    @cached_property
    def target(self) -> Target:
        start = self.problem.start(self.problem.draws, self.seed, self.dtype).to(self.device)
        return target_of(self.problem, self.reverse(0.0), start, self.seed)

    def truth_of(self, method: Method) -> Reference | Target:
        """What a method is measured against; computed on first use."""
        return self.target if method.make().draws_noise(self.reverse(method.eta)) else self.reference

    @cached_property
    def default_grid(self) -> str | None:
        """The name of the grid that `steps` alone means; None when it is none of the named ones."""
        flow = self.reverse(0.0)
        default = flow.default_grid(5, *flow.span)
        for name, grid in GRIDS.items():
            try:
                if torch.allclose(grid(flow, 5, *flow.span), default, rtol=1e-9, atol=0):
                    return name
            except ValueError:
                continue
        return None

    def about(self, truth: Reference | Target) -> dict[str, Any]:
        """What the report says of the problem."""
        return {
            "title": self.problem.title or self.problem.name,
            "process": repr(self._model.sde),
            "prediction": self._model.prediction,
            "shape": list(self.problem.shape),
            "default_grid": self.default_grid,
            "threads": self.threads,
            "device": str(self.device),
            "truth": truth.text,
            "floors": truth.floors,
            "preview": preview.data_uri(truth.x, truth.x),
        }

    def run(self, job: Job) -> Result:
        """One run. What the solve raises becomes a failed result.

        Raises:
            Exception: the reference or target could not be computed.
        """
        method = job.method
        solver, problem, truth = method.make(), self.reverse(method.eta), self.truth_of(method)
        result = Result(
            problem=self.problem.name, solver=method.name, grid=job.grid, kind=truth.kind, eta=method.eta,
            budget=job.budget, tolerance=job.tolerance, seed=self.seed, dtype=str(self.dtype).removeprefix("torch."),
            scale=spread(truth.x), about=self.about(truth),
        )  # fmt: skip
        self._timer.seconds = 0.0
        began = time.perf_counter()
        try:
            solution = solve(
                problem, truth.start, solver,
                steps=job.steps, grid=job.times, rtol=job.tolerance, seed=self.seed, throw=False,
            )  # fmt: skip
        except Exception as error:
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return dataclasses.replace(result, status="failed", message=text)
        _wait(self.device)
        wall, inside = time.perf_counter() - began, self._timer.seconds
        solution = dataclasses.replace(solution, x=solution.x.cpu(), status=solution.status.cpu())
        failed = truth.failed(solution)
        return dataclasses.replace(
            result,
            status="failed" if failed else "ok",
            message=solution.failures() if failed else None,
            wall_seconds=wall,
            model_seconds=inside,
            preview=preview.data_uri(solution.x, truth.x),
            **_cost(solution),
            **truth.measure(solution),
        )


def _cost(solution: Solution) -> dict[str, Any]:
    """Calls and steps a sample; the means where samples differ."""
    return {
        name: float(torch.as_tensor(getattr(solution.stats, name), dtype=torch.float64).mean())
        for name in ("nfe", "steps")
    }


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given, so that its time can be taken."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def _call(model: Model, x: Tensor) -> None:
    """The network once, in the middle of its time."""
    model(x, 0.5 * (model.sde.t_min + model.sde.t1), model.prediction)


def _in_dtype(
    problem: Problem, seed: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> tuple[Model, torch.dtype]:
    """A copy of the model whose network runs on the device, in the first of the dtypes that it can.

    Solvers' errors fall below the rounding of a float32 network well before 50 calls.

    Raises:
        RuntimeError: the network fails in all.
    """
    last: Exception | None = None
    for dtype in dtypes:
        model = copy.copy(problem.model)
        x = problem.start(2, seed, dtype).to(device)
        try:
            if isinstance(model.net, torch.nn.Module):
                model.net = copy.deepcopy(model.net).to(device, dtype).eval()
            _call(model, x)
        except Exception as error:
            last = error
        else:
            return model, dtype
    raise RuntimeError(
        f"the network of {problem.name!r} failed on x of shape {tuple(x.shape)}, {dtype} on {device}: "
        f"{type(last).__name__}: {last}"
    ) from last


def _best_threads(work: Callable[[], None]) -> int:
    """1 or torch's own number of threads, whichever runs `work` faster: small tensors gain nothing from more."""
    own = torch.get_num_threads()
    if own == 1:
        return 1
    seconds = {}
    try:
        for threads in (own, 1):
            torch.set_num_threads(threads)
            work()
            began = time.perf_counter()
            for _ in range(3):
                work()
            seconds[threads] = time.perf_counter() - began
    finally:
        torch.set_num_threads(own)
    # a tie goes to one thread: its times vary less
    return own if seconds[own] < 0.8 * seconds[1] else 1
