"""A stabilised explicit method for stiff drifts with noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from sdeflow.calculus import NoiseKind
from sdeflow.checked import checked_class
from sdeflow.solvers.stochastic import H, StochasticSolver, Terms

_LEAST, _MOST = 1e-6, 1e4


@checked_class
@dataclass(frozen=True)
class SKROCK(StochasticSolver):
    """Second-kind stabilised Chebyshev method: an explicit Euler-Maruyama for drifts of rate about stages^2/h.

    With Q = G(x, t) W, w0 = 1 + damping/s^2, w1 = T_s(w0)/T_s'(w0), T the Chebyshev polynomials:

        K_1 = x + (w1/w0) h f(x + s w1/2 Q) + s w1/w0 Q,
        K_i = 2 w1 T_(i-1)/T_i h f(K_(i-1)) + 2 w0 T_(i-1)/T_i K_(i-1) - T_(i-2)/T_i K_(i-2),  K_0 = x,  x' = K_s.

    (Abdulle, Almuslimani and Vilmart 2018, Optimal explicit stabilized integrator of weak order 1 for stiff and
    ergodic SDEs, equation 9.) Stable in mean square for real rates up to (2 - 4/3 damping) s^2/h. Strong order 1/2
    (1 for additive noise), weak order 1; `stages` drifts and one diffusion a step, any noise.

    Args:
        stages: s >= 1; 1 is Euler-Maruyama with f at x + Q/2.
        damping: > 0.
    """

    stages: int = 5
    damping: float = 0.05
    strong: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= 10_000:
            raise ValueError(f"SKROCK: expected stages >= 1, got {self.stages!r} (at most 10000)")
        if not _LEAST <= self.damping <= _MOST:  # beyond, cosh overflows or acosh has no digits
            raise ValueError(f"SKROCK: expected damping > 0, from {_LEAST:g} to {_MOST:g}, got {self.damping!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"SKROCK({self.stages})"

    @cached_property
    def _table(self) -> tuple[float, float, list[float]]:
        """(w0, w1, T_0(w0) .. T_s(w0))."""
        s = self.stages
        w0 = 1 + self.damping / s**2
        angle = math.acosh(w0)
        values = [math.cosh(i * angle) for i in range(s + 1)]
        return w0, values[s] / (s * math.sinh(s * angle) / math.sinh(angle)), values

    def order_for(self, kind: NoiseKind) -> float:
        return 1.0 if kind == "additive" else 0.5

    def step(self, terms: Terms, x: Tensor, t: Tensor, h: H, w: Tensor, area: Tensor | None) -> Tensor:
        s, (w0, w1, values) = self.stages, self._table
        q = terms.apply(terms.diffusion(x, t), w)
        mu = w1 / w0
        before, now = x, x + (mu * h) * terms.drift(x + (0.5 * s * w1) * q, t) + (s * mu) * q
        c_before, c_now = 0.0, mu  # the times of the stages obey the same recursion
        for i in range(2, s + 1):
            ratio = values[i - 1] / values[i]
            mu, nu = 2 * w1 * ratio, 2 * w0 * ratio
            new = (mu * h) * terms.drift(now, t + c_now * h) + nu * now + (1 - nu) * before
            before, now = now, new
            c_before, c_now = c_now, mu + nu * c_now + (1 - nu) * c_before
        return now
