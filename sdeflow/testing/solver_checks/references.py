"""Grids, and the states at their ends by methods of higher order or on the path itself."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from sdeflow import grids
from sdeflow.noise import Noise, SamePath
from sdeflow.processes import VP
from sdeflow.reverse import ReverseSDE
from sdeflow.solve import solve
from sdeflow.solvers.runge_kutta import DOP853
from sdeflow.solvers.stochastic_rk import SRA3
from sdeflow.testing.solver_checks.problems import MIXTURE, states

F64 = torch.float64
PATHS = 256
"""Paths of strong orders: a slope over a factor of 8 in the steps is then good to about 0.05."""
START, END = 0.8, 0.05
"""The span of VP's time: log(alpha/sigma) from -2.9 to 1.9, where nothing is at its limit yet."""


def rising(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps + 1, dtype=F64)


def falling(steps: int) -> Tensor:
    return torch.linspace(START, END, steps + 1, dtype=F64)


def uneven(start: float, end: float, steps: int) -> Tensor:
    share = torch.linspace(0, 1, steps + 1, dtype=F64)
    return start + (end - start) * (0.8 * share + 0.2 * share**2)


@lru_cache(maxsize=4)
def flow_case(start: float, end: float) -> tuple[ReverseSDE, Tensor, Tensor]:
    """(the flow of the mixture, states at `start`, at `end`)."""
    process = VP()
    flow = process.probability_flow(MIXTURE.model(process))
    x = states(6, 2, 2)
    with torch.no_grad():
        return flow, x, solve(flow, x, DOP853(), steps=192, grid=grids.uniform, t_span=(start, end)).x


@lru_cache(maxsize=4)
def well_case(seed: int, steps: int = 1024) -> tuple[Tensor, Tensor]:
    """(start, end) of `Well` by Taylor's scheme of strong order 1.5 (Kloeden and Platen 1992, section 10.4)."""
    walk = Noise(seed, PATHS, one_path=True).walk(
        torch.linspace(0, 1, steps + 1, dtype=F64), (1,), F64, areas=True
    )  # fmt: skip
    x, size = torch.full((PATHS, 1), 0.5, dtype=F64), 1 / steps
    for k in range(steps):
        t, (w, h) = k * size, walk(k)
        assert h is not None
        g, slope, integral = 0.7 * (1 + 0.5 * math.sin(3 * t)), 1.05 * math.cos(3 * t), size * (0.5 * w + h)
        f, f_x = x - x**3 + math.cos(3 * t), 1 - 3 * x**2
        second = -3 * math.sin(3 * t) + f * f_x - 3 * g * g * x
        x = x + f * size + g * w + f_x * g * integral + slope * (size * w - integral) + 0.5 * size**2 * second
    return torch.full((PATHS, 1), 0.5, dtype=F64), x


@lru_cache(maxsize=4)
def reversal_case(seed: int) -> tuple[ReverseSDE, Tensor, Tensor]:
    """(the reverse SDE of the mixture, start, end on the path of `seed` by SRA3)."""
    process = VP()
    problem = process.reverse(MIXTURE.model(process), 1.0)
    x = states(64, 2, 1)
    with torch.no_grad():
        return problem, x, solve(problem, x, SRA3(), grid=falling(512), noise=SamePath(seed)).x


@lru_cache(maxsize=4)
def whole_path(seed: int, width: int) -> Tensor:
    """W on [0, 1] of the path of `SamePath(seed)`."""
    return Noise(seed, PATHS, one_path=True).walk(rising(1), (width,), F64)(0).w.clone()
