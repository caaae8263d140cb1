"""Solving the probability flow so that the solve can be undone exactly, at any number of steps.

The coupling of McCallum and Foster (2024, Efficient, accurate and stable gradients for neural ODEs) makes a
reversible method of any one-step method y + Psi_h(y, u). It carries a second state z, both equal at the start:

    y_{n+1} = l y_n + (1 - l) z_n + Psi_h(z_n, u_n)            z_{n+1} = z_n - Psi_{-h}(y_{n+1}, u_{n+1})

and, solved from the last line up, the same evaluations at the same arguments give the step back:

    z_n = z_{n+1} + Psi_{-h}(y_{n+1}, u_{n+1})                 y_n = [y_{n+1} - (1 - l) z_n - Psi_h(z_n, u_n)]/l

Two evaluations of Psi a step. Order: Psi_{-h}(y(u + h), u + h) = y(u) - y(u + h) + O(h^{p+1}), so one step from y = z
on the solution leaves both within O(h^{p+1}), and the method has the order p of Psi.

Stability: on y' = m y, with P = R(hm) - 1 and Q = R(-hm) - 1, R that of Psi, the step is the matrix

    [ l          1 - l + P           ]
    [ -l Q       1 - Q (1 - l + P)   ]     of determinant l and trace 1 + l - Q (1 - l + P).

Where the solution grows the roots are about that growth and l over it. Where it decays both are within 1 only for
0 < Q (1 - l + P) < 2 (1 + l), with Euler's method h|m| < 1 - l: beyond it y - z grows about as fast
as the solution decays, from the O(h^{p+1}) it starts with. Leapfrog does the same, and with it BELM (Wang et al. 2024),
which it is on equal steps of sigma/alpha. Hence the default variable, "angle": there the flow turns noise into data
of about the same size, while in "x/alpha" it shrinks by alpha/sigma down to the data, and in "x/sigma" the
other way. Undoing a step divides the determinant by l: rounding errors grow by the decay undone, and 1/l a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.model import Model
from sdeflow.noise import Noise
from sdeflow.reverse import ReverseSDE
from sdeflow.sde import Problem
from sdeflow.solvers.base import Memory, Pull, Solver, Stepper, View, refuse_noise, semilinear
from sdeflow.solvers.embedded import combine
from sdeflow.solvers.runge_kutta import Midpoint, RungeKutta
from sdeflow.variables import variable

if TYPE_CHECKING:
    from sdeflow.solve_input import Grid


@dataclass(frozen=True)
class Coupled:
    """Both states of a reversible solve at a grid's end: all that it takes to go back.

    Attributes:
        x: states (batch, *event), what the method computes.
        other: its second state, near x; of the shape of x.
        grid: times of the solve that arrived here, float64 (steps + 1,).
        nfe: model calls of that solve.
    """

    x: Tensor
    other: Tensor
    grid: Tensor
    nfe: int


@checked_class
@dataclass(frozen=True)
class Reversible(Solver):
    """The reversible coupling of a Runge-Kutta method, run in a variable of the flow.

    Through `solve` it is a method for the flow like others; `reversible_encode` and `reversible_decode` carry its
    second state, and undo each other to rounding. Order that of `base`; twice its calls a step.

    Args:
        base: an explicit Runge-Kutta method; Midpoint unless given.
        name_of_variable: "angle", "straight", "x/alpha", "x/sigma" or "x" (`sdeflow.variables`).
        coupling: l in (0, 1]: smaller ones bind the states more tightly, and amplify rounding by 1/l a step undone.

    Raises:
        TypeError: base is no Runge-Kutta method.
        ValueError: an unknown variable, or a coupling outside (0, 1].
    """

    base: RungeKutta = field(default_factory=Midpoint)
    name_of_variable: str = "angle"
    coupling: float = 0.99
    view: View = "transition"

    def __post_init__(self) -> None:
        if not isinstance(self.base, RungeKutta):
            raise TypeError(f"Reversible: expected base as a Runge-Kutta method such as Midpoint(), got {self.base!r}")
        variable(self.name_of_variable)
        if not 0 < self.coupling <= 1:
            raise ValueError(f"Reversible: expected coupling in (0, 1], got {self.coupling!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"Reversible {self.base.name} in {self.name_of_variable}"

    @property
    def order(self) -> int:
        """That of the method it couples."""
        return self.base.order

    def check(self, problem: Problem) -> None:
        semilinear(self.name, problem)
        refuse_noise(self.name, problem)

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        return _Forward(_Run(self, semilinear(self.name, problem), x, grid))


def reversible_encode(
    model: Model | ReverseSDE,
    x: Tensor,
    *,
    solver: Reversible | None = None,
    steps: int | None = None,
    grid: Grid | None = None,
    t0: float | None = None,
    t1: float | None = None,
) -> Coupled:
    """The latents of data x (batch, *event) at t0, with what `reversible_decode` needs to give x back exactly.

    Records no gradients; states that overflow come back as they are, not finite.

    Args:
        model: a `Model` of a GaussianSDE, or its probability flow.
        solver: `Reversible()` unless given.
        steps, grid: as in `solve`; a grid of times runs up, and replaces t0 and t1.
        t0, t1: as in `encode`.

    Raises:
        ValueError, TypeError: as `encode`.
    """
    from sdeflow.coding import checked_states, flow_of, span_of
    from sdeflow.solve_input import grid_of

    flow = flow_of(model)
    solver = Reversible() if solver is None else solver
    if not isinstance(solver, Reversible):
        raise TypeError(f"expected a Reversible solver, got {solver!r}")
    solver.check(flow)
    checked_states(flow, x)
    flow.check_batch(len(x))
    of_times = grid is not None and not callable(grid)
    if of_times and (t0 is not None or t1 is not None):
        raise ValueError("expected a grid of times, or t0 and t1, not both")
    ts = grid_of(flow, solver, steps, grid, None if of_times else span_of(flow, t0, t1))
    if float(ts[1]) < float(ts[0]):
        raise ValueError("expected a grid that runs up to the latents; to start from noise use `solve`")
    with torch.no_grad():
        return _Run(solver, flow, x, ts).forward(x)


def reversible_decode(model: Model | ReverseSDE, latent: Coupled, *, solver: Reversible | None = None) -> Coupled:
    """The solve that made `latent` undone: x at the start of its grid, with the second state there.

    Args:
        model, solver: those of `reversible_encode`.
        latent: what it returned; with other states of the same shapes, the data that these are the latents of.

    Raises:
        ValueError, TypeError: arguments that are not of that kind.
    """
    from sdeflow.coding import checked_states, flow_of

    flow = flow_of(model)
    solver = Reversible() if solver is None else solver
    if not isinstance(solver, Reversible) or not isinstance(latent, Coupled):
        raise TypeError(f"expected a Coupled latent and a Reversible solver, got {latent!r} and {solver!r}")
    solver.check(flow)
    checked_states(flow, latent.x)
    if latent.other.shape != latent.x.shape or latent.other.dtype != latent.x.dtype:
        raise ValueError(
            f"expected both states of one shape and dtype, got {tuple(latent.x.shape)} {latent.x.dtype} and "
            f"{tuple(latent.other.shape)} {latent.other.dtype}"
        )
    flow.check_batch(len(latent.x))
    with torch.no_grad():
        return _Run(solver, flow, latent.x, latent.grid).back(latent)


class _Run:
    """The steps of a reversible method on a grid, forwards and back."""

    def __init__(self, solver: Reversible, flow: ReverseSDE, x: Tensor, grid: Tensor) -> None:
        process, chosen = flow.gaussian, variable(solver.name_of_variable)
        clock = chosen.clock(process, grid)
        if not bool(torch.isfinite(clock).all()):
            raise ValueError(
                f"{solver.name}: the clock is infinite on the grid (from t = {float(grid[0]):g} to "
                f"{float(grid[-1]):g}): start or end short of it, or choose another variable"
            )
        table = solver.base.tableau
        self.stages = len(table.b) - 1 if table.first_same_as_last else len(table.b)
        self.a = [[float(v) for v in row] for row in table.a[: self.stages]]
        self.b = [float(v) for v in table.b[: self.stages]]
        h = torch.diff(clock)
        c = torch.tensor([float(v) for v in table.c[: self.stages]], dtype=torch.float64)
        # of Psi_h from each step's start and of Psi_{-h} from its end: (steps, 2, stages)
        base, end = torch.stack([clock[:-1], clock[1:]], 1), torch.stack([clock[1:], clock[:-1]], 1)
        points = base[..., None] + torch.stack([h, -h], 1)[..., None] * c
        # grid points as they are, not through the clock and back
        here, there = torch.stack([grid[:-1], grid[1:]], 1), torch.stack([grid[1:], grid[:-1]], 1)
        inner = (c > 0) & (c < 1)
        times = torch.where(c == 0, here[..., None], there[..., None]).expand(points.shape).clone()
        times[..., inner] = chosen.time(process, points[..., inner])
        points = torch.where(c == 0, base[..., None], torch.where(c == 1, end[..., None], points))
        self.scale = chosen.scale(process, times).tolist()
        ends = chosen.scale(process, grid)
        self.first, self.last = float(ends[0]), float(ends[-1])
        self.at_grid = ends.tolist()
        self.h, self.steps, self.grid = h.tolist(), len(h), grid
        self.l = float(solver.coupling)
        self.dtype = x.dtype
        # 16-bit states are combined in float32: their 8 to 11 bits would swallow the increments
        self.work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        target = chosen.name if chosen.name != "x" else "drift"
        self.evaluate = flow.evaluator(target, times.flatten())
        self.calls = 0

    def psi(self, i: int, back: int, y: Tensor) -> Tensor:
        """The increment Psi_h(y) from the start of step i, or (back = 1) Psi_{-h}(y) from its end."""
        h, evaluations = (-self.h[i] if back else self.h[i]), list[Tensor]()
        for s in range(self.stages):
            point = y if not any(self.a[s]) else y + h * combine(self.a[s], evaluations)
            row = (2 * i + back) * self.stages + s
            state = (self.scale[i][back][s] * point).to(self.dtype)
            evaluations.append(self.evaluate(row, state).to(self.work))
            self.calls += 1
        return h * combine(self.b, evaluations)

    def up(self, i: int, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Step i."""
        y = self.l * y + (1 - self.l) * z + self.psi(i, 0, z)
        return y, z - self.psi(i, 1, y)

    def down(self, i: int, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Step i undone."""
        z = z + self.psi(i, 1, y)
        return (y - (1 - self.l) * z - self.psi(i, 0, z)) / self.l, z

    def forward(self, x: Tensor) -> Coupled:
        y = z = x.to(self.work) / self.first
        for i in range(self.steps):
            y, z = self.up(i, y, z)
        return self._coupled(y, z, self.last)

    def back(self, end: Coupled) -> Coupled:
        y, z = (v.to(self.work) / self.last for v in (end.x, end.other))
        for i in reversed(range(self.steps)):
            y, z = self.down(i, y, z)
        return self._coupled(y, z, self.first)

    def gradient(self, y: Tensor, z: Tensor, given: dict[int, Tensor], pull: Pull) -> Tensor:
        """The steps undone from both states at the end, each followed by its transpose; see `Undoable`."""
        none = torch.zeros_like(y)
        a, b = given[self.steps].to(self.work) * self.last, none  # the cotangents of y and z
        for i in reversed(range(self.steps)):
            at, back = self._recorded(i, 1, y)
            a = a + pull([back], at, [-b])
            z = z + back.detach()
            at, ahead = self._recorded(i, 0, z)
            y = (y - (1 - self.l) * z - ahead.detach()) / self.l
            b = b + (1 - self.l) * a + pull([ahead], at, [a])
            a = self.l * a
            if i in given and i > 0:
                a = a + given[i].to(self.work) * self.at_grid[i]
        start = ((a + b) / self.first).to(self.dtype)
        return start + given[0] if 0 in given else start

    def _recorded(self, i: int, back: int, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            return leaf, self.psi(i, back, leaf)

    def _coupled(self, y: Tensor, z: Tensor, scale: float) -> Coupled:
        return Coupled((scale * y).to(self.dtype), (scale * z).to(self.dtype), self.grid, self.calls)


class _Forward:
    """The stepper of `solve`: it keeps the second state, and starts it anew where somebody changed the first."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._y = self._z = self._returned = torch.empty(0)

    @property
    def calls(self) -> int:
        return self._run.calls

    def step(self, i: int, x: Tensor) -> Tensor:
        run = self._run
        if x is not self._returned:
            self._y = self._z = x.to(run.work) / run.at_grid[i]
        self._y, self._z = run.up(i, self._y, self._z)
        self._returned = (run.at_grid[i + 1] * self._y).to(run.dtype)
        return self._returned

    def remember(self) -> Memory:
        return {"y": self._y, "z": self._z} if self._y.numel() else {}

    def restore(self, memory: Memory, x: Tensor) -> None:
        if memory:
            self._y, self._z, self._returned = memory["y"], memory["z"], x
        else:
            self._y = self._z = self._returned = torch.empty(0)

    def gradient(self, given: dict[int, Tensor], pull: Pull) -> Tensor:
        return self._run.gradient(self._y, self._z, given, pull)
