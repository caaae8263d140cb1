"""What a solver is: frozen data that says which view of a problem it needs and how to step it."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from sdeflow.kept import Kept, bits, constant
from sdeflow.noise import Noise
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem

if TYPE_CHECKING:
    from sdeflow.plan import Plan

View = Literal["drift", "transition"]


class Stepper(Protocol):
    """One solve on a fixed grid, ready to run: the memory of a multistep method lives here."""

    @property
    def calls(self) -> int:
        """Evaluations made so far."""
        ...

    def step(self, i: int, x: Tensor) -> Tensor:
        """The state at grid[i + 1] from the state `x` at grid[i]; steps are taken in order."""
        ...


Memory = dict[Hashable, Tensor]
"""What a stepper keeps between steps: past evaluations, a second state."""


@runtime_checkable
class Replayable(Protocol):
    """A stepper whose steps can be made again from any step that it has passed (`sdeflow.gradients`)."""

    calls: int

    def step(self, i: int, x: Tensor) -> Tensor: ...

    def remember(self) -> Memory:
        """What the next step needs besides its state; empty at the start and for one-step methods."""
        ...

    def restore(self, memory: Memory, x: Tensor) -> None:
        """Go on from such a memory, or from equal tensors, with the state `x` that belongs to it."""
        ...


Pull = Callable[[Sequence[Tensor], Tensor, Sequence[Tensor | None]], Tensor]
"""`pull(outputs, leaf, cotangents)`: the cotangent of `leaf`; those of parameters are added up where it was made."""


@runtime_checkable
class Undoable(Protocol):
    """A stepper whose solve can be undone step by step from its end."""

    def gradient(self, given: dict[int, Tensor], pull: Pull) -> Tensor:
        """The gradient of the start, from those `given` of the states at places of the grid, after the last step."""
        ...


Evaluate = Callable[[Tensor, Tensor], Tensor]
"""`evaluate(x, s)`: one evaluation of every sample x (batch, *event) at its clock s (batch,)."""

Norm = Callable[..., Tensor]


class Interpolant(Protocol):
    """The states inside a step of a pair."""

    def stages(self, evaluate: Evaluate, x: Tensor, s: Tensor, h: Tensor, stages: list[Tensor]) -> list[Tensor]:
        """The evaluations of a step, with those that only the states inside it need."""
        ...

    def state(self, x: Tensor, h: Tensor, theta: Tensor, stages: list[Tensor]) -> Tensor:
        """The state at s + theta h, theta (batch,) in [0, 1]."""
        ...


class Pair(Protocol):
    """An embedded pair: steps of one size a sample, with an error estimate, on a clock of its own."""

    @property
    def order(self) -> int:
        """The order of the local error that steers the step."""
        ...

    def clock(self, problem: Problem, t: float) -> float:
        """The clock at time t."""
        ...

    def time(self, problem: Problem, s: Tensor) -> Tensor:
        """The times of clocks s (batch,)."""
        ...

    def evaluate(self, problem: Problem, x: Tensor, s: Tensor) -> Tensor:
        """What the pair combines, at states x and clocks s (batch,)."""
        ...

    def first_step(self, evaluate: Evaluate, norm: Norm, x: Tensor, s: Tensor, k: Tensor, span: float) -> Tensor:
        """A first step size per sample, > 0, from the evaluation k at the start."""
        ...

    def attempt(
        self, evaluate: Evaluate, problem: Problem, x: Tensor, s: Tensor, h: Tensor, k: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]:
        """(result, error estimates, evaluation at the result or None, evaluations) of steps h (batch,)."""
        ...

    def size(self, norms: list[Tensor]) -> Tensor:
        """The error of each sample from the norms of the estimates."""
        ...

    @property
    def dense(self) -> Interpolant | None:
        """What interpolates inside a step; None where nothing does."""
        ...


class Solver(ABC):
    """A method. Solvers are immutable; everything that changes in a solve is in its `Stepper`.

    Attributes:
        name: for tables and messages.
        view: "drift" (any problem) or "transition" (the reversal of a GaussianSDE).
    """

    name: str
    view: View = "drift"

    @abstractmethod
    def check(self, problem: Problem) -> None:
        """Refuse a problem that this method cannot solve.

        Raises:
            ValueError: the problem lacks the view, or its noise does not fit.
        """

    @abstractmethod
    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        """A stepper over `grid` for states like `x`."""

    def draws_noise(self, problem: Problem) -> bool:
        """Whether a solve of `problem` needs a seed."""
        return problem.stochastic

    @property
    def pair(self) -> Pair | None:
        """The embedded pair with which the method solves to a tolerance; None if it has none."""
        return None


def per_row(v: Tensor, x: Tensor) -> Tensor:
    """One value a sample (batch,), shaped to broadcast against x (batch, *event)."""
    return v.reshape(-1, *[1] * (x.ndim - 1))


class LinearSolver(Solver):
    """A method whose every state is a linear combination: on a fixed grid it is a `Plan`."""

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "plan" in vars(cls):
            cls.plan = _on_checked_grid(cls.plan)  # type: ignore[method-assign]

    @abstractmethod
    def plan(self, problem: Problem, grid: Tensor) -> Plan:
        """All coefficients of all steps on `grid`, in float64, before the first model call.

        Whatever method a subclass gives is called with a problem and a grid that `solve` would take, float64 on the
        CPU; users may give a list of times.
        """

    def plan_key(self, problem: Problem) -> Hashable | None:
        """What `plan` reads of a problem, as a key to keep plans by; None where it may change unseen."""
        return reversal_key(problem)

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        plan = kept_plan(self, self.plan_key(problem), grid, lambda: self.plan(problem, grid))
        return plan.stepper(problem, x, grid, noise)


_Method = TypeVar("_Method", bound=Callable[..., Any])


_IN_A_PLAN: ContextVar[bool] = ContextVar("_IN_A_PLAN", default=False)
"""Whether a plan asks others for parts of itself: on a grid that was checked, or on a clock that is no time."""


def _on_checked_grid(plan: _Method) -> _Method:
    """The method `plan`, which refuses what is no problem and no grid of its times."""

    @functools.wraps(plan)
    def planned(self: Solver, problem: Problem, grid: Tensor) -> Plan:
        from sdeflow.solve_input import checked_problem_grid

        made: Plan
        if _IN_A_PLAN.get():
            made = plan(self, problem, grid)
            return made
        grid = checked_problem_grid(problem, grid)
        token = _IN_A_PLAN.set(True)
        try:
            made = plan(self, problem, grid)
        finally:
            _IN_A_PLAN.reset(token)
        return made

    return planned  # type: ignore[return-value]


def reversal_key(problem: Problem) -> Hashable | None:
    """The process, eta and direction of a reversal, if they cannot change."""
    if isinstance(problem, ReverseSDE) and constant(problem.process) and constant(problem.eta):
        return problem.process, problem.eta, problem.direction
    return None


def kept_plan(solver: Solver, made_for: Hashable | None, grid: Tensor, make: Callable[[], Plan]) -> Plan:
    """The plan of an unchangeable solver for what `made_for` says, kept for the next solve on this grid."""
    key = None if made_for is None or not constant(solver) else (solver, made_for, bits(grid))
    return _PLANS.get(key, make)


_PLANS: Kept[Plan] = Kept(64)


def refuse_noise(name: str, problem: Problem) -> None:
    """Deterministic methods integrate no noise: a problem with some is an error, not a silent ODE."""
    if problem.stochastic:
        raise ValueError(
            f"{name} is deterministic and the problem has noise: solve the probability flow "
            "(sde.probability_flow(model), or eta=0), or use a stochastic solver such as EulerMaruyama"
        )


def semilinear(name: str, problem: Problem) -> ReverseSDE:
    """The problem as the reversal of a GaussianSDE, which the transition view needs."""
    if not isinstance(problem, ReverseSDE):
        raise ValueError(
            f"{name} needs the transition view of a problem: expected sde.reverse(model) of a GaussianSDE, "
            f"got {type(problem).__name__}: use a solver of the drift view, such as RK45 or EulerMaruyama"
        )
    _ = problem.gaussian
    return problem
