"""Samplers by the names of their papers that are points of the families here: each a line of data."""

from __future__ import annotations

from typing import Literal

from sdeflow.solvers.adams import Adams
from sdeflow.solvers.exponential_rk import ExponentialRK
from sdeflow.solvers.in_variable import InVariable
from sdeflow.solvers.runge_kutta import RK4, Heun, RungeKutta
from sdeflow.solvers.tableaus import KUTTA3

Start = Literal["ramp", "runge-kutta"]
"""How a multistep method begins; see `Adams`."""


def IPNDM(order: int = 4, *, start: Start = "ramp") -> InVariable:
    """iPNDM of order 1 to 4: Adams-Bashforth on eps in x/alpha (Zhang and Chen 2023, DEIS, appendix H).

    With the weights of the grid: the published constants (3/2, -1/2; 23, -16, 5; ...) are those of equal steps, and
    of order 2 at most on any other grid.
    """
    return InVariable(Adams(order, start=start), "x/alpha", label=f"IPNDM({order})")


def PNDM() -> InVariable:
    """PNDM: Adams-Bashforth of order 4 on eps in x/alpha, its first three steps by Runge-Kutta, 3 calls more each.

    (Liu et al. 2022, PNDM, equations 11 and 12; with the weights of the grid.)
    """
    return InVariable(Adams(4, start="runge-kutta"), "x/alpha", label="PNDM")


def LMS(order: int = 4, *, start: Start = "ramp") -> InVariable:
    """The linear multistep sampler of k-diffusion: Adams-Bashforth in the clock sigma/alpha, integrated exactly."""
    return InVariable(Adams(order, start=start), "x/alpha", label=f"LMS({order})")


def DPM2() -> ExponentialRK:
    """DPM-2: the midpoint in lam, one step of DPM-Solver-2 as published (Lu et al. 2022, DPM-Solver, algorithm 1)."""
    return ExponentialRK(2, "eps", "DPM2", "midpoint")


def RhoRK(order: int = 2) -> InVariable:
    """DEIS's rho-RK: Runge-Kutta in x/alpha; 2 is Heun (EDM's), 3 Kutta's, 4 the classical method.

    (Zhang and Chen 2023, DEIS, section 3.3 and appendix B.2.)
    """
    methods = {2: Heun, 3: lambda: RungeKutta(KUTTA3), 4: RK4}
    if order not in methods:
        raise ValueError(f"RhoRK: expected order 2, 3 or 4, got {order!r}")
    return InVariable(methods[order](), "x/alpha", label=f"RhoRK({order})")


def StraightABM(order: int = 4, *, start: Start = "ramp") -> InVariable:
    """Adams-Bashforth-Moulton in the straight variable x/(alpha + sigma): predictor of `order`, corrector above it."""
    return InVariable(Adams(order, corrector=True, start=start), "straight", label=f"StraightABM({order})")
