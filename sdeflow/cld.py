"""Critically damped Langevin diffusion: data with a velocity that alone is noised."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import checked_class
from sdeflow.linear import LinearSDE
from sdeflow.noise import PRIOR, Noise


@checked_class
class CLD(LinearSDE):
    """Critically damped Langevin diffusion on pairs (x, v) of data and velocity, events (2, *data):

        d[x; v] = beta [[0, 1/M], [-1, -Gamma/M]] [x; v] dt + [0; sqrt(2 Gamma beta)] dW,   Gamma = 2 sqrt(M)

    (Dockhorn, Vahdat and Kreis 2022, Score-based generative modeling with critically-damped Langevin diffusion,
    equation 5.) Stationary law x ~ N(0, 1), v ~ N(0, M); noise enters the velocity alone.

    Args:
        beta: a positive number, or a function of a float64 tensor of times.
        gamma: the friction Gamma; None for the critical 2 sqrt(M), where F has a double eigenvalue.
        mass: M.
        t0, t1: the span.
        gamma0: velocities at t0 are N(0, gamma0 M), independent of the data.
        t_min: where sampling ends; None for t0 + (t1 - t0)/1000.

    Raises:
        ValueError: a number that is not positive, or a function beta without noise.
    """

    def __init__(
        self,
        beta: float | Callable[[Tensor], Any] = 4.0,
        gamma: float | None = None,
        mass: float = 0.25,
        t0: float = 0.0,
        t1: float = 1.0,
        *,
        gamma0: float = 0.04,
        t_min: float | None = None,
    ) -> None:
        numbers = {"mass": mass, "gamma0": gamma0}
        numbers |= {} if callable(beta) else {"beta": beta}
        numbers |= {} if gamma is None else {"gamma": gamma}
        for name, value in numbers.items():
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"CLD: expected {name} > 0, got {value!r}")
        self.beta, self.mass, self.gamma0 = beta, float(mass), float(gamma0)
        self.gamma = 2 * math.sqrt(mass) if gamma is None else float(gamma)
        a = torch.tensor([[0.0, 1 / mass], [-1.0, -self.gamma / mass]], dtype=torch.float64)
        g = torch.tensor([0.0, math.sqrt(2 * self.gamma)], dtype=torch.float64)
        if callable(beta):
            rate = beta

            def at(t: Tensor) -> Tensor:
                return torch.as_tensor(rate(t), dtype=torch.float64)

            super().__init__(
                lambda t: at(t)[..., None, None] * a, lambda t: torch.sqrt(at(t))[..., None] * g, t0, t1, t_min=t_min
            )
        else:
            super().__init__(beta * a, math.sqrt(beta) * g, t0, t1, t_min=t_min)

    def __repr__(self) -> str:
        return f"CLD(beta={self.beta!r}, gamma={self.gamma:g}, mass={self.mass:g}, t0={self.t0:g}, t1={self.t1:g})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CLD):
            return NotImplemented
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("beta", "gamma", "mass", "gamma0", "t0", "t1", "t_min")
        )

    __hash__ = LinearSDE.__hash__

    @property
    def start_covariance(self) -> Tensor:
        """diag(0, gamma0 M): data are points with a velocity of their own."""
        return torch.tensor([[0.0, 0.0], [0.0, self.gamma0 * self.mass]], dtype=torch.float64)

    def join(self, data: Tensor, velocity: Tensor) -> Tensor:
        """States (batch, 2, *data) of data and velocities (batch, *data)."""
        if data.shape != velocity.shape:
            raise ValueError(
                f"expected velocities of the shape of data, {tuple(data.shape)}, got {tuple(velocity.shape)}"
            )
        return torch.stack([data, velocity], dim=1)

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """(data, velocity), (batch, *data) each, of states (batch, 2, *data)."""
        self._check_event(state)
        return state[:, 0], state[:, 1]

    def start(self, data: Tensor, seed: int, *, index: int | Tensor | None = None) -> Tensor:
        """States at t0: `data` (batch, *data) with velocities drawn from N(0, gamma0 M)."""
        noise = Noise(seed, data.shape[0], index=index, device=data.device)
        velocity = noise.normal(PRIOR, 1, data.shape[1:], data.dtype)
        return self.join(data, math.sqrt(self.gamma0 * self.mass) * velocity)
