"""The reversible Heun method, for Stratonovich equations and for ordinary ones: a solve that can be undone exactly.

(Kidger, Foster, Li and Lyons 2021, Efficient and accurate gradients for neural SDEs, algorithms 1 and 2.) It carries a
second state z, equal to y at the start, and with I_n = f(z_n, t_n) h + G(z_n, t_n) W, I'_n = f(z_{n+1}, t_{n+1}) h +
G(z_{n+1}, t_{n+1}) W steps by

    z_{n+1} = 2 y_n - z_n + I_n                y_{n+1} = y_n + 1/2 (I_n + I'_n)

one evaluation a step, and one more at the start. The same evaluations give the step back:

    z_n = 2 y_{n+1} - z_{n+1} - I'_n           y_n = y_{n+1} - 1/2 (I_n + I'_n).

Stability: on y' = m y the difference y - z neither grows nor decays only for hm in [-i, i]; where the solution decays
it grows about as fast, from the O(h^2) it starts with (section 4 of the paper). It is made for gradients of models
that are trained through a solve, not for stiff problems or many time constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sdeflow.calculus import NoiseKind, noise_kind
from sdeflow.noise import Noise
from sdeflow.sde import SDE, Problem, noise_shape
from sdeflow.solvers.base import Memory, Pull, Solver, Stepper
from sdeflow.solvers.stochastic import Terms
from sdeflow.times import Each


@dataclass(frozen=True)
class ReversibleHeun(Solver):
    """The reversible Heun method: z' = 2 y - z + I(z); y' = y + 1/2 (I(z) + I(z')), I the increment of the equation.

    Order 2 on ordinary equations; of the Stratonovich equation strong order 1 for additive noise, 1/2 else. One
    drift a step and one at the start. With `solve(..., gradient="adjoint")` its gradients are those of the steps that
    were made, exact to rounding, in memory that does not grow with their number.

    Raises:
        ValueError: as `solve`.
    """

    name = "ReversibleHeun"

    @property
    def order(self) -> int:
        """On ordinary equations."""
        return 2

    def order_for(self, kind: NoiseKind) -> float:
        """The strong order for a kind of noise."""
        return 1.0 if kind == "additive" else 0.5

    def check(self, problem: Problem) -> None:
        if problem.stochastic and not isinstance(problem, SDE):
            raise ValueError(f"{self.name} needs an SDE or an ODE, got {type(problem).__name__}")

    def stepper(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> Stepper:
        return _Run(problem, x, grid, noise)


class _Node(NamedTuple):
    """The evaluation at one time: f and G at z."""

    z: Tensor
    f: Tensor
    g: Tensor | None


class _Run:
    """The steps on a grid, forwards and back."""

    def __init__(self, problem: Problem, x: Tensor, grid: Tensor, noise: Noise | None) -> None:
        # 16-bit states are stepped in float32: their 8 to 11 bits would swallow the increments
        self._work = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        self._h, self._dtype, self.calls = torch.diff(grid).tolist(), x.dtype, 0
        if noise is None:
            self._evaluate = problem.evaluator("drift", grid)
            self._terms: Terms | None = None
        else:
            assert isinstance(problem, SDE)
            event, self._times = noise_shape(problem, x, grid[0])[1:], Each(grid)
            self._terms = Terms(problem, "stratonovich", noise_kind(problem, x, grid[0]))
            self._walk = noise.walk(grid, event, self._work)
        self._y = self._returned = torch.empty(0)
        self._node = _Node(self._y, self._y, None)

    def step(self, i: int, x: Tensor) -> Tensor:
        if x is not self._returned:  # the start, or a state that somebody changed
            self._y = x.to(self._work)
            self._node = self._at(i, self._y)
        w = self._noise(i)
        before = self._increment(i, self._node, w)
        self._node = self._at(i + 1, torch.add(before - self._node.z, self._y, alpha=2.0))
        self._y = torch.add(self._y, before + self._increment(i, self._node, w), alpha=0.5)
        self._returned = self._y.to(self._dtype)
        return self._returned

    def remember(self) -> Memory:
        if not self._y.numel():
            return {}
        node = self._node
        memory: Memory = {"y": self._y, "z": node.z, "f": node.f}
        return memory if node.g is None else {**memory, "g": node.g}

    def restore(self, memory: Memory, x: Tensor) -> None:
        if memory:
            self._y, self._returned = memory["y"], x
            self._node = _Node(memory["z"], memory["f"], memory.get("g"))
        else:
            self._y = self._returned = torch.empty(0)

    def gradient(self, given: dict[int, Tensor], pull: Pull) -> Tensor:
        last = len(self._h)
        y, z = self._y.detach(), self._node.z.detach()
        a, b = given[last].to(self._work), torch.zeros_like(y)  # the cotangents of y and z at node k
        a_next, b_next = torch.zeros_like(y), b  # at node k + 1
        w_next: Tensor | None = None
        for k in reversed(range(last + 1)):
            w = self._noise(k - 1) if k > 0 else None
            h, h_next = self._h[k - 1] if k > 0 else 0.0, self._h[k] if k < last else 0.0
            # the increments of node k: its last half of step k - 1; its first half of y and all of z of step k
            before, after = 0.5 * a, torch.add(b_next, a_next, alpha=0.5)
            with torch.enable_grad():
                node = self._at(k, z.detach().requires_grad_())
                outputs, cotangents = [node.f], [h * before + h_next * after]
                if self._terms is not None:
                    assert node.g is not None
                    outputs += [self._terms.apply(node.g, v) for v in (w, w_next) if v is not None]
                    cotangents += [c for v, c in ((w, before), (w_next, after)) if v is not None]
            b = b + pull(outputs, node.z, cotangents)
            node = _Node(node.z.detach(), node.f.detach(), None if node.g is None else node.g.detach())
            if k < last:  # the rest of step k undone
                y = torch.sub(y, self._increment(k, node, w_next), alpha=0.5)
            if k == 0:
                break
            rest = self._increment(k - 1, node, w)
            z = torch.add(-z - rest, y, alpha=2.0)
            y = torch.sub(y, rest, alpha=0.5)
            a_next, b_next, w_next = a, b, w
            a, b = torch.add(a, b, alpha=2.0), -b
            if k - 1 in given and k > 1:
                a = a + given[k - 1].to(self._work)
        start = (a + b).to(self._dtype)
        return start + given[0] if 0 in given else start

    def _noise(self, i: int) -> Tensor | None:
        if self._terms is None:
            return None
        return self._terms.lift(self._walk(i).w, self._returned)

    def _at(self, k: int, z: Tensor) -> _Node:
        self.calls += 1
        if self._terms is None:
            state = z if self._work == self._dtype else z.to(self._dtype)
            return _Node(z, self._evaluate(k, state).to(self._work), None)
        t = self._times[k]
        return _Node(z, self._terms.drift(z, t), self._terms.diffusion(z, t))

    def _increment(self, i: int, node: _Node, w: Tensor | None) -> Tensor:
        """f h + G W, over step i."""
        f = node.f * self._h[i]
        if w is None:
            return f
        assert self._terms is not None
        assert node.g is not None
        return self._terms.add(f, node.g, w)
