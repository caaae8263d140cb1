"""The solvers of torchsde.

They are driven below `torchsde.sdeint`, by its method's own `step` and `integrate`: each call of sdeint evaluates the
problem once more to look at shapes, may draw from torch's global generator for it, and has one step size for a whole
grid, whose sum in floating point can fall short of the end and leave one more step.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.interop import flat_diffusion
from sdeflow.noise import Noise, fresh_seed
from sdeflow.pid import PID
from sdeflow.sde import SDE, Problem, noise_shape
from sdeflow.solution import Solution, State, Status
from sdeflow.solvers.backends.shared import Backend, Drift, March, Span, StepLimit, stats_of, unsaved, verdict
from sdeflow.solvers.base import Stepper


@dataclass(frozen=True)
class _Method:
    """What a method integrates, and what it asks of the Brownian motion."""

    interpretations: tuple[str, ...]
    general: bool = True
    areas: str = "none"


_ITO, _STRATONOVICH = ("ito",), ("stratonovich",)
_METHODS = {
    "euler": _Method(_ITO),
    "milstein": _Method(_ITO + _STRATONOVICH, general=False),
    "srk": _Method(_ITO, general=False, areas="space-time"),
    "euler_heun": _Method(_STRATONOVICH),
    "heun": _Method(_STRATONOVICH),
    "midpoint": _Method(_STRATONOVICH),
    "reversible_heun": _Method(_STRATONOVICH),
    "log_ode": _Method(_STRATONOVICH, areas="foster"),
}


@checked_class
@dataclass(frozen=True)
class Torchsde(Backend):
    """A method of torchsde (Li et al. 2020, Scalable gradients for SDEs): `pip install 'sdeflow[peers]'`.

    For Ito equations "euler", "milstein", "srk"; for Stratonovich equations "euler_heun", "heun", "midpoint",
    "milstein", "reversible_heun", "log_ode"; any of them for additive noise, where the two are one (the processes of
    this library, and where `additive` is declared). "milstein" and "srk" otherwise take diagonal noise only, and take
    each component of it to depend on its own component of x alone. States of any event shape are flattened; "log_ode"
    forms areas (batch, m, m) of the m noise components. Gradients flow.

    Calls a step: 1; 2 for "heun", "midpoint", "log_ode"; 10 for "srk", which evaluates its stages anew for each later
    one, 3 for additive noise; "reversible_heun" adds one at the start.

    The noise is torchsde's: a function of the seed, the indices and the span, but also of the batch's shape and of the
    steps. Other samples beside it change a sample's path, and runs on two grids do not see the same path.

    To a tolerance (rtol, atol), each step is compared with two halves, three times the calls; saved times end steps.
    "euler" then needs additive noise: otherwise it may converge to the solution of another equation (Gaines and Lyons
    1997). The solve runs in one go: `iterate` yields the start and the end.

    Args:
        method: one of the above.
        first_step: to a tolerance, the first step's size.
        min_step: to a tolerance, a step below it ends the solve with `Status.STEP_UNDERFLOW`.
    """

    method: str = "srk"
    first_step: float = 1e-3
    min_step: float = 1e-5

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"Torchsde: expected one of {', '.join(_METHODS)}, got {self.method!r}")
        if not 0 < self.min_step <= self.first_step:
            raise ValueError(f"{self.name}: expected 0 < min_step <= first_step, got {self!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"torchsde {self.method}"

    def check(self, problem: Problem) -> None:
        if not isinstance(problem, SDE):
            raise ValueError(
                f"{self.name} needs an SDE, got {type(problem).__name__}, which has no diffusion: "
                "use Torchdiffeq, or a solver of ours such as Heun"
            )
        fitting = [name for name, method in _METHODS.items() if _fits(method, problem)]
        if self.method not in fitting:
            kind = problem.interpretation.capitalize()
            raise ValueError(
                f"{self.name} does not fit {type(problem).__name__}, {_article(kind)} equation with {problem.noise} "
                f"noise: expected one of {', '.join(fitting)}"
            )
        _torchsde()

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        assert isinstance(problem, SDE)
        self._check_noise(noise)
        return _GridRun(self, problem, x, grid, noise)

    def march(
        self, problem: Problem, x: Tensor, t_span: Span, control: PID, save: Tensor | None, noise: Noise | None = None
    ) -> March:
        assert isinstance(problem, SDE)
        if self.method == "euler" and not _additive(problem):
            raise ValueError(
                f"{self.name} to a tolerance needs additive noise (a diffusion that does not depend on x): "
                "use milstein or srk, or steps or a grid"
            )
        self._check_noise(noise)
        if noise is None and problem.stochastic:
            noise = Noise(fresh_seed(), x.shape[0], device=x.device)
        return _AdaptiveRun(self, problem, x, t_span, control, save, noise)

    def _check_noise(self, noise: Noise | None) -> None:
        if noise is not None and (type(noise) is not Noise or noise.one_path or noise._sign is not None):
            raise ValueError(f"{self.name} makes its own Brownian path, torchsde's: expected a seed, not a noise")


def _torchsde() -> Any:
    try:
        return importlib.import_module("torchsde")
    except ImportError as error:
        raise ImportError("Torchsde needs torchsde: pip install 'sdeflow[peers]'") from error


def _article(kind: str) -> str:
    return f"{'an' if kind == 'Ito' else 'a'} {kind}"


def _additive(problem: SDE) -> bool:
    """Whether the diffusion is known not to depend on x: Ito and Stratonovich are then the same."""
    if problem.additive:
        return True
    start = torch.tensor([problem.span[0]], dtype=torch.float64)
    return problem.scalar_diffusion(start) is not None


def _fits(method: _Method, problem: SDE) -> bool:
    if _additive(problem):
        return True
    return problem.interpretation in method.interpretations and (method.general or problem.noise == "diagonal")


@contextmanager
def _recordable() -> Iterator[None]:
    """Out of inference mode, in which "milstein" and "log_ode" could not differentiate the diffusion."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _usable(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x


class _Equation:
    """The problem as torchsde calls it: flat states (batch, channels) on an ascending clock s = t or -t."""

    def __init__(self, solver: Torchsde, problem: SDE, x: Tensor, t_span: Span) -> None:
        self.method = solver.method
        additive = _additive(problem) and self.method in ("srk", "milstein")  # which have cheaper formulas for it
        self.noise_type = "additive" if additive else problem.noise
        types = _METHODS[self.method].interpretations
        self.sde_type = problem.interpretation if problem.interpretation in types else types[0]
        self.sign = 1.0 if t_span[1] > t_span[0] else -1.0
        self.span = self.sign * t_span[0], self.sign * t_span[1]
        # 16-bit states are stepped in float32: their 8 to 11 bits would swallow the increments
        self._work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        self.drift = Drift(problem, x, t_span, self._work)
        self._problem, self._shape, self._dtype, self._device = problem, x.shape, x.dtype, x.device
        self._low, self._high = min(t_span), max(t_span)
        if additive and problem.noise == "diagonal":  # torchsde then needs no matrices (batch, channels, channels)
            self.g_prod = self._scaled
        start = torch.tensor(t_span[0], dtype=torch.float64)
        self._channels = math.prod(noise_shape(problem, x, start)[1:])
        # whether the caller differentiates: through x, or through parameters of the problem
        self._recorded = x.requires_grad or self.g(self.sign * start, self.flat(x)).requires_grad

    def flat(self, x: Tensor) -> Tensor:
        return _usable(x).reshape(self._shape[0], -1).to(self._work)

    def state(self, y: Tensor) -> Tensor:
        return y.reshape(self._shape).to(self._dtype)

    def settled(self, y: Tensor) -> Tensor:
        """y after a step, without the graph that "milstein" and "log_ode" leave of a problem that has none."""
        return y if self._recorded else y.detach()

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        value = self.drift(self.sign * s, y.reshape(self._shape)).reshape(y.shape)
        self._recorded |= value.requires_grad
        return self.sign * value

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        t = (self.sign * s).clamp(self._low, self._high)
        return flat_diffusion(self._problem, self.state(y), t).to(self._work)

    def _scaled(self, s: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.g(s, y) * v

    def path(self, noise: Noise | None, h: float | None) -> Any:
        """torchsde's Brownian motion for this equation, for steps of about h."""
        return _torchsde().BrownianInterval(
            *self.span, (self._shape[0], self._channels), self._work, self._device, entropy=_entropy(noise), dt=h,
            levy_area_approximation=_METHODS[self.method].areas,
        )  # fmt: skip


def _entropy(noise: Noise | None) -> int:
    """A number of 128 bits from the seed and the indices, so that the parts of a split batch see different noise."""
    if noise is None:  # a diffusion of 0
        return 0
    seed = (noise.seed % 2**64).to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(noise.index.cpu().numpy().tobytes(), key=seed, digest_size=16).digest())


def _driver(solver: Torchsde, equation: _Equation, path: Any, control: PID | None) -> Any:
    """torchsde's solver object: its `step` makes one step, its `integrate` solves to a tolerance."""
    base = importlib.import_module("torchsde._core.base_sde")
    method = importlib.import_module("torchsde._core.methods").select(solver.method, equation.sde_type)
    # dt_min 0: at its own minimum torchsde goes on, whatever the error
    return method(
        sde=base.ForwardSDE(equation), bm=path, dt=solver.first_step, dt_min=0.0, options={},
        adaptive=control is not None, rtol=control and control.rtol, atol=control and control.atol,
    )  # fmt: skip


class _GridRun:
    def __init__(self, solver: Torchsde, problem: SDE, x: Tensor, grid: Tensor, noise: Noise | None) -> None:
        with _recordable():
            start, end = float(grid[0]), float(grid[-1])
            self._equation = _Equation(solver, problem, x, (start, end))
            path = self._equation.path(noise, abs(end - start) / (grid.numel() - 1))
            self._driver = _driver(solver, self._equation, path, None)
            self._clock = (self._equation.sign * _usable(grid)).unbind()
        self._y = self._returned = torch.empty(0)
        self._memory: tuple[Tensor, ...] = ()

    @property
    def calls(self) -> int:
        return self._equation.drift.calls

    def step(self, i: int, x: Tensor) -> Tensor:
        start, end = self._clock[i : i + 2]
        with _recordable():
            # unless somebody changed the state, a 16-bit one goes on from what was computed, not from its rounding,
            # and "reversible_heun" from its memory
            if x is not self._returned:
                self._y = self._equation.flat(x)
                self._memory = self._driver.init_extra_solver_state(start, self._y)
            y, self._memory = self._driver.step(start, end, self._y, self._memory)
            self._y = self._equation.settled(y)
            self._returned = self._equation.state(self._y)
        return self._returned


class _Underflow(Exception):
    pass


class _Attempts:
    """torchsde's `step`, which it calls for a whole step and then for its two halves, with what happens.

    Attributes:
        made, accepted: attempts.
        s, y: the start of the attempt under way, which is the last accepted state.
        h: the size of the last attempt that `end` did not cut short; None before it.
        bad: the samples that an attempt, then the last, made infinite or NaN, bool (batch,).
        end: where torchsde integrates to.
    """

    def __init__(self, step: Callable[..., Any], equation: _Equation, y: Tensor, min_step: float, limit: int) -> None:
        self.made = self.accepted = 0
        self.s, self.y = equation.span[0], y
        self.h: float | None = None
        self.bad = torch.zeros(y.shape[0], dtype=torch.bool, device=y.device)
        self.end = equation.span[0]
        self._step, self._equation, self._min_step, self._limit = step, equation, min_step, limit
        self._calls = 0

    def __call__(self, s0: Tensor, s1: Tensor, y: Tensor, memory: Any) -> Any:
        if self._calls % 3 == 0:
            self._begin(float(s0), float(s1), y)
        self._calls += 1
        result, memory = self._step(s0, s1, y, memory)
        self.bad = self.bad | ~torch.isfinite(result.detach()).all(1)
        return self._equation.settled(result), memory

    def _begin(self, start: float, end: float, y: Tensor) -> None:
        self.accepted += start > self.s
        self.s, self.y = start, y
        if self.made >= self._limit:
            raise StepLimit
        if end < self.end:
            self.h = end - start
            if self.h < self._min_step:
                raise _Underflow
        self.made += 1


class _AdaptiveRun:
    def __init__(
        self, solver: Torchsde, problem: SDE, x: Tensor, t_span: Span, control: PID, save: Tensor | None,
        noise: Noise | None,
    ) -> None:  # fmt: skip
        with _recordable():
            self._equation = _Equation(solver, problem, x, t_span)
            self._driver = _driver(solver, self._equation, self._equation.path(noise, None), control)
            self._xs = unsaved(save, x)
            start = self._equation.flat(x)
        self._attempts = _Attempts(self._driver.step, self._equation, start, solver.min_step, control.max_steps)
        self._driver.step = self._attempts
        self._x, self._t, self._span, self._save, self._noise = x, t_span[0], t_span, save, noise
        self._status: Tensor | None = None

    @property
    def state(self) -> State:
        return State(self._x, self._t, self._attempts.made, None)

    @property
    def done(self) -> bool:
        return self._status is not None

    def advance(self) -> None:
        """The whole solve."""
        with _recordable():
            try:
                self._integrate()
            except StepLimit:
                self._fail(Status.STEP_LIMIT)
            except _Underflow:
                self._fail(Status.STEP_UNDERFLOW)
            except AssertionError as error:
                if not str(error).startswith("Found nans in the error estimate"):
                    raise
                self._fail(Status.STEP_UNDERFLOW)

    def _integrate(self) -> None:
        """To the end by way of the saved times, each of which ends a step: torchsde draws a line through its steps."""
        equation, attempts, driver = self._equation, self._attempts, self._driver
        saved = [] if self._save is None else self._save.tolist()
        times = sorted({*self._span, *saved}, reverse=equation.sign < 0)
        clock = equation.sign * torch.tensor(times, dtype=torch.float64)
        self._record()
        y, memory = attempts.y, driver.init_extra_solver_state(clock[0], attempts.y)
        for i, t in enumerate(times[1:]):
            attempts.end = float(clock[i + 1])
            path, memory = driver.integrate(y, clock[i : i + 2], memory)
            y, driver.dt = path[-1], driver.dt if attempts.h is None else attempts.h
            self._x, self._t = equation.state(y), t
            self._record()
        attempts.accepted += 1
        self._status = verdict(self._x, Status.FINISHED)

    def _record(self) -> None:
        if self._xs is not None and self._save is not None:
            self._xs[self._save == self._t] = self._x

    def _fail(self, status: Status) -> None:
        attempts = self._attempts
        self._x, self._t = self._equation.state(attempts.y), self._equation.sign * attempts.s
        self._status = verdict(self._x, status, attempts.bad)

    def solution(self) -> Solution:
        assert self._status is not None
        made, accepted = self._attempts.made, self._attempts.accepted
        stats = stats_of(self._equation.drift.calls, accepted, made - accepted)
        seed = None if self._noise is None else self._noise.seed
        return Solution(x=self._x, ts=self._save, xs=self._xs, status=self._status, stats=stats, seed=seed)
